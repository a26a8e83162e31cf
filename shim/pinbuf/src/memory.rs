// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mappings that this crate makes, and copies into and out of them.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{self, MapFlags, ProtFlags};

use crate::{Error, Result};

/// A mapping that is its own only owner, aligned.
///
/// Others (devices, processes) may write to the memory at any time, so there are no references to
/// it: bytes are copied in and out.
///
/// # Invariants
///
/// `address..address + len` is mapped readable and writable until this is dropped. Nothing of it
/// raises SIGBUS: it is anonymous, a file of this crate's that keeps its size, or a dma-buf.
#[derive(Debug)]
pub(crate) struct Memory {
    address: NonNull<c_void>,
    len: usize,
}

// SAFETY: the memory belongs to the process, not to a thread, and is accessed only by copies that
// assume nothing about who else writes.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`; two threads that write the same bytes leave one's or the other's.
unsafe impl Sync for Memory {}

const PROT: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Memory {
    /// Anonymous memory, private.
    pub(crate) fn anonymous(len: usize, align: usize, extra: MapFlags) -> Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | extra;
        Self::place(len, align, |at, fixed| {
            // SAFETY: nothing that exists is replaced: `place` gives no other flag for an address than
            // MAP_FIXED_NOREPLACE.
            unsafe { mman::mmap_anonymous(at, nonzero(len)?, PROT, flags | fixed) }
                .map_err(Error::system("mmap"))
        })
    }

    /// A file, or dma-buf, mapped shared from its start.
    ///
    /// The file must keep its size (a seal, or its kind, sees to it).
    pub(crate) fn shared(fd: impl AsFd, len: usize, align: usize) -> Result<Self> {
        Self::place(len, align, |at, fixed| {
            let flags = MapFlags::MAP_SHARED | fixed;
            // SAFETY: nothing that exists is replaced: `place` gives no other flag for an address than
            // MAP_FIXED_NOREPLACE.
            unsafe { mman::mmap(at, nonzero(len)?, PROT, flags, fd.as_fd(), 0) }
                .map_err(Error::system("mmap"))
        })
    }

    /// Maps at a multiple of `align`, a power of two.
    ///
    /// A reservation finds free addresses for that, and is given back as a whole before they are used:
    /// where `MAP_FIXED` fails in the file's own `mmap`, the kernel leaves a hole in what it was to
    /// replace, another thread's mapping may get that, and unmapping the reservation would unmap the
    /// other one.
    fn place(
        len: usize,
        align: usize,
        map: impl Fn(Option<NonZeroUsize>, MapFlags) -> Result<NonNull<c_void>>,
    ) -> Result<Self> {
        /// How often another thread may take the addresses first.
        const TRIES: usize = 100;
        if align <= crate::page_size() {
            // INVARIANT: mapped by the caller's closure, and known nowhere else.
            return Ok(Self {
                address: map(None, MapFlags::empty())?,
                len,
            });
        }
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let mut tries = 0;
        loop {
            tries += 1;
            // The kernel gives the highest addresses that are free, to other threads as well: each time a place farther below
            // them is tried.
            let below = align.checked_mul(tries);
            let reserved = below.and_then(|below| len.checked_add(below));
            let reserved = nonzero(reserved.ok_or(Error::TooLarge)?)?;
            // SAFETY: without an address nothing that exists is replaced.
            let start =
                unsafe { mman::mmap_anonymous(None, reserved, ProtFlags::PROT_NONE, flags) }
                    .map_err(Error::system("mmap"))?;
            // SAFETY: what was reserved above, which nothing uses.
            unsafe { mman::munmap(start, reserved.get()) }.map_err(Error::system("munmap"))?;
            let aligned = (start.as_ptr() as usize).next_multiple_of(align);
            match map(NonZeroUsize::new(aligned), MapFlags::MAP_FIXED_NOREPLACE) {
                Err(Error::System {
                    errno: Errno::EEXIST,
                    ..
                }) if tries < TRIES => {}
                // INVARIANT: mapped by the caller's closure, and known nowhere else.
                result => return result.map(|address| Self { address, len }),
            }
        }
    }

    pub(crate) fn advise(&self, advice: mman::MmapAdvise) -> nix::Result<()> {
        // SAFETY: the callers' advice (huge pages, no copy for children) changes no contents.
        unsafe { mman::madvise(self.address, self.len, advice) }
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address.as_ptr().cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        check_inside(offset, len, self.len)?;
        Ok(self.address().wrapping_add(offset))
    }

    pub(crate) fn read_at(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `from` is mapped for that length, and `to` is a reference of its own, so the two
        // do not overlap. A concurrent writer changes which bytes are copied, and nothing else.
        unsafe { copy(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    pub(crate) fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        let to = self.at(offset, from.len())?;
        // SAFETY: as for `read_at`, the other way round.
        unsafe { copy(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    pub(crate) fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<()> {
        let to = self.at(offset, len)?;
        // SAFETY: mapped for that length, and without references.
        unsafe { to.write_bytes(byte, len) };
        Ok(())
    }
}

/// Copies bytes that others may write to.
///
/// # Safety
///
/// `from` must be readable and `to` writable for `len` bytes, and they must not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // The compiler cannot look through the pointers: one side is always memory whose address came
    // from a system call.
    // SAFETY: by the contract of this function.
    unsafe { std::ptr::copy_nonoverlapping(std::hint::black_box(from), to, len) };
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: by the invariants it is ours, and there are no references to it.
        let _ = unsafe { mman::munmap(self.address, self.len) };
    }
}

fn nonzero(len: usize) -> Result<NonZeroUsize> {
    NonZeroUsize::new(len).ok_or(Error::Empty)
}

/// Is `offset..offset + len` inside of `size` bytes?
pub(crate) fn check_inside(offset: usize, len: usize, size: usize) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfBounds { offset, len, size }),
    }
}

/// Is this a multiple of the page size?
pub(crate) fn check_aligned(value: u64) -> Result<()> {
    let align = crate::page_size() as u64;
    if value % align == 0 {
        Ok(())
    } else {
        Err(Error::Misaligned { value, align })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn aligned_memory() {
        for (len, align) in [(4096, 4096), (4096, 2 << 20), (5 << 20, 2 << 20)] {
            let memory = Memory::anonymous(len, align, MapFlags::empty()).unwrap();
            assert_eq!(memory.address() as usize % align, 0);
            memory.write_at(len - 3, b"end").unwrap();
            let mut end = [0; 4];
            memory.read_at(len - 4, &mut end).unwrap();
            assert_eq!(&end, b"\0end");
            let outside = Error::OutOfBounds {
                offset: len - 3,
                len: 4,
                size: len,
            };
            assert_eq!(memory.read_at(len - 3, &mut end), Err(outside));
            assert!(memory.write_at(usize::MAX, b"x").is_err());
        }
    }

    /// Where the kernel calls a file's own `mmap`, it has unmapped already what is at a fixed
    /// address: when that fails, there is a hole, and another thread's mapping may be in it.
    #[test]
    fn a_mapping_that_fails_leaves_those_of_others_alone() {
        const LEN: usize = 8 << 20;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // A socket cannot be mapped.
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert!(Memory::shared(&socket, LEN, 2 << 20).is_err());
                }
            });
            let end = Instant::now() + Duration::from_secs(1);
            let mut lost = 0;
            while Instant::now() < end {
                let len = nonzero(LEN).unwrap();
                // SAFETY: without an address nothing that exists is replaced.
                let at = unsafe { mman::mmap_anonymous(None, len, ProtFlags::PROT_NONE, flags) };
                let at = at.unwrap();
                std::thread::yield_now();
                // SAFETY: the mapping of above, if it is still there. That changes nothing.
                let kept = unsafe { mman::mprotect(at, LEN, ProtFlags::PROT_NONE) };
                lost += u32::from(kept.is_err());
                // SAFETY: as above; no other thread maps something and keeps it.
                unsafe { mman::munmap(at, LEN) }.unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(lost, 0, "mappings of another thread are gone");
        });
    }
}
