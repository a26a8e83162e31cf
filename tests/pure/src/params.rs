// SPDX-License-Identifier: GPL-2.0

//! The module's parameters: `driver/params.rs`, of which each thread has its own.

use std::cell::Cell;

thread_local! {
    /// Pages of each user, pages of all users together, and retries.
    pub(crate) static PARAMS: Cell<(usize, usize, u32)> = const { Cell::new((0, 0, 0)) };
}

pub(crate) fn allowance_pages() -> usize {
    PARAMS.get().0
}

pub(crate) fn allowance_system_pages() -> usize {
    PARAMS.get().1
}

pub(crate) fn pin_retries() -> u32 {
    PARAMS.get().2
}
