// SPDX-License-Identifier: MIT OR Apache-2.0

//! From udmabuf's items to pieces of files: the same checks, in the same order, with the same
//! errors as `udmabuf_create()` makes.

use core::ffi::c_int;

use pinbuf_uapi::{Backing, Range};

use crate::buffer::Buffer;
use crate::request::{Item, INLINE_ITEMS};
use crate::sys::{self, Errno, Plain, Result};

pub const PAGE: u64 = 4096;

const EINVAL: Errno = Errno(libc::EINVAL);
const EBADFD: Errno = Errno(libc::EBADFD);

/// How far back a list is searched for a file that was seen before.
const LOOK_BACK: usize = 32;

/// A file that items name.
#[derive(Clone, Copy, Debug, Default)]
pub struct File {
    /// The program's descriptor of it.
    pub fd: c_int,
    pub size: u64,
}

// SAFETY: integers.
unsafe impl Plain for File {}

/// The files of a call.
///
/// The checks are made on the program's descriptors; another thread may put another file in the
/// place of one meanwhile. The driver checks for itself what its own safety needs.
pub struct Files(Buffer<File, 2>);

impl core::ops::Deref for Files {
    type Target = [File];

    fn deref(&self) -> &[File] {
        &self.0
    }
}

impl Files {
    /// Finds the file whose descriptor is `fd`, or adds it.
    fn index(&mut self, fd: u32) -> Result<usize> {
        let fd = fd as c_int;
        let from = self.0.len().saturating_sub(LOOK_BACK);
        if let Some(found) = self.0[from..].iter().rposition(|file| file.fd == fd) {
            return Ok(from + found);
        }
        check_seals(fd)?;
        let stat = sys::fstat(fd).map_err(|_| EBADFD)?;
        let size = stat.st_size as u64;
        let file = File { fd, size };
        self.0.push(file)?;
        Ok(self.0.len() - 1)
    }
}

/// Descriptors of a call's files that are open for writing: the program's own, or, for files that
/// it opened read-only, which udmabuf takes as well, new ones, made through /proc.
pub struct Writable {
    fds: Buffer<c_int, 2>,
    own: Buffer<c_int, 2>,
    /// A copy of the device's descriptor. It holds the lowest free number, which the buffer gets in
    /// the end, as with udmabuf, while the new descriptors get others.
    held: Option<c_int>,
}

impl Writable {
    pub fn new(files: &[File], device: c_int) -> Result<Self> {
        let mut writable = Self {
            fds: Buffer::with_capacity(files.len())?,
            own: Buffer::with_capacity(files.len())?,
            held: None,
        };
        for file in files {
            let mode = sys::fcntl(file.fd, libc::F_GETFL, 0).map_err(|_| EBADFD)?;
            let mut fd = file.fd;
            if mode & libc::O_ACCMODE != libc::O_RDWR {
                if writable.held.is_none() {
                    writable.held = sys::fcntl(device, libc::F_DUPFD_CLOEXEC, 0).ok();
                }
                fd = reopen(file.fd)?;
                // There is room for one a file.
                let _ = writable.own.push(fd);
            }
            let _ = writable.fds.push(fd);
        }
        Ok(writable)
    }

    /// The descriptor of the file of that index.
    pub fn fd(&self, index: usize) -> c_int {
        self.fds[index]
    }

    /// Gives back the number that is held for the buffer.
    pub fn release_number(&self) {
        if let Some(fd) = self.held {
            sys::close(fd);
        }
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        for fd in self.own.iter() {
            sys::close(*fd);
        }
    }
}

/// Opens the file behind a descriptor once more, for reading and writing.
fn reopen(fd: c_int) -> Result<c_int> {
    const PREFIX: &[u8] = b"/proc/thread-self/fd/";
    let mut path = [0u8; PREFIX.len() + 12];
    path[..PREFIX.len()].copy_from_slice(PREFIX);
    let mut digits = [0u8; 10];
    let mut n = 0;
    let mut rest = fd.unsigned_abs();
    loop {
        digits[n] = b'0' + (rest % 10) as u8;
        n += 1;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    for (place, digit) in path[PREFIX.len()..]
        .iter_mut()
        .zip(digits[..n].iter().rev())
    {
        *place = *digit;
    }
    let path = core::ffi::CStr::from_bytes_until_nul(&path).map_err(|_| Errno(libc::EINVAL))?;
    sys::open(path, libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOCTTY)
}

/// `check_memfd_seals()` of udmabuf.
fn check_seals(fd: c_int) -> Result<()> {
    // No descriptor, one with O_PATH (fget() takes none), and a file that cannot be sealed: all of them EBADFD.
    let seals = sys::fcntl(fd, libc::F_GET_SEALS, 0).map_err(|_| EBADFD)?;
    seals_fit(seals)
}

fn seals_fit(seals: c_int) -> Result<()> {
    let denied = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
    if seals & libc::F_SEAL_SHRINK != 0 && seals & denied == 0 {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// What a call asks for, checked.
pub struct Plan {
    pub files: Files,
    /// The pieces of files that make the buffer, as the driver wants them, but that `fd` is the
    /// file's index: neighbours in the list that are neighbours in the file are one.
    pub ranges: Buffer<Range, INLINE_ITEMS>,
    pub backing: Buffer<Backing, INLINE_ITEMS>,
    pub bytes: u64,
}

impl Plan {
    pub fn new(items: &[Item]) -> Result<Self> {
        // All alignment is checked before any descriptor.
        let bytes = total(items)?;
        let mut plan = Self {
            files: Files(Buffer::new()),
            ranges: Buffer::with_capacity(items.len())?,
            backing: Buffer::with_capacity(items.len())?,
            bytes,
        };
        // Where the last piece ends, by its file and offset.
        let mut end = None;
        for item in items {
            let index = plan.files.index(item.memfd)?;
            let next = check_extent(item, plan.files[index].size)?;
            let place = (index, item.offset);
            match plan.ranges.last_mut() {
                Some(last) if end == Some(place) => last.len += item.size,
                _ => {
                    plan.ranges.push(Range {
                        addr: 0,
                        len: item.size,
                    })?;
                    plan.backing.push(Backing {
                        fd: index as c_int,
                        reserved: 0,
                        offset: item.offset,
                    })?;
                }
            }
            end = Some((index, next));
        }
        Ok(plan)
    }
}

/// The first loop of `udmabuf_create()`. Where that compares with its limit, this does with what
/// a file can hold.
fn total(items: &[Item]) -> Result<u64> {
    let mut bytes = 0u64;
    for item in items {
        if item.offset % PAGE != 0 || item.size % PAGE != 0 {
            return Err(EINVAL);
        }
        bytes = bytes
            .checked_add(item.size)
            .filter(|&sum| sum <= i64::MAX as u64)
            .ok_or(EINVAL)?;
    }
    if bytes == 0 {
        return Err(EINVAL);
    }
    Ok(bytes)
}

/// What `memfd_pin_folios()` demands of a piece. Returns where it ends.
fn check_extent(item: &Item, file_size: u64) -> Result<u64> {
    match item.offset.checked_add(item.size) {
        Some(end) if item.size > 0 && end <= file_size => Ok(end),
        _ => Err(EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(offset: u64, size: u64) -> Item {
        Item {
            memfd: u32::MAX,
            pad: 0,
            offset,
            size,
        }
    }

    #[test]
    fn alignment_and_sums() {
        assert_eq!(total(&[item(0, 4096), item(8192, 8192)]), Ok(12288));
        assert_eq!(total(&[item(0, 4096), item(0, 0)]), Ok(4096));
        for bad in [
            &[][..],
            &[item(0, 0)],
            &[item(1, 4096)],
            &[item(0, 4095)],
            &[item(0, 4096), item(2048, 4096)],
            &[item(0, 1 << 63)],
            &[item(0, !4095), item(0, 8192)],
        ] {
            assert_eq!(total(bad), Err(EINVAL), "{bad:?}");
        }
    }

    #[test]
    fn extents() {
        assert_eq!(check_extent(&item(4096, 4096), 8192), Ok(8192));
        assert_eq!(check_extent(&item(4096, 8192), 8192), Err(EINVAL));
        assert_eq!(check_extent(&item(0, 0), 8192), Err(EINVAL));
        assert_eq!(check_extent(&item(!4095, 8192), 8192), Err(EINVAL));
        assert_eq!(check_extent(&item(0, 8192), 6000), Err(EINVAL));
    }

    #[test]
    fn seals() {
        use libc::{F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE};
        assert_eq!(seals_fit(F_SEAL_SHRINK), Ok(()));
        assert_eq!(seals_fit(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), Ok(()));
        assert_eq!(seals_fit(0), Err(EINVAL));
        assert_eq!(seals_fit(F_SEAL_SHRINK | F_SEAL_WRITE), Err(EINVAL));
        assert_eq!(seals_fit(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE), Err(EINVAL));
    }

    #[test]
    fn descriptors_come_after_alignment() {
        assert_eq!(Plan::new(&[item(0, 4096)]).err(), Some(EBADFD));
        assert_eq!(
            Plan::new(&[item(0, 4096), item(1, 4096)]).err(),
            Some(EINVAL)
        );
    }

    #[test]
    fn neighbours_become_one_piece() {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"plan".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 1 << 20) }, 0);
        sys::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
        let item = |offset, size| Item {
            memfd: fd as u32,
            pad: 0,
            offset,
            size,
        };
        let list = [
            item(0, 4096),
            item(4096, 8192),
            item(4096, 4096),
            item(0, 4096),
        ];
        let plan = Plan::new(&list).unwrap();
        assert_eq!(plan.bytes, 20480);
        let parts: Vec<_> = plan
            .backing
            .iter()
            .zip(plan.ranges.iter())
            .map(|(backing, range)| (backing.fd, backing.offset, range.len))
            .collect();
        assert_eq!(parts, [(0, 0, 12288), (0, 4096, 4096), (0, 0, 4096)]);
        assert_eq!(plan.files.len(), 1);
        let beyond = [item(0, 4096), item((1 << 20) - 4096, 8192)];
        assert_eq!(Plan::new(&beyond).err(), Some(EINVAL));
        sys::close(fd);
    }

    #[test]
    fn a_file_opened_read_only_is_opened_again() {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"plan".as_ptr(), 0) };
        let path = format!("/proc/self/fd/{fd}\0");
        let path = core::ffi::CStr::from_bytes_with_nul(path.as_bytes()).unwrap();
        let readonly = sys::open(path, libc::O_RDONLY).unwrap();
        let files = [fd, readonly].map(|fd| File { fd, size: 0 });
        let writable = Writable::new(&files, fd).unwrap();
        assert_eq!(writable.fd(0), fd);
        let new = writable.fd(1);
        assert!(new != readonly && new != fd);
        let mode = sys::fcntl(new, libc::F_GETFL, 0).unwrap() & libc::O_ACCMODE;
        assert_eq!(mode, libc::O_RDWR);
        let inode = |fd| sys::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(new), inode(fd));
        writable.release_number();
        drop(writable);
        assert_ne!(sys::fstat(new).map(|stat| stat.st_ino), Ok(inode(fd)));
        sys::close(readonly);
        sys::close(fd);
    }
}
