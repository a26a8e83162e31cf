// SPDX-License-Identifier: MIT OR Apache-2.0

//! Recognising a descriptor of `/dev/pinbuf`.

use core::ffi::c_int;
use core::sync::atomic::{AtomicU64, Ordering};

use pinbuf_uapi as uapi;

use crate::sys::{self, Errno, Result};

/// `MISC_MAJOR`: pinbuf is one of the miscellaneous devices.
const MISC_MAJOR: u32 = 10;

/// The device number that was found last, or 0. It only saves the question: what is not equal is
/// asked, and a device that does not know pinbuf's calls makes us forget it.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Is what was opened by pinbuf's name pinbuf, and can it be used? A sandbox may have some other file of that name, or
/// refuse its requests.
pub fn check(fd: c_int) -> Result<()> {
    let number = number(fd).ok_or(Errno(libc::ENODEV))?;
    if number == NUMBER.load(Ordering::Relaxed) {
        return Ok(());
    }
    match query(fd) {
        Ok(()) => {
            NUMBER.store(number, Ordering::Relaxed);
            Ok(())
        }
        // Opened with O_PATH: nothing can be asked, and nothing will be.
        Err(Errno(libc::EBADF)) => Ok(()),
        error => error,
    }
}

/// Asks a device whether it is pinbuf.
fn query(fd: c_int) -> Result<()> {
    let mut query = uapi::Query {
        size: size_of::<uapi::Query>() as u32,
        ..Default::default()
    };
    // SAFETY: PINBUF_QUERY reads and writes this struct. Its number is free in the kernel's list:
    // other miscellaneous devices answer that they do not know it.
    unsafe { sys::ioctl(fd, uapi::QUERY, &mut query) }?;
    if query.version > 0 {
        Ok(())
    } else {
        Err(Errno(libc::ENODEV))
    }
}

fn is_misc(stat: &libc::stat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFCHR && libc::major(stat.st_rdev) == MISC_MAJOR
}

/// Is this a descriptor of the device that was found last?
pub fn is_known(fd: c_int) -> bool {
    number(fd).is_some_and(|number| number == NUMBER.load(Ordering::Relaxed))
}

/// Is this a descriptor of pinbuf's device? The number changes when the module is loaded again,
/// and there may be no path to the device where we are, so the descriptor itself is asked.
pub fn is_pinbuf(fd: c_int) -> bool {
    match number(fd) {
        Some(number) if query(fd).is_ok() => {
            NUMBER.store(number, Ordering::Relaxed);
            true
        }
        _ => false,
    }
}

/// The number of a miscellaneous device.
fn number(fd: c_int) -> Option<u64> {
    let stat = sys::fstat(fd).ok().filter(is_misc)?;
    Some(stat.st_rdev)
}

/// Is the device's descriptor one that cannot be used for calls (`O_PATH`)? `fstat` does not show that.
pub fn is_path_only(fd: c_int) -> bool {
    let mut query = uapi::Query::default();
    // SAFETY: PINBUF_QUERY reads this struct, and refuses its size.
    let answer = unsafe { sys::ioctl(fd, uapi::QUERY, &mut query) };
    answer == Err(Errno(libc::EBADF))
}

/// Forgets the number: something else has it now.
pub fn forget() {
    NUMBER.store(0, Ordering::Relaxed);
}
