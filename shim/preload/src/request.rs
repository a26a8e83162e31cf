// SPDX-License-Identifier: MIT OR Apache-2.0

//! udmabuf's interface, as `<linux/udmabuf.h>` has it, and reading its requests.

use core::mem::size_of;

use crate::buffer::Buffer;
use crate::sys::{copy_from_program, Errno, Plain, Result};

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
/// so many: three lists of them take 9 KiB of stack. QEMU's framebuffers have 4 to 138 as a rule.
pub const INLINE_ITEMS: usize = 160;

const fn ioc_write(nr: u32, size: usize) -> u32 {
    1 << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | nr
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
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
    pub memfd: u32,
    pub pad: u32,
    pub offset: u64,
    pub size: u64,
}

// SAFETY: integers without padding.
unsafe impl Plain for Create {}
// SAFETY: integers without padding.
unsafe impl Plain for ListHead {}
// SAFETY: integers without padding.
unsafe impl Plain for Item {}

/// What a program asks for.
pub struct Request {
    pub flags: u32,
    pub items: Buffer<Item, INLINE_ITEMS>,
}

impl Request {
    /// Reads the argument of `UDMABUF_CREATE`.
    pub fn read_single(arg: usize) -> Result<Self> {
        let mut create = [Create::default()];
        copy_from_program(&mut create, arg)?;
        let [create] = create;
        let mut items = Buffer::zeroed(1)?;
        items[0] = Item {
            memfd: create.memfd,
            pad: 0,
            offset: create.offset,
            size: create.size,
        };
        Ok(Self {
            flags: create.flags,
            items,
        })
    }

    /// Reads the argument of `UDMABUF_CREATE_LIST`: as udmabuf does, the count is looked at before
    /// the items are read.
    pub fn read_list(arg: usize) -> Result<Self> {
        let mut head = [ListHead::default()];
        copy_from_program(&mut head, arg)?;
        let [head] = head;
        if head.count > MAX_ITEMS {
            return Err(Errno(libc::EINVAL));
        }
        let mut items = Buffer::zeroed(head.count as usize)?;
        copy_from_program(&mut items, arg.wrapping_add(size_of::<ListHead>()))?;
        Ok(Self {
            flags: head.flags,
            items,
        })
    }
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
        let request = Request::read_single(&raw const create as usize).unwrap();
        assert_eq!(request.flags, 1);
        assert_eq!(
            *request.items,
            [Item {
                memfd: 3,
                pad: 0,
                offset: 4096,
                size: 8192
            }]
        );

        let mut list = vec![0u8; 8 + 24 * 100];
        list[0] = 1;
        list[4] = 100;
        for i in 0..100 {
            list[8 + 24 * i] = i as u8;
        }
        let request = Request::read_list(list.as_ptr() as usize).unwrap();
        assert_eq!(request.items.len(), 100);
        assert!(request
            .items
            .iter()
            .zip(0..)
            .all(|(item, i)| item.memfd == i));

        assert_eq!(Request::read_single(0).err(), Some(Errno(libc::EFAULT)));
        assert_eq!(Request::read_list(8).err(), Some(Errno(libc::EFAULT)));
        let endless = [1u32, u32::MAX];
        let result = Request::read_list(endless.as_ptr() as usize);
        assert_eq!(result.err(), Some(Errno(libc::EINVAL)));
    }
}
