// SPDX-License-Identifier: GPL-2.0

//! Prototypes of `driver/helpers.c`; both change together. See there for what each is.
//!
//! Only [`crate::kernel_ext`] and [`crate::params`] call these.

use kernel::{
    bindings,
    ffi::{
        c_int,
        c_long,
        c_uint,
        c_ulong,
        c_void, //
    },
};

/// `struct pinbuf_place` of `driver/helpers.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Place {
    pub(crate) pfn: c_ulong,
    pub(crate) left: c_ulong,
    pub(crate) folio_pages: c_ulong,
    pub(crate) hugetlb: bool,
    pub(crate) device: bool,
    pub(crate) user: bool,
}

/// `struct pinbuf_mapped` of `driver/helpers.h`.
#[repr(C)]
pub(crate) struct Mapped {
    pub(crate) file: *mut bindings::file,
    pub(crate) start: c_ulong,
    pub(crate) end: c_ulong,
    pub(crate) index: c_ulong,
    pub(crate) unit: c_ulong,
}

impl Default for Mapped {
    fn default() -> Self {
        Self {
            file: core::ptr::null_mut(),
            start: 0,
            end: 0,
            index: 0,
            unit: 1,
        }
    }
}

// Behind these pointers are C's structs, some of them empty in this configuration.
#[allow(improper_ctypes)]
extern "C" {
    pub(crate) fn pinbuf_param_allowance_mb() -> c_uint;
    pub(crate) fn pinbuf_param_allowance_system_mb() -> c_uint;
    pub(crate) fn pinbuf_param_charge_process() -> bool;
    pub(crate) fn pinbuf_param_pin_retries() -> c_uint;

    pub(crate) fn pinbuf_fatal_signal_pending() -> bool;
    pub(crate) fn pinbuf_cond_resched();
    pub(crate) fn pinbuf_rlimit_memlock() -> c_ulong;
    pub(crate) fn pinbuf_get_current_user() -> *mut bindings::user_struct;
    pub(crate) fn pinbuf_capable_ipc_lock_noaudit() -> bool;
    pub(crate) fn pinbuf_current_host_uid() -> c_uint;
    pub(crate) fn pinbuf_totalram_pages() -> c_ulong;

    pub(crate) fn pinbuf_pfn_to_page(pfn: c_ulong) -> *mut bindings::page;
    pub(crate) fn pinbuf_page_address(page: *const bindings::page) -> *mut c_void;
    pub(crate) fn pinbuf_page_place(page: *const bindings::page, out: *mut Place);
    pub(crate) fn pinbuf_pin_one(
        addr: c_ulong,
        flags: c_uint,
        page: *mut *mut bindings::page,
        out: *mut Place,
    ) -> c_int;
    pub(crate) fn pinbuf_pages_ordinary(
        pages: *const *mut bindings::page,
        count: c_ulong,
        pfns: *mut c_ulong,
    ) -> c_ulong;
    pub(crate) fn pinbuf_pages_backed_by(
        pages: *const *mut bindings::page,
        count: c_ulong,
        file: *const bindings::file,
        index: c_ulong,
    ) -> c_ulong;

    pub(crate) fn pinbuf_file_pin_folios(
        file: *mut bindings::file,
        start: bindings::loff_t,
        end: bindings::loff_t,
        all: bindings::loff_t,
        folios: *mut *mut bindings::folio,
        max: c_uint,
    ) -> c_long;
    pub(crate) fn pinbuf_mapped_pin_folios(
        file: *mut bindings::file,
        start: bindings::loff_t,
        end: bindings::loff_t,
        all: bindings::loff_t,
        folios: *mut *mut bindings::folio,
        max: c_uint,
    ) -> c_long;
    pub(crate) fn pinbuf_file_pin_one(
        file: *mut bindings::file,
        index: c_ulong,
        pages: c_ulong,
        folio: *mut *mut bindings::folio,
        out: *mut Place,
    ) -> c_int;
    pub(crate) fn pinbuf_mapped_file(addr: c_ulong, out: *mut Mapped) -> bool;
    pub(crate) fn pinbuf_file_unit(file: *mut bindings::file) -> c_ulong;
    pub(crate) fn pinbuf_file_has_pages(
        file: *mut bindings::file,
        index: c_ulong,
        count: c_ulong,
    ) -> bool;
    pub(crate) fn pinbuf_folios_plain(
        folios: *const *mut bindings::folio,
        count: c_ulong,
        file: *const bindings::file,
        index: c_ulong,
        order: c_uint,
        pfns: *mut c_ulong,
    ) -> c_ulong;
    pub(crate) fn pinbuf_folio_place(
        folio: *mut bindings::folio,
        file: *mut bindings::file,
        index: c_ulong,
        out: *mut Place,
    ) -> c_int;
    pub(crate) fn pinbuf_unpin_folios_dirty(pfn: c_ulong, pages: c_ulong, max: c_ulong) -> c_ulong;
    pub(crate) fn pinbuf_unpin_pfns_dirty(pfns: *mut c_ulong, count: c_ulong);

    pub(crate) fn pinbuf_same_pgmap(a: *const bindings::page, b: *const bindings::page) -> bool;

    pub(crate) fn pinbuf_sg_set_page(
        sg: *mut bindings::scatterlist,
        page: *mut bindings::page,
        len: c_uint,
    );
    pub(crate) fn pinbuf_sg_next(sg: *mut bindings::scatterlist) -> *mut bindings::scatterlist;
    pub(crate) fn pinbuf_dma_get_max_seg_size(dev: *mut bindings::device) -> c_uint;
    pub(crate) fn pinbuf_dma_get_seg_boundary(dev: *mut bindings::device) -> c_ulong;
    pub(crate) fn pinbuf_dma_sync_sgtable_for_cpu(
        dev: *mut bindings::device,
        sgt: *mut bindings::sg_table,
        dir: bindings::dma_data_direction,
    );
    pub(crate) fn pinbuf_dma_sync_sgtable_for_device(
        dev: *mut bindings::device,
        sgt: *mut bindings::sg_table,
        dir: bindings::dma_data_direction,
    );
    pub(crate) fn pinbuf_dma_unmap_sgtable(
        dev: *mut bindings::device,
        sgt: *mut bindings::sg_table,
        dir: bindings::dma_data_direction,
    );

    pub(crate) fn pinbuf_vmap(pages: *mut *mut bindings::page, count: c_uint) -> *mut c_void;
    pub(crate) fn pinbuf_vunmap(addr: *const c_void);
    pub(crate) fn pinbuf_vma_is_shared(vma: *const bindings::vm_area_struct) -> bool;
    pub(crate) fn pinbuf_vma_is_exec(vma: *const bindings::vm_area_struct) -> bool;
    pub(crate) fn pinbuf_vma_set_pfnmap(vma: *mut bindings::vm_area_struct);
    pub(crate) fn pinbuf_huge_pfns_allowed() -> bool;
    pub(crate) fn pinbuf_insert_pfn_pmd_near(
        vmf: *const bindings::vm_fault,
        distance: c_long,
        pfn: c_ulong,
        write: bool,
    );
    pub(crate) fn pinbuf_set_pte_pfn(
        vma: *mut bindings::vm_area_struct,
        addr: c_ulong,
        pte: *mut bindings::pte_t,
        pfn: c_ulong,
    );
}
