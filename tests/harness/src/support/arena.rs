// SPDX-License-Identifier: MIT OR Apache-2.0

//! A part of the address space where nothing but a test maps anything, so that what the test unmapped
//! stays empty, and every address in it can be probed.

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::probe::{self, Copier};
use super::PAGE;

/// Far below where the kernel places mappings by itself.
const BASE: usize = 1 << 44;
/// From one arena to the next.
const STEP: usize = 1 << 40;

/// The part of the address space. Places in it are offsets from its beginning, which is a multiple of
/// 1 TiB. Each number is used by one arena at a time.
#[derive(Debug)]
pub struct Arena {
    base: usize,
    len: usize,
}

impl Arena {
    /// The arena of a number, which must be empty.
    pub fn new(number: usize, len: usize) -> Result<Self> {
        assert!(len <= STEP && len % PAGE == 0);
        let base = BASE + number * STEP;
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        let arena = Self { base, len };
        arena
            .map_with(0, len, libc::PROT_NONE, flags, None, 0)
            .context("the arena is not empty")?;
        arena.unmap(0, len).context("emptying the arena")?;
        Ok(arena)
    }

    /// Its size.
    #[allow(clippy::len_without_is_empty, reason = "its size, not what is mapped")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of a place.
    pub fn address(&self, at: usize) -> u64 {
        self.within(at, 0) as u64
    }

    fn within(&self, at: usize, len: usize) -> usize {
        assert!(at <= self.len && len <= self.len - at, "{at:#x}+{len:#x}");
        self.base + at
    }

    fn map_with(
        &self,
        at: usize,
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: usize,
    ) -> Result<(), Errno> {
        let address = self.within(at, len);
        let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        // SAFETY: only the test's mappings lie there, which it reaches by probes alone.
        let result = unsafe { libc::mmap(address as *mut _, len, prot, flags, fd, offset as i64) };
        if result == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        assert_eq!(result as usize, address, "where mmap maps");
        Ok(())
    }

    /// `mmap` with `MAP_FIXED`: replaces what is there.
    pub fn map(
        &self,
        at: usize,
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: usize,
    ) -> Result<(), Errno> {
        self.map_with(at, len, prot, flags | libc::MAP_FIXED, fd, offset)
    }

    /// As [`map`](Self::map), but fails with `EEXIST` if anything is there.
    pub fn map_if_empty(
        &self,
        at: usize,
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: usize,
    ) -> Result<(), Errno> {
        self.map_with(at, len, prot, flags | libc::MAP_FIXED_NOREPLACE, fd, offset)
    }

    /// `munmap`.
    pub fn unmap(&self, at: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: only the test's mappings lie there, which it reaches by probes alone.
        Errno::result(unsafe { libc::munmap(self.within(at, len) as *mut _, len) }).map(drop)
    }

    /// `mprotect`.
    pub fn protect(&self, at: usize, len: usize, prot: i32) -> Result<(), Errno> {
        // SAFETY: as in `unmap`.
        Errno::result(unsafe { libc::mprotect(self.within(at, len) as *mut _, len, prot) })
            .map(drop)
    }

    /// `madvise`.
    pub fn advise(&self, at: usize, len: usize, advice: i32) -> Result<(), Errno> {
        // SAFETY: as in `unmap`.
        Errno::result(unsafe { libc::madvise(self.within(at, len) as *mut _, len, advice) })
            .map(drop)
    }

    /// `mlock` or `munlock`.
    pub fn lock(&self, at: usize, len: usize, lock: bool) -> Result<(), Errno> {
        let address = self.within(at, len) as *const libc::c_void;
        let result = if lock {
            // SAFETY: changes nothing that a program sees.
            unsafe { libc::mlock(address, len) }
        } else {
            // SAFETY: as above.
            unsafe { libc::munlock(address, len) }
        };
        Errno::result(result).map(drop)
    }

    /// `mremap`; `to` counts with `MREMAP_FIXED` alone. Returns the place, which without that may lie
    /// outside of the arena.
    pub fn remap(
        &self,
        at: usize,
        old: usize,
        new: usize,
        flags: i32,
        to: usize,
    ) -> Result<usize, Errno> {
        let target = if flags & libc::MREMAP_FIXED != 0 {
            self.within(to, new)
        } else {
            0
        };
        let from = self.within(at, old) as *mut libc::c_void;
        // SAFETY: as in `unmap`, for both places.
        let result = unsafe { libc::mremap(from, old, new, flags, target) };
        if result == libc::MAP_FAILED {
            Err(Errno::last())
        } else {
            Ok((result as usize).wrapping_sub(self.base))
        }
    }

    /// Reads the word at a place.
    pub fn peek(&self, at: usize) -> Result<u64, Signal> {
        probe::peek(self.within(at, 8) as u64)
    }

    /// Writes the word at a place.
    pub fn poke(&self, at: usize, word: u64) -> Result<(), Signal> {
        // SAFETY: no object of Rust's lies in an arena.
        unsafe { probe::poke(self.within(at, 8) as u64, word) }
    }

    /// The kernel reads the word at a place, and writes it.
    pub fn copies(&self, copier: &Copier, at: usize) -> (nix::Result<()>, nix::Result<()>) {
        let address = self.within(at, 8) as u64;
        let from = copier.copy_from(address);
        // SAFETY: no object of Rust's lies in an arena.
        (from, unsafe { copier.copy_to(address) })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let result = self.unmap(0, self.len);
        assert_eq!(result, Ok(()), "emptying the arena");
    }
}
