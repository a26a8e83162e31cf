// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the kernel reports about buffers, pins and locked pages.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::{Info, Query};

/// A dma-buf that a process has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// Its descriptor in that process.
    pub fd: i32,
    /// The exporter's name.
    pub exporter: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its number, the same for every descriptor of it.
    pub inode: u64,
}

/// The dma-bufs that a process has open.
pub fn buffers(process: u32) -> Result<Vec<Buffer>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // Descriptors come and go meanwhile.
        let Ok(target) = fs::read_link(format!("/proc/{process}/fd/{name}")) else {
            continue;
        };
        if !target.to_string_lossy().starts_with("/dmabuf:") {
            continue;
        }
        let Ok(text) = fs::read_to_string(format!("/proc/{process}/fdinfo/{name}")) else {
            continue;
        };
        let Ok(metadata) = fs::metadata(format!("/proc/{process}/fd/{name}")) else {
            continue;
        };
        let field = |field: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(field))
                .map(|value| value.trim().to_owned())
                .with_context(|| format!("fdinfo has no {field}"))
        };
        found.push(Buffer {
            fd: name.parse()?,
            exporter: field("exp_name:")?,
            size: field("size:")?.parse()?,
            inode: metadata.ino(),
        });
    }
    Ok(found)
}

/// The dma-buf of a descriptor of this process.
pub fn buffer_of(fd: BorrowedFd<'_>) -> Result<Buffer> {
    buffers(std::process::id())?
        .into_iter()
        .find(|buffer| buffer.fd == fd.as_raw_fd())
        .context("the descriptor is no dma-buf's")
}

/// The last lines of a file, which may be missing.
pub fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(80).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// The last lines of the kernel's log.
pub fn kernel_log() -> String {
    let output = Command::new("dmesg").output();
    let text = output.map_or_else(
        |error| error.to_string(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    let lines: Vec<&str> = text.lines().rev().take(30).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// How a process maps a dma-buf: the permissions of each mapping.
pub fn mappings(process: u32, inode: u64) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{process}/maps"))?;
    // range, permissions, offset, device, inode, path
    Ok(text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.get(4).is_some_and(|word| *word == inode.to_string()))
        .filter(|words| words.get(5).is_some_and(|path| path.contains("dmabuf")))
        .map(|words| words[1].to_owned())
        .collect())
}

/// How many dma-bufs of each exporter there are in the whole system, as debugfs lists them.
pub fn dma_bufs(exporter: &str) -> Result<usize> {
    let text = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo").context("debugfs")?;
    // size, flags, mode, count, exporter, inode, name
    Ok(text
        .lines()
        .filter(|line| line.split_whitespace().nth(4) == Some(exporter))
        .count())
}

/// The kernel's stack of the first thread of a process, the innermost function first.
pub fn kernel_stack(process: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{process}/stack")).context("the stack of QEMU's first thread")
}

/// The same for all threads of a process.
pub fn kernel_stacks(process: u32) -> Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))?;
    // Threads end meanwhile.
    Ok(tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stack")).ok())
        .collect())
}

/// Pages pinned minus pages released since the boot.
pub fn pins() -> Result<i64> {
    fs::write("/proc/sys/vm/stat_refresh", "1")?;
    let text = fs::read_to_string("/proc/vmstat")?;
    let number = |name: &str| -> Result<i64> {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|value| value.trim().parse().ok())
            .with_context(|| format!("/proc/vmstat has no {name}"))
    };
    Ok(number("nr_foll_pin_acquired ")? - number("nr_foll_pin_released ")?)
}

/// A field of a process's status, in KiB.
pub fn status_kib(process: u32, field: &str) -> Result<u64> {
    fs::read_to_string(format!("/proc/{process}/status"))?
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|value| value.trim_start_matches(':').split_whitespace().next())
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("status has no {field}"))
}

fn device() -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/pinbuf")
        .context("opening /dev/pinbuf")
}

fn call<T>(command: u32, argument: &mut T) -> Result<()> {
    let device = device()?;
    // SAFETY: callers pass each command with its struct.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            command.into(),
            std::ptr::from_mut(argument),
        )
    };
    Errno::result(result).context("asking pinbuf")?;
    Ok(())
}

/// A copy of another process's descriptor of a buffer.
pub fn copy(process: u32, buffer: &Buffer) -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    let pidfd = Errno::result(pidfd).context("pidfd_open")?;
    // SAFETY: the call has just returned it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), buffer.fd, 0) };
    let fd = Errno::result(fd).context("pidfd_getfd")?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `PINBUF_INFO` of a buffer of another process.
pub fn info(process: u32, buffer: &Buffer) -> Result<Info> {
    let fd = copy(process, buffer)?;
    let mut info = Info {
        size: size_of::<Info>() as u32,
        fd: fd.as_raw_fd(),
        ..Default::default()
    };
    call(pinbuf_uapi::INFO, &mut info)?;
    Ok(info)
}

/// `PINBUF_QUERY`: the caller's limits.
pub fn query() -> Result<Query> {
    let mut query = Query {
        size: size_of::<Query>() as u32,
        ..Default::default()
    };
    call(pinbuf_uapi::QUERY, &mut query)?;
    Ok(query)
}

/// Counters that must have their old values when a scenario is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balance {
    pins: i64,
    dma_bufs: usize,
    allowance: u64,
    free_huge_pages: u64,
}

impl Balance {
    /// Reads them.
    pub fn now() -> Result<Self> {
        let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        Ok(Self {
            pins: pins()?,
            dma_bufs: dma_bufs("pinbuf")?,
            allowance: query()?.allowance_used,
            free_huge_pages: fs::read_to_string(free)?.trim().parse()?,
        })
    }
}

/// Fails if the kernel has a udmabuf, or a device file of that name exists.
pub fn no_udmabuf() -> Result<()> {
    ensure!(
        !fs::exists("/dev/udmabuf")? && !fs::exists("/sys/class/misc/udmabuf")?,
        "there is a udmabuf: boot with initcall_blacklist=udmabuf_dev_init"
    );
    ensure!(dma_bufs("udmabuf")? == 0, "there are buffers of udmabuf's");
    Ok(())
}

/// The number of items of each UDMABUF_CREATE_LIST, as a probe in the kernel sees it.
#[derive(Debug)]
pub struct ListTrace(());

const TRACING: &str = "/sys/kernel/tracing";
const PROBE: &str = "events/kprobes/pinbuf_list";

impl ListTrace {
    /// Starts the probe.
    pub fn start() -> Result<Self> {
        let write = |name: &str, text: &str| {
            fs::write(format!("{TRACING}/{name}"), text).with_context(|| format!("tracing: {name}"))
        };
        write("trace", "")?;
        // The system call's second and third argument, as x86's pt_regs hold them; the count is the
        // second word of struct udmabuf_create_list.
        write(
            "kprobe_events",
            "p:pinbuf_list __x64_sys_ioctl cmd=+0x68(%di):x32 items=+u4(+0x60(%di)):u32",
        )?;
        // UDMABUF_CREATE_LIST
        write(&format!("{PROBE}/filter"), "cmd == 0x40087543")?;
        write(&format!("{PROBE}/enable"), "1")?;
        Ok(Self(()))
    }

    /// Ends the probe, and returns the items of each call.
    pub fn end(self) -> Result<Vec<u32>> {
        fs::write(format!("{TRACING}/{PROBE}/enable"), "0")?;
        let text = fs::read_to_string(format!("{TRACING}/trace"))?;
        fs::write(format!("{TRACING}/kprobe_events"), "")?;
        text.lines()
            .filter_map(|line| line.split_once(" items=").map(|(_, number)| number))
            .map(|number| Ok(number.trim().parse()?))
            .collect()
    }
}
