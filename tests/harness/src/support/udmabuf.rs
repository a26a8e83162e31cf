// SPDX-License-Identifier: MIT OR Apache-2.0

//! udmabuf's interface, as `<linux/udmabuf.h>` declares it. The shim has its own declarations, so that a mistake
//! in these makes tests fail. The calls go through libc's functions, where the shim stands.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::fcntl::{fcntl, FcntlArg, OFlag, SealFlag};
use nix::sys::stat::Mode;

use super::memory::memfd;
use super::Buffer;

/// `UDMABUF_FLAGS_CLOEXEC`.
pub const CLOEXEC: u32 = 1;

/// `struct udmabuf_create`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Create {
    /// The descriptor.
    pub memfd: u32,
    /// [`CLOEXEC`].
    pub flags: u32,
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// `struct udmabuf_create_item`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Item {
    /// The descriptor.
    pub memfd: u32,
    /// Ignored.
    pub pad: u32,
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// The size of `struct udmabuf_create_list` without its items.
const LIST_HEAD: usize = 8;

nix::ioctl_write_ptr!(
    /// `UDMABUF_CREATE`.
    udmabuf_create,
    b'u',
    0x42,
    Create
);
nix::ioctl_write_ptr_bad!(
    /// `UDMABUF_CREATE_LIST`.
    udmabuf_create_list,
    nix::request_code_write!(b'u', 0x43, LIST_HEAD),
    u64
);

/// Opens udmabuf's device.
pub fn open() -> nix::Result<OwnedFd> {
    nix::fcntl::open(
        "/dev/udmabuf",
        OFlag::O_RDWR | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

/// A memfd with the seal that udmabuf requires.
pub fn sealed_memfd(len: usize) -> Result<OwnedFd> {
    let file = memfd(len, libc::MFD_ALLOW_SEALING)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).context("sealing a memfd")?;
    Ok(file)
}

impl Create {
    /// A part of a memfd, as a buffer that is closed on exec.
    pub fn new(memfd: impl AsFd, offset: usize, size: usize) -> Self {
        Self {
            memfd: memfd.as_fd().as_raw_fd() as u32,
            flags: CLOEXEC,
            offset: offset as u64,
            size: size as u64,
        }
    }

    /// `UDMABUF_CREATE`.
    pub fn call(&self, device: impl AsFd) -> nix::Result<OwnedFd> {
        // SAFETY: the kernel, or the shim, reads the struct.
        let fd = unsafe { udmabuf_create(device.as_fd().as_raw_fd(), self) }?;
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Opens the device and makes a buffer of the first `len` bytes of a memfd.
pub fn buffer(memfd: impl AsFd, len: usize) -> nix::Result<Buffer> {
    Ok(Buffer::from_fd(Create::new(memfd, 0, len).call(open()?)?))
}

/// The argument of `UDMABUF_CREATE_LIST`.
#[derive(Debug)]
pub struct List(Vec<u64>);

impl List {
    /// The parts, in this order, as a buffer that is closed on exec.
    pub fn new(items: impl ExactSizeIterator<Item = Item>) -> Self {
        let mut words = vec![u64::from(CLOEXEC) | (items.len() as u64) << 32];
        for item in items {
            words.extend([
                u64::from(item.memfd) | u64::from(item.pad) << 32,
                item.offset,
                item.size,
            ]);
        }
        Self(words)
    }

    /// `UDMABUF_CREATE_LIST`.
    pub fn call(&self, device: impl AsFd) -> nix::Result<OwnedFd> {
        // SAFETY: the kernel, or the shim, reads the head and as many items as it names; both are there.
        let fd = unsafe { udmabuf_create_list(device.as_fd().as_raw_fd(), self.0.as_ptr()) }?;
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
