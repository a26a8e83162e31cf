// SPDX-License-Identifier: GPL-2.0

//! Shared mappings of files of shmem and hugetlbfs, where the page cache tells what is mapped.
//!
//! Such a mapping can show nothing but the file's pages at the file's offsets. So who has it could
//! read and write these pages at the moment of the look-up, whether the page tables know them
//! already or not, and whatever is mapped at the address afterwards. The reference to the file keeps
//! that true: it is not the address that is looked up again.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h).

use crate::ffi;
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    fs::file::LocalFile,
    page::PAGE_SHIFT,
    sync::aref::ARef, //
};

/// A mapping that the current process had, shared and writable, when it was looked up.
pub(crate) struct MappedFile {
    file: ARef<LocalFile>,
    /// First address, and that behind the last one.
    start: usize,
    end: usize,
    /// The page of the file at `start`.
    index: usize,
    /// Pages of 4 KiB, or the like, that one page of the file has.
    unit: usize,
}

impl MappedFile {
    /// The mapping at `addr`, if it is one of a kind for which all of this holds, and can be told
    /// without waiting for anybody. Otherwise, at which addresses, `addr` among them, it is not.
    pub(crate) fn at(addr: usize) -> Result<Self, Range<usize>> {
        let mut found = ffi::Mapped::default();
        // SAFETY: Only system calls lead here, so that the current task has an address space.
        let is_one = unsafe { ffi::pinbuf_mapped_file(addr, &mut found) };
        match NonNull::new(found.file) {
            Some(file) if is_one => Ok(Self {
                // SAFETY: The reference is ours. A file that is in use by `fdget_pos` meanwhile is so
                // on this thread, which is here, or is shared, and then locked.
                file: unsafe { ARef::from_raw(file.cast()) },
                start: found.start,
                end: found.end,
                index: found.index,
                unit: found.unit,
            }),
            _ => Err(found.start..found.end),
        }
    }

    /// The file.
    pub(crate) fn file(&self) -> &LocalFile {
        &self.file
    }

    /// Pages of 4 KiB, or the like, in one page of the file: a power of two.
    pub(crate) fn unit(&self) -> usize {
        self.unit
    }

    /// The page of the file that is mapped at `addr`, and how many there are from it on; `None`
    /// outside.
    pub(crate) fn pages_at(&self, addr: usize) -> Option<(usize, usize)> {
        if !(self.start..self.end).contains(&addr) {
            return None;
        }
        let skipped = (addr - self.start) >> PAGE_SHIFT;
        let index = self.index.checked_add(skipped)?;
        Some((index, (self.end - addr) >> PAGE_SHIFT))
    }
}
