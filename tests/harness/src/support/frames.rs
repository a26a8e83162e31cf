// SPDX-License-Identifier: MIT OR Apache-2.0

//! The page frames of memory, and the kernel's data about them: zones, CMA areas, memory blocks,
//! flags.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{bail, Context, Result};

use super::memory::GIGA;
use super::{kernel, Memory, PAGE};

/// The number of a page frame.
pub type Pfn = u64;

/// A page's entry of `/proc/self/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing there.
    Absent,
    /// Swapped out.
    Swapped,
    /// In this frame.
    Present(Pfn),
}

fn words(path: &str, first: u64, count: usize) -> Result<Vec<u64>> {
    let file = File::open(path).with_context(|| format!("opening {path}"))?;
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, first * 8)
        .with_context(|| format!("reading {count} words at {first:#x} of {path}"))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()))
        .collect())
}

/// Where the pages of a part of some memory are.
pub fn entries(memory: &Memory, offset: usize, len: usize) -> Result<Vec<Entry>> {
    let first = (memory.addr() + offset as u64) / PAGE as u64;
    let words = words("/proc/self/pagemap", first, len / PAGE)?;
    let entry = |word: u64| match (word >> 63, word >> 62 & 1) {
        (1, _) => Entry::Present(word & ((1 << 55) - 1)),
        (_, 1) => Entry::Swapped,
        _ => Entry::Absent,
    };
    Ok(words.into_iter().map(entry).collect())
}

/// The frames of a part of some memory, all of which must be present.
pub fn frames(memory: &Memory, offset: usize, len: usize) -> Result<Vec<Pfn>> {
    let mut found = Vec::with_capacity(len / PAGE);
    for (index, entry) in entries(memory, offset, len)?.into_iter().enumerate() {
        match entry {
            // Without CAP_SYS_ADMIN the number is hidden.
            Entry::Present(pfn) if pfn != 0 => found.push(pfn),
            other => bail!("page {index} of the memory: {other:?}"),
        }
    }
    Ok(found)
}

/// The frames of all of it.
pub fn all_frames(memory: &Memory) -> Result<Vec<Pfn>> {
    frames(memory, 0, memory.len())
}

/// `KPF_HUGE`.
pub const HUGETLB: u64 = 1 << 17;
/// `KPF_KSM`.
pub const KSM: u64 = 1 << 21;
/// `KPF_THP`.
pub const THP: u64 = 1 << 22;
/// `KPF_ZERO_PAGE`.
pub const ZERO_PAGE: u64 = 1 << 24;
/// `KPF_COMPOUND_HEAD`.
pub const HEAD: u64 = 1 << 15;

/// What `/proc/kpageflags` says.
pub fn flags(pfn: Pfn) -> Result<u64> {
    Ok(words("/proc/kpageflags", pfn, 1)?[0])
}

/// How often the page is mapped, as `/proc/kpagecount` says. Some kernels know only how often the pages of its folio
/// are mapped on average: [`kernel::has_page_mapcounts`].
pub fn mappings(pfn: Pfn) -> Result<u64> {
    Ok(words("/proc/kpagecount", pfn, 1)?[0])
}

/// How many of the frames have the flag.
pub fn with_flag(pfns: &[Pfn], flag: u64) -> Result<usize> {
    let mut count = 0;
    for &pfn in pfns {
        count += usize::from(flags(pfn)? & flag != 0);
    }
    Ok(count)
}

/// How many of the frames lie in one of the areas.
pub fn within(pfns: &[Pfn], areas: &[Range<Pfn>]) -> usize {
    pfns.iter()
        .filter(|pfn| areas.iter().any(|area| area.contains(pfn)))
        .count()
}

/// The frames that a zone spans.
pub fn zone(name: &str) -> Result<Range<Pfn>> {
    let text = kernel::read("/proc/zoneinfo")?;
    let mut spanned = None;
    let mut inside = false;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["Node", _, "zone", zone] => inside = zone == name,
            ["spanned", count] if inside => spanned = Some(count.parse::<u64>()?),
            ["start_pfn:", start] if inside => {
                let start: u64 = start.parse()?;
                let spanned = spanned.context("a zone without a span")?;
                if spanned == 0 {
                    break;
                }
                return Ok(start..start + spanned);
            }
            _ => {}
        }
    }
    bail!("zone {name} has no pages: boot with movablecore=640M, say")
}

/// `ZONE_MOVABLE`.
pub fn movable() -> Result<Range<Pfn>> {
    zone("Movable")
}

/// The frames of the pool's only page of 1 GiB.
pub fn giga_page() -> Result<Range<Pfn>> {
    const PAGES: Pfn = (GIGA / PAGE) as Pfn;
    for first in (PAGES..64 * PAGES).step_by(PAGES as usize) {
        // Beyond the end of memory there is nothing to read.
        let Ok(flags) = flags(first) else { break };
        if flags & (HUGETLB | HEAD) == HUGETLB | HEAD
            && self::flags(first + PAGES - 1)? & HUGETLB != 0
        {
            return Ok(first..first + PAGES);
        }
    }
    bail!("no page of 1 GiB in the pool")
}

/// Pages of a memory block.
pub fn block_pages() -> Result<u64> {
    let text = kernel::read("/sys/devices/system/memory/block_size_bytes")?;
    Ok(u64::from_str_radix(text.trim(), 16)? / PAGE as u64)
}

/// A memory block, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block(pub u64);

impl Block {
    /// Its state's file.
    fn path(self) -> String {
        format!("/sys/devices/system/memory/memory{}/state", self.0)
    }

    /// Its frames.
    pub fn frames(self) -> Result<Range<Pfn>> {
        let pages = block_pages()?;
        Ok(self.0 * pages..(self.0 + 1) * pages)
    }

    /// Blocks that lie in an area as a whole.
    pub fn inside(area: &Range<Pfn>) -> Result<Vec<Self>> {
        let pages = block_pages()?;
        Ok((area.start.div_ceil(pages)..area.end / pages)
            .map(Block)
            .collect())
    }

    /// Tries once to take it offline; an error says that the kernel could not.
    pub fn offline(self) -> Result<()> {
        kernel::write(self.path(), "offline")
    }

    /// Brings it back online, for pages that can be moved.
    pub fn online(self) -> Result<()> {
        kernel::write(self.path(), "online_movable")
    }

    /// Whether it is online.
    pub fn is_online(self) -> Result<bool> {
        Ok(kernel::read(self.path())?.trim() == "online")
    }
}
