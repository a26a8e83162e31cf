// SPDX-License-Identifier: MIT OR Apache-2.0

//! Repeated operations do not accumulate anything in the kernel: neither objects of its allocators, nor address
//! space, nor open files.
//!
//! A reference that is never dropped shows in no counter of pins, charges or dma-bufs. But the object that it
//! keeps is one more per round, in each of several repetitions, while the stocks of allocators stop growing. On
//! kernels with kmemleak that finds such objects, and KASAN keeps freed ones for a while.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::unistd::{setresuid, Uid};
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Backing, CHARGE_USER};

use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::{memfd, PAGE};
use pinbuf_test_harness::support::process::{drop_ipc_lock, in_child, set_memlock};
use pinbuf_test_harness::support::vgem::{self, Vgem, SYNC_READ};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory, Skip};
use pinbuf_test_harness::tests;

use crate::namespaces::{in_namespace, COUNT, LIMIT};

tests! { "leaks":
    users within 120,
    users_that_are_refused within 120,
    processes within 120,
    devices within 120,
    devices_that_cannot_map within 120,
    fences within 120,
    kernel_mappings,
    files,
}

/// How often the whole is repeated.
const REPETITIONS: usize = 3;

/// How long freed objects may be counted: `kfree_rcu()` collects for up to five seconds.
const PATIENCE: Duration = Duration::from_secs(7);

/// Does something `rounds` times, several times over. No count may grow by one per round each time.
fn piles_nothing_up(rounds: usize, mut action: impl FnMut(usize) -> Result<()>) -> Result<()> {
    if kernel::has_checkers() {
        return Ok(());
    }
    let many = i64::try_from(rounds)? * 8 / 10;
    let mut grown: Option<BTreeMap<String, i64>> = None;
    for repetition in 0..=REPETITIONS {
        kernel::wait_for_rcu()?;
        let before = kernel::objects()?;
        for round in 0..rounds {
            action(repetition * rounds + round)?;
        }
        if repetition == 0 {
            // Allocations of the first time stay.
            continue;
        }
        let end = Instant::now();
        let left = loop {
            let mut left = kernel::objects()?;
            left.retain(|name, count| {
                *count -= before.get(name).unwrap_or(&0);
                *count >= many && grown.as_ref().is_none_or(|grown| grown.contains_key(name))
            });
            if left.is_empty() {
                return Ok(());
            }
            if end.elapsed() > PATIENCE {
                break left;
            }
            // What RCU has yet to free is counted.
            kernel::wait_for_rcu()?;
        };
        grown = Some(left);
    }
    bail!("{rounds} rounds each time leave behind: {grown:?}")
}

/// A buffer that is charged to a user.
fn users() -> Result<()> {
    let device = Device::open()?;
    in_child(|| {
        drop_ipc_lock()?;
        set_memlock(8 * PAGE)?;
        let memory = Memory::anonymous(PAGE)?;
        let root = Uid::from_raw(0);
        piles_nothing_up(400, |round| {
            let uid = Uid::from_raw(100_000 + u32::try_from(round)?);
            setresuid(uid, root, root).context("setresuid")?;
            let buffer = device.create(&[memory.range()])?;
            if round % 100 == 0 {
                let charge = device.describe(&buffer)?.charge;
                check_eq!(charge, CHARGE_USER, "what is charged");
            }
            Ok(())
        })
    })
}

/// A user that has room under its own limit, while the users of its namespace have no room together.
fn users_that_are_refused() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace(LIMIT, |device, link| {
        let root = Uid::from_raw(0);
        let memory = Memory::anonymous(LIMIT * PAGE)?;
        let _all = device.create(&[memory.range()]).context("the limit")?;
        loop {
            match u32::try_from(link.hear()?)? {
                0 => return Ok(()),
                uid => setresuid(Uid::from_raw(uid), root, root).context("setresuid")?,
            }
            let error = device.create(&[memory.part(0, PAGE)]).err();
            check_eq!(error, Some(Errno::ENOMEM), "a page too many");
            link.signal()?;
        }
    })?;
    let result = piles_nothing_up(COUNT as usize / 10, |round| {
        link.say(round as u64 + 1)?;
        link.wait()
    });
    // If the child has failed, it says why.
    let _ = link.say(0);
    child.join()?;
    result
}

/// A buffer of a process that ends.
fn processes() -> Result<()> {
    let device = Device::open()?;
    piles_nothing_up(100, |_| {
        in_child(|| {
            let memory = Memory::anonymous(PAGE)?;
            drop(device.create(&[memory.range()])?);
            Ok(())
        })
    })
}

/// A device that maps a buffer.
fn devices() -> Result<()> {
    let memory = Memory::small_pages(16 * PAGE)?;
    let ranges: Vec<_> = (0..16).rev().map(|n| memory.part(n * PAGE, PAGE)).collect();
    let buffer = Device::open()?.create(&ranges)?;
    piles_nothing_up(300, |_| {
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        let mapping = importer.map(Direction::Bidirectional)?.0;
        importer.unmap(mapping)?;
        importer.detach().context("detaching")
    })
}

/// A device for which there are no bounce buffers left.
fn devices_that_cannot_map() -> Result<()> {
    if !kernel::bounces_always()? {
        return Ok(());
    }
    /// Bounce buffers for more than there are, and the pages of a buffer.
    const MOST: usize = 1 << 30;
    const PAGES: usize = 64;
    let memory = Memory::small_pages(PAGES * PAGE)?;
    let ranges: Vec<_> = (0..PAGES)
        .rev()
        .map(|n| memory.part(n * PAGE, PAGE))
        .collect();
    let buffer = Device::open()?.create(&ranges)?;
    let importers = (0..MOST / (PAGES * PAGE))
        .map(|_| Importer::attach(buffer.as_fd(), Limits::NONE))
        .map(|importer| importer.and_then(|it| it.map(Direction::ToDevice).map(|_| it)))
        .map_while(std::io::Result::ok)
        .collect::<Vec<_>>();
    check!(importers.len() > 1, "{} mappings", importers.len());
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    piles_nothing_up(300, |_| {
        check!(importer.map(Direction::ToDevice).is_err(), "mapped");
        Ok(())
    })
}

/// A buffer with a device's fence.
fn fences() -> Result<()> {
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    piles_nothing_up(300, |_| {
        let buffer = device.create(&[memory.range()])?;
        vgem.uses(buffer.as_fd(), SYNC_READ)?.signal()
    })
}

/// A kernel mapping of memory that is not in one piece.
fn kernel_mappings() -> Result<()> {
    let memory = Memory::small_pages(16 * PAGE)?;
    let ranges = [memory.part(PAGE, 15 * PAGE), memory.part(0, PAGE)];
    let device = Device::open()?;
    let buffer = device.create(&ranges)?;
    check!(device.describe(&buffer)?.extents > 1, "one extent");
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    piles_nothing_up(300, |_| {
        importer.vmap()?;
        importer.vunmap()?;
        Ok(())
    })
}

/// A file whose pages are compared with a buffer's.
fn files() -> Result<()> {
    let device = Device::open()?;
    piles_nothing_up(300, |_| {
        let file = memfd(PAGE, 0)?;
        let memory = Memory::shared(&file, PAGE)?;
        let backing = Backing {
            fd: file.as_raw_fd(),
            reserved: 0,
            offset: 0,
        };
        drop(device.create_checked(&[memory.range()], &[backing])?);
        Ok(())
    })
}
