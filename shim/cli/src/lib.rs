// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf`: run programs written for udmabuf on pinbuf, find out why that does not work, look at
//! live buffers, and measure.

mod access;
mod apparmor;
mod bench;
mod command;
mod dmabuf;
mod doctor;
mod elf;
mod finding;
mod info;
mod process;
mod run;
mod security;
mod setup;
mod shim;
mod supervise;
mod text;
mod version;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Run programs on pinbuf, check the setup, list buffers, and measure.
#[derive(Debug, Parser)]
#[command(name = "pinbuf", version)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Run(run::Run),
    Doctor(doctor::Doctor),
    Info(info::Info),
    Watch(watch::Watch),
    Bench(bench::Bench),
}

/// The status for errors of `pinbuf` itself, as with env(1) and timeout(1): those of the command
/// that it runs are the command's.
const OWN_ERROR: u8 = 125;

/// The command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    // `--version` reports the module's version too, which is only known at run time.
    let matches = Arguments::command()
        .long_version(&*Box::leak(version::text().into_boxed_str()))
        .get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match arguments.action {
        Action::Run(run) => run.run(),
        Action::Doctor(doctor) => doctor.run(),
        Action::Info(info) => info.run(),
        Action::Watch(watch) => watch.run(),
        Action::Bench(bench) => bench.run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            text::complain!("{error:#}");
            ExitCode::from(OWN_ERROR)
        }
    }
}
