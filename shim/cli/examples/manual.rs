// SPDX-License-Identifier: MIT OR Apache-2.0

//! Writes the manual pages and the shells' completions of the command `pinbuf` to a directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// When the command line changed last.
const DATE: &str = "2026-11-28";

fn main() -> Result<()> {
    let directory: PathBuf = std::env::args_os()
        .nth(1)
        .context("usage: manual DIRECTORY")?
        .into();
    std::fs::create_dir_all(&directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut pinbuf_cli::command(), "pinbuf", &directory)?;
    }
    let mut command = pinbuf_cli::command().disable_help_subcommand(true);
    // Gives the subcommands the names of their pages.
    command.build();
    pages(&command, &directory)
}

/// The page of a command, and those of its subcommands.
fn pages(command: &Command, directory: &Path) -> Result<()> {
    let page = Man::new(command.clone())
        .date(DATE)
        .source(concat!("pinbuf ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut text = Vec::new();
    page.render(&mut text)?;
    // Before a list of values, clap_mangen writes line breaks around an empty line, which mandoc complains of.
    let text = String::from_utf8(text)?.replace(".br\n\n.br\n", ".br\n");
    std::fs::write(directory.join(page.get_filename()), text)?;
    command
        .get_subcommands()
        .filter(|inner| !inner.is_hide_set())
        .try_for_each(|inner| pages(inner, directory))
}
