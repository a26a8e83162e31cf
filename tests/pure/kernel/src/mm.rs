// SPDX-License-Identifier: GPL-2.0

//! Address spaces.

use crate::sync::aref::AlwaysRefCounted;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

/// An address space.
#[derive(Debug, Default)]
pub struct Mm {
    /// The number of pages that are pinned.
    pub pinned_vm: AtomicI64,
    /// The number of references.
    pub references: AtomicUsize,
}

/// An address space that a process uses.
pub type MmWithUser = Mm;

impl AlwaysRefCounted for Mm {
    fn inc_ref(&self) {
        self.references.fetch_add(1, Ordering::Relaxed);
    }

    fn dec_ref(&self) {
        self.references.fetch_sub(1, Ordering::Relaxed);
    }
}
