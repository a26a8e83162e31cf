// SPDX-License-Identifier: MIT OR Apache-2.0

//! Asking the kernel where the program has files mapped: `PROCMAP_QUERY` on `/proc/self/maps`.
//!
//! The file is opened when the program opens the device, since monitors lock themselves in later, and is
//! kept. Before each use the number is proved to be that file still: a program may close all descriptors, and
//! get the number again for something else. After a `fork` the file describes the parent's mappings: what it
//! says is a hint that the driver refuses where it is wrong. Where that is not enough ([`crate::late`]), a mapping that is
//! made has to appear there ([`Maps::are_own`]).

use core::ffi::c_int;
use core::sync::atomic::{fence, AtomicU64, Ordering};

use crate::late;
use crate::log::log;
use crate::procmap;
use crate::spans::{FileId, Spans};
use crate::sys::{self, Errno};

/// Numbers from here on are given to what is opened behind the program's back, so that its own descriptors
/// have the numbers that they have without us. Below 1,024, the usual limit.
const HIGH: c_int = 960;

/// A descriptor of ours, and what proves that it is.
pub struct Maps {
    /// What is kept, and by which process.
    state: AtomicU64,
    dev: AtomicU64,
    ino: AtomicU64,
}

/// This process's maps.
pub static MAPS: Maps = Maps::new();

/// In the place of a descriptor: there is none.
const NONE: c_int = -1;
/// In the place of a descriptor: a thread is writing the fields.
const BUSY: c_int = -2;

/// A process and its descriptor, as one word.
fn state_of(pid: c_int, fd: c_int) -> u64 {
    u64::from(pid as u32) << 32 | u64::from(fd as u32)
}

impl Maps {
    const fn new() -> Self {
        Self {
            state: AtomicU64::new(NONE as u32 as u64),
            dev: AtomicU64::new(0),
            ino: AtomicU64::new(0),
        }
    }

    /// The descriptor, if it is open and ours.
    fn proved(&self) -> Option<c_int> {
        self.proved_of(self.state.load(Ordering::Acquire))
    }

    fn proved_of(&self, state: u64) -> Option<c_int> {
        let fd = state as u32 as c_int;
        if fd < 0 {
            return None;
        }
        let stat = sys::fstat(fd).ok()?;
        let same = stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && stat.st_dev == self.dev.load(Ordering::Relaxed)
            && stat.st_ino == self.ino.load(Ordering::Relaxed);
        // Another thread that writes the fields says so before.
        fence(Ordering::Acquire);
        (same && self.state.load(Ordering::Relaxed) == state).then_some(fd)
    }

    /// Opens the file, unless that was done in this process and it is still open.
    ///
    /// One of several threads that do this gets to keep its descriptor, and the others close theirs. A thread
    /// that is interrupted by a fork while it writes does so in the parent only: the child has another number.
    pub fn open(&self) {
        let pid = sys::getpid();
        let old = self.state.load(Ordering::Acquire);
        if old == state_of(pid, BUSY) {
            return;
        }
        let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOCTTY;
        let fd = match sys::open(c"/proc/self/maps", flags) {
            Ok(fd) => fd,
            Err(Errno(errno)) => {
                log!("cannot open /proc/self/maps (errno {errno}): memfds are mapped for each create");
                return;
            }
        };
        let Ok(stat) = sys::fstat(fd) else {
            return sys::close(fd);
        };
        let old_fd = self.proved_of(old);
        // While ours is open, no other file has its inode number.
        if old_fd.is_some() && stat.st_ino == self.ino.load(Ordering::Relaxed) {
            return sys::close(fd);
        }
        let high = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, HIGH);
        sys::close(fd);
        // Where the program has set a low limit there are mappings of our own instead: a low number would be
        // missing among the program's.
        let Ok(fd) = high else {
            log!("no descriptor from {HIGH} on is free for /proc/self/maps: memfds are mapped for each create");
            return;
        };
        let claimed = self.state.compare_exchange(
            old,
            state_of(pid, BUSY),
            Ordering::Acquire,
            Ordering::Relaxed,
        );
        if claimed.is_err() {
            return sys::close(fd);
        }
        fence(Ordering::Release);
        self.dev.store(stat.st_dev, Ordering::Relaxed);
        self.ino.store(stat.st_ino, Ordering::Relaxed);
        self.state.store(state_of(pid, fd), Ordering::Release);
        // The parent's, in a child that opens the device as well.
        if let Some(old) = old_fd {
            sys::close(old);
        }
    }

    /// Are those that are asked about the mappings of this process? After a fork they are the parent's, where a mapping
    /// that is made here does not appear, or does not go away.
    pub fn are_own(&self) -> bool {
        let Some(fd) = self.proved() else {
            return false;
        };
        let page = sys::page_size() as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // Not of a file: after `mlockall(MCL_FUTURE)`, all that is mapped is faulted in.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let Ok(made) = sys::mmap(None, page, access, flags, -1, 0) else {
            return false;
        };
        let appears = procmap::is_mapped(fd, made as u64);
        // SAFETY: the mapping of above, which nothing uses.
        let unmapped = unsafe { sys::munmap(made, page) };
        appears && unmapped.is_ok() && !procmap::is_mapped(fd, made as u64)
    }

    /// Adds where these files are mapped, in whatever way. Returns whether each part of them that is mapped is mapped
    /// once, shared, for reading and writing; nothing where that cannot be found out.
    pub fn ask_all(&self, wanted: impl Fn(FileId) -> bool, spans: &mut Spans) -> Option<bool> {
        procmap::ask_all(self.proved()?, |span| wanted(span.id), spans).ok()
    }

    /// Adds where these files are mapped shared, for reading and writing.
    pub fn ask(&self, wanted: impl Fn(FileId) -> bool, spans: &mut Spans) {
        let Some(fd) = self.proved() else {
            return;
        };
        // A page that is late may be waited for in a mapping that is found.
        let most = if late::is_expected() {
            usize::MAX
        } else {
            procmap::MOST
        };
        procmap::ask(fd, most, wanted, spans);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spans::Span;

    /// The numbers of descriptors are shared by all tests.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn memfd() -> c_int {
        // SAFETY: a terminated name.
        let fd = unsafe { libc::memfd_create(c"maps".as_ptr(), 0) };
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::ftruncate(fd, 1 << 20) }, 0);
        fd
    }

    fn map(fd: c_int, len: usize, prot: c_int, flags: c_int, offset: u64) -> u64 {
        sys::mmap(None, len, prot, flags, fd, offset).unwrap() as u64
    }

    fn ask(maps: &Maps, wanted: impl Fn(FileId) -> bool) -> Vec<Span> {
        let mut spans = Spans::new();
        maps.ask(wanted, &mut spans);
        spans.to_vec()
    }

    #[test]
    fn only_shared_writable_mappings_are_found() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        let (fd, other) = (memfd(), memfd());
        let id = |fd| {
            let stat = sys::fstat(fd).unwrap();
            FileId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            }
        };
        let (id, page) = (id(fd), sys::page_size() as usize);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        map(fd, page, libc::PROT_READ, libc::MAP_SHARED, 0);
        map(fd, page, libc::PROT_WRITE, libc::MAP_SHARED, 0);
        map(fd, page, both, libc::MAP_PRIVATE, 0);
        map(other, page, both, libc::MAP_SHARED, 0);
        assert!(ask(&maps, |_| true).is_empty());
        maps.open();
        assert!(maps.proved().is_some_and(|fd| fd >= HIGH));
        assert!(ask(&maps, |found| found == id).is_empty());
        let at = map(fd, 3 * page, both, libc::MAP_SHARED, 2 * page as u64);
        let whole = Span {
            id,
            offset: 2 * page as u64,
            len: 3 * page as u64,
            addr: at,
        };
        assert_eq!(ask(&maps, |found| found == id), [whole]);
        // Of a mapping in three pieces, of which the middle one is not writable any more.
        let middle = (at as usize + page) as *mut libc::c_void;
        // SAFETY: a page of the mapping, which nothing uses.
        assert_eq!(unsafe { libc::mprotect(middle, page, libc::PROT_READ) }, 0);
        let found = ask(&maps, |found| found == id);
        let ends = [
            (whole.offset, at),
            (whole.offset + 2 * page as u64, at + 2 * page as u64),
        ];
        assert_eq!(found.len(), 2);
        assert!(found.iter().zip(ends).all(|(span, (offset, addr))| {
            (span.offset, span.len, span.addr) == (offset, page as u64, addr)
        }));
    }

    fn id(fd: c_int) -> FileId {
        let stat = sys::fstat(fd).unwrap();
        FileId {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }

    /// What `ask_all` finds of a file.
    fn all(maps: &Maps, id: FileId) -> (Option<bool>, Vec<(u64, u64)>) {
        let mut spans = Spans::new();
        let once = maps.ask_all(|found| found == id, &mut spans);
        let found = spans.iter().map(|span| (span.offset, span.addr));
        (once, found.collect())
    }

    #[test]
    fn other_mappings_of_a_file_are_noticed() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        let (fd, other) = (memfd(), memfd());
        let page = sys::page_size() as usize;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(all(&maps, id(fd)), (None, vec![]));
        maps.open();
        assert_eq!(all(&maps, id(fd)), (Some(true), vec![]));
        let upper = map(fd, page, both, libc::MAP_SHARED, page as u64);
        let lower = map(fd, page, both, libc::MAP_SHARED, 0);
        let (once, parts) = all(&maps, id(fd));
        assert_eq!((once, parts[0]), (Some(true), (0, lower)));
        let unmap = |at, len| {
            // SAFETY: a mapping of this test, which nothing uses.
            unsafe { sys::munmap(at as usize, len) }.unwrap();
        };
        for (prot, flags) in [
            (both, libc::MAP_SHARED),
            (both, libc::MAP_PRIVATE),
            (libc::PROT_READ, libc::MAP_SHARED),
            (libc::PROT_NONE, libc::MAP_SHARED),
        ] {
            let second = map(fd, 2 * page, prot, flags, 0);
            assert_eq!(all(&maps, id(fd)).0, Some(false));
            unmap(second, 2 * page);
            let elsewhere = map(fd, page, prot, flags, 2 * page as u64);
            let only = prot == both && flags == libc::MAP_SHARED;
            assert_eq!(all(&maps, id(fd)).0, Some(only));
            unmap(elsewhere, page);
            let another = map(other, 2 * page, prot, flags, 0);
            assert_eq!(all(&maps, id(fd)).0, Some(true));
            unmap(another, 2 * page);
        }
        unmap(upper, page);
        unmap(lower, page);
        sys::close(maps.proved().unwrap());
    }

    #[test]
    fn the_maps_of_another_process_are_noticed() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        assert!(!maps.are_own());
        maps.open();
        // Another test may map something where that mapping was.
        assert!((0..100).any(|_| maps.are_own()));
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let parents = maps.are_own();
            maps.open();
            let status = parents || !maps.are_own();
            // SAFETY: ends the child.
            unsafe { libc::_exit(status.into()) }
        }
        let mut status = -1;
        // SAFETY: the status is written.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(status, 0);
        sys::close(maps.proved().unwrap());
    }

    #[test]
    fn memory_that_comes_late_is_found_behind_many_mappings() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        maps.open();
        let (fd, other) = (memfd(), memfd());
        let page = sys::page_size() as usize;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let count = procmap::MOST + 1;
        let first = map(other, (count + 1) * page, both, libc::MAP_SHARED, 0);
        for i in 0..=count {
            // The mapping sought is the highest; neighbours of the same offset stay apart.
            let file = if i == count { fd } else { other };
            let at = (first as usize + i * page) as *mut libc::c_void;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: a page of the mapping above, which nothing uses.
            let mapped = unsafe { libc::mmap(at, page, both, flags, file, 0) };
            assert_eq!(mapped, at);
        }
        let id = id(fd);
        assert!(ask(&maps, |found| found == id).is_empty());
        assert_eq!(all(&maps, id).1.len(), 1);
        // Of writes, and of pages that are missing.
        for (mode, expected) in [(2, false), (1, true), (2, true)] {
            let argument = [first, page as u64, mode, 0];
            // SAFETY: as the kernel is given it.
            unsafe { late::registered(argument.as_ptr() as usize) };
            assert_eq!(late::is_expected(), expected);
        }
        assert_eq!(ask(&maps, |found| found == id).len(), 1);
        // SAFETY: the mappings of this test, which nothing uses.
        unsafe { sys::munmap(first as usize, (count + 1) * page) }.unwrap();
        sys::close(maps.proved().unwrap());
    }

    /// The descriptors of `/proc/self/maps` with high numbers.
    fn kept() -> usize {
        (HIGH..HIGH + 64)
            .filter_map(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok())
            .filter(|path| path.ends_with("maps"))
            .count()
    }

    #[test]
    fn of_several_threads_one_keeps_its_own() {
        let _alone = ALONE.lock().unwrap();
        for _ in 0..200 {
            let maps = Maps::new();
            let before = kept();
            let start = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        maps.open();
                    });
                }
            });
            let fd = maps.proved().unwrap();
            assert_eq!(kept(), before + 1);
            sys::close(fd);
        }
    }

    #[test]
    fn a_child_gets_past_a_write_that_its_parent_was_at() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        let before = kept();
        maps.state
            .store(state_of(sys::getpid(), BUSY), Ordering::Relaxed);
        maps.open();
        assert_eq!((maps.proved(), kept()), (None, before));
        maps.state
            .store(state_of(sys::getpid() - 1, BUSY), Ordering::Relaxed);
        maps.open();
        assert!(maps.proved().is_some());
        sys::close(maps.proved().unwrap());
    }

    #[test]
    fn no_low_number_is_kept() {
        let _alone = ALONE.lock().unwrap();
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the struct is written.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
        let low = libc::rlimit {
            rlim_cur: HIGH as u64 / 2,
            ..limit
        };
        // SAFETY: the struct is read.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &low) }, 0);
        let maps = Maps::new();
        maps.open();
        // SAFETY: the struct is read.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        assert_eq!(maps.proved(), None);
        maps.open();
        assert!(maps.proved().is_some_and(|fd| fd >= HIGH));
    }

    #[test]
    fn another_file_of_that_number_is_not_asked() {
        let _alone = ALONE.lock().unwrap();
        let maps = Maps::new();
        maps.open();
        let ours = maps.proved().unwrap();
        maps.open();
        assert_eq!(maps.proved(), Some(ours));
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::dup2(memfd(), ours) }, ours);
        assert_eq!(maps.proved(), None);
        assert!(ask(&maps, |_| true).is_empty());
        maps.open();
        assert!(maps.proved().is_some_and(|new| new != ours));
        // The program's file was not closed for it.
        assert!(sys::fstat(ours).is_ok());
    }
}
