// SPDX-License-Identifier: GPL-2.0

//! Exporting memory that stays in place as dma-bufs.
//!
//! A driver implements [`Exporter`] for a type that owns memory and gives values of it to
//! [`DmaBuf::export`]. The abstraction keeps the devices' mappings: one scatterlist for each call
//! that maps, until the call that unmaps, and CPU access synchronises all of them. It suits
//! exporters whose memory neither moves nor goes away while the dma-buf lives.
//!
//! # Life
//!
//! The dma-buf owns the exporter's value, and drops it when its own last reference goes: that of
//! the last descriptor, mapping, or importer. This happens in process context, possibly in a
//! worker, without locks. The dma-buf also holds the module.
//!
//! # Locks
//!
//! In order: the mmap lock, `dma_resv`, [`Exported::mappings`].
//!
//! The core calls `map`, `unmap`, `vmap` and `vunmap` with the buffer's `dma_resv` lock held, and
//! `begin_cpu_access` and `end_cpu_access` without any lock, so these may run while devices map
//! and unmap. `mappings` is what makes that safe: it is held from before a scatterlist is mapped until it
//! is in there, and while it is taken out and unmapped. Mapping fills bounce buffers and unmapping empties
//! them; an access by the CPU meanwhile would be lost, or see old data, if it was not synchronised.
//!
//! # Bounce buffers
//!
//! A mapping that bounces (swiotlb) has a copy of the memory, and the DMA API cannot say which parts
//! of it the device wrote: making the device's writes visible copies all of it back. With a second
//! mapping that a device writes to, one of the two would lose its data. So a mapping that a device may
//! write to and that bounces shares the memory with no other mapping that a device may write to
//! (`EBUSY`). A mapping that bounces and that its device only reads shows what was in the memory when
//! it was mapped and what the CPU has written since, and not what other devices have.
//!
//! The lock covers each call, and not the time between the beginning and the end of an access. What the CPU
//! has written in an access that is not over is lost if meanwhile the device's mapping is undone, or another
//! access begins: both copy the bounce buffer back. The core's interface does not say which access is
//! whose, so this cannot be prevented here; `system_heap` does the same.
//!
//! C header: [`include/linux/dma-buf.h`](srctree/include/linux/dma-buf.h).

use super::sg_table::MappedTable;
use core::{
    ffi::c_void,
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    device::Device,
    dma::DataDirection,
    error::{
        from_err_ptr,
        from_result, //
    },
    ffi::{
        c_int,
        c_long,
        c_ulong, //
    },
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
    sync::{
        new_mutex,
        Mutex, //
    }, //
};

/// Memory that can be exported as a dma-buf.
///
/// All callbacks may sleep.
pub(crate) trait Exporter: Sized + Send + Sync + 'static {
    /// The exporter's name, shown in `/sys/kernel/debug/dma_buf/bufinfo` and in
    /// `/proc/PID/fdinfo`.
    const NAME: &'static CStr;

    /// The type's table of operations, which must be a `static`: its address distinguishes a dma-buf of
    /// this type from all others.
    fn operations() -> &'static Operations<Self>;

    /// The memory's size in bytes, a multiple of the page size and not zero; always the same.
    fn size(&self) -> usize;

    /// Maps all of the memory for a device.
    fn map(&self, dev: &Device, direction: DataDirection) -> Result<KBox<MappedTable>>;

    /// Sets up a user mapping of the memory. The core has checked that it lies within the memory.
    ///
    /// # Safety
    ///
    /// `vma` is being set up. Its file is the dma-buf, so that `self` outlives it.
    unsafe fn mmap(&self, vma: *mut bindings::vm_area_struct) -> Result;

    /// Maps all of the memory for the kernel. The core asks once, however many importers want it.
    fn vmap(&self) -> Result<NonNull<c_void>>;

    /// Undoes [`Exporter::vmap`], of which `address` is the result.
    ///
    /// # Safety
    ///
    /// The mapping is used no more, and is undone once.
    unsafe fn vunmap(&self, address: NonNull<c_void>);
}

/// The table of operations of an [`Exporter`].
#[repr(transparent)]
pub(crate) struct Operations<E>(bindings::dma_buf_ops, PhantomData<fn() -> E>);

impl<E: Exporter> Operations<E> {
    /// A table for a `static`.
    pub(crate) const fn new() -> Self {
        Self(
            bindings::dma_buf_ops {
                map_dma_buf: Some(map::<E>),
                unmap_dma_buf: Some(unmap::<E>),
                release: Some(release::<E>),
                begin_cpu_access: Some(begin_cpu_access::<E>),
                end_cpu_access: Some(end_cpu_access::<E>),
                mmap: Some(mmap::<E>),
                vmap: Some(vmap::<E>),
                vunmap: Some(vunmap::<E>),
                ..pin_init::zeroed()
            },
            PhantomData,
        )
    }
}

/// What a dma-buf's private data points to.
#[pin_data]
struct Exported<E> {
    /// The devices' mappings, by the address of their scatterlist. Dropped before the memory that
    /// they are of. (The core refuses to release a dma-buf that is still attached.)
    #[pin]
    mappings: Mutex<RBTree<usize, KBox<MappedTable>>>,
    #[pin]
    exporter: E,
}

/// A reference to a dma-buf, of whatever exporter.
///
/// # Invariants
///
/// The pointer is valid, and this value owns one of its references.
pub(crate) struct DmaBuf(NonNull<bindings::dma_buf>);

impl DmaBuf {
    /// Makes `exporter` a dma-buf, which owns it from now on; after an error it has been dropped.
    pub(crate) fn export<E: Exporter>(
        module: &'static ThisModule,
        exporter: impl PinInit<E>,
    ) -> Result<Self> {
        let exported = KBox::pin_init(
            pin_init!(Exported {
                mappings <- new_mutex!(RBTree::new(), "dma_buf::mappings"),
                exporter <- exporter,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let size = exported.exporter.size();
        // SAFETY: The value is not moved out of: it is turned back into a pinned box.
        let exported = KBox::into_raw(unsafe { Pin::into_inner_unchecked(exported) });
        let info = bindings::dma_buf_export_info {
            exp_name: E::NAME.as_char_ptr(),
            owner: module.as_ptr(),
            ops: &E::operations().0,
            size,
            flags: bindings::O_RDWR as c_int,
            resv: core::ptr::null_mut(),
            priv_: exported.cast(),
        };
        // SAFETY: `info` is filled in, and what it points to lives as long as the dma-buf.
        match from_err_ptr(unsafe { bindings::dma_buf_export(&info) }) {
            // SAFETY: Not an error, hence a valid dma-buf. INVARIANT: Its reference is ours.
            Ok(buf) => Ok(Self(unsafe { NonNull::new_unchecked(buf) })),
            Err(error) => {
                // SAFETY: The pointer came from a box, and nobody has taken it over.
                drop(unsafe { KBox::from_raw(exported) });
                // The core says ENOENT when the module is going.
                Err(if error == ENOENT { ENODEV } else { error })
            }
        }
    }

    /// The dma-buf behind a descriptor of the current process. `EBADF` if it is not open, `EINVAL`
    /// if it is something else.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Always allowed in process context.
        let buf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // SAFETY: Not an error, hence a valid dma-buf. INVARIANT: Its reference is ours.
        Ok(Self(unsafe { NonNull::new_unchecked(buf) }))
    }

    /// Turns the reference into a descriptor of the current process. Nothing may fail after this:
    /// other threads can use the descriptor already.
    pub(crate) fn into_fd(self, cloexec: bool) -> Result<i32> {
        let flags = if cloexec { bindings::O_CLOEXEC } else { 0 };
        // SAFETY: A valid dma-buf, whose reference is given away if this succeeds.
        let fd = unsafe { bindings::dma_buf_fd(self.0.as_ptr(), flags as c_int) };
        if fd < 0 {
            return Err(Error::from_errno(fd));
        }
        core::mem::forget(self);
        Ok(fd)
    }

    /// The exporter's value, if it is one of `E`'s.
    pub(crate) fn exporter<E: Exporter>(&self) -> Option<&E> {
        Some(&self.exported::<E>()?.exporter)
    }

    /// The number of devices' mappings, if it is one of `E`'s. Waits while one is made or synchronised.
    pub(crate) fn mappings<E: Exporter>(&self) -> Option<usize> {
        Some(self.exported::<E>()?.mappings.lock().iter().count())
    }

    fn exported<E: Exporter>(&self) -> Option<&Exported<E>> {
        // SAFETY: A valid dma-buf; its operations never change.
        let ops = unsafe { (*self.0.as_ptr()).ops };
        if !core::ptr::eq(ops, &E::operations().0) {
            return None;
        }
        // SAFETY: One of `E`'s, as its operations show; it lives as long as our reference.
        Some(unsafe { exported::<E>(self.0.as_ptr()) })
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours to drop.
        unsafe { bindings::dma_buf_put(self.0.as_ptr()) };
    }
}

/// # Safety
///
/// `buf` is a valid dma-buf of `E`'s, and stays so for `'a`.
unsafe fn exported<'a, E: Exporter>(buf: *const bindings::dma_buf) -> &'a Exported<E> {
    // SAFETY: `DmaBuf::export` put it there; `release` alone takes it away.
    unsafe { &*(*buf).priv_.cast::<Exported<E>>() }
}

/// The direction as Rust has it. (How C's is represented in Rust differs between 7.2 and 7.3.)
fn direction(raw: bindings::dma_data_direction) -> Result<DataDirection> {
    use DataDirection::{
        Bidirectional,
        FromDevice,
        ToDevice, //
    };
    [Bidirectional, ToDevice, FromDevice]
        .into_iter()
        .find(|direction| bindings::dma_data_direction::from(*direction) == raw)
        .ok_or(EINVAL)
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs, with its `dma_resv` lock held.
unsafe extern "C" fn map<E: Exporter>(
    attachment: *mut bindings::dma_buf_attachment,
    raw: bindings::dma_data_direction,
) -> *mut bindings::sg_table {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>((*attachment).dmabuf) };
    // SAFETY: The attached device is valid while it is attached.
    let dev = unsafe { Device::from_raw((*attachment).dev) };
    let map = || -> Result<*mut bindings::sg_table> {
        let reserved = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?;
        let mut mappings = exported.mappings.lock();
        let table = exported.exporter.map(dev, direction(raw)?)?;
        if table.device_writes() {
            let mut writers = mappings.values().filter(|other| other.device_writes());
            if writers.any(|other| table.bounces() || other.bounces()) {
                table.discard();
                return Err(EBUSY);
            }
        }
        let raw = table.as_raw();
        mappings.insert(reserved.into_node(raw as usize, table));
        Ok(raw)
    };
    map().unwrap_or_else(|error| error.to_ptr())
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs, with its `dma_resv` lock held, with a scatterlist
/// that [`map`] returned.
unsafe extern "C" fn unmap<E: Exporter>(
    attachment: *mut bindings::dma_buf_attachment,
    table: *mut bindings::sg_table,
    _direction: bindings::dma_data_direction,
) {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>((*attachment).dmabuf) };
    let mut mappings = exported.mappings.lock();
    // Unmapped with the lock held.
    drop(mappings.remove_node(&(table as usize)));
}

/// # Safety
///
/// Called by the core once, when nobody uses this dma-buf of `E`'s any more.
unsafe extern "C" fn release<E: Exporter>(buf: *mut bindings::dma_buf) {
    // SAFETY: `DmaBuf::export` made it from a box; nobody else has it now. It is dropped in place.
    drop(unsafe { KBox::from_raw((*buf).priv_.cast::<Exported<E>>()) });
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs.
unsafe extern "C" fn begin_cpu_access<E: Exporter>(
    buf: *mut bindings::dma_buf,
    raw: bindings::dma_data_direction,
) -> c_int {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>(buf) };
    from_result(|| {
        let direction = direction(raw)?;
        // The core waits for the devices too, but only afterwards; until they are done there may
        // be nothing to sync yet. A reader waits for writers, a writer for all.
        let usage = if direction == DataDirection::FromDevice {
            bindings::dma_resv_usage_DMA_RESV_USAGE_WRITE
        } else {
            bindings::dma_resv_usage_DMA_RESV_USAGE_READ
        };
        // SAFETY: The buffer's `dma_resv` lives as long as it, and is not locked by the caller, by
        // the rules for this callback.
        let left = unsafe {
            bindings::dma_resv_wait_timeout((*buf).resv, usage, true, c_long::MAX as c_ulong)
        };
        if left < 0 {
            return Err(Error::from_errno(left as c_int));
        }
        for table in exported.mappings.lock().values() {
            table.sync_for_cpu(direction);
        }
        Ok(0)
    })
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs.
unsafe extern "C" fn end_cpu_access<E: Exporter>(
    buf: *mut bindings::dma_buf,
    raw: bindings::dma_data_direction,
) -> c_int {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>(buf) };
    from_result(|| {
        let direction = direction(raw)?;
        for table in exported.mappings.lock().values() {
            table.sync_for_device(direction);
        }
        Ok(0)
    })
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs and a VMA that is being set up, whose file is the
/// dma-buf.
unsafe extern "C" fn mmap<E: Exporter>(
    buf: *mut bindings::dma_buf,
    vma: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>(buf) };
    from_result(|| {
        // SAFETY: By the function's requirements.
        unsafe { exported.exporter.mmap(vma) }?;
        Ok(0)
    })
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs, with its `dma_resv` lock held.
unsafe extern "C" fn vmap<E: Exporter>(
    buf: *mut bindings::dma_buf,
    map: *mut bindings::iosys_map,
) -> c_int {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>(buf) };
    from_result(|| {
        let address = exported.exporter.vmap()?;
        let mapped = bindings::iosys_map {
            __bindgen_anon_1: bindings::iosys_map__bindgen_ty_1 {
                vaddr: address.as_ptr(),
            },
            is_iomem: false,
        };
        // SAFETY: The core passes a pointer to write to.
        unsafe { map.write(mapped) };
        Ok(0)
    })
}

/// # Safety
///
/// Called by the core for one of `E`'s dma-bufs, with its `dma_resv` lock held, with what [`vmap`]
/// wrote.
unsafe extern "C" fn vunmap<E: Exporter>(
    buf: *mut bindings::dma_buf,
    map: *mut bindings::iosys_map,
) {
    // SAFETY: By the function's requirements.
    let exported = unsafe { exported::<E>(buf) };
    // SAFETY: `vmap` wrote an address of system memory there.
    let address = unsafe { (*map).__bindgen_anon_1.vaddr };
    if let Some(address) = NonNull::new(address) {
        // SAFETY: By the function's requirements.
        unsafe { exported.exporter.vunmap(address) };
    }
}
