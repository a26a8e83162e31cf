// SPDX-License-Identifier: GPL-2.0

//! Exporting memory, which stays in place, as dma-bufs.
//!
//! A driver implements [`Exporter`] for a type that owns memory, and passes values of the type to
//! [`DmaBuf::export`]. The abstraction manages the mappings of devices: each map call creates one
//! scatterlist, which lives until the matching unmap call, and CPU access synchronises all of them.
//! It suits exporters whose memory is neither moved nor freed while the dma-buf lives.
//!
//! # Lifetime
//!
//! The dma-buf owns the exporter's value, and drops it when the last reference to the dma-buf is
//! dropped, by a descriptor, a mapping or an importer. This happens in process context, possibly in
//! a worker, without locks held. The dma-buf also holds a reference to the module.
//!
//! # Locks
//!
//! Lock order: mmap lock, then `dma_resv`, then [`Exported::mappings`].
//!
//! The core calls `map`, `unmap`, `vmap` and `vunmap` with the buffer's `dma_resv` lock held, and
//! `begin_cpu_access` and `end_cpu_access` without any lock, so the latter may run while devices
//! map and unmap. The mutex `mappings` makes that safe: it is held from before a scatterlist is
//! mapped until it is in the tree, and while it is removed and unmapped. Mapping copies to bounce
//! buffers, and unmapping copies back from them: without the mutex, a concurrent access by the CPU
//! would be lost or see old data.
//!
//! # Bounce buffers
//!
//! A mapping that uses bounce buffers (swiotlb) is a copy of the memory, and the DMA API does not
//! know which parts of it the device wrote: making the device's writes visible copies all of it
//! back. With a second mapping that a device writes to, the data of one of the two would be lost.
//! So a mapping that a device may write to and that uses bounce buffers cannot exist beside another
//! mapping that a device may write to (`EBUSY`). A mapping that uses bounce buffers and that its
//! device only reads shows the content of the memory at the time of mapping and what the CPU has
//! written since, and not what other devices have written since.
//!
//! The mutex is held during each call, and not between the beginning and the end of an access. What
//! the CPU has written in an access that has not ended is lost if meanwhile the device's mapping is
//! removed or another access begins: both copy the bounce buffer back. The core's interface does
//! not identify accesses, so the exporter cannot prevent this; `system_heap` behaves in the same
//! way.
//!
//! C header: [`include/linux/dma-buf.h`](srctree/include/linux/dma-buf.h).

use super::sg_table::{
    MappedTable,
    Prepared, //
};
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
    },
    types::Opaque, //
};

/// Memory that can be exported as a dma-buf.
///
/// All callbacks may sleep.
pub(crate) trait Exporter: Sized + Send + Sync + 'static {
    /// The exporter's name, shown in `/sys/kernel/debug/dma_buf/bufinfo` and in
    /// `/proc/PID/fdinfo`.
    const NAME: &'static CStr;

    /// The type's table of operations, which must be a `static`: its address distinguishes a
    /// dma-buf of this type from all others.
    fn operations() -> &'static Operations<Self>;

    /// The size of the memory in bytes: a multiple of the page size, not zero, and constant.
    fn size(&self) -> usize;

    /// Prepares a mapping of all of the memory for a device.
    fn prepare<'a>(&self, dev: &'a Device, direction: DataDirection) -> Result<Prepared<'a>>;

    /// Sets up a user mapping of the memory. The core has checked that the mapping lies within the
    /// memory.
    ///
    /// # Safety
    ///
    /// `vma` is being set up. Its file is the dma-buf, so that `self` outlives it.
    unsafe fn mmap(&self, vma: *mut bindings::vm_area_struct) -> Result;

    /// Maps all of the memory for the kernel. The core shares one such mapping between all
    /// importers.
    fn vmap(&self) -> Result<NonNull<c_void>>;

    /// Removes the mapping of which [`Exporter::vmap`] returned `address`.
    ///
    /// # Safety
    ///
    /// The mapping is not used any more, and is removed once.
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

/// The value that a dma-buf's private data points to.
#[pin_data]
struct Exported<E> {
    /// The mappings of devices, by the address of their scatterlist. Dropped before the memory that
    /// they map. (The core does not release a dma-buf that is still attached.)
    #[pin]
    mappings: Mutex<RBTree<usize, KBox<MappedTable>>>,
    #[pin]
    exporter: E,
    #[pin]
    resv: Resv,
}

/// A `dma_resv` for a dma-buf. If the core allocated it, together with the `struct dma_buf`, both
/// would take 512 bytes instead of 256.
#[pin_data(PinnedDrop)]
struct Resv {
    #[pin]
    raw: Opaque<bindings::dma_resv>,
}

impl Resv {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The place is valid for writing, and the value stays there until it is dropped.
            raw <- Opaque::ffi_init(|place| unsafe { bindings::dma_resv_init(place) }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Resv {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `new` has initialised it. Whoever uses the `dma_resv` of a dma-buf holds a
        // reference to the dma-buf.
        unsafe { bindings::dma_resv_fini(self.raw.get()) };
    }
}

/// A reference to a dma-buf of any exporter.
///
/// # Invariants
///
/// The pointer is valid, and this value owns one of its references.
pub(crate) struct DmaBuf(NonNull<bindings::dma_buf>);

impl DmaBuf {
    /// Exports `exporter` as a dma-buf, which then owns it. On an error, it is dropped.
    pub(crate) fn export<E: Exporter>(
        module: &'static ThisModule,
        exporter: impl PinInit<E>,
    ) -> Result<Self> {
        let exported = KBox::pin_init(
            pin_init!(Exported {
                mappings <- new_mutex!(RBTree::new(), "dma_buf::mappings"),
                exporter <- exporter,
                resv <- Resv::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let (size, resv) = (exported.exporter.size(), exported.resv.raw.get());
        // SAFETY: The value is not moved: `release` and the error path below drop it in place.
        let exported = KBox::into_raw(unsafe { Pin::into_inner_unchecked(exported) });
        let info = bindings::dma_buf_export_info {
            exp_name: E::NAME.as_char_ptr(),
            owner: module.as_ptr(),
            ops: &E::operations().0,
            size,
            flags: bindings::O_RDWR as c_int,
            resv,
            priv_: exported.cast(),
        };
        // SAFETY: `info` is filled in, and what it points to lives as long as the dma-buf.
        match from_err_ptr(unsafe { bindings::dma_buf_export(&info) }) {
            // SAFETY: Not an error, hence a valid dma-buf. INVARIANT: The new value owns the
            // reference.
            Ok(buf) => Ok(Self(unsafe { NonNull::new_unchecked(buf) })),
            Err(error) => {
                // SAFETY: The pointer came from a box, and the core has not taken it over.
                drop(unsafe { KBox::from_raw(exported) });
                // The core returns `ENOENT` if the module is being unloaded.
                Err(if error == ENOENT { ENODEV } else { error })
            }
        }
    }

    /// The dma-buf that a descriptor of the current process refers to. Fails with `EBADF` if the
    /// descriptor is not open, and with `EINVAL` if it refers to something else.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Always allowed in process context.
        let buf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // SAFETY: Not an error, hence a valid dma-buf. INVARIANT: The new value owns the reference.
        Ok(Self(unsafe { NonNull::new_unchecked(buf) }))
    }

    /// Turns the reference into a descriptor of the current process. The caller must not fail after
    /// this: other threads can use the descriptor already.
    pub(crate) fn into_fd(self, cloexec: bool) -> Result<i32> {
        let flags = if cloexec { bindings::O_CLOEXEC } else { 0 };
        // SAFETY: A valid dma-buf, whose reference the descriptor takes over if this succeeds.
        let fd = unsafe { bindings::dma_buf_fd(self.0.as_ptr(), flags as c_int) };
        if fd < 0 {
            return Err(Error::from_errno(fd));
        }
        core::mem::forget(self);
        Ok(fd)
    }

    /// The exporter's value, if the dma-buf is one of `E`'s.
    pub(crate) fn exporter<E: Exporter>(&self) -> Option<&E> {
        Some(&self.exported::<E>()?.exporter)
    }

    /// The number of mappings of devices, if the dma-buf is one of `E`'s. Waits while one is
    /// created, removed or synchronised.
    pub(crate) fn mappings<E: Exporter>(&self) -> Option<usize> {
        Some(self.exported::<E>()?.mappings.lock().iter().count())
    }

    fn exported<E: Exporter>(&self) -> Option<&Exported<E>> {
        // SAFETY: A valid dma-buf; its operations never change.
        let ops = unsafe { (*self.0.as_ptr()).ops };
        if !core::ptr::eq(ops, &E::operations().0) {
            return None;
        }
        // SAFETY: One of `E`'s, as its operations show. It lives as long as the reference that
        // `self` owns.
        Some(unsafe { exported::<E>(self.0.as_ptr()) })
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, this value owns the reference.
        unsafe { bindings::dma_buf_put(self.0.as_ptr()) };
    }
}

/// # Safety
///
/// `buf` is a valid dma-buf of `E`'s, and stays so for `'a`.
unsafe fn exported<'a, E: Exporter>(buf: *const bindings::dma_buf) -> &'a Exported<E> {
    // SAFETY: `DmaBuf::export` stored the pointer, and only `release` frees the value.
    unsafe { &*(*buf).priv_.cast::<Exported<E>>() }
}

/// Converts a direction from C. (The type that bindgen generates for it differs between 7.2 and
/// 7.3.)
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
        // Memory is allocated without the lock: the importer's memory cgroup may delay that for
        // seconds, and accesses by the CPU wait for the lock.
        let reserved = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?;
        let prepared = exported.exporter.prepare(dev, direction(raw)?)?;
        let mut mappings = exported.mappings.lock();
        let table = prepared.map()?;
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
    // Dropped, and so unmapped, with the lock held.
    drop(mappings.remove_node(&(table as usize)));
}

/// # Safety
///
/// Called by the core once, when this dma-buf of `E`'s is not used any more.
unsafe extern "C" fn release<E: Exporter>(buf: *mut bindings::dma_buf) {
    // SAFETY: `DmaBuf::export` got the pointer from a box, and nothing else uses the value now. It
    // is dropped in place.
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
        // The core waits for the devices' fences too, but only after this callback. What a device
        // writes after the sync below would not be synchronised, so the wait for devices that write
        // has to be before it. Devices that read do not matter here: the core waits for them before
        // the CPU writes.
        let usage = bindings::dma_resv_usage_DMA_RESV_USAGE_WRITE;
        // SAFETY: The `dma_resv` lives as long as the buffer. By the rules for this callback, its
        // caller does not hold the lock.
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
        // SAFETY: The core passes a pointer that is valid for writing.
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
