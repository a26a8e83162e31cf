// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that import buffers, and the kernel's own mappings of them.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::PAGE;
use pinbuf_test_importer::{uapi, Direction, Importer, Limits, Mapping};

use crate::executor::{Executor, Kept};

/// The maximum number of devices that an input has at once.
const DEVICES: usize = 8;
/// The kernel's DMA checker tracks at most this number of mappings of the same page.
const OVERLAP: usize = 7;
/// The segment length of a device that declares none.
const SEGMENT: u64 = 64 << 10;

/// A device, attached to a buffer.
#[derive(Debug)]
struct Attached {
    importer: Importer,
    kept: Rc<Kept>,
    /// Its addresses reach all memory: nothing is bounced.
    direct: bool,
    segment: u64,
    /// Each with the device's direction.
    mappings: Vec<(Mapping, Direction)>,
    vmapped: bool,
}

/// All devices.
#[derive(Debug, Default)]
pub struct Devices(Vec<Attached>);

impl Devices {
    fn get(&mut self, number: u8) -> Option<&mut Attached> {
        let index = usize::from(number).checked_rem(self.0.len())?;
        self.0.get_mut(index)
    }

    /// Removes one.
    pub fn detach(&mut self, number: u8) {
        if let Some(index) = usize::from(number).checked_rem(self.0.len()) {
            self.0.remove(index);
        }
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// How often the most frequently mapped page would be mapped after one more mapping of this buffer.
    fn overlap(&self, kept: &Kept) -> usize {
        let mapped = |device: &Attached| vec![Rc::clone(&device.kept); device.mappings.len()];
        let all: Vec<Rc<Kept>> = self.0.iter().flat_map(mapped).collect();
        let mut counts = HashMap::new();
        for buffer in all.iter().map(|kept| &**kept).chain([kept]) {
            for page in buffer.once() {
                *counts.entry(*page).or_insert(0) += buffer.repeated();
            }
        }
        counts.into_values().max().unwrap_or(0)
    }

    /// Whether another mapping of the device's buffer may be refused: two may be written to by devices, and
    /// one of them may bounce.
    fn may_conflict(&self, device: usize, direction: Direction) -> bool {
        let writes = |direction: Direction| direction != Direction::ToDevice;
        let device = &self.0[device];
        let mut others = self
            .0
            .iter()
            .filter(|other| Rc::ptr_eq(&other.kept, &device.kept))
            .filter(|other| other.mappings.iter().any(|mapping| writes(mapping.1)));
        writes(direction) && others.any(|other| !(device.direct && other.direct))
    }

    /// Mappings of a buffer that live.
    pub fn mappings(&self, kept: &Rc<Kept>) -> usize {
        let of_it = self
            .0
            .iter()
            .filter(|device| Rc::ptr_eq(&device.kept, kept));
        of_it.map(|device| device.mappings.len()).sum()
    }
}

fn direction(number: u8) -> Direction {
    match number % 3 {
        0 => Direction::Bidirectional,
        1 => Direction::ToDevice,
        _ => Direction::FromDevice,
    }
}

/// The error number of a call of the importer's.
fn errno<T>(answer: std::io::Result<T>) -> Result<T, Errno> {
    answer.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

impl Executor {
    /// A new device for a buffer.
    pub(crate) fn attach(&mut self, buffer: u8, bits: u8, segment: u16) -> Result<()> {
        let Some(index) = self.buffer_index(buffer) else {
            return Ok(());
        };
        if self.devices.0.len() == DEVICES {
            self.devices.0.remove(0);
        }
        let mask_bits = match bits % 8 {
            0 if self.bounces => 32,
            1 => 40,
            _ => 64,
        };
        let held = &self.buffers[index];
        let limits = Limits {
            mask_bits,
            max_segment: u32::from(segment) * PAGE as u32,
        };
        let importer = Importer::attach(held.fd.as_fd(), limits).context("attaching a device")?;
        let segment = match limits.max_segment {
            0 => SEGMENT,
            bytes => bytes.into(),
        };
        self.devices.0.push(Attached {
            segment: segment.min(importer.max_mapping()),
            importer,
            kept: Rc::clone(&held.kept),
            direct: mask_bits > 32,
            mappings: Vec::new(),
            vmapped: false,
        });
        Ok(())
    }

    /// Maps its buffer for a device.
    pub(crate) fn device_map(&mut self, device: u8, number: u8) -> Result<()> {
        let Some(index) = usize::from(device).checked_rem(self.devices.0.len()) else {
            return Ok(());
        };
        if self.devices.overlap(&self.devices.0[index].kept) > OVERLAP {
            return Ok(());
        }
        let direction = direction(number);
        let may_conflict = self.devices.may_conflict(index, direction);
        let device = &mut self.devices.0[index];
        match errno(device.importer.map(direction)) {
            Ok((mapping, _)) => {
                let report = device.importer.report(mapping)?;
                let bytes = (device.kept.length() * PAGE) as u64;
                if report.total != bytes || report.max_len > device.segment {
                    bail!(
                        "a device sees {} bytes in segments of up to {}; expected {bytes} and {}",
                        report.total,
                        report.max_len,
                        device.segment
                    );
                }
                device.mappings.push((mapping, direction));
            }
            Err(Errno::ENOSPC) if device.mappings.len() == uapi::MAPPINGS as usize => {}
            Err(Errno::EBUSY) if may_conflict => {}
            // Bounce buffers run out.
            Err(Errno::ENOMEM | Errno::EIO) if !device.direct => {}
            Err(error) => bail!("mapping for a device: {error}"),
        }
        if !device.direct {
            for id in device.kept.once().iter().flatten() {
                self.contents.distrust(*id);
            }
        }
        Ok(())
    }

    /// Undoes a mapping for a device.
    pub(crate) fn device_unmap(&mut self, device: u8, mapping: u8) -> Result<()> {
        if let Some(device) = self.devices.get(device) {
            if let Some(index) = usize::from(mapping).checked_rem(device.mappings.len()) {
                let (mapping, _) = device.mappings.remove(index);
                device.importer.unmap(mapping).context("unmapping")?;
            }
        }
        Ok(())
    }

    /// A device reads or writes a page.
    pub(crate) fn device_touch(
        &mut self,
        device: u8,
        mapping: u8,
        page: u16,
        write: bool,
    ) -> Result<()> {
        let Some(device) = self.devices.get(device) else {
            return Ok(());
        };
        let Some(index) = usize::from(mapping).checked_rem(device.mappings.len()) else {
            return Ok(());
        };
        let (mapping, _) = device.mappings[index];
        let page = usize::from(page) % device.kept.length();
        let offset = (page * PAGE) as u64;
        let stamp = self.contents.stamp();
        let mut word = stamp.to_ne_bytes();
        if write {
            device.importer.write(mapping, offset, &word)
        } else {
            device.importer.read(mapping, offset, &mut word)
        }
        .context("a device's access")?;
        let kept = Rc::clone(&device.kept);
        self.touched("a device", &kept, page, write, u64::from_ne_bytes(word))
    }

    /// Maps a device's buffer into the kernel.
    pub(crate) fn kernel_map(&mut self, device: u8) -> Result<()> {
        let Some(device) = self.devices.get(device) else {
            return Ok(());
        };
        match errno(device.importer.vmap()) {
            Ok(_) if !device.vmapped => device.vmapped = true,
            Err(Errno::EBUSY) if device.vmapped => {}
            other => bail!("vmap: {other:?}"),
        }
        Ok(())
    }

    /// Undoes that.
    pub(crate) fn kernel_unmap(&mut self, device: u8) -> Result<()> {
        if let Some(device) = self.devices.get(device).filter(|device| device.vmapped) {
            device.importer.vunmap().context("vunmap")?;
            device.vmapped = false;
        }
        Ok(())
    }

    /// The kernel reads or writes a page.
    pub(crate) fn kernel_touch(&mut self, device: u8, page: u16, write: bool) -> Result<()> {
        let Some(device) = self.devices.get(device).filter(|device| device.vmapped) else {
            return Ok(());
        };
        let page = usize::from(page) % device.kept.length();
        let offset = (page * PAGE) as u64;
        let stamp = self.contents.stamp();
        let mut word = stamp.to_ne_bytes();
        if write {
            device.importer.vmap_write(offset, &word)
        } else {
            device.importer.vmap_read(offset, &mut word)
        }
        .context("the kernel's access")?;
        let kept = Rc::clone(&device.kept);
        self.touched("the kernel", &kept, page, write, u64::from_ne_bytes(word))
    }

    /// A page's first word was written, or seen.
    fn touched(
        &mut self,
        who: &str,
        kept: &Kept,
        page: usize,
        write: bool,
        word: u64,
    ) -> Result<()> {
        let Some(id) = kept.page(page) else {
            return Ok(());
        };
        if write {
            self.contents.set(id, word);
        } else if let Some(expected) = self.contents.get(id).filter(|known| *known != word) {
            bail!("{who} sees {word:#x} in page {page}, expected {expected:#x}");
        }
        Ok(())
    }

    /// The kernel begins or ends access.
    pub(crate) fn bracket(&mut self, device: u8, number: u8, end: bool) -> Result<()> {
        if let Some(device) = self.devices.get(device) {
            if end {
                device.importer.end_cpu_access(direction(number))
            } else {
                device.importer.begin_cpu_access(direction(number))
            }
            .context("CPU access")?;
        }
        Ok(())
    }
}
