// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs of Debian's that use udmabuf, and the command `pinbuf`, as users run them: as root in a
//! guest that has no udmabuf; prints KTAP.
//!
//! The guest's image has the programs (`clients` in `qemu-scripts/src/image/mod.rs`).  They run as an
//! ordinary user in the group kvm, with Debian's default limits.

mod bars;
mod bench;
mod compositor;
mod containers;
mod doctor;
mod evidence;
mod examples;
mod gstreamer;
mod gtk;
mod info;
mod jay;
mod kwin;
mod libcamera;
mod library;
mod process;
mod qemu;
mod run;
mod selinux;
mod supervised;
mod udev;
mod user;
mod vulkan;
mod watch;
mod wayland;
mod weston;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use pinbuf_test_harness::{Choice, Test};

/// Tests programs that use udmabuf on pinbuf, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    choice: Choice,
}

/// Themes for other machines, which run if they are named: where SELinux is in force AppArmor is not, and the programs
/// of the others are in the images `programs` and `jay`.
const ELSEWHERE: [&str; 6] = ["selinux", "gstreamer", "weston", "gtk", "kwin", "jay"];

fn tests() -> impl Iterator<Item = &'static Test> + Clone {
    [
        qemu::TESTS,
        vulkan::TESTS,
        libcamera::TESTS,
        user::TESTS,
        run::TESTS,
        supervised::TESTS,
        supervised::front::TESTS,
        supervised::surroundings::TESTS,
        supervised::users::TESTS,
        doctor::TESTS,
        info::TESTS,
        watch::TESTS,
        bench::TESTS,
        library::TESTS,
        examples::TESTS,
        containers::TESTS,
        selinux::TESTS,
        gstreamer::TESTS,
        weston::TESTS,
        gtk::TESTS,
        kwin::TESTS,
        jay::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let Options { choice } = Options::parse();
    let all =
        tests().filter(|test| !choice.themes.is_empty() || !ELSEWHERE.contains(&test.theme()));
    let Some(chosen) = choice.of(all)? else {
        return Ok(ExitCode::SUCCESS);
    };
    process::no_udmabuf()?;
    udev::install()?;
    choice.report(&chosen)
}
