// SPDX-License-Identifier: GPL-2.0

//! Pinning pages of the current process for the long term.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h), and
//! [`Documentation/core-api/pin_user_pages.rst`](srctree/Documentation/core-api/pin_user_pages.rst).

use super::mapped_file::MappedFile;
use crate::{
    extents::Pfn,
    ffi, //
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ptr::NonNull, //
};
use kernel::{
    alloc::{
        flags::GFP_KERNEL_ACCOUNT,
        KVVec, //
    },
    bindings,
    error::to_result,
    ffi::{
        c_int,
        c_long,
        c_uint, //
    },
    fs::file::LocalFile,
    page::PAGE_SHIFT,
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
    /// Where the page is, and what it is.
    pub(crate) fn place(self) -> Place {
        let mut place = Place::default();
        // SAFETY: A pinned page is a valid `struct page`, whose folio cannot be split or freed.
        unsafe { ffi::pinbuf_page_place(self.0, &mut place) };
        place
    }

    /// The page is the first of a folio: where in it the page `index` of `file` is, once the folio can
    /// be shown. `EAGAIN` if the page is not in it; `EHWPOISON` if some of it is lost.
    pub(crate) fn place_in_file(self, file: &LocalFile, index: usize) -> Result<Place> {
        let mut place = Place::default();
        // SAFETY: As above; `file` is a valid `struct file`.
        to_result(unsafe {
            ffi::pinbuf_folio_place(self.0.cast(), file.as_ptr(), index, &mut place)
        })?;
        Ok(place)
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

/// Where a pinned page is (its frame, how many pages its folio has from it on and in all), and
/// what: hugetlb's, where it can only be mapped whole and at its own alignment; memory of a device;
/// anonymous memory or page cache, not what a driver allocated for itself. All of that stays the same
/// while it is pinned.
pub(crate) use crate::ffi::Place;

/// A page that is pinned once.
///
/// # Invariants
///
/// The pointer is that of a page of which the value owns a pin.
pub(crate) struct OnePin(NonNull<bindings::page>);

impl OnePin {
    /// Pins the page at the address `addr`, as [`Batch::pin`] does, and tells what it is.
    #[inline]
    pub(crate) fn new(addr: usize) -> Result<(Self, Place)> {
        let mut page = core::ptr::null_mut();
        let mut place = MaybeUninit::uninit();
        // SAFETY: There is room for a pointer and a place. The current task has a memory map, since
        // only system calls lead here.
        let pinned = unsafe { ffi::pinbuf_pin_one(addr, LONG_TERM, &mut page, place.as_mut_ptr()) };
        match NonNull::new(page) {
            // SAFETY: The page was pinned, hence the place filled in. INVARIANT: The pin is ours.
            Some(page) if pinned == 1 => Ok((Self(page), unsafe { place.assume_init() })),
            _ => Err(to_result(pinned).err().unwrap_or(EAGAIN)),
        }
    }

    /// Pins the folio of `file` in which the `pages` pages from `index` on are, as
    /// [`Batch::pin_file`] does, and tells where they are in it. `None` if they are in several pages of
    /// the file, or hugetlbfs has not got it yet: then it takes [`Batch::pin_file`].
    #[inline]
    pub(crate) fn of_file(
        file: &LocalFile,
        index: usize,
        pages: usize,
    ) -> Result<Option<(Self, Place)>> {
        let mut folio = core::ptr::null_mut();
        let mut place = MaybeUninit::uninit();
        let (to, out) = (&mut folio, place.as_mut_ptr());
        // SAFETY: There is room for a pointer and a place; `file` is a valid `struct file`.
        let pinned = unsafe { ffi::pinbuf_file_pin_one(file.as_ptr(), index, pages, to, out) };
        match NonNull::new(folio) {
            Some(folio) if pinned == 1 => {
                // SAFETY: The folio was pinned, hence the place filled in.
                let place = unsafe { place.assume_init() };
                // INVARIANT: The pin is ours; a pointer to a folio is one to its first page, and a
                // pin of that page is one of the folio.
                Ok(Some((Self(folio.cast()), place)))
            }
            _ => to_result(pinned).map(|()| None),
        }
    }

    /// The page. The pin is the caller's from now on.
    fn into_page(self) -> NonNull<bindings::page> {
        core::mem::ManuallyDrop::new(self).0
    }

    /// Leaves the pin to the caller, who knows the page's frame.
    #[inline]
    pub(crate) fn leave(self) {
        self.into_page();
    }
}

impl Drop for OnePin {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Nothing was written through the pin.
        unsafe { bindings::unpin_user_page_range_dirty_lock(self.0.as_ptr(), 1, false) };
    }
}

/// For writing and for the long term.
const LONG_TERM: u32 = bindings::FOLL_WRITE | bindings::FOLL_LONGTERM;

/// Room for the frames of some pages: half a kilobyte of stack, which nobody clears.
pub(crate) struct Frames([MaybeUninit<Pfn>; Self::ROOM]);

impl Frames {
    const ROOM: usize = 64;

    pub(crate) fn new() -> Self {
        Self([MaybeUninit::uninit(); Self::ROOM])
    }

    fn as_mut_ptr(&mut self) -> *mut Pfn {
        self.0.as_mut_ptr().cast()
    }

    /// # Safety
    ///
    /// The first `count` have been written.
    unsafe fn first(&self, count: usize) -> &[Pfn] {
        // SAFETY: By the function's requirements.
        unsafe { core::slice::from_raw_parts(self.0.as_ptr().cast(), count) }
    }
}

/// `pinbuf_file_pin_folios` or its like.
type PinFolios = unsafe extern "C" fn(
    *mut bindings::file,
    bindings::loff_t,
    bindings::loff_t,
    bindings::loff_t,
    *mut *mut bindings::folio,
    c_uint,
) -> c_long;

/// Room for the result of one call of [`Batch::pin`] or [`Batch::pin_file`], used again and again.
///
/// # Invariants
///
/// The first `len` of [`Batch::slots`] are pages that are pinned, each once, by this batch. `many`,
/// as a vector, is empty; if it has a capacity, the slots are there.
pub(crate) struct Batch {
    few: [MaybeUninit<*mut bindings::page>; Self::FEW],
    many: KVVec<*mut bindings::page>,
    /// Pages of the buffer.
    most: usize,
    len: usize,
}

impl Batch {
    /// The most pages that one call pins: an array of one page, which stays in the cache, and
    /// 2 MiB of address space, which GUP's fast path walks with interrupts disabled.
    pub(crate) const MAX: usize = 512;

    /// So many pages are pinned without an allocation: small buffers cost little else, and of pages of
    /// 2 MiB these are as many as are asked for at once ([`Batch::MAX_OF_FILE`], from any page on).
    const FEW: usize = 33;

    /// The most pages of a file that one call asks for, where they are not small: if the file has
    /// no pages there yet, so many are allocated and cleared before the task can be killed.
    const MAX_OF_FILE: usize = (64 << 20) >> PAGE_SHIFT;

    /// A batch for a buffer of `pages` pages. Does not allocate.
    pub(crate) const fn new(pages: usize) -> Self {
        // INVARIANT: No page is pinned yet.
        Self {
            few: [MaybeUninit::uninit(); Self::FEW],
            many: KVVec::new(),
            most: pages,
            len: 0,
        }
    }

    /// Drops the pages that are pinned, and sees to it that the next call can pin `pages`, small or huge,
    /// or as many as one call pins; otherwise it pins fewer.
    #[inline]
    pub(crate) fn make_room(&mut self, pages: usize) -> Result {
        self.keep(0);
        if pages > Self::FEW && self.many.capacity() == 0 {
            self.many = KVVec::with_capacity(self.most.min(Self::MAX), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(())
    }

    /// The same for `pages` pages of a file, of which `unit` are one page of the file's.
    pub(crate) fn make_room_in_file(&mut self, pages: usize, unit: usize) -> Result {
        self.make_room(match unit {
            1 => pages,
            // Both ends may be in the middle of one. `unit` is a power of two.
            _ => (pages.min(Self::MAX_OF_FILE).saturating_sub(1) >> unit.trailing_zeros()) + 2,
        })
    }

    /// Where the pages are.
    fn slots(&mut self) -> &mut [MaybeUninit<*mut bindings::page>] {
        if self.many.capacity() > 0 {
            self.many.spare_capacity_mut()
        } else {
            &mut self.few
        }
    }

    /// The pages as C wants them.
    fn as_ptr(&self) -> *const *mut bindings::page {
        if self.many.capacity() > 0 {
            self.many.as_ptr()
        } else {
            self.few.as_ptr().cast()
        }
    }

    /// The pages that the last call pinned.
    pub(crate) fn pages(&self) -> &[PinnedPage<'_>] {
        // SAFETY: By the type invariant so many are there, and `PinnedPage` is transparent over the
        // pointer. INVARIANT: They stay pinned while `self` is borrowed, as it takes `&mut self` to
        // unpin them or give them away.
        unsafe { core::slice::from_raw_parts(self.as_ptr().cast(), self.len) }
    }

    /// Pins up to `pages` pages of the current process from the address `addr` on, for writing
    /// and for the long term, and returns how many it pinned, one at least.
    ///
    /// May sleep for long: until memory has been written back, a userfault has been answered or
    /// the task is killed. No lock may be held that somebody else waits for.
    ///
    /// Errors are GUP's own.
    pub(crate) fn pin(&mut self, addr: usize, pages: usize) -> Result<usize> {
        self.pin_with(addr, pages, LONG_TERM)
    }

    /// Makes a pinned page what the last call pinned.
    pub(crate) fn adopt(&mut self, pin: OnePin) {
        self.keep(0);
        if let Some(slot) = self.slots().first_mut() {
            slot.write(pin.into_page().as_ptr());
            // INVARIANT: It is pinned once, and that pin was given away.
            self.len = 1;
        }
    }

    /// Whether the `pages` pages from `addr` on can be had for a short time, that is, without
    /// moving them. Keeps none.
    pub(crate) fn can_pin_briefly(&mut self, addr: usize, pages: usize) -> bool {
        // If only some can be had, it is not for lack of memory that the next one cannot.
        let pinned = self.pin_with(addr, pages, bindings::FOLL_WRITE);
        self.keep(0);
        pinned.is_ok()
    }

    fn pin_with(&mut self, addr: usize, pages: usize, flags: u32) -> Result<usize> {
        self.keep(0);
        let slots = self.slots();
        let pages = pages.min(slots.len()).min(Self::MAX);
        let out = slots.as_mut_ptr().cast();
        // SAFETY: There is room for `pages` pointers. The current task has a memory map, since only
        // system calls lead here.
        let pinned = unsafe { bindings::pin_user_pages_fast(addr, pages as c_int, flags, out) };
        to_result(pinned)?;
        if pinned == 0 {
            return Err(EAGAIN);
        }
        // INVARIANT: So many entries were written, of pages that are pinned once each.
        self.len = pinned as usize;
        Ok(self.len)
    }

    /// Pins the folios of up to `pages` pages of `file` from its page `index` on, as
    /// [`Batch::pin`] does, allocating those that the file does not have yet. Each folio is pinned
    /// once and stands in [`Batch::pages`] with its first page; the first is the one that `index`
    /// was in.
    ///
    /// The file must be open for reading and writing and not be append-only (`EACCES`), not be sealed against that (`EPERM`), and be
    /// of shmem or hugetlbfs and not end before (`EINVAL`). Other errors are the kernel's own.
    /// May sleep for long; takes the inode's lock, shared.
    pub(crate) fn pin_file(
        &mut self,
        file: &LocalFile,
        index: usize,
        pages: usize,
    ) -> Result<usize> {
        self.pin_folios(file, index, pages, ffi::pinbuf_file_pin_folios)
    }

    /// The same, where nobody has to be waited for and all pages are there, for pages that the current
    /// process has mapped shared and writable: then it does not matter how the file was opened.
    ///
    /// Any error only says that [`Batch::pin`] is to be asked.
    pub(crate) fn pin_mapped_file(
        &mut self,
        file: &MappedFile,
        index: usize,
        pages: usize,
    ) -> Result<usize> {
        self.pin_folios(file.file(), index, pages, ffi::pinbuf_mapped_pin_folios)
    }

    fn pin_folios(
        &mut self,
        file: &LocalFile,
        index: usize,
        pages: usize,
        pin: PinFolios,
    ) -> Result<usize> {
        self.keep(0);
        let most = Self::most_of(file);
        let end_of =
            |pages: usize| ((index as u64 + pages as u64) << PAGE_SHIFT) as bindings::loff_t;
        let (start, end, all) = (end_of(0), end_of(pages.min(most)), end_of(pages));
        let slots = self.slots();
        let room = slots.len().min(Self::MAX) as c_uint;
        let out = slots.as_mut_ptr().cast();
        // SAFETY: There is room for so many pointers. `file` is a valid `struct file`, and of a kind
        // whose pages can be pinned if that is not checked.
        let pinned = unsafe { pin(file.as_ptr(), start, end, all, out, room) };
        to_result(pinned.min(0) as c_int)?;
        if pinned == 0 {
            return Err(EAGAIN);
        }
        // INVARIANT: So many entries were written, of folios that are pinned once each. A pointer to
        // a folio is one to its first page, and a pin of that page is one of the folio.
        self.len = pinned as usize;
        Ok(self.len)
    }

    /// The most pages of `file` that one call of [`Batch::pin_file`] asks for.
    pub(crate) fn most_of(file: &LocalFile) -> usize {
        if file_is_hugetlb(file) {
            Self::MAX_OF_FILE
        } else {
            Self::MAX
        }
    }

    /// The frames of the pages from the entry `from` on, as far as these are ordinary (neither a
    /// device's nor hugetlb's nor such as a driver allocated for itself) and there is room in `out`.
    pub(crate) fn ordinary<'f>(&self, from: usize, out: &'f mut Frames) -> &'f [Pfn] {
        let rest = self.pages().get(from..).unwrap_or(&[]);
        let most = rest.len().min(Frames::ROOM);
        // SAFETY: Pinned pages are valid `struct page`s, whose folios cannot be split or freed.
        // There is room for so many frames.
        let count =
            unsafe { ffi::pinbuf_pages_ordinary(rest.as_ptr().cast(), most, out.as_mut_ptr()) };
        // SAFETY: So many were written.
        unsafe { out.first(count) }
    }

    /// How many pages from the entry `from` on were, a moment ago, those of `file` from its page
    /// `index` on.
    pub(crate) fn backed_by(&self, from: usize, file: &LocalFile, index: usize) -> usize {
        let rest = self.pages().get(from..).unwrap_or(&[]);
        // SAFETY: As above; `file` is a valid `struct file`.
        unsafe {
            ffi::pinbuf_pages_backed_by(rest.as_ptr().cast(), rest.len(), file.as_ptr(), index)
        }
    }

    /// After [`Batch::pin_file`]: the first frames of the folios from the entry `from` on, as far as
    /// these have `1 << order` pages, are those of `file` from its page `index` on, and can be shown as
    /// they are: `most` at most, and no more than there is room for in `out`.
    pub(crate) fn plain_folios<'f>(
        &self,
        from: usize,
        file: &LocalFile,
        index: usize,
        order: u32,
        most: usize,
        out: &'f mut Frames,
    ) -> &'f [Pfn] {
        let rest = self.pages().get(from..).unwrap_or(&[]);
        let most = rest.len().min(Frames::ROOM).min(most);
        let (first, file) = (rest.as_ptr().cast(), file.as_ptr());
        // SAFETY: As above; these are the first pages of folios.
        let count =
            unsafe { ffi::pinbuf_folios_plain(first, most, file, index, order, out.as_mut_ptr()) };
        // SAFETY: So many were written.
        unsafe { out.first(count) }
    }

    /// Hands the first `taken` pins over to the caller and drops the others.
    pub(crate) fn keep(&mut self, taken: usize) {
        for page in self.pages().get(taken..).unwrap_or(&[]) {
            // SAFETY: By the type invariant the page is pinned once by us, and it is forgotten
            // below. Nothing was written through the pin.
            unsafe { bindings::unpin_user_page_range_dirty_lock(page.0, 1, false) };
        }
        self.len = 0;
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.keep(0);
    }
}

/// Whether `file` has pages for all of the `pages` from `index` on, none of them swapped out: then
/// it is not for want of memory that they cannot be pinned.
pub(crate) fn file_has_pages(file: &LocalFile, index: usize, pages: usize) -> bool {
    // SAFETY: `file` is a valid `struct file`.
    unsafe { ffi::pinbuf_file_has_pages(file.as_ptr(), index, pages) }
}

/// How many pages one page of `file` has: more than one if it is hugetlb's.
pub(crate) fn file_unit(file: &LocalFile) -> usize {
    // SAFETY: `file` is a valid `struct file`.
    unsafe { ffi::pinbuf_file_unit(file.as_ptr()) }
}

/// Whether `file` is hugetlb's.
pub(crate) fn file_is_hugetlb(file: &LocalFile) -> bool {
    file_unit(file) > 1
}

/// Drops pins of pages, many at a time where they are scattered.
///
/// # Invariants
///
/// The first `len` entries of `pages` are pinned pages, whose pins were given to the value.
pub(crate) struct Unpinner {
    pages: [MaybeUninit<*mut bindings::page>; Self::ROOM],
    len: usize,
}

impl Unpinner {
    /// Pages that are collected: half a kilobyte of stack.
    const ROOM: usize = 64;

    /// From so many pages on, a range is not taken apart.
    const RANGE: usize = 8;

    /// One that has nothing to do yet.
    pub(crate) fn new() -> Self {
        Self {
            pages: [MaybeUninit::uninit(); Self::ROOM],
            len: 0,
        }
    }

    /// Drops one pin of each of the `pages` pages from the frame `pfn` on, now or later, after
    /// marking their folios dirty: a device may have written to them without leaving a trace in
    /// any page table.
    ///
    /// # Safety
    ///
    /// The caller owns a pin of each of these pages, and gives it up.
    #[inline]
    pub(crate) unsafe fn unpin(&mut self, pfn: Pfn, pages: usize) {
        // SAFETY: The frame belongs to a pinned page.
        let page = unsafe { ffi::pinbuf_pfn_to_page(pfn) };
        if pages >= Self::RANGE {
            // SAFETY: By the function's requirements.
            unsafe { bindings::unpin_user_page_range_dirty_lock(page, pages, true) };
            return;
        }
        for n in 0..pages {
            if self.len == Self::ROOM {
                self.flush();
            }
            self.pages[self.len].write(page.wrapping_add(n));
            // INVARIANT: The pin is the caller's, who gave it up.
            self.len += 1;
        }
    }

    fn flush(&mut self) {
        let pages = self.pages.as_mut_ptr().cast();
        // SAFETY: By the type invariant; they are forgotten below.
        unsafe { bindings::unpin_user_pages_dirty_lock(pages, self.len, true) };
        self.len = 0;
    }
}

impl Drop for Unpinner {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Drops one pin of each of these page frames, after marking them dirty. The numbers are
/// overwritten.
///
/// # Safety
///
/// The caller owns a pin of each of these pages, and gives it up.
pub(crate) unsafe fn unpin_frames(pfns: &mut [Pfn]) {
    // SAFETY: By the function's requirements.
    unsafe { ffi::pinbuf_unpin_pfns_dirty(pfns.as_mut_ptr(), pfns.len()) };
}

/// Drops one pin of each folio, `max` at most, that the `pages` adjacent pages from the frame `pfn`
/// on are in, after marking them dirty, and returns of how many of these pages that was. The last
/// folio may reach beyond them.
///
/// # Safety
///
/// The caller owns one pin of each of these folios, and gives it up.
pub(crate) unsafe fn unpin_folios(pfn: Pfn, pages: usize, max: usize) -> usize {
    // SAFETY: By the function's requirements.
    unsafe { ffi::pinbuf_unpin_folios_dirty(pfn, pages, max) }
}
