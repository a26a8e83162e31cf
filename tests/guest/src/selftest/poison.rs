// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that is found broken after it was pinned: nobody gets to use it from then on, and its neighbours are
//! not affected.
//!
//! `MADV_HWPOISON` breaks it. Once it is free it is repaired ([`Broken`]): the kernel gives out a huge page of
//! which a part is broken, and another test would get that.

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Barrier;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::WaitStatus;
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::frames;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, BLOCK, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{signal_of, Child, PATIENCE};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "poison":
    // The core warns of a kernel mapping that fails.
    small_pages allowing ["at dma_buf_vmap+"],
    shmem allowing ["at dma_buf_vmap+"],
    transparent_huge_page allowing ["at dma_buf_vmap+"],
    hugetlb allowing ["at dma_buf_vmap+"],
    mapped_before allowing ["at dma_buf_vmap+"],
    far_behind allowing ["at dma_buf_vmap+"],
    before_it_is_pinned,
    while_it_is_faulted within 180,
}

/// `KPF_HWPOISON`.
const BROKEN: u64 = 1 << 19;

/// Fills memory with values that identify each page.
fn fill(memory: &Memory) {
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.set(offset, stamp(31, offset as u64));
    }
}

/// While it lives, `SIGBUS` has no effect: a process that maps a page that breaks gets one.
struct Survive(SigAction);

impl Survive {
    fn new() -> Result<Self> {
        extern "C" fn notice(_: libc::c_int) {}
        let handler = SigHandler::Handler(notice);
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        let before = unsafe { sigaction(Signal::SIGBUS, &action) }?;
        Ok(Self(before))
    }
}

impl Drop for Survive {
    fn drop(&mut self) {
        // SAFETY: what was there before.
        let _ = unsafe { sigaction(Signal::SIGBUS, &self.0) };
    }
}

/// Broken frames, which are repaired when this is dropped: nobody may use them by then.
pub(crate) struct Broken(Vec<frames::Pfn>);

impl Broken {
    const REPAIR: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

    pub(crate) fn none() -> Result<Self> {
        let status = Command::new("modprobe")
            .args(["--quiet", "hwpoison_inject"])
            .status()?;
        if !status.success() {
            // Pages that were broken could not be repaired.
            let release = kernel::read("/proc/sys/kernel/osrelease")?;
            bail!(Skip(format!(
                "the kernel {} has no hwpoison_inject",
                release.trim()
            )));
        }
        Ok(Self(Vec::new()))
    }

    /// Breaks a page.
    pub(crate) fn add(&mut self, memory: &Memory, offset: usize) -> Result<()> {
        let mut pfn = frames::frames(memory, offset, PAGE)?[0];
        if frames::flags(pfn)? & frames::HUGETLB != 0 {
            // Its first page is marked.
            pfn &= !(HUGE / PAGE - 1) as u64;
        }
        self.0.push(pfn);
        // The error says that a pinned page cannot be removed; it is marked all the same.
        let result = {
            let _survive = Survive::new()?;
            memory.advise(offset, PAGE, libc::MADV_HWPOISON)
        };
        check!(
            frames::flags(pfn)? & BROKEN != 0,
            "frame {pfn:#x} is not marked: {result:?}"
        );
        Ok(())
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        for pfn in &self.0 {
            if let Err(error) = kernel::write(Self::REPAIR, format!("{pfn:#x}")) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// The result of touching a page of a mapping.
fn signal_at(mapped: &Memory, offset: usize) -> Result<Option<Signal>> {
    signal_of(|| {
        std::hint::black_box(mapped.get(offset));
    })
}

/// The code of the SIGBUS that touching a page of a mapping raises: a monitor decides by it what it reports to its
/// guest.
fn code_at(mapped: &Memory, offset: usize) -> Result<i32> {
    extern "C" fn end_by_code(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a handler with SA_SIGINFO the signal's information.
        let code = unsafe { (*info).si_code };
        // SAFETY: ends the child.
        unsafe { libc::_exit(100 + code) };
    }
    let child = Child::run(|| {
        let handler = SigHandler::SigAction(end_by_code);
        let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: the handler makes a system call only.
        unsafe { sigaction(Signal::SIGBUS, &action) }?;
        std::hint::black_box(mapped.get(offset));
        Ok(())
    })?;
    match child.end(PATIENCE)? {
        (WaitStatus::Exited(_, status), _) if status >= 100 => Ok(status - 100),
        other => bail!("the child ended by {other:?}"),
    }
}

/// Expects that nobody gets to use the buffer, of which the pages of `broken` are broken, and that
/// all others can be read and written. Nothing has been mapped before.
fn is_broken(buffer: &Buffer, broken: std::ops::Range<usize>, align: usize) -> Result<()> {
    let len = buffer.len()?;
    let fd = Some(buffer.as_fd());
    let mapped = Memory::map_aligned(len, align, RW, libc::MAP_SHARED, fd, 0)?;
    for offset in [broken.start, broken.end - PAGE] {
        let signal = signal_at(&mapped, offset)?;
        check_eq!(signal, Some(Signal::SIGBUS), "touching {offset:#x}");
    }
    check_eq!(
        code_at(&mapped, broken.start)?,
        libc::BUS_MCEERR_AR,
        "the signal's code"
    );
    for offset in (0..len).step_by(PAGE).filter(|at| !broken.contains(at)) {
        let expected = stamp(31, offset as u64);
        check_eq!(mapped.get(offset), expected, "what is at {offset:#x}");
        mapped.set(offset + 8, expected);
    }
    let signal = signal_at(&mapped, broken.start)?;
    check_eq!(
        signal,
        Some(Signal::SIGBUS),
        "touching it after its neighbours"
    );
    is_not_mapped(buffer)
}

/// Expects that no device and no part of the kernel gets the buffer.
fn is_not_mapped(buffer: &Buffer) -> Result<()> {
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    for direction in [
        Direction::ToDevice,
        Direction::FromDevice,
        Direction::Bidirectional,
    ] {
        let error = importer.map(direction).err();
        let error = error.and_then(|error| error.raw_os_error());
        check_eq!(error, Some(libc::EHWPOISON), "{direction:?}");
    }
    let error = importer.vmap().err().and_then(|error| error.raw_os_error());
    check_eq!(error, Some(libc::EHWPOISON), "the kernel's mapping");
    Ok(())
}

fn small_pages() -> Result<()> {
    let mut broken = Broken::none()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    fill(&memory);
    let buffer = Device::open()?.create(&[memory.range()])?;
    broken.add(&memory, 5 * PAGE)?;
    is_broken(&buffer, 5 * PAGE..6 * PAGE, PAGE)
}

fn shmem() -> Result<()> {
    let mut broken = Broken::none()?;
    let file = memfd(16 * PAGE, 0)?;
    let memory = Memory::shared(&file, 16 * PAGE)?;
    fill(&memory);
    let buffer = Device::open()?.create(&[memory.range()])?;
    broken.add(&memory, 5 * PAGE)?;
    is_broken(&buffer, 5 * PAGE..6 * PAGE, PAGE)
}

/// Memory in a transparent huge page.
fn transparent() -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    fill(&memory);
    let pfns = frames::all_frames(&memory)?;
    let huge = frames::with_flag(&pfns[..1], frames::THP)?;
    check_eq!(huge, 1, "transparent huge pages");
    Ok(memory)
}

/// One page of a block that could have a huge entry.
fn transparent_huge_page() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let mut broken = Broken::none()?;
    let memory = transparent()?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    broken.add(&memory, 77 * PAGE)?;
    is_broken(&buffer, 77 * PAGE..78 * PAGE, HUGE)
}

/// A page of the pool is broken as a whole.
fn hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let mut broken = Broken::none()?;
    let memory = Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE)?;
    fill(&memory);
    let buffer = Device::open()?.create(&[memory.range()])?;
    broken.add(&memory, HUGE + 77 * PAGE)?;
    is_broken(&buffer, HUGE..2 * HUGE, HUGE)
}

/// What was mapped already stays, as `DESIGN.md` says; what is mapped anew is not given out.
fn mapped_before() -> Result<()> {
    let mut broken = Broken::none()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    fill(&memory);
    let buffer = Device::open()?.create(&[memory.range()])?;
    let before = buffer.map()?;
    before.touch();
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    broken.add(&memory, 5 * PAGE)?;
    check_eq!(signal_at(&before, 4 * PAGE)?, None, "a neighbour");
    let mut seen = [0; 8];
    importer.read(mapping, 4 * PAGE as u64, &mut seen)?;
    check_eq!(
        u64::from_le_bytes(seen),
        stamp(31, 4 * PAGE as u64),
        "a neighbour, as the device reads it"
    );
    importer.unmap(mapping)?;
    importer.vunmap()?;
    drop((importer, before));
    is_broken(&buffer, 5 * PAGE..6 * PAGE, PAGE)
}

/// One page of many, wherever it is: the last one, and one beyond the first few thousand pages.
fn far_behind() -> Result<()> {
    const PAGES: usize = 5000;
    let device = Device::open()?;
    for page in [4096, PAGES - 1] {
        let mut broken = Broken::none()?;
        let memory = Memory::small_pages(PAGES * PAGE)?;
        memory.touch();
        let buffer = device.create(&[memory.range()])?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        importer.unmap(importer.map(Direction::Bidirectional)?.0)?;
        broken.add(&memory, page * PAGE)?;
        is_not_mapped(&buffer).with_context(|| format!("page {page} is broken"))?;
    }
    Ok(())
}

/// The mm core does not pin it.
fn before_it_is_pinned() -> Result<()> {
    let mut broken = Broken::none()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    fill(&memory);
    broken.add(&memory, 5 * PAGE)?;
    let device = Device::open()?;
    let error = device.create(&[memory.range()]).err();
    check_eq!(error, Some(Errno::EFAULT), "create");
    drop(device.create(&[memory.part(0, 5 * PAGE), memory.part(6 * PAGE, 10 * PAGE)])?);
    Ok(())
}

/// Two threads touch a block for the first time while a page of it breaks: whether that block gets a
/// huge entry or a page table, they agree.
fn while_it_is_faulted() -> Result<()> {
    const ROUNDS: usize = 12;
    kernel::needs_transparent_huge_pages()?;
    let device = Device::open()?;
    let mut broken = Broken::none()?;
    // Kept, so that no round gets what an earlier one broke.
    let mut memories = Vec::new();
    let mut broken_first = 0;
    for round in 0..ROUNDS {
        let memory = transparent().with_context(|| format!("round {round}"))?;
        let buffer = device.create(&[memory.range()])?;
        let fd = Some(buffer.as_fd());
        let mapped = Memory::map_aligned(HUGE, HUGE, RW, libc::MAP_SHARED, fd, 0)?;
        let bad = 1 + (stamp(32, round as u64) % 510) as usize;
        let barrier = Barrier::new(3);
        // So that either may be first.
        let wait = |thread: usize| {
            barrier.wait();
            for _ in 0..stamp(33 + thread as u64, round as u64) % 3000 {
                std::hint::spin_loop();
            }
        };
        std::thread::scope(|scope| -> Result<()> {
            for (thread, page) in [(0, 0), (1, BLOCK - 1)] {
                let (mapped, wait) = (&mapped, &wait);
                scope.spawn(move || {
                    wait(thread);
                    std::hint::black_box(mapped.get(page * PAGE));
                });
            }
            wait(2);
            broken.add(&memory, bad * PAGE)
        })?;
        for page in (0..BLOCK).filter(|page| *page != bad) {
            let offset = page * PAGE;
            let expected = stamp(31, offset as u64);
            check_eq!(mapped.get(offset), expected, "page {page}, round {round}");
        }
        match signal_at(&mapped, bad * PAGE)? {
            None => {}
            Some(Signal::SIGBUS) => broken_first += 1,
            Some(other) => check_eq!(other, Signal::SIGBUS, "the broken page"),
        }
        memories.push(memory);
    }
    println!("# in {broken_first} of {ROUNDS} rounds the page broke before it was mapped");
    Ok(())
}
