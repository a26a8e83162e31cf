// SPDX-License-Identifier: MIT OR Apache-2.0

//! A canvas's memory as a dma-buf.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::{Create, Info, Range};

use crate::canvas::Canvas;

/// Where pinbuf is.
const DEVICE: &str = "/dev/pinbuf";

/// A dma-buf and its `PINBUF_INFO`.
pub struct Export {
    buffer: OwnedFd,
    info: Info,
}

/// `ioctl` with a struct of pinbuf's.
fn call<T>(device: &File, command: u32, argument: &mut T) -> nix::Result<i32> {
    // SAFETY: each command is passed with the struct that it reads and writes, and what the struct
    // points to is live.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            command.into(),
            std::ptr::from_mut(argument),
        )
    };
    Errno::result(result)
}

#[repr(C)]
struct Sync {
    flags: u64,
}

nix::ioctl_write_ptr!(dma_buf_sync, b'b', 0, Sync);

impl Export {
    /// `DMA_BUF_SYNC_WRITE` and `DMA_BUF_SYNC_READ`: some of it is written.
    const READ_WRITE: u64 = 3;
    const END: u64 = 4;

    /// Pins a canvas.
    pub fn of(canvas: &Canvas) -> Result<Self> {
        let device = File::options()
            .read(true)
            .write(true)
            .open(DEVICE)
            .with_context(|| format!("opening {DEVICE}: is the module pinbuf loaded?"))?;
        let ranges = [Range {
            addr: canvas.addr(),
            len: canvas.len(),
        }];
        let mut create = Create {
            size: size_of::<Create>() as u32,
            flags: pinbuf_uapi::CREATE_CLOEXEC,
            ranges: ranges.as_ptr() as u64,
            count: ranges.len() as u32,
            ..Default::default()
        };
        let fd = call(&device, pinbuf_uapi::CREATE, &mut create).context("PINBUF_CREATE")?;
        // SAFETY: the call has just returned it.
        let buffer = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut info = Info {
            size: size_of::<Info>() as u32,
            fd,
            ..Default::default()
        };
        call(&device, pinbuf_uapi::INFO, &mut info).context("PINBUF_INFO")?;
        Ok(Self { buffer, info })
    }

    /// The result of `PINBUF_INFO`.
    pub fn info(&self) -> Info {
        self.info
    }

    /// Draws, and tells the devices that mapped the buffer.
    pub fn bracket(&self, draw: impl FnOnce()) -> Result<()> {
        self.sync(Self::READ_WRITE)?;
        draw();
        self.sync(Self::READ_WRITE | Self::END)
    }

    fn sync(&self, flags: u64) -> Result<()> {
        loop {
            // SAFETY: the kernel reads the struct.
            match unsafe { dma_buf_sync(self.buffer.as_raw_fd(), &Sync { flags }) } {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other.map(drop).context("DMA_BUF_IOCTL_SYNC"),
            }
        }
    }
}

impl AsFd for Export {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.buffer.as_fd()
    }
}
