// SPDX-License-Identifier: GPL-2.0

//! Which page frames a buffer consists of.
//!
//! One list of extents (runs of adjacent frames), sorted by their position in the buffer and
//! searched by bisection: 16 bytes per extent, whatever its length. A buffer whose pages are all
//! scattered takes 16 bytes per page, which is what udmabuf takes for every buffer.
//!
//! This file depends on neither memory management nor locks. It is also compiled for the host,
//! where `tests/pure` compares it with a list of pages.

use crate::one_or_more::OneOrMore;
use kernel::{
    alloc::{
        flags::{
            __GFP_NOWARN, //
            GFP_KERNEL_ACCOUNT,
        },
        Flags,
        KVVec, //
    },
    prelude::*, //
};

/// What keeps the pages of an extent in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One pin per page.
    Pages,
    /// One pin per hugetlb folio.
    Hugetlb,
}

/// Adjacent page frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first frame.
    pub(crate) pfn: usize,
    /// The number of frames, at least one.
    pub(crate) pages: usize,
    pub(crate) kind: Kind,
}

/// An extent; it ends where the next one begins, or at the end of the buffer.
#[derive(Clone, Copy)]
struct Extent {
    /// The index of its first page in the buffer.
    start: usize,
    /// The frame of that page, with the bit [`HUGETLB`] set for that kind.
    frame: usize,
}

/// Marks [`Kind::Hugetlb`]. No frame has a number that large: physical addresses have at most 52
/// bits.
const HUGETLB: usize = 1 << (usize::BITS - 1);

/// The caller determines how long a list gets. So lists are charged to its memory cgroup, and a
/// failed allocation is reported to it (`ENOMEM`) and not in the log.
fn flags() -> Flags {
    GFP_KERNEL_ACCOUNT | __GFP_NOWARN
}

/// The maximum number of extents to ask for memory for. `kvmalloc()` refuses larger allocations,
/// and warns about some of them. A list may get longer: `reserve` doubles its capacity, and
/// `vrealloc()` has no such limit.
const MOST: usize = i32::MAX as usize / size_of::<Extent>();

/// The minimum number of extents to allocate memory for. A single extent is not allocated.
const AT_FIRST: usize = 8;

impl Extent {
    fn new(start: usize, pfn: usize, kind: Kind) -> Self {
        let kind = match kind {
            Kind::Pages => 0,
            Kind::Hugetlb => HUGETLB,
        };
        Self {
            start,
            frame: pfn | kind,
        }
    }

    fn pfn(self) -> usize {
        self.frame & !HUGETLB
    }

    fn kind(self) -> Kind {
        if self.frame & HUGETLB == 0 {
            Kind::Pages
        } else {
            Kind::Hugetlb
        }
    }
}

/// The number of extents to allocate memory for when a list of `len` extents, at least one, of
/// `pages` pages is full: as many as the remaining pages will need if they are as scattered as
/// those before. Zero if the list may not grow.
pub(crate) fn growth(len: usize, pages: usize, expected: usize) -> usize {
    let left = expected.saturating_sub(pages);
    let more = match len {
        1 => AT_FIRST - 1,
        _ => (len.saturating_mul(left) / pages.max(1)).max(AT_FIRST),
    };
    more.min(left.max(1)).min(MOST.saturating_sub(len))
}

/// The page frames of a buffer, in the order of the buffer.
///
/// # Invariants
///
/// The first extent starts at 0, each other one starts after its predecessor, and all start before
/// `pages`. `next` is the value of [`Extent::frame`] that a further page of the last extent would
/// have.
pub(crate) struct Extents {
    list: OneOrMore<Extent>,
    pages: usize,
    next: usize,
    /// The number of pages that the buffer will have.
    expected: usize,
}

impl Extents {
    /// Creates an empty list for a buffer that will have `expected` pages.
    pub(crate) fn new(expected: usize) -> Self {
        // INVARIANT: The list is empty.
        Self {
            list: OneOrMore::new(),
            pages: 0,
            // Not equal to any frame.
            next: usize::MAX,
            expected,
        }
    }

    /// The number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The number of extents.
    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    /// The memory that is allocated for the list, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.list.capacity() * size_of::<Extent>()
    }

    /// Appends `pages` frames, at least one, from `pfn` on. With `joins`, they become part of the
    /// last extent if they are adjacent to it and of its kind. An error leaves the list unchanged.
    #[inline(always)] // Called once per page where memory is scattered.
    pub(crate) fn push(&mut self, pfn: usize, pages: usize, kind: Kind, joins: bool) -> Result {
        let new = Extent::new(self.pages, pfn, kind);
        // The comparison includes the kind, which is in the same word as the frame.
        if !(joins && new.frame == self.next) && self.list.push_within_capacity(new).is_err() {
            self.push_and_grow(new)?;
        }
        // INVARIANT: `pages` is at least one. The sum does not wrap: it is the buffer's size in
        // pages, and the size in bytes is an `isize` (`ranges::total_pages`).
        self.pages = self.pages.wrapping_add(pages);
        self.next = new.frame.wrapping_add(pages);
        Ok(())
    }

    /// Appends the first extent, or allocates memory for at least one more.
    #[cold]
    fn push_and_grow(&mut self, new: Extent) -> Result {
        let len = self.list.len();
        if len == 0 {
            self.list = OneOrMore::One([new]);
            return Ok(());
        }
        let more = growth(len, self.pages, self.expected);
        if more == 0 {
            return Err(ENOMEM);
        }
        self.list.reserve(more, flags())?;
        self.list.push_within_capacity(new).map_err(|_| ENOMEM)
    }

    /// Frees unused capacity if it is more than an eighth of the list, or if the capacity exceeds
    /// the number of pages. A capacity of up to [`AT_FIRST`] stays.
    pub(crate) fn shrink(&mut self) -> Result {
        let (len, room) = (self.list.len(), self.list.capacity());
        if room > AT_FIRST && (room - len > len / 8 || room > self.pages) {
            let mut exact = KVVec::with_capacity(len, flags())?;
            exact.extend_from_slice(&self.list, flags())?;
            self.list = OneOrMore::More(exact);
        }
        Ok(())
    }

    /// All extents, as runs.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Run> + Clone + '_ {
        self.iter_from(0)
    }

    /// The frames from the page `first` on, as runs: the rest of the extent that contains it, then
    /// the extents after that one. Empty if `first` is not in the buffer.
    pub(crate) fn iter_from(&self, first: usize) -> impl Iterator<Item = Run> + Clone + '_ {
        let list: &[Extent] = &self.list;
        // The index after the last extent that starts at `first` or before.
        let index = list.partition_point(|extent| extent.start <= first);
        let from = if first < self.pages {
            index.saturating_sub(1)
        } else {
            list.len()
        };
        (from..list.len()).map(move |index| {
            let extent = list[index];
            let end = list.get(index + 1).map_or(self.pages, |next| next.start);
            let skipped = first.saturating_sub(extent.start);
            Run {
                pfn: extent.pfn() + skipped,
                pages: end - extent.start - skipped,
                kind: extent.kind(),
            }
        })
    }
}
