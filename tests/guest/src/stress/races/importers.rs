// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that map and unmap, against synchronisation, faults of user mappings, and buffers whose last user
//! may be any of them.

use std::os::fd::AsFd;
use std::sync::{Arc, RwLock};

use anyhow::{Context, Result};
use fastrand::Rng;
use pinbuf_test_importer::{Direction, Importer, Limits};

use super::{race, Count};
use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory, Sync};
use pinbuf_test_harness::tests;

tests! { "races":
    importers within 120,
}

const PAGES: usize = 256;
/// Mappings that one device has at once: the DMA API's checker counts to seven for a page, and there
/// are three devices.
const MOST: usize = 2;

/// The buffer of the moment, which is replaced by another one of the same memory.
struct Current(RwLock<Arc<Buffer>>);

impl Current {
    /// A reference of one's own, which may be the last one.
    fn get(&self) -> Arc<Buffer> {
        Arc::clone(&self.0.read().expect("a thread panicked"))
    }

    fn set(&self, buffer: Buffer) {
        let old = std::mem::replace(
            &mut *self.0.write().expect("a thread panicked"),
            Arc::new(buffer),
        );
        drop(old);
    }
}

/// A buffer of the memory's pages in one order or another, each of which says its number in its
/// second word.
fn buffer(device: &Device, memory: &Memory, rng: &mut Rng) -> Result<Buffer> {
    let mut ranges: Vec<_> = (0..PAGES)
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    if rng.bool() {
        // In part: one extent, perhaps, and many.
        rng.shuffle(&mut ranges[..PAGES / 2]);
    }
    device.create(&ranges).context("create")
}

/// Maps a few times, at the same time, reads a word, and unmaps some: closing does the rest.
fn device_at_work(current: &Current, maps: &Count, rng: &mut Rng) -> Result<()> {
    let buffer = current.get();
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
    drop(buffer);
    let mut mapped = Vec::new();
    for _ in 0..rng.usize(1..32) {
        let direction = [
            Direction::Bidirectional,
            Direction::ToDevice,
            Direction::FromDevice,
        ][rng.usize(..3)];
        let (mapping, _) = importer.map(direction).context("mapping")?;
        mapped.push(mapping);
        maps.up();
        super::pause(rng);
        let page = rng.u64(..PAGES as u64);
        let mut number = [0; 8];
        importer
            .read(mapping, page * PAGE as u64 + 8, &mut number)
            .context("reading as the device")?;
        check!(
            u64::from_ne_bytes(number) < PAGES as u64,
            "the device reads {number:x?}"
        );
        while mapped.len() > rng.usize(..MOST) {
            importer
                .unmap(mapped.swap_remove(rng.usize(..mapped.len())))
                .context("unmapping")?;
        }
    }
    if rng.bool() {
        importer.vmap().context("mapping into the kernel")?;
        importer
            .begin_cpu_access(Direction::Bidirectional)
            .context("begin_cpu_access")?;
        let mut number = [0; 8];
        let page = rng.u64(..PAGES as u64);
        importer.vmap_read(page * PAGE as u64 + 8, &mut number)?;
        check!(
            u64::from_ne_bytes(number) < PAGES as u64,
            "the kernel reads {number:x?}"
        );
        importer
            .end_cpu_access(Direction::Bidirectional)
            .context("end_cpu_access")?;
    }
    Ok(())
}

fn importers() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(PAGES * PAGE)?;
    for page in 0..PAGES {
        memory.set(page * PAGE + 8, page as u64);
    }
    let first = buffer(&device, &memory, &mut Rng::with_seed(0))?;
    let current = Current(RwLock::new(Arc::new(first)));
    let (maps, closed) = (Count::default(), Count::default());
    race(&[
        ("device", &|rng| device_at_work(&current, &maps, rng)),
        ("device", &|rng| device_at_work(&current, &maps, rng)),
        ("device", &|rng| device_at_work(&current, &maps, rng)),
        ("sync", &|rng| {
            let buffer = current.get();
            let mode = [Sync::Read, Sync::Write, Sync::ReadWrite][rng.usize(..3)];
            buffer.synced(mode, || super::pause(rng))
        }),
        ("fault", &|rng| {
            let mapped = current.get().map()?;
            for _ in 0..8 {
                let page = rng.usize(..PAGES);
                let number = mapped.get(page * PAGE + 8);
                check!(number < PAGES as u64, "page {page} says {number:#x}");
            }
            Ok(())
        }),
        ("ask", &|_| {
            let info = device.describe(&current.get())?;
            check_eq!(info.pages, PAGES as u64, "pages");
            Ok(())
        }),
        ("close", &|rng| {
            current.set(buffer(&device, &memory, rng)?);
            closed.up();
            Ok(())
        }),
    ])?;
    println!("# {} mappings", maps.get());
    check!(
        maps.get() > 0 && closed.get() > 0,
        "no buffer was mapped, or none was closed"
    );
    Ok(())
}
