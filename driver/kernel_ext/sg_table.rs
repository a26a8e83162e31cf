// SPDX-License-Identifier: GPL-2.0

//! Scatterlists of physical pages that their owner keeps in place, mapped for a device.
//!
//! `kernel::scatterlist::SGTable` owns the pages that it maps, which are those of a `vmalloc` area.
//! The type of this file does not own its pages.
//!
//! C header: [`include/linux/scatterlist.h`](srctree/include/linux/scatterlist.h).

use super::{
    pages::PageArray,
    sched::cond_resched, //
};
use crate::ffi;
use core::mem::MaybeUninit;
use kernel::{
    bindings,
    device::Device,
    dma::DataDirection,
    error::to_result,
    ffi::c_ulong,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::aref::ARef,
    types::Opaque, //
};

/// What a device accepts in one scatterlist entry.
#[derive(Clone, Copy)]
pub(crate) struct SegmentLimits {
    /// The maximum number of pages, at least one.
    pages: usize,
    /// No entry may cross an address that is a multiple of this number of pages, which is a power
    /// of two.
    boundary: usize,
}

impl SegmentLimits {
    /// The limits of `dev`: those that its driver declared, and the size of a bounce buffer if the
    /// device may need one. Fails with `EINVAL` if the device does not accept a whole page in one
    /// entry, because entries consist of whole pages.
    pub(crate) fn of(dev: &Device) -> Result<Self> {
        // SAFETY: `dev` is a valid device.
        let segment = unsafe { ffi::pinbuf_dma_get_max_seg_size(raw(dev)) } as usize;
        // SAFETY: `dev` is a valid device.
        let mapping = unsafe { bindings::dma_max_mapping_size(raw(dev)) };
        // SAFETY: `dev` is a valid device.
        let mask = unsafe { ffi::pinbuf_dma_get_seg_boundary(raw(dev)) };
        // `segment` is an `unsigned int` in C, as the length of an entry is.
        let bytes = segment.min(mapping);
        if bytes < PAGE_SIZE || mask < PAGE_SIZE - 1 {
            return Err(EINVAL);
        }
        Ok(Self {
            pages: bytes >> PAGE_SHIFT,
            boundary: (mask >> PAGE_SHIFT) + 1,
        })
    }

    /// The number of pages, of the `pages` pages from the frame `pfn` on, that fit into one entry.
    fn fit(self, pfn: usize, pages: usize) -> usize {
        let to_boundary = self.boundary - (pfn & (self.boundary - 1));
        pages.min(self.pages).min(to_boundary)
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
    bounces: bool,
    /// DMA attributes for unmapping.
    unmap: c_ulong,
}

// SAFETY: A scatterlist is plain memory, and any task may unmap it.
unsafe impl Send for MappedTable {}
// SAFETY: A shared reference only allows syncing, which any number of tasks may do by the rules of
// the DMA API.
unsafe impl Sync for MappedTable {}

/// A scatterlist that is allocated and filled, and is going to be mapped for `dev`.
pub(crate) struct Prepared<'a> {
    table: Table,
    dev: &'a Device,
    direction: DataDirection,
    room: KBox<MaybeUninit<MappedTable>>,
}

impl<'a> Prepared<'a> {
    /// Allocates a scatterlist of `runs`, pairs of a first page frame and a number of pages, for
    /// `dev`, with as few entries as the device's limits allow. May sleep, for seconds where the
    /// caller's memory cgroup is short of memory: the list is charged to it.
    ///
    /// # Safety
    ///
    /// The frames have `struct page`s, and their pages stay in place while the value lives, and
    /// while the mapping lives that is made of it.
    pub(crate) unsafe fn new(
        dev: &'a Device,
        direction: DataDirection,
        runs: impl Iterator<Item = (usize, usize)> + Clone,
    ) -> Result<Self> {
        let limits = SegmentLimits::of(dev)?;
        let count = segments(runs.clone(), limits).count();
        // The DMA API counts entries in an `int`.
        let count = i32::try_from(count).map_err(|_| ENOMEM)? as u32;

        let mut table = Table::new(count)?;
        table.fill(segments(runs, limits));

        // What the CPU writes has to reach the bounce buffers even if only the device is declared
        // to write, because they are copied back as a whole afterwards. With a device that is not
        // coherent, it has to reach memory: the next access by the CPU begins with dropping what
        // caches hold, and a line that is written back late replaces what the device wrote.
        let direction = match direction {
            DataDirection::FromDevice if may_bounce(dev) || !is_coherent(dev) => {
                DataDirection::Bidirectional
            }
            direction => direction,
        };
        Ok(Self {
            table,
            dev,
            direction,
            room: KBox::new_uninit(GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// Maps it. May sleep.
    pub(crate) fn map(mut self) -> Result<KBox<MappedTable>> {
        // SAFETY: `dev` is a valid device, and the list is filled with pages that stay in place, by
        // the requirements of `new`.
        to_result(unsafe {
            let dev = raw(self.dev);
            bindings::dma_map_sgtable(dev, &mut self.table.0, self.direction.into(), 0)
        })?;
        // INVARIANT: Allocated, and mapped above.
        let mut mapped = KBox::write(
            self.room,
            MappedTable {
                table: Opaque::new(self.table.into_inner()),
                dev: ARef::from(self.dev),
                direction: self.direction,
                bounces: false,
                unmap: 0,
            },
        );
        mapped.bounces = mapped.find_bounces();
        Ok(mapped)
    }
}

impl MappedTable {
    /// Whether some of the memory is mapped through bounce buffers.
    fn find_bounces(&self) -> bool {
        if !may_bounce(&self.dev) {
            return false;
        }
        let table = self.table.get();
        // SAFETY: Allocated and mapped, by the type invariant.
        let (mut sg, count) = unsafe { ((*table).sgl, (*table).nents) };
        for index in 0..count {
            if index % 4096 == 4095 {
                cond_resched();
            }
            // SAFETY: One of the `nents` entries that are mapped.
            if unsafe { ffi::pinbuf_dma_need_sync(raw(&self.dev), (*sg).dma_address) } {
                return true;
            }
            // SAFETY: As above.
            sg = unsafe { bindings::sg_next(sg) };
        }
        false
    }

    /// Whether the device may write to the memory.
    pub(crate) fn device_writes(&self) -> bool {
        self.direction != DataDirection::ToDevice
    }

    /// Whether the device may access a copy of some of the memory. (Also true for a device that
    /// could bounce and is not coherent, whether it bounces or not.)
    pub(crate) fn bounces(&self) -> bool {
        self.bounces
    }

    /// Removes a mapping that was not passed to any device. Bounce buffers are not copied back:
    /// that would overwrite what others have written to the memory since.
    pub(crate) fn discard(mut self: KBox<Self>) {
        self.unmap = bindings::DMA_ATTR_SKIP_CPU_SYNC as c_ulong;
    }

    /// The scatterlist for C code. The pointer stays valid while the box lives.
    pub(crate) fn as_raw(self: &KBox<Self>) -> *mut bindings::sg_table {
        self.table.get()
    }

    /// Makes what the device wrote visible to the CPU, if an access by the CPU in the direction
    /// `access` concerns this mapping.
    pub(crate) fn sync_for_cpu(&self, access: DataDirection) {
        // The CPU may write to parts of the memory only, and the rest is copied back to the device
        // with them. So a write access begins as a read access.
        let access = match access {
            DataDirection::ToDevice => DataDirection::Bidirectional,
            access => access,
        };
        if let Some(direction) = sync_direction(self.direction, access) {
            let (dev, table) = (raw(&self.dev), self.table.get());
            // SAFETY: Mapped for this device, by the type invariant, in a direction that allows
            // this.
            unsafe { ffi::pinbuf_dma_sync_sgtable_for_cpu(dev, table, direction.into()) }
        }
    }

    /// Makes what the CPU wrote visible to the device, under the same condition.
    pub(crate) fn sync_for_device(&self, access: DataDirection) {
        if let Some(direction) = sync_direction(self.direction, access) {
            let (dev, table) = (raw(&self.dev), self.table.get());
            // SAFETY: Mapped for this device, by the type invariant, in a direction that allows
            // this.
            unsafe { ffi::pinbuf_dma_sync_sgtable_for_device(dev, table, direction.into()) }
        }
    }
}

impl Drop for MappedTable {
    fn drop(&mut self) {
        // SAFETY: Mapped for this device in this direction, by the type invariant, and not used any
        // more.
        unsafe {
            bindings::dma_unmap_sgtable(
                raw(&self.dev),
                self.table.get(),
                self.direction.into(),
                self.unmap,
            )
        };
        // SAFETY: Allocated, by the type invariant, and not used any more.
        unsafe { bindings::sg_free_table(self.table.get()) };
    }
}

/// Whether memory may be bounced for `dev`.
///
/// If a device may need bounce buffers, its `dma_max_mapping_size()` is limited to the size of one.
/// The same holds for an untrusted device behind an IOMMU. But an IOMMU bounces only memory that
/// does not fill whole pages of the IOMMU, and entries consist of whole pages.
fn may_bounce(dev: &Device) -> bool {
    // SAFETY: A valid device.
    let (most, mask) = unsafe {
        (
            bindings::dma_max_mapping_size(raw(dev)),
            bindings::dma_get_merge_boundary(raw(dev)),
        )
    };
    // The mask of the IOMMU's page size; 0 without an IOMMU.
    let fills_pages = mask != 0 && mask < PAGE_SIZE;
    most != usize::MAX && !fills_pages
}

/// Whether the device sees what is in the CPU's caches, and caches see what it writes.
fn is_coherent(dev: &Device) -> bool {
    // SAFETY: A valid device.
    unsafe { ffi::pinbuf_dev_is_dma_coherent(raw(dev)) }
}

/// The C device: `Device::as_raw` is private to the `kernel` crate.
fn raw(dev: &Device) -> *mut bindings::device {
    // `Device` is transparent over `Opaque<bindings::device>`.
    core::ptr::from_ref(dev).cast_mut().cast()
}

/// The direction in which a mapping has to be synced for an access by the CPU; `None` if it does
/// not have to be synced.
///
/// The DMA API allows a bidirectional mapping to be synced in any direction, and this has to be the
/// direction of the access: after a read, a bidirectional sync would copy old content over what the
/// device has written to its bounce buffer meanwhile. Any other mapping is synced in its own
/// direction, and an access in the opposite direction does not concern its device.
fn sync_direction(mapping: DataDirection, access: DataDirection) -> Option<DataDirection> {
    if mapping == DataDirection::Bidirectional {
        Some(access)
    } else if access == mapping || access == DataDirection::Bidirectional {
        Some(mapping)
    } else {
        None
    }
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
        // SAFETY: `table` is a local variable, which the function initialises. The list is a chain
        // of pages.
        to_result(unsafe {
            bindings::sg_alloc_table(&mut table, entries, bindings::GFP_KERNEL_ACCOUNT)
        })?;
        Ok(Self(table))
    }

    fn fill(&mut self, segments: impl Iterator<Item = (usize, usize)>) {
        let array = PageArray::get();
        let mut sg = self.0.sgl;
        for (index, (pfn, pages)) in segments.enumerate() {
            if index > 0 {
                // SAFETY: There is one entry for each segment, and this is not the last one.
                sg = unsafe { bindings::sg_next(sg) };
                if index % 4096 == 0 {
                    cond_resched();
                }
            }
            let page = array.page(pfn);
            // SAFETY: The frame has a `struct page`, as `Prepared::new` demands. `sg` is an
            // entry of the list; the length fits, by `SegmentLimits`.
            unsafe { ffi::pinbuf_sg_set_page(sg, page, (pages * PAGE_SIZE) as u32, 0) };
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
        // SAFETY: Allocated, by the type invariant, and not used any more.
        unsafe { bindings::sg_free_table(&mut self.0) };
    }
}
