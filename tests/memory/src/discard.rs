// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a discard under a live buffer does today: the process gets other pages, the buffer keeps
//! the old ones, which nobody else can get meanwhile. Nothing tells user space.

use std::os::fd::AsFd;

use anyhow::Result;
use pinbuf_test_importer::{Direction, Importer, Limits, Mapping};

use crate::common::huge_private;
use crate::frames::{all_frames, Pfn};
use crate::swap::{give_up, page_out};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{
    huge_memfd, memfd, pattern, punch_hole, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "discard":
    dont_need,
    dont_need_locked,
    lazily_freed,
    hole_punched,
    removed,
    truncated,
    hole_in_hugetlb,
    dont_need_hugetlb,
    unmapped,
    unmapped_and_mapped_again,
    moved_elsewhere,
    balloon within 120,
}

const LEN: usize = 64 * PAGE;

/// A buffer of some memory, with a device and a mapping, and the frames that it has.
struct Live {
    buffer: Buffer,
    mapped: Memory,
    importer: Importer,
    mapping: Mapping,
    frames: Vec<Pfn>,
    pins: i64,
    len: usize,
}

impl Live {
    fn new(memory: &Memory) -> Result<Self> {
        memory.write(0, &pattern(1, 0, memory.len()));
        let pins = kernel::pins()?;
        let device = Device::open()?;
        let buffer = device.create(&[memory.range()])?;
        let mapped = buffer.map()?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        let mapping = importer.map(Direction::Bidirectional)?.0;
        Ok(Self {
            buffer,
            mapped,
            importer,
            mapping,
            frames: all_frames(memory)?,
            pins: kernel::pins()? - pins,
            len: memory.len(),
        })
    }

    /// Device and mapping see the old pages, each other's writes, and keep as many pins.
    fn keeps_the_old(&self, seed: u64) -> Result<()> {
        let mut seen = vec![0; self.len];
        self.importer.read(self.mapping, 0, &mut seen)?;
        same("the device", 0, &seen, &pattern(seed, 0, self.len))?;
        self.mapped.read(0, &mut seen);
        same("the mapping", 0, &seen, &pattern(seed, 0, self.len))?;
        let next = pattern(seed + 1, 0, self.len);
        self.importer.write(self.mapping, 0, &next)?;
        self.mapped.read(0, &mut seen);
        same("the mapping", 0, &seen, &next)
    }

    /// What the process has there now is none of the buffer's pages.
    fn has_others(&self, memory: &Memory) -> Result<()> {
        memory.touch();
        for offset in (0..memory.len()).step_by(PAGE) {
            memory.set(offset, 5);
        }
        let mut old = self.frames.clone();
        old.sort_unstable();
        for pfn in all_frames(memory)? {
            check!(
                old.binary_search(&pfn).is_err(),
                "frame {pfn:#x} is the buffer's and the process's"
            );
        }
        Ok(())
    }

    /// The buffer goes, and its pages with it.
    fn ends(self) -> Result<()> {
        let pins = kernel::pins()?;
        let held = self.pins;
        drop((self.importer, self.mapped, self.buffer));
        check_eq!(pins - kernel::pins()?, held, "pins released");
        Ok(())
    }
}

fn zero(memory: &Memory) -> Result<()> {
    let mut seen = vec![1; memory.len()];
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &vec![0; memory.len()])
}

/// The process sees zeroes, in pages of its own; the device goes on with the old ones.
fn parts_ways(memory: &Memory, discard: impl Fn() -> Result<()>) -> Result<()> {
    let live = Live::new(memory)?;
    discard()?;
    zero(memory)?;
    live.keeps_the_old(1)?;
    zero(memory)?;
    live.has_others(memory)?;
    live.keeps_the_old(2)?;
    live.ends()
}

fn dont_need() -> Result<()> {
    let memory = Memory::small_pages(LEN)?;
    parts_ways(&memory, || {
        Ok(memory.advise(0, LEN, libc::MADV_DONTNEED)?)
    })
}

fn dont_need_locked() -> Result<()> {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    let memory = Memory::small_pages(LEN)?;
    // SAFETY: locks the test's own mapping.
    let result = unsafe { libc::mlock(memory.at(0).cast(), LEN) };
    nix::errno::Errno::result(result)?;
    parts_ways(&memory, || {
        Ok(memory.advise(0, LEN, MADV_DONTNEED_LOCKED)?)
    })
}

/// Given up, but not taken away while it is pinned: nobody parts.
fn lazily_freed() -> Result<()> {
    let memory = Memory::small_pages(LEN)?;
    let live = Live::new(&memory)?;
    give_up(&memory)?;
    page_out(&memory)?;
    check_eq!(all_frames(&memory)?, live.frames, "frames");
    live.keeps_the_old(1)?;
    let mut seen = vec![0; LEN];
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &pattern(2, 0, LEN))?;
    live.ends()
}

fn hole_punched() -> Result<()> {
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    parts_ways(&memory, || punch_hole(&file, 0, LEN))
}

fn removed() -> Result<()> {
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    parts_ways(&memory, || Ok(memory.advise(0, LEN, libc::MADV_REMOVE)?))
}

fn truncated() -> Result<()> {
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    parts_ways(&memory, || {
        nix::unistd::ftruncate(&file, 0)?;
        nix::unistd::ftruncate(&file, LEN as i64)?;
        Ok(())
    })
}

fn hole_in_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let file = huge_memfd(HUGE)?;
    let memory = Memory::shared(&file, HUGE)?;
    parts_ways(&memory, || {
        punch_hole(&file, 0, HUGE)?;
        check_eq!(HugePool::free()?, 1, "free huge pages after the hole");
        Ok(())
    })?;
    drop((memory, file));
    check_eq!(HugePool::free()?, 2, "free huge pages after all");
    Ok(())
}

fn dont_need_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let memory = huge_private(1)?;
    parts_ways(&memory, || {
        Ok(memory.advise(0, HUGE, libc::MADV_DONTNEED)?)
    })
}

fn unmapped() -> Result<()> {
    let memory = Memory::small_pages(LEN)?;
    let live = Live::new(&memory)?;
    drop(memory);
    let other = Memory::small_pages(16 * LEN)?;
    live.has_others(&other)?;
    live.keeps_the_old(1)?;
    live.ends()
}

fn unmapped_and_mapped_again() -> Result<()> {
    let memory = Memory::small_pages(LEN)?;
    parts_ways(&memory, || Ok(memory.replace(0, LEN)?))
}

/// Pages that move to another address stay the buffer's.
fn moved_elsewhere() -> Result<()> {
    let mut memory = Memory::small_pages(LEN)?;
    let live = Live::new(&memory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let target = Memory::map(LEN, RW, flags, None, 0)?;
    memory.remap_onto(target, 0)?;
    check_eq!(all_frames(&memory)?, live.frames, "frames");
    live.keeps_the_old(1)?;
    let mut seen = vec![0; LEN];
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &pattern(2, 0, LEN))?;
    live.ends()
}

/// A balloon that takes and gives back, page by page, again and again: each round leaves the
/// buffer's pages alone, and what a new buffer is given is what the process has.
fn balloon() -> Result<()> {
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    memory.advise(0, LEN, libc::MADV_NOHUGEPAGE)?;
    let live = Live::new(&memory)?;
    let device = Device::open()?;
    for round in 0..40 {
        for page in (round % 3..64).step_by(3) {
            memory.advise(page * PAGE, PAGE, libc::MADV_REMOVE)?;
        }
        for page in 0..64 {
            memory.set(page * PAGE + 8, (round * 64 + page) as u64);
        }
        let buffer = device.create(&[memory.range()])?;
        let mapped = buffer.map()?;
        for page in 0..64 {
            check_eq!(
                mapped.get(page * PAGE + 8),
                (round * 64 + page) as u64,
                "round {round}, page {page}"
            );
        }
    }
    // Every page has been taken once at least.
    live.has_others(&memory)?;
    live.keeps_the_old_after(&memory)?;
    live.ends()
}

impl Live {
    /// The bytes were overwritten by the process while the pages were shared; what counts is that
    /// they are no longer.
    fn keeps_the_old_after(&self, memory: &Memory) -> Result<()> {
        self.importer
            .write(self.mapping, 0, &pattern(9, 0, self.len))?;
        for offset in (0..memory.len()).step_by(PAGE) {
            check_eq!(memory.get(offset), 5, "the memory at {offset:#x}");
        }
        self.keeps_the_old(9)
    }
}
