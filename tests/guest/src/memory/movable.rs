// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ZONE_MOVABLE`: every page leaves it when a buffer is made, so that the memory block that it
//! was in can go offline while the buffer lives. In a guest with `movablecore=`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::wait::WaitStatus;

use crate::common::views_agree;
use crate::frames::{
    all_frames, block_pages, movable, with_flag, within, Block, Pfn, HUGETLB, THP,
};
use crate::holders::Piped;
use pinbuf_test_harness::support::kernel::{vmstat, HugePool};
use pinbuf_test_harness::support::kinds::{Kind, Pooled};
use pinbuf_test_harness::support::memory::{memfd, stamp, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "movable":
    anonymous within 180,
    shmem within 180,
    transparent within 180,
    hugetlb_private within 180,
    hugetlb_shared within 180,
    plain_reference_blocks within 120,
    hugetlb_without_spare within 120,
    part_of_it within 120,
    partly_pinned_huge within 120,
    gigantic within 180,
    used_again within 120,
    absent_memory within 120,
    by_two_at_once within 120,
    by_several_at_once within 420,
    by_several_processes_at_once within 120,
}

/// Blocks of the zone that can go offline now, without any buffer: each was tried, and is online again.
fn willing_blocks() -> Result<Vec<Block>> {
    let mut willing = Vec::new();
    for block in Block::inside(&movable()?)? {
        if offline_patiently(block)? {
            block.online()?;
            willing.push(block);
        }
    }
    check!(
        !willing.is_empty(),
        "no block goes offline without a buffer"
    );
    Ok(willing)
}

/// Tries to take a block offline. The kernel retries until a signal ends the write.
fn offline_patiently(block: Block) -> Result<bool> {
    offline_within(block, Duration::from_secs(30))
}

fn offline_within(block: Block, limit: Duration) -> Result<bool> {
    let child = Child::run(|| {
        // SAFETY: no memory is passed; the alarm ends this process, and the kernel's attempt.
        unsafe { libc::alarm(limit.as_secs() as libc::c_uint) };
        block.offline()
    })?;
    let (status, _) = child.end(limit + Duration::from_secs(20))?;
    let gone = !block.is_online()?;
    check_eq!(
        gone,
        matches!(status, WaitStatus::Exited(_, 0)),
        "what the block's state says ({status:?})"
    );
    Ok(gone)
}

/// A block that is offline, and goes online again.
struct Offline(Block);

impl Drop for Offline {
    fn drop(&mut self) {
        if let Err(error) = self.0.online() {
            eprintln!("{error:#}");
        }
    }
}

/// The block that has most of the frames, of those that go offline.
fn fullest(pfns: &[Pfn], willing: &[Block]) -> Result<Option<(Block, usize)>> {
    let pages = block_pages()?;
    let mut counts = BTreeMap::new();
    for pfn in pfns {
        *counts.entry(Block(pfn / pages)).or_insert(0) += 1;
    }
    let found = counts
        .into_iter()
        .filter(|(block, _)| willing.contains(block))
        .max_by_key(|(_, count)| *count);
    Ok(found)
}

/// Memory of a kind in blocks that can go offline. Some blocks cannot even without a buffer, as the kernel has
/// put its own data there when it started; these are filled first.
struct Placed {
    memory: Option<Pooled>,
    block: Block,
    count: usize,
    fillers: Vec<Pooled>,
}

impl Placed {
    fn new(kind: Kind, len: usize, willing: &[Block]) -> Result<Self> {
        let mut fillers = Vec::new();
        // As much as the zone holds: few blocks may be able to go offline at the moment.
        let zone = movable()?;
        let most = (zone.end - zone.start) as usize * PAGE / len;
        for _ in 0..most {
            let candidate = kind.pooled(len)?;
            let pfns = all_frames(&candidate.memory)?;
            if let Some((block, count)) = fullest(&pfns, willing)? {
                return Ok(Self {
                    memory: Some(candidate),
                    block,
                    count,
                    fillers,
                });
            }
            fillers.push(candidate);
        }
        bail!("none of the pages lies in a block that goes offline: {willing:?}")
    }

    fn memory(&self) -> Result<&Memory> {
        Ok(&self.memory.as_ref().context("memory")?.memory)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        // In the order in which the pool of huge pages has grown.
        self.memory = None;
        while self.fillers.pop().is_some() {}
    }
}

fn written(memory: &Memory) {
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.set(offset + 8, stamp(31, offset as u64));
    }
}

fn unchanged(memory: &Memory, what: &str) -> Result<()> {
    for offset in (0..memory.len()).step_by(PAGE) {
        check_eq!(
            memory.get(offset + 8),
            stamp(31, offset as u64),
            "{what} at {offset:#x}"
        );
    }
    Ok(())
}

/// All pages are in the zone, then none is; the block that most were in goes offline.
fn leaves(kind: Kind, len: usize) -> Result<()> {
    let willing = willing_blocks()?;
    let zone = movable()?;
    let device = Device::open()?;
    let placed = Placed::new(kind, len, &willing)?;
    let (block, count) = (placed.block, placed.count);
    let memory = placed.memory()?;
    written(memory);
    let mut before = all_frames(memory)?;
    before.sort_unstable();
    let pages = before.len();
    check_eq!(
        within(&before, std::slice::from_ref(&zone)),
        pages,
        "pages in ZONE_MOVABLE before"
    );
    let flag = match kind {
        Kind::Transparent => Some(THP),
        Kind::HugePrivate | Kind::HugeShared => Some(HUGETLB),
        Kind::Anonymous | Kind::Shmem => None,
    };
    if let Some(flag) = flag {
        check_eq!(with_flag(&before, flag)?, pages, "pages of the kind before");
    }
    let pool = pool_state()?;
    let moved = vmstat("pgmigrate_success")?;

    let buffer = device.create(&[memory.range()]).context("PINBUF_CREATE")?;
    let moved = vmstat("pgmigrate_success")? - moved;
    let after = all_frames(memory)?;
    check_eq!(
        within(&after, std::slice::from_ref(&zone)),
        0,
        "pages in ZONE_MOVABLE under a buffer"
    );
    check!(
        after.iter().all(|pfn| before.binary_search(pfn).is_err()),
        "a page has not moved"
    );
    check!(moved >= pages as i64, "pgmigrate_success rose by {moved}");
    check_eq!(pool_state()?, pool, "the pool of huge pages");
    let whole = match flag {
        Some(flag) => with_flag(&after, flag)?,
        None => 0,
    };
    if flag == Some(HUGETLB) {
        check_eq!(whole, pages, "pages of hugetlb after");
    }

    check!(
        offline_patiently(block)?,
        "{block:?}, which {count} of the pages were in, does not go offline"
    );
    let offline = Offline(block);
    let span = block.frames()?;
    check_eq!(
        within(&after, std::slice::from_ref(&span)),
        0,
        "pages of the buffer in the block"
    );
    let mapped = buffer.map()?;
    unchanged(&mapped, "the buffer")?;
    unchanged(memory, "the memory")?;
    views_agree(&buffer, &[(memory, 0, len)])?;
    check_eq!(all_frames(memory)?, after, "frames under a buffer");
    println!(
        "# {kind:?}: {pages} pages in ZONE_MOVABLE (frames {:#x}-{:#x}) before, 0 after \
         (pgmigrate_success +{moved}, {whole} still huge); memory{} ({count} of them) offline \
         while the buffer lives",
        zone.start, zone.end, block.0
    );
    drop((mapped, buffer));
    // The block comes back before the memory goes, so that the pool finds its pages.
    drop(offline);
    check!(block.is_online()?, "the block is not back");
    Ok(())
}

fn pool_state() -> Result<(i64, i64, i64)> {
    Ok((
        kernel::field("/proc/meminfo", "HugePages_Total")?,
        kernel::field("/proc/meminfo", "HugePages_Free")?,
        kernel::field("/proc/meminfo", "HugePages_Surp")?,
    ))
}

fn anonymous() -> Result<()> {
    leaves(Kind::Anonymous, 64 << 20)
}

fn shmem() -> Result<()> {
    leaves(Kind::Shmem, 64 << 20)
}

fn transparent() -> Result<()> {
    leaves(Kind::Transparent, 32 << 20)
}

fn hugetlb_private() -> Result<()> {
    leaves(Kind::HugePrivate, 32 << 20)
}

fn hugetlb_shared() -> Result<()> {
    leaves(Kind::HugeShared, 32 << 20)
}

/// The control: what a mere reference does to a block, and a buffer does not.
fn plain_reference_blocks() -> Result<()> {
    let willing = willing_blocks()?;
    let placed = Placed::new(Kind::Shmem, 16 << 20, &willing)?;
    let block = placed.block;
    let memory = placed.memory()?;
    let span = block.frames()?;
    let page = all_frames(memory)?
        .iter()
        .position(|pfn| span.contains(pfn))
        .context("a page in the block")?;
    let piped = Piped::pages(memory, page * PAGE, 1)?;
    check!(
        !offline_within(block, Duration::from_secs(3))?,
        "the block went offline under a reference"
    );
    check_eq!(
        within(&all_frames(memory)?[page..=page], &[span]),
        1,
        "the page that is held, in its block"
    );
    drop(piped);
    check!(
        offline_patiently(block)?,
        "the block stays without the reference, too"
    );
    block.online()
}

/// The pool has no other page: the target is a new allocation, and the pool's size stays.
fn hugetlb_without_spare() -> Result<()> {
    for kind in [Kind::HugePrivate, Kind::HugeShared] {
        let device = Device::open()?;
        let movable_memory = kind.pooled(4 * HUGE)?;
        let memory = &movable_memory.memory;
        let before = all_frames(memory)?;
        check_eq!(HugePool::free()?, 0, "spare huge pages");
        check_eq!(
            within(&before, &[movable()?]),
            before.len(),
            "pages in ZONE_MOVABLE before"
        );
        let pool = pool_state()?;
        let buffer = device.create(&[memory.range()])?;
        check_eq!(
            within(&all_frames(memory)?, &[movable()?]),
            0,
            "pages in ZONE_MOVABLE under a buffer"
        );
        check_eq!(pool_state()?, pool, "the pool of huge pages");
        views_agree(&buffer, &[(memory, 0, 4 * HUGE)])?;
    }
    Ok(())
}

/// Only the pages that a range names are moved.
fn part_of_it() -> Result<()> {
    let device = Device::open()?;
    for kind in [Kind::Anonymous, Kind::Shmem] {
        let movable_memory = kind.pooled(300 * PAGE)?;
        let memory = &movable_memory.memory;
        let before = all_frames(memory)?;
        let buffer = device.create(&[
            memory.part(10 * PAGE, 20 * PAGE),
            memory.part(200 * PAGE, PAGE),
            memory.part(15 * PAGE, PAGE),
        ])?;
        let after = all_frames(memory)?;
        for page in 0..300 {
            let named = (10..30).contains(&page) || page == 200;
            check_eq!(
                before[page] != after[page],
                named,
                "whether page {page} of {kind:?} moved"
            );
            check_eq!(
                within(&after[page..=page], &[movable()?]) == 0,
                named,
                "whether page {page} of {kind:?} left the zone"
            );
        }
        drop(buffer);
    }
    Ok(())
}

/// One page of a huge page takes all of it along, or the huge page is split; either way none that
/// is pinned stays.
fn partly_pinned_huge() -> Result<()> {
    let device = Device::open()?;
    for kind in [Kind::Transparent, Kind::HugeShared] {
        let movable_memory = kind.pooled(2 * HUGE)?;
        let memory = &movable_memory.memory;
        written(memory);
        let buffer = device.create(&[memory.part(HUGE - PAGE, 2 * PAGE)])?;
        let after = all_frames(memory)?;
        check_eq!(
            within(&after[511..513], &[movable()?]),
            0,
            "pinned pages of {kind:?} in ZONE_MOVABLE"
        );
        unchanged(memory, "the memory")?;
        views_agree(&buffer, &[(memory, HUGE - PAGE, 2 * PAGE)])?;
    }
    Ok(())
}

/// Pages of 1 GiB are not put into the zone, unless `vm.movable_gigantic_pages` says so.
fn gigantic() -> Result<()> {
    let path = "/sys/kernel/mm/hugepages/hugepages-1048576kB";
    check!(
        kernel::number(format!("{path}/free_hugepages"))? > 0,
        "no free page of 1 GiB: boot with hugepagesz=1G hugepages=1"
    );
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
    let memory = Memory::map(GIGA, RW, flags, None, 0)?;
    memory.set(0, 1);
    let before = all_frames(&memory)?;
    check_eq!(before.len(), GIGA / PAGE, "pages");
    check_eq!(
        within(&before, &[movable()?]),
        0,
        "pages of 1 GiB in ZONE_MOVABLE"
    );
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(device.describe(&buffer)?.pins, 1, "pins");
    check_eq!(all_frames(&memory)?, before, "frames");
    Ok(())
}

/// After release, new memory may be in the zone again, and old memory may move back.
fn used_again() -> Result<()> {
    let device = Device::open()?;
    let zone = movable()?;
    let movable_memory = Kind::Shmem.pooled(16 << 20)?;
    let memory = &movable_memory.memory;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(
        within(&all_frames(memory)?, std::slice::from_ref(&zone)),
        0,
        "pages in ZONE_MOVABLE under a buffer"
    );
    // The zone's free memory is used by others meanwhile.
    let other = Kind::Anonymous.pooled(16 << 20)?;
    check_eq!(
        within(&all_frames(&other.memory)?, std::slice::from_ref(&zone)),
        (16 << 20) / PAGE,
        "pages of new memory in ZONE_MOVABLE while the buffer lives"
    );
    drop((buffer, other));
    drop(movable_memory);
    let again = Kind::Shmem.pooled(16 << 20)?;
    check_eq!(
        within(&all_frames(&again.memory)?, &[zone]),
        (16 << 20) / PAGE,
        "pages of new memory in ZONE_MOVABLE after release"
    );
    Ok(())
}

/// A call's pauses, all together, with the parameters as they are loaded: what `driver/pin/retry.rs`
/// says.
/// Memory that a create faults in is allocated where it may stay, so nothing has to be migrated; what the process
/// allocates before and afterwards for itself may lie anywhere.
fn absent_memory() -> Result<()> {
    const PAGES: usize = 512;
    let in_zone =
        |memory: &Memory| -> Result<usize> { Ok(within(&all_frames(memory)?, &[movable()?])) };
    let touched = || -> Result<Memory> {
        let memory = Memory::small_pages(PAGES * PAGE)?;
        memory.touch_to_write();
        check_eq!(
            in_zone(&memory)?,
            PAGES,
            "pages of the process's own in the zone"
        );
        Ok(memory)
    };
    let device = Device::open()?;
    let _before = touched()?;
    for shared in [false, true] {
        let memory = match shared {
            true => Memory::shared(memfd(PAGES * PAGE, 0)?, PAGES * PAGE)?,
            false => Memory::small_pages(PAGES * PAGE)?,
        };
        let migrated = vmstat("pgmigrate_success")?;
        let buffer = device.create(&[memory.range()])?;
        let migrated = vmstat("pgmigrate_success")? - migrated;
        check_eq!(in_zone(&memory)?, 0, "pages of a buffer in the zone");
        // The kernel may move some pages for its own reasons.
        check!(
            migrated < PAGES as i64 / 8,
            "{migrated} pages were migrated for {PAGES} absent ones"
        );
        let _after = touched().context("after a create")?;
        drop(buffer);
    }
    Ok(())
}

fn patience() -> Result<Duration> {
    let retries = kernel::number("/sys/module/pinbuf/parameters/pin_retries")?;
    Ok(Duration::from_millis(4 * ((1 << retries) - 1)))
}

/// What several callers pin at once, in bytes: the same number of pages wherever pages are larger.
const LEN: usize = 2048 * PAGE;

/// Makes a buffer of all of the memory, and returns how long that took and the result.
fn timed(device: &Device, memory: &Memory) -> (Duration, nix::Result<()>) {
    let start = Instant::now();
    let result = device.create(&[memory.range()]).map(drop);
    (start.elapsed(), result)
}

/// Several threads want the same pages out of the zone at the same time: each is in the way of the
/// others' migrations. Nearly always all get what they want at once. But GUP itself tries again without end
/// while others have isolated some of its pages, so that a caller may run out of retries (`EBUSY`); then
/// the pages can be had as soon as the others are done.
fn several_at_once(callers: usize, rounds: usize) -> Result<()> {
    let device = Device::open()?;
    // What GUP takes for itself.
    let (alone, result) = {
        let memory = Kind::Anonymous.pooled(LEN)?;
        timed(&device, &memory.memory)
    };
    result.context("alone")?;
    let mut all = Vec::new();
    for number in 0..rounds {
        let memory = Kind::Anonymous.pooled(LEN)?;
        let memory = &memory.memory;
        let pfns = all_frames(memory)?;
        let inside = within(&pfns, &[movable()?]);
        check!(
            inside * 2 > pfns.len(),
            "{inside} of {} pages are in ZONE_MOVABLE",
            pfns.len()
        );
        let barrier = std::sync::Barrier::new(callers);
        let taken: Vec<_> = std::thread::scope(|scope| {
            let caller = || {
                barrier.wait();
                timed(&device, memory)
            };
            let callers: Vec<_> = (0..callers).map(|_| scope.spawn(caller)).collect();
            let result = callers.into_iter().map(std::thread::ScopedJoinHandle::join);
            result.map(|it| it.expect("a caller panicked")).collect()
        });
        check!(
            taken.iter().any(|(_, result)| result.is_ok())
                && taken
                    .iter()
                    .all(|(_, result)| matches!(result, Ok(()) | Err(Errno::EBUSY))),
            "round {number}, alone {alone:?}: {taken:?}"
        );
        timed(&device, memory).1.context("afterwards")?;
        check_eq!(
            within(&all_frames(memory)?, &[movable()?]),
            0,
            "pages that are in the zone still"
        );
        all.extend(taken.into_iter().map(|(took, _)| took));
    }
    let worst = all.into_iter().max().unwrap_or_default();
    println!(
        "# alone {} ms, the longest of {callers} {} ms",
        alone.as_millis(),
        worst.as_millis()
    );
    // The pauses are bounded. GUP's own time is not: it was seen to reach a minute under emulation, on a machine with
    // five times more work than processors. Without the driver's turns it was two to three minutes on an idle one.
    let most = patience()? + 20 * alone + Duration::from_secs(90);
    check!(
        worst <= most,
        "a create took {worst:?}, alone {alone:?}: not {most:?}"
    );
    Ok(())
}

fn by_two_at_once() -> Result<()> {
    several_at_once(2, 6)
}

fn by_several_at_once() -> Result<()> {
    several_at_once(6, 4)
}

/// A file that several processes map.
fn by_several_processes_at_once() -> Result<()> {
    const CALLERS: usize = 4;
    const ROUNDS: usize = 4;
    let device = Device::open()?;
    let most = patience()? + Duration::from_secs(30);
    for number in 0..ROUNDS {
        let file = memfd(LEN, 0)?;
        let memory = Memory::shared(&file, LEN)?;
        for offset in (0..memory.len()).step_by(PAGE) {
            memory.set(offset, 1);
        }
        let children = (0..CALLERS)
            .map(|_| {
                Child::run(|| {
                    let own = Memory::shared(&file, LEN)?;
                    let (took, result) = timed(&device, &own);
                    if result != Err(Errno::EBUSY) {
                        result.with_context(|| format!("after {took:?}"))?;
                    }
                    check!(took <= most, "took {took:?}, not {most:?}");
                    Ok(())
                })
            })
            .collect::<Result<Vec<_>>>()?;
        for child in children {
            child.join().with_context(|| format!("round {number}"))?;
        }
        timed(&device, &memory).1.context("afterwards")?;
        check_eq!(
            within(&all_frames(&memory)?, &[movable()?]),
            0,
            "pages that are in the zone still"
        );
    }
    Ok(())
}
