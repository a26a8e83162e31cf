// SPDX-License-Identifier: MIT OR Apache-2.0

//! A software device that imports dma-bufs: the user-space side of `pinbuf_test_importer.ko`.
//!
//! An [`Importer`] is one device. It is attached to one dma-buf, maps it up to [`uapi::MAPPINGS`]
//! times, and reads and writes it at the DMA addresses of a mapping, or through a kernel mapping.

pub mod uapi;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The path of the module's device.
pub const PATH: &str = "/dev/pinbuf_test_importer";

/// The direction in which a device transfers data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// Both ways.
    Bidirectional = uapi::BIDIRECTIONAL,
    /// The device reads.
    ToDevice = uapi::TO_DEVICE,
    /// The device writes.
    FromDevice = uapi::FROM_DEVICE,
}

/// The limits of a device.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Width of its addresses.
    pub mask_bits: u32,
    /// The maximum length of a segment in bytes; zero: not declared, which means 64 KiB.
    pub max_segment: u32,
}

impl Limits {
    /// No limits.
    pub const NONE: Self = Self {
        mask_bits: 64,
        max_segment: u32::MAX,
    };
}

/// The number of a mapping, for this importer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping(u32);

/// One device.
#[derive(Debug)]
pub struct Importer {
    file: OwnedFd,
    max_mapping: u64,
}

/// Calls `ioctl` with a struct that the kernel reads and writes.
fn call<T>(fd: RawFd, command: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: every command that this crate passes takes a pointer to the `T` passed with it, whose
    // pointers and lengths the caller took from live slices.
    let result = unsafe { libc::ioctl(fd, command.into(), std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Opens the module's device, unattached.
///
/// # Errors
/// If the device does not exist.
pub fn open() -> io::Result<OwnedFd> {
    File::options()
        .read(true)
        .write(true)
        .open(PATH)
        .map(OwnedFd::from)
}

/// The cost of pinning a range.
#[derive(Clone, Copy, Debug)]
pub struct PinCost {
    /// The number of pages that were pinned.
    pub pages: u64,
    /// The time that pinning took.
    pub pin: Duration,
    /// The time that unpinning took.
    pub unpin: Duration,
}

/// Pins `len` bytes at `addr` of this process, one page per `stride` bytes, and unpins them.
///
/// # Errors
/// Those of `pin_user_pages_fast`.
pub fn pin_cost(addr: u64, len: u64, stride: u64) -> io::Result<PinCost> {
    cost(uapi::Pin {
        addr,
        len,
        stride,
        fd: -1,
        ..Default::default()
    })
}

/// Pins the folios of a part of a memfd, which has pages of `page` bytes, and unpins them.
///
/// # Errors
/// Those of `memfd_pin_folios`.
pub fn file_pin_cost(fd: BorrowedFd<'_>, offset: u64, len: u64, page: u64) -> io::Result<PinCost> {
    cost(uapi::Pin {
        addr: offset,
        len,
        stride: page,
        fd: fd.as_raw_fd(),
        ..Default::default()
    })
}

fn cost(mut argument: uapi::Pin) -> io::Result<PinCost> {
    call(open()?.as_raw_fd(), uapi::PIN, &mut argument)?;
    Ok(PinCost {
        pages: argument.pages,
        pin: Duration::from_nanos(argument.pin_ns),
        unpin: Duration::from_nanos(argument.unpin_ns),
    })
}

/// Makes dma-bufs without memory: the minimum cost of any exporter.
#[derive(Debug)]
pub struct EmptyExporter(OwnedFd);

impl EmptyExporter {
    /// Opens the module's device.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn new() -> io::Result<Self> {
        open().map(Self)
    }

    /// A dma-buf of one page that supports no operation.
    ///
    /// # Errors
    /// Those of `dma_buf_export` and `dma_buf_fd`.
    pub fn export(&self) -> io::Result<OwnedFd> {
        // SAFETY: the call takes no argument.
        let fd = unsafe { libc::ioctl(self.0.as_raw_fd(), uapi::EXPORT.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned it, so nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The cost of a scatterlist.
#[derive(Clone, Copy, Debug)]
pub struct SegmentCost {
    /// The time that allocating, filling and mapping it took.
    pub map: Duration,
    /// The time that unmapping and freeing it took.
    pub unmap: Duration,
}

/// Maps a scatterlist of `count` entries for a device without limits, and unmaps it.
///
/// # Errors
/// Those of `sg_alloc_table` and `dma_map_sgtable`.
pub fn segment_cost(count: u32) -> io::Result<SegmentCost> {
    let device = open()?;
    let mut argument = uapi::Segments {
        count,
        ..Default::default()
    };
    call(device.as_raw_fd(), uapi::SEGMENTS, &mut argument)?;
    Ok(SegmentCost {
        map: Duration::from_nanos(argument.map_ns),
        unmap: Duration::from_nanos(argument.unmap_ns),
    })
}

/// Which of a thread's calls of `pin_user_pages_fast` and `memfd_pin_folios` fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct PinFailure {
    /// The first call that fails, from 1 on.
    pub nth: u32,
    /// All later calls fail, too.
    pub lasting: bool,
    /// Only calls with `FOLL_LONGTERM` count: a page can still be pinned briefly.
    pub longterm_only: bool,
    /// The errno; zero: the call returns that it pinned nothing.
    pub error: i32,
}

/// Makes calls that pin fail, for the thread that uses it.
#[derive(Debug)]
pub struct FailingPins(OwnedFd);

impl FailingPins {
    /// Opens the module's device; nothing fails yet.
    ///
    /// # Errors
    /// If the module is not loaded.
    pub fn new() -> io::Result<Self> {
        open().map(Self)
    }

    /// Makes a call while pins fail, and returns the number of pins and how many of them failed.
    ///
    /// # Errors
    /// If the kernel has no kprobes, or does not allow probes of these functions.
    pub fn during<T>(
        &self,
        failure: PinFailure,
        call: impl FnOnce() -> T,
    ) -> io::Result<(T, uapi::PinsFailed)> {
        let flag = |set, flag| if set { flag } else { 0 };
        let argument = uapi::FailPins {
            nth: failure.nth,
            flags: flag(failure.lasting, uapi::PINS_LASTING)
                | flag(failure.longterm_only, uapi::PINS_LONGTERM),
            error: failure.error.unsigned_abs(),
            ..Default::default()
        };
        self.while_failing(argument, call)
    }

    /// Makes a call in which every other pin fails, from the first on.
    ///
    /// # Errors
    /// As for [`during`](Self::during).
    pub fn every_other<T>(
        &self,
        error: i32,
        call: impl FnOnce() -> T,
    ) -> io::Result<(T, uapi::PinsFailed)> {
        let argument = uapi::FailPins {
            nth: 1,
            flags: uapi::PINS_OTHER,
            error: error.unsigned_abs(),
            ..Default::default()
        };
        self.while_failing(argument, call)
    }

    fn while_failing<T>(
        &self,
        mut argument: uapi::FailPins,
        call: impl FnOnce() -> T,
    ) -> io::Result<(T, uapi::PinsFailed)> {
        let fd = self.0.as_raw_fd();
        self::call(fd, uapi::FAIL_PINS, &mut argument)?;
        let result = call();
        let mut counts = uapi::PinsFailed::default();
        self::call(fd, uapi::PINS_FAILED, &mut counts)?;
        Ok((result, counts))
    }
}

impl Importer {
    /// A new device, attached to a dma-buf.
    ///
    /// # Errors
    /// If the module is not loaded, and those of `dma_buf_attach`.
    pub fn attach(buffer: BorrowedFd<'_>, limits: Limits) -> io::Result<Self> {
        Self::attach_bounded(buffer, limits, 0)
    }

    /// The same for a device whose segments may not cross an address that is a multiple of
    /// `boundary` plus one; zero: not declared, which means 4 GiB.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach).
    pub fn attach_bounded(
        buffer: BorrowedFd<'_>,
        limits: Limits,
        boundary: u64,
    ) -> io::Result<Self> {
        let file = open()?;
        let mut argument = uapi::Attach {
            fd: buffer.as_raw_fd(),
            mask_bits: limits.mask_bits,
            max_seg: limits.max_segment,
            boundary,
            ..Default::default()
        };
        call(file.as_raw_fd(), uapi::ATTACH, &mut argument)?;
        Ok(Self {
            file,
            max_mapping: argument.max_mapping,
        })
    }

    /// A new device of which it is said whether caches are coherent with it.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if all devices are coherent on this machine; as for [`attach`](Self::attach).
    pub fn attach_coherent(buffer: BorrowedFd<'_>, coherent: bool) -> io::Result<Self> {
        let file = open()?;
        call(file.as_raw_fd(), uapi::COHERENT, &mut u32::from(coherent))?;
        let mut argument = uapi::Attach {
            fd: buffer.as_raw_fd(),
            mask_bits: Limits::NONE.mask_bits,
            max_seg: Limits::NONE.max_segment,
            ..Default::default()
        };
        call(file.as_raw_fd(), uapi::ATTACH, &mut argument)?;
        Ok(Self {
            file,
            max_mapping: argument.max_mapping,
        })
    }

    /// What maintenance of caches an action of this thread leads to, for whatever device.
    ///
    /// # Errors
    /// `EOPNOTSUPP` as above; if there are more calls than fit into a list.
    pub fn syncs_during<T>(&self, action: impl FnOnce() -> T) -> io::Result<(T, Vec<uapi::Sync>)> {
        let fd = self.file.as_raw_fd();
        call(fd, uapi::SYNCS_BEGIN, &mut 0_u32)?;
        let result = action();
        let mut list = vec![uapi::Sync::default(); uapi::SYNCS as usize];
        let mut argument = uapi::Syncs {
            syncs: list.as_mut_ptr() as u64,
            ..Default::default()
        };
        call(fd, uapi::SYNCS_END, &mut argument)?;
        if argument.count > uapi::SYNCS {
            return Err(io::Error::other("too many calls that maintain caches"));
        }
        list.truncate(argument.count as usize);
        Ok((result, list))
    }

    /// The memory attributes of the buffer's first page, mapped at an address of the caller's.
    ///
    /// # Errors
    /// `EOPNOTSUPP` on architectures other than arm64 and x86; without a mapping for the device.
    pub fn attributes(&self, addr: u64) -> io::Result<uapi::Attributes> {
        let mut argument = uapi::Attributes {
            addr,
            ..Default::default()
        };
        self.call(uapi::ATTRIBUTES, &mut argument)?;
        Ok(argument)
    }

    /// Attaches on behalf of a PCI device of domain 0 (bus << 8 | device << 3 | function), through
    /// whose IOMMU the buffer is then mapped. Such an importer cannot read or write as the device.
    ///
    /// # Errors
    /// If there is no such device, and as for [`attach`](Self::attach).
    pub fn attach_as(pci: u32, buffer: BorrowedFd<'_>, max_segment: u32) -> io::Result<Self> {
        let file = open()?;
        let mut argument = uapi::Attach {
            fd: buffer.as_raw_fd(),
            mask_bits: Limits::NONE.mask_bits,
            max_seg: max_segment,
            pci,
            ..Default::default()
        };
        call(file.as_raw_fd(), uapi::ATTACH, &mut argument)?;
        Ok(Self {
            file,
            max_mapping: argument.max_mapping,
        })
    }

    /// An attached device whose descriptor came from elsewhere, for example from another process.
    #[must_use]
    pub fn from_attached(file: OwnedFd) -> Self {
        Self {
            file,
            max_mapping: 0,
        }
    }

    /// The longest segment that the DMA layer maps for this device.
    #[must_use]
    pub fn max_mapping(&self) -> u64 {
        self.max_mapping
    }

    /// Detaches, which removes all mappings.
    ///
    /// # Errors
    /// If the device is not attached.
    pub fn detach(&self) -> io::Result<()> {
        self.call(uapi::DETACH, &mut ())
    }

    /// Maps the buffer and returns the duration of that.
    ///
    /// # Errors
    /// Those of `dma_buf_map_attachment`.
    pub fn map(&self, direction: Direction) -> io::Result<(Mapping, Duration)> {
        let mut argument = uapi::Map {
            direction: direction as u32,
            ..Default::default()
        };
        self.call(uapi::MAP, &mut argument)?;
        Ok((Mapping(argument.mapping), Duration::from_nanos(argument.ns)))
    }

    /// Removes a mapping and returns the duration of that.
    ///
    /// # Errors
    /// If there is no such mapping.
    pub fn unmap(&self, mapping: Mapping) -> io::Result<Duration> {
        let mut argument = uapi::Unmap {
            mapping: mapping.0,
            ..Default::default()
        };
        self.call(uapi::UNMAP, &mut argument)?;
        Ok(Duration::from_nanos(argument.ns))
    }

    /// The sums of a mapping's scatterlist.
    ///
    /// # Errors
    /// If there is no such mapping.
    pub fn report(&self, mapping: Mapping) -> io::Result<uapi::Report> {
        let mut argument = uapi::Report {
            mapping: mapping.0,
            ..Default::default()
        };
        self.call(uapi::REPORT, &mut argument)?;
        Ok(argument)
    }

    /// A mapping's scatterlist, entry by entry.
    ///
    /// # Errors
    /// If there is no such mapping, or it is too long.
    pub fn entries(&self, mapping: Mapping) -> io::Result<Vec<uapi::Entry>> {
        let capacity = self.report(mapping)?.count;
        let mut entries = vec![uapi::Entry::default(); usize::try_from(capacity).unwrap_or(0)];
        let mut argument = uapi::Report {
            mapping: mapping.0,
            capacity: u32::try_from(capacity).map_err(io::Error::other)?,
            entries: entries.as_mut_ptr() as u64,
            ..Default::default()
        };
        self.call(uapi::REPORT, &mut argument)?;
        Ok(entries)
    }

    /// Reads as the device does.
    ///
    /// # Errors
    /// If there is no such mapping, or if the range exceeds the buffer.
    pub fn read(&self, mapping: Mapping, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.transfer(mapping.0, 0, offset, data.as_mut_ptr(), data.len())
    }

    /// Writes as the device does.
    ///
    /// # Errors
    /// If there is no such mapping, or if the range exceeds the buffer.
    pub fn write(&self, mapping: Mapping, offset: u64, data: &[u8]) -> io::Result<()> {
        self.transfer(
            mapping.0,
            uapi::RW_WRITE,
            offset,
            data.as_ptr().cast_mut(),
            data.len(),
        )
    }

    /// Maps the buffer into the kernel and returns the duration of that.
    ///
    /// # Errors
    /// Those of `dma_buf_vmap`.
    pub fn vmap(&self) -> io::Result<Duration> {
        let mut argument = uapi::Time::default();
        self.call(uapi::VMAP, &mut argument)?;
        Ok(Duration::from_nanos(argument.ns))
    }

    /// Undoes [`vmap`](Self::vmap) and returns the duration of that.
    ///
    /// # Errors
    /// If there is no such mapping.
    pub fn vunmap(&self) -> io::Result<Duration> {
        let mut argument = uapi::Time::default();
        self.call(uapi::VUNMAP, &mut argument)?;
        Ok(Duration::from_nanos(argument.ns))
    }

    /// Reads through the kernel's mapping.
    ///
    /// # Errors
    /// If there is none, or if the range exceeds the buffer.
    pub fn vmap_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.transfer(0, uapi::RW_VMAP, offset, data.as_mut_ptr(), data.len())
    }

    /// Writes through the kernel's mapping.
    ///
    /// # Errors
    /// If there is none, or if the range exceeds the buffer.
    pub fn vmap_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let flags = uapi::RW_VMAP | uapi::RW_WRITE;
        self.transfer(0, flags, offset, data.as_ptr().cast_mut(), data.len())
    }

    /// Begins an access by the kernel and returns the duration of that.
    ///
    /// # Errors
    /// Those of `dma_buf_begin_cpu_access`.
    pub fn begin_cpu_access(&self, direction: Direction) -> io::Result<Duration> {
        self.cpu(direction, 0)
    }

    /// Ends an access by the kernel and returns the duration of that.
    ///
    /// # Errors
    /// Those of `dma_buf_end_cpu_access`.
    pub fn end_cpu_access(&self, direction: Direction) -> io::Result<Duration> {
        self.cpu(direction, uapi::CPU_END)
    }

    fn cpu(&self, direction: Direction, flags: u32) -> io::Result<Duration> {
        let mut argument = uapi::Cpu {
            direction: direction as u32,
            flags,
            ns: 0,
        };
        self.call(uapi::CPU, &mut argument)?;
        Ok(Duration::from_nanos(argument.ns))
    }

    /// Copies `len` bytes to or from `data`, which the callers take from a slice.
    fn transfer(
        &self,
        mapping: u32,
        flags: u32,
        offset: u64,
        data: *mut u8,
        len: usize,
    ) -> io::Result<()> {
        let mut argument = uapi::Rw {
            mapping,
            flags,
            offset,
            len: len as u64,
            data: data as u64,
        };
        self.call(uapi::RW, &mut argument)
    }

    fn call<T>(&self, command: u32, argument: &mut T) -> io::Result<()> {
        call(self.file.as_raw_fd(), command, argument)
    }
}

impl AsFd for Importer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Importer> for OwnedFd {
    fn from(importer: Importer) -> Self {
        importer.file
    }
}
