// SPDX-License-Identifier: MIT OR Apache-2.0

//! The first process of a guest: mounts the root, runs one command, reports how it ended.
//!
//! It is linked statically, so that it is the whole of the initramfs but for kernel modules.

mod command;
mod ports;
mod root;

use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::panic;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};
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
    ignore_gigantic_page()?;
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

/// Tells kmemleak, through the test importer, not to scan a huge page of 1 GiB that was set aside during boot: its
/// contents are the tests', and no object of the kernel is reached from there. Scanning it twice takes 40 s.
fn ignore_gigantic_page() -> Result<()> {
    const SIZE: NonZeroUsize = NonZeroUsize::new(1 << 30).unwrap();
    const PARAMETER: &str = "/sys/module/pinbuf_test_importer/parameters/unscanned";

    if !fs::exists(PARAMETER)? {
        return Ok(());
    }
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_1GB;
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let page = unsafe { mmap_anonymous(None, SIZE, ProtFlags::PROT_WRITE, flags) };
    // Most guests have no such page.
    let Ok(page) = page else { return Ok(()) };
    // SAFETY: the mapping was just made, can be written, and no Rust object is in it.
    unsafe { page.cast::<u8>().write_volatile(1) };
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|pagemap| pagemap.read_exact_at(&mut entry, page.addr().get() as u64 / 4096 * 8))
        .context("reading /proc/self/pagemap")?;
    let frame = u64::from_ne_bytes(entry) & ((1 << 55) - 1);
    // SAFETY: nothing refers to the mapping any longer.
    unsafe { munmap(page, SIZE.get()) }.context("unmapping the huge page")?;
    fs::write(PARAMETER, format!("{:#x}", frame * 4096)).context(PARAMETER)
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
