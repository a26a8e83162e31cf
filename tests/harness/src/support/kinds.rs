// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kinds of memory that a process can have and the kernel may move.

use anyhow::{Context, Result};

use super::frames::{all_frames, flags, THP};
use super::kernel::{self, HugePool};
use super::memory::{huge_memfd, memfd, BLOCK, HUGE, PAGE, RW};
use super::{check, Memory};

/// A kind of memory whose pages the kernel may move.
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

/// Memory of a [`Kind`], and the pool that it is from.
pub struct Pooled {
    /// The memory, all of it present.
    pub memory: Memory,
    /// Held until the memory is gone, which is declared before it.
    _pool: Option<HugePool>,
}

impl Kind {
    /// Memory of this kind, none of it present yet. Huge pages have to be in the [pool](Self::pool).
    pub fn fresh(self, len: usize) -> Result<Memory> {
        match self {
            Self::Anonymous => Memory::small_pages(len),
            Self::Shmem => {
                let memory = Memory::shared(memfd(len, 0)?, len)?;
                memory.advise(0, len, libc::MADV_NOHUGEPAGE)?;
                Ok(memory)
            }
            Self::Transparent => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let memory = Memory::map_aligned(len, HUGE, RW, flags, None, 0)?;
                memory.advise(0, len, libc::MADV_HUGEPAGE)?;
                Ok(memory)
            }
            Self::HugePrivate => huge_private(len / HUGE),
            Self::HugeShared => Memory::shared(huge_memfd(len)?, len),
        }
    }

    /// The same, all of it present, each page with its offset in it.
    pub fn present(self, len: usize) -> Result<Memory> {
        let memory = match self {
            Self::Transparent => transparent(len / HUGE)?,
            _ => self.fresh(len)?,
        };
        for offset in (0..len).step_by(PAGE) {
            memory.set(offset, offset as u64);
        }
        Ok(memory)
    }

    /// The huge pages that `len` bytes of it are taken from.
    pub fn pool(self, len: usize) -> Result<Option<HugePool>> {
        match self {
            Self::HugePrivate | Self::HugeShared => {
                HugePool::with_free((len / HUGE) as i64).map(Some)
            }
            Self::Anonymous | Self::Shmem | Self::Transparent => Ok(None),
        }
    }

    /// Memory that is present, and its pool.
    pub fn pooled(self, len: usize) -> Result<Pooled> {
        let pool = self.pool(len)?;
        let memory = self.present(len)?;
        if self == Self::HugePrivate {
            // As pinbuf.h recommends; a fork would need as many huge pages again.
            memory.advise(0, len, libc::MADV_DONTFORK)?;
        }
        Ok(Pooled {
            memory,
            _pool: pool,
        })
    }
}

/// Private memory in huge pages of the pool.
pub fn huge_private(pages: usize) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    Memory::map(pages * HUGE, RW, flags, None, 0).context("mapping private huge pages")
}

/// Memory in transparent huge pages, proved by their flags.
pub fn transparent(pages: usize) -> Result<Memory> {
    let memory = Kind::Transparent.fresh(pages * HUGE)?;
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
    let heads: Vec<_> = all_frames(memory)?.into_iter().step_by(BLOCK).collect();
    for &pfn in &heads {
        if flags(pfn)? & THP == 0 || pfn % BLOCK as u64 != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}
