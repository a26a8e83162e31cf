// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program written for udmabuf: makes a dma-buf of a memfd as large as a 4K framebuffer, writes
//! through the one, and reads through the other.  It prints who made the dma-buf.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::memory::memfd;
use pinbuf_test_harness::support::{Buffer, Memory, Sync, PAGE};

const WIDTH: usize = 3840;
const HEIGHT: usize = 2160;
const SIZE: usize = WIDTH * HEIGHT * 4;

/// `struct udmabuf_create`.
#[repr(C)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

nix::ioctl_write_ptr!(
    /// `UDMABUF_CREATE`.
    udmabuf_create,
    b'u',
    0x42,
    Create
);

fn main() -> Result<()> {
    let memory = memfd(SIZE, libc::MFD_ALLOW_SEALING)?;
    // SAFETY: no memory is involved.
    Errno::result(unsafe {
        libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)
    })
    .context("sealing the memfd")?;
    let pixels = Memory::shared(&memory, SIZE)?;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/udmabuf")
        .context("opening /dev/udmabuf")?;
    let create = Create {
        memfd: memory.as_raw_fd() as u32,
        flags: 1,
        offset: 0,
        size: SIZE as u64,
    };
    let make = || -> Result<Buffer> {
        // SAFETY: the kernel reads the struct.
        let fd = unsafe { udmabuf_create(device.as_raw_fd(), &create) };
        // SAFETY: the call has just returned it.
        Ok(Buffer::from_fd(unsafe {
            OwnedFd::from_raw_fd(fd.context("UDMABUF_CREATE")?)
        }))
    };
    let buffer = make()?;
    ensure!(buffer.len()? == SIZE, "the buffer has another size");
    let value = |page: usize| (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for page in 0..SIZE / PAGE {
        pixels.set(page * PAGE, value(page));
    }
    let seen = buffer.map()?;
    buffer.synced(Sync::Read, || -> Result<()> {
        for page in 0..SIZE / PAGE {
            ensure!(
                seen.get(page * PAGE) == value(page),
                "page {page} is another"
            );
        }
        Ok(())
    })??;
    let fd = buffer.as_fd().as_raw_fd();
    if fs::exists("/proc/self")? {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        let exporter = text
            .lines()
            .find_map(|line| line.strip_prefix("exp_name:"))
            .context("fdinfo names no exporter")?;
        println!("{SIZE} bytes by {}", exporter.trim());
    } else {
        println!("{SIZE} bytes");
    }
    if std::env::args().any(|argument| argument == "--discard") {
        // Three pages, and no more; then two requests that change nothing.
        pixels.advise(8 * PAGE, 3 * PAGE, libc::MADV_REMOVE)?;
        drop((make()?, make()?));
    }
    if std::env::args().any(|argument| argument == "--hold") {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    Ok(())
}
