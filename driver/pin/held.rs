// SPDX-License-Identifier: GPL-2.0

//! The pins that a buffer holds, and their release.

use crate::{
    extents::{
        Extents,
        Kind, //
    },
    kernel_ext::{
        pages::{
            self,
            FolioPin,
            PageArray,
            PagePin, //
        },
        sched, //
    }, //
};
use kernel::prelude::*;

/// The pins of a buffer, in the order of the buffer.
///
/// # Invariants
///
/// For each extent of [`Kind::Pages`], one pin of each of its pages is held, and for each extent of
/// [`Kind::Hugetlb`], one pin of each folio that it overlaps.
pub(crate) struct Held {
    extents: Extents,
    /// The number of hugetlb pages, and the number of pins that hold them.
    hugetlb_pages: usize,
    hugetlb_pins: usize,
}

impl Held {
    /// No pins yet, for a buffer that will have `pages` pages.
    pub(super) fn new(pages: usize) -> Self {
        // INVARIANT: There are no extents.
        Self {
            extents: Extents::new(pages),
            hugetlb_pages: 0,
            hugetlb_pins: 0,
        }
    }

    /// The pages that are pinned.
    pub(crate) fn extents(&self) -> &Extents {
        &self.extents
    }

    /// The number of pins.
    pub(crate) fn count(&self) -> usize {
        self.extents.pages() - self.hugetlb_pages + self.hugetlb_pins
    }

    /// Appends a page. On an error, its pin is dropped.
    #[inline(always)]
    pub(super) fn push_page(&mut self, pin: PagePin, array: PageArray) -> Result {
        self.extents.push(pin.pfn(array), 1, Kind::Pages, true)?;
        // INVARIANT: The pin is given up for the page that was appended to the extents.
        pin.give_up();
        Ok(())
    }

    /// Appends the first `pages` pages that the pin holds, or all if it holds fewer. On an error,
    /// the pin is dropped.
    pub(super) fn push_folio(&mut self, pin: FolioPin, pages: usize, array: PageArray) -> Result {
        let pages = pages.min(pin.pages_left());
        // A folio that is in the buffer twice has two pins, and release drops one pin per folio of
        // an extent. So a run that begins inside a folio must not join an extent that ends there.
        let joins = pin.place() == 0;
        self.extents
            .push(pin.pfn(array), pages, Kind::Hugetlb, joins)?;
        // INVARIANT: The pin is given up for the folio whose pages were appended to the extents.
        pin.give_up();
        self.hugetlb_pages += pages;
        self.hugetlb_pins += 1;
        Ok(())
    }

    /// Frees memory that was allocated for more extents than the buffer has.
    pub(super) fn finish(&mut self) -> Result {
        self.extents.shrink()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let array = PageArray::get();
        for (number, run) in self.extents.iter().enumerate() {
            match run.kind {
                // SAFETY: By the type invariant these pins are held. Nothing uses them after this.
                Kind::Pages => unsafe { pages::unpin_pages(array, run.pfn, run.pages) },
                // SAFETY: As above.
                Kind::Hugetlb => unsafe { pages::unpin_hugetlb(array, run.pfn, run.pages) },
            }
            if number % 256 == 255 {
                sched::cond_resched();
            }
        }
    }
}
