// SPDX-License-Identifier: MIT OR Apache-2.0

//! Recognising a descriptor of `/dev/pinbuf`.

use core::ffi::c_int;
use core::sync::atomic::{AtomicU64, Ordering};

use pinbuf_uapi as uapi;

use crate::sys;

/// `MISC_MAJOR`: pinbuf is one of the miscellaneous devices.
const MISC_MAJOR: u32 = 10;

/// The device number that was found last, or 0. It only saves the question: what is not equal is
/// asked, and a device that does not know pinbuf's calls makes us forget it.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Is this a descriptor of pinbuf's device? The number changes when the module is loaded again,
/// and there may be no path to the device where we are, so the descriptor itself is asked.
pub fn is_pinbuf(fd: c_int) -> bool {
    let Ok(stat) = sys::fstat(fd) else {
        return false;
    };
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR {
        return false;
    }
    if stat.st_rdev == NUMBER.load(Ordering::Relaxed) {
        return true;
    }
    if libc::major(stat.st_rdev) != MISC_MAJOR {
        return false;
    }
    let mut query = uapi::Query {
        size: size_of::<uapi::Query>() as u32,
        ..Default::default()
    };
    // SAFETY: PINBUF_QUERY reads and writes this struct. Its number is free in the kernel's list:
    // other miscellaneous devices answer that they do not know it.
    let known = unsafe { sys::ioctl(fd, uapi::QUERY, &mut query) }.is_ok() && query.version > 0;
    if known {
        NUMBER.store(stat.st_rdev, Ordering::Relaxed);
    }
    known
}

/// Forgets the number: something else has it now.
pub fn forget() {
    NUMBER.store(0, Ordering::Relaxed);
}
