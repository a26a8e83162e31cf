// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf info`.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::{bail, Result};
use clap::Args;
use pinbuf::{ChargedTo, Device, DmaBuf};
use serde::Serialize;

/// Shows live dma-bufs: who holds them, and what they consist of.
#[derive(Debug, Args)]
pub struct Info {
    /// All dma-bufs of this process, whoever exported them.  [default: pinbuf's, of all processes]
    #[arg(long)]
    pid: Option<u32>,
    /// Also other exporters' buffers.
    #[arg(long)]
    all: bool,
    /// For scripts.
    #[arg(long)]
    json: bool,
}

/// The exporter's name in /proc, for pinbuf's buffers.
const EXPORTER: &str = "pinbuf";

/// A buffer.
#[derive(Debug, Default, Serialize)]
struct Buffer {
    /// Its number in the dma-bufs' file system.
    inode: u64,
    bytes: u64,
    exporter: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    holders: Vec<Holder>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pinned: Option<Pinned>,
}

/// A process that has it.
#[derive(Debug, Default, Serialize)]
struct Holder {
    pid: u32,
    command: String,
    descriptors: Vec<u32>,
    /// Addresses at which it is mapped, and how many bytes.
    mapped: Vec<(String, u64)>,
}

/// What pinbuf tells of it.
#[derive(Debug, Serialize)]
struct Pinned {
    pages: u64,
    extents: u64,
    pins: u64,
    kernel_bytes: u64,
    held_bytes: u64,
    charged_pages: u64,
    charged_to: String,
    device_mappings: u32,
}

impl Info {
    pub fn run(self) -> Result<ExitCode> {
        let pids = match self.pid {
            Some(pid) => {
                if fs::metadata(format!("/proc/{pid}")).is_err() {
                    bail!("there is no process {pid}");
                }
                vec![pid]
            }
            None => processes()?,
        };
        let device = Device::open().ok();
        let mut buffers = BTreeMap::new();
        let mut unreadable = 0;
        for &pid in &pids {
            if look_at(pid, device.as_ref(), &mut buffers).is_err() {
                unreadable += 1;
            }
        }
        if self.pid.is_some() && unreadable > 0 {
            bail!(
                "the descriptors of process {} cannot be read: it is another user's",
                pids[0]
            );
        }
        if self.pid.is_none() && !self.all {
            buffers.retain(|_, buffer| buffer.exporter == EXPORTER);
        }
        let buffers: Vec<Buffer> = buffers.into_values().collect();
        if self.json {
            println!("{}", serde_json::to_string_pretty(&buffers)?);
        } else {
            print(&buffers);
            if unreadable > 0 {
                eprintln!("pinbuf: {unreadable} processes of other users were not looked at");
            }
            if device.is_none() {
                eprintln!("pinbuf: /dev/pinbuf cannot be opened, so details are missing");
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn processes() -> Result<Vec<u32>> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

/// Adds the buffers of a process.
fn look_at(pid: u32, device: Option<&Device>, buffers: &mut BTreeMap<u64, Buffer>) -> Result<()> {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let mut found: BTreeMap<u64, Holder> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_buffer = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("/dmabuf:"));
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_buffer, number) else {
            continue;
        };
        // It may be closed at any time.
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else {
            continue;
        };
        let inode = metadata.ino();
        found.entry(inode).or_default().descriptors.push(number);
        let buffer = buffers.entry(inode).or_default();
        buffer.inode = inode;
        buffer.bytes = field(&text, "size")
            .and_then(|size| size.parse().ok())
            .unwrap_or(0);
        buffer.exporter = field(&text, "exp_name").unwrap_or_default();
        buffer.name = field(&text, "name").filter(|name| !name.is_empty());
        if buffer.exporter == EXPORTER && buffer.pinned.is_none() {
            buffer.pinned = device.and_then(|device| describe(device, pid, number));
        }
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    for (inode, address, bytes) in maps.lines().filter_map(mapping) {
        found
            .entry(inode)
            .or_default()
            .mapped
            .push((address, bytes));
        let buffer = buffers.entry(inode).or_default();
        // Of a buffer that is only mapped, /proc does not tell more.
        buffer.inode = inode;
        if buffer.exporter.is_empty() {
            buffer.bytes = buffer.bytes.max(bytes);
        }
    }
    for (inode, mut holder) in found {
        holder.pid = pid;
        holder.command = command.trim().to_owned();
        holder.descriptors.sort_unstable();
        if let Some(buffer) = buffers.get_mut(&inode) {
            buffer.holders.push(holder);
        }
    }
    Ok(())
}

/// A field of /proc/PID/fdinfo.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found == name).then(|| value.trim().to_owned())
    })
}

/// A line of /proc/PID/maps, if it is a dma-buf's: inode, address, bytes.
fn mapping(line: &str) -> Option<(u64, String, u64)> {
    let mut words = line.split_whitespace();
    let range = words.next()?;
    let inode = words.nth(3)?.parse().ok()?;
    if !words.next()?.starts_with("/dmabuf:") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((inode, format!("0x{start}"), number(end)? - number(start)?))
}

/// Asks pinbuf about another process's buffer, through a copy of its descriptor.
fn describe(device: &Device, pid: u32, number: u32) -> Option<Pinned> {
    let info = DmaBuf::from_fd(copy(pid, number)?)
        .ok()?
        .info(device)
        .ok()?;
    Some(Pinned {
        pages: info.pages,
        extents: info.extents,
        pins: info.pins,
        kernel_bytes: info.kernel_bytes,
        held_bytes: info.held_bytes,
        charged_pages: info.charged_pages,
        charged_to: match info.charged_to {
            ChargedTo::User => "user".to_owned(),
            ChargedTo::Allowance => "allowance".to_owned(),
            ChargedTo::Nothing => "nothing".to_owned(),
            other => format!("{other:?}").to_lowercase(),
        },
        device_mappings: info.mappings,
    })
}

fn copy(pid: u32, number: u32) -> Option<OwnedFd> {
    // SAFETY: no memory is involved.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if process < 0 {
        return None;
    }
    // SAFETY: the kernel has just returned it, so nobody else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(process as i32) };
    use std::os::fd::AsRawFd;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    // SAFETY: as above.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn size(bytes: u64) -> String {
    match bytes {
        0..=1_048_575 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

fn print(buffers: &[Buffer]) {
    if buffers.is_empty() {
        println!("no buffers");
    }
    for buffer in buffers {
        let exporter = if buffer.exporter.is_empty() {
            "(only mapped)"
        } else {
            &buffer.exporter
        };
        let name = buffer
            .name
            .as_deref()
            .map(|name| format!(" `{name}`"))
            .unwrap_or_default();
        println!(
            "buffer {}{name}: {}, {exporter}",
            buffer.inode,
            size(buffer.bytes)
        );
        if let Some(pinned) = &buffer.pinned {
            println!(
                "  {} pages in {} extents, {} pins, keeps {} in place and {} bytes of kernel memory; \
                 {} pages charged to: {}; mapped by {} devices",
                pinned.pages,
                pinned.extents,
                pinned.pins,
                size(pinned.held_bytes),
                pinned.kernel_bytes,
                pinned.charged_pages,
                pinned.charged_to,
                pinned.device_mappings
            );
        }
        for holder in &buffer.holders {
            let mut how = Vec::new();
            if !holder.descriptors.is_empty() {
                let numbers: Vec<_> = holder.descriptors.iter().map(u32::to_string).collect();
                how.push(format!("fd {}", numbers.join(", ")));
            }
            for (address, bytes) in &holder.mapped {
                how.push(format!("{} at {address}", size(*bytes)));
            }
            println!("  {} ({}): {}", holder.command, holder.pid, how.join("; "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = "7f00-8f00 rw-s 00000000 00:0f 42                         /dmabuf:name";
        assert_eq!(mapping(line), Some((42, "0x7f00".to_owned(), 0x1000)));
        assert_eq!(mapping("7f00-8f00 rw-p 00000000 00:00 0"), None);
        assert_eq!(
            mapping("7f00-8f00 r--p 00000000 08:01 7 /usr/bin/dmabuf:"),
            None
        );
    }

    #[test]
    fn fields() {
        let text = "pos:\t0\nsize:\t4096\ncount:\t2\nexp_name:\tpinbuf\n";
        assert_eq!(field(text, "exp_name").as_deref(), Some("pinbuf"));
        assert_eq!(field(text, "name"), None);
    }
}
