// SPDX-License-Identifier: MIT OR Apache-2.0

//! Other long-term pins of the same pages: vfio, io_uring's fixed buffers, another buffer. In a guest with an
//! emulated IOMMU and the device `edu` behind it.

use std::time::Duration;

use anyhow::{Context, Result};
use io_uring::IoUring;
use nix::errno::Errno;

use crate::common::views_agree;
use crate::frames::{all_frames, movable, within, Pfn};
use crate::holders::Piped;
use crate::vfio::Container;
use pinbuf_test_harness::support::kernel::{vmstat, Setting};
use pinbuf_test_harness::support::kinds::{Kind, Pooled};
use pinbuf_test_harness::support::memory::{stamp, HUGE, PAGE};
use pinbuf_test_harness::support::process::{drop_ipc_lock, in_child, set_memlock};
use pinbuf_test_harness::support::{check, check_eq, kernel, udmabuf, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "pinners":
    pinbuf_first,
    vfio_first,
    overlap_in_part,
    charged_apart,
    random_rounds within 300,
    random_rounds_shmem within 300,
    random_rounds_huge within 300,
    same_load within 120,
}

const IOVA: u64 = 1 << 32;

/// What is pinned beyond what was.
struct Counters {
    pins: i64,
    pinned: i64,
    locked: i64,
}

impl Counters {
    fn now() -> Result<Self> {
        Ok(Self {
            pins: kernel::pins()?,
            pinned: kernel::vm_pin()? / PAGE as i64,
            locked: kernel::vm_lck()? / PAGE as i64,
        })
    }

    /// Pins, `VmPin` and `VmLck`, in pages, since then.
    fn since(&self) -> Result<(i64, i64, i64)> {
        let now = Self::now()?;
        Ok((
            now.pins - self.pins,
            now.pinned - self.pinned,
            now.locked - self.locked,
        ))
    }
}

fn memory_in_movable(kind: Kind, len: usize) -> Result<Pooled> {
    let memory = kind.pooled(len)?;
    check_eq!(
        within(&all_frames(&memory.memory)?, &[movable()?]),
        len / PAGE,
        "pages in ZONE_MOVABLE before"
    );
    Ok(memory)
}

fn pinbuf_first() -> Result<()> {
    let vfio = Container::new()?;
    let device = Device::open()?;
    let memory = memory_in_movable(Kind::Shmem, 300 * PAGE)?;
    let memory = &memory.memory;
    let counters = Counters::now()?;
    let buffer = device.create(&[memory.range()])?;
    let frames = all_frames(memory)?;
    vfio.map(memory, 0, memory.len(), IOVA)
        .context("VFIO_IOMMU_MAP_DMA")?;
    check_eq!(all_frames(memory)?, frames, "frames after vfio pinned, too");
    check_eq!(counters.since()?, (600, 300, 300), "pins, VmPin, VmLck");
    drop(buffer);
    check_eq!(counters.since()?, (300, 0, 300), "without the buffer");
    vfio.unmap(IOVA, memory.len())?;
    check_eq!(counters.since()?, (0, 0, 0), "without either");
    Ok(())
}

fn vfio_first() -> Result<()> {
    let vfio = Container::new()?;
    let device = Device::open()?;
    let memory = memory_in_movable(Kind::Anonymous, 300 * PAGE)?;
    let memory = &memory.memory;
    let counters = Counters::now()?;
    vfio.map(memory, 0, memory.len(), IOVA)
        .context("VFIO_IOMMU_MAP_DMA")?;
    let frames = all_frames(memory)?;
    check_eq!(within(&frames, &[movable()?]), 0, "pages in ZONE_MOVABLE");
    let buffer = device.create(&[memory.range()])?;
    check_eq!(
        all_frames(memory)?,
        frames,
        "frames after pinbuf pinned, too"
    );
    check_eq!(counters.since()?, (600, 300, 300), "pins, VmPin, VmLck");
    views_agree(&buffer, &[(memory, 0, memory.len())])?;
    vfio.unmap(IOVA, memory.len())?;
    check_eq!(counters.since()?, (300, 300, 0), "without vfio");
    views_agree(&buffer, &[(memory, 0, memory.len())])?;
    drop(buffer);
    check_eq!(counters.since()?, (0, 0, 0), "without either");
    Ok(())
}

fn overlap_in_part() -> Result<()> {
    let vfio = Container::new()?;
    let device = Device::open()?;
    let memory = memory_in_movable(Kind::Anonymous, 300 * PAGE)?;
    let memory = &memory.memory;
    let counters = Counters::now()?;
    vfio.map(memory, 50 * PAGE, 100 * PAGE, IOVA)
        .context("VFIO_IOMMU_MAP_DMA")?;
    let buffer = device.create(&[memory.part(100 * PAGE, 100 * PAGE)])?;
    vfio.map(memory, 180 * PAGE, 60 * PAGE, IOVA + (1 << 30))
        .context("VFIO_IOMMU_MAP_DMA")?;
    let frames = all_frames(memory)?;
    check_eq!(
        within(&frames[50..240], &[movable()?]),
        0,
        "pinned pages in ZONE_MOVABLE"
    );
    check_eq!(
        within(&frames, &[movable()?]),
        110,
        "pages in ZONE_MOVABLE that nobody pinned"
    );
    check_eq!(counters.since()?, (260, 100, 160), "pins, VmPin, VmLck");
    vfio.unmap(IOVA, 100 * PAGE)?;
    check_eq!(counters.since()?, (160, 100, 60), "without the first");
    check_eq!(all_frames(memory)?, frames, "frames");
    drop(buffer);
    vfio.unmap(IOVA + (1 << 30), 60 * PAGE)?;
    check_eq!(counters.since()?, (0, 0, 0), "after all");
    Ok(())
}

/// vfio type 1 counts in `VmLck`, pinbuf in `VmPin`: the same pages need no more than either does.
fn charged_apart() -> Result<()> {
    let _allowance = Setting::parameter("allowance_mb", 0)?;
    in_child(|| {
        let vfio = Container::new()?;
        let device = Device::open()?;
        let memory = Memory::small_pages(101 * PAGE)?;
        drop_ipc_lock()?;
        set_memlock(100 * PAGE)?;
        vfio.map(&memory, 0, 100 * PAGE, IOVA)
            .context("VFIO_IOMMU_MAP_DMA")?;
        let buffer = device.create(&[memory.part(0, 100 * PAGE)])?;
        check_eq!(
            device.create(&[memory.part(100 * PAGE, PAGE)]).map(drop),
            Err(Errno::ENOMEM),
            "one page more"
        );
        check_eq!(
            vfio.map(&memory, 100 * PAGE, PAGE, IOVA + (1 << 30)),
            Err(Errno::ENOMEM),
            "one page more for vfio"
        );
        drop(buffer);
        vfio.unmap(IOVA, 100 * PAGE)
    })
}

/// A pin of a part of the memory, with the counts that it must cause.
enum Pinner<'a> {
    Pinbuf(Buffer, i64),
    Vfio(&'a Container, u64, usize),
    Ring(Box<IoUring>),
}

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 += 1;
        (stamp(2024, self.0) >> 16) as usize % limit
    }
}

/// `rounds` times, one of three kinds of pins is added or removed, on parts that overlap at random. After each
/// step the kernel's counters must be the sum over all live pins, and no page may have moved.
///
/// Without `CAP_IPC_LOCK`, as io_uring counts nothing for a user that has it; it then shares the user's locked
/// pages with pinbuf.
fn rounds(memory: &Memory, rounds: usize, exact: bool) -> Result<()> {
    drop_ipc_lock()?;
    set_memlock(1 << 30)?;
    let vfio = Container::new()?;
    let device = Device::open()?;
    let pages = memory.len() / PAGE;
    let counters = Counters::now()?;
    let mut random = Random(pages as u64);
    let mut live: Vec<(Pinner<'_>, usize, usize, Vec<Pfn>)> = Vec::new();
    let mut made = [0; 3];
    let mut most = 0;
    for round in 0..rounds {
        if live.len() >= 6 || (!live.is_empty() && random.below(2) == 0) {
            let (pinner, ..) = live.swap_remove(random.below(live.len()));
            match pinner {
                Pinner::Vfio(vfio, iova, len) => vfio.unmap(iova, len)?,
                Pinner::Ring(ring) => ring.submitter().unregister_buffers()?,
                Pinner::Pinbuf(buffer, _) => drop(buffer),
            }
        } else {
            let at = random.below(pages);
            let count = 1 + random.below(pages - at);
            let (offset, len) = (at * PAGE, count * PAGE);
            let kind = random.below(3);
            let pinner = match kind {
                0 => {
                    let buffer = device
                        .create(&[memory.part(offset, len)])
                        .with_context(|| format!("PINBUF_CREATE in round {round}"))?;
                    let pins = device.describe(&buffer)?.pins as i64;
                    Pinner::Pinbuf(buffer, pins)
                }
                1 => {
                    let iova = IOVA + ((round as u64) << 30);
                    vfio.map(memory, offset, len, iova)
                        .with_context(|| format!("VFIO_IOMMU_MAP_DMA in round {round}"))?;
                    Pinner::Vfio(&vfio, iova, len)
                }
                _ => {
                    let ring = Box::new(IoUring::new(2)?);
                    let vector = libc::iovec {
                        iov_base: memory.at(offset).cast(),
                        iov_len: len,
                    };
                    // SAFETY: the memory outlives the ring, and nothing is submitted to it.
                    unsafe { ring.submitter().register_buffers(&[vector]) }
                        .with_context(|| format!("io_uring in round {round}"))?;
                    Pinner::Ring(ring)
                }
            };
            made[kind] += 1;
            let frames = crate::frames::frames(memory, offset, len)?;
            check_eq!(
                within(&frames, &[movable()?]),
                0,
                "round {round}: pinned pages in ZONE_MOVABLE"
            );
            live.push((pinner, offset, len, frames));
        }
        most = most.max(live.len());
        let mut expected = (0, 0, 0);
        for (pinner, offset, len, frames) in &live {
            let pages = (len / PAGE) as i64;
            let (pins, pinned, locked) = match pinner {
                Pinner::Pinbuf(_, pins) => (*pins, pages, 0),
                Pinner::Vfio(..) => (pages, 0, pages),
                Pinner::Ring(_) => (pages, pages, 0),
            };
            expected.0 += pins;
            expected.1 += pinned;
            expected.2 += locked;
            check_eq!(
                crate::frames::frames(memory, *offset, *len)?,
                *frames,
                "round {round}: frames of pinned pages"
            );
        }
        if exact {
            check_eq!(
                counters.since()?,
                expected,
                "round {round}: pins, VmPin, VmLck"
            );
        }
    }
    for (pinner, ..) in live {
        if let Pinner::Vfio(vfio, iova, len) = pinner {
            vfio.unmap(iova, len)?;
        }
    }
    // Parts of a ring are freed in the background.
    for _ in 0..200 {
        if counters.since()? == (0, 0, 0) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    check_eq!(counters.since()?, (0, 0, 0), "pins, VmPin, VmLck after all");
    check!(
        made.iter().all(|count| *count >= rounds / 10),
        "pinners made: {made:?}"
    );
    println!("# {rounds} rounds: {made:?} pinbuf, vfio, io_uring; at most {most} at once");
    Ok(())
}

fn random_rounds() -> Result<()> {
    let memory = memory_in_movable(Kind::Anonymous, 256 * PAGE)?;
    rounds(&memory.memory, 200, true)
}

fn random_rounds_shmem() -> Result<()> {
    let memory = memory_in_movable(Kind::Shmem, 256 * PAGE)?;
    rounds(&memory.memory, 200, true)
}

/// With huge pages io_uring counts whole pages, once for each ring, in its own way; in the end nothing may be
/// left.
fn random_rounds_huge() -> Result<()> {
    let memory = memory_in_movable(Kind::HugeShared, 4 * HUGE)?;
    rounds(&memory.memory, 200, false)
}

/// The same pages held for the same short time: udmabuf and vfio fail, pinbuf succeeds.
fn same_load() -> Result<()> {
    const SHORT: Duration = Duration::from_millis(250);
    let vfio = Container::new()?;
    let device = Device::open()?;
    let len = 256 * PAGE;
    let prepared = || -> Result<_> {
        let file = udmabuf::sealed_memfd(len)?;
        let memory = Memory::shared(&file, len)?;
        for offset in (0..len).step_by(PAGE) {
            memory.set(offset, 1);
        }
        check_eq!(
            within(&all_frames(&memory)?, &[movable()?]),
            len / PAGE,
            "pages in ZONE_MOVABLE before"
        );
        let holder = Piped::pages(&memory, 20 * PAGE, 3)?.release_after(SHORT);
        Ok((file, memory, holder))
    };
    let fails = vmstat("pgmigrate_fail")?;
    let (file, memory, holder) = prepared()?;
    let others = udmabuf::buffer(&file, len).map(drop);
    check!(others.is_err(), "udmabuf was as patient as pinbuf");
    check!(!holder.is_finished(), "the pipe was too fast for the test");
    holder.join().expect("the pipe's thread");
    udmabuf::buffer(&file, len).context("udmabuf, when nobody holds the pages")?;
    drop((file, memory));
    let after_udmabuf = vmstat("pgmigrate_fail")?;

    let (_file, memory, holder) = prepared()?;
    let mapped = vfio.map(&memory, 0, len, IOVA);
    check!(mapped.is_err(), "vfio was as patient as pinbuf");
    check!(!holder.is_finished(), "the pipe was too fast for the test");
    holder.join().expect("the pipe's thread");
    vfio.map(&memory, 0, len, IOVA)
        .context("vfio, when nobody holds the pages")?;
    vfio.unmap(IOVA, len)?;
    drop(memory);
    let after_vfio = vmstat("pgmigrate_fail")?;

    let (_file, memory, holder) = prepared()?;
    let buffer = device.create(&[memory.range()]).context("pinbuf")?;
    check!(holder.is_finished(), "pinbuf overtook the holder");
    holder.join().expect("the pipe's thread");
    check_eq!(
        within(&all_frames(&memory)?, &[movable()?]),
        0,
        "pages in ZONE_MOVABLE"
    );
    views_agree(&buffer, &[(&memory, 0, len)])?;
    let after_pinbuf = vmstat("pgmigrate_fail")?;
    check!(after_pinbuf > after_vfio, "pgmigrate_fail did not rise");
    println!(
        "# pages held for {} ms: udmabuf {others:?} (pgmigrate_fail +{}), vfio {mapped:?} (+{}), \
         pinbuf succeeds (+{})",
        SHORT.as_millis(),
        after_udmabuf - fails,
        after_vfio - after_udmabuf,
        after_pinbuf - after_vfio
    );
    Ok(())
}
