// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ways in which a buffer's bytes can be reached, and the check that all agree.

use anyhow::{bail, Context, Result};
use pinbuf_test_importer::{Direction, Importer, Mapping};

use super::memory::{pattern, stamp, Memory, PAGE};
use super::{Buffer, Sync};

/// One way to reach a buffer's bytes, with the calls that it needs before and after an access.
pub trait View {
    /// Its name.
    fn name(&self) -> String;
    /// Accesses the bytes between the calls that it needs; writing includes reading.
    fn bracket(&self, write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Reads between these calls.
    fn get(&self, offset: usize, data: &mut [u8]) -> Result<()>;
    /// Writes between these calls.
    fn put(&self, offset: usize, data: &[u8]) -> Result<()>;

    /// Reads at an offset of the buffer.
    fn read(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.bracket(false, &mut || self.get(offset, data))
    }

    /// Writes at an offset of the buffer.
    fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.bracket(true, &mut || self.put(offset, data))
    }
}

/// The bracket for the CPU's access.
fn synced(buffer: &Buffer, write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    buffer.synced(if write { Sync::ReadWrite } else { Sync::Read }, action)?
}

/// The memory that was pinned.
#[derive(Debug)]
pub struct Source<'a> {
    /// The buffer, for the brackets.
    pub buffer: &'a Buffer,
    /// Pieces in the buffer's order: memory, offset in it, length.
    pub pieces: Vec<(&'a Memory, usize, usize)>,
}

impl<'a> Source<'a> {
    /// All of one piece of memory.
    pub fn whole(buffer: &'a Buffer, memory: &'a Memory) -> Self {
        Self {
            buffer,
            pieces: vec![(memory, 0, memory.len())],
        }
    }

    fn each(
        &self,
        offset: usize,
        len: usize,
        mut action: impl FnMut(&Memory, usize, std::ops::Range<usize>),
    ) {
        let mut start = 0;
        for (memory, at, size) in &self.pieces {
            let from = offset.max(start);
            let to = (offset + len).min(start + size);
            if from < to {
                action(memory, at + from - start, from - offset..to - offset);
            }
            start += size;
        }
    }
}

impl View for Source<'_> {
    fn name(&self) -> String {
        "the memory".to_owned()
    }

    fn bracket(&self, write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        synced(self.buffer, write, action)
    }

    fn get(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        let len = data.len();
        self.each(offset, len, |memory, at, part| {
            memory.read(at, &mut data[part])
        });
        Ok(())
    }

    fn put(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.each(offset, data.len(), |memory, at, part| {
            memory.write(at, &data[part])
        });
        Ok(())
    }
}

/// A mapping of the dma-buf.
#[derive(Debug)]
pub struct Mapped<'a> {
    /// The buffer, for the brackets.
    buffer: &'a Buffer,
    /// All of it.
    memory: &'a Memory,
}

impl<'a> Mapped<'a> {
    /// That of this buffer.
    pub fn of(buffer: &'a Buffer, memory: &'a Memory) -> Self {
        Self { buffer, memory }
    }
}

impl View for Mapped<'_> {
    fn name(&self) -> String {
        "the dma-buf's mapping".to_owned()
    }

    fn bracket(&self, write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        synced(self.buffer, write, action)
    }

    fn get(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.memory.read(offset, data);
        Ok(())
    }

    fn put(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.memory.write(offset, data);
        Ok(())
    }
}

/// A device that mapped the buffer.
#[derive(Debug)]
pub struct DeviceView<'a> {
    /// The device.
    importer: &'a Importer,
    /// Its mapping.
    mapping: Mapping,
}

impl<'a> DeviceView<'a> {
    /// That of this device.
    pub fn of(importer: &'a Importer, mapping: Mapping) -> Self {
        Self { importer, mapping }
    }
}

impl View for DeviceView<'_> {
    fn name(&self) -> String {
        "the device".to_owned()
    }

    fn bracket(&self, _write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        action()
    }

    fn get(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.importer
            .read(self.mapping, offset as u64, data)
            .context("reading as the device")
    }

    fn put(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.importer
            .write(self.mapping, offset as u64, data)
            .context("writing as the device")
    }
}

/// The kernel's mapping.
#[derive(Debug)]
pub struct KernelView<'a>(pub &'a Importer);

impl View for KernelView<'_> {
    fn name(&self) -> String {
        "the kernel's mapping".to_owned()
    }

    fn bracket(&self, write: bool, action: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let direction = if write {
            Direction::Bidirectional
        } else {
            Direction::FromDevice
        };
        self.0
            .begin_cpu_access(direction)
            .context("begin_cpu_access")?;
        let result = action();
        self.0.end_cpu_access(direction).context("end_cpu_access")?;
        result
    }

    fn get(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.0
            .vmap_read(offset as u64, data)
            .context("reading through the vmap")
    }

    fn put(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.0
            .vmap_write(offset as u64, data)
            .context("writing through the vmap")
    }
}

/// Says where two byte strings first differ.
pub fn same(what: &str, offset: usize, seen: &[u8], expected: &[u8]) -> Result<()> {
    if seen.len() != expected.len() {
        bail!(
            "{what}: expected {} bytes, seen {}",
            expected.len(),
            seen.len()
        );
    }
    // All at once first: comparing byte by byte is slow.
    if seen == expected {
        return Ok(());
    }
    if let Some(at) = (0..seen.len()).find(|&at| seen[at] != expected[at]) {
        let end = seen.len().min(at + 8);
        bail!(
            "{what} at byte {:#x}: expected {:02x?}, seen {:02x?}",
            offset + at,
            &expected[at..end],
            &seen[at..end]
        );
    }
    Ok(())
}

/// Reads a view and compares it with a pattern.
pub fn holds(view: &dyn View, seed: u64, offset: usize, len: usize) -> Result<()> {
    reads(view, offset, &pattern(seed, offset as u64, len))
}

/// Reads a view and compares it with bytes.
fn reads(view: &dyn View, offset: usize, expected: &[u8]) -> Result<()> {
    let mut seen = vec![0; expected.len()];
    view.read(offset, &mut seen)?;
    same(&view.name(), offset, &seen, expected)
}

/// Every view writes all `len` bytes in turn, and all others must see each byte of it.
pub fn agree(views: &[&dyn View], len: usize) -> Result<()> {
    for (index, writer) in views.iter().enumerate() {
        let seed = 1000 + index as u64;
        let written = pattern(seed, 0, len);
        writer.write(0, &written)?;
        for reader in views {
            reads(*reader, 0, &written)
                .with_context(|| format!("after {} was written", writer.name()))?;
        }
        // Bytes that are no multiple of anything, across a page's end where there is one.
        let offset = if len > PAGE { PAGE - 3 } else { 5 };
        let odd = pattern(seed + 500, 0, 7);
        writer.write(offset, &odd)?;
        for reader in views {
            let mut seen = [0; 9];
            reader.read(offset - 1, &mut seen)?;
            let around = pattern(seed, offset as u64 - 1, 9);
            let what = format!(
                "{} after seven bytes through {}",
                reader.name(),
                writer.name()
            );
            same(&what, offset, &seen[1..8], &odd)?;
            same(
                &what,
                offset - 1,
                &[seen[0], seen[8]],
                &[around[0], around[8]],
            )?;
        }
    }
    Ok(())
}

/// As [`agree`], with eight bytes in each of `samples` pages spread over the buffer.
pub fn agree_sampled(views: &[&dyn View], len: usize, samples: usize) -> Result<()> {
    let pages = len / PAGE;
    let offsets: Vec<usize> = (0..samples.min(pages))
        .map(|sample| {
            sample * (pages - 1) / (samples.min(pages) - 1).max(1) * PAGE + sample % 509 * 8
        })
        .collect();
    for (index, writer) in views.iter().enumerate() {
        let seed = 2000 + index as u64;
        let expected = |offset: usize| stamp(seed, offset as u64).to_le_bytes();
        writer.bracket(true, &mut || {
            offsets
                .iter()
                .try_for_each(|&offset| writer.put(offset, &expected(offset)))
        })?;
        for reader in views {
            reader.bracket(false, &mut || {
                let what = format!("{} after {} was written", reader.name(), writer.name());
                offsets.iter().try_for_each(|&offset| {
                    let mut seen = [0; 8];
                    reader.get(offset, &mut seen)?;
                    same(&what, offset, &seen, &expected(offset))
                })
            })?;
        }
    }
    Ok(())
}
