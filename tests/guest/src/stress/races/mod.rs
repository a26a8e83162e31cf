// SPDX-License-Identifier: MIT OR Apache-2.0

//! Calls against each other and against other events, with random delays, for a while. Results are checked each
//! time, and in the end the harness checks that nothing is left behind.

pub mod death;
pub mod hugetlb;
pub mod importers;
pub mod memlock;
pub mod memory;
pub mod module;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;

use crate::settings::Settings;

/// An action that is repeated, with a name.
pub type Worker<'a> = (&'static str, &'a (dyn Fn(&mut Rng) -> Result<()> + Sync));

/// Runs all workers, each in its own thread, until the time is over or one fails.
pub fn race(workers: &[Worker<'_>]) -> Result<()> {
    let Settings { seconds, seed, .. } = Settings::get();
    let end = Instant::now() + seconds;
    let stop = AtomicBool::new(false);
    let mut told = String::new();
    let results: Vec<(&str, Result<u64>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter()
            .enumerate()
            .map(|(index, (name, work))| {
                let stop = &stop;
                let mut rng = Rng::with_seed(seed.wrapping_add(index as u64));
                let thread = scope.spawn(move || {
                    let mut rounds = 0;
                    while Instant::now() < end && !stop.load(Ordering::Relaxed) {
                        pause(&mut rng);
                        let result = work(&mut rng);
                        if result.is_err() {
                            stop.store(true, Ordering::Relaxed);
                            return result.map(|()| rounds);
                        }
                        rounds += 1;
                    }
                    Ok(rounds)
                });
                (*name, thread)
            })
            .collect();
        threads
            .into_iter()
            .map(|(name, thread)| (name, thread.join().expect("a thread panicked")))
            .collect()
    });
    for (name, result) in results {
        let rounds = result.with_context(|| format!("{name} (--seed {seed})"))?;
        told += &format!(" {name} {rounds} times;");
    }
    println!("#{}", told.trim_end_matches(';'));
    Ok(())
}

/// Waits for a random time: none at all, a few instructions, a turn of the scheduler, or longer.
pub fn pause(rng: &mut Rng) {
    match rng.u32(..8) {
        0..=2 => {}
        3..=5 => {
            for _ in 0..1_u32 << rng.u32(..14) {
                std::hint::spin_loop();
            }
        }
        6 => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(rng.u64(1..1000))),
    }
}

/// How often something happened.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Once more.
    pub fn up(&self) {
        self.add(1);
    }

    /// Adds this number.
    pub fn add(&self, times: usize) {
        self.0.fetch_add(times as u64, Ordering::Relaxed);
    }

    /// The sum.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
