// SPDX-License-Identifier: MIT OR Apache-2.0

//! Create against huge pages that are replaced by small ones and back. A huge page is pinned once, which is
//! right only if the pinned page is one: if the driver concluded it from the mapping, the buffer would continue
//! behind a small page with foreign pages.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{Direction, Importer, Limits};

use super::{race, Count};
use pinbuf_test_harness::support::frames::all_frames;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, HUGE, PAGE};
use pinbuf_test_harness::support::{check, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "races":
    hugetlb_replaced within 120,
}

/// Huge pages that are replaced.
const BLOCKS: usize = 4;
const LEN: usize = BLOCKS * HUGE;
const PAGES_A_BLOCK: usize = HUGE / PAGE;

/// A file, all of it mapped where it stays: what its pages are is known.
struct Known {
    file: OwnedFd,
    /// Held so that the pages stay.
    _memory: Memory,
    seed: u64,
    frames: Vec<u64>,
}

impl Known {
    fn new(file: OwnedFd, seed: u64) -> Result<Self> {
        let memory = Memory::shared(&file, LEN)?;
        for page in 0..LEN / PAGE {
            memory.set(page * PAGE, stamp(seed, page as u64));
        }
        Ok(Self {
            frames: all_frames(&memory)?,
            _memory: memory,
            file,
            seed,
        })
    }

    /// Whether this is the file's page of that number, by its contents and its frame.
    fn is(&self, page: usize, holds: u64, frame: u64) -> bool {
        holds == stamp(self.seed, page as u64) && self.frames[page] == frame
    }
}

/// The frames of a buffer, page by page, as a device is given them: without an IOMMU and without a
/// bounce buffer its addresses are the memory's.
fn frames_of(buffer: &Buffer) -> Result<Vec<u64>> {
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
    let (mapping, _) = importer.map(Direction::ToDevice).context("mapping")?;
    let mut frames = Vec::new();
    for entry in importer.entries(mapping)? {
        let first = entry.addr / PAGE as u64;
        frames.extend(first..first + entry.len / PAGE as u64);
    }
    Ok(frames)
}

fn hugetlb_replaced() -> Result<()> {
    let device = Device::open()?;
    let _pool = HugePool::with_free(BLOCKS as i64)?;
    let huge = Known::new(huge_memfd(LEN)?, 1)?;
    let small = Known::new(memfd(LEN, 0)?, 2)?;

    // Below 4 GiB, where nothing lands in a hole, and at a huge page's place.
    let reserved = Memory::low(LEN + HUGE)?;
    let start = (reserved.addr() as usize).next_multiple_of(HUGE) - reserved.addr() as usize;
    reserved.replace_by(start, LEN, huge.file.as_fd(), 0)?;

    let (buffers, refused) = (Count::default(), Count::default());
    let (from_huge, from_small, mixed) = (Count::default(), Count::default(), Count::default());
    race(&[
        ("create", &|rng| {
            let first = rng.usize(..LEN / PAGE);
            let pages = rng.usize(1..=LEN / PAGE - first);
            let range = reserved.part(start + first * PAGE, pages * PAGE);
            let buffer = match device.create(&[range]) {
                Ok(buffer) => buffer,
                Err(Errno::EFAULT) => {
                    refused.up();
                    return Ok(());
                }
                Err(error) => return Err(error).context("create"),
            };
            buffers.up();
            let frames = frames_of(&buffer)?;
            check!(frames.len() == pages, "{} frames", frames.len());
            let mapped = buffer.map()?;
            let mut count = [0, 0];
            for (page, &frame) in frames.iter().enumerate() {
                let holds = mapped.get(page * PAGE);
                let of_huge = huge.is(first + page, holds, frame);
                let of_small = small.is(first + page, holds, frame);
                check!(
                    of_huge || of_small,
                    "page {page} of a buffer from page {first} is frame {frame:#x}, holds \
                     {holds:#x}: of neither file"
                );
                count[usize::from(of_small)] += 1;
            }
            from_huge.add(count[0]);
            from_small.add(count[1]);
            if count[0] > 0 && count[1] > 0 {
                mixed.up();
            }
            Ok(())
        }),
        ("replace", &|rng| {
            let block = rng.usize(..BLOCKS);
            let (at, offset) = (start + block * HUGE, block * PAGES_A_BLOCK * PAGE);
            let file = if rng.bool() { &huge.file } else { &small.file };
            if rng.bool() {
                reserved.unmap(at, HUGE)?;
                super::pause(rng);
            }
            reserved.replace_by(at, HUGE, file.as_fd(), offset)?;
            Ok(())
        }),
    ])?;
    println!(
        "# {} buffers ({} pages of huge ones, {} small; {} buffers of both), {} times EFAULT",
        buffers.get(),
        from_huge.get(),
        from_small.get(),
        mixed.get(),
        refused.get()
    );
    check!(
        from_huge.get() > 0 && from_small.get() > 0,
        "only one kind of page was ever pinned"
    );
    Ok(())
}
