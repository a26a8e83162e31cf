// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests pinbuf from user space, inside a guest, as root; prints KTAP.
//!
//! It needs `pinbuf.ko` and `pinbuf_test_importer.ko` loaded and writes to a directory on a real
//! file system. After every subtest it checks that nothing is left behind: pins, charges,
//! descriptors, dma-bufs, module references.

mod compat32;
mod create;
mod discards;
mod discards_more;
mod discards_random;
mod errors;
mod fences;
mod fork;
mod held;
mod huge;
mod importer;
mod info;
mod leaks;
mod lifetime;
mod lists;
mod mapped;
mod mappings;
mod memlock;
mod mmap;
mod namespaces;
mod poison;
mod uffd;
mod vivid;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use pinbuf_test_harness::{report, Test};

/// Tests pinbuf inside a guest, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    /// Print the names of the subtests and do nothing
    #[arg(long)]
    list: bool,

    /// Run only subtests whose name contains one of these
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,

    /// Leave out subtests whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    without: Vec<String>,

    /// Do not check what a subtest left behind
    #[arg(long)]
    no_leak_checks: bool,

    /// Used by the tests themselves: what a program sees after execve
    #[arg(long, hide = true, value_name = "FD")]
    after_exec: Option<i32>,
}

fn tests() -> impl Iterator<Item = &'static Test> {
    [
        create::TESTS,
        discards::TESTS,
        discards_more::TESTS,
        discards_random::TESTS,
        info::TESTS,
        errors::TESTS,
        lists::TESTS,
        mapped::TESTS,
        mmap::TESTS,
        mappings::pages::TESTS,
        mappings::one_page::TESTS,
        mappings::blocks::TESTS,
        mappings::blocks_askew::TESTS,
        mappings::giga::TESTS,
        mappings::giga_across::TESTS,
        mappings::giga_twice::TESTS,
        poison::TESTS,
        importer::TESTS,
        fences::TESTS,
        huge::TESTS,
        memlock::TESTS,
        held::TESTS,
        namespaces::TESTS,
        fork::TESTS,
        lifetime::TESTS,
        leaks::TESTS,
        compat32::TESTS,
        uffd::TESTS,
        vivid::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(fd) = options.after_exec {
        return lifetime::after_exec(fd).map(|()| ExitCode::SUCCESS);
    }
    let chosen: Vec<&Test> = tests()
        .filter(|test| {
            let named = |parts: &[String]| parts.iter().any(|part| test.name.contains(part));
            (options.filter.is_empty() || named(&options.filter)) && !named(&options.without)
        })
        .collect();
    if options.list {
        for test in chosen {
            println!("{}", test.name);
        }
        return Ok(ExitCode::SUCCESS);
    }

    report(&chosen, !options.no_leak_checks)
}
