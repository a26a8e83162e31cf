// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory that a buffer keeps in place: whole large folios, once each, which an allowance is
//! charged for and a limit is not.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::{Range, CHARGE_ALLOWANCE, CHARGE_NONE, CHARGE_USER};

use pinbuf_test_harness::support::frames::{all_frames, flags, HEAD, THP};
use pinbuf_test_harness::support::kernel::{
    needs_transparent_huge_pages, transparent_size, HugePool, Setting,
};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{become_user, in_child, set_memlock, PATIENCE, USER};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

use pinbuf_test_harness::support::uffd::{Faults, Mode};

tests! { "held":
    a_page_of_each_huge_page,
    huge_pages_that_are_gone,
    each_folio_once,
    larger_than_a_folio,
    shmem,
    pages_of_64_kib,
    hugetlb_by_the_page,
    a_limit_counts_pages,
    the_capability_counts_nothing,
    the_least_of_a_buffer,
    many_small_buffers,
    charged_while_create_waits,
    charged_while_a_batch_waits within 120,
    refused_before_a_batch_waits within 120,
    given_back_after_an_error,
}

/// Pages of a huge page.
const FOLIO: usize = HUGE / PAGE;

/// The minimum number of pages that a buffer counts for on the allowance.
const LEAST: usize = 8;

/// Expects that all of the memory is in aligned folios of this number of pages.
fn is_in_folios(memory: &Memory, pages: usize) -> Result<()> {
    let frames = all_frames(memory)?;
    for folio in frames.chunks(pages) {
        let first = folio[0];
        check!(
            first % pages as u64 == 0 && flags(first)? & (HEAD | THP) == HEAD | THP,
            "no folio of {pages} pages begins at frame {first:#x}"
        );
        for (index, frame) in folio.iter().enumerate() {
            check_eq!(*frame, first + index as u64, "frames in a folio");
        }
    }
    Ok(())
}

/// Memory in transparent huge pages. As root alone: frames are hidden from others.
fn transparent(count: usize) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(count * HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, memory.len(), libc::MADV_HUGEPAGE)?;
    for page in 0..count * FOLIO {
        memory.set(page * PAGE, 1);
    }
    is_in_folios(&memory, FOLIO)?;
    Ok(memory)
}

/// An allowance of this number of pages, for each user.
fn allowance_of(pages: usize) -> Result<Setting> {
    Setting::parameter("allowance_mb", (pages * PAGE) >> 20)
}

/// Becomes an ordinary user whose limit on locked memory is zero.
fn become_user_of_an_allowance() -> Result<()> {
    become_user(USER)?;
    set_memlock(0)
}

/// Pages of the allowance that are used.
fn used(device: &Device) -> Result<usize> {
    Ok(device.query()?.allowance_used as usize / PAGE)
}

/// Expects what a buffer is charged for, and what it keeps in place.
fn is_charged(device: &Device, buffer: &Buffer, to: u32, pages: usize, held: usize) -> Result<()> {
    let info = device.describe(buffer)?;
    check_eq!(info.charge, to, "what is charged");
    check_eq!(info.charged_pages as usize, pages, "pages charged");
    check_eq!(info.held_bytes as usize, held * PAGE, "bytes held");
    Ok(())
}

/// One page of a huge page counts for all of it.
fn a_page_of_each_huge_page() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(4 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = transparent(6)?;
        become_user_of_an_allowance()?;
        let page = |folio: usize| memory.part(folio * HUGE + 7 * PAGE, PAGE);
        // In one buffer each.
        let mut buffers = Vec::new();
        for folio in 0..4 {
            let buffer = device.create(&[page(folio)]).context("a huge page")?;
            is_charged(&device, &buffer, CHARGE_ALLOWANCE, FOLIO, FOLIO)?;
            check_eq!(used(&device)?, (folio + 1) * FOLIO, "the allowance used");
            buffers.push(buffer);
        }
        let error = device.create(&[page(4)]).err();
        check_eq!(error, Some(Errno::ENOMEM), "a page of a fifth huge page");
        let vm_pin = kernel::vm_pin()? / PAGE as i64;
        check_eq!(
            vm_pin,
            4,
            "pages in VmPin, which counts those that were named"
        );
        drop(buffers);
        check_eq!(used(&device)?, 0, "the allowance used by none");
        check_eq!(kernel::vm_pin()?, 0, "VmPin at the end");
        // And all in one.
        let pages: Vec<Range> = (0..6).map(page).collect();
        let error = device.create(&pages[..5]).err();
        check_eq!(error, Some(Errno::ENOMEM), "pages of five huge pages");
        check_eq!(used(&device)?, 0, "the allowance used after an error");
        let buffer = device.create(&pages[1..5])?;
        is_charged(&device, &buffer, CHARGE_ALLOWANCE, 4 * FOLIO, 4 * FOLIO)?;
        drop(buffer);
        check_eq!(used(&device)?, 0, "the allowance used at the end");
        Ok(())
    })
}

/// A user with a limit of 8 MiB pins one page of each of many huge pages, and unmaps these: the
/// limit counts pages, but what does not fit into it is bounded as memory.
fn huge_pages_that_are_gone() -> Result<()> {
    /// Pages that the limit has room for.
    const LIMIT: usize = 20;
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(8 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memories = (0..40)
            .map(|_| transparent(1))
            .collect::<Result<Vec<_>>>()?;
        become_user(USER)?;
        set_memlock(LIMIT * PAGE)?;
        let mut buffers = Vec::new();
        for memory in memories {
            match device.create(&[memory.part(0, PAGE)]) {
                Ok(buffer) => buffers.push(buffer),
                Err(error) => check_eq!(error, Errno::ENOMEM, "create"),
            }
            // The buffer keeps it.
            drop(memory);
        }
        check_eq!(buffers.len(), LIMIT + 8, "buffers");
        check_eq!(used(&device)?, 8 * FOLIO, "the allowance used");
        for buffer in &buffers {
            let held = device.describe(buffer)?.held_bytes;
            check_eq!(held as usize, HUGE, "bytes held");
        }
        drop(buffers);
        check_eq!(used(&device)?, 0, "the allowance used at the end");
        Ok(())
    })
}

/// Pages of folios, and what they come to: all pages as often as they are there, and the rest of
/// each folio.
fn held_by(pages: &[usize]) -> usize {
    let mut folios = BTreeMap::new();
    for page in pages {
        *folios.entry(page / FOLIO).or_insert(0) += 1;
    }
    let rest: usize = folios.values().map(|used| FOLIO - FOLIO.min(*used)).sum();
    pages.len() + rest
}

/// However its pages lie in a buffer.
fn each_folio_once() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(16 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = transparent(3)?;
        become_user_of_an_allowance()?;
        let lists: [(&str, Vec<usize>); 8] = [
            ("one after the other", (5..15).collect()),
            ("backwards", (5..15).rev().collect()),
            ("across a border", (FOLIO - 3..FOLIO + 3).collect()),
            (
                "in turn",
                (0..60).map(|n| n % 3 * FOLIO + n / 3 * 2).collect(),
            ),
            ("one page again and again", vec![9; 20]),
            (
                "two pages in turn",
                (0..20).map(|n| n % 2 * (FOLIO + 4)).collect(),
            ),
            ("all of it", (0..3 * FOLIO).collect()),
            (
                "a folio that comes back",
                (0..10)
                    .chain(2 * FOLIO..2 * FOLIO + 5)
                    .chain(100..120)
                    .collect(),
            ),
        ];
        for (name, list) in lists {
            let ranges: Vec<Range> = list
                .iter()
                .map(|page| memory.part(page * PAGE, PAGE))
                .collect();
            let held = held_by(&list);
            let buffer = device.create(&ranges)?;
            is_charged(&device, &buffer, CHARGE_ALLOWANCE, held, held).context(name)?;
            check_eq!(used(&device)?, held, "the allowance used, {name}");
            drop(buffer);
            check_eq!(used(&device)?, 0, "the allowance used after {name}");
        }
        // Each buffer for itself, also of the same folio.
        let first = device.create(&[memory.part(0, PAGE)])?;
        let second = device.create(&[memory.part(PAGE, PAGE)])?;
        check_eq!(used(&device)?, 2 * FOLIO, "the allowance used by two");
        drop((first, second));
        Ok(())
    })
}

/// Pages that are there more often than the folio has pages count as often as they are there.
fn larger_than_a_folio() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(4 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = transparent(1)?;
        become_user_of_an_allowance()?;
        for pages in [FOLIO - 1, FOLIO, FOLIO + 1, 2 * FOLIO] {
            let list = vec![3; pages];
            let buffer = device.create(&vec![memory.part(3 * PAGE, PAGE); pages])?;
            let held = held_by(&list);
            is_charged(&device, &buffer, CHARGE_ALLOWANCE, held, held)
                .with_context(|| format!("{pages} times a page"))?;
            check_eq!(used(&device)?, held, "the allowance used");
        }
        Ok(())
    })
}

/// Huge pages of shmem.
fn shmem() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _huge = Setting::choice(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    )?;
    let _setting = allowance_of(4 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let file = memfd(2 * HUGE, 0)?;
        let flags = libc::MAP_SHARED;
        let memory = Memory::map_aligned(2 * HUGE, HUGE, RW, flags, Some(file.as_fd()), 0)?;
        memory.advise(0, 2 * HUGE, libc::MADV_HUGEPAGE)?;
        for page in 0..2 * FOLIO {
            memory.set(page * PAGE, 1);
        }
        is_in_folios(&memory, FOLIO)?;
        become_user_of_an_allowance()?;
        let buffer = device.create(&[memory.part(HUGE - PAGE, PAGE)])?;
        is_charged(&device, &buffer, CHARGE_ALLOWANCE, FOLIO, FOLIO)?;
        drop(buffer);
        let buffer = device.create(&[memory.part(HUGE - PAGE, 2 * PAGE)])?;
        is_charged(&device, &buffer, CHARGE_ALLOWANCE, 2 * FOLIO, 2 * FOLIO)
    })
}

fn pages_of_64_kib() -> Result<()> {
    needs_transparent_huge_pages()?;
    const PAGES: usize = 16;
    let _small = Setting::choice(transparent_size(PAGES * PAGE), "always")?;
    let _large = Setting::choice(transparent_size(HUGE), "never")?;
    let _setting = allowance_of(FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = Memory::map_aligned(4 * PAGES * PAGE, HUGE, RW, flags, None, 0)?;
        for page in 0..4 * PAGES {
            memory.set(page * PAGE, 1);
        }
        is_in_folios(&memory, PAGES)?;
        become_user_of_an_allowance()?;
        let buffer = device.create(&[memory.part(3 * PAGE, PAGE)])?;
        is_charged(&device, &buffer, CHARGE_ALLOWANCE, PAGES, PAGES)?;
        let buffer = device.create(&[memory.part((PAGES - 1) * PAGE, (PAGES + 2) * PAGE)])?;
        is_charged(&device, &buffer, CHARGE_ALLOWANCE, 3 * PAGES, 3 * PAGES)
    })
}

/// The pool bounds hugetlb already.
fn hugetlb_by_the_page() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let _setting = allowance_of(FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::shared(huge_memfd(HUGE)?, HUGE)?;
        memory.touch();
        become_user_of_an_allowance()?;
        for pages in [1, 100, FOLIO] {
            let buffer = device.create(&[memory.part(0, pages * PAGE)])?;
            is_charged(&device, &buffer, CHARGE_ALLOWANCE, pages.max(LEAST), pages)
                .with_context(|| format!("{pages} pages"))?;
        }
        Ok(())
    })
}

/// As iommufd's: pages are charged, whatever they keep in place. What they keep is reported all the same.
fn a_limit_counts_pages() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(0)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = transparent(3)?;
        become_user(USER)?;
        set_memlock(5 * PAGE)?;
        let ranges: Vec<Range> = (0..3)
            .map(|folio| memory.part(folio * HUGE, PAGE))
            .collect();
        let buffer = device.create(&ranges)?;
        is_charged(&device, &buffer, CHARGE_USER, 3, 3 * FOLIO)?;
        let error = device.create(&ranges).err();
        check_eq!(error, Some(Errno::ENOMEM), "three more of five");
        drop(device.create(&ranges[..2])?);
        Ok(())
    })
}

fn the_capability_counts_nothing() -> Result<()> {
    needs_transparent_huge_pages()?;
    let device = Device::open()?;
    let memory = transparent(1)?;
    let buffer = device.create(&[memory.part(0, 2 * PAGE)])?;
    is_charged(&device, &buffer, CHARGE_NONE, 2, FOLIO)?;
    let small = Memory::small_pages(3 * PAGE)?;
    let buffer = device.create(&[small.range()])?;
    is_charged(&device, &buffer, CHARGE_NONE, 3, 3)
}

/// What a buffer keeps of the kernel's own memory makes it count for some pages at least.
fn the_least_of_a_buffer() -> Result<()> {
    let _setting = allowance_of(256)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(20 * PAGE)?;
        become_user_of_an_allowance()?;
        for pages in [1, 2, LEAST - 1, LEAST, LEAST + 1, 20] {
            let buffer = device.create(&[memory.part(0, pages * PAGE)])?;
            let charged = pages.max(LEAST);
            is_charged(&device, &buffer, CHARGE_ALLOWANCE, charged, pages)?;
            check_eq!(used(&device)?, charged, "the allowance used by {pages}");
        }
        Ok(())
    })
}

fn many_small_buffers() -> Result<()> {
    let _setting = allowance_of(256)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(PAGE)?;
        become_user_of_an_allowance()?;
        let buffers: Vec<Buffer> = std::iter::from_fn(|| device.create(&[memory.range()]).ok())
            .take(1000)
            .collect();
        check_eq!(buffers.len(), 256 / LEAST, "buffers of one page");
        drop(buffers);
        check_eq!(used(&device)?, 0, "the allowance used at the end");
        Ok(())
    })
}

/// A call that waits for a page, for as long as its caller wants, is charged for what it has pinned.
fn charged_while_create_waits() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(8 * FOLIO)?;
    for count in [1, 3] {
        in_child(|| {
            let device = Device::open()?;
            let memory = transparent(count)?;
            let missing = Memory::small_pages(PAGE)?;
            let faults = Faults::of(&missing, Mode::Missing)?;
            become_user_of_an_allowance()?;
            let mut ranges: Vec<Range> = (0..count)
                .map(|folio| memory.part(folio * HUGE, PAGE))
                .collect();
            ranges.push(missing.range());
            let result = std::thread::scope(|scope| {
                let caller = scope.spawn(|| device.create(&ranges));
                let checked = faults.wait().and_then(|()| {
                    let used = used(&device)?;
                    check!(
                        used >= count * FOLIO,
                        "{used} pages are charged while {count} huge pages are held"
                    );
                    Ok(())
                });
                // Nobody waits for a userfaultfd that is closed.
                drop(faults);
                let result = caller.join().expect("the caller panicked");
                checked.map(|()| result)
            })?;
            let held = count * FOLIO + 1;
            is_charged(&device, &result?, CHARGE_ALLOWANCE, held, held)?;
            check_eq!(used(&device)?, 0, "the allowance used at the end");
            Ok(())
        })
        .with_context(|| format!("{count} huge pages"))?;
    }
    Ok(())
}

/// Pages that the driver asks GUP for in one call. The first page of a range is a batch of its own.
const BATCH: usize = 512;

/// Many huge pages, but few enough for the memory of any guest, however large they are.
const MANY: usize = 16;

/// A range of `pages` pages, each `step`th out of a huge page of its own, and one page that is missing; and the
/// rest of the huge pages.
fn pages_of_huge_pages(pages: usize, step: usize) -> Result<(Memory, Vec<Memory>)> {
    let window = Memory::small_pages((pages + 1) * PAGE)?;
    for page in 0..pages {
        window.set(page * PAGE, 1);
    }
    let mut rest = Vec::new();
    for page in (step - 1..pages).step_by(step) {
        let memory = transparent(1)?;
        memory.move_part(0, PAGE, &window, page * PAGE)?;
        rest.push(memory);
    }
    Ok((window, rest))
}

/// A call waits for the last page of a batch, for as long as its caller wants: it is charged for all that it
/// has pinned until then. Only its pins keep the rest of the huge pages.
fn charged_while_a_batch_waits() -> Result<()> {
    needs_transparent_huge_pages()?;
    // A part of a batch, and a whole one: it would take 1 GiB if each of its pages were of a huge page.
    for (pages, step) in [(1, 1), (5, 1), (MANY, 1), (BATCH, BATCH / MANY)] {
        let huge = pages / step;
        // Of each huge page one page is in the buffer, and all others are pages of their own.
        let held = huge * FOLIO + (pages - huge);
        let _setting = allowance_of(held + 2 * FOLIO)?;
        let _system = Setting::parameter("allowance_system_mb", 2048)?;
        in_child(|| {
            let device = Device::open()?;
            let (window, rest) = pages_of_huge_pages(pages, step)?;
            let faults = Faults::of_range(window.part(pages * PAGE, PAGE), Mode::Missing)?;
            become_user_of_an_allowance()?;
            let result = std::thread::scope(|scope| {
                let caller = scope.spawn(|| device.create(&[window.range()]));
                let checked = faults.wait().and_then(|()| {
                    drop(rest);
                    check_eq!(used(&device)?, held + 1, "pages that are charged");
                    Ok(())
                });
                // Nobody waits for a userfaultfd that is closed.
                drop(faults);
                let result = caller.join().expect("the caller panicked");
                checked.map(|()| result)
            })?;
            is_charged(&device, &result?, CHARGE_ALLOWANCE, held + 1, held + 1)?;
            check_eq!(used(&device)?, 0, "the allowance used at the end");
            Ok(())
        })
        .with_context(|| format!("{pages} pages, {huge} of huge pages"))?;
    }
    Ok(())
}

/// Where the allowance has no room for them, the call fails, and does not hold them while it waits.
fn refused_before_a_batch_waits() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(8 * FOLIO)?;
    for pages in [9, MANY] {
        in_child(|| {
            let device = Device::open()?;
            let (window, rest) = pages_of_huge_pages(pages, 1)?;
            let faults = Faults::of_range(window.part(pages * PAGE, PAGE), Mode::Missing)?;
            become_user_of_an_allowance()?;
            let result = std::thread::scope(|scope| {
                let caller = scope.spawn(|| device.create(&[window.range()]));
                let start = Instant::now();
                while !caller.is_finished() && start.elapsed() < PATIENCE / 4 {
                    std::thread::sleep(Duration::from_millis(5));
                }
                let finished = caller.is_finished();
                drop((faults, rest));
                let result = caller.join().expect("the caller panicked");
                check!(finished, "create waits, with what it must not have");
                Ok(result)
            })?;
            check_eq!(result.err(), Some(Errno::ENOMEM), "create");
            check_eq!(used(&device)?, 0, "the allowance used at the end");
            Ok(())
        })
        .with_context(|| format!("{pages} huge pages"))?;
    }
    Ok(())
}

fn given_back_after_an_error() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = allowance_of(8 * FOLIO)?;
    in_child(|| {
        let device = Device::open()?;
        let memory = transparent(3)?;
        let hole = Memory::small_pages(3 * PAGE)?;
        hole.unmap(PAGE, PAGE)?;
        become_user_of_an_allowance()?;
        for _ in 0..20 {
            let ranges = [
                memory.part(0, PAGE),
                memory.part(HUGE + PAGE, 3 * PAGE),
                hole.range(),
            ];
            let error = device.create(&ranges).err();
            check_eq!(error, Some(Errno::EFAULT), "create with a hole");
            check_eq!(used(&device)?, 0, "the allowance used after an error");
        }
        Ok(())
    })
}
