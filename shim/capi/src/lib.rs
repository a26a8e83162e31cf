// SPDX-License-Identifier: MIT OR Apache-2.0

//! pinbuf for C. `include/libpinbuf.h` describes the functions; each is the call of the crate
//! `pinbuf` of that name, with descriptors and negative error numbers in place of types.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use libc::size_t;
use pinbuf::{Device, DmaBuf, Error, HugePage, Region, Watch};
use pinbuf_uapi as uapi;

/// The negative error number of an error.
fn number(error: &Error) -> c_int {
    -match error {
        Error::NoDevice => libc::ENOENT,
        Error::NotPermitted => libc::EACCES,
        Error::NotPinbuf | Error::Unsupported => libc::ENOTTY,
        Error::TooLarge => libc::EOVERFLOW,
        Error::NotPinnable => libc::EFAULT,
        Error::OverLimit { .. } | Error::NoMemory | Error::NoHugePages { .. } => libc::ENOMEM,
        Error::Busy => libc::EBUSY,
        Error::Interrupted => libc::EINTR,
        Error::NotTheBacking => libc::EAGAIN,
        Error::BadDescriptor => libc::EBADF,
        Error::TooManyFiles => libc::EMFILE,
        Error::Unloading => libc::ENODEV,
        Error::System { errno, .. } => *errno as c_int,
        _ => libc::EINVAL,
    }
}

fn errno() -> c_int {
    -std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

/// Opens the device.
#[no_mangle]
pub extern "C" fn pinbuf_open() -> c_int {
    match Device::open() {
        Ok(device) => OwnedFd::from(device).into_raw_fd(),
        Err(error) => number(&error),
    }
}

/// An ioctl whose argument is a struct, or the error's number.
///
/// # Safety
///
/// `argument` must be what `request` reads and writes.
unsafe fn ioctl<T>(fd: c_int, request: u32, argument: *mut T) -> c_int {
    // SAFETY: by the contract of this function.
    let ret = unsafe { libc::ioctl(fd, libc::c_ulong::from(request), argument) };
    if ret < 0 {
        errno()
    } else {
        ret
    }
}

/// Returns the features and limits of the kernel's pinbuf.
///
/// # Safety
///
/// `query` must be null or a `struct pinbuf_query`.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_query(device: c_int, query: *mut uapi::Query) -> c_int {
    if query.is_null() {
        return -libc::EFAULT;
    }
    let mut found = uapi::Query {
        size: size_of::<uapi::Query>() as u32,
        ..Default::default()
    };
    // SAFETY: the struct of this call.
    let ret = unsafe { ioctl(device, uapi::QUERY, &mut found) };
    if ret >= 0 {
        // SAFETY: by the contract of this function.
        unsafe { query.write(found) };
    }
    ret.min(0)
}

/// Returns what a buffer consists of.
///
/// # Safety
///
/// `info` must be null or a `struct pinbuf_info`.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_info(device: c_int, buffer: c_int, info: *mut uapi::Info) -> c_int {
    if info.is_null() {
        return -libc::EFAULT;
    }
    let size = size_of::<uapi::Info>() as u32;
    let mut found = uapi::Info {
        size,
        fd: buffer,
        ..Default::default()
    };
    // SAFETY: the struct of this call.
    let ret = unsafe { ioctl(device, uapi::INFO, &mut found) };
    if ret >= 0 {
        // SAFETY: by the contract of this function.
        unsafe { info.write(found) };
    }
    ret.min(0)
}

/// Lists parts of a buffer that the memory's owner may not see.
///
/// # Safety
///
/// `list` must be an array of `count` elements, and is unused if `count` is zero. `offset` must be null or
/// point to a number.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_discards(
    device: c_int,
    buffer: c_int,
    list: *mut uapi::Discard,
    count: size_t,
    offset: *mut u64,
) -> c_int {
    if offset.is_null() {
        return -libc::EFAULT;
    }
    let mut call = uapi::Discards {
        size: size_of::<uapi::Discards>() as u32,
        fd: buffer,
        // SAFETY: by the contract of this function.
        offset: unsafe { offset.read() },
        list: list as u64,
        // More than can be returned are not asked for.
        count: count.min(c_int::MAX as size_t) as u32,
        reserved: 0,
    };
    // SAFETY: the struct of this call; the list is as long as the caller says.
    let ret = unsafe { ioctl(device, uapi::DISCARDS, &mut call) };
    if ret < 0 {
        return ret;
    }
    // SAFETY: by the contract of this function.
    unsafe { offset.write(call.offset) };
    call.count as c_int
}

/// A buffer that is watched, by the number that its owner knows it by.
#[derive(Debug)]
struct Numbered {
    number: c_int,
    buffer: DmaBuf,
}

impl Deref for Numbered {
    type Target = DmaBuf;

    fn deref(&self) -> &DmaBuf {
        &self.buffer
    }
}

/// `struct pinbuf_watch`.
#[derive(Debug)]
pub struct CWatch {
    watch: Watch<Box<Device>, Numbered>,
    /// The numbers of buffers that have changed, and that no call has returned yet.
    changed: VecDeque<c_int>,
}

/// What a descriptor refers to, by a descriptor of our own.
fn of_fd<T: for<'fd> TryFrom<BorrowedFd<'fd>, Error = Error>>(fd: c_int) -> Result<T, c_int> {
    if fd < 0 {
        return Err(-libc::EBADF);
    }
    // SAFETY: it is copied at once; a number that is not open is an error of that.
    T::try_from(unsafe { BorrowedFd::borrow_raw(fd) }).map_err(|error| number(&error))
}

/// Makes a watch.
///
/// # Safety
///
/// `watch` must be null or point to a pointer.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_watch_new(watch: *mut *mut CWatch, device: c_int) -> c_int {
    if watch.is_null() {
        return -libc::EFAULT;
    }
    let device: Device = match of_fd(device) {
        Ok(device) => device,
        Err(error) => return error,
    };
    let made = Box::new(CWatch {
        watch: Watch::new(Box::new(device)),
        changed: VecDeque::new(),
    });
    // SAFETY: by the contract of this function.
    unsafe { watch.write(Box::into_raw(made)) };
    0
}

/// Watches a buffer too.
///
/// # Safety
///
/// `watch` must be null or one of [`pinbuf_watch_new`]'s, which no other thread uses.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_watch_add(watch: *mut CWatch, buffer: c_int) -> c_int {
    // SAFETY: by the contract of this function.
    let Some(watch) = (unsafe { watch.as_mut() }) else {
        return -libc::EFAULT;
    };
    match of_fd(buffer) {
        Ok(copy) => {
            let added = watch.watch.add(Numbered {
                number: buffer,
                buffer: copy,
            });
            added.map_or_else(|error| number(&error), |()| 0)
        }
        Err(error) => error,
    }
}

/// Watches a buffer no longer.
///
/// # Safety
///
/// As for [`pinbuf_watch_add`].
#[no_mangle]
pub unsafe extern "C" fn pinbuf_watch_remove(watch: *mut CWatch, buffer: c_int) -> c_int {
    // SAFETY: by the contract of this function.
    let Some(watch) = (unsafe { watch.as_mut() }) else {
        return -libc::EFAULT;
    };
    let mut result = -libc::ENOENT;
    watch.watch.retain(|watched| {
        let other = watched.number != buffer;
        if !other {
            result = 0;
        }
        other
    });
    watch.changed.retain(|number| *number != buffer);
    result
}

/// Asks all buffers, and returns the numbers of those that changed.
///
/// # Safety
///
/// As for [`pinbuf_watch_add`]. `buffers` must be an array of `count` elements, and is unused if `count` is zero.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_watch_poll(
    watch: *mut CWatch,
    buffers: *mut c_int,
    count: size_t,
) -> c_int {
    // SAFETY: by the contract of this function.
    let Some(watch) = (unsafe { watch.as_mut() }) else {
        return -libc::EFAULT;
    };
    if buffers.is_null() && count > 0 {
        return -libc::EFAULT;
    }
    match watch.watch.poll() {
        Ok(changes) => {
            for change in changes {
                if !watch.changed.contains(&change.buffer.number) {
                    watch.changed.push_back(change.buffer.number);
                }
            }
        }
        Err(error) => return number(&error),
    }
    let returned = watch.changed.len().min(count).min(c_int::MAX as usize);
    for (place, number) in watch.changed.drain(..returned).enumerate() {
        // SAFETY: by the contract of this function: `place` is below `count`.
        unsafe { buffers.wrapping_add(place).write(number) };
    }
    returned as c_int
}

/// Frees a watch.
///
/// # Safety
///
/// `watch` must be null or one of [`pinbuf_watch_new`]'s, which nobody uses any more.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_watch_free(watch: *mut CWatch) {
    if !watch.is_null() {
        // SAFETY: by the contract of this function.
        drop(unsafe { Box::from_raw(watch) });
    }
}

/// Makes a buffer of a range.
///
/// # Safety
///
/// Holders of the buffer read and write the memory at any time until the buffer is gone.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_export(device: c_int, address: *mut c_void, len: size_t) -> c_int {
    let range = uapi::Range {
        addr: address as u64,
        len: len as u64,
    };
    // SAFETY: by the contract of this function.
    unsafe { pinbuf_export_ranges(device, &range, 1, uapi::CREATE_CLOEXEC) }
}

/// Makes a buffer of ranges.
///
/// # Safety
///
/// As for [`pinbuf_export`]. The kernel checks `ranges` itself.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_export_ranges(
    device: c_int,
    ranges: *const uapi::Range,
    count: size_t,
    flags: u32,
) -> c_int {
    let Ok(count) = u32::try_from(count) else {
        return -libc::EINVAL;
    };
    if flags & uapi::CREATE_CHECK_BACKING != 0 {
        return -libc::EINVAL;
    }
    let mut create = uapi::Create {
        size: size_of::<uapi::Create>() as u32,
        flags,
        ranges: ranges as u64,
        count,
        reserved: 0,
        backing: 0,
    };
    // SAFETY: the struct of this call; what it makes of the memory, the caller vouches for.
    unsafe { ioctl(device, uapi::CREATE, &mut create) }
}

/// `struct pinbuf_region`.
#[repr(C)]
#[derive(Debug)]
pub struct CRegion {
    /// The first byte.
    pub address: *mut c_void,
    /// Bytes.
    pub len: size_t,
}

/// Makes memory.
///
/// # Safety
///
/// `region` must be null or a `struct pinbuf_region`.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_region_new(
    region: *mut CRegion,
    len: size_t,
    kind: c_int,
) -> c_int {
    if region.is_null() {
        return -libc::EFAULT;
    }
    let made = match kind {
        0 => Region::anonymous(len),
        1 => Region::huge_advised(len),
        2 => Region::hugetlb(len, HugePage::Mib2),
        3 => Region::hugetlb(len, HugePage::Gib1),
        _ => return -libc::EINVAL,
    };
    match made {
        Ok(made) => {
            // From here on it belongs to the caller, and `pinbuf_region_free` unmaps it.
            let made = ManuallyDrop::new(made);
            let made = CRegion {
                address: made.as_ptr().cast(),
                len: made.len(),
            };
            // SAFETY: by the contract of this function.
            unsafe { region.write(made) };
            0
        }
        Err(error) => number(&error),
    }
}

/// Frees memory.
///
/// # Safety
///
/// `region` must be null or one that [`pinbuf_region_new`] filled in, whose memory is not used any
/// more.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_region_free(region: *mut CRegion) {
    if region.is_null() {
        return;
    }
    let empty = CRegion {
        address: std::ptr::null_mut(),
        len: 0,
    };
    // SAFETY: by the contract of this function.
    let CRegion { address, len } = unsafe { region.replace(empty) };
    if !address.is_null() {
        // SAFETY: by the contract of this function the memory is that of a region.
        unsafe { libc::munmap(address, len) };
    }
}

/// Maps a buffer.
///
/// # Safety
///
/// `address` must be null or point to a pointer, `len` must be null or point to a number.
#[no_mangle]
pub unsafe extern "C" fn pinbuf_map(
    buffer: c_int,
    address: *mut *mut c_void,
    len: *mut size_t,
) -> c_int {
    if address.is_null() {
        return -libc::EFAULT;
    }
    if buffer < 0 {
        return -libc::EBADF;
    }
    // SAFETY: `ManuallyDrop` leaves the descriptor to the caller; a wrong number is an error of
    // the calls made with it.
    let fd = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(buffer) });
    let Ok(copy) = fd.try_clone() else {
        return errno();
    };
    let buffer = match DmaBuf::from_fd(copy) {
        Ok(buffer) => buffer,
        Err(error) => return number(&error),
    };
    match buffer.map() {
        Ok(mapping) => {
            // From here on it belongs to the caller, who unmaps it.
            let mapping = ManuallyDrop::new(mapping);
            // SAFETY: by the contract of this function.
            unsafe { address.write(mapping.as_ptr().cast()) };
            if !len.is_null() {
                // SAFETY: by the contract of this function.
                unsafe { len.write(mapping.len()) };
            }
            0
        }
        Err(error) => number(&error),
    }
}

/// `DMA_BUF_IOCTL_SYNC`.
const SYNC: u32 = 0x4008_6200;
const SYNC_END: u64 = 4;

fn sync(buffer: c_int, access: c_int, end: u64) -> c_int {
    if !(1..=3).contains(&access) {
        return -libc::EINVAL;
    }
    let mut flags = access as u64 | end;
    loop {
        // SAFETY: the call reads a number.
        match unsafe { ioctl(buffer, SYNC, &mut flags) } {
            ret if ret == -libc::EINTR || ret == -libc::EAGAIN => {}
            ret => return ret.min(0),
        }
    }
}

/// Begins an access.
#[no_mangle]
pub extern "C" fn pinbuf_begin(buffer: c_int, access: c_int) -> c_int {
    sync(buffer, access, 0)
}

/// Ends an access.
#[no_mangle]
pub extern "C" fn pinbuf_end(buffer: c_int, access: c_int) -> c_int {
    sync(buffer, access, SYNC_END)
}
