// SPDX-License-Identifier: MIT OR Apache-2.0

//! The functions that stand before libc's.
//!
//! A path is compared only after the kernel has read it: until then it may be a pointer to
//! nowhere, for which the kernel says `EFAULT` and we would crash. So each call is made as the
//! program asked for it, and made once more for `/dev/pinbuf` if the path turns out to be
//! `/dev/udmabuf`. The first call has no effect but a descriptor, which is closed once `/dev/pinbuf` is open.
//! Where that cannot be had, the first call's result stands. With `O_CREAT`, where there is no
//! `/dev/udmabuf` and the program may write to `/dev`, the first call does create a regular file, as it does
//! without the shim. It stays: whether the file was there before cannot be found out afterwards.

use core::ffi::{c_char, c_int, c_void};

use libc::mode_t;

use crate::log::log;
use crate::maps::MAPS;
use crate::sys::{errno, set_errno, Errno};
use crate::{align, create, device, late, next, request, sys};

const UDMABUF: &[u8] = b"/dev/udmabuf\0";
const PINBUF: *const c_char = c"/dev/pinbuf".as_ptr();

/// Does a call fail with this error also before the kernel has read the path, or because it could not? Flags are
/// checked before, a sandbox or an old kernel has no such call at all, and a descriptor is allocated before the
/// path's own error is looked at. For pinbuf's device, each of these would fail in the same way.
fn may_be_unread(error: c_int) -> bool {
    matches!(
        error,
        libc::EFAULT | libc::EINVAL | libc::ENOSYS | libc::EMFILE | libc::ENOMEM
    )
}

/// Is this the path of udmabuf's device? `result` is that of a call which was given the path.
///
/// # Safety
///
/// If the kernel has read `path`, it must be null or a terminated string.
#[inline]
unsafe fn is_udmabuf(path: *const c_char, result: c_int) -> bool {
    if path.is_null() || (result == -1 && may_be_unread(errno())) {
        return false;
    }
    for (i, &byte) in UDMABUF.iter().enumerate() {
        // SAFETY: all bytes before were equal and not zero, so the string goes on here.
        let found = unsafe { *path.wrapping_add(i) };
        if found as u8 != byte {
            return false;
        }
    }
    true
}

/// Which of two errors the program gets: of its own call, and of the same for pinbuf's device. The latter
/// says why pinbuf cannot be used, unless there is no such device.
fn error_of(own: c_int, pinbufs: c_int) -> c_int {
    if matches!(pinbufs, libc::ENOENT | libc::ENODEV | libc::ENOTTY) {
        own
    } else {
        pinbufs
    }
}

/// Opens pinbuf's device, if what has that name is it and can be used; otherwise `errno` says why not.
fn open_device(flags: c_int) -> c_int {
    // SAFETY: a terminated string; without O_CREAT the mode is not looked at.
    let fd = unsafe { next::openat(libc::AT_FDCWD, PINBUF, flags, 0) };
    if fd >= 0 {
        if let Err(Errno(error)) = device::check(fd) {
            sys::close(fd);
            set_errno(error);
            return -1;
        }
    }
    fd
}

/// Opens pinbuf's device in the place of udmabuf's, for which the program's own call gave `own`.
///
/// Where pinbuf cannot be had, for whatever reason, the program gets what it gets without the shim.
#[cold]
#[inline(never)]
fn open_pinbuf(mut own: c_int, flags: c_int) -> c_int {
    let mut before = errno();
    let exclusive = libc::O_CREAT | libc::O_EXCL;
    if flags & exclusive == exclusive {
        // There is such a file, whether the kernel has it or not.
        if own >= 0 {
            sys::close(own);
        }
        log!("/dev/udmabuf is not created: it exists");
        set_errno(libc::EEXIST);
        return -1;
    }
    let flags = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC);
    let mut fd = open_device(flags);
    if own >= 0 && (fd >= 0 || matches!(errno(), libc::EMFILE | libc::ENFILE)) {
        // The program gets the lower number, which its own call had; there may be no other.
        sys::close(own);
        let higher = fd;
        fd = open_device(flags);
        if fd >= 0 {
            if higher >= 0 {
                sys::close(higher);
            }
        } else if higher >= 0 {
            fd = higher;
        } else {
            let error = errno();
            // SAFETY: a terminated string; without O_CREAT the mode is not looked at.
            own = unsafe { next::openat(libc::AT_FDCWD, UDMABUF.as_ptr().cast(), flags, 0) };
            if own < 0 {
                // Another thread has the number now.
                before = errno();
            }
            set_errno(error);
        }
    }
    if fd >= 0 {
        MAPS.open();
        log!("/dev/udmabuf opened as /dev/pinbuf: fd {fd}");
        set_errno(before);
        return fd;
    }
    let error = errno();
    if own >= 0 {
        log!("cannot open /dev/pinbuf (errno {error}): fd {own} is the kernel's udmabuf");
        set_errno(before);
    } else {
        log!("cannot open /dev/pinbuf in place of /dev/udmabuf: errno {error}");
        set_errno(error_of(before, error));
    }
    own
}

/// Functions that open: all arguments are passed on.
macro_rules! interpose_open {
    ($($name:ident($($before:ident: $type:ty,)? | $($mode:ident: $mode_type:ty)?);)*) => {$(
        /// libc's function of this name, for which `/dev/udmabuf` is `/dev/pinbuf`.
        ///
        /// # Safety
        ///
        /// As for libc's.
        #[no_mangle]
        pub unsafe extern "C" fn $name(
            $($before: $type,)?
            path: *const c_char,
            flags: c_int
            $(, $mode: $mode_type)?
        ) -> c_int {
            // SAFETY: the program's own call.
            let fd = unsafe { next::$name($($before,)? path, flags $(, $mode)?) };
            // SAFETY: the kernel was given the path.
            if unsafe { is_udmabuf(path, fd) } {
                open_pinbuf(fd, flags)
            } else {
                fd
            }
        }
    )*};
}

interpose_open! {
    open(| mode: mode_t);
    open64(| mode: mode_t);
    __open(| mode: mode_t);
    __open64(| mode: mode_t);
    __open_2(|);
    __open64_2(|);
    openat(dir: c_int, | mode: mode_t);
    openat64(dir: c_int, | mode: mode_t);
    __openat_2(dir: c_int, |);
    __openat64_2(dir: c_int, |);
}

/// Functions that ask about a path: the call is made again with pinbuf's.
macro_rules! interpose_path {
    ($($name:ident($($before:ident: $before_type:ty,)* | $($after:ident: $after_type:ty),*);)*) => {$(
        /// libc's function of this name, for which `/dev/udmabuf` is `/dev/pinbuf`.
        ///
        /// # Safety
        ///
        /// As for libc's.
        #[no_mangle]
        pub unsafe extern "C" fn $name(
            $($before: $before_type,)*
            path: *const c_char
            $(, $after: $after_type)*
        ) -> c_int {
            // SAFETY: the program's own call.
            let result = unsafe { next::$name($($before,)* path $(, $after)*) };
            // SAFETY: the kernel was given the path.
            if !unsafe { is_udmabuf(path, result) } {
                return result;
            }
            let own = errno();
            // SAFETY: the program's own call, with another terminated string.
            if unsafe { next::$name($($before,)* PINBUF $(, $after)*) } == 0 {
                return 0;
            }
            // What does not succeed writes nothing, so the own result is whole.
            set_errno(if result == 0 { own } else { error_of(own, errno()) });
            result
        }
    )*};
}

interpose_path! {
    access(| mode: c_int);
    eaccess(| mode: c_int);
    euidaccess(| mode: c_int);
    faccessat(dir: c_int, | mode: c_int, flags: c_int);
    stat(| to: *mut libc::stat);
    stat64(| to: *mut libc::stat64);
    lstat(| to: *mut libc::stat);
    lstat64(| to: *mut libc::stat64);
    fstatat(dir: c_int, | to: *mut libc::stat, flags: c_int);
    fstatat64(dir: c_int, | to: *mut libc::stat64, flags: c_int);
    __xstat(version: c_int, | to: *mut libc::stat);
    __xstat64(version: c_int, | to: *mut libc::stat64);
    __lxstat(version: c_int, | to: *mut libc::stat);
    __lxstat64(version: c_int, | to: *mut libc::stat64);
    __fxstatat(version: c_int, dir: c_int, | to: *mut libc::stat, flags: c_int);
    __fxstatat64(version: c_int, dir: c_int, | to: *mut libc::stat64, flags: c_int);
    statx(dir: c_int, | flags: c_int, mask: u32, to: *mut libc::statx);
}

/// libc's `ioctl`, which answers udmabuf's requests on pinbuf's device.
///
/// # Safety
///
/// As for libc's.
#[no_mangle]
pub unsafe extern "C" fn ioctl(fd: c_int, number: libc::c_ulong, arg: usize) -> c_int {
    // The kernel looks at 32 bits.
    if matches!(number as u32, request::CREATE | request::CREATE_LIST) {
        return request(fd, number, arg);
    }
    if number as u32 == late::REGISTER {
        return register(fd, number, arg);
    }
    // SAFETY: the program's own call.
    unsafe { next::ioctl(fd, number, arg) }
}

/// Memory is registered with userfaultfd.
#[cold]
#[inline(never)]
fn register(fd: c_int, number: libc::c_ulong, arg: usize) -> c_int {
    // SAFETY: the program's own call.
    let result = unsafe { next::ioctl(fd, number, arg) };
    let own = errno();
    // Where the kernel can read the argument and not write to it, it has registered the memory when it says so.
    if result == 0 || (own == libc::EFAULT && late::is_readable(arg)) {
        // SAFETY: the argument of this call.
        unsafe { late::registered(arg) };
    }
    set_errno(own);
    result
}

/// One of udmabuf's requests. A device that is not known as pinbuf's gets the program's own call first, since a program
/// may have locked itself in with udmabuf's requests alone: pinbuf's device says that it does not know them.
#[cold]
#[inline(never)]
fn request(fd: c_int, number: libc::c_ulong, arg: usize) -> c_int {
    let before = errno();
    if device::is_known(fd) {
        set_errno(before);
        if let Some(result) = answer(fd, number as u32, arg) {
            return result;
        }
    }
    // SAFETY: the program's own call.
    let result = unsafe { next::ioctl(fd, number, arg) };
    let own = errno();
    if result == -1 && own == libc::ENOTTY && device::is_pinbuf(fd) {
        set_errno(before);
        if let Some(result) = answer(fd, number as u32, arg) {
            return result;
        }
    }
    set_errno(own);
    match result {
        -1 => log!("failed with errno {own}, on another device than pinbuf's"),
        dmabuf => log!("created fd {dmabuf}: by the kernel's udmabuf"),
    }
    result
}

/// Answers one of udmabuf's requests; `None` if `fd` turns out not to be pinbuf's.
fn answer(fd: c_int, number: u32, arg: usize) -> Option<c_int> {
    let before = errno();
    match create::answer(fd, number, arg) {
        Ok(dmabuf) => {
            set_errno(before);
            Some(dmabuf)
        }
        Err(Errno(libc::ENOTTY)) => {
            device::forget();
            set_errno(before);
            None
        }
        Err(Errno(errno)) => {
            set_errno(errno);
            Some(-1)
        }
    }
}

macro_rules! interpose_mmap {
    ($($name:ident)*) => {$(
        /// libc's function of this name, which aligns large shared mappings of dma-bufs where the
        /// kernel is free to choose the address.
        ///
        /// # Safety
        ///
        /// As for libc's.
        #[no_mangle]
        pub unsafe extern "C" fn $name(
            at: *mut c_void,
            len: usize,
            prot: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void {
            if align::may_help(at as usize, len, flags, fd) {
                let before = errno();
                let mapped = align::map(len, prot, flags, fd, offset as u64);
                set_errno(before);
                if let Some(address) = mapped {
                    return address as *mut c_void;
                }
            }
            // SAFETY: the program's own call.
            unsafe { next::$name(at, len, prot, flags, fd, offset) }
        }
    )*};
}

interpose_mmap! { mmap mmap64 }
