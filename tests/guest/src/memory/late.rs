// SPDX-License-Identifier: MIT OR Apache-2.0

//! A create that waits for pages, and what happens to its memory meanwhile: pages that it has pinned, or not
//! reached yet, are discarded, marked or unmapped; it is killed; or nobody is left to answer.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use pinbuf_uapi::Range;

use crate::common::{refused, views_agree};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, pattern, punch_hole, HUGE, PAGE};
use pinbuf_test_harness::support::process::{Child, PATIENCE};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "late":
    protected_pages_of_a_file,
    protected_huge_pages,
    several_files_in_a_call,
    hole_while_waiting,
    hole_in_hugetlb_while_waiting,
    dont_need_while_waiting,
    dont_need_of_a_file_while_waiting,
    poisoned_while_waiting,
    poisoned_huge_page_while_waiting,
    guard_behind_a_late_page,
    unmapped_while_waiting,
    killed_while_waiting,
    signalled_while_waiting,
    own_faults,
    own_faults_of_hugetlb,
}

/// `MADV_GUARD_INSTALL`.
const GUARD: i32 = 102;

/// Pages of the memory in most tests, and the one that is late.
const PAGES: usize = 12;
const LATE: usize = 6;
/// A page that a create has pinned when it waits for the late one, and one that it has not reached.
const BEFORE: usize = 2;
const BEHIND: usize = 9;

/// Runs a create in a thread, and something else beside it. Faults are over before its result is waited for, so
/// that an error of `beside` ends the test.
fn create_beside(
    ranges: &[Range],
    faults: Faults,
    beside: impl FnOnce(&Faults, &dyn Fn() -> bool) -> Result<()>,
) -> Result<Result<Buffer, Errno>> {
    let device = Device::open()?;
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| device.create(ranges));
        let result = beside(&faults, &|| caller.is_finished());
        drop(faults);
        let created = caller.join().expect("the caller panicked");
        result.map(|()| created)
    })
}

/// Expects a fault at an offset of the memory, while a create still runs.
fn faults_at(
    faults: &Faults,
    memory: &Memory,
    offset: usize,
    done: &dyn Fn() -> bool,
) -> Result<u64> {
    let addr = faults.take()?;
    check_eq!(addr, memory.addr() + offset as u64, "the page it waits for");
    check!(!done(), "create did not wait for the page at {offset:#x}");
    Ok(addr)
}

/// Takes over the faults of some memory, and fills all of its pages but some.
fn filled_but(memory: &Memory, size: usize, late: &[usize], seed: u64) -> Result<Faults> {
    let faults = Faults::of(memory, Mode::Missing)?;
    for page in (0..memory.len() / size).filter(|page| !late.contains(page)) {
        let data = pattern(seed, (page * size) as u64, size);
        faults.copy(memory.addr() + (page * size) as u64, &data)?;
    }
    Ok(faults)
}

/// All pages are there and write-protected. A pin is a write, so each is asked for.
fn protected(memory: &Memory, size: usize) -> Result<()> {
    let data = pattern(50, 0, memory.len());
    memory.write(0, &data);
    let faults = Faults::of(memory, Mode::Protected)?;
    faults.protect(memory.addr(), memory.len(), true)?;
    let created = create_beside(&[memory.range()], faults, |faults, done| {
        for offset in (0..memory.len()).step_by(size) {
            let addr = faults_at(faults, memory, offset, done)?;
            faults.protect(addr, size, false)?;
        }
        Ok(())
    })?;
    let buffer = created.context("PINBUF_CREATE")?;
    let mut seen = vec![0; memory.len()];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &data)?;
    views_agree(&buffer, &[(memory, 0, memory.len())])
}

fn protected_pages_of_a_file() -> Result<()> {
    protected(
        &Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?,
        PAGE,
    )
}

fn protected_huge_pages() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    protected(&Memory::shared(huge_memfd(3 * HUGE)?, 3 * HUGE)?, HUGE)
}

/// Pages of three files and of private memory, of two sizes, in an order of their own; of each but the first
/// some are late.
fn several_files_in_a_call() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let whole = Memory::shared(memfd(8 * PAGE, 0)?, 8 * PAGE)?;
    whole.write(0, &pattern(51, 0, 8 * PAGE));
    let file = Memory::shared(memfd(8 * PAGE, 0)?, 8 * PAGE)?;
    let of_file = filled_but(&file, PAGE, &[0, 5], 52)?;
    let huge = Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE)?;
    let of_huge = filled_but(&huge, HUGE, &[1], 53)?;
    let private = Memory::small_pages(4 * PAGE)?;
    let of_private = filled_but(&private, PAGE, &[3], 54)?;
    let pieces = [
        (&whole, 0, 4 * PAGE, 51),
        (&huge, HUGE + 3 * PAGE, 5 * PAGE, 53),
        (&file, 4 * PAGE, 4 * PAGE, 52),
        (&private, 0, 4 * PAGE, 54),
        (&whole, 4 * PAGE, 4 * PAGE, 51),
        (&file, 0, 4 * PAGE, 52),
        (&huge, 0, HUGE, 53),
    ];
    let ranges = pieces.map(|(memory, at, len, _)| memory.part(at, len));
    let created = create_beside(&ranges, of_huge, |of_huge, done| {
        // GUP asks for the page of 4 KiB at which it faults; the answer is the whole huge page.
        let addr = faults_at(of_huge, &huge, HUGE, done)?;
        of_huge.copy(addr, &pattern(53, HUGE as u64, HUGE))?;
        let small = [
            (&of_file, &file, 5 * PAGE, 52),
            (&of_private, &private, 3 * PAGE, 54),
            (&of_file, &file, 0, 52),
        ];
        for (faults, memory, offset, seed) in small {
            let addr = faults_at(faults, memory, offset, done)?;
            faults.copy(addr, &pattern(seed, offset as u64, PAGE))?;
        }
        Ok(())
    })?;
    let buffer = created.context("PINBUF_CREATE")?;
    let mapped = buffer.map()?;
    let mut start = 0;
    for (_, at, len, seed) in pieces {
        let mut seen = vec![0; len];
        mapped.read(start, &mut seen);
        same("the buffer", start, &seen, &pattern(seed, at as u64, len))?;
        start += len;
    }
    views_agree(
        &buffer,
        &pieces.map(|(memory, at, len, _)| (memory, at, len)),
    )
}

/// What a discard takes away.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// The page itself.
    Page,
    /// The mapping's reference to it.
    Reference,
}

/// While a create waits, a page that it has pinned and one that it has not reached are discarded. The buffer
/// keeps the first as it was, and the second is waited for again.
fn discarded(
    memory: &Memory,
    size: usize,
    takes: Takes,
    discard: impl Fn(usize) -> Result<()>,
) -> Result<()> {
    let faults = filled_but(memory, size, &[LATE], 55)?;
    let again = pattern(56, 0, size);
    let created = create_beside(&[memory.range()], faults, |faults, done| {
        let addr = faults_at(faults, memory, LATE * size, done)?;
        discard(BEFORE * size)?;
        discard(BEHIND * size)?;
        faults.copy(addr, &pattern(55, (LATE * size) as u64, size))?;
        if takes == Takes::Page {
            let addr = faults_at(faults, memory, BEHIND * size, done)?;
            faults.copy(addr, &again)?;
        }
        Ok(())
    })?;
    let buffer = created.context("PINBUF_CREATE")?;
    let mut expected = pattern(55, 0, memory.len());
    if takes == Takes::Page {
        expected[BEHIND * size..][..size].copy_from_slice(&again);
    }
    let mut seen = vec![0; memory.len()];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &expected)?;
    if takes == Takes::Page {
        expected[BEFORE * size..][..size].fill(0);
    }
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &expected)
}

fn hole_while_waiting() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    discarded(&memory, PAGE, Takes::Page, |offset| {
        punch_hole(&file, offset, PAGE)
    })
}

fn hole_in_hugetlb_while_waiting() -> Result<()> {
    // The buffer keeps the page that is punched out, and the file gets another one.
    let _pool = HugePool::with_free(PAGES as i64 + 1)?;
    let file = huge_memfd(PAGES * HUGE)?;
    let memory = Memory::shared(&file, PAGES * HUGE)?;
    discarded(&memory, HUGE, Takes::Page, |offset| {
        punch_hole(&file, offset, HUGE)
    })
}

fn dont_need_while_waiting() -> Result<()> {
    let memory = Memory::small_pages(PAGES * PAGE)?;
    discarded(&memory, PAGE, Takes::Page, |offset| {
        Ok(memory.advise(offset, PAGE, libc::MADV_DONTNEED)?)
    })
}

/// The file keeps its pages.
fn dont_need_of_a_file_while_waiting() -> Result<()> {
    let memory = Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?;
    discarded(&memory, PAGE, Takes::Reference, |offset| {
        Ok(memory.advise(offset, PAGE, libc::MADV_DONTNEED)?)
    })
}

/// Expects that a create that waits for the late page fails because of `then`, and keeps nothing.
fn fails(
    memory: &Memory,
    size: usize,
    then: impl FnOnce(&Faults, u64) -> Result<()>,
) -> Result<()> {
    let (pins, buffers) = (kernel::pins()?, kernel::dma_bufs()?);
    let faults = filled_but(memory, size, &[LATE], 57)?;
    let created = create_beside(&[memory.range()], faults, |faults, done| {
        let addr = faults_at(faults, memory, LATE * size, done)?;
        check!(
            kernel::pins()? > pins,
            "nothing was pinned before the late page"
        );
        then(faults, addr)
    })?;
    check_eq!(created.map(drop), Err(Errno::EFAULT), "create");
    check_eq!(kernel::pins()?, pins, "pins afterwards");
    check_eq!(kernel::dma_bufs()?, buffers, "dma-bufs afterwards");
    Ok(())
}

fn poisoned_while_waiting() -> Result<()> {
    let memory = Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?;
    fails(&memory, PAGE, |faults, addr| faults.poison(addr, PAGE))
}

fn poisoned_huge_page_while_waiting() -> Result<()> {
    let _pool = HugePool::with_free(PAGES as i64)?;
    let memory = Memory::shared(huge_memfd(PAGES * HUGE)?, PAGES * HUGE)?;
    fails(&memory, HUGE, |faults, addr| faults.poison(addr, HUGE))
}

fn guard_behind_a_late_page() -> Result<()> {
    let memory = Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?;
    fails(&memory, PAGE, |faults, addr| {
        memory.advise(BEHIND * PAGE, PAGE, GUARD)?;
        faults.copy(addr, &pattern(57, (LATE * PAGE) as u64, PAGE))
    })?;
    refused("a guard", Errno::EFAULT, &[memory.range()])
}

/// Closing the userfaultfd wakes the waiting call, which finds no mapping.
fn unmapped_while_waiting() -> Result<()> {
    let memory = Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?;
    fails(&memory, PAGE, |_, _| Ok(memory.unmap(LATE * PAGE, PAGE)?))
}

/// Waits until a process waits for a userfault in a call of pinbuf's.
fn until_waits(child: &mut Child) -> Result<()> {
    let start = Instant::now();
    while !waits(child)? {
        check!(child.runs()?, "the child ended instead of waiting");
        check!(start.elapsed() < PATIENCE, "the child does not wait");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn waits(child: &Child) -> Result<bool> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.pid()))?;
    for task in tasks {
        let stack = kernel::read(task?.path().join("stack")).unwrap_or_default();
        if stack.contains("handle_userfault") && stack.contains("[pinbuf]") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What must be as before after a create was killed.
fn balance(device: &Device) -> Result<(i64, i64, i64, u64)> {
    let allowance = device.query()?.allowance_used;
    Ok((
        kernel::pins()?,
        kernel::dma_bufs()?,
        HugePool::free()?,
        allowance,
    ))
}

/// Expects that a process that waits in a create dies of a signal at once, and leaves nothing. A signal that it
/// handles does not end the wait; it comes before SIGKILL alone, as the kernel delivers no other one behind it while a
/// thread waits so.
fn dies_of(signal: Signal, action: impl FnOnce() -> Result<()>) -> Result<()> {
    let device = Device::open()?;
    let before = balance(&device)?;
    let mut child = Child::run(action)?;
    until_waits(&mut child)?;
    if signal == Signal::SIGKILL {
        child.kill(Signal::SIGUSR1)?;
    }
    std::thread::sleep(Duration::from_millis(300));
    check!(waits(&child)?, "the wait ended by itself, or by SIGUSR1");
    check!(kernel::pins()? > before.0, "nothing was pinned meanwhile");
    let start = Instant::now();
    child.kill(signal)?;
    let (status, said) = child.end(PATIENCE)?;
    check!(
        matches!(status, WaitStatus::Signaled(_, by, _) if by == signal),
        "the child ended by {status:?}, saying {said:?}"
    );
    let took = start.elapsed();
    check!(took < Duration::from_secs(5), "it took {took:?} to die");
    check_eq!(
        balance(&device)?,
        before,
        "pins, dma-bufs, free huge pages, and allowance used"
    );
    Ok(())
}

extern "C" fn handled(_: libc::c_int) {}

/// Lets this process handle SIGUSR1.
fn handle() -> Result<()> {
    let handler = handled as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing.
    let before = unsafe { libc::signal(libc::SIGUSR1, handler) };
    check!(before != libc::SIG_ERR, "no handler for SIGUSR1");
    Ok(())
}

/// One thread creates from several files, while another one has the faults and does not answer.
fn killed_while_waiting() -> Result<()> {
    let _pool = HugePool::with_free(PAGES as i64)?;
    dies_of(Signal::SIGKILL, || {
        handle()?;
        let whole = Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?;
        let huge = Memory::shared(huge_memfd(PAGES * HUGE)?, PAGES * HUGE)?;
        let _of_huge = filled_but(&huge, HUGE, &[LATE], 58)?;
        let device = Device::open()?;
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| device.create(&[whole.range(), huge.range()]).map(drop));
            let created = caller.join().expect("the caller panicked");
            anyhow::bail!("create ended: {created:?}")
        })
    })
}

/// A signal with a handler does not end the call, however much is left to pin after it. The handler runs when the call
/// has ended.
fn signalled_while_waiting() -> Result<()> {
    /// More than the driver pins between two looks at the signals.
    const MORE: usize = 2048;
    handle()?;
    let device = Device::open()?;
    let (late, rest) = (
        Memory::small_pages(PAGE)?,
        Memory::small_pages(MORE * PAGE)?,
    );
    rest.touch_to_write();
    let faults = Faults::of(&late, Mode::Missing)?;
    // SAFETY: a call without conditions.
    let creator = unsafe { libc::pthread_self() };
    let created = std::thread::scope(|scope| {
        let other = scope.spawn(|| -> Result<()> {
            let addr = faults.take()?;
            // SAFETY: that thread waits for this one.
            unsafe { libc::pthread_kill(creator, libc::SIGUSR1) };
            faults.copy(addr, &pattern(60, 0, PAGE))?;
            Ok(())
        });
        let created = device.create(&[late.range(), rest.range()]);
        other.join().expect("a thread panicked").map(|()| created)
    })?;
    let buffer = created.context("PINBUF_CREATE with a signal")?;
    views_agree(&buffer, &[(&late, 0, PAGE), (&rest, 0, MORE * PAGE)])
}

/// The thread that creates is the one that would have to answer: it waits until it is killed.
fn own(signal: Signal, file: impl Fn() -> Result<OwnedFd>, size: usize) -> Result<()> {
    dies_of(signal, || {
        handle()?;
        let memory = Memory::shared(file()?.as_fd(), PAGES * size)?;
        let _faults = filled_but(&memory, size, &[LATE], 59)?;
        let created = Device::open()?.create(&[memory.range()]).map(drop);
        anyhow::bail!("create ended: {created:?}")
    })
}

fn own_faults() -> Result<()> {
    own(Signal::SIGTERM, || memfd(PAGES * PAGE, 0), PAGE)
}

fn own_faults_of_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(PAGES as i64)?;
    own(Signal::SIGKILL, || huge_memfd(PAGES * HUGE), HUGE)
}
