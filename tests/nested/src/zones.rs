// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a virtual machine's memory lies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::process::Command;

use anyhow::{ensure, Context, Result};

use crate::pagemap;

const PAGE: u64 = 4096;

/// The present pages of a virtual machine's memory, by place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All.
    pub all: u64,
    /// In ZONE_MOVABLE.
    pub movable: u64,
    /// In the contiguous memory allocator's area.
    pub cma: u64,
}

/// The page numbers of QEMU's mappings of its guest's memory.
fn pages(process: u32) -> Result<Vec<u64>> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
    let mut found = Vec::new();
    for line in maps
        .lines()
        .filter(|line| line.contains("/memfd:memory-backend-memfd"))
    {
        let (start, end) = line
            .split_whitespace()
            .next()
            .and_then(|range| range.split_once('-'))
            .context("a mapping without a range")?;
        let start = u64::from_str_radix(start, 16)?;
        let end = u64::from_str_radix(end, 16)?;
        let pages = (end - start) / PAGE;
        let frames = pagemap::frames(&process.to_string(), start, pages as usize)?;
        found.extend(frames.into_iter().flatten());
    }
    ensure!(!found.is_empty(), "QEMU maps no memfd");
    Ok(found)
}

/// The page numbers of ZONE_MOVABLE.
fn movable() -> Result<Vec<Range<u64>>> {
    let text = fs::read_to_string("/proc/zoneinfo")?;
    let (mut ranges, mut spanned, mut inside) = (Vec::new(), 0, false);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Node", _, "zone", name] => inside = *name == "Movable",
            ["spanned", number] => spanned = number.parse()?,
            ["start_pfn:", number] if inside && spanned > 0 => {
                let start: u64 = number.parse()?;
                ranges.push(start..start + spanned);
            }
            _ => {}
        }
    }
    Ok(ranges)
}

/// The page frames of CMA's area, according to the kernel's log.
fn cma() -> Result<Vec<Range<u64>>> {
    let output = Command::new("dmesg").output().context("running dmesg")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut ranges = Vec::new();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("cma: Reserved ") else {
            continue;
        };
        let Some((size, start)) = rest.split_once(" MiB at 0x") else {
            continue;
        };
        let start = start.split_whitespace().next().unwrap_or_default();
        let start = u64::from_str_radix(start, 16)? / PAGE;
        let size: u64 = size.parse()?;
        ranges.push(start..start + (size << 20) / PAGE);
    }
    Ok(ranges)
}

/// Where a virtual machine's memory lies now.
pub fn memory_of(process: u32) -> Result<Memory> {
    let (movable, cma) = (movable()?, cma()?);
    let mut memory = Memory::default();
    for page in pages(process)? {
        memory.all += 1;
        memory.movable += u64::from(movable.iter().any(|range| range.contains(&page)));
        memory.cma += u64::from(cma.iter().any(|range| range.contains(&page)));
    }
    Ok(memory)
}

/// The number of pages of a block of memory that can be taken offline.
fn block_size() -> Result<u64> {
    let size = fs::read_to_string("/sys/devices/system/memory/block_size_bytes")?;
    Ok(u64::from_str_radix(size.trim(), 16)? / PAGE)
}

/// The blocks that lie in ZONE_MOVABLE as a whole.
fn movable_blocks() -> Result<BTreeSet<u64>> {
    let size = block_size()?;
    Ok(movable()?
        .into_iter()
        .flat_map(|range| range.start.div_ceil(size)..range.end / size)
        .collect())
}

/// The blocks that can be taken offline now; they are put back online at once.
pub fn willing_blocks() -> Result<BTreeSet<u64>> {
    let mut willing = BTreeSet::new();
    for block in movable_blocks()? {
        if set_online(block, false).is_ok() {
            set_online(block, true)?;
            willing.insert(block);
        }
    }
    Ok(willing)
}

/// The blocks of ZONE_MOVABLE, and how much of a virtual machine's memory each holds.
pub fn blocks_of(process: u32) -> Result<BTreeMap<u64, u64>> {
    let (size, movable) = (block_size()?, movable_blocks()?);
    let mut blocks = BTreeMap::new();
    for page in pages(process)? {
        let block = page / size;
        if movable.contains(&block) {
            *blocks.entry(block).or_insert(0) += 1;
        }
    }
    Ok(blocks)
}

/// Takes a block of memory offline, or puts it back online.
pub fn set_online(block: u64, online: bool) -> Result<()> {
    let path = format!("/sys/devices/system/memory/memory{block}/state");
    let state = if online { "online_movable" } else { "offline" };
    fs::write(&path, state).with_context(|| format!("{state} to {path}"))
}
