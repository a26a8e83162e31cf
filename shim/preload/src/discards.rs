// SPDX-License-Identifier: MIT OR Apache-2.0

//! With a log, a line for each buffer whose memory the program does not see any more.
//!
//! A program that gives pages of a live buffer back (by a balloon, a hole in the file) shows or sends old pages
//! from then on, without an error. The shim starts no thread and follows no descriptor, so it asks at the
//! program's next request for a buffer, and asks about all descriptors up to the highest that a request
//! returned. What was reported of a descriptor is not reported again.

use core::ffi::c_int;
use core::mem::size_of;
use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use pinbuf_uapi as uapi;

use crate::log::{self, log};
use crate::sys::{self, Errno};

/// The highest descriptor of a buffer so far.
static HIGHEST: AtomicI32 = AtomicI32::new(-1);

/// Descriptors that are asked about: a log is not worth more calls.
const MOST: c_int = 4096;

/// What was last reported of each descriptor, of a buffer that [`mark`] tells from others.
static REPORTED: [AtomicU64; MOST as usize] = [const { AtomicU64::new(0) }; MOST as usize];

/// A number for a buffer and the bytes that it lost; not zero.
fn mark(inode: u64, discarded: u64, unsure: u64) -> u64 {
    inode
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(discarded.rotate_left(20))
        .wrapping_add(unsure.rotate_left(40))
        | 1
}

/// Takes note of a new buffer's descriptor.
pub fn made(fd: c_int) {
    if log::enabled() {
        HIGHEST.fetch_max(fd.min(MOST - 1), Ordering::Relaxed);
    }
}

/// Reports buffers that have lost bytes since they were last asked about, through an open pinbuf device.
pub fn report(device: c_int) {
    if !log::enabled() {
        return;
    }
    for fd in 0..=HIGHEST.load(Ordering::Relaxed) {
        let mut info = uapi::Info {
            size: size_of::<uapi::Info>() as u32,
            fd,
            ..uapi::Info::default()
        };
        // SAFETY: the call reads and writes this struct.
        match unsafe { sys::ioctl(device, uapi::INFO, &mut info) } {
            Ok(_) => {}
            Err(Errno(libc::ENOTTY)) => return,
            // Closed meanwhile, or no buffer of pinbuf's.
            Err(_) => continue,
        }
        let (discarded, unsure) = (info.discarded_bytes, info.unsure_bytes);
        let reported = &REPORTED[fd as usize];
        if discarded == 0 && unsure == 0 {
            reported.store(0, Ordering::Relaxed);
            continue;
        }
        let Ok(stat) = sys::fstat(fd) else { continue };
        let mark = mark(stat.st_ino, discarded, unsure);
        if reported.swap(mark, Ordering::Relaxed) == mark {
            continue;
        }
        if discarded == info.bytes {
            // Many programs do so as soon as they have the buffer. Then nobody sees other pages.
            log!("fd {fd}: all of its {discarded} bytes were discarded, or their file was closed");
        } else {
            log!(
                "fd {fd}: the memory of {discarded} of {} bytes was discarded, and perhaps that of {unsure} more: \
                 the buffer shows old pages there",
                info.bytes
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_differ() {
        let marks = [
            mark(1, 4096, 0),
            mark(1, 8192, 0),
            mark(1, 0, 4096),
            mark(2, 4096, 0),
            mark(2, 0, 0),
        ];
        for (index, one) in marks.iter().enumerate() {
            assert_ne!(*one, 0);
            assert!(!marks[index + 1..].contains(one));
        }
    }
}
