// SPDX-License-Identifier: MIT OR Apache-2.0

//! Lists of many short ranges, of which the driver may join neighbours: the buffer's order is the
//! list's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::{
    Backing, Create, Discard, Discards, Query, Range, CREATE_CHECK_BACKING, CREATE_CLOEXEC,
    DISCARDS, QUERY, STATE_DISCARDED,
};

use pinbuf_test_harness::support::device::{create, ioctl};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, punch_hole, stamp, HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "lists":
    shuffled_anonymous,
    shuffled_memfd,
    shuffled_memfd_checked,
    shuffled_hugetlb,
    shuffled_hugetlb_checked,
    shuffled_over_several_mappings,
    of_different_lengths,
    with_gaps,
    with_repetitions,
    in_order,
    one_range_that_cannot_be_pinned,
    at_odd_addresses,
}

/// Pages of the memory that lists are about.
const PAGES: usize = 1000;

/// Numbers below `count`, each once, in an order that looks random.
fn shuffled(count: usize) -> Vec<usize> {
    let mut list: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        list.swap(last, (stamp(11, last as u64) % (last as u64 + 1)) as usize);
    }
    list
}

/// Compares the buffer with pages of the memory, word by word and both ways.
fn is_of(buffer: &Buffer, memory: &Memory, pages: &[usize]) -> Result<()> {
    let mapped = buffer.map()?;
    check_eq!(mapped.len(), pages.len() * PAGE, "the buffer's size");
    for page in 0..memory.len() / PAGE {
        memory.set(page * PAGE, stamp(12, page as u64));
    }
    for (index, page) in pages.iter().enumerate() {
        check_eq!(
            mapped.get(index * PAGE),
            stamp(12, *page as u64),
            "page {index} of the buffer, which is page {page}"
        );
    }
    for (index, page) in pages.iter().enumerate() {
        mapped.set(index * PAGE + 8, stamp(13, index as u64));
        check_eq!(
            memory.get(page * PAGE + 8),
            stamp(13, index as u64),
            "page {page} of the memory, which is page {index}"
        );
    }
    Ok(())
}

/// Makes a buffer of parts (page and number of pages) of the memory, and compares.
fn list(memory: &Memory, parts: &[(usize, usize)]) -> Result<()> {
    let device = Device::open()?;
    let ranges: Vec<Range> = parts
        .iter()
        .map(|(page, pages)| memory.part(page * PAGE, pages * PAGE))
        .collect();
    let buffer = device.create(&ranges).context("PINBUF_CREATE")?;
    is_of(&buffer, memory, &all_pages(parts))
}

/// The same, with each page compared with the file that is mapped as a whole.
fn list_checked(file: BorrowedFd<'_>, memory: &Memory, parts: &[(usize, usize)]) -> Result<()> {
    let device = Device::open()?;
    let (ranges, backing) = checked(file, memory, parts);
    let buffer = device
        .create_checked(&ranges, &backing)
        .context("PINBUF_CREATE")?;
    is_of(&buffer, memory, &all_pages(parts))
}

/// Ranges of the memory, and what they map.
fn checked(
    file: BorrowedFd<'_>,
    memory: &Memory,
    parts: &[(usize, usize)],
) -> (Vec<Range>, Vec<Backing>) {
    let part = |&(page, pages): &(usize, usize)| {
        let backing = Backing {
            fd: file.as_raw_fd(),
            offset: (page * PAGE) as u64,
            ..Default::default()
        };
        (memory.part(page * PAGE, pages * PAGE), backing)
    };
    parts.iter().map(part).unzip()
}

fn all_pages(parts: &[(usize, usize)]) -> Vec<usize> {
    let each = |&(page, pages): &(usize, usize)| page..page + pages;
    parts.iter().flat_map(each).collect()
}

fn single_pages(pages: &[usize]) -> Vec<(usize, usize)> {
    pages.iter().map(|page| (*page, 1)).collect()
}

fn shuffled_anonymous() -> Result<()> {
    let memory = Memory::small_pages(PAGES * PAGE)?;
    let pages = shuffled(PAGES);
    list(&memory, &single_pages(&pages))?;
    // Each page is pinned once, whichever way.
    let device = Device::open()?;
    let ranges: Vec<Range> = pages
        .iter()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    let info = device.describe(&device.create(&ranges)?)?;
    check_eq!(
        (info.pages, info.pins),
        (PAGES as u64, PAGES as u64),
        "pages and pins"
    );
    Ok(())
}

fn shuffled_memfd() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    list(&memory, &single_pages(&shuffled(PAGES)))
}

fn shuffled_memfd_checked() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    list_checked(file.as_fd(), &memory, &single_pages(&shuffled(PAGES)))
}

fn shuffled_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let file = huge_memfd(2 * HUGE)?;
    let memory = Memory::shared(&file, 2 * HUGE)?;
    list(&memory, &single_pages(&shuffled(2 * HUGE / PAGE)))
}

fn shuffled_hugetlb_checked() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let file = huge_memfd(2 * HUGE)?;
    let memory = Memory::shared(&file, 2 * HUGE)?;
    list_checked(
        file.as_fd(),
        &memory,
        &single_pages(&shuffled(2 * HUGE / PAGE)),
    )
}

/// Small and huge pages, anonymous and of files, in one list.
fn shuffled_over_several_mappings() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let memory = Memory::map_aligned(
        3 * HUGE,
        HUGE,
        RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    memory.keep_small(0, 3 * HUGE)?;
    let small = memfd(300 * PAGE, 0)?;
    memory.replace_by(100 * PAGE, 300 * PAGE, small.as_fd(), 0)?;
    let huge = huge_memfd(HUGE)?;
    memory.replace_by(HUGE, HUGE, huge.as_fd(), 0)?;
    list(&memory, &single_pages(&shuffled(3 * HUGE / PAGE)))
}

fn of_different_lengths() -> Result<()> {
    let file = memfd(4 * PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, 4 * PAGES * PAGE)?;
    let mut parts = Vec::new();
    let mut page = 0;
    while page < 4 * PAGES - 7 {
        let pages = 1 + (stamp(14, page as u64) % 7) as usize;
        parts.push((page, pages));
        page += pages;
    }
    let parts: Vec<_> = shuffled(parts.len()).iter().map(|n| parts[*n]).collect();
    list(&memory, &parts)?;
    list_checked(file.as_fd(), &memory, &parts)
}

fn with_gaps() -> Result<()> {
    let memory = Memory::small_pages(3 * PAGES * PAGE)?;
    let parts: Vec<_> = shuffled(PAGES)
        .iter()
        .map(|n| (3 * n + n % 2, 1 + n % 2))
        .collect();
    list(&memory, &parts)
}

/// Parts that are named again, and such that overlap.
fn with_repetitions() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    let parts: Vec<_> = shuffled(2 * PAGES - 4)
        .iter()
        .map(|n| (n / 2, 1 + n % 3))
        .collect();
    // Each page of the buffer shows its page of the memory; what is written last counts.
    let device = Device::open()?;
    let ranges: Vec<Range> = parts
        .iter()
        .map(|(page, pages)| memory.part(page * PAGE, pages * PAGE))
        .collect();
    let (_, backing) = checked(file.as_fd(), &memory, &parts);
    for page in 0..PAGES {
        memory.set(page * PAGE, stamp(15, page as u64));
    }
    for buffer in [
        device.create(&ranges)?,
        device.create_checked(&ranges, &backing)?,
    ] {
        let mapped = buffer.map()?;
        let pages = all_pages(&parts);
        check_eq!(mapped.len(), pages.len() * PAGE, "the buffer's size");
        for (index, page) in pages.iter().enumerate() {
            let expected = stamp(15, *page as u64);
            check_eq!(mapped.get(index * PAGE), expected, "page {index}");
        }
        let info = device.describe(&buffer)?;
        check_eq!(info.pins, pages.len() as u64, "pins");
    }
    Ok(())
}

/// Neighbours, over the borders of mappings.
fn in_order() -> Result<()> {
    let memory = Memory::small_pages(PAGES * PAGE)?;
    let file = memfd(100 * PAGE, 0)?;
    memory.replace_by(50 * PAGE, 100 * PAGE, file.as_fd(), 0)?;
    let pages: Vec<usize> = (0..PAGES).collect();
    list(&memory, &single_pages(&pages))
}

/// All or nothing, wherever in a list the error is, and whichever way it is pinned.
fn one_range_that_cannot_be_pinned() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(PAGES * PAGE, 0)?;
    let kinds = [
        Memory::small_pages(PAGES * PAGE)?,
        Memory::shared(&file, PAGES * PAGE)?,
    ];
    let orders = [(0..PAGES).collect(), shuffled(PAGES)];
    for memory in &kinds {
        for order in &orders {
            let ranges: Vec<Range> = order
                .iter()
                .map(|page| memory.part(page * PAGE, PAGE))
                .collect();
            for bad in [0, 1, 500, PAGES - 1] {
                memory.protect(bad * PAGE, PAGE, libc::PROT_READ)?;
                let result = device.create(&ranges).map(drop);
                check_eq!(result, Err(Errno::EFAULT), "without page {bad}");
                memory.protect(bad * PAGE, PAGE, RW)?;
            }
            check!(device.create(&ranges).is_ok(), "with all pages");
        }
    }
    Ok(())
}

/// The bytes of a struct of the interface.
fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    let first = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: the interface's structs consist of integers without padding.
    unsafe { std::slice::from_raw_parts(first, size_of::<T>()) }.to_vec()
}

/// Structs and arrays of all calls, wherever they begin: 32-bit programs align numbers of eight bytes to four, and packed
/// ones not at all.
fn at_odd_addresses() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(8 * PAGE, 0)?;
    let memory = Memory::shared(&file, 8 * PAGE)?;
    memory.touch_to_write();
    let pages = [5, 2, 7];
    let parts = pages.map(|page| (page, 1));
    let place = Memory::anonymous(4 * PAGE)?;
    for count in [1, 3] {
        let (ranges, backing) = checked(file.as_fd(), &memory, &parts[..count]);
        for odd in [1, 2, 4, 7] {
            // The list crosses from one page into the next.
            let (at_ranges, at_backing, at) = (PAGE - 16 - odd, 2 * PAGE + odd, 3 * PAGE + odd);
            let bytes: Vec<u8> = ranges.iter().flat_map(bytes_of).collect();
            place.write(at_ranges, &bytes);
            let bytes: Vec<u8> = backing.iter().flat_map(bytes_of).collect();
            place.write(at_backing, &bytes);
            let call = Create {
                flags: CREATE_CLOEXEC | CREATE_CHECK_BACKING,
                ranges: place.addr() + at_ranges as u64,
                count: count as u32,
                backing: place.addr() + at_backing as u64,
                ..create()
            };
            place.write(at, &bytes_of(&call));
            let buffer = device
                .create_at(place.addr() + at as u64)
                .with_context(|| format!("{count} ranges, {odd} bytes beside"))?;
            is_of(&buffer, &memory, &pages[..count])?;
            punch_hole(&file, pages[0] * PAGE, PAGE)?;
            let call = Discards {
                size: size_of::<Discards>() as u32,
                fd: buffer.as_fd().as_raw_fd(),
                list: place.addr() + at_ranges as u64,
                count: 2,
                ..Default::default()
            };
            place.write(at, &bytes_of(&call));
            ioctl(&device, DISCARDS, place.addr() + at as u64).context("PINBUF_DISCARDS")?;
            let found = Discard {
                len: PAGE as u64,
                state: STATE_DISCARDED,
                ..Default::default()
            };
            let mut seen = vec![0; size_of::<Discard>()];
            place.read(at_ranges, &mut seen);
            check_eq!(seen, bytes_of(&found), "the part that is gone");
            memory.touch_to_write();
        }
    }
    for odd in [1, 2, 4, 7] {
        place.write(odd, &bytes_of(&(size_of::<Query>() as u32)));
        ioctl(&device, QUERY, place.addr() + odd as u64).context("PINBUF_QUERY")?;
        let mut seen = vec![0; size_of::<Query>()];
        place.read(odd, &mut seen);
        check_eq!(seen, bytes_of(&device.query()?), "the answer");
        place.write(odd, &[0; size_of::<Query>()]);
    }
    Ok(())
}
