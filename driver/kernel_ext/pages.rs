// SPDX-License-Identifier: GPL-2.0

//! Pinned pages of user memory, and the folios that contain them.
//!
//! A [`PagePin`] owns one pin of one page, a [`FolioPin`] one pin that is known to hold a whole
//! hugetlb folio. Both unpin when they are dropped. A caller that keeps many pins records page
//! frame numbers, gives the pins up ([`PagePin::give_up`]), and unpins in bulk later
//! ([`unpin_pages`]).
//!
//! While a folio is pinned it is neither split nor freed, so its size and kind do not change, with
//! one exception: truncation removes a folio from its file, after which `mapping` is null.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/page-flags.h`](srctree/include/linux/page-flags.h).

use super::sched::cond_resched;
use crate::ffi;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::to_result,
    ffi::{
        c_char,
        c_int,
        c_uint, //
    },
    fs::file::LocalFile,
    mm::MmWithUser,
    page::PAGE_SHIFT,
    prelude::*,
    task::CurrentTask,
    types::NotThreadSafe, //
};

/// The number of a page frame.
pub(crate) type Pfn = usize;

/// The array of all `struct page`s, indexed by their frames (`CONFIG_SPARSEMEM_VMEMMAP`).
#[derive(Clone, Copy)]
pub(crate) struct PageArray(*mut bindings::page);

impl PageArray {
    /// The array.
    pub(crate) fn get() -> Self {
        // SAFETY: Computes an address; nothing is read.
        Self(unsafe { ffi::pinbuf_pfn_to_page(0) })
    }

    /// The page of a frame.
    #[inline]
    pub(crate) fn page(self, pfn: Pfn) -> *mut bindings::page {
        self.0.wrapping_add(pfn)
    }

    /// The frame of a page.
    #[inline]
    fn pfn(self, page: NonNull<bindings::page>) -> Pfn {
        distance(self.0, page.as_ptr())
    }
}

/// The number of pages from `first` to `page` in the array of all pages.
#[inline]
fn distance(first: *const bindings::page, page: *const bindings::page) -> usize {
    // `page` is not before `first`: this does not wrap.
    (page as usize).wrapping_sub(first as usize) / size_of::<bindings::page>()
}

/// The address space of the current task. A value proves that the task has one, unlike a kernel
/// thread, and cannot be passed to another task.
pub(crate) struct CurrentMm<'t>(&'t MmWithUser, NotThreadSafe);

impl<'t> CurrentMm<'t> {
    /// The address space of `task`; `None` for a kernel thread.
    pub(crate) fn of(task: &'t CurrentTask) -> Option<Self> {
        Some(Self(task.mm()?, NotThreadSafe))
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &MmWithUser {
        self.0
    }
}

/// How pages are pinned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// For the long term: pages are first migrated to where they may stay. Pages that are not
    /// present are faulted in.
    Long,
    /// For the long term, as far as pages are present: `EFAULT` if the first is not.
    LongIfPresent,
    /// For a short time: pages are pinned where they are.
    Short,
}

/// Pins at least one and up to `max` pages of the current process for writing, from the address
/// `addr` on, and replaces the content of `out` with the pins. No more pages are pinned than `out`
/// has capacity for.
///
/// May sleep. Where pages are faulted in, their owner can make it sleep for any length of time:
/// until memory is written back, until a userfault is resolved, or until the task is killed. So the
/// caller must not hold a lock that other tasks wait for.
///
/// The errors are those of GUP; `EAGAIN` stands for its result 0.
pub(crate) fn pin_user_pages(
    _: &CurrentMm<'_>,
    addr: usize,
    max: usize,
    how: How,
    out: &mut KVec<PagePin>,
) -> Result {
    out.clear();
    let long = bindings::FOLL_WRITE | bindings::FOLL_LONGTERM;
    let flags = match how {
        How::Long => long,
        How::LongIfPresent => long | bindings::FOLL_NOFAULT,
        How::Short => bindings::FOLL_WRITE,
    };
    let room = out.spare_capacity_mut();
    let max = max.min(room.len()).min(c_int::MAX as usize);
    // `PagePin` is transparent over a pointer to a page.
    let slots = room.as_mut_ptr().cast();
    // SAFETY: `slots` has room for `max` pointers, and the current task has an address space.
    let pinned =
        unsafe { bindings::pin_user_pages_fast(addr, max as c_int, flags as c_uint, slots) };
    if pinned <= 0 {
        to_result(pinned)?;
        return Err(EAGAIN);
    }
    // SAFETY: GUP wrote `pinned` pointers to pages, each of which it pinned once. The pins now
    // belong to the elements of `out`.
    unsafe { out.inc_len(pinned as usize) };
    Ok(())
}

/// Faults in up to `pages` pages of the current process for writing, from the address `addr` on,
/// without pinning them. Stops at the first page that cannot be faulted in, and at the end of the
/// mapping that contains the page before `addr`.
///
/// GUP refuses some mappings (of files on disk, of devices) before it faults a page in. This
/// function does not: so the caller has pinned the page before `addr`.
///
/// May sleep, as [`pin_user_pages`].
pub(crate) fn fault_in(mm: &CurrentMm<'_>, addr: usize, pages: usize) {
    if pages == 0 {
        return;
    }
    // SAFETY: Computes an address.
    let start = unsafe { ffi::pinbuf_untagged_addr(addr) };
    let end = {
        let mappings = mm.mm().mmap_read_lock();
        let before = mappings.vma_lookup(start.wrapping_sub(1));
        before.map_or(start, |vma| vma.end())
    };
    let size = end.saturating_sub(start).min(pages << PAGE_SHIFT);
    // SAFETY: Sets a flag of the current task: as in GUP, memory is allocated where it may stay.
    let flags = unsafe { ffi::pinbuf_memalloc_pin_save() };
    // SAFETY: The current task has an address space. Any address is allowed.
    unsafe { bindings::fault_in_safe_writeable(start as *const c_char, size) };
    // SAFETY: Restores the flag.
    unsafe { ffi::pinbuf_memalloc_pin_restore(flags) };
    cond_resched();
}

/// One pin of one page of user memory.
///
/// # Invariants
///
/// The pointer refers to a valid page, of which this value owns one pin.
#[repr(transparent)]
pub(crate) struct PagePin(NonNull<bindings::page>);

impl PagePin {
    /// The page's frame.
    #[inline]
    pub(crate) fn pfn(&self, array: PageArray) -> Pfn {
        array.pfn(self.0)
    }

    /// The folio that the page is in.
    #[inline]
    pub(crate) fn folio(&self) -> Folio<'_> {
        // SAFETY: A valid page, of which `self` owns a pin, by the type invariant.
        unsafe { folio_of(self.0) }
    }

    /// The folio that the page is, and its flags; `None` for a page of a large folio.
    #[inline]
    pub(crate) fn small_folio(&self) -> Option<(Folio<'_>, FolioFlags)> {
        // SAFETY: A valid page, of which `self` owns a pin, by the type invariant.
        unsafe { small_folio(self.0) }
    }

    /// Converts the pin of a page that was pinned at the address `addr` to a pin of its whole
    /// folio, if that is sound; returns the pin unchanged otherwise.
    ///
    /// It is sound for hugetlb only. A hugetlb folio is mapped whole and aligned, or not at all,
    /// and belongs to one owner as a whole. So if this page belongs to hugetlb, and its index in
    /// the folio equals the index of its address in the huge page, then the folio's other pages
    /// were mapped at the neighbouring addresses when this one was pinned. Transparent huge pages
    /// are mapped and owned page by page.
    pub(crate) fn into_folio_pin(self, addr: usize) -> Result<FolioPin, Self> {
        let folio = self.folio();
        if !folio.is_hugetlb() {
            return Err(self);
        }
        let pages = folio.pages();
        let index = folio.place_of(&self);
        if (addr >> PAGE_SHIFT) & (pages - 1) != index {
            return Err(self);
        }
        // INVARIANT: Checked above.
        Ok(FolioPin {
            first: self,
            index,
            pages,
        })
    }

    /// Gives the pin up without unpinning: the caller has to pass the frame to [`unpin_pages`]
    /// later.
    #[inline]
    pub(crate) fn give_up(self) {
        core::mem::forget(self);
    }
}

impl Drop for PagePin {
    fn drop(&mut self) {
        // SAFETY: This value owns the pin, by the type invariant. Nothing was written through it.
        unsafe { bindings::unpin_user_page(self.0.as_ptr()) };
    }
}

/// One pin that holds all pages of a hugetlb folio.
///
/// # Invariants
///
/// `first` is the page `index` of a hugetlb folio of `pages` pages, which the process had mapped
/// whole, around the address of `first`, when it was pinned.
pub(crate) struct FolioPin {
    first: PagePin,
    index: usize,
    pages: usize,
}

impl FolioPin {
    /// The number of pages of the folio from the pinned one on, at least one.
    pub(crate) fn pages_left(&self) -> usize {
        self.pages - self.index
    }

    /// The frame of the pinned page.
    pub(crate) fn pfn(&self, array: PageArray) -> Pfn {
        self.first.pfn(array)
    }

    /// The folio.
    pub(crate) fn folio(&self) -> Folio<'_> {
        let head = self.first.0.as_ptr().wrapping_sub(self.index);
        // SAFETY: By the type invariant, this is the first page of a folio, so it is not null.
        // INVARIANT: The folio is pinned.
        Folio(unsafe { NonNull::new_unchecked(head.cast()) }, PhantomData)
    }

    /// The index of the pinned page in the folio.
    pub(crate) fn place(&self) -> usize {
        self.index
    }

    /// Gives the pin up without unpinning: the caller has to pass the frame to [`unpin_hugetlb`]
    /// later.
    pub(crate) fn give_up(self) {
        self.first.give_up();
    }
}

/// A page that is a folio of its own, as most pages are, and its flags; `None` for a page of a large
/// folio.
///
/// Recognised without a function call: one call per page would cost as much as everything else that
/// the driver does with the page.
///
/// # Safety
///
/// The page is valid, and its folio stays pinned for `'a`.
#[inline]
unsafe fn small_folio<'a>(page: NonNull<bindings::page>) -> Option<(Folio<'a>, FolioFlags)> {
    let raw = page.as_ptr();
    // SAFETY: By the function's requirements. While the page is pinned, `PG_head` does not change.
    // Other flags may change, so the read is volatile.
    let flags = unsafe { (&raw const (*raw).flags.f).read_volatile() };
    if flags & (1 << bindings::pageflags_PG_head) != 0 {
        return None;
    }
    // SAFETY: By the function's requirements. Bit 0 of the first word after the flags marks a tail
    // page, whatever else the word is used for, and does not change while the page is pinned. (On
    // older kernels, a tail page of hugetlb may have `PG_head` set, and so does not count as a folio
    // of its own either.) Other bits may change, so the read is volatile.
    let word = unsafe {
        (&raw const (*raw).__bindgen_anon_1)
            .cast::<usize>()
            .read_volatile()
    };
    if word & 1 != 0 {
        return None;
    }
    // INVARIANT: The page is a folio of its own, which stays pinned.
    Some((Folio(page.cast(), PhantomData), FolioFlags(flags)))
}

/// The folio that a page is in.
///
/// # Safety
///
/// The page is valid, and its folio stays pinned for `'a`.
#[inline]
unsafe fn folio_of<'a>(page: NonNull<bindings::page>) -> Folio<'a> {
    // SAFETY: By the function's requirements.
    let folio = unsafe { ffi::pinbuf_page_folio(page.as_ptr()) };
    // SAFETY: Every page is in a folio, so the pointer is not null. INVARIANT: The folio stays
    // pinned.
    Folio(unsafe { NonNull::new_unchecked(folio) }, PhantomData)
}

/// A folio that stays pinned for `'a`.
///
/// # Invariants
///
/// The pointer refers to a valid folio, of which a page is pinned for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Folio<'a>(NonNull<bindings::folio>, PhantomData<&'a PagePin>);

impl Folio<'_> {
    /// A number that distinguishes the folio from all others that are pinned at the same time.
    pub(crate) fn id(self) -> usize {
        self.0.as_ptr() as usize
    }

    /// Its flags.
    pub(crate) fn flags(self) -> FolioFlags {
        let page = self.0.as_ptr().cast::<bindings::page>();
        // SAFETY: A valid folio, by the type invariant; the flags are at the same offset in its
        // first page. Flags may change meanwhile, so the read is volatile.
        FolioFlags(unsafe { (&raw const (*page).flags.f).read_volatile() })
    }

    /// Its number of pages, a power of two.
    pub(crate) fn pages(self) -> usize {
        // SAFETY: A valid folio, by the type invariant.
        unsafe { ffi::pinbuf_folio_nr_pages(self.0.as_ptr()) }
    }

    /// Whether it belongs to hugetlb.
    pub(crate) fn is_hugetlb(self) -> bool {
        // SAFETY: A valid folio, by the type invariant.
        unsafe { ffi::pinbuf_folio_test_hugetlb(self.0.as_ptr()) }
    }

    /// Whether it is anonymous memory: `folio_test_anon()`.
    #[inline]
    pub(crate) fn is_anon(self) -> bool {
        self.mapping() as usize & bindings::FOLIO_MAPPING_ANON as usize != 0
    }

    /// Its reference count, to which each pin of a small folio adds 1,024.
    #[inline]
    pub(crate) fn references(self) -> i32 {
        // SAFETY: A valid folio, by the type invariant; the counter is at the same offset in its
        // first page. It may change meanwhile, so the read is volatile.
        unsafe {
            (&raw const (*self.0.as_ptr().cast::<bindings::page>())
                ._refcount
                .counter)
                .read_volatile()
        }
    }

    /// The index of a page in this folio, which contains it.
    #[inline]
    pub(crate) fn place_of(self, pin: &PagePin) -> usize {
        distance(self.0.as_ptr().cast(), pin.0.as_ptr())
    }

    /// The index of the folio's page `place` in a file, if the folio belongs to it. The result may be
    /// outdated when it is returned: truncation is not excluded.
    #[inline]
    pub(crate) fn index_in(self, file: FileMapping<'_>, place: usize) -> Option<usize> {
        // SAFETY: A valid folio, by the type invariant. The field changes when the folio is
        // truncated, so the read is volatile.
        let first = unsafe {
            let fields = &raw const (*self.0.as_ptr()).__bindgen_anon_1.__bindgen_anon_1;
            (&raw const (*fields).__bindgen_anon_2.index).read_volatile()
        };
        (self.mapping() == file.0).then_some(first.wrapping_add(place))
    }

    /// The file that the folio belongs to, or the value that marks anonymous memory. Null after
    /// truncation.
    #[inline]
    fn mapping(self) -> *mut bindings::address_space {
        // SAFETY: A valid folio, by the type invariant. The field changes when the folio is
        // truncated, so the read is volatile.
        unsafe {
            let fields = &raw const (*self.0.as_ptr()).__bindgen_anon_1.__bindgen_anon_1;
            (&raw const (*fields).mapping).read_volatile()
        }
    }

    /// Whether a process maps the folio or a part of it.
    fn is_mapped(self) -> bool {
        // SAFETY: A valid folio, by the type invariant.
        unsafe { ffi::pinbuf_folio_mapped(self.0.as_ptr()) }
    }
}

/// What distinguishes the folios of an open file from those of others.
#[derive(Clone, Copy)]
pub(crate) struct FileMapping<'f>(*mut bindings::address_space, PhantomData<&'f LocalFile>);

impl<'f> FileMapping<'f> {
    pub(crate) fn of(file: &'f LocalFile) -> Self {
        // SAFETY: A valid file; the pointer does not change while it is open.
        Self(unsafe { (*file.as_ptr()).f_mapping }, PhantomData)
    }
}

/// The flags of a folio at the time when they were read. While the folio is pinned,
/// `PG_swapbacked` changes only for anonymous memory (`MADV_FREE`).
#[derive(Clone, Copy)]
pub(crate) struct FolioFlags(usize);

impl FolioFlags {
    /// Whether swap backs the folio: `folio_test_swapbacked()`. It backs shmem, also after
    /// truncation, and all anonymous memory except for memory that its owner gave up (`MADV_FREE`,
    /// `MAP_DROPPABLE`).
    #[inline]
    pub(crate) fn is_swapbacked(self) -> bool {
        self.0 & (1 << bindings::pageflags_PG_swapbacked) != 0
    }
}

/// Whether the owner of pinned memory still sees it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sight {
    /// The page still belongs to the file, or a process still maps it.
    Seen,
    /// Neither, and that will not change any more.
    Discarded,
    /// Unknown.
    Unsure,
}

impl Sight {
    fn seen_if(is_seen: bool) -> Self {
        if is_seen {
            Self::Seen
        } else {
            Self::Discarded
        }
    }
}

/// The state of a pinned page, and the number of pages from it on, at most `pages`, that are known
/// to have the same state. The result may be outdated when it is returned: a discard may happen at
/// any time. No discard is undone.
///
/// * A page of a file is seen as long as it belongs to the file. Removing it (by a hole, by
///   truncation, or with the file itself) clears its folio's `mapping` for good. Pieces smaller
///   than a folio are zeroed in place while the folio is pinned, and stay seen.
/// * A page of private memory is seen as long as a page table maps it. GUP pins only pages that are
///   exclusive to one process. While they are pinned, fork copies them, and KSM, migration and
///   `UFFDIO_MOVE` skip them. So only that process, or one that shares its address space, can map
///   the page, at whatever address it has moved it to. Reclaim does not unmap it, whether it is in
///   the swap cache or not.
///
/// Memory that the kernel has found broken, whose owner gets a signal, may be reported as seen or
/// as discarded.
///
/// # Safety
///
/// The frame is of a page whose folio is pinned, and `pages` is at least one.
#[inline(always)] // Called once per page, and most pages need no further call.
pub(crate) unsafe fn sight(array: PageArray, pfn: Pfn, pages: usize) -> (Sight, usize) {
    let Some(page) = NonNull::new(array.page(pfn)) else {
        return (Sight::Unsure, pages);
    };
    // SAFETY: By the function's requirements; used within this function only.
    let small = unsafe { small_folio(page) };
    let (folio, left) = match small {
        Some((folio, _)) => (folio, 1),
        // SAFETY: As above.
        None => unsafe { (folio_of(page), pages.min(left_in_folio(page.as_ptr()))) },
    };
    let is_seen = if !folio.is_anon() {
        !folio.mapping().is_null()
    } else if small.is_none() && !folio.is_hugetlb() {
        // SAFETY: By the function's requirements; a large folio.
        return unsafe { sight_of_part(folio, page, left) };
    } else {
        folio.is_mapped()
    };
    (Sight::seen_if(is_seen), left)
}

/// [`sight`] for private memory in a transparent huge page, which is mapped as a whole or page by
/// page.
///
/// # Safety
///
/// `page` is in `folio`, which is large.
unsafe fn sight_of_part(
    folio: Folio<'_>,
    page: NonNull<bindings::page>,
    left: usize,
) -> (Sight, usize) {
    // SAFETY: A valid folio, by the type invariant, and a large one.
    if unsafe { ffi::pinbuf_folio_entire_mapcount(folio.0.as_ptr()) } > 0 {
        return (Sight::Seen, left);
    }
    if !cfg!(CONFIG_PAGE_MAPCOUNT) {
        // The kernel keeps no counter per page.
        let sight = if folio.is_mapped() {
            Sight::Unsure
        } else {
            Sight::Discarded
        };
        return (sight, left);
    }
    // When the kernel splits the mapping of a whole huge page, it maps the pages one by one before
    // it unmaps the whole. So the counter of the page has to be read after that of the whole.
    // SAFETY: Always allowed.
    unsafe { ffi::pinbuf_smp_rmb() };
    // SAFETY: A valid page, by the function's requirements. The counter may change meanwhile, so
    // the read is volatile. It is one less than the number of page table entries.
    let count =
        unsafe { (&raw const (*page.as_ptr()).__bindgen_anon_2._mapcount.counter).read_volatile() };
    (Sight::seen_if(count >= 0), 1)
}

/// The number of pages that are unpinned between two calls of [`cond_resched`].
const STRIDE: usize = 512;

/// Drops one pin of each of the `pages` pages from the frame `pfn` on, and marks their folios
/// dirty: a device may have written to them, which no page table records. May sleep.
///
/// # Safety
///
/// The caller owns a pin of each of these pages, and gives it up.
pub(crate) unsafe fn unpin_pages(array: PageArray, pfn: Pfn, pages: usize) {
    let mut done = 0;
    while done < pages {
        let count = (pages - done).min(STRIDE);
        // SAFETY: By the function's requirements.
        unsafe { bindings::unpin_user_page_range_dirty_lock(array.page(pfn + done), count, true) };
        done += count;
        if done < pages {
            cond_resched();
        }
    }
}

/// Drops one pin of each hugetlb folio that contains any of the `pages` adjacent pages from the
/// frame `pfn` on, and marks these folios dirty. May sleep.
///
/// # Safety
///
/// The caller owns one pin of each of these folios, and gives it up.
pub(crate) unsafe fn unpin_hugetlb(array: PageArray, pfn: Pfn, pages: usize) {
    let mut done = 0;
    while done < pages {
        let page = array.page(pfn + done);
        // SAFETY: By the function's requirements.
        let left = unsafe { left_in_folio(page) };
        // SAFETY: By the function's requirements; a pin of a page is one of its folio.
        unsafe { bindings::unpin_user_page_range_dirty_lock(page, 1, true) };
        done += left;
        cond_resched();
    }
}

/// The number of pages of a folio from `page` on.
///
/// # Safety
///
/// The page is pinned.
unsafe fn left_in_folio(page: *mut bindings::page) -> usize {
    // SAFETY: By the function's requirements.
    unsafe {
        let folio = ffi::pinbuf_page_folio(page);
        ffi::pinbuf_folio_nr_pages(folio) - distance(folio.cast(), page)
    }
}

/// Whether one of the `pages` adjacent pages from the frame `pfn` on, at least one, has been found
/// broken. With `hugetlb`, whose folios are broken as a whole, each folio is checked once.
///
/// # Safety
///
/// The frames are those of pinned pages, and all of these belong to hugetlb if `hugetlb` is set.
#[inline]
pub(crate) unsafe fn any_poisoned(array: PageArray, pfn: Pfn, pages: usize, hugetlb: bool) -> bool {
    let mut done = 0;
    while done < pages {
        let page = array.page(pfn + done);
        // SAFETY: By the function's requirements.
        if unsafe { ffi::pinbuf_is_page_hwpoison(page) } {
            return true;
        }
        done += if hugetlb {
            // SAFETY: By the function's requirements.
            unsafe { left_in_folio(page) }
        } else {
            1
        };
    }
    false
}
