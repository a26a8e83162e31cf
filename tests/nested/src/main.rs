// SPDX-License-Identifier: MIT OR Apache-2.0

//! Stock QEMU on pinbuf, in the test guest: inner guests draw, QEMU shows what they drew, and
//! every pixel is compared.  The same program is the first process of the inner guests.

mod balloon;
mod dbus;
mod discards;
mod disk;
mod evidence;
mod fragment;
mod gl;
mod honest;
mod initramfs;
mod inner;
mod libvirt;
mod link;
mod load;
mod machine;
mod migrate;
mod pagemap;
mod pattern;
mod picture;
mod protocol;
mod scenarios;
mod screen;
mod vfio;
mod vnc;
mod x11;
mod zones;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{ensure, Result};
use clap::Parser;

use evidence::Balance;

/// Runs virtual machines on pinbuf, and prints KTAP.
#[derive(Debug, Parser)]
struct Options {
    /// Run only scenarios of these groups, separated by commas.
    #[arg(long, value_name = "GROUPS", default_value = "screen")]
    group: String,
    /// Run only scenarios whose names contain this; may be given several times.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// How many times all of them run, one round after the other.
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: usize,
    /// How long the honest guest runs, in seconds.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Run no tests; write a picture of an inner guest's screen to this file.
    #[arg(long, value_name = "FILE")]
    demo: Option<PathBuf>,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        inner::main();
    }
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("Bail out! {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    vfio::modprobe("kvm_amd")?;
    if let Some(file) = &options.demo {
        let file = std::path::absolute(file)?;
        balanced(|| scenarios::demo(&file))?;
        println!("  afterwards no pin, no buffer and no charge is left");
        return Ok(true);
    }
    honest::SECONDS.store(options.seconds, Ordering::Relaxed);
    let chosen: Vec<_> = scenarios::ALL
        .iter()
        .filter(|scenario| {
            options
                .group
                .split(',')
                .any(|group| group == scenario.group)
        })
        .filter(|scenario| {
            let filters = &options.filter;
            filters.is_empty() || filters.iter().any(|filter| scenario.name.contains(filter))
        })
        .collect();
    let chosen = chosen.repeat(options.times);
    println!("KTAP version 1\n1..{}", chosen.len());
    let mut good = true;
    for (number, scenario) in (1..).zip(chosen) {
        let start = Instant::now();
        println!("# {}", scenario.name);
        let result = balanced(scenario.run);
        let seconds = start.elapsed().as_secs_f64();
        println!("# {}: {seconds:.1} s", scenario.name);
        match result {
            Ok(()) => println!("ok {number} {}", scenario.name),
            Err(error) => {
                good = false;
                for line in format!("{error:#}").lines() {
                    println!("# {line}");
                }
                println!("not ok {number} {}", scenario.name);
            }
        }
        std::io::stdout().flush()?;
    }
    Ok(good)
}

/// Runs a scenario, and fails if it leaves pins, buffers, charges or huge pages behind.
fn balanced(scenario: impl FnOnce() -> Result<()>) -> Result<()> {
    // A scenario that failed may have left them.
    scenarios::huge_pages(0)?;
    let before = Balance::now()?;
    scenario()?;
    // QEMU's last threads release what it held.
    let start = Instant::now();
    loop {
        let after = Balance::now()?;
        if after == before {
            println!("# as before: {after:?}");
            return Ok(());
        }
        let patience = start.elapsed().as_secs() < 10;
        ensure!(patience, "before: {before:?}, after: {after:?}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
