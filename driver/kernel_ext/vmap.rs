// SPDX-License-Identifier: GPL-2.0

//! Kernel mappings of pages that their owner keeps in place.
//!
//! C header: [`include/linux/vmalloc.h`](srctree/include/linux/vmalloc.h).

use super::{
    pages::PageArray,
    sched::cond_resched, //
};
use crate::ffi;
use core::{
    ffi::c_void,
    ptr::NonNull, //
};
use kernel::{
    alloc::{
        flags::__GFP_NOWARN,
        KVVec, //
    },
    bindings,
    prelude::*, //
};

/// Maps the pages of `runs`, pairs of a first page frame and a number of pages, at consecutive
/// addresses. May sleep.
///
/// Allocates eight bytes per page while it runs. Fails with `ENOMEM` if memory is short, or if
/// there are more than 2^28 - 1 pages (a tebibyte of 4 KiB pages).
///
/// # Safety
///
/// The frames have `struct page`s, and their pages stay in place until [`unmap`].
pub(crate) unsafe fn map(
    runs: impl Iterator<Item = (usize, usize)>,
    pages: usize,
) -> Result<NonNull<c_void>> {
    // `kvmalloc()` refuses larger arrays.
    const MOST: usize = i32::MAX as usize / size_of::<*mut bindings::page>();
    if pages > MOST {
        return Err(ENOMEM);
    }
    // Not charged: it is freed before this function returns, and the core would warn if a charge
    // failed because a memory cgroup is full.
    let mut array = KVVec::with_capacity(pages, GFP_KERNEL | __GFP_NOWARN)?;
    let pages_array = PageArray::get();
    for (pfn, pages) in runs {
        for n in 0..pages {
            if array.len() % 4096 == 4095 {
                cond_resched();
            }
            array.push(pages_array.page(pfn + n), GFP_KERNEL)?;
        }
    }
    // SAFETY: The array holds that number of pointers, to pages that stay in place.
    let address = unsafe { ffi::pinbuf_vmap(array.as_mut_ptr(), array.len() as u32) };
    NonNull::new(address).ok_or(ENOMEM)
}

/// Undoes [`map`].
///
/// # Safety
///
/// `address` came from [`map`], is not used any more, and is unmapped once.
pub(crate) unsafe fn unmap(address: NonNull<c_void>) {
    // SAFETY: By the function's requirements.
    unsafe { ffi::pinbuf_vunmap(address.as_ptr()) };
}

/// The address of the frame `pfn` in the kernel's direct map, if it is mapped there. Frames that
/// are physically adjacent are adjacent there too.
///
/// # Safety
///
/// The frame has a `struct page`.
pub(crate) unsafe fn direct(pfn: usize) -> Option<NonNull<c_void>> {
    // SAFETY: By the function's requirements.
    NonNull::new(unsafe { ffi::pinbuf_page_address(PageArray::get().page(pfn)) })
}
