// SPDX-License-Identifier: MIT OR Apache-2.0

//! `/dev/pinbuf` and the dma-bufs that it gives.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::{lseek, Whence};
use pinbuf_uapi::{Backing, Create, Discard, Discards, Info, Query, Range};

use super::memory::{Memory, RW};

/// Where the device is.
pub const PATH: &str = "/dev/pinbuf";

/// `ioctl` with a pointer, which may be a bad one on purpose.
pub fn ioctl(fd: impl AsFd, command: u32, argument: u64) -> nix::Result<i32> {
    // SAFETY: the kernel checks the pointer; what it may write to is the caller's own struct.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), command.into(), argument) };
    Errno::result(result)
}

/// An open device.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl Device {
    /// Opens it.
    pub fn open() -> Result<Self> {
        Self::open_with(OFlag::O_RDWR)
    }

    /// Opens it with these flags.
    pub fn open_with(flags: OFlag) -> Result<Self> {
        let fd = open(PATH, flags | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("opening {PATH}"))?;
        Ok(Self(fd))
    }

    /// Pins ranges.
    pub fn create(&self, ranges: &[Range]) -> nix::Result<Buffer> {
        self.create_with(ranges, pinbuf_uapi::CREATE_CLOEXEC)
    }

    /// Pins ranges with flags.
    pub fn create_with(&self, ranges: &[Range], flags: u32) -> nix::Result<Buffer> {
        self.create_raw(&Create {
            flags,
            ranges: ranges.as_ptr() as u64,
            count: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            ..create()
        })
    }

    /// Pins ranges that must map what `backing` says.
    pub fn create_checked(&self, ranges: &[Range], backing: &[Backing]) -> nix::Result<Buffer> {
        assert_eq!(ranges.len(), backing.len());
        self.create_raw(&Create {
            flags: pinbuf_uapi::CREATE_CLOEXEC | pinbuf_uapi::CREATE_CHECK_BACKING,
            ranges: ranges.as_ptr() as u64,
            count: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            backing: backing.as_ptr() as u64,
            ..create()
        })
    }

    /// `PINBUF_CREATE` as it is.
    pub fn create_raw(&self, argument: &Create) -> nix::Result<Buffer> {
        self.create_at(std::ptr::from_ref(argument) as u64)
    }

    /// `PINBUF_CREATE` with a struct at any address.
    pub fn create_at(&self, argument: u64) -> nix::Result<Buffer> {
        let fd = ioctl(self, pinbuf_uapi::CREATE, argument)?;
        // SAFETY: the call has just returned it.
        Ok(Buffer(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// `PINBUF_QUERY`.
    pub fn query(&self) -> nix::Result<Query> {
        let mut query = Query {
            size: size_of::<Query>() as u32,
            ..Default::default()
        };
        ioctl(
            self,
            pinbuf_uapi::QUERY,
            std::ptr::from_mut(&mut query) as u64,
        )?;
        Ok(query)
    }

    /// `PINBUF_INFO`.
    pub fn info(&self, fd: i32) -> nix::Result<Info> {
        let mut info = Info {
            size: size_of::<Info>() as u32,
            fd,
            ..Default::default()
        };
        ioctl(
            self,
            pinbuf_uapi::INFO,
            std::ptr::from_mut(&mut info) as u64,
        )?;
        Ok(info)
    }

    /// `PINBUF_DISCARDS` as it is.
    pub fn discards_raw(&self, argument: &mut Discards) -> nix::Result<()> {
        let argument = std::ptr::from_mut(argument) as u64;
        ioctl(self, pinbuf_uapi::DISCARDS, argument).map(drop)
    }

    /// The discarded parts of a buffer, requested with room for `at_once` parts per call.
    pub fn discards(&self, buffer: &Buffer, at_once: usize) -> Result<Vec<Discard>> {
        let mut all = Vec::new();
        let len = buffer.len()? as u64;
        let mut offset = 0;
        while offset < len {
            let mut list = vec![Discard::default(); at_once];
            let mut call = Discards {
                size: size_of::<Discards>() as u32,
                fd: buffer.as_fd().as_raw_fd(),
                offset,
                list: list.as_mut_ptr() as u64,
                count: at_once as u32,
                reserved: 0,
            };
            self.discards_raw(&mut call).context("PINBUF_DISCARDS")?;
            list.truncate(call.count as usize);
            all.extend(list);
            if call.offset <= offset {
                bail!(
                    "PINBUF_DISCARDS went from {offset:#x} to {:#x}",
                    call.offset
                );
            }
            offset = call.offset;
        }
        Ok(all)
    }

    /// The result of `PINBUF_INFO` for a buffer.
    pub fn describe(&self, buffer: &Buffer) -> Result<Info> {
        self.info(buffer.as_fd().as_raw_fd()).context("PINBUF_INFO")
    }
}

impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A create argument with its size filled in.
pub fn create() -> Create {
    Create {
        size: size_of::<Create>() as u32,
        ..Default::default()
    }
}

/// Which access `DMA_BUF_IOCTL_SYNC` brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Sync {
    /// Reading.
    Read = 1,
    /// Writing all of it.
    Write = 2,
    /// Reading, and writing some of it.
    ReadWrite = 3,
}

#[repr(C)]
struct SyncArgument {
    flags: u64,
}

nix::ioctl_write_ptr!(
    /// DMA_BUF_IOCTL_SYNC.
    dma_buf_sync, b'b', 0, SyncArgument
);

/// `DMA_BUF_IOCTL_SYNC` with any flags, as one call.
pub fn sync_once(fd: impl AsFd, flags: u64) -> nix::Result<()> {
    // SAFETY: the kernel reads one `u64`.
    unsafe { dma_buf_sync(fd.as_fd().as_raw_fd(), &SyncArgument { flags }) }.map(drop)
}

/// The same, again after a signal.
pub fn sync_raw(fd: impl AsFd, flags: u64) -> nix::Result<()> {
    loop {
        match sync_once(&fd, flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// A dma-buf.
#[derive(Debug)]
pub struct Buffer(OwnedFd);

impl Buffer {
    const END: u64 = 1 << 2;

    /// Takes a dma-buf's descriptor that came from elsewhere.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Its size, as `lseek` tells it.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> Result<usize> {
        Ok(usize::try_from(
            lseek(&self.0, 0, Whence::SeekEnd).context("lseek on a dma-buf")?,
        )?)
    }

    /// Maps all of it.
    pub fn map(&self) -> Result<Memory> {
        self.map_part(0, self.len()?).context("mapping a dma-buf")
    }

    /// Maps a part of it, for reading and writing.
    pub fn map_part(&self, offset: usize, len: usize) -> nix::Result<Memory> {
        self.map_as(offset, len, RW, libc::MAP_SHARED)
    }

    /// Maps a part of it in any way.
    pub fn map_as(&self, offset: usize, len: usize, prot: i32, flags: i32) -> nix::Result<Memory> {
        Memory::map(len, prot, flags, Some(self.as_fd()), offset as u64)
    }

    /// Does something between `SYNC_START` and `SYNC_END`.
    pub fn synced<T>(&self, sync: Sync, action: impl FnOnce() -> T) -> Result<T> {
        sync_raw(self, sync as u64).context("DMA_BUF_IOCTL_SYNC, start")?;
        let result = action();
        sync_raw(self, sync as u64 | Self::END).context("DMA_BUF_IOCTL_SYNC, end")?;
        Ok(result)
    }
}

impl AsFd for Buffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Buffer> for OwnedFd {
    fn from(buffer: Buffer) -> Self {
        buffer.0
    }
}
