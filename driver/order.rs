// SPDX-License-Identifier: GPL-2.0

//! In which order the parts of a call are pinned.
//!
//! Looking pages up costs more for each call than for each page, so neighbours are looked up
//! together: parts that follow each other as they are given ([`joined`]), and, where parts are short and
//! lie close together in some other order, as a guest's allocator gives them out, after sorting them
//! ([`Order`]). The buffer's order is the caller's in any case.
//!
//! This file knows nothing of memory or locks, and is compiled for the host too, where `tests/pure`
//! holds it against a naive model.

use kernel::{
    alloc::{
        flags::{
            __GFP_NOWARN, //
            GFP_KERNEL_ACCOUNT,
        },
        AllocError,
        KVVec, //
    },
    page::PAGE_SHIFT, //
};

/// A part of what a call names: whole pages of an address space or a file.
///
/// # Invariants
///
/// `start + len` does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The descriptor of the file; the same for all where addresses are meant.
    pub(crate) space: i32,
    /// First byte.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl Part {
    /// Its pages.
    pub(crate) fn pages(&self) -> usize {
        (self.len >> PAGE_SHIFT) as usize
    }

    fn end(&self) -> u64 {
        self.start + self.len
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        self.space == next.space && self.end() == next.start
    }
}

/// The same parts, those that follow each other joined.
pub(crate) fn joined(mut parts: impl Iterator<Item = Part>) -> impl Iterator<Item = Part> {
    let mut ahead = parts.next();
    core::iter::from_fn(move || {
        let mut all = ahead?;
        ahead = loop {
            match parts.next() {
                // INVARIANT: That ends where `next` does.
                Some(next) if all.is_followed_by(&next) => all.len += next.len,
                other => break other,
            }
        };
        Some(all)
    })
}

/// Parts of one space, by their places in it.
///
/// # Invariants
///
/// Each number of a part is in `table` once, and nothing else but [`Order::NONE`]. `before` has an
/// element for each part, unless all parts have one page: then it is empty.
pub(crate) struct Order {
    /// Which part begins at a page, counted from that of the lowest.
    table: KVVec<u32>,
    /// How many pages the parts have that were given before a part.
    before: KVVec<u32>,
}

impl Order {
    /// Fewer parts are not worth it.
    const FEWEST: usize = 64;
    /// Nor are parts that have more pages than this, on average: the calls are not what they cost.
    const LONGEST: u64 = 4;
    /// Nor are parts that lie among more than so many times their pages: few are neighbours.
    const SPARSEST: u64 = 2;
    /// No part begins at this page.
    const NONE: u32 = u32::MAX;

    /// The order of `count` parts of `pages` pages in all, if it promises to make neighbours of many.
    ///
    /// Costs a look at each part, if they are short, where it does not. Otherwise it is found without
    /// comparing parts, in linear time and with four bytes for each page among which they lie: a page
    /// is where one part begins at most, or they have no order.
    pub(crate) fn of(count: usize, pages: usize, part: impl Fn(usize) -> Part) -> Option<Self> {
        let short = pages as u64 <= Self::LONGEST * count as u64;
        if count < Self::FEWEST || !short {
            return None;
        }
        let mut last = part(0);
        let (mut low, mut high, mut breaks) = (last.start, last.end(), 0);
        for number in 1..count {
            let next = part(number);
            if next.space != last.space {
                return None;
            }
            breaks += usize::from(!last.is_followed_by(&next));
            low = low.min(next.start);
            high = high.max(next.end());
            last = next;
        }
        let span = (high - low) >> PAGE_SHIFT;
        if breaks < count / 2 || span > Self::SPARSEST * pages as u64 {
            return None;
        }
        // Without memory there is still the order in which they were given.
        let single = pages == count;
        Self::find(count, single, low, span as usize, part)
            .ok()
            .flatten()
    }

    /// The order of `count` parts, `single` pages if that is so, which lie among the `span` pages from
    /// `low` on. None if two of them begin at the same page.
    fn find(
        count: usize,
        single: bool,
        low: u64,
        span: usize,
        part: impl Fn(usize) -> Part,
    ) -> Result<Option<Self>, AllocError> {
        let mut table = KVVec::new();
        table.extend_with(span, Self::NONE, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        for number in 0..count {
            match table.get_mut(((part(number).start - low) >> PAGE_SHIFT) as usize) {
                Some(slot) if *slot == Self::NONE => *slot = number as u32,
                _ => return Ok(None),
            }
        }
        let mut before = KVVec::new();
        if !single {
            before.extend_with(count, 0, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
            let mut pages = 0;
            for (number, before) in before.iter_mut().enumerate() {
                // Parts are short: their pages are a number of some twenty bits.
                *before = pages as u32;
                pages += part(number).pages();
            }
        }
        // INVARIANT: Each number was put there once.
        Ok(Some(Self { table, before }))
    }

    /// The numbers of the parts, sorted by their places.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        let parts = self.table.iter().filter(|number| **number != Self::NONE);
        parts.map(|number| *number as usize)
    }

    /// How many pages the parts have that were given before the part `number`.
    pub(crate) fn pages_before(&self, number: usize) -> usize {
        self.before
            .get(number)
            .map_or(number, |pages| *pages as usize)
    }
}
