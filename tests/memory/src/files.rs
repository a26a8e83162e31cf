// SPDX-License-Identifier: MIT OR Apache-2.0

//! Files that are named, not mapped (`PINBUF_CREATE_FROM_FILES`): their pages leave `ZONE_MOVABLE`
//! too, and the driver is as patient with them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::holders::Piped;
use pinbuf_test_harness::support::frames::{all_frames, movable, within};
use pinbuf_test_harness::support::kernel::{vmstat, HugePool, Setting};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, HUGE, PAGE};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "files":
    memfd_held_by_a_pipe within 120,
    hugetlb_held_by_a_pipe within 120,
}

/// Well within the driver's patience.
const SHORT: Duration = Duration::from_millis(250);

/// A mapping of the file, which only the test needs, with all pages in `ZONE_MOVABLE`.
fn in_the_zone(fd: BorrowedFd<'_>, len: usize) -> Result<Memory> {
    let memory = Memory::shared(fd, len)?;
    if len % HUGE != 0 {
        memory.advise(0, len, libc::MADV_NOHUGEPAGE)?;
    }
    for offset in (0..len).step_by(PAGE) {
        memory.set(offset, offset as u64 + 1);
    }
    check_eq!(
        within(&all_frames(&memory)?, &[movable()?]),
        len / PAGE,
        "pages in ZONE_MOVABLE before"
    );
    Ok(memory)
}

fn create(fd: BorrowedFd<'_>, len: usize) -> nix::Result<Buffer> {
    Device::open()
        .expect("the device")
        .create_from_files(&[(fd, 0, len)])
}

/// Nothing can be had, and nothing is kept.
fn busy(fd: BorrowedFd<'_>, len: usize) -> Result<Duration> {
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    let start = Instant::now();
    check_eq!(create(fd, len).map(drop), Err(Errno::EBUSY), "create");
    check_eq!(kernel::pins()?, pins, "pins after EBUSY");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after EBUSY");
    Ok(start.elapsed())
}

/// Without patience: `EBUSY`. Held for long: `EBUSY`. Held for a short time: success.
/// `make` makes the file, and what its pages are from; they end in that order.
fn held_by_a_pipe(
    make: impl Fn() -> Result<(OwnedFd, Option<HugePool>)>,
    len: usize,
) -> Result<()> {
    let (fd, pool) = make()?;
    let memory = in_the_zone(fd.as_fd(), len)?;
    let setting = Setting::parameter("pin_retries", 0)?;
    let piped = Piped::pages(&memory, 20 * PAGE, 3)?;
    busy(fd.as_fd(), len).context("without patience")?;
    drop(setting);
    let fails = vmstat("pgmigrate_fail")?;
    let took = busy(fd.as_fd(), len).context("held for long")?;
    let fails = vmstat("pgmigrate_fail")? - fails;
    check!(fails > 0, "pgmigrate_fail has not risen");
    // Those that moved meanwhile go back to the kernel, or the next file would have them.
    drop((piped, memory, fd, pool));

    let (fd, _pool) = make()?;
    let memory = in_the_zone(fd.as_fd(), len)?;
    let release = Piped::pages(&memory, 20 * PAGE, 3)?.release_after(SHORT);
    let start = Instant::now();
    let buffer = create(fd.as_fd(), len).context("held for a short time")?;
    let success = start.elapsed();
    check!(
        release.is_finished(),
        "create succeeded while pages were held"
    );
    release.join().expect("the pipe's thread");
    check_eq!(
        within(&all_frames(&memory)?, &[movable()?]),
        0,
        "pages in ZONE_MOVABLE under a buffer"
    );
    let mapped = buffer.map()?;
    for offset in (0..len).step_by(PAGE) {
        check_eq!(mapped.get(offset), offset as u64 + 1, "bytes after moving");
    }
    println!(
        "# EBUSY in {} ms, pgmigrate_fail +{fails}; success in {} ms after {} ms of holding",
        took.as_millis(),
        success.as_millis(),
        SHORT.as_millis()
    );
    Ok(())
}

fn memfd_held_by_a_pipe() -> Result<()> {
    held_by_a_pipe(|| Ok((memfd(700 * PAGE, 0)?, None)), 700 * PAGE)
}

fn hugetlb_held_by_a_pipe() -> Result<()> {
    held_by_a_pipe(
        || {
            let pool = HugePool::with_free(2)?;
            Ok((huge_memfd(2 * HUGE)?, Some(pool)))
        },
        2 * HUGE,
    )
}
