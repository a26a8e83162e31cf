// SPDX-License-Identifier: GPL-2.0

//! User mappings of physical pages that their owner keeps in place. Faults fill them in: with a
//! huge entry where the address, the mapping and the memory allow it, and otherwise with all
//! entries of one page table at once.
//!
//! Such a mapping is a `VM_PFNMAP`: it holds no references to its pages, GUP refuses it, and it
//! does not grow. It must be shared, because a private mapping would need copies of the pages.
//!
//! The largest entry is a PMD. The mm core can split, move and protect a PMD that maps page frames,
//! but not a PUD: `move_page_tables()` takes it for a bad page table and clears it without a TLB
//! flush, so that the old address still reaches pages after they were freed; and splitting it, for
//! a partial `munmap()` or `mprotect()`, takes user data for a page table.
//!
//! # Broken memory
//!
//! A page that was found broken (`PG_hwpoison`) is not entered: an access to it raises `SIGBUS`.
//! Entries that were made before stay.
//!
//! # Locks
//!
//! Faults run under the mmap lock or the VMA lock, held for reading, and therefore concurrently.
//! Two faults in one block of the address space may choose differently between a huge entry and a
//! page table, because the conditions may change between them, and the core can replace neither
//! with the other. So both are installed under the lock of the block's PMD, and only in an empty
//! one. Only faults fill a block. Operations that empty it or split its entry hold one of the
//! core's locks for writing, with one exception: a page table that other VMAs use too may be
//! removed, but a block that lies in several VMAs never gets a huge entry.
//!
//! Faults share no lock of the driver, because they allocate page tables, and the memory cgroup of
//! one process may delay that for seconds.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/huge_mm.h`](srctree/include/linux/huge_mm.h).

use super::pages::{
    any_poisoned,
    PageArray,
    Pfn, //
};
use crate::ffi;
use core::{
    ffi::c_void,
    marker::PhantomData, //
};
#[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
use kernel::ffi::c_uint;
use kernel::{
    bindings,
    error::code,
    ffi::{
        c_int,
        c_ulong, //
    },
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// The number of entries of a page table, which is one page of 8-byte entries (`helpers.c` checks
/// that).
const TABLE_PAGES: usize = PAGE_SIZE / 8;

/// The number of bytes that a page table maps, as does a huge entry of the lowest level.
const TABLE_SIZE: usize = TABLE_PAGES * PAGE_SIZE;

/// The order of a huge entry of the lowest level.
#[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
const PMD_ORDER: c_uint = TABLE_PAGES.trailing_zeros();

/// Memory to be mapped.
///
/// # Safety
///
/// The frames that [`Pages::runs`] returns have `struct page`s, are those of pinned pages in
/// ordinary write-back memory, and stay the same while the value lives.
pub(crate) unsafe trait Pages: Send + Sync + 'static {
    /// The frames from the page `first` on, in order, as runs of adjacent frames: the first frame,
    /// and the number of frames. Empty beyond the end. Called under a spinlock: must not sleep.
    fn runs(&self, first: usize) -> impl Iterator<Item = (Pfn, usize)> + '_;

    /// Whether one of the `pages` pages from `first` on, all of which must exist, has been found
    /// broken. Must not sleep.
    fn any_poisoned(&self, first: usize, pages: usize) -> bool;
}

/// Makes `vma` a mapping of `pages`, from the page on that the VMA's page offset names. Fails with
/// `EINVAL` unless the VMA is shared, and with `EPERM` if it is executable.
///
/// # Safety
///
/// `vma` is being set up, in an `mmap` callback, and nothing has been mapped in it. `pages` lives
/// as long as the VMA and all VMAs that are split, copied or moved from it, which is the case if
/// the VMA's file owns it.
pub(crate) unsafe fn set_up<P: Pages>(vma: *mut bindings::vm_area_struct, pages: &P) -> Result {
    // SAFETY: `vma` is valid, by the function's requirements.
    let flags = unsafe { (*vma).__bindgen_anon_2.vm_flags };
    if flags & bindings::VM_SHARED == 0 {
        return Err(EINVAL);
    }
    if flags & bindings::VM_EXEC != 0 {
        return Err(EPERM);
    }
    let set = bindings::VM_PFNMAP | bindings::VM_DONTEXPAND | bindings::VM_DONTDUMP;
    let clear = bindings::VM_MIXEDMAP | bindings::VM_MAYEXEC;
    // SAFETY: As above; the VMA is not visible to others yet.
    unsafe { ffi::pinbuf_vm_flags_mod(vma, set, clear) };
    // SAFETY: As above.
    unsafe { (*vma).vm_private_data = core::ptr::from_ref(pages).cast_mut().cast() };
    // SAFETY: As above.
    unsafe { (*vma).vm_ops = Operations::<P>::VTABLE };
    Ok(())
}

/// Whether mappings may get huge entries on this kernel.
///
/// The page-table checker ignores special PTEs, but counts special PMDs as mappings of their pages,
/// and reports a second writable one of an anonymous page as a bug (up to 7.3 at least).
pub(crate) fn huge_entries_allowed() -> bool {
    // SAFETY: Reads a static key.
    cfg!(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP) && !unsafe { ffi::pinbuf_page_table_check_enabled() }
}

struct Operations<P>(PhantomData<P>);

impl<P: Pages> Operations<P> {
    const VTABLE: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
        fault: Some(fault::<P>),
        #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
        huge_fault: Some(huge_fault::<P>),
        ..pin_init::zeroed()
    };
}

/// The details of a fault.
struct Fault<'a, P> {
    vmf: *mut bindings::vm_fault,
    vma: *mut bindings::vm_area_struct,
    pages: &'a P,
    /// The addresses of the VMA's first byte and of the byte after its last one.
    start: usize,
    end: usize,
    /// The address of the page that was touched.
    address: usize,
    /// The index of that page in the memory.
    page: usize,
}

impl<'a, P: Pages> Fault<'a, P> {
    /// # Safety
    ///
    /// `vmf` is valid for `'a`, and its VMA was given to [`set_up`] with the same `P`.
    unsafe fn new(vmf: *mut bindings::vm_fault) -> Self {
        // SAFETY: By the function's requirements.
        let info = unsafe { &(*vmf).__bindgen_anon_1 };
        // SAFETY: The VMA of a fault is valid, and stable: one of its locks is held.
        let bounds = unsafe { &(*info.vma).__bindgen_anon_1.__bindgen_anon_1 };
        // SAFETY: `set_up` stored a pointer to a `P` there, which lives as long as the VMA.
        let pages = unsafe { &*(*info.vma).vm_private_data.cast::<P>() };
        Self {
            vmf,
            vma: info.vma,
            pages,
            start: bounds.vm_start,
            end: bounds.vm_end,
            address: info.address & !(PAGE_SIZE - 1),
            page: info.pgoff,
        }
    }

    /// Whether the block that contains the address has no entry yet.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    fn block_is_empty(&self) -> bool {
        // SAFETY: The fault's own PMD, which is valid while the fault is handled.
        unsafe { ffi::pinbuf_pmd_none((*self.vmf).pmd) }
    }

    /// Whether the block that contains the address has a huge entry.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    fn block_is_huge(&self) -> bool {
        // SAFETY: As above.
        unsafe { ffi::pinbuf_pmd_leaf((*self.vmf).pmd) }
    }

    /// The first page of the block that contains the address, and its frame, if a huge entry may be
    /// used: the whole aligned block lies in the VMA, in the memory and in one run of frames, and
    /// the first frame is aligned.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    fn huge_block(&self) -> Option<(usize, Pfn)> {
        let block = self.address & !(TABLE_SIZE - 1);
        if block < self.start || block > self.end || self.end - block < TABLE_SIZE {
            return None;
        }
        // Pages of the memory follow each other as addresses of the VMA do.
        let first = self
            .page
            .checked_sub((self.address - block) >> PAGE_SHIFT)?;
        let (pfn, pages) = self.pages.runs(first).next()?;
        (pages >= TABLE_PAGES && pfn % TABLE_PAGES == 0).then_some((first, pfn))
    }

    /// Enters a huge page, if the block has no entry, or a huge entry already.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    fn enter_huge(&self) -> bindings::vm_fault_t {
        let Some((first, pfn)) = self.huge_block().filter(|_| huge_entries_allowed()) else {
            return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
        };
        let huge = self.block_is_huge();
        if !huge && (!self.block_is_empty() || self.pages.any_poisoned(first, TABLE_PAGES)) {
            return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
        }
        // SAFETY: The fault is valid.
        let flags = unsafe { (*self.vmf).flags };
        // Only for an entry that exists. If another fault installs a page table meanwhile, the
        // function does nothing, but it would warn about a write.
        let write = huge && flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
        // SAFETY: The VMA is a shared `VM_PFNMAP`, and the entry's whole block lies within it.
        let result = unsafe { bindings::vmf_insert_pfn_pmd(self.vmf, pfn, write) };
        if self.block_is_huge() {
            result
        } else {
            bindings::vm_fault_reason_VM_FAULT_FALLBACK
        }
    }

    /// Fills in the page table around the address, as far as the VMA reaches.
    fn fill_table(&self) -> bindings::vm_fault_t {
        let block = self.address & !(TABLE_SIZE - 1);
        let low = block.max(self.start);
        let high = (block + TABLE_SIZE).min(self.end);
        let Some(first) = self.page.checked_sub((self.address - low) >> PAGE_SHIFT) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        if self.pages.runs(self.page).next().is_none() {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        }
        if self.pages.any_poisoned(self.page, 1) {
            return bindings::vm_fault_reason_VM_FAULT_HWPOISON;
        }
        // SAFETY: The fault is valid.
        if !unsafe { ffi::pinbuf_pmd_install(self.vmf) } {
            // Another fault has entered a huge page meanwhile. The access is retried.
            return bindings::vm_fault_reason_VM_FAULT_NOPAGE;
        }
        match enter_pages(self.vma, low, high, self.pages.runs(first)) {
            // `ENOMEM`: The page table has been removed meanwhile. The access is retried, and the
            // core allocates another one.
            Ok(()) | Err(code::ENOMEM) => bindings::vm_fault_reason_VM_FAULT_NOPAGE,
            Err(_) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

/// The progress of [`enter_page`].
struct Cursor<R> {
    vma: *mut bindings::vm_area_struct,
    array: PageArray,
    runs: R,
    /// The first frame of the current run that is left, and the number of frames that are left.
    pfn: Pfn,
    left: usize,
}

/// Enters the pages of `runs`, in order, at the addresses from `low` to `high`, which lie in one
/// page table of `vma`, where there is no entry yet. Fails with `ENOMEM` if the page table is gone
/// and cannot be replaced.
fn enter_pages<R: Iterator<Item = (Pfn, usize)>>(
    vma: *mut bindings::vm_area_struct,
    low: usize,
    high: usize,
    runs: R,
) -> Result {
    let mut cursor = Cursor {
        vma,
        array: PageArray::get(),
        runs,
        pfn: 0,
        left: 0,
    };
    // SAFETY: The range lies in the VMA, one of whose locks is held, and in one page table.
    // `enter_page::<R>` gets the pointer to `cursor`, and is called only before the function
    // returns.
    kernel::error::to_result(unsafe {
        bindings::apply_to_page_range(
            (*vma).vm_mm,
            low,
            high - low,
            Some(enter_page::<R>),
            (&raw mut cursor).cast(),
        )
    })
}

/// # Safety
///
/// Called by `apply_to_page_range` under the page table's lock, with a [`Cursor`] as `data`.
unsafe extern "C" fn enter_page<R: Iterator<Item = (Pfn, usize)>>(
    pte: *mut bindings::pte_t,
    address: c_ulong,
    data: *mut c_void,
) -> c_int {
    // SAFETY: By the function's requirements; nothing else uses the cursor meanwhile.
    let cursor = unsafe { &mut *data.cast::<Cursor<R>>() };
    if cursor.left == 0 {
        let Some((pfn, pages)) = cursor.runs.next() else {
            return EFAULT.to_errno();
        };
        (cursor.pfn, cursor.left) = (pfn, pages);
    }
    let pfn = cursor.pfn;
    cursor.pfn += 1;
    cursor.left -= 1;
    // SAFETY: `pte` belongs to `address` in this VMA, and its lock is held. `Pages` guarantees that
    // the frame is that of a pinned page.
    unsafe {
        if ffi::pinbuf_pte_none(pte) && !any_poisoned(cursor.array, pfn, 1, false) {
            ffi::pinbuf_set_pte_pfn(cursor.vma, address, pte, pfn);
        }
    }
    0
}

/// # Safety
///
/// Called by the kernel for a VMA that was given to [`set_up`] with the same `P`.
unsafe extern "C" fn fault<P: Pages>(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: By the function's requirements.
    unsafe { Fault::<P>::new(vmf) }.fill_table()
}

/// # Safety
///
/// Called by the kernel for a VMA that was given to [`set_up`] with the same `P`.
#[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
unsafe extern "C" fn huge_fault<P: Pages>(
    vmf: *mut bindings::vm_fault,
    order: c_uint,
) -> bindings::vm_fault_t {
    if order != PMD_ORDER {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    }
    // SAFETY: By the function's requirements.
    unsafe { Fault::<P>::new(vmf) }.enter_huge()
}
