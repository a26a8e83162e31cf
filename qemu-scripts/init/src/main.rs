// SPDX-License-Identifier: MIT OR Apache-2.0

//! The first process of a guest: mounts the root, runs one command, reports how it ended.
//!
//! It is linked statically, so that it is the whole of the initramfs but for kernel modules.

mod command;
mod ports;
mod root;

use std::fs::{self, File};
use std::io::Write;
use std::panic;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::reboot::{reboot, RebootMode};
use pinbuf_guest_init::{port, Config, Event, CONFIG_PATH, END_MARK};

fn main() {
    panic::set_hook(Box::new(|info| {
        log(&format!("{info}"));
        halt();
    }));
    if let Err(error) = run() {
        log(&format!("{error:#}"));
        let reported = ports::open(port::CONTROL).and_then(|mut control| {
            ports::send(&mut control, &Event::Failed(format!("{error:#}")))
        });
        if let Err(error) = reported {
            log(&format!(
                "and this cannot be reported to the host: {error:#}"
            ));
        }
    }
    log(END_MARK);
    halt();
}

fn run() -> Result<()> {
    root::mount_kernel_file_systems()?;
    let config = fs::read(CONFIG_PATH).context("reading the configuration")?;
    let config: Config = serde_json::from_slice(&config).context("parsing the configuration")?;
    root::load_boot_modules(&config)?;
    root::switch(&config)?;
    root::mount_the_rest(&config)?;
    root::load_modules(&config)?;

    let mut control = ports::open(port::CONTROL)?;
    let event = command::run(&config, &mut control)?;
    if config.check_leaks {
        check_leaks()?;
    }
    log(END_MARK);
    ports::send(&mut control, &event)?;
    // The host stops the machine when it has read the log up to the mark.
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// Lets kmemleak scan, and copies what it found to the kernel's log.
fn check_leaks() -> Result<()> {
    const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
    /// kmemleak reports what is older than five seconds and was seen unreferenced twice.
    const AGE: Duration = Duration::from_millis(5500);

    let cmdline = fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
    let is_off = cmdline
        .split_whitespace()
        .any(|word| word == "kmemleak=off");
    if is_off || !fs::exists(KMEMLEAK)? {
        return Ok(());
    }
    for _ in 0..2 {
        std::thread::sleep(AGE);
        fs::write(KMEMLEAK, "scan").context("starting kmemleak's scan")?;
    }
    for line in fs::read_to_string(KMEMLEAK)
        .context("reading kmemleak's report")?
        .lines()
    {
        log(&format!("kmemleak: {line}"));
    }
    Ok(())
}

/// Writes one line to the kernel's log.
fn log(line: &str) {
    if let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg") {
        let _ = kmsg.write_all(format!("<4>{line}\n").as_bytes());
    }
}

/// Ends the machine: QEMU runs with `-no-reboot`.
fn halt() -> ! {
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
