// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which parts of a buffer the memory's owner does not see any more: `PINBUF_DISCARDS` and
//! `PINBUF_INFO`.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::unistd::ftruncate;
use pinbuf_uapi::{Discard, Discards, STATE_DISCARDED, STATE_UNSURE};

use pinbuf_test_harness::support::frames::{all_frames, flags, THP};
use pinbuf_test_harness::support::kernel::{needs_transparent_huge_pages, HugePool, Setting};
use pinbuf_test_harness::support::memory::{
    huge_memfd, memfd, pattern, punch_hole, GIGA, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::process::{
    become_user, in_child, set_memlock, Child, Link, PATIENCE, USER,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "discards":
    nothing,
    holes,
    holes_while_unmapped,
    holes_of_another_process,
    removed,
    truncated,
    the_file_is_gone,
    the_file_is_not_gone,
    shared_memory_stays,
    part_of_a_page,
    shared_huge_pages,
    dont_need,
    mapped_over,
    unmapped,
    guard_pages,
    moved,
    the_process_ends,
    a_fork_of_private_memory,
    a_fork_that_outlives,
    private_memory_of_a_file,
    advice_that_keeps,
    huge_pages,
    parts_of_huge_pages,
    huge_pages_split_and_made,
    hugetlb_files,
    hugetlb_private,
    pages_of_1_gib,
    twice_in_a_buffer,
    from_an_offset,
    arguments,
    amplification within 120,
    killed within 120,
}

pub(crate) const COUNT: usize = 16;
pub(crate) const LEN: usize = COUNT * PAGE;
const MADV_GUARD_INSTALL: i32 = 102;
pub(crate) const MADV_COLLAPSE: i32 = 25;

/// Parts of a buffer: first page, number of pages.
pub(crate) type Parts<'a> = &'a [(usize, usize)];

/// Expects these parts to be gone, and nothing else.
pub(crate) fn is_gone(device: &Device, buffer: &Buffer, parts: Parts) -> Result<()> {
    is_gone_or_unsure(device, buffer, parts, &[])
}

/// Expects these parts to be gone, and nothing else. Nothing is known of the parts `single`, if the kernel does not
/// count the mappings of each page: they are in large folios of which some page is mapped by an entry of its own.
pub(crate) fn is_gone_or_unsure(
    device: &Device,
    buffer: &Buffer,
    parts: Parts,
    single: Parts,
) -> Result<()> {
    let unsure = match single {
        [] => single,
        _ if kernel::has_page_mapcounts()? => &[],
        _ => single,
    };
    let mut states = vec![0; buffer.len()? / PAGE];
    for (parts, state) in [(parts, STATE_DISCARDED), (unsure, STATE_UNSURE)] {
        for &(first, pages) in parts {
            states[first..first + pages].fill(state);
        }
    }
    let mut expected = Vec::new();
    let mut offset = 0;
    for run in states.chunk_by(|one, next| one == next) {
        let len = (run.len() * PAGE) as u64;
        if run[0] != 0 {
            expected.push(Discard {
                offset,
                len,
                state: run[0],
                reserved: 0,
            });
        }
        offset += len;
    }
    for at_once in [1, 2, 64] {
        let seen = device.discards(buffer, at_once)?;
        check_eq!(seen, expected, "discards, {at_once} at once");
    }
    let info = device.describe(buffer)?;
    let bytes = [STATE_DISCARDED, STATE_UNSURE].map(|state| -> u64 {
        let of = expected.iter().filter(|part| part.state == state);
        of.map(|part| part.len).sum()
    });
    let state = expected.iter().fold(0, |all, part| all | part.state);
    check_eq!(info.discarded_bytes, bytes[0], "bytes discarded");
    check_eq!(info.unsure_bytes, bytes[1], "bytes not known of");
    check_eq!(info.state, u64::from(state), "state");
    Ok(())
}

/// A buffer of all of this memory, written before.
pub(crate) fn buffer_of(device: &Device, memory: &Memory) -> Result<Buffer> {
    memory.write(0, &pattern(7, 0, memory.len()));
    let buffer = device.create(&[memory.range()])?;
    is_gone(device, &buffer, &[])?;
    Ok(buffer)
}

fn nothing() -> Result<()> {
    let device = Device::open()?;
    let memories = [
        Memory::small_pages(LEN)?,
        Memory::shared(memfd(LEN, 0)?, LEN)?,
        Memory::map(LEN, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?,
    ];
    for memory in &memories {
        buffer_of(&device, memory)?;
    }
    let all: Vec<_> = memories.iter().map(Memory::range).collect();
    is_gone(&device, &device.create(&all)?, &[])
}

fn holes() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    punch_hole(&file, 3 * PAGE, PAGE)?;
    is_gone(&device, &buffer, &[(3, 1)])?;
    punch_hole(&file, 4 * PAGE, 2 * PAGE)?;
    punch_hole(&file, 9 * PAGE, PAGE)?;
    is_gone(&device, &buffer, &[(3, 3), (9, 1)])?;
    // What the file has there now is another page.
    memory.touch_to_write();
    is_gone(&device, &buffer, &[(3, 3), (9, 1)])?;
    punch_hole(&file, 0, LEN)?;
    is_gone(&device, &buffer, &[(0, COUNT)])?;
    // A buffer of the new pages is not affected.
    buffer_of(&device, &memory)?;
    is_gone(&device, &buffer, &[(0, COUNT)])
}

fn holes_while_unmapped() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let buffer = buffer_of(&device, &Memory::shared(&file, LEN)?)?;
    is_gone(&device, &buffer, &[])?;
    punch_hole(&file, 0, 2 * PAGE)?;
    is_gone(&device, &buffer, &[(0, 2)])
}

fn holes_of_another_process() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    in_child(|| punch_hole(&file, 14 * PAGE, 2 * PAGE))?;
    is_gone(&device, &buffer, &[(14, 2)])
}

fn removed() -> Result<()> {
    let device = Device::open()?;
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    for memory in [
        Memory::shared(memfd(LEN, 0)?, LEN)?,
        Memory::map(LEN, RW, shared, None, 0)?,
    ] {
        let buffer = buffer_of(&device, &memory)?;
        memory.advise(5 * PAGE, PAGE, libc::MADV_REMOVE)?;
        is_gone(&device, &buffer, &[(5, 1)])?;
    }
    Ok(())
}

fn truncated() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    ftruncate(&file, (10 * PAGE) as i64)?;
    is_gone(&device, &buffer, &[(10, COUNT - 10)])?;
    ftruncate(&file, LEN as i64)?;
    is_gone(&device, &buffer, &[(10, COUNT - 10)])
}

/// The last user of the file releases it: only the buffer still has its memory.
fn the_file_is_gone() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    drop(memory);
    is_gone(&device, &buffer, &[(0, COUNT)])
}

fn the_file_is_not_gone() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    drop(memory);
    is_gone(&device, &buffer, &[])
}

/// What removes a mapping, but not the file's page, leaves the memory shared.
fn shared_memory_stays() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(0, LEN, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[])?;
    memory.advise(0, LEN, libc::MADV_PAGEOUT)?;
    is_gone(&device, &buffer, &[])?;
    memory.protect(0, LEN, libc::PROT_NONE)?;
    is_gone(&device, &buffer, &[])?;
    drop(memory);
    is_gone(&device, &buffer, &[])?;
    // And it is the same memory.
    let memory = Memory::shared(&file, LEN)?;
    let mapped = buffer.map()?;
    for page in 0..COUNT {
        mapped.set(page * PAGE, page as u64 + 100);
        check_eq!(memory.get(page * PAGE), page as u64 + 100, "page {page}");
    }
    Ok(())
}

/// A hole smaller than a page clears the buffer's bytes too.
fn part_of_a_page() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    punch_hole(&file, 2 * PAGE + 512, PAGE)?;
    is_gone(&device, &buffer, &[])?;
    let mapped = buffer.map()?;
    check_eq!(
        mapped.get(2 * PAGE + 512),
        0,
        "the buffer where the hole begins"
    );
    mapped.set(2 * PAGE + 512, 3);
    check_eq!(memory.get(2 * PAGE + 512), 3, "the memory");
    Ok(())
}

/// `count` huge pages of a file, with a buffer.
pub(crate) fn huge_file(
    device: &Device,
    count: usize,
) -> Result<(OwnedFd, Memory, Buffer, Setting)> {
    needs_transparent_huge_pages()?;
    let setting = Setting::choice(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    )?;
    let len = count * HUGE;
    let file = memfd(len, 0)?;
    let shared = libc::MAP_SHARED;
    let memory = Memory::map_aligned(len, HUGE, RW, shared, Some(file.as_fd()), 0)?;
    memory.advise(0, len, libc::MADV_HUGEPAGE)?;
    let buffer = buffer_of(device, &memory)?;
    check!(
        flags(all_frames(&memory)?[0])? & THP != 0,
        "there is no huge page at the beginning"
    );
    Ok((file, memory, buffer, setting))
}

/// A hole in a part of a huge page of shmem clears that part; a hole of the whole page takes it away.
fn shared_huge_pages() -> Result<()> {
    let device = Device::open()?;
    let (file, memory, buffer, _setting) = huge_file(&device, 2)?;
    punch_hole(&file, 5 * PAGE, 3 * PAGE)?;
    is_gone(&device, &buffer, &[])?;
    let mapped = buffer.map()?;
    check_eq!(mapped.get(6 * PAGE), 0, "the buffer in the hole");
    mapped.set(6 * PAGE, 8);
    check_eq!(memory.get(6 * PAGE), 8, "the memory in the hole");
    punch_hole(&file, 0, HUGE)?;
    is_gone(&device, &buffer, &[(0, HUGE / PAGE)])
}

fn dont_need() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(2 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(2, 1)])?;
    memory.advise(8 * PAGE, 8 * PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(2, 1), (8, 8)])?;
    memory.touch_to_write();
    is_gone(&device, &buffer, &[(2, 1), (8, 8)])
}

fn mapped_over() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.replace(4 * PAGE, 4 * PAGE)?;
    is_gone(&device, &buffer, &[(4, 4)])
}

fn unmapped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.unmap(0, PAGE)?;
    is_gone(&device, &buffer, &[(0, 1)])?;
    drop(memory);
    is_gone(&device, &buffer, &[(0, COUNT)])
}

fn guard_pages() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(6 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL)?;
    is_gone(&device, &buffer, &[(6, 2)])?;
    // In shared memory they hide the page, which is still in the file.
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(6 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL)?;
    is_gone(&device, &buffer, &[])
}

/// Memory that was moved still belongs to its owner.
fn moved() -> Result<()> {
    let device = Device::open()?;
    let mut memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    memory.remap_onto(Memory::map(LEN, RW, flags, None, 0)?, 0)?;
    is_gone(&device, &buffer, &[])?;
    let mapped = buffer.map()?;
    mapped.set(PAGE, 9);
    check_eq!(memory.get(PAGE), 9, "the memory at its new place");
    memory.unmap(PAGE, PAGE)?;
    is_gone(&device, &buffer, &[(1, 1)])
}

/// The buffer of a process that exits, in the hands of another.
fn the_process_ends() -> Result<()> {
    let device = Device::open()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(LEN)?;
        memory.touch_to_write();
        let buffer = device.create(&[memory.range()])?;
        link.theirs.send(buffer.as_fd())?;
        link.theirs.wait()
    })?;
    let buffer = Buffer::from_fd(link.ours.receive()?);
    is_gone(&device, &buffer, &[])?;
    link.ours.signal()?;
    child.join_within(PATIENCE)?;
    is_gone(&device, &buffer, &[(0, COUNT)])
}

/// A child has copies: the parent keeps the buffer's pages, whichever of the two writes.
fn a_fork_of_private_memory() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    in_child(|| {
        is_gone(&device, &buffer, &[])?;
        memory.touch_to_write();
        is_gone(&device, &buffer, &[])
    })?;
    let link = Link::new()?;
    let child = Child::run(|| link.theirs.wait())?;
    memory.touch_to_write();
    is_gone(&device, &buffer, &[])?;
    // The child has other pages: it does not keep these.
    memory.advise(0, 2 * PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(0, 2)])?;
    link.ours.signal()?;
    child.join_within(PATIENCE)?;
    is_gone(&device, &buffer, &[(0, 2)])
}

/// Memory that was shared by a fork before the buffer was made: the buffer's pages belong to one process, and are
/// gone once that has let go of them, although the other process still has its own.
pub(crate) fn forked_before(
    device: &Device,
    memory: &Memory,
    discard: impl FnOnce() -> Result<()>,
    parts: Parts,
    single: Parts,
) -> Result<()> {
    let link = Link::new()?;
    let child = Child::run(|| link.theirs.wait())?;
    let buffer = device.create(&[memory.range()])?;
    is_gone_or_unsure(device, &buffer, &[], single)?;
    discard()?;
    is_gone_or_unsure(device, &buffer, parts, single)?;
    link.ours.signal()?;
    child.join_within(PATIENCE)?;
    is_gone_or_unsure(device, &buffer, parts, single)
}

fn a_fork_that_outlives() -> Result<()> {
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(7, 0, LEN));
    let unmap = || Ok(memory.unmap(0, LEN)?);
    forked_before(&Device::open()?, &memory, unmap, &[(0, COUNT)], &[])
}

/// Pages of a private mapping are the process's, whatever becomes of the file.
fn private_memory_of_a_file() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::private(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    punch_hole(&file, 0, LEN)?;
    is_gone(&device, &buffer, &[])?;
    memory.advise(3 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(3, 1)])
}

/// Advice and protection that change how memory is seen, and not which.
fn advice_that_keeps() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    for advice in [
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_FREE,
        libc::MADV_MERGEABLE,
        libc::MADV_DONTFORK,
    ] {
        memory
            .advise(0, LEN, advice)
            .with_context(|| format!("madvise {advice}"))?;
        memory.protect(0, LEN, libc::PROT_NONE)?;
        memory.protect(0, LEN, RW)?;
        let seen = device.discards(&buffer, 4)?;
        check!(seen.is_empty(), "after advice {advice}: {seen:?}");
    }
    let mapped = buffer.map()?;
    for page in 0..COUNT {
        mapped.set(page * PAGE, page as u64 + 1);
        check_eq!(memory.get(page * PAGE), page as u64 + 1, "page {page}");
    }
    is_gone(&device, &buffer, &[])
}

/// Private memory in `count` transparent huge pages, with a buffer.
pub(crate) fn transparent(device: &Device, count: usize) -> Result<(Memory, Buffer)> {
    needs_transparent_huge_pages()?;
    let flags_ = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(count * HUGE, HUGE, RW, flags_, None, 0)?;
    memory.advise(0, memory.len(), libc::MADV_HUGEPAGE)?;
    memory.touch_to_write();
    for frame in all_frames(&memory)? {
        check!(flags(frame)? & THP != 0, "{frame:#x} is of no huge page");
    }
    let buffer = buffer_of(device, &memory)?;
    Ok((memory, buffer))
}

pub(crate) const FOLIO: usize = HUGE / PAGE;

fn huge_pages() -> Result<()> {
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 3)?;
    memory.advise(HUGE, HUGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(FOLIO, FOLIO)])?;
    drop(memory);
    is_gone(&device, &buffer, &[(0, 3 * FOLIO)])
}

fn parts_of_huge_pages() -> Result<()> {
    const FIRST: Parts = &[(0, FOLIO)];
    const BOTH: Parts = &[(0, 2 * FOLIO)];
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 2)?;
    memory.advise(7 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    is_gone_or_unsure(&device, &buffer, &[(7, 1)], FIRST)?;
    memory.unmap(HUGE - PAGE, 2 * PAGE)?;
    is_gone_or_unsure(&device, &buffer, &[(7, 1), (FOLIO - 1, 2)], BOTH)?;
    // A buffer of a part of a huge page.
    let part = device.create(&[memory.part(20 * PAGE, 4 * PAGE)])?;
    is_gone_or_unsure(&device, &part, &[], &[(0, 4)])?;
    memory.advise(22 * PAGE, 8 * PAGE, libc::MADV_DONTNEED)?;
    is_gone_or_unsure(&device, &part, &[(2, 2)], &[(0, 4)])?;
    let parts = [(7, 1), (22, 8), (FOLIO - 1, 2)];
    is_gone_or_unsure(&device, &buffer, &parts, BOTH)
}

/// How a huge page is mapped does not matter, where the mappings of each page are counted.
fn huge_pages_split_and_made() -> Result<()> {
    const SPLIT: Parts = &[(0, FOLIO)];
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 2)?;
    memory.protect(3 * PAGE, PAGE, libc::PROT_READ)?;
    is_gone_or_unsure(&device, &buffer, &[], SPLIT)?;
    memory.protect(3 * PAGE, PAGE, RW)?;
    // May fail, as the page is pinned.
    let _ = memory.advise(0, HUGE, MADV_COLLAPSE);
    is_gone_or_unsure(&device, &buffer, &[], SPLIT)?;
    memory.advise(0, PAGE, libc::MADV_DONTNEED)?;
    let _ = memory.advise(0, HUGE, MADV_COLLAPSE);
    memory.touch_to_write();
    let mapped = buffer.map()?;
    for page in 1..2 * FOLIO {
        mapped.set(page * PAGE, page as u64);
        check_eq!(memory.get(page * PAGE), page as u64, "page {page}");
    }
    is_gone_or_unsure(&device, &buffer, &[(0, 1)], SPLIT)
}

fn hugetlb_files() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    let device = Device::open()?;
    let file = huge_memfd(3 * HUGE)?;
    let memory = Memory::shared(&file, 3 * HUGE)?;
    let buffer = buffer_of(&device, &memory)?;
    let part = device.create(&[memory.part(HUGE - PAGE, 2 * PAGE)])?;
    // A hole of less than a huge page clears, a hole of a huge page takes it away.
    punch_hole(&file, HUGE + PAGE, PAGE)?;
    is_gone(&device, &buffer, &[])?;
    punch_hole(&file, HUGE, HUGE)?;
    is_gone(&device, &buffer, &[(FOLIO, FOLIO)])?;
    is_gone(&device, &part, &[(1, 1)])?;
    memory.advise(0, HUGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(FOLIO, FOLIO)])?;
    drop((memory, file));
    is_gone(&device, &buffer, &[(0, 3 * FOLIO)])
}

fn hugetlb_private() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    let buffer = buffer_of(&device, &memory)?;
    in_child(|| is_gone(&device, &buffer, &[]))?;
    memory.advise(HUGE, HUGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(FOLIO, FOLIO)])?;
    drop(memory);
    is_gone(&device, &buffer, &[(0, 2 * FOLIO)])
}

fn pages_of_1_gib() -> Result<()> {
    let _pool = HugePool::with_giga()?;
    let device = Device::open()?;
    let file = memfd(GIGA, libc::MFD_HUGETLB | libc::MFD_HUGE_1GB)?;
    let memory = Memory::shared(&file, GIGA)?;
    memory.set(0, 1);
    let buffer = device.create(&[memory.range()])?;
    is_gone(&device, &buffer, &[])?;
    punch_hole(&file, 0, GIGA)?;
    is_gone(&device, &buffer, &[(0, GIGA / PAGE)])
}

/// The same pages twice, and in another order.
fn twice_in_a_buffer() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    memory.touch_to_write();
    let page = |number: usize| memory.part(number * PAGE, PAGE);
    let buffer = device.create(&[page(3), page(1), page(0), page(1), page(1), page(2)])?;
    memory.advise(PAGE, PAGE, libc::MADV_DONTNEED)?;
    is_gone(&device, &buffer, &[(1, 1), (3, 2)])
}

/// Where a call begins, and where it ends.
fn from_an_offset() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    for first in [2, 8] {
        memory.advise(first * PAGE, 4 * PAGE, libc::MADV_DONTNEED)?;
    }
    // First page, room for parts, the page where the call ends, and the parts.
    let cases: [(usize, usize, usize, Parts); 8] = [
        (0, 0, 2, &[]),
        (0, 1, 8, &[(2, 4)]),
        (0, 2, COUNT, &[(2, 4), (8, 4)]),
        (4, 2, COUNT, &[(4, 2), (8, 4)]),
        (4, 0, 4, &[]),
        (6, 1, COUNT, &[(8, 4)]),
        (12, 1, COUNT, &[]),
        (COUNT, 1, COUNT, &[]),
    ];
    for (from, room, to, parts) in cases {
        let mut list = [Discard {
            offset: 77,
            ..Discard::default()
        }; 4];
        let mut call = Discards {
            size: size_of::<Discards>() as u32,
            fd: buffer.as_fd().as_raw_fd(),
            offset: (from * PAGE) as u64,
            list: list.as_mut_ptr() as u64,
            count: room as u32,
            reserved: 0,
        };
        device.discards_raw(&mut call)?;
        check_eq!(call.offset, (to * PAGE) as u64, "the end, from {from}");
        check_eq!(call.count as usize, parts.len(), "elements, from {from}");
        for (number, &(first, pages)) in parts.iter().enumerate() {
            check_eq!(list[number].offset, (first * PAGE) as u64, "from {from}");
            check_eq!(list[number].len, (pages * PAGE) as u64, "from {from}");
        }
        check_eq!(list[parts.len()].offset, 77, "what is not filled in");
    }
    Ok(())
}

fn arguments() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(0, PAGE, libc::MADV_DONTNEED)?;
    let mut list = [Discard::default(); 4];
    let right = Discards {
        size: size_of::<Discards>() as u32,
        fd: buffer.as_fd().as_raw_fd(),
        offset: 0,
        list: list.as_mut_ptr() as u64,
        count: 4,
        reserved: 0,
    };
    let cases = [
        (right, Ok(())),
        (Discards { fd: -1, ..right }, Err(Errno::EBADF)),
        (
            Discards {
                fd: device.as_fd().as_raw_fd(),
                ..right
            },
            Err(Errno::EINVAL),
        ),
        (Discards { offset: 1, ..right }, Err(Errno::EINVAL)),
        // Where a call that has checked everything ends.
        (
            Discards {
                offset: LEN as u64,
                ..right
            },
            Ok(()),
        ),
        (
            Discards {
                offset: (LEN + PAGE) as u64,
                ..right
            },
            Err(Errno::EINVAL),
        ),
        (
            Discards {
                offset: u64::MAX - PAGE as u64 + 1,
                ..right
            },
            Err(Errno::EINVAL),
        ),
        (
            Discards {
                reserved: 1,
                ..right
            },
            Err(Errno::EINVAL),
        ),
        (Discards { list: 0, ..right }, Err(Errno::EFAULT)),
        (
            Discards {
                list: u64::MAX - 7,
                ..right
            },
            Err(Errno::EFAULT),
        ),
        // Nothing is written, so nothing is wrong.
        (
            Discards {
                list: 0,
                offset: PAGE as u64,
                ..right
            },
            Ok(()),
        ),
        (
            Discards {
                list: 0,
                count: 0,
                ..right
            },
            Ok(()),
        ),
        (
            Discards {
                count: u32::MAX,
                ..right
            },
            Ok(()),
        ),
    ];
    for (number, (mut call, expected)) in cases.into_iter().enumerate() {
        check_eq!(device.discards_raw(&mut call), expected, "case {number}");
    }
    Ok(())
}

/// Memory that is discarded under a buffer and filled anew, again and again: the pages that the buffers keep
/// are bounded by the limit and the allowance, whatever the owner still maps.
fn amplification() -> Result<()> {
    const ALLOWANCE: usize = 8 << 20;
    const LIMIT: usize = 1 << 20;
    const MEMORY: usize = 1 << 20;
    let _setting = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    in_child(|| {
        let device = Device::open()?;
        become_user(USER)?;
        set_memlock(LIMIT)?;
        let file = memfd(MEMORY, 0)?;
        let memory = Memory::shared(&file, MEMORY)?;
        memory.keep_small(0, MEMORY)?;
        let mut buffers = Vec::new();
        loop {
            memory.touch_to_write();
            match device.create(&[memory.range()]) {
                Ok(buffer) => buffers.push(buffer),
                Err(error) => {
                    check_eq!(error, Errno::ENOMEM, "a create beyond the bounds");
                    break;
                }
            }
            check!(
                buffers.len() <= (ALLOWANCE + LIMIT) / MEMORY,
                "{} buffers of {MEMORY} bytes",
                buffers.len()
            );
            punch_hole(&file, 0, MEMORY)?;
        }
        check_eq!(
            buffers.len(),
            (ALLOWANCE + LIMIT) / MEMORY,
            "buffers that fit"
        );
        for buffer in &buffers {
            is_gone(&device, buffer, &[(0, MEMORY / PAGE)])?;
        }
        // One that is closed makes room for another.
        buffers.pop();
        buffers.push(device.create(&[memory.range()])?);
        check_eq!(
            device.create(&[memory.range()]).err(),
            Some(Errno::ENOMEM),
            "one more"
        );
        Ok(())
    })
}

/// A process that queries a large buffer again and again can be killed at any time, and no other task waits for
/// it.
fn killed() -> Result<()> {
    const TIMES: usize = 150;
    let device = Device::open()?;
    let memory = Memory::small_pages(2 << 20)?;
    memory.touch_to_write();
    let ranges = vec![memory.range(); TIMES];
    let buffer = device.create(&ranges)?;
    for _ in 0..4 {
        let child = Child::run(|| loop {
            device.describe(&buffer)?;
            device.discards(&buffer, 16)?;
        })?;
        std::thread::sleep(std::time::Duration::from_millis(30));
        child.kill(nix::sys::signal::Signal::SIGKILL)?;
        let (status, _) = child.end(PATIENCE)?;
        check!(
            matches!(status, nix::sys::wait::WaitStatus::Signaled(..)),
            "the process ended with {status:?}"
        );
    }
    memory.advise(PAGE, PAGE, libc::MADV_DONTNEED)?;
    check_eq!(device.discards(&buffer, 64)?.len(), TIMES, "parts");
    Ok(())
}
