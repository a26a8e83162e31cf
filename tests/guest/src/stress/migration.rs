// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that have to leave `ZONE_MOVABLE`, and no memory to move them to: the driver tries again,
//! and gives up with `EBUSY`.

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::faults::inject::Refusal;
use crate::faults::sweep::Held;
use crate::kinds::{few, is_of, Kind};
use pinbuf_test_harness::support::frames::{all_frames, movable, within};
use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::{stamp, PAGE};
use pinbuf_test_harness::support::{check, check_eq, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "migration":
    refused_for_a_while within 120,
    refused_for_good within 120,
}

const KINDS: [Kind; 4] = [
    Kind::Anonymous,
    Kind::Shmem,
    Kind::Transparent,
    Kind::HugeShared,
];

/// What GUP calls to move pages, and what must be on the stack of an allocation that fails.
const MOVER: &str = "migrate_pages";

/// Expects this number of the memory's pages in the zone.
fn in_zone(memory: &Memory, pages: usize, when: &str) -> Result<()> {
    let found = within(&all_frames(memory)?, &[movable()?]);
    check_eq!(found, pages, "pages in ZONE_MOVABLE {when}");
    Ok(())
}

/// The first tries fail, and the next one succeeds: nobody hears of it. Counted, not timed.
fn refused_for_a_while() -> Result<()> {
    const TIMES: i64 = 3;
    let device = Device::open()?;
    for kind in KINDS {
        let _pool = kind.pool(few(kind))?;
        let memory = kind.present(few(kind))?;
        in_zone(&memory, memory.len() / PAGE, "before")?;
        let refusal = Refusal::new(MOVER, TIMES)?;
        let buffer = device
            .create(&[memory.range()])
            .with_context(|| format!("create of {kind:?}, refused {TIMES} times"))?;
        check_eq!(refusal.left()?, 0, "refusals that {kind:?} did not meet");
        drop(refusal);
        in_zone(&memory, 0, "under a buffer")?;
        is_of(&device, &buffer, &memory)?;
    }
    Ok(())
}

fn refused_for_good() -> Result<()> {
    const TIMES: i64 = 1_000_000;
    /// Fewer than by default, so that the pauses are still short.
    const RETRIES: i64 = 5;
    let device = Device::open()?;
    for kind in KINDS {
        let _pool = kind.pool(few(kind))?;
        let memory = kind.present(few(kind))?;
        for offset in (0..memory.len()).step_by(PAGE) {
            memory.set(offset, stamp(7, offset as u64));
        }
        in_zone(&memory, memory.len() / PAGE, "before")?;
        let setting = Setting::parameter("pin_retries", RETRIES)?;
        let refusal = Refusal::new(MOVER, TIMES)?;
        let before = Held::now()?;
        let result = device.create(&[memory.range()]).map(drop);
        check_eq!(result, Err(Errno::EBUSY), "create of {kind:?}");
        check_eq!(Held::now()?, before, "what is left behind");
        let met = TIMES - refusal.left()?;
        check!(
            met > RETRIES,
            "{kind:?}: {met} refusals in {RETRIES} new tries"
        );
        drop((refusal, setting));
        for offset in (0..memory.len()).step_by(PAGE) {
            check_eq!(
                memory.get(offset),
                stamp(7, offset as u64),
                "at {offset:#x}"
            );
        }

        let buffer = device.create(&[memory.range()]).context("the same call")?;
        in_zone(&memory, 0, "under a buffer")?;
        is_of(&device, &buffer, &memory)?;
    }
    Ok(())
}
