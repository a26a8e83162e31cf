// SPDX-License-Identifier: GPL-2.0

//! Scatterlists over physical pages that somebody else keeps in place, mapped for a device.
//!
//! `kernel::scatterlist::SGTable` owns the pages it maps, from a `vmalloc` area; this one does not.
//!
//! C header: [`include/linux/scatterlist.h`](srctree/include/linux/scatterlist.h).

use super::sched::cond_resched;
use crate::ffi;
use kernel::{
    bindings,
    device::Device,
    dma::DataDirection,
    error::to_result,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::aref::ARef,
    types::Opaque, //
};

/// What a device can take in one scatterlist entry.
#[derive(Clone, Copy)]
pub(crate) struct SegmentLimits {
    /// The most pages, one at least.
    pages: usize,
    /// No entry may cross an address that is a multiple of this many pages (of a power of two);
    /// 0: any may.
    boundary: usize,
}

impl SegmentLimits {
    /// The limits of `dev`: what its driver declared, and what a bounce buffer holds if there is
    /// one.
    pub(crate) fn of(dev: &Device) -> Self {
        // SAFETY: `dev` is a valid device.
        let segment = unsafe { ffi::pinbuf_dma_get_max_seg_size(raw(dev)) } as usize;
        // SAFETY: `dev` is a valid device.
        let mapping = unsafe { bindings::dma_max_mapping_size(raw(dev)) };
        // SAFETY: `dev` is a valid device.
        let mask = unsafe { ffi::pinbuf_dma_get_seg_boundary(raw(dev)) };
        // The length of an entry is a `u32`.
        let bytes = segment.min(mapping).min(u32::MAX as usize);
        Self {
            pages: (bytes >> PAGE_SHIFT).max(1),
            boundary: (mask >> PAGE_SHIFT).wrapping_add(1),
        }
    }

    /// How many of `pages` pages from the frame `pfn` on fit into one entry.
    fn fit(self, pfn: usize, pages: usize) -> usize {
        let pages = pages.min(self.pages);
        if self.boundary <= 1 {
            pages
        } else {
            pages.min(self.boundary - (pfn & (self.boundary - 1)))
        }
    }
}

/// A scatterlist that is mapped for a device.
///
/// # Invariants
///
/// `table` is allocated and is mapped for `dev` in the direction `direction`.
pub(crate) struct MappedTable {
    table: Opaque<bindings::sg_table>,
    dev: ARef<Device>,
    direction: DataDirection,
}

// SAFETY: A scatterlist is plain memory, and any task may unmap it.
unsafe impl Send for MappedTable {}
// SAFETY: A shared reference only allows syncing, which the DMA API lets any number of tasks do.
unsafe impl Sync for MappedTable {}

impl MappedTable {
    /// Maps `runs`, pairs of a first page frame and a number of pages, for `dev`, with as few
    /// entries as its limits allow. May sleep.
    ///
    /// The memory of the list is charged to the caller's memory cgroup.
    ///
    /// # Safety
    ///
    /// The frames have `struct page`s, and these stay where they are while the value lives.
    pub(crate) unsafe fn new(
        dev: &Device,
        direction: DataDirection,
        runs: impl Iterator<Item = (usize, usize)> + Clone,
    ) -> Result<KBox<Self>> {
        let limits = SegmentLimits::of(dev);
        let count = segments(runs.clone(), limits).count();
        // The DMA API counts entries in an `int`.
        let count = i32::try_from(count).map_err(|_| ENOMEM)? as u32;

        let mut table = Table::new(count)?;
        table.fill(segments(runs, limits));

        let mapped = KBox::new_uninit(GFP_KERNEL_ACCOUNT)?;
        // SAFETY: `dev` is a valid device, and the list is filled with pages that stay in place, by
        // the function's requirements.
        to_result(unsafe {
            bindings::dma_map_sgtable(raw(dev), &mut table.0, direction.into(), 0)
        })?;
        // INVARIANT: Allocated and mapped just now.
        Ok(KBox::write(
            mapped,
            Self {
                table: Opaque::new(table.into_inner()),
                dev: ARef::from(dev),
                direction,
            },
        ))
    }

    /// The scatterlist, for C. Stays valid, and at the same address, while the box lives.
    pub(crate) fn as_raw(self: &KBox<Self>) -> *mut bindings::sg_table {
        self.table.get()
    }

    /// Makes what the device wrote visible to the CPU, if the CPU's access in `direction` meets
    /// what this mapping is for.
    pub(crate) fn sync_for_cpu(&self, direction: DataDirection) {
        if meet(self.direction, direction) {
            // SAFETY: Mapped for this device in this direction, by the type invariant.
            unsafe {
                ffi::pinbuf_dma_sync_sgtable_for_cpu(
                    raw(&self.dev),
                    self.table.get(),
                    self.direction.into(),
                )
            }
        }
    }

    /// Makes what the CPU wrote visible to the device, likewise.
    pub(crate) fn sync_for_device(&self, direction: DataDirection) {
        if meet(self.direction, direction) {
            // SAFETY: Mapped for this device in this direction, by the type invariant.
            unsafe {
                ffi::pinbuf_dma_sync_sgtable_for_device(
                    raw(&self.dev),
                    self.table.get(),
                    self.direction.into(),
                )
            }
        }
    }
}

impl Drop for MappedTable {
    fn drop(&mut self) {
        // SAFETY: Mapped for this device in this direction, by the type invariant, and used no
        // more.
        unsafe {
            ffi::pinbuf_dma_unmap_sgtable(raw(&self.dev), self.table.get(), self.direction.into())
        };
        // SAFETY: Allocated, by the type invariant, and used no more.
        unsafe { bindings::sg_free_table(self.table.get()) };
    }
}

/// The C device: `Device::as_raw` is private to the `kernel` crate.
fn raw(dev: &Device) -> *mut bindings::device {
    // `Device` is transparent over `Opaque<bindings::device>`.
    core::ptr::from_ref(dev).cast_mut().cast()
}

/// A mapping is synced with its own direction, or not at all: with another one the DMA API would
/// complain. A CPU that only reads need not be told of a device that only reads.
fn meet(a: DataDirection, b: DataDirection) -> bool {
    a == b || a == DataDirection::Bidirectional || b == DataDirection::Bidirectional
}

/// Cuts runs into entries.
fn segments(
    runs: impl Iterator<Item = (usize, usize)>,
    limits: SegmentLimits,
) -> impl Iterator<Item = (usize, usize)> {
    runs.flat_map(move |(pfn, pages)| {
        let mut done = 0;
        core::iter::from_fn(move || {
            let left = pages - done;
            if left == 0 {
                return None;
            }
            let first = pfn + done;
            let fit = limits.fit(first, left);
            done += fit;
            Some((first, fit))
        })
    })
}

/// A scatterlist that is not mapped.
///
/// # Invariants
///
/// The list is allocated.
struct Table(bindings::sg_table);

impl Table {
    fn new(entries: u32) -> Result<Self> {
        let mut table = bindings::sg_table::default();
        // SAFETY: `table` is ours; the function initialises it. The list is a chain of pages.
        to_result(unsafe {
            bindings::sg_alloc_table(&mut table, entries, bindings::GFP_KERNEL_ACCOUNT)
        })?;
        Ok(Self(table))
    }

    fn fill(&mut self, segments: impl Iterator<Item = (usize, usize)>) {
        let mut sg = self.0.sgl;
        for (index, (pfn, pages)) in segments.enumerate() {
            if index > 0 {
                // SAFETY: There is one entry for each segment, and this is not the last one.
                sg = unsafe { ffi::pinbuf_sg_next(sg) };
                if index % 4096 == 0 {
                    cond_resched();
                }
            }
            // SAFETY: The frame has a `struct page`, as `MappedTable::new` demands.
            let page = unsafe { ffi::pinbuf_pfn_to_page(pfn) };
            // SAFETY: `sg` is an entry of the list; the length fits, by `SegmentLimits`.
            unsafe { ffi::pinbuf_sg_set_page(sg, page, (pages * PAGE_SIZE) as u32) };
        }
    }

    fn into_inner(self) -> bindings::sg_table {
        let table = self.0;
        core::mem::forget(self);
        table
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: Allocated, by the type invariant, and used no more.
        unsafe { bindings::sg_free_table(&mut self.0) };
    }
}
