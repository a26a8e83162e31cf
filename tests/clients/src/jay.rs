// SPDX-License-Identifier: MIT OR Apache-2.0

//! The compositor Jay and its own tests, which draw into buffers that it makes by udmabuf, and compare pictures of the
//! screen.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{bail, ensure, Result};
use nix::unistd::{chown, Uid};
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::tests;

use crate::evidence;
use crate::process::{no_udmabuf, End, Start};
use crate::wayland::Place;

tests!("jay":
    its_tests_pass within 900,
    its_tests_pass_by_the_supervisor within 900,
    its_tests_fail_without_pinbuf within 600,
);

/// A command that only a Jay with tests has.
const COMMAND: &[&str] = &["jay", "run-tests"];

/// Where its tests write a log each, and their database. Jay has the path compiled in: `qemu-scripts/src/image/jay.rs`.
const LOGS: &str = "/usr/src/jay/testruns";

/// How many tests this release has, and how many of them draw nothing: quit, seats, regions, registries, and buffers that
/// are released.
const COUNT: usize = 83;
const WITHOUT_SCREEN: usize = 5;

/// What Jay reports where it finds neither udmabuf nor a graphics card.
const NO_BUFFERS: &str = "Could not create any allocator";

/// What Jay reports of a test that took too long, and how often such a test may.
const TIMEOUT: &str = "Test timed out";
const RUNS: usize = 3;

/// The bytes of a screen of 800 x 600, in rows of a multiple of 256 bytes.
const SCREEN: usize = 800_usize.next_multiple_of(64) * 600 * 4;

/// How many buffers of such a screen, and of whatever size, the tests make at least; 48 and 285 were seen.
const SCREENS: usize = 40;
const BUFFERS: usize = 200;

/// How a run of its tests ends.
fn run(start: Start) -> Result<End> {
    no_udmabuf()?;
    let place = Place::new("jay")?;
    if Path::new(LOGS).exists() {
        fs::remove_dir_all(LOGS)?;
    }
    fs::create_dir(LOGS)?;
    chown(LOGS, Some(Uid::from_raw(USER)), None)?;
    let end = End::from(place.command(&start.by_kvm_user()).output()?);
    let begun = end.err.matches("] Running t2").count();
    ensure!(begun == COUNT, "{begun} tests were run: {end:?}");
    Ok(end)
}

/// The tests that failed, with their errors: the list at the end.
fn failed(end: &End) -> Vec<(&str, Vec<&str>)> {
    let mut found: Vec<(&str, Vec<&str>)> = Vec::new();
    let list = end.err.split_once("The following tests failed:");
    for line in list.map_or("", |(_, list)| list).lines() {
        let Some((_, text)) = line.split_once("]     ") else {
            continue;
        };
        match (text.strip_prefix("    "), found.last_mut()) {
            (Some(error), Some((_, errors))) => errors.push(error),
            _ => found.push((text.trim_end_matches(':'), Vec::new())),
        }
    }
    found
}

/// Fails unless all tests pass, with buffers of pinbuf's.
///
/// Each test has 5 s of real time, which a guest that is emulated on a busy machine may exceed. One that did, and has no
/// other error, is given another chance; as Jay runs all tests or none, that is another run of all.
fn pass(way: &str) -> Result<()> {
    let mut slow: Option<BTreeSet<String>> = None;
    for _ in 0..RUNS {
        let end = run(Start::program(COMMAND).on_pinbuf_with(&["--log", "--by", way]))?;
        let failed = failed(&end);
        let mut errors = failed.iter().flat_map(|(_, errors)| errors);
        let wrong = errors.any(|&error| error != TIMEOUT);
        ensure!(
            !wrong && end.status == Some(i32::from(!failed.is_empty())),
            "{failed:?}: {end:?}"
        );
        let screens = evidence::made(&end.err, SCREEN);
        let buffers = evidence::made(&end.err, 0);
        println!(
            "# {} of {COUNT} tests pass, with {buffers} buffers, {screens} of them of a screen's size",
            COUNT - failed.len()
        );
        ensure!(screens >= SCREENS && buffers >= BUFFERS, "{end:?}");
        let names = failed.iter().map(|(name, _)| (*name).to_owned()).collect();
        let left = match slow {
            Some(before) => &before & &names,
            None => names,
        };
        if left.is_empty() {
            return Ok(());
        }
        println!("# too slow: {left:?}");
        slow = Some(left);
    }
    bail!("in {RUNS} runs, these tests took too long each time: {slow:?}")
}

fn its_tests_pass() -> Result<()> {
    pass("preload")
}

fn its_tests_pass_by_the_supervisor() -> Result<()> {
    pass("supervisor")
}

/// All that have a screen.
fn its_tests_fail_without_pinbuf() -> Result<()> {
    let end = run(Start::program(COMMAND))?;
    let failed = failed(&end);
    let without_screen = COUNT - failed.len();
    let other = failed.iter().find(|(_, errors)| errors != &[NO_BUFFERS]);
    ensure!(
        end.status == Some(1) && without_screen == WITHOUT_SCREEN && other.is_none(),
        "{without_screen} pass, {other:?}: {end:?}"
    );
    Ok(())
}
