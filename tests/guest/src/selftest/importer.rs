// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that import a buffer: what they are given, and that they and the CPU see the same.
//!
//! These also run with `swiotlb=force`, where a device sees a copy of the memory that only
//! synchronization brings up to date.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{pin_cost, Direction, Importer, Limits, Mapping};
use pinbuf_uapi::Range;

use pinbuf_test_harness::support::device::sync_raw;
use pinbuf_test_harness::support::frames;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{pattern, stamp, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{Child, Link, PATIENCE};
use pinbuf_test_harness::support::view::{
    agree, agree_sampled, holds, same, DeviceView, KernelView, Mapped, Source, View,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Sync};
use pinbuf_test_harness::tests;

tests! { "importer":
    device_reads,
    device_writes,
    both_ways_scattered,
    entries_are_extents,
    segment_limits,
    segment_limits_scattered,
    boundaries,
    too_small,
    narrow_addresses,
    two_at_once,
    two_mappings_of_one,
    two_writers_in_turn,
    a_second_writer,
    a_second_writer_of_memory_beyond,
    a_second_writer_of_memory_partly_beyond,
    a_reader_that_goes_changes_nothing,
    a_refused_writer_changes_nothing,
    cpu_writes_while_a_device_maps within 120,
    cpu_writes_while_a_device_unmaps within 120,
    cpu_reads_while_a_device_unmaps within 120,
    cpu_writes_beside_a_device_that_writes,
    a_refused_writer_loses_nothing_of_anothers,
    a_read_keeps_what_a_device_writes,
    many_at_once,
    concurrent_maps within 120,
    map_while_mapped_by_cpu,
    kernel_mapping,
    kernel_mapping_counts,
    kernel_mapping_large,
    kernel_access,
    sync_modes,
    sync_without_devices,
    sync_from_many_threads,
    unmap_in_any_order,
    closed_while_mapped,
    exit_with_live_importer,
    killed_importer,
    cost_of_bare_pins,
}

const DIRECTIONS: [Direction; 3] = [
    Direction::Bidirectional,
    Direction::ToDevice,
    Direction::FromDevice,
];

/// A device that has mapped a buffer.
fn mapped(buffer: &Buffer, limits: Limits, direction: Direction) -> Result<(Importer, Mapping)> {
    let importer = Importer::attach(buffer.as_fd(), limits).context("attaching")?;
    let mapping = importer.map(direction).context("mapping for the device")?.0;
    Ok((importer, mapping))
}

/// Pages of some memory, in an order in which no two are adjacent.
fn scattered(memory: &Memory) -> Vec<Range> {
    (0..memory.len() / PAGE)
        .rev()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect()
}

/// What the CPU wrote before and after mapping reaches a device that reads.
fn device_reads() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(20 * PAGE)?;
    memory.write(0, &pattern(1, 0, 20 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    for direction in [Direction::ToDevice, Direction::Bidirectional] {
        memory.write(0, &pattern(1, 0, 20 * PAGE));
        let (importer, mapping) = mapped(&buffer, Limits::NONE, direction)?;
        let view = DeviceView::of(&importer, mapping);
        holds(&view, 1, 0, 20 * PAGE).context("written before it was mapped")?;
        let source = Source::whole(&buffer, &memory);
        source.write(0, &pattern(2, 0, 20 * PAGE))?;
        holds(&view, 2, 0, 20 * PAGE).context("written while it was mapped")?;
        let cpu = buffer.map()?;
        let cpu = Mapped::of(&buffer, &cpu);
        cpu.write(0, &pattern(3, 0, 20 * PAGE))?;
        holds(&view, 3, 0, 20 * PAGE).context("written through the dma-buf's mapping")?;
        // Announced as a write of everything.
        buffer.synced(Sync::Write, || memory.write(0, &pattern(4, 0, 20 * PAGE)))?;
        holds(&view, 4, 0, 20 * PAGE).context("written in a bracket for writing only")?;
    }
    Ok(())
}

/// What a device writes reaches the CPU, after a bracket or after it was unmapped.
fn device_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(20 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let cpu = buffer.map()?;
    for direction in [Direction::FromDevice, Direction::Bidirectional] {
        let (importer, mapping) = mapped(&buffer, Limits::NONE, direction)?;
        importer.write(mapping, 0, &pattern(5, 0, 20 * PAGE))?;
        holds(&Source::whole(&buffer, &memory), 5, 0, 20 * PAGE)?;
        holds(&Mapped::of(&buffer, &cpu), 5, 0, 20 * PAGE)?;
        importer.write(mapping, 0, &pattern(6, 0, 20 * PAGE))?;
        importer.unmap(mapping)?;
        let mut seen = vec![0; 20 * PAGE];
        memory.read(0, &mut seen);
        same(
            "the memory after unmapping",
            0,
            &seen,
            &pattern(6, 0, 20 * PAGE),
        )?;
    }
    Ok(())
}

fn both_ways_scattered() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(300 * PAGE)?;
    let buffer = device.create(&scattered(&memory))?;
    let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::Bidirectional)?;
    importer.vmap()?;
    let pieces = (0..300)
        .rev()
        .map(|page| (&memory, page * PAGE, PAGE))
        .collect();
    let source = Source {
        buffer: &buffer,
        pieces,
    };
    let cpu = buffer.map()?;
    let cpu = Mapped::of(&buffer, &cpu);
    let view = DeviceView::of(&importer, mapping);
    agree(&[&source, &cpu, &view, &KernelView(&importer)], 300 * PAGE)
}

/// The longest segment that a device with this limit may be given.
fn longest(importer: &Importer, limit: u32) -> u64 {
    let limit = if limit == 0 {
        64 << 10
    } else {
        u64::from(limit)
    };
    limit.min(importer.max_mapping()) / PAGE as u64 * PAGE as u64
}

/// A device without limits gets one entry for each extent.
fn entries_are_extents() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(500 * PAGE)?;
    for ranges in [
        vec![memory.range()],
        scattered(&memory),
        vec![memory.part(7 * PAGE, PAGE); 9],
    ] {
        let buffer = device.create(&ranges)?;
        let info = device.describe(&buffer)?;
        let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
        let report = importer.report(mapping)?;
        check_eq!(report.total, info.bytes, "bytes of all entries");
        check_eq!(report.align % PAGE as u64, 0, "alignment of the entries");
        check!(
            report.max_len <= longest(&importer, u32::MAX),
            "an entry of {}",
            report.max_len
        );
        if !kernel::bounces_always()? {
            check_eq!(report.count, info.extents, "entries and extents");
            check_eq!(report.adjacent, 0, "entries that could have been one");
        }
    }
    Ok(())
}

/// One extent is cut as the device needs it.
fn segment_limits() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, RW, flags, None, 0)?;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(device.describe(&buffer)?.extents, 1, "extents");
    let source = Source::whole(&buffer, &memory);
    for limit in [
        0,
        PAGE as u32,
        2 * PAGE as u32,
        3 * PAGE as u32,
        16 * PAGE as u32,
        1 << 20,
        (1 << 20) + PAGE as u32,
        HUGE as u32,
        u32::MAX,
    ] {
        let limits = Limits {
            mask_bits: 64,
            max_segment: limit,
        };
        let (importer, mapping) = mapped(&buffer, limits, Direction::Bidirectional)?;
        let longest = longest(&importer, limit).min(HUGE as u64);
        let entries = importer.entries(mapping)?;
        let expected = (HUGE as u64).div_ceil(longest);
        check_eq!(
            entries.len() as u64,
            expected,
            "entries with segments up to {limit}"
        );
        check_eq!(
            entries.iter().map(|entry| entry.len).sum::<u64>(),
            HUGE as u64,
            "bytes"
        );
        for (index, entry) in entries.iter().enumerate() {
            check!(
                entry.len <= longest && entry.len % PAGE as u64 == 0,
                "entry {index} has {} bytes; at most {longest}",
                entry.len
            );
        }
        let view = DeviceView::of(&importer, mapping);
        agree_sampled(&[&source, &view], HUGE, 67)
            .with_context(|| format!("with segments up to {limit}"))?;
    }
    Ok(())
}

/// Limits that are no multiple of the page do not make entries that are none.
fn segment_limits_scattered() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(200 * PAGE)?;
    let buffer = device.create(&[memory.range(), memory.part(0, 100 * PAGE)])?;
    let page = PAGE as u32;
    for limit in [page + 904, 2 * page + 1808, 16 * page - 1, 17 * page + 369] {
        let limits = Limits {
            mask_bits: 64,
            max_segment: limit,
        };
        let (importer, mapping) = mapped(&buffer, limits, Direction::ToDevice)?;
        let report = importer.report(mapping)?;
        check_eq!(
            report.total,
            300 * PAGE as u64,
            "bytes with segments up to {limit}"
        );
        check_eq!(
            report.align % PAGE as u64,
            0,
            "alignment with segments up to {limit}"
        );
        check!(
            report.max_len <= u64::from(limit),
            "an entry of {} bytes",
            report.max_len
        );
    }
    Ok(())
}

/// No entry crosses a boundary, which may be as near as the next page.
fn boundaries() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, RW, flags, None, 0)?;
    let (first, len) = (3 * PAGE, 100 * PAGE);
    let buffer = device.create(&[memory.part(first, len)])?;
    check_eq!(device.describe(&buffer)?.extents, 1, "extents");
    let source = Source {
        buffer: &buffer,
        pieces: vec![(&memory, first, len)],
    };
    for (mask, max_segment) in [
        (PAGE as u64 - 1, u32::MAX),
        (PAGE as u64 - 1, 0),
        (2 * PAGE as u64 - 1, u32::MAX),
        (16 * PAGE as u64 - 1, u32::MAX),
        (16 * PAGE as u64 - 1, 3 * PAGE as u32),
        (0xf_ffff, u32::MAX),
        (u64::from(u32::MAX), u32::MAX),
    ] {
        let what = format!("a boundary mask of {mask:#x}, segments up to {max_segment}");
        let limits = Limits {
            mask_bits: 64,
            max_segment,
        };
        let importer = Importer::attach_bounded(buffer.as_fd(), limits, mask)?;
        let mapping = importer
            .map(Direction::Bidirectional)
            .context(what.clone())?
            .0;
        let entries = importer.entries(mapping)?;
        let sum: u64 = entries.iter().map(|entry| entry.len).sum();
        check_eq!(sum, len as u64, "bytes with {what}");
        let longest = longest(&importer, max_segment);
        for (index, entry) in entries.iter().enumerate() {
            check!(
                entry.len > 0
                    && entry.len <= longest
                    && (entry.addr | entry.len) % PAGE as u64 == 0,
                "{entry:x?} with {what}"
            );
            check_eq!(
                entry.addr & !mask,
                (entry.addr + entry.len - 1) & !mask,
                "on which side entry {index} ends with {what}"
            );
        }
        if mask == 0xfff {
            check_eq!(entries.len(), len / PAGE, "entries with {what}");
        }
        if !kernel::bounces_always()? {
            // No more than it takes.
            for pair in entries.windows(2) {
                let [one, next] = pair else { continue };
                let joined = one.len + next.len;
                let crosses = (one.addr ^ (next.addr + next.len - 1)) & !mask != 0;
                check!(
                    joined > longest || crosses || one.len == longest,
                    "{one:x?} and {next:x?} could be one with {what}"
                );
            }
        }
        let view = DeviceView::of(&importer, mapping);
        agree_sampled(&[&source, &view], len, 41).context(what)?;
    }
    Ok(())
}

/// A device that takes less than a page in one piece is refused: entries are whole pages.
fn too_small() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    for (mask, max_segment) in [
        (0, 512),
        (0, 4095),
        (0x7ff, u32::MAX),
        (0x1ff, 0),
        (0x7ff, 2048),
    ] {
        let limits = Limits {
            mask_bits: 64,
            max_segment,
        };
        let importer = Importer::attach_bounded(buffer.as_fd(), limits, mask)?;
        for direction in DIRECTIONS {
            let error = importer.map(direction).err();
            check_eq!(
                error.and_then(|error| error.raw_os_error()),
                Some(libc::EINVAL),
                "a boundary mask of {mask:#x}, segments up to {max_segment}"
            );
        }
        check_eq!(device.describe(&buffer)?.mappings, 0, "mappings");
    }
    Ok(())
}

/// A device that reaches only the first 4 GiB: the memory beyond is bounced.
fn narrow_addresses() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(64 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let source = Source::whole(&buffer, &memory);
    let mut lies_beyond = false;
    for mask_bits in [64, 36, 32] {
        let limits = Limits {
            mask_bits,
            max_segment: 0,
        };
        let slots = kernel::bounce_slots()?;
        let (importer, mapping) = mapped(&buffer, limits, Direction::Bidirectional)?;
        for entry in importer.entries(mapping)? {
            let last = u128::from(entry.addr) + u128::from(entry.len);
            check!(
                last <= 1 << mask_bits,
                "{last:#x} is beyond {mask_bits} bits"
            );
            lies_beyond |= last > 1 << 32;
        }
        if mask_bits == 32 && lies_beyond {
            check!(kernel::bounce_slots()? > slots, "nothing was bounced");
        }
        let view = DeviceView::of(&importer, mapping);
        agree_sampled(&[&source, &view], memory.len(), 37)
            .with_context(|| format!("with addresses of {mask_bits} bits"))?;
    }
    Ok(())
}

/// A device that writes, and another that reads what it wrote.
fn two_at_once() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(50 * PAGE)?;
    memory.write(0, &pattern(1, 0, 50 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let source = Source::whole(&buffer, &memory);
    let limits = Limits {
        mask_bits: 64,
        max_segment: 2 * PAGE as u32,
    };
    let (writer, written) = mapped(&buffer, limits, Direction::FromDevice)?;
    let (reader, read) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
    check_eq!(device.describe(&buffer)?.mappings, 2, "devices' mappings");
    let reader_view = DeviceView::of(&reader, read);
    for seed in 10..14 {
        writer.write(written, 0, &pattern(seed, 0, 50 * PAGE))?;
        // An access of the CPU brings it to the reader, too.
        let mut seen = vec![0; 50 * PAGE];
        buffer.synced(Sync::ReadWrite, || memory.read(0, &mut seen))?;
        same("the memory", 0, &seen, &pattern(seed, 0, 50 * PAGE))?;
        holds(&reader_view, seed, 0, 50 * PAGE)?;
    }
    // Whichever ends first, the other one continues.
    writer.unmap(written)?;
    source.write(0, &pattern(20, 0, 50 * PAGE))?;
    holds(&reader_view, 20, 0, 50 * PAGE)?;
    let written = writer.map(Direction::FromDevice)?.0;
    drop(reader);
    writer.write(written, 0, &pattern(21, 0, 50 * PAGE))?;
    holds(&source, 21, 0, 50 * PAGE)
}

/// Each map call has a table and a direction of its own.
fn two_mappings_of_one() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(10 * PAGE)?;
    memory.write(0, &pattern(30, 0, 10 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let read = importer.map(Direction::ToDevice)?.0;
    let write = importer.map(Direction::FromDevice)?.0;
    holds(&DeviceView::of(&importer, read), 30, 0, 10 * PAGE)?;
    importer.write(write, 0, &pattern(31, 0, 10 * PAGE))?;
    let mut seen = vec![0; 10 * PAGE];
    buffer.synced(Sync::ReadWrite, || memory.read(0, &mut seen))?;
    same("the memory", 0, &seen, &pattern(31, 0, 10 * PAGE))?;
    holds(&DeviceView::of(&importer, read), 31, 0, 10 * PAGE)?;
    importer.unmap(write)?;
    holds(&DeviceView::of(&importer, read), 31, 0, 10 * PAGE)
}

/// Two devices that both write, one after the other.
fn two_writers_in_turn() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    for seed in 40..46 {
        let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::FromDevice)?;
        importer.write(mapping, 0, &pattern(seed, 0, 8 * PAGE))?;
        drop(importer);
        let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
        holds(&DeviceView::of(&importer, mapping), seed, 0, 8 * PAGE)?;
    }
    Ok(())
}

/// Whether another mapping excludes this one.
fn is_busy(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Expects that a device may not map the buffer for now, and that nothing is left of it.
fn is_refused(buffer: &Buffer, limits: Limits, direction: Direction) -> Result<()> {
    let device = Device::open()?;
    let (mappings, slots) = (device.describe(buffer)?.mappings, kernel::bounce_slots()?);
    let importer = Importer::attach(buffer.as_fd(), limits)?;
    match importer.map(direction) {
        Ok(_) => check!(false, "{limits:?} may write in the direction {direction:?}"),
        Err(error) => check!(is_busy(&error), "{direction:?}: {error}"),
    }
    check_eq!(device.describe(buffer)?.mappings, mappings, "mappings");
    check_eq!(kernel::bounce_slots()?, slots, "bounce buffers in use");
    Ok(())
}

const WRITES: [Direction; 2] = [Direction::FromDevice, Direction::Bidirectional];

/// Where devices see copies, one of several that write would lose what it wrote: there may be only one.
fn a_second_writer() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(70, 0, 8 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    for first in WRITES {
        let (writer, written) = mapped(&buffer, Limits::NONE, first)?;
        if !kernel::bounces_always()? {
            for second in WRITES {
                drop(mapped(&buffer, Limits::NONE, second)?);
                // Also the same device again.
                let again = writer.map(second)?.0;
                writer.unmap(again)?;
            }
            continue;
        }
        for second in WRITES {
            is_refused(&buffer, Limits::NONE, second).with_context(|| format!("{first:?}"))?;
            let again = writer.map(second).map(drop);
            check!(
                again.as_ref().is_err_and(is_busy),
                "the same device, {second:?}: {again:?}"
            );
        }
        // Those that only read are accepted, and see what it writes.
        let (reader, read) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
        writer.write(written, 0, &pattern(71, 0, 8 * PAGE))?;
        buffer.synced(Sync::ReadWrite, || ())?;
        let view = DeviceView::of(&reader, read);
        holds(&view, 71, 0, 8 * PAGE)?;
        // When it has ended, another one may map.
        writer.unmap(written)?;
        for second in WRITES {
            let (next, mapping) = mapped(&buffer, Limits::NONE, second)?;
            next.write(mapping, 0, &pattern(72, 0, 8 * PAGE))?;
            holds(&Source::whole(&buffer, &memory), 72, 0, 8 * PAGE)?;
        }
        drop(reader);
    }
    Ok(())
}

/// Some memory beyond the first 4 GiB, if the machine has any.
fn memory_beyond(pages: usize) -> Result<Option<(Memory, Vec<Range>)>> {
    let memory = Memory::small_pages(512 << 20)?;
    let mut ranges = Vec::new();
    for page in 0..memory.len() / PAGE {
        memory.set(page * PAGE, 1);
        if frames::frames(&memory, page * PAGE, PAGE)?[0] >= (4 << 30) / PAGE as u64 {
            ranges.push(memory.part(page * PAGE, PAGE));
            if ranges.len() == pages {
                return Ok(Some((memory, ranges)));
            }
        }
    }
    Ok(None)
}

/// Memory of which a device with 32-bit addresses has copies, page by page.
pub fn memory_to_bounce(pages: usize) -> Result<(Memory, Vec<Range>)> {
    if kernel::bounces_always()? {
        let memory = Memory::small_pages(pages * PAGE)?;
        let ranges = scattered(&memory);
        return Ok((memory, ranges));
    }
    memory_beyond(pages)?.context("no memory beyond 4 GiB: boot with 5G")
}

/// One device has copies because it does not reach the memory, the other one has the memory: it is
/// the same, whichever comes first.
fn a_second_writer_of_memory_beyond() -> Result<()> {
    if kernel::bounces_always()? {
        // Both of them.
        return Ok(());
    }
    let Some((_memory, ranges)) = memory_beyond(8)? else {
        bail!("no memory beyond 4 GiB: boot with 5G");
    };
    let device = Device::open()?;
    let buffer = device.create(&ranges)?;
    let narrow = Limits {
        mask_bits: 32,
        max_segment: 0,
    };
    for (first, second) in [(narrow, Limits::NONE), (Limits::NONE, narrow)] {
        for direction in WRITES {
            let (writer, written) = mapped(&buffer, first, direction)?;
            for other in WRITES {
                is_refused(&buffer, second, other)?;
            }
            let (reader, read) = mapped(&buffer, second, Direction::ToDevice)?;
            writer.write(written, 0, &pattern(73, 0, 8 * PAGE))?;
            buffer.synced(Sync::ReadWrite, || ())?;
            let view = DeviceView::of(&reader, read);
            holds(&view, 73, 0, 8 * PAGE)?;
        }
    }
    Ok(())
}

/// The same where a device reaches most of the memory: one page has a copy, and it is not the first one.
fn a_second_writer_of_memory_partly_beyond() -> Result<()> {
    if kernel::bounces_always()? {
        return Ok(());
    }
    let Some((_memory, beyond)) = memory_beyond(1)? else {
        bail!("no memory beyond 4 GiB: boot with 5G");
    };
    // The kernel takes memory above 4 GiB first; a page of what is below is asked for by a device's width.
    let Some(below) = memory_below()? else {
        bail!("no memory below 4 GiB");
    };
    let narrow = Limits {
        mask_bits: 32,
        max_segment: 0,
    };
    let device = Device::open()?;
    for ranges in [[below.range(), beyond[0]], [beyond[0], below.range()]] {
        let buffer = device.create(&ranges)?;
        let (_writer, _written) = mapped(&buffer, narrow, Direction::FromDevice)?;
        is_refused(&buffer, Limits::NONE, Direction::FromDevice)?;
        is_refused(&buffer, Limits::NONE, Direction::Bidirectional)?;
    }
    Ok(())
}

/// A page below 4 GiB.
fn memory_below() -> Result<Option<Memory>> {
    // Pages that were allocated meanwhile stay allocated, so that the next page is another one. There may be
    // gigabytes of them: huge pages, where there are any, take a fraction of the time.
    const STEP: usize = if HUGE > 16 << 20 { HUGE } else { 16 << 20 };
    let mut others = Vec::new();
    while kernel::available()? > 512 << 20 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = Memory::map_aligned(STEP, HUGE, RW, flags, None, 0)?;
        if kernel::has_transparent_huge_pages() {
            memory.advise(0, STEP, libc::MADV_HUGEPAGE)?;
        }
        memory.touch_to_write();
        let pfns = frames::all_frames(&memory)?;
        if let Some(page) = pfns.iter().position(|pfn| *pfn < 1 << 20) {
            let low = Memory::small_pages(PAGE)?;
            // The page itself moves into a mapping of its own.
            memory.move_part(page * PAGE, PAGE, &low, 0)?;
            return Ok(Some(low));
        }
        others.push(memory);
    }
    Ok(None)
}

/// The end of a mapping whose device only reads leaves the memory as it is: what another device has written
/// since is not in its copy.
fn a_reader_that_goes_changes_nothing() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    memory.write(0, &pattern(74, 0, 8 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let (reader, read) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
    let (writer, written) = mapped(&buffer, Limits::NONE, Direction::FromDevice)?;
    writer.write(written, 0, &pattern(75, 0, 8 * PAGE))?;
    writer.unmap(written)?;
    reader.unmap(read)?;
    holds(&Source::whole(&buffer, &memory), 75, 0, 8 * PAGE)
}

/// A map that is refused has no effect: while it is tried, a write of the CPU (or of a device that has the
/// memory itself) must not be overwritten by a copy of the earlier contents.
fn a_refused_writer_changes_nothing() -> Result<()> {
    if !kernel::bounces_always()? {
        return Ok(());
    }
    const LEN: usize = 1 << 20;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = device.create(&[memory.range()])?;
    let (_writer, _written) = mapped(&buffer, Limits::NONE, Direction::FromDevice)?;
    let over = AtomicBool::new(false);
    let lost = std::thread::scope(|scope| -> Result<u64> {
        let cpu = scope.spawn(|| {
            let (mut value, mut lost) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                value += 1;
                for offset in (0..LEN).step_by(PAGE) {
                    memory.set(offset, value);
                }
                std::thread::yield_now();
                for offset in (0..LEN).step_by(PAGE) {
                    lost += u64::from(memory.get(offset) != value);
                }
            }
            lost
        });
        let refused =
            (0..300).try_for_each(|round| is_refused(&buffer, Limits::NONE, WRITES[round % 2]));
        over.store(true, Ordering::Relaxed);
        let lost = cpu.join().expect("the thread panicked");
        refused.map(|()| lost)
    })?;
    check_eq!(lost, 0, "words that were written and lost");
    Ok(())
}

/// A device that has the memory itself writes to it, and continues while another one, which would have a copy,
/// tries to map it: no copy of the earlier contents overwrites that.
fn a_refused_writer_loses_nothing_of_anothers() -> Result<()> {
    const PAGES: usize = 512;
    if kernel::bounces_always()? {
        // Both would have copies.
        return Ok(());
    }
    let Some((memory, ranges)) = memory_beyond(PAGES)? else {
        bail!("no memory beyond 4 GiB: boot with 5G");
    };
    let device = Device::open()?;
    let buffer = device.create(&ranges)?;
    let last = (ranges[PAGES - 1].addr - memory.addr()) as usize;
    let narrow = Limits {
        mask_bits: 32,
        max_segment: 0,
    };
    let (writer, written) = mapped(&buffer, Limits::NONE, Direction::FromDevice)?;
    let other = Importer::attach(buffer.as_fd(), narrow)?;
    let start = Instant::now();
    is_refused(&buffer, narrow, Direction::Bidirectional)?;
    let time = start.elapsed();
    let write = |number: u64| {
        let place = ((PAGES - 1) * PAGE) as u64;
        Ok(writer.write(written, place, &number.to_ne_bytes())?)
    };
    with_cpu(at_once, write, |thread| {
        for round in 0..ACCESSES {
            let delay = time * round / ACCESSES;
            let refused = thread.meanwhile(delay, || other.map(WRITES[round as usize % 2]));
            check!(
                refused.as_ref().is_err_and(is_busy),
                "the other device: {refused:?}"
            );
            check_eq!(
                memory.get(last),
                u64::from(round) + 1,
                "what the device wrote while another one was refused, of {time:?}"
            );
        }
        Ok(())
    })
}

/// A thread that makes one access each time it is asked to, while the caller does something else.
struct Cpu {
    /// How many accesses were asked for, and how many were made.
    asked: AtomicU64,
    done: AtomicU64,
    /// How long it waits before an access, in nanoseconds.
    delay: AtomicU64,
    over: AtomicBool,
}

impl Cpu {
    fn serve(
        &self,
        ready: impl Fn() -> Result<()>,
        access: impl Fn(u64) -> Result<()>,
    ) -> Result<()> {
        let mut first_error = Ok(());
        for number in 1.. {
            while self.asked.load(Ordering::Acquire) < number {
                if self.over.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::yield_now();
            }
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            let result = ready().and_then(|()| {
                let start = Instant::now();
                let delay = Duration::from_nanos(self.delay.load(Ordering::Relaxed));
                while start.elapsed() < delay {
                    std::hint::spin_loop();
                }
                access(number)
            });
            self.done.store(number, Ordering::Release);
            first_error = first_error.and(result);
        }
        first_error
    }

    /// Asks for the next access, and does something else. Both are over when this returns.
    fn meanwhile<T>(&self, delay: Duration, action: impl FnOnce() -> T) -> T {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.delay.store(delay, Ordering::Relaxed);
        let number = self.asked.fetch_add(1, Ordering::Release) + 1;
        let result = action();
        while self.done.load(Ordering::Acquire) < number {
            std::thread::yield_now();
        }
        result
    }
}

/// Runs `rounds` with a thread that makes the access whenever that asks for it: some time after
/// `ready` has returned.
fn with_cpu(
    ready: impl Fn() -> Result<()> + Send,
    access: impl Fn(u64) -> Result<()> + Send,
    rounds: impl FnOnce(&Cpu) -> Result<()>,
) -> Result<()> {
    let cpu = Cpu {
        asked: AtomicU64::new(0),
        done: AtomicU64::new(0),
        delay: AtomicU64::new(0),
        over: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| cpu.serve(ready, access));
        let result = rounds(&cpu);
        cpu.over.store(true, Ordering::Relaxed);
        thread.join().expect("the thread panicked").and(result)
    })
}

/// Large enough for a map or an unmap that bounces to take a while. Where nothing is bounced, no size is.
fn slow() -> Result<usize> {
    Ok(if kernel::bounces_always()? {
        4 << 20
    } else {
        64 * PAGE
    })
}

/// Places that are copied first, in the middle, and last.
fn places(len: usize) -> [usize; 3] {
    [0, len / 2, len - 8]
}

/// Accesses to each place, spread over the time that the map or the unmap takes.
const ACCESSES: u32 = 24;

/// The accesses that are made: where nothing is bounced, there is nothing to be lost.
fn accesses() -> Result<u32> {
    Ok(if kernel::bounces_always()? {
        ACCESSES
    } else {
        2
    })
}

/// The median of a few.
fn typical(mut take: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let mut times = (0..5).map(|_| take()).collect::<Result<Vec<_>>>()?;
    times.sort();
    Ok(times[2])
}

fn at_once() -> Result<()> {
    Ok(())
}

/// A word as a device sees it.
fn word(importer: &Importer, mapping: Mapping, place: usize) -> Result<u64> {
    let mut word = [0; 8];
    importer.read(mapping, place as u64, &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

/// What the CPU writes while a device maps, the device sees when both are done.
fn cpu_writes_while_a_device_maps() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(slow()?)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    for direction in [Direction::Bidirectional, Direction::ToDevice] {
        let time = typical(|| {
            let (mapping, time) = importer.map(direction)?;
            importer.unmap(mapping)?;
            Ok(time)
        })?;
        for place in places(memory.len()) {
            let access = |number| buffer.synced(Sync::ReadWrite, || memory.set(place, number));
            with_cpu(at_once, access, |cpu| {
                for round in 0..accesses()? {
                    let map = || importer.map(direction);
                    let mapping = cpu.meanwhile(time * round / ACCESSES, map)?.0;
                    let seen = word(&importer, mapping, place)?;
                    importer.unmap(mapping)?;
                    check_eq!(
                        seen,
                        u64::from(round) + 1,
                        "what the device sees at {place:#x}, {direction:?}, of {time:?}"
                    );
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// What the CPU writes while a device unmaps stays.
///
/// The access begins after the unmap has begun. An unmap in the middle of an access is not covered: it
/// writes back a copy that was made before.
fn cpu_writes_while_a_device_unmaps() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(slow()?)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    // The bounce buffers that are in use when a part of the mapping's have been given back, which
    // shows that the unmap has begun.
    let fewer = AtomicI64::new(0);
    let bounces = kernel::bounces_always()?;
    let begun = || {
        let start = Instant::now();
        while bounces && kernel::bounce_slots()? > fewer.load(Ordering::Relaxed) {
            check!(start.elapsed() < PATIENCE, "no bounce buffer is given back");
        }
        Ok(())
    };
    for direction in WRITES {
        let map = || importer.map(direction);
        let time = typical(|| Ok(importer.unmap(map()?.0)?))?;
        for place in places(memory.len()) {
            let access = |number| buffer.synced(Sync::ReadWrite, || memory.set(place, number));
            with_cpu(begun, access, |cpu| {
                for round in 0..accesses()? {
                    let before = kernel::bounce_slots()?;
                    let mapping = map()?.0;
                    let slots = kernel::bounce_slots()?;
                    fewer.store(slots - (slots - before) / 8, Ordering::Relaxed);
                    let unmap = || importer.unmap(mapping);
                    cpu.meanwhile(time * round / ACCESSES, unmap)?;
                    check_eq!(
                        memory.get(place),
                        u64::from(round) + 1,
                        "what the CPU wrote at {place:#x}, {direction:?}, of {time:?}"
                    );
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// What a device has written, the CPU sees at any time while the device unmaps.
fn cpu_reads_while_a_device_unmaps() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(slow()?)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    for direction in WRITES {
        let map = || importer.map(direction);
        let time = typical(|| Ok(importer.unmap(map()?.0)?))?;
        for place in places(memory.len()) {
            memory.set(place, 0);
            let access = |number| {
                let seen = buffer.synced(Sync::Read, || memory.get(place))?;
                check_eq!(
                    seen,
                    number,
                    "what the CPU sees at {place:#x}, {direction:?}, of {time:?}"
                );
                Ok(())
            };
            with_cpu(at_once, access, |cpu| {
                for round in 0..accesses()? {
                    let mapping = map()?.0;
                    let value = (u64::from(round) + 1).to_ne_bytes();
                    importer.write(mapping, place as u64, &value)?;
                    let unmap = || importer.unmap(mapping);
                    cpu.meanwhile(time * round / ACCESSES, unmap)?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// What the CPU writes beside what a device writes stays: when the CPU reads, and when the device
/// is gone.
fn cpu_writes_beside_a_device_that_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    for direction in WRITES {
        for sync in [Sync::Write, Sync::ReadWrite] {
            for kernel in [false, true] {
                let what = format!("{direction:?}, {sync:?}, by the kernel: {kernel}");
                memory.write(0, &pattern(120, 0, 8 * PAGE));
                let (importer, mapping) = mapped(&buffer, Limits::NONE, direction)?;
                importer.vmap()?;
                let access = if sync == Sync::Write {
                    Direction::ToDevice
                } else {
                    Direction::Bidirectional
                };
                // What nobody writes to, what the device writes to, and what the CPU writes to, in
                // each page, at a place that differs by the round.
                for round in 1..=4 {
                    let word = |page: usize, which: usize| page * PAGE + (round * 3 + which) * 8;
                    let (ours, its) = (round as u64, 1000 + round as u64);
                    for page in 0..8 {
                        let at = word(page, 0) as u64;
                        importer.write(mapping, at, &its.to_ne_bytes())?;
                    }
                    if kernel {
                        importer.begin_cpu_access(access)?;
                        for page in 0..8 {
                            importer.vmap_write(word(page, 1) as u64, &ours.to_ne_bytes())?;
                        }
                        importer.end_cpu_access(access)?;
                    } else {
                        buffer.synced(sync, || {
                            (0..8).for_each(|page| memory.set(word(page, 1), ours));
                        })?;
                    }
                    let look = || {
                        (0..8)
                            .map(|page| [0, 1, 2].map(|which| memory.get(word(page, which))))
                            .collect::<Vec<_>>()
                    };
                    let expected: Vec<_> = (0..8)
                        .map(|page| [its, ours, stamp(120, word(page, 2) as u64 / 8)])
                        .collect();
                    if round % 2 == 0 {
                        let seen = buffer.synced(Sync::Read, look)?;
                        check_eq!(seen, expected, "when the CPU reads, {what}");
                    }
                    if round == 4 {
                        importer.unmap(mapping)?;
                        check_eq!(look(), expected, "after it was unmapped, {what}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// While the CPU reads, a device writes. The end of the CPU's access does not restore the device's old bytes.
fn a_read_keeps_what_a_device_writes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(20 * PAGE)?;
    memory.write(0, &pattern(74, 0, 20 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    for direction in WRITES {
        let (writer, written) = mapped(&buffer, Limits::NONE, direction)?;
        let (_reader, _read) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
        let view = DeviceView::of(&writer, written);
        let source = Source::whole(&buffer, &memory);
        for seed in 75..79 {
            // A process's bracket, and the kernel's.
            buffer.synced(Sync::Read, || {
                writer.write(written, 0, &pattern(seed, 0, 20 * PAGE))
            })??;
            holds(&view, seed, 0, 20 * PAGE).context("as the device sees it")?;
            holds(&source, seed, 0, 20 * PAGE).context("as the CPU sees it")?;
            writer.begin_cpu_access(Direction::FromDevice)?;
            writer.write(written, 0, &pattern(seed + 10, 0, 20 * PAGE))?;
            writer.end_cpu_access(Direction::FromDevice)?;
            holds(&source, seed + 10, 0, 20 * PAGE).context("after the kernel read")?;
        }
    }
    Ok(())
}

fn many_at_once() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(16 * PAGE)?;
    memory.write(0, &pattern(50, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mut importers = Vec::new();
    for index in 0..24 {
        let max_segment = [0, PAGE as u32, 16 * PAGE as u32][index % 3];
        let limits = Limits {
            mask_bits: 64,
            max_segment,
        };
        importers.push(mapped(&buffer, limits, Direction::ToDevice)?);
    }
    check_eq!(device.describe(&buffer)?.mappings, 24, "devices' mappings");
    let source = Source::whole(&buffer, &memory);
    for round in 0..4 {
        source.write(0, &pattern(51 + round, 0, 16 * PAGE))?;
        for (importer, mapping) in &importers {
            let view = DeviceView::of(importer, *mapping);
            holds(&view, 51 + round, 0, 16 * PAGE)?;
        }
        // Every third one leaves.
        let mut index = 0;
        importers.retain(|_| {
            index += 1;
            index % 3 != 0
        });
        check_eq!(
            device.describe(&buffer)?.mappings as usize,
            importers.len(),
            "mappings"
        );
    }
    Ok(())
}

/// Devices come and go while the CPU synchronizes and another buffer's user faults pages in.
fn concurrent_maps() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(64 * PAGE)?;
    memory.write(0, &pattern(60, 0, 64 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let bounces = kernel::bounces_always()?;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let maps = (0..3).map(|thread| {
            let buffer = &buffer;
            scope.spawn(move || -> Result<()> {
                for round in 0..30 {
                    let direction = [Direction::ToDevice, Direction::Bidirectional][round % 2];
                    let limits = Limits {
                        mask_bits: 64,
                        max_segment: (PAGE as u32) << (thread * 2),
                    };
                    let importer = Importer::attach(buffer.as_fd(), limits)?;
                    let mapping = match importer.map(direction) {
                        Ok((mapping, _)) => mapping,
                        // Another of these threads' devices writes, and is bounced.
                        Err(error) if bounces && is_busy(&error) => continue,
                        Err(error) => return Err(error).context("mapping for the device"),
                    };
                    let mut seen = vec![0; PAGE];
                    importer.read(mapping, (round * PAGE) as u64, &mut seen)?;
                    same(
                        "a device",
                        0,
                        &seen,
                        &pattern(60, (round * PAGE) as u64, PAGE),
                    )?;
                    importer.unmap(mapping)?;
                }
                Ok(())
            })
        });
        let maps: Vec<_> = maps.collect();
        let syncs = scope.spawn(|| -> Result<()> {
            for _ in 0..150 {
                buffer.synced(Sync::Read, || ())?;
            }
            Ok(())
        });
        let faults = scope.spawn(|| -> Result<()> {
            for _ in 0..30 {
                buffer.map()?.touch();
            }
            Ok(())
        });
        maps.into_iter()
            .chain([syncs, faults])
            .map(|thread| thread.join().expect("a thread panicked"))
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    check_eq!(device.describe(&buffer)?.mappings, 0, "devices' mappings");
    Ok(())
}

/// The CPU's mapping and the devices' are independent.
fn map_while_mapped_by_cpu() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let cpu = buffer.map()?;
    cpu.touch();
    let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::Bidirectional)?;
    let view = DeviceView::of(&importer, mapping);
    agree(&[&Mapped::of(&buffer, &cpu), &view], 4 * PAGE)?;
    drop(cpu);
    agree(&[&Source::whole(&buffer, &memory), &view], 4 * PAGE)
}

/// The kernel's mapping of one extent, and of many.
fn kernel_mapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(40 * PAGE)?;
    for (ranges, order) in [
        (vec![memory.part(0, PAGE)], vec![0]),
        (scattered(&memory), (0..40).rev().collect::<Vec<_>>()),
        (vec![memory.part(3 * PAGE, PAGE); 3], vec![3, 3, 3]),
    ] {
        let buffer = device.create(&ranges)?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        importer.vmap()?;
        let view = KernelView(&importer);
        for (index, page) in order.iter().enumerate() {
            memory.write(page * PAGE, &pattern(70, (page * PAGE) as u64, PAGE));
            let mut seen = vec![0; PAGE];
            view.read(index * PAGE, &mut seen)?;
            same(
                "the kernel",
                index * PAGE,
                &seen,
                &pattern(70, (page * PAGE) as u64, PAGE),
            )?;
            view.write(index * PAGE, &pattern(71, 0, PAGE))?;
            memory.read(page * PAGE, &mut seen);
            same("the memory", page * PAGE, &seen, &pattern(71, 0, PAGE))?;
        }
        // Beyond the end there is nothing to read.
        let error = importer
            .vmap_read((order.len() * PAGE) as u64, &mut [0])
            .err();
        check_eq!(
            error.and_then(|e| e.raw_os_error()),
            Some(libc::ERANGE),
            "beyond the end"
        );
        importer.vunmap()?;
    }
    Ok(())
}

/// The mapping lives until its last user is gone, and can be made again.
fn kernel_mapping_counts() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(40 * PAGE)?;
    let buffer = device.create(&scattered(&memory))?;
    let first = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let second = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    for round in 0..5 {
        first.vmap()?;
        second.vmap()?;
        KernelView(&first).write(5, &pattern(80 + round, 5, 1000))?;
        first.vunmap()?;
        holds(&KernelView(&second), 80 + round, 5, 1000)?;
        second.vunmap()?;
    }
    Ok(())
}

fn kernel_mapping_large() -> Result<()> {
    const LEN: usize = 16 << 20;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = device.create(&scattered(&memory))?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    importer.vmap()?;
    let pieces = (0..LEN / PAGE)
        .rev()
        .map(|page| (&memory, page * PAGE, PAGE))
        .collect();
    let source = Source {
        buffer: &buffer,
        pieces,
    };
    agree_sampled(&[&source, &KernelView(&importer)], LEN, 301)
}

/// `begin_cpu_access` and `end_cpu_access` from inside the kernel, in every direction, with mappings
/// of every direction alive.
fn kernel_access() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let (importer, to_device) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
    for direction in DIRECTIONS {
        importer.begin_cpu_access(direction)?;
        importer.end_cpu_access(direction)?;
    }
    let (other, from_device) = mapped(&buffer, Limits::NONE, Direction::FromDevice)?;
    importer.vmap()?;
    other.write(from_device, 0, &pattern(90, 0, 4 * PAGE))?;
    importer.begin_cpu_access(Direction::Bidirectional)?;
    let mut seen = vec![0; 4 * PAGE];
    importer.vmap_read(0, &mut seen)?;
    same("the kernel's mapping", 0, &seen, &pattern(90, 0, 4 * PAGE))?;
    importer.end_cpu_access(Direction::Bidirectional)?;
    holds(&DeviceView::of(&importer, to_device), 90, 0, 4 * PAGE)
}

/// Every valid mode works with every set of mappings, and nothing else does.
fn sync_modes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    importer.map(Direction::ToDevice)?;
    for direction in DIRECTIONS {
        let mapping = importer.map(direction)?.0;
        for mode in [1, 2, 3] {
            for end in [0, 4] {
                check_eq!(
                    sync_raw(&buffer, mode | end),
                    Ok(()),
                    "mode {mode:#x}, end {end}"
                );
            }
        }
        importer.unmap(mapping)?;
    }
    for flags in [0, 4, 8, 16, 1 << 32, u64::MAX, 9] {
        let result = sync_raw(&buffer, flags);
        check_eq!(result, Err(Errno::EINVAL), "flags {flags:#x}");
    }
    Ok(())
}

fn sync_without_devices() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    for sync in [Sync::Read, Sync::Write, Sync::ReadWrite] {
        buffer.synced(sync, || memory.set(0, sync as u64))?;
        check_eq!(buffer.map()?.get(0), sync as u64, "what was written");
    }
    Ok(())
}

/// Brackets of several threads may interleave.
fn sync_from_many_threads() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (buffer, memory) = (&buffer, &memory);
                scope.spawn(move || -> Result<()> {
                    for round in 0..200 {
                        let write = || memory.set(thread * PAGE, round);
                        buffer.synced(Sync::ReadWrite, write)?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a thread panicked"))
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    buffer.synced(Sync::ReadWrite, || ())?;
    for thread in 0..4 {
        let mut seen = [0; 8];
        importer.read(mapping, (thread * PAGE) as u64, &mut seen)?;
        check_eq!(
            u64::from_ne_bytes(seen),
            199,
            "what thread {thread} wrote last"
        );
    }
    Ok(())
}

fn unmap_in_any_order() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let bounces = kernel::bounces_always()?;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let mut mappings = Vec::new();
        for index in 0..4 {
            let direction = match DIRECTIONS[index % 3] {
                // One mapping that writes is the maximum.
                _ if index > 0 && bounces => Direction::ToDevice,
                direction => direction,
            };
            mappings.push(importer.map(direction)?.0);
        }
        for (gone, index) in order.into_iter().enumerate() {
            importer.unmap(mappings[index])?;
            let left = device.describe(&buffer)?.mappings as usize;
            check_eq!(left, 3 - gone, "mappings after {} of {order:?}", gone + 1);
        }
    }
    importer.detach()?;
    let error = importer.map(Direction::ToDevice).err();
    check_eq!(
        error.and_then(|e| e.raw_os_error()),
        Some(libc::ENOTCONN),
        "map when detached"
    );
    Ok(())
}

/// A device keeps the buffer, when everything else of it is gone.
fn closed_while_mapped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(32 * PAGE)?;
    memory.write(0, &pattern(100, 0, 32 * PAGE));
    let pins = kernel::pins()?;
    let buffer = device.create(&[memory.range()])?;
    let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
    drop((buffer, memory, device));
    check_eq!(
        kernel::pins()?,
        pins + 32,
        "pages that the device keeps pinned"
    );
    let other = Memory::anonymous(32 * PAGE)?;
    other.write(0, &pattern(101, 0, 32 * PAGE));
    holds(&DeviceView::of(&importer, mapping), 100, 0, 32 * PAGE)?;
    drop(importer);
    check_eq!(
        kernel::pins()?,
        pins,
        "pinned pages when the device is gone, too"
    );
    Ok(())
}

/// The process that made the buffer has ended; a device, in another process, continues.
fn exit_with_live_importer() -> Result<()> {
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(32 * PAGE)?;
        memory.write(0, &pattern(110, 0, 32 * PAGE));
        let buffer = device.create(&scattered(&memory))?;
        let (importer, _) = mapped(&buffer, Limits::NONE, Direction::ToDevice)?;
        importer.vmap()?;
        link.theirs.send(importer.as_fd())
    })?;
    let importer = Importer::from_attached(link.ours.receive()?);
    child.join()?;
    // Memory that the child gave back would be used for this.
    let other = Memory::small_pages(256 * PAGE)?;
    other.write(0, &pattern(111, 0, 256 * PAGE));
    let mut seen = vec![0; PAGE];
    for page in 0..32 {
        importer.vmap_read((page * PAGE) as u64, &mut seen)?;
        let expected = pattern(110, ((31 - page) * PAGE) as u64, PAGE);
        same(
            "the buffer after its maker's exit",
            page * PAGE,
            &seen,
            &expected,
        )?;
    }
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.write(mapping, 0, &pattern(112, 0, 32 * PAGE))?;
    holds(&KernelView(&importer), 112, 0, 32 * PAGE)?;
    let mut seen = vec![0; 256 * PAGE];
    other.read(0, &mut seen);
    same("other memory", 0, &seen, &pattern(111, 0, 256 * PAGE))
}

/// A process that is killed takes its devices along.
fn killed_importer() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(8 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let (importer, _) = mapped(&buffer, Limits::NONE, Direction::Bidirectional)?;
        importer.vmap()?;
        link.theirs.signal()?;
        loop {
            std::thread::park();
        }
    })?;
    link.ours.wait()?;
    check_eq!(
        device.describe(&buffer)?.mappings,
        1,
        "mappings while it runs"
    );
    drop(child);
    check_eq!(
        device.describe(&buffer)?.mappings,
        0,
        "mappings after it was killed"
    );
    let (importer, mapping) = mapped(&buffer, Limits::NONE, Direction::Bidirectional)?;
    let view = DeviceView::of(&importer, mapping);
    agree(&[&Source::whole(&buffer, &memory), &view], 8 * PAGE)
}

/// The bare calls that benchmarks compare with leave nothing behind either.
fn cost_of_bare_pins() -> Result<()> {
    let memory = Memory::small_pages(2048 * PAGE)?;
    let pins = kernel::pins()?;
    for (stride, expected) in [(PAGE, 2048), (2 * PAGE, 1024), (512 * PAGE, 4)] {
        let cost = pin_cost(memory.addr(), memory.len() as u64, stride as u64)?;
        check_eq!(cost.pages, expected, "pages pinned, one in {stride} bytes");
        check!(
            !cost.pin.is_zero() && !cost.unpin.is_zero(),
            "times: {cost:?}"
        );
        check_eq!(kernel::pins()?, pins, "pinned pages afterwards");
    }
    memory.unmap(2047 * PAGE, PAGE)?;
    let error = pin_cost(memory.addr(), memory.len() as u64, PAGE as u64).err();
    check_eq!(
        error.and_then(|e| e.raw_os_error()),
        Some(libc::EFAULT),
        "with a hole"
    );
    check_eq!(kernel::pins()?, pins, "pinned pages after an error");
    Ok(())
}
