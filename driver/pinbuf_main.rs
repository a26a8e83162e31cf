// SPDX-License-Identifier: GPL-2.0

//! pinbuf: dma-bufs of a process's own memory.
//!
//! A process names ranges of its address space; the driver pins their pages for the long term and
//! hands back a dma-buf of them. `uapi/pinbuf.h` says what user space may rely on, `DESIGN.md` how
//! it is reached. From here, in the order of a call:
//!
//! * [`calls`]: the three ioctls, and checking what they are given ([`user_struct`] reads it);
//! * [`charge`] on [`allowances`]: who answers for the pages, and how many may be pinned;
//! * [`order`]: in which order they are pinned; [`pins`]: pinning them, with patience;
//! * [`extents`] on [`chunked_vec`]: remembering which they are;
//! * [`buffer`]: what is exported;
//! * [`kernel_ext`]: safe wrappers of what the `kernel` crate does not wrap yet, and everything that
//!   differs between kernel versions; [`ffi`] and `helpers.c` below it.
//!
//! # Locks
//!
//! In order: the mmap lock, `dma_resv`, `dma_buf::mappings`. [`charge`] has a mutex besides, under
//! which nothing else is taken. None of these is held while pages are pinned, unpinned or user
//! memory is copied.
//!
//! # Lifetimes
//!
//! An open `/dev/pinbuf` holds the module, and so does each dma-buf. A dma-buf owns its
//! [`buffer::Buffer`], which owns pins and charge; it is held by descriptors, by user mappings
//! and by importers, and may be released by any task, after the caller is long gone.

use kernel::prelude::*;

#[cfg(not(CONFIG_64BIT))]
compile_error!("page frames and counters of locked pages are taken for numbers of 64 bits");

mod allowances;
mod buffer;
mod calls;
mod charge;
mod chunked_vec;
mod extents;
mod ffi;
mod kernel_ext;
mod order;
mod params;
mod pins;
mod ranges;
// Public to user space; the driver does not use all of it.
#[allow(dead_code, unreachable_pub)]
#[path = "../uapi/src/contract.rs"]
mod uapi;
mod user_array;
mod user_struct;

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
    device: kernel_ext::misc::Registration<calls::Calls>,
}

impl kernel::InPlaceModule for Pinbuf {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        kernel_ext::module::remember(module);
        // SAFETY: Called once, here, before there is a device.
        unsafe { charge::init() };
        try_pin_init!(Self {
            device <- kernel_ext::misc::Registration::new(module, c"pinbuf"),
        })
    }
}
