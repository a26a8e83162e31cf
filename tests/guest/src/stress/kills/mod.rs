// SPDX-License-Identifier: MIT OR Apache-2.0

//! Callers that are killed, at random moments of everything that can be done with a buffer.
//!
//! The sequence of requests, callers and places follows from the seed. The instruction at which the signal
//! arrives does not: delays follow from the seed too, but not the progress that a process makes in them.
//!
//! * [`requests`]: what a victim does, repeatedly;
//! * [`victims`]: where it does so: in a process, threads, a shared address space, a user namespace;
//! * [`baseline`]: what has to be as before after each interval.

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
use shim::{under_the_shim, under_the_supervisor};

tests! { "kills":
    anywhere within 600,
    under_the_shim within 600,
    under_the_supervisor within 600,
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

/// A delay of 8 us to 65 ms. Each power of two is equally likely.
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
    rehearse(&scene, &progress).context("while each request is completed once")?;
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

/// Completes each request once, in a victim that is killed only then: a request that always fails would
/// test nothing.
fn rehearse(scene: &Scene, progress: &Progress) -> Result<()> {
    for request in REQUESTS {
        let victim = Victim::alone(scene, progress, *request)?;
        let deadline = Instant::now() + PATIENCE;
        while progress.rounds(*request) == 0 {
            check!(
                Instant::now() < deadline,
                "{request:?} was not completed within {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        victim.kill(scene, progress)?;
    }
    scene.take_what_was_sent()
}

/// Prints what the victims were doing when they were killed.
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
    println!("# completed before: {}", rounds.join(", "));
}

/// Whether a create may fail so in a victim that goes on: the limit of its user is used up by other victims, or
/// pages cannot be migrated while another victim holds them.
fn may_fail(error: Errno) -> bool {
    matches!(error, Errno::ENOMEM | Errno::EBUSY | Errno::EINTR)
}
