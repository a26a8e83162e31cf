// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answering `UDMABUF_CREATE` and `UDMABUF_CREATE_LIST`.

use core::ffi::c_int;

use pinbuf_uapi::{self as uapi, Backing, Range};

use crate::layout::Layout;
use crate::log::log;
use crate::mappings::{self, Maps};
use crate::plan::{File, Plan, PAGE};
use crate::request::{self, Request};
use crate::sys::{self, Errno, Result};

/// Pieces of this size are mapped before they are pinned: a fault for reading maps 16 pages at
/// once, where a pin takes a fault a page.
const WORTH_POPULATING: u64 = 16 * PAGE;

/// Answers a request for a buffer; `ENOTTY` says that `device` is not pinbuf's.
pub fn answer(device: c_int, request: u32, arg: usize) -> Result<c_int> {
    let request = match request {
        request::CREATE => Request::read_single(arg)?,
        _ => Request::read_list(arg)?,
    };
    // It also holds the lowest free descriptor, which the buffer gets in the end as with udmabuf,
    // while the copies of the program's descriptors get others.
    let maps = Maps::open();
    let plan = Plan::new(&request.items)?;
    let flags = match request.flags & request::FLAGS_CLOEXEC {
        0 => 0,
        _ => uapi::CREATE_CLOEXEC,
    };
    let (how, result) = create(device, flags, &plan, maps);
    // A seal that came meanwhile: as if it had been there before.
    let result = result.and_then(|fd| match plan.files.check_seals() {
        Ok(()) => Ok(fd),
        Err(error) => {
            sys::close(fd);
            Err(error)
        }
    });
    match &result {
        Ok(fd) => log!(
            "created fd {fd}: {} bytes, {} items, {} pieces, {how}",
            plan.bytes,
            request.items.len(),
            plan.pieces.len(),
        ),
        Err(Errno(errno)) => log!(
            "failed with errno {errno}: {} bytes, {} items, {} pieces, {how}",
            plan.bytes,
            request.items.len(),
            plan.pieces.len(),
        ),
    }
    result
}

/// Makes the buffer, and tells how.
fn create(device: c_int, flags: u32, plan: &Plan, maps: Maps) -> (&'static str, Result<c_int>) {
    let found = maps.find(&plan.files);
    drop(maps);
    if let Some(mapped) = mappings::cover(&found, &plan.files, &plan.pieces) {
        match pin(device, flags, &mapped.ranges, Some(&mapped.backing)) {
            // Not what it seemed: another thread changed it, or it is of a kind that cannot be
            // pinned through this mapping. Or the store is exhausted, which shows again.
            Err(Errno(libc::EAGAIN | libc::EFAULT | libc::EOVERFLOW | libc::EINVAL)) => {}
            result => return ("the program's mapping", result.map_err(as_udmabuf)),
        }
    }
    (
        "a mapping of the shim's",
        create_mapped(device, flags, plan).map_err(as_udmabuf),
    )
}

/// The error that udmabuf gives in such a case.
fn as_udmabuf(error: Errno) -> Errno {
    Errno(match error.0 {
        // Our mapping is there and is writable, so its store is exhausted: hugetlb's pool, say.
        libc::EFAULT => libc::ENOMEM,
        // udmabuf gives up with this when pages cannot be moved.
        libc::EBUSY => libc::ENOMEM,
        // The limit on locked memory, under mlockall().
        libc::EAGAIN => libc::ENOMEM,
        // A seal that came after it was checked.
        libc::EPERM => libc::EINVAL,
        other => other,
    })
}

/// Makes the buffer through mappings of our own.
fn create_mapped(device: c_int, flags: u32, plan: &Plan) -> Result<c_int> {
    let map = |huge| {
        let layout = Layout::new(&plan.files, &plan.pieces, huge)?;
        Stretch::new(&layout, &plan.files).map(|stretch| (layout, stretch))
    };
    let (mut layout, stretch) = match map(true) {
        // Perhaps RLIMIT_AS: without gaps it takes fewer addresses.
        Err(Errno(libc::ENOMEM)) => map(false)?,
        other => other?,
    };
    for range in layout.ranges.iter_mut() {
        range.addr += stretch.base as u64;
    }
    pin(device, flags, &layout.ranges, None)
}

/// `PINBUF_CREATE`.
fn pin(device: c_int, flags: u32, ranges: &[Range], backing: Option<&[Backing]>) -> Result<c_int> {
    let mut create = uapi::Create {
        size: size_of::<uapi::Create>() as u32,
        flags,
        ranges: ranges.as_ptr() as u64,
        count: ranges.len() as u32,
        reserved: 0,
        backing: 0,
    };
    if let Some(backing) = backing {
        debug_assert_eq!(backing.len(), ranges.len());
        create.flags |= uapi::CREATE_CHECK_BACKING;
        create.backing = backing.as_ptr() as u64;
    }
    // SAFETY: PINBUF_CREATE reads the struct and the lists, of `count` elements, that it names.
    unsafe { sys::ioctl(device, uapi::CREATE, &mut create) }
}

/// Addresses that the shim has reserved for a call, with the pieces mapped into them.
///
/// # Invariants
///
/// `address..address + len` is mapped by this value, and nobody else knows of it.
struct Stretch {
    address: usize,
    len: usize,
    /// The first address in it that is aligned as the layout demands.
    base: usize,
}

impl Stretch {
    fn new(layout: &Layout, files: &[File]) -> Result<Self> {
        let len = layout
            .len
            .checked_add(layout.align - PAGE)
            .ok_or(Errno(libc::ENOMEM))? as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without an address nothing that exists is replaced.
        let address = unsafe { sys::mmap(None, len, libc::PROT_NONE, flags, -1, 0)? };
        let base = address.next_multiple_of(layout.align as usize);
        // INVARIANT: it was just mapped, and unmaps itself if the rest fails.
        let stretch = Self { address, len, base };
        let mut writable = Writable::default();
        for placement in layout.placements.iter() {
            let file = &files[placement.file as usize];
            let mut flags = libc::MAP_SHARED;
            if file.block != PAGE {
                flags |= libc::MAP_NORESERVE;
            }
            let at = base + placement.at as usize;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let fd = writable.fd(placement.file, file)?;
            // SAFETY: the placements lie within the layout's length, hence in the stretch.
            unsafe {
                sys::mmap(
                    Some(at),
                    placement.len as usize,
                    prot,
                    flags,
                    fd,
                    placement.offset,
                )?
            };
        }
        // A child has no use for it. Without the advice it would only have more to unmap.
        let _ = sys::advise(address, len, libc::MADV_DONTFORK);
        for placement in layout.placements.iter() {
            let block = files[placement.file as usize].block;
            if block == PAGE && placement.len >= WORTH_POPULATING {
                let at = base + placement.at as usize;
                // What this does not do, the pin does.
                let _ = sys::advise(at, placement.len as usize, libc::MADV_POPULATE_READ);
            }
        }
        Ok(stretch)
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        // SAFETY: by the invariant it is ours. The buffer holds pages, not addresses.
        unsafe { sys::munmap(self.address, self.len) };
    }
}

/// The descriptor through which a file can be mapped for writing: its own, or for one that was
/// opened read-only another, made through /proc. Only the last one is kept.
#[derive(Default)]
struct Writable {
    last: Option<(u32, c_int)>,
    opened: Option<c_int>,
}

impl Writable {
    fn fd(&mut self, index: u32, file: &File) -> Result<c_int> {
        if let Some((_, fd)) = self.last.filter(|&(last, _)| last == index) {
            return Ok(fd);
        }
        self.close();
        let mode = sys::fcntl(file.fd, libc::F_GETFL, 0)? & libc::O_ACCMODE;
        let fd = if mode == libc::O_RDWR {
            file.fd
        } else {
            let fd = reopen(file.fd)?;
            self.opened = Some(fd);
            fd
        };
        self.last = Some((index, fd));
        Ok(fd)
    }

    fn close(&mut self) {
        self.last = None;
        if let Some(fd) = self.opened.take() {
            sys::close(fd);
        }
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        self.close();
    }
}

/// Opens the file behind a descriptor once more, for reading and writing.
fn reopen(fd: c_int) -> Result<c_int> {
    const PREFIX: &[u8] = b"/proc/thread-self/fd/";
    let mut path = [0u8; PREFIX.len() + 12];
    path[..PREFIX.len()].copy_from_slice(PREFIX);
    let mut digits = [0u8; 10];
    let mut n = 0;
    let mut rest = fd.unsigned_abs();
    loop {
        digits[n] = b'0' + (rest % 10) as u8;
        n += 1;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    for (place, digit) in path[PREFIX.len()..]
        .iter_mut()
        .zip(digits[..n].iter().rev())
    {
        *place = *digit;
    }
    let path = core::ffi::CStr::from_bytes_until_nul(&path).map_err(|_| Errno(libc::EINVAL))?;
    sys::open(path, libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOCTTY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::request::Item;
    use core::ffi::CStr;

    fn memfd(bytes: i64) -> c_int {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, bytes) }, 0);
        sys::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK).unwrap();
        fd
    }

    #[test]
    fn a_stretch_shows_the_file_and_goes_away() {
        let fd = memfd(1 << 24);
        // SAFETY: the bytes are only read.
        let written = unsafe { libc::pwrite(fd, b"here".as_ptr().cast(), 4, 3 * 4096) };
        assert_eq!(written, 4);
        let readonly = {
            let path = format!("/proc/self/fd/{fd}\0");
            sys::open(
                CStr::from_bytes_with_nul(path.as_bytes()).unwrap(),
                libc::O_RDONLY,
            )
            .unwrap()
        };
        for fd in [fd, readonly] {
            let item = |offset, size| Item {
                memfd: fd as u32,
                pad: 0,
                offset,
                size,
            };
            let items = [item(8 << 20, 4 << 20), item(3 * 4096, 4096)];
            let plan = Plan::new(&items).unwrap();
            for huge in [true, false] {
                let layout = Layout::new(&plan.files, &plan.pieces, huge).unwrap();
                let stretch = Stretch::new(&layout, &plan.files).unwrap();
                let at = stretch.base + layout.placements[1].at as usize;
                // SAFETY: mapped by the stretch.
                assert_eq!(unsafe { *(at as *const [u8; 4]) }, *b"here");
                drop(stretch);
                let mut byte = [0u64];
                assert!(sys::copy_from_program(&mut byte, at).is_err());
            }
        }
        sys::close(readonly);
        sys::close(fd);
    }

    #[test]
    fn the_programs_mapping_is_found() {
        let fd = memfd(1 << 20);
        let item = Item {
            memfd: fd as u32,
            pad: 0,
            offset: 8192,
            size: 8192,
        };
        let plan = Plan::new(&[item]).unwrap();
        assert!(Maps::open().find(&plan.files).is_empty());
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let at = unsafe { sys::mmap(None, 1 << 20, prot, libc::MAP_SHARED, fd, 0) }.unwrap();
        let found = Maps::open().find(&plan.files);
        // Kernels before 6.11 do not tell.
        if let Some(mapped) = mappings::cover(&found, &plan.files, &plan.pieces) {
            assert_eq!(
                *mapped.ranges,
                [Range {
                    addr: at as u64 + 8192,
                    len: 8192
                }]
            );
            assert_eq!(mapped.backing[0].offset, 8192);
        }
        // SAFETY: the mapping of above.
        unsafe { sys::munmap(at, 1 << 20) };
        sys::close(fd);
    }
}
