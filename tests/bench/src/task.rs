// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a worker has to measure, and what it answers.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// How buffers are made, or what they are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The kernel's udmabuf.
    Udmabuf,
    /// pinbuf's own call.
    Pinbuf,
    /// udmabuf's interface on pinbuf, through the shim, by a program that has the memory mapped shared
    /// and writable, as QEMU has.
    Shim,
    /// The same, by a program that has not.
    Unmapped,
    /// No buffer: a bare pin and unpin of the same memory, in the test importer module.
    Pin,
    /// A dma-buf with nothing in it, in the test importer module: what any exporter's costs at least.
    Empty,
    /// No buffer: the memory's own mapping, or a scatterlist of nothing but its segments.
    Own,
}

impl fmt::Display for Side {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Udmabuf => "udmabuf",
            Self::Pinbuf => "pinbuf",
            Self::Shim | Self::Unmapped => "shim",
            Self::Pin => "bare pin",
            Self::Empty => "empty dma-buf",
            Self::Own => "bare",
        })
    }
}

/// The memory, of which the worker inherits the memfd.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Shape {
    /// Its size.
    pub bytes: u64,
    /// Pages of 2 MiB.
    pub huge: bool,
    /// The workers have it mapped, all but [`Side::Unmapped`]'s; otherwise no process has.
    pub mapped: bool,
    /// All of its pages are given back before every sample.
    pub sparse: bool,
    /// Its pages of 4 KiB were allocated in an order that has nothing to do with their offsets, as in
    /// a guest that has run for a while.
    pub scattered: bool,
}

/// A part of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Making a buffer and closing it: the mean of this many times.
    Cycle { times: u32 },
    /// The same while this many other buffers live.
    Among { others: u32, times: u32 },
    /// Making a buffer, the first `DMA_BUF_IOCTL_SYNC` (to read), mapping it, writing a byte to every
    /// page of 4 KiB, unmapping and closing: the mean of this many.
    Life { times: u32 },
    /// Mapping it, writing a byte of every page of 4 KiB, and unmapping.
    Touch { aligned: bool },
    /// Mapping it for a device whose segments are no longer than this, which is behind an IOMMU or
    /// has none.
    Device { max_segment: u32, iommu: bool },
    /// The first `DMA_BUF_IOCTL_SYNC`, and the next one.
    Sync,
    /// Asking which parts of it are discarded: the mean of this many times.
    Ask { times: u32 },
    /// Mapping it into the kernel.
    Vmap,
    /// What the kernel keeps for a buffer: the mean of this many, each made by a process of its own
    /// that has exited, or all by one that lives.
    Footprint { buffers: u32, orphans: bool },
    /// What the kernel keeps for a device's mapping of it.
    Table { max_segment: u32 },
    /// Making and closing buffers in one thread, and in this many on as many processors.
    Threads { threads: u32, times: u32 },
    /// The longest time that closing the buffer keeps a real-time task from running.
    Stretch,
}

/// A figure of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Making the buffer (or pinning the memory).
    Create,
    /// Closing it (or unpinning).
    Close,
    /// Both.
    Cycle,
    /// From making it to closing it, all that [`What::Life`] does.
    Life,
    /// Mapping it and touching every page.
    Touch,
    /// The first of these accesses.
    First,
    /// Page faults of all of them.
    Faults,
    /// Unmapping it.
    Unmap,
    /// A device's mapping.
    Map,
    /// The end of it.
    MapEnd,
    /// Entries of its scatterlist.
    Entries,
    /// The first begin of CPU access.
    Sync,
    /// The next one.
    SyncAgain,
    /// A question about discards.
    Ask,
    /// The kernel's mapping.
    Vmap,
    /// The end of it.
    Vunmap,
    /// Bytes of kernel memory, by the kernel's counters.
    Kernel,
    /// Bytes of kernel memory that the driver says it keeps.
    Kept,
    /// Runs of adjacent pages, by the driver's account.
    Extents,
    /// References to pages, by the driver's account.
    Pins,
    /// How many times one thread's throughput several have.
    Scaling,
    /// The longest stretch without a chance for others.
    Stretch,
}

/// What a metric counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds of the guest's clock.
    Time,
    /// Bytes.
    Bytes,
    /// Anything else.
    Number,
}

impl Metric {
    /// What it counts.
    pub fn unit(self) -> Unit {
        match self {
            Self::Kernel | Self::Kept => Unit::Bytes,
            Self::Faults | Self::Entries | Self::Extents | Self::Pins | Self::Scaling => {
                Unit::Number
            }
            _ => Unit::Time,
        }
    }
}

/// One measurement.
pub type Sample = BTreeMap<Metric, f64>;

/// All that a worker needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// How buffers are made.
    pub side: Side,
    /// The inherited descriptor of the memory.
    pub fd: i32,
    /// The memory.
    pub shape: Shape,
    /// The parts of it that make the buffer, in this order.
    pub items: Vec<Item>,
    /// What is measured.
    pub what: What,
}

/// A worker's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// What it measured.
    Sample(Sample),
    /// It could not.
    Error(String),
}
