// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that caches are not coherent with: what they read has to be cleaned from caches first, and what they wrote
//! has to be dropped from them before the CPU reads. An emulator has no caches, so what is compared is which calls
//! for this the kernel makes, and for which memory.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use pinbuf_test_importer::uapi;
use pinbuf_test_importer::{Direction, Importer};

use pinbuf_test_harness::support::device::sync_raw;
use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "coherency":
    map_and_unmap,
    cpu_access,
    several_attachments,
    coherent_devices,
}

const DIRECTIONS: [Direction; 3] = [
    Direction::Bidirectional,
    Direction::ToDevice,
    Direction::FromDevice,
];

/// The flags of `DMA_BUF_IOCTL_SYNC`.
const READ: u64 = 1;
const WRITE: u64 = 2;
const END: u64 = 4;
const ACCESSES: [u64; 3] = [READ, WRITE, READ | WRITE];

/// Memory in several pieces, none adjacent to the next.
fn buffer() -> Result<(Memory, Buffer)> {
    let memory = Memory::small_pages(12 * PAGE)?;
    let ranges: Vec<_> = (0..6)
        .map(|piece| memory.part((10 - 2 * piece) * PAGE, PAGE))
        .collect();
    let buffer = Device::open()?.create(&ranges).context("create")?;
    Ok((memory, buffer))
}

fn attach(buffer: &Buffer, coherent: bool) -> Result<Importer> {
    Importer::attach_coherent(buffer.as_fd(), coherent).context("attaching a device")
}

/// What calls do to caches: (physical address, length) of what they write back, and of what they drop.
#[derive(Debug, PartialEq, Eq)]
struct Effect {
    cleaned: Vec<(u64, u64)>,
    dropped: Vec<(u64, u64)>,
}

impl Effect {
    /// On arm64: before a transfer, everything is written back; after one, what the device may have written is
    /// dropped.
    fn of(syncs: &[uapi::Sync]) -> Self {
        let ranges = |wanted: &dyn Fn(&uapi::Sync) -> bool| {
            let chosen = syncs.iter().filter(|sync| wanted(sync));
            let mut ranges: Vec<_> = chosen.map(|sync| (sync.addr, sync.len)).collect();
            ranges.sort_unstable();
            ranges
        };
        Self {
            cleaned: ranges(&|sync| sync.for_cpu == 0),
            dropped: ranges(&|sync| sync.for_cpu == 1 && sync.direction != uapi::TO_DEVICE),
        }
    }

    /// What is expected, of this memory.
    fn expected(memory: &[(u64, u64)], clean: bool, drop: bool) -> Self {
        let whole = |wanted| if wanted { memory.to_vec() } else { Vec::new() };
        Self {
            cleaned: whole(clean),
            dropped: whole(drop),
        }
    }
}

/// The memory of a mapping, whose device addresses are physical ones.
fn memory_of(device: &Importer, mapping: pinbuf_test_importer::Mapping) -> Result<Vec<(u64, u64)>> {
    let entries = device.entries(mapping).context("the scatterlist")?;
    let mut ranges: Vec<_> = entries
        .iter()
        .map(|entry| (entry.addr, entry.len))
        .collect();
    check_eq!(
        ranges.iter().map(|(_, len)| len).sum::<u64>(),
        6 * PAGE as u64,
        "bytes of the scatterlist"
    );
    ranges.sort_unstable();
    Ok(ranges)
}

fn map_and_unmap() -> Result<()> {
    let (_memory, buffer) = buffer()?;
    let device = attach(&buffer, false)?;
    for direction in DIRECTIONS {
        let (mapped, syncs) = device.syncs_during(|| device.map(direction))?;
        let (mapping, _) = mapped.context("map")?;
        let memory = memory_of(&device, mapping)?;
        check_eq!(
            Effect::of(&syncs),
            Effect::expected(&memory, true, false),
            "what mapping for {direction:?} does to caches"
        );
        let (unmapped, syncs) = device.syncs_during(|| device.unmap(mapping))?;
        unmapped.context("unmap")?;
        check_eq!(
            Effect::of(&syncs),
            Effect::expected(&memory, false, direction != Direction::ToDevice),
            "what unmapping from {direction:?} does to caches"
        );
    }
    Ok(())
}

/// Whether what an access begins with has to drop what caches hold: where the device may have written. An access that
/// only writes may write parts of lines.
fn drops(direction: Direction) -> bool {
    direction != Direction::ToDevice
}

/// Whether what an access ends with has to write caches back: where the device reads what the CPU wrote; and where it
/// writes, so that no line that the CPU changed is written back later, over what the device wrote.
fn cleans(direction: Direction, access: u64) -> bool {
    direction != Direction::ToDevice || access & WRITE != 0
}

fn cpu_access() -> Result<()> {
    let (_memory, buffer) = buffer()?;
    let device = attach(&buffer, false)?;
    for direction in DIRECTIONS {
        let (mapping, _) = device.map(direction).context("map")?;
        let memory = memory_of(&device, mapping)?;
        for access in ACCESSES {
            let (begun, syncs) = device.syncs_during(|| sync_raw(&buffer, access))?;
            begun.context("begin")?;
            check_eq!(
                Effect::of(&syncs),
                Effect::expected(&memory, false, drops(direction)),
                "what the begin of access {access} does, mapped for {direction:?}"
            );
            let (ended, syncs) = device.syncs_during(|| sync_raw(&buffer, access | END))?;
            ended.context("end")?;
            check_eq!(
                Effect::of(&syncs),
                Effect::expected(&memory, cleans(direction, access), false),
                "what the end of access {access} does, mapped for {direction:?}"
            );
        }
        device.unmap(mapping).context("unmap")?;
    }
    let (ended, syncs) = device.syncs_during(|| sync_raw(&buffer, READ | WRITE))?;
    ended.context("begin")?;
    check_eq!(syncs, vec![], "calls without any mapping");
    sync_raw(&buffer, READ | WRITE | END).context("end")
}

/// Each attachment is maintained for itself: one device's direction, or coherency, says nothing of another's.
fn several_attachments() -> Result<()> {
    let (_memory, buffer) = buffer()?;
    let reads = attach(&buffer, false)?;
    let writes = attach(&buffer, false)?;
    let coherent = attach(&buffer, true)?;
    let (mapping, _) = reads.map(Direction::ToDevice).context("map")?;
    writes.map(Direction::FromDevice).context("map")?;
    coherent.map(Direction::Bidirectional).context("map")?;
    let memory = memory_of(&reads, mapping)?;
    let twice: Vec<_> = memory.iter().flat_map(|&range| [range, range]).collect();
    for (access, cleaned) in [(READ, &memory), (WRITE, &twice), (READ | WRITE, &twice)] {
        let (begun, syncs) = reads.syncs_during(|| sync_raw(&buffer, access))?;
        begun.context("begin")?;
        check_eq!(
            Effect::of(&syncs),
            Effect::expected(&memory, false, true),
            "what the begin of access {access} does"
        );
        let (ended, syncs) = reads.syncs_during(|| sync_raw(&buffer, access | END))?;
        ended.context("end")?;
        check_eq!(
            Effect::of(&syncs),
            Effect::expected(cleaned, true, false),
            "what the end of access {access} does"
        );
    }
    Ok(())
}

fn coherent_devices() -> Result<()> {
    let (_memory, buffer) = buffer()?;
    let device = attach(&buffer, true)?;
    for direction in DIRECTIONS {
        let whole = || -> Result<()> {
            let (mapping, _) = device.map(direction).context("map")?;
            for access in ACCESSES {
                sync_raw(&buffer, access).context("begin")?;
                sync_raw(&buffer, access | END).context("end")?;
            }
            device.unmap(mapping).context("unmap").map(drop)
        };
        let (done, syncs) = device.syncs_during(whole)?;
        done?;
        check_eq!(syncs, vec![], "calls for {direction:?}");
    }
    Ok(())
}
