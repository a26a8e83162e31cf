// SPDX-License-Identifier: MIT OR Apache-2.0

//! Kinds of memory, and buffers of it.

use anyhow::{Context, Result};

use pinbuf_test_harness::support::frames::{all_frames, with_flag, THP};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory};

/// Memory that a process can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory in small pages.
    Anonymous,
    /// A memfd in small pages.
    Shmem,
    /// Transparent huge pages.
    Transparent,
    /// Huge pages of the pool, private.
    HugePrivate,
    /// Huge pages of the pool, shared.
    HugeShared,
}

impl Kind {
    /// Some pages of it ([`FEW`]), or some huge ones, none of them there yet.
    pub fn fresh(self) -> Result<Memory> {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        match self {
            Self::Anonymous => Memory::small_pages(FEW * PAGE),
            Self::Shmem => {
                let memory = Memory::shared(memfd(FEW * PAGE, 0)?, FEW * PAGE)?;
                memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
                Ok(memory)
            }
            Self::Transparent => {
                let memory = Memory::map_aligned(2 * HUGE, HUGE, RW, private, None, 0)?;
                memory.advise(0, memory.len(), libc::MADV_HUGEPAGE)?;
                Ok(memory)
            }
            Self::HugePrivate => {
                let flags = private | libc::MAP_HUGETLB;
                Memory::map(2 * HUGE, RW, flags, None, 0).context("mapping private huge pages")
            }
            Self::HugeShared => Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE),
        }
    }

    /// The same, all of it there.
    pub fn present(self) -> Result<Memory> {
        let memory = self.fresh()?;
        for offset in (0..memory.len()).step_by(PAGE) {
            memory.set(offset, 1);
        }
        if self == Self::Transparent {
            let frames = all_frames(&memory)?;
            let huge = with_flag(&frames, THP)?;
            check_eq!(huge, frames.len(), "pages in transparent huge ones");
        }
        Ok(memory)
    }

    /// What has to be there for it.
    pub fn pool(self) -> Result<Option<HugePool>> {
        match self {
            Self::HugePrivate | Self::HugeShared => HugePool::with_free(2).map(Some),
            Self::Anonymous | Self::Shmem | Self::Transparent => Ok(None),
        }
    }
}

/// More small pages than the driver pins without memory for a list of them.
pub const FEW: usize = 40;

/// Whether the buffer consists of the memory's pages, in their order.
pub fn is_of(device: &Device, buffer: &Buffer, memory: &Memory) -> Result<()> {
    const SAMPLES: usize = 64;
    let len = memory.len();
    check_eq!(
        device.describe(buffer)?.bytes,
        len as u64,
        "the buffer's size"
    );
    let mapped = buffer.map()?;
    let stride = (len / SAMPLES).next_multiple_of(PAGE).max(PAGE);
    for offset in (0..len).step_by(stride) {
        memory.set(offset + 8, stamp(1, offset as u64));
    }
    for offset in (0..len).step_by(stride) {
        check_eq!(
            mapped.get(offset + 8),
            stamp(1, offset as u64),
            "what the buffer holds at {offset:#x}"
        );
    }
    Ok(())
}

/// Memory in pages of which hardly any two are adjacent, and what lies between them.
pub fn scattered(pages: usize) -> Result<[Memory; 2]> {
    let both = [
        Memory::small_pages(pages * PAGE)?,
        Memory::small_pages(pages * PAGE)?,
    ];
    for page in 0..pages {
        for memory in &both {
            memory.set(page * PAGE, 1);
        }
    }
    Ok(both)
}
