// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers of kernel interfaces that the `kernel` crate does not have yet.
//!
//! None of these modules depends on the rest of the driver, except for [`crate::ffi`], so that they
//! could become part of the `kernel` crate. All differences between kernel versions are here: for
//! example, [`miscdevice`] registers its device itself, because `kernel::miscdevice` of 7.2 does
//! not set `file_operations.owner`, so that a module could be unloaded while a descriptor is open.

pub(crate) mod dma_buf;
pub(crate) mod miscdevice;
pub(crate) mod module;
pub(crate) mod pages;
pub(crate) mod pfn_map;
pub(crate) mod sched;
pub(crate) mod sg_table;
pub(crate) mod user;
pub(crate) mod vmap;
