// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answering `UDMABUF_CREATE` and `UDMABUF_CREATE_LIST`.

use core::ffi::c_int;

use pinbuf_uapi as uapi;

use crate::log::log;
use crate::plan::{Plan, Writable};
use crate::request::{self, Request};
use crate::sys::{self, Errno, Result};

/// Answers a request for a buffer; `ENOTTY` says that `device` is not pinbuf's.
pub fn answer(device: c_int, request: u32, arg: usize) -> Result<c_int> {
    let request = match request {
        request::CREATE => Request::read_single(arg)?,
        _ => Request::read_list(arg)?,
    };
    let mut plan = Plan::new(&request.items)?;
    let mut flags = uapi::CREATE_FROM_FILES;
    if request.flags & request::FLAGS_CLOEXEC != 0 {
        flags |= uapi::CREATE_CLOEXEC;
    }
    let result = create(device, flags, &mut plan).map_err(as_udmabuf);
    match &result {
        Ok(fd) => log!(
            "created fd {fd}: {} bytes, {} items, {} pieces",
            plan.bytes,
            request.items.len(),
            plan.ranges.len(),
        ),
        Err(Errno(errno)) => log!(
            "failed with errno {errno}: {} bytes, {} items, {} pieces",
            plan.bytes,
            request.items.len(),
            plan.ranges.len(),
        ),
    }
    result
}

/// Makes the buffer. Afterwards the plan names descriptors, not indices of files.
fn create(device: c_int, flags: u32, plan: &mut Plan) -> Result<c_int> {
    let writable = Writable::new(&plan.files, device)?;
    for backing in plan.backing.iter_mut() {
        backing.fd = writable.fd(backing.fd as usize);
    }
    let mut create = uapi::Create {
        size: size_of::<uapi::Create>() as u32,
        flags,
        ranges: plan.ranges.as_ptr() as u64,
        count: plan.ranges.len() as u32,
        reserved: 0,
        backing: plan.backing.as_ptr() as u64,
    };
    writable.release_number();
    // SAFETY: PINBUF_CREATE reads the struct and the lists, of `count` elements, that it names.
    unsafe { sys::ioctl(device, uapi::CREATE, &mut create) }
}

/// The error that udmabuf gives in such a case.
fn as_udmabuf(error: Errno) -> Errno {
    Errno(match error.0 {
        // The file's store is exhausted: hugetlb's pool, say.
        libc::EFAULT => libc::ENOMEM,
        // udmabuf gives up with this when pages cannot be moved.
        libc::EBUSY => libc::ENOMEM,
        // A seal that came after it was checked.
        libc::EPERM => libc::EINVAL,
        // Another thread closed it, or put another file in its place.
        libc::EBADF => libc::EBADFD,
        other => other,
    })
}
