// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers of kernel interfaces that the `kernel` crate does not have yet.
//!
//! Each module stands for itself and knows nothing of pinbuf, so that it could become a part of
//! the `kernel` crate as it is. All differences between kernel versions are in here:
//! [`miscdevice`] registers its device itself, since `kernel::miscdevice` of 7.2 leaves
//! `file_operations.owner` empty and a module could be unloaded under an open descriptor.

pub(crate) mod dma_buf;
pub(crate) mod miscdevice;
pub(crate) mod module;
pub(crate) mod pages;
pub(crate) mod pfn_map;
pub(crate) mod sched;
pub(crate) mod sg_table;
pub(crate) mod user;
pub(crate) mod vmap;
