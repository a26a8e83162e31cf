// SPDX-License-Identifier: GPL-2.0

//! pinbuf: dma-bufs of a process's own memory.
//!
//! A process names ranges of its address space; the driver pins their pages for the long term and
//! returns a dma-buf of them. `uapi/pinbuf.h` is the contract with user space, and `DESIGN.md`
//! explains the decisions. The modules, in the order in which a call uses them:
//!
//! * [`ioctl`]: the four ioctls; [`uaccess`] copies their arguments, [`ranges`] checks the ranges;
//! * [`charge`], on top of [`allowances`]: charges the pages to a user, and limits how many may be
//!   pinned;
//! * [`pin`]: pins the pages with GUP, and holds the pins;
//! * [`extents`]: records which pages were pinned, in a list of [`one_or_more`];
//! * [`buffer`]: the exported object; [`discards`]: finds the parts of it that the owner does not
//!   see any more;
//! * [`kernel_ext`]: safe wrappers of what the `kernel` crate does not wrap yet, and everything
//!   that differs between kernel versions, on top of [`ffi`] and `helpers.c`; [`params`]: the
//!   module's parameters.
//!
//! # Locks
//!
//! Lock order: mmap lock or VMA lock, then `dma_resv`, then `dma_buf::mappings`. The mutex of
//! [`charge`] is a leaf: no other lock is taken under it. The driver holds none of these locks when
//! it pins or unpins pages or copies user memory. Faults in mappings take no lock but those of the
//! page tables, so that no process delays the faults of another.
//!
//! # Lifetimes
//!
//! An open `/dev/pinbuf` holds a reference to the module, and so does each dma-buf. A dma-buf owns
//! its [`buffer::Buffer`], which owns the pins and the charge. Descriptors, user mappings and
//! importers hold references to the dma-buf, and any task may drop the last one, also after the
//! process that created the buffer has exited.

use kernel::prelude::*;

#[cfg(not(CONFIG_64BIT))]
compile_error!(
    "pinbuf needs a 64-bit kernel: page frame numbers and page counters are 64 bits wide"
);
#[cfg(target_endian = "big")]
compile_error!("pinbuf does not support big-endian kernels: its interface was never tested there");
#[cfg(not(CONFIG_SPARSEMEM_VMEMMAP))]
compile_error!(
    "pinbuf needs CONFIG_SPARSEMEM_VMEMMAP: adjacent frames must have adjacent struct pages"
);

mod allowances;
mod buffer;
mod charge;
mod discards;
mod extents;
mod ffi;
mod ioctl;
mod kernel_ext;
mod one_or_more;
mod params;
mod pin;
mod ranges;
mod uaccess;
// The interface to user space, of which the driver does not use every item.
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
        // SAFETY: Called once, before the device is registered.
        unsafe { charge::init() };
        try_pin_init!(Self {
            device <- kernel_ext::miscdevice::Registration::new(module, c"pinbuf"),
        })
    }
}
