// SPDX-License-Identifier: MIT OR Apache-2.0

//! Everything that builds pinbuf for a kernel, boots it in QEMU guests, and tests it there.

mod apt;
mod archive;
mod bench;
mod cache;
mod cleanup;
mod debug;
mod demo;
mod documents;
mod guest;
mod image;
mod initramfs;
mod kernel;
mod ktap;
mod lint;
mod module;
mod paths;
mod payload;
mod planted;
mod qemu;
mod qmp;
mod runs;
mod sanitize;
mod stock;
mod test;
mod tree;
mod ui;
mod userspace;
mod vm;
mod watch;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::kernel::Kernel;
use crate::tree::Tree;

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
    Module(Module),
    Test(test::Test),
    Demo(demo::Demo),
    Bench(bench::Bench),
}

/// Build pinbuf.ko for a kernel, and print its path.
#[derive(Debug, Args)]
struct Module {
    /// Kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` prints it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Fetch new package lists first.
    #[arg(long)]
    update: bool,
}

impl Module {
    fn run(self) -> Result<i32> {
        let tools = Tree::tools()?;
        if self.update {
            tools.refresh_lists(true)?;
        }
        let kernel = Kernel::select(&tools, &self.kernel)?;
        for path in module::ensure(&tools, &kernel)? {
            println!("{}", path.display());
        }
        Ok(0)
    }
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
