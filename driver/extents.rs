// SPDX-License-Identifier: GPL-2.0

//! Which physical pages a buffer consists of.
//!
//! A buffer is a sequence of *extents*: runs of physically adjacent pages. [`ExtentMap`] stores
//! them in one of three forms:
//!
//! * *few*: up to [`FEW`] extents lie in the map itself. Most buffers are small, or lie in one
//!   piece; they need no memory besides.
//! * *sparse*: 16 bytes an extent (its first page in the buffer, its first page frame), found by
//!   bisection.
//! * *dense*: 8 bytes a *unit* of pages (its first page frame), found by indexing. A unit is a
//!   power of two of pages, such that every extent begins at a multiple of it in the buffer; then
//!   the pages of a unit are adjacent. Scattered pages have a unit of one page, scattered huge
//!   pages, once the map is finished, one of a huge page.
//!
//! A finished map is sparse where that is half of dense, or where dense is no smaller, but for a few
//! bytes. It never takes more than 8 bytes a page, and a chunk's slack while it grows; a look-up is
//! at most logarithmic.
//!
//! Page frames are numbers of 64 bits, with marks in the uppermost.
//!
//! This file knows nothing of pins, pages or locks, and is compiled for the host too, where
//! `tests/pure` holds it against a naive model.

use crate::chunked_vec::{
    ChunkedVec,
    WORTH_GIVING_BACK, //
};
use core::{
    mem::size_of,
    slice, //
};
use kernel::alloc::AllocError;

/// Extents that need no memory besides the map.
const FEW: usize = 2;

/// A number of a physical page frame.
pub(crate) type Pfn = usize;

/// How the pages of an extent are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Granularity {
    /// Each page was pinned for itself.
    Page,
    /// One pin was taken in each folio that the extent touches.
    Folio,
}

/// Physically adjacent pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first page frame.
    pub(crate) pfn: Pfn,
    /// How many pages.
    pub(crate) pages: usize,
    /// How they are pinned.
    pub(crate) granularity: Granularity,
}

/// A page frame with two marks in the bits that no page frame uses: physical addresses have at
/// most 56 bits on any 64-bit machine, hence frames at most 44.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Frame(u64);

impl Frame {
    /// Pinned with [`Granularity::Folio`].
    const FOLIO: u64 = 1 << 63;
    /// First of its extent (dense form only: neighbours in one extent follow each other there,
    /// but not all that follow each other are in one extent).
    const FIRST: u64 = 1 << 62;
    /// Equal to no frame that [`Self::new`] makes.
    const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    fn new(pfn: Pfn, granularity: Granularity) -> Self {
        match granularity {
            Granularity::Page => Self(pfn as u64),
            Granularity::Folio => Self(pfn as u64 | Self::FOLIO),
        }
    }

    /// The frame, marked if it is the first of its extent.
    #[inline(always)]
    fn mark(self, first: bool) -> Self {
        Self(self.0 | if first { Self::FIRST } else { 0 })
    }

    #[inline(always)]
    fn is_first(self) -> bool {
        self.0 & Self::FIRST != 0
    }

    #[inline(always)]
    fn pfn(self) -> Pfn {
        (self.0 & !(Self::FOLIO | Self::FIRST)) as Pfn
    }

    #[inline(always)]
    fn granularity(self) -> Granularity {
        if self.0 & Self::FOLIO != 0 {
            Granularity::Folio
        } else {
            Granularity::Page
        }
    }

    /// The frame without a mark of a first.
    #[inline(always)]
    fn unmarked(self) -> Self {
        Self(self.0 & !Self::FIRST)
    }

    /// The frame `pages` behind this one, in the same extent; marked as this one.
    #[inline(always)]
    fn skip(self, pages: usize) -> Self {
        Self(self.0.wrapping_add(pages as u64))
    }

    /// The run of this frame and those behind it: the pages `from..to` of a buffer.
    #[inline(always)]
    fn run(self, from: usize, to: usize) -> Run {
        Run {
            pfn: self.pfn(),
            pages: to.wrapping_sub(from),
            granularity: self.granularity(),
        }
    }
}

/// An extent in the few and sparse forms. It ends where the next one begins.
#[derive(Clone, Copy)]
struct Extent {
    /// Its first page, counted in the buffer.
    start: u64,
    /// Its first page frame, without a mark of a first.
    frame: Frame,
}

impl Extent {
    #[inline(always)]
    fn new(start: usize, frame: Frame) -> Self {
        Self {
            start: start as u64,
            frame,
        }
    }
}

enum Form {
    Few([Extent; FEW]),
    Sparse(ChunkedVec<Extent>),
    /// The unit is `1 << shift` pages.
    Dense {
        frames: ChunkedVec<Frame>,
        shift: u32,
    },
}

/// The extents of a buffer, in the buffer's order.
///
/// # Invariants
///
/// * Few: there are at most [`FEW`] extents. Few and sparse: the extents' starts begin at 0 and rise
///   strictly; the last is below `pages`.
/// * Dense: there is a frame for each unit of `pages`, the last of which may be shorter, and the
///   first one is marked as the first of its extent. Every extent begins with a unit.
/// * `extents` is the number of extents in any form.
/// * `folios` says that some are pinned with [`Granularity::Folio`].
/// * `next` is the frame, without a mark of a first, that would continue the last extent, if it may
///   be continued, or else [`Frame::NONE`].
pub(crate) struct ExtentMap {
    form: Form,
    expected: usize,
    pages: usize,
    extents: usize,
    next: Frame,
    folios: bool,
}

impl ExtentMap {
    /// An empty map for a buffer of `expected` pages: never more are appended. Does not allocate.
    pub(crate) const fn new(expected: usize) -> Self {
        const NOTHING: Extent = Extent {
            start: 0,
            frame: Frame::NONE,
        };
        Self {
            form: Form::Few([NOTHING; FEW]),
            expected,
            pages: 0,
            extents: 0,
            next: Frame::NONE,
            folios: false,
        }
    }

    /// Whether each page is pinned for itself, and is told fastest by [`Self::frames`].
    pub(crate) fn is_scattered(&self) -> bool {
        matches!(self.form, Form::Dense { shift: 0, .. }) && !self.folios
    }

    /// The buffer's size in pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The number of extents.
    pub(crate) fn extents(&self) -> usize {
        self.extents
    }

    /// Bytes of memory that the map holds, besides itself.
    pub(crate) fn bytes(&self) -> usize {
        match &self.form {
            Form::Few(_) => 0,
            Form::Sparse(extents) => extents.bytes(),
            Form::Dense { frames, .. } => frames.bytes(),
        }
    }

    /// Appends a run, which becomes part of the last extent if it follows it physically, is pinned
    /// in the same way, and is `joinable`: the caller knows of no other reason against it.
    ///
    /// After an error the map is as it was.
    #[inline]
    pub(crate) fn push(&mut self, run: Run, joinable: bool) -> Result<(), AllocError> {
        let frame = Frame::new(run.pfn, run.granularity);
        let joins = joinable && frame == self.next;
        let done = match &mut self.form {
            _ if run.pages == 0 => return Ok(()),
            Form::Dense { frames, shift: 0 } if run.pages == 1 => {
                frames.push_within(frame.mark(!joins))
            }
            Form::Dense { .. } => false,
            _ if joins => true,
            Form::Sparse(extents) => extents.push_within(Extent::new(self.pages, frame)),
            Form::Few(few) => match few.get_mut(self.extents) {
                Some(slot) => {
                    *slot = Extent::new(self.pages, frame);
                    true
                }
                None => false,
            },
        };
        if !done {
            return self.push_slowly(frame, run.pages, joins);
        }
        self.count(frame, run.pages, joins);
        Ok(())
    }

    /// Appends single pages, each pinned for itself, and returns how many from the first on: fewer
    /// than all only if memory cannot be had. They join each other and the last extent where they
    /// follow physically.
    pub(crate) fn push_frames(&mut self, frames: &[Pfn]) -> usize {
        let mut rest = frames;
        loop {
            let taken = self.append_frames_within(rest);
            rest = rest.get(taken..).unwrap_or(&[]);
            if rest.is_empty() || self.make_room(rest.len(), extents_of(rest)).is_err() {
                return frames.len() - rest.len();
            }
        }
    }

    /// Whatever comes next begins a new extent.
    pub(crate) fn end_extent(&mut self) {
        self.next = Frame::NONE;
    }

    /// Gives back spare memory, when no more runs will come, and takes the form that is smaller,
    /// where that is [worth it](WORTH_GIVING_BACK). Dense is given up only where sparse is half of
    /// it, as its look-ups are quicker. Where no memory can be had for that, the map stays as it
    /// is, which is right, only larger.
    ///
    /// Linear in the pages of a map that is dense, and in the extents of one that is not. Does not
    /// offer the processor to others meanwhile.
    pub(crate) fn finish(&mut self) {
        let sparse = size_of::<Extent>().saturating_mul(self.extents);
        match &self.form {
            Form::Few(_) => return,
            Form::Sparse(_) => {
                let shift = self.shift();
                let words = self.words(shift);
                let dense = size_of::<Frame>().saturating_mul(words);
                if sparse >= dense.saturating_add(WORTH_GIVING_BACK) {
                    let _ = self.make_dense(shift, words);
                }
            }
            Form::Dense { frames, .. } => {
                // No larger unit is looked for: a map turns dense where it has more extents than
                // pairs of pages, so that one of them begins at an odd page.
                let dense = size_of::<Frame>().saturating_mul(frames.len());
                let halved = dense / 2 >= sparse;
                if halved && dense >= sparse.saturating_add(WORTH_GIVING_BACK) {
                    let _ = self.make_sparse(self.extents);
                }
            }
        }
        match &mut self.form {
            Form::Few(_) => {}
            Form::Sparse(extents) => extents.shrink_to_fit(),
            Form::Dense { frames, .. } => frames.shrink_to_fit(),
        }
    }

    /// The pages from `page` on that are in one extent with it: at most `max`, which must not be
    /// zero. `None` if the buffer ends before `page`.
    ///
    /// Costs the logarithm of the number of extents, and in the dense form, where extents are
    /// a few units long on average, the length of the answer in units.
    pub(crate) fn find(&self, page: usize, max: usize) -> Option<Run> {
        if page >= self.pages {
            return None;
        }
        let most = max.min(self.pages - page);
        let Form::Dense { frames, shift } = &self.form else {
            let index = self.index_of(page);
            return Some(self.rest_of(index, self.extent(index)?, page, most));
        };
        let unit = 1usize << shift;
        let mut index = page >> shift;
        let skipped = page & (unit - 1);
        let frame = frames.get(index)?.skip(skipped);
        let mut pages = unit - skipped;
        index += 1;
        'count: while pages < most {
            let piece = frames.piece(index);
            if piece.is_empty() {
                break;
            }
            for next in piece {
                if pages >= most || next.is_first() {
                    break 'count;
                }
                pages += unit;
            }
            index += piece.len();
        }
        Some(frame.run(0, pages.min(most)))
    }

    /// Writes the page frames from `page` on to `out`, and returns how many: fewer than there is
    /// room for where the map, or one of its pieces, ends.
    pub(crate) fn frames(&self, page: usize, out: &mut [Pfn]) -> usize {
        if let Form::Dense { frames, shift: 0 } = &self.form {
            let piece = frames.piece(page);
            for (out, frame) in out.iter_mut().zip(piece) {
                *out = frame.pfn();
            }
            return piece.len().min(out.len());
        }
        let room = out.len();
        let mut out = out.iter_mut();
        let mut at = page;
        let mut index = match &self.form {
            Form::Dense { .. } => 0,
            _ => self.index_of(page),
        };
        while at < self.pages && out.len() > 0 {
            let run = match &self.form {
                // By units, not by extents: how long those are must not count.
                Form::Dense { shift, .. } => self.find(at, unit_rest(at, *shift).min(out.len())),
                _ => self
                    .extent(index)
                    .map(|extent| self.rest_of(index, extent, at, out.len())),
            };
            let Some(run) = run else {
                break;
            };
            // In this order, as the first of the two may be asked once too often.
            for (pfn, out) in (run.pfn..run.pfn + run.pages).zip(out.by_ref()) {
                *out = pfn;
            }
            at += run.pages;
            index += 1;
        }
        room - out.len()
    }

    /// All extents in the buffer's order, in linear time: of extents, or of units where the form is
    /// dense.
    pub(crate) fn iter(&self) -> Iter<'_> {
        let (piece, behind, frame) = match &self.form {
            Form::Dense { frames, shift } => {
                let mut piece = frames.piece(0).iter();
                let behind = piece.len();
                let frame = piece.next().copied();
                (Piece::Dense(piece, 1 << shift), behind, frame)
            }
            _ => {
                let mut piece = self.extents_from(0).iter();
                let behind = piece.len();
                let frame = piece.next().map(|extent| extent.frame);
                (Piece::Sparse(piece), behind, frame)
            }
        };
        Iter {
            map: self,
            piece,
            behind,
            page: 0,
            frame: frame.unwrap_or(Frame::NONE),
        }
    }

    /// Few and sparse: the extents from `index` on that lie in one piece.
    #[inline]
    fn extents_from(&self, index: usize) -> &[Extent] {
        match &self.form {
            Form::Few(few) => few.get(index..self.extents).unwrap_or(&[]),
            Form::Sparse(extents) => extents.piece(index),
            Form::Dense { .. } => &[],
        }
    }

    /// Dense: the frames from `index` on that lie in one piece.
    #[inline]
    fn words_from(&self, index: usize) -> &[Frame] {
        match &self.form {
            Form::Dense { frames, .. } => frames.piece(index),
            _ => &[],
        }
    }

    /// As [`Self::extents_from`], for an iterator, which by far mostly stays in a piece.
    #[cold]
    #[inline(never)]
    fn more_extents(&self, index: usize) -> slice::Iter<'_, Extent> {
        self.extents_from(index).iter()
    }

    /// As [`Self::words_from`], likewise.
    #[cold]
    #[inline(never)]
    fn more_words(&self, index: usize) -> slice::Iter<'_, Frame> {
        self.words_from(index).iter()
    }

    /// Few and sparse: an extent.
    #[inline]
    fn extent(&self, index: usize) -> Option<Extent> {
        self.extents_from(index).first().copied()
    }

    /// Few and sparse: the extent that `page` is in, if it is in any.
    fn index_of(&self, page: usize) -> usize {
        let begins_before = |extent: &Extent| extent.start as usize <= page;
        let behind = match &self.form {
            Form::Sparse(extents) => extents.partition_point(begins_before),
            _ => self.extents_from(0).partition_point(begins_before),
        };
        behind.saturating_sub(1)
    }

    /// Few and sparse: at most `max` of the pages of an extent from `page` on.
    fn rest_of(&self, index: usize, extent: Extent, page: usize, max: usize) -> Run {
        let end = self
            .extent(index + 1)
            .map_or(self.pages, |next| next.start as usize);
        let frame = extent.frame.skip(page - extent.start as usize);
        frame.run(0, (end - page).min(max))
    }

    /// Sparse: the largest unit, as a power of two, that a dense form could have.
    fn shift(&self) -> u32 {
        let mut starts = 0;
        let mut index = 0;
        loop {
            let piece = self.extents_from(index);
            if piece.is_empty() {
                break;
            }
            starts = piece.iter().fold(starts, |all, extent| all | extent.start);
            index += piece.len();
        }
        // The second extent does not begin at 0.
        starts.trailing_zeros().min(usize::BITS - 1)
    }

    /// The units of `1 << shift` pages.
    fn words(&self, shift: u32) -> usize {
        self.pages.div_ceil(1 << shift)
    }

    /// Counts a run that has been appended.
    #[inline(always)]
    fn count(&mut self, frame: Frame, pages: usize, joins: bool) {
        self.pages += pages;
        self.folios |= frame.granularity() == Granularity::Folio;
        self.extents += usize::from(!joins);
        self.next = frame.skip(pages);
    }

    /// Appends a run for which memory may be needed: as [`Self::push`], which sees to the rest.
    #[inline(never)]
    fn push_slowly(&mut self, frame: Frame, pages: usize, joins: bool) -> Result<(), AllocError> {
        let full = match &mut self.form {
            Form::Dense { frames, shift: 0 } => frames.spare().len() < pages,
            _ => true,
        };
        if full {
            self.make_room(pages, usize::from(!joins))?;
        }
        let most = self.most(pages);
        match &mut self.form {
            Form::Dense { frames, shift: 0 } => {
                if let Err(error) = append_words(frames, frame.mark(!joins), 1, pages, most) {
                    frames.truncate(self.pages);
                    return Err(error);
                }
            }
            Form::Sparse(extents) => {
                if !joins && !extents.push_within(Extent::new(self.pages, frame)) {
                    return Err(AllocError);
                }
            }
            // Not where `make_room` has succeeded.
            _ => return Err(AllocError),
        }
        self.count(frame, pages, joins);
        Ok(())
    }

    /// Appends as many single pages as need no memory, and returns how many.
    #[inline(always)]
    fn append_frames_within(&mut self, frames: &[Pfn]) -> usize {
        let page = self.pages;
        let (taken, begun) = match &mut self.form {
            Form::Few(few) => {
                let mut slots = few.get_mut(self.extents..).unwrap_or_default().iter_mut();
                let room = slots.len();
                let taken = join(frames, page, &mut self.next, |extent| {
                    slots.next().map(|slot| *slot = extent).is_some()
                });
                (taken, room - slots.len())
            }
            Form::Sparse(extents) => {
                let mut slots = extents.spare().iter_mut();
                let room = slots.len();
                let taken = join(frames, page, &mut self.next, |extent| {
                    slots.next().map(|slot| slot.write(extent)).is_some()
                });
                let begun = room - slots.len();
                // SAFETY: So many of them were written.
                unsafe { extents.fill(begun) };
                (taken, begun)
            }
            Form::Dense {
                frames: words,
                shift: 0,
            } => {
                let mut next = self.next;
                let mut begun = 0usize;
                let slots = words.spare();
                let room = slots.len();
                for (pfn, slot) in frames.iter().zip(slots) {
                    let frame = Frame::new(*pfn, Granularity::Page);
                    let first = frame != next;
                    slot.write(frame.mark(first));
                    begun = begun.wrapping_add(usize::from(first));
                    next = frame.skip(1);
                }
                let taken = room.min(frames.len());
                // SAFETY: So many of them were written.
                unsafe { words.fill(taken) };
                self.next = next;
                (taken, begun)
            }
            Form::Dense { .. } => (0, 0),
        };
        self.pages += taken;
        self.extents += begun;
        taken
    }

    /// How many pages will be appended at most, if at least `pages` are.
    fn most(&self, pages: usize) -> usize {
        self.expected.saturating_sub(self.pages).max(pages).max(1)
    }

    /// Makes room for more, at least for one extent or unit, where `pages` more in `extents` extents
    /// are to be appended.
    ///
    /// The form is chosen here, where memory is needed in any case. Between a turn and the next one
    /// back the number of pages at least quadruples (dense has more than half an extent a page,
    /// sparse at most an eighth), so building stays linear.
    #[cold]
    fn make_room(&mut self, pages: usize, extents: usize) -> Result<(), AllocError> {
        let most = self.most(pages);
        let all_pages = self.pages.saturating_add(pages);
        let all_extents = self.extents.saturating_add(extents);
        match &mut self.form {
            Form::Dense { frames, shift: 0 } if all_extents >= all_pages / 8 => {
                frames.room(ahead(all_pages), most)?;
                Ok(())
            }
            Form::Dense { .. } => self.make_sparse(all_extents),
            _ if all_extents > all_pages.div_ceil(2) => self.make_dense(0, ahead(all_pages)),
            Form::Sparse(sparse) => {
                sparse.room(extents, most)?;
                Ok(())
            }
            Form::Few(_) => self.make_sparse(all_extents),
        }
    }

    /// Turns dense, with room for `ahead` units at once, if a chunk has that.
    fn make_dense(&mut self, shift: u32, ahead: usize) -> Result<(), AllocError> {
        let mut frames = ChunkedVec::new();
        let mut most = self.expected.max(self.pages).div_ceil(1 << shift);
        frames.room(ahead, most)?;
        for run in self.iter() {
            let frame = Frame::new(run.pfn, run.granularity).mark(true);
            let words = run.pages.div_ceil(1 << shift);
            if words != 1 || !frames.push_within(frame) {
                append_words(&mut frames, frame, 1 << shift, words, most)?;
            }
            most = most.saturating_sub(words);
        }
        self.form = Form::Dense { frames, shift };
        Ok(())
    }

    /// Turns sparse, for `ahead` extents in all: with room for one more at least, if those are more
    /// than there are.
    fn make_sparse(&mut self, ahead: usize) -> Result<(), AllocError> {
        let mut extents = ChunkedVec::new();
        let mut left = ahead.max(self.extents).max(1);
        extents.room(left, left)?;
        let mut append = |extent| {
            if !extents.push_within(extent) {
                extents.room(left, left)?;
                extents.push_within(extent);
            }
            left = left.saturating_sub(1).max(1);
            Ok(())
        };
        if let Form::Dense { shift, .. } = &self.form {
            let mut page = 0usize;
            let mut index = 0;
            loop {
                let piece = self.words_from(index);
                if piece.is_empty() {
                    break;
                }
                for word in piece {
                    if word.is_first() {
                        append(Extent::new(page, word.unmarked()))?;
                    }
                    page = page.wrapping_add(1 << shift);
                }
                index += piece.len();
            }
        } else {
            for extent in self.extents_from(0) {
                append(*extent)?;
            }
        }
        if ahead > self.extents {
            // What there is may have filled a chunk.
            extents.room(left, left)?;
        }
        self.form = Form::Sparse(extents);
        Ok(())
    }
}

/// The number of extents that single pages are in by themselves.
fn extents_of(frames: &[Pfn]) -> usize {
    let next = frames.get(1..).unwrap_or(&[]);
    let breaks = frames
        .iter()
        .zip(next)
        .filter(|(pfn, next)| **next != pfn.wrapping_add(1));
    breaks.count() + 1
}

/// How many words a dense map of `pages` pages makes room for, if a chunk has that: small ones would
/// be copied soon.
fn ahead(pages: usize) -> usize {
    pages.saturating_mul(16)
}

/// The pages from `page` to the end of its unit.
fn unit_rest(page: usize, shift: u32) -> usize {
    let unit = 1usize << shift;
    unit - (page & (unit - 1))
}

/// Joins single pages, the first of which is `page` in the buffer, to an extent that `next` would
/// continue, and to new ones, until `begin` has no room for one. Returns how many pages there were.
#[inline(always)]
fn join(
    frames: &[Pfn],
    page: usize,
    next: &mut Frame,
    mut begin: impl FnMut(Extent) -> bool,
) -> usize {
    let mut follows = *next;
    let mut taken = 0usize;
    while let Some(pfn) = frames.get(taken) {
        let frame = Frame::new(*pfn, Granularity::Page);
        if frame != follows && !begin(Extent::new(page.wrapping_add(taken), frame)) {
            break;
        }
        follows = frame.skip(1);
        taken = taken.wrapping_add(1);
    }
    *next = follows;
    taken
}

/// Appends `words` units of `unit` pages, which follow each other. After an error some may have been
/// appended.
fn append_words(
    frames: &mut ChunkedVec<Frame>,
    mut frame: Frame,
    unit: usize,
    words: usize,
    most: usize,
) -> Result<(), AllocError> {
    let mut left = words;
    while left > 0 {
        let most = most.saturating_sub(words - left).max(left);
        let mut slots = frames.room(left, most)?.iter_mut().take(left);
        let count = slots.len();
        for slot in slots.by_ref() {
            slot.write(frame);
            frame = frame.unmarked().skip(unit);
        }
        // SAFETY: So many of them were written.
        unsafe { frames.fill(count) };
        left -= count;
    }
    Ok(())
}

/// What is left of a piece of a map, and the unit in pages if that is dense.
#[derive(Clone)]
enum Piece<'a> {
    Sparse(slice::Iter<'a, Extent>),
    Dense(slice::Iter<'a, Frame>, usize),
}

/// An iterator over the extents of an [`ExtentMap`].
///
/// # Invariants
///
/// `frame` is that of the page `page`, with which an extent begins, unless the map ends there.
/// `piece` follows on it, and what has the index `behind` in the map's form follows on `piece`.
#[derive(Clone)]
pub(crate) struct Iter<'a> {
    map: &'a ExtentMap,
    piece: Piece<'a>,
    behind: usize,
    page: usize,
    frame: Frame,
}

impl Iterator for Iter<'_> {
    type Item = Run;

    #[inline]
    fn next(&mut self) -> Option<Run> {
        let (page, frame) = (self.page, self.frame);
        if page >= self.map.pages {
            return None;
        }
        // The end of an extent shows in what follows it.
        let end = match &mut self.piece {
            Piece::Sparse(piece) => loop {
                if let Some(extent) = piece.next() {
                    self.frame = extent.frame;
                    break extent.start as usize;
                }
                *piece = self.map.more_extents(self.behind);
                if piece.len() == 0 {
                    break self.map.pages;
                }
                self.behind += piece.len();
            },
            Piece::Dense(piece, unit) => {
                let mut end = page.wrapping_add(*unit);
                loop {
                    if let Some(frame) = piece.next() {
                        if frame.is_first() {
                            self.frame = *frame;
                            break end;
                        }
                        end = end.wrapping_add(*unit);
                        continue;
                    }
                    *piece = self.map.more_words(self.behind);
                    if piece.len() == 0 {
                        // The last unit may be shorter.
                        break self.map.pages;
                    }
                    self.behind += piece.len();
                }
            }
        };
        self.page = end;
        Some(frame.run(page, end))
    }

    /// Keeps everything in registers.
    #[inline]
    fn fold<B, F: FnMut(B, Run) -> B>(self, init: B, mut f: F) -> B {
        let Self {
            map,
            piece,
            mut behind,
            mut page,
            mut frame,
        } = self;
        let mut value = init;
        if page >= map.pages {
            return value;
        }
        match piece {
            Piece::Sparse(mut piece) => loop {
                for extent in piece.by_ref() {
                    let end = extent.start as usize;
                    value = f(value, frame.run(page, end));
                    (page, frame) = (end, extent.frame);
                }
                piece = map.more_extents(behind);
                behind += piece.len();
                if piece.len() == 0 {
                    break;
                }
            },
            Piece::Dense(mut piece, unit) => {
                let mut end = page;
                loop {
                    for next in piece.by_ref() {
                        end = end.wrapping_add(unit);
                        if next.is_first() {
                            value = f(value, frame.run(page, end));
                            (page, frame) = (end, *next);
                        }
                    }
                    piece = map.more_words(behind);
                    behind += piece.len();
                    if piece.len() == 0 {
                        break;
                    }
                }
            }
        }
        f(value, frame.run(page, map.pages))
    }
}
