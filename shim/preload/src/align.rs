// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mapping dma-bufs where huge page-table entries fit.
//!
//! The kernel places a dma-buf's mapping at any page. pinbuf enters a buffer with entries of 2 MiB (with
//! pages of 4 KiB), but only at addresses that are as aligned. So a program that lets the kernel choose gets
//! an address that is.
//!
//! Which mappings are of dma-bufs is known from the numbers of the descriptors that creates have returned: asking
//! takes a system call that a sandbox may kill for, and `mmap` itself is allowed there. So buffers that a program
//! receives or duplicates are left to the kernel; and a number that another file has got since makes the shim align a
//! mapping of that, which harms nothing. Before the first buffer, `mmap` costs a program a few comparisons.

use core::ffi::c_int;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::sys;

/// x86's; no flag elsewhere.
const MAP_32BIT: c_int = 0x40;

/// A bit for each number below 1,024, and for those above that leave the same remainder.
static MADE: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

fn bit(fd: c_int) -> (&'static AtomicU64, u64) {
    let place = fd as usize % (64 * MADE.len());
    (&MADE[place / 64], 1 << (place % 64))
}

/// Notes that a descriptor is a dma-buf's.
pub fn made(dmabuf: c_int) {
    let (word, bit) = bit(dmabuf);
    word.fetch_or(bit, Ordering::Relaxed);
}

fn was_made(fd: c_int) -> bool {
    let (word, bit) = bit(fd);
    word.load(Ordering::Relaxed) & bit != 0
}

/// What an entry one level above pages maps: a table has as many entries of eight bytes as fit into a page.
fn huge_entry() -> usize {
    let page = sys::page_size() as usize;
    page * (page / 8)
}

/// Is this a call that alignment may help? It costs a few comparisons.
#[inline]
pub fn may_help(address: usize, len: usize, flags: c_int, fd: c_int) -> bool {
    fits(address, len, flags, fd) && was_made(fd)
}

fn fits(address: usize, len: usize, flags: c_int, fd: c_int) -> bool {
    fd >= 0
        && address == 0
        && matches!(
            flags & libc::MAP_TYPE,
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
        )
        && flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE | MAP_32BIT) == 0
        && len >= huge_entry()
}

/// Maps a dma-buf, aligned; `None` when that fails, and the program's call should be made as it is.
pub fn map(len: usize, prot: c_int, flags: c_int, fd: c_int, offset: u64) -> Option<usize> {
    map_aligned(huge_entry(), len, prot, flags, fd, offset)
}

fn map_aligned(
    align: usize,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: u64,
) -> Option<usize> {
    let len = len.checked_next_multiple_of(sys::page_size() as usize)?;
    let reserved = len.checked_add(align)?;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = sys::mmap(None, reserved, libc::PROT_NONE, anonymous, -1, 0).ok()?;
    let phase = offset % align as u64;
    let address = align_to(start as u64, align as u64, phase) as usize;
    // The reservation only finds free addresses. It is given back as a whole before the file is mapped: where
    // MAP_FIXED fails in the file's own `mmap`, the kernel leaves a hole in what it was to replace, another
    // thread's mapping may get that, and unmapping the reservation would unmap the other one.
    // SAFETY: just reserved, and unused.
    unsafe { sys::munmap(start, reserved) }.ok()?;
    // Another thread's mapping may get these addresses meanwhile: then the kernel chooses others.
    sys::mmap(Some(address), len, prot, flags, fd, offset).ok()
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
        let (shared, huge) = (libc::MAP_SHARED, huge_entry());
        assert!(fits(0, huge, shared, 3));
        assert!(fits(0, huge, shared | libc::MAP_POPULATE, 3));
        assert!(fits(0, huge, libc::MAP_SHARED_VALIDATE, 3));
        assert!(!fits(4096, huge, shared, 3));
        assert!(!fits(0, huge - 1, shared, 3));
        assert!(!fits(0, huge, shared, -1));
        assert!(!fits(0, huge, libc::MAP_PRIVATE, 3));
        assert!(!fits(0, huge, shared | libc::MAP_FIXED, 3));
    }

    #[test]
    fn only_what_was_made_is_touched() {
        let help = |fd| may_help(0, huge_entry(), libc::MAP_SHARED, fd);
        assert!(!help(703) && !help(-1));
        made(703);
        assert!(help(703) && !help(702) && !help(704) && !help(-1));
        made(5000);
        assert!(help(5000) && !help(5001));
    }

    #[test]
    fn addresses_are_aligned_with_the_offset() {
        let (huge, page) = (huge_entry(), sys::page_size());
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 8 * huge as i64) }, 0);
        let prot = libc::PROT_READ;
        for offset in [0, page, huge as u64, huge as u64 + 2 * page] {
            let len = 2 * huge + huge / 2 + 100;
            // Another test's thread may take the addresses meanwhile, but not each time.
            let aligned = (0..1000).any(|_| {
                let at = map_aligned(huge, len, prot, libc::MAP_SHARED, fd, offset).unwrap();
                // SAFETY: the mapping of above.
                unsafe { sys::munmap(at, len) }.unwrap();
                at as u64 % huge as u64 == offset % huge as u64
            });
            assert!(aligned, "{offset}");
        }
        // What fails leaves nothing behind.
        assert_eq!(map_aligned(huge, huge, prot, libc::MAP_SHARED, fd, 1), None);
        sys::close(fd);
    }

    #[test]
    fn a_mapping_that_fails_leaves_those_of_others_alone() {
        let huge = huge_entry();
        // Its own `mmap` refuses, which is late: after the kernel has made room.
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
        assert!(fd >= 0);
        let stop = core::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
                    let result = map_aligned(huge, 4 * huge, prot, flags, fd, 0);
                    assert_eq!(result, None);
                }
            });
            let end = std::time::Instant::now() + std::time::Duration::from_millis(1000);
            let mut lost = 0;
            while std::time::Instant::now() < end {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let at = sys::mmap(None, 4 * huge, libc::PROT_NONE, flags, -1, 0).unwrap();
                std::thread::yield_now();
                // SAFETY: the mapping of above, if it is still there. That changes nothing.
                let kept = unsafe { libc::mprotect(at as *mut _, 4 * huge, libc::PROT_NONE) };
                lost += u32::from(kept != 0);
                // SAFETY: as above; there is no other thread that maps something and keeps it.
                unsafe { sys::munmap(at, 4 * huge) }.unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(lost, 0, "mappings of another thread are gone");
        });
        sys::close(fd);
    }
}
