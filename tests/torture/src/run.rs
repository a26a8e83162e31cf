// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs lists of steps, each list in a process of its own, and makes a failing list shorter.

use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use nix::sys::wait::WaitStatus;
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::turn::Turn;

use crate::steps::{generate, Step};
use crate::world::World;

/// How long a step may take, or what comes after the last one.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the search for a shorter list may take.
const SEARCH: Duration = Duration::from_secs(90);

/// Steps with their numbers.
type List = Vec<(usize, Step)>;

/// Why a list failed.
struct Failure {
    reason: String,
    /// How many of the list's steps were done, the one that failed among them.
    done: usize,
    /// The process cannot be killed: the kernel is no longer usable.
    hangs: bool,
}

/// Runs a list. `None` if all went well.
fn run(seed: u64, list: &[(usize, Step)]) -> Result<Option<Failure>> {
    let progress = Turn::new()?;
    let mut child = Child::run(|| {
        let mut world = World::new(seed)?;
        for (done, (number, step)) in list.iter().enumerate() {
            progress.set(done as u64 + 1);
            world.step(*number, step)?;
        }
        world.end()
    })?;
    let mut last = (progress.get(), Instant::now());
    while child.runs()? && last.1.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
        if last.0 != progress.get() {
            last = (progress.get(), Instant::now());
        }
    }
    let ended = child.end(Duration::ZERO);
    let done = progress.get() as usize;
    let (reason, hangs) = match ended {
        Ok((WaitStatus::Exited(_, 0), _)) => return Ok(None),
        Ok((WaitStatus::Exited(..), said)) => (said, false),
        Ok((status, _)) => (format!("ended by {status:?}"), false),
        Err(error) => (format!("{error:#}"), true),
    };
    Ok(Some(Failure {
        reason,
        done,
        hangs,
    }))
}

/// Leaves out what the failure does not need: halves first, then smaller parts, then single steps.
fn shorten(seed: u64, mut list: List) -> Result<(List, usize)> {
    let deadline = Instant::now() + SEARCH;
    let mut runs = 0;
    let mut size = list.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        let mut shorter = false;
        while at < list.len() {
            if Instant::now() > deadline {
                return Ok((list, runs));
            }
            let mut candidate = list.clone();
            candidate.drain(at..list.len().min(at + size));
            runs += 1;
            match run(seed, &candidate)? {
                Some(failure) if failure.hangs => return Ok((list, runs)),
                Some(failure) => {
                    candidate.truncate(failure.done);
                    list = candidate;
                    shorter = true;
                }
                None => at += size,
            }
        }
        if size == 1 && !shorter {
            break;
        }
        size = if shorter {
            size.min(list.len())
        } else {
            size / 2
        };
        if size > list.len() / 2 {
            size = (list.len() / 2).max(1);
        }
    }
    Ok((list, runs))
}

/// Runs the steps of a seed, or those that are named. The list of a failure is shortened and printed.
pub fn seed(seed: u64, count: usize, only: &[usize]) -> Result<()> {
    let numbered = generate(seed, count).into_iter().enumerate();
    let list: List = numbered
        .filter(|(number, _)| only.is_empty() || only.contains(number))
        .collect();
    let start = Instant::now();
    let Some(failure) = run(seed, &list)? else {
        return Ok(());
    };
    let after = start.elapsed().as_millis();
    println!(
        "# seed {seed} failed at step {} of {}, after {after} ms: {}",
        failure.done,
        list.len(),
        failure.reason
    );
    let mut list = list;
    list.truncate(failure.done);
    let (short, runs) = if failure.hangs {
        // Further runs would show nothing: a processor is lost.
        let last = list.len().saturating_sub(20);
        (list.split_off(last), 0)
    } else {
        shorten(seed, list)?
    };
    let numbers: Vec<String> = short.iter().map(|(number, _)| number.to_string()).collect();
    let mut lines = vec![format!(
        "{}\n{} steps are left after {runs} shorter runs; again with --seed {seed} --steps {count} --only {}",
        failure.reason,
        short.len(),
        numbers.join(",")
    )];
    lines.extend(
        short
            .iter()
            .map(|(number, step)| format!("  {number}: {step:x?}")),
    );
    if failure.hangs {
        // A further run may hang, too.
        for line in &lines {
            println!("# {line}");
        }
    }
    bail!(lines.join("\n"));
}
