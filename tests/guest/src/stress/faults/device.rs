// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices' mappings, kernel mappings and synchronisation.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{Direction, Importer, Limits, Mapping};

use super::inject::{errno, Fault, Injector};
use super::sweep::{Call, Expected};
use crate::kinds::scattered;
use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::memory::{stamp, PAGE};
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "faults":
    query,
    info,
    device_mapping within 300,
    kernel_mapping within 300 allowing ["at dma_buf_vmap+"],
    cpu_access,
    sync,
}

const EFAULT: &[Errno] = &[Errno::EFAULT];
const ENOMEM: &[Errno] = &[Errno::ENOMEM];

/// What a call that allocates nothing meets.
fn copies(at_least: usize) -> [Expected<'static>; 3] {
    [
        Expected::single(Fault::Slab, &[]),
        Expected::single(Fault::Page, &[]),
        Expected::single(Fault::UserCopy, EFAULT).failing(at_least),
    ]
}

fn query() -> Result<()> {
    let injector = Injector::new()?;
    let device = Device::open()?;
    Call {
        name: "PINBUF_QUERY",
        prepare: || Ok(()),
        make: |(): &()| device.query(),
        verify: |(): &(), query: &pinbuf_uapi::Query| {
            check_eq!(query.version, pinbuf_uapi::VERSION, "version");
            Ok(())
        },
    }
    .sweep(&injector, &copies(3))
}

fn info() -> Result<()> {
    let injector = Injector::new()?;
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    Call {
        name: "PINBUF_INFO",
        prepare: || Ok(()),
        make: |(): &()| device.info(buffer.as_fd().as_raw_fd()),
        verify: |(): &(), info: &pinbuf_uapi::Info| {
            check_eq!(info.pages, 4, "pages");
            Ok(())
        },
    }
    .sweep(&injector, &copies(3))
}

/// A buffer of pages of which hardly any two are adjacent.
struct Scattered {
    device: Device,
    memory: Memory,
    _between: Memory,
    buffer: Buffer,
    importer: Importer,
}

impl Scattered {
    fn new(pages: usize) -> Result<Self> {
        let device = Device::open()?;
        let [memory, between] = scattered(pages)?;
        let buffer = device.create(&[memory.range()])?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
        Ok(Self {
            device,
            memory,
            _between: between,
            buffer,
            importer,
        })
    }

    /// Pages at the beginning, in the middle and at the end.
    fn samples(&self) -> [usize; 3] {
        let pages = self.memory.len() / PAGE;
        [0, pages / 2, pages - 1].map(|page| page * PAGE)
    }
}

/// A mapping that is undone at once.
struct Mapped<'a>(&'a Importer, Mapping);

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        self.0.unmap(self.1).expect("unmapping what was mapped");
    }
}

/// The list of segments, its chain of pages, and what remembers the mapping.
fn device_mapping() -> Result<()> {
    let injector = Injector::new()?;
    let it = Scattered::new(700)?;
    Call {
        name: "mapping for a device",
        prepare: || {
            check_eq!(
                it.device.describe(&it.buffer)?.mappings,
                0,
                "mappings before"
            );
            Ok(())
        },
        make: |(): &()| {
            let (mapping, _) = errno(it.importer.map(Direction::Bidirectional))?;
            Ok(Mapped(&it.importer, mapping))
        },
        verify: |(): &(), mapped: &Mapped<'_>| {
            for offset in it.samples() {
                it.memory.set(offset, stamp(3, offset as u64));
                let mut seen = [0; 8];
                it.importer.read(mapped.1, offset as u64, &mut seen)?;
                check_eq!(
                    u64::from_ne_bytes(seen),
                    stamp(3, offset as u64),
                    "what the device reads at {offset:#x}"
                );
            }
            Ok(())
        },
    }
    .sweep(
        &injector,
        &[
            Expected::single(Fault::Slab, ENOMEM).failing(3),
            Expected::lasting(Fault::Slab, ENOMEM).failing(3),
            Expected::single(Fault::Page, ENOMEM).failing(4),
            Expected::lasting(Fault::Page, ENOMEM).failing(4),
            // The importer's own.
            Expected::single(Fault::UserCopy, EFAULT).failing(2),
        ],
    )
}

/// A mapping into the kernel that is undone at once.
struct InKernel<'a>(&'a Importer);

impl Drop for InKernel<'_> {
    fn drop(&mut self) {
        self.0.vunmap().expect("unmapping what was mapped");
    }
}

/// The array of pages, the area, and its page tables. The core warns, once, when the callback fails.
fn kernel_mapping() -> Result<()> {
    let injector = Injector::new()?;
    let it = Scattered::new(700)?;
    Call {
        name: "mapping into the kernel",
        prepare: || Ok(()),
        make: |(): &()| errno(it.importer.vmap()).map(|_| InKernel(&it.importer)),
        verify: |(): &(), _: &InKernel<'_>| {
            for offset in it.samples() {
                it.memory.set(offset, stamp(4, offset as u64));
                let mut seen = [0; 8];
                it.importer.vmap_read(offset as u64, &mut seen)?;
                check_eq!(
                    u64::from_ne_bytes(seen),
                    stamp(4, offset as u64),
                    "what the kernel reads at {offset:#x}"
                );
            }
            Ok(())
        },
    }
    .sweep(
        &injector,
        &[
            Expected::single(Fault::Slab, ENOMEM).failing(2),
            Expected::lasting(Fault::Slab, ENOMEM).failing(3),
            Expected::single(Fault::Page, ENOMEM).failing(1),
            Expected::lasting(Fault::Page, ENOMEM).failing(1),
        ],
    )
}

/// The kernel's own access, with a device that has mapped the buffer. The user copies are the importer's: after
/// the second one the access has begun, or ended, in any case, which nothing counts.
fn cpu_access() -> Result<()> {
    let injector = Injector::new()?;
    let it = Scattered::new(20)?;
    let mapping = it.importer.map(Direction::Bidirectional)?.0;
    for (name, begin) in [("begin_cpu_access", true), ("end_cpu_access", false)] {
        Call {
            name,
            prepare: || Ok(()),
            make: |(): &()| {
                errno(if begin {
                    it.importer.begin_cpu_access(Direction::Bidirectional)
                } else {
                    it.importer.end_cpu_access(Direction::Bidirectional)
                })
            },
            verify: |(): &(), _: &std::time::Duration| Ok(()),
        }
        .sweep(&injector, &copies(2))?;
    }
    it.importer.unmap(mapping)?;
    Ok(())
}

/// `DMA_BUF_IOCTL_SYNC`, with a device that has mapped the buffer.
fn sync() -> Result<()> {
    /// `_IOW('b', 0, u64)`.
    const DMA_BUF_IOCTL_SYNC: u32 = 0x4008_6200;
    const READ_WRITE: u64 = 3;
    const END: u64 = 4;

    let injector = Injector::new()?;
    let it = Scattered::new(20)?;
    let mapping = it.importer.map(Direction::Bidirectional)?.0;
    for (name, flags) in [("sync, start", READ_WRITE), ("sync, end", READ_WRITE | END)] {
        Call {
            name,
            prepare: || Ok(()),
            make: |(): &()| {
                let argument = std::ptr::from_ref(&flags) as u64;
                ioctl(&it.buffer, DMA_BUF_IOCTL_SYNC, argument)
            },
            verify: |(): &(), _: &i32| Ok(()),
        }
        .sweep(&injector, &copies(1))?;
    }
    it.importer.unmap(mapping)?;
    Ok(())
}
