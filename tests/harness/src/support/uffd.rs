// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose missing pages a program provides.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use pinbuf_uapi::Range;

use super::Memory;
use crate::check_eq;

const API: u64 = 0xAA;
/// `UFFD_USER_MODE_ONLY`: faults of the process itself alone.
pub const USER_MODE_ONLY: i32 = 1;
/// `UFFD_FEATURE_SIGBUS`: a signal instead of a message.
pub const FEATURE_SIGBUS: u64 = 1 << 7;
const REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(
    /// UFFDIO_API.
    uffd_api, 0xAA, 0x3F, ApiArgument
);
nix::ioctl_readwrite!(
    /// UFFDIO_REGISTER.
    uffd_register, 0xAA, 0x00, RegisterArgument
);
nix::ioctl_readwrite!(
    /// UFFDIO_COPY.
    uffd_copy, 0xAA, 0x03, CopyArgument
);

/// A userfaultfd that has the missing pages of some memory.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// Takes them over.
    pub fn of(memory: &Memory, flags: i32, features: u64) -> Result<Self> {
        Self::of_range(memory.range(), flags, features)
    }

    /// Takes over those of a part.
    pub fn of_part(memory: &Memory, offset: usize, len: usize) -> Result<Self> {
        Self::of_range(memory.part(offset, len), 0, 0)
    }

    fn of_range(range: Range, flags: i32, features: u64) -> Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | flags,
            )
        };
        Errno::result(fd).context("userfaultfd")?;
        // SAFETY: the call has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
        let mut argument = ApiArgument {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct.
        unsafe { uffd_api(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_API")?;
        let mut argument = RegisterArgument {
            start: range.addr,
            len: range.len,
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: as above; faults in the memory wait from here on.
        unsafe { uffd_register(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_REGISTER")?;
        Ok(Self(fd))
    }

    /// Waits until someone waits for an answer.
    pub fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(20_000u16))?;
        check_eq!(
            fds[0].revents(),
            Some(PollFlags::POLLIN),
            "faults that wait for an answer"
        );
        Ok(())
    }

    /// Takes the message of a fault, and tells its address.
    pub fn take(&self) -> Result<u64> {
        self.wait()?;
        let mut message = [0; 32];
        let count = nix::unistd::read(&self.0, &mut message)?;
        check_eq!(
            (count, message[0]),
            (32, 0x12),
            "a message of a fault: its size and kind"
        );
        let address = message[16..24].try_into().expect("eight bytes");
        Ok(u64::from_ne_bytes(address))
    }

    /// Gives pages.
    pub fn answer(&self, addr: u64, data: &[u8]) -> Result<()> {
        let mut argument = CopyArgument {
            dst: addr,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the kernel puts new pages where there were none, in memory that the test maps.
        unsafe { uffd_copy(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_COPY")?;
        check_eq!(argument.copied, i64::try_from(data.len())?, "bytes copied");
        Ok(())
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
