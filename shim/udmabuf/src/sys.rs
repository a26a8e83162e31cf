// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls, made directly: neither libc's cancellation points nor our own interposed
//! functions lie between.

use core::ffi::{c_int, c_long, c_void, CStr};
use core::mem::{size_of, MaybeUninit};
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

/// An error number, as in `errno`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub c_int);

/// What a system call returns.
pub type Result<T> = core::result::Result<T, Errno>;

/// The calling thread's `errno`.
pub fn errno() -> c_int {
    // SAFETY: a call without conditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: libc's pointer to the thread's errno is always valid.
    unsafe { *place }
}

/// Sets the calling thread's `errno`.
pub fn set_errno(value: c_int) {
    // SAFETY: a call without conditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: libc's pointer to the thread's errno is always valid.
    unsafe { *place = value }
}

fn check(ret: c_long) -> Result<c_long> {
    if ret == -1 {
        Err(Errno(errno()))
    } else {
        Ok(ret)
    }
}

/// `fcntl` with an integer argument.
pub fn fcntl(fd: c_int, command: c_int, arg: c_int) -> Result<c_int> {
    // SAFETY: the callers' commands take integers: the kernel touches no memory of ours.
    check(unsafe { libc::syscall(libc::SYS_fcntl, fd, command, arg) }).map(|ret| ret as c_int)
}

/// `getpid`.
pub fn getpid() -> c_int {
    // SAFETY: a call without conditions.
    unsafe { libc::syscall(libc::SYS_getpid) as c_int }
}

/// `close`, of a descriptor of the caller.
pub fn close(fd: c_int) {
    // SAFETY: the callers own the descriptor.
    let _ = unsafe { libc::syscall(libc::SYS_close, fd) };
}

/// `open`, without `O_CREAT`.
pub fn open(path: &CStr, flags: c_int) -> Result<c_int> {
    // SAFETY: `path` is a terminated string, and without O_CREAT no mode is read.
    let ret = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0) };
    check(ret).map(|fd| fd as c_int)
}

/// `fstat`.
pub fn fstat(fd: c_int) -> Result<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel writes at most one struct stat to the memory given.
    check(unsafe { libc::syscall(libc::SYS_fstat, fd, stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the struct is filled.
    Ok(unsafe { stat.assume_init() })
}

/// An ioctl whose argument is `arg`, a struct that holds its own extent.
///
/// # Safety
///
/// `request` must be one that reads and writes nothing but `T`, and memory that `arg` names and
/// that may be read and written so.
pub unsafe fn ioctl<T>(fd: c_int, request: u32, arg: &mut T) -> Result<c_int> {
    // SAFETY: by the contract of this function.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_ioctl,
            fd,
            c_long::from(request),
            ptr::from_mut(arg),
        )
    };
    check(ret).map(|ret| ret as c_int)
}

/// Maps memory; with `at`, preferably at that address. Nothing that is mapped is replaced: `MAP_FIXED` is not
/// passed on.
pub fn mmap(
    at: Option<usize>,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: u64,
) -> Result<usize> {
    // SAFETY: without MAP_FIXED the kernel picks addresses that are free.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            at.unwrap_or(0),
            len,
            prot,
            flags & !libc::MAP_FIXED,
            fd,
            offset as c_long,
        )
    };
    check(ret).map(|address| address as usize)
}

/// Unmaps memory.
///
/// # Safety
///
/// The range must be the caller's own, and unused.
pub unsafe fn munmap(address: usize, len: usize) -> Result<()> {
    // SAFETY: by the contract of this function.
    check(unsafe { libc::syscall(libc::SYS_munmap, address, len) }).map(|_| ())
}

/// Writes all of `bytes`, as far as possible.
pub fn write(fd: c_int, bytes: &[u8]) {
    // SAFETY: the kernel reads `bytes` only.
    let _ = unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) };
}

/// Can the program's memory be read at this address, for eight bytes?
///
/// `rt_sigprocmask` is a call that sandboxes allow, since every program makes it: it reads a set of signals
/// before it looks at what to do with it, and refuses that.
pub fn can_read(address: usize) -> bool {
    const NOTHING: c_int = -1;
    let none = ptr::null_mut::<c_void>();
    // SAFETY: the kernel reads eight bytes, if it can, and writes nothing.
    let ret = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, NOTHING, address, none, 8usize) };
    // A null pointer stands for no set at all.
    address != 0 && check(ret) != Err(Errno(libc::EFAULT))
}

/// Can the program's memory be read from `from` on, for `len` bytes, at least eight? A program that unmaps it
/// after this crashes, as it would by reading it.
fn can_read_all(from: usize, len: usize) -> bool {
    let Some(end) = from.checked_add(len) else {
        return false;
    };
    let page = page_size() as usize;
    // The first eight bytes, which may lie in two pages, and the beginning of every further page.
    let mut address = from;
    while address < end {
        if !can_read(address) {
            return false;
        }
        address = (address / page + 1).saturating_mul(page);
    }
    true
}

/// Eight bytes at any address.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Word(u64);

/// Copies from an address that the program gave, which may be anything, to `len` elements at `to`: `EFAULT`
/// if any of it cannot be read.
///
/// # Safety
///
/// There must be room for them. `T` must consist of whole words.
pub unsafe fn copy_from_program<T: Plain>(to: *mut T, len: usize, from: usize) -> Result<()> {
    const { assert!(size_of::<T>() % 8 == 0) };
    let bytes = len.checked_mul(size_of::<T>()).ok_or(Errno(libc::EFAULT))?;
    if bytes > 0 && !can_read_all(from, bytes) {
        return Err(Errno(libc::EFAULT));
    }
    let (to, from) = (to.cast::<Word>(), from as *const Word);
    for i in 0..bytes / 8 {
        // SAFETY: the kernel has just read from every page of it. Volatile, since other threads of the program
        // may write there.
        let word = unsafe { from.wrapping_add(i).read_volatile() };
        // SAFETY: by the contract of this function; every pattern is valid (`Plain`).
        unsafe { to.wrapping_add(i).write(word) };
    }
    Ok(())
}

/// The size of a page.
pub fn page_size() -> u64 {
    static PAGE: AtomicU64 = AtomicU64::new(0);
    let known = PAGE.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    // SAFETY: a call without conditions.
    let page = unsafe { libc::getauxval(libc::AT_PAGESZ) };
    PAGE.store(page, Ordering::Relaxed);
    page
}

/// Plain numbers: every pattern of bytes is a value, and zeroes are [`Default`]'s.
///
/// # Safety
///
/// That must be so.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: structs of integers without padding.
unsafe impl Plain for c_int {}
// SAFETY: integers.
unsafe impl Plain for pinbuf_uapi::Range {}
// SAFETY: structs of integers without padding.
unsafe impl Plain for pinbuf_uapi::Backing {}

#[cfg(test)]
mod tests {
    use super::*;

    // SAFETY: a number.
    unsafe impl Plain for u64 {}

    fn copy(to: &mut [u64], from: usize) -> Result<()> {
        // SAFETY: room for the words of a slice.
        unsafe { copy_from_program(to.as_mut_ptr(), to.len(), from) }
    }

    #[test]
    fn what_can_be_read_is_copied() {
        let from: Vec<u64> = (0..5000).collect();
        let mut to = vec![0u64; 5000];
        copy(&mut to, from.as_ptr() as usize).unwrap();
        assert_eq!(from, to);
        copy(&mut to[..2], from.as_ptr() as usize + 3).unwrap();
        assert_eq!(to[..2], [1 << 40, 2 << 40]);
        copy(&mut [], 0).unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_efault() {
        let mut to = [0u64; 2];
        for bad in [0, 1, usize::MAX, usize::MAX - 15, 0xdead_0000_0000_0000] {
            assert_eq!(copy(&mut to, bad), Err(Errno(libc::EFAULT)));
        }
    }

    #[test]
    fn the_end_of_a_mapping_is_respected() {
        let page = page_size() as usize;
        let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let at = mmap(None, 4 * page, prot, flags, -1, 0).unwrap();
        // SAFETY: the last page of that mapping, which nothing uses.
        unsafe { munmap(at + 3 * page, page) }.unwrap();
        let end = at + 3 * page;
        for len in [2, page / 4] {
            let mut to = vec![1u64; len];
            for beyond in [1, 4, 8, 12, 8 * len] {
                let from = end - 8 * len + beyond;
                assert_eq!(copy(&mut to, from), Err(Errno(libc::EFAULT)));
            }
            assert!(to.iter().all(|word| *word == 1));
            assert_eq!(copy(&mut to, end - 8 * len), Ok(()));
            assert!(to.iter().all(|word| *word == 0));
        }
    }
}
