// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls, made directly: neither libc's cancellation points nor our own interposed
//! functions lie between.

use core::ffi::{c_int, c_long, c_void, CStr};
use core::mem::{size_of_val, MaybeUninit};
use core::ptr;

/// The `f_type` of a dma-buf's file.
pub const DMA_BUF_MAGIC: i64 = 0x444d_4142;

/// An error number, as in `errno`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub c_int);

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

pub fn close(fd: c_int) {
    // SAFETY: the callers own the descriptor.
    let _ = unsafe { libc::syscall(libc::SYS_close, fd) };
}

pub fn open(path: &CStr, flags: c_int) -> Result<c_int> {
    // SAFETY: `path` is a terminated string, and without O_CREAT no mode is read.
    let ret = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0) };
    check(ret).map(|fd| fd as c_int)
}

pub fn fstat(fd: c_int) -> Result<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel writes at most one struct stat to the memory given.
    check(unsafe { libc::syscall(libc::SYS_fstat, fd, stat.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the struct is filled.
    Ok(unsafe { stat.assume_init() })
}

pub fn fstatfs(fd: c_int) -> Result<libc::statfs> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel writes at most one struct statfs to the memory given.
    check(unsafe { libc::syscall(libc::SYS_fstatfs, fd, stat.as_mut_ptr()) })?;
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

/// Maps memory; with `at`, at exactly that address.
///
/// # Safety
///
/// With `at`, what is mapped in `at..at + len` must be the caller's own, and unused.
pub unsafe fn mmap(
    at: Option<usize>,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: u64,
) -> Result<usize> {
    let flags = if at.is_some() {
        flags | libc::MAP_FIXED
    } else {
        flags
    };
    // SAFETY: without MAP_FIXED the kernel picks addresses that are free; with it, by the contract
    // of this function.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            at.unwrap_or(0),
            len,
            prot,
            flags,
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
pub unsafe fn munmap(address: usize, len: usize) {
    // SAFETY: by the contract of this function.
    let _ = unsafe { libc::syscall(libc::SYS_munmap, address, len) };
}

/// Writes all of `bytes`, as far as possible.
pub fn write(fd: c_int, bytes: &[u8]) {
    // SAFETY: the kernel reads `bytes` only.
    let _ = unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) };
}

/// Copies from an address that the program gave, which may be anything: `EFAULT` if any of it
/// cannot be read.
pub fn copy_from_program<T: Plain>(to: &mut [T], from: usize) -> Result<()> {
    let len = size_of_val(to);
    if len == 0 {
        return Ok(());
    }
    let local = libc::iovec {
        iov_base: to.as_mut_ptr().cast(),
        iov_len: len,
    };
    let remote = libc::iovec {
        iov_base: from as *mut c_void,
        iov_len: len,
    };
    // SAFETY: getpid reads no memory.
    let pid = unsafe { libc::syscall(libc::SYS_getpid) };
    // SAFETY: the kernel writes `len` bytes at most to `to`, for which every pattern of bytes is
    // valid (`Plain`), and checks `remote` itself.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_process_vm_readv,
            pid,
            ptr::from_ref(&local),
            1usize,
            ptr::from_ref(&remote),
            1usize,
            0usize,
        )
    };
    match check(ret) {
        Ok(read) if read as usize == len => Ok(()),
        Ok(_) | Err(Errno(libc::EFAULT)) => Err(Errno(libc::EFAULT)),
        // A seccomp filter, or a kernel without the call: a pipe makes the same checks.
        Err(_) => copy_through_pipe(to.as_mut_ptr().cast(), from, len),
    }
}

/// Copies `len` bytes from `from`, which may be anything, to `to`, which can take them.
fn copy_through_pipe(to: *mut u8, from: usize, len: usize) -> Result<()> {
    const STEP: usize = 4096;
    let mut ends = [0 as c_int; 2];
    // SAFETY: the kernel writes two descriptors to `ends`.
    check(unsafe { libc::syscall(libc::SYS_pipe2, ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    let mut done = 0;
    let mut result = Ok(());
    while done < len {
        let step = STEP.min(len - done);
        let from = from.wrapping_add(done);
        // SAFETY: the kernel checks `from` itself.
        let written = check(unsafe { libc::syscall(libc::SYS_write, ends[1], from, step) });
        let written = match written {
            Ok(written) => written as usize,
            Err(error) => {
                result = Err(error);
                break;
            }
        };
        // SAFETY: `done + written` is at most `len`, which `to` can take.
        let to = unsafe { to.add(done) };
        // SAFETY: as above; the kernel writes `written` bytes at most.
        match check(unsafe { libc::syscall(libc::SYS_read, ends[0], to, written) }) {
            Ok(read) if read as usize == written && written > 0 => done += written,
            _ => {
                result = Err(Errno(libc::EFAULT));
                break;
            }
        }
    }
    close(ends[0]);
    close(ends[1]);
    result
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

    #[test]
    fn what_can_be_read_is_copied() {
        let from: Vec<u64> = (0..5000).collect();
        let mut to = vec![0u64; 5000];
        copy_from_program(&mut to, from.as_ptr() as usize).unwrap();
        assert_eq!(from, to);
        to.fill(0);
        copy_through_pipe(to.as_mut_ptr().cast(), from.as_ptr() as usize, 40_000).unwrap();
        assert_eq!(from, to);
    }

    #[test]
    fn what_cannot_be_read_is_efault() {
        let mut to = [0u64; 2];
        for bad in [0, 1, usize::MAX, 0xdead_0000_0000_0000] {
            assert_eq!(copy_from_program(&mut to, bad), Err(Errno(libc::EFAULT)));
            let to = to.as_mut_ptr().cast();
            assert_eq!(copy_through_pipe(to, bad, 16), Err(Errno(libc::EFAULT)));
        }
    }

    #[test]
    fn the_end_of_a_mapping_is_respected() {
        // SAFETY: a new mapping.
        let at = unsafe {
            mmap(
                None,
                8192,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let at = at.unwrap();
        // SAFETY: the second page of that mapping, which nothing uses.
        unsafe { munmap(at + 4096, 4096) };
        let mut to = [1u64; 2];
        assert_eq!(
            copy_from_program(&mut to, at + 4096 - 8),
            Err(Errno(libc::EFAULT))
        );
        assert_eq!(copy_from_program(&mut to, at + 4096 - 16), Ok(()));
        assert_eq!(to, [0, 0]);
    }
}
