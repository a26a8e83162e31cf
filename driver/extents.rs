// SPDX-License-Identifier: GPL-2.0

//! Which physical pages a buffer consists of.
//!
//! A buffer is a sequence of *extents*: runs of physically adjacent pages. [`ExtentMap`] stores
//! them in one of two forms:
//!
//! * *sparse*: 16 bytes an extent (its first page in the buffer, its first page frame), found by
//!   bisection. A gibibyte of adjacent huge pages is one extent.
//! * *dense*: 8 bytes a page (its page frame), found by indexing. A fully scattered buffer has as
//!   many extents as pages.
//!
//! Dense is at most twice the cost of sparse, and neither is more than 8 bytes a page; a look-up is
//! at most logarithmic.
//!
//! Page frames are numbers of 64 bits, with marks in the uppermost.
//!
//! This file knows nothing of pins, pages or locks, and is compiled for the host too, where
//! `tests/pure` holds it against a naive model.

use crate::chunked_vec::ChunkedVec;
use kernel::alloc::AllocError;

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

    fn new(pfn: Pfn, granularity: Granularity, first: bool) -> Self {
        let mut word = pfn as u64;
        if granularity == Granularity::Folio {
            word |= Self::FOLIO;
        }
        if first {
            word |= Self::FIRST;
        }
        Self(word)
    }

    fn pfn(self) -> Pfn {
        (self.0 & !(Self::FOLIO | Self::FIRST)) as Pfn
    }

    fn granularity(self) -> Granularity {
        if self.0 & Self::FOLIO != 0 {
            Granularity::Folio
        } else {
            Granularity::Page
        }
    }

    /// The frame behind this one, in the same extent.
    fn next(self) -> Self {
        Self((self.0 & !Self::FIRST) + 1)
    }

    fn is_first(self) -> bool {
        self.0 & Self::FIRST != 0
    }
}

/// An extent in the sparse form. It ends where the next one begins.
#[derive(Clone, Copy)]
struct Extent {
    /// Its first page, counted in the buffer.
    start: u64,
    /// Its first page frame.
    frame: Frame,
}

enum Form {
    Sparse(ChunkedVec<Extent>),
    Dense(ChunkedVec<Frame>),
}

/// The extents of a buffer, in the buffer's order.
///
/// # Invariants
///
/// * Sparse: the extents' starts begin at 0 and rise strictly; the last is below `pages`.
/// * Dense: there are `pages` frames, and the first one is marked as the first of its extent.
/// * `extents` is the number of extents in either form.
/// * `folios` says that some are pinned with [`Granularity::Folio`].
/// * `next` is the frame, without marks of a first, that would continue the last extent, if it may be
///   continued.
pub(crate) struct ExtentMap {
    form: Form,
    expected: usize,
    pages: usize,
    extents: usize,
    next: Option<Frame>,
    folios: bool,
}

impl ExtentMap {
    /// Extents below which the form is not worth a thought: one page of them.
    const FEW: usize = 256;

    /// An empty map for a buffer of `expected` pages: never more are appended. Does not allocate.
    pub(crate) const fn new(expected: usize) -> Self {
        Self {
            form: Form::Sparse(ChunkedVec::new()),
            expected,
            pages: 0,
            extents: 0,
            next: None,
            folios: false,
        }
    }

    /// Whether each page is pinned for itself, and is told fastest by [`Self::frames`].
    pub(crate) fn is_scattered(&self) -> bool {
        matches!(self.form, Form::Dense(_)) && !self.folios
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
            Form::Sparse(extents) => extents.bytes(),
            Form::Dense(frames) => frames.bytes(),
        }
    }

    /// Appends a run, which becomes part of the last extent if it follows it physically, is pinned
    /// in the same way, and is `joinable`: the caller knows of no other reason against it.
    ///
    /// After an error the map is as it was.
    pub(crate) fn push(&mut self, run: Run, joinable: bool) -> Result<(), AllocError> {
        if run.pages == 0 {
            return Ok(());
        }
        let joins = joinable && self.next == Some(Frame::new(run.pfn, run.granularity, false));
        self.choose_form(run.pages)?;
        let most = self.expected.saturating_sub(self.pages).max(1);
        match &mut self.form {
            Form::Sparse(_) if joins => {}
            Form::Sparse(extents) => {
                let extent = Extent {
                    start: self.pages as u64,
                    frame: Frame::new(run.pfn, run.granularity, true),
                };
                extents.push(extent, most)?;
            }
            Form::Dense(frames) => {
                let mut frame = Frame::new(run.pfn, run.granularity, !joins);
                for page in 0..run.pages {
                    if let Err(error) = frames.push(frame, most - page.min(most - 1)) {
                        frames.truncate(self.pages);
                        return Err(error);
                    }
                    frame = frame.next();
                }
            }
        }
        self.pages += run.pages;
        self.folios |= run.granularity == Granularity::Folio;
        self.extents += usize::from(!joins);
        self.next = Some(Frame::new(run.pfn + run.pages, run.granularity, false));
        Ok(())
    }

    /// Appends pages one by one, each pinned for itself, and returns how many from the first on: fewer
    /// than all only if memory cannot be had. They join each other and the last extent where they
    /// follow physically.
    pub(crate) fn push_frames(&mut self, frames: &[Pfn]) -> usize {
        let mut pfns = frames.iter().copied();
        let before = self.pages;
        let mut next = pfns.next();
        while let Some(pfn) = next {
            let mut run = Run {
                pfn,
                pages: 1,
                granularity: Granularity::Page,
            };
            next = pfns.next();
            while next == Some(run.pfn + run.pages) {
                run.pages += 1;
                next = pfns.next();
            }
            if self.push(run, true).is_err() {
                break;
            }
            if next.is_none() {
                break;
            }
            // The way of scattered pages, which are what this costs most for.
            let most = self.expected.saturating_sub(self.pages).max(1);
            if let Form::Dense(frames) = &mut self.form {
                let Ok(room) = frames.room(most) else {
                    continue;
                };
                let mut filled = 0;
                let mut last = self.next;
                for slot in room {
                    let Some(pfn) = next else {
                        break;
                    };
                    let joins = last == Some(Frame::new(pfn, Granularity::Page, false));
                    let frame = Frame::new(pfn, Granularity::Page, !joins);
                    slot.write(frame);
                    last = Some(frame.next());
                    self.extents += usize::from(!joins);
                    filled += 1;
                    next = pfns.next();
                }
                // SAFETY: So many of them were written.
                unsafe { frames.fill(filled) };
                self.pages += filled;
                self.next = last;
            }
        }
        self.pages - before
    }

    /// Whatever comes next begins a new extent.
    pub(crate) fn end_extent(&mut self) {
        self.next = None;
    }

    /// Gives back spare memory, when no more runs will come, and turns sparse where that halves the
    /// cost. Where no memory can be had for that, the map stays as it is.
    pub(crate) fn finish(&mut self) {
        if let Form::Dense(_) = self.form {
            if 4 * self.extents <= self.pages {
                // Failing leaves the dense form, which is right, only larger.
                let _ = self.make_sparse();
            }
        }
        match &mut self.form {
            Form::Sparse(extents) => extents.shrink_to_fit(),
            Form::Dense(frames) => frames.shrink_to_fit(),
        }
    }

    /// The pages from `page` on that are in one extent with it: at most `max`, which must not be
    /// zero. `None` if the buffer ends before `page`.
    ///
    /// Costs the logarithm of the number of extents, and in the dense form, where extents are
    /// shorter than two pages on average, the length of the answer.
    pub(crate) fn find(&self, page: usize, max: usize) -> Option<Run> {
        if page >= self.pages {
            return None;
        }
        match &self.form {
            Form::Sparse(extents) => {
                let index = self.index_of(extents, page);
                let extent = extents.get(index)?;
                Some(self.rest_of(extents, index, extent, page, max))
            }
            Form::Dense(frames) => {
                let frame = frames.get(page)?;
                let most = max.min(self.pages - page);
                let mut pages = 1;
                'count: loop {
                    let piece = frames.piece(page + pages);
                    if piece.is_empty() {
                        break;
                    }
                    for next in piece {
                        if pages == most || next.is_first() {
                            break 'count;
                        }
                        pages += 1;
                    }
                }
                Some(Run {
                    pfn: frame.pfn(),
                    pages,
                    granularity: frame.granularity(),
                })
            }
        }
    }

    /// Writes the page frames from `page` on to `out`, and returns how many: fewer than there is
    /// room for where the map, or one of its pieces, ends.
    pub(crate) fn frames(&self, page: usize, out: &mut [Pfn]) -> usize {
        if let Form::Dense(frames) = &self.form {
            let piece = frames.piece(page);
            for (out, frame) in out.iter_mut().zip(piece) {
                *out = frame.pfn();
            }
            return piece.len().min(out.len());
        }
        let Form::Sparse(extents) = &self.form else {
            return 0;
        };
        let mut count = 0;
        let mut index = self.index_of(extents, page);
        while let Some(extent) = extents.get(index) {
            let at = page + count;
            if at >= self.pages || count == out.len() {
                break;
            }
            let run = self.rest_of(extents, index, extent, at, out.len() - count);
            for (n, out) in out[count..][..run.pages].iter_mut().enumerate() {
                *out = run.pfn + n;
            }
            count += run.pages;
            index += 1;
        }
        count
    }

    /// All extents in the buffer's order, in linear time.
    pub(crate) fn iter(&self) -> Iter<'_> {
        Iter {
            map: self,
            page: 0,
            index: 0,
            piece: &[],
        }
    }

    /// The extent that `page` is in, if it is in any.
    fn index_of(&self, extents: &ChunkedVec<Extent>, page: usize) -> usize {
        let (mut low, mut high) = (0, extents.len());
        // The last extent that starts at `page` or before is in low..high.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match extents.get(middle) {
                Some(extent) if extent.start as usize <= page => low = middle,
                _ => high = middle,
            }
        }
        low
    }

    fn rest_of(
        &self,
        extents: &ChunkedVec<Extent>,
        index: usize,
        extent: Extent,
        page: usize,
        max: usize,
    ) -> Run {
        let end = extents
            .get(index + 1)
            .map_or(self.pages, |next| next.start as usize);
        let skipped = page - extent.start as usize;
        Run {
            pfn: extent.frame.pfn() + skipped,
            pages: (end - page).min(max),
            granularity: extent.frame.granularity(),
        }
    }

    /// Takes the other form when that has become clearly smaller, before `more` pages of one run
    /// are appended.
    ///
    /// Between a turn and the next one back the number of pages at least quadruples (dense needs
    /// more than half an extent a page, sparse at most an eighth), so building stays linear.
    fn choose_form(&mut self, more: usize) -> Result<(), AllocError> {
        let dense = matches!(self.form, Form::Dense(_));
        if !dense && self.extents >= Self::FEW && 2 * self.extents > self.pages {
            self.make_dense()
        } else if dense && self.pages.saturating_add(more) / 8 > self.extents {
            self.make_sparse()
        } else {
            Ok(())
        }
    }

    fn make_dense(&mut self) -> Result<(), AllocError> {
        let mut frames = ChunkedVec::new();
        let mut most = self.expected.max(self.pages);
        for run in self.iter() {
            let mut frame = Frame::new(run.pfn, run.granularity, true);
            for _ in 0..run.pages {
                frames.push(frame, most)?;
                frame = frame.next();
                most -= 1;
            }
        }
        self.form = Form::Dense(frames);
        Ok(())
    }

    fn make_sparse(&mut self) -> Result<(), AllocError> {
        let mut extents = ChunkedVec::new();
        let mut start = 0;
        for run in self.iter() {
            let extent = Extent {
                start,
                frame: Frame::new(run.pfn, run.granularity, true),
            };
            extents.push(extent, self.extents + 1)?;
            start += run.pages as u64;
        }
        self.form = Form::Sparse(extents);
        Ok(())
    }
}

/// An iterator over the extents of an [`ExtentMap`].
#[derive(Clone)]
pub(crate) struct Iter<'a> {
    map: &'a ExtentMap,
    page: usize,
    index: usize,
    /// Dense: the frames from `page` on, as far as they lie in one piece.
    piece: &'a [Frame],
}

impl Iterator for Iter<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.page >= self.map.pages {
            return None;
        }
        let run = match &self.map.form {
            Form::Sparse(extents) => {
                let extent = extents.get(self.index)?;
                self.map
                    .rest_of(extents, self.index, extent, self.page, usize::MAX)
            }
            Form::Dense(frames) => {
                if self.piece.is_empty() {
                    self.piece = frames.piece(self.page);
                }
                let first = *self.piece.first()?;
                let mut pages = 0;
                loop {
                    pages += 1;
                    self.piece = self.piece.get(1..).unwrap_or(&[]);
                    if self.piece.is_empty() {
                        self.piece = frames.piece(self.page + pages);
                    }
                    match self.piece.first() {
                        Some(frame) if !frame.is_first() => {}
                        _ => break,
                    }
                }
                Run {
                    pfn: first.pfn(),
                    pages,
                    granularity: first.granularity(),
                }
            }
        };
        self.page += run.pages;
        self.index += 1;
        Some(run)
    }
}
