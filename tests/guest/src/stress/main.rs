// SPDX-License-Identifier: MIT OR Apache-2.0

//! Makes pinbuf's calls fail and race, as root inside a guest; prints KTAP.
//!
//! * `faults`: every allocation, user copy and pin of a call fails in turn. On a kernel with fault
//!   injection, as `qemu-scripts/debug.config` makes one; `--filter faults.pin` needs kprobes alone.
//! * `huge`: the same for huge page-table entries, which that kernel's page-table checker forbids: it
//!   must be switched off with `page_table_check=off`.
//! * `migration`: no room for pages that have to leave `ZONE_MOVABLE`. With `movablecore=` besides.
//! * `races`: calls against whatever else the process, other processes and the kernel do, on any
//!   kernel, with random delays, for `--seconds` each.
//! * `kills`: `--kills` processes are killed at random moments of all that can be done with a buffer, and
//!   programs under `pinbuf run`. Best with `movablecore=`.
//! * `suspend`: the machine sleeps while buffers live. In a guest as the row `suspend` makes one.
//! * `leaks`: what kmemleak finds at the end.
//!
//! A test that misses what it needs fails.

mod faults;
mod kills;
mod kinds;
mod leaks;
mod migration;
mod races;
mod settings;
mod suspend;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use pinbuf_test_harness::{Choice, Test};

use settings::Settings;

/// Makes pinbuf's calls fail and race, and reports in KTAP.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    choice: Choice,

    /// How long each race goes on
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,

    /// How many processes are killed by `kills`
    #[arg(long, value_name = "N", default_value_t = 300)]
    kills: usize,

    /// Where random numbers begin; another one each time if it is not given
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Uses /dev/udmabuf until it is killed, as a program under the shim
    #[arg(long, hide = true, value_name = "SEED")]
    udmabuf_client: Option<u64>,
}

fn tests() -> impl Iterator<Item = &'static Test> + Clone {
    [
        faults::create::TESTS,
        faults::device::TESTS,
        faults::mapping::TESTS,
        faults::pins::TESTS,
        faults::huge::TESTS,
        migration::TESTS,
        races::memory::TESTS,
        races::hugetlb::TESTS,
        races::death::TESTS,
        races::importers::TESTS,
        races::memlock::TESTS,
        races::module::TESTS,
        kills::TESTS,
        suspend::TESTS,
        leaks::TESTS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(seed) = options.udmabuf_client {
        return kills::client(seed).map(|()| ExitCode::SUCCESS);
    }
    let Some(chosen) = options.choice.of(tests())? else {
        return Ok(ExitCode::SUCCESS);
    };
    let seconds = Duration::from_secs(options.seconds);
    // Their time is what the setting up takes at most; a race's own comes on top, and that of kills, of which
    // each takes 50 ms, or more than a second with checkers on a busy machine.
    let own = |test: &Test| match test.theme() {
        "kills" => Duration::from_secs(2) * u32::try_from(options.kills).unwrap_or(u32::MAX),
        _ => seconds,
    };
    let chosen: Vec<Test> = chosen
        .into_iter()
        .map(|test| Test {
            timeout: test.timeout + own(test),
            ..*test
        })
        .collect();
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    println!(
        "# --seed {seed} --seconds {} --kills {}",
        options.seconds, options.kills
    );
    if chosen.iter().any(|test| test.theme() == "suspend") {
        suspend::leave_shares()?;
    }
    Settings {
        seconds,
        kills: options.kills,
        seed,
    }
    .set();
    options.choice.report(&chosen.iter().collect::<Vec<_>>())
}
