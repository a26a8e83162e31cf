// SPDX-License-Identifier: MIT OR Apache-2.0

//! Buffers: mapping, synchronising, describing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::statfs::{fstatfs, FsType};
use nix::unistd::{lseek, Whence};

use crate::memory::Memory;
use crate::{ChargedTo, Device, Error, Result};

const DMA_BUF_MAGIC: FsType = FsType(0x444d_4142);

nix::ioctl_write_ptr!(ioctl_sync, b'b', 0, u64);

const SYNC_READ: u64 = 1;
const SYNC_WRITE: u64 = 2;
const SYNC_END: u64 = 4;

/// The kind of access by the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read what devices wrote.
    Read,
    /// Write what devices will read.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    fn flags(self) -> u64 {
        match self {
            Self::Read => SYNC_READ,
            Self::Write => SYNC_WRITE,
            Self::ReadWrite => SYNC_READ | SYNC_WRITE,
        }
    }
}

/// What a buffer of pinbuf consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// The size in bytes.
    pub bytes: u64,
    /// The same in pages.
    pub pages: u64,
    /// Runs of physically adjacent pages.
    pub extents: u64,
    /// Number of references to pages and huge pages that the buffer holds.
    pub pins: u64,
    /// Kernel memory for the list of extents, in bytes.
    pub kernel_bytes: u64,
    /// Memory that the buffer keeps in place, in bytes: its pages, and the rest of the large folios,
    /// such as transparent huge pages, that contain them.
    pub held_bytes: u64,
    /// Number of pages that are charged.
    pub charged_pages: u64,
    /// What they are charged to.
    pub charged_to: ChargedTo,
    /// Number of live mappings by devices.
    pub mappings: u32,
    /// Of the size, bytes that the memory's owner does not see any more; [`DmaBuf::discarded`] says
    /// which.
    pub discarded_bytes: u64,
    /// Of the size, bytes of which it is unknown whether the owner sees them.
    pub unsure_bytes: u64,
}

/// A dma-buf.
///
/// It is a descriptor and nothing else: it can be converted into an [`OwnedFd`] and passed on, and
/// be made from one that another process sent. The pages live until the last copy of the descriptor
/// and the last mapping, the CPU's or a device's, are gone.
#[derive(Debug)]
pub struct DmaBuf(OwnedFd);

impl DmaBuf {
    pub(crate) fn of_kernel(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Takes a descriptor of a dma-buf, of any exporter.
    ///
    /// # Errors
    ///
    /// [`Error::NotADmaBuf`].
    ///
    /// ```
    /// let file = std::fs::File::open("/dev/null").expect("/dev/null");
    /// assert_eq!(pinbuf::DmaBuf::from_fd(file.into()).err(), Some(pinbuf::Error::NotADmaBuf));
    /// ```
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let kind = fstatfs(&fd)
            .map_err(Error::system("fstatfs"))?
            .filesystem_type();
        if kind == DMA_BUF_MAGIC {
            Ok(Self(fd))
        } else {
            Err(Error::NotADmaBuf)
        }
    }

    /// The size in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::System`], if the file of the descriptor was replaced by another one.
    pub fn size(&self) -> Result<usize> {
        let end = lseek(&self.0, 0, Whence::SeekEnd).map_err(Error::system("lseek"))?;
        usize::try_from(end).map_err(|_| Error::TooLarge)
    }

    /// Returns what the buffer consists of.
    ///
    /// # Errors
    ///
    /// [`Error::NotADmaBuf`] if the buffer belongs to another exporter.
    pub fn info(&self, device: &Device) -> Result<Info> {
        let info = device.info(self.0.as_fd())?;
        Ok(Info {
            bytes: info.bytes,
            pages: info.pages,
            extents: info.extents,
            pins: info.pins,
            kernel_bytes: info.kernel_bytes,
            held_bytes: info.held_bytes,
            charged_pages: info.charged_pages,
            charged_to: info.charge.into(),
            mappings: info.mappings,
            discarded_bytes: info.discarded_bytes,
            unsure_bytes: info.unsure_bytes,
        })
    }

    /// Maps the whole buffer for reading and writing. A buffer of 2 MiB or more is mapped at a
    /// multiple of what a huge entry maps (2 MiB with pages of 4 KiB), so that huge page-table entries fit.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`], [`Error::System`] for buffers that cannot be mapped.
    ///
    /// ```no_run
    /// # let buffer = pinbuf::Device::open()?.export(&pinbuf::Region::anonymous(1 << 20)?)?;
    /// let mapping = buffer.map()?;
    /// let access = mapping.begin(pinbuf::Access::Write)?;
    /// access.write_at(0, b"pixels")?;
    /// access.finish()?;
    /// # Ok::<(), pinbuf::Error>(())
    /// ```
    pub fn map(&self) -> Result<Mapping<'_>> {
        let len = self.size()?;
        let huge = crate::huge_entry();
        let align = if len >= huge { huge } else { 1 };
        // Where the address space has no room for the alignment, it may have room without.
        let memory = match Memory::shared(&self.0, len, align) {
            Err(_) if align > 1 => Memory::shared(&self.0, len, 1)?,
            result => result?,
        };
        Ok(Mapping {
            memory,
            buffer: self,
        })
    }

    /// Begins an access by the CPU, so that it sees what devices wrote. The access ends when the guard
    /// is dropped. Use this for accesses through the memory that the buffer was made of, or through a
    /// mapping that was made elsewhere; for a [`Mapping`] there is [`Mapping::begin`].
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`], [`Error::System`].
    pub fn begin_cpu_access(&self, access: Access) -> Result<SyncGuard<'_>> {
        self.sync(access.flags())?;
        Ok(SyncGuard {
            buffer: self,
            access,
            ended: false,
        })
    }

    fn sync(&self, flags: u64) -> Result<()> {
        loop {
            // SAFETY: DMA_BUF_IOCTL_SYNC reads a number.
            match unsafe { ioctl_sync(self.0.as_raw_fd(), &flags) } {
                Ok(_) => return Ok(()),
                // The interface asks for it: a signal, or a lock taken by another.
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(errno) => return Err(Error::system("DMA_BUF_IOCTL_SYNC")(errno)),
            }
        }
    }

    /// Duplicates the descriptor.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyFiles`].
    pub fn try_clone(&self) -> Result<Self> {
        copy(self.as_fd()).map(Self)
    }
}

/// Another descriptor of the same file.
pub(crate) fn copy(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|error| {
        let errno = error
            .raw_os_error()
            .map_or(Errno::UnknownErrno, Errno::from_raw);
        Error::system("F_DUPFD_CLOEXEC")(errno)
    })
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<DmaBuf> for OwnedFd {
    fn from(buffer: DmaBuf) -> Self {
        buffer.0
    }
}

/// A copy of a descriptor that belongs to others; the buffer is the same.
impl TryFrom<BorrowedFd<'_>> for DmaBuf {
    type Error = Error;

    fn try_from(fd: BorrowedFd<'_>) -> Result<Self> {
        Self::from_fd(copy(fd)?)
    }
}

impl TryFrom<OwnedFd> for DmaBuf {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        Self::from_fd(fd)
    }
}

/// An access by the CPU that has begun. It ends when this is dropped, or with
/// [`finish`](Self::finish), which returns errors.
#[derive(Debug)]
#[must_use = "the access ends when the guard is dropped"]
pub struct SyncGuard<'a> {
    buffer: &'a DmaBuf,
    access: Access,
    ended: bool,
}

impl SyncGuard<'_> {
    /// Ends the access: what the CPU wrote becomes visible to devices.
    ///
    /// # Errors
    ///
    /// [`Error::System`].
    pub fn finish(mut self) -> Result<()> {
        self.ended = true;
        self.buffer.sync(self.access.flags() | SYNC_END)
    }
}

impl Drop for SyncGuard<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // There is no way to return an error here; `finish` does.
            let _ = self.buffer.sync(self.access.flags() | SYNC_END);
        }
    }
}

/// A buffer, mapped for the CPU.
#[derive(Debug)]
pub struct Mapping<'a> {
    memory: Memory,
    buffer: &'a DmaBuf,
}

impl Mapping<'_> {
    /// The length in bytes.
    #[allow(clippy::len_without_is_empty)] // No buffer is empty.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The address of the first byte. Other processes and devices may read and write the memory
    /// at the same time; begin an access first.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.address()
    }

    /// Begins an access, during which bytes can be copied in and out.
    ///
    /// # Errors
    ///
    /// As for [`DmaBuf::begin_cpu_access`].
    pub fn begin(&self, access: Access) -> Result<CpuAccess<'_>> {
        Ok(CpuAccess {
            memory: &self.memory,
            guard: self.buffer.begin_cpu_access(access)?,
        })
    }
}

/// An access to a [`Mapping`] that has begun, and ends when this is dropped.
#[derive(Debug)]
#[must_use = "the access ends when this is dropped"]
pub struct CpuAccess<'a> {
    memory: &'a Memory,
    guard: SyncGuard<'a>,
}

impl CpuAccess<'_> {
    /// Copies bytes out of the buffer, from `offset` in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn read_at(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.memory.read_at(offset, to)
    }

    /// Copies bytes into the buffer, to `offset` in bytes. The access should be one for writing.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn write_at(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.memory.write_at(offset, from)
    }

    /// Sets `len` bytes from `offset` on. The access should be one for writing.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<()> {
        self.memory.fill(offset, len, byte)
    }

    /// Ends the access, and returns errors.
    ///
    /// # Errors
    ///
    /// [`Error::System`].
    pub fn finish(self) -> Result<()> {
        self.guard.finish()
    }
}
