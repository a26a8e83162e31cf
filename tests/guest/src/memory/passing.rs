// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that cannot be moved at the moment, because another user holds a reference: within the driver's
//! patience create succeeds, beyond it create returns `EBUSY` and keeps nothing. Without patience the same must
//! fail, or the tests would prove nothing.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};

use crate::common::views_agree;
use crate::frames::{self, all_frames, movable, within};
use crate::holders::{Piped, SlowDisk};
use pinbuf_test_harness::support::kernel::{vmstat, Setting};
use pinbuf_test_harness::support::kinds::Kind;
use pinbuf_test_harness::support::memory::{memfd, HUGE, PAGE};
use pinbuf_test_harness::support::process::PATIENCE;
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "passing":
    anonymous within 120,
    shmem within 120,
    transparent within 120,
    hugetlb within 120,
    many_pages_one_by_one within 120,
    direct_io within 120,
    caches_dropped within 120,
    patience_has_an_end within 120,
    killed_while_patient within 120,
    signalled_while_patient within 120,
    does_not_wait_with_what_is_not_charged,
    a_turn_ends_while_its_holder_waits within 120,
}

/// Pages of the memory that are held.
const HELD: usize = 3;
/// Well within the driver's patience of 1 + 2 + … + 512 ms, also where these are halved.
const SHORT: Duration = Duration::from_millis(250);
/// What `pin_retries` is by default, which the module's documentation names.
const RETRIES: u32 = 10;

/// The least time that this number of pauses takes together. They double from a millisecond on, and each but the
/// first is shortened at random, to no less than half.
fn least(retries: i64) -> Duration {
    Duration::from_millis((1 << retries) / 2)
}

/// How long the driver waits at least before it gives up.
fn patience() -> Result<Duration> {
    let retries = kernel::number("/sys/module/pinbuf/parameters/pin_retries")?;
    check_eq!(retries, i64::from(RETRIES), "pin_retries, as loaded");
    Ok(least(retries))
}

/// Expects that create fails, and that nothing is kept.
fn busy(device: &Device, memory: &Memory) -> Result<Duration> {
    let (pins, pinned, buffers) = (kernel::pins()?, kernel::vm_pin()?, kernel::dma_bufs()?);
    let start = Instant::now();
    let result = device.create(&[memory.range()]).map(drop);
    let took = start.elapsed();
    check_eq!(result, Err(Errno::EBUSY), "create with pages that are held");
    check_eq!(kernel::pins()?, pins, "pins after EBUSY");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after EBUSY");
    check_eq!(kernel::dma_bufs()?, buffers, "dma-bufs after EBUSY");
    Ok(took)
}

/// Expects success, with all pages where they may stay.
fn succeeds(device: &Device, memory: &Memory) -> Result<(Buffer, Duration)> {
    let start = Instant::now();
    let buffer = device.create(&[memory.range()]).context("PINBUF_CREATE")?;
    let took = start.elapsed();
    check_eq!(
        within(&all_frames(memory)?, &[movable()?]),
        0,
        "pages in ZONE_MOVABLE under a buffer"
    );
    Ok((buffer, took))
}

/// The memory, after proof that all of it lies in `ZONE_MOVABLE`.
fn checked(memory: &Memory) -> Result<()> {
    let pages = memory.len() / PAGE;
    check_eq!(
        within(&all_frames(memory)?, &[movable()?]),
        pages,
        "pages in ZONE_MOVABLE before"
    );
    Ok(())
}

/// Held for a short time: success. Held for long: `EBUSY`. Without retries: `EBUSY` at once. The kernel's
/// counters show that it tried to move them, and failed.
fn held_by_a_pipe(kind: Kind, len: usize, counters: &[&str]) -> Result<()> {
    let device = Device::open()?;
    let patience = patience()?;
    let mut report = String::new();

    // Without retries.
    let movable_memory = kind.pooled(len)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let setting = Setting::parameter("pin_retries", 0)?;
    // Until the call returns: to move huge pages that come before may take longer than `SHORT`.
    let piped = Piped::pages(memory, 20 * PAGE, HELD)?;
    let took = busy(&device, memory).context("without patience")?;
    drop((piped, setting));
    report += &format!("at once EBUSY in {} ms", took.as_millis());

    // For long: longer than the driver retries.
    let before: Vec<i64> = counters
        .iter()
        .map(|it| vmstat(it))
        .collect::<Result<_>>()?;
    let piped = Piped::pages(memory, 20 * PAGE, HELD)?;
    let took = busy(&device, memory).context("held for long")?;
    check!(
        took >= patience,
        "gave up after {took:?}, before {patience:?} were over"
    );
    for (name, before) in counters.iter().zip(before) {
        let risen = vmstat(name)? - before;
        check!(risen > 0, "{name} has not risen");
        report += &format!("; {name} +{risen}");
    }
    report += &format!("; EBUSY in {} ms", took.as_millis());
    drop(piped);

    // For a short time. What moved meanwhile stays moved; new memory is in the zone again.
    drop(movable_memory);
    let movable_memory = kind.pooled(len)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let release = Piped::pages(memory, 20 * PAGE, HELD)?.release_after(SHORT);
    let (buffer, took) = succeeds(&device, memory)?;
    check!(
        release.is_finished(),
        "create succeeded after {took:?}, while the pages were held"
    );
    check!(took >= SHORT / 2, "it took {took:?} only");
    release.join().expect("the pipe's thread");
    for offset in (0..len).step_by(PAGE) {
        check_eq!(memory.get(offset), offset as u64, "bytes after moving");
    }
    views_agree(&buffer, &[(memory, 0, len)])?;
    println!(
        "# {kind:?}: {report}; success in {} ms after {} ms of holding",
        took.as_millis(),
        SHORT.as_millis()
    );
    Ok(())
}

fn anonymous() -> Result<()> {
    held_by_a_pipe(Kind::Anonymous, 700 * PAGE, &["pgmigrate_fail"])
}

fn shmem() -> Result<()> {
    held_by_a_pipe(Kind::Shmem, 700 * PAGE, &["pgmigrate_fail"])
}

/// What users of vfio see: `thp_migration_fail`.
fn transparent() -> Result<()> {
    held_by_a_pipe(
        Kind::Transparent,
        2 * HUGE,
        &["pgmigrate_fail", "thp_migration_fail"],
    )
}

fn hugetlb() -> Result<()> {
    held_by_a_pipe(Kind::HugePrivate, 2 * HUGE, &["pgmigrate_fail"])?;
    held_by_a_pipe(Kind::HugeShared, 2 * HUGE, &["pgmigrate_fail"])
}

/// Several holders, each of which releases its page when the next one is reached: retries are counted for the
/// same pages.
fn many_pages_one_by_one() -> Result<()> {
    let device = Device::open()?;
    let movable_memory = Kind::Anonymous.pooled(2048 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let fails = vmstat("pgmigrate_fail")?;
    let mut threads = Vec::new();
    for index in 0..3u32 {
        // Each in a batch of its own.
        let piped = Piped::pages(memory, (index as usize * 600 + 9) * PAGE, 2)?;
        threads.push(piped.release_after(SHORT * (index + 1)));
    }
    let (buffer, took) = succeeds(&device, memory)?;
    for thread in threads {
        check!(thread.is_finished(), "create overtook a holder");
        thread.join().expect("the pipe's thread");
    }
    let fails = vmstat("pgmigrate_fail")? - fails;
    check!(
        fails >= 3,
        "pgmigrate_fail +{fails}: not each holder was met"
    );
    println!(
        "# three holders, one after the other: {} ms, pgmigrate_fail +{fails}",
        took.as_millis()
    );
    views_agree(&buffer, &[(memory, 0, memory.len())])
}

/// The frames of those pages that are mapped at the moment: compaction takes some away for a while.
fn present(memory: &Memory) -> Result<Vec<frames::Pfn>> {
    let entries = frames::entries(memory, 0, memory.len())?;
    Ok(entries
        .into_iter()
        .filter_map(|entry| match entry {
            frames::Entry::Present(pfn) => Some(pfn),
            _ => None,
        })
        .collect())
}

/// Dirty shmem, while another task drops caches and compacts memory all the time: its pages are isolated at any
/// moment, and put back.
fn caches_dropped() -> Result<()> {
    const PAGES: usize = 3000;
    let device = Device::open()?;
    let stop = AtomicBool::new(false);
    let dropped = vmstat("drop_pagecache")?;
    let mut moved = 0;
    std::thread::scope(|scope| -> Result<()> {
        let dropper = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                kernel::write("/proc/sys/vm/drop_caches", 3)?;
                kernel::write("/proc/sys/vm/compact_memory", 1)?;
            }
            Ok(())
        });
        let rounds = (|| {
            for round in 0..15u64 {
                let fd = memfd(PAGES * PAGE, 0)?;
                let memory = Memory::shared(&fd, PAGES * PAGE)?;
                memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
                for page in 0..PAGES {
                    memory.set(page * PAGE, round << 32 | page as u64);
                }
                moved += within(&present(&memory)?, &[movable()?]);
                let buffer = device.create(&[memory.range()]).context("PINBUF_CREATE")?;
                check_eq!(
                    within(&present(&memory)?, &[movable()?]),
                    0,
                    "pages in ZONE_MOVABLE under a buffer"
                );
                let mapped = buffer.map()?;
                for page in 0..PAGES {
                    check_eq!(
                        mapped.get(page * PAGE),
                        round << 32 | page as u64,
                        "a word of the buffer"
                    );
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        dropper.join().expect("the thread that drops caches")?;
        rounds
    })?;
    let dropped = vmstat("drop_pagecache")? - dropped;
    check!(dropped > 0, "drop_pagecache has not risen");
    check!(
        moved > 15 * PAGES / 2,
        "{moved} pages only were in the zone"
    );
    println!("# 15 rounds, {moved} pages left the zone, caches dropped {dropped} times");
    Ok(())
}

/// Direct I/O in flight, on a disk that takes its time.
fn direct_io() -> Result<()> {
    const TAKES: Duration = Duration::from_millis(400);
    let device = Device::open()?;
    let disk = SlowDisk::new(TAKES)?;
    for (retries, expected) in [(0, Some(Errno::EBUSY)), (RETRIES, None)] {
        let movable_memory = Kind::Shmem.pooled(300 * PAGE)?;
        let memory = &movable_memory.memory;
        checked(memory)?;
        let _setting = Setting::parameter("pin_retries", retries)?;
        let fails = vmstat("pgmigrate_fail")?;
        let pins = kernel::pins()?;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| disk.write(memory, 40 * PAGE, 4 * PAGE));
            let deadline = Instant::now() + Duration::from_secs(5);
            while kernel::pins()? == pins {
                check!(
                    Instant::now() < deadline,
                    "no direct I/O was seen in flight"
                );
            }
            let start = Instant::now();
            let result = device.create(&[memory.range()]);
            let took = start.elapsed();
            match (result, expected) {
                (Err(error), Some(expected)) => {
                    check_eq!(error, expected, "create without patience");
                    check!(!writer.is_finished(), "the disk was too fast for the test");
                }
                (Ok(buffer), None) => {
                    check_eq!(
                        within(&all_frames(memory)?, &[movable()?]),
                        0,
                        "pages in ZONE_MOVABLE under a buffer"
                    );
                    views_agree(&buffer, &[(memory, 0, memory.len())])?;
                }
                (result, _) => anyhow::bail!("with {retries} retries: {result:?}"),
            }
            let risen = vmstat("pgmigrate_fail")? - fails;
            check!(risen > 0, "pgmigrate_fail has not risen");
            println!(
                "# with {retries} retries: {expected:?} after {} ms, pgmigrate_fail +{risen}",
                took.as_millis()
            );
            writer.join().expect("the writer's thread")?;
            anyhow::Ok(())
        })?;
        check_eq!(kernel::pins()?, pins, "pins after all");
    }
    Ok(())
}

/// After the last retry, the driver tries to pin the page where it is. It must not try that with several pages: if one
/// of them is missing, its owner could make the call wait forever, and the pages before it keep huge pages in place
/// that are not charged.
fn does_not_wait_with_what_is_not_charged() -> Result<()> {
    let device = Device::open()?;
    let movable_memory = Kind::Anonymous.pooled(64 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    // The first page is a batch of its own.
    let _piped = Piped::pages(memory, PAGE, 1)?;
    memory.advise(5 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    let faults = Faults::of_range(memory.part(5 * PAGE, PAGE), Mode::Missing)?;
    let _setting = Setting::parameter("pin_retries", 0)?;
    let result = std::thread::scope(|scope| {
        let caller = scope.spawn(|| busy(&device, memory));
        let start = Instant::now();
        while !caller.is_finished() && start.elapsed() < PATIENCE / 4 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let finished = caller.is_finished();
        // Nobody waits for a userfaultfd that is closed.
        drop(faults);
        let result = caller.join().expect("the caller panicked");
        check!(finished, "create waits, with what it must not have");
        result
    });
    result.map(drop)
}

/// A caller that retries takes the turn, and keeps it until its call ends. If it then waits for a page that nobody
/// provides, others get the turn after a second: they need not wait for their last retry.
fn a_turn_ends_while_its_holder_waits() -> Result<()> {
    /// Less than the first few pauses.
    const BRIEF: Duration = Duration::from_millis(30);
    const TURN: Duration = Duration::from_secs(1);
    let device = &Device::open()?;
    let patience = patience()?;
    let movable_memory = Kind::Anonymous.pooled(64 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let missing = &Memory::small_pages(PAGE)?;
    let faults = Faults::of(missing, Mode::Missing)?;
    std::thread::scope(|scope| -> Result<()> {
        let release = Piped::pages(memory, 0, HELD)?.release_after(BRIEF);
        let holder = scope.spawn(|| device.create(&[memory.part(0, 8 * PAGE), missing.range()]));
        faults.wait()?;
        release.join().expect("the pipe's thread");
        std::thread::sleep(TURN);
        let mut quickest = Duration::MAX;
        for round in 1..4 {
            let part = memory.part(16 * round * PAGE, 16 * PAGE);
            let release = Piped::pages(memory, 16 * round * PAGE, HELD)?.release_after(BRIEF);
            let start = Instant::now();
            device.create(&[part]).context("PINBUF_CREATE")?;
            quickest = quickest.min(start.elapsed());
            release.join().expect("the pipe's thread");
        }
        check!(!holder.is_finished(), "the holder of the turn did not wait");
        // Nobody waits for a userfaultfd that is closed.
        drop(faults);
        holder
            .join()
            .expect("the holder panicked")
            .context("the holder")?;
        check!(
            quickest < patience,
            "the quickest took {quickest:?}: all pauses, of {patience:?} at least"
        );
        Ok(())
    })
}

/// However many pages are held, the time is bounded, and the parameter sets it.
fn patience_has_an_end() -> Result<()> {
    let device = Device::open()?;
    let movable_memory = Kind::Anonymous.pooled(64 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let piped = Piped::pages(memory, 0, 16)?;
    for retries in [0, 1, 4, 7] {
        let _setting = Setting::parameter("pin_retries", retries)?;
        let took = busy(&device, memory)?;
        let least = least(retries);
        // Each try has its own cost, which the guest's speed sets.
        let most = least * 6 + Duration::from_secs(4);
        check!(
            took >= least && took < most,
            "{retries} retries took {took:?}: not {least:?} to {most:?}"
        );
    }
    // Pauses of 1 + 2 + … ms, and not of a multiple of that. The machine may have other work at times.
    let sum = Duration::from_millis((1 << RETRIES) - 1);
    let mut took = Duration::MAX;
    for _ in 0..3 {
        took = took.min(busy(&device, memory)?);
        if took < 2 * sum {
            break;
        }
    }
    check!(
        took < 2 * sum,
        "{RETRIES} retries took {took:?}, of {sum:?} at most"
    );
    drop(piped);
    succeeds(&device, memory)?;
    Ok(())
}

/// A task that waits for pages to be released can be killed.
fn killed_while_patient() -> Result<()> {
    use pinbuf_test_harness::support::process::Child;

    let pins = kernel::pins()?;
    let _setting = Setting::parameter("pin_retries", 16)?;
    let movable_memory = Kind::Shmem.pooled(64 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let _piped = Piped::pages(memory, 0, 16)?;
    let mut child = Child::run(|| {
        let device = Device::open()?;
        let result = device.create(&[memory.range()]);
        anyhow::bail!("create came back: {result:?}")
    })?;
    // 65 s of retries in all; after two of them it sleeps for a second or more, each time.
    std::thread::sleep(Duration::from_secs(2));
    // The next pause begins: the task gives the processor up, and not again soon.
    let status = format!("/proc/{}/status", child.pid());
    let switches = || kernel::field(&status, "voluntary_ctxt_switches");
    let deadline = Instant::now() + PATIENCE;
    let (mut last, mut began) = (switches()?, false);
    loop {
        check!(child.runs()?, "the child is gone");
        check!(Instant::now() < deadline, "it does not retry");
        std::thread::sleep(Duration::from_millis(20));
        let now = switches()?;
        if now == last && began {
            break;
        }
        began |= now != last;
        last = now;
    }
    let start = Instant::now();
    child.kill(Signal::SIGKILL)?;
    let (status, said) = child.end(Duration::from_secs(10))?;
    let took = start.elapsed();
    check!(
        matches!(
            status,
            nix::sys::wait::WaitStatus::Signaled(_, Signal::SIGKILL, _)
        ),
        "ended by {status:?}: {said}"
    );
    check!(took < Duration::from_millis(800), "it took {took:?} to die");
    check_eq!(kernel::pins()?, pins, "pins after it was killed");
    Ok(())
}

extern "C" fn counts(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Signals that were handled.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// A signal with a handler that comes before or during the pauses does not shorten them, and is handled afterwards.
fn signalled_while_patient() -> Result<()> {
    let device = Device::open()?;
    let action = SigAction::new(
        SigHandler::Handler(counts),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler adds a number.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let movable_memory = Kind::Anonymous.pooled(64 * PAGE)?;
    let memory = &movable_memory.memory;
    checked(memory)?;
    let release = Piped::pages(memory, 20 * PAGE, HELD)?.release_after(SHORT);
    // SAFETY: a call without conditions.
    let creator = unsafe { libc::pthread_self() };
    let stop = AtomicBool::new(false);
    let (buffer, during) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(creator, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let before = SIGNALS.load(Ordering::Relaxed);
        let result = succeeds(&device, memory);
        let during = SIGNALS.load(Ordering::Relaxed) - before;
        stop.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>((result?.0, during))
    })?;
    release.join().expect("the pipe's thread");
    check!(during > 0, "no signal came");
    views_agree(&buffer, &[(memory, 0, memory.len())])
}
