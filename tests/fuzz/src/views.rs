// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mappings of buffers: made, cut, moved, protected, touched, inherited.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::PAGE;

use crate::executor::{Executor, Kept};
use crate::expected::Expected;
use crate::input::{Advice, Create, Motion, Sharing};

/// Where the first mapping begins: far from where the kernel puts anything by itself.
const BASE: u64 = 0x2468_0000_0000;
/// The longest mapping that gets a place here; a longer one than any buffer.
const LONGEST: u64 = 4 << 30;
const HUGE: u64 = 2 << 20;
const GIGA: u64 = 1 << 30;
/// Pages from which on a mapping is a large one: numbers of pages of 16 bits do not reach its end.
const LARGE: u64 = 1 << 16;
/// In a large mapping, numbers beyond the first table's pages stand for multiples.
const FARTHER: u64 = 9;
const PAGE_BYTES: u64 = PAGE as u64;

/// What adjacent pages of a mapping show.
#[derive(Clone, Debug)]
struct Shown {
    /// How many they are: a mapping of 1 GiB is one of these, until it is taken apart.
    pages: u64,
    kept: Rc<Kept>,
    /// The first one of the buffer.
    page: usize,
    protection: i32,
    /// A child gets it too.
    inherited: bool,
}

/// What was mapped once; there may be holes in it now.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    pages: u64,
}

impl Shown {
    /// Without the first pages.
    fn from(&self, skipped: u64) -> Self {
        Self {
            pages: self.pages - skipped,
            page: self.page + skipped as usize,
            ..self.clone()
        }
    }
}

/// A number of pages in a mapping.
fn farther(span: Span, pages: u16) -> u64 {
    match u64::from(pages) {
        pages if span.pages > LARGE && pages >= 512 => pages * FARTHER,
        pages => pages,
    }
}

/// All mappings of buffers.
#[derive(Debug)]
pub struct Views {
    spans: Vec<Span>,
    shown: BTreeMap<u64, Shown>,
    next: u64,
}

impl Default for Views {
    fn default() -> Self {
        Self {
            spans: Vec::new(),
            shown: BTreeMap::new(),
            next: BASE,
        }
    }
}

impl Views {
    fn span(&self, view: u8) -> Option<Span> {
        let index = usize::from(view).checked_rem(self.spans.len())?;
        Some(self.spans[index])
    }

    /// The address of a page of a mapping; an unmapped address, if there is none.
    pub fn address(&self, view: u8, page: u16) -> u64 {
        match self.span(view) {
            Some(span) => span.start + farther(span, page) % span.pages * PAGE_BYTES,
            None => BASE - PAGE_BYTES,
        }
    }

    /// Part of a mapping, which may reach beyond it.
    fn part(&self, view: u8, page: u16, pages: u16) -> Option<(u64, u64)> {
        let span = self.span(view)?;
        Some((self.address(view, page), farther(span, pages.max(1))))
    }

    /// A place for a mapping: a large one begins at a multiple of 1 GiB, or a page behind it.
    fn place(&mut self, length: u64, aligned: bool) -> u64 {
        let align = if length < GIGA { HUGE } else { GIGA };
        let start = self.next.next_multiple_of(align) + if aligned { 0 } else { PAGE_BYTES };
        self.next = start + length.next_multiple_of(PAGE_BYTES);
        start
    }

    /// What the page at an address shows.
    fn at(&self, address: u64) -> Option<Shown> {
        let (start, shown) = self.shown.range(..=address).next_back()?;
        let skipped = (address - start) / PAGE_BYTES;
        (skipped < shown.pages).then(|| shown.from(skipped))
    }

    /// Splits what contains an address, so that something begins there.
    fn split(&mut self, address: u64) {
        let Some((&start, _)) = self.shown.range(..address).next_back() else {
            return;
        };
        let Some(tail) = self.at(address) else {
            return;
        };
        if let Some(head) = self.shown.get_mut(&start) {
            if start + head.pages * PAGE_BYTES > address {
                head.pages = (address - start) / PAGE_BYTES;
                self.shown.insert(address, tail);
            }
        }
    }

    /// What there is in a part, each with its address, cut at the part's ends.
    fn cut(&mut self, start: u64, pages: u64) -> Vec<u64> {
        let end = start + pages * PAGE_BYTES;
        self.split(start);
        self.split(end);
        self.shown
            .range(start..end)
            .map(|(address, _)| *address)
            .collect()
    }

    /// The first page of a part where nothing is.
    fn hole(&self, start: u64, pages: u64) -> Option<u64> {
        let mut page = 0;
        while page < pages {
            match self.at(start + page * PAGE_BYTES) {
                Some(shown) => page += shown.pages,
                None => return Some(page),
            }
        }
        None
    }

    /// Unmaps all.
    pub fn clear(&mut self) -> Result<()> {
        let length = (self.next - BASE) as usize;
        if length > 0 {
            // SAFETY: nothing but these mappings lies there.
            Errno::result(unsafe { libc::munmap(BASE as *mut _, length) })
                .context("unmapping all")?;
        }
        *self = Self {
            next: self.next,
            ..Self::default()
        };
        Ok(())
    }
}

impl Executor {
    /// `mmap` of a buffer.
    pub(crate) fn map(
        &mut self,
        buffer: u8,
        offset: u64,
        length: u64,
        protection: u8,
        sharing: Sharing,
        aligned: bool,
    ) -> Result<()> {
        let Some(index) = self.buffer_index(buffer) else {
            return Ok(());
        };
        let held = &self.buffers[index];
        let (fd, kept) = (held.fd.as_raw_fd(), Rc::clone(&held.kept));
        let size = kept.length() as u64 * PAGE_BYTES;
        let length = match length {
            0 => size.checked_sub(offset).unwrap_or(PAGE_BYTES),
            length => length,
        };
        let protection = i32::from(protection & 7);
        let mut flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Populated => libc::MAP_SHARED | libc::MAP_POPULATE,
            Sharing::Validated => libc::MAP_SHARED_VALIDATE,
            Sharing::Private => libc::MAP_PRIVATE,
            Sharing::Locked => libc::MAP_SHARED | libc::MAP_LOCKED,
        };

        let mut expected = Expected::default();
        expected.must_if(
            length == 0 || offset % PAGE_BYTES != 0 || sharing == Sharing::Private,
            Errno::EINVAL,
        );
        if protection & libc::PROT_EXEC != 0 {
            expected.must(Errno::EPERM);
            expected.must(Errno::EACCES);
        }
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > size) {
            // The first that notices reports it.
            for errno in [Errno::EINVAL, Errno::EOVERFLOW, Errno::ENOMEM] {
                expected.must(errno);
            }
        }
        if sharing == Sharing::Locked {
            expected.may(Errno::EAGAIN);
            expected.may(Errno::EPERM);
        }

        let mut address = 0;
        if length <= LONGEST {
            address = self.views.place(length, aligned);
            flags |= libc::MAP_FIXED;
        }
        // SAFETY: a place where nothing lies, or one of the kernel's choice.
        let result = unsafe {
            libc::mmap(
                address as *mut _,
                length as usize,
                protection,
                flags,
                fd,
                offset as i64,
            )
        };
        let answer = if result == libc::MAP_FAILED {
            Err(Errno::last())
        } else {
            Ok(())
        };
        self.say(|| format!("   mmap: {answer:?} at {address:#x}"));
        expected.check("mmap", &answer)?;
        if answer.is_ok() {
            let pages = length.div_ceil(PAGE_BYTES);
            self.views.spans.push(Span {
                start: address,
                pages,
            });
            let shown = Shown {
                pages,
                kept,
                page: (offset / PAGE_BYTES) as usize,
                protection,
                inherited: true,
            };
            self.views.shown.insert(address, shown);
        }
        Ok(())
    }

    /// Reads or writes a page of a mapping.
    pub(crate) fn touch(&mut self, view: u8, page: u16, write: bool) -> Result<()> {
        if self.views.span(view).is_none() {
            return Ok(());
        }
        let address = self.views.address(view, page);
        let stamp = self.contents.stamp();
        let shown = self.views.at(address);
        let protection = shown
            .as_ref()
            .map_or(libc::PROT_NONE, |shown| shown.protection);
        let mut expected = Expected::default();
        let needed = if write {
            libc::PROT_WRITE
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        };
        expected.must_if(protection & needed == 0, Errno::EFAULT);
        let answer = if write {
            self.access.write(address, stamp).map(|()| stamp)
        } else {
            self.access.read(address)
        };
        self.say(|| format!("   {address:#x}: {answer:x?}"));
        expected.check("touching a mapping", &answer)?;
        let (Some(shown), Ok(word)) = (shown, answer) else {
            return Ok(());
        };
        let Some(id) = shown.kept.page(shown.page) else {
            return Ok(());
        };
        if write {
            self.contents.set(id, stamp);
        } else if let Some(expected) = self.contents.get(id).filter(|known| *known != word) {
            bail!(
                "page {} of a buffer, at {address:#x}: expected {expected:#x}, seen {word:#x}",
                shown.page
            );
        }
        Ok(())
    }

    /// `mremap`.
    pub(crate) fn remap(
        &mut self,
        view: u8,
        page: u16,
        old: u16,
        new: u16,
        motion: Motion,
    ) -> Result<()> {
        let Some((start, old)) = self.views.part(view, page, old) else {
            return Ok(());
        };
        let new = self.views.part(view, page, new).map_or(1, |part| part.1);
        let (target, flags) = match motion {
            Motion::Stay => (start, 0),
            Motion::Move | Motion::Keep => {
                let keep = if motion == Motion::Keep {
                    libc::MREMAP_DONTUNMAP
                } else {
                    0
                };
                let target = self.views.place(new * PAGE_BYTES, page % 2 == 0);
                (target, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | keep)
            }
        };
        // SAFETY: mappings of buffers, or nothing; the target is nothing.
        let result = unsafe {
            libc::mremap(
                start as *mut _,
                (old * PAGE_BYTES) as usize,
                (new * PAGE_BYTES) as usize,
                flags,
                target,
            )
        };
        let answer = if result == libc::MAP_FAILED {
            Err(Errno::last())
        } else {
            Ok(result as u64)
        };
        self.say(|| format!("   mremap {start:#x} ({old} pages) to {target:#x}: {answer:x?}"));
        self.views.split(start + new * PAGE_BYTES);
        match answer {
            Ok(_) if new > old => bail!("a mapping grew from {old} to {new} pages"),
            Ok(place) if place != target => bail!("mremap to {target:#x} gave {place:#x}"),
            Ok(_) => {}
            Err(_) => {
                // It may have unmapped what is too much before it failed.
                for address in self.views.cut(start, old) {
                    let readable = self.views.shown[&address].protection != libc::PROT_NONE;
                    if readable && self.access.read(address).is_err() {
                        self.views.shown.remove(&address);
                    }
                }
                return Ok(());
            }
        }
        for address in self.views.cut(start, old) {
            let offset = address - start;
            let shown = self.views.shown[&address].clone();
            if motion != Motion::Keep {
                self.views.shown.remove(&address);
            }
            if offset < new * PAGE_BYTES {
                self.views.shown.insert(target + offset, shown);
            }
        }
        if target != start {
            self.views.spans.push(Span {
                start: target,
                pages: new,
            });
        }
        Ok(())
    }

    /// `munmap`.
    pub(crate) fn unmap(&mut self, view: u8, page: u16, pages: u16) -> Result<()> {
        let Some((start, pages)) = self.views.part(view, page, pages) else {
            return Ok(());
        };
        // SAFETY: mappings of buffers, or nothing.
        let result = unsafe { libc::munmap(start as *mut _, (pages * PAGE_BYTES) as usize) };
        Errno::result(result).context("munmap")?;
        for address in self.views.cut(start, pages) {
            self.views.shown.remove(&address);
        }
        Ok(())
    }

    /// `mprotect`.
    pub(crate) fn protect(
        &mut self,
        view: u8,
        page: u16,
        pages: u16,
        protection: u8,
    ) -> Result<()> {
        let Some((start, pages)) = self.views.part(view, page, pages) else {
            return Ok(());
        };
        let protection = i32::from(protection & 7);
        let length = (pages * PAGE_BYTES) as usize;
        // SAFETY: mappings of buffers, or nothing.
        let result = unsafe { libc::mprotect(start as *mut _, length, protection) };
        let answer = Errno::result(result);
        self.say(|| format!("   mprotect {start:#x}, {pages} pages: {answer:?}"));
        // Up to the first hole, which is an error.
        let first_hole = self.views.hole(start, pages);
        let there = self.views.cut(start, first_hole.unwrap_or(pages));
        let mut expected = Expected::default();
        expected.must_if(first_hole.is_some(), Errno::ENOMEM);
        expected.must_if(protection & libc::PROT_EXEC != 0, Errno::EACCES);
        expected.check("mprotect", &answer)?;
        if answer.is_ok() || answer == Err(Errno::ENOMEM) {
            if protection & libc::PROT_EXEC != 0 && !there.is_empty() {
                bail!("a mapping became executable");
            }
            for address in there {
                if let Some(shown) = self.views.shown.get_mut(&address) {
                    shown.protection = protection;
                }
            }
        }
        Ok(())
    }

    /// `madvise`: whatever it does, the mapping shows what it did.
    pub(crate) fn advise(&mut self, view: u8, page: u16, pages: u16, advice: Advice) -> Result<()> {
        let Some((start, pages)) = self.views.part(view, page, pages) else {
            return Ok(());
        };
        let number = match advice {
            Advice::DontNeed => libc::MADV_DONTNEED,
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::DoFork => libc::MADV_DOFORK,
            Advice::Huge => libc::MADV_HUGEPAGE,
            Advice::NoHuge => libc::MADV_NOHUGEPAGE,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::Cold => libc::MADV_COLD,
            Advice::PageOut => libc::MADV_PAGEOUT,
            Advice::Free => libc::MADV_FREE,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::DoDump => libc::MADV_DODUMP,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::Collapse => libc::MADV_COLLAPSE,
            Advice::WillNeed => libc::MADV_WILLNEED,
            Advice::GuardInstall => 102,
        };
        let length = (pages * PAGE_BYTES) as usize;
        // SAFETY: mappings of buffers, or nothing.
        let answer = Errno::result(unsafe { libc::madvise(start as *mut _, length, number) });
        self.say(|| format!("   madvise {start:#x}, {pages} pages: {answer:?}"));
        // Holes are an error in the end, but no obstacle.
        if answer.is_ok() || answer == Err(Errno::ENOMEM) {
            for address in self.views.cut(start, pages) {
                match (advice, self.views.shown.get_mut(&address)) {
                    (Advice::DontFork, Some(shown)) => shown.inherited = false,
                    (Advice::DoFork, Some(shown)) => shown.inherited = true,
                    (Advice::GuardInstall, Some(_)) => drop(self.views.shown.remove(&address)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// `fork`: the child touches a page, and perhaps makes a buffer, and the parent sees it.
    pub(crate) fn fork(
        &mut self,
        view: u8,
        page: u16,
        write: bool,
        create: Option<&Create>,
    ) -> Result<()> {
        if self.forked || self.memory.is_answered() {
            return Ok(());
        }
        let address = self.views.address(view, page);
        let child = Child::run(|| {
            self.forked = true;
            self.views.shown.retain(|_, shown| shown.inherited);
            self.memory.forked(&mut self.contents);
            self.touch(view, page, write)?;
            if let Some(create) = create {
                self.create(create)?;
            }
            Ok(())
        });
        let child = match child {
            Ok(child) => child,
            // Pinned huge pages are copied, if there are any left.
            Err(error) if error.downcast_ref() == Some(&Errno::ENOMEM) => return Ok(()),
            Err(error) => return Err(error),
        };
        child.join().context("after fork")?;
        for area in [&mut self.structs, &mut self.ranges, &mut self.backings] {
            area.used_by_another();
        }
        // The same stamp that the child took.
        let stamp = self.contents.stamp();
        if let Some(shown) = self.views.at(address) {
            let id = shown.kept.page(shown.page);
            let wrote = write && shown.inherited && shown.protection & libc::PROT_WRITE != 0;
            if let Some(id) = id.filter(|_| wrote && !self.views.spans.is_empty()) {
                self.contents.set(id, stamp);
            }
        }
        Ok(())
    }
}
