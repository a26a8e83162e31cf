// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which processor a thread runs on.

use anyhow::{Context, Result};
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

const SELF: Pid = Pid::from_raw(0);

/// Keeps this thread on a processor.
pub fn on(number: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(number)?;
    sched_setaffinity(SELF, &set).context("choosing a processor")
}

/// Does something on every processor that this thread may run on, in turn.
pub fn on_each(mut action: impl FnMut() -> Result<()>) -> Result<()> {
    let before = sched_getaffinity(SELF)?;
    let mut done = Ok(());
    for number in 0..CpuSet::count() {
        if done.is_ok() && before.is_set(number)? {
            done = on(number).and_then(|()| action());
        }
    }
    sched_setaffinity(SELF, &before).context("giving the processors back")?;
    done
}
