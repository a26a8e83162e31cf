// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory that buffers are made of: a row of adjacent slots, each with a region of some kind,
//! and what is known about each page.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, punch_hole, RW};
use pinbuf_test_harness::support::PAGE;

use crate::access::{map_at, Access};
use crate::contents::{Contents, Id};
use crate::input::{Kind, Region};
use crate::late::{self, Late};
use crate::profile::{phase, Phase};

/// Where the first slot begins: far from where the kernel puts anything by itself.
pub const BASE: u64 = 0x1357_0000_0000;
/// The pages of a slot.
pub const SLOT_PAGES: usize = 1024;
/// The bytes of a slot.
pub const SLOT: u64 = (SLOT_PAGES * PAGE) as u64;
/// The maximum number of slots.
pub const SLOTS: usize = 4;

/// The maximum number of pages that are written at first; more take long where every page is checked.
const POPULATED: usize = 8;
const HUGE_PAGES: usize = 512;

/// Where a part is for a moment when it is shifted.
const SHIFTED: u64 = 0x1468_0000_0000;
/// How many times pages may come late in one input.
const MOST_LATES: usize = 4;
/// The maximum number of pages that a thread may have to provide each time.
const MOST_ANSWERED: usize = 64;

/// What an address shows.
#[derive(Clone, Copy, Debug)]
enum Shows {
    Nothing,
    /// The file's page.
    File,
    /// A page of its own.
    Own(Id),
    /// A page, of which nothing is known.
    Unknown,
}

/// A page of a slot.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    shows: Shows,
    writable: bool,
    /// If the page is not there, it comes late.
    late: Option<Lateness>,
}

/// What becomes of a fault that a userfaultfd handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lateness {
    /// An error.
    Refused,
    /// A page of a known kind.
    Answered,
}

impl Mapped {
    /// The first word of a page that nobody has written to.
    fn blank(&self) -> u64 {
        match self.late {
            Some(Lateness::Answered) => late::WORD,
            _ => 0,
        }
    }
}

/// A region, in its slot.
#[derive(Debug)]
pub struct Slot {
    kind: Kind,
    fd: Option<OwnedFd>,
    /// The file's pages.
    file: Vec<Id>,
    mapped: Vec<Mapped>,
}

/// What becomes of a page that is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// It is refused.
    Refused,
    /// It is pinned, and is this one, as far as that is known.
    Pinned(Option<Id>),
}

impl Slot {
    fn empty() -> Self {
        Self {
            kind: Kind::Hole,
            fd: None,
            file: Vec::new(),
            mapped: Vec::new(),
        }
    }

    /// Maps a region. A kind that is not available here is a hole.
    fn new(start: u64, region: Region, contents: &mut Contents) -> Result<Self> {
        let kind = region.kind;
        let mut pages = usize::from(region.pages.0).clamp(1, SLOT_PAGES);
        let (mut protection, mut flags) = (RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let mut fd = None;
        let mut words = Vec::new();
        match kind {
            Kind::Hole => return Ok(Self::empty()),
            Kind::Anonymous | Kind::TransparentHuge => {}
            Kind::ReadOnly => protection = libc::PROT_READ,
            Kind::Inaccessible => protection = libc::PROT_NONE,
            Kind::SharedAnonymous => flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            Kind::Memfd | Kind::PrivateMemfd => {
                fd = Some(memfd(pages * PAGE, 0)?);
                flags = if kind == Kind::Memfd {
                    libc::MAP_SHARED
                } else {
                    libc::MAP_PRIVATE
                };
            }
            Kind::SealedMemfd => {
                let file = memfd(pages * PAGE, libc::MFD_ALLOW_SEALING)?;
                fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).context("sealing")?;
                fd = Some(file);
                flags = libc::MAP_SHARED;
                protection = libc::PROT_READ;
            }
            Kind::HugeMemfd | Kind::PrivateHugeMemfd => {
                pages = pages.next_multiple_of(HUGE_PAGES);
                fd = Some(huge_memfd(pages * PAGE)?);
                flags = if kind == Kind::HugeMemfd {
                    libc::MAP_SHARED
                } else {
                    libc::MAP_PRIVATE
                };
            }
            Kind::PrivateFile => {
                let file = std::fs::File::open("/proc/self/exe").context("opening the program")?;
                pages = pages.min(file.metadata()?.len() as usize / PAGE);
                words = first_words(&file, pages)?;
                fd = Some(file.into());
                flags = libc::MAP_PRIVATE;
            }
            Kind::Secret => {
                // SAFETY: takes a number alone.
                let secret = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
                let Ok(secret) = Errno::result(secret as RawFd) else {
                    return Ok(Self::empty());
                };
                // SAFETY: the call has just returned it.
                let secret = unsafe { OwnedFd::from_raw_fd(secret) };
                nix::unistd::ftruncate(&secret, (pages * PAGE) as i64)?;
                fd = Some(secret);
                flags = libc::MAP_SHARED;
            }
            Kind::Device => {
                pages = 1;
                fd = Some(pinbuf_test_importer::open().context("opening the importer")?);
                flags = libc::MAP_SHARED;
            }
        }
        let number = fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a slot, in which nothing of Rust's lies.
        let result = unsafe { map_at(start, pages * PAGE, protection, flags, number, 0) };
        match result {
            Ok(()) => {}
            // The pool of huge pages, or of what may be locked.
            Err(Errno::ENOMEM | Errno::EAGAIN) => return Ok(Self::empty()),
            Err(error) => return Err(error).context(format!("mapping {kind:?}")),
        }
        let advice = match kind {
            Kind::TransparentHuge => Some(libc::MADV_HUGEPAGE),
            Kind::Anonymous => Some(libc::MADV_NOHUGEPAGE),
            _ => None,
        };
        if let Some(advice) = advice {
            // SAFETY: the mapping made above.
            Errno::result(unsafe { libc::madvise(start as *mut _, pages * PAGE, advice) })
                .context("madvise")?;
        }

        words.resize(pages, 0);
        let mut slot = Self {
            kind,
            fd,
            file: Vec::new(),
            mapped: Vec::new(),
        };
        let writable = protection & libc::PROT_WRITE != 0;
        for word in words {
            let id = contents.fresh(Some(word));
            let shows = if slot.has_file() {
                slot.file.push(id);
                Shows::File
            } else {
                Shows::Own(id)
            };
            slot.mapped.push(Mapped {
                shows,
                writable,
                late: None,
            });
        }
        Ok(slot)
    }

    /// Whether pages are a file's, or would be one's if that had a name.
    fn has_file(&self) -> bool {
        self.fd.is_some() || self.kind == Kind::SharedAnonymous
    }

    fn is_private(&self) -> bool {
        matches!(
            self.kind,
            Kind::PrivateMemfd | Kind::PrivateHugeMemfd | Kind::PrivateFile
        ) || !self.has_file()
    }

    fn is_huge(&self) -> bool {
        matches!(self.kind, Kind::HugeMemfd | Kind::PrivateHugeMemfd)
    }

    /// The kernel does not pin this kind.
    fn is_refused(&self) -> bool {
        matches!(self.kind, Kind::Secret | Kind::Device | Kind::SealedMemfd)
    }

    /// A write, or a pin, gives a private page its own copy.
    fn unshare(&mut self, page: usize, contents: &mut Contents) {
        if !self.is_private() {
            return;
        }
        let block = if self.is_huge() {
            page / HUGE_PAGES * HUGE_PAGES..(page / HUGE_PAGES + 1) * HUGE_PAGES
        } else {
            page..page + 1
        };
        for page in block {
            if let (Some(mapped), Some(file)) = (self.mapped.get_mut(page), self.file.get(page)) {
                if matches!(mapped.shows, Shows::File) {
                    mapped.shows = Shows::Own(contents.copy(*file));
                }
            }
        }
    }

    fn id(&self, page: usize) -> Option<Id> {
        match self.mapped.get(page)?.shows {
            Shows::Nothing | Shows::Unknown => None,
            Shows::File => self.file.get(page).copied(),
            Shows::Own(id) => Some(id),
        }
    }

    /// Something happened whose effect the model does not know.
    fn forget(&mut self, contents: &mut Contents) {
        for page in 0..self.mapped.len() {
            if let Some(id) = self.id(page) {
                contents.forget(id);
            }
            if !matches!(self.mapped[page].shows, Shows::Nothing) {
                self.mapped[page].shows = Shows::Unknown;
            }
        }
        for id in &mut self.file {
            contents.forget(*id);
            *id = contents.fresh(None);
        }
    }
}

/// The first word of each of a file's first pages.
fn first_words(file: &std::fs::File, pages: usize) -> Result<Vec<u64>> {
    use std::os::unix::fs::FileExt;

    let mut words = Vec::new();
    for page in 0..pages {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (page * PAGE) as u64)?;
        words.push(u64::from_ne_bytes(word));
    }
    Ok(words)
}

/// All slots.
#[derive(Debug, Default)]
pub struct Memory {
    slots: Vec<Slot>,
    lates: Vec<Late>,
}

impl Memory {
    /// Maps all regions.
    pub fn new(regions: &[Region], access: &Access, contents: &mut Contents) -> Result<Self> {
        let mut memory = Self::default();
        for (index, region) in regions.iter().take(SLOTS).enumerate() {
            let start = BASE + index as u64 * SLOT;
            let mapping = phase(Phase::Regions);
            let slot = Slot::new(start, *region, contents)?;
            memory.slots.push(slot);
            drop(mapping);
            if region.populated {
                let _timer = phase(Phase::Populate);
                for page in 0..memory.slots[index].mapped.len().min(POPULATED) {
                    // What cannot be written stays as it is.
                    memory.write(start + (page * PAGE) as u64, access, contents)?;
                }
            }
        }
        Ok(memory)
    }

    /// Unmaps all of it.
    pub fn clear(&mut self) -> Result<()> {
        // SAFETY: slots, in which nothing of Rust's lies.
        let result = unsafe { libc::munmap(BASE as *mut _, SLOTS * SLOT as usize) };
        Errno::result(result).context("unmapping the memory")?;
        self.slots.clear();
        self.lates.clear();
        Ok(())
    }

    /// Whether some of it is charged to the caller's locked pages by itself.
    pub fn is_charged(&self) -> bool {
        self.slots.iter().any(|slot| slot.kind == Kind::Secret)
    }

    /// The index of the slot that an operation's number stands for.
    pub fn index(&self, number: u8) -> usize {
        usize::from(number) % self.slots.len().max(1)
    }

    /// The address of a page, which may lie outside of every region.
    pub fn address(&self, number: u8, page: u16) -> u64 {
        let page = usize::from(page) % SLOT_PAGES;
        BASE + self.index(number) as u64 * SLOT + (page * PAGE) as u64
    }

    /// The descriptor of a region's file.
    pub fn descriptor(&self, number: u8) -> Option<RawFd> {
        let slot = self.slots.get(self.index(number))?;
        slot.fd.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn find(&self, address: u64) -> Option<(usize, usize)> {
        let offset = address.checked_sub(BASE)?;
        let slot = usize::try_from(offset / SLOT).ok()?;
        let page = (offset % SLOT) as usize / PAGE;
        (page < self.slots.get(slot)?.mapped.len()).then_some((slot, page))
    }

    /// What a pin of the page at `address` would do.
    pub fn pin(&self, address: u64) -> Pin {
        let Some((slot, page)) = self.find(address) else {
            return Pin::Refused;
        };
        let slot = &self.slots[slot];
        let mapped = slot.mapped[page];
        if !mapped.writable || slot.is_refused() || matches!(mapped.shows, Shows::Nothing) {
            return Pin::Refused;
        }
        Pin::Pinned(slot.id(page))
    }

    /// The page at `address` was pinned: which one it is.
    pub fn pinned(&mut self, address: u64, contents: &mut Contents) -> Option<Id> {
        let (slot, page) = self.find(address)?;
        self.slots[slot].unshare(page, contents);
        self.slots[slot].id(page)
    }

    /// Whether the page at `address` is of a kind whose pages may run out.
    pub fn is_scarce(&self, address: u64) -> bool {
        self.find(address)
            .is_some_and(|(slot, _)| self.slots[slot].is_huge())
    }

    /// The descriptor and offset of the file that is mapped at `address`; none if it is not known.
    pub fn backing(&self, address: u64) -> Option<(RawFd, u64)> {
        let (slot, page) = self.find(address)?;
        let fd = self.slots[slot].fd.as_ref()?.as_raw_fd();
        Some((fd, (page * PAGE) as u64))
    }

    /// Whether the page at `address`, once it is pinned, is that of the file `fd` at `offset`; none
    /// if that is not known.
    pub fn is_backed_by(&self, address: u64, fd: RawFd, offset: u64) -> Option<bool> {
        let (slot, page) = self.find(address)?;
        let slot = &self.slots[slot];
        match slot.mapped[page].shows {
            Shows::Unknown => None,
            Shows::File if !slot.is_private() => Some(
                slot.fd.as_ref().is_some_and(|file| file.as_raw_fd() == fd)
                    && offset == (page * PAGE) as u64,
            ),
            Shows::File | Shows::Own(_) | Shows::Nothing => Some(false),
        }
    }

    /// The page that is seen at `address`.
    pub fn seen(&self, address: u64) -> Option<Id> {
        let (slot, page) = self.find(address)?;
        self.slots[slot].id(page)
    }

    /// Writes the page at `address`, if that is possible.
    pub fn write(&mut self, address: u64, access: &Access, contents: &mut Contents) -> Result<()> {
        let stamp = contents.stamp();
        if access.write(address, stamp).is_ok() {
            let (slot, page) = self
                .find(address)
                .with_context(|| format!("{address:#x} could be written, but is no memory"))?;
            self.slots[slot].unshare(page, contents);
            if let Some(id) = self.slots[slot].id(page) {
                contents.set(id, stamp);
            }
        }
        Ok(())
    }

    /// The pages of a region that lie in a part, which its operation may reach beyond.
    fn part(&self, number: u8, page: u16, pages: u16) -> (usize, std::ops::Range<usize>) {
        let slot = self.index(number);
        let most = self.slots.get(slot).map_or(0, |slot| slot.mapped.len());
        let first = usize::from(page) % SLOT_PAGES;
        (
            slot,
            first.min(most)..(first + usize::from(pages)).min(most),
        )
    }

    /// The bytes of the same part.
    fn bytes(&self, number: u8, page: u16, pages: u16) -> (u64, usize) {
        let first = usize::from(page) % SLOT_PAGES;
        let pages = usize::from(pages).clamp(1, SLOT_PAGES - first);
        (self.address(number, page), pages * PAGE)
    }

    /// `MADV_DONTNEED`.
    pub fn discard(
        &mut self,
        number: u8,
        page: u16,
        pages: u16,
        contents: &mut Contents,
    ) -> nix::Result<()> {
        let (start, len) = self.bytes(number, page, pages);
        // SAFETY: slots, in which nothing of Rust's lies.
        let result =
            Errno::result(unsafe { libc::madvise(start as *mut _, len, libc::MADV_DONTNEED) });
        // A hole in the part is an error, but the rest is discarded.
        let (slot, part) = self.part(number, page, pages);
        if let Some(slot) = self.slots.get_mut(slot) {
            if slot.is_huge() {
                slot.forget(contents);
            }
            if slot.is_private() && !slot.is_huge() && result != Err(Errno::EINVAL) {
                for page in part {
                    slot.mapped[page].shows = match slot.mapped[page].shows {
                        Shows::Nothing => Shows::Nothing,
                        _ if slot.file.is_empty() => {
                            Shows::Own(contents.fresh(Some(slot.mapped[page].blank())))
                        }
                        _ => Shows::File,
                    };
                }
            }
        }
        result.map(drop)
    }

    /// Punches a hole into a region's file.
    pub fn punch(
        &mut self,
        number: u8,
        page: u16,
        pages: u16,
        contents: &mut Contents,
    ) -> Result<()> {
        let (index, part) = self.part(number, page, pages);
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let Some(fd) = slot.fd.as_ref().filter(|_| !part.is_empty()) else {
            return Ok(());
        };
        if punch_hole(fd, part.start * PAGE, part.len() * PAGE).is_ok() {
            if slot.is_huge() {
                slot.forget(contents);
            } else {
                for page in part {
                    slot.file[page] = contents.fresh(Some(slot.mapped[page].blank()));
                }
            }
        }
        Ok(())
    }

    /// `munmap`.
    pub fn release(&mut self, number: u8, page: u16, pages: u16) -> nix::Result<()> {
        let (start, len) = self.bytes(number, page, pages);
        // SAFETY: slots, in which nothing of Rust's lies.
        Errno::result(unsafe { libc::munmap(start as *mut _, len) })?;
        let (slot, part) = self.part(number, page, pages);
        for page in part {
            self.slots[slot].mapped[page].shows = Shows::Nothing;
            self.slots[slot].mapped[page].late = None;
        }
        Ok(())
    }

    /// `mprotect`. What it does before an error in the middle the model does not know, so the part
    /// is within one region.
    pub fn restrict(
        &mut self,
        number: u8,
        page: u16,
        pages: u16,
        protection: u8,
    ) -> nix::Result<()> {
        let (slot, part) = self.part(number, page, pages);
        let there = |page: usize| !matches!(self.slots[slot].mapped[page].shows, Shows::Nothing);
        if part.is_empty() || !part.clone().all(there) {
            return Ok(());
        }
        let start = self.address(number, page);
        let protection = i32::from(protection & 7);
        // SAFETY: a slot, in which nothing of Rust's lies.
        Errno::result(unsafe { libc::mprotect(start as *mut _, part.len() * PAGE, protection) })?;
        for page in part {
            self.slots[slot].mapped[page].writable = protection & libc::PROT_WRITE != 0;
        }
        Ok(())
    }

    /// A part of a region that consists of pages that are mapped; none if there are others.
    fn whole(&self, number: u8, page: u16, pages: u16) -> Option<(usize, std::ops::Range<usize>)> {
        let (slot, part) = self.part(number, page, pages);
        let there = |page: usize| !matches!(self.slots[slot].mapped[page].shows, Shows::Nothing);
        (!part.is_empty() && part.clone().all(there)).then_some((slot, part))
    }

    /// `mremap` to elsewhere, and back, after which everything is as before.
    pub fn shift(&mut self, number: u8, page: u16, pages: u16) -> Result<()> {
        let Some((slot, part)) = self.whole(number, page, pages) else {
            return Ok(());
        };
        // What moves is not late any more, and huge pages move as a whole.
        let late = |page: usize| self.slots[slot].mapped[page].late.is_some();
        if self.slots[slot].is_huge() || part.clone().any(late) {
            return Ok(());
        }
        let start = self.address(number, page);
        let length = part.len() * PAGE;
        let remap = |from: u64, to: u64| {
            // SAFETY: slots, in which nothing of Rust's lies, and what is mapped nowhere.
            let result = unsafe {
                libc::mremap(
                    from as *mut _,
                    length,
                    length,
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                    to,
                )
            };
            if result == libc::MAP_FAILED {
                Err(Errno::last())
            } else {
                Ok(())
            }
        };
        match remap(start, SHIFTED) {
            Ok(()) => remap(SHIFTED, start).context("mremap back"),
            // It consists of several mappings, or locking them is not allowed: then nothing has moved.
            Err(Errno::EFAULT | Errno::EINVAL | Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error).context("mremap"),
        }
    }

    /// Faults on pages of a part that are not there fail from now on, or are answered by a thread.
    pub fn delay(
        &mut self,
        number: u8,
        page: u16,
        pages: u16,
        answered: bool,
        contents: &mut Contents,
    ) -> Result<nix::Result<()>> {
        let Some((index, part)) = self.whole(number, page, pages) else {
            return Ok(Ok(()));
        };
        let kind = self.slots[index].kind;
        let known = matches!(kind, Kind::Anonymous | Kind::SharedAnonymous | Kind::Memfd);
        let most = if answered { MOST_ANSWERED } else { SLOT_PAGES };
        let part = part.start..part.end.min(part.start + most);
        if self.lates.len() == MOST_LATES || answered && !known {
            return Ok(Ok(()));
        }
        let start = BASE + index as u64 * SLOT + (part.start * PAGE) as u64;
        let late = match Late::new(start, part.len() * PAGE, answered)? {
            Ok(late) => late,
            Err(errno) => return Ok(Err(errno)),
        };
        self.lates.push(late);
        let mut present = vec![0u8; part.len()];
        // SAFETY: the kernel writes a byte for each page.
        let result =
            unsafe { libc::mincore(start as *mut _, part.len() * PAGE, present.as_mut_ptr()) };
        Errno::result(result).context("mincore")?;
        for (page, present) in part.zip(present) {
            let lateness = if answered {
                Lateness::Answered
            } else {
                Lateness::Refused
            };
            self.slots[index].mapped[page].late = Some(lateness);
            if answered && present & 1 == 0 {
                if let Some(id) = self.slots[index].id(page) {
                    contents.set(id, late::WORD);
                }
            }
        }
        Ok(Ok(()))
    }

    /// Provides a page whose faults fail, if it is missing.
    pub fn bring(&mut self, number: u8, page: u16, contents: &mut Contents) -> Result<()> {
        let address = self.address(number, page);
        let Some((slot, page)) = self.find(address) else {
            return Ok(());
        };
        let region = &self.slots[slot];
        if region.mapped[page].late != Some(Lateness::Refused)
            || !matches!(
                region.kind,
                Kind::Anonymous | Kind::SharedAnonymous | Kind::Memfd
            )
        {
            return Ok(());
        }
        let word = contents.stamp();
        // Those that the page is not registered with return an error.
        let brought = self
            .lates
            .iter()
            .any(|late| late.bring(address, word).is_ok());
        if let Some(id) = region.id(page).filter(|_| brought) {
            contents.set(id, word);
        }
        Ok(())
    }

    /// Whether the page at `address` may be refused because it is late.
    pub fn may_be_refused(&self, address: u64) -> bool {
        self.find(address).is_some_and(|(slot, page)| {
            self.slots[slot].mapped[page].late == Some(Lateness::Refused)
        })
    }

    /// Whether a child would see other pages than this process, which has a thread that provides them.
    pub fn is_answered(&self) -> bool {
        let late = |mapped: &Mapped| mapped.late == Some(Lateness::Answered);
        self.slots.iter().any(|slot| slot.mapped.iter().any(late))
    }

    /// In a child: private pages are copies of the parent's.
    pub fn forked(&mut self, contents: &mut Contents) {
        for slot in &mut self.slots {
            for mapped in &mut slot.mapped {
                if let Shows::Own(id) = mapped.shows {
                    mapped.shows = Shows::Own(contents.copy(id));
                }
            }
        }
    }
}
