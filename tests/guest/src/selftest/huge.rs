// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory in huge pages: explicit ones of 2 MiB and 1 GiB, at any page inside them, and transparent
//! ones.

use std::os::fd::AsFd;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Info, Range};

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{
    huge_memfd, pattern, punch_hole, stamp, BLOCK, GIGA, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::view::{
    agree, agree_sampled, DeviceView, KernelView, Mapped, Source,
};
use pinbuf_test_harness::support::{check, check_eq, frames, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "huge":
    private,
    shared,
    odd_offsets,
    many_pages_cost_little,
    pages_in_any_order,
    same_page_twice,
    halves_of_a_page_by_two_mappings,
    pool_gets_them_back_late,
    hole_punched,
    gigantic within 120,
    transparent,
    transparent_then_split,
    transparent_in_part,
    transparent_adjacent,
    transparent_with_a_page_replaced,
}

/// Makes a buffer of the ranges, compares all views of some pages, and returns its description.
fn views_agree(memory: &Memory, parts: &[(usize, usize)]) -> Result<Info> {
    let device = Device::open()?;
    let ranges: Vec<Range> = parts
        .iter()
        .map(|&(at, len)| memory.part(at, len))
        .collect();
    let pins = kernel::pins()?;
    let buffer = device.create(&ranges).context("PINBUF_CREATE")?;
    let info = device.describe(&buffer)?;
    check_eq!(
        kernel::pins()? - pins,
        info.pins as i64,
        "pins by the kernel's count and by ours"
    );
    let len = buffer.len()?;
    check_eq!(
        len,
        parts.iter().map(|part| part.1).sum::<usize>(),
        "the buffer's size"
    );
    check_eq!(info.charged_pages, (len / PAGE) as u64, "pages charged");
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    let pieces = parts.iter().map(|&(at, len)| (memory, at, len)).collect();
    let source = Source {
        buffer: &buffer,
        pieces,
    };
    let cpu = Mapped::of(&buffer, &mapped);
    let view = DeviceView::of(&importer, mapping);
    let views: [&dyn pinbuf_test_harness::support::view::View; 4] =
        [&source, &cpu, &view, &KernelView(&importer)];
    if len <= 64 * PAGE {
        agree(&views, len)?;
    } else {
        agree_sampled(&views, len, 149)?;
    }
    Ok(info)
}

fn private() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    let info = views_agree(&memory, &[(0, 2 * HUGE)])?;
    check!(
        info.extents <= 2,
        "{} extents of two huge pages",
        info.extents
    );
    Ok(())
}

fn shared() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let file = huge_memfd(2 * HUGE)?;
    let memory = Memory::shared(&file, 2 * HUGE)?;
    let info = views_agree(&memory, &[(0, 2 * HUGE)])?;
    check!(
        info.extents <= 2,
        "{} extents of two huge pages",
        info.extents
    );
    Ok(())
}

/// Any page inside of a huge page may be the first or the last.
fn odd_offsets() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let file = huge_memfd(3 * HUGE)?;
    let memory = Memory::shared(&file, 3 * HUGE)?;
    for (page, pages) in [
        (0, 1),
        (1, 1),
        (BLOCK - 1, 1),
        (BLOCK - 1, 2),
        (7, BLOCK + 1),
        (300, 2 * BLOCK + 76),
        (1, 3 * BLOCK - 1),
    ] {
        let info = views_agree(&memory, &[(page * PAGE, pages * PAGE)])
            .with_context(|| format!("{pages} pages from page {page}"))?;
        let huge_pages = (page + pages).div_ceil(BLOCK) - page / BLOCK;
        check!(
            info.extents <= huge_pages as u64,
            "{} extents in {huge_pages} huge pages",
            info.extents
        );
        check_eq!(info.pages, pages as u64, "pages");
    }
    views_agree(
        &memory,
        &[
            (3 * PAGE, PAGE),
            ((BLOCK + 88) * PAGE, 9 * PAGE),
            ((BLOCK - 1) * PAGE, 2 * PAGE),
        ],
    )?;
    Ok(())
}

/// What is kept for huge pages does not grow with the pages in them.
fn many_pages_cost_little() -> Result<()> {
    const COUNT: usize = (128 << 20) / HUGE;
    let _pool = HugePool::with_free(COUNT as i64)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(COUNT * HUGE, RW, flags, None, 0)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let info = device.describe(&buffer)?;
    check!(
        info.extents <= COUNT as u64,
        "{} extents of {COUNT} huge pages",
        info.extents
    );
    check!(
        info.kernel_bytes <= COUNT as u64 * 32 + 256,
        "{} bytes for {COUNT} extents",
        info.kernel_bytes
    );
    check_eq!(info.charged_pages, (COUNT * BLOCK) as u64, "pages charged");
    Ok(())
}

fn pages_in_any_order() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    let file = huge_memfd(4 * HUGE)?;
    let memory = Memory::shared(&file, 4 * HUGE)?;
    let parts = [3, 0, 2, 1].map(|page| (page * HUGE, HUGE));
    views_agree(&memory, &parts)?;
    // In pieces, across the boundaries, last piece first.
    let parts: Vec<_> = (0..4 * HUGE / (96 * PAGE))
        .rev()
        .map(|piece| (piece * 96 * PAGE, 96 * PAGE))
        .collect();
    views_agree(&memory, &parts)?;
    Ok(())
}

/// A huge page that is named twice is charged twice and stays until both are gone.
fn same_page_twice() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let file = huge_memfd(HUGE)?;
    let memory = Memory::shared(&file, HUGE)?;
    let device = Device::open()?;
    let pins = kernel::pins()?;
    let buffer = device.create(&[memory.range(), memory.part(100 * PAGE, 3 * PAGE)])?;
    let second = device.create(&[memory.part((BLOCK - 1) * PAGE, PAGE)])?;
    check_eq!(
        device.describe(&buffer)?.charged_pages,
        BLOCK as u64 + 3,
        "pages charged"
    );
    let (mapped, other) = (buffer.map()?, second.map()?);
    memory.set((BLOCK - 1) * PAGE, 7);
    memory.set(101 * PAGE, 8);
    check_eq!(mapped.get((BLOCK - 1) * PAGE), 7, "the last page");
    check_eq!(
        mapped.get((BLOCK + 1) * PAGE),
        8,
        "the page that is there twice"
    );
    check_eq!(other.get(0), 7, "the other buffer");
    drop((buffer, mapped));
    check_eq!(other.get(0), 7, "the other buffer, alone");
    drop((second, other));
    check_eq!(kernel::pins()?, pins, "pinned pages");
    Ok(())
}

/// Each half of a huge page, by an address of its own, has a pin of its own, though their frames are
/// adjacent.
fn halves_of_a_page_by_two_mappings() -> Result<()> {
    const HALF: usize = HUGE / 2;
    let _pool = HugePool::with_free(1)?;
    let file = huge_memfd(HUGE)?;
    let (one, two) = (Memory::shared(&file, HUGE)?, Memory::shared(&file, HUGE)?);
    let device = Device::open()?;
    let pins = kernel::pins()?;
    let buffer = device.create(&[one.part(0, HALF), two.part(HALF, HALF)])?;
    let info = device.describe(&buffer)?;
    check_eq!(info.pins, 2, "pins");
    check_eq!(kernel::pins()? - pins, 2, "pins by the kernel's count");
    let mapped = buffer.map()?;
    one.set(HUGE - PAGE, 9);
    check_eq!(mapped.get(HUGE - PAGE), 9, "the last page");
    drop((buffer, mapped));
    check_eq!(kernel::pins()?, pins, "pinned pages");
    Ok(())
}

/// The pool has its pages again when the buffer goes, not when the memory does.
fn pool_gets_them_back_late() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let device = Device::open()?;
    let buffer = {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        let memory = Memory::map(2 * HUGE, RW, flags, None, 0)?;
        memory.set(HUGE, 4);
        device.create(&[memory.part((BLOCK - 1) * PAGE, 2 * PAGE)])?
    };
    check_eq!(
        HugePool::free()?,
        0,
        "free huge pages while the buffer lives"
    );
    check_eq!(buffer.map()?.get(PAGE), 4, "the second huge page");
    drop(buffer);
    check_eq!(HugePool::free()?, 2, "free huge pages after it");
    Ok(())
}

/// A hole in the file takes the page from the process, not from the buffer.
fn hole_punched() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let file = huge_memfd(2 * HUGE)?;
    let memory = Memory::shared(&file, 2 * HUGE)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    memory.set(HUGE + 5 * PAGE, 5);
    punch_hole(&file, HUGE, HUGE)?;
    check_eq!(memory.get(HUGE + 5 * PAGE), 0, "the file's new page");
    check_eq!(mapped.get(HUGE + 5 * PAGE), 5, "the buffer's page");
    memory.set(HUGE + 5 * PAGE, 6);
    mapped.set(HUGE + 5 * PAGE, 7);
    check_eq!(memory.get(HUGE + 5 * PAGE), 6, "the file's page");
    Ok(())
}

/// Pages of 1 GiB, where the machine has one to give.
fn gigantic() -> Result<()> {
    let _pool = HugePool::with_giga()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
    let memory = Memory::map(GIGA, RW, flags, None, 0)?;
    let device = Device::open()?;
    for (at, len) in [
        (0, GIGA),
        (PAGE, GIGA - 2 * PAGE),
        (HUGE - PAGE, 3 * PAGE),
        (GIGA - PAGE, PAGE),
    ] {
        let buffer = device.create(&[memory.part(at, len)])?;
        let info = device.describe(&buffer)?;
        check_eq!(info.extents, 1, "extents of {len:#x} bytes at {at:#x}");
        check!(
            info.kernel_bytes <= 256,
            "{} bytes of kernel memory",
            info.kernel_bytes
        );
        check_eq!(info.charged_pages, (len / PAGE) as u64, "pages charged");
        let mapped =
            Memory::map_congruent(len, GIGA, at, RW, libc::MAP_SHARED, Some(buffer.as_fd()), 0)?;
        for offset in (0..len).step_by(509 * PAGE) {
            memory.set(at + offset, stamp(1, offset as u64));
        }
        let before = kernel::faults()?;
        for offset in (0..len).step_by(509 * PAGE) {
            check_eq!(
                mapped.get(offset),
                stamp(1, offset as u64),
                "offset {offset:#x}"
            );
        }
        let faults = kernel::faults()? - before;
        check!(
            faults <= 2 * (GIGA / HUGE + BLOCK / 2) as i64,
            "{faults} faults on {len:#x} bytes"
        );
    }
    views_agree(
        &memory,
        &[
            (GIGA - 40 * PAGE, 40 * PAGE),
            ((BLOCK - 1) * PAGE, 2 * PAGE),
        ],
    )?;
    Ok(())
}

/// Memory in transparent huge pages; an error if there are none.
fn transparent_memory(pages: usize) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(pages * HUGE, HUGE, RW, flags, None, 0)?;
    kernel::write("/proc/sys/vm/compact_memory", "1")?;
    memory.advise(0, pages * HUGE, libc::MADV_HUGEPAGE)?;
    for page in 0..pages {
        memory.set(page * HUGE, 1);
    }
    // This makes huge what the first touch did not.
    if let Err(error) = memory.advise(0, pages * HUGE, libc::MADV_COLLAPSE) {
        check_eq!(error, Errno::EAGAIN, "MADV_COLLAPSE");
    }
    Ok(memory)
}

fn transparent() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let memory = transparent_memory(2)?;
    let info = views_agree(&memory, &[(0, 2 * HUGE)])?;
    check!(
        info.extents <= 2,
        "{} extents of two huge pages",
        info.extents
    );
    check!(
        info.kernel_bytes <= 512,
        "{} bytes of kernel memory",
        info.kernel_bytes
    );
    Ok(())
}

/// A huge page that falls apart afterwards stays whole for the buffer.
fn transparent_then_split() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let memory = transparent_memory(1)?;
    let device = Device::open()?;
    memory.write(0, &pattern(2, 0, HUGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = Memory::map_aligned(HUGE, HUGE, RW, libc::MAP_SHARED, Some(buffer.as_fd()), 0)?;
    memory.protect(9 * PAGE, PAGE, libc::PROT_READ)?;
    memory.unmap(20 * PAGE, 2 * PAGE)?;
    memory.advise(100 * PAGE, 10 * PAGE, libc::MADV_DONTNEED)?;
    for page in 0..BLOCK {
        let expected = stamp(2, (page * PAGE / 8) as u64);
        check_eq!(
            mapped.get(page * PAGE),
            expected,
            "page {page} of the buffer"
        );
    }
    mapped.set(300 * PAGE, 3);
    check_eq!(memory.get(300 * PAGE), 3, "a page that was left alone");
    check_eq!(memory.get(105 * PAGE), 0, "a page that was dropped");
    Ok(())
}

/// Huge pages that are adjacent in memory are one extent, of which each page has one pin to be dropped.
fn transparent_adjacent() -> Result<()> {
    // Of 32 MiB, few fit.
    const PAGES: usize = if HUGE > 4 << 20 { 16 } else { 64 };
    kernel::needs_transparent_huge_pages()?;
    let memory = transparent_memory(PAGES)?;
    let mut places = Vec::new();
    for page in 0..PAGES {
        let pfns = frames::frames(&memory, page * HUGE, HUGE)?;
        if (pfns[0]..)
            .zip(&pfns)
            .all(|(expected, pfn)| expected == *pfn)
        {
            places.push((pfns[0], page));
        }
    }
    places.sort_unstable();
    let pair = places
        .windows(2)
        .find(|pair| pair[0].0 + BLOCK as u64 == pair[1].0);
    let Some([(_, first), (_, second)]) = pair else {
        bail!("no two of {PAGES} huge pages are adjacent: {places:?}");
    };
    let device = Device::open()?;
    let pins = kernel::pins()?;
    let ranges = [
        memory.part(first * HUGE, HUGE),
        memory.part(second * HUGE, HUGE),
    ];
    // Pins that the wrong page loses leave the sum as it is, and leave a reference count that cannot be used up
    // any more.
    for round in 0..3 {
        let buffer = device
            .create(&ranges)
            .with_context(|| format!("round {round}"))?;
        let info = device.describe(&buffer)?;
        check_eq!(
            (info.extents, info.pins),
            (1, 2 * BLOCK as u64),
            "extents and pins"
        );
        drop(buffer);
        check_eq!(kernel::pins()?, pins, "pinned pages");
    }
    Ok(())
}

/// A transparent huge page is mapped page by page: where one of its pages was replaced, the buffer has the new
/// page of the process.
fn transparent_with_a_page_replaced() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let memory = transparent_memory(1)?;
    let head = frames::flags(frames::frames(&memory, 0, PAGE)?[0])?;
    check!(head & frames::THP != 0, "there is no transparent huge page");
    for page in 0..BLOCK {
        memory.set(page * PAGE, stamp(26, page as u64));
    }
    let replaced = [77, 300];
    memory.replace(replaced[0] * PAGE, PAGE)?;
    memory.advise(replaced[1] * PAGE, PAGE, libc::MADV_DONTNEED)?;
    for page in replaced {
        memory.set(page * PAGE, stamp(27, page as u64));
    }
    let head = frames::flags(frames::frames(&memory, 0, PAGE)?[0])?;
    check!(head & frames::THP != 0, "the huge page was taken apart");
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(device.describe(&buffer)?.pins, BLOCK as u64, "pins");
    let mapped = buffer.map()?;
    for page in 0..BLOCK {
        let seed = if replaced.contains(&page) { 27 } else { 26 };
        let expected = stamp(seed, page as u64);
        check_eq!(mapped.get(page * PAGE), expected, "page {page}");
    }
    Ok(())
}

/// Part of a huge page is charged as that part.
fn transparent_in_part() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let memory = transparent_memory(2)?;
    let info = views_agree(&memory, &[(500 * PAGE, 24 * PAGE), (3 * PAGE, PAGE)])?;
    check_eq!(info.pages, 25, "pages");
    check_eq!(info.charged_pages, 25, "pages charged");
    check!(info.extents <= 3, "{} extents", info.extents);
    Ok(())
}
