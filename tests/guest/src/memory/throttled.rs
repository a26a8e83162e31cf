// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that its control group slows down while it allocates memory, in a fault or for a device, delays no
//! other process that has the same buffer.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::Range;

use crate::populate::Group;
use pinbuf_test_harness::support::memory::{BLOCK, PAGE, RW};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::{check, Buffer, Device, Memory, Sync};
use pinbuf_test_harness::tests;

tests! { "throttled":
    fault_delays_no_other_process within 120,
    mapping_delays_no_access within 120,
}

/// Page tables that a mapping of the buffer takes.
const TABLES: usize = 200;
/// Threads in the group.
const THREADS: usize = 4;
/// How long the processes run.
const TIME: Duration = Duration::from_secs(30);
/// What the group may have: less than its processes take.
const HIGH: usize = 64 << 10;
/// A wait that is the control group's doing: it throttles for up to two seconds.
const LONG: Duration = Duration::from_secs(1);

/// Makes the kernel write to one page for each page table of a new mapping, in one system call: the control group
/// throttles in a fault, and not on the way back to the program.
fn fault_in_the_kernel(buffer: &Buffer, zero: &File) -> Result<()> {
    let mapped = buffer.map()?;
    let mut pieces: Vec<_> = (0..TABLES)
        .map(|table| libc::iovec {
            iov_base: mapped.at(table * BLOCK * PAGE).cast(),
            iov_len: 1,
        })
        .collect();
    // SAFETY: the pieces lie in the mapping, which no Rust object is in.
    let read = unsafe {
        libc::readv(
            zero.as_raw_fd(),
            pieces.as_mut_ptr(),
            i32::try_from(pieces.len())?,
        )
    };
    Errno::result(read).context("reading zeroes into the mapping")?;
    Ok(())
}

/// A child in the group does something with several threads, and counts in `waits` how often that took long.
fn throttled_child(
    group: &Group,
    waits: &Memory,
    act: impl Fn() -> Result<()> + std::marker::Sync,
) -> Result<Child> {
    Child::run(|| {
        group.join()?;
        std::thread::scope(|scope| {
            let run = |thread| -> Result<()> {
                loop {
                    let start = Instant::now();
                    act()?;
                    let long = u64::from(start.elapsed() >= LONG);
                    waits.set(thread * 8, waits.get(thread * 8) + long);
                }
            };
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || run(thread)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("a thread panicked"))
        })
    })
}

/// Expects that what this process does never takes long, while a child in a control group with too little memory does
/// something else.
fn delays_nobody(
    theirs: impl Fn() -> Result<()> + std::marker::Sync,
    mut ours: impl FnMut() -> Result<Duration>,
) -> Result<()> {
    let waits = Memory::map(PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?;
    let group = Group::new("memory")?;
    group.set("memory.high", HIGH)?;
    let mut child = throttled_child(&group, &waits, theirs)?;
    let mut longest = Duration::ZERO;
    let start = Instant::now();
    while start.elapsed() < TIME {
        longest = longest.max(ours()?);
    }
    let throttled: u64 = (0..THREADS).map(|thread| waits.get(thread * 8)).sum();
    if !child.runs()? {
        child.join()?;
        bail!("the child in the group came to an end");
    }
    child.kill(Signal::SIGKILL)?;
    child.end(Duration::from_secs(20))?;
    println!("# {throttled} long waits in the group, and up to {longest:?} outside");
    check!(throttled > 0, "the control group throttled nothing");
    check!(
        longest < LONG,
        "a process outside of the group waited for {longest:?}"
    );
    group.remove()
}

fn fault_delays_no_other_process() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages((BLOCK - 1) * PAGE)?;
    // Of that length, so that no huge entry fits.
    let buffer = device.create(&vec![memory.range(); TABLES + 1])?;
    let zero = File::open("/dev/zero")?;
    let fault = || {
        let mapped = buffer.map()?;
        let mut longest = Duration::ZERO;
        for table in 0..TABLES {
            let start = Instant::now();
            mapped.set(table * BLOCK * PAGE, 1);
            longest = longest.max(start.elapsed());
        }
        Ok(longest)
    };
    delays_nobody(|| fault_in_the_kernel(&buffer, &zero), fault)
}

/// A device's mapping allocates an entry for each extent.
fn mapping_delays_no_access() -> Result<()> {
    // With more of them, no mapping is finished in time.
    const PAGES: usize = 20_000;
    let device = Device::open()?;
    let memory = Memory::small_pages(2 * PAGE)?;
    // No two are adjacent: the same page again and again.
    let ranges: Vec<Range> = vec![memory.part(0, PAGE); PAGES];
    let buffer = device.create(&ranges)?;
    let map = || {
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        importer.map(Direction::Bidirectional)?;
        Ok(())
    };
    let access = || {
        let start = Instant::now();
        buffer.synced(Sync::ReadWrite, || ())?;
        Ok(start.elapsed())
    };
    delays_nobody(map, access)
}
