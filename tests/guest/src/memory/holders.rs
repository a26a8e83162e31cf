// SPDX-License-Identifier: MIT OR Apache-2.0

//! Other users that hold on to pages for a while.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use pinbuf_test_harness::support::{check_eq, Memory, PAGE};

/// Plain references on pages, held by a pipe: what `vmsplice` put there and nobody has read.
#[derive(Debug)]
pub struct Piped {
    _ends: (OwnedFd, OwnedFd),
}

impl Piped {
    /// Puts this number of pages into a pipe, 16 at most.
    pub fn pages(memory: &Memory, offset: usize, pages: usize) -> Result<Self> {
        let ends = pipe2(OFlag::O_CLOEXEC)?;
        let vector = libc::iovec {
            iov_base: memory.at(offset).cast(),
            iov_len: pages * PAGE,
        };
        // SAFETY: the kernel reads the vector and takes references on mapped memory.
        let count = unsafe {
            libc::vmsplice(
                ends.1.as_raw_fd(),
                &vector,
                1,
                libc::SPLICE_F_NONBLOCK as libc::c_uint,
            )
        };
        check_eq!(
            Errno::result(count).context("vmsplice")?,
            (pages * PAGE) as isize,
            "bytes in the pipe"
        );
        Ok(Self { _ends: ends })
    }

    /// Releases them later, in another thread.
    pub fn release_after(self, delay: Duration) -> JoinHandle<()> {
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            drop(self);
        })
    }
}

/// A slow disk, so that direct I/O is in flight for this long.
#[derive(Debug)]
pub struct SlowDisk(File);

impl SlowDisk {
    const PATH: &'static str = "/dev/nullb0";

    /// Makes one with this delay.
    pub fn new(delay: Duration) -> Result<Self> {
        // One with another delay may be there.
        modprobe(&["-r", "null_blk"])?;
        modprobe(&[
            "null_blk",
            "nr_devices=1",
            "gb=1",
            "irqmode=2",
            &format!("completion_nsec={}", delay.as_nanos()),
        ])?;
        for _ in 0..100 {
            if Path::new(Self::PATH).exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(Self::PATH)
            .context("opening the slow disk")?;
        Ok(Self(file))
    }

    /// Writes a part of some memory; returns when it has been done.
    pub fn write(&self, memory: &Memory, offset: usize, len: usize) -> io::Result<()> {
        write_from(self.0.as_fd(), memory, offset, len)
    }
}

fn write_from(fd: BorrowedFd<'_>, memory: &Memory, offset: usize, len: usize) -> io::Result<()> {
    assert!(offset + len <= memory.len());
    // SAFETY: the kernel reads mapped memory.
    let count = unsafe { libc::pwrite(fd.as_raw_fd(), memory.at(offset).cast(), len, 0) };
    match usize::try_from(count) {
        Ok(count) if count == len => Ok(()),
        Ok(count) => Err(io::Error::other(format!("{count} bytes of {len}"))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Loads a module, with parameters.
pub fn modprobe(arguments: &[&str]) -> Result<()> {
    let output = Command::new("modprobe")
        .args(arguments)
        .output()
        .context("running modprobe")?;
    if !output.status.success() {
        bail!(
            "modprobe {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
