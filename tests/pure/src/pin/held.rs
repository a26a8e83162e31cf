// SPDX-License-Identifier: GPL-2.0

//! The pins of a buffer: `driver/pin/held.rs`, without the pins.

use crate::extents::Extents;

pub(crate) struct Held(pub(crate) Extents);

impl Held {
    pub(crate) fn extents(&self) -> &Extents {
        &self.0
    }
}
