// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for these tests, and buffers of it.

use anyhow::Result;

pub use pinbuf_test_harness::support::kinds::Kind;
use pinbuf_test_harness::support::memory::{stamp, HUGE, PAGE};
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory};

/// More small pages than the driver pins without memory for a list of them.
pub const FEW: usize = 40;

/// The size of a little memory of this kind: [`FEW`] small pages, or two huge ones.
pub fn few(kind: Kind) -> usize {
    match kind {
        Kind::Anonymous | Kind::Shmem => FEW * PAGE,
        Kind::Transparent | Kind::HugePrivate | Kind::HugeShared => 2 * HUGE,
    }
}

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
