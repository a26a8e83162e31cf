// SPDX-License-Identifier: GPL-2.0

//! The pins that a buffer holds, and dropping them.

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

/// Pins, in a buffer's order.
///
/// # Invariants
///
/// One pin is held of each page in an extent of [`Kind::Pages`], and of each folio that an extent of
/// [`Kind::Hugetlb`] reaches into.
pub(crate) struct Held {
    extents: Extents,
    /// Of hugetlb: pages, and the pins that stand for them.
    hugetlb_pages: usize,
    hugetlb_pins: usize,
}

impl Held {
    /// No pins yet, of `pages` pages in the end.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // INVARIANT: There are no extents.
        Ok(Self {
            extents: Extents::new(pages)?,
            hugetlb_pages: 0,
            hugetlb_pins: 0,
        })
    }

    /// Which pages they are.
    pub(crate) fn extents(&self) -> &Extents {
        &self.extents
    }

    /// How many pins there are.
    pub(crate) fn count(&self) -> usize {
        self.extents.pages() - self.hugetlb_pages + self.hugetlb_pins
    }

    /// Adds a page. After an error its pin has been dropped.
    #[inline(always)]
    pub(super) fn push_page(&mut self, pin: PagePin, array: PageArray) -> Result {
        self.extents.push(pin.pfn(array), 1, Kind::Pages, true)?;
        // INVARIANT: The pin is given up for the page that the extents gained.
        pin.give_up();
        Ok(())
    }

    /// Adds the first `pages` pages that the pin stands for. After an error it has been dropped.
    pub(super) fn push_folio(&mut self, pin: FolioPin, pages: usize, array: PageArray) -> Result {
        let pages = pages.min(pin.pages_left());
        // A folio that is there twice has two pins, so a run that begins inside of one may not join
        // an extent that ends there.
        let joins = pin.starts_folio();
        self.extents
            .push(pin.pfn(array), pages, Kind::Hugetlb, joins)?;
        // INVARIANT: The pin is given up for the folio that the extents gained.
        pin.give_up();
        self.hugetlb_pages += pages;
        self.hugetlb_pins += 1;
        Ok(())
    }

    /// Gives back memory that was set aside for more extents than there are.
    pub(super) fn finish(&mut self) -> Result {
        self.extents.shrink()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let array = PageArray::get();
        for (number, run) in self.extents.iter().enumerate() {
            match run.kind {
                // SAFETY: By the type invariant these pins are held; nobody uses them after this.
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
