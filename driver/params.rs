// SPDX-License-Identifier: GPL-2.0

//! The module's parameters, which root can change at run time. They are declared in
//! `driver/helpers.c`.

use crate::{
    ffi,
    kernel_ext::user, //
};

/// Pages per mebibyte.
const PAGES_PER_MIB: usize = user::pages_in(1 << 20);

/// The number of pages that a user may keep in place beyond `RLIMIT_MEMLOCK`.
pub(crate) fn allowance_pages() -> usize {
    // SAFETY: Reads a parameter.
    let mib = unsafe { ffi::pinbuf_param_allowance_mb() };
    (mib as usize).saturating_mul(PAGES_PER_MIB)
}

/// The same for all users together.
pub(crate) fn allowance_system_pages() -> usize {
    // SAFETY: Reads a parameter.
    match unsafe { ffi::pinbuf_param_allowance_system_mb() } {
        0 => user::total_pages() / 16,
        mib => (mib as usize).saturating_mul(PAGES_PER_MIB),
    }
}

/// The maximum number of retries when pages cannot be migrated. The pauses start at one millisecond
/// and double: with 16 retries, the last one takes up to half a minute.
pub(crate) fn pin_retries() -> u32 {
    // SAFETY: Reads a parameter.
    unsafe { ffi::pinbuf_param_pin_retries() }.min(16)
}
