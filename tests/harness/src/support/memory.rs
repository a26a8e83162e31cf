// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of every kind, mapped by hand and reached through raw pointers.
//!
//! Other processes, devices and other mappings write to it, so no reference into it ever exists.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_uapi::Range;

use super::kernel;

/// The page size, which is also what every test counts in.
pub const PAGE: usize = match option_env!("PINBUF_TEST_PAGES") {
    None => 4 << 10,
    Some(size) => match size.as_bytes() {
        b"4K" => 4 << 10,
        b"16K" => 16 << 10,
        _ => panic!("PINBUF_TEST_PAGES is neither 4K nor 16K"),
    },
};
/// The size of a huge page: what a page table, a page of 8-byte entries, maps.
pub const HUGE: usize = PAGE / 8 * PAGE;
/// The number of pages in a huge page.
pub const BLOCK: usize = HUGE / PAGE;
/// The size of a gigantic page.
pub const GIGA: usize = 1 << 30;

/// Reading and writing.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping, undone when dropped.
#[derive(Debug)]
pub struct Memory {
    addr: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; access is through `&self` because
// others write to it at any time anyway.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// `mmap`, with an address that is a hint or, with `MAP_FIXED`, owned by the caller.
fn mmap(
    addr: *mut u8,
    len: usize,
    prot: i32,
    flags: i32,
    fd: Option<BorrowedFd<'_>>,
    offset: u64,
) -> Result<*mut u8, Errno> {
    let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
    // SAFETY: a new mapping; where `MAP_FIXED` replaces one, the caller owns that.
    let result = unsafe { libc::mmap(addr.cast(), len, prot, flags, fd, offset as i64) };
    if result == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(result.cast())
    }
}

impl Memory {
    /// Maps `len` bytes of `fd`, or of nothing, anywhere.
    pub fn map(
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: u64,
    ) -> Result<Self, Errno> {
        let addr = mmap(ptr::null_mut(), len, prot, flags, fd, offset)?;
        Ok(Self { addr, len })
    }

    /// Maps as [`map`](Self::map), at a multiple of `align`.
    pub fn map_aligned(
        len: usize,
        align: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: u64,
    ) -> Result<Self, Errno> {
        Self::map_congruent(len, align, 0, prot, flags, fd, offset)
    }

    /// Maps as [`map`](Self::map), at `remainder` beyond a multiple of `align`.
    pub fn map_congruent(
        len: usize,
        align: usize,
        remainder: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: u64,
    ) -> Result<Self, Errno> {
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let span = len + 2 * align;
        let whole = Self::map(span, libc::PROT_NONE, reserve, None, 0)?;
        let base = whole.addr;
        std::mem::forget(whole);
        let start = (base as usize).next_multiple_of(align) + remainder - base as usize;
        // Give the margins back, and replace what is between them.
        let end = (start + len).next_multiple_of(PAGE);
        let addr = base.wrapping_add(start);
        let pieces = [(base, start), (base.wrapping_add(end), span - end)];
        for (addr, len) in pieces.into_iter().filter(|piece| piece.1 > 0) {
            drop(Self { addr, len });
        }
        let inner = Self { addr, len };
        mmap(addr, len, prot, flags | libc::MAP_FIXED, fd, offset)?;
        Ok(inner)
    }

    /// Private anonymous memory, not touched yet.
    pub fn anonymous(len: usize) -> Result<Self> {
        Self::map(len, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None, 0)
            .with_context(|| format!("mapping {len} bytes"))
    }

    /// Private anonymous memory in 4 KiB pages that are not adjacent, at least not all of them.
    pub fn small_pages(len: usize) -> Result<Self> {
        let memory = Self::anonymous(len)?;
        memory.keep_small(0, len)?;
        Ok(memory)
    }

    /// Private anonymous memory below 4 GiB, which no flag asks for on all architectures.
    pub fn low(len: usize) -> Result<Self> {
        const STEP: usize = 16 << 20;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        for addr in (STEP..(1 << 32) - len).step_by(STEP) {
            match mmap(ptr::without_provenance_mut(addr), len, RW, flags, None, 0) {
                Ok(addr) => return Ok(Self { addr, len }),
                Err(Errno::EEXIST) => {}
                Err(error) => return Err(error).context("mapping below 4 GiB"),
            }
        }
        bail!("there is no room for {len} bytes below 4 GiB")
    }

    /// A shared mapping of a file from its beginning, at an address where nothing is.
    pub fn shared_at(fd: impl AsFd, len: usize, addr: u64) -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        let addr = ptr::without_provenance_mut(addr as usize);
        let addr = mmap(addr, len, RW, flags, Some(fd.as_fd()), 0).context("mapping a file")?;
        Ok(Self { addr, len })
    }

    /// A shared mapping of a file from its beginning.
    pub fn shared(fd: impl AsFd, len: usize) -> Result<Self> {
        Self::map(len, RW, libc::MAP_SHARED, Some(fd.as_fd()), 0).context("mapping a file shared")
    }

    /// A private mapping of a file from its beginning.
    pub fn private(fd: impl AsFd, len: usize) -> Result<Self> {
        Self::map(len, RW, libc::MAP_PRIVATE, Some(fd.as_fd()), 0).context("mapping a file private")
    }

    /// Its first byte.
    pub fn addr(&self) -> u64 {
        self.addr as u64
    }

    /// Its size in bytes.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// All of it.
    pub fn range(&self) -> Range {
        self.part(0, self.len)
    }

    /// `len` bytes at `offset`, which may lie outside.
    pub fn part(&self, offset: usize, len: usize) -> Range {
        Range {
            addr: self.addr() + offset as u64,
            len: len as u64,
        }
    }

    /// A pointer into it.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len, "{offset} is beyond {}", self.len);
        self.addr.wrapping_add(offset)
    }

    fn span(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            len <= self.len && offset <= self.len - len,
            "{offset}+{len} of {}",
            self.len
        );
        self.addr.wrapping_add(offset)
    }

    /// Copies from it.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let from = self.span(offset, data.len());
        // SAFETY: inside of the mapping; `data` is a Rust allocation, so apart from it. A mapping
        // that cannot be read ends the process by a signal, which is what such a test expects.
        unsafe { ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) };
    }

    /// Copies to it.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let to = self.span(offset, data.len());
        // SAFETY: as in `read`; nothing of Rust's lies in the mapping.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Reads eight bytes.
    pub fn get(&self, offset: usize) -> u64 {
        let from = self.span(offset, 8).cast::<u64>();
        // SAFETY: inside of the mapping, and volatile as others write to it.
        unsafe { from.read_unaligned_volatile() }
    }

    /// Writes eight bytes.
    pub fn set(&self, offset: usize, value: u64) {
        let to = self.span(offset, 8).cast::<u64>();
        // SAFETY: as in `get`.
        unsafe { to.write_unaligned_volatile(value) };
    }

    /// Reads one byte of each page, which makes every page present.
    pub fn touch(&self) {
        for offset in (0..self.len).step_by(PAGE) {
            std::hint::black_box(self.get(offset));
        }
    }

    /// Writes one word of each page, which makes every page one of its own.
    pub fn touch_to_write(&self) {
        for offset in (0..self.len).step_by(PAGE) {
            self.set(offset, offset as u64);
        }
    }

    /// `madvise` on a part.
    pub fn advise(&self, offset: usize, len: usize, advice: i32) -> Result<(), Errno> {
        // SAFETY: the part belongs to this mapping, and no Rust object lies in it.
        Errno::result(unsafe { libc::madvise(self.span(offset, len).cast(), len, advice) })?;
        Ok(())
    }

    /// Keeps transparent huge pages out of a part. A kernel without them refuses that advice, and has to.
    pub fn keep_small(&self, offset: usize, len: usize) -> Result<()> {
        let has = kernel::has_transparent_huge_pages();
        match self.advise(offset, len, libc::MADV_NOHUGEPAGE) {
            Ok(()) if has => Ok(()),
            Err(Errno::EINVAL) if !has => Ok(()),
            answer => bail!("MADV_NOHUGEPAGE: {answer:?}; transparent huge pages: {has}"),
        }
    }

    /// `mprotect` on a part.
    pub fn protect(&self, offset: usize, len: usize, prot: i32) -> Result<(), Errno> {
        // SAFETY: the part belongs to this mapping, and no Rust object lies in it.
        Errno::result(unsafe { libc::mprotect(self.span(offset, len).cast(), len, prot) })?;
        Ok(())
    }

    /// `munmap` on a part, which leaves a hole.
    pub fn unmap(&self, offset: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: the part belongs to this mapping, and no Rust object lies in it.
        Errno::result(unsafe { libc::munmap(self.span(offset, len).cast(), len) })?;
        Ok(())
    }

    /// Puts new private anonymous memory where a part was.
    pub fn replace(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        mmap(self.span(offset, len), len, RW, flags, None, 0)?;
        Ok(())
    }

    /// Puts a shared mapping of a file where a part was.
    pub fn replace_by(
        &self,
        at: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        offset: usize,
    ) -> Result<(), Errno> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        mmap(self.span(at, len), len, RW, flags, Some(fd), offset as u64)?;
        Ok(())
    }

    /// `mremap` to another size, and with `MREMAP_MAYMOVE` to another place.
    pub fn remap(&mut self, len: usize, flags: i32) -> Result<(), Errno> {
        // SAFETY: the whole mapping is this object's, which keeps what the call returns.
        let result = unsafe { libc::mremap(self.addr.cast(), self.len, len, flags) };
        if result == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        self.addr = result.cast();
        self.len = len;
        Ok(())
    }

    /// `mremap` of a part of it to a part of `target`, which it replaces; leaves a hole.
    pub fn move_part(
        &self,
        offset: usize,
        len: usize,
        target: &Self,
        at: usize,
    ) -> Result<(), Errno> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to) = (self.span(offset, len), target.span(at, len));
        // SAFETY: both parts belong to mappings of this type, in which no Rust object lies.
        let result = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
        if result == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(())
    }

    /// `mremap` of all of it to where `target` is, which it replaces.
    pub fn remap_onto(&mut self, target: Self, flags: i32) -> Result<(), Errno> {
        let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert!(target.len >= self.len, "the target is too small");
        // SAFETY: both mappings are this object's from here on.
        let result =
            unsafe { libc::mremap(self.addr.cast(), self.len, self.len, flags, target.addr) };
        if result == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        std::mem::forget(target);
        self.addr = result.cast();
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's, and nothing points into it any more.
        let result = unsafe { libc::munmap(self.addr.cast(), self.len) };
        assert_eq!(result, 0, "munmap: {}", Errno::last());
    }
}

/// Volatile access where the pointer may be unaligned: by bytes.
trait Unaligned {
    /// Reads.
    ///
    /// # Safety
    /// As `ptr::read`, but for alignment.
    unsafe fn read_unaligned_volatile(self) -> u64;
    /// Writes.
    ///
    /// # Safety
    /// As `ptr::write`, but for alignment.
    unsafe fn write_unaligned_volatile(self, value: u64);
}

impl Unaligned for *mut u64 {
    unsafe fn read_unaligned_volatile(self) -> u64 {
        // SAFETY: the caller's promise; arrays of bytes have no alignment.
        u64::from_ne_bytes(unsafe { self.cast::<[u8; 8]>().read_volatile() })
    }

    unsafe fn write_unaligned_volatile(self, value: u64) {
        // SAFETY: the caller's promise; arrays of bytes have no alignment.
        unsafe { self.cast::<[u8; 8]>().write_volatile(value.to_ne_bytes()) };
    }
}

/// A memfd of `len` bytes.
pub fn memfd(len: usize, flags: u32) -> Result<OwnedFd> {
    // SAFETY: a constant name.
    let fd = unsafe { libc::memfd_create(c"pinbuf-selftest".as_ptr(), flags | libc::MFD_CLOEXEC) };
    Errno::result(fd).context("memfd_create")?;
    // SAFETY: the call has just returned it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    nix::unistd::ftruncate(&fd, len.try_into()?).context("sizing a memfd")?;
    Ok(fd)
}

/// A memfd of huge pages.
pub fn huge_memfd(len: usize) -> Result<OwnedFd> {
    memfd(
        len,
        libc::MFD_HUGETLB | HUGE.trailing_zeros() << libc::MFD_HUGE_SHIFT,
    )
}

/// A new file of `len` bytes in a directory, without a name.
pub fn file_in(directory: impl AsRef<Path>, len: usize) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    let directory = directory.as_ref();
    let name = directory.join(format!(".pinbuf-selftest-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&name)
        .with_context(|| format!("creating {}", name.display()))?;
    // In this order: a 9p server finds a file by its name.
    file.set_len(len as u64)?;
    std::fs::remove_file(&name)?;
    Ok(file)
}

/// Punches a hole into a file.
pub fn punch_hole(fd: impl AsFd, offset: usize, len: usize) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, len) = (libc::off_t::try_from(offset)?, libc::off_t::try_from(len)?);
    // SAFETY: touches no memory of this process.
    let result = unsafe { libc::fallocate(fd.as_fd().as_raw_fd(), mode, offset, len) };
    Errno::result(result).context("punching a hole")?;
    Ok(())
}

/// Bytes that depend on the page, the offset and `seed`.
pub fn pattern(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let first = offset / 8;
    let last = (offset + len as u64).div_ceil(8);
    let mut bytes = Vec::with_capacity(len + 16);
    for word in first..last {
        bytes.extend_from_slice(&stamp(seed, word).to_le_bytes());
    }
    let skip = (offset % 8) as usize;
    bytes.drain(..skip);
    bytes.truncate(len);
    bytes
}

/// One word of [`pattern`]: splitmix64's output function over both numbers.
pub fn stamp(seed: u64, word: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
