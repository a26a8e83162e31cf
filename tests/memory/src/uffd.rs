// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose faults a program answers, in the modes of userfaultfd: pages that are missing, in
//! the page cache but not mapped ("minor"), or write-protected. A page may also be marked poisoned.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use pinbuf_test_harness::support::{check_eq, Memory, PAGE};

/// `UFFDIO_REGISTER_MODE_MISSING`.
pub const MISSING: u64 = 1;
/// `UFFDIO_REGISTER_MODE_WP`.
pub const WRITE_PROTECTED: u64 = 2;
/// `UFFDIO_REGISTER_MODE_MINOR`.
pub const MINOR: u64 = 4;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `_MINOR_HUGETLBFS`, `_MINOR_SHMEM` and `_POISON`.
const FEATURES: u64 = 1 | 1 << 9 | 1 << 10 | 1 << 14;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Continue {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Poison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

nix::ioctl_readwrite!(uffd_api, 0xAA, 0x3F, Api);
nix::ioctl_readwrite!(uffd_register, 0xAA, 0x00, Register);
nix::ioctl_readwrite!(uffd_copy, 0xAA, 0x03, Copy);
nix::ioctl_readwrite!(uffd_write_protect, 0xAA, 0x06, WriteProtect);
nix::ioctl_readwrite!(uffd_continue, 0xAA, 0x07, Continue);
nix::ioctl_readwrite!(uffd_poison, 0xAA, 0x08, Poison);

/// A userfaultfd that has some memory's faults.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// Takes them over.
    pub fn of(memory: &Memory, mode: u64) -> Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        Errno::result(fd).context("userfaultfd")?;
        // SAFETY: the call has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
        let mut argument = Api {
            api: 0xAA,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct.
        unsafe { uffd_api(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_API")?;
        let mut argument = Register {
            start: memory.addr(),
            len: memory.len() as u64,
            mode,
            ioctls: 0,
        };
        // SAFETY: as above; faults in the memory wait from here on.
        unsafe { uffd_register(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_REGISTER")?;
        Ok(Self(fd))
    }

    /// Waits for the next fault, and tells the address of its page.
    pub fn wait(&self) -> Result<u64> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut fds, PollTimeout::from(30_000u16))?;
        check_eq!(count, 1, "faults that wait for an answer");
        let mut message = [0u8; 32];
        check_eq!(
            nix::unistd::read(&self.0, &mut message)?,
            32,
            "bytes of the message"
        );
        // struct uffd_msg: the address is in its third word.
        let addr = u64::from_ne_bytes(message[16..24].try_into()?);
        Ok(addr / PAGE as u64 * PAGE as u64)
    }

    /// Answers with a new page.
    pub fn copy(&self, addr: u64, data: &[u8]) -> Result<()> {
        let mut argument = Copy {
            dst: addr,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the kernel puts new pages where there were none, in memory that the test maps.
        unsafe { uffd_copy(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_COPY")?;
        Ok(())
    }

    /// Answers with the page that is in the page cache.
    pub fn resume(&self, addr: u64) -> Result<()> {
        self.resume_with(addr, PAGE)
    }

    /// The same where pages have another size.
    pub fn resume_with(&self, addr: u64, len: usize) -> Result<()> {
        let mut argument = Continue {
            start: addr,
            len: len as u64,
            mode: 0,
            mapped: 0,
        };
        // SAFETY: the kernel maps a page of the file that the memory maps.
        unsafe { uffd_continue(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_CONTINUE")?;
        Ok(())
    }

    /// Marks pages that are not there: who touches them gets a signal.
    pub fn poison(&self, addr: u64, len: usize) -> Result<()> {
        let mut argument = Poison {
            start: addr,
            len: len as u64,
            mode: 0,
            updated: 0,
        };
        // SAFETY: the kernel changes page table entries of memory that the test maps.
        unsafe { uffd_poison(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_POISON")?;
        Ok(())
    }

    /// Protects memory from writing, or no longer.
    pub fn protect(&self, addr: u64, len: usize, on: bool) -> Result<()> {
        let mut argument = WriteProtect {
            start: addr,
            len: len as u64,
            mode: u64::from(on),
        };
        // SAFETY: the kernel changes page table entries of memory that the test maps.
        unsafe { uffd_write_protect(self.0.as_raw_fd(), &mut argument) }
            .context("UFFDIO_WRITEPROTECT")?;
        Ok(())
    }
}
