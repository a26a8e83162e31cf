// SPDX-License-Identifier: MIT OR Apache-2.0

//! `deb`: the part of `packaging/build-deb` that runs in a Debian tree.

use anyhow::{Context, Result};
use clap::Args;

use crate::debian::tree::{inside, Tree};
use crate::paths;
use crate::ui::step;

/// What `packaging/debian/control` needs for the build, and lintian.
const PACKAGES: &[&str] = &[
    "build-essential",
    "cargo",
    "debhelper",
    "dh-dkms",
    "dpkg-dev",
    "fakeroot",
    "lintian",
    "rustc",
];

/// Build the Debian packages from the sources that packaging/build-deb prepared.
#[derive(Debug, Args)]
pub struct Deb {}

impl Deb {
    /// Builds them, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        let tree = Tree::with_packages("deb", PACKAGES)?;
        let sources = paths::build().join("deb/source/pinbuf");
        let script = "cd \"$0\" && exec packaging/build-deb --prepared";
        let mut command = tree.command(&["sh", "-c", script, &inside(&sources)?])?;
        step("Debian packages", |step| step.run(&mut command, "deb.log"))
            .context("building the packages failed")?;
        Ok(0)
    }
}
