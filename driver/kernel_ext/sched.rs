// SPDX-License-Identifier: GPL-2.0

//! Giving way, and giving up.

use crate::ffi;
use kernel::{
    bindings,
    prelude::*,
    time::msecs_to_jiffies, //
};

/// Lets other tasks run, where the kernel does not preempt by itself. Sleeps: called where that is
/// allowed, which the kernel's debugging options check.
#[inline]
pub(crate) fn cond_resched() {
    // SAFETY: All callers of this function may sleep, as its documentation demands; it touches no
    // memory of ours.
    unsafe { ffi::pinbuf_cond_resched() }
}

/// Whether the current task is about to be killed.
#[inline]
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Reads the current task's signals.
    unsafe { ffi::pinbuf_fatal_signal_pending(kernel::current!().as_ptr()) }
}

/// Fails with `EINTR` if the current task is about to be killed, and lets others run if not.
#[inline]
pub(crate) fn breathe() -> Result {
    if fatal_signal_pending() {
        return Err(EINTR);
    }
    cond_resched();
    Ok(())
}

/// Sleeps for `ms` milliseconds, or until the current task is killed: then `EINTR`.
pub(crate) fn sleep_killable(ms: u32) -> Result {
    // SAFETY: In process context; sets the task's state itself.
    unsafe { bindings::schedule_timeout_killable(msecs_to_jiffies(ms) as isize) };
    if fatal_signal_pending() {
        return Err(EINTR);
    }
    Ok(())
}

/// A number that cannot be foreseen.
pub(crate) fn random() -> u32 {
    // SAFETY: Always allowed.
    unsafe { bindings::get_random_u32() }
}
