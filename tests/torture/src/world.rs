// SPDX-License-Identifier: MIT OR Apache-2.0

//! The process's mappings, and a model of them. The model says for every address of the arena which word is
//! there and which access is allowed.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{bail, Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use pinbuf_test_harness::support::arena::Arena;
use pinbuf_test_harness::support::kernel;
use pinbuf_test_harness::support::memory::{memfd, punch_hole, stamp, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::turn::Turn;
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device};
use pinbuf_uapi::Range;

use crate::steps::{Edge, Extent, Harm, Kind, Spot, Step, Target};

/// The size of the arena: some GiB, as a mapping of 1 GiB should have places to go.
const SIZE: usize = 8 * GIGA;
/// Buffers that have a descriptor at a time.
const SLOTS: usize = 5;
/// Old places that are remembered.
const PLACES: usize = 40;
/// A step of a child's after a fork.
const CHILD_STEPS: usize = 6;
/// What the process that gets freed memory writes.
const SECRET: u64 = 0x7365_6372_6574_2121;
/// Bytes of small pages that it takes.
const SMALL_MEMORY: usize = 48 << 20;

/// The places in a part where it writes that: in each page, or in those of each block that are looked at.
fn secrets(at: usize, len: usize) -> impl Iterator<Item = usize> {
    (at..at + len).step_by(PAGE).filter(move |at| {
        let page = at / PAGE;
        len < GIGA || page % 13 == 0 || matches!(page % 512, 0 | 1 | 511)
    })
}

/// A page frame, as the model counts them.
type Frame = u32;

/// The frames of pages of 1 GiB have this bit; those below are the place in the page.
const GIANT: Frame = 1 << 31;
const GIANT_PAGES: Frame = 1 << 18;

/// The word that a frame begins with until it is written. Of 1 GiB, most pages stay as the kernel cleared
/// them: to write them all takes long.
fn first_word(seed: u64, frame: Frame) -> u64 {
    let page = frame % GIANT_PAGES;
    if frame & GIANT != 0 && page % 13 != 0 && !matches!(page % 512, 0 | 1 | 511) {
        return 0;
    }
    stamp(seed, frame.into())
}

/// Pages of a buffer.
#[derive(Debug)]
struct Pages {
    /// The frame of the first page of the memory.
    first: Frame,
    /// Pages of the memory, of a piece, and of the buffer.
    memory: usize,
    piece: usize,
    len: usize,
    reversed: bool,
}

impl Pages {
    /// Which page of the memory a page of the buffer is.
    fn source(&self, page: usize) -> usize {
        let pieces = self.memory / self.piece;
        let piece = page / self.piece % pieces;
        let piece = if self.reversed {
            pieces - 1 - piece
        } else {
            piece
        };
        piece * self.piece + page % self.piece
    }

    fn frame(&self, page: usize) -> Frame {
        self.first + self.source(page) as Frame
    }
}

/// What a mapping maps.
#[derive(Clone, Debug)]
enum What {
    /// A buffer from a page on.
    Buffer(Rc<Pages>, usize),
    /// Other memory from a page on, which only its number tells from more of it.
    Other(u32, usize),
}

/// A mapping, as the kernel keeps them: those of buffers are split and never joined.
#[derive(Clone, Debug)]
struct Mapping {
    len: usize,
    what: What,
    prot: i32,
    inherited: bool,
}

impl Mapping {
    /// From `by` bytes on.
    fn tail(&self, by: usize) -> Self {
        let pages = by / PAGE;
        let what = match &self.what {
            What::Buffer(buffer, page) => What::Buffer(Rc::clone(buffer), page + pages),
            What::Other(number, page) => What::Other(*number, page + pages),
        };
        Self {
            len: self.len - by,
            what,
            ..self.clone()
        }
    }

    fn is_buffer(&self) -> bool {
        matches!(self.what, What::Buffer(..))
    }
}

/// What the process sees of a page of the memory behind a buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    /// The buffer's page.
    Frame(Frame),
    /// Another one.
    Unknown,
    /// Nothing.
    Gone,
}

/// A buffer that has a descriptor, and the memory behind it.
#[derive(Debug)]
struct Slot {
    kind: Kind,
    buffer: Option<Buffer>,
    pages: Rc<Pages>,
    file: Option<OwnedFd>,
    at: usize,
    memory: Vec<Source>,
}

/// All of it.
pub struct World {
    arena: Arena,
    sources: Arena,
    device: Device,
    seed: u64,
    slots: [Option<Slot>; SLOTS],
    mappings: BTreeMap<usize, Mapping>,
    words: HashMap<Frame, u64>,
    others: HashMap<(u32, usize), u64>,
    frames: Frame,
    giants: Frame,
    numbers: u32,
    writes: u64,
    /// Places that something was mapped at or taken away from.
    places: Vec<(usize, usize)>,
    is_child: bool,
}

impl World {
    /// Nothing is mapped yet.
    pub fn new(seed: u64) -> Result<Self> {
        Ok(Self {
            arena: Arena::new(0, SIZE)?,
            sources: Arena::new(1, SLOTS * 2 * GIGA)?,
            device: Device::open()?,
            seed,
            slots: Default::default(),
            mappings: BTreeMap::new(),
            words: HashMap::new(),
            others: HashMap::new(),
            frames: 0,
            giants: 0,
            numbers: 0,
            writes: 0,
            places: Vec::new(),
            is_child: false,
        })
    }

    /// Executes a step and checks a sample of the arena. The number chooses the sample.
    pub fn step(&mut self, number: usize, step: &Step) -> Result<()> {
        self.apply(step)?;
        let mut rng = Rng::with_seed(self.seed ^ (number as u64) << 20);
        self.sample(&mut rng)
    }

    /// Checks everything, then what is left after all is closed.
    pub fn end(&mut self) -> Result<()> {
        self.layout_is_right()?;
        let starts: Vec<usize> = self.mappings.keys().copied().collect();
        for start in starts {
            let len = self.mappings[&start].len;
            let every = if len > 64 * HUGE { 13 } else { 1 };
            for at in (start..start + len).step_by(every * PAGE) {
                self.probe(at, false)?;
            }
        }
        for (at, len) in self.places.clone() {
            self.probe_around(at, len)?;
        }
        self.arena.unmap(0, SIZE).context("unmapping all")?;
        self.mappings.clear();
        for (at, len) in self.places.clone() {
            self.probe_around(at, len).context("all is unmapped")?;
        }
        for slot in 0..SLOTS {
            self.let_go(slot)?;
        }
        self.recycle().context("all is closed")
    }

    fn apply(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Create {
                slot,
                kind,
                pages,
                piece,
                reversed,
            } => self.create(slot.into(), kind, pages.into(), piece.into(), reversed),
            Step::Close { slot } => {
                if let Some(slot) = &mut self.slots[usize::from(slot) % SLOTS] {
                    slot.buffer = None;
                }
                Ok(())
            }
            Step::Harm {
                slot,
                harm,
                page,
                pages,
            } => self.harm(usize::from(slot) % SLOTS, harm, page as usize, pages.into()),
            Step::Map {
                slot,
                page,
                extent,
                to,
                prot,
                flags,
                only_if_empty,
            } => self.map(slot, page as usize, extent, to, prot, flags, only_if_empty),
            Step::MapOther { to, pages } => self.map_other(to, pages.into()),
            Step::Unmap { at, extent } => {
                let (at, len) = self.part(at, extent);
                self.arena.unmap(at, len).context("munmap")?;
                self.remove(at, len);
                Ok(())
            }
            Step::Move {
                at,
                extent,
                to,
                difference,
                keep,
            } => self.relocate(at, extent, to, difference, keep),
            Step::Resize {
                at,
                extent,
                difference,
                may_move,
            } => self.resize(at, extent, difference, may_move),
            Step::Protect { at, extent, prot } => self.protect(at, extent, prot),
            Step::Advise { at, extent, advice } => self.advise(at, extent, advice),
            Step::Lock { at, extent, lock } => {
                let (at, len) = self.part(at, extent);
                // Holes and what cannot be read are errors; page frames are passed over.
                let _ = self.arena.lock(at, len, lock);
                self.remember(at, len);
                Ok(())
            }
            Step::Touch { at, extent, write } => {
                let (at, len) = self.part(at, extent);
                let every = (len / PAGE / 1100).max(1) * PAGE;
                (at..at + len)
                    .step_by(every)
                    .try_for_each(|at| self.probe(at, write))
            }
            Step::Fork { seed, execs } => self.fork(seed, execs),
            Step::Recycle => self.recycle(),
        }
    }

    // The model.

    /// The mapping at a place, and where it begins.
    fn at(&self, at: usize) -> Option<(usize, &Mapping)> {
        let (start, mapping) = self.mappings.range(..=at).next_back()?;
        (at - start < mapping.len).then_some((*start, mapping))
    }

    /// Splits the mapping at a place in two that meet there.
    fn split(&mut self, at: usize) {
        let Some((start, mapping)) = self.at(at) else {
            return;
        };
        if start == at {
            return;
        }
        let tail = mapping.tail(at - start);
        if let Some(head) = self.mappings.get_mut(&start) {
            head.len = at - start;
        }
        self.mappings.insert(at, tail);
    }

    /// Takes out what is in a part.
    fn remove(&mut self, at: usize, len: usize) -> Vec<(usize, Mapping)> {
        self.remember(at, len);
        self.split(at);
        self.split(at + len);
        let starts: Vec<usize> = self
            .mappings
            .range(at..at + len)
            .map(|one| *one.0)
            .collect();
        starts
            .into_iter()
            .filter_map(|start| Some((start, self.mappings.remove(&start)?)))
            .collect()
    }

    fn insert(&mut self, at: usize, mapping: Mapping) {
        self.remove(at, mapping.len);
        self.mappings.insert(at, mapping);
    }

    fn remember(&mut self, at: usize, len: usize) {
        if len > 0 {
            self.places.push((at, len));
        }
        if self.places.len() > PLACES {
            // The oldest but for a few from the beginning.
            self.places.remove(PLACES / 4);
        }
    }

    fn word(&self, frame: Frame) -> u64 {
        let word = self.words.get(&frame).copied();
        word.unwrap_or_else(|| first_word(self.seed, frame))
    }

    /// The first hole in a part, if there is one.
    fn hole(&self, at: usize, len: usize) -> Option<usize> {
        let mut next = at;
        while next < at + len {
            match self.at(next) {
                Some((start, mapping)) => next = start + mapping.len,
                None => return Some(next),
            }
        }
        None
    }

    // Places.

    fn spot(&self, spot: Spot) -> usize {
        let pick = usize::from(spot.pick);
        let recent = self.places.iter().rev().find_map(|place| self.at(place.0));
        let picked = match (self.mappings.len(), spot.edge) {
            (0, _) | (_, Edge::Anywhere(_)) => None,
            // Every other time what was changed last.
            (count, _) if pick % 2 == 0 => self
                .mappings
                .iter()
                .nth(pick / 2 % count)
                .map(|(start, mapping)| (*start, mapping)),
            _ => recent,
        };
        let block = |align: usize, start: usize, len: usize| {
            let first = start.next_multiple_of(align);
            let count = (start + len).saturating_sub(first) / align;
            first + pick / 2 % (count + 1) * align
        };
        let place = match (picked, spot.edge) {
            (None, Edge::Anywhere(block)) => usize::from(block) * HUGE % SIZE,
            (None, _) => pick * HUGE % SIZE,
            (Some((start, mapping)), edge) => match edge {
                Edge::Start => start,
                Edge::End => start + mapping.len,
                Edge::Block => block(HUGE, start, mapping.len),
                Edge::Giga => block(GIGA, start, mapping.len),
                Edge::Inside(page) => start + page as usize % (mapping.len / PAGE) * PAGE,
                Edge::Anywhere(block) => usize::from(block) * HUGE % SIZE,
            },
        };
        place
            .saturating_add_signed(isize::from(spot.shift) * PAGE as isize)
            .min(SIZE - PAGE)
    }

    fn extent(&self, at: usize, extent: Extent) -> usize {
        let len = match extent {
            Extent::Pages(pages) => usize::from(pages) * PAGE,
            Extent::Rest => self
                .at(at)
                .map_or(PAGE, |(start, one)| start + one.len - at),
            Extent::Blocks(blocks) => usize::from(blocks) * HUGE,
            Extent::Giga => GIGA,
        };
        len.clamp(PAGE, SIZE - at)
    }

    fn part(&self, at: Spot, extent: Extent) -> (usize, usize) {
        let at = self.spot(at);
        (at, self.extent(at, extent))
    }

    /// Where `len` bytes go that lie at `from` modulo 2 MiB where huge entries fit.
    fn target(&self, to: Target, from: usize, len: usize) -> usize {
        let place = match to {
            Target::Block(block) => usize::from(block) * HUGE % SIZE,
            Target::Giga(giga) => usize::from(giga) * GIGA % SIZE,
            Target::Congruent(block) => usize::from(block) * HUGE % SIZE + from % HUGE,
            Target::Over(spot) => self.spot(spot),
        };
        place.min(SIZE - len)
    }

    // Steps.

    fn create(
        &mut self,
        slot: usize,
        kind: Kind,
        pages: usize,
        piece: usize,
        reversed: bool,
    ) -> Result<()> {
        let slot = slot % SLOTS;
        self.let_go(slot)?;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let huge = private | libc::MAP_HUGETLB;
        let blocks = pages % 4 + 1;
        let (len, flags, file) = match kind {
            Kind::Small => (pages * PAGE, private, None),
            Kind::Memfd => {
                let len = pages * PAGE;
                (len, libc::MAP_SHARED, Some(memfd(len, 0)?))
            }
            Kind::Transparent => (blocks * HUGE, private, None),
            Kind::Huge => (blocks * HUGE, huge, None),
            Kind::HugeFile => {
                let len = blocks * HUGE;
                let flags = libc::MFD_HUGETLB | HUGE.trailing_zeros() << libc::MFD_HUGE_SHIFT;
                (len, libc::MAP_SHARED, Some(memfd(len, flags)?))
            }
            Kind::Giga => (GIGA, huge | libc::MAP_HUGE_1GB, None),
        };
        let at = slot * 2 * GIGA;
        let fd = file.as_ref().map(AsFd::as_fd);
        match self.sources.map(at, len, RW, flags, fd, 0) {
            Ok(()) => {}
            // The pool is empty: buffers that are still mapped have the pages.
            Err(Errno::ENOMEM) if kind >= Kind::Huge => return Ok(()),
            Err(error) => return Err(error).context("mapping memory"),
        }
        let small = if kind == Kind::Transparent {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        if kind <= Kind::Transparent {
            self.sources.advise(at, len, small).context("madvise")?;
        }
        // Pinned private pages would be copied for each child.
        self.sources
            .advise(at, len, libc::MADV_DONTFORK)
            .context("MADV_DONTFORK")?;
        let count = len / PAGE;
        let first = if kind == Kind::Giga {
            self.giants += 1;
            GIANT + (self.giants - 1) * GIANT_PAGES
        } else {
            self.frames += count as Frame;
            self.frames - count as Frame
        };
        for page in 0..count {
            let word = first_word(self.seed, first + page as Frame);
            if word != 0 {
                let written = self.sources.poke(at + page * PAGE, word);
                check!(written.is_ok(), "page {page} of {kind:?}: {written:?}");
            }
        }
        let piece = piece.clamp(1, count);
        let pieces = count / piece;
        let shape = Pages {
            first,
            memory: pieces * piece,
            piece,
            len: pieces * piece,
            reversed,
        };
        let shape = if kind == Kind::Giga && reversed {
            // Twice, next to each other.
            Pages {
                memory: count,
                piece: count,
                len: 2 * count,
                ..shape
            }
        } else if kind == Kind::Giga {
            Pages {
                memory: count,
                piece: count,
                len: count,
                ..shape
            }
        } else {
            shape
        };
        let ranges: Vec<Range> = (0..shape.len / shape.piece)
            .map(|piece| {
                let page = shape.source(piece * shape.piece);
                Range {
                    addr: self.sources.address(at + page * PAGE),
                    len: (shape.piece * PAGE) as u64,
                }
            })
            .collect();
        let buffer = self.device.create(&ranges).context("PINBUF_CREATE")?;
        self.slots[slot] = Some(Slot {
            kind,
            buffer: Some(buffer),
            pages: Rc::new(shape),
            file,
            at,
            memory: (first..first + count as Frame).map(Source::Frame).collect(),
        });
        Ok(())
    }

    /// Closes a buffer and unmaps the memory; mappings stay.
    fn let_go(&mut self, slot: usize) -> Result<()> {
        if let Some(slot) = self.slots[slot].take() {
            self.sources
                .unmap(slot.at, 2 * GIGA)
                .context("unmapping memory")?;
        }
        Ok(())
    }

    fn harm(&mut self, index: usize, harm: Harm, page: usize, pages: usize) -> Result<()> {
        let Some(slot) = &mut self.slots[index] else {
            return Ok(());
        };
        let unit = match slot.kind {
            Kind::Small | Kind::Memfd | Kind::Transparent => 1,
            Kind::Huge | Kind::HugeFile => 512,
            Kind::Giga => 1 << 18,
        };
        let count = slot.memory.len();
        let page = page % count / unit * unit;
        let pages = pages.next_multiple_of(unit).min(count - page);
        let (at, len) = (slot.at + page * PAGE, pages * PAGE);
        let is_huge = unit > 1;
        let state = match harm {
            Harm::Unmap => {
                self.sources.unmap(at, len).context("munmap")?;
                Source::Gone
            }
            Harm::Replace => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                self.sources
                    .map(at, len, RW, flags, None, 0)
                    .context("mmap")?;
                self.sources
                    .advise(at, len, libc::MADV_DONTFORK)
                    .context("MADV_DONTFORK")?;
                Source::Unknown
            }
            Harm::Drop => {
                // Where a part of it is not mapped, the call fails after it has dropped the rest.
                let _ = self.sources.advise(at, len, libc::MADV_DONTNEED);
                if slot.file.is_some() {
                    // A shared file keeps its pages.
                    return Ok(());
                }
                Source::Unknown
            }
            Harm::Punch => {
                let Some(file) = &slot.file else {
                    return Ok(());
                };
                punch_hole(file, page * PAGE, len)?;
                Source::Unknown
            }
            Harm::Truncate => {
                let Some(file) = &slot.file else {
                    return Ok(());
                };
                nix::unistd::ftruncate(file, (page * PAGE) as i64).context("ftruncate")?;
                for state in &mut slot.memory[page..] {
                    *state = Source::Unknown;
                }
                return Ok(());
            }
            Harm::Merge | Harm::Collapse | Harm::Split => {
                let advice = if harm == Harm::Merge {
                    libc::MADV_MERGEABLE
                } else {
                    libc::MADV_COLLAPSE
                };
                if harm == Harm::Split && !is_huge {
                    let _ = self.sources.protect(at, len, libc::PROT_READ);
                    let _ = self.sources.protect(at, len, RW);
                } else {
                    let _ = self.sources.advise(at, len, advice);
                }
                return Ok(());
            }
            Harm::Compact => return kernel::write("/proc/sys/vm/compact_memory", "1"),
            Harm::Write => {
                for page in page..page + pages.min(64) {
                    let Source::Frame(frame) = slot.memory[page] else {
                        continue;
                    };
                    let place = slot.at + page * PAGE;
                    let word = self.words.get(&frame).copied();
                    let word = word.unwrap_or_else(|| first_word(self.seed, frame));
                    check_eq!(
                        self.sources.peek(place),
                        Ok(word),
                        "page {page} of the memory in slot {index}"
                    );
                    self.writes += 1;
                    let word = stamp(!self.seed, self.writes);
                    check_eq!(self.sources.poke(place, word), Ok(()), "writing to memory");
                    self.words.insert(frame, word);
                }
                return Ok(());
            }
        };
        for seen in &mut slot.memory[page..page + pages] {
            // Only a new mapping brings back what was unmapped.
            if *seen != Source::Gone || harm == Harm::Replace {
                *seen = state;
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "a step's fields")]
    fn map(
        &mut self,
        slot: u8,
        page: usize,
        extent: Extent,
        to: Target,
        prot: i32,
        flags: i32,
        only_if_empty: bool,
    ) -> Result<()> {
        let open = |slot: &&Slot| slot.buffer.is_some();
        let open: Vec<usize> = (0..SLOTS)
            .filter(|&slot| self.slots[slot].as_ref().is_some_and(|slot| open(&slot)))
            .collect();
        let Some(&index) = open.get(usize::from(slot) % open.len().max(1)) else {
            return Ok(());
        };
        let Some(Slot {
            buffer: Some(buffer),
            pages,
            ..
        }) = &self.slots[index]
        else {
            return Ok(());
        };
        let page = page % pages.len;
        let rest = (pages.len - page) * PAGE;
        let len = match extent {
            Extent::Rest => rest,
            Extent::Pages(pages) => usize::from(pages) * PAGE,
            Extent::Blocks(blocks) => usize::from(blocks) * HUGE,
            Extent::Giga => GIGA,
        };
        let flags = flags | libc::MAP_SHARED;
        let fd = Some(buffer.as_fd());
        let len = len.min(2 * GIGA);
        let at = self.target(to, page * PAGE, len);
        let is_empty = self.mappings.range(at..at + len).next().is_none() && self.at(at).is_none();
        if len > rest || only_if_empty {
            let expected = match (is_empty, len > rest) {
                (false, _) => Err(Errno::EEXIST),
                (true, true) => Err(Errno::EINVAL),
                (true, false) => Ok(()),
            };
            let mapped = self
                .arena
                .map_if_empty(at, len, prot, flags, fd, page * PAGE);
            check_eq!(mapped, expected, "mmap with MAP_FIXED_NOREPLACE");
            if mapped.is_err() {
                return Ok(());
            }
        } else {
            let mapped = self.arena.map(at, len, prot, flags, fd, page * PAGE);
            check_eq!(mapped, Ok(()), "mmap of {len:#x} bytes at {at:#x}");
        }
        let mapping = Mapping {
            len,
            what: What::Buffer(Rc::clone(pages), page),
            prot,
            inherited: true,
        };
        self.insert(at, mapping);
        Ok(())
    }

    fn map_other(&mut self, to: Target, pages: usize) -> Result<()> {
        let len = pages * PAGE;
        let at = self.target(to, 0, len);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.arena
            .map(at, len, RW, flags, None, 0)
            .context("mmap of other memory")?;
        self.numbers += 1;
        let mapping = Mapping {
            len,
            what: What::Other(self.numbers, 0),
            prot: RW,
            inherited: true,
        };
        self.insert(at, mapping);
        Ok(())
    }

    fn relocate(
        &mut self,
        at: Spot,
        extent: Extent,
        to: Target,
        difference: i16,
        keep: bool,
    ) -> Result<()> {
        let (at, mut len) = self.part(at, extent);
        let here = self
            .at(at)
            .map(|(start, one)| (start + one.len, one.is_buffer()));
        let is_buffer = here.is_some_and(|(_, is_buffer)| is_buffer);
        // Advice for a part of a mapping makes the kernel cut it there, which nothing but this call shows.
        let here = match here {
            Some((end, is_buffer)) => Some((end.min(self.end_of_vma(at)?), is_buffer)),
            None => None,
        };
        if let (Some((end, _)), true) = (here, keep) {
            len = len.min(end - at);
        }
        let mut new = len
            .saturating_add_signed(isize::from(difference) * PAGE as isize)
            .clamp(PAGE, SIZE - at);
        if keep || !is_buffer && new > len {
            // Other memory may grow: not what this is about.
            new = len;
        }
        let to = self.target(to, at, new.max(len));
        let overlap = at < to + new && to < at + len;
        let expected = match here {
            _ if overlap => Err(Errno::EINVAL),
            None => Err(Errno::EFAULT),
            Some(_) if keep && is_buffer => Err(Errno::EINVAL),
            Some((end, _)) if new < len && new > end - at => Err(Errno::EFAULT),
            Some(_) if new > len => Err(Errno::EFAULT),
            Some(_) => Ok(to),
        };
        let keeping = if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | keeping;
        let moved = self.arena.remap(at, len, new, flags, to);
        check_eq!(
            moved,
            expected,
            "mremap of {len:#x} bytes at {at:#x} to {new:#x} at {to:#x}, flags {flags}"
        );
        if moved.is_err() {
            self.remember(at, len);
            self.remember(to, new);
            return Ok(());
        }
        if new < len {
            self.remove(at + new, len - new);
            self.remove(to, new);
        }
        for (start, mapping) in self.remove(at, new) {
            if keep {
                // What stays is empty.
                self.numbers += 1;
                let what = What::Other(self.numbers, 0);
                self.mappings.insert(
                    start,
                    Mapping {
                        what,
                        ..mapping.clone()
                    },
                );
            }
            // Where there is a hole in the middle, what is at the new place stays.
            self.insert(start - at + to, mapping);
        }
        self.remember(at, new);
        Ok(())
    }

    fn resize(&mut self, at: Spot, extent: Extent, difference: i16, may_move: bool) -> Result<()> {
        let (at, len) = self.part(at, extent);
        let new = len
            .saturating_add_signed(isize::from(difference) * PAGE as isize)
            .clamp(PAGE, SIZE - at);
        let here = self.at(at).map(|(_, mapping)| mapping.is_buffer());
        if here == Some(false) && new > len {
            return Ok(());
        }
        let flags = if may_move { libc::MREMAP_MAYMOVE } else { 0 };
        let resized = self.arena.remap(at, len, new, flags, 0);
        let expected = match here {
            Some(_) if new <= len => Ok(at),
            _ => Err(Errno::EFAULT),
        };
        check_eq!(
            resized,
            expected,
            "mremap of {len:#x} at {at:#x} to {new:#x}"
        );
        if resized.is_ok() {
            self.remove(at + new, len - new);
        }
        self.remember(at, len);
        Ok(())
    }

    fn protect(&mut self, at: Spot, extent: Extent, prot: i32) -> Result<()> {
        let (at, len) = self.part(at, extent);
        let is_buffer = self.at(at).is_some_and(|(_, mapping)| mapping.is_buffer());
        let executable = prot & libc::PROT_EXEC != 0;
        let prot = if is_buffer {
            prot
        } else {
            prot & !libc::PROT_EXEC
        };
        let done = self.arena.protect(at, len, prot);
        let hole = self.hole(at, len);
        let end = hole.unwrap_or(at + len);
        let expected = match hole {
            _ if executable && is_buffer => Err(Errno::EACCES),
            Some(_) => Err(Errno::ENOMEM),
            None => Ok(()),
        };
        check_eq!(
            done,
            expected,
            "mprotect of {len:#x} bytes at {at:#x} to {prot}"
        );
        if executable && is_buffer {
            self.remember(at, len);
            return Ok(());
        }
        for (start, mapping) in self.remove(at, end - at) {
            self.mappings.insert(start, Mapping { prot, ..mapping });
        }
        Ok(())
    }

    /// The place where the kernel's own mapping ends that is at `at`; of what is not mapped, `at`.
    fn end_of_vma(&self, at: usize) -> Result<usize> {
        let address = self.arena.address(at);
        for line in kernel::read("/proc/self/maps")?.lines() {
            let ends = line
                .split_once(' ')
                .and_then(|(range, _)| range.split_once('-'));
            let Some((Ok(start), Ok(end))) = ends
                .map(|(start, end)| (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)))
            else {
                bail!("/proc/self/maps: {line}");
            };
            if (start..end).contains(&address) {
                return Ok(at + (end - address) as usize);
            }
        }
        Ok(at)
    }

    fn advise(&mut self, at: Spot, extent: Extent, advice: i32) -> Result<()> {
        let (at, len) = self.part(at, extent);
        let end = at + len;
        let first = self.at(at).map(|(start, _)| start).unwrap_or(at);
        if self
            .mappings
            .range(first..end)
            .any(|one| !one.1.is_buffer())
        {
            // Other memory may really be dropped.
            return Ok(());
        }
        let answer = self.arena.advise(at, len, advice);
        self.remember(at, len);
        if advice == libc::MADV_DONTFORK && matches!(answer, Ok(()) | Err(Errno::ENOMEM)) {
            for (start, mapping) in self.remove(at, len) {
                let inherited = false;
                self.mappings.insert(
                    start,
                    Mapping {
                        inherited,
                        ..mapping
                    },
                );
            }
        }
        Ok(())
    }

    fn fork(&mut self, seed: u16, execs: bool) -> Result<()> {
        if self.is_child {
            return Ok(());
        }
        let child = Child::run(|| {
            self.is_child = true;
            self.mappings.retain(|_, mapping| mapping.inherited);
            let mut rng = Rng::with_seed(seed.into());
            for _ in 0..2 {
                self.sample(&mut rng)?;
            }
            for number in 0..CHILD_STEPS {
                let step = Step::layout(&mut rng);
                self.apply(&step)
                    .and_then(|()| self.sample(&mut rng))
                    .with_context(|| format!("in the child, its step {number}, {step:?}"))?;
            }
            if execs {
                let path = c"/bin/true";
                nix::unistd::execv(path, &[path]).context("execv")?;
            }
            Ok(())
        });
        child?.join()
    }

    /// Another process takes what memory is free, and fills it. Nothing of that is seen here, and nothing
    /// that is done here is seen there.
    fn recycle(&mut self) -> Result<()> {
        if self.is_child {
            return Ok(());
        }
        let turn = Turn::new()?;
        let child = Child::run(|| {
            let filled = self.fill();
            turn.set(if filled.is_ok() { 1 } else { u64::MAX });
            let filled = filled?;
            turn.wait(2)?;
            for (arena, at, len) in filled {
                for at in secrets(at, len) {
                    check_eq!(arena.peek(at), Ok(SECRET), "another process's memory");
                }
            }
            Ok(())
        })?;
        let waited = turn.wait(1);
        let looked = waited.and_then(|()| {
            let mut rng = Rng::with_seed(self.seed);
            for (at, len) in self.places.clone() {
                self.probe_around(at, len)
                    .context("freed memory has a new owner")?;
            }
            self.sample(&mut rng)
        });
        turn.set(2);
        child.join().and(looked)
    }

    /// Takes the pools' free pages and some small ones.
    fn fill(&mut self) -> Result<Vec<(&Arena, usize, usize)>> {
        self.arena.unmap(0, SIZE)?;
        self.sources.unmap(0, self.sources.len())?;
        for slot in &mut self.slots {
            *slot = None;
        }
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let huge = private | libc::MAP_HUGETLB;
        let mut filled = Vec::new();
        let mut next = 0;
        for (len, flags, most) in [
            (GIGA, huge | libc::MAP_HUGE_1GB, 1),
            (HUGE, huge, usize::MAX),
            (SMALL_MEMORY, private, 1),
        ] {
            for _ in 0..most {
                match self.arena.map(next, len, RW, flags, None, 0) {
                    Ok(()) => {}
                    Err(Errno::ENOMEM) if flags != private => break,
                    Err(error) => return Err(error).context("taking memory"),
                }
                if flags == private {
                    self.arena.advise(next, len, libc::MADV_NOHUGEPAGE)?;
                }
                for at in secrets(next, len) {
                    check_eq!(self.arena.poke(at, SECRET), Ok(()), "new memory");
                }
                filled.push((&self.arena, next, len));
                next += len;
            }
        }
        Ok(filled)
    }

    // What is seen.

    /// Compares a page, and writes to it if it can be written, or must not be.
    fn probe(&mut self, at: usize, write: bool) -> Result<()> {
        let Some((start, mapping)) = self.at(at) else {
            let read = self.arena.peek(at);
            check!(read.is_err(), "read {read:x?} at {at:#x}, where nothing is");
            let written = self.arena.poke(at, 0xdead);
            check!(written.is_err(), "written at {at:#x}, where nothing is");
            return Ok(());
        };
        let (pages, prot) = ((at - start) / PAGE, mapping.prot);
        let (what, expected) = match &mapping.what {
            What::Buffer(buffer, page) => {
                let frame = buffer.frame(page + pages);
                (Ok(frame), self.word(frame))
            }
            What::Other(number, page) => {
                let key = (*number, page + pages);
                (Err(key), self.others.get(&key).copied().unwrap_or(0))
            }
        };
        let read = self.arena.peek(at);
        if prot & RW == 0 {
            check!(
                read.is_err(),
                "read {read:x?} at {at:#x}, which is PROT_NONE"
            );
        } else {
            check_eq!(read, Ok(expected), "at {at:#x}, page {what:x?}");
        }
        if prot & libc::PROT_WRITE == 0 {
            let written = self.arena.poke(at, 0xdead);
            check!(written.is_err(), "written at {at:#x}, which is read-only");
        } else if write && !self.is_child {
            self.writes += 1;
            let word = stamp(!self.seed, self.writes);
            check_eq!(self.arena.poke(at, word), Ok(()), "writing at {at:#x}");
            match what {
                Ok(frame) => self.words.insert(frame, word),
                Err(key) => self.others.insert(key, word),
            };
        }
        Ok(())
    }

    /// Pages around both ends of a part and around boundaries in it.
    fn probe_around(&mut self, at: usize, len: usize) -> Result<()> {
        let end = at + len;
        let middle = (at + len / 2) / HUGE * HUGE;
        let giga = at.next_multiple_of(GIGA);
        for near in [
            at,
            end,
            middle,
            giga.min(end),
            at.next_multiple_of(HUGE).min(end),
        ] {
            for at in [near.wrapping_sub(PAGE), near, near + PAGE] {
                if at < SIZE {
                    self.probe(at, false)?;
                }
            }
        }
        Ok(())
    }

    /// What the last step was about first, then some of all.
    fn sample(&mut self, rng: &mut Rng) -> Result<()> {
        let places: Vec<_> = self.places.iter().rev().take(4).copied().collect();
        for (at, len) in places {
            self.probe_around(at, len)?;
            for _ in 0..4 {
                self.probe(at + rng.usize(..len / PAGE) * PAGE, rng.bool())?;
            }
        }
        for _ in 0..3 {
            if let Some(&(at, len)) = rng.choice(&self.places) {
                self.probe_around(at, len)?;
            }
        }
        let starts: Vec<usize> = self.mappings.keys().copied().collect();
        for _ in 0..4 {
            if let Some(start) = rng.choice(&starts) {
                let at = start + rng.usize(..self.mappings[start].len / PAGE) * PAGE;
                self.probe(at, rng.bool())?;
            }
        }
        self.sample_memory(rng)
    }

    /// The memory behind the buffers.
    fn sample_memory(&mut self, rng: &mut Rng) -> Result<()> {
        if self.is_child {
            return Ok(());
        }
        for slot in self.slots.iter().flatten() {
            for page in [0, rng.usize(..slot.memory.len())] {
                let place = slot.at + page * PAGE;
                match slot.memory[page] {
                    Source::Frame(frame) => {
                        let word = self.word(frame);
                        check_eq!(
                            self.sources.peek(place),
                            Ok(word),
                            "page {page} of the memory, {:?}",
                            slot.kind
                        );
                    }
                    Source::Gone => {
                        let read = self.sources.peek(place);
                        check!(read.is_err(), "page {page} of unmapped memory: {read:x?}");
                    }
                    Source::Unknown => {}
                }
            }
        }
        Ok(())
    }

    /// The kernel's list of mappings is the model's.
    fn layout_is_right(&self) -> Result<()> {
        let base = self.arena.address(0) as usize;
        let mut seen: Vec<(usize, usize, String)> = Vec::new();
        let mut add = |start: usize, end: usize, what: String| match seen.last_mut() {
            Some(last) if last.1 == start && last.2 == what => last.1 = end,
            _ => seen.push((start, end, what)),
        };
        for line in kernel::read("/proc/self/maps")?.lines() {
            let mut words = line.split_whitespace();
            let (Some(range), Some(access)) = (words.next(), words.next()) else {
                bail!("/proc/self/maps: {line}");
            };
            let (start, end) = range.split_once('-').context("a range")?;
            let start = usize::from_str_radix(start, 16)?;
            let end = usize::from_str_radix(end, 16)?;
            if (base..base + SIZE).contains(&start) {
                add(start - base, end - base, access.to_owned());
            }
        }
        let kernels = std::mem::take(&mut seen);
        let mut add = |start: usize, end: usize, what: String| match seen.last_mut() {
            Some(last) if last.1 == start && last.2 == what => last.1 = end,
            _ => seen.push((start, end, what)),
        };
        for (start, mapping) in &self.mappings {
            let letter = |bit: i32, letter| if mapping.prot & bit != 0 { letter } else { '-' };
            let access = [
                letter(libc::PROT_READ, 'r'),
                letter(libc::PROT_WRITE, 'w'),
                letter(libc::PROT_EXEC, 'x'),
                if mapping.is_buffer() { 's' } else { 'p' },
            ];
            add(*start, start + mapping.len, access.into_iter().collect());
        }
        check_eq!(kernels, seen, "mappings");

        Ok(())
    }
}
