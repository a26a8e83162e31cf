// SPDX-License-Identifier: MIT OR Apache-2.0

//! From udmabuf's items to pieces of files: the same checks, in the same order, with the same
//! errors as `udmabuf_create()` makes.

use core::ffi::c_int;

use crate::buffer::Buffer;
use crate::request::{Item, INLINE_ITEMS};
use crate::sys::{self, Errno, Plain, Result, HUGETLBFS_MAGIC};

pub const PAGE: u64 = 4096;

const EINVAL: Errno = Errno(libc::EINVAL);
const EBADFD: Errno = Errno(libc::EBADFD);

/// How far back a list is searched for a file that was seen before.
const LOOK_BACK: usize = 32;

/// A file that items name.
#[derive(Clone, Copy, Debug, Default)]
pub struct File {
    /// The number that the program uses.
    pub named: c_int,
    /// Our copy of it, or the same number when no descriptor was free for one.
    pub fd: c_int,
    pub dev: u64,
    pub inode: u64,
    pub size: u64,
    /// Size of its pages in the page cache: what offsets of mappings are multiples of.
    pub block: u64,
}

/// A part of a file; neighbours in a list that are neighbours in the file are one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Index in the list of files.
    pub file: u32,
    pub pad: u32,
    pub offset: u64,
    pub len: u64,
}

// SAFETY: integers.
unsafe impl Plain for File {}
// SAFETY: integers.
unsafe impl Plain for Piece {}

/// The files of a call. Copies are closed when this goes.
pub struct Files(Buffer<File, 2>);

impl core::ops::Deref for Files {
    type Target = [File];

    fn deref(&self) -> &[File] {
        &self.0
    }
}

impl Files {
    /// Finds the file that the program calls `named`, or takes a copy of its descriptor.
    fn index(&mut self, named: u32) -> Result<usize> {
        let named = named as c_int;
        let from = self.0.len().saturating_sub(LOOK_BACK);
        if let Some(found) = self.0[from..].iter().rposition(|file| file.named == named) {
            return Ok(from + found);
        }
        // The checks are made on a copy: the number may come to mean another file at any time.
        // Where no descriptor is free for one, that has to do.
        let fd = sys::fcntl(named, libc::F_DUPFD_CLOEXEC, 0).unwrap_or(named);
        // From here on, what is left closes the copy.
        let file = File {
            named,
            fd,
            ..File::default()
        };
        self.0.push(file).map_err(|_| Errno(libc::ENOMEM))?;
        check_seals(fd)?;
        let stat = sys::fstat(fd).map_err(|_| EBADFD)?;
        let block = if stat.st_blksize as u64 == PAGE {
            PAGE
        } else {
            page_of(fd)?
        };
        let index = self.0.len() - 1;
        self.0[index] = File {
            dev: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size as u64,
            block,
            ..file
        };
        Ok(index)
    }

    /// Checks all seals again.
    pub fn check_seals(&self) -> Result<()> {
        self.0.iter().try_for_each(|file| check_seals(file.fd))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in self.0.iter().filter(|file| file.fd != file.named) {
            sys::close(file.fd);
        }
    }
}

/// The page size of a file whose blocks are larger than a page: hugetlbfs, or shmem that prefers
/// huge pages and can do without.
fn page_of(fd: c_int) -> Result<u64> {
    let fs = sys::fstatfs(fd).map_err(|_| EBADFD)?;
    Ok(if fs.f_type == HUGETLBFS_MAGIC {
        fs.f_bsize as u64
    } else {
        PAGE
    })
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
    pub pieces: Buffer<Piece, INLINE_ITEMS>,
    pub bytes: u64,
}

impl Plan {
    pub fn new(items: &[Item]) -> Result<Self> {
        // All alignment is checked before any descriptor.
        let bytes = total(items)?;
        let mut files = Files(Buffer::with_capacity(items.len())?);
        let mut pieces = Buffer::<Piece, INLINE_ITEMS>::with_capacity(items.len())?;
        for item in items {
            let index = files.index(item.memfd)?;
            check_extent(item, files[index].size)?;
            let file = index as u32;
            if let Some(last) = pieces.last_mut() {
                if last.file == file && last.offset + last.len == item.offset {
                    last.len += item.size;
                    continue;
                }
            }
            let piece = Piece {
                file,
                pad: 0,
                offset: item.offset,
                len: item.size,
            };
            pieces.push(piece).map_err(|_| Errno(libc::ENOMEM))?;
        }
        Ok(Self {
            files,
            pieces,
            bytes,
        })
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

/// What `memfd_pin_folios()` demands of a piece.
fn check_extent(item: &Item, file_size: u64) -> Result<()> {
    match item.offset.checked_add(item.size) {
        Some(end) if item.size > 0 && end <= file_size => Ok(()),
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
        assert_eq!(check_extent(&item(4096, 4096), 8192), Ok(()));
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
            .pieces
            .iter()
            .map(|p| (p.file, p.offset, p.len))
            .collect();
        assert_eq!(parts, [(0, 0, 12288), (0, 4096, 4096), (0, 0, 4096)]);
        assert_eq!(plan.files.len(), 1);
        assert!(plan.files[0].fd > fd);
        let copy = plan.files[0].fd;
        drop(plan);
        assert!(sys::fcntl(copy, libc::F_GETFD, 0).is_err());
        let beyond = [item(0, 4096), item((1 << 20) - 4096, 8192)];
        assert_eq!(Plan::new(&beyond).err(), Some(EINVAL));
        sys::close(fd);
    }
}
