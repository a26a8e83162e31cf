// SPDX-License-Identifier: MIT OR Apache-2.0

//! Asking the kernel where a process has files mapped: `PROCMAP_QUERY` on `/proc/PID/maps`.

use core::ffi::c_int;
use core::mem::{offset_of, size_of};

use crate::spans::{FileId, Span, Spans};
use crate::sys;

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

/// `PROCMAP_QUERY_VMA_READABLE`, `_WRITABLE`, `_SHARED`, `_COVERING_OR_NEXT_VMA`, `_FILE_BACKED_VMA`.
const SHARED_AND_WRITABLE: u64 = 0x01 | 0x02 | 0x08 | 0x10 | 0x20;

/// Adds where these files are mapped shared, for reading and writing. `fd` is an open `/proc/PID/maps`, of whose
/// shared mappings the first `most` are looked at.
pub fn ask(fd: c_int, most: usize, wanted: impl Fn(FileId) -> bool, spans: &mut Spans) {
    let mut query = Query::default();
    for _ in 0..most {
        query.size = size_of::<Query>() as u64;
        query.flags = SHARED_AND_WRITABLE;
        query.addr = query.end;
        // SAFETY: PROCMAP_QUERY reads and writes this struct, which names no other memory.
        if unsafe { sys::ioctl(fd, PROCMAP_QUERY, &mut query) }.is_err() {
            break;
        }
        let id = FileId {
            dev: libc::makedev(query.major, query.minor),
            ino: query.ino,
        };
        if wanted(id) {
            let span = Span {
                id,
                offset: query.offset,
                len: query.end - query.start,
                addr: query.start,
            };
            if spans.push(span).is_err() {
                break;
            }
        }
    }
    spans.finish();
}
