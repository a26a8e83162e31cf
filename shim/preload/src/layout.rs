// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the shim maps pieces that the program has not mapped itself.
//!
//! All of them lie in one stretch of addresses, one behind the other in the buffer's order: what
//! is contiguous in the buffer is contiguous there too, and a call with thousands of pieces gets
//! by with few ranges. Only what the pieces cover is mapped, for `mlockall(MCL_FUTURE)` fills what
//! is mapped and `RLIMIT_AS` counts it.

use pinbuf_uapi::{Range, MAX_RANGES};

use crate::buffer::Buffer;
use crate::plan::{File, Piece, PAGE};
use crate::request::INLINE_ITEMS;
use crate::sys::{Errno, Plain, Result};

/// The size of a page-table entry of the second level, and the alignment that lets one be used.
pub const HUGE: u64 = 2 << 20;

/// How far back a piece is searched for that covers another.
const LOOK_BACK: usize = 32;

/// A mapping to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Bytes from the stretch's start.
    pub at: u64,
    pub len: u64,
    pub offset: u64,
    /// Index in the list of files.
    pub file: u32,
    pub pad: u32,
}

// SAFETY: integers.
unsafe impl Plain for Placement {}

/// Which mappings to make, and which parts of them are the buffer.
pub struct Layout {
    pub placements: Buffer<Placement, INLINE_ITEMS>,
    /// The buffer; addresses count from the stretch's start.
    pub ranges: Buffer<Range, INLINE_ITEMS>,
    /// Bytes of the stretch.
    pub len: u64,
    /// What its start is a multiple of.
    pub align: u64,
}

impl Layout {
    /// Lays the pieces out. With `huge`, large ones begin where huge entries fit, which takes more
    /// addresses.
    pub fn new(files: &[File], pieces: &[Piece], huge: bool) -> Result<Self> {
        let mut layout = Self {
            placements: Buffer::with_capacity(pieces.len())?,
            ranges: Buffer::with_capacity(pieces.len().min(MAX_RANGES as usize))?,
            len: 0,
            align: PAGE,
        };
        for piece in pieces {
            let block = files[piece.file as usize].block;
            let addr = layout.place(piece, block, huge);
            layout.add_range(addr, piece.len)?;
        }
        Ok(layout)
    }

    /// Finds the piece a place, and returns the address of its first byte.
    fn place(&mut self, piece: &Piece, block: u64, huge: bool) -> u64 {
        // On hugetlbfs whole pages are mapped.
        let start = piece.offset - piece.offset % block;
        let end = (piece.offset + piece.len).next_multiple_of(block);
        let covers =
            |p: &&Placement| p.file == piece.file && p.offset <= start && end <= p.offset + p.len;
        let from = self.placements.len().saturating_sub(LOOK_BACK);
        if let Some(found) = self.placements[from..].iter().rev().find(covers) {
            return found.at + (piece.offset - found.offset);
        }
        if let Some(last) = self.placements.last_mut() {
            if last.file == piece.file && last.offset + last.len == start {
                let at = last.at + last.len;
                last.len += end - start;
                self.len = at + (end - start);
                return at + (piece.offset - start);
            }
        }
        let align = if huge && end - start >= HUGE {
            block.max(HUGE)
        } else {
            block
        };
        self.align = self.align.max(align);
        let at = align_to(self.len, align, start % align);
        self.len = at + (end - start);
        let placement = Placement {
            at,
            len: end - start,
            offset: start,
            file: piece.file,
            pad: 0,
        };
        // There is room for one a piece.
        let pushed = self.placements.push(placement);
        debug_assert!(pushed.is_ok());
        at + (piece.offset - start)
    }

    fn add_range(&mut self, addr: u64, len: u64) -> Result<()> {
        match self.ranges.last_mut() {
            Some(last) if last.addr + last.len == addr => last.len += len,
            // Only hugetlb pieces need a range each.
            _ => self
                .ranges
                .push(Range { addr, len })
                .map_err(|_| Errno(libc::EINVAL))?,
        }
        Ok(())
    }
}

/// The first number from `least` on that leaves `phase` when divided by `align`.
pub fn align_to(least: u64, align: u64, phase: u64) -> u64 {
    least + (phase + align - least % align) % align
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHMEM: File = File {
        named: 0,
        fd: 0,
        dev: 0,
        inode: 1,
        size: 1 << 40,
        block: PAGE,
    };
    const HUGETLB: File = File {
        block: HUGE,
        inode: 2,
        ..SHMEM
    };

    fn piece(file: u32, offset: u64, len: u64) -> Piece {
        Piece {
            file,
            pad: 0,
            offset,
            len,
        }
    }

    /// Every byte of the buffer must be the byte of the file that was asked for.
    fn check(files: &[File], pieces: &[Piece], huge: bool) -> Layout {
        let layout = Layout::new(files, pieces, huge).unwrap();
        let mut pages = Vec::new();
        for range in layout.ranges.iter() {
            for addr in (range.addr..range.addr + range.len).step_by(PAGE as usize) {
                let hit: Vec<_> = layout
                    .placements
                    .iter()
                    .filter(|p| p.at <= addr && addr < p.at + p.len)
                    .map(|p| (p.file, p.offset + addr - p.at))
                    .collect();
                assert_eq!(hit.len(), 1, "{addr:x}");
                pages.push(hit[0]);
            }
        }
        let wanted: Vec<_> = pieces
            .iter()
            .flat_map(|p| {
                (p.offset..p.offset + p.len)
                    .step_by(PAGE as usize)
                    .map(|page| (p.file, page))
            })
            .collect();
        assert_eq!(pages, wanted);
        for p in layout.placements.iter() {
            let block = files[p.file as usize].block;
            assert!(p.at % block == 0 && p.offset % block == 0 && p.len % block == 0);
            assert!(p.at + p.len <= layout.len);
            assert!(block <= layout.align);
        }
        layout
    }

    #[test]
    fn scattered_pages_are_one_range() {
        let pieces: Vec<_> = (0..1000)
            .map(|i| piece(0, (2000 - 2 * i) * PAGE, PAGE))
            .collect();
        let layout = check(&[SHMEM], &pieces, true);
        assert_eq!(layout.ranges.len(), 1);
        assert_eq!(layout.len, 1000 * PAGE);
        assert_eq!(layout.align, PAGE);
    }

    #[test]
    fn repeated_pages_are_mapped_once() {
        let pieces = [
            piece(0, 0, 3 * PAGE),
            piece(0, PAGE, PAGE),
            piece(0, PAGE, PAGE),
        ];
        let layout = check(&[SHMEM], &pieces, true);
        assert_eq!(layout.placements.len(), 1);
        assert_eq!(layout.ranges.len(), 3);
    }

    #[test]
    fn hugetlb_is_mapped_in_whole_pages() {
        let pieces = [
            piece(0, 5 * PAGE, PAGE),
            piece(0, HUGE - PAGE, 2 * PAGE),
            piece(1, 9 * PAGE, PAGE),
            piece(0, 7 * HUGE, HUGE),
            piece(0, 0, PAGE),
        ];
        let layout = check(&[HUGETLB, SHMEM], &pieces, true);
        // The second piece lies in pages that are mapped in part; they are mapped anew.
        assert_eq!(layout.placements.len(), 4);
    }

    #[test]
    fn large_pieces_fit_huge_entries() {
        let pieces = [piece(0, 3 * PAGE, PAGE), piece(0, HUGE + PAGE, 4 * HUGE)];
        let layout = check(&[SHMEM], &pieces, true);
        assert_eq!(layout.align, HUGE);
        let large = layout.placements[1];
        assert_eq!(large.at % HUGE, large.offset % HUGE);
        assert_eq!(check(&[SHMEM], &pieces, false).len, 4 * HUGE + PAGE);
    }

    #[test]
    fn random_lists() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let pieces: Vec<_> = (0..1 + random(20))
                .map(|_| {
                    piece(
                        random(2) as u32,
                        random(1500) * PAGE,
                        (1 + random(40)) * PAGE,
                    )
                })
                .collect();
            check(&[HUGETLB, SHMEM], &pieces, random(2) == 0);
        }
    }
}
