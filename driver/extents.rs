// SPDX-License-Identifier: GPL-2.0

//! Which page frames a buffer consists of.
//!
//! One list of extents (runs of adjacent frames), sorted by their place in the buffer and searched by
//! bisection: 16 bytes an extent, whatever its length. A buffer whose pages are all scattered takes
//! 16 bytes a page, which is what udmabuf takes for every buffer.
//!
//! This file knows nothing of memory or locks, and is compiled for the host too, where `tests/pure`
//! compares it with a list of pages.

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
    /// One pin a page.
    Pages,
    /// One pin a hugetlb folio.
    Hugetlb,
}

/// Adjacent page frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first frame.
    pub(crate) pfn: usize,
    /// How many there are, at least one.
    pub(crate) pages: usize,
    pub(crate) kind: Kind,
}

/// An extent; it ends where the next one begins, or at the end of the buffer.
#[derive(Clone, Copy)]
struct Extent {
    /// The first page of the buffer that is in it.
    start: usize,
    /// The frame of that page, and [`HUGETLB`] for that kind.
    frame: usize,
}

/// No frame has a number that large: physical addresses have at most 52 bits.
const HUGETLB: usize = 1 << (usize::BITS - 1);

/// Large lists are charged to the caller's memory cgroup, and one that cannot be had is the caller's
/// problem, not one for the log.
fn flags() -> Flags {
    GFP_KERNEL_ACCOUNT | __GFP_NOWARN
}

/// The kernel refuses larger allocations, and warns of some of them.
const MOST: usize = i32::MAX as usize / size_of::<Extent>();

/// The least room that is made, for buffers that may need it.
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

/// The page frames of a buffer, in its order.
///
/// # Invariants
///
/// The first extent starts at 0, each starts behind the one before it, and all start before `pages`.
/// `next` is what a further page of the last extent would have in [`Extent::frame`].
pub(crate) struct Extents {
    list: KVVec<Extent>,
    pages: usize,
    next: usize,
    /// The pages that are expected in the end.
    expected: usize,
}

impl Extents {
    /// No pages yet; `expected` in the end.
    pub(crate) fn new(expected: usize) -> Result<Self> {
        // INVARIANT: There is nothing.
        Ok(Self {
            list: KVVec::with_capacity(expected.min(AT_FIRST), flags())?,
            pages: 0,
            // No frame.
            next: usize::MAX,
            expected,
        })
    }

    /// The number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The number of extents.
    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    /// Bytes of memory that the list takes.
    pub(crate) fn bytes(&self) -> usize {
        self.list.capacity() * size_of::<Extent>()
    }

    /// Adds `pages` frames from `pfn` on, at least one. With `joins` they become a part of the last
    /// extent if they follow it and are of its kind. Nothing has changed after an error.
    #[inline(always)] // Once a page where memory is scattered.
    pub(crate) fn push(&mut self, pfn: usize, pages: usize, kind: Kind, joins: bool) -> Result {
        let new = Extent::new(self.pages, pfn, kind);
        // The kind is in the same word as the frame.
        if !(joins && new.frame == self.next) && self.list.push_within_capacity(new).is_err() {
            self.grow()?;
            self.list.push_within_capacity(new).map_err(|_| ENOMEM)?;
        }
        // INVARIANT: `pages` is at least one. The sum does not wrap: it is the buffer's size in pages, and the
        // size in bytes is an `isize` (`ranges::total_pages`).
        self.pages = self.pages.wrapping_add(pages);
        self.next = new.frame.wrapping_add(pages);
        Ok(())
    }

    /// Makes room for another extent, and for as many as the pages to come will make if they are
    /// scattered as those before.
    #[cold]
    fn grow(&mut self) -> Result {
        let len = self.list.len();
        let left = self.expected.saturating_sub(self.pages);
        let more = len.saturating_mul(left) / self.pages.max(1);
        let more = more.max(AT_FIRST).min(MOST - len);
        if more == 0 {
            return Err(ENOMEM);
        }
        Ok(self.list.reserve(more, flags())?)
    }

    /// Gives back room that is not used, but for an eighth, and never keeps room for more extents
    /// than there are pages.
    pub(crate) fn shrink(&mut self) -> Result {
        let (len, room) = (self.list.len(), self.list.capacity());
        if room > AT_FIRST && (room - len > len / 8 || room > self.pages) {
            let mut exact = KVVec::with_capacity(len, flags())?;
            exact.extend_from_slice(&self.list, flags())?;
            self.list = exact;
        }
        Ok(())
    }

    /// All extents.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Run> + Clone + '_ {
        self.iter_from(0)
    }

    /// The frames from the page `first` on: the rest of the extent that it is in, then the extents
    /// behind that. None behind the end.
    pub(crate) fn iter_from(&self, first: usize) -> impl Iterator<Item = Run> + Clone + '_ {
        // The last extent that starts at `first` or before.
        let index = self.list.partition_point(|extent| extent.start <= first);
        let from = if first < self.pages {
            index.saturating_sub(1)
        } else {
            self.list.len()
        };
        (from..self.list.len()).map(move |index| {
            let extent = self.list[index];
            let end = self
                .list
                .get(index + 1)
                .map_or(self.pages, |next| next.start);
            let skipped = first.saturating_sub(extent.start);
            Run {
                pfn: extent.pfn() + skipped,
                pages: end - extent.start - skipped,
                kind: extent.kind(),
            }
        })
    }
}
