// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory types: all mappings of a buffer's memory, by processes and by the kernel, are cached as the direct map is. An
//! emulator has no caches, so the entries of the page tables are compared (x86), or what the processor says (arm64).

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use pinbuf_test_importer::uapi::NOT_MAPPED;
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "memory_types":
    page_entries,
    huge_entries,
}

/// Is this the type of ordinary memory, which is cached for reading and writing?
fn is_ordinary(attributes: u64) -> bool {
    if cfg!(target_arch = "aarch64") {
        // Neither device memory (0x0?) nor memory without caches.
        attributes != NOT_MAPPED && attributes & 0xf0 != 0 && attributes != 0x44
    } else {
        // Write-back.
        attributes == 0
    }
}

/// With arm64's memory tags, the direct map is of the type that has them, and caches alike.
fn without_tags(attributes: u64) -> u64 {
    const TAGGED: u64 = 0xf0;
    const WRITE_BACK: u64 = 0xff;
    match attributes {
        TAGGED if cfg!(target_arch = "aarch64") => WRITE_BACK,
        other => other,
    }
}

/// Expects that the buffer's first page, which is mapped at `mapped` and which the process has at `addr`, is mapped
/// everywhere as in the direct map.
fn are_alike(buffer: &Buffer, mapped: &Memory, addr: u64) -> Result<()> {
    let device = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    device.map(Direction::Bidirectional).context("map")?;
    device.vmap().context("vmap")?;
    mapped.set(0, 1);
    let of_buffer = device.attributes(mapped.addr())?;
    let of_process = device.attributes(addr)?;
    check!(is_ordinary(of_buffer.direct), "{of_buffer:x?}");
    let direct = without_tags(of_buffer.direct);
    for (what, attributes) in [
        ("the process's mapping", of_process.user),
        ("the buffer's mapping", of_buffer.user),
        ("the kernel's mapping", of_buffer.vmap),
    ] {
        check_eq!(without_tags(attributes), direct, "{what}");
    }
    Ok(())
}

fn page_entries() -> Result<()> {
    let memory = Memory::small_pages(12 * PAGE)?;
    // None is adjacent to the next, so that the kernel's mapping is not the direct map.
    let ranges: Vec<_> = (0..6)
        .map(|piece| memory.part((10 - 2 * piece) * PAGE, PAGE))
        .collect();
    let buffer = Device::open()?.create(&ranges)?;
    are_alike(&buffer, &buffer.map()?, memory.addr() + 10 * PAGE as u64)
}

fn huge_entries() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, RW, flags, None, 0)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let fd = Some(buffer.as_fd());
    let mapped = Memory::map_aligned(HUGE, HUGE, RW, libc::MAP_SHARED, fd, 0)?;
    are_alike(&buffer, &mapped, memory.addr())
}
