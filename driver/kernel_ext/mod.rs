// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers of kernel interfaces that the `kernel` crate does not have yet.
//!
//! None of these modules depends on the rest of the driver, except for [`crate::ffi`], so that they
//! could become part of the `kernel` crate. All differences between kernel versions are here.

pub(crate) mod dma_buf;
pub(crate) mod miscdevice;
pub(crate) mod module;
pub(crate) mod pages;
pub(crate) mod pfn_map;
pub(crate) mod sched;
pub(crate) mod sg_table;
pub(crate) mod user;
pub(crate) mod vmap;
