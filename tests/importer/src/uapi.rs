// SPDX-License-Identifier: MIT OR Apache-2.0

//! Declares for Rust what `importer.h` declares for C; the header describes it. `tests/host`
//! compares the two.

use std::mem::size_of;

/// The maximum number of mappings that one device holds at the same time.
pub const MAPPINGS: u32 = 8;

/// The device reads and writes.
pub const BIDIRECTIONAL: u32 = 0;
/// The device reads.
pub const TO_DEVICE: u32 = 1;
/// The device writes.
pub const FROM_DEVICE: u32 = 2;

/// [`ATTACH`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attach {
    /// The dma-buf.
    pub fd: i32,
    /// Width of the device's addresses, 24 to 64.
    pub mask_bits: u32,
    /// The maximum length of a segment in bytes; zero: not declared.
    pub max_seg: u32,
    /// Zero, or the address of a PCI device.
    pub pci: u32,
    /// No segment may cross a multiple of this plus one; zero: not declared.
    pub boundary: u64,
    /// Out: the longest segment that the DMA layer can map, in bytes.
    pub max_mapping: u64,
}

/// [`MAP`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Map {
    /// [`BIDIRECTIONAL`], [`TO_DEVICE`] or [`FROM_DEVICE`].
    pub direction: u32,
    /// Out: the mapping's number.
    pub mapping: u32,
    /// Out: nanoseconds.
    pub ns: u64,
}

/// [`UNMAP`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Unmap {
    /// The mapping's number.
    pub mapping: u32,
    /// Zero.
    pub reserved: u32,
    /// Out: nanoseconds.
    pub ns: u64,
}

/// One scatterlist entry as the device sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// DMA address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// [`REPORT`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// The mapping's number.
    pub mapping: u32,
    /// Capacity of the array, in elements.
    pub capacity: u32,
    /// Address of an array of [`Entry`]s.
    pub entries: u64,
    /// Out: number of entries.
    pub count: u64,
    /// Out: sum of their lengths.
    pub total: u64,
    /// Out: length of the shortest.
    pub min_len: u64,
    /// Out: length of the longest.
    pub max_len: u64,
    /// Out: bitwise OR of all addresses and lengths.
    pub align: u64,
    /// Out: number of entries that begin where the previous one ends.
    pub adjacent: u64,
}

/// [`RW`]: from the caller to the buffer.
pub const RW_WRITE: u32 = 1 << 0;
/// [`RW`]: through the kernel's mapping.
pub const RW_VMAP: u32 = 1 << 1;

/// [`RW`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rw {
    /// The mapping's number.
    pub mapping: u32,
    /// `RW_*`.
    pub flags: u32,
    /// First byte in the buffer.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Address of the caller's memory.
    pub data: u64,
}

/// [`VMAP`]'s and [`VUNMAP`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Time {
    /// Out: nanoseconds.
    pub ns: u64,
}

/// [`CPU`]: end, not begin.
pub const CPU_END: u32 = 1 << 0;

/// [`CPU`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// [`BIDIRECTIONAL`], [`TO_DEVICE`] or [`FROM_DEVICE`].
    pub direction: u32,
    /// `CPU_*`.
    pub flags: u32,
    /// Out: nanoseconds.
    pub ns: u64,
}

/// [`PIN`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Pin {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// One page per this number of bytes is pinned.
    pub stride: u64,
    /// Out: number of pages pinned.
    pub pages: u64,
    /// Out: nanoseconds.
    pub pin_ns: u64,
    /// Out: nanoseconds.
    pub unpin_ns: u64,
    /// A memfd, or -1.
    pub fd: i32,
    /// Zero.
    pub reserved: u32,
}

/// [`SEGMENTS`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Segments {
    /// Number of entries.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// Out: nanoseconds.
    pub map_ns: u64,
    /// Out: nanoseconds.
    pub unmap_ns: u64,
}

/// [`FAIL_PINS`]: all later calls, too.
pub const PINS_LASTING: u32 = 1 << 0;
/// [`FAIL_PINS`]: only calls with `FOLL_LONGTERM` count.
pub const PINS_LONGTERM: u32 = 1 << 1;
/// [`FAIL_PINS`]: every other later call, too.
pub const PINS_OTHER: u32 = 1 << 2;

/// [`FAIL_PINS`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FailPins {
    /// The first call that fails, from 1 on.
    pub nth: u32,
    /// `PINS_*`.
    pub flags: u32,
    /// The errno that it returns; zero: it returns that it pinned nothing.
    pub error: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`PINS_FAILED`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinsFailed {
    /// Out: number of calls that were counted.
    pub seen: u64,
    /// Out: number of these that were made to fail.
    pub failed: u64,
}

/// The maximum number of calls that [`SYNCS_END`] lists.
pub const SYNCS: u32 = 256;

/// One call that maintains caches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sync {
    /// Physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// [`BIDIRECTIONAL`], [`TO_DEVICE`] or [`FROM_DEVICE`].
    pub direction: u32,
    /// 1: `arch_sync_dma_for_cpu()`, 0: `arch_sync_dma_for_device()`.
    pub for_cpu: u32,
}

/// [`SYNCS_END`]'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Syncs {
    /// Address of an array of [`SYNCS`] elements.
    pub syncs: u64,
    /// Out: number of calls.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// No address is mapped.
pub const NOT_MAPPED: u64 = 0x100;

/// [`ATTRIBUTES`]' argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attributes {
    /// Where the caller has mapped the buffer's first page.
    pub addr: u64,
    /// Out: the attributes of that mapping.
    pub user: u64,
    /// Out: those of the kernel's mapping.
    pub vmap: u64,
    /// Out: those of the direct map.
    pub direct: u64,
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

const fn ioc(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | nr
}

/// Makes a device and attaches it; takes [`Attach`].
pub const ATTACH: u32 = ioc(READ | WRITE, 0xe0, size_of::<Attach>());
/// Detaches.
pub const DETACH: u32 = ioc(NONE, 0xe1, 0);
/// Maps; takes [`Map`].
pub const MAP: u32 = ioc(READ | WRITE, 0xe2, size_of::<Map>());
/// Unmaps; takes [`Unmap`].
pub const UNMAP: u32 = ioc(READ | WRITE, 0xe3, size_of::<Unmap>());
/// Describes a mapping; takes [`Report`].
pub const REPORT: u32 = ioc(READ | WRITE, 0xe4, size_of::<Report>());
/// Reads or writes; takes [`Rw`].
pub const RW: u32 = ioc(WRITE, 0xe5, size_of::<Rw>());
/// Maps into the kernel; takes [`Time`].
pub const VMAP: u32 = ioc(READ, 0xe6, size_of::<Time>());
/// Undoes [`VMAP`]; takes [`Time`].
pub const VUNMAP: u32 = ioc(READ, 0xe7, size_of::<Time>());
/// Begins or ends the kernel's access; takes [`Cpu`].
pub const CPU: u32 = ioc(READ | WRITE, 0xe8, size_of::<Cpu>());
/// Pins and unpins memory; takes [`Pin`].
pub const PIN: u32 = ioc(READ | WRITE, 0xe9, size_of::<Pin>());
/// Maps and unmaps a scatterlist; takes [`Segments`].
pub const SEGMENTS: u32 = ioc(READ | WRITE, 0xea, size_of::<Segments>());
/// Makes calls that pin fail; takes [`FailPins`].
pub const FAIL_PINS: u32 = ioc(WRITE, 0xeb, size_of::<FailPins>());
/// Ends [`FAIL_PINS`]; takes [`PinsFailed`].
pub const PINS_FAILED: u32 = ioc(READ, 0xec, size_of::<PinsFailed>());
/// Says whether new devices are coherent; takes a `u32`.
pub const COHERENT: u32 = ioc(WRITE, 0xee, size_of::<u32>());
/// Begins to note the maintenance of caches that calls of this task lead to.
pub const SYNCS_BEGIN: u32 = ioc(NONE, 0xef, 0);
/// Ends [`SYNCS_BEGIN`]; takes [`Syncs`].
pub const SYNCS_END: u32 = ioc(READ | WRITE, 0xf0, size_of::<Syncs>());
/// Describes mappings of the buffer's first page; takes [`Attributes`].
pub const ATTRIBUTES: u32 = ioc(READ | WRITE, 0xf1, size_of::<Attributes>());
/// Returns a dma-buf of one page that supports no operation.
pub const EXPORT: u32 = ioc(NONE, 0xed, 0);
