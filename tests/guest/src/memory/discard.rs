// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a discard under a live buffer does: the process gets other pages, and the buffer keeps the old ones,
//! which nobody else gets meanwhile. And what the driver reports of it while swap is on.

use std::os::fd::AsFd;

use anyhow::{bail, Result};
use pinbuf_test_importer::{Direction, Importer, Limits, Mapping};

use crate::frames::{all_frames, with_flag, Pfn, THP};
use crate::swap::{give_up, page_out, SlowSwap};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::kinds::huge_private;
use pinbuf_test_harness::support::memory::{
    huge_memfd, memfd, pattern, punch_hole, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Skip};
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
    in_the_swap_cache,
    parts_of_folios_in_the_swap_cache,
    turmoil_with_swap within 180,
}

const LEN: usize = 64 * PAGE;
/// `KPF_SWAPCACHE`.
const SWAP_CACHE: u64 = 1 << 13;

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

/// The process sees zeroes, in its own new pages; the device continues with the old ones.
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

/// `MADV_FREE` does not take a pinned page away: process and buffer keep the same page.
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

/// A balloon that takes pages and gives them back, again and again: no round changes the buffer's pages, and a
/// new buffer gets the pages that the process has.
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

/// What is reported of a buffer: pages that are discarded, and pages not known of.
fn reported(device: &Device, buffer: &Buffer) -> Result<(usize, usize)> {
    let info = device.describe(buffer)?;
    Ok((
        info.discarded_bytes as usize / PAGE,
        info.unsure_bytes as usize / PAGE,
    ))
}

/// Pages that were read back from swap stay in the swap cache, mapped, where a buffer finds them. When their
/// owner unmaps them, they are discarded.
fn in_the_swap_cache() -> Result<()> {
    let _swap = SlowSwap::on(64 << 20)?;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(1, 0, LEN));
    page_out(&memory)?;
    memory.touch();
    let cached = with_flag(&all_frames(&memory)?, SWAP_CACHE)?;
    let buffer = device.create(&[memory.range()])?;
    println!("# {cached} of 64 pages are in the swap cache");
    for _ in 0..3 {
        page_out(&memory)?;
        check_eq!(reported(&device, &buffer)?, (0, 0), "paged out");
    }
    let still = with_flag(&all_frames(&memory)?, SWAP_CACHE)?;
    memory.advise(0, LEN / 2, libc::MADV_DONTNEED)?;
    let seen = reported(&device, &buffer)?;
    println!("# {still} are in the swap cache; reported {seen:?}");
    check_eq!(seen, (32, 0), "half of it discarded");
    Ok(())
}

fn parts_of_folios_in_the_swap_cache() -> Result<()> {
    const FOLIO: usize = 16;
    kernel::needs_transparent_huge_pages()?;
    if PAGE > 4096 {
        // CONFIG_THP_SWAP is for pages of 4 KiB.
        bail!(Skip(
            "this kernel splits folios before they are swapped out".to_owned()
        ));
    }
    let _setting = kernel::Setting::choice(kernel::transparent_size(FOLIO * PAGE), "always")?;
    let _swap = SlowSwap::on(256 << 20)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let len = 256 * FOLIO * PAGE;
    let memory = Memory::map_aligned(len, FOLIO * PAGE, RW, flags, None, 0)?;
    memory.write(0, &pattern(1, 0, len));
    // While they are written out, an access finds them in the swap cache.
    let mut cached = 0;
    for _ in 0..5 {
        page_out(&memory)?;
        memory.touch();
        let frames = all_frames(&memory)?;
        cached = 0;
        for &frame in &frames {
            cached +=
                usize::from(crate::frames::flags(frame)? & (SWAP_CACHE | THP) == SWAP_CACHE | THP);
        }
        if cached > 0 {
            break;
        }
    }
    let buffer = device.create(&[memory.range()])?;
    println!(
        "# {cached} of {} pages are in the swap cache, in folios",
        256 * FOLIO
    );
    for folio in 0..256 {
        memory.advise((folio * FOLIO + 3) * PAGE, PAGE, libc::MADV_DONTNEED)?;
    }
    let seen = reported(&device, &buffer)?;
    println!("# reported {seen:?}");
    for _ in 0..3 {
        page_out(&memory)?;
        memory.touch();
    }
    let seen = reported(&device, &buffer)?;
    println!("# later {seen:?}");
    check!(cached > 0, "no folio is in the swap cache");
    if kernel::has_page_mapcounts()? {
        check_eq!(seen, (256, 0), "a page of each folio");
    } else {
        // Of a folio that is large, nothing is known; of one that is not, the page is discarded.
        let (discarded, unsure) = seen;
        check_eq!(discarded + unsure / FOLIO, 256, "folios, of {seen:?}");
    }
    Ok(())
}

/// Memory is paged out, read back, forked and pinned, again and again: no page is reported as discarded that
/// its owner has.
fn turmoil_with_swap() -> Result<()> {
    const TIME: std::time::Duration = std::time::Duration::from_secs(8);
    let _swap = SlowSwap::on(64 << 20)?;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let huge = Memory::map_aligned(
        HUGE,
        HUGE,
        RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    huge.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    let file = memfd(LEN, 0)?;
    let shared = Memory::shared(&file, LEN)?;
    let begin = std::time::Instant::now();
    let (mut rounds, mut cached) = (0, 0);
    let may_be_unsure = !kernel::has_page_mapcounts()?;
    while begin.elapsed() < TIME {
        for (memory, may_be_unsure) in [(&memory, false), (&huge, may_be_unsure), (&shared, false)]
        {
            if rounds % 2 == 0 {
                memory.touch_to_write();
            }
            page_out(memory)?;
            if rounds % 3 == 0 {
                memory.touch();
            }
            let buffer = device.create(&[memory.range()])?;
            cached += with_flag(&all_frames(memory)?, SWAP_CACHE)?;
            let done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| -> Result<()> {
                let asks = scope.spawn(|| -> Result<()> {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        let (discarded, unsure) = reported(&device, &buffer)?;
                        check_eq!(discarded, 0, "discarded, round {rounds}");
                        check!(unsure == 0 || may_be_unsure, "unsure, round {rounds}");
                    }
                    Ok(())
                });
                for _ in 0..4 {
                    memory.advise(0, memory.len(), libc::MADV_PAGEOUT)?;
                    memory.protect(PAGE, PAGE, libc::PROT_READ)?;
                    memory.protect(PAGE, PAGE, RW)?;
                }
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                match asks.join() {
                    Ok(result) => result,
                    Err(_) => anyhow::bail!("the thread that asks panicked"),
                }
            })?;
        }
        rounds += 1;
    }
    println!("# {rounds} rounds, {cached} pages pinned in the swap cache");
    Ok(())
}
