// SPDX-License-Identifier: MIT OR Apache-2.0

//! Making a buffer: pinbuf's call or udmabuf's, with nothing left to do but the call.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{bail, ensure, Context, Result};
use pinbuf_test_harness::support::{udmabuf, Device};
use pinbuf_test_importer::EmptyExporter;
use pinbuf_uapi::{Create, Range};

use crate::task::{Item, Side};

/// A prepared call.
pub enum Maker {
    /// `PINBUF_CREATE`.
    Pinbuf { device: Device, ranges: Vec<Range> },
    /// `UDMABUF_CREATE`, of one item.
    Single {
        device: OwnedFd,
        create: udmabuf::Create,
    },
    /// `UDMABUF_CREATE_LIST`.
    List {
        device: OwnedFd,
        list: udmabuf::List,
    },
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
                let device = udmabuf::open().context("opening /dev/udmabuf")?;
                let part = |item: &Item| udmabuf::Item {
                    memfd: memfd as u32,
                    pad: 0,
                    offset: item.offset,
                    size: item.len,
                };
                match items {
                    [item] => Self::Single {
                        device,
                        create: udmabuf::Create {
                            memfd: memfd as u32,
                            flags: udmabuf::CLOEXEC,
                            offset: item.offset,
                            size: item.len,
                        },
                    },
                    _ => Self::List {
                        device,
                        list: udmabuf::List::new(items.iter().map(part)),
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
            Self::Single { device, create } => create.call(device).context("UDMABUF_CREATE"),
            Self::List { device, list } => list.call(device).context("UDMABUF_CREATE_LIST"),
            Self::Empty(exporter) => exporter.export().context("PTI_EXPORT"),
        }
    }
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
