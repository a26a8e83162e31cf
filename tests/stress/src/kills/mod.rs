// SPDX-License-Identifier: MIT OR Apache-2.0

//! Callers that are killed, at random moments of everything that can be done with a buffer.
//!
//! What is requested, by whom and where, follows from the seed. The moments do not: a process runs as far
//! as it comes before the signal, and they are random in time, which is the point.
//!
//! * [`requests`]: what a victim does, again and again;
//! * [`victims`]: where it does so: a process, threads, a process that shares its memory, a user namespace;
//! * [`baseline`]: what has to be as it was, now and then and in the end.

mod baseline;
mod requests;
mod shim;
mod victims;

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::errno::Errno;

use crate::settings::Settings;
use baseline::Baseline;
use pinbuf_test_harness::support::check;
use pinbuf_test_harness::support::process::PATIENCE;
use pinbuf_test_harness::tests;
use requests::{Progress, REQUESTS, STEPS};
use victims::{Scene, Victim};

pub use shim::client;
use shim::under_the_shim;

tests! { "kills":
    anywhere within 600,
    under_the_shim within 600,
}

/// Victims that live at the same time, at most.
const AT_ONCE: usize = 3;

/// Kills between two comparisons with the baseline, and comparisons in all.
fn intervals(kills: usize) -> (usize, usize) {
    let interval = match kills {
        ..=1000 => (kills / 3).clamp(1, 100),
        _ => 1000.min(kills / 4),
    };
    (interval, kills.div_ceil(interval))
}

/// A time from next to nothing to 65 ms, short ones as often as long ones.
fn moment(rng: &mut Rng) -> Duration {
    let most = 1_u64 << rng.u32(4..17);
    Duration::from_micros(rng.u64(most / 2..most))
}

fn anywhere() -> Result<()> {
    let Settings { kills, seed, .. } = Settings::get();
    let (interval, count) = intervals(kills);
    let scene = Scene::new()?;
    let progress = Progress::new()?;
    let mut baseline = Baseline::new(scene.accounts()?, interval)?;
    rehearse(&scene, &progress).context("before any is killed in the midst")?;
    let mut rng = Rng::with_seed(seed);
    let mut killed = 0;
    for number in 1..=count {
        let target = (number * interval).min(kills);
        while killed < target {
            let at_once = rng.usize(1..=AT_ONCE).min(target - killed);
            let group = (0..at_once)
                .map(|slot| Victim::start(&scene, &progress, slot, &mut rng))
                .collect::<Result<Vec<_>>>()
                .with_context(|| format!("after {killed} kills (--seed {seed})"))?;
            for victim in group {
                std::thread::sleep(moment(&mut rng));
                victim
                    .kill(&scene, &progress)
                    .with_context(|| format!("after {killed} kills (--seed {seed})"))?;
                killed += 1;
            }
            scene.take_what_was_sent()?;
        }
        baseline
            .is_reached(number)
            .with_context(|| format!("after {killed} kills (--seed {seed})"))?;
    }
    baseline.is_kept()?;
    report(&progress, killed);
    drop(baseline);
    scene.end()
}

/// Each request is done as a whole by a victim that is let live: what a signal interrupts later is no
/// failure.
fn rehearse(scene: &Scene, progress: &Progress) -> Result<()> {
    for request in REQUESTS {
        let victim = Victim::alone(scene, progress, *request)?;
        let deadline = Instant::now() + PATIENCE;
        while progress.rounds(*request) == 0 {
            check!(Instant::now() < deadline, "{request:?} comes to nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        victim.kill(scene, progress)?;
    }
    scene.take_what_was_sent()
}

/// Says where the signals met their victims.
fn report(progress: &Progress, killed: usize) {
    let mut steps: Vec<_> = STEPS
        .iter()
        .map(|step| (progress.deaths(*step), *step))
        .filter(|(deaths, _)| *deaths > 0)
        .collect();
    steps.sort_unstable_by_key(|(deaths, _)| Reverse(*deaths));
    let steps: Vec<_> = steps
        .iter()
        .map(|(deaths, step)| format!("{step:?} {deaths}"))
        .collect();
    println!("# {killed} kills, while: {}", steps.join(", "));
    let rounds: Vec<_> = REQUESTS
        .iter()
        .map(|request| format!("{request:?} {}", progress.rounds(*request)))
        .collect();
    println!("# rounds before: {}", rounds.join(", "));
}

/// What a create may answer to a victim that goes on: its user's room is used by others, which are dying, or
/// pages cannot be moved while others are pinned.
fn may_fail(error: Errno) -> bool {
    matches!(error, Errno::ENOMEM | Errno::EBUSY | Errno::EINTR)
}
