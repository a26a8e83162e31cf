// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mappings of our own, for the length of a call, of what the program has not mapped.

use core::ffi::{c_int, CStr};

use crate::buffer::Buffer;
use crate::plan::{File, Piece};
use crate::spans::{Span, Spans};
use crate::sys::{self, Errno, Plain, Result};

/// The most mappings for one call. With more, which are then small as a rule, each file is mapped from the first
/// to the last byte that is needed: a mapping costs more than the faults for a few pages.
const MOST: usize = 256;

/// The most that is mapped at once for that reason, in bytes: pieces that are farther apart would use up the
/// addresses of a process, which are 128 TiB as a rule.
const FARTHEST: u64 = 1 << 40;

/// How much a read fault enters, if it is there, in bytes and as aligned; the kernel's `fault_around_bytes`
/// unless it was changed.
const AROUND: u64 = 64 << 10;

/// The most that is entered ahead of pinning in one call, in bytes.
const AHEAD: u64 = 64 << 20;

/// No architecture has larger pages in a table: a table of 64 KiB has 8,192 entries, of pages of 512 MiB, of
/// which sixteen may be one.
const LARGEST_PAGE: usize = 16 << 30;

/// A part of a file that will be mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Run {
    file: usize,
    start: u64,
    end: u64,
    /// The size of the file's pages.
    block: u64,
    /// Where it is mapped, or 0.
    addr: u64,
}

// SAFETY: integers without padding.
unsafe impl Plain for Run {}

/// What is mapped.
///
/// # Invariants
///
/// Where a run has an address, the mapping there, of `end - start` bytes or more, is this window's alone.
pub struct Window<'a> {
    files: &'a [File],
    runs: Buffer<Run, 8>,
    /// What is mapped.
    spans: Spans,
    /// How much may still be entered ahead.
    ahead: u64,
}

impl<'a> Window<'a> {
    /// A window onto some of these files.
    pub const fn new(files: &'a [File]) -> Self {
        Self {
            files,
            runs: Buffer::new(),
            spans: Spans::new(),
            ahead: AHEAD,
        }
    }

    /// Adds a piece to what shall be mapped: the pages of it that the file has, whole.
    pub fn add(&mut self, piece: Piece) -> Result<()> {
        let page = sys::page_size();
        let block = self.files[piece.file].block;
        let block = if block.is_power_of_two() {
            block.max(page)
        } else {
            page
        };
        let end = piece.offset.checked_add(piece.len);
        let end = end.and_then(|end| end.checked_next_multiple_of(block));
        self.runs.push(Run {
            file: piece.file,
            start: piece.offset - piece.offset % block,
            end: end.ok_or(Errno(libc::EINVAL))?,
            block,
            addr: 0,
        })
    }

    /// Maps all of it, each page once.
    pub fn map(&mut self) -> Result<()> {
        self.join();
        let mut writable = Reopened(None);
        for run in self.runs.iter_mut() {
            let len = run.end - run.start;
            let file = &self.files[run.file];
            // The kernel chooses the address, for each: a descriptor that another thread puts another file at,
            // after it was checked, may have larger pages, to which the kernel rounds the length up.
            let addr = map(len as usize, file.fd, run.start, &mut writable)? as u64;
            // INVARIANT: just mapped.
            run.addr = addr;
            self.spans.push(Span {
                id: file.id,
                offset: run.start,
                len,
                addr,
            })?;
        }
        self.spans.finish();
        Ok(())
    }

    /// Sorts what shall be mapped, and joins what touches or overlaps.
    fn join(&mut self) {
        let files = self.files;
        self.runs.sort_by_key(|run| (files[run.file].id, run.start));
        self.join_if(|last, run| run.start <= last.end);
        if self.runs.len() > MOST {
            self.join_if(|last, run| run.end - last.start <= FARTHEST);
        }
    }

    /// Makes one run of neighbours that are of one file.
    fn join_if(&mut self, joins: impl Fn(&Run, &Run) -> bool) {
        let mut kept = 0;
        for i in 0..self.runs.len() {
            let run = self.runs[i];
            if kept > 0 {
                let last = &mut self.runs[kept - 1];
                let same = self.files[last.file].id == self.files[run.file].id;
                if same && joins(last, &run) {
                    last.end = last.end.max(run.end);
                    continue;
                }
            }
            self.runs[kept] = run;
            kept += 1;
        }
        self.runs.truncate(kept);
    }

    /// The whole pages of the file that have a piece which was mapped: where they are, and their length.
    pub fn pages(&self, piece: Piece) -> Option<(u64, u64)> {
        let file = &self.files[piece.file];
        let block = file.block.max(sys::page_size());
        let start = piece.offset - piece.offset % block;
        let end = (piece.offset + piece.len).checked_next_multiple_of(block)?;
        let address = self.spans.at(file.id, start).0?;
        Some((address, end - start))
    }

    /// Where a piece is that was mapped, or 0. Its pages are entered into the page table: a read fault enters
    /// those around the address as well, while pinning takes one fault for each. A file's huge pages take few
    /// faults anyway.
    ///
    /// That is done for files that have all of their pages only, and up to a bound: a fault for a page that is
    /// not there would allocate it, and the driver has not yet compared the size with any limit.
    pub fn fault_in(&mut self, piece: Piece) -> u64 {
        let file = &self.files[piece.file];
        let address = self.spans.at(file.id, piece.offset).0.unwrap_or(0);
        let page = sys::page_size();
        if file.block <= page && file.stored >= file.size && piece.len > page {
            let around = AROUND.max(page);
            let mut next = address;
            while next < address + piece.len && self.ahead >= around {
                self.ahead -= around;
                // If there is no memory for it, the pin reports that.
                let _ = sys::can_read(next as usize);
                next = (next / around + 1) * around;
            }
        }
        address
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        for run in self.runs.iter().filter(|run| run.addr != 0) {
            // SAFETY: by the invariants this mapping is ours, and the call is over.
            unsafe { unmap(run.addr as usize, (run.end - run.start) as usize) };
        }
    }
}

/// Unmaps what `map` has mapped, also where the pages turned out to be larger than those of the file that
/// was meant: the kernel refuses to cut such a mapping within a page, so the first multiple of a power of two
/// that it accepts is where the mapping ends.
///
/// # Safety
///
/// The mapping at `addr`, of `len` bytes or more, must be the caller's own, and unused.
unsafe fn unmap(addr: usize, len: usize) {
    let mut block = sys::page_size() as usize;
    while block <= LARGEST_PAGE {
        let Some(whole) = len.checked_next_multiple_of(block) else {
            return;
        };
        // SAFETY: up to `len`, by the contract of this function; beyond, what was refused before is a part
        // of a page of this mapping.
        if unsafe { sys::munmap(addr, whole) } != Err(Errno(libc::EINVAL)) {
            return;
        }
        block *= 2;
    }
}

/// A file that was opened for writing because the program's descriptor is not, by that descriptor's number.
struct Reopened(Option<(c_int, c_int)>);

impl Reopened {
    /// A descriptor of the file behind `fd` that is open for writing. It is closed before the buffer gets its
    /// own, which is therefore the lowest free number.
    fn get(&mut self, fd: c_int) -> Result<c_int> {
        match self.0 {
            Some((of, new)) if of == fd => Ok(new),
            _ => {
                self.close();
                let new = reopen(fd)?;
                self.0 = Some((fd, new));
                Ok(new)
            }
        }
    }

    fn close(&mut self) {
        if let Some((_, fd)) = self.0.take() {
            sys::close(fd);
        }
    }
}

impl Drop for Reopened {
    fn drop(&mut self) {
        self.close();
    }
}

/// Maps a part of a file so that it can be pinned.
fn map(len: usize, fd: c_int, offset: u64, writable: &mut Reopened) -> Result<usize> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // A reservation of huge pages would be given back at once.
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    match sys::mmap(None, len, access, flags, fd, offset) {
        Err(Errno(libc::EACCES)) => sys::mmap(None, len, access, flags, writable.get(fd)?, offset),
        result => result,
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
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| Errno(libc::EINVAL))?;
    sys::open(path, libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOCTTY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spans::FileId;

    fn file(ino: u64, block: u64) -> File {
        File {
            fd: -1,
            size: 1 << 40,
            id: FileId { dev: 1, ino },
            block,
            stored: 0,
        }
    }

    fn planned(files: &[File], pieces: &[(usize, u64, u64)]) -> Vec<(usize, u64, u64)> {
        let mut window = Window::new(files);
        for &(file, offset, len) in pieces {
            window.add(Piece { file, offset, len }).unwrap();
        }
        window.join();
        let runs = window.runs.iter();
        runs.map(|run| (run.file, run.start, run.end)).collect()
    }

    #[test]
    fn each_page_is_mapped_once() {
        let page = sys::page_size();
        let files = [file(9, page), file(3, 512 * page), file(9, page)];
        let small = |list: &[(usize, u64, u64)]| {
            let pages: Vec<_> = list
                .iter()
                .map(|&(file, offset, len)| (file, offset * page, len * page))
                .collect();
            planned(&files, &pages)
        };
        assert_eq!(
            small(&[(0, 3, 2), (0, 0, 1)]),
            [(0, 0, page), (0, 3 * page, 5 * page)]
        );
        assert_eq!(
            small(&[(0, 3, 2), (0, 5, 1), (0, 3, 1)]),
            [(0, 3 * page, 6 * page)]
        );
        assert_eq!(
            small(&[(0, 3, 9), (0, 5, 1), (0, 4, 1)]),
            [(0, 3 * page, 12 * page)]
        );
        // Two descriptors of one file.
        assert_eq!(small(&[(0, 3, 2), (2, 4, 2)]), [(0, 3 * page, 6 * page)]);
        // Whole huge pages.
        let huge = 512 * page;
        assert_eq!(small(&[(1, 5, 1)]), [(1, 0, huge)]);
        assert_eq!(small(&[(1, 5, 1), (1, 511, 2)]), [(1, 0, 2 * huge)]);
        assert_eq!(
            small(&[(0, 0, 1), (1, 2048, 1), (1, 5, 1)]),
            [(1, 0, huge), (1, 4 * huge, 5 * huge), (0, 0, page)]
        );
    }

    #[test]
    fn very_many_pieces_are_mapped_as_one() {
        let page = sys::page_size();
        let files = [file(1, page), file(2, page)];
        let mut list: Vec<_> = (0..MOST as u64 - 1)
            .map(|i| (0, 2 * i * page, page))
            .collect();
        list.push((1, 5 * page, page));
        assert_eq!(planned(&files, &list).len(), MOST);
        list.push((1, 9 * page, page));
        let whole = (2 * MOST as u64 - 3) * page;
        assert_eq!(
            planned(&files, &list),
            [(0, 0, whole), (1, 5 * page, 10 * page)]
        );
        // Nothing is mapped across a terabyte.
        list.push((0, FARTHEST, page));
        list.push((0, FARTHEST + 5 * page, page));
        let far = (0, FARTHEST, FARTHEST + 6 * page);
        assert_eq!(
            planned(&files, &list),
            [(0, 0, whole), far, (1, 5 * page, 10 * page)]
        );
    }

    fn memfd(name: &CStr, pages: u64) -> c_int {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), 0) };
        let size = pages * sys::page_size();
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, size as i64) }, 0);
        for i in 0..pages {
            let at = (i * sys::page_size()) as i64;
            // SAFETY: eight bytes are read.
            unsafe { libc::pwrite(fd, (&raw const i).cast(), 8, at) };
        }
        fd
    }

    fn opened(fd: c_int) -> File {
        let stat = sys::fstat(fd).unwrap();
        File {
            fd,
            size: stat.st_size as u64,
            id: FileId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
            block: stat.st_blksize as u64,
            stored: 512 * stat.st_blocks as u64,
        }
    }

    #[test]
    fn pieces_are_where_the_window_says() {
        let page = sys::page_size();
        let files = [opened(memfd(c"pieces", 64)), opened(memfd(c"pieces", 64))];
        for pieces in [
            &[(0, 5, 3)][..],
            &[(0, 5, 3), (1, 60, 4), (0, 7, 10), (0, 40, 1), (1, 0, 1)],
        ] {
            let piece = |&(file, offset, len): &(usize, u64, u64)| Piece {
                file,
                offset: offset * page,
                len: len * page,
            };
            let mut window = Window::new(&files);
            for piece in pieces.iter().map(piece) {
                window.add(piece).unwrap();
            }
            window.map().unwrap();
            for piece in pieces.iter().map(piece) {
                let (address, reach) = window.spans.at(files[piece.file].id, piece.offset);
                assert!(reach >= piece.len);
                for i in 0..piece.len / page {
                    let word = (address.unwrap() + i * page) as *mut u64;
                    // SAFETY: in the window, and aligned.
                    assert_eq!(unsafe { word.read_volatile() }, piece.offset / page + i);
                }
            }
            let mapped = || {
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                maps.contains("/memfd:pieces")
            };
            assert!(mapped());
            drop(window);
            assert!(!mapped());
        }
        for file in files {
            sys::close(file.fd);
        }
    }

    #[test]
    fn a_file_opened_read_only_is_mapped_for_writing() {
        let fd = memfd(c"window", 4);
        let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).unwrap();
        let readonly = sys::open(&path, libc::O_RDONLY).unwrap();
        let files = [opened(readonly)];
        let piece = Piece {
            file: 0,
            offset: 0,
            len: sys::page_size(),
        };
        let mut window = Window::new(&files);
        window.add(piece).unwrap();
        window.map().unwrap();
        let word = window.spans.at(files[0].id, 0).0.unwrap() as *mut u64;
        // SAFETY: in the window, and aligned.
        unsafe { word.write_volatile(77) };
        let mut seen = 0u64;
        // SAFETY: room for eight bytes.
        unsafe { libc::pread(fd, (&raw mut seen).cast(), 8, 0) };
        assert_eq!(seen, 77);
        sys::close(readonly);
        sys::close(fd);
    }

    /// Each is opened once more for that, and none stays open.
    #[test]
    fn several_files_opened_read_only_are_kept_apart() {
        const FILES: u64 = 3;
        let page = sys::page_size();
        let open = || {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            links
                .filter_map(|link| std::fs::read_link(link.path()).ok())
                .filter(|path| path.as_os_str().to_string_lossy().contains("/memfd:apart"))
                .count()
        };
        let fds: Vec<_> = (0..FILES)
            .map(|number| {
                let fd = memfd(c"apart", 2);
                // SAFETY: eight bytes are read.
                unsafe { libc::pwrite(fd, (&raw const number).cast(), 8, page as i64) };
                let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).unwrap();
                let readonly = sys::open(&path, libc::O_RDONLY).unwrap();
                sys::close(fd);
                readonly
            })
            .collect();
        let files: Vec<_> = fds.iter().map(|&fd| opened(fd)).collect();
        let before = open();
        let mut window = Window::new(&files);
        let piece = |file| Piece {
            file,
            offset: page,
            len: page,
        };
        for file in 0..files.len() {
            window.add(piece(file)).unwrap();
        }
        window.map().unwrap();
        assert_eq!(open(), before, "descriptors of the files");
        for (file, number) in (0..files.len()).zip(0..) {
            let word = window.fault_in(piece(file)) as *const u64;
            // SAFETY: in the window, and aligned.
            assert_eq!(unsafe { word.read_volatile() }, number);
        }
        for fd in fds {
            sys::close(fd);
        }
    }

    #[test]
    fn a_file_with_larger_pages_than_it_had_is_unmapped_whole() {
        let page = sys::page_size();
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"larger".as_ptr(), libc::MFD_HUGETLB) };
        let huge = opened(fd).block;
        // As if another thread had put it in the place of an ordinary file after `fstat`.
        let files = [File {
            block: page,
            ..opened(fd)
        }];
        let mut window = Window::new(&files);
        for offset in [0, huge, 4 * huge] {
            let len = page;
            window
                .add(Piece {
                    file: 0,
                    offset,
                    len,
                })
                .unwrap();
        }
        window.map().unwrap();
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps().contains("/memfd:larger") || maps().contains("anon_hugepage"));
        for run in window.runs.iter() {
            assert_eq!(run.addr % huge, 0);
        }
        drop(window);
        assert!(!maps().contains("/memfd:larger") && !maps().contains("anon_hugepage"));
        sys::close(fd);
    }

    /// Pages of a file that are faulted in, by files with and without holes.
    #[test]
    fn only_pages_that_are_there_are_faulted_in() {
        let page = sys::page_size();
        let pages = 2 * AHEAD / page;
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"holes".as_ptr(), 0) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, (pages * page) as i64) }, 0);
        let resident = |window: &Window| {
            let mut list = vec![0u8; pages as usize];
            let addr = window.runs[0].addr as usize;
            let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
            let mut entries = vec![0u8; 8 * pages as usize];
            let at = (addr as u64 / page) * 8;
            std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, at).unwrap();
            for (to, entry) in list.iter_mut().zip(entries.chunks(8)) {
                *to = entry[7] >> 7;
            }
            list.iter().map(|&byte| u64::from(byte)).sum::<u64>()
        };
        let stored = || sys::fstat(fd).unwrap().st_blocks as u64 * 512;
        let fault_in = || {
            let files = [opened(fd)];
            let piece = Piece {
                file: 0,
                offset: 0,
                len: pages * page,
            };
            let mut window = Window::new(&files);
            window.add(piece).unwrap();
            window.map().unwrap();
            assert_eq!(window.fault_in(piece), window.runs[0].addr);
            resident(&window)
        };
        assert_eq!(fault_in(), 0);
        assert_eq!(stored(), 0);
        // SAFETY: no memory is involved.
        let result = unsafe { libc::fallocate(fd, 0, 0, (pages * page) as i64) };
        assert_eq!(result, 0);
        let entered = fault_in();
        assert!(entered > 0 && entered <= AHEAD / page, "{entered}");
        sys::close(fd);
    }
}
