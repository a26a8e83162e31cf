// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tortures mappings of buffers: random steps, with a model of what there is to see at every address.
//! As root, inside a guest; prints KTAP.
//!
//! * `torture.steps`: one thread, so that the same seed does the same each time. Seed after seed, until
//!   the time is over; each of them does `--steps` steps in a process of its own. After each step a sample
//!   of the arena is compared, in the end all of it. A run that fails is made shorter and printed.
//! * `torture.threads`: several threads on one address space. The model is weaker: whatever is seen is a
//!   page of a buffer that was mapped there, and in the end nothing is left.
//!
//! Buffers of 1 GiB need a page of that size: boot with `hugepagesz=1G hugepages=1`.

mod run;
mod settings;
mod steps;
mod threads;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;

use pinbuf_test_harness::support::kernel::{self, HugePool, Setting};
use pinbuf_test_harness::{tests, Choice, Test};

use settings::Settings;

/// Tortures mappings of buffers, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    /// How long each subtest goes on; at least one seed is run
    #[arg(long, value_name = "N", default_value_t = 30)]
    seconds: u64,

    /// Where random numbers begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Steps of each seed
    #[arg(long, value_name = "N", default_value_t = 600)]
    steps: usize,

    /// Of the first seed's steps, only those with these numbers, once
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    only: Vec<usize>,

    #[command(flatten)]
    choice: Choice,
}

/// Pages of 2 MiB that buffers are made of.
const POOL: i64 = 24;

tests! { "torture":
    steps within 500,
    threads within 60,
}

fn steps() -> Result<()> {
    let settings = Settings::get();
    let _pool = HugePool::with_free(POOL)?;
    // Buffers of 1 GiB are made where there is a page for them.
    let _giga = HugePool::with_giga();
    let _merge = Setting::set("/sys/kernel/mm/ksm/run", 1)?;
    let start = Instant::now();
    let mut done = 0;
    while done == 0 || start.elapsed() < settings.seconds && settings.only.is_empty() {
        run::seed(settings.seed + done, settings.steps, &settings.only)?;
        done += 1;
    }
    println!(
        "# {done} seeds of {} steps each in {} ms, {} kB are free",
        settings.steps,
        start.elapsed().as_millis(),
        kernel::field("/proc/meminfo", "MemFree")?
    );
    Ok(())
}

fn threads() -> Result<()> {
    let settings = Settings::get();
    let _pool = HugePool::with_free(POOL)?;
    let _giga = HugePool::with_giga();
    threads::run(settings.seed, settings.seconds)
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let Some(chosen) = options.choice.of(TESTS.iter())? else {
        return Ok(ExitCode::SUCCESS);
    };
    let seconds = Duration::from_secs(options.seconds);
    // Their time is what comes on top of the subtest's own.
    let chosen: Vec<Test> = chosen
        .into_iter()
        .map(|test| Test {
            timeout: test.timeout + seconds,
            ..*test
        })
        .collect();
    println!("# --seed {} --steps {}", options.seed, options.steps);
    Settings {
        seconds,
        seed: options.seed,
        steps: options.steps,
        only: options.only,
    }
    .set();
    options.choice.report(&chosen.iter().collect::<Vec<_>>())
}
