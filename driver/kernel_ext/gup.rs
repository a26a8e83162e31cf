// SPDX-License-Identifier: GPL-2.0

//! Pinning pages of the current process for the long term.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h), and
//! [`Documentation/core-api/pin_user_pages.rst`](srctree/Documentation/core-api/pin_user_pages.rst).

use crate::{
    extents::Pfn,
    ffi, //
};
use core::marker::PhantomData;
use kernel::{
    alloc::{
        flags::GFP_KERNEL_ACCOUNT,
        KVVec, //
    },
    bindings,
    error::to_result,
    fs::file::LocalFile,
    prelude::*, //
};

// Runs of frames are taken for runs of `struct page`s below, and their numbers are reckoned from one
// another. With one memory map that is so; without, it is so only within a section.
#[cfg(all(CONFIG_SPARSEMEM, not(CONFIG_SPARSEMEM_VMEMMAP)))]
compile_error!("needs CONFIG_SPARSEMEM_VMEMMAP or CONFIG_FLATMEM");

/// A page that is pinned for as long as the value can be used: `'a` is the life of the pin.
///
/// # Invariants
///
/// The pointer is that of a page that stays pinned for `'a`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct PinnedPage<'a>(*mut bindings::page, PhantomData<&'a Batch>);

impl PinnedPage<'_> {
    /// The page's frame number.
    #[inline]
    pub(crate) fn pfn(self) -> Pfn {
        // SAFETY: A pinned page is a valid `struct page`.
        unsafe { ffi::pinbuf_page_to_pfn(self.0) }
    }

    /// The page's frame number, reckoned from that of another page.
    #[inline]
    pub(crate) fn pfn_from(self, other: Self, pfn: Pfn) -> Pfn {
        let bytes = (self.0 as isize).wrapping_sub(other.0 as isize);
        pfn.wrapping_add_signed(bytes / size_of::<bindings::page>() as isize)
    }

    /// The size of the page's folio in pages.
    pub(crate) fn folio_pages(self) -> usize {
        // SAFETY: A pinned page is a valid `struct page`, whose folio cannot be split or freed.
        unsafe { ffi::pinbuf_page_folio_pages(self.0) }
    }

    /// Whether the page was, a moment ago, the page number `index` of `file`.
    pub(crate) fn is_backed_by(self, file: &LocalFile, index: usize) -> bool {
        // SAFETY: A pinned page is a valid `struct page`; `file` is a valid `struct file`.
        unsafe { ffi::pinbuf_page_is_backed_by(self.0, file.as_ptr(), index) }
    }

    /// Whether the page may share an extent with the frame `pfn`, as far as device memory is
    /// concerned: not if they belong to different devices, or one of them to none.
    ///
    /// # Safety
    ///
    /// The frame is that of a page that is pinned.
    pub(crate) unsafe fn same_pgmap(self, pfn: Pfn) -> bool {
        // SAFETY: By the function's requirements.
        let other = unsafe { ffi::pinbuf_pfn_to_page(pfn) };
        // SAFETY: Pinned pages are valid `struct page`s.
        unsafe { ffi::pinbuf_same_pgmap(self.0, other) }
    }

    /// Whether `self` is the `n`th page behind `first`, physically.
    #[inline]
    pub(crate) fn follows(self, first: Self, n: usize) -> bool {
        self.0 == first.0.wrapping_add(n)
    }
}

/// What a pinned page tells of the folio it is in, which stays the same while it is pinned.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Description(usize);

impl Description {
    /// How many pages of the folio there are from this one on; physically, they follow it.
    #[inline]
    pub(crate) fn left(self) -> usize {
        self.0 >> ffi::PAGE_LEFT_SHIFT
    }

    /// It belongs to hugetlb, where it can only be mapped whole and at its own alignment.
    #[inline]
    pub(crate) fn is_hugetlb(self) -> bool {
        self.0 & ffi::PAGE_HUGETLB != 0
    }

    /// It is memory of a device.
    #[inline]
    pub(crate) fn is_device(self) -> bool {
        self.0 & ffi::PAGE_DEVICE != 0
    }

    /// It is anonymous memory or page cache, not pages that a driver allocated for itself.
    #[inline]
    pub(crate) fn is_user(self) -> bool {
        self.0 & ffi::PAGE_USER != 0
    }
}

/// Room for the result of one call of [`Batch::pin`], used again and again.
///
/// # Invariants
///
/// The entries of `pages` are pages that are pinned, each once, by this batch. There is room for as
/// many `descriptions` as for pages.
pub(crate) struct Batch {
    pages: KVVec<*mut bindings::page>,
    descriptions: KVVec<Description>,
}

impl Batch {
    /// The most pages that one call pins: an array of one page, which stays in the cache, and
    /// 2 MiB of address space, which GUP's fast path walks with interrupts disabled.
    pub(crate) const MAX: usize = 512;

    /// A batch with room for `capacity` pages, at most [`Batch::MAX`].
    pub(crate) fn new(capacity: usize) -> Result<Self> {
        let capacity = capacity.clamp(1, Self::MAX);
        Ok(Self {
            pages: KVVec::with_capacity(capacity, GFP_KERNEL_ACCOUNT)?,
            descriptions: KVVec::with_capacity(capacity, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// Pins up to `pages` pages of the current process from the address `addr` on, for writing
    /// and for the long term, and returns how many it pinned, one at least.
    ///
    /// May sleep for long: until memory has been written back, a userfault has been answered or
    /// the task is killed. No lock may be held that somebody else waits for.
    ///
    /// Errors are GUP's own.
    pub(crate) fn pin(&mut self, addr: usize, pages: usize) -> Result<usize> {
        self.pin_with(addr, pages, bindings::FOLL_WRITE | bindings::FOLL_LONGTERM)
    }

    /// Whether the `pages` pages from `addr` on can be had for a short time, that is, without
    /// moving them. Keeps none.
    pub(crate) fn can_pin_briefly(&mut self, addr: usize, pages: usize) -> bool {
        let pages = pages.min(self.pages.capacity());
        // If only some can be had, it is not for lack of memory that the next one cannot.
        let pinned = self.pin_with(addr, pages, bindings::FOLL_WRITE);
        self.unpin_from(0);
        pinned.is_ok()
    }

    fn pin_with(&mut self, addr: usize, pages: usize, flags: u32) -> Result<usize> {
        self.unpin_from(0);
        let pages = pages.min(self.pages.capacity());
        // SAFETY: The vector has room for `pages` pointers. The current task has a memory map, since only system calls lead here.
        let pinned = unsafe {
            bindings::pin_user_pages_fast(addr, pages as c_int, flags, self.pages.as_mut_ptr())
        };
        to_result(pinned)?;
        if pinned == 0 {
            return Err(EAGAIN);
        }
        // SAFETY: `pinned` is at most `pages`, for which there is capacity, and so many entries
        // were written. INVARIANT: they are pinned once each.
        unsafe { self.pages.inc_len(pinned as usize) };
        Ok(pinned as usize)
    }

    /// The pages that the last call of [`Batch::pin`] pinned, and what each one tells.
    pub(crate) fn describe(&mut self) -> (&[PinnedPage<'_>], &[Description]) {
        let count = self.pages.len();
        self.descriptions.clear();
        // SAFETY: Pinned pages are valid `struct page`s, whose folios cannot be split or freed.
        // There is room for so many descriptions, and `Description` is transparent.
        unsafe {
            ffi::pinbuf_pages_describe(
                self.pages.as_ptr(),
                count,
                self.descriptions.as_mut_ptr().cast(),
            )
        };
        // SAFETY: So many were written.
        unsafe { self.descriptions.inc_len(count) };
        // SAFETY: `PinnedPage` is transparent over the pointer. INVARIANT: The pages stay pinned
        // while `self` is borrowed, as it takes `&mut self` to unpin them or give them away.
        let pages = unsafe { core::slice::from_raw_parts(self.pages.as_ptr().cast(), count) };
        (pages, &self.descriptions)
    }

    /// Hands the first `taken` pins over to the caller and drops the others.
    pub(crate) fn keep(&mut self, taken: usize) {
        self.unpin_from(taken);
        self.pages.clear();
    }

    /// Drops the pins from the entry `from` on.
    fn unpin_from(&mut self, from: usize) {
        if let Some(rest) = self.pages.get(from..) {
            for page in rest {
                // SAFETY: By the type invariant the page is pinned once by us, and it is forgotten
                // below. Nothing was written through the pin.
                unsafe { bindings::unpin_user_page_range_dirty_lock(*page, 1, false) };
            }
        }
        self.pages.truncate(from);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.unpin_from(0);
    }
}

/// Drops one pin of each of the `pages` pages from the frame `pfn` on, after marking their folios
/// dirty: a device may have written to them without leaving a trace in any page table.
///
/// # Safety
///
/// The caller owns a pin of each of these pages, and gives it up.
pub(crate) unsafe fn unpin_pages(pfn: Pfn, pages: usize) {
    // SAFETY: The frame belongs to a pinned page.
    let page = unsafe { ffi::pinbuf_pfn_to_page(pfn) };
    // SAFETY: By the function's requirements.
    unsafe { bindings::unpin_user_page_range_dirty_lock(page, pages, true) };
}

/// Drops one pin of the folio that the frame `pfn` is in, after marking it dirty, and returns how
/// many pages of it there are from that frame on.
///
/// # Safety
///
/// The caller owns one pin of that folio, and gives it up.
pub(crate) unsafe fn unpin_folio(pfn: Pfn) -> usize {
    // SAFETY: The frame belongs to a pinned folio.
    let page = unsafe { ffi::pinbuf_pfn_to_page(pfn) };
    let mut description = Description(0);
    // SAFETY: A page of a pinned folio; `Description` is transparent.
    unsafe { ffi::pinbuf_pages_describe(&page, 1, &mut description.0) };
    // SAFETY: By the function's requirements; dropping one page's pin drops one of its folio's.
    unsafe { bindings::unpin_user_page_range_dirty_lock(page, 1, true) };
    description.left()
}
