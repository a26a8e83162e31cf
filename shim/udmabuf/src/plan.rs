// SPDX-License-Identifier: MIT OR Apache-2.0

//! From udmabuf's items to pieces of files: the same checks, in the same order, with the same
//! errors as `udmabuf_create()` makes.

use core::ffi::c_int;

use crate::buffer::Buffer;
use crate::request::{Item, Items};
use crate::spans::FileId;
use crate::sys::{self, Errno, Plain, Result};

const EINVAL: Errno = Errno(libc::EINVAL);
const EBADFD: Errno = Errno(libc::EBADFD);

/// How far back a list is searched for a file that was seen before.
const LOOK_BACK: usize = 32;

/// A file that items name.
#[derive(Clone, Copy, Debug, Default)]
pub struct File {
    /// The program's descriptor of it.
    pub fd: c_int,
    /// The size in bytes.
    pub size: u64,
    /// Which file it is.
    pub id: FileId,
    /// The size of its pages: hugetlb's files say that as the size of a block.
    pub block: u64,
    /// How many bytes of it have memory.
    pub stored: u64,
}

// SAFETY: integers, of which every pattern is valid; zeroes are the default.
unsafe impl Plain for File {}

impl File {
    /// May there be parts of the file that have no memory? A huge page at its end counts as a whole, so that
    /// a file which is no multiple of one may have as much memory as bytes, and holes. More memory than that is behind
    /// its end.
    pub fn may_have_holes(&self) -> bool {
        let page = sys::page_size();
        // Where a block is a page, the file may have transparent huge pages all the same.
        let largest = if self.block > page {
            self.block
        } else {
            page * (page / 8)
        };
        let whole = self.size.checked_next_multiple_of(largest);
        whole != Some(self.stored)
    }
}

/// The files of a call.
///
/// The checks are made on the program's descriptors; another thread may put another file in the
/// place of one meanwhile. So they are made again once there is a buffer. What is put there and taken away
/// again between the two is not found; the driver checks for itself what its own safety needs.
pub struct Files(Buffer<File, 4>);

impl core::ops::Deref for Files {
    type Target = [File];

    fn deref(&self) -> &[File] {
        &self.0
    }
}

impl Files {
    /// Finds the file whose descriptor is `fd`, or adds it. Returns its place and its size.
    #[inline]
    fn find(&mut self, fd: u32) -> Result<(u32, u64)> {
        let files: &[File] = &self.0;
        let known = files.iter().enumerate().rev().take(LOOK_BACK);
        for (place, file) in known {
            if file.fd == fd as c_int {
                return Ok((place as u32, file.size));
            }
        }
        self.add(fd as c_int)
    }

    #[cold]
    #[inline(never)]
    fn add(&mut self, fd: c_int) -> Result<(u32, u64)> {
        check_seals(fd)?;
        let stat = sys::fstat(fd).map_err(|_| EBADFD)?;
        let size = stat.st_size as u64;
        self.0.push(File {
            fd,
            size,
            id: FileId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
            block: stat.st_blksize as u64,
            stored: 512 * stat.st_blocks as u64,
        })?;
        Ok((self.0.len() as u32 - 1, size))
    }
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

/// A part of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// The file's place in the list of files.
    pub file: usize,
    /// The first byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What a call asks for, checked.
pub struct Plan {
    /// The files that the items name.
    pub files: Files,
    /// The items, with a file's place in the list for its descriptor, and in the place where they were read
    /// to: neighbours in the list that are neighbours in the file are one.
    items: Items,
    /// How many items there were.
    pub asked: usize,
    /// The sum of the items in bytes.
    pub bytes: u64,
}

impl Plan {
    /// A plan for nothing yet.
    pub const fn new() -> Self {
        Self {
            files: Files(Buffer::new()),
            items: Buffer::new(),
            asked: 0,
            bytes: 0,
        }
    }

    /// Where items are read to.
    pub fn items(&mut self) -> &mut Items {
        &mut self.items
    }

    /// Checks the items that were read.
    pub fn check(&mut self) -> Result<()> {
        self.asked = self.items.len();
        // All alignment is checked before any descriptor.
        self.bytes = total(&self.items, sys::page_size())?;
        let items: &mut [Item] = &mut self.items;
        let mut kept = 0;
        let mut last = None;
        for i in 0..items.len() {
            let mut item = items[i];
            // Most items name the same file as the item before.
            let (place, size) = match last {
                Some((fd, file)) if fd == item.memfd => file,
                _ => self.files.find(item.memfd)?,
            };
            last = Some((item.memfd, (place, size)));
            check_extent(&item, size)?;
            item.memfd = place;
            if kept > 0 {
                let last = &mut items[kept - 1];
                if (last.memfd, last.offset + last.size) == (place, item.offset) {
                    last.size += item.size;
                    continue;
                }
            }
            items[kept] = item;
            kept += 1;
        }
        self.items.truncate(kept);
        Ok(())
    }

    /// Are the files' descriptors still those of the files that were checked, and may those still be used?
    /// Another thread may have put another file at a number after it was checked: an error says so.
    pub fn check_again(&self) -> Result<()> {
        for file in self.files.iter() {
            check_seals(file.fd)?;
            let stat = sys::fstat(file.fd).map_err(|_| EBADFD)?;
            let id = FileId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            };
            if id != file.id {
                return Err(EBADFD);
            }
        }
        Ok(())
    }

    /// The pieces of files that make the buffer, in its order.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = Piece> + '_ {
        self.items.iter().map(|item| Piece {
            file: item.memfd as usize,
            offset: item.offset,
            len: item.size,
        })
    }
}

/// The first loop of `udmabuf_create()`. Where that compares with its limit, this does with what
/// a file can hold.
fn total(items: &[Item], page: u64) -> Result<u64> {
    let mut bytes = 0u64;
    for item in items {
        if (item.offset | item.size) & (page - 1) != 0 {
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
        for page in [4096, 16384, 65536] {
            let total = |items: &[Item]| total(items, page);
            let list = [item(0, page), item(2 * page, 2 * page)];
            assert_eq!(total(&list), Ok(3 * page));
            assert_eq!(total(&[item(0, page), item(0, 0)]), Ok(page));
            for bad in [
                &[][..],
                &[item(0, 0)],
                &[item(1, page)],
                &[item(0, page - 1)],
                &[item(0, page / 2)],
                &[item(0, page), item(page / 2, page)],
                &[item(0, 1 << 63)],
                &[item(0, !(page - 1)), item(0, 2 * page)],
            ] {
                assert_eq!(total(bad), Err(EINVAL), "{bad:?}");
            }
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
    fn holes() {
        let page = sys::page_size();
        let huge = page * (page / 8);
        let with = |block, size, stored| {
            let file = File {
                size,
                block,
                stored,
                ..File::default()
            };
            file.may_have_holes()
        };
        let may_have = |size, stored| with(page, size, stored);
        assert!(!may_have(0, 0) && !may_have(2 * huge, 2 * huge));
        assert!(may_have(huge, 0) && may_have(2 * huge, 2 * huge - page));
        // A huge page at the end, and a hole at the beginning.
        assert!(may_have(huge + page, huge + page));
        assert!(!may_have(huge + page, 2 * huge));
        assert!(may_have(2 * huge, 2 * huge + page));
        assert!(may_have(u64::MAX, u64::MAX));
        // Files of hugetlb pages, of sizes below and above that of a transparent huge page.
        for block in [2 * page, 512 * huge] {
            assert!(!with(block, 3 * block, 3 * block));
            assert!(with(block, 3 * block, 2 * block));
        }
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

    fn planned(items: &[Item]) -> Result<Plan> {
        let mut plan = Plan::new();
        for item in items {
            plan.items().push(*item)?;
        }
        plan.check()?;
        Ok(plan)
    }

    #[test]
    fn descriptors_come_after_alignment() {
        let page = sys::page_size();
        assert_eq!(planned(&[item(0, page)]).err(), Some(EBADFD));
        let list = [item(0, page), item(1, page)];
        assert_eq!(planned(&list).err(), Some(EINVAL));
    }

    #[test]
    fn neighbours_become_one_piece() {
        let page = sys::page_size();
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"plan".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 256 * page as i64) }, 0);
        sys::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
        let item = |page_offset, pages| Item {
            memfd: fd as u32,
            pad: 0,
            offset: page_offset * page,
            size: pages * page,
        };
        let plan = planned(&[item(0, 1), item(1, 2), item(1, 1), item(0, 1)]).unwrap();
        assert_eq!(plan.bytes, 5 * page);
        let piece = |offset, len| Piece {
            file: 0,
            offset: offset * page,
            len: len * page,
        };
        let pieces: Vec<_> = plan.pieces().collect();
        assert_eq!(pieces, [piece(0, 3), piece(1, 1), piece(0, 1)]);
        assert_eq!(plan.files.len(), 1);
        let stat = sys::fstat(fd).unwrap();
        let id = FileId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        assert_eq!((plan.files[0].id, plan.files[0].fd), (id, fd));
        assert_eq!(planned(&[item(0, 1), item(255, 2)]).err(), Some(EINVAL));

        // The same file, another one of the same kind, one that may not be used any more, and none.
        assert_eq!(plan.check_again(), Ok(()));
        let planned = planned(&[item(0, 1)]).unwrap();
        assert_eq!(planned.check_again(), Ok(()));
        // SAFETY: a terminated name.
        let other = unsafe { libc::memfd_create(c"other".as_ptr(), libc::MFD_ALLOW_SEALING) };
        sys::fcntl(other, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
        let kept = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0).unwrap();
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::dup2(other, fd) }, fd);
        assert_eq!(planned.check_again(), Err(EBADFD));
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::dup2(kept, fd) }, fd);
        assert_eq!(planned.check_again(), Ok(()));
        sys::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE).unwrap();
        assert_eq!(planned.check_again(), Err(EINVAL));
        sys::close(fd);
        assert_eq!(planned.check_again(), Err(EBADFD));
        sys::close(other);
        sys::close(kept);
    }
}
