// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mapping dma-bufs where huge page-table entries fit.
//!
//! The kernel places a dma-buf's mapping at any page. pinbuf enters a buffer with 2 MiB entries, but
//! only at addresses that are as aligned. So a program that lets the kernel choose gets an address
//! that is.

use core::ffi::c_int;

use crate::sys::{self, DMA_BUF_MAGIC};

const MIB2: usize = 2 << 20;
/// x86's; no flag elsewhere.
const MAP_32BIT: c_int = 0x40;

/// Is this a call that alignment may help? It costs a few comparisons.
#[inline]
pub fn may_help(address: usize, len: usize, flags: c_int, fd: c_int) -> bool {
    fd >= 0
        && address == 0
        && len >= MIB2
        && matches!(
            flags & libc::MAP_TYPE,
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
        )
        && flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE | MAP_32BIT) == 0
}

/// Maps a dma-buf, aligned; `None` when it is none or that fails, and the program's call should
/// be made as it is.
pub fn map(len: usize, prot: c_int, flags: c_int, fd: c_int, offset: u64) -> Option<usize> {
    if sys::fstatfs(fd).ok()?.f_type != DMA_BUF_MAGIC {
        return None;
    }
    map_aligned(MIB2, len, prot, flags, fd, offset)
}

fn map_aligned(
    align: usize,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: u64,
) -> Option<usize> {
    let len = len.checked_next_multiple_of(4096)?;
    let reserved = len.checked_add(align)?;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: without an address nothing that exists is replaced.
    let start = unsafe { sys::mmap(None, reserved, libc::PROT_NONE, anonymous, -1, 0) }.ok()?;
    let end = start + reserved;
    let phase = offset % align as u64;
    let address = align_to(start as u64, align as u64, phase) as usize;
    // SAFETY: it lies in what was just reserved: at most `align - 1` behind its start.
    let mapped = unsafe { sys::mmap(Some(address), len, prot, flags, fd, offset) };
    if mapped.is_err() {
        // SAFETY: just reserved, and unused.
        unsafe { sys::munmap(start, reserved) };
        return None;
    }
    if start < address {
        // SAFETY: the part in front, unused.
        unsafe { sys::munmap(start, address - start) };
    }
    if address + len < end {
        // SAFETY: the part behind, unused.
        unsafe { sys::munmap(address + len, end - (address + len)) };
    }
    Some(address)
}

/// The first number from `least` on that leaves `phase` when divided by `align`.
fn align_to(least: u64, align: u64, phase: u64) -> u64 {
    least + (phase + align - least % align) % align
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_calls_are_touched() {
        let shared = libc::MAP_SHARED;
        assert!(may_help(0, MIB2, shared, 3));
        assert!(may_help(0, MIB2, shared | libc::MAP_POPULATE, 3));
        assert!(may_help(0, MIB2, libc::MAP_SHARED_VALIDATE, 3));
        assert!(!may_help(4096, MIB2, shared, 3));
        assert!(!may_help(0, MIB2 - 1, shared, 3));
        assert!(!may_help(0, MIB2, shared, -1));
        assert!(!may_help(0, MIB2, libc::MAP_PRIVATE, 3));
        assert!(!may_help(0, MIB2, shared | libc::MAP_FIXED, 3));
    }

    #[test]
    fn addresses_are_aligned_with_the_offset() {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 16 << 20) }, 0);
        let prot = libc::PROT_READ;
        for offset in [0, 4096, 2 << 20, (2 << 20) + 8192] {
            let len = (5 << 20) + 100;
            let at = map_aligned(MIB2, len, prot, libc::MAP_SHARED, fd, offset).unwrap();
            assert_eq!(at as u64 % MIB2 as u64, offset % MIB2 as u64);
            // SAFETY: the mapping of above.
            unsafe { sys::munmap(at, len) };
        }
        // What fails leaves nothing behind.
        assert_eq!(map_aligned(MIB2, MIB2, prot, libc::MAP_SHARED, fd, 1), None);
        // A memfd is no dma-buf.
        assert_eq!(map(MIB2, prot, libc::MAP_SHARED, fd, 0), None);
        sys::close(fd);
    }
}
