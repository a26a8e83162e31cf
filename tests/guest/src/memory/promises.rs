// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a mapping promises holds for a create too: a guard or a poison marker is an error, as it is for an
//! access, and a page that has not arrived is waited for. In large shared mappings, where taking pages directly
//! from the page cache would save most, and would ignore all of it.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::common::{refused, views_agree, works, works_whole};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, pattern, HUGE, PAGE, RW};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "promises":
    guards_in_anonymous_memory,
    guards_in_a_file,
    poisoned_by_its_owner,
    poisoned_huge_page,
    late_pages_of_a_file within 120,
    late_huge_pages_of_a_file,
    late_pages_of_another_process,
    known_pages_of_a_file,
    known_huge_pages_of_a_file,
}

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`.
const GUARD: i32 = 102;
const NO_GUARD: i32 = 103;

/// As large as a virtual machine's framebuffers are, and larger than a page table.
const LARGE: usize = 64 << 20;

/// Guards, anywhere in the memory, forbid a create that includes them, and nothing else.
fn guarded(memory: &Memory) -> Result<()> {
    let last = memory.len() - PAGE;
    for at in [0, 5 * PAGE, memory.len() / 2, last] {
        memory
            .advise(at, PAGE, GUARD)
            .context("MADV_GUARD_INSTALL")?;
        let what = format!("a guard at {at:#x}");
        refused(&what, Errno::EFAULT, &[memory.range()])?;
        refused(&what, Errno::EFAULT, &[memory.part(at, PAGE)])?;
        if at > 0 {
            drop(Device::open()?.create(&[memory.part(0, at)])?);
        }
        memory.advise(at, PAGE, NO_GUARD)?;
        works(&[(memory, at, PAGE)])?;
    }
    drop(Device::open()?.create(&[memory.range()])?);
    Ok(())
}

fn guards_in_anonymous_memory() -> Result<()> {
    let memory = Memory::small_pages(1000 * PAGE)?;
    guarded(&memory).context("not touched")?;
    memory.write(0, &pattern(40, 0, memory.len()));
    guarded(&memory).context("touched")
}

fn guards_in_a_file() -> Result<()> {
    let file = memfd(LARGE, 0)?;
    let memory = Memory::shared(&file, LARGE)?;
    guarded(&memory).context("not touched")?;
    memory.touch();
    guarded(&memory).context("touched")?;
    // The guard is of this mapping, not of the file.
    memory.advise(7 * PAGE, PAGE, GUARD)?;
    let other = Memory::shared(&file, LARGE)?;
    drop(Device::open()?.create(&[other.range()])?);
    refused("a guard", Errno::EFAULT, &[memory.range()])
}

/// `UFFDIO_POISON`: what the page held is lost, on another machine, say.
fn poisoned_by_its_owner() -> Result<()> {
    let file = memfd(LARGE, 0)?;
    let memory = Memory::shared(&file, LARGE)?;
    let faults = Faults::of(&memory, Mode::Missing)?;
    let bad = LARGE / 2 + 3 * PAGE;
    let data = pattern(41, 0, LARGE);
    faults.copy(memory.addr(), &data[..bad])?;
    faults.poison(memory.addr() + bad as u64, PAGE)?;
    faults.copy(memory.addr() + (bad + PAGE) as u64, &data[bad + PAGE..])?;
    refused("a poisoned page", Errno::EFAULT, &[memory.range()])?;
    refused("it alone", Errno::EFAULT, &[memory.part(bad, PAGE)])?;
    let (before, behind) = ((&memory, 0, bad), (&memory, bad + PAGE, LARGE - bad - PAGE));
    works(&[before, behind])?;
    // Nothing was put into the file meanwhile.
    let other = Memory::shared(&file, LARGE)?;
    let mut seen = vec![1; PAGE];
    other.read(bad, &mut seen);
    same("the file", bad, &seen, &vec![0; PAGE])
}

fn poisoned_huge_page() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let memory = Memory::shared(huge_memfd(3 * HUGE)?, 3 * HUGE)?;
    let faults = Faults::of(&memory, Mode::Missing)?;
    let data = pattern(42, 0, HUGE);
    faults.copy(memory.addr(), &data)?;
    faults.poison(memory.addr() + HUGE as u64, HUGE)?;
    faults.copy(memory.addr() + 2 * HUGE as u64, &data)?;
    refused("a poisoned page", Errno::EFAULT, &[memory.range()])?;
    works(&[(&memory, 0, HUGE), (&memory, 2 * HUGE, HUGE)])?;
    check_eq!(HugePool::free()?, 1, "free huge pages");
    Ok(())
}

/// Create waits for the pages at these places, which `answer` then gives, and nothing else.
fn waits_for(
    memory: &Memory,
    faults: &Faults,
    late: &[usize],
    answer: impl Fn(u64) -> Result<()>,
) -> Result<pinbuf_test_harness::support::Buffer> {
    let device = Device::open()?;
    let buffer = std::thread::scope(|scope| {
        let caller = scope.spawn(|| device.create(&[memory.range()]));
        for offset in late {
            let addr = faults.take()?;
            check_eq!(addr, memory.addr() + *offset as u64, "what faulted");
            check!(!caller.is_finished(), "create did not wait");
            answer(addr)?;
        }
        anyhow::Ok(caller.join().expect("the caller panicked"))
    })?;
    buffer.context("PINBUF_CREATE")
}

/// The file's pages have not arrived at the monitor yet: postcopy migration with shared memory.
fn late(memory: &Memory, size: usize, late: &[usize]) -> Result<()> {
    let len = memory.len();
    let data = pattern(43, 0, len);
    let faults = Faults::of(memory, Mode::Missing)?;
    let mut from = 0;
    for offset in late.iter().copied().chain([len]) {
        if from < offset {
            faults.copy(memory.addr() + from as u64, &data[from..offset])?;
        }
        from = offset + size;
    }
    let buffer = waits_for(memory, &faults, late, |addr| {
        let offset = (addr - memory.addr()) as usize;
        // EEXIST, if the page had been filled with zeroes.
        faults.copy(addr, &data[offset..offset + size])
    })?;
    let mut seen = vec![0; len];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &data)?;
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &data)?;
    views_agree(&buffer, &[(memory, 0, len)])
}

fn late_pages_of_a_file() -> Result<()> {
    let memory = Memory::shared(memfd(LARGE, 0)?, LARGE)?;
    late(
        &memory,
        PAGE,
        &[0, PAGE, 511 * PAGE, 512 * PAGE, LARGE / 2, LARGE - PAGE],
    )
}

fn late_huge_pages_of_a_file() -> Result<()> {
    let _pool = HugePool::with_free(8)?;
    let memory = Memory::shared(huge_memfd(8 * HUGE)?, 8 * HUGE)?;
    late(&memory, HUGE, &[0, 3 * HUGE, 7 * HUGE])
}

/// The ranges are in another mapping of the same file, as those of a device model in another process are: a
/// page that has not arrived in the watched mapping has not arrived.
fn late_pages_of_another_process() -> Result<()> {
    let file = memfd(16 * PAGE, 0)?;
    let watched = Memory::shared(&file, 16 * PAGE)?;
    let faults = Faults::of(&watched, Mode::Missing)?;
    let data = pattern(44, 0, 16 * PAGE);
    faults.copy(watched.addr(), &data[..9 * PAGE])?;
    let buffer = waits_for(
        &watched,
        &faults,
        &(9..16).map(|page| page * PAGE).collect::<Vec<_>>(),
        |addr| {
            let offset = (addr - watched.addr()) as usize;
            faults.copy(addr, &data[offset..offset + PAGE])
        },
    )?;
    let other = Memory::shared(&file, 16 * PAGE)?;
    let mut seen = vec![0; 16 * PAGE];
    other.read(0, &mut seen);
    same("the file", 0, &seen, &data)?;
    views_agree(&buffer, &[(&other, 0, 16 * PAGE)])
}

/// The pages are there, but the owner has to enter each of them into this mapping.
fn known(memory: &Memory, file: impl AsFd, size: usize) -> Result<()> {
    let len = memory.len();
    let data = pattern(45, 0, len);
    Memory::shared(file, len)?.write(0, &data);
    let faults = Faults::of(memory, Mode::Minor)?;
    let all: Vec<usize> = (0..len).step_by(size).collect();
    let buffer = waits_for(memory, &faults, &all, |addr| faults.resume(addr, size))?;
    let mut seen = vec![0; len];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &data)?;
    views_agree(&buffer, &[(memory, 0, len)])
}

fn known_pages_of_a_file() -> Result<()> {
    let file = memfd(600 * PAGE, 0)?;
    let memory = Memory::map(600 * PAGE, RW, libc::MAP_SHARED, Some(file.as_fd()), 0)?;
    known(&memory, &file, PAGE)
}

fn known_huge_pages_of_a_file() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let file = huge_memfd(3 * HUGE)?;
    let memory = Memory::shared(&file, 3 * HUGE)?;
    known(&memory, &file, HUGE)?;
    drop(memory);
    let memory = Memory::shared(&file, 3 * HUGE)?;
    works_whole(&memory)?;
    Ok(())
}
