// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf info`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use anyhow::{bail, Result};
use clap::Args;
use pinbuf::{ChargedTo, Device, DmaBuf, Region};
use serde::Serialize;

use crate::dmabuf::{self, Descriptor, Mapping};
use crate::text::{self, complain, say};
use crate::watch::{self, Part};

/// Show live dma-bufs: which processes hold them, and what they consist of.
///
/// For a buffer that is only mapped, /proc does not name the exporter. Where debugfs is mounted, root sees its exporter,
/// and also the buffers that only devices hold.
#[derive(Debug, Args)]
pub struct Info {
    /// All dma-bufs of this process, of any exporter.  [default: pinbuf's, of all processes]
    #[arg(long)]
    pid: Option<u32>,
    /// Also other exporters' buffers.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A buffer.
#[derive(Debug, Default, Serialize)]
struct Buffer {
    /// Its number in the dma-bufs' file system.
    inode: u64,
    bytes: u64,
    /// `None` if it is not known.
    exporter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    holders: Vec<Holder>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pinned: Option<Pinned>,
}

impl Buffer {
    fn set_name(&mut self, name: &[u8]) {
        self.name = (!name.is_empty()).then(|| text::of_bytes(name));
    }
}

/// A process that has it.
#[derive(Debug, Default, Serialize)]
struct Holder {
    pid: u32,
    command: String,
    descriptors: BTreeSet<u32>,
    /// Addresses at which it is mapped, and how many bytes.
    mapped: Vec<(String, u64)>,
}

/// The result of `PINBUF_INFO`.
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
    /// What the memory's owner does not see any more; none from a kernel that does not report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    discarded: Option<Vec<Part>>,
}

/// The buffers that were found.
#[derive(Debug, Default)]
struct Found {
    buffers: BTreeMap<u64, Buffer>,
    /// Mappings of what is called like a dma-buf.
    mapped: Vec<(u32, Mapping)>,
    /// The device number of the dma-bufs' file system.
    filesystem: Option<u64>,
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
        let mut found = Found::default();
        let mut unreadable = 0;
        for &pid in &pids {
            if found.add_process(pid, device.as_ref()).is_err() {
                unreadable += 1;
            }
        }
        if self.pid.is_some() && unreadable > 0 {
            bail!(
                "the descriptors of process {} cannot be read: it is another user's",
                pids[0]
            );
        }
        found.add_mappings(device.as_ref());
        found.add_kernels(self.pid.is_none());
        let mut buffers = found.buffers;
        if self.pid.is_none() && !self.all {
            let others = |exporter: &Option<String>| {
                exporter.as_deref().is_some_and(|e| e != dmabuf::PINBUF)
            };
            buffers.retain(|_, buffer| !others(&buffer.exporter));
        }
        let buffers: Vec<Buffer> = buffers.into_values().collect();
        if self.json {
            text::print_json(&buffers)?;
        } else {
            print(&buffers);
            if unreadable > 0 {
                complain!("{unreadable} processes of other users could not be examined");
            }
            if device.is_none() {
                complain!("/dev/pinbuf cannot be opened, so details are missing");
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

pub fn processes() -> Result<Vec<u32>> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

/// The name that a process gives itself.
pub fn command(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    text::of_bytes(name.strip_suffix(b"\n").unwrap_or(&name))
}

impl Found {
    /// A buffer, and how a process holds it.
    fn holder(&mut self, inode: u64, pid: u32) -> (&mut Buffer, usize) {
        let buffer = self.buffers.entry(inode).or_default();
        buffer.inode = inode;
        let place = buffer.holders.iter().position(|holder| holder.pid == pid);
        let place = place.unwrap_or_else(|| {
            buffer.holders.push(Holder {
                pid,
                command: command(pid),
                ..Holder::default()
            });
            buffer.holders.len() - 1
        });
        (buffer, place)
    }

    /// Adds the buffers that a process has descriptors of, and notes its mappings.
    fn add_process(&mut self, pid: u32, device: Option<&Device>) -> Result<()> {
        let mut mapped = Vec::new();
        for thread in dmabuf::tables(pid)? {
            let own_table = thread != pid;
            let thread = dmabuf::thread_path(pid, thread);
            for descriptor in dmabuf::descriptors(&thread)? {
                self.filesystem = Some(descriptor.device);
                let (buffer, place) = self.holder(descriptor.inode, pid);
                buffer.bytes = descriptor.bytes;
                buffer.set_name(&descriptor.name);
                buffer.exporter = Some(descriptor.exporter.clone());
                buffer.holders[place].descriptors.insert(descriptor.number);
                let ours = descriptor.exporter == dmabuf::PINBUF;
                // Another thread's number would be looked for in the first one's table.
                if ours && !own_table && buffer.pinned.is_none() {
                    buffer.pinned = device.and_then(|device| describe(device, pid, &descriptor));
                }
            }
            // Threads share their mappings; one that has ended has none.
            if mapped.is_empty() {
                mapped = dmabuf::mappings(&thread).unwrap_or_default();
            }
        }
        self.mapped
            .extend(mapped.into_iter().map(|mapping| (pid, mapping)));
        Ok(())
    }

    /// Adds the buffers that are mapped.
    fn add_mappings(&mut self, device: Option<&Device>) {
        if !self.mapped.is_empty() && self.filesystem.is_none() {
            self.filesystem = device.and_then(filesystem_of_own);
        }
        for (pid, mapping) in std::mem::take(&mut self.mapped) {
            // The file system itself is asked last: that of another user (FUSE) may never answer.
            let same = self.filesystem.map(|device| device == mapping.device);
            let known = same.or_else(|| dmabuf::is_buffer(pid, &mapping));
            // Where nothing can be proved, it is better to list what is none than to hide what is one.
            if !known.unwrap_or(true) {
                continue;
            }
            let (buffer, place) = self.holder(mapping.inode, pid);
            let start = format!("{:#x}", mapping.start);
            buffer.holders[place].mapped.push((start, mapping.bytes));
            if buffer.exporter.is_none() {
                buffer.bytes = buffer.bytes.max(mapping.bytes);
            }
        }
    }

    /// Adds what debugfs says: the exporters of those that are only mapped, and those that no process has.
    fn add_kernels(&mut self, all: bool) {
        for entry in dmabuf::of_debugfs() {
            let buffer = match self.buffers.get_mut(&entry.inode) {
                Some(buffer) => buffer,
                None if all => self.buffers.entry(entry.inode).or_default(),
                None => continue,
            };
            if buffer.exporter.is_none() {
                buffer.inode = entry.inode;
                buffer.bytes = entry.bytes;
                buffer.set_name(&entry.name);
                buffer.exporter = Some(entry.exporter);
            }
        }
    }
}

/// The device number of the dma-bufs' file system, from a buffer made for that.
fn filesystem_of_own(device: &Device) -> Option<u64> {
    let buffer = device.export(&Region::anonymous(1).ok()?).ok()?;
    Some(nix::sys::stat::fstat(buffer.as_fd()).ok()?.st_dev)
}

/// Asks pinbuf about another process's buffer, through a copy of its descriptor.
fn describe(device: &Device, pid: u32, descriptor: &Descriptor) -> Option<Pinned> {
    let buffer = copy(pid, descriptor)?;
    let info = buffer.info(device).ok()?;
    let discarded = buffer.discarded(device).ok();
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
        discarded: discarded.map(|parts| parts.iter().map(Part::from).collect()),
    })
}

/// A copy of a process's descriptor of a buffer; none if the number is another file's meanwhile.
pub fn copy(pid: u32, descriptor: &Descriptor) -> Option<DmaBuf> {
    // SAFETY: no memory is involved.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if process < 0 {
        return None;
    }
    // SAFETY: the kernel has just returned it, so nobody else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(process as i32) };
    let (process, number) = (process.as_raw_fd(), descriptor.number);
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
    // SAFETY: as above.
    let fd = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })?;
    let buffer = DmaBuf::from_fd(fd).ok()?;
    let inode = nix::sys::stat::fstat(buffer.as_fd()).ok()?.st_ino;
    (inode == descriptor.inode).then_some(buffer)
}

pub fn size(bytes: u64) -> String {
    match bytes {
        0..=1_048_575 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

fn print(buffers: &[Buffer]) {
    if buffers.is_empty() {
        say!("no buffers");
    }
    for buffer in buffers {
        let exporter = match &buffer.exporter {
            Some(exporter) => exporter,
            None => "of an unknown exporter (only mapped)",
        };
        let name = buffer
            .name
            .as_deref()
            .map(|name| format!(" `{name}`"))
            .unwrap_or_default();
        say!(
            "buffer {}{name}: {}, {exporter}",
            buffer.inode,
            size(buffer.bytes)
        );
        if let Some(pinned) = &buffer.pinned {
            say!(
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
            let parts = pinned.discarded.as_deref().unwrap_or_default();
            if !parts.is_empty() {
                say!("  {}", watch::in_words(parts, buffer.bytes));
            }
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
            say!("  {} ({}): {}", holder.command, holder.pid, how.join("; "));
        }
        if buffer.holders.is_empty() {
            say!("  no process: a device, or a descriptor on its way through a socket");
        }
    }
}
