// SPDX-License-Identifier: MIT OR Apache-2.0

//! udmabuf's interface, and libc's calls in the form that the cases need: results and `errno` as
//! they are. All calls go through libc's functions, where the shim stands.

use std::ffi::{c_int, c_void, CStr};
use std::io::{Error, Result};
use std::mem::size_of_val;

/// The device.
pub const DEVICE: &CStr = c"/dev/udmabuf";

/// `UDMABUF_CREATE`.
pub const CREATE: libc::c_ulong = 0x4018_7542;
/// `UDMABUF_CREATE_LIST`.
pub const CREATE_LIST: libc::c_ulong = 0x4008_7543;
/// `UDMABUF_FLAGS_CLOEXEC`.
pub const CLOEXEC: u32 = 1;

/// `struct udmabuf_create`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Create {
    pub memfd: u32,
    pub flags: u32,
    pub offset: u64,
    pub size: u64,
}

/// `struct udmabuf_create_item`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Item {
    pub memfd: u32,
    pub pad: u32,
    pub offset: u64,
    pub size: u64,
}

/// `DMA_BUF_IOCTL_SYNC` and its flags.
pub const SYNC: libc::c_ulong = 0x4008_6200;
pub const SYNC_READ: u64 = 1;
pub const SYNC_RW: u64 = 3;
pub const SYNC_END: u64 = 4;

/// A page, of the size that the tests are built for.
pub const PAGE: u64 = match option_env!("PINBUF_TEST_PAGES") {
    None => 4 << 10,
    Some(size) => match size.as_bytes() {
        b"4K" => 4 << 10,
        b"16K" => 16 << 10,
        _ => panic!("PINBUF_TEST_PAGES is neither 4K nor 16K"),
    },
};

/// What a call returned, or the error it left.
pub fn check(ret: i64) -> Result<i64> {
    if ret == -1 {
        Err(Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// An ioctl with an address as its argument, which may be wrong.
pub fn ioctl(fd: c_int, request: libc::c_ulong, arg: usize) -> Result<c_int> {
    // SAFETY: udmabuf only reads from the address, through the kernel, which checks it; SYNC gets
    // that of a number.
    check(i64::from(unsafe { libc::ioctl(fd, request, arg) })).map(|ret| ret as c_int)
}

/// `UDMABUF_CREATE`.
pub fn create(device: c_int, memfd: c_int, offset: u64, size: u64, flags: u32) -> Result<c_int> {
    let create = Create {
        memfd: memfd as u32,
        flags,
        offset,
        size,
    };
    ioctl(device, CREATE, &raw const create as usize)
}

/// The argument of `UDMABUF_CREATE_LIST`, which has its items behind a head of eight bytes.
pub fn list(flags: u32, count: u32, items: &[Item]) -> Vec<u64> {
    let mut words = vec![u64::from(flags) | u64::from(count) << 32];
    for item in items {
        words.push(u64::from(item.memfd) | u64::from(item.pad) << 32);
        words.push(item.offset);
        words.push(item.size);
    }
    debug_assert_eq!(words.len() * 8, 8 + size_of_val(items));
    words
}

/// `UDMABUF_CREATE_LIST`.
pub fn create_list(device: c_int, items: &[Item], flags: u32) -> Result<c_int> {
    let list = list(flags, items.len() as u32, items);
    ioctl(device, CREATE_LIST, list.as_ptr() as usize)
}

/// The name of a dma-buf's exporter, if `/proc` can be read.
pub fn exporter(dmabuf: c_int) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{dmabuf}")).ok()?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("exp_name:"))?;
    Some(name.trim().to_owned())
}

/// `DMA_BUF_IOCTL_SYNC`.
pub fn sync(dmabuf: c_int, flags: u64) -> Result<c_int> {
    ioctl(dmabuf, SYNC, &raw const flags as usize)
}

pub fn open(path: &CStr, flags: c_int) -> Result<c_int> {
    // SAFETY: a terminated string; no mode is needed.
    check(i64::from(unsafe { libc::open(path.as_ptr(), flags) })).map(|fd| fd as c_int)
}

pub fn close(fd: c_int) -> Result<()> {
    // SAFETY: the cases close what they opened.
    check(i64::from(unsafe { libc::close(fd) })).map(|_| ())
}

pub fn fcntl(fd: c_int, command: c_int, arg: c_int) -> Result<c_int> {
    // SAFETY: the commands used here take a number or nothing.
    check(i64::from(unsafe { libc::fcntl(fd, command, arg) })).map(|ret| ret as c_int)
}

pub fn memfd(flags: u32, size: u64) -> Result<c_int> {
    // SAFETY: a terminated name.
    let fd = check(i64::from(unsafe {
        libc::memfd_create(c"conformance".as_ptr(), flags)
    }))? as c_int;
    // SAFETY: no memory is involved.
    check(i64::from(unsafe { libc::ftruncate(fd, size as i64) }))?;
    Ok(fd)
}

/// The size of a file, as `lseek` reports it.
pub fn end(fd: c_int) -> Result<i64> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::lseek(fd, 0, libc::SEEK_END) })
}

/// A mapping of a file, until it is dropped.
pub struct Map {
    address: *mut c_void,
    len: usize,
}

impl Map {
    pub fn new(fd: c_int, len: u64, prot: c_int, flags: c_int) -> Result<Self> {
        Self::at_offset(fd, len, prot, flags, 0)
    }

    pub fn at_offset(fd: c_int, len: u64, prot: c_int, flags: c_int, offset: u64) -> Result<Self> {
        let len = len as usize;
        // SAFETY: without an address nothing that exists is replaced.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset as i64) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { address, len })
    }

    /// Shared, for reading and writing.
    pub fn shared(fd: c_int, len: u64) -> Result<Self> {
        Self::new(
            fd,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
    }

    /// As [`Map::shared`], at an address where nothing is mapped.
    pub fn shared_at(fd: c_int, len: u64, address: usize) -> Result<Self> {
        let (len, prot) = (len as usize, libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: nothing that exists is replaced.
        let address = unsafe { libc::mmap(address as *mut c_void, len, prot, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { address, len })
    }

    pub fn address(&self) -> usize {
        self.address as usize
    }

    fn word(&self, page: u64) -> *mut u64 {
        let offset = (page * PAGE) as usize;
        assert!(offset < self.len);
        self.address.wrapping_byte_add(offset).cast()
    }

    /// The first word of a page.
    pub fn get(&self, page: u64) -> u64 {
        // SAFETY: inside of the mapping, and aligned.
        unsafe { self.word(page).read_volatile() }
    }

    /// Sets the first word of a page; the mapping must be writable.
    pub fn set(&self, page: u64, value: u64) {
        // SAFETY: inside of the mapping, and aligned.
        unsafe { self.word(page).write_volatile(value) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing keeps its addresses.
        unsafe { libc::munmap(self.address, self.len) };
    }
}
