// SPDX-License-Identifier: MIT OR Apache-2.0

//! An nvme disk's data.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};

use crate::pattern;
use crate::protocol::DiskPlan;

/// The number of bytes in one read or write.
const CHUNK: usize = 256 << 10;

/// Memory that is aligned for O_DIRECT.
struct Buffer {
    words: Vec<u64>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let words = vec![0_u64; (CHUNK + 4096) / 8];
        let start = words.as_ptr().align_offset(4096);
        Self { words, start }
    }

    fn words(&mut self) -> &mut [u64] {
        &mut self.words[self.start..self.start + CHUNK / 8]
    }

    fn bytes(&mut self) -> &mut [u8] {
        let words = self.words();
        // SAFETY: any bytes are valid words and the other way round, and the borrow is passed on.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
    }
}

/// The nvme disks of the machine.
pub fn namespaces() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let device = Path::new("/dev").join(&name);
        if name.starts_with("nvme") && device.exists() {
            found.push(device);
        }
    }
    found.sort();
    Ok(found)
}

/// Waits for a disk.
pub fn wait(patience: Duration) -> Result<PathBuf> {
    let start = Instant::now();
    while start.elapsed() < patience {
        if let Some(path) = namespaces()?.pop() {
            return Ok(path);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("no nvme disk appeared")
}

fn open(path: &Path) -> Result<File> {
    Ok(File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?)
}

/// Fills a part of the disk.
pub fn write(path: &Path, seed: u64, from: u64, length: u64) -> Result<()> {
    let (file, mut buffer) = (open(path)?, Buffer::new());
    for offset in (from..from + length).step_by(CHUNK) {
        write_chunk(&file, &mut buffer, seed, offset)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Compares a part of the disk.
pub fn verify(path: &Path, seed: u64, from: u64, length: u64) -> Result<()> {
    let (file, mut buffer, mut expected) = (open(path)?, Buffer::new(), vec![0; CHUNK / 8]);
    for offset in (from..from + length).step_by(CHUNK) {
        verify_chunk(&file, &mut buffer, &mut expected, seed, offset)?;
    }
    Ok(())
}

fn write_chunk(file: &File, buffer: &mut Buffer, seed: u64, offset: u64) -> Result<()> {
    pattern::fill(buffer.words(), seed, offset);
    Ok(file.write_all_at(buffer.bytes(), offset)?)
}

fn verify_chunk(
    file: &File,
    buffer: &mut Buffer,
    expected: &mut [u64],
    seed: u64,
    offset: u64,
) -> Result<()> {
    buffer.words().fill(0);
    file.read_exact_at(buffer.bytes(), offset)?;
    pattern::fill(expected, seed, offset);
    let wrong = buffer
        .words()
        .iter()
        .zip(expected)
        .filter(|(a, b)| *a != *b);
    let wrong = wrong.count();
    ensure!(wrong == 0, "{wrong} words from byte {offset} on are wrong");
    Ok(())
}

/// Reads the first part and writes the second until `stop`, both at least once. Returns the bytes that were read and
/// found right, and the bytes that were written.
pub fn exercise(path: &Path, plan: DiskPlan, stop: &AtomicBool) -> Result<(u64, u64)> {
    let (file, mut buffer, mut expected) = (open(path)?, Buffer::new(), vec![0; CHUNK / 8]);
    let (mut read, mut written) = (0, 0);
    while read < plan.part || !stop.load(Ordering::Relaxed) {
        let offset = read % plan.part;
        verify_chunk(&file, &mut buffer, &mut expected, plan.read_seed, offset)?;
        read += CHUNK as u64;
        let offset = plan.part + written % plan.part;
        write_chunk(&file, &mut buffer, plan.write_seed, offset)?;
        verify_chunk(&file, &mut buffer, &mut expected, plan.write_seed, offset)?;
        written += CHUNK as u64;
    }
    file.sync_all()?;
    Ok((read, written))
}
