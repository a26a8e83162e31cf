// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answering `UDMABUF_CREATE` and `UDMABUF_CREATE_LIST`.
//!
//! udmabuf names parts of files, pinbuf takes addresses. Three things are tried in turn, each with
//! `PINBUF_CREATE_CHECK_BACKING`, so that the driver refuses every page that is not the file's:
//!
//! 1. the program's own mappings, where they were the last time;
//! 2. the program's own mappings, where the kernel says that they are now, and mappings of our own
//!    for what is not among them;
//! 3. mappings of our own for everything.
//!
//! The program's own come first since a page that is not there yet may have to come from elsewhere: a
//! mapping that is registered with userfaultfd makes the call wait for it, as the program would.

use core::ffi::c_int;

use pinbuf_uapi as uapi;

use crate::buffer::Buffer;
use crate::hints::HINTS;
use crate::log::log;
use crate::maps::MAPS;
use crate::plan::{File, Piece, Plan};
use crate::request::{self, INLINE_ITEMS};
use crate::spans::{FileId, Spans};
use crate::sys::{self, Errno, Result};
use crate::window::Window;
use crate::{align, device, discards, late};

/// How often a call is made at most, when the file's pages change under our own mapping, or the files
/// themselves do.
const TRIES: u32 = 16;

/// Answers a request for a buffer; `ENOTTY` says that `device` is not pinbuf's.
pub fn answer(device: c_int, request: u32, arg: usize) -> Result<c_int> {
    discards::report(device);
    let mut changed = Errno(libc::EBADFD);
    for _ in 0..TRIES {
        let (dmabuf, checked) = answer_once(device, request, arg)?;
        match checked {
            Ok(()) => return Ok(dmabuf),
            Err(error) => changed = error,
        }
        log!("fd {dmabuf} is closed: another thread changed the files meanwhile");
        sys::close(dmabuf);
    }
    log!(
        "failed with errno {}: the files changed {TRIES} times",
        changed.0
    );
    Err(changed)
}

/// Answers a request once. With the buffer comes whether the files were the same throughout.
#[inline(never)]
fn answer_once(device: c_int, request: u32, arg: usize) -> Result<(c_int, Result<()>)> {
    let mut plan = Plan::new();
    let mut call = Call::new();
    let mut result = match read(&mut plan, request, arg) {
        Ok(flags) => create(device, flags, &plan, &mut call).map_err(as_udmabuf),
        Err(error) => Err(error),
    };
    match result {
        Ok(dmabuf) => {
            align::made(dmabuf);
            discards::made(dmabuf);
        }
        Err(_) if device::is_path_only(device) => result = Err(Errno(libc::EBADF)),
        Err(_) => {}
    }
    let (outcome, number) = match result {
        Ok(fd) => ("created fd", fd),
        Err(Errno(errno)) => ("failed with errno", errno),
    };
    log!(
        "{outcome} {number}: {} bytes, {} items, {} pieces, {} ranges mapped for the call",
        plan.bytes,
        plan.asked,
        plan.pieces().len(),
        call.missing
    );
    result.map(|dmabuf| (dmabuf, plan.check_again()))
}

/// Reads a request and checks it. Returns the flags for pinbuf's call.
fn read(plan: &mut Plan, number: u32, arg: usize) -> Result<u32> {
    let flags = match number {
        request::CREATE => request::read_single(plan.items(), arg)?,
        _ => request::read_list(plan.items(), arg)?,
    };
    plan.check()?;
    let cloexec = if flags & request::FLAGS_CLOEXEC != 0 {
        uapi::CREATE_CLOEXEC
    } else {
        0
    };
    Ok(uapi::CREATE_CHECK_BACKING | cloexec)
}

fn create(device: c_int, flags: u32, plan: &Plan, call: &mut Call) -> Result<c_int> {
    let of_call = |id: FileId| plan.files.iter().any(|file| file.id == id);

    let mut known = Spans::new();
    HINTS.recall(of_call, &mut known);
    if !known.is_empty() && call.locate(plan, &known)? && call.missing == 0 {
        late::request(&call.ranges);
        match call.make(device, flags) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    let mut found = Spans::new();
    MAPS.ask(of_call, &mut found);
    if !known.is_empty() || !found.is_empty() {
        HINTS.replace(of_call, &found);
    }
    if !found.is_empty() && call.locate(plan, &found)? {
        match call.make_with(device, flags, plan, &found) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    // Nothing is cut: there is a range for each piece.
    let none = Spans::new();
    if !call.locate(plan, &none)? {
        return Err(Errno(libc::EINVAL));
    }
    let mut result = call.make_with(device, flags, plan, &none);
    for _ in 1..TRIES {
        if result != Err(Errno(libc::EAGAIN)) {
            break;
        }
        result = call.make_with(device, flags, plan, &none);
    }
    result
}

/// Stops [`each_part`]; not an error of any other step.
const TOO_MANY: Errno = Errno(libc::E2BIG);

/// Does something with each piece of a plan, cut where mappings end, and its address.
fn each_part(
    plan: &Plan,
    mapped: &Spans,
    mut then: impl FnMut(Piece, Option<u64>) -> Result<()>,
) -> Result<()> {
    let files: &[File] = &plan.files;
    for mut rest in plan.pieces() {
        let id = files[rest.file].id;
        while rest.len > 0 {
            let (address, reach) = mapped.at(id, rest.offset);
            let len = rest.len.min(reach);
            then(Piece { len, ..rest }, address)?;
            rest.offset += len;
            rest.len -= len;
        }
    }
    Ok(())
}

/// What the driver is asked for.
struct Call {
    ranges: Buffer<uapi::Range, INLINE_ITEMS>,
    backing: Buffer<uapi::Backing, INLINE_ITEMS>,
    /// Ranges that are not among the program's mappings.
    missing: usize,
}

impl Call {
    const fn new() -> Self {
        Self {
            ranges: Buffer::new(),
            backing: Buffer::new(),
            missing: 0,
        }
    }

    /// Takes the addresses of what is mapped. Returns false where that makes more ranges than the driver takes:
    /// a list of pieces that are scattered over many mappings has as many ranges as both multiplied.
    fn locate(&mut self, plan: &Plan, mapped: &Spans) -> Result<bool> {
        const MOST: usize = uapi::MAX_RANGES as usize;
        self.ranges.truncate(0);
        self.backing.truncate(0);
        self.missing = 0;
        if plan.pieces().len() > MOST {
            return Ok(false);
        }
        self.ranges.reserve(plan.pieces().len())?;
        self.backing.reserve(plan.pieces().len())?;
        let files: &[File] = &plan.files;
        let located = each_part(plan, mapped, |piece, address| {
            if self.ranges.len() == MOST {
                return Err(TOO_MANY);
            }
            self.missing += usize::from(address.is_none());
            self.ranges.push(uapi::Range {
                addr: address.unwrap_or(0),
                len: piece.len,
            })?;
            self.backing.push(uapi::Backing {
                fd: files[piece.file].fd,
                reserved: 0,
                offset: piece.offset,
            })
        });
        match located {
            Ok(()) => Ok(true),
            Err(TOO_MANY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes the buffer of what the program has mapped, which was located, and of a window onto the rest.
    fn make_with(
        &mut self,
        device: c_int,
        flags: u32,
        plan: &Plan,
        theirs: &Spans,
    ) -> Result<c_int> {
        let mut window = Window::new(&plan.files);
        if self.missing > 0 {
            each_part(plan, theirs, |piece, address| match address {
                Some(_) => Ok(()),
                None => window.add(piece),
            })?;
            window.map()?;
            let mut ranges = self.ranges.iter_mut();
            each_part(plan, theirs, |piece, address| {
                let range = ranges.next();
                if let Some(range) = range.filter(|_| address.is_none()) {
                    range.addr = window.fault_in(piece);
                }
                Ok(())
            })?;
        } else {
            late::request(&self.ranges);
        }
        self.make(device, flags)
    }

    fn make(&self, device: c_int, flags: u32) -> Result<c_int> {
        let mut create = uapi::Create {
            size: size_of::<uapi::Create>() as u32,
            flags,
            ranges: self.ranges.as_ptr() as u64,
            count: self.ranges.len() as u32,
            reserved: 0,
            backing: self.backing.as_ptr() as u64,
        };
        // SAFETY: PINBUF_CREATE reads the struct and the lists, of `count` elements, that it names.
        unsafe { sys::ioctl(device, uapi::CREATE, &mut create) }
    }
}

/// The error that udmabuf gives in such a case.
fn as_udmabuf(error: Errno) -> Errno {
    Errno(match error.0 {
        // The file's store is exhausted: hugetlb's pool, say.
        libc::EFAULT => libc::ENOMEM,
        // udmabuf gives up with this when pages cannot be moved.
        libc::EBUSY => libc::ENOMEM,
        // The file loses its pages faster than they can be pinned; or locked memory is at its limit, which
        // counts for mappings after mlockall().
        libc::EAGAIN => libc::ENOMEM,
        // A seal that came after it was checked.
        libc::EPERM => libc::EINVAL,
        // Another thread closed it, or put another file in its place.
        libc::EBADF => libc::EBADFD,
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spans::Span;

    #[test]
    fn ranges_do_not_multiply() {
        let page = sys::page_size();
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"create".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 1024 * page as i64) }, 0);
        sys::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
        let stat = sys::fstat(fd).unwrap();
        let id = FileId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        // Each page is mapped by itself.
        let mut mapped = Spans::new();
        for i in 0..1024 {
            let span = Span {
                id,
                offset: i * page,
                len: page,
                addr: 2 * (1024 - i) * page,
            };
            mapped.push(span).unwrap();
        }
        mapped.finish();
        let locate = |items: usize, mapped: &Spans| {
            let mut plan = Plan::new();
            for _ in 0..items {
                let item = request::Item {
                    memfd: fd as u32,
                    pad: 0,
                    offset: 0,
                    size: 1024 * page,
                };
                plan.items().push(item).unwrap();
            }
            plan.check().unwrap();
            let mut call = Call::new();
            let fits = call.locate(&plan, mapped).unwrap();
            (fits, call.ranges.len())
        };
        let most = uapi::MAX_RANGES as usize;
        assert_eq!(locate(64, &mapped), (true, most));
        assert_eq!(locate(65, &mapped), (false, most));
        assert_eq!(locate(1 << 20, &mapped), (false, 0));
        assert_eq!(locate(most, &Spans::new()), (true, most));
        assert_eq!(locate(most + 1, &Spans::new()), (false, 0));
        sys::close(fd);
    }
}
