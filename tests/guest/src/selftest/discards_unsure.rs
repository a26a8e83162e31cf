// SPDX-License-Identifier: MIT OR Apache-2.0

//! Private memory in huge pages that are mapped page by page. A kernel that does not count the mappings of each page
//! does not know which of these pages are mapped: they are reported as unsure. All other parts of a buffer are reported
//! exactly. The same tests run where the kernel counts, and everything is reported exactly.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use pinbuf_uapi::{Discard, Discards, STATE_DISCARDED, STATE_UNSURE};

use crate::discards::{is_gone, is_gone_or_unsure, transparent, FOLIO};
use pinbuf_test_harness::support::memory::{HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "discards_unsure":
    until_all_of_it_is_unmapped,
    each_huge_page_by_itself,
    beside_memory_of_other_kinds,
    moved_as_a_whole_and_in_parts,
    from_an_offset_within,
    split_and_unmapped_while_asked,
}

fn until_all_of_it_is_unmapped() -> Result<()> {
    const ALL: (usize, usize) = (0, FOLIO);
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 1)?;
    memory.advise(5 * PAGE, 3 * PAGE, libc::MADV_DONTNEED)?;
    is_gone_or_unsure(&device, &buffer, &[(5, 3)], &[ALL])?;
    // The new pages are of other folios.
    memory.touch_to_write();
    is_gone_or_unsure(&device, &buffer, &[(5, 3)], &[ALL])?;
    memory.unmap(0, HUGE - PAGE)?;
    is_gone_or_unsure(&device, &buffer, &[(0, FOLIO - 1)], &[ALL])?;
    memory.advise(HUGE - PAGE, PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[ALL])
}

fn each_huge_page_by_itself() -> Result<()> {
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 4)?;
    memory.advise(HUGE + 9 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    memory.advise(2 * HUGE, HUGE, libc::MADV_DONTNEED)?;
    let parts = [(FOLIO + 9, 1), (2 * FOLIO, FOLIO)];
    is_gone_or_unsure(&device, &buffer, &parts, &[(FOLIO, FOLIO)])?;
    memory.unmap(HUGE, HUGE)?;
    is_gone(&device, &buffer, &[(FOLIO, 2 * FOLIO)])
}

/// Parts of a buffer that begin and end within huge pages, some of them twice, next to small pages.
fn beside_memory_of_other_kinds() -> Result<()> {
    let device = Device::open()?;
    let small = Memory::small_pages(4 * PAGE)?;
    small.touch_to_write();
    let (memory, _whole) = transparent(&device, 2)?;
    let buffer = device.create(&[
        small.part(0, 2 * PAGE),
        memory.part(HUGE - 3 * PAGE, 6 * PAGE),
        small.part(2 * PAGE, 2 * PAGE),
        memory.part(HUGE - PAGE, PAGE),
    ])?;
    is_gone(&device, &buffer, &[])?;
    small.advise(PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
    memory.advise(HUGE - PAGE, PAGE, libc::MADV_DONTNEED)?;
    let parts = [(1, 1), (4, 1), (8, 1), (10, 1)];
    is_gone_or_unsure(&device, &buffer, &parts, &[(2, 3), (10, 1)])
}

fn moved_as_a_whole_and_in_parts() -> Result<()> {
    let device = Device::open()?;
    let (mut memory, buffer) = transparent(&device, 1)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let target = |remainder| Memory::map_congruent(HUGE, HUGE, remainder, RW, flags, None, 0);
    memory.remap_onto(target(0)?, 0)?;
    is_gone(&device, &buffer, &[])?;
    // At another place in a huge page it is mapped page by page.
    memory.remap_onto(target(PAGE)?, 0)?;
    is_gone_or_unsure(&device, &buffer, &[], &[(0, FOLIO)])?;
    memory.unmap(0, HUGE)?;
    is_gone(&device, &buffer, &[(0, FOLIO)])
}

fn from_an_offset_within() -> Result<()> {
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 2)?;
    memory.advise(HUGE + 20 * PAGE, 4 * PAGE, libc::MADV_DONTNEED)?;
    let ask = |from: usize, room: u32| -> Result<(usize, Vec<Discard>)> {
        let mut list = [Discard::default(); 2];
        let mut call = Discards {
            size: size_of::<Discards>() as u32,
            fd: buffer.as_fd().as_raw_fd(),
            offset: (from * PAGE) as u64,
            list: list.as_mut_ptr() as u64,
            count: room,
            reserved: 0,
        };
        device.discards_raw(&mut call)?;
        Ok((
            call.offset as usize / PAGE,
            list[..call.count as usize].to_vec(),
        ))
    };
    // The first such page, and the rest from within it.
    let (first, from, end, state) = if kernel::has_page_mapcounts()? {
        (FOLIO + 20, FOLIO + 22, FOLIO + 24, STATE_DISCARDED)
    } else {
        (FOLIO, FOLIO + 22, 2 * FOLIO, STATE_UNSURE)
    };
    check_eq!(ask(0, 0)?, (first, vec![]), "the first page");
    let rest = Discard {
        offset: (from * PAGE) as u64,
        len: ((end - from) * PAGE) as u64,
        state,
        reserved: 0,
    };
    check_eq!(ask(from, 2)?, (2 * FOLIO, vec![rest]), "the rest");
    Ok(())
}

/// While the kernel goes from one way of mapping to the other, and until the last page is unmapped, nothing of a huge
/// page is reported as discarded that is mapped, and no state is followed by one that it cannot come from.
fn split_and_unmapped_while_asked() -> Result<()> {
    const TIME: Duration = Duration::from_secs(3);
    let device = Device::open()?;
    kernel::needs_transparent_huge_pages()?;
    let exact = kernel::has_page_mapcounts()?;
    let begin = Instant::now();
    let (mut rounds, mut asked) = (0, 0);
    while begin.elapsed() < TIME {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
        memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
        memory.touch_to_write();
        let buffer = device.create(&[memory.range()])?;
        is_gone(&device, &buffer, &[])?;
        let (begun, end) = (AtomicBool::new(false), AtomicBool::new(false));
        asked += std::thread::scope(|scope| -> Result<u64> {
            let asks = scope.spawn(|| -> Result<u64> {
                let (mut asked, mut known) = (0, 0);
                // Once more at the end.
                let mut last = false;
                while !last {
                    last = end.load(Ordering::Acquire);
                    let info = device.describe(&buffer)?;
                    check!(
                        info.discarded_bytes == 0 || begun.load(Ordering::Acquire),
                        "discarded while it is mapped: {info:?}"
                    );
                    check!(info.unsure_bytes == 0 || !exact, "unsure: {info:?}");
                    // What is seen becomes unsure or discarded, and what is unsure becomes discarded.
                    let state = info.unsure_bytes + 2 * info.discarded_bytes;
                    check!(known <= state, "{info:?} after {known}");
                    known = state;
                    asked += 1;
                }
                Ok(asked)
            });
            memory.protect(3 * PAGE, PAGE, libc::PROT_READ)?;
            begun.store(true, Ordering::Release);
            memory.advise(0, HUGE / 2, libc::MADV_DONTNEED)?;
            memory.advise(HUGE / 2, HUGE / 2, libc::MADV_DONTNEED)?;
            end.store(true, Ordering::Release);
            match asks.join() {
                Ok(result) => result,
                Err(_) => bail!("the thread that asks panicked"),
            }
        })?;
        is_gone(&device, &buffer, &[(0, FOLIO)])?;
        rounds += 1;
    }
    println!("# {rounds} rounds, asked {asked} times");
    Ok(())
}
