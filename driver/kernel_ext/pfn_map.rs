// SPDX-License-Identifier: GPL-2.0

//! User mappings of physical pages that somebody else keeps in place, filled in as they are
//! touched: with huge entries where the address, the mapping and the memory allow it, several at
//! once ([`AROUND`]), and otherwise with all entries of one page table at once.
//!
//! The largest entry is a PMD's. The mm core can split, move and protect a PMD of page frames, and
//! cannot do that to a PUD: `move_page_tables()` takes it for a bad page table and drops it without
//! a TLB flush, so that the old address goes on reaching pages that were freed since, and splitting
//! one for a partial `munmap()` or `mprotect()` takes user data for a page table.
//!
//! Such a mapping is a `VM_PFNMAP`: its pages are not reference-counted through it, GUP refuses it,
//! and it does not grow. It must be shared; a private one would need copies.
//!
//! # Context
//!
//! Faults run under the mmap lock, held for reading, and so concurrently. They only fill in empty
//! entries, and whether a block gets a huge entry or a page table is the same for all of them:
//! what that depends on changes under the mmap lock held for writing alone. (Hence faults under the
//! VMA's own lock are sent back; `PR_SET_THP_DISABLE` does not wait for these.) Nothing here takes
//! a lock but the page tables' own.
//!
//! C headers: [`include/linux/mm.h`](srctree/include/linux/mm.h),
//! [`include/linux/huge_mm.h`](srctree/include/linux/huge_mm.h).

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
    prelude::*, //
};

/// Bytes that one page table maps, and so one huge entry of the lowest level.
const TABLE_SIZE: usize = 1 << bindings::PMD_SHIFT;

/// Blocks that one fault fills in with huge entries: the aligned group, of so many, that it is in.
/// A fault costs what some fifteen entries cost.
const AROUND: usize = 16;

/// Frames that are looked up at once when a page table is filled in: half a kilobyte of stack.
const AHEAD: usize = 64;

/// Memory to be mapped.
///
/// # Safety
///
/// The frames that the functions tell have `struct page`s, are ordinary write-back memory, and
/// stay the same, and in place, while the value lives.
pub(crate) unsafe trait Pages: Send + Sync + 'static {
    /// The frame of the page `page`, and how many pages from it on, at most `max`, follow each
    /// other physically. `None` behind the end.
    fn run(&self, page: usize, max: usize) -> Option<(usize, usize)>;

    /// Writes the frames of the pages from `page` on to `out`, and returns how many; one at least
    /// unless `page` is behind the end. Called under a spinlock: must not sleep.
    fn frames(&self, page: usize, out: &mut [usize]) -> usize;
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
    if !unsafe { ffi::pinbuf_vma_is_shared(vma) } {
        return Err(EINVAL);
    }
    // SAFETY: As above.
    if unsafe { ffi::pinbuf_vma_is_exec(vma) } {
        return Err(EPERM);
    }
    // SAFETY: As above; the VMA is not visible to others yet.
    unsafe { ffi::pinbuf_vma_set_pfnmap(vma) };
    // SAFETY: As above.
    unsafe { (*vma).vm_private_data = core::ptr::from_ref(pages).cast_mut().cast() };
    // SAFETY: As above.
    unsafe { (*vma).vm_ops = Operations::<P>::VTABLE };
    Ok(())
}

/// Whether mappings may get huge entries on this kernel.
pub(crate) fn huge_entries_allowed() -> bool {
    // SAFETY: Reads a static key.
    cfg!(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP) && unsafe { ffi::pinbuf_huge_pfns_allowed() }
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
    vma: *mut bindings::vm_area_struct,
    pages: &'a P,
    /// The VMA's bounds, bytes.
    start: usize,
    end: usize,
    /// The address of the page that was touched.
    address: usize,
    /// The same as a page of the memory.
    page: usize,
    /// The access is a write.
    write: bool,
}

impl<'a, P: Pages> Fault<'a, P> {
    /// # Safety
    ///
    /// `vmf` is valid for `'a`, and its VMA was given to [`set_up`] with the same `P`.
    unsafe fn new(vmf: *const bindings::vm_fault) -> Self {
        // SAFETY: By the function's requirements.
        let info = unsafe { &(*vmf).__bindgen_anon_1 };
        // SAFETY: The VMA of a fault is valid, and stable: one of its locks is held.
        let bounds = unsafe { &(*info.vma).__bindgen_anon_1.__bindgen_anon_1 };
        // SAFETY: `set_up` put a pointer to a `P` there that lives as long as the VMA.
        let pages = unsafe { &*(*info.vma).vm_private_data.cast::<P>() };
        Self {
            vma: info.vma,
            pages,
            start: bounds.vm_start,
            end: bounds.vm_end,
            address: info.address & !(PAGE_SIZE - 1),
            page: info.pgoff,
            // SAFETY: By the function's requirements.
            write: unsafe { (*vmf).flags } & bindings::fault_flag_FAULT_FLAG_WRITE != 0,
        }
    }

    /// The frame that a huge entry of `1 << order` pages for the address `block` would begin with,
    /// if one may be used: the whole block is aligned and lies in the VMA, in the memory and in one
    /// run of frames, and the first frame is aligned.
    fn huge_frame(&self, block: usize, order: c_uint) -> Option<usize> {
        let count = 1usize.checked_shl(order)?;
        let size = count.checked_mul(PAGE_SIZE)?;
        if block < self.start || block > self.end || self.end - block < size {
            return None;
        }
        // Pages of the memory are counted as the VMA's addresses are.
        let first = (self.page + (block >> PAGE_SHIFT)).checked_sub(self.address >> PAGE_SHIFT)?;
        let (pfn, pages) = self.pages.run(first, count)?;
        (pages == count && pfn & (count - 1) == 0).then_some(pfn)
    }

    /// Fills in huge entries for blocks near that of the address, where there is nothing yet.
    ///
    /// # Safety
    ///
    /// `vmf` is the fault's, at the level of PMDs.
    #[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
    unsafe fn fill_around(&self, vmf: *mut bindings::vm_fault) {
        // One lower table holds as many entries as a page table does, which is a multiple of
        // `AROUND`: the group lies in one.
        const { assert!(bindings::PTRS_PER_PMD as usize % AROUND == 0) };
        let here = self.address / TABLE_SIZE;
        let group = here - here % AROUND;
        for block in (group..group + AROUND).filter(|block| *block != here) {
            let Some(pfn) = self.huge_frame(block * TABLE_SIZE, bindings::PMD_ORDER) else {
                continue;
            };
            let distance = block.wrapping_sub(here) as isize;
            // SAFETY: By the function's requirements. The block lies in the VMA, and in the same
            // table of entries.
            unsafe { ffi::pinbuf_insert_pfn_pmd_near(vmf, distance, pfn, self.write) };
        }
    }

    /// Fills in the page table around the address, as far as VMA and memory reach.
    fn fill_table(&self) -> c_uint {
        let block = self.address & !(TABLE_SIZE - 1);
        let low = block.max(self.start);
        let high = (block + TABLE_SIZE).min(self.end);
        let Some(first) = self.page.checked_sub((self.address - low) >> PAGE_SHIFT) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        let mut cursor = Cursor {
            vma: self.vma,
            pages: self.pages,
            page: first,
            frames: [0; AHEAD],
            next: 0,
            count: 0,
        };
        // SAFETY: The range lies in the VMA and in one page table. `set_entry::<P>` gets the
        // pointer to `cursor`, and is called before the function returns.
        let error = unsafe {
            bindings::apply_to_page_range(
                (*self.vma).vm_mm,
                low,
                high - low,
                Some(set_entry::<P>),
                (&raw mut cursor).cast(),
            )
        };
        match error {
            0 => bindings::vm_fault_reason_VM_FAULT_NOPAGE,
            // The memory ends before the VMA does. That is an error only for who touches it.
            _ if cursor.page > self.page => bindings::vm_fault_reason_VM_FAULT_NOPAGE,
            _ if error == ENOMEM.to_errno() => bindings::vm_fault_reason_VM_FAULT_OOM,
            _ => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

/// How far [`set_entry`] has come.
struct Cursor<'a, P> {
    vma: *mut bindings::vm_area_struct,
    pages: &'a P,
    /// The next page of the memory.
    page: usize,
    /// Frames that were asked for ahead: `next` is the next one, `count` how many there are.
    frames: [usize; AHEAD],
    next: usize,
    count: usize,
}

/// # Safety
///
/// Called by `apply_to_page_range` under the page table's lock, with a [`Cursor`] as `data`.
unsafe extern "C" fn set_entry<P: Pages>(
    pte: *mut bindings::pte_t,
    address: c_ulong,
    data: *mut c_void,
) -> c_int {
    // SAFETY: By the function's requirements; the cursor is in use nowhere else meanwhile.
    let cursor = unsafe { &mut *data.cast::<Cursor<'_, P>>() };
    if cursor.next == cursor.count {
        cursor.count = cursor.pages.frames(cursor.page, &mut cursor.frames);
        cursor.next = 0;
    }
    let Some(pfn) = cursor.frames[..cursor.count].get(cursor.next) else {
        return EFAULT.to_errno();
    };
    // SAFETY: `pte` belongs to `address` in this VMA, and its lock is held.
    unsafe { ffi::pinbuf_set_pte_pfn(cursor.vma, address, pte, *pfn) };
    cursor.next += 1;
    cursor.page += 1;
    0
}

/// # Safety
///
/// Called by the kernel for a VMA that was given to [`set_up`] with the same `P`.
unsafe extern "C" fn fault<P: Pages>(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: By the function's requirements.
    let fault = unsafe { Fault::<P>::new(vmf) };
    fault.fill_table()
}

/// # Safety
///
/// Called by the kernel for a VMA that was given to [`set_up`] with the same `P`.
#[cfg(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP)]
unsafe extern "C" fn huge_fault<P: Pages>(
    vmf: *mut bindings::vm_fault,
    order: c_uint,
) -> bindings::vm_fault_t {
    // Nothing larger than a PMD: the core cannot take a PUD of page frames apart.
    if order != bindings::PMD_ORDER {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    }
    // SAFETY: By the function's requirements.
    let fault = unsafe { Fault::<P>::new(vmf) };
    let frame = fault.huge_frame(fault.address & !(TABLE_SIZE - 1), order);
    let Some(pfn) = frame.filter(|_| huge_entries_allowed()) else {
        return bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    };
    // SAFETY: By the function's requirements.
    if unsafe { (*vmf).flags } & bindings::fault_flag_FAULT_FLAG_VMA_LOCK != 0 {
        // SAFETY: The flag says that the VMA's lock is held; whoever answers so gives it up.
        unsafe { bindings::vma_end_read(fault.vma) };
        return bindings::vm_fault_reason_VM_FAULT_RETRY;
    }
    // SAFETY: The VMA is a shared `VM_PFNMAP`, and the entry's whole block lies within it.
    let result = unsafe { bindings::vmf_insert_pfn_pmd(vmf, pfn, fault.write) };
    if result == bindings::vm_fault_reason_VM_FAULT_NOPAGE {
        // SAFETY: By the function's requirements.
        unsafe { fault.fill_around(vmf) };
    }
    result
}
