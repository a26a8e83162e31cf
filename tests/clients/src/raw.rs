// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program written for udmabuf on rustix, which makes its own system calls, as compositors of Smithay's kind do. Makes a
//! dma-buf of a memfd as large as a 4K framebuffer, writes through the one, and reads through the other. It prints who
//! made the dma-buf. (Its names of files are rustix' as well: libc sees nothing of it.)

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::support::udmabuf::Create;
use rustix::fs::{
    fcntl_add_seals, ftruncate, memfd_create, open, MemfdFlags, Mode, OFlags, SealFlags,
};
use rustix::ioctl::{ioctl, Ioctl, IoctlOutput, Opcode};
use rustix::mm::{mmap, MapFlags, ProtFlags};

const SIZE: usize = 3840 * 2160 * 4;
const PAGE: usize = 4096;

/// `UDMABUF_CREATE`.
struct Request(Create);

// SAFETY: `UDMABUF_CREATE` reads the struct, and returns a new descriptor.
unsafe impl Ioctl for Request {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        0x4018_7542
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(fd: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// A file's memory, mapped until the program ends.
fn map(file: BorrowedFd<'_>) -> Result<*mut u32> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping.
    let at = unsafe {
        mmap(
            std::ptr::null_mut(),
            SIZE,
            access,
            MapFlags::SHARED,
            file,
            0,
        )
    };
    Ok(at.context("mmap")?.cast())
}

fn main() -> Result<()> {
    // What is not opened by libc is what matters.
    let device = open(
        "/dev/udmabuf",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context("opening /dev/udmabuf")?;
    let memory = memfd_create("client", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, SIZE as u64)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK)?;
    let request = Request(Create::new(&memory, 0, SIZE));
    // SAFETY: as for the implementation.
    let buffer = unsafe { ioctl(&device, request) }.context("UDMABUF_CREATE")?;
    let (pixels, seen) = (map(memory.as_fd())?, map(buffer.as_fd())?);
    let value = |page: usize| (page as u32 + 1).wrapping_mul(0x9e37_79b9);
    for page in 0..SIZE / PAGE {
        // SAFETY: in the mapping, and aligned.
        unsafe {
            pixels
                .wrapping_byte_add(page * PAGE)
                .write_volatile(value(page))
        };
    }
    for page in 0..SIZE / PAGE {
        // SAFETY: in the mapping, and aligned.
        let found = unsafe { seen.wrapping_byte_add(page * PAGE).read_volatile() };
        ensure!(found == value(page), "page {page} is another");
    }
    let path = format!("/proc/self/fdinfo/{}", buffer.as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    let exporter = text
        .lines()
        .find_map(|line| line.strip_prefix("exp_name:"))
        .context("fdinfo names no exporter")?;
    println!("{SIZE} bytes by {}", exporter.trim());
    Ok(())
}
