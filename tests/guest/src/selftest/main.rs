// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests pinbuf from user space, inside a guest, as root; prints KTAP.
//!
//! It needs `pinbuf.ko` and `pinbuf_test_importer.ko` loaded and writes to a directory on a real
//! file system. After every subtest it checks that nothing is left behind: pins, charges,
//! descriptors, dma-bufs, module references.

#[cfg(target_arch = "aarch64")]
mod coherency;
mod compat32;
mod create;
mod discards;
mod discards_more;
mod discards_random;
mod discards_unsure;
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
mod memory_types;
mod mixed;
mod mmap;
#[cfg(target_arch = "aarch64")]
mod mte;
mod namespaces;
mod poison;
mod uffd;
mod vivid;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use pinbuf_test_harness::{Choice, Test};

/// Tests pinbuf inside a guest, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    choice: Choice,

    /// Used by the tests themselves: what a program sees after execve
    #[arg(long, hide = true, value_name = "FD")]
    after_exec: Option<i32>,
}

fn tests() -> impl Iterator<Item = &'static Test> + Clone {
    [
        create::TESTS,
        discards::TESTS,
        discards_more::TESTS,
        discards_random::TESTS,
        discards_unsure::TESTS,
        info::TESTS,
        errors::TESTS,
        lists::TESTS,
        mapped::TESTS,
        mixed::TESTS,
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
        #[cfg(target_arch = "aarch64")]
        coherency::TESTS,
        #[cfg(target_arch = "aarch64")]
        mte::TESTS,
        fences::TESTS,
        huge::TESTS,
        memlock::TESTS,
        memory_types::TESTS,
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
    match options.choice.of(tests())? {
        Some(chosen) => options.choice.report(&chosen),
        None => Ok(ExitCode::SUCCESS),
    }
}
