// SPDX-License-Identifier: MIT OR Apache-2.0

#![doc = include_str!("../README.md")]

mod device;
mod discards;
mod dmabuf;
mod error;
mod image;
mod memory;
mod region;

pub use device::{ChargedTo, Device, FileRange, Query, Range};
pub use discards::{Change, Discard, DiscardState, Watch};
pub use dmabuf::{Access, CpuAccess, DmaBuf, Info, Mapping, SyncGuard};
pub use drm_fourcc::{DrmFourcc, DrmModifier};
pub use error::{Error, ImageError, Result};
pub use image::{Image, Plane};
pub use region::{HugePage, Region, RegionSlice};

/// The size of a page in bytes: addresses, offsets and lengths of buffers are multiples of it.
pub fn page_size() -> usize {
    use std::sync::OnceLock;
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        // Every Linux system reports it; 4 KiB is the smallest page of all architectures.
        size.ok()
            .flatten()
            .and_then(|size| usize::try_from(size).ok())
            .unwrap_or(4 << 10)
    })
}

/// What a huge page-table entry maps, in bytes: a page table is a page of 8-byte entries. 2 MiB with pages of
/// 4 KiB, 32 MiB with pages of 16 KiB.
pub(crate) fn huge_entry() -> usize {
    page_size() * (page_size() / 8)
}
