// SPDX-License-Identifier: GPL-2.0

//! Memory that a buffer keeps in place besides its own pages.
//!
//! A pinned page keeps its whole folio in place: one 4 KiB page of a transparent huge page keeps
//! 2 MiB, also after the process has unmapped it. So each large folio counts once and as a whole,
//! in whatever order its pages are in the buffer. hugetlb does not count here: its pool bounds it,
//! and processes get it only in whole huge pages anyway.
//!
//! This memory is charged during the call, and not at its end: a caller can make a call wait in GUP
//! for any length of time, with everything that the call has pinned before.

use crate::{
    charge::Charge,
    kernel_ext::pages::Folio, //
};
use kernel::{
    prelude::*,
    rbtree::RBTree, //
};

/// Consecutive pages of the buffer that are in one large folio.
#[derive(Clone, Copy)]
struct Row {
    /// The folio's [`Folio::id`].
    folio: usize,
    /// The number of pages of the folio.
    of: usize,
    /// The number of consecutive pages.
    pages: usize,
}

/// Counts the pages of large folios that are not in the buffer.
pub(super) struct Rest {
    /// The number of pages in the buffer, for each large folio, without those of `row`.
    folios: RBTree<usize, usize>,
    /// The last pages that were counted, which are not in `folios` yet.
    row: Option<Row>,
    pages: usize,
}

impl Rest {
    pub(super) fn new() -> Self {
        Self {
            folios: RBTree::new(),
            row: None,
            pages: 0,
        }
    }

    /// Counts a page of the buffer that is in the large folio `folio`.
    pub(super) fn count(&mut self, folio: Folio<'_>, charge: &mut Charge) -> Result {
        match &mut self.row {
            Some(row) if row.folio == folio.id() => {
                row.pages += 1;
                Ok(())
            }
            _ => {
                let row = Row {
                    folio: folio.id(),
                    of: folio.pages(),
                    pages: 1,
                };
                let last = self.row.replace(row);
                self.add(last, charge)
            }
        }
    }

    fn add(&mut self, row: Option<Row>, charge: &mut Charge) -> Result {
        let Some(row) = row else {
            return Ok(());
        };
        match self.folios.get_mut(&row.folio) {
            Some(pages) => {
                self.pages -= row.of.saturating_sub(*pages);
                *pages += row.pages;
                self.pages += row.of.saturating_sub(*pages);
            }
            None => {
                self.folios
                    .try_create_and_insert(row.folio, row.pages, GFP_KERNEL_ACCOUNT)?;
                self.pages += row.of.saturating_sub(row.pages);
            }
        }
        charge.hold_besides(self.pages)
    }

    /// Charges everything that was counted.
    #[inline]
    pub(super) fn catch_up(&mut self, charge: &mut Charge) -> Result {
        if self.row.is_none() {
            return Ok(());
        }
        let last = self.row.take();
        self.add(last, charge)
    }

    /// Charges the exact number of pages, and returns it.
    pub(super) fn finish(mut self, charge: &mut Charge) -> Result<usize> {
        self.catch_up(charge)?;
        charge.settle(self.pages);
        Ok(self.pages)
    }
}
