// SPDX-License-Identifier: GPL-2.0

//! Rescheduling, fatal signals and pauses.

use crate::ffi;
use kernel::{
    bindings,
    prelude::*,
    time::msecs_to_jiffies, //
};

/// Lets other tasks run, on kernels that do not preempt by themselves. May sleep, so it must be
/// called where that is allowed, which the kernel's debugging options check.
#[inline]
pub(crate) fn cond_resched() {
    // SAFETY: All callers may sleep, as this function's documentation demands. It accesses no
    // memory of the driver.
    unsafe { ffi::pinbuf_cond_resched() }
}

/// Whether a fatal signal is pending for the current task.
#[inline]
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Reads the current task's signals.
    unsafe { ffi::pinbuf_fatal_signal_pending(kernel::current!().as_ptr()) }
}

/// Fails with `EINTR` if a fatal signal is pending for the current task, and lets other tasks run
/// otherwise.
#[inline]
pub(crate) fn breathe() -> Result {
    if fatal_signal_pending() {
        return Err(EINTR);
    }
    cond_resched();
    Ok(())
}

/// Sleeps for `ms` milliseconds. Fails with `EINTR` if a fatal signal arrives for the current task.
pub(crate) fn sleep_killable(ms: u32) -> Result {
    // SAFETY: Called in process context. The function sets the task's state itself.
    unsafe { bindings::schedule_timeout_killable(msecs_to_jiffies(ms) as isize) };
    if fatal_signal_pending() {
        return Err(EINTR);
    }
    Ok(())
}

/// A random number.
pub(crate) fn random() -> u32 {
    // SAFETY: Always allowed.
    unsafe { bindings::get_random_u32() }
}
