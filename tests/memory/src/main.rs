// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests pinbuf with every kind of memory, and with pages that must be moved first, as root in guests that are
//! booted for it; prints KTAP.
//!
//! Each theme needs a guest of its own kind, which its row in `qemu-scripts/src/test/runs.rs` makes: a test
//! that lacks what it needs fails.

mod cma;
mod common;
mod discard;
mod holders;
mod kinds;
mod late;
mod movable;
mod owners;
mod passing;
mod pinners;
mod populate;
mod promises;
mod safety;
mod swap;
mod vfio;

use std::process::ExitCode;

use anyhow::{bail, Result};
use clap::Parser;

use pinbuf_test_harness::support::frames;
use pinbuf_test_harness::{report, Test};

/// Tests pinbuf with every kind of memory, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    /// Run these themes only: the part of a name before its dot
    themes: Vec<String>,

    /// Print the names of the subtests and do nothing
    #[arg(long)]
    list: bool,

    /// Of these, run only subtests whose name contains one of these
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,

    /// Do not look for what a subtest left behind
    #[arg(long)]
    no_leak_checks: bool,
}

impl Options {
    fn wants(&self, test: &Test) -> bool {
        (self.themes.is_empty() || self.themes.iter().any(|wanted| wanted == test.theme()))
            && (self.filter.is_empty() || self.filter.iter().any(|part| test.name.contains(part)))
    }
}

/// The part of a subtest's name before its dot.
trait Themed {
    /// Its theme.
    fn theme(&self) -> &str;
}

impl Themed for Test {
    fn theme(&self) -> &str {
        self.name.split('.').next().unwrap_or_default()
    }
}

fn tests() -> impl Iterator<Item = &'static Test> {
    [
        kinds::TESTS,
        populate::TESTS,
        movable::TESTS,
        cma::TESTS,
        cma::spare::TESTS,
        passing::TESTS,
        pinners::TESTS,
        safety::TESTS,
        discard::TESTS,
        promises::TESTS,
        late::TESTS,
        owners::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    for theme in &options.themes {
        if !tests().any(|test| test.theme() == theme) {
            bail!("there is no theme `{theme}`");
        }
    }
    let chosen: Vec<&Test> = tests().filter(|test| options.wants(test)).collect();
    if options.list {
        for test in chosen {
            println!("{}", test.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    report(&chosen, !options.no_leak_checks)
}
