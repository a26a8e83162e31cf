// SPDX-License-Identifier: GPL-2.0

//! When to call GUP again, and how its errors are translated.
//!
//! GUP migrates pages out of `ZONE_MOVABLE` and CMA before it pins them for the long term. The
//! migration fails while others hold a reference to one of these pages: for a moment (direct I/O, a
//! pipe, another create of the same pages) or for longer. GUP gives up at the first such failure,
//! with the same `ENOMEM` that it returns when memory is short.
//!
//! So the driver retries, up to `pin_retries` times for the same pages and up to [`IN_ALL`] times
//! that number in one call, with pauses that start at one millisecond and double. A call thus
//! pauses for at most `IN_ALL * (2^pin_retries - 1)` ms: 4.1 s by default.
//!
//! Several callers that pin the same pages hold such references for each other: each pins all pages
//! of its batch before it migrates some. So each pause is shortened at random, to as little as
//! half; each retry asks for an eighth of the pages, and after a success the number doubles again;
//! and all retries but the last are made by one caller at a time ([`super::turn`]).
//!
//! After the last retry, the driver tries to pin the first page where it is, for a moment. If that
//! succeeds, the pages could not be migrated (`EBUSY`); otherwise the kernel is out of memory
//! (`ENOMEM`).

use super::turn::Turn;
use crate::{
    kernel_ext::{
        pages::{
            self,
            CurrentMm,
            How,
            PagePin, //
        },
        sched, //
    },
    params, //
};
use kernel::{
    error::code,
    prelude::*, //
};

/// The maximum number of retries in one call, as a multiple of `pin_retries`.
const IN_ALL: u32 = 4;

/// The retries of a call.
pub(super) struct Patience {
    /// The maximum number for the same pages.
    each: u32,
    /// The number that the call has left.
    left: u32,
    /// The maximum number of pages to ask for.
    most: usize,
    turn: Option<Turn>,
    /// The number of pages to fault in before the next batch is pinned; 0 where pages are present.
    /// If it is not 0, the page before the next one is in the same part and was pinned, or the next
    /// batch is a single page, before which nothing is faulted in.
    ahead: usize,
}

/// The maximum number of pages that are faulted in before they are pinned.
const AHEAD: usize = 16;

impl Patience {
    /// The retries of a new call.
    pub(super) fn new() -> Self {
        let each = params::pin_retries();
        Self {
            each,
            left: IN_ALL * each,
            most: usize::MAX,
            turn: None,
            ahead: 0,
        }
    }

    /// Has to be called before the first page of each part.
    pub(super) fn begin_part(&mut self) {
        self.ahead = 0;
    }

    /// Pins at least one and up to `max` pages from the address `addr` on for the long term, and
    /// retries where that may help. The errors are those of `PINBUF_CREATE`.
    pub(super) fn pin(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result {
        if self.attempt(mm, addr, max, out)? {
            return Ok(());
        }
        self.retry(mm, addr, max, out)
    }

    /// Returns whether pages were pinned; an error is final.
    fn attempt(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result<bool> {
        let max = max.min(self.most);
        let Err(error) = self.pin_once(mm, addr, max, out) else {
            self.most = self.most.saturating_mul(2);
            return Ok(true);
        };
        self.most = (max / 8).max(1);
        final_error(error).map_or(Ok(false), Err)
    }

    #[cold]
    fn retry(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result {
        let mut retries = self.each;
        let mut pause = 1;
        while retries > 0 && self.left > 0 {
            retries -= 1;
            self.left -= 1;
            sched::sleep_killable(jitter(pause))?;
            pause *= 2;
            self.turn = self.turn.take().or_else(Turn::take);
            let last = retries == 0 || self.left == 0;
            if (self.turn.is_some() || last) && self.attempt(mm, addr, max, out)? {
                return Ok(());
            }
        }
        // One page, because this faults pages in too: see `pin_once`.
        let brief = pages::pin_user_pages(mm, addr, 1, How::Short, out);
        out.clear();
        match brief {
            Ok(()) => Err(EBUSY),
            Err(error) => Err(final_error(error).unwrap_or(ENOMEM)),
        }
    }

    /// Pins the pages that are present; if the first is not, faults it in and pins it alone.
    ///
    /// A caller can make GUP wait in a page fault forever, with all pages that the same call of GUP
    /// has pinned before. So GUP faults in one page per call, and further pages are faulted in
    /// without being pinned: everything that the ioctl holds while it waits has been charged.
    ///
    /// If something else is mapped than the caller expects, or memory that GUP refuses, at most one
    /// page of it is faulted in: the first page of a part and of a mapping is pinned, and compared
    /// with the expected file, before the next ones are faulted in, at first two, then twice as
    /// many for each batch, up to [`AHEAD`].
    fn pin_once(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result {
        if max > 1 {
            pages::fault_in(mm, addr, self.ahead.min(max));
            match pages::pin_user_pages(mm, addr, max, How::LongIfPresent, out) {
                Err(code::EFAULT) => self.ahead = 0,
                result => {
                    // Where there are more pages than were faulted in, others were present.
                    let more = out.len() > self.ahead;
                    self.ahead = if more { 0 } else { AHEAD.min(2 * self.ahead) };
                    return result;
                }
            }
        }
        pages::pin_user_pages(mm, addr, 1, How::Long, out)?;
        if max > 1 {
            self.ahead = 2;
        }
        Ok(())
    }
}

/// Translates an error of GUP; `None` if the failure may be transient.
fn final_error(error: Error) -> Option<Error> {
    match error {
        code::ENOMEM | code::EAGAIN | code::EBUSY => None,
        code::EINTR => Some(EINTR),
        // The memory is not mapped, not writable, of a kind that is not pinned for the long term (a
        // file on disk, memory of a device, DAX) or poisoned, or its backing store is exhausted.
        _ => Some(EFAULT),
    }
}

/// A pause of `ms` milliseconds, shortened at random to no less than half.
fn jitter(ms: u32) -> u32 {
    let half = ms / 2;
    ms - sched::random() % (half + 1)
}
