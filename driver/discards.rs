// SPDX-License-Identifier: GPL-2.0

//! Which parts of a buffer the memory's owner does not see any more.
//!
//! The driver keeps no record of discards and is not notified of them. The state of each page shows
//! whether it was discarded ([`pages::sight`]), so a query costs a few dozen instructions per page
//! or folio.

use crate::{
    kernel_ext::{
        pages::{
            self,
            PageArray,
            Sight, //
        },
        sched, //
    },
    pin::held::Held, //
};
use core::ops::ControlFlow;
use kernel::prelude::*;

/// Adjacent pages of a buffer that have the same state.
pub(crate) struct Part {
    /// The first page.
    pub(crate) first: usize,
    /// The number of pages.
    pub(crate) pages: usize,
    pub(crate) sight: Sight,
}

/// The number of pages or folios between two checks for a fatal signal.
const STRIDE: usize = 1024;

/// Calls `each` for all parts of a buffer from the page `from` on, in order, until `each` breaks.
/// Adjacent parts have different states. Returns the first page of the part for which `each` broke,
/// or the end of the buffer.
///
/// Fails with `EINTR` if a fatal signal is pending, and with any error of `each`.
pub(crate) fn survey(
    held: &Held,
    from: usize,
    mut each: impl FnMut(&Part) -> Result<ControlFlow<()>>,
) -> Result<usize> {
    let array = PageArray::get();
    let mut part = Part {
        first: from,
        pages: 0,
        sight: Sight::Seen,
    };
    let mut work = 0;
    for run in held.extents().iter_from(from) {
        let mut done = 0;
        while done < run.pages {
            // SAFETY: All these pages are in folios that `held` has pinned, and at least one is
            // left.
            let (sight, pages) = unsafe { pages::sight(array, run.pfn + done, run.pages - done) };
            if sight != part.sight {
                if part.pages > 0 && each(&part)?.is_break() {
                    return Ok(part.first);
                }
                part = Part {
                    first: part.first + part.pages,
                    pages: 0,
                    sight,
                };
            }
            part.pages += pages;
            done += pages;
            work += 1;
            if work % STRIDE == 0 {
                sched::breathe()?;
            }
        }
    }
    if part.pages > 0 && each(&part)?.is_break() {
        return Ok(part.first);
    }
    Ok(part.first + part.pages)
}
