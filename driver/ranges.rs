// SPDX-License-Identifier: GPL-2.0

//! The ranges of a call: checking and joining them before anything is pinned.
//!
//! This file depends on neither memory management nor locks. It is also compiled for the host,
//! where `tests/pure` compares it with a simple model.

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

/// Pages at adjacent addresses of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) addr: usize,
    pub(crate) pages: usize,
    /// The descriptor of the file that is expected to be mapped there, and the index of the file's
    /// page at `addr`.
    pub(crate) backing: Option<(i32, usize)>,
}

impl Part {
    fn of(range: uapi::Range, backing: Option<uapi::Backing>) -> Self {
        Self {
            addr: range.addr as usize,
            pages: (range.len >> PAGE_SHIFT) as usize,
            backing: backing.map(|backing| (backing.fd, (backing.offset >> PAGE_SHIFT) as usize)),
        }
    }

    /// Whether `next` begins where this part ends, in the address space and in the file.
    fn continues_with(&self, next: &Self) -> bool {
        next.addr == self.addr + (self.pages << PAGE_SHIFT)
            && next.backing == self.backing.map(|(fd, page)| (fd, page + self.pages))
    }
}

/// Checks all ranges, and returns the sum of their pages.
pub(crate) fn total_pages(ranges: &[Element<uapi::Range>]) -> Result<usize> {
    let mut bytes: u64 = 0;
    for Element(range) in ranges {
        if range.len == 0 || (range.addr | range.len) % PAGE_SIZE as u64 != 0 {
            return Err(EINVAL);
        }
        range.addr.checked_add(range.len).ok_or(EOVERFLOW)?;
        bytes = bytes.checked_add(range.len).ok_or(EOVERFLOW)?;
    }
    // A file cannot be larger, and neither can a dma-buf.
    let bytes = isize::try_from(bytes).map_err(|_| EOVERFLOW)?;
    Ok(bytes as usize >> PAGE_SHIFT)
}

/// Checks the parts of files that the ranges are expected to map, as far as that is possible
/// without the files.
pub(crate) fn check_backings(
    ranges: &[Element<uapi::Range>],
    backings: &[Element<uapi::Backing>],
) -> Result {
    for (Element(range), Element(backing)) in ranges.iter().zip(backings) {
        if backing.reserved != 0 || backing.offset % PAGE_SIZE as u64 != 0 {
            return Err(EINVAL);
        }
        let end = backing.offset.checked_add(range.len).ok_or(EOVERFLOW)?;
        // No file is larger.
        isize::try_from(end).map_err(|_| EINVAL)?;
    }
    Ok(())
}

/// The ranges in their order. Consecutive ranges that are also adjacent in the address space (and
/// in the file that they map) become one part, because each part costs a call of GUP.
///
/// The ranges have been checked by [`total_pages`], and the backings, one per range, by
/// [`check_backings`].
pub(crate) fn joined<'a>(
    ranges: &'a [Element<uapi::Range>],
    backings: Option<&'a [Element<uapi::Backing>]>,
) -> impl Iterator<Item = Part> + 'a {
    let mut backings = backings.unwrap_or_default().iter();
    let mut parts = ranges
        .iter()
        .map(move |range| Part::of(range.0, backings.next().map(|backing| backing.0)))
        .peekable();
    core::iter::from_fn(move || {
        let mut joined = parts.next()?;
        while let Some(next) = parts.next_if(|next| joined.continues_with(next)) {
            joined.pages += next.pages;
        }
        Some(joined)
    })
}
