// SPDX-License-Identifier: GPL-2.0

//! A buffer: pinned pages, who is charged for them, and how they are exported.

use crate::{
    charge::Charge,
    kernel_ext::{
        dma_buf::{
            Exporter,
            Operations, //
        },
        pfn_map,
        sg_table::MappedTable,
        vmap, //
    },
    pins::Pins, //
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
    // Dropped in this order: the pages go before their charge does.
    pins: Pins,
    charge: Charge,
}

impl Buffer {
    /// A buffer of at least one page.
    pub(crate) fn new(pins: Pins, charge: Charge) -> Self {
        Self { pins, charge }
    }

    /// The pages.
    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The charge.
    pub(crate) fn charge(&self) -> &Charge {
        &self.charge
    }

    /// First frame and length of each extent.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + Clone + '_ {
        self.pins.map().iter().map(|run| (run.pfn, run.pages))
    }

    /// Where the direct map has all of the buffer in one piece, if it does. Always the same.
    fn direct(&self) -> Option<NonNull<c_void>> {
        let map = self.pins.map();
        if map.extents() != 1 {
            return None;
        }
        let first = map.find(0, 1)?;
        // SAFETY: A pinned page.
        unsafe { vmap::direct(first.pfn) }
    }
}

// SAFETY: The frames are those of pinned pages, which stay in place until the buffer is dropped.
// `Pinner` takes anonymous memory, page cache and device memory that the kernel lets be pinned for
// long, and no pages that a driver may have mapped with another memory type.
unsafe impl pfn_map::Pages for Buffer {
    fn run(&self, page: usize, max: usize) -> Option<(usize, usize)> {
        let run = self.pins.map().find(page, max)?;
        Some((run.pfn, run.pages))
    }

    fn frames(&self, page: usize, out: &mut [usize]) -> usize {
        self.pins.map().frames(page, out)
    }
}

static OPERATIONS: Operations<Buffer> = Operations::new();

impl Exporter for Buffer {
    const NAME: &'static CStr = c"pinbuf";

    fn operations() -> &'static Operations<Self> {
        &OPERATIONS
    }

    fn size(&self) -> usize {
        self.pins.map().pages() << PAGE_SHIFT
    }

    fn map(&self, dev: &Device, direction: DataDirection) -> Result<KBox<MappedTable>> {
        // SAFETY: The pages are pinned while the buffer lives, and it outlives its mappings: the
        // importer that maps it holds the dma-buf.
        unsafe { MappedTable::new(dev, direction, self.runs()) }
    }

    unsafe fn mmap(&self, vma: *mut bindings::vm_area_struct) -> Result {
        // SAFETY: By the function's requirements.
        unsafe { pfn_map::set_up(vma, self) }
    }

    fn vmap(&self) -> Result<NonNull<c_void>> {
        if let Some(address) = self.direct() {
            return Ok(address);
        }
        // SAFETY: The pages are pinned while the buffer lives, and it outlives its mappings.
        unsafe { vmap::map(self.runs(), self.pins.map().pages()) }
    }

    unsafe fn vunmap(&self, address: NonNull<c_void>) {
        if self.direct().is_none() {
            // SAFETY: By the function's requirements; it came from `vmap::map`, as `direct` always
            // gives the same answer.
            unsafe { vmap::unmap(address) };
        }
    }
}
