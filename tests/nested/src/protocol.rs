// SPDX-License-Identifier: MIT OR Apache-2.0

//! Lines of JSON between the test and the first process of the inner guest.

use serde::{Deserialize, Serialize};

/// The name of the virtio serial port that carries them.
pub const PORT: &str = "pinbuf.inner";

/// What the inner guest is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Make a dumb buffer of the display's preferred size, and show it.
    Show,
    /// Keep that buffer, and show another one.
    ShowAnother,
    /// Draw a frame into it.
    Draw(u32),
    /// Draw a frame into it without notifying the driver.
    DrawQuietly(u32),
    /// Count the pixels of its memory that differ from this frame.
    Wrong(u32),
    /// Allocate this number of MiB page by page, then free every other page of that.
    Fragment(u64),
    /// Make a process's own memory a dma-buf, by pinbuf, and show that instead of a dumb buffer.
    ShowExported,
    /// Read and write the disk repeatedly, until the request to stop.
    DiskStart(DiskPlan),
    /// Stop that, and report what was done.
    DiskStop,
    /// The current number of disks.
    Disks,
    /// Put these pages of the screen, which is the process's own memory, into the balloon, and go on using them.
    Inflate(Vec<usize>),
    /// How many pages of the screen, which is the process's own memory, lie above 4 GiB, where memory is plugged.
    HighPages,
    /// Allocate this number of MiB, write to each page, and free them.
    Churn(usize),
}

/// A disk's data: the first part was written outside, the second is written inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// The size of each of the two parts.
    pub part: u64,
    /// What the first part holds: see `pattern::fill`.
    pub read_seed: u64,
    /// What the second part is to hold.
    pub write_seed: u64,
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It has booted.
    Ready,
    /// The screen's size.
    Shown {
        /// Pixels from left to right.
        width: u32,
        /// Pixels from top to bottom.
        height: u32,
    },
    /// Done.
    Done,
    /// The number of pages that were freed one by one.
    Freed(u64),
    /// What was read and found right, and written, in bytes.
    Disk {
        /// Read and compared.
        read: u64,
        /// Written.
        written: u64,
    },
    /// A number.
    Count(usize),
    /// The request failed, for this reason.
    Failed(String),
}
