// SPDX-License-Identifier: GPL-2.0

//! When to ask GUP again, and what its errors become.
//!
//! GUP migrates pages out of `ZONE_MOVABLE` and CMA before it pins them for the long term. That
//! fails while somebody else holds a reference to one: for a moment (direct I/O, a pipe, another
//! create of the same pages) or for longer. GUP gives up at the first such failure, with the same
//! `ENOMEM` that it gives when there is no memory.
//!
//! So the driver tries again, up to `pin_retries` times for the same pages and [`IN_ALL`] times that
//! in one call, with pauses that double from a millisecond on. A call thus pauses for at most
//! `IN_ALL * (2^pin_retries - 1)` ms: 4.1 s by default.
//!
//! Several callers that want the same pages are each other's passing references: each pins all pages of
//! its batch before it migrates some. So a pause is shortened at random, to as little as half, a retry
//! asks for an eighth of the pages (after a success, a call asks for twice as many again), and retries
//! but the last are left to one caller at a time ([`super::turn`]).
//!
//! When the retries are used up, pages that can be pinned where they are were not to be moved
//! (`EBUSY`), and otherwise there is no memory (`ENOMEM`).

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

/// In one call, this many times `pin_retries` retries.
const IN_ALL: u32 = 4;

/// The retries of a call.
pub(super) struct Patience {
    /// For the same pages.
    each: u32,
    /// That the call still has.
    left: u32,
    /// The most pages to ask for.
    most: usize,
    turn: Option<Turn>,
    /// Pages to pin alone before many are asked for again, and how many these were last.
    alone: usize,
    row: usize,
}

/// The most pages that are pinned alone in a row.
const ROW: usize = 16;

impl Patience {
    /// The retries of a new call.
    pub(super) fn new() -> Self {
        let each = params::pin_retries();
        Self {
            each,
            left: IN_ALL * each,
            most: usize::MAX,
            turn: None,
            alone: 0,
            row: 0,
        }
    }

    /// Pins up to `max` pages from the address `addr` on for the long term, at least one, and tries
    /// again where that may help. Errors are those of `PINBUF_CREATE`.
    pub(super) fn pin(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result {
        let mut retries = self.each;
        let mut pause = 1;
        let mut in_turn = true;
        loop {
            let max = max.min(self.most);
            let last = retries == 0 || self.left == 0;
            if in_turn || last {
                match self.pin_once(mm, addr, max, out) {
                    Ok(()) => {
                        self.most = self.most.saturating_mul(2);
                        return Ok(());
                    }
                    Err(error) => final_error(error).map_or(Ok(()), Err)?,
                }
                self.most = (max / 8).max(1);
            }
            if last {
                break;
            }
            retries -= 1;
            self.left -= 1;
            sched::sleep_killable(jitter(pause))?;
            pause *= 2;
            self.turn = self.turn.take().or_else(Turn::take);
            in_turn = self.turn.is_some();
        }
        let brief = pages::pin_user_pages(mm, addr, max.min(self.most), How::Short, out);
        out.clear();
        match brief {
            Ok(()) => Err(EBUSY),
            Err(error) => Err(final_error(error).unwrap_or(ENOMEM)),
        }
    }

    /// Pins what is there, or else one page that is not.
    ///
    /// GUP can be made to wait in a fault for ever, with all that it has pinned before in the same
    /// call. So it faults in one page at a time: what a call holds while it waits has been counted. And
    /// where something else is mapped than the caller believes, no more than that is faulted in before the
    /// page is compared with the file that was expected.
    /// Where pages are not there, more and more of them, up to [`ROW`], are pinned alone before it is
    /// tried again whether many are.
    fn pin_once(
        &mut self,
        mm: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        out: &mut KVec<PagePin>,
    ) -> Result {
        if max > 1 && self.alone == 0 {
            match pages::pin_user_pages(mm, addr, max, How::LongIfPresent, out) {
                Err(code::EFAULT) => {
                    self.row = (2 * self.row).clamp(1, ROW);
                    self.alone = self.row;
                }
                result => {
                    self.row = 0;
                    return result;
                }
            }
        }
        self.alone = self.alone.saturating_sub(1);
        pages::pin_user_pages(mm, addr, 1, How::Long, out)
    }
}

/// What an error of GUP's becomes; `None` if it may pass.
fn final_error(error: Error) -> Option<Error> {
    match error {
        code::ENOMEM | code::EAGAIN | code::EBUSY => None,
        code::EINTR => Some(EINTR),
        // Not mapped, not writable, of a kind that is not pinned for long (a file on disk, a
        // device's memory, DAX), poisoned, or its backing store is exhausted.
        _ => Some(EFAULT),
    }
}

/// A pause of `ms` milliseconds, shortened at random to no less than half.
fn jitter(ms: u32) -> u32 {
    let half = ms / 2;
    ms - sched::random() % (half + 1)
}
