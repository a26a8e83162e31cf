// SPDX-License-Identifier: MIT OR Apache-2.0

//! udmabuf's interface, as `<linux/udmabuf.h>` has it, and reading its requests.

use core::mem::size_of;

use crate::buffer::Buffer;
use crate::sys::{Errno, Plain, Result};

/// `UDMABUF_CREATE`.
pub const CREATE: u32 = ioc_write(0x42, size_of::<Create>());
/// `UDMABUF_CREATE_LIST`.
pub const CREATE_LIST: u32 = ioc_write(0x43, size_of::<ListHead>());
/// `UDMABUF_FLAGS_CLOEXEC`; all other flags are ignored.
pub const FLAGS_CLOEXEC: u32 = 1;

/// The most items a list may have here. udmabuf's own limit is 1,024 unless it was changed; ours
/// exists to bound the memory that a bad count asks for.
pub const MAX_ITEMS: u32 = 1 << 20;

/// Items that are read without memory from `mmap`, which costs more than all else that is done with
/// so few: three lists of them take 3.5 KiB of stack, and a create 6 KiB in all (by the frames of an optimised build for
/// x86-64), of which a signal handler may have 8 KiB. QEMU's framebuffers have 4 to 138 as a rule.
pub const INLINE_ITEMS: usize = 64;

const fn ioc_write(nr: u32, size: usize) -> u32 {
    1 << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | nr
}

/// The argument of `UDMABUF_CREATE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Create {
    /// The file.
    pub memfd: u32,
    /// [`FLAGS_CLOEXEC`].
    pub flags: u32,
    /// The first byte; a multiple of the page size.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ListHead {
    flags: u32,
    count: u32,
}

/// A piece of a memfd.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Item {
    /// The file.
    pub memfd: u32,
    /// Ignored.
    pub pad: u32,
    /// The first byte; a multiple of the page size.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The items of a request.
pub type Items = Buffer<Item, INLINE_ITEMS>;

// SAFETY: integers without padding.
unsafe impl Plain for Create {}
// SAFETY: integers without padding.
unsafe impl Plain for ListHead {}
// SAFETY: integers without padding.
unsafe impl Plain for Item {}

/// Reads the argument of `UDMABUF_CREATE`, and returns the flags.
pub fn read_single(items: &mut Items, arg: usize) -> Result<u32> {
    let mut create = Buffer::<Create, 1>::new();
    create.read_from_program(1, arg)?;
    let create = create[0];
    items.push(Item {
        memfd: create.memfd,
        pad: 0,
        offset: create.offset,
        size: create.size,
    })?;
    Ok(create.flags)
}

/// Reads the argument of `UDMABUF_CREATE_LIST`, and returns the flags: as udmabuf does, the count is looked
/// at before the items are read.
pub fn read_list(items: &mut Items, arg: usize) -> Result<u32> {
    let mut head = Buffer::<ListHead, 1>::new();
    head.read_from_program(1, arg)?;
    let head = head[0];
    if head.count > MAX_ITEMS {
        return Err(Errno(libc::EINVAL));
    }
    items.read_from_program(head.count as usize, arg.wrapping_add(size_of::<ListHead>()))?;
    Ok(head.flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_udmabufs() {
        assert_eq!(CREATE, 0x4018_7542);
        assert_eq!(CREATE_LIST, 0x4008_7543);
        assert_eq!(size_of::<Item>(), 24);
    }

    #[test]
    fn requests_are_read() {
        let create = Create {
            memfd: 3,
            flags: 1,
            offset: 4096,
            size: 8192,
        };
        let mut items = Items::new();
        assert_eq!(read_single(&mut items, &raw const create as usize), Ok(1));
        let item = Item {
            memfd: 3,
            pad: 0,
            offset: 4096,
            size: 8192,
        };
        assert_eq!(*items, [item]);

        for count in [0, 100, 1000] {
            let mut list = vec![3 | (count as u64) << 32];
            for i in 0..count as u64 {
                list.extend([i, 2 * i, 3 * i]);
            }
            let mut items = Items::new();
            assert_eq!(read_list(&mut items, list.as_ptr() as usize), Ok(3));
            assert_eq!(items.len(), count);
            assert!(items.iter().zip(0u64..).all(|(item, i)| {
                (u64::from(item.memfd), item.offset, item.size) == (i, 2 * i, 3 * i)
            }));
        }

        let efault = Err(Errno(libc::EFAULT));
        let mut items = Items::new();
        assert_eq!(read_single(&mut items, 0), efault);
        assert_eq!(read_list(&mut items, 8), efault);
        let endless = [1u32, u32::MAX];
        let result = read_list(&mut items, endless.as_ptr() as usize);
        assert_eq!(result, Err(Errno(libc::EINVAL)));
    }
}
