// SPDX-License-Identifier: GPL-2.0

//! User mappings of physical pages that somebody else keeps in place, filled in as they are
//! touched: with a huge entry where the address, the mapping and the memory allow it, and otherwise
//! with all entries of one page table at once.
//!
//! Such a mapping is a `VM_PFNMAP`: its pages are not reference-counted through it, GUP refuses it,
//! and it does not grow. It must be shared; a private one would need copies.
//!
//! The largest entry is a PMD's. The mm core can split, move and protect a PMD of page frames, and
//! cannot do that to a PUD: `move_page_tables()` takes it for a bad page table and drops it without
//! a TLB flush, so that the old address goes on reaching pages that were freed since, and splitting
//! one for a partial `munmap()` or `mprotect()` takes user data for a page table.
//!
//! # Broken memory
//!
//! A page that was found broken (`PG_hwpoison`) is not entered: touching it is `SIGBUS`. What was
//! entered before stays.
//!
//! # Locks
//!
//! Faults run under the mmap lock or the VMA's, held for reading, and so concurrently. What a block
//! of the address space gets, a huge entry or a page table, depends on things that may change
//! meanwhile, and the core cannot cope with two faults that disagree: neither with a huge entry where
//! a page table is, nor the other way round. So a fault takes [`Pages::faults`], and looks at
//! what the block has before it enters anything. Only faults enter something into an empty block;
//! what takes entries away or apart holds one of the core's locks for writing.
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
use kernel::{
    bindings,
    ffi::{
        c_int,
        c_uint,
        c_ulong, //
    },
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::Mutex, //
};

/// Entries of a page table: it is a page of 8-byte entries (`helpers.c` checks that).
const TABLE_PAGES: usize = PAGE_SIZE / 8;

/// Bytes that a page table maps, and so a huge entry of the lowest level.
const TABLE_SIZE: usize = TABLE_PAGES * PAGE_SIZE;

/// The order of a huge entry of the lowest level.
const PMD_ORDER: c_uint = TABLE_PAGES.trailing_zeros();

/// Memory to be mapped.
///
/// # Safety
///
/// The frames that [`Pages::runs`] gives have `struct page`s that are pinned, are ordinary write-back
/// memory, and stay the same while the value lives.
pub(crate) unsafe trait Pages: Send + Sync + 'static {
    /// The frames from the page `first` on, in order: the first of adjacent frames, and how many
    /// they are. Nothing behind the end. Called under a spinlock: must not sleep.
    fn runs(&self, first: usize) -> impl Iterator<Item = (Pfn, usize)> + '_;

    /// Whether one of `pages` pages from `first` on, all of which are there, has been found broken. Must not sleep.
    fn any_poisoned(&self, first: usize, pages: usize) -> bool;

    /// A lock for this file alone.
    fn faults(&self) -> &Mutex<()>;
}

/// Makes `vma` a mapping of `pages`, of which the VMA's page offset is the first page that it
/// shows. Fails with `EINVAL` unless it is shared, and with `EPERM` if it is executable.
///
/// # Safety
///
/// `vma` is being set up, in an `mmap` callback, and nothing has been mapped in it. `pages` lives
/// as long as the VMA and all that are split, copied or moved from it, as it does when the VMA's
/// file owns it.
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
/// The page-table checker overlooks special PTEs, but counts special PMDs as mappings of their
/// pages, and takes a second writable one of an anonymous page for a bug (up to 7.3 at least).
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

/// What a fault is about.
struct Fault<'a, P> {
    vmf: *mut bindings::vm_fault,
    vma: *mut bindings::vm_area_struct,
    pages: &'a P,
    /// The VMA's bounds, bytes.
    start: usize,
    end: usize,
    /// The address of the page that was touched.
    address: usize,
    /// The same as a page of the memory.
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
        // SAFETY: `set_up` put a pointer to a `P` there that lives as long as the VMA.
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

    /// Whether the block that the address is in has nothing yet.
    fn block_is_empty(&self) -> bool {
        // SAFETY: The fault's own entry, which is valid while it is handled.
        unsafe { ffi::pinbuf_pmd_none((*self.vmf).pmd) }
    }

    /// Whether the block that the address is in has a huge entry.
    fn block_is_huge(&self) -> bool {
        // SAFETY: As above.
        unsafe { ffi::pinbuf_pmd_leaf((*self.vmf).pmd) }
    }

    /// The first page of the block that the address is in, and its frame, if a huge entry may be
    /// used: the whole aligned block lies in the VMA, in the memory and in one run of frames, and the
    /// first frame is aligned.
    fn huge_block(&self) -> Option<(usize, Pfn)> {
        let block = self.address & !(TABLE_SIZE - 1);
        if block < self.start || block > self.end || self.end - block < TABLE_SIZE {
            return None;
        }
        // Pages of the memory are counted as the VMA's addresses are.
        let first = self
            .page
            .checked_sub((self.address - block) >> PAGE_SHIFT)?;
        let (pfn, pages) = self.pages.runs(first).next()?;
        (pages >= TABLE_PAGES && pfn % TABLE_PAGES == 0).then_some((first, pfn))
    }

    /// Enters a huge page, if the block has nothing or that already.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    fn enter_huge(&self) -> bindings::vm_fault_t {
        let Some((first, pfn)) = self.huge_block().filter(|_| huge_entries_allowed()) else {
            return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
        };
        let _lock = self.pages.faults().lock();
        let empty = self.block_is_empty();
        if !empty && !self.block_is_huge() {
            return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
        }
        if empty && self.pages.any_poisoned(first, TABLE_PAGES) {
            return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
        }
        // SAFETY: The fault is valid.
        let flags = unsafe { (*self.vmf).flags };
        let write = flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
        // SAFETY: The VMA is a shared `VM_PFNMAP`, and the entry's whole block lies within it.
        unsafe { bindings::vmf_insert_pfn_pmd(self.vmf, pfn, write) }
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
        let _lock = self.pages.faults().lock();
        if self.block_is_huge() {
            // Another fault was here in between. The access is made again.
            return bindings::vm_fault_reason_VM_FAULT_NOPAGE;
        }
        match enter_pages(self.vma, low, high, self.pages.runs(first)) {
            Ok(()) => bindings::vm_fault_reason_VM_FAULT_NOPAGE,
            Err(error) if error == ENOMEM => bindings::vm_fault_reason_VM_FAULT_OOM,
            Err(_) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

/// How far [`enter_page`] has come.
struct Cursor<R> {
    vma: *mut bindings::vm_area_struct,
    array: PageArray,
    runs: R,
    /// Frames of the last run that are left.
    pfn: Pfn,
    left: usize,
}

/// Enters pages at the addresses from `low` to `high`, which lie in one page table of `vma`, in the
/// order of `runs`, where there is nothing yet.
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
    // `enter_page::<R>` gets the pointer to `cursor`, and is called before the function returns.
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
    // SAFETY: By the function's requirements; the cursor is in use nowhere else meanwhile.
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
    // the frame is of a pinned page.
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
