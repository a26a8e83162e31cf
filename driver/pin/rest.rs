// SPDX-License-Identifier: GPL-2.0

//! Memory that a buffer keeps in place besides its own pages.
//!
//! A pinned page keeps its whole folio: one page of 4 KiB in a transparent huge page keeps 2 MiB, also
//! after the process has unmapped it. So each large folio counts as a whole, once, however
//! its pages lie in the buffer. hugetlb does not count here: its pool bounds it, and what it gives to
//! a process is whole huge pages anyway.
//!
//! What is counted is held against the charge as it comes, and not in the end: a call can be made to
//! wait in GUP for as long as its caller wants, with all that it has pinned before.

use crate::{
    charge::Charge,
    kernel_ext::pages::Folio, //
};
use kernel::{
    prelude::*,
    rbtree::RBTree, //
};

/// Pages in a row that are in one large folio.
#[derive(Clone, Copy)]
struct Row {
    /// The folio's [`Folio::id`].
    folio: usize,
    /// The pages that the folio has.
    of: usize,
    /// The pages in a row.
    pages: usize,
}

/// Counts the pages that large folios have besides those that are in the buffer.
pub(super) struct Rest {
    /// Pages of the buffer, by the folio that they are in, without `row`.
    folios: RBTree<usize, usize>,
    /// The last pages that were counted.
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

    /// Sees to it that all that was counted is charged.
    #[inline]
    pub(super) fn catch_up(&mut self, charge: &mut Charge) -> Result {
        match self.row.take() {
            None => Ok(()),
            last => self.add(last, charge),
        }
    }

    /// The pages in the end, for which the charge has been settled.
    pub(super) fn finish(mut self, charge: &mut Charge) -> Result<usize> {
        self.catch_up(charge)?;
        charge.settle(self.pages);
        Ok(self.pages)
    }
}
