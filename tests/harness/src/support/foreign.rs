// SPDX-License-Identifier: MIT OR Apache-2.0

//! dma-bufs of other exporters than pinbuf.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use super::memory::PAGE;
use super::udmabuf;

/// A dma-buf from the kernel's own udmabuf or system heap.
pub fn dma_buf() -> Result<OwnedFd> {
    #[repr(C)]
    struct HeapAllocation {
        len: u64,
        fd: u32,
        fd_flags: u32,
        heap_flags: u64,
    }
    nix::ioctl_readwrite!(heap_alloc, b'H', 0, HeapAllocation);

    if Path::new("/dev/udmabuf").exists() {
        let file = udmabuf::sealed_memfd(PAGE)?;
        let made = udmabuf::Create::new(&file, 0, PAGE).call(udmabuf::open()?);
        return made.context("udmabuf");
    }
    let heap = File::open("/dev/dma_heap/system").context("no other exporter of dma-bufs")?;
    let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
    let mut argument = HeapAllocation {
        len: PAGE as u64,
        fd: 0,
        fd_flags: flags,
        heap_flags: 0,
    };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { heap_alloc(heap.as_raw_fd(), &mut argument) }.context("the system heap")?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd as i32) })
}
