// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_SHIM_LOG`: one line a call, on standard error (`1` or `stderr`) or appended to a file.

use core::ffi::c_int;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::ffi::{c_char, CStr};

use crate::sys;

const OFF: u32 = 0;
const STDERR: u32 = 1;
const FILE: u32 = 2;

static TARGET: AtomicU32 = AtomicU32::new(OFF);
/// With [`FILE`], a terminated string that lives as long as the process.
static PATH: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());
/// With [`STDERR`], the file that descriptor 2 was when the library was loaded: a program that has closed it may get
/// that number for its memory or data, into which no line must be written.
static FILE_OF_STDERR: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// The device and the inode number of what descriptor 2 is, if it is open.
fn file_of_stderr() -> Option<[u64; 2]> {
    let stat = sys::fstat(2).ok()?;
    Some([stat.st_dev, stat.st_ino])
}

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
        b"1" | b"stderr" => use_stderr(),
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

/// Logs to descriptor 2, as long as it is what it is now.
fn use_stderr() {
    if let Some(file) = file_of_stderr() {
        for (to, word) in FILE_OF_STDERR.iter().zip(file) {
            to.store(word, Ordering::Relaxed);
        }
        TARGET.store(STDERR, Ordering::Release);
    }
}

/// Is descriptor 2 what it was?
fn is_stderr() -> bool {
    let known = FILE_OF_STDERR.each_ref();
    file_of_stderr() == Some(known.map(|word| word.load(Ordering::Relaxed)))
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
        STDERR if is_stderr() => sys::write(2, text),
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
    // Nobody may read from a FIFO: then the line is lost, and the program does not wait.
    let flags = libc::O_WRONLY
        | libc::O_APPEND
        | libc::O_CREAT
        | libc::O_CLOEXEC
        | libc::O_NOCTTY
        | libc::O_NONBLOCK;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks something in a child, whose descriptors and variables are its own.
    fn in_child(check: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: a call without conditions.
            unsafe { libc::alarm(10) };
            let status = (!check()).into();
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) }
        }
        let mut status = -1;
        // SAFETY: the status is written.
        unsafe { libc::waitpid(child, &mut status, 0) };
        status == 0
    }

    #[test]
    fn lines_go_to_the_standard_error_of_the_start_only() {
        let memfd = || {
            sys::close(2);
            // SAFETY: a terminated name.
            unsafe { libc::memfd_create(c"log".as_ptr(), 0) == 2 }
        };
        let written = || sys::fstat(2).is_ok_and(|stat| stat.st_size > 0);
        assert!(in_child(|| {
            let opened = memfd();
            use_stderr();
            line(format_args!("a line"));
            opened && written()
        }));
        assert!(in_child(|| {
            use_stderr();
            let opened = memfd();
            line(format_args!("a line"));
            opened && !written()
        }));
        assert!(in_child(|| {
            sys::close(2);
            use_stderr();
            !enabled()
        }));
    }

    #[test]
    fn a_fifo_without_a_reader_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("pinbuf-log-{}", std::process::id()));
        let path = std::ffi::CString::new(path.into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a terminated string.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        assert!(in_child(|| {
            PATH.store(path.as_ptr().cast_mut(), Ordering::Relaxed);
            TARGET.store(FILE, Ordering::Release);
            line(format_args!("a line"));
            true
        }));
        // SAFETY: a terminated string.
        assert_eq!(unsafe { libc::unlink(path.as_ptr()) }, 0);
    }
}
