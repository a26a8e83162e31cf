// SPDX-License-Identifier: MIT OR Apache-2.0

//! A 32-bit caller. `int 0x80` takes the same way into the kernel as a 32-bit program's calls: the
//! compat system call table, with pointers of 32 bits.

use std::arch::asm;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::{Discards, Info, Query, Range, STATE_DISCARDED};

use crate::create::bytes_of;
use crate::discards_more;
use pinbuf_test_harness::support::device::{create, sync_raw};
use pinbuf_test_harness::support::memory::{memfd, pattern, PAGE};
use pinbuf_test_harness::support::view::{holds, Mapped};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "compat32":
    query,
    create_and_info,
    checked,
    discards,
    errors,
    memory_above_4_gib,
    sync_of_the_buffer,
}

/// The number of `ioctl` in the 32-bit table.
const IOCTL: u32 = 54;

/// `ioctl` as a 32-bit program calls it.
fn ioctl32(fd: impl AsFd, command: u32, argument: u32) -> nix::Result<i32> {
    let mut result = IOCTL as i32;
    // SAFETY: the kernel checks the pointer; it changes no register but `eax`, and clears r8 to r11.
    // `rbx` is LLVM's own, so it is swapped in and out.
    unsafe {
        asm!(
            "xchg {fd:r}, rbx",
            "int 0x80",
            "xchg {fd:r}, rbx",
            fd = inout(reg) u64::from(fd.as_fd().as_raw_fd() as u32) => _,
            inout("eax") result,
            in("ecx") command,
            in("edx") argument,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
        );
    }
    if result < 0 {
        Err(Errno::from_raw(-result))
    } else {
        Ok(result)
    }
}

/// Memory that 32 bits reach: the struct is written to its beginning, the rest is free.
struct Low(Memory);

impl Low {
    fn new() -> Result<Self> {
        let memory = Memory::low(4 * PAGE)?;
        check!(
            memory.addr() + 4 * PAGE as u64 <= 1 << 32,
            "{:#x}",
            memory.addr()
        );
        Ok(Self(memory))
    }

    fn addr(&self, offset: usize) -> u32 {
        (self.0.addr() + offset as u64) as u32
    }

    fn put_ranges(&self, offset: usize, ranges: &[Range]) {
        for (index, range) in ranges.iter().enumerate() {
            self.0.set(offset + index * 16, range.addr);
            self.0.set(offset + index * 16 + 8, range.len);
        }
    }
}

fn query() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    low.0.write(0, &(size_of::<Query>() as u32).to_ne_bytes());
    check_eq!(
        ioctl32(&device, pinbuf_uapi::QUERY, low.addr(0)),
        Ok(0),
        "PINBUF_QUERY"
    );
    // Field by field what a 64-bit caller sees.
    let expected = device.query()?;
    let words = [
        u64::from(expected.size) | u64::from(expected.version) << 32,
        expected.features,
        expected.create_flags,
        u64::from(expected.max_ranges) | u64::from(expected.page_size) << 32,
        u64::from(expected.charge_mode) | u64::from(expected.reserved) << 32,
        expected.memlock_bytes,
        expected.allowance_bytes,
        expected.allowance_used,
        expected.allowance_system,
    ];
    for (index, word) in words.into_iter().enumerate() {
        check_eq!(low.0.get(index * 8), word, "word {index} of the answer");
    }
    Ok(())
}

/// Calls create with ranges, by way of 32 bits.
fn create32(device: &Device, low: &Low, ranges: &[Range]) -> nix::Result<Buffer> {
    low.put_ranges(1024, ranges);
    let argument = pinbuf_uapi::Create {
        ranges: u64::from(low.addr(1024)),
        count: ranges.len() as u32,
        ..create()
    };
    low.0.write(0, &bytes_of(&argument));
    let fd = ioctl32(device, pinbuf_uapi::CREATE, low.addr(0))?;
    // SAFETY: the call has just returned it.
    Ok(Buffer::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn create_and_info() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let memory = Memory::low(8 * PAGE)?;
    let ranges = [memory.part(4 * PAGE, 4 * PAGE), memory.part(0, 4 * PAGE)];
    let buffer = create32(&device, &low, &ranges)?;
    memory.write(0, &pattern(1, 4 * PAGE as u64, 4 * PAGE));
    memory.write(4 * PAGE, &pattern(1, 0, 4 * PAGE));
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 1, 0, 8 * PAGE)?;

    low.0.write(0, &vec![0; 256]);
    low.0.write(0, &(size_of::<Info>() as u32).to_ne_bytes());
    low.0.write(4, &buffer.as_fd().as_raw_fd().to_ne_bytes());
    check_eq!(
        ioctl32(&device, pinbuf_uapi::INFO, low.addr(0)),
        Ok(0),
        "PINBUF_INFO"
    );
    let expected = device.describe(&buffer)?;
    let words = [
        u64::from(expected.size) | u64::from(expected.fd as u32) << 32,
        expected.bytes,
        expected.pages,
        expected.extents,
        expected.pins,
        expected.kernel_bytes,
        expected.charged_pages,
        u64::from(expected.charge) | u64::from(expected.mappings) << 32,
        expected.state,
    ];
    for (index, word) in words.into_iter().enumerate() {
        check_eq!(low.0.get(index * 8), word, "word {index} of the answer");
    }
    Ok(())
}

fn checked() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let file = memfd(2 * PAGE, 0)?;
    let memory = Memory::shared(&file, 2 * PAGE)?;
    low.put_ranges(1024, &[memory.range()]);
    for (offset, expected) in [(0u64, None), (PAGE as u64, Some(Errno::EAGAIN))] {
        low.0.set(2048, u64::from(file.as_raw_fd() as u32));
        low.0.set(2056, offset);
        let argument = pinbuf_uapi::Create {
            flags: pinbuf_uapi::CREATE_CHECK_BACKING | pinbuf_uapi::CREATE_CLOEXEC,
            ranges: u64::from(low.addr(1024)),
            count: 1,
            backing: u64::from(low.addr(2048)),
            ..create()
        };
        low.0.write(0, &bytes_of(&argument));
        let result = ioctl32(&device, pinbuf_uapi::CREATE, low.addr(0));
        check_eq!(result.err(), expected, "a backing at {offset:#x}");
        if let Ok(fd) = result {
            // SAFETY: the call has just returned it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok(())
}

fn errors() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let memory = Memory::low(2 * PAGE)?;
    let range = memory.range();
    let cases = [
        ("no range", vec![], Errno::EINVAL),
        (
            "an odd address",
            vec![Range {
                addr: range.addr + 1,
                ..range
            }],
            Errno::EINVAL,
        ),
        (
            "an odd length",
            vec![Range {
                len: range.len + 1,
                ..range
            }],
            Errno::EINVAL,
        ),
        (
            "the zero page",
            vec![
                range,
                Range {
                    addr: 0,
                    len: PAGE as u64,
                },
            ],
            Errno::EFAULT,
        ),
        (
            "a range that wraps",
            vec![Range {
                len: 0u64.wrapping_sub(PAGE as u64),
                ..range
            }],
            Errno::EOVERFLOW,
        ),
    ];
    for (what, ranges, expected) in cases {
        let error = create32(&device, &low, &ranges).err();
        check_eq!(error, Some(expected), "{what}");
    }
    for command in [pinbuf_uapi::CREATE, pinbuf_uapi::QUERY, pinbuf_uapi::INFO] {
        let result = ioctl32(&device, command, 0x1000);
        check_eq!(
            result,
            Err(Errno::EFAULT),
            "command {command:#x} with a bad pointer"
        );
        low.0.write(0, &3u32.to_ne_bytes());
        let result = ioctl32(&device, command, low.addr(0));
        check_eq!(
            result,
            Err(Errno::EINVAL),
            "command {command:#x} with a short struct"
        );
    }
    let result = ioctl32(&device, 0x7553, low.addr(0));
    check_eq!(result, Err(Errno::ENOTTY), "an unknown command");
    Ok(())
}

/// A range has 64 bits whoever calls, so that no address is cut off.
fn memory_above_4_gib() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    check!(
        memory.addr() >> 32 != 0,
        "the memory is at {:#x}",
        memory.addr()
    );
    let buffer = create32(&device, &low, &[memory.range()]).context("create")?;
    memory.set(PAGE, 6);
    check_eq!(buffer.map()?.get(PAGE), 6, "the second page");
    Ok(())
}

/// The dma-buf itself answers 32-bit calls.
fn sync_of_the_buffer() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let memory = Memory::low(PAGE)?;
    let buffer = create32(&device, &low, &[memory.range()])?;
    for flags in [1u64, 5, 2, 6, 3, 7] {
        low.0.set(0, flags);
        check_eq!(
            ioctl32(&buffer, 0x4008_6200, low.addr(0)),
            Ok(0),
            "sync with {flags}"
        );
        check_eq!(
            sync_raw(&buffer, flags),
            Ok(()),
            "sync with {flags}, by 64 bits"
        );
    }
    Ok(())
}

fn discards() -> Result<()> {
    let device = Device::open()?;
    let low = Low::new()?;
    let memory = Memory::low(8 * PAGE)?;
    memory.keep_small(0, 8 * PAGE)?;
    let buffer = create32(&device, &low, &[memory.range()])?;
    memory.advise(PAGE, PAGE, libc::MADV_DONTNEED)?;
    memory.advise(5 * PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
    let call = Discards {
        size: size_of::<Discards>() as u32,
        fd: buffer.as_fd().as_raw_fd(),
        offset: 0,
        list: u64::from(low.addr(PAGE)),
        count: 4,
        reserved: 0,
    };
    low.0.write(0, &discards_more::bytes_of(&call));
    check_eq!(
        ioctl32(&device, pinbuf_uapi::DISCARDS, low.addr(0)),
        Ok(0),
        "PINBUF_DISCARDS"
    );
    check_eq!(low.0.get(8), 8 * PAGE as u64, "the end");
    check_eq!(low.0.get(24), 2, "elements");
    let state = u64::from(STATE_DISCARDED);
    for (index, word) in [
        PAGE as u64,
        PAGE as u64,
        state,
        5 * PAGE as u64,
        2 * PAGE as u64,
        state,
    ]
    .into_iter()
    .enumerate()
    {
        check_eq!(
            low.0.get(PAGE + index * 8),
            word,
            "word {index} of the list"
        );
    }
    // An address that only 64 bits reach is not cut.
    let far = Discards {
        list: 1 << 32 | call.list,
        ..call
    };
    low.0.write(0, &discards_more::bytes_of(&far));
    let failed = ioctl32(&device, pinbuf_uapi::DISCARDS, low.addr(0));
    check_eq!(failed, Err(Errno::EFAULT), "a list above 4 GiB");
    Ok(())
}
