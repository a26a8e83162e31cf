// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of the kinds that tests share, and what holds for every buffer.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Info, Range};

use crate::frames;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, BLOCK, HUGE, PAGE, RW};
use pinbuf_test_harness::support::view::{
    agree, agree_sampled, DeviceView, KernelView, Mapped, Source, View,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};

/// Compares all four views of a buffer, each writing and each reading: every byte up to 1 MiB, a
/// sample beyond.
pub fn views_agree(buffer: &Buffer, pieces: &[(&Memory, usize, usize)]) -> Result<()> {
    let len = pieces.iter().map(|piece| piece.2).sum();
    check_eq!(buffer.len()?, len, "the buffer's size");
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    let source = Source {
        buffer,
        pieces: pieces.to_vec(),
    };
    let cpu = Mapped::of(buffer, &mapped);
    let device = DeviceView::of(&importer, mapping);
    let views: [&dyn View; 4] = [&source, &device, &cpu, &KernelView(&importer)];
    if len <= 256 * PAGE {
        agree(&views, len)
    } else {
        agree_sampled(&views, len, 151)
    }
}

/// Makes a buffer of pieces of memory, compares all views, and expects nothing to be left.
pub fn works(pieces: &[(&Memory, usize, usize)]) -> Result<Info> {
    let device = Device::open()?;
    let ranges: Vec<Range> = pieces
        .iter()
        .map(|(memory, at, len)| memory.part(*at, *len))
        .collect();
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    let buffer = device.create(&ranges).context("PINBUF_CREATE")?;
    let info = device.describe(&buffer)?;
    let bytes: usize = pieces.iter().map(|piece| piece.2).sum();
    check_eq!(info.charged_pages, (bytes / PAGE) as u64, "pages charged");
    check_eq!(
        kernel::pins()? - pins,
        info.pins as i64,
        "pins by the kernel's count and by ours"
    );
    check_eq!(kernel::vm_pin()? - pinned, bytes as i64, "VmPin");
    views_agree(&buffer, pieces)?;
    drop(buffer);
    check_eq!(kernel::pins()?, pins, "pins after release");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after release");
    Ok(info)
}

/// As [`works`], with all of one piece of memory.
pub fn works_whole(memory: &Memory) -> Result<Info> {
    works(&[(memory, 0, memory.len())])
}

/// Expects an error, and that nothing was kept.
pub fn refused(what: &str, expected: Errno, ranges: &[Range]) -> Result<()> {
    let device = Device::open()?;
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    let (buffers, descriptors) = (kernel::dma_bufs()?, kernel::descriptors()?);
    let result = device.create(ranges).map(drop);
    check_eq!(result, Err(expected), "create with {what}");
    check_eq!(kernel::pins()?, pins, "pins after {what} was refused");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after {what} was refused");
    check_eq!(
        kernel::dma_bufs()?,
        buffers,
        "dma-bufs after {what} was refused"
    );
    check_eq!(
        kernel::descriptors()?,
        descriptors,
        "descriptors after {what} was refused"
    );
    Ok(())
}

/// Refused alone, behind memory that is fine, and before it.
pub fn refused_anywhere(what: &str, expected: Errno, range: Range) -> Result<()> {
    let fine = Memory::small_pages(3 * PAGE)?;
    refused(what, expected, &[range])?;
    refused(
        &format!("{what}, last"),
        expected,
        &[fine.part(0, PAGE), range],
    )?;
    refused(
        &format!("{what}, first"),
        expected,
        &[range, fine.part(PAGE, PAGE)],
    )
}

/// Private memory in huge pages of the pool.
pub fn huge_private(pages: usize) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    Memory::map(pages * HUGE, RW, flags, None, 0).context("mapping private huge pages")
}

/// Memory in transparent huge pages, proved by their flags.
pub fn transparent(pages: usize) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(pages * HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, memory.len(), libc::MADV_HUGEPAGE)?;
    for page in 0..pages {
        memory.set(page * HUGE, 1);
    }
    if !all_transparent(&memory)? {
        kernel::write("/proc/sys/vm/compact_memory", "1")?;
        // What it did not do shows below.
        let _ = memory.advise(0, memory.len(), libc::MADV_COLLAPSE);
        check!(
            all_transparent(&memory)?,
            "no {pages} transparent huge pages could be had"
        );
    }
    Ok(memory)
}

fn all_transparent(memory: &Memory) -> Result<bool> {
    memory.touch();
    let heads: Vec<_> = frames::all_frames(memory)?
        .into_iter()
        .step_by(BLOCK)
        .collect();
    for &pfn in &heads {
        if frames::flags(pfn)? & frames::THP == 0 || pfn % BLOCK as u64 != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A kind of memory whose pages the kernel may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory in small pages.
    Anonymous,
    /// A memfd.
    Shmem,
    /// Transparent huge pages.
    Transparent,
    /// Huge pages of the pool, private.
    HugePrivate,
    /// Huge pages of the pool, shared.
    HugeShared,
}

/// Memory of a [`Kind`], and the pool that it is from.
pub struct Movable {
    /// The memory, all of it present.
    pub memory: Memory,
    /// Held until the memory is gone, which is declared before it.
    _pool: Option<HugePool>,
}

impl Kind {
    /// Memory of this kind, touched.
    pub fn memory(self, len: usize) -> Result<Movable> {
        let huge = (len / HUGE) as i64;
        let (memory, pool) = match self {
            Kind::Anonymous => (Memory::small_pages(len)?, None),
            Kind::Shmem => {
                let memory = Memory::shared(memfd(len, 0)?, len)?;
                memory.advise(0, len, libc::MADV_NOHUGEPAGE)?;
                (memory, None)
            }
            Kind::Transparent => (transparent(len / HUGE)?, None),
            Kind::HugePrivate => {
                let pool = HugePool::with_free(huge)?;
                let memory = huge_private(len / HUGE)?;
                // As pinbuf.h recommends; a fork would need as many huge pages again.
                memory.advise(0, len, libc::MADV_DONTFORK)?;
                (memory, Some(pool))
            }
            Kind::HugeShared => {
                let pool = HugePool::with_free(huge)?;
                (Memory::shared(huge_memfd(len)?, len)?, Some(pool))
            }
        };
        for offset in (0..len).step_by(PAGE) {
            memory.set(offset, offset as u64);
        }
        Ok(Movable {
            memory,
            _pool: pool,
        })
    }
}
