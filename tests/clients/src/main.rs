// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs of Debian's that use udmabuf, and the command `pinbuf`, as users run them: as root in a
//! guest that has no udmabuf; prints KTAP.
//!
//! The guest's image has the programs (`clients` in `qemu-scripts/src/image/mod.rs`).  They run as an
//! ordinary user in the group kvm, with Debian's default limits.

mod bars;
mod containers;
mod doctor;
mod evidence;
mod info;
mod libcamera;
mod process;
mod qemu;
mod run;
mod selinux;
mod udev;
mod user;
mod vulkan;
mod watch;

use std::process::ExitCode;

use anyhow::{bail, Result};
use clap::Parser;
use pinbuf_test_harness::{report, Test};

/// Tests programs that use udmabuf on pinbuf, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    /// Run these themes only: the part of a name before its dot
    themes: Vec<String>,

    /// Of these, run only subtests whose name contains one of these
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,
}

impl Options {
    fn wants(&self, test: &Test) -> bool {
        // Where SELinux is in force AppArmor is not, and the other way round.
        let unasked = self.themes.is_empty() && theme(test) != "selinux";
        (unasked || self.themes.iter().any(|wanted| wanted == theme(test)))
            && (self.filter.is_empty() || self.filter.iter().any(|part| test.name.contains(part)))
    }
}

fn theme(test: &Test) -> &str {
    test.name.split('.').next().unwrap_or_default()
}

fn tests() -> impl Iterator<Item = &'static Test> {
    [
        qemu::TESTS,
        vulkan::TESTS,
        libcamera::TESTS,
        user::TESTS,
        run::TESTS,
        doctor::TESTS,
        info::TESTS,
        watch::TESTS,
        containers::TESTS,
        selinux::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    for wanted in &options.themes {
        if !tests().any(|test| theme(test) == wanted) {
            bail!("there is no theme `{wanted}`");
        }
    }
    process::no_udmabuf()?;
    udev::install()?;
    let chosen: Vec<&Test> = tests().filter(|test| options.wants(test)).collect();
    report(&chosen, true)
}
