// SPDX-License-Identifier: MIT OR Apache-2.0

//! What must be so after every batch of inputs: nothing is left behind; and after every input: the kernel has
//! not complained.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use pinbuf_test_harness::support::kernel;

/// How long the kernel may take to release what a process held.
const SETTLE: Duration = Duration::from_secs(10);

/// What the kernel holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    pins: i64,
    dma_bufs: i64,
    module_references: Option<i64>,
    bounce_slots: i64,
}

impl Held {
    fn now() -> Result<Self> {
        Ok(Self {
            pins: kernel::pins()?,
            dma_bufs: kernel::dma_bufs()?,
            module_references: kernel::module_references()?,
            bounce_slots: kernel::bounce_slots()?,
        })
    }
}

/// Compares what the kernel holds and says with what it did before.
pub struct Watch {
    log: File,
    before: Held,
}

impl Watch {
    /// Messages as important as this, or more so, are complaints.
    const WARNING: u32 = 4;

    /// What the kernel may print.
    const HARMLESS: &'static [&'static str] = &[
        // For too many mappings at once.
        "swiotlb buffer is full",
        // For mappings of more than there is.
        "__vm_enough_memory",
        // Huge pages that memfd_pin_folios() adds to a file are not counted, but their release is.
        "vmstat_refresh: nr_hugetlb -",
    ];

    /// Remembers how things are.
    pub fn new() -> Result<Self> {
        let mut log = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("opening /dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self {
            log,
            before: Held::now()?,
        })
    }

    /// Fails if the kernel complained since the last time, in this process or in one that it was forked from.
    pub fn listen(&self) -> Result<()> {
        let complaints = self.complaints()?;
        if !complaints.is_empty() {
            bail!("the kernel says: {}", complaints.join("\n  "));
        }
        Ok(())
    }

    /// Fails if something is left behind.
    pub fn check(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Held::now()?;
            if now == self.before {
                return Ok(());
            }
            if Instant::now() > deadline {
                let text = format!("left behind: before {:?}, after {now:?}", self.before);
                // Each is reported once.
                self.before = now;
                bail!(text);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn complaints(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut record = [0; 8192];
        loop {
            match (&self.log).read(&mut record) {
                Ok(0) => break,
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    let Some((head, line)) = text.split_once(';') else {
                        continue;
                    };
                    let line = line.lines().next().unwrap_or_default();
                    let level: u32 = head.split(',').next().unwrap_or_default().parse()?;
                    // The facility is in the upper bits: the kernel's own is zero.
                    if level <= Self::WARNING
                        && !Self::HARMLESS
                            .iter()
                            .any(|harmless| line.contains(harmless))
                    {
                        found.push(line.to_owned());
                    }
                }
                // Records that were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("reading the kernel's log"),
            }
        }
        Ok(found)
    }
}
