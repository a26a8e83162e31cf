// SPDX-License-Identifier: MIT OR Apache-2.0

//! CMA: pages that the kernel has put into an area leave it when a buffer is made, so that the
//! whole area can be allocated while the buffer lives. In a guest with `hugetlb_cma=1G`, where a
//! page of 1 GiB is the whole area (and `nokaslr`, or else the kernel may lie in the only place for
//! it).

use std::ops::Range;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::common::views_agree;
use crate::frames::{all_frames, giga_page, within, Pfn};
use crate::holders::Piped;
use pinbuf_test_harness::support::kernel::{vmstat, Setting};
use pinbuf_test_harness::support::kinds::transparent;
use pinbuf_test_harness::support::memory::{memfd, stamp, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "cma":
    anonymous within 300,
    shmem within 300,
    transparent_huge within 300,
    plain_reference_blocks within 300,
    held_for_a_moment within 300,
    gigantic_in_the_area within 300,
}

/// What needs a larger guest: with 8 GiB, a second page of 1 GiB can be had.
pub mod spare {
    use super::*;

    tests! { "cma-spare":
        gigantic within 300,
    }

    /// With a free page of 1 GiB elsewhere, one in the area can leave it.
    fn gigantic() -> Result<()> {
        let area = area()?;
        let _pool = Setting::set(POOL, 2)?;
        check_eq!(
            kernel::number(POOL)?,
            2,
            "pages of 1 GiB, one of them outside of the area"
        );
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
        let map = || -> Result<(Memory, bool)> {
            let memory = Memory::map(GIGA, RW, flags, None, 0)?;
            memory.set(PAGE, 7);
            let inside = area.contains(&all_frames(&memory)?[0]);
            Ok((memory, inside))
        };
        let (first, inside) = map()?;
        let (memory, other) = if inside {
            (first, None)
        } else {
            let (second, inside) = map()?;
            check!(inside, "neither page is in the area");
            (second, Some(first))
        };
        for offset in (0..GIGA).step_by(509 * PAGE) {
            memory.set(offset, stamp(42, offset as u64));
        }
        let device = Device::open()?;
        if let Some(other) = other {
            check_eq!(
                device.create(&[memory.range()]).map(drop),
                Err(Errno::EBUSY),
                "create while the other page is in use"
            );
            drop(other);
        }
        let buffer = device.create(&[memory.range()])?;
        let after = all_frames(&memory)?;
        check_eq!(
            within(&after, std::slice::from_ref(&area)),
            0,
            "pages in CMA under a buffer"
        );
        check_eq!(device.describe(&buffer)?.pins, 1, "pins");
        for offset in (0..GIGA).step_by(509 * PAGE) {
            check_eq!(memory.get(offset), stamp(42, offset as u64), "the memory");
        }
        views_agree(&buffer, &[(&memory, 0, GIGA)])?;
        check_eq!(kernel::number(POOL)?, 2, "pages of 1 GiB in the pool");
        drop((buffer, memory));
        Ok(())
    }
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

/// The area, found by allocating a page of 1 GiB, which is all of it.
fn area() -> Result<Range<Pfn>> {
    let total = kernel::field("/proc/meminfo", "CmaTotal")?;
    check_eq!(
        total << 10,
        GIGA as i64,
        "CmaTotal; boot with hugetlb_cma=1G nokaslr"
    );
    let _whole = whole_area()?.context("the area cannot be allocated without any buffer")?;
    giga_page()
}

/// Allocates the whole area, or returns that it cannot be allocated.
fn whole_area() -> Result<Option<Setting>> {
    let setting = Setting::set(POOL, 1)?;
    if kernel::number(POOL)? == 0 {
        return Ok(None);
    }
    let free = vmstat("nr_free_cma")?;
    check_eq!(free, 0, "free pages in CMA with all of it allocated");
    Ok(Some(setting))
}

/// Memory, some of which has spilled into the area, and what was needed to make it do so.
struct Spilled {
    memory: Memory,
    frames: Vec<Pfn>,
    inside: usize,
    _filler: Vec<Memory>,
}

/// Fills memory until `make` gives some of which a third is in the area, at least. The kernel puts
/// movable pages there while more than half of what is free is in CMA, so half is what can be
/// expected.
fn spilled(area: &Range<Pfn>, make: impl Fn() -> Result<Memory>) -> Result<Spilled> {
    const STEP: usize = 32 << 20;
    let mut filler = Vec::new();
    let surplus = vmstat("nr_free_pages")? - 2 * vmstat("nr_free_cma")?;
    let mut next = usize::try_from(surplus).unwrap_or(0) * PAGE + STEP;
    let mut all = 0;
    loop {
        let more = Memory::anonymous(next)?;
        for offset in (0..next).step_by(PAGE) {
            more.set(offset, 1);
        }
        filler.push(more);
        all += next;
        next = STEP;
        let memory = make()?;
        let frames = all_frames(&memory)?;
        let inside = within(&frames, std::slice::from_ref(area));
        if inside >= frames.len() / 3 {
            return Ok(Spilled {
                memory,
                frames,
                inside,
                _filler: filler,
            });
        }
        // Freed, it would only wait, on a list of the processor's own, to be given out again.
        filler.push(memory);
        check!(
            all < GIGA,
            "with a GiB allocated, memory does not spill into CMA"
        );
    }
}

fn filled(memory: Memory) -> Memory {
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.set(offset, stamp(41, offset as u64));
    }
    memory
}

fn small() -> Result<Memory> {
    Ok(filled(Memory::small_pages(16 << 20)?))
}

fn shared() -> Result<Memory> {
    let memory = Memory::shared(memfd(16 << 20, 0)?, 16 << 20)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    Ok(filled(memory))
}

fn huge() -> Result<Memory> {
    Ok(filled(transparent(8)?))
}

/// Many pages are in the area, then none is; then all of the area can be had.
fn leaves(what: &str, make: impl Fn() -> Result<Memory>) -> Result<()> {
    let area = area()?;
    let device = Device::open()?;
    let spilled = spilled(&area, make)?;
    let memory = &spilled.memory;
    let moved = vmstat("pgmigrate_success")?;
    let buffer = device.create(&[memory.range()]).context("PINBUF_CREATE")?;
    let moved = vmstat("pgmigrate_success")? - moved;
    let after = all_frames(memory)?;
    check_eq!(
        within(&after, std::slice::from_ref(&area)),
        0,
        "pages in CMA under a buffer"
    );
    check!(
        moved >= spilled.inside as i64,
        "pgmigrate_success rose by {moved}"
    );
    let whole = whole_area()?;
    check!(
        whole.is_some(),
        "the area cannot be allocated while a buffer lives"
    );
    let mapped = buffer.map()?;
    for offset in (0..memory.len()).step_by(PAGE) {
        let expected = stamp(41, offset as u64);
        check_eq!(memory.get(offset), expected, "the memory at {offset:#x}");
        check_eq!(mapped.get(offset), expected, "the buffer at {offset:#x}");
    }
    views_agree(&buffer, &[(memory, 0, memory.len())])?;
    check_eq!(all_frames(memory)?, after, "frames under a buffer");
    println!(
        "# {what}: {} of {} pages in CMA (frames {:#x}-{:#x}) before, 0 after (pgmigrate_success \
         +{moved}); then all {} pages of the area allocated while the buffer lives",
        spilled.inside,
        spilled.frames.len(),
        area.start,
        area.end,
        area.end - area.start,
    );
    Ok(())
}

fn anonymous() -> Result<()> {
    leaves("anonymous", small)
}

fn shmem() -> Result<()> {
    leaves("shmem", shared)
}

fn transparent_huge() -> Result<()> {
    leaves("transparent huge pages", huge)
}

/// The control: a mere reference on one page in the area blocks all of it.
fn plain_reference_blocks() -> Result<()> {
    let area = area()?;
    let spilled = spilled(&area, small)?;
    let page = spilled
        .frames
        .iter()
        .position(|pfn| area.contains(pfn))
        .context("a page in CMA")?;
    let piped = Piped::pages(&spilled.memory, page * PAGE, 1)?;
    let fails = vmstat("cma_alloc_fail")?;
    check!(
        whole_area()?.is_none(),
        "all of the area was allocated, although a page of it was held"
    );
    let fails = vmstat("cma_alloc_fail")? - fails;
    check!(fails > 0, "cma_alloc_fail did not rise");
    drop(piped);
    check!(
        whole_area()?.is_some(),
        "the area cannot be allocated without the reference, either"
    );
    println!("# a reference on one page: cma_alloc_fail +{fails}, without it the area is had");
    Ok(())
}

/// As in ZONE_MOVABLE: with retries it succeeds, without them it fails.
fn held_for_a_moment() -> Result<()> {
    use std::time::Duration;
    let area = area()?;
    let device = Device::open()?;
    let spilled = spilled(&area, huge)?;
    let memory = &spilled.memory;
    let page = spilled
        .frames
        .iter()
        .position(|pfn| area.contains(pfn))
        .context("a page in CMA")?;
    let fails = vmstat("thp_migration_fail")?;
    let setting = Setting::parameter("pin_retries", 0)?;
    let piped = Piped::pages(memory, page * PAGE, 1)?;
    check_eq!(
        device.create(&[memory.range()]).map(drop),
        Err(Errno::EBUSY),
        "create without patience"
    );
    drop(setting);
    let release = piped.release_after(Duration::from_millis(250));
    let buffer = device.create(&[memory.range()])?;
    check!(release.is_finished(), "create overtook the holder");
    release.join().expect("the pipe's thread");
    let fails = vmstat("thp_migration_fail")? - fails;
    check!(fails > 1, "thp_migration_fail rose by {fails}");
    check_eq!(
        within(&all_frames(memory)?, &[area]),
        0,
        "pages in CMA under a buffer"
    );
    check_eq!(memory.get(HUGE), stamp(41, HUGE as u64), "the memory");
    views_agree(&buffer, &[(memory, 0, memory.len())])
}

/// A page of 1 GiB that is itself the area cannot be moved: `EBUSY`, and it stays usable.
fn gigantic_in_the_area() -> Result<()> {
    let area = area()?;
    let pool = whole_area()?.context("the area cannot be allocated")?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
    let memory = Memory::map(GIGA, RW, flags, None, 0)?;
    memory.set(PAGE, 7);
    let frames = all_frames(&memory)?;
    check_eq!(within(&frames, &[area]), frames.len(), "pages in CMA");
    let device = Device::open()?;
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    check_eq!(
        device.create(&[memory.part(3 * PAGE, 5 * PAGE)]).map(drop),
        Err(Errno::EBUSY),
        "create with a page of 1 GiB in CMA"
    );
    check_eq!(kernel::pins()?, pins, "pins after EBUSY");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after EBUSY");
    check_eq!(memory.get(PAGE), 7, "the memory");
    drop(memory);
    drop(pool);
    check_eq!(kernel::number(POOL)?, 0, "pages of 1 GiB after all");
    Ok(())
}
