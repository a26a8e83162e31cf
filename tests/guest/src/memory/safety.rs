// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a device wrote is there after the buffer is gone and the memory was forced out; and a
//! process that forks keeps what it shares with its devices.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::Result;
use pinbuf_test_importer::{Direction, Importer, Limits};

use crate::common::views_agree;
use crate::frames::all_frames;
use crate::swap::{force_out, give_up, page_out, resident, Swap};
use pinbuf_test_harness::support::kernel::vmstat;
use pinbuf_test_harness::support::memory::{memfd, pattern, PAGE};
use pinbuf_test_harness::support::process::{Child, Link};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, processor, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "safety":
    anonymous_swapped,
    shmem_swapped,
    clean_after_swap_in,
    lazily_freed,
    shmem_never_written,
    written_through_the_mapping,
    not_swapped_while_pinned,
    fork_and_swap,
}

const LEN: usize = 300 * PAGE;

/// A device writes all of the memory, through a buffer that is gone afterwards.
fn device_writes(memory: &Memory, seed: u64) -> Result<()> {
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::FromDevice)?.0;
    importer.write(mapping, 0, &pattern(seed, 0, memory.len()))?;
    Ok(())
}

fn holds(memory: &Memory, seed: u64) -> Result<()> {
    let mut seen = vec![0; memory.len()];
    memory.read(0, &mut seen);
    same("the memory", 0, &seen, &pattern(seed, 0, memory.len()))
}

fn survives(memory: &Memory, seed: u64) -> Result<()> {
    device_writes(memory, seed)?;
    let before = vmstat("pswpin")?;
    force_out(memory)?;
    check_eq!(resident(memory)?, 0, "pages in memory");
    holds(memory, seed)?;
    let came = vmstat("pswpin")? - before;
    check!(came > 0, "nothing came back from swap");
    println!("# {} pages forced out; pswpin +{came}", memory.len() / PAGE);
    Ok(())
}

fn anonymous_swapped() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(1, 0, LEN));
    survives(&memory, 2)?;
    survives(&memory, 3)
}

fn shmem_swapped() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    memory.write(0, &pattern(4, 0, LEN));
    survives(&memory, 5)?;
    survives(&memory, 6)
}

/// Pages that were read back from swap are clean, with a copy there that is old now.
fn clean_after_swap_in() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(7, 0, LEN));
    force_out(&memory)?;
    // Some come back on each processor, as when the scheduler moves the program.
    let mut offsets = (0..LEN).step_by(PAGE);
    processor::on_each(|| {
        for offset in offsets.by_ref().take(20) {
            memory.get(offset);
        }
        Ok(())
    })?;
    holds(&memory, 7)?;
    survives(&memory, 8)
}

/// Memory that the program gave up (`MADV_FREE`) is dropped unless it is dirty. A write of a device does not
/// mark the page table, so the release has to mark the page.
fn lazily_freed() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    // The control: without a write, the kernel drops it.
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(9, 0, LEN));
    give_up(&memory)?;
    page_out(&memory)?;
    check_eq!(memory.get(LEN - PAGE), 0, "memory that was given up");

    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(10, 0, LEN));
    give_up(&memory)?;
    device_writes(&memory, 11)?;
    // It may take more than one pass until the pages count as swappable again.
    for _ in 0..5 {
        page_out(&memory)?;
    }
    holds(&memory, 11)
}

/// A page of shmem that was only read is clean, and mapped writable.
fn shmem_never_written() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    memory.advise(0, LEN, libc::MADV_NOHUGEPAGE)?;
    memory.touch();
    survives(&memory, 12)
}

/// A write of the CPU through the dma-buf's mapping does not mark the memory's own page table.
fn written_through_the_mapping() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::shared(memfd(LEN, 0)?, LEN)?;
    memory.advise(0, LEN, libc::MADV_NOHUGEPAGE)?;
    memory.touch();
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    mapped.write(0, &pattern(13, 0, LEN));
    drop((buffer, mapped));
    force_out(&memory)?;
    holds(&memory, 13)
}

/// Pinned pages stay, whatever the kernel is asked to do.
fn not_swapped_while_pinned() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    for memory in [
        Memory::small_pages(LEN)?,
        Memory::shared(memfd(LEN, 0)?, LEN)?,
    ] {
        memory.write(0, &pattern(14, 0, LEN));
        let device = Device::open()?;
        let buffer = device.create(&[memory.range()])?;
        let before = all_frames(&memory)?;
        for _ in 0..3 {
            page_out(&memory)?;
        }
        holds(&memory, 14)?;
        check_eq!(all_frames(&memory)?, before, "frames under a buffer");
        views_agree(&buffer, &[(&memory, 0, LEN)])?;
        drop(buffer);
        force_out(&memory)?;
    }
    Ok(())
}

/// Parent and device still agree, the child sees its own copy, and all of it survives swapping.
fn fork_and_swap() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::small_pages(LEN)?;
    memory.write(0, &pattern(15, 0, LEN));
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let before = all_frames(&memory)?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    let link = Link::new()?;
    let child = Child::run(|| {
        // Its copies of these would keep the buffer; nothing here uses them any more.
        nix::unistd::close(importer.as_fd().as_raw_fd())?;
        nix::unistd::close(buffer.as_fd().as_raw_fd())?;
        link.theirs.wait()?;
        // What the parent and the device wrote meanwhile is not its own.
        holds(&memory, 15)?;
        memory.write(0, &pattern(16, 0, LEN));
        page_out(&memory)?;
        link.theirs.signal()?;
        link.theirs.wait()?;
        holds(&memory, 16)
    })?;
    check_eq!(all_frames(&memory)?, before, "the parent's frames");
    memory.write(0, &pattern(17, 0, LEN));
    check_eq!(all_frames(&memory)?, before, "the parent's frames, written");
    let mut seen = vec![0; LEN];
    importer.read(mapping, 0, &mut seen)?;
    same("the device", 0, &seen, &pattern(17, 0, LEN))?;
    importer.write(mapping, 0, &pattern(18, 0, LEN))?;
    holds(&memory, 18)?;
    link.ours.signal()?;
    link.ours.wait()?;
    importer.read(mapping, 0, &mut seen)?;
    same("the device", 0, &seen, &pattern(18, 0, LEN))?;
    importer.write(mapping, 0, &pattern(19, 0, LEN))?;
    drop((importer, buffer));
    force_out(&memory)?;
    holds(&memory, 19)?;
    link.ours.signal()?;
    child.join()
}
