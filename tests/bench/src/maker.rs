// SPDX-License-Identifier: MIT OR Apache-2.0

//! Making a buffer: pinbuf's call or udmabuf's, with nothing left to do but the call.

use std::ffi::CString;
use std::fs;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::Device;
use pinbuf_test_importer::EmptyExporter;
use pinbuf_uapi::{Create, Range};

use crate::task::{Item, Side};

/// `struct udmabuf_create`.
#[repr(C)]
struct UdmabufCreate {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

const UDMABUF_CREATE: libc::c_ulong = 0x4018_7542;
const UDMABUF_CREATE_LIST: libc::c_ulong = 0x4008_7543;
const UDMABUF_FLAGS_CLOEXEC: u32 = 1;

/// A prepared call.
pub enum Maker {
    /// `PINBUF_CREATE`.
    Pinbuf { device: Device, ranges: Vec<Range> },
    /// `UDMABUF_CREATE`, of one item.
    Single {
        device: OwnedFd,
        item: Item,
        memfd: i32,
    },
    /// `UDMABUF_CREATE_LIST`: a head of eight bytes, and 24 for each item.
    List { device: OwnedFd, words: Vec<u64> },
    /// A dma-buf with nothing in it.
    Empty(EmptyExporter),
}

impl Maker {
    /// Prepares a call for these parts of a memfd, which is mapped at `base` if pinbuf is to take
    /// it, and makes sure that the right driver answers.
    pub fn new(side: Side, memfd: i32, base: Option<u64>, items: &[Item]) -> Result<Self> {
        let maker = match side {
            Side::Pinbuf => {
                let base = base.context("pinbuf takes addresses")?;
                let range = |item: &Item| Range {
                    addr: base + item.offset,
                    len: item.len,
                };
                Self::Pinbuf {
                    device: Device::open()?,
                    ranges: items.iter().map(range).collect(),
                }
            }
            Side::Udmabuf | Side::Shim | Side::Unmapped => {
                let device = open_udmabuf()?;
                match items {
                    [item] => Self::Single {
                        device,
                        item: *item,
                        memfd,
                    },
                    _ => Self::List {
                        device,
                        words: list(memfd, items),
                    },
                }
            }
            Side::Empty => Self::Empty(EmptyExporter::new()?),
            Side::Pin | Side::Own => bail!("{side} makes no buffers"),
        };
        let expected = match side {
            Side::Udmabuf => "udmabuf",
            Side::Empty => "pinbuf_test_importer",
            _ => "pinbuf",
        };
        let seen = exporter(&maker.make()?)?;
        ensure!(seen == expected, "the buffer is {seen}'s, not {expected}'s");
        Ok(maker)
    }

    /// Makes a buffer.
    pub fn make(&self) -> Result<OwnedFd> {
        match self {
            Self::Pinbuf { device, ranges } => {
                let create = Create {
                    size: size_of::<Create>() as u32,
                    flags: pinbuf_uapi::CREATE_CLOEXEC,
                    ranges: ranges.as_ptr() as u64,
                    count: ranges.len() as u32,
                    ..Create::default()
                };
                let buffer = device.create_raw(&create).context("PINBUF_CREATE")?;
                Ok(buffer.into())
            }
            Self::Single {
                device,
                item,
                memfd,
            } => {
                let create = UdmabufCreate {
                    memfd: *memfd as u32,
                    flags: UDMABUF_FLAGS_CLOEXEC,
                    offset: item.offset,
                    size: item.len,
                };
                ioctl(device, UDMABUF_CREATE, (&raw const create).cast())
            }
            Self::List { device, words } => {
                ioctl(device, UDMABUF_CREATE_LIST, words.as_ptr().cast())
            }
            Self::Empty(exporter) => exporter.export().context("PTI_EXPORT"),
        }
    }
}

/// The argument of `UDMABUF_CREATE_LIST`.
fn list(memfd: i32, items: &[Item]) -> Vec<u64> {
    let head = u64::from(UDMABUF_FLAGS_CLOEXEC) | (items.len() as u64) << 32;
    let body = items
        .iter()
        .flat_map(|item| [u64::from(memfd as u32), item.offset, item.len]);
    std::iter::once(head).chain(body).collect()
}

/// Opens `/dev/udmabuf` by libc's function, where the shim stands.
fn open_udmabuf() -> Result<OwnedFd> {
    let path = CString::new("/dev/udmabuf")?;
    // SAFETY: a terminated string; no mode is needed.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    let fd = Errno::result(fd).context("opening /dev/udmabuf")?;
    // SAFETY: just opened, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ioctl(device: &OwnedFd, request: libc::c_ulong, argument: *const u8) -> Result<OwnedFd> {
    // SAFETY: both calls only read: a struct, or as many items as its head says.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), request, argument) };
    let fd = Errno::result(fd).context("UDMABUF_CREATE")?;
    // SAFETY: the kernel has just returned it, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which driver a dma-buf is from.
fn exporter(buffer: &OwnedFd) -> Result<String> {
    let path = format!("/proc/self/fdinfo/{}", buffer.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("exp_name:"))
        .with_context(|| format!("{path} names no exporter"))?;
    Ok(name.trim().to_owned())
}
