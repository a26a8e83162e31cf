// SPDX-License-Identifier: MIT OR Apache-2.0

//! Access to memory at arbitrary addresses: a bad one is an error here, never a signal.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::memory::memfd;
use pinbuf_test_harness::support::PAGE;

/// Lets the kernel copy between this process's memory and a file.
#[derive(Debug)]
pub struct Access(OwnedFd);

impl Access {
    /// Gets ready.
    pub fn new() -> Result<Self> {
        memfd(PAGE, 0).context("a file to copy through").map(Self)
    }

    /// Reads the word at `address`.
    pub fn read(&self, address: u64) -> nix::Result<u64> {
        let mut word = 0u64;
        self.take_from(address)?;
        self.put_to(std::ptr::from_mut(&mut word) as u64)?;
        Ok(word)
    }

    /// Writes the word at `address`, where no object of Rust's lies.
    pub fn write(&self, address: u64, word: u64) -> nix::Result<()> {
        self.take_from(std::ptr::from_ref(&word) as u64)?;
        self.put_to(address)
    }

    fn take_from(&self, address: u64) -> nix::Result<()> {
        // SAFETY: the kernel reads, and checks the address.
        let copied = unsafe { libc::pwrite(self.0.as_raw_fd(), address as *const _, 8, 0) };
        complete(copied)
    }

    fn put_to(&self, address: u64) -> nix::Result<()> {
        // SAFETY: the kernel checks the address; what is there is the caller's to write to.
        let copied = unsafe { libc::pread(self.0.as_raw_fd(), address as *mut _, 8, 0) };
        complete(copied)
    }
}

fn complete(copied: isize) -> nix::Result<()> {
    match Errno::result(copied)? {
        8 => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// `mmap` at an address of the caller's choice, replacing what is there.
///
/// # Safety
/// Nothing of Rust's lies there.
pub unsafe fn map_at(
    address: u64,
    length: usize,
    protection: i32,
    flags: i32,
    fd: i32,
    offset: u64,
) -> nix::Result<()> {
    // SAFETY: by the function's requirements.
    let result = unsafe {
        libc::mmap(
            address as *mut _,
            length,
            protection,
            flags | libc::MAP_FIXED,
            fd,
            offset as i64,
        )
    };
    if result == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(())
    }
}
