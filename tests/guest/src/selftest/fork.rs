// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that forks while a buffer of its memory lives.

use std::os::fd::AsFd;

use anyhow::Result;
use nix::sys::signal::Signal;
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{memfd, pattern, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{in_child, signal_of, Child, Link};
use pinbuf_test_harness::support::view::{holds, Mapped};
use pinbuf_test_harness::support::{check_eq, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "fork":
    private_child_writes,
    private_parent_writes,
    private_device_writes,
    private_not_inherited,
    private_huge_pages,
    private_huge_pages_not_inherited,
    shared_memory,
    mapping_is_inherited,
    descriptor_is_inherited,
    child_creates,
    many_children,
    grandchild_holds_it,
}

/// The child's private memory belongs to it; the buffer stays the parent's.
fn private_child_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(1, 0, 8 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    in_child(|| {
        holds(&Mapped::of(&buffer, &memory), 1, 0, 8 * PAGE)?;
        memory.write(0, &pattern(2, 0, 8 * PAGE));
        holds(&Mapped::of(&buffer, &mapped), 1, 0, 8 * PAGE)
    })?;
    holds(&Mapped::of(&buffer, &memory), 1, 0, 8 * PAGE)?;
    holds(&Mapped::of(&buffer, &mapped), 1, 0, 8 * PAGE)?;
    // And the parent's still is the buffer's.
    memory.write(0, &pattern(3, 0, 8 * PAGE));
    holds(&Mapped::of(&buffer, &mapped), 3, 0, 8 * PAGE)
}

/// What the parent writes after the fork reaches the buffer, and not the child.
fn private_parent_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(4, 0, 8 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        link.theirs.wait()?;
        holds(&Mapped::of(&buffer, &memory), 4, 0, 8 * PAGE)?;
        holds(&Mapped::of(&buffer, &mapped), 5, 0, 8 * PAGE)?;
        mapped.set(16, 99);
        Ok(())
    })?;
    memory.write(0, &pattern(5, 0, 8 * PAGE));
    holds(&Mapped::of(&buffer, &mapped), 5, 0, 8 * PAGE)?;
    link.ours.signal()?;
    child.join()?;
    check_eq!(
        memory.get(16),
        99,
        "what the child wrote through the mapping"
    );
    Ok(())
}

/// Parent and device still agree.
fn private_device_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    let link = Link::new()?;
    let child = Child::run(|| {
        memory.set(0, 1);
        link.theirs.signal()?;
        link.theirs.wait()?;
        check_eq!(memory.get(0), 1, "the child's own word");
        Ok(())
    })?;
    link.ours.wait()?;
    importer.write(mapping, 0, &pattern(6, 0, 8 * PAGE))?;
    holds(&Mapped::of(&buffer, &memory), 6, 0, 8 * PAGE)?;
    link.ours.signal()?;
    child.join()
}

/// As is recommended.
fn private_not_inherited() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(7, 0, 8 * PAGE));
    memory.advise(0, 8 * PAGE, libc::MADV_DONTFORK)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let signal = signal_of(|| {
        memory.get(0);
    })?;
    check_eq!(signal, Some(Signal::SIGSEGV), "the child's access");
    memory.write(0, &pattern(8, 0, 8 * PAGE));
    holds(&Mapped::of(&buffer, &mapped), 8, 0, 8 * PAGE)
}

fn private_huge_memory(free: i64) -> Result<(HugePool, Memory)> {
    let pool = HugePool::with_free(free)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    Ok((pool, Memory::map(HUGE, RW, flags, None, 0)?))
}

/// The child gets a copy at once, for which the pool needs a page.
fn private_huge_pages() -> Result<()> {
    let (_pool, memory) = private_huge_memory(2)?;
    let device = Device::open()?;
    memory.write(0, &pattern(9, 0, HUGE));
    let buffer = device.create(&[memory.part(PAGE, 100 * PAGE)])?;
    let mapped = buffer.map()?;
    in_child(|| {
        memory.write(0, &pattern(10, 0, HUGE));
        Ok(())
    })?;
    check_eq!(HugePool::free()?, 1, "free huge pages after the child");
    memory.set(2 * PAGE, 11);
    check_eq!(mapped.get(PAGE), 11, "what the parent wrote");
    memory.write(2 * PAGE, &pattern(9, 2 * PAGE as u64, 8));
    let mut seen = vec![0; 100 * PAGE];
    mapped.read(0, &mut seen);
    let expected = pattern(9, PAGE as u64, 100 * PAGE);
    pinbuf_test_harness::support::view::same("the buffer", 0, &seen, &expected)
}

fn private_huge_pages_not_inherited() -> Result<()> {
    let (_pool, memory) = private_huge_memory(1)?;
    let device = Device::open()?;
    memory.advise(0, HUGE, libc::MADV_DONTFORK)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let signal = signal_of(|| {
        memory.get(0);
    })?;
    check_eq!(signal, Some(Signal::SIGSEGV), "the child's access");
    memory.set(HUGE - 8, 12);
    check_eq!(mapped.get(HUGE - 8), 12, "what the parent wrote");
    Ok(())
}

/// Shared memory is everyone's.
fn shared_memory() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(8 * PAGE, 0)?;
    let memory = Memory::shared(&file, 8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    in_child(|| {
        memory.write(0, &pattern(13, 0, 8 * PAGE));
        Ok(())
    })?;
    holds(&Mapped::of(&buffer, &mapped), 13, 0, 8 * PAGE)?;
    holds(&Mapped::of(&buffer, &memory), 13, 0, 8 * PAGE)
}

/// The dma-buf's mapping is shared in both processes, whether it was touched before or not.
fn mapping_is_inherited() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let (touched, untouched) = (buffer.map()?, buffer.map()?);
    touched.write(0, &pattern(14, 0, 8 * PAGE));
    in_child(|| {
        holds(&Mapped::of(&buffer, &touched), 14, 0, 8 * PAGE)?;
        untouched.write(0, &pattern(15, 0, 8 * PAGE));
        holds(&Mapped::of(&buffer, &touched), 15, 0, 8 * PAGE)
    })?;
    holds(&Mapped::of(&buffer, &touched), 15, 0, 8 * PAGE)?;
    holds(&Mapped::of(&buffer, &memory), 15, 0, 8 * PAGE)
}

fn descriptor_is_inherited() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(16, 0, 8 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    in_child(|| {
        check_eq!(
            device.describe(&buffer)?.pages,
            8,
            "pages, asked by the child"
        );
        let mapped = buffer.map()?;
        holds(&Mapped::of(&buffer, &mapped), 16, 0, 8 * PAGE)?;
        mapped.write(0, &pattern(17, 0, 8 * PAGE));
        Ok(())
    })?;
    holds(&Mapped::of(&buffer, &memory), 17, 0, 8 * PAGE)
}

/// With the parent's device, the child pins the child's memory.
fn child_creates() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(18, 0, 8 * PAGE));
    let link = Link::new()?;
    let child = Child::run(|| {
        memory.write(0, &pattern(19, 0, 8 * PAGE));
        let buffer = device.create(&[memory.range()])?;
        link.theirs.send(buffer.as_fd())
    })?;
    let buffer = pinbuf_test_harness::support::Buffer::from_fd(link.ours.receive()?);
    child.join()?;
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 19, 0, 8 * PAGE)?;
    holds(&Mapped::of(&buffer, &memory), 18, 0, 8 * PAGE)
}

fn many_children() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let children = (0..8)
        .map(|index| {
            Child::run(|| {
                memory.set(0, 1000);
                mapped.set(index * PAGE, index as u64 + 1);
                drop(device.create(&[memory.range()])?);
                Ok(())
            })
        })
        .collect::<Result<Vec<_>>>()?;
    for child in children {
        child.join()?;
    }
    for index in 0..8 {
        check_eq!(
            memory.get(index * PAGE),
            index as u64 + 1,
            "what child {index} wrote"
        );
    }
    Ok(())
}

/// The last user is a process that the buffer's maker does not know.
fn grandchild_holds_it() -> Result<()> {
    let link = Link::new()?;
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(8 * PAGE)?;
        memory.write(0, &pattern(20, 0, 8 * PAGE));
        let buffer = device.create(&[memory.range()])?;
        drop((memory, device));
        let grandchild = Child::run(|| {
            link.theirs.wait()?;
            let mapped = buffer.map()?;
            holds(&Mapped::of(&buffer, &mapped), 20, 0, 8 * PAGE)?;
            link.theirs.say(21)
        })?;
        // It outlives this process.
        std::mem::forget(grandchild);
        Ok(())
    })?;
    link.ours.signal()?;
    check_eq!(link.ours.hear()?, 21, "the grandchild's answer");
    Ok(())
}
