// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that may be exported safely.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{MapFlags, MmapAdvise};

use crate::memory::{check_aligned, check_inside, Memory};
use crate::{Error, Result};

/// The size of a huge page. Which sizes there are depends on the processor and on the size of ordinary pages; a size
/// that the kernel does not have is an [`Error::System`] or [`Error::NoHugePages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HugePage {
    /// 64 KiB: arm64 with pages of 4 KiB.
    Kib64,
    /// 2 MiB: x86-64, arm64.
    Mib2,
    /// 32 MiB: arm64, where it is the default with pages of 16 KiB.
    Mib32,
    /// 1 GiB. Such pages are usually reserved at boot (`hugepagesz=1G hugepages=N`).
    Gib1,
}

impl HugePage {
    /// The size in bytes.
    ///
    /// ```
    /// assert_eq!(pinbuf::HugePage::Mib2.bytes(), 2 << 20);
    /// ```
    pub const fn bytes(self) -> usize {
        match self {
            Self::Kib64 => 64 << 10,
            Self::Mib2 => 2 << 20,
            Self::Mib32 => 32 << 20,
            Self::Gib1 => 1 << 30,
        }
    }

    /// The system's default size: that of the pool whose pages `vm.nr_hugepages` sets. None if the kernel has no huge
    /// pages, or of another size.
    pub fn system() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Hugepagesize:"))?;
        let kib: usize = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
        [Self::Kib64, Self::Mib2, Self::Mib32, Self::Gib1]
            .into_iter()
            .find(|page| page.bytes() == kib << 10)
    }

    /// The flag for `mmap`: the size's logarithm.
    fn map_flag(self) -> MapFlags {
        let log = self.bytes().trailing_zeros() as libc::c_int;
        MapFlags::from_bits_retain(log << libc::MAP_HUGE_SHIFT)
    }

    /// The flag for `memfd_create`.
    fn memfd_flag(self) -> MFdFlags {
        MFdFlags::from_bits_retain(self.bytes().trailing_zeros() << libc::MFD_HUGE_SHIFT)
    }
}

/// Memory of this process that can be exported as a dma-buf.
///
/// It owns its memory, and never lends it by reference: bytes are copied with
/// [`read_at`](Self::read_at) and [`write_at`](Self::write_at), so a device or another process may
/// change them at any time. New memory is zeroed. Lengths are rounded up to whole pages of the
/// region's kind.
///
/// Private regions are not inherited by `fork`: otherwise the first write afterwards would give one
/// of the two processes a copy of the page, which the buffer does not have.
///
/// Dropping a region unmaps it; buffers made of it keep their pages.
///
/// ```
/// # fn main() -> pinbuf::Result<()> {
/// let memory = pinbuf::Region::anonymous(10_000)?;
/// assert_eq!(memory.len(), 10_000_usize.next_multiple_of(pinbuf::page_size()));
/// memory.write_at(5_000, b"hello")?;
/// let mut bytes = [0; 6];
/// memory.read_at(5_000, &mut bytes)?;
/// assert_eq!(&bytes, b"hello\0");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Region {
    memory: Memory,
    memfd: Option<OwnedFd>,
}

impl Region {
    /// Private anonymous memory of `len` bytes, as `malloc` gives.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`], [`Error::NoMemory`].
    pub fn anonymous(len: usize) -> Result<Self> {
        let len = round_up(len, crate::page_size())?;
        Self::private(Memory::anonymous(
            len,
            crate::page_size(),
            MapFlags::empty(),
        )?)
    }

    /// The same, aligned to a huge page-table entry (2 MiB with pages of 4 KiB) and with advice to the kernel to use transparent huge pages, which
    /// it does where it can.
    ///
    /// # Errors
    ///
    /// As for [`anonymous`](Self::anonymous).
    pub fn huge_advised(len: usize) -> Result<Self> {
        let len = round_up(len, crate::page_size())?;
        let memory = Memory::anonymous(len, crate::huge_entry(), MapFlags::empty())?;
        // Kernels without transparent huge pages refuse the advice; the memory is as good.
        let _ = memory.advise(MmapAdvise::MADV_HUGEPAGE);
        Self::private(memory)
    }

    /// Private memory of huge pages, which are reserved from the system's pool.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`]; [`Error::NoHugePages`] if the pool has too few;
    /// never [`Error::Misaligned`], as `len` is rounded up.
    pub fn hugetlb(len: usize, page: HugePage) -> Result<Self> {
        let len = round_up(len, page.bytes())?;
        // The kernel aligns it.
        let memory = Memory::anonymous(len, 1, MapFlags::MAP_HUGETLB | page.map_flag())
            .map_err(|error| no_huge_pages(error, len, page))?;
        Self::private(memory)
    }

    /// A memfd of `len` bytes that is mapped shared; with `page`, of huge pages. The file is sealed
    /// against shrinking and growing, and can be passed on (see
    /// [`memfd_descriptor`](Self::memfd_descriptor)). `name` is shown in `/proc`.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`], [`Error::NoMemory`], [`Error::TooManyFiles`], and with huge pages
    /// [`Error::NoHugePages`].
    pub fn memfd(name: &str, len: usize, page: Option<HugePage>) -> Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let flags = match page {
            None => flags,
            Some(page) => flags | MFdFlags::MFD_HUGETLB | page.memfd_flag(),
        };
        let unit = page.map_or(crate::page_size(), HugePage::bytes);
        let len = round_up(len, unit)?;
        // A name that has a zero in it ends there.
        let name = name.split('\0').next().unwrap_or_default();
        let fd = memfd_create(name, flags).map_err(|errno| match (errno, page) {
            (Errno::ENODEV, Some(page)) => Error::NoHugePages {
                bytes: len,
                page: page.bytes(),
            },
            (errno, _) => Error::system("memfd_create")(errno),
        })?;
        let size = i64::try_from(len).map_err(|_| Error::TooLarge)?;
        nix::unistd::ftruncate(&fd, size).map_err(Error::system("ftruncate"))?;
        // So that no mapping, ours or another's, can lose its memory (SIGBUS).
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::system("F_ADD_SEALS"))?;
        // The kernel aligns huge pages itself.
        let align = match page {
            None if len >= crate::huge_entry() => crate::huge_entry(),
            _ => 1,
        };
        let memory = Memory::shared(&fd, len, align).map_err(|error| match page {
            Some(page) => no_huge_pages(error, len, page),
            None => error,
        })?;
        Ok(Self {
            memory,
            memfd: Some(fd),
        })
    }

    fn private(memory: Memory) -> Result<Self> {
        memory
            .advise(MmapAdvise::MADV_DONTFORK)
            .map_err(Error::system("madvise"))?;
        Ok(Self {
            memory,
            memfd: None,
        })
    }

    /// The length in bytes: a multiple of the page size.
    #[allow(clippy::len_without_is_empty)] // No region is empty.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The address of the first byte. All users of a buffer of this region share the memory.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.address()
    }

    /// The memfd, if the region was made by [`Region::memfd`].
    pub fn memfd_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Copies bytes out of the region, from `offset` in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn read_at(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.memory.read_at(offset, to)
    }

    /// Copies bytes into the region, to `offset` in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.memory.write_at(offset, from)
    }

    /// Sets `len` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<()> {
        self.memory.fill(offset, len, byte)
    }

    /// A part, for [`Device::export_slices`](crate::Device::export_slices): `offset` and `len` in
    /// bytes, multiples of the page size.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::OutOfBounds`].
    ///
    /// ```
    /// # fn main() -> pinbuf::Result<()> {
    /// let page = pinbuf::page_size();
    /// let memory = pinbuf::Region::anonymous(16 * page)?;
    /// assert_eq!(memory.slice(page, 2 * page)?.len(), 2 * page);
    /// assert!(memory.slice(100, page).is_err());
    /// # Ok(())
    /// # }
    /// ```
    pub fn slice(&self, offset: usize, len: usize) -> Result<RegionSlice<'_>> {
        if len == 0 {
            return Err(Error::Empty);
        }
        check_aligned(offset as u64)?;
        check_aligned(len as u64)?;
        check_inside(offset, len, self.len())?;
        Ok(RegionSlice {
            region: self,
            offset,
            len,
        })
    }

    /// The whole region as a part.
    pub fn as_slice(&self) -> RegionSlice<'_> {
        RegionSlice {
            region: self,
            offset: 0,
            len: self.len(),
        }
    }
}

/// A part of a [`Region`], of whole pages.
#[derive(Clone, Copy, Debug)]
pub struct RegionSlice<'a> {
    region: &'a Region,
    offset: usize,
    len: usize,
}

impl RegionSlice<'_> {
    /// The length in bytes: a multiple of the page size.
    #[allow(clippy::len_without_is_empty)] // No slice is empty.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The offset in the region, bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn range(&self) -> crate::Range {
        let addr = self.region.as_ptr() as u64 + self.offset as u64;
        crate::Range {
            addr,
            len: self.len as u64,
        }
    }
}

fn round_up(len: usize, unit: usize) -> Result<usize> {
    if len == 0 {
        return Err(Error::Empty);
    }
    len.checked_next_multiple_of(unit)
        .filter(|&len| len <= isize::MAX as usize)
        .ok_or(Error::TooLarge)
}

fn no_huge_pages(error: Error, bytes: usize, page: HugePage) -> Error {
    match error {
        // EINVAL: the processor has no pages of this size.
        Error::NoMemory
        | Error::System {
            errno: Errno::EINVAL,
            ..
        } => Error::NoHugePages {
            bytes,
            page: page.bytes(),
        },
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_hold_bytes() {
        let regions = [
            Region::anonymous(1).unwrap(),
            Region::huge_advised(5 << 20).unwrap(),
            Region::memfd("test", 3 << 20, None).unwrap(),
        ];
        for region in regions {
            assert_eq!(region.len() % crate::page_size(), 0);
            region.fill(0, region.len(), 7).unwrap();
            let mut byte = [0];
            region.read_at(region.len() - 1, &mut byte).unwrap();
            assert_eq!(byte, [7]);
        }
        assert_eq!(Region::anonymous(0).err(), Some(Error::Empty));
        assert_eq!(Region::anonymous(usize::MAX).err(), Some(Error::TooLarge));
    }

    #[test]
    fn a_missing_huge_page_is_reported() {
        // 1 PiB.
        let error = Region::hugetlb(1 << 50, HugePage::Mib2).err();
        assert!(
            matches!(error, Some(Error::NoHugePages { .. })),
            "{error:?}"
        );
    }
}
