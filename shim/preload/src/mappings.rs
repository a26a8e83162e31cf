// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program's own mappings of the files that a call names.

use core::ffi::c_int;

use pinbuf_uapi::{Backing, Range, MAX_RANGES};

use crate::buffer::Buffer;
use crate::plan::{File, Piece};
use crate::request::INLINE_ITEMS;
use crate::sys::{self, Plain};

/// `PROCMAP_QUERY`, of kernels from 6.11 on.
const PROCMAP_QUERY: u32 = 3 << 30 | (size_of::<Query>() as u32) << 16 | 0x66 << 8 | 17;

const WRITABLE: u64 = 0x02;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;
const FILE_BACKED: u64 = 0x20;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// A shared and writable mapping of one of the files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    dev: u64,
    inode: u64,
}

// SAFETY: integers.
unsafe impl Plain for Mapping {}

/// No more mappings than these are considered, and no more than so many files compared.
const MOST: usize = 32;
/// No more mappings than these are looked at.
const MOST_SEEN: usize = 4096;

/// The list of the calling thread's mappings: `/proc/self` is empty once the first thread has
/// ended. Where there is no `/proc`, nothing is found.
pub struct Maps(Option<c_int>);

impl Maps {
    pub fn open() -> Self {
        Self(sys::open(c"/proc/thread-self/maps", libc::O_RDONLY | libc::O_CLOEXEC).ok())
    }

    /// Finds the mappings that could serve; none if the kernel does not tell.
    pub fn find(&self, files: &[File]) -> Buffer<Mapping, MOST> {
        // A list this long is made without a system call.
        let Ok(mut found) = Buffer::with_capacity(MOST) else {
            unreachable!()
        };
        let Some(maps) = self.0.filter(|_| files.len() <= MOST) else {
            return found;
        };
        let mut from = 0;
        for _ in 0..MOST_SEEN {
            let Some(query) = next(maps, from) else { break };
            let dev = libc::makedev(query.dev_major, query.dev_minor);
            if files
                .iter()
                .any(|file| file.inode == query.inode && file.dev == dev)
            {
                let mapping = Mapping {
                    start: query.vma_start,
                    end: query.vma_end,
                    offset: query.vma_offset,
                    dev,
                    inode: query.inode,
                };
                if found.push(mapping).is_err() {
                    break;
                }
            }
            from = query.vma_end;
        }
        found
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        if let Some(fd) = self.0 {
            sys::close(fd);
        }
    }
}

/// The first shared and writable mapping of a file at `from` or behind.
fn next(maps: c_int, from: u64) -> Option<Query> {
    let mut query = Query {
        size: size_of::<Query>() as u64,
        query_flags: WRITABLE | SHARED | COVERING_OR_NEXT | FILE_BACKED,
        query_addr: from,
        ..Query::default()
    };
    // SAFETY: PROCMAP_QUERY reads and writes this struct, and without sizes for them it writes
    // neither name nor build id.
    unsafe { sys::ioctl(maps, PROCMAP_QUERY, &mut query) }.ok()?;
    Some(query)
}

/// A buffer made of mappings that exist.
pub struct Mapped {
    pub ranges: Buffer<Range, INLINE_ITEMS>,
    pub backing: Buffer<Backing, INLINE_ITEMS>,
}

/// Names the pieces by addresses, if mappings cover all of them.
pub fn cover(mappings: &[Mapping], files: &[File], pieces: &[Piece]) -> Option<Mapped> {
    if mappings.is_empty() {
        return None;
    }
    // A piece may lie in more than one mapping.
    let capacity = (pieces.len() + MOST).min(MAX_RANGES as usize);
    let capacity = if pieces.len() == 1 {
        INLINE_ITEMS
    } else {
        capacity
    };
    let mut mapped = Mapped {
        ranges: Buffer::with_capacity(capacity).ok()?,
        backing: Buffer::with_capacity(capacity).ok()?,
    };
    for piece in pieces {
        let file = &files[piece.file as usize];
        let (mut offset, end) = (piece.offset, piece.offset + piece.len);
        while offset < end {
            let (addr, len) = mappings
                .iter()
                .filter(|m| m.inode == file.inode && m.dev == file.dev)
                .filter(|m| m.offset <= offset && offset - m.offset < m.end - m.start)
                .map(|m| {
                    (
                        m.start + (offset - m.offset),
                        m.end - m.start - (offset - m.offset),
                    )
                })
                .max_by_key(|&(_, len)| len)?;
            let len = len.min(end - offset);
            mapped.ranges.push(Range { addr, len }).ok()?;
            mapped
                .backing
                .push(Backing {
                    fd: file.fd,
                    reserved: 0,
                    offset,
                })
                .ok()?;
            offset += len;
        }
    }
    Some(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PAGE;

    const FILE: File = File {
        named: 9,
        fd: 40,
        dev: 1,
        inode: 7,
        size: 1 << 30,
        block: PAGE,
    };

    fn mapping(start: u64, pages: u64, offset: u64) -> Mapping {
        Mapping {
            start,
            end: start + pages * PAGE,
            offset: offset * PAGE,
            dev: 1,
            inode: 7,
        }
    }

    fn piece(offset: u64, pages: u64) -> Piece {
        Piece {
            file: 0,
            pad: 0,
            offset: offset * PAGE,
            len: pages * PAGE,
        }
    }

    fn ranges(mappings: &[Mapping], pieces: &[Piece]) -> Option<Vec<(u64, u64, u64)>> {
        let mapped = cover(mappings, &[FILE], pieces)?;
        assert_eq!(mapped.ranges.len(), mapped.backing.len());
        assert!(mapped.backing.iter().all(|b| b.fd == 40 && b.reserved == 0));
        let both = mapped.ranges.iter().zip(mapped.backing.iter());
        Some(
            both.map(|(r, b)| (r.addr, r.len / PAGE, b.offset / PAGE))
                .collect(),
        )
    }

    #[test]
    fn pieces_lie_in_mappings() {
        let maps = [mapping(0x10000, 4, 8), mapping(0x40000, 4, 12)];
        assert_eq!(ranges(&maps, &[piece(9, 1)]), Some(vec![(0x11000, 1, 9)]));
        // Over the end of one into the other.
        let parts = vec![(0x13000, 1, 11), (0x40000, 2, 12)];
        assert_eq!(ranges(&maps, &[piece(11, 3)]), Some(parts));
        // Before, behind, and beyond.
        assert_eq!(ranges(&maps, &[piece(7, 1)]), None);
        assert_eq!(ranges(&maps, &[piece(16, 1)]), None);
        assert_eq!(ranges(&maps, &[piece(9, 1), piece(15, 2)]), None);
        assert_eq!(ranges(&[], &[piece(9, 1)]), None);
        // Another file.
        let other = [
            Mapping {
                inode: 8,
                ..maps[0]
            },
            Mapping { dev: 2, ..maps[0] },
        ];
        assert_eq!(ranges(&other, &[piece(9, 1)]), None);
    }
}
