// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose faults a program answers: pages that are missing, that are in the page cache but not mapped
//! ("minor"), or that are write-protected. The crate userfaultfd needs libclang to build, and has neither poison
//! markers nor `UFFDIO_MOVE`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use linux_raw_sys::general::{
    uffd_msg, uffdio_api, uffdio_continue, uffdio_copy, uffdio_move, uffdio_poison, uffdio_range,
    uffdio_register, uffdio_writeprotect, _UFFDIO_API, _UFFDIO_CONTINUE, _UFFDIO_COPY,
    _UFFDIO_MOVE, _UFFDIO_POISON, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT, UFFDIO,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFD_API,
    UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_POISON,
};
pub use linux_raw_sys::general::{UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use pinbuf_uapi::Range;

use super::{Memory, PAGE};
use crate::check_eq;

nix::ioctl_readwrite!(
    /// `UFFDIO_API`.
    api, UFFDIO, _UFFDIO_API, uffdio_api
);
nix::ioctl_readwrite!(
    /// `UFFDIO_REGISTER`.
    register, UFFDIO, _UFFDIO_REGISTER, uffdio_register
);
nix::ioctl_readwrite!(
    /// `UFFDIO_COPY`.
    copy, UFFDIO, _UFFDIO_COPY, uffdio_copy
);
nix::ioctl_readwrite!(
    /// `UFFDIO_MOVE`.
    move_pages, UFFDIO, _UFFDIO_MOVE, uffdio_move
);
nix::ioctl_readwrite!(
    /// `UFFDIO_WRITEPROTECT`.
    write_protect, UFFDIO, _UFFDIO_WRITEPROTECT, uffdio_writeprotect
);
nix::ioctl_readwrite!(
    /// `UFFDIO_CONTINUE`.
    resume, UFFDIO, _UFFDIO_CONTINUE, uffdio_continue
);
nix::ioctl_readwrite!(
    /// `UFFDIO_POISON`.
    poison, UFFDIO, _UFFDIO_POISON, uffdio_poison
);

/// Which faults are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// Those of pages that are missing.
    Missing = UFFDIO_REGISTER_MODE_MISSING,
    /// Those of pages that are in the page cache.
    Minor = UFFDIO_REGISTER_MODE_MINOR,
    /// Writes to pages that are write-protected.
    Protected = UFFDIO_REGISTER_MODE_WP,
}

/// A userfaultfd that has some memory's faults.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// Takes over the faults of memory.
    pub fn of(memory: &Memory, mode: Mode) -> Result<Self> {
        Self::of_range(memory.range(), mode)
    }

    /// Takes over those of a range.
    pub fn of_range(range: Range, mode: Mode) -> Result<Self> {
        let faults = Self::open(0, 0)?;
        faults.register(range, mode)?;
        Ok(faults)
    }

    /// A userfaultfd without memory, with these flags, and with features besides those that the modes need.
    pub fn open(flags: u32, features: u32) -> Result<Self> {
        // Without O_NONBLOCK, poll() fails.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags as libc::c_int;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        Errno::result(fd).context("userfaultfd")?;
        // SAFETY: the call has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
        let features = UFFD_FEATURE_PAGEFAULT_FLAG_WP
            | UFFD_FEATURE_MINOR_HUGETLBFS
            | UFFD_FEATURE_MINOR_SHMEM
            | UFFD_FEATURE_POISON
            | features;
        let mut argument = uffdio_api {
            api: UFFD_API.into(),
            features: features.into(),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct.
        unsafe { api(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_API")?;
        Ok(Self(fd))
    }

    /// Takes over the faults of a range.
    pub fn register(&self, range: Range, mode: Mode) -> Result<()> {
        let mut argument = uffdio_register {
            range: span(range.addr, range.len),
            mode: mode as u64,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct; faults in the memory wait from here on.
        unsafe { register(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_REGISTER")?;
        Ok(())
    }

    /// Waits until a fault waits for an answer.
    pub fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(30_000u16))?;
        check_eq!(
            fds[0].revents(),
            Some(PollFlags::POLLIN),
            "faults that wait for an answer"
        );
        Ok(())
    }

    /// Waits for a fault, and returns the address of its page.
    pub fn take(&self) -> Result<u64> {
        self.wait()?;
        self.read()
    }

    /// The address of the page of a fault that is there already.
    pub fn read(&self) -> Result<u64> {
        let mut message = [0; size_of::<uffd_msg>()];
        let count = nix::unistd::read(&self.0, &mut message)?;
        check_eq!(
            (count, u32::from(message[0])),
            (message.len(), UFFD_EVENT_PAGEFAULT),
            "a message of a fault: its size and kind"
        );
        // The second word after the kind.
        let address = u64::from_ne_bytes(message[16..24].try_into()?);
        Ok(address / PAGE as u64 * PAGE as u64)
    }

    /// Provides pages that were missing.
    pub fn copy(&self, addr: u64, data: &[u8]) -> Result<()> {
        let mut argument = uffdio_copy {
            dst: addr,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel puts new pages where there were none, in memory that the test maps.
        unsafe { copy(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_COPY")?;
        check_eq!(argument.copy, i64::try_from(data.len())?, "bytes copied");
        Ok(())
    }

    /// Moves pages from elsewhere to where they were missing.
    pub fn move_pages(&self, addr: u64, from: u64, len: usize) -> Result<()> {
        let mut argument = uffdio_move {
            dst: addr,
            src: from,
            len: len as u64,
            mode: 0,
            move_: 0,
        };
        // SAFETY: pages move between mappings of the test.
        unsafe { move_pages(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_MOVE")?;
        Ok(())
    }

    /// Maps pages that are in the page cache.
    pub fn resume(&self, addr: u64, len: usize) -> Result<()> {
        let mut argument = uffdio_continue {
            range: span(addr, len as u64),
            mode: 0,
            mapped: 0,
        };
        // SAFETY: the kernel maps pages of the file that the memory maps.
        unsafe { resume(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_CONTINUE")?;
        Ok(())
    }

    /// Marks pages that are missing as poisoned: an access to them is a signal.
    pub fn poison(&self, addr: u64, len: usize) -> Result<()> {
        let mut argument = uffdio_poison {
            range: span(addr, len as u64),
            mode: 0,
            updated: 0,
        };
        // SAFETY: the kernel changes page table entries of memory that the test maps.
        unsafe { poison(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_POISON")?;
        Ok(())
    }

    /// Protects pages from writes, or no longer.
    pub fn protect(&self, addr: u64, len: usize, on: bool) -> Result<()> {
        let mut argument = uffdio_writeprotect {
            range: span(addr, len as u64),
            mode: u64::from(on),
        };
        // SAFETY: the kernel changes page table entries of memory that the test maps.
        unsafe { write_protect(self.0.as_raw_fd(), &mut argument) }
            .context("UFFDIO_WRITEPROTECT")?;
        Ok(())
    }
}

fn span(start: u64, len: u64) -> uffdio_range {
    uffdio_range { start, len }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
