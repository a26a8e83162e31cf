// SPDX-License-Identifier: MIT OR Apache-2.0

//! User mappings, and the faults that fill them in.

use anyhow::Result;
use nix::errno::Errno;

use super::inject::{Fault, Injector};
use super::sweep::{Call, Expected};
use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::memory::{stamp, GIGA, PAGE, RW};
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

use std::os::fd::AsFd;

tests! { "faults":
    mmap within 300,
    touched_by_the_kernel within 300,
    touched_by_the_process within 300,
}

const PAGES: usize = 600;

/// A call for any file that reads an `int`, with one access: zero changes nothing.
pub const FIONBIO: u32 = 0x5421;

/// What faults do in this number of allocations.
pub fn failing(errors: &[Errno], slabs: usize, pages: usize) -> [Expected<'_>; 4] {
    [
        Expected::single(Fault::Slab, errors).failing(slabs),
        Expected::lasting(Fault::Slab, errors).failing(slabs),
        Expected::single(Fault::Page, errors).failing(pages),
        Expected::lasting(Fault::Page, errors).failing(pages),
    ]
}

/// The same where no caller sees them.
pub fn recovering(slabs: usize, pages: usize) -> [Expected<'static>; 4] {
    [
        Expected::single(Fault::Slab, &[]).recovering(slabs),
        Expected::lasting(Fault::Slab, &[]).recovering(slabs),
        Expected::single(Fault::Page, &[]).recovering(pages),
        Expected::lasting(Fault::Page, &[]).recovering(pages),
    ]
}

/// A buffer, and the memory it is of, whose first word is zero.
fn buffer() -> Result<(Memory, Buffer)> {
    let memory = Memory::small_pages(PAGES * PAGE)?;
    for page in 0..PAGES {
        memory.set(page * PAGE, stamp(5, page as u64));
    }
    memory.set(0, 0);
    let buffer = Device::open()?.create(&[memory.range()])?;
    Ok((memory, buffer))
}

/// A mapping that has page tables down to the lowest for itself alone, none of them there yet.
pub fn alone(buffer: &Buffer, len: usize) -> Result<Memory> {
    let flags = libc::MAP_SHARED;
    Ok(Memory::map_aligned(
        len,
        GIGA,
        RW,
        flags,
        Some(buffer.as_fd()),
        0,
    )?)
}

fn mmap() -> Result<()> {
    let injector = Injector::new()?;
    let (memory, buffer) = buffer()?;
    Call {
        name: "mmap",
        prepare: || Ok(()),
        make: |(): &()| buffer.map_part(0, memory.len()),
        verify: |(): &(), mapped: &Memory| {
            for offset in (PAGE..memory.len()).step_by(101 * PAGE) {
                check_eq!(mapped.get(offset), memory.get(offset), "at {offset:#x}");
            }
            Ok(())
        },
    }
    .sweep(&injector, &failing(&[Errno::ENOMEM], 2, 0))
}

/// What a system call makes of a fault that cannot be served is an error.
fn touched_by_the_kernel() -> Result<()> {
    let injector = Injector::new()?;
    let (memory, buffer) = buffer()?;
    Call {
        name: "a page fault in a system call",
        prepare: || alone(&buffer, memory.len()),
        make: |mapped: &Memory| {
            // What copies more than a word tries again, byte by byte.
            ioctl(&buffer, FIONBIO, mapped.addr())
        },
        verify: |mapped: &Memory, _: &i32| {
            check_eq!(mapped.get(PAGE), memory.get(PAGE), "the next page");
            Ok(())
        },
    }
    .sweep(&injector, &failing(&[Errno::EFAULT], 0, 2))
}

/// The kernel retries a fault of user space without memory: nobody sees an error.
fn touched_by_the_process() -> Result<()> {
    let injector = Injector::new()?;
    let (memory, buffer) = buffer()?;
    Call {
        name: "a page fault",
        prepare: || alone(&buffer, memory.len()),
        make: |mapped: &Memory| Ok(mapped.get(PAGE)),
        verify: |mapped: &Memory, seen: &u64| {
            check_eq!(*seen, memory.get(PAGE), "the word that was read");
            for offset in (PAGE..memory.len()).step_by(PAGE) {
                check_eq!(mapped.get(offset), memory.get(offset), "at {offset:#x}");
            }
            Ok(())
        },
    }
    .sweep(&injector, &recovering(0, 2))
}
