// SPDX-License-Identifier: MIT OR Apache-2.0

//! The functions of the next library in the search order, libc's as a rule.
//!
//! They are looked up once, by a constructor. Until it has run (constructors of other libraries
//! may come first) the calls are made without libc.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};
use std::ffi::CStr;

use libc::mode_t;

use crate::log;

/// A function of the next library, or null.
struct Symbol(AtomicPtr<c_void>);

impl Symbol {
    const fn new() -> Self {
        Self(AtomicPtr::new(core::ptr::null_mut()))
    }

    fn resolve(&self, name: &CStr) {
        // SAFETY: a terminated string.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
        self.0.store(found, Ordering::Relaxed);
    }

    #[inline]
    fn get(&self) -> *mut c_void {
        self.0.load(Ordering::Relaxed)
    }
}

#[used]
#[link_section = ".init_array"]
static INIT: extern "C" fn() = init;

/// Declares the functions: the symbol's name, its type, and what is called while it is unknown.
macro_rules! next {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) -> $ret:ty = $fallback:expr;)*) => {
        #[allow(non_upper_case_globals)]
        mod symbols {
            use super::Symbol;
            $(pub(super) static $name: Symbol = Symbol::new();)*
        }

        extern "C" fn init() {
            let errno = crate::sys::errno();
            $(symbols::$name.resolve(
                // No name contains a zero before its end.
                CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes())
                    .unwrap_or_default(),
            );)*
            log::init();
            crate::sys::set_errno(errno);
        }

        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// As for libc's function of that name.
            #[inline]
            pub unsafe fn $name($($arg: $type),*) -> $ret {
                let next = symbols::$name.get();
                if next.is_null() {
                    $fallback
                } else {
                    // SAFETY: the symbol of this name has this type.
                    let next = unsafe {
                        core::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $ret>(
                            next,
                        )
                    };
                    // SAFETY: by the contract of this function.
                    unsafe { next($($arg),*) }
                }
            }
        )*
    };
}

/// A system call with the arguments that the program gave.
macro_rules! raw {
    ($number:ident $(, $arg:expr)*) => {
        // SAFETY: the call that libc's function would make, with the program's own arguments.
        unsafe { libc::syscall(libc::$number $(, $arg)*) }
    };
}

const CWD: c_int = libc::AT_FDCWD;

// Variadic functions are declared with all their arguments: where registers pass arguments (all
// 64-bit systems) the two are called alike, and an argument that was not given is not looked at.
next! {
    open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, CWD, path, flags, mode) as c_int;
    open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, CWD, path, flags, mode) as c_int;
    __open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, CWD, path, flags, mode) as c_int;
    __open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, CWD, path, flags, mode) as c_int;
    __open_2(path: *const c_char, flags: c_int) -> c_int =
        raw!(SYS_openat, CWD, path, flags, 0) as c_int;
    __open64_2(path: *const c_char, flags: c_int) -> c_int =
        raw!(SYS_openat, CWD, path, flags, 0) as c_int;
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, dir, path, flags, mode) as c_int;
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        raw!(SYS_openat, dir, path, flags, mode) as c_int;
    __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int =
        raw!(SYS_openat, dir, path, flags, 0) as c_int;
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int =
        raw!(SYS_openat, dir, path, flags, 0) as c_int;
    ioctl(fd: c_int, request: libc::c_ulong, arg: usize) -> c_int =
        raw!(SYS_ioctl, fd, request, arg) as c_int;
    access(path: *const c_char, mode: c_int) -> c_int =
        raw!(SYS_faccessat, CWD, path, mode) as c_int;
    eaccess(path: *const c_char, mode: c_int) -> c_int =
        raw!(SYS_faccessat2, CWD, path, mode, libc::AT_EACCESS) as c_int;
    euidaccess(path: *const c_char, mode: c_int) -> c_int =
        raw!(SYS_faccessat2, CWD, path, mode, libc::AT_EACCESS) as c_int;
    faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int =
        raw!(SYS_faccessat2, dir, path, mode, flags) as c_int;
    stat(path: *const c_char, to: *mut libc::stat) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, 0) as c_int;
    stat64(path: *const c_char, to: *mut libc::stat64) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, 0) as c_int;
    lstat(path: *const c_char, to: *mut libc::stat) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, libc::AT_SYMLINK_NOFOLLOW) as c_int;
    lstat64(path: *const c_char, to: *mut libc::stat64) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, libc::AT_SYMLINK_NOFOLLOW) as c_int;
    fstatat(dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int =
        raw!(SYS_newfstatat, dir, path, to, flags) as c_int;
    fstatat64(dir: c_int, path: *const c_char, to: *mut libc::stat64, flags: c_int) -> c_int =
        raw!(SYS_newfstatat, dir, path, to, flags) as c_int;
    __xstat(_version: c_int, path: *const c_char, to: *mut libc::stat) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, 0) as c_int;
    __xstat64(_version: c_int, path: *const c_char, to: *mut libc::stat64) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, 0) as c_int;
    __lxstat(_version: c_int, path: *const c_char, to: *mut libc::stat) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, libc::AT_SYMLINK_NOFOLLOW) as c_int;
    __lxstat64(_version: c_int, path: *const c_char, to: *mut libc::stat64) -> c_int =
        raw!(SYS_newfstatat, CWD, path, to, libc::AT_SYMLINK_NOFOLLOW) as c_int;
    __fxstatat(_version: c_int, dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int)
        -> c_int = raw!(SYS_newfstatat, dir, path, to, flags) as c_int;
    __fxstatat64(_version: c_int, dir: c_int, path: *const c_char, to: *mut libc::stat64, flags: c_int)
        -> c_int = raw!(SYS_newfstatat, dir, path, to, flags) as c_int;
    statx(dir: c_int, path: *const c_char, flags: c_int, mask: u32, to: *mut libc::statx) -> c_int =
        raw!(SYS_statx, dir, path, flags, mask, to) as c_int;
    mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64)
        -> *mut c_void = raw!(SYS_mmap, at, len, prot, flags, fd, offset) as *mut c_void;
    mmap64(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64)
        -> *mut c_void = raw!(SYS_mmap, at, len, prot, flags, fd, offset) as *mut c_void;
}
