// SPDX-License-Identifier: MIT OR Apache-2.0

//! `/dev/pinbuf`.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use pinbuf_uapi as uapi;

use crate::memory::check_aligned;
use crate::{DmaBuf, Error, Region, RegionSlice, Result};

pub use pinbuf_uapi::Range;

nix::ioctl_write_ptr_bad!(ioctl_create, uapi::CREATE, uapi::Create);
nix::ioctl_readwrite_bad!(ioctl_query, uapi::QUERY, uapi::Query);
nix::ioctl_readwrite_bad!(ioctl_info, uapi::INFO, uapi::Info);

/// What the pages of a buffer are charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChargedTo {
    /// The locked pages of the user, under `RLIMIT_MEMLOCK`.
    User,
    /// The user's allowance beyond the limit.
    Allowance,
    /// Nothing: the process has `CAP_IPC_LOCK`, which lifts the limit.
    Nothing,
    /// A value that this version of the library does not know.
    Other(u32),
}

impl From<u32> for ChargedTo {
    fn from(number: u32) -> Self {
        match number {
            uapi::CHARGE_USER => Self::User,
            uapi::CHARGE_ALLOWANCE => Self::Allowance,
            uapi::CHARGE_NONE => Self::Nothing,
            other => Self::Other(other),
        }
    }
}

/// The features of the kernel's pinbuf, and the limits of the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Query {
    /// The version of the interface.
    pub version: u32,
    /// Buffers are mapped with huge page-table entries where they fit.
    pub huge_mmap: bool,
    /// [`Device::export_file_ranges`] is supported.
    pub check_backing: bool,
    /// [`DmaBuf::discarded`] is supported.
    pub discards: bool,
    /// Maximum number of ranges in one call.
    pub max_ranges: usize,
    /// Page size in bytes: addresses and lengths must be multiples of it.
    pub page_size: usize,
    /// How the limit is applied: [`ChargedTo::User`].
    pub charged_to: ChargedTo,
    /// `RLIMIT_MEMLOCK` in bytes; `None` means that there is no limit.
    pub memlock: Option<u64>,
    /// Bytes that a user may keep in place beyond the limit.
    pub allowance: u64,
    /// Bytes of the allowance that live buffers of this user take.
    pub allowance_used: u64,
    /// Bytes that all users together may keep in place beyond their limits.
    pub allowance_system: u64,
}

/// A range, and the file and offset that the caller expects it to map.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The range of the address space.
    pub range: Range,
    /// The file: a memfd, or one on tmpfs or hugetlbfs.
    pub file: BorrowedFd<'a>,
    /// The byte of the file that the range's first byte maps; a multiple of the page size.
    pub offset: u64,
}

/// `/dev/pinbuf`, opened.
///
/// It has no state: any number of threads may use one at the same time, also after `fork`.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl Device {
    /// The path of the device.
    pub const PATH: &'static str = "/dev/pinbuf";

    /// Opens the device.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`], [`Error::NotPermitted`], [`Error::TooManyFiles`].
    ///
    /// ```no_run
    /// let device = pinbuf::Device::open()?;
    /// println!("version {}", device.query()?.version);
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub fn open() -> Result<Self> {
        Self::open_path(Self::PATH)
    }

    /// Opens the device at another path, for example in a container.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open), and [`Error::NotPinbuf`].
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(path);
        let file = opened.map_err(|error| {
            match error
                .raw_os_error()
                .map_or(Errno::UnknownErrno, Errno::from_raw)
            {
                Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => Error::NoDevice,
                Errno::EACCES | Errno::EPERM => Error::NotPermitted,
                errno => Error::system("open")(errno),
            }
        })?;
        Self::from_fd(file.into())
    }

    /// Takes an open descriptor of the device, for example from a process with the permission to open it.
    ///
    /// # Errors
    ///
    /// [`Error::NotPinbuf`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let device = Self(fd);
        match device.query() {
            Ok(_) => Ok(device),
            Err(Error::System { .. }) => Err(Error::NotPinbuf),
            Err(error) => Err(error),
        }
    }

    /// Returns the features of the kernel's pinbuf and the limits of the caller.
    ///
    /// # Errors
    ///
    /// No error is expected if the device could be opened.
    pub fn query(&self) -> Result<Query> {
        let mut query = uapi::Query {
            size: size_of::<uapi::Query>() as u32,
            ..Default::default()
        };
        // SAFETY: PINBUF_QUERY reads and writes this struct.
        unsafe { ioctl_query(self.0.as_raw_fd(), &mut query) }.map_err(|errno| Error::System {
            call: "PINBUF_QUERY",
            errno,
        })?;
        Ok(Query {
            version: query.version,
            huge_mmap: query.features & uapi::FEATURE_HUGE_MMAP != 0,
            check_backing: query.features & uapi::FEATURE_CHECK_BACKING != 0,
            discards: query.features & uapi::FEATURE_DISCARDS != 0,
            max_ranges: query.max_ranges as usize,
            page_size: query.page_size as usize,
            charged_to: query.charge_mode.into(),
            memlock: (query.memlock_bytes != u64::MAX).then_some(query.memlock_bytes),
            allowance: query.allowance_bytes,
            allowance_used: query.allowance_used,
            allowance_system: query.allowance_system,
        })
    }

    /// Makes a buffer of a whole region.
    ///
    /// # Errors
    ///
    /// [`Error::OverLimit`], [`Error::NotPinnable`] (for memory of huge pages: the pool is
    /// exhausted), [`Error::Busy`], [`Error::TooManyFiles`], [`Error::Interrupted`].
    ///
    /// ```no_run
    /// let device = pinbuf::Device::open()?;
    /// let memory = pinbuf::Region::huge_advised(64 << 20)?;
    /// let buffer = device.export(&memory)?;
    /// assert_eq!(buffer.size()?, 64 << 20);
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub fn export(&self, region: &Region) -> Result<DmaBuf> {
        self.export_slices(&[region.as_slice()])
    }

    /// Makes a buffer of parts of regions, in the order given. Parts may repeat and overlap.
    ///
    /// # Errors
    ///
    /// As for [`export`](Self::export); [`Error::Empty`] without parts, [`Error::TooManyRanges`].
    ///
    /// ```no_run
    /// let device = pinbuf::Device::open()?;
    /// let memory = pinbuf::Region::anonymous(16 * 4096)?;
    /// // The second page, then the first.
    /// let parts = [memory.slice(4096, 4096)?, memory.slice(0, 4096)?];
    /// let buffer = device.export_slices(&parts)?;
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub fn export_slices(&self, parts: &[RegionSlice<'_>]) -> Result<DmaBuf> {
        let ranges: Vec<Range> = parts.iter().map(RegionSlice::range).collect();
        self.create(&ranges, &[])
    }

    /// Makes a buffer of ranges of this process's address space, which consist of whole pages.
    ///
    /// # Safety
    ///
    /// From this call until the last user of the buffer (a copy of the descriptor, a mapping, a
    /// device) is gone, other processes and devices can read and write the memory at any time. So
    /// no reference to it may exist, except through types that permit this, such as atomics; it
    /// must hold nothing whose change would break an invariant; and if the memory is freed and
    /// allocated again, the buffer still shows the same pages.
    ///
    /// # Errors
    ///
    /// As for [`export_slices`](Self::export_slices); [`Error::Misaligned`], [`Error::TooLarge`],
    /// and [`Error::NotPinnable`] for ranges that are not mapped writable, or not memory.
    ///
    /// ```no_run
    /// use std::alloc::{alloc_zeroed, Layout};
    ///
    /// let device = pinbuf::Device::open()?;
    /// let layout = Layout::from_size_align(8192, 4096).expect("a valid layout");
    /// // SAFETY: the layout has a size.
    /// let memory = unsafe { alloc_zeroed(layout) };
    /// assert!(!memory.is_null());
    /// let range = pinbuf::Range { addr: memory as u64, len: 8192 };
    /// // SAFETY: there is no reference to the memory, and it is never freed.
    /// let buffer = unsafe { device.export_ranges(&[range])? };
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub unsafe fn export_ranges(&self, ranges: &[Range]) -> Result<DmaBuf> {
        self.create(ranges, &[])
    }

    /// The same for ranges that map files, if other threads may change the mappings at the same
    /// time: the kernel compares the pages that it pinned with those of the file.
    ///
    /// # Safety
    ///
    /// As for [`export_ranges`](Self::export_ranges), for the memory of the files.
    ///
    /// # Errors
    ///
    /// As for [`export_ranges`](Self::export_ranges); [`Error::NotTheBacking`].
    ///
    /// ```no_run
    /// # let device = pinbuf::Device::open()?;
    /// let memory = pinbuf::Region::memfd("frame", 1 << 20, None)?;
    /// let part = pinbuf::FileRange {
    ///     range: pinbuf::Range { addr: memory.as_ptr() as u64 + 4096, len: 8192 },
    ///     file: memory.memfd_descriptor().expect("a region with a memfd"),
    ///     offset: 4096,
    /// };
    /// // SAFETY: a region shows its memory through no reference.
    /// let buffer = unsafe { device.export_file_ranges(&[part])? };
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub unsafe fn export_file_ranges(&self, parts: &[FileRange<'_>]) -> Result<DmaBuf> {
        let ranges: Vec<Range> = parts.iter().map(|part| part.range).collect();
        let backing = parts
            .iter()
            .map(|part| backing(part.file, part.offset))
            .collect::<Result<Vec<_>>>()?;
        self.create(&ranges, &backing)
    }

    fn create(&self, ranges: &[Range], backing: &[uapi::Backing]) -> Result<DmaBuf> {
        let bytes = check_ranges(ranges)?;
        let mut create = uapi::Create {
            size: size_of::<uapi::Create>() as u32,
            flags: uapi::CREATE_CLOEXEC,
            ranges: ranges.as_ptr() as u64,
            count: ranges.len() as u32,
            reserved: 0,
            backing: 0,
        };
        if !backing.is_empty() {
            create.flags |= uapi::CREATE_CHECK_BACKING;
            create.backing = backing.as_ptr() as u64;
        }
        // SAFETY: PINBUF_CREATE reads the struct and the lists that it names; what is pinned is
        // memory of regions, to which Rust knows no references, or what the caller of an unsafe
        // function vouches for.
        let fd = unsafe { ioctl_create(self.0.as_raw_fd(), &create) }
            .map_err(|errno| Error::of_create(errno, bytes))?;
        // SAFETY: the kernel has just returned it, so it has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf::of_kernel(fd))
    }

    pub(crate) fn info(&self, buffer: BorrowedFd<'_>) -> Result<uapi::Info> {
        let mut info = uapi::Info {
            size: size_of::<uapi::Info>() as u32,
            fd: buffer.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: PINBUF_INFO reads and writes this struct.
        match unsafe { ioctl_info(self.0.as_raw_fd(), &mut info) } {
            Ok(_) => Ok(info),
            Err(Errno::EINVAL) => Err(Error::NotADmaBuf),
            Err(errno) => Err(Error::system("PINBUF_INFO")(errno)),
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> Self {
        device.0
    }
}

/// A copy of a descriptor that belongs to others.
impl TryFrom<BorrowedFd<'_>> for Device {
    type Error = Error;

    fn try_from(fd: BorrowedFd<'_>) -> Result<Self> {
        Self::from_fd(crate::dmabuf::copy(fd)?)
    }
}

impl TryFrom<OwnedFd> for Device {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        Self::from_fd(fd)
    }
}

/// A place in a file, in the form that the kernel takes.
fn backing(file: BorrowedFd<'_>, offset: u64) -> Result<uapi::Backing> {
    check_aligned(offset)?;
    Ok(uapi::Backing {
        fd: file.as_raw_fd(),
        reserved: 0,
        offset,
    })
}

/// Checks as much as possible without the kernel, and returns the sum in bytes.
fn check_ranges(ranges: &[Range]) -> Result<u64> {
    let max = uapi::MAX_RANGES as usize;
    if ranges.len() > max {
        return Err(Error::TooManyRanges {
            count: ranges.len(),
            max,
        });
    }
    let mut bytes = 0u64;
    for range in ranges {
        if range.len == 0 {
            return Err(Error::Empty);
        }
        check_aligned(range.addr)?;
        check_aligned(range.len)?;
        range.addr.checked_add(range.len).ok_or(Error::TooLarge)?;
        bytes = bytes.checked_add(range.len).ok_or(Error::TooLarge)?;
    }
    if bytes == 0 {
        return Err(Error::Empty);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let range = |addr, len| Range { addr, len };
        assert_eq!(
            check_ranges(&[range(4096, 8192), range(4096, 4096)]),
            Ok(12288)
        );
        assert_eq!(check_ranges(&[]), Err(Error::Empty));
        assert_eq!(check_ranges(&[range(4096, 0)]), Err(Error::Empty));
        let misaligned = Err(Error::Misaligned {
            value: 5,
            align: 4096,
        });
        assert_eq!(check_ranges(&[range(5, 4096)]), misaligned);
        assert_eq!(check_ranges(&[range(0, 5)]), misaligned);
        assert_eq!(check_ranges(&[range(!4095, 4096)]), Err(Error::TooLarge));
        let half = range(0, 1 << 63);
        assert_eq!(check_ranges(&[half, half]), Err(Error::TooLarge));
        let many = vec![range(4096, 4096); 65_537];
        assert!(matches!(
            check_ranges(&many),
            Err(Error::TooManyRanges { .. })
        ));
        assert_eq!(check_ranges(&many[1..]), Ok(65_536 * 4096));
        // Up to the last page that has an end.
        assert_eq!(check_ranges(&[range(!8191, 4096)]), Ok(4096));
    }

    #[test]
    fn other_files_are_not_the_device() {
        assert_eq!(Device::open_path("/nowhere").err(), Some(Error::NoDevice));
        assert_eq!(Device::open_path("/dev/null").err(), Some(Error::NotPinbuf));
    }
}
