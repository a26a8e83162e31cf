// SPDX-License-Identifier: GPL-2.0

//! A buffer: its pinned pages, their charge, and how they are exported.

use crate::{
    charge::Charge,
    extents::Kind,
    kernel_ext::{
        dma_buf::{
            Exporter,
            Operations, //
        },
        pages::{
            any_poisoned,
            PageArray, //
        },
        pfn_map,
        sched,
        sg_table::Prepared,
        vmap, //
    },
    pin::held::Held, //
};
use core::{
    ffi::c_void,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device::Device,
    dma::DataDirection,
    page::PAGE_SHIFT,
    prelude::*, //
};

/// The pages of one dma-buf.
pub(crate) struct Buffer {
    // Fields are dropped in this order: the pages are unpinned before they are uncharged.
    held: Held,
    /// The number of pages of large folios that the buffer keeps in place besides its own pages.
    rest: usize,
    charge: Charge,
}

impl Buffer {
    /// Creates a buffer of at least one page.
    pub(crate) fn new(held: Held, rest: usize, charge: Charge) -> Self {
        Self { held, rest, charge }
    }

    /// The pages.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// The number of pages that the buffer keeps in place besides its own.
    pub(crate) fn rest(&self) -> usize {
        self.rest
    }

    /// The charge.
    pub(crate) fn charge(&self) -> &Charge {
        &self.charge
    }

    /// First frame and length of each extent.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + Clone + '_ {
        self.held.extents().iter().map(|run| (run.pfn, run.pages))
    }

    /// Fails with `EHWPOISON` if memory of the buffer was found broken after it was pinned, so that
    /// no device and no part of the kernel gets to use it.
    fn check_poison(&self) -> Result {
        const AT_ONCE: usize = 4096;
        let pages = self.held.extents().pages();
        for first in (0..pages).step_by(AT_ONCE) {
            if pfn_map::Pages::any_poisoned(self, first, AT_ONCE.min(pages - first)) {
                return Err(Error::from_errno(-(bindings::EHWPOISON as i32)));
            }
            sched::cond_resched();
        }
        Ok(())
    }

    /// The address of the buffer in the direct map, if the buffer is a single extent. The result
    /// never changes.
    fn direct(&self) -> Option<NonNull<c_void>> {
        let mut runs = self.runs();
        let (pfn, _) = runs.next()?;
        if runs.next().is_some() {
            return None;
        }
        // SAFETY: The frame is that of a pinned page, so it has a `struct page`.
        unsafe { vmap::direct(pfn) }
    }
}

// SAFETY: The frames are those of pinned pages, which stay in place until the buffer is dropped.
// `pin` accepts only anonymous memory, shmem and hugetlb, which are ordinary write-back memory.
unsafe impl pfn_map::Pages for Buffer {
    fn runs(&self, first: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let extents = self.held.extents();
        extents.iter_from(first).map(|run| (run.pfn, run.pages))
    }

    fn any_poisoned(&self, first: usize, pages: usize) -> bool {
        let array = PageArray::get();
        let mut left = pages;
        for run in self.held.extents().iter_from(first) {
            let (pages, hugetlb) = (run.pages.min(left), run.kind == Kind::Hugetlb);
            // SAFETY: The pages are pinned while the buffer lives, and those of an extent of
            // `Kind::Hugetlb` all belong to hugetlb.
            if unsafe { any_poisoned(array, run.pfn, pages, hugetlb) } {
                return true;
            }
            left -= pages;
            if left == 0 {
                break;
            }
        }
        false
    }
}

static OPERATIONS: Operations<Buffer> = Operations::new();

impl Exporter for Buffer {
    const NAME: &'static CStr = c"pinbuf";

    fn operations() -> &'static Operations<Self> {
        &OPERATIONS
    }

    fn size(&self) -> usize {
        self.held.extents().pages() << PAGE_SHIFT
    }

    fn prepare<'a>(&self, dev: &'a Device, direction: DataDirection) -> Result<Prepared<'a>> {
        self.check_poison()?;
        // SAFETY: The pages are pinned while the buffer lives, and the buffer outlives its
        // mappings: the importer that maps it holds a reference to the dma-buf.
        unsafe { Prepared::new(dev, direction, self.runs()) }
    }

    unsafe fn mmap(&self, vma: *mut bindings::vm_area_struct) -> Result {
        // SAFETY: By the function's requirements.
        unsafe { pfn_map::set_up(vma, self) }
    }

    fn vmap(&self) -> Result<NonNull<c_void>> {
        self.check_poison()?;
        if let Some(address) = self.direct() {
            return Ok(address);
        }
        // SAFETY: The pages are pinned while the buffer lives, and the buffer outlives its
        // mappings.
        unsafe { vmap::map(self.runs(), self.held.extents().pages()) }
    }

    unsafe fn vunmap(&self, address: NonNull<c_void>) {
        if self.direct().is_none() {
            // SAFETY: By the function's requirements; the address came from `vmap::map`, because
            // `direct` always returns the same result.
            unsafe { vmap::unmap(address) };
        }
    }
}
