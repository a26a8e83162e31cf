// SPDX-License-Identifier: GPL-2.0

//! Callers that want the same movable pages go one after the other.
//!
//! GUP pins all pages that it is asked for before it migrates some of them, so two callers that want the
//! same pages are in each other's way, and several may be so for minutes. Hence a caller that has failed
//! takes the turn, if nobody has it, and those without it leave out retries while it is taken.
//!
//! This is no lock: nobody waits for it longer than for its own retries, as the caller that has it may
//! be kept waiting in a page fault by its user for ever. A turn ends after [`MOST`] in any case.

use kernel::{
    bindings,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// Nanoseconds after which a turn is over.
const MOST: i64 = 1_000_000_000;

/// When the turn was taken, or 0.
static TAKEN: Atomic<i64> = Atomic::new(0);

/// The turn, until the value is dropped.
pub(super) struct Turn(i64);

impl Turn {
    /// Takes the turn, if nobody has it.
    pub(super) fn take() -> Option<Self> {
        let last = TAKEN.load(Relaxed);
        let now = now();
        if last != 0 && now - last < MOST {
            return None;
        }
        TAKEN.cmpxchg(last, now, Relaxed).ok()?;
        Some(Self(now))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Another caller has it by now if it was over.
        let _ = TAKEN.cmpxchg(self.0, 0, Relaxed);
    }
}

/// The time since the boot, nanoseconds, not zero.
fn now() -> i64 {
    // SAFETY: Always allowed.
    unsafe { bindings::ktime_get() }.max(1)
}
