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
mod throttled;
mod vfio;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use pinbuf_test_harness::support::frames;
use pinbuf_test_harness::{Choice, Test};

/// Tests pinbuf with every kind of memory, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    choice: Choice,
}

fn tests() -> impl Iterator<Item = &'static Test> + Clone {
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
        throttled::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    match options.choice.of(tests())? {
        Some(chosen) => options.choice.report(&chosen),
        None => Ok(ExitCode::SUCCESS),
    }
}
