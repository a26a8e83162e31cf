// SPDX-License-Identifier: MIT OR Apache-2.0

//! Everything that builds pinbuf for a kernel, boots it in QEMU guests, and tests it there.
//!
//! - `debian`: the archive, the kernels in it, and trees of its packages
//! - `kernel`: a kernel that can be booted, and the module for it
//! - `image`: what a guest's disks and initramfs hold
//! - `guest`: one guest, from its start to its end
//! - `test`: the rows that run in guests, and those that run on the host
//! - `command`: the other commands

mod cache;
mod cleanup;
mod command;
mod debian;
mod guest;
mod image;
mod kernel;
mod paths;
mod test;
mod ui;

use clap::{Parser, Subcommand};

use crate::command::{bench, deb, demo, module, vm};

/// The status if this program itself failed, as opposed to the command that it ran.
const FAILED: i32 = 97;

#[derive(Debug, Parser)]
#[command(name = "guest", about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Vm(vm::Vm),
    Module(module::Module),
    Test(test::Test),
    Demo(demo::Demo),
    Bench(bench::Bench),
    Deb(deb::Deb),
}

/// The number of compilations at the same time.
fn jobs() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

fn main() {
    let task = Cli::parse().command;
    let result = cleanup::on_signals().and_then(|()| match task {
        Task::Vm(vm) => vm.run(),
        Task::Module(module) => module.run(),
        Task::Test(test) => test.run(),
        Task::Demo(demo) => demo.run(),
        Task::Bench(bench) => bench.run(),
        Task::Deb(deb) => deb.run(),
    });
    std::process::exit(match result {
        Ok(status) => status,
        Err(error) => {
            cleanup::restore_terminal();
            eprintln!("error: {error:#}");
            FAILED
        }
    });
}
