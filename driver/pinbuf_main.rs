// SPDX-License-Identifier: GPL-2.0

//! pinbuf: dma-bufs of a process's own memory.
//!
//! A process names ranges of its address space; the driver pins their pages for the long term and
//! hands back a dma-buf of them. `uapi/pinbuf.h` says what user space may rely on, `DESIGN.md` how
//! it is reached. From here, in the order of a call:
//!
//! * [`ioctl`]: the four calls; [`uaccess`] reads what they are given, [`ranges`] checks it;
//! * [`charge`] on [`allowances`]: who is charged for the pages, and how many may be pinned;
//! * [`pin`]: pinning them by GUP, and holding the pins;
//! * [`extents`]: remembering which pages they are;
//! * [`buffer`]: what is exported; [`discards`]: which parts of it the owner does not see any more;
//! * [`kernel_ext`]: safe wrappers of what the `kernel` crate does not wrap yet, and everything that
//!   differs between kernel versions; [`ffi`] and `helpers.c` below it; [`params`].
//!
//! # Locks
//!
//! In order: the mmap lock or a VMA's, `dma_resv`, `dma_buf::mappings`; and the mmap lock or a VMA's,
//! `pinbuf::faults`, the page tables' own. [`charge`] has a mutex besides, under which nothing else is taken.
//! None of these is held while pages are pinned, unpinned or user memory is copied.
//!
//! # Lifetimes
//!
//! An open `/dev/pinbuf` holds the module, and so does each dma-buf. A dma-buf owns its
//! [`buffer::Buffer`], which owns pins and charge; it is held by descriptors, by user mappings
//! and by importers, and may be released by any task, after the caller is long gone.

use kernel::prelude::*;

#[cfg(not(CONFIG_64BIT))]
compile_error!(
    "pinbuf needs a 64-bit kernel: page frames and counters of pages are 64-bit numbers"
);
#[cfg(target_endian = "big")]
compile_error!("pinbuf is not made for big-endian kernels: its contract was never tried there");
#[cfg(not(CONFIG_SPARSEMEM_VMEMMAP))]
compile_error!("pinbuf needs CONFIG_SPARSEMEM_VMEMMAP: adjacent frames have adjacent struct pages");

mod allowances;
mod buffer;
mod charge;
mod discards;
mod extents;
mod ffi;
mod ioctl;
mod kernel_ext;
mod params;
mod pin;
mod ranges;
mod uaccess;
// Public to user space; the driver does not use all of it.
#[allow(dead_code, unreachable_pub)]
#[path = "../uapi/src/contract.rs"]
mod uapi;

module! {
    type: Pinbuf,
    name: "pinbuf",
    authors: ["The pinbuf authors"],
    description: "dma-bufs of a process's own memory",
    license: "GPL",
    imports_ns: ["DMA_BUF"],
}

#[pin_data]
struct Pinbuf {
    #[pin]
    device: kernel_ext::miscdevice::Registration<ioctl::Calls>,
}

impl kernel::InPlaceModule for Pinbuf {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        kernel_ext::module::remember(module);
        // SAFETY: Called once, here, before there is a device.
        unsafe { charge::init() };
        try_pin_init!(Self {
            device <- kernel_ext::miscdevice::Registration::new(module, c"pinbuf"),
        })
    }
}
