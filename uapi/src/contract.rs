// SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note

//! The contract between pinbuf's kernel module and user space.
//!
//! Declares for Rust what `uapi/pinbuf.h` declares for C; the header describes each call, field and
//! error. The test `tests/host/tests/uapi_layout.rs` compares the two. The kernel module is
//! compiled from this file too.
//!
//! The struct of each call begins with its own size in bytes. All structs have the same layout for
//! 32-bit and 64-bit callers: they have only fixed-width fields, with 64-bit ones at multiples of
//! eight.

use core::mem::size_of;

/// The version of this interface.
pub const VERSION: u32 = 1;

/// The maximum number of ranges of one [`CREATE`].
pub const MAX_RANGES: u32 = 65_536;

/// A range of the caller's address space, laid out as a 64-bit `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First byte; a multiple of the page size.
    pub addr: u64,
    /// Length in bytes; a multiple of the page size, not zero.
    pub len: u64,
}

/// The part of a file that a range is expected to map: [`CREATE_CHECK_BACKING`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// A descriptor of the file: a memfd, or a file on tmpfs or hugetlbfs.
    pub fd: i32,
    /// Zero.
    pub reserved: u32,
    /// The offset in the file that the range begins at; a multiple of the page size.
    pub offset: u64,
}

/// The descriptor of the dma-buf is closed on `execve`.
pub const CREATE_CLOEXEC: u32 = 1 << 0;
/// The call fails with `EAGAIN` unless the pinned pages are those that [`Create::backing`] names.
pub const CREATE_CHECK_BACKING: u32 = 1 << 1;
/// All flags of [`CREATE`] that this version supports. (Bit 2 is reserved for notifications of
/// discards. Bit 3 was used by a development version and stays unused.)
pub const CREATE_FLAGS: u32 = CREATE_CLOEXEC | CREATE_CHECK_BACKING;

/// The argument of [`CREATE`]: the ranges to pin and to export as one dma-buf.
///
/// The call waits for pages that a userfaultfd has yet to provide, until they arrive or the caller
/// is killed. A thread that alone resolves these userfaults would wait for itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Create {
    /// Size of this struct in bytes, as the caller knows it.
    pub size: u32,
    /// `CREATE_*`.
    pub flags: u32,
    /// Address of an array of `count` [`Range`]s, in the order of the buffer.
    pub ranges: u64,
    /// Number of ranges, 1 to [`MAX_RANGES`].
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// With [`CREATE_CHECK_BACKING`], address of an array of `count` [`Backing`]s; otherwise zero.
    pub backing: u64,
}

/// Mappings for the CPU use huge page-table entries where they fit.
pub const FEATURE_HUGE_MMAP: u64 = 1 << 0;
/// [`CREATE_CHECK_BACKING`] is supported.
pub const FEATURE_CHECK_BACKING: u64 = 1 << 1;
// Feature bit 2 was used by a development version and stays unused.
/// [`DISCARDS`] and the fields of [`INFO`] about discards are supported.
pub const FEATURE_DISCARDS: u64 = 1 << 3;

/// Charged to the user's locked pages, under `RLIMIT_MEMLOCK`.
pub const CHARGE_USER: u32 = 0;
// 1 was used by a development version and stays unused.
/// Charged to the user's allowance beyond the limit.
pub const CHARGE_ALLOWANCE: u32 = 2;
/// Charged to nothing: the process has `CAP_IPC_LOCK`.
pub const CHARGE_NONE: u32 = 3;

/// The argument of [`QUERY`]: version, features and limits of this kernel's pinbuf.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// In: size of this struct in bytes. Out: the kernel's own.
    pub size: u32,
    /// [`VERSION`].
    pub version: u32,
    /// `FEATURE_*`.
    pub features: u64,
    /// The `CREATE_*` flags that are supported.
    pub create_flags: u64,
    /// The maximum number of ranges per call.
    pub max_ranges: u32,
    /// In bytes; addresses and lengths must be multiples of it.
    pub page_size: u32,
    /// [`CHARGE_USER`]: how the limit is applied.
    pub charge_mode: u32,
    /// Zero.
    pub reserved: u32,
    /// The caller's `RLIMIT_MEMLOCK` in bytes; all ones: it is unlimited, or the caller has
    /// `CAP_IPC_LOCK`.
    pub memlock_bytes: u64,
    /// The amount that a user may keep in place beyond it, in bytes.
    pub allowance_bytes: u64,
    /// The part of it that live buffers of the caller's user use, in bytes.
    pub allowance_used: u64,
    /// The maximum amount for all users together, in bytes.
    pub allowance_system: u64,
}

/// The argument of [`INFO`]: one of pinbuf's dma-bufs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// In: size of this struct in bytes. Out: the kernel's own.
    pub size: u32,
    /// In: the dma-buf's descriptor.
    pub fd: i32,
    /// The size of the buffer in bytes.
    pub bytes: u64,
    /// The same in pages.
    pub pages: u64,
    /// Number of runs of physically adjacent pages in the buffer.
    pub extents: u64,
    /// Number of pins of pages or folios that the buffer holds.
    pub pins: u64,
    /// Kernel memory that the list of extents takes, in bytes.
    pub kernel_bytes: u64,
    /// Number of pages charged. An allowance is charged for whole large folios.
    pub charged_pages: u64,
    /// `CHARGE_*`: what they are charged to.
    pub charge: u32,
    /// Number of mappings of devices that exist.
    pub mappings: u32,
    /// `STATE_*`: the states of the buffer's parts.
    pub state: u64,
    /// Memory that the buffer keeps in place, in bytes: its pages, and the rest of the large folios
    /// that contain them. Of hugetlb, only the pages count.
    pub held_bytes: u64,
    /// Bytes that the memory's owner does not see any more: [`STATE_DISCARDED`].
    pub discarded_bytes: u64,
    /// Bytes whose state is unknown: [`STATE_UNSURE`].
    pub unsure_bytes: u64,
}

/// The memory's owner does not see this part of a buffer any more, and never will again.
pub const STATE_DISCARDED: u32 = 1 << 0;
/// Whether the memory's owner sees this part of a buffer is unknown.
pub const STATE_UNSURE: u32 = 1 << 1;

/// A part of a buffer that the memory's owner does not see any more, or may not see.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discard {
    /// First byte of the buffer; a multiple of the page size.
    pub offset: u64,
    /// Length in bytes; a multiple of the page size, not zero.
    pub len: u64,
    /// One of `STATE_*`.
    pub state: u32,
    /// Zero.
    pub reserved: u32,
}

/// The argument of [`DISCARDS`]: which parts of a buffer the memory's owner does not see any more.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discards {
    /// In: size of this struct in bytes. Out: the kernel's own.
    pub size: u32,
    /// In: the dma-buf's descriptor.
    pub fd: i32,
    /// In: the first byte to check, a multiple of the page size. Out: the byte after the last one
    /// that was checked; the size of the buffer if nothing is left.
    pub offset: u64,
    /// Address of an array of [`Discard`]s.
    pub list: u64,
    /// In: capacity of the array, in elements. Out: number of elements that were filled in.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// The type byte of the ioctl numbers, which follow udmabuf's `'u' 40-4F`.
pub const IOC_TYPE: u32 = b'u' as u32;
/// The number of [`CREATE`] within [`IOC_TYPE`].
pub const NR_CREATE: u32 = 0x50;
/// The number of [`QUERY`] within [`IOC_TYPE`].
pub const NR_QUERY: u32 = 0x51;
/// The number of [`INFO`] within [`IOC_TYPE`].
pub const NR_INFO: u32 = 0x52;
/// The number of [`DISCARDS`] within [`IOC_TYPE`].
pub const NR_DISCARDS: u32 = 0x53;

const WRITE: u32 = 1;
const READ_WRITE: u32 = 3;

/// An ioctl number, as `_IOC` of `<asm-generic/ioctl.h>` composes it.
const fn ioc(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | IOC_TYPE << 8 | nr
}

/// Pins ranges and returns a dma-buf's descriptor; takes a [`Create`].
pub const CREATE: u32 = ioc(WRITE, NR_CREATE, size_of::<Create>());
/// Returns version, features and limits; takes a [`Query`].
pub const QUERY: u32 = ioc(READ_WRITE, NR_QUERY, size_of::<Query>());
/// Describes a dma-buf; takes an [`Info`].
pub const INFO: u32 = ioc(READ_WRITE, NR_INFO, size_of::<Info>());
/// Lists the parts of a dma-buf that the memory's owner does not see any more; takes a
/// [`Discards`].
pub const DISCARDS: u32 = ioc(READ_WRITE, NR_DISCARDS, size_of::<Discards>());

// The layout is part of the contract.
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Backing>() == 16);
const _: () = assert!(size_of::<Create>() == 32);
const _: () = assert!(size_of::<Query>() == 72);
const _: () = assert!(size_of::<Info>() == 96);
const _: () = assert!(size_of::<Discard>() == 24);
const _: () = assert!(size_of::<Discards>() == 32);
