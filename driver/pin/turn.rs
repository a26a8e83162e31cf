// SPDX-License-Identifier: GPL-2.0

//! Lets callers that pin the same movable pages retry one after the other.
//!
//! GUP pins all pages of a call before it migrates some of them. So two callers that pin the same
//! pages make each other's migration fail, and several callers may do so for minutes. Therefore a
//! caller that has failed takes the turn, if it is free, and callers without the turn skip retries
//! while it is taken.
//!
//! The turn is not a lock: the user of the caller that has it can make that caller wait in a page
//! fault forever. So no caller waits for the turn longer than its own retries take, and a turn ends
//! after [`MOST`].

use kernel::{
    bindings,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The maximum duration of a turn, in nanoseconds.
const MOST: i64 = 1_000_000_000;

/// The time when the turn was taken, or 0 if it is free.
static TAKEN: Atomic<i64> = Atomic::new(0);

/// The turn, which ends when the value is dropped.
pub(super) struct Turn(i64);

impl Turn {
    /// Takes the turn, if it is free or the last one is over.
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
        // Fails if this turn was over and another caller has taken the next one.
        let _ = TAKEN.cmpxchg(self.0, 0, Relaxed);
    }
}

/// The time since boot in nanoseconds, never zero.
fn now() -> i64 {
    // SAFETY: Always allowed.
    unsafe { bindings::ktime_get() }.max(1)
}
