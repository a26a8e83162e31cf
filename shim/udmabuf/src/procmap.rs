// SPDX-License-Identifier: MIT OR Apache-2.0

//! Asking the kernel where a process has files mapped: `PROCMAP_QUERY` on `/proc/PID/maps`.

use core::ffi::c_int;
use core::mem::{offset_of, size_of};

use crate::spans::{FileId, Span, Spans};
use crate::sys::{self, Errno, Result};

/// The most mappings that a program looks at in one go. Shared and writable mappings of files are few, but for
/// those of graphics drivers.
pub const MOST: usize = 1024;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    ino: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const _: () = assert!(size_of::<Query>() == 104 && offset_of!(Query, major) == 72);

/// `PROCMAP_QUERY`: `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u32 = 3 << 30 | (size_of::<Query>() as u32) << 16 | (b'f' as u32) << 8 | 17;

/// `PROCMAP_QUERY_VMA_READABLE`, `_WRITABLE`, `_SHARED`.
const SHARED_AND_WRITABLE: u64 = 0x01 | 0x02 | 0x08;
/// `PROCMAP_QUERY_COVERING_OR_NEXT_VMA`.
const OR_NEXT: u64 = 0x10;
/// `PROCMAP_QUERY_FILE_BACKED_VMA`.
const OF_FILES: u64 = 0x20;

impl Query {
    /// Asks about a mapping that is at an address, or with [`OR_NEXT`] behind it.
    fn ask(&mut self, fd: c_int, flags: u64, addr: u64) -> Result<Span> {
        *self = Self {
            size: size_of::<Self>() as u64,
            flags,
            addr,
            ..Self::default()
        };
        // SAFETY: PROCMAP_QUERY reads and writes this struct, which names no other memory.
        unsafe { sys::ioctl(fd, PROCMAP_QUERY, self) }?;
        Ok(Span {
            id: FileId {
                dev: libc::makedev(self.major, self.minor),
                ino: self.ino,
            },
            offset: self.offset,
            len: self.end - self.start,
            addr: self.start,
        })
    }
}

/// Adds where these files are mapped shared, for reading and writing. `fd` is an open `/proc/PID/maps`, of whose
/// shared mappings the first `most` are looked at.
pub fn ask(fd: c_int, most: usize, wanted: impl Fn(FileId) -> bool, spans: &mut Spans) {
    let mut query = Query::default();
    for _ in 0..most {
        let Ok(span) = query.ask(fd, SHARED_AND_WRITABLE | OF_FILES | OR_NEXT, query.end) else {
            break;
        };
        if wanted(span.id) && spans.push(span).is_err() {
            break;
        }
    }
    spans.finish();
}

/// Adds these mappings of files, whether shared and writable or not. Returns whether each part of a file that is
/// mapped by them is mapped once, shared, and for reading and writing; an error where that cannot be found out.
pub fn ask_all(fd: c_int, wanted: impl Fn(&Span) -> bool, spans: &mut Spans) -> Result<bool> {
    let mut query = Query::default();
    let mut shared = true;
    loop {
        match query.ask(fd, OF_FILES | OR_NEXT, query.end) {
            Ok(span) if wanted(&span) => {
                shared &= query.vma_flags & SHARED_AND_WRITABLE == SHARED_AND_WRITABLE;
                spans.push(span)?;
            }
            Ok(_) => {}
            Err(Errno(libc::ENOENT)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(!spans.finish() && shared)
}

/// Is something mapped at an address?
pub fn is_mapped(fd: c_int, addr: u64) -> bool {
    Query::default().ask(fd, 0, addr).is_ok()
}
