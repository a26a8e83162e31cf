// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_SHIM_LOG`: one line a call, on standard error (`1` or `stderr`) or appended to a file.

use core::ffi::c_int;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::ffi::{c_char, CStr};

use crate::sys;

const OFF: u32 = 0;
const STDERR: u32 = 1;
const FILE: u32 = 2;

static TARGET: AtomicU32 = AtomicU32::new(OFF);
/// With [`FILE`], a terminated string that lives as long as the process.
static PATH: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());

extern "C" {
    /// `getenv` that knows nothing in set-user-ID programs.
    fn secure_getenv(name: *const c_char) -> *const c_char;
}

/// Reads the environment; called once, when the library is loaded.
pub fn init() {
    // SAFETY: the name is a terminated string. Set-user-ID programs get a null.
    let value = unsafe { secure_getenv(c"PINBUF_SHIM_LOG".as_ptr()) };
    if value.is_null() {
        return;
    }
    // SAFETY: a string of the environment.
    match unsafe { CStr::from_ptr(value) }.to_bytes() {
        b"" | b"0" => {}
        b"1" | b"stderr" => TARGET.store(STDERR, Ordering::Relaxed),
        _ => {
            // A copy, since the program may change its environment. It is made at load time only,
            // where malloc may be used; without memory there is no log.
            // SAFETY: a string of the environment.
            let copy = unsafe { libc::strdup(value) };
            if !copy.is_null() {
                PATH.store(copy, Ordering::Relaxed);
                TARGET.store(FILE, Ordering::Release);
            }
        }
    }
}

/// Is a log asked for?
pub fn enabled() -> bool {
    TARGET.load(Ordering::Relaxed) != OFF
}

/// A line, cut off where it is too long.
struct Line {
    text: [u8; 240],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = self.text.len() - 1 - self.len;
        let part = &part.as_bytes()[..part.len().min(room)];
        self.text[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        Ok(())
    }
}

/// Writes a line, and leaves `errno` alone.
pub fn line(message: fmt::Arguments<'_>) {
    let errno = sys::errno();
    let mut line = Line {
        text: [0; 240],
        len: 0,
    };
    let _ = write!(line, "libudmabuf_shim: {message}");
    line.text[line.len] = b'\n';
    let text = &line.text[..=line.len];
    match TARGET.load(Ordering::Acquire) {
        STDERR => sys::write(2, text),
        FILE => {
            if let Some(fd) = open_file() {
                sys::write(fd, text);
                sys::close(fd);
            }
        }
        _ => {}
    }
    sys::set_errno(errno);
}

fn open_file() -> Option<c_int> {
    let path = PATH.load(Ordering::Relaxed);
    let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NOCTTY;
    // SAFETY: a terminated string that is never freed.
    let fd = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, 0o666) };
    (fd >= 0).then_some(fd as c_int)
}

/// Logs, when a log is asked for.
macro_rules! log {
    ($($part:tt)*) => {
        if $crate::log::enabled() {
            $crate::log::line(format_args!($($part)*));
        }
    };
}
pub(crate) use log;
