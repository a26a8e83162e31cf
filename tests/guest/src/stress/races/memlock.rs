// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes of one user that want more than there is: never more than the limit together, and all of it is
//! available again in the end.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

use anyhow::{bail, Result};
use fastrand::Rng;
use nix::errno::Errno;
use pinbuf_uapi::{CHARGE_ALLOWANCE, CHARGE_USER};

use super::pause;
use crate::settings::Settings;
use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::{PAGE, RW};
use pinbuf_test_harness::support::process::{become_user, in_child, set_memlock, Child, USER};
use pinbuf_test_harness::support::{check, check_eq, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "races":
    memlock within 120,
    allowance within 120,
}

const PROCESSES: u64 = 4;

/// Numbers that processes share.
struct Shared(Memory);

impl Shared {
    fn new() -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Ok(Self(Memory::map(PAGE, RW, flags, None, 0)?))
    }

    fn number(&self, index: usize) -> &AtomicI64 {
        let word = self.0.at(index * 8).cast::<AtomicI64>();
        // SAFETY: aligned, inside of the mapping, and reached as an atomic only.
        unsafe { &*word }
    }

    /// Pages that buffers certainly hold: added after create, and subtracted before close.
    fn held(&self) -> &AtomicI64 {
        self.number(0)
    }

    /// The maximum of them at any time.
    fn most(&self) -> &AtomicI64 {
        self.number(1)
    }

    /// Buffers that were made.
    fn made(&self) -> &AtomicI64 {
        self.number(2)
    }

    /// Creates that were refused.
    fn refused(&self) -> &AtomicI64 {
        self.number(3)
    }
}

/// What each process does: buffers of random sizes, several at a time.
fn want(shared: &Shared, room: usize, limit: usize, charge: u32, index: u64) -> Result<()> {
    let Settings { seconds, seed, .. } = Settings::get();
    let mut rng = Rng::with_seed(seed.wrapping_add(index));
    let device = Device::open()?;
    become_user(USER)?;
    set_memlock(limit * PAGE)?;
    let memory = Memory::anonymous(room * PAGE)?;
    let mut buffers = Vec::new();
    let end = Instant::now() + seconds;
    let let_go = |(buffer, pages): (_, i64)| {
        shared.held().fetch_sub(pages, Ordering::SeqCst);
        drop(buffer);
    };
    while Instant::now() < end {
        let pages = rng.usize(1..=room);
        match device.create(&[memory.part(0, pages * PAGE)]) {
            Ok(buffer) => {
                let held = shared.held().fetch_add(pages as i64, Ordering::SeqCst) + pages as i64;
                shared.most().fetch_max(held, Ordering::SeqCst);
                shared.made().fetch_add(1, Ordering::Relaxed);
                check_eq!(device.describe(&buffer)?.charge, charge, "what is charged");
                buffers.push((buffer, pages as i64));
            }
            Err(Errno::ENOMEM) => {
                shared.refused().fetch_add(1, Ordering::Relaxed);
                while buffers.len() > rng.usize(..3) {
                    let_go(buffers.swap_remove(rng.usize(..buffers.len())));
                }
            }
            Err(error) => bail!("create: {error}"),
        }
        pause(&mut rng);
    }
    buffers.into_iter().for_each(let_go);
    Ok(())
}

/// `room` pages for all together, by a limit of `limit` pages or by what is beyond it.
fn compete(room: usize, limit: usize, charge: u32) -> Result<()> {
    let shared = Shared::new()?;
    let children: Vec<Child> = (0..PROCESSES)
        .map(|index| Child::run(|| want(&shared, room, limit, charge, index)))
        .collect::<Result<_>>()?;
    let patience = Settings::get().seconds + pinbuf_test_harness::support::process::PATIENCE;
    for child in children {
        child.join_within(patience)?;
    }
    let [held, most, made, refused] = [
        shared.held(),
        shared.most(),
        shared.made(),
        shared.refused(),
    ]
    .map(|number| number.load(Ordering::SeqCst));
    println!("# {made} buffers, {refused} refused; at most {most} pages at once, of {room}");
    check_eq!(held, 0, "pages held in the end");
    check!(
        most <= room as i64,
        "{most} pages were pinned at once, of {room}"
    );
    check!(
        made > 0 && refused > 0,
        "{made} buffers and {refused} refusals are no race"
    );
    // All of it can be had again.
    in_child(|| {
        let device = Device::open()?;
        become_user(USER)?;
        set_memlock(limit * PAGE)?;
        let memory = Memory::anonymous((room + 1) * PAGE)?;
        let all = device.create(&[memory.part(0, room * PAGE)])?;
        let more = device.create(&[memory.part(0, PAGE)]).err();
        check_eq!(more, Some(Errno::ENOMEM), "a page more than all");
        drop(all);
        Ok(())
    })
}

fn memlock() -> Result<()> {
    let _none = Setting::parameter("allowance_mb", 0)?;
    compete(16, 16, CHARGE_USER)
}

fn allowance() -> Result<()> {
    const PAGES: usize = 256;
    let _allowance = Setting::parameter("allowance_mb", (PAGES * PAGE) >> 20)?;
    compete(PAGES, 0, CHARGE_ALLOWANCE)
}
