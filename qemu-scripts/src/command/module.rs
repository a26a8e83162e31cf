// SPDX-License-Identifier: MIT OR Apache-2.0

//! `module`: the module for one kernel.

use anyhow::Result;
use clap::Args;

use crate::debian::tree::Tree;
use crate::kernel::{module, Kernel};

/// Build pinbuf.ko for a kernel, and print its path.
#[derive(Debug, Args)]
pub struct Module {
    /// Kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` prints it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Fetch new package lists first.
    #[arg(long)]
    update: bool,
}

impl Module {
    /// Builds it, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
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
