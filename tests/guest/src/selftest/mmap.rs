// SPDX-License-Identifier: MIT OR Apache-2.0

//! The CPU's mappings of a buffer: what they show, what they refuse, and what they cost.

use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use pinbuf_uapi::Range;

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{self, pattern, stamp, BLOCK, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::signal_of;
use pinbuf_test_harness::support::view::{holds, same, Mapped};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "mmap":
    private_refused,
    exec_refused,
    beyond_the_end,
    parts,
    read_only,
    protect,
    grow_refused,
    move_and_shrink,
    move_without_unmapping,
    duplicate_by_remap,
    partial_unmap,
    partial_unmap_of_huge,
    protect_part_of_huge,
    cannot_be_resized,
    pages_cannot_be_dropped,
    not_pinnable,
    system_calls_read_it,
    flags_of_the_mapping,
    populate,
    huge_entries,
    huge_entries_need_alignment,
    huge_entries_inside_extents_only,
    huge_entries_end_with_their_extent,
    huge_entries_not_beyond,
    no_huge_entries_if_unwanted,
    threads_fault_at_once,
    two_faults_install_one_table within 120,
    many_mappings,
    faults_of_small_pages,
}

/// Memory, a buffer of it, and bytes in it by which every page is known.
fn stamped(device: &Device, memory: &Memory, seed: u64) -> Result<Buffer> {
    let buffer = device.create(&[memory.range()])?;
    memory.write(0, &pattern(seed, 0, memory.len()));
    Ok(buffer)
}

fn private_refused() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 1)?;
    for prot in [RW, libc::PROT_READ, libc::PROT_NONE] {
        let error = buffer.map_as(0, 4 * PAGE, prot, libc::MAP_PRIVATE).err();
        check_eq!(
            error,
            Some(Errno::EINVAL),
            "MAP_PRIVATE with protection {prot}"
        );
    }
    Ok(())
}

/// Never executable.
fn exec_refused() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = stamped(&device, &memory, 1)?;
    for prot in [
        libc::PROT_EXEC,
        RW | libc::PROT_EXEC,
        libc::PROT_READ | libc::PROT_EXEC,
    ] {
        let error = buffer.map_as(0, PAGE, prot, libc::MAP_SHARED).err();
        check!(
            matches!(error, Some(Errno::EPERM | Errno::EACCES | Errno::EINVAL)),
            "mmap with protection {prot} gives {error:?}"
        );
    }
    let mapped = buffer.map()?;
    let result = mapped.protect(0, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    check_eq!(result, Err(Errno::EACCES), "mprotect to executable");
    Ok(())
}

/// No mapping reaches beyond the buffer.
fn beyond_the_end() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 2)?;
    let error = |offset, len| buffer.map_part(offset, len).err();
    for (offset, len) in [
        (0, 5 * PAGE),
        (0, 4 * PAGE + 1),
        (PAGE, 4 * PAGE),
        (4 * PAGE, PAGE),
        (3 * PAGE, PAGE + 1),
        (100 * PAGE, PAGE),
        (1 << 40, PAGE),
    ] {
        check_eq!(
            error(offset, len),
            Some(Errno::EINVAL),
            "{len:#x} bytes at {offset:#x}"
        );
    }
    for offset in [usize::MAX - PAGE + 1, (i64::MAX as usize) / PAGE * PAGE] {
        let error = error(offset, 2 * PAGE);
        check!(
            matches!(error, Some(Errno::EINVAL | Errno::EOVERFLOW)),
            "two pages at {offset:#x} give {error:?}"
        );
    }
    // The last page can be had, and a length that is no multiple of the page.
    let last = buffer.map_part(3 * PAGE, 100)?;
    let mut seen = vec![0; 100];
    last.read(0, &mut seen);
    same(
        "the last page",
        3 * PAGE,
        &seen,
        &pattern(2, 3 * PAGE as u64, 100),
    )
}

/// Every window of the buffer shows what it should.
fn parts() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(600 * PAGE)?;
    let ranges: Vec<Range> = (0..600 / 4)
        .rev()
        .map(|part| memory.part(part * 4 * PAGE, 4 * PAGE))
        .collect();
    let buffer = device.create(&ranges)?;
    let whole = buffer.map()?;
    whole.write(0, &pattern(3, 0, whole.len()));
    for (page, pages) in [
        (0, 1),
        (1, 1),
        (3, 2),
        (4, 4),
        (5, 9),
        (17, 511),
        (88, 512),
        (599, 1),
    ] {
        let part = buffer.map_part(page * PAGE, pages * PAGE)?;
        let mut seen = vec![0; pages * PAGE];
        part.read(0, &mut seen);
        same(
            "a part",
            page * PAGE,
            &seen,
            &pattern(3, (page * PAGE) as u64, pages * PAGE),
        )?;
        part.set(0, 0xabcd);
        check_eq!(
            whole.get(page * PAGE),
            0xabcd,
            "page {page} after a write through a part"
        );
        part.write(0, &pattern(3, (page * PAGE) as u64, 8));
    }
    // Touched from the last page to the first.
    let backwards = buffer.map()?;
    for page in (0..600).rev() {
        let expected = stamp(3, (page * PAGE / 8) as u64);
        check_eq!(backwards.get(page * PAGE), expected, "page {page}");
    }
    Ok(())
}

fn read_only() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let buffer = stamped(&device, &memory, 4)?;
    let mapped = buffer.map_as(0, 2 * PAGE, libc::PROT_READ, libc::MAP_SHARED)?;
    holds(&Mapped::of(&buffer, &mapped), 4, 0, 2 * PAGE)?;
    let signal = signal_of(|| mapped.set(0, 1))?;
    check_eq!(
        signal,
        Some(Signal::SIGSEGV),
        "a write to a read-only mapping"
    );
    let none = buffer.map_as(0, PAGE, libc::PROT_NONE, libc::MAP_SHARED)?;
    let signal = signal_of(|| {
        none.get(0);
    })?;
    check_eq!(
        signal,
        Some(Signal::SIGSEGV),
        "a read of an inaccessible mapping"
    );
    none.protect(0, PAGE, RW)?;
    none.set(0, 5);
    check_eq!(memory.get(0), 5, "after it was made accessible");
    Ok(())
}

fn protect() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 5)?;
    let mapped = buffer.map()?;
    mapped.touch();
    mapped.protect(PAGE, PAGE, libc::PROT_READ)?;
    let signal = signal_of(|| mapped.set(PAGE, 1))?;
    check_eq!(
        signal,
        Some(Signal::SIGSEGV),
        "a write to a page made read-only"
    );
    check_eq!(
        signal_of(|| mapped.set(2 * PAGE, 1))?,
        None,
        "a write to the page behind it"
    );
    check_eq!(
        mapped.get(PAGE),
        stamp(5, BLOCK as u64),
        "the page made read-only"
    );
    mapped.protect(PAGE, PAGE, RW)?;
    mapped.set(PAGE, 6);
    check_eq!(memory.get(PAGE), 6, "after it was made writable again");
    Ok(())
}

fn grow_refused() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 6)?;
    let mut part = buffer.map_part(0, 2 * PAGE)?;
    for flags in [0, libc::MREMAP_MAYMOVE] {
        // Even what the buffer has: the mapping keeps its size.
        for pages in [3, 4, 5, 1000] {
            let error = part.remap(pages * PAGE, flags).err();
            check!(error.is_some(), "mremap to {pages} pages worked");
        }
    }
    let mut seen = vec![0; 2 * PAGE];
    part.read(0, &mut seen);
    same("the mapping", 0, &seen, &pattern(6, 0, 2 * PAGE))
}

fn move_and_shrink() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(16 * PAGE)?;
    let buffer = stamped(&device, &memory, 7)?;
    for touched in [false, true] {
        let mut part = buffer.map_part(4 * PAGE, 8 * PAGE)?;
        if touched {
            part.touch();
        }
        let old = part.addr();
        part.remap_onto(Memory::anonymous(8 * PAGE)?, 0)?;
        check!(part.addr() != old, "the mapping did not move");
        let mut seen = vec![0; 8 * PAGE];
        part.read(0, &mut seen);
        same(
            "the moved mapping",
            0,
            &seen,
            &pattern(7, 4 * PAGE as u64, 8 * PAGE),
        )?;
        part.remap(3 * PAGE, 0)?;
        part.remap_onto(Memory::anonymous(3 * PAGE)?, 0)?;
        let mut seen = vec![0; 3 * PAGE];
        part.read(0, &mut seen);
        same(
            "the shrunk mapping",
            0,
            &seen,
            &pattern(7, 4 * PAGE as u64, 3 * PAGE),
        )?;
        let error = part.remap(4 * PAGE, libc::MREMAP_MAYMOVE).err();
        check!(error.is_some(), "the shrunk mapping could grow again");
    }
    Ok(())
}

/// `MREMAP_DONTUNMAP` is for memory that can be faulted in anew.
fn move_without_unmapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 8)?;
    let mut mapped = buffer.map()?;
    let old = mapped.addr();
    let result = mapped.remap_onto(Memory::anonymous(4 * PAGE)?, libc::MREMAP_DONTUNMAP);
    if result.is_ok() {
        // Then both must show the buffer and nothing else; the old one is found by its address.
        drop(Memory::anonymous(PAGE)?);
        check!(mapped.addr() != old, "the mapping did not move");
    } else {
        check_eq!(result, Err(Errno::EINVAL), "mremap with MREMAP_DONTUNMAP");
    }
    holds(&Mapped::of(&buffer, &mapped), 8, 0, 4 * PAGE)
}

/// An old size of zero duplicates a shared mapping, unless that may not expand.
fn duplicate_by_remap() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 9)?;
    let mapped = buffer.map()?;
    for pages in [1, 4, 8] {
        // SAFETY: nothing is unmapped by this, and a new mapping is given back below.
        let result =
            unsafe { libc::mremap(mapped.at(0).cast(), 0, pages * PAGE, libc::MREMAP_MAYMOVE) };
        check_eq!(result, libc::MAP_FAILED, "a duplicate of {pages} pages");
    }
    holds(&Mapped::of(&buffer, &mapped), 9, 0, 4 * PAGE)
}

fn partial_unmap() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(16 * PAGE)?;
    let buffer = stamped(&device, &memory, 10)?;
    for touched in [false, true] {
        let mapped = buffer.map()?;
        if touched {
            mapped.touch();
        }
        mapped.unmap(5 * PAGE, 2 * PAGE)?;
        mapped.unmap(0, PAGE)?;
        mapped.unmap(15 * PAGE, PAGE)?;
        for page in [0, 5, 6, 15] {
            let signal = signal_of(|| {
                mapped.get(page * PAGE);
            })?;
            check_eq!(
                signal,
                Some(Signal::SIGSEGV),
                "page {page}, which was unmapped"
            );
        }
        for (page, pages) in [(1, 4), (7, 8)] {
            let mut seen = vec![0; pages * PAGE];
            mapped.read(page * PAGE, &mut seen);
            let expected = pattern(10, (page * PAGE) as u64, pages * PAGE);
            same("what is left", page * PAGE, &seen, &expected)?;
        }
    }
    Ok(())
}

/// A buffer of huge pages, mapped where huge entries fit.
fn huge_mapping(pages: usize, seed: u64) -> Result<(HugePool, Memory, Buffer, Memory)> {
    let pool = HugePool::with_free(i64::try_from(pages)?)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(pages * HUGE, RW, flags, None, 0).context("mapping huge pages")?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    for page in 0..pages * HUGE / PAGE {
        memory.set(page * PAGE, stamp(seed, page as u64));
    }
    let mapped = aligned(&buffer, 0, pages * HUGE)?;
    Ok((pool, memory, buffer, mapped))
}

/// Maps at an address that is a multiple of a huge page.
fn aligned(buffer: &Buffer, offset: usize, len: usize) -> Result<Memory> {
    Memory::map_aligned(
        len,
        HUGE,
        RW,
        libc::MAP_SHARED,
        Some(buffer.as_fd()),
        offset as u64,
    )
    .context("mapping at a huge page's address")
}

/// Each page holds its stamp, but for those that are left out.
fn pages_hold(mapped: &Memory, seed: u64, without: &[usize]) -> Result<()> {
    for page in (0..mapped.len() / PAGE).filter(|page| !without.contains(page)) {
        check_eq!(
            mapped.get(page * PAGE),
            stamp(seed, page as u64),
            "page {page}"
        );
    }
    Ok(())
}

fn partial_unmap_of_huge() -> Result<()> {
    let (_pool, _memory, _buffer, mapped) = huge_mapping(3, 11)?;
    mapped.touch();
    let holes = [3, BLOCK - 1, BLOCK, BLOCK + 188, 3 * BLOCK - 1];
    for page in holes {
        mapped
            .unmap(page * PAGE, PAGE)
            .with_context(|| format!("unmapping page {page}"))?;
    }
    for page in holes {
        let signal = signal_of(|| {
            mapped.get(page * PAGE);
        })?;
        check_eq!(
            signal,
            Some(Signal::SIGSEGV),
            "page {page}, which was unmapped"
        );
    }
    pages_hold(&mapped, 11, &holes)
}

fn protect_part_of_huge() -> Result<()> {
    let (_pool, memory, _buffer, mapped) = huge_mapping(2, 12)?;
    mapped.touch();
    mapped.protect(100 * PAGE, 10 * PAGE, libc::PROT_READ)?;
    let signal = signal_of(|| mapped.set(105 * PAGE, 1))?;
    check_eq!(
        signal,
        Some(Signal::SIGSEGV),
        "a write to a page made read-only"
    );
    pages_hold(&mapped, 12, &[])?;
    mapped.set(99 * PAGE, 1);
    mapped.set(110 * PAGE, 2);
    mapped.protect(100 * PAGE, 10 * PAGE, RW)?;
    mapped.set(105 * PAGE, 3);
    check_eq!(
        [99, 110, 105].map(|page| memory.get(page * PAGE)),
        [1, 2, 3],
        "what was written"
    );
    pages_hold(&mapped, 12, &[99, 110, 105])
}

fn cannot_be_resized() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    for len in [0, PAGE, 4 * PAGE] {
        let error = nix::unistd::ftruncate(&buffer, len as i64).err();
        check!(error.is_some(), "ftruncate to {len} worked");
    }
    check_eq!(buffer.len()?, 2 * PAGE, "size");
    Ok(())
}

/// No advice makes other pages appear in the mapping.
fn pages_cannot_be_dropped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 13)?;
    let mapped = buffer.map()?;
    mapped.touch();
    let advices = [
        libc::MADV_DONTNEED,
        libc::MADV_FREE,
        libc::MADV_REMOVE,
        libc::MADV_PAGEOUT,
        libc::MADV_COLD,
        libc::MADV_WILLNEED,
        libc::MADV_MERGEABLE,
        libc::MADV_COLLAPSE,
    ];
    for advice in advices {
        // Most are refused.
        let _ = mapped.advise(0, 4 * PAGE, advice);
        let mut seen = vec![0; 4 * PAGE];
        mapped.read(0, &mut seen);
        same(
            &format!("after advice {advice}"),
            0,
            &seen,
            &pattern(13, 0, 4 * PAGE),
        )?;
        mapped.set(8, advice as u64);
        check_eq!(
            memory.get(8),
            advice as u64,
            "written after advice {advice}"
        );
        memory.write(0, &pattern(13, 0, 16));
    }
    Ok(())
}

/// The mapping has no pages of its own to pin: a user that needs pins takes the original memory.
fn not_pinnable() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = stamped(&device, &memory, 14)?;
    let mapped = buffer.map()?;
    mapped.touch();
    let (_reader, writer) = nix::unistd::pipe()?;
    let vector = libc::iovec {
        iov_base: mapped.at(0).cast(),
        iov_len: PAGE,
    };
    // SAFETY: the vector names live memory, which the pipe may refer to until it is closed.
    let result = unsafe { libc::vmsplice(writer.as_raw_fd(), &vector, 1, 0) };
    check_eq!(
        Errno::result(result),
        Err(Errno::EFAULT),
        "vmsplice from the mapping"
    );
    Ok(())
}

/// Ordinary system calls copy from and to it.
fn system_calls_read_it() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = stamped(&device, &memory, 15)?;
    let mapped = buffer.map()?;
    let file = memory::memfd(4 * PAGE, 0)?;
    // SAFETY: the mapping lives, and nothing writes to it meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(mapped.at(0), mapped.len()) };
    let written = nix::sys::uio::pwritev(&file, &[IoSlice::new(bytes)], 0)?;
    check_eq!(written, 4 * PAGE, "bytes that pwritev took");
    let copy = Memory::shared(&file, 4 * PAGE)?;
    holds(&Mapped::of(&buffer, &copy), 15, 0, 4 * PAGE)?;
    nix::sys::uio::pwrite(&file, &pattern(16, 0, 4 * PAGE), 0)?;
    // SAFETY: the mapping lives, and only the kernel writes to it.
    let result = unsafe { libc::pread(file.as_raw_fd(), mapped.at(0).cast(), 4 * PAGE, 0) };
    check_eq!(result, 4 * PAGE as isize, "bytes that pread gave");
    holds(&Mapped::of(&buffer, &memory), 16, 0, 4 * PAGE)?;
    std::io::sink().write_all(bytes)?;
    Ok(())
}

/// Page frames, fixed in size, left out of core dumps.
fn flags_of_the_mapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let maps = kernel::read("/proc/self/smaps")?;
    let start = format!("{:x}-", mapped.addr());
    let flags = maps
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .find_map(|line| line.strip_prefix("VmFlags: "))
        .context("the mapping is not in smaps")?;
    for flag in ["rd", "wr", "sh", "pf", "de", "dd"] {
        check!(
            flags.split_whitespace().any(|seen| seen == flag),
            "no {flag} among {flags}"
        );
    }
    for flag in ["ex", "me", "io"] {
        check!(
            !flags.split_whitespace().any(|seen| seen == flag),
            "{flag} is among {flags}"
        );
    }
    Ok(())
}

fn populate() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(8 * PAGE)?;
    let buffer = stamped(&device, &memory, 17)?;
    for flags in [libc::MAP_POPULATE, libc::MAP_LOCKED, libc::MAP_NORESERVE] {
        let mapped = buffer.map_as(0, 8 * PAGE, RW, libc::MAP_SHARED | flags)?;
        holds(&Mapped::of(&buffer, &mapped), 17, 0, 8 * PAGE)?;
    }
    Ok(())
}

/// Touches every page and returns the number of faults.
fn faults_of(mapped: &Memory) -> Result<i64> {
    let before = kernel::faults()?;
    mapped.touch();
    Ok(kernel::faults()? - before)
}

/// One fault for each huge page.
fn huge_entries() -> Result<()> {
    let (_pool, _memory, buffer, mapped) = huge_mapping(8, 20)?;
    let faults = faults_of(&mapped)?;
    check!(faults <= 8 + 2, "{faults} faults on 8 huge pages");
    pages_hold(&mapped, 20, &[])?;
    // Part of the buffer, from a huge page's beginning.
    let part = aligned(&buffer, 3 * HUGE, 4 * HUGE)?;
    let faults = faults_of(&part)?;
    check!(faults <= 4 + 2, "{faults} faults on 4 huge pages");
    for page in 0..4 * BLOCK {
        let expected = stamp(20, (page + 3 * BLOCK) as u64);
        check_eq!(part.get(page * PAGE), expected, "page {page} of the part");
    }
    // Reached by a write first.
    let again = aligned(&buffer, 0, 8 * HUGE)?;
    let before = kernel::faults()?;
    for page in 0..8 * BLOCK {
        again.set(page * PAGE, page as u64);
    }
    let faults = kernel::faults()? - before;
    check!(faults <= 8 + 2, "{faults} faults by writes to 8 huge pages");
    check_eq!(mapped.get(4095 * PAGE), 4095, "the last page");
    Ok(())
}

/// At any other address the bytes are right all the same.
fn huge_entries_need_alignment() -> Result<()> {
    let (_pool, _memory, buffer, _) = huge_mapping(2, 21)?;
    for remainder in [PAGE, HUGE / 2, HUGE - PAGE] {
        let mapped = Memory::map_congruent(
            2 * HUGE,
            HUGE,
            remainder,
            RW,
            libc::MAP_SHARED,
            Some(buffer.as_fd()),
            0,
        )?;
        pages_hold(&mapped, 21, &[]).with_context(|| format!("at remainder {remainder:#x}"))?;
        // With the offset to match, they fit again.
        let offset = remainder;
        let len = 2 * HUGE - offset;
        let mapped = Memory::map_congruent(
            len,
            HUGE,
            remainder,
            RW,
            libc::MAP_SHARED,
            Some(buffer.as_fd()),
            offset as u64,
        )?;
        let faults = faults_of(&mapped)?;
        let small = (HUGE - offset) / PAGE;
        check!(
            faults <= 1 + 2 + small as i64,
            "{faults} faults on {small} small pages and a huge"
        );
        for page in 0..len / PAGE {
            let expected = stamp(21, (page + offset / PAGE) as u64);
            check_eq!(
                mapped.get(page * PAGE),
                expected,
                "page {page} at {remainder:#x}"
            );
        }
    }
    Ok(())
}

/// A block that lacks one page of a huge page, the first or the last one, has another one in its place.
fn huge_entries_end_with_their_extent() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let huge = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    let other = Memory::small_pages(PAGE)?;
    for page in 0..2 * BLOCK {
        huge.set(page * PAGE, stamp(24, page as u64));
    }
    other.set(0, stamp(25, 0));
    let device = Device::open()?;
    let whole = [huge.part(0, HUGE - PAGE), other.range()];
    let last_missing = device.create(&whole)?;
    let first_missing = device.create(&[other.range(), huge.part(PAGE, HUGE - PAGE)])?;
    for (buffer, odd) in [(last_missing, BLOCK - 1), (first_missing, 0)] {
        let mapped = aligned(&buffer, 0, HUGE)?;
        for page in 0..BLOCK {
            let expected = if page == odd {
                stamp(25, 0)
            } else {
                stamp(24, page as u64)
            };
            check_eq!(
                mapped.get(page * PAGE),
                expected,
                "page {page}, {odd} is another's"
            );
        }
        mapped.set(odd * PAGE, 7);
        check_eq!(other.get(0), 7, "the page of small memory");
        other.set(0, stamp(25, 0));
    }
    Ok(())
}

/// A block that is one huge page in part only, and other pages for the rest.
fn huge_entries_inside_extents_only() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let huge = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    let small = Memory::small_pages(BLOCK * PAGE)?;
    for page in 0..2 * BLOCK {
        huge.set(page * PAGE, stamp(22, page as u64));
    }
    for page in 0..BLOCK {
        small.set(page * PAGE, stamp(23, page as u64));
    }
    // 100 small pages, the second huge page, the rest of the small ones, half of the first one.
    let ranges = [
        small.part(0, 100 * PAGE),
        huge.part(HUGE, HUGE),
        small.part(100 * PAGE, (BLOCK - 100) * PAGE),
        huge.part(128 * PAGE, 256 * PAGE),
    ];
    let buffer = Device::open()?.create(&ranges)?;
    let mapped = aligned(&buffer, 0, buffer.len()?)?;
    let expected = |page: usize| match page {
        0..100 => stamp(23, page as u64),
        page if page < 100 + BLOCK => stamp(22, (page - 100 + BLOCK) as u64),
        page if page < 2 * BLOCK => stamp(23, (page - BLOCK) as u64),
        page => stamp(22, (page - 2 * BLOCK + 128) as u64),
    };
    for page in (0..mapped.len() / PAGE).rev() {
        check_eq!(mapped.get(page * PAGE), expected(page), "page {page}");
    }
    // And at an address where the second range's huge entry fits.
    let mapped = Memory::map_congruent(
        buffer.len()?,
        HUGE,
        HUGE - 100 * PAGE,
        RW,
        libc::MAP_SHARED,
        Some(buffer.as_fd()),
        0,
    )?;
    for page in 0..mapped.len() / PAGE {
        check_eq!(
            mapped.get(page * PAGE),
            expected(page),
            "page {page}, aligned to the second"
        );
    }
    Ok(())
}

/// A mapping that ends inside a huge page shows nothing beyond its end.
fn huge_entries_not_beyond() -> Result<()> {
    let (_pool, _memory, buffer, _) = huge_mapping(2, 24)?;
    let len = HUGE + 100 * PAGE;
    // Behind it lies memory of the process, which must stay what it is.
    let around = Memory::map_aligned(
        2 * HUGE,
        HUGE,
        RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    around.replace_by(0, len, buffer.as_fd(), 0)?;
    for page in 0..len / PAGE {
        check_eq!(
            around.get(page * PAGE),
            stamp(24, page as u64),
            "page {page}"
        );
    }
    for page in len / PAGE..2 * HUGE / PAGE {
        check_eq!(
            around.get(page * PAGE),
            0,
            "page {page}, behind the mapping"
        );
    }
    // So it is when the mapping is cut before it is touched, at either end.
    let cut = aligned(&buffer, 0, 2 * HUGE)?;
    cut.unmap(HUGE + PAGE, HUGE - PAGE)?;
    cut.unmap(0, PAGE)?;
    for page in 1..BLOCK + 1 {
        check_eq!(
            cut.get(page * PAGE),
            stamp(24, page as u64),
            "page {page} of the cut mapping"
        );
    }
    for page in [0, BLOCK + 1, BLOCK + 88, 2 * BLOCK - 1] {
        let signal = signal_of(|| {
            cut.get(page * PAGE);
        })?;
        check_eq!(
            signal,
            Some(Signal::SIGSEGV),
            "page {page}, which was cut off"
        );
    }
    Ok(())
}

fn no_huge_entries_if_unwanted() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let (_pool, _memory, buffer, _) = huge_mapping(2, 25)?;
    let mapped = aligned(&buffer, 0, 2 * HUGE)?;
    mapped.advise(0, 2 * HUGE, libc::MADV_NOHUGEPAGE)?;
    pages_hold(&mapped, 25, &[])?;
    nix::sys::prctl::set_thp_disable(true)?;
    let mapped = aligned(&buffer, 0, 2 * HUGE)?;
    pages_hold(&mapped, 25, &[])
}

fn threads_fault_at_once() -> Result<()> {
    let (_pool, _memory, buffer, _) = huge_mapping(2, 26)?;
    for round in 0..10 {
        // Once where huge entries fit, once where they do not.
        let mapped = if round % 2 == 0 {
            aligned(&buffer, 0, 2 * HUGE)?
        } else {
            buffer.map()?
        };
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| pages_hold(&mapped, 26, &[])))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a thread panicked"))
                .collect()
        });
        results.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

/// Two threads touch a block that has no page table, at the same moment. A table that replaced the other one would be
/// lost: the process's tables would increase, and the kernel says so when the process ends, even of one. Without the
/// lock one fault in thirty loses its table, and in three hundred where the guest waits for a processor.
///
/// Of each block one page is mapped: a fault fills the table as far as the mapping reaches, and that comes after what
/// is tested.
fn two_faults_install_one_table() -> Result<()> {
    const BLOCKS: usize = 64;
    let rounds = if kernel::has_checkers() { 8 } else { 32 };
    let memory = Memory::small_pages(PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let tables = || kernel::field("/proc/self/status", "VmPTE");
    let meet = |arrived: &AtomicUsize, number: usize| {
        arrived.fetch_add(1, Ordering::AcqRel);
        for turn in 1_u64.. {
            if arrived.load(Ordering::Acquire) >= 2 * (number + 1) {
                break;
            }
            if turn % 1000 == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    let mut before = 0;
    for round in 0..=rounds {
        let mapped = Memory::map_aligned(BLOCKS * HUGE, HUGE, libc::PROT_NONE, nothing, None, 0)?;
        for block in 0..BLOCKS {
            mapped.replace_by(block * HUGE, PAGE, buffer.as_fd(), 0)?;
        }
        let arrived = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for block in 0..BLOCKS {
                        meet(&arrived, block);
                        mapped.get(block * HUGE);
                    }
                });
            }
        });
        drop(mapped);
        if round == 0 {
            // With the tables for the threads' own memory.
            before = tables()?;
        }
    }
    let lost = tables()? - before;
    check!(
        lost <= 32,
        "{lost} KiB of page tables are left of {} faults",
        BLOCKS * rounds
    );
    Ok(())
}

fn many_mappings() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(64 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mappings = (0..200)
        .map(|_| buffer.map())
        .collect::<Result<Vec<Memory>>>()?;
    for (index, mapped) in mappings.iter().enumerate() {
        mapped.set(index % 64 * PAGE + 8 * (index / 64), index as u64);
    }
    for index in 0..200 {
        let seen = memory.get(index % 64 * PAGE + 8 * (index / 64));
        check_eq!(seen, index as u64, "written through mapping {index}");
    }
    Ok(())
}

/// A fault brings in neighbours too: far fewer faults than pages.
fn faults_of_small_pages() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(2048 * PAGE)?;
    let ranges: Vec<Range> = (0..2048)
        .rev()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    let buffer = device.create(&ranges)?;
    let mapped = buffer.map()?;
    let faults = faults_of(&mapped)?;
    check!(
        faults <= 2048 / 8,
        "{faults} faults on 2048 scattered pages"
    );
    Ok(())
}
