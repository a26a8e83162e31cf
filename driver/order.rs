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

use core::mem::swap;
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
pub(crate) fn joined(parts: impl Iterator<Item = Part>) -> impl Iterator<Item = Part> {
    let mut parts = parts.peekable();
    core::iter::from_fn(move || {
        let mut all = parts.next()?;
        while let Some(next) = parts.next_if(|next| all.is_followed_by(next)) {
            // INVARIANT: That ends where `next` does.
            all.len += next.len;
        }
        Some(all)
    })
}

/// Parts of one space, sorted by their places in it.
///
/// # Invariants
///
/// The lowest [`NUMBER_BITS`] bits of the keys are the numbers of the parts, each of them once.
/// `places` has as many elements.
pub(crate) struct Order {
    keys: KVVec<u64>,
    places: KVVec<u64>,
}

/// Bits that tell the number of a part.
const NUMBER_BITS: u32 = 16;

const _: () = assert!(crate::uapi::MAX_RANGES <= 1 << NUMBER_BITS);

/// Bits that are sorted by at once: counting what they are takes a kilobyte of stack.
const DIGIT_BITS: u32 = 8;

impl Order {
    /// Fewer parts are not worth it.
    const FEWEST: usize = 64;
    /// Nor are parts that have more pages than this, on average: the calls are not what they cost.
    const LONGEST: u64 = 4;
    /// Nor are parts that lie among more than so many times their pages: few are neighbours.
    const SPARSEST: u64 = 4;

    /// The order of `count` parts, if sorting them promises to make neighbours of many.
    ///
    /// Costs a look at each part if it does not, and otherwise two or three more, and 16 bytes each.
    pub(crate) fn of(count: usize, part: impl Fn(usize) -> Part) -> Option<Self> {
        if !(Self::FEWEST..=1 << NUMBER_BITS).contains(&count) {
            return None;
        }
        let mut last = part(0);
        let (mut low, mut high, mut bytes, mut breaks) = (last.start, last.end(), last.len, 0);
        for number in 1..count {
            let next = part(number);
            if next.space != last.space {
                return None;
            }
            breaks += usize::from(!last.is_followed_by(&next));
            low = low.min(next.start);
            high = high.max(next.end());
            bytes = bytes.checked_add(next.len)?;
            last = next;
        }
        let pages = bytes >> PAGE_SHIFT;
        let span = (high - low) >> PAGE_SHIFT;
        let short = pages <= Self::LONGEST * count as u64;
        if breaks < count / 2 || !short || span > Self::SPARSEST * pages {
            return None;
        }
        // Without memory there is still the order in which they were given.
        Self::sort(count, low, span, part).ok()
    }

    /// Sorts `count` parts, whose pages are among the `span` pages from `low` on: the least significant
    /// digit first, which needs no comparisons, no recursion, and as many steps whatever the order.
    fn sort(
        count: usize,
        low: u64,
        span: u64,
        part: impl Fn(usize) -> Part,
    ) -> Result<Self, AllocError> {
        let mut keys = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        for number in 0..count {
            // Parts are short and close to each other: this is a number of some twenty bits.
            let page = (part(number).start - low) >> PAGE_SHIFT;
            keys.push(page << NUMBER_BITS | number as u64, GFP_KERNEL_ACCOUNT)?;
        }
        let mut other = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        other.extend_from_slice(&keys, GFP_KERNEL_ACCOUNT)?;

        let bits = u64::BITS - span.leading_zeros();
        for shift in (0..bits).step_by(DIGIT_BITS as usize) {
            let digit = |key: u64| (key >> (NUMBER_BITS + shift)) as usize % (1 << DIGIT_BITS);
            let mut places = [0_u32; 1 << DIGIT_BITS];
            for key in &keys[..] {
                places[digit(*key)] += 1;
            }
            let mut sum = 0;
            for place in &mut places {
                sum += core::mem::replace(place, sum);
            }
            for key in &keys[..] {
                let place = &mut places[digit(*key)];
                if let Some(slot) = other.get_mut(*place as usize) {
                    *slot = *key;
                }
                *place += 1;
            }
            swap(&mut keys, &mut other);
        }

        // `other` becomes the sums.
        let mut pages = 0;
        for (number, sum) in other.iter_mut().enumerate() {
            *sum = pages;
            pages += part(number).pages() as u64;
        }
        // INVARIANT: Sorting moved the keys and changed none.
        Ok(Self {
            keys,
            places: other,
        })
    }

    /// The numbers of the parts, sorted.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.keys.iter().map(|key| number(*key))
    }

    /// How many pages the parts before the part `number` have, as they were given.
    pub(crate) fn pages_before(&self, number: usize) -> usize {
        self.places.get(number).map_or(0, |place| *place as usize)
    }
}

/// The number of the part that a key stands for.
fn number(key: u64) -> usize {
    (key & ((1 << NUMBER_BITS) - 1)) as usize
}
