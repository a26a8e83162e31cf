// SPDX-License-Identifier: MIT OR Apache-2.0

//! What another process has open: the device, and dma-bufs of pinbuf's.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::{Buffer, Device};

/// The descriptors of a process that are open on this file.
pub fn open_on(process: u32, wanted: impl Fn(&str) -> bool) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        // Descriptors come and go meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if wanted(&target.to_string_lossy()) {
            found.push(entry.file_name().to_string_lossy().parse()?);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether a process has pinbuf's device open.
pub fn has_device(process: u32) -> Result<bool> {
    Ok(!open_on(process, |target| {
        Path::new(target) == Path::new("/dev/pinbuf")
    })?
    .is_empty())
}

/// The name that pinbuf's buffers have in fdinfo.
pub const PINBUF: &str = "pinbuf";

/// The dma-bufs that a process has open, each once, as descriptors of our own.  Each must be
/// pinbuf's.
pub fn buffers(process: u32) -> Result<Vec<Buffer>> {
    let found = all_buffers(process)?.into_iter().map(|(exporter, buffer)| {
        ensure!(exporter == PINBUF, "a buffer of {exporter}'s");
        Ok(buffer)
    });
    found.collect()
}

/// The same, with the exporters' names.  Those that are pinbuf's by name must be so by what the driver says of
/// them.
pub fn all_buffers(process: u32) -> Result<Vec<(String, Buffer)>> {
    let device = Device::open()?;
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for number in open_on(process, |target| target.starts_with("/dmabuf:"))? {
        let Ok(text) = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")) else {
            continue;
        };
        let exporter = text
            .lines()
            .find_map(|line| line.strip_prefix("exp_name:"))
            .context("fdinfo names no exporter")?
            .trim();
        let buffer = Buffer::from_fd(copy(process, number)?);
        let inode = nix::sys::stat::fstat(&buffer)?.st_ino;
        if seen.contains(&inode) {
            continue;
        }
        if exporter == PINBUF {
            let info = device.info(buffer.as_fd().as_raw_fd())?;
            ensure!(info.bytes == buffer.len()? as u64, "pinbuf says {info:?}");
        }
        seen.push(inode);
        found.push((exporter.to_owned(), buffer));
    }
    Ok(found)
}

/// A copy of another process's descriptor.
fn copy(process: u32, number: i32) -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    let pidfd = Errno::result(pidfd).context("pidfd_open")?;
    // SAFETY: the call has just returned it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = Errno::result(fd).context("pidfd_getfd")?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// How many buffers of at least this size were made, by the log of `pinbuf run --log`.
pub fn made(log: &str, bytes: usize) -> usize {
    let size = |line: &str| {
        let (_, made) = line.split_once("created fd ")?;
        let (_, size) = made.split_once(": ")?;
        size.split(' ').next()?.parse().ok()
    };
    let sizes = log.lines().filter_map(size);
    sizes.filter(|&size: &usize| size >= bytes).count()
}
