// SPDX-License-Identifier: GPL-2.0

//! What can be told of a call's ranges before anything is pinned.
//!
//! This file knows nothing of memory or locks, and is compiled for the host too, where `tests/pure`
//! holds it against a naive model.

use crate::uapi;
use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    transmute::FromBytes, //
};

/// An element of one of the caller's arrays.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Element<T>(pub(crate) T);

// SAFETY: Fixed-width integers: every bit pattern is a value.
unsafe impl FromBytes for Element<uapi::Range> {}
// SAFETY: As above.
unsafe impl FromBytes for Element<uapi::Backing> {}

/// The pages of all ranges together, each of which has been checked then.
pub(crate) fn total_pages(ranges: &[Element<uapi::Range>]) -> Result<usize> {
    let mut bytes: u64 = 0;
    for Element(range) in ranges {
        if range.len == 0 || (range.addr | range.len) % PAGE_SIZE as u64 != 0 {
            return Err(EINVAL);
        }
        range.addr.checked_add(range.len).ok_or(EOVERFLOW)?;
        bytes = bytes.checked_add(range.len).ok_or(EOVERFLOW)?;
    }
    // A file cannot be larger, nor, hence, a dma-buf.
    let bytes = isize::try_from(bytes).map_err(|_| EOVERFLOW)?;
    Ok(bytes as usize >> PAGE_SHIFT)
}

/// Checks which parts of files the ranges are said to be of, as far as that is possible.
pub(crate) fn check_backings(
    ranges: &[Element<uapi::Range>],
    backings: &[Element<uapi::Backing>],
) -> Result {
    for (Element(range), Element(backing)) in ranges.iter().zip(backings) {
        if backing.reserved != 0 || backing.offset % PAGE_SIZE as u64 != 0 {
            return Err(EINVAL);
        }
        let end = backing.offset.checked_add(range.len).ok_or(EOVERFLOW)?;
        // No file is longer.
        isize::try_from(end).map_err(|_| EINVAL)?;
    }
    Ok(())
}
