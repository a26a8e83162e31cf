// SPDX-License-Identifier: MIT OR Apache-2.0

//! Shared mappings of files: it must be the pages, and the errors, that an access by address would
//! give.

use std::os::fd::AsFd;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::unistd::ftruncate;

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{
    file_in, huge_memfd, memfd, punch_hole, stamp, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "mapped":
    at_an_offset,
    after_mremap,
    at_the_end_of_a_mapping,
    several_files_in_one_range,
    small_and_huge_in_one_range,
    hugetlb_from_any_page_to_any,
    holes,
    holes_of_hugetlb,
    beyond_the_end,
    read_only,
    written_through_another_mapping,
    sealed_against_new_mappings,
    opened_for_reading_only,
    forbidden_by_a_protection_key,
    unlinked_and_closed,
}

/// More pages than one call of GUP pins.
const PAGES: usize = 700;

/// Compares the first words of all pages of a buffer and of memory, both ways.
fn is_of(buffer: &Buffer, memory: &Memory, offset: usize, len: usize) -> Result<()> {
    let mapped = buffer.map()?;
    check_eq!(mapped.len(), len, "the buffer's size");
    for at in (0..len).step_by(PAGE) {
        memory.set(offset + at, stamp(21, at as u64));
        let seen = mapped.get(at);
        check_eq!(seen, stamp(21, at as u64), "the buffer at {at:#x}");
        mapped.set(at + 8, stamp(22, at as u64));
        let seen = memory.get(offset + at + 8);
        check_eq!(seen, stamp(22, at as u64), "the memory at {at:#x}");
    }
    Ok(())
}

fn agrees(memory: &Memory, offset: usize, len: usize) -> Result<()> {
    let device = Device::open()?;
    let buffer = device
        .create(&[memory.part(offset, len)])
        .context("PINBUF_CREATE")?;
    is_of(&buffer, memory, offset, len)
}

/// Expects that the memory is refused, as memory that cannot be written.
fn is_refused(memory: &Memory) -> Result<()> {
    let result = Device::open()?.create(&[memory.range()]).map(drop);
    check_eq!(result, Err(Errno::EFAULT), "PINBUF_CREATE");
    Ok(())
}

fn shared_at(file: impl AsFd, len: usize, offset: usize) -> Result<Memory> {
    let flags = libc::MAP_SHARED;
    let fd = Some(file.as_fd());
    Ok(Memory::map(len, RW, flags, fd, offset as u64)?)
}

fn at_an_offset() -> Result<()> {
    for file in [
        memfd(3 * PAGES * PAGE, 0)?,
        file_in("/dev/shm", 3 * PAGES * PAGE)?.into(),
    ] {
        let all = Memory::shared(&file, 3 * PAGES * PAGE)?;
        let memory = shared_at(&file, PAGES * PAGE, (PAGES + 5) * PAGE)?;
        agrees(&memory, 0, PAGES * PAGE)?;
        agrees(&memory, 7 * PAGE, 100 * PAGE)?;
        let at = memory.get(50 * PAGE);
        check_eq!(
            all.get((PAGES + 55) * PAGE),
            at,
            "the same page of the file"
        );
    }
    Ok(())
}

fn after_mremap() -> Result<()> {
    let file = memfd(2 * PAGES * PAGE, 0)?;
    let mut memory = shared_at(&file, PAGES * PAGE, 9 * PAGE)?;
    memory.remap((PAGES + 300) * PAGE, libc::MREMAP_MAYMOVE)?;
    agrees(&memory, 0, memory.len())
}

/// The range ends with the mapping, and one page later there is nothing.
fn at_the_end_of_a_mapping() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.unmap(600 * PAGE, 100 * PAGE)?;
    memory.unmap(0, 10 * PAGE)?;
    agrees(&memory, 10 * PAGE, 590 * PAGE)?;
    let device = Device::open()?;
    for (from, pages) in [(9, 100), (500, 101), (10, 591)] {
        let result = device
            .create(&[memory.part(from * PAGE, pages * PAGE)])
            .map(drop);
        check_eq!(result, Err(Errno::EFAULT), "{pages} pages from {from}");
    }
    Ok(())
}

fn several_files_in_one_range() -> Result<()> {
    let memory = Memory::small_pages(6 * 100 * PAGE)?;
    let files = [memfd(200 * PAGE, 0)?, memfd(200 * PAGE, 0)?];
    memory.replace_by(100 * PAGE, 100 * PAGE, files[0].as_fd(), 0)?;
    memory.replace_by(200 * PAGE, 100 * PAGE, files[1].as_fd(), 50 * PAGE)?;
    // The same file again, but not what comes next in it.
    memory.replace_by(300 * PAGE, 100 * PAGE, files[1].as_fd(), 20 * PAGE)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    for page in 0..600 {
        memory.set(page * PAGE, stamp(23, page as u64));
        let seen = mapped.get(page * PAGE);
        check_eq!(seen, stamp(23, page as u64), "page {page}");
    }
    Ok(())
}

fn small_and_huge_in_one_range() -> Result<()> {
    let _pool = HugePool::with_free(5)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(8 * HUGE, HUGE, RW, flags, None, 0)?;
    let small = memfd(HUGE, 0)?;
    memory.replace_by(HUGE, HUGE, small.as_fd(), 0)?;
    let huge = huge_memfd(5 * HUGE)?;
    memory.replace_by(2 * HUGE, 5 * HUGE, huge.as_fd(), 0)?;
    agrees(&memory, 0, 8 * HUGE)?;
    agrees(&memory, HUGE + 3 * PAGE, 6 * HUGE + 5 * PAGE)
}

fn hugetlb_from_any_page_to_any() -> Result<()> {
    let _pool = HugePool::with_free(6)?;
    let file = huge_memfd(6 * HUGE)?;
    let memory = Memory::shared(&file, 6 * HUGE)?;
    for (offset, len) in [
        (0, 6 * HUGE),
        (PAGE, 6 * HUGE - PAGE),
        (0, 6 * HUGE - PAGE),
        (HUGE - PAGE, 4 * HUGE + 2 * PAGE),
        (3 * PAGE, HUGE),
    ] {
        agrees(&memory, offset, len).with_context(|| format!("{len:#x} bytes from {offset:#x}"))?;
    }
    Ok(())
}

/// A hole gets a page, which is zero.
fn holes() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.touch();
    memory.set(20 * PAGE, 1);
    punch_hole(&file, 20 * PAGE, 300 * PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    check_eq!(buffer.map()?.get(20 * PAGE), 0, "a page that was punched");
    is_of(&buffer, &memory, 0, PAGES * PAGE)
}

fn holes_of_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(6)?;
    let file = huge_memfd(6 * HUGE)?;
    let memory = Memory::shared(&file, 6 * HUGE)?;
    memory.set(3 * HUGE, 1);
    for hole in [None, Some(0), Some(3), Some(5)] {
        if let Some(page) = hole {
            punch_hole(&file, page * HUGE, HUGE)?;
        }
        let buffer = Device::open()?.create(&[memory.range()])?;
        if hole == Some(3) {
            check_eq!(buffer.map()?.get(3 * HUGE), 0, "a page that was punched");
        }
        is_of(&buffer, &memory, 0, 6 * HUGE).with_context(|| format!("hole {hole:?}"))?;
    }
    Ok(())
}

/// Where the file ends before its mapping does, there is nothing to pin.
fn beyond_the_end() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.touch();
    ftruncate(&file, (PAGES as i64 - 1) * PAGE as i64)?;
    is_refused(&memory)?;
    ftruncate(&file, 0)?;
    is_refused(&memory)?;
    ftruncate(&file, (PAGES * PAGE) as i64)?;
    agrees(&memory, 0, PAGES * PAGE)
}

fn read_only() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.touch();
    memory.protect(0, memory.len(), libc::PROT_READ)?;
    is_refused(&memory)?;
    memory.protect(0, memory.len(), RW)?;
    memory.protect(300 * PAGE, PAGE, libc::PROT_READ)?;
    is_refused(&memory)?;
    memory.protect(300 * PAGE, PAGE, libc::PROT_NONE)?;
    is_refused(&memory)?;
    memory.protect(300 * PAGE, PAGE, RW)?;
    agrees(&memory, 0, memory.len())
}

/// Pages that this mapping has never seen.
fn written_through_another_mapping() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let writer = Memory::shared(&file, PAGES * PAGE)?;
    for page in 0..PAGES {
        writer.set(page * PAGE, stamp(24, page as u64));
    }
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    for page in 0..PAGES {
        let seen = mapped.get(page * PAGE);
        check_eq!(seen, stamp(24, page as u64), "page {page}");
    }
    drop(mapped);
    is_of(&buffer, &writer, 0, PAGES * PAGE)
}

/// A writable mapping stays writable, and can be pinned.
fn sealed_against_new_mappings() -> Result<()> {
    let file = memfd(PAGES * PAGE, libc::MFD_ALLOW_SEALING)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE))?;
    check!(
        Memory::shared(&file, PAGES * PAGE).is_err(),
        "a new mapping can be written"
    );
    agrees(&memory, 0, PAGES * PAGE)
}

fn opened_for_reading_only() -> Result<()> {
    let file = memfd(PAGES * PAGE, 0)?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let reader = std::fs::File::open(path)?;
    let fd = Some(reader.as_fd());
    let memory = Memory::map(PAGES * PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, 0)?;
    is_refused(&memory)
}

/// A key that forbids this thread to write.
fn forbidden_by_a_protection_key() -> Result<()> {
    const DISABLE_WRITE: libc::c_ulong = 2;
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.touch();
    // SAFETY: no memory is involved.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, DISABLE_WRITE) };
    if cfg!(target_arch = "aarch64") && Errno::result(key) == Err(Errno::ENOSPC) {
        bail!(Skip(
            "this arm64 processor has no protection keys".to_owned()
        ));
    }
    let key = Errno::result(key).context("pkey_alloc: needs a processor with protection keys")?;
    let protect = |key: libc::c_long| {
        // SAFETY: memory of ours, which stays mapped.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pkey_mprotect,
                memory.addr(),
                memory.len(),
                RW,
                key,
            )
        };
        Errno::result(result).context("pkey_mprotect")
    };
    protect(key)?;
    is_refused(&memory)?;
    protect(0)?;
    // SAFETY: no memory is involved, and none has the key any more.
    Errno::result(unsafe { libc::syscall(libc::SYS_pkey_free, key) })?;
    agrees(&memory, 0, memory.len())
}

/// The mapping is all that is left of the file.
fn unlinked_and_closed() -> Result<()> {
    let file = file_in("/dev/shm", PAGES * PAGE)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    drop(file);
    let buffer = Device::open()?.create(&[memory.range()])?;
    is_of(&buffer, &memory, 0, PAGES * PAGE)
}
