// SPDX-License-Identifier: MIT OR Apache-2.0

//! The call to pinbuf's driver: ranges of addresses, and the parts of files that they have to map.

use core::ffi::c_int;
use core::mem::size_of;

use pinbuf_uapi as uapi;

use crate::buffer::{heap_sort, Buffer};
use crate::plan::{File, Piece, Plan};
use crate::request::{self, INLINE_ITEMS};
use crate::spans::{self, Spans};
use crate::sys::{self, Errno, Result};
use crate::window::Window;

/// How often a call is made at most, when the file's pages change under our own mapping, or the files
/// themselves do.
pub const TRIES: u32 = 16;

/// The flags of pinbuf's call for those of a request: udmabuf ignores all but one.
pub fn flags_of(request: u32) -> u32 {
    let cloexec = if request & request::FLAGS_CLOEXEC != 0 {
        uapi::CREATE_CLOEXEC
    } else {
        0
    };
    uapi::CREATE_CHECK_BACKING | cloexec
}

/// Stops [`each_part`]; not an error of any other step.
const TOO_MANY: Errno = Errno(libc::E2BIG);

/// Does something with each piece of a plan, cut where mappings end, and its address.
pub fn each_part(
    plan: &Plan,
    mapped: &Spans,
    mut then: impl FnMut(Piece, Option<u64>) -> Result<()>,
) -> Result<()> {
    let files: &[File] = &plan.files;
    let (mut file, mut spans) = (usize::MAX, &[][..]);
    for mut rest in plan.pieces() {
        // Most pieces are of the same file as the piece before.
        if rest.file != file {
            file = rest.file;
            spans = mapped.of(files[file].id);
        }
        while rest.len > 0 {
            let (address, reach) = spans::at(spans, rest.offset);
            let len = rest.len.min(reach);
            then(Piece { len, ..rest }, address)?;
            rest.offset += len;
            rest.len -= len;
        }
    }
    Ok(())
}

/// What the driver is asked for.
pub struct Call {
    /// Addresses.
    pub ranges: Buffer<uapi::Range, INLINE_ITEMS>,
    backing: Buffer<uapi::Backing, INLINE_ITEMS>,
    /// Ranges that are not among the program's mappings.
    pub missing: usize,
}

impl Call {
    /// A call for nothing yet.
    pub const fn new() -> Self {
        Self {
            ranges: Buffer::new(),
            backing: Buffer::new(),
            missing: 0,
        }
    }

    /// Takes the addresses of what is mapped. Returns false where that makes more ranges than the driver takes:
    /// a list of pieces that are scattered over many mappings has as many ranges as both multiplied.
    pub fn locate(&mut self, plan: &Plan, mapped: &Spans) -> Result<bool> {
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

    /// Are the ranges in the order of their addresses?
    pub fn ascends(&self) -> bool {
        self.ranges.is_sorted_by_key(|range| range.addr)
    }

    /// Brings the ranges into the order of their addresses.
    pub fn sort(&mut self) {
        let swap = |call: &mut Self, i, j| {
            call.ranges.swap(i, j);
            call.backing.swap(i, j);
        };
        heap_sort(self, self.ranges.len(), |call, i| call.ranges[i].addr, swap);
    }

    /// Adds a range that does not map what its backing says: the first page again, as another page of its file. The
    /// driver refuses the call then, once it has had all other pages. Returns false where there is no room.
    pub fn spoil(&mut self) -> Result<bool> {
        let (Some(&first), Some(&backing)) = (self.ranges.first(), self.backing.first()) else {
            return Ok(false);
        };
        if self.ranges.len() == uapi::MAX_RANGES as usize {
            return Ok(false);
        }
        let page = sys::page_size();
        self.ranges.push(uapi::Range { len: page, ..first })?;
        self.backing.push(uapi::Backing {
            offset: backing.offset ^ page,
            ..backing
        })?;
        Ok(true)
    }

    /// Makes the buffer of what the program has mapped, which was located, and of a window onto the rest, which `ready`
    /// gets to see once it is mapped.
    pub fn make_with(
        &mut self,
        device: c_int,
        flags: u32,
        plan: &Plan,
        theirs: &Spans,
        ready: impl FnOnce(&Window) -> Result<()>,
    ) -> Result<c_int> {
        let mut window = Window::new(&plan.files);
        if self.missing > 0 {
            each_part(plan, theirs, |piece, address| match address {
                Some(_) => Ok(()),
                None => window.add(piece),
            })?;
            window.map()?;
            ready(&window)?;
            let mut ranges = self.ranges.iter_mut();
            each_part(plan, theirs, |piece, address| {
                let range = ranges.next();
                if let Some(range) = range.filter(|_| address.is_none()) {
                    range.addr = window.fault_in(piece);
                }
                Ok(())
            })?;
        }
        self.make(device, flags)
    }

    /// Makes the buffer of mappings of our own alone, again where the file's pages change meanwhile.
    pub fn make_by_window(
        &mut self,
        device: c_int,
        flags: u32,
        plan: &Plan,
        ready: impl Fn(&Window) -> Result<()>,
    ) -> Result<c_int> {
        // Nothing is cut: there is a range for each piece.
        let none = Spans::new();
        if !self.locate(plan, &none)? {
            return Err(Errno(libc::EINVAL));
        }
        let mut result = self.make_with(device, flags, plan, &none, &ready);
        for _ in 1..TRIES {
            if result != Err(Errno(libc::EAGAIN)) {
                break;
            }
            result = self.make_with(device, flags, plan, &none, &ready);
        }
        result
    }

    /// Asks the driver; `flags` are those of `PINBUF_CREATE`.
    pub fn make(&self, device: c_int, flags: u32) -> Result<c_int> {
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
pub fn as_udmabuf(error: Errno) -> Errno {
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
    use crate::spans::{FileId, Span};

    /// A program that was written for udmabuf knows no other errors: QEMU, for example, tries something else after some
    /// of these. All that `PINBUF_CREATE` and `mmap` of a memfd may return is here.
    #[test]
    fn errors_are_such_as_udmabuf_gives() {
        use libc::{EACCES, EAGAIN, EBADF, EBADFD, EBUSY, EFAULT, EINTR, EINVAL};
        use libc::{EMFILE, ENFILE, ENODEV, ENOMEM, EPERM};
        for (error, expected) in [
            (EINVAL, EINVAL),
            (EFAULT, ENOMEM),
            (ENOMEM, ENOMEM),
            (EBUSY, ENOMEM),
            (EAGAIN, ENOMEM),
            (EPERM, EINVAL),
            (EBADF, EBADFD),
            (EBADFD, EBADFD),
            (EINTR, EINTR),
            (EMFILE, EMFILE),
            (ENFILE, ENFILE),
            (ENODEV, ENODEV),
            (EACCES, EACCES),
        ] {
            assert_eq!(as_udmabuf(Errno(error)), Errno(expected), "{error}");
        }
    }

    #[test]
    fn ranges_are_sorted_with_their_backings() {
        let mut call = Call::new();
        // More than lists have room for without a mapping.
        let count = 3 * INLINE_ITEMS as u64;
        for i in 0..count {
            let addr = i * 37 % count;
            call.ranges
                .push(uapi::Range {
                    addr,
                    len: addr + 1,
                })
                .unwrap();
            let backing = uapi::Backing {
                fd: addr as c_int,
                reserved: 0,
                offset: 2 * addr,
            };
            call.backing.push(backing).unwrap();
        }
        assert!(!call.ascends());
        let mut sorted = call;
        sorted.sort();
        assert!(sorted.ascends());
        assert_eq!(sorted.ranges.len() as u64, count);
        for (i, (range, backing)) in (0..).zip(sorted.ranges.iter().zip(sorted.backing.iter())) {
            assert_eq!((range.addr, range.len), (i, i + 1));
            assert_eq!((backing.fd, backing.offset), (i as c_int, 2 * i));
        }
        assert_eq!(sorted.spoil(), Ok(true));
        let (first, last) = (sorted.backing[0], sorted.backing[count as usize]);
        assert_eq!(sorted.ranges[count as usize].addr, sorted.ranges[0].addr);
        assert!(last.fd == first.fd && last.offset != first.offset);
        assert_eq!(Call::new().spoil(), Ok(false));
    }

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
        // One more range does not fit.
        let mut full = Call::new();
        full.ranges.reserve(most).unwrap();
        full.backing.reserve(most).unwrap();
        for _ in 0..most {
            full.ranges.push(uapi::Range::default()).unwrap();
            full.backing.push(uapi::Backing::default()).unwrap();
        }
        assert_eq!((full.spoil(), full.ranges.len()), (Ok(false), most));
        sys::close(fd);
    }
}
