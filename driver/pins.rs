// SPDX-License-Identifier: GPL-2.0

//! Pinning the ranges of a call, and unpinning them.
//!
//! # What may happen meanwhile
//!
//! GUP runs without any lock of ours, and other threads of the caller may map and unmap as they
//! like. What counts is what was pinned: every page was, at the moment of its pin, mapped writable
//! at its address in the caller's address space. Nothing is concluded from a VMA.
//!
//! # One pin for a huge page
//!
//! A hugetlb folio is mapped whole and aligned, or not at all, and belongs to one owner as a
//! whole. So a pin of one of its pages, once GUP has given it, proves that its neighbours too were
//! mapped at the neighbouring addresses; and a pin keeps the whole folio. It suffices then to pin
//! one page of each, provided that the page itself says it is hugetlb, and that its place in the
//! folio is its address's place in the huge page. Transparent huge pages can be mapped
//! in part, and shared page by page: there every page is pinned.
//!
//! Where the caller names a file instead of addresses, there is no mapping to doubt: the folio that
//! the page cache has at an index is the file's as a whole, and one pin keeps it whole.
//!
//! # Addresses where a file is mapped
//!
//! A shared and writable mapping of a file of shmem or hugetlbfs can show nothing but the pages
//! that the page cache has. There the page cache is asked instead of the page tables, which costs
//! less a page, and for hugetlb one pin a folio without further proof. The file is what the VMA
//! named at one moment of the call, and a reference keeps it from being another's: whatever is
//! mapped at the address from then on, the pages are such as the caller had mapped during the call.
//! (To conclude from a VMA what GUP will find at its addresses would be a race; here GUP is not asked.)
//! Where anything is not as usual, pages have to be waited for or faults are watched, GUP does it.
//!
//! # Patience
//!
//! Pages that lie in `ZONE_MOVABLE` or CMA are migrated by GUP before it pins them. That fails
//! while somebody else holds a reference, for a moment (direct I/O, a pipe) or a page that would
//! have to be split or allocated; GUP gives up at the first such failure, with `ENOMEM`. We try
//! again, with pauses of 1, 2, 4, … ms, up to `pin_retries` times for the same pages, and no more
//! than [`TRIES_IN_ALL`] times that in one call.

use crate::{
    extents::{
        ExtentMap,
        Granularity,
        Pfn,
        Run, //
    },
    kernel_ext::{
        gup::{
            self,
            Batch,
            Frames,
            OnePin,
            Place,
            Unpinner, //
        },
        mapped_file::MappedFile,
        sched, //
    },
    params, //
};
use kernel::{
    alloc::{
        flags::{
            __GFP_NOWARN, //
            GFP_KERNEL_ACCOUNT,
        },
        KVVec, //
    },
    error::code,
    fs::file::LocalFile,
    page::PAGE_SHIFT,
    prelude::*, //
};

/// In one call, at most so many times `pin_retries` new tries.
const TRIES_IN_ALL: u32 = 4;

/// Calls of GUP between two such looks: it looks for itself when it has to fault pages in. The same for
/// single pages of files.
const CALLS: u32 = 8;

/// So many pages have to be left of a range for it to be worth a look whether a file is mapped there:
/// with GUP, a call costs 600 instructions less than with the page cache and a small page 60 more, a
/// huge one 400.
const WORTH_A_LOOK: usize = 32;
/// The same while huge pages are expected, which have 512 pages at least as a rule; at first we do
/// not know.
const WORTH_A_LOOK_HUGE: usize = 1024;
/// Pages of the file, small or huge, of which there must be so many.
const FEW_UNITS: usize = 3;

/// Folios that are unpinned at once; most extents of folios have more than a few.
const AT_ONCE: usize = 64;

/// Pages between two looks at whether somebody else should run, or the task be killed.
const STRIDE: usize = Batch::MAX;

/// Pinned pages, in a buffer's order.
///
/// # Invariants
///
/// Of each page in an extent of `map` with [`Granularity::Page`] one pin is held, and of each
/// folio in one with [`Granularity::Folio`]. Extents of the latter kind end at the end of a folio
/// or where the next one was pinned anew: each piece of a folio in an extent is one pin.
pub(crate) struct Pins {
    map: ExtentMap,
    pins: usize,
    /// Each page is pinned for itself, and none is a device's: any may be in one extent with any.
    plain: bool,
}

impl Pins {
    const fn new(expected: usize) -> Self {
        Self {
            map: ExtentMap::new(expected),
            pins: 0,
            plain: true,
        }
    }

    /// Which pages they are.
    pub(crate) fn map(&self) -> &ExtentMap {
        &self.map
    }

    /// How many pins are held.
    pub(crate) fn count(&self) -> usize {
        self.pins
    }

    /// Takes over the pins of `run`. They are dropped after an error.
    ///
    /// # Safety
    ///
    /// The caller owns these pins, of every page or one in the run's only folio, and gives them up.
    unsafe fn push(&mut self, run: Run, joinable: bool) -> Result {
        if let Err(error) = self.map.push(run, joinable) {
            match run.granularity {
                // SAFETY: By the function's requirements.
                Granularity::Page => unsafe { Unpinner::new().unpin(run.pfn, run.pages) },
                Granularity::Folio => {
                    // SAFETY: By the function's requirements.
                    unsafe { gup::unpin_folios(run.pfn, run.pages, 1) };
                }
            }
            return Err(error.into());
        }
        self.pins += match run.granularity {
            Granularity::Page => run.pages,
            Granularity::Folio => {
                self.plain = false;
                1
            }
        };
        Ok(())
    }

    /// Takes over the pins of single pages, and returns of how many from the first on: of fewer than
    /// all only if memory for remembering them cannot be had.
    ///
    /// # Safety
    ///
    /// The caller owns one pin of each of these pages, and gives up those that are taken over.
    unsafe fn push_frames(&mut self, frames: &[Pfn]) -> usize {
        let taken = self.map.push_frames(frames);
        self.pins += taken;
        taken
    }

    /// Takes over the pins of folios of `pages` pages each, of which these are the first frames, and
    /// returns of how many from the first on, as above.
    ///
    /// # Safety
    ///
    /// The caller owns one pin of each of these folios, and gives up those that are taken over.
    unsafe fn push_folios(&mut self, frames: &[Pfn], pages: usize) -> usize {
        let mut taken = 0;
        while let Some(&pfn) = frames.get(taken) {
            let rest = frames[taken..].iter().enumerate();
            let follows = |(n, frame): &(usize, &Pfn)| **frame == pfn + n * pages;
            let count = rest.take_while(follows).count();
            let run = Run {
                pfn,
                pages: count * pages,
                granularity: Granularity::Folio,
            };
            if self.map.push(run, true).is_err() {
                break;
            }
            self.pins += count;
            self.plain = false;
            taken += count;
        }
        taken
    }

    /// Whether [`Self::rearranged`] can be asked.
    pub(crate) fn are_plain(&self) -> bool {
        self.plain
    }

    /// The same pages in another order: `places` tells, for part after part of them, which page its
    /// first one becomes, and how many pages it has. After an error nothing is pinned any more.
    pub(crate) fn rearranged(
        mut self,
        places: impl Iterator<Item = (usize, usize)>,
    ) -> Result<Self> {
        let pages = self.map.pages();
        if !self.plain {
            return Err(EINVAL);
        }
        let mut frames = KVVec::<Pfn>::new();
        frames.extend_with(pages, Pfn::MAX, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        let mut runs = self.map.iter();
        let (mut pfn, mut left) = (0, 0);
        let (mut moved, mut since) = (0, 0);
        for (mut place, mut pages) in places {
            while pages > 0 {
                if left == 0 {
                    let run = runs.next().ok_or(EINVAL)?;
                    (pfn, left) = (run.pfn, run.pages);
                }
                let count = left.min(pages);
                let to = frames.get_mut(place..).and_then(|to| to.get_mut(..count));
                for (n, frame) in to.ok_or(EINVAL)?.iter_mut().enumerate() {
                    *frame = pfn + n;
                }
                (pfn, left) = (pfn + count, left - count);
                (place, pages) = (place + count, pages - count);
                (moved, since) = (moved + count, since + count);
            }
            if since >= STRIDE {
                since = 0;
                sched::breathe()?;
            }
        }
        // As many were put somewhere as there is room for; that no place was taken twice is for the
        // caller to see to, and for this to check before pins are told from it.
        if moved != pages || frames.contains(&Pfn::MAX) {
            return Err(EINVAL);
        }
        let mut map = ExtentMap::new(pages);
        for frames in frames.chunks(STRIDE) {
            sched::breathe()?;
            if map.push_frames(frames) < frames.len() {
                return Err(ENOMEM);
            }
        }
        map.finish();
        // INVARIANT: The same pages, of each of which one pin is held.
        self.map = map;
        Ok(self)
    }
}

impl Pins {
    /// The pages of a map of single ones, without a look at where extents begin.
    fn drop_scattered(&self) {
        let mut frames = [0; 64];
        let mut page = 0;
        let mut since = 0;
        loop {
            let count = self.map.frames(page, &mut frames);
            if count == 0 {
                return;
            }
            // SAFETY: By the type invariant we hold these pins, and drop them once.
            unsafe { gup::unpin_frames(&mut frames[..count]) };
            page += count;
            since += count;
            if since >= STRIDE {
                since = 0;
                sched::cond_resched();
            }
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if self.map.is_scattered() {
            return self.drop_scattered();
        }
        let mut unpinner = Unpinner::new();
        let mut since = 0;
        // Internal iteration is the quickest.
        self.map.iter().for_each(|run| {
            let mut done = 0;
            while done < run.pages {
                let pfn = run.pfn + done;
                let left = run.pages - done;
                let (pages, calls) = match run.granularity {
                    Granularity::Page => {
                        let pages = left.min(STRIDE);
                        // SAFETY: By the type invariant we hold these pins, and drop them once.
                        unsafe { unpinner.unpin(pfn, pages) };
                        (pages, pages)
                    }
                    Granularity::Folio => {
                        // SAFETY: As above; folios are taken whole or to the end of the extent.
                        let pages = unsafe { gup::unpin_folios(pfn, left, AT_ONCE) };
                        (pages, AT_ONCE)
                    }
                };
                done += pages;
                since += calls;
                if since >= STRIDE {
                    since = 0;
                    sched::cond_resched();
                }
            }
        });
    }
}

/// The file that a range is expected to map.
pub(crate) struct Expected<'a> {
    /// The file.
    pub(crate) file: &'a LocalFile,
    /// The page of it that the range's first page maps.
    pub(crate) page: usize,
}

/// Pins range after range.
pub(crate) struct Pinner {
    pins: Pins,
    batch: Batch,
    /// The last page was hugetlb's, so the next one is pinned alone. At first we do not know, and
    /// ask with one page.
    hugetlb: bool,
    /// The last frame in `pins`, if it is device memory.
    device: Option<Pfn>,
    /// New tries that this call still has.
    patience: u32,
    /// Calls of GUP, and parts of files.
    calls: u32,
    /// The last mapping of a file that was found.
    mapped: Option<MappedFile>,
    /// Addresses where the page cache cannot do it, as was last seen.
    gup_alone: core::ops::Range<usize>,
    /// The last folio of a file had `1 << order` pages.
    order: u32,
}

impl Pinner {
    /// New tries for a call.
    pub(crate) fn patience() -> u32 {
        TRIES_IN_ALL * params::pin_retries()
    }

    /// A pinner for `pages` pages in all, which may try again so often.
    pub(crate) fn new(pages: usize, patience: u32) -> Self {
        Self {
            pins: Pins::new(pages),
            batch: Batch::new(pages),
            hugetlb: true,
            device: None,
            patience,
            calls: 0,
            mapped: None,
            gup_alone: 0..0,
            order: 0,
        }
    }

    /// Pins `pages` pages of the current process from the address `addr` on.
    pub(crate) fn pin(
        &mut self,
        mut addr: usize,
        mut pages: usize,
        mut expected: Option<Expected<'_>>,
    ) -> Result {
        while pages > 0 {
            if self.calls % CALLS == 0 {
                sched::breathe()?;
            }
            self.calls = self.calls.wrapping_add(1);
            let done = if let Some(expected) = &expected {
                let want = if self.hugetlb { 1 } else { pages };
                self.pin_batch(addr, want)?;
                self.take_batch(addr, pages, Some(expected))?
            } else {
                match self.pin_mapped(addr, pages)? {
                    0 if self.hugetlb => self.pin_one(addr, pages)?,
                    0 => {
                        self.pin_batch(addr, pages)?;
                        self.take_batch(addr, pages, None)?
                    }
                    done => done,
                }
            };
            addr += done << PAGE_SHIFT;
            pages -= done;
            if let Some(expected) = &mut expected {
                expected.page += done;
            }
        }
        Ok(())
    }

    /// Pins the page at `addr`, and with it, if it is hugetlb's, the others of its folio: returns how
    /// many of the range's `left` pages.
    #[inline]
    fn pin_one(&mut self, addr: usize, left: usize) -> Result<usize> {
        match OnePin::new(addr) {
            Ok((pin, place)) if place.user && !place.device => {
                self.after_device();
                self.hugetlb = place.hugetlb;
                let mut run = Run {
                    pfn: place.pfn,
                    pages: 1,
                    granularity: Granularity::Page,
                };
                let mut joinable = true;
                if place.hugetlb && in_place(&place, addr) {
                    run.pages = left.min(place.left);
                    run.granularity = Granularity::Folio;
                    // Two pins of one folio must not look like one.
                    joinable = place.left == place.folio_pages;
                }
                pin.leave();
                // SAFETY: The pin is ours, and given up here.
                unsafe { self.pins.push(run, joinable) }?;
                return Ok(run.pages);
            }
            Ok((pin, _)) => self.batch.adopt(pin),
            Err(error) => self.pin_patiently(addr, 1, error)?,
        }
        self.take_batch(addr, left, None)
    }

    /// Pins a batch of at most `pages` pages from the address `addr` on, if a file is mapped there and
    /// the page cache tells them without ado: how many, or none.
    #[inline]
    fn pin_mapped(&mut self, addr: usize, pages: usize) -> Result<usize> {
        let enough = if self.hugetlb {
            WORTH_A_LOOK_HUGE
        } else {
            WORTH_A_LOOK
        };
        if pages < enough || self.gup_alone.contains(&addr) {
            return Ok(0);
        }
        self.pin_mapped_batch(addr, pages)
    }

    fn pin_mapped_batch(&mut self, addr: usize, pages: usize) -> Result<usize> {
        let last = self.mapped.take();
        let last = last.filter(|mapped| mapped.pages_at(addr).is_some());
        let mapped = match last.map_or_else(|| MappedFile::at(addr), Ok) {
            Ok(mapped) => mapped,
            Err(addresses) => {
                self.gup_alone = addresses;
                return Ok(0);
            }
        };
        let Some((index, there)) = mapped.pages_at(addr) else {
            return Ok(0);
        };
        let most = pages.min(there);
        let before = index & (mapped.unit() - 1);
        if before + most <= (FEW_UNITS - 1) * mapped.unit() {
            self.mapped = Some(mapped);
            return Ok(0);
        }
        sched::breathe()?;
        self.batch.make_room_in_file(most, mapped.unit())?;
        let taken = match self.batch.pin_mapped_file(&mapped, index, most) {
            Ok(_) => self.take_file_batch(mapped.file(), index, most)?.pages,
            Err(_) => 0,
        };
        if taken == 0 {
            // It may be worth a try again behind what cannot be had.
            self.gup_alone = addr..addr.saturating_add(Batch::MAX << PAGE_SHIFT);
        }
        self.mapped = Some(mapped);
        Ok(taken)
    }

    /// All that was pinned, which is taken out, and the tries that are left.
    // Not by value: the batch takes a quarter of a kilobyte of stack, and would once more.
    pub(crate) fn finish(&mut self) -> (Pins, u32) {
        self.pins.map.finish();
        let pins = core::mem::replace(&mut self.pins, Pins::new(0));
        (pins, self.patience)
    }

    /// Pins `pages` pages of `file` from its page `index` on, wherever they are mapped.
    pub(crate) fn pin_file(
        &mut self,
        file: &LocalFile,
        mut index: usize,
        mut pages: usize,
    ) -> Result {
        if self.calls % CALLS == 0 {
            sched::breathe()?;
        }
        self.calls = self.calls.wrapping_add(1);
        // Lists are mostly of parts that lie in one page.
        let mut last = match OnePin::of_file(file, index, pages) {
            Ok(Some((pin, place))) => return self.take_file_one(pin, &place, pages),
            Ok(None) => {
                sched::breathe()?;
                self.pin_file_batch(file, index, pages)?
            }
            Err(error) => Taken::nothing(error),
        };
        loop {
            let done = match last {
                Taken { pages: 0, error } => self.pin_file_patiently(file, index, pages, error)?,
                Taken { pages, .. } => pages,
            };
            index += done;
            pages -= done;
            if pages == 0 {
                return Ok(());
            }
            sched::breathe()?;
            last = self.pin_file_batch(file, index, pages)?;
        }
    }

    /// Moves the pin of the folio in which `pages` pages of a file are to the pins.
    #[inline]
    fn take_file_one(&mut self, pin: OnePin, place: &Place, pages: usize) -> Result {
        self.after_device();
        let run = Run {
            pfn: place.pfn,
            pages,
            granularity: if place.folio_pages == 1 {
                Granularity::Page
            } else {
                Granularity::Folio
            },
        };
        pin.leave();
        // SAFETY: The pin is ours, and given up here. Two pins of one folio must not look like one.
        unsafe { self.pins.push(run, place.left == place.folio_pages) }
    }

    /// Pins a batch of pages of `file`, and takes what is right of it: if nothing is, there is an
    /// error.
    fn pin_file_batch(&mut self, file: &LocalFile, index: usize, pages: usize) -> Result<Taken> {
        self.batch.make_room_in_file(pages, gup::file_unit(file))?;
        match self.batch.pin_file(file, index, pages) {
            Ok(_) => self.take_file_batch(file, index, pages),
            Err(error) => Ok(Taken::nothing(error)),
        }
    }

    /// The same after a first error, with patience: how many pages it takes in the end.
    #[cold]
    fn pin_file_patiently(
        &mut self,
        file: &LocalFile,
        index: usize,
        pages: usize,
        mut error: Option<Error>,
    ) -> Result<usize> {
        let mut tries = self.tries();
        loop {
            if sched::fatal_signal_pending() {
                return Err(EINTR);
            }
            // Truncated and filled again under our hands, if there is no other reason.
            let reason = error.unwrap_or(EAGAIN);
            let asked = pages.min(Batch::most_of(file));
            // Memory may be short for moving pages, which passes, or for new ones.
            let short = reason == ENOMEM && !gup::file_has_pages(file, index, asked);
            if !may_pass(reason) || short {
                return Err(contract_of_file(reason, file));
            }
            if !self.try_again(&mut tries)? {
                return Err(EBUSY);
            }
            match self.pin_file_batch(file, index, pages)? {
                Taken {
                    pages: 0,
                    error: next,
                } => error = next,
                Taken { pages, .. } => return Ok(pages),
            }
        }
    }

    /// The tries for one batch.
    fn tries(&self) -> Tries {
        Tries {
            left: params::pin_retries().min(self.patience),
            pause_ms: 1,
        }
    }

    /// Waits for the next try, if there is one.
    fn try_again(&mut self, tries: &mut Tries) -> Result<bool> {
        if tries.left == 0 {
            return Ok(false);
        }
        tries.left -= 1;
        self.patience -= 1;
        sched::sleep_killable(tries.pause_ms)?;
        tries.pause_ms *= 2;
        Ok(true)
    }

    /// Pins up to `want` pages into the batch, with patience, and translates errors.
    #[inline]
    fn pin_batch(&mut self, addr: usize, want: usize) -> Result {
        self.batch.make_room(want)?;
        match self.batch.pin(addr, want) {
            Ok(_) => Ok(()),
            Err(error) => self.pin_patiently(addr, want, error),
        }
    }

    /// The same after a first `error`.
    #[cold]
    fn pin_patiently(&mut self, addr: usize, want: usize, mut error: Error) -> Result {
        let mut tries = self.tries();
        loop {
            if sched::fatal_signal_pending() {
                return Err(EINTR);
            }
            if !may_pass(error) {
                return Err(contract(error));
            }
            if !self.try_again(&mut tries)? {
                // GUP says ENOMEM for both. If the pages can be had when they need not move, there
                // was memory enough for them.
                return Err(
                    if error != ENOMEM || self.batch.can_pin_briefly(addr, want) {
                        EBUSY
                    } else {
                        ENOMEM
                    },
                );
            }
            error = match self.batch.pin(addr, want) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
        }
    }

    /// Moves the batch, which begins at the address `addr`, to the pins, and returns how many
    /// pages of the range's `left` that makes.
    fn take_batch(
        &mut self,
        addr: usize,
        left: usize,
        expected: Option<&Expected<'_>>,
    ) -> Result<usize> {
        let count = self.batch.pages().len();
        if let Some(expected) = expected {
            if self.batch.backed_by(0, expected.file, expected.page) < count {
                return Err(EAGAIN);
            }
        }
        let mut frames = Frames::new();
        let mut done = 0;
        while done < count {
            // Where hugetlb is expected, there is one page to be looked at.
            let ordinary = if self.hugetlb && count == 1 {
                &[]
            } else {
                self.batch.ordinary(done, &mut frames)
            };
            if !ordinary.is_empty() {
                self.hugetlb = false;
                self.after_device();
                done += self.take_frames(done, ordinary, 0)?;
                continue;
            }

            let pages = self.batch.pages();
            let first = pages[done];
            let place = first.place();
            if !place.user && !place.device {
                self.batch.keep(done);
                return Err(EFAULT);
            }
            self.hugetlb = place.hugetlb;
            // The rest of the folio, as far as the batch has it in this order.
            let mut taken = 1;
            let most = place.left.min(count - done);
            while taken < most && pages[done + taken].follows(first, taken) {
                taken += 1;
            }
            let mut run = Run {
                pfn: place.pfn,
                pages: taken,
                granularity: Granularity::Page,
            };
            let mut joinable = true;
            if count == 1 && place.hugetlb && in_place(&place, addr) {
                run.pages = left.min(place.left);
                run.granularity = Granularity::Folio;
                // Two pins of one folio must not look like one.
                joinable = place.left == place.folio_pages;
            } else if place.device || self.device.is_some() {
                joinable = match self.device {
                    // SAFETY: The frame is in `pins`, hence pinned.
                    Some(last) => unsafe { first.same_pgmap(last) },
                    None => false,
                };
            }
            self.device = place.device.then_some(run.pfn);
            self.pins.plain &= !place.device;
            // SAFETY: The batch pinned these pages, and gives them up below in any case.
            let pushed = unsafe { self.pins.push(run, joinable) };
            if let Err(error) = pushed {
                // `push` has dropped this run's pins; the batch drops those behind it.
                self.batch.keep(done + taken);
                return Err(error);
            }
            done += run.pages;
        }
        self.batch.keep(count);
        Ok(done)
    }

    /// Moves the batch, which begins with the folio of the page `index` of `file`, to the pins, as far as
    /// the folios are the file's and can be shown.
    fn take_file_batch(&mut self, file: &LocalFile, index: usize, left: usize) -> Result<Taken> {
        let count = self.batch.pages().len();
        self.after_device();
        let mut frames = Frames::new();
        let mut order = self.order;
        let (mut entry, mut done) = (0, 0);
        let mut error = None;
        while entry < count && done < left {
            let (index, left) = (index + done, left - done);
            let whole = left >> order;
            let plain = if whole == 0 {
                &[]
            } else {
                let batch = &self.batch;
                batch.plain_folios(entry, file, index, order, whole, &mut frames)
            };
            if !plain.is_empty() {
                done += plain.len() << order;
                entry += self.take_frames(entry, plain, order)?;
                continue;
            }
            let place = match self.batch.pages()[entry].place_in_file(file, index) {
                Ok(place) => place,
                Err(why) => {
                    error = Some(why);
                    break;
                }
            };
            // What follows is probably as large.
            order = place.folio_pages.trailing_zeros();
            if order == 0 {
                done += 1;
                entry += self.take_frames(entry, &[place.pfn], order)?;
                continue;
            }
            let run = Run {
                pfn: place.pfn,
                pages: place.left.min(left),
                granularity: Granularity::Folio,
            };
            entry += 1;
            // SAFETY: The batch pinned the folio, and gives it up below in any case. Two pins of
            // one folio must not look like one.
            let pushed = unsafe { self.pins.push(run, place.left == place.folio_pages) };
            if let Err(error) = pushed {
                // `push` has dropped this pin; the batch drops those behind it.
                self.batch.keep(entry);
                return Err(error);
            }
            done += run.pages;
        }
        self.order = order;
        self.batch.keep(entry);
        Ok(Taken { pages: done, error })
    }

    /// Moves pages of the batch from the entry `from` on, or folios of `1 << order` pages, of which these
    /// are the `frames`, to the pins, and returns how many. After an error the batch has none left.
    fn take_frames(&mut self, from: usize, frames: &[Pfn], order: u32) -> Result<usize> {
        // SAFETY: The batch pinned these pages or folios once each; it gives up those that were
        // taken, here or, with all others, in our callers.
        let taken = unsafe {
            match order {
                0 => self.pins.push_frames(frames),
                _ => self.pins.push_folios(frames, 1 << order),
            }
        };
        if taken < frames.len() {
            self.batch.keep(from + taken);
            return Err(ENOMEM);
        }
        Ok(taken)
    }

    /// What comes next is no device's memory: it must not join such an extent.
    fn after_device(&mut self) {
        if self.device.take().is_some() {
            self.pins.map.end_extent();
        }
    }
}

/// Whether the place of a hugetlb page in its folio is that of its address in a huge page of that
/// size, as it must be where hugetlb mapped it.
fn in_place(place: &Place, addr: usize) -> bool {
    (addr >> PAGE_SHIFT) & (place.folio_pages - 1) == place.folio_pages - place.left
}

/// Whether a failure of GUP's may pass by itself.
fn may_pass(error: Error) -> bool {
    error == ENOMEM || error == EAGAIN || error == EBUSY
}

/// What was taken of a batch of a file's folios.
struct Taken {
    /// So many pages.
    pages: usize,
    /// Why no more: the next folio cannot be shown, or is not the file's any more.
    error: Option<Error>,
}

impl Taken {
    fn nothing(error: Error) -> Self {
        Self {
            pages: 0,
            error: Some(error),
        }
    }
}

/// Tries that are left for one batch.
struct Tries {
    left: u32,
    pause_ms: u32,
}

/// The errors of pinning a file, in the contract's terms: no room in its store is `EFAULT`, as
/// where a mapping of it is pinned. Filling a hole in a file of hugetlb ends at any signal: then the
/// call begins anew when that has been handled.
fn contract_of_file(error: Error, file: &LocalFile) -> Error {
    if error == EINTR {
        return code::ERESTARTNOINTR;
    }
    let exhausted = error == ENOSPC || (error == ENOMEM && gup::file_is_hugetlb(file));
    if exhausted {
        EFAULT
    } else if [EINVAL, EACCES, EPERM, ENOMEM].contains(&error) {
        error
    } else if error == EAGAIN {
        EBUSY
    } else {
        contract(error)
    }
}

/// GUP's errors that do not pass, in the contract's terms: whatever it does not pin is `EFAULT`.
fn contract(error: Error) -> Error {
    if error == EINTR || error == code::ERESTARTSYS {
        EINTR
    } else {
        EFAULT
    }
}
