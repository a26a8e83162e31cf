// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory that is measured: memfds that udmabuf takes, and parts of them.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{ensure, Context, Result};
use nix::fcntl::{fcntl, FcntlArg, FdFlag, SealFlag};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{self, Memory, HUGE, PAGE};

use crate::task::{Item, Shape};

/// A memfd of this shape, with pages behind all of it unless it is to be sparse.
pub fn memfd(shape: Shape) -> Result<OwnedFd> {
    let kind = if shape.huge {
        libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
    } else {
        0
    };
    let fd = memory::memfd(
        usize::try_from(shape.bytes)?,
        kind | libc::MFD_ALLOW_SEALING,
    )?;
    // udmabuf demands it.
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).context("sealing a memfd")?;
    if !shape.sparse {
        let map = Memory::shared(&fd, usize::try_from(shape.bytes)?)?;
        if shape.scattered {
            // No reading ahead or around: each fault allocates one page.
            for item in shuffled(shape.bytes, PAGE as u64) {
                map.set(usize::try_from(item.offset)?, 1);
            }
        } else {
            touch(&map, if shape.huge { HUGE } else { PAGE });
        }
    }
    Ok(fd)
}

/// Writes one byte in each `step`.
pub fn touch(map: &Memory, step: usize) {
    let first = map.at(0);
    for offset in (0..map.len()).step_by(step) {
        // SAFETY: inside of the mapping, whose contents do not matter.
        unsafe { first.wrapping_add(offset).write_volatile(1) };
    }
}

/// Gives the pages of a part of a memfd back.
pub fn punch(fd: impl AsFd, offset: u64, len: u64) -> Result<()> {
    memory::punch_hole(fd, usize::try_from(offset)?, usize::try_from(len)?)
}

/// A pool of free huge pages, which hands them out in the order of their addresses: so memory that is
/// filled from its beginning is as contiguous as the pool is.
pub fn sorted_pool(bytes: u64) -> Result<HugePool> {
    let count = bytes / HUGE as u64;
    let pool = HugePool::with_free(i64::try_from(count)?)?;
    let shape = Shape {
        bytes,
        huge: true,
        mapped: false,
        sparse: false,
        scattered: false,
    };
    let all = memfd(shape)?;
    let mut pages = frames(&all, bytes, HUGE)?;
    pages.sort_by_key(|page| std::cmp::Reverse(page.1));
    // The pages that were freed last are allocated first.
    for (offset, _) in pages {
        punch(&all, offset, HUGE as u64)?;
    }
    Ok(pool)
}

/// The frame behind the first byte of each `step` bytes of a memfd.
fn frames(fd: &OwnedFd, bytes: u64, step: usize) -> Result<Vec<(u64, u64)>> {
    let map = Memory::shared(fd, usize::try_from(bytes)?)?;
    let pagemap = File::open("/proc/self/pagemap").context("/proc/self/pagemap")?;
    let mut found = Vec::new();
    for offset in (0..map.len()).step_by(step) {
        map.get(offset);
        let mut entry = [0; 8];
        let at = (map.addr() + offset as u64) / PAGE as u64 * 8;
        pagemap.read_exact_at(&mut entry, at)?;
        let entry = u64::from_ne_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        ensure!(
            entry >> 63 == 1 && frame != 0,
            "/proc/self/pagemap shows no frame"
        );
        found.push((offset as u64, frame));
    }
    Ok(found)
}

/// The descriptor's number, for a child that inherits it. (Each other descriptor of this program is
/// closed on exec.)
pub fn inheritable(fd: &OwnedFd) -> Result<i32> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    Ok(fd.as_raw_fd())
}

/// Numbers that look random and are the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        let number = memory::stamp(0, self.0);
        self.0 += 1;
        number % limit
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// All of it, in one piece.
pub fn whole(bytes: u64) -> Vec<Item> {
    vec![Item {
        offset: 0,
        len: bytes,
    }]
}

/// All of it, in pieces of `len` bytes, in order.
pub fn pieces(bytes: u64, len: u64) -> Vec<Item> {
    (0..bytes / len)
        .map(|n| Item {
            offset: n * len,
            len,
        })
        .collect()
}

/// The same in another order.
pub fn shuffled(bytes: u64, len: u64) -> Vec<Item> {
    let mut items = pieces(bytes, len);
    Numbers(1).shuffle(&mut items);
    items
}

/// A framebuffer of `bytes` in `count` pieces, scattered over memory of `room` bytes, as a guest's
/// allocator does it: their lengths differ, and they lie anywhere, in any order.
pub fn framebuffer(bytes: u64, count: u64, room: u64) -> Vec<Item> {
    let page = PAGE as u64;
    let (pages, slot) = (bytes.div_ceil(page), room / page / count);
    let mut numbers = Numbers(count);
    let mut left = pages;
    let mut items: Vec<Item> = (0..count)
        .map(|n| {
            let others = count - n - 1;
            // Half to three halves of what is left for each, and the last takes the rest.
            let mean = left / (others + 1);
            let len = if others == 0 {
                left
            } else {
                (mean / 2 + numbers.below(mean + 1)).clamp(1, (left - others).min(slot))
            };
            left -= len;
            let at = n * slot + numbers.below(slot.saturating_sub(len) + 1);
            Item {
                offset: at * page,
                len: len * page,
            }
        })
        .collect();
    numbers.shuffle(&mut items);
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framebuffers_are_whole_and_inside() {
        for (bytes, count) in [(8_294_400, 4), (8_294_400, 138), (33_177_600, 138)] {
            let room = 256 << 20;
            let mut items = framebuffer(bytes, count, room);
            assert_eq!(items.len() as u64, count);
            let sum: u64 = items.iter().map(|item| item.len).sum();
            assert_eq!(sum, bytes.next_multiple_of(4096));
            items.sort_by_key(|item| item.offset);
            assert!(items
                .windows(2)
                .all(|two| two[0].offset + two[0].len <= two[1].offset));
            assert!(items.iter().all(|item| item.offset + item.len <= room));
        }
    }

    #[test]
    fn shuffling_loses_nothing() {
        let mut items = shuffled(1 << 20, 4096);
        assert_ne!(items, pieces(1 << 20, 4096));
        items.sort_by_key(|item| item.offset);
        assert_eq!(items, pieces(1 << 20, 4096));
    }
}
