// SPDX-License-Identifier: GPL-2.0

//! Which parts of a buffer the memory's owner does not see any more.
//!
//! The driver keeps no record of discards and gets no notice of them. Each page shows by itself what
//! has become of it ([`pages::sight`]), so to ask costs a few instructions for each page, or for each
//! folio.

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

/// Adjacent pages of a buffer of which the same is known.
pub(crate) struct Part {
    /// The first page.
    pub(crate) first: usize,
    /// The number of pages.
    pub(crate) pages: usize,
    pub(crate) sight: Sight,
}

/// Folios between two checks for a fatal signal.
const STRIDE: usize = 1024;

/// Calls `each` for all parts of a buffer from the page `from` on, in their order, until it breaks; adjacent
/// parts differ. Returns the page where the part begins for which it broke, or the end of the buffer.
///
/// `EINTR` if the task is about to be killed.
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
            // SAFETY: All these pages are in folios that `held` has pinned.
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
