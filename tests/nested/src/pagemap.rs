// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which page frames a process has at its addresses.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

const PAGE: u64 = 4096;

/// The frames of a number of pages from an address on; `None` for a page that is not present. `process` is a number, or
/// `self`.
///
/// The kernel does not report mappings without pages of their own (`VM_PFNMAP`), such as those of dumb buffers and
/// dma-bufs.
pub fn frames(process: &str, start: u64, pages: usize) -> Result<Vec<Option<u64>>> {
    let path = format!("/proc/{process}/pagemap");
    let pagemap = File::open(&path).with_context(|| path.clone())?;
    let mut entries = vec![0; pages * 8];
    pagemap
        .read_exact_at(&mut entries, start / PAGE * 8)
        .context(path)?;
    let entry = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0, |all, &byte| all << 8 | u64::from(byte))
    };
    Ok(entries
        .chunks_exact(8)
        .map(entry)
        .map(|entry| (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1)))
        .collect())
}
