// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mappings of every size taken apart: split, protected, moved, unmapped in parts, advised about and
//! inherited, in page-table entries of every level that a mapping can have. What is left shows what it
//! showed, and no old address reaches anything, also after the memory has gone to another process.

use std::collections::HashSet;
use std::os::fd::AsFd;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use pinbuf_uapi::Range;

use pinbuf_test_harness::support::arena::Arena;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{stamp, BLOCK, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::probe::Copier;
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::turn::Turn;
use pinbuf_test_harness::support::{check, check_eq, frames, kernel, processor};
use pinbuf_test_harness::support::{Buffer, Device, Memory};

/// Makes the subtests for each shape of a mapping.
macro_rules! shapes {
    ($($theme:literal $shape:ident: $value:expr,)*) => {$(
        pub mod $shape {
            use super::*;

            const SHAPE: Shape = $value;

            fn protect() -> Result<()> {
                Case::new(&SHAPE)?.protect()
            }
            fn unmap() -> Result<()> {
                Case::new(&SHAPE)?.unmap()
            }
            fn move_elsewhere() -> Result<()> {
                Case::new(&SHAPE)?.move_elsewhere()
            }
            fn move_onto_itself() -> Result<()> {
                Case::new(&SHAPE)?.move_onto_itself()
            }
            fn resize() -> Result<()> {
                Case::new(&SHAPE)?.resize()
            }
            fn advise() -> Result<()> {
                Case::new(&SHAPE)?.advise()
            }
            fn fork() -> Result<()> {
                Case::new(&SHAPE)?.fork()
            }
            fn gone_to_another_process() -> Result<()> {
                gone(&SHAPE)
            }

            pinbuf_test_harness::tests! { $theme:
                protect within 300,
                unmap within 300,
                move_elsewhere within 300,
                move_onto_itself within 300,
                resize within 300,
                advise within 300,
                fork within 300,
                gone_to_another_process within 300,
            }
        }
    )*};
}

shapes! {
    // Page tables, several of them, across a GiB.
    "mappings.pages" pages: Shape {
        source: Source::Pages(1200),
        ranges: Ranges::Backwards(4),
        place: GIGA - 700 * PAGE,
    },
    "mappings.one_page" one_page: Shape {
        source: Source::Pages(1),
        ranges: Ranges::Whole,
        place: GIGA - PAGE,
    },
    // Huge entries on both sides of a GiB.
    "mappings.blocks" blocks: Shape {
        source: Source::Huge(5),
        ranges: Ranges::Backwards(BLOCK),
        place: GIGA - 2 * HUGE,
    },
    // The same memory, at addresses where no huge entry fits.
    "mappings.blocks_askew" blocks_askew: Shape {
        source: Source::Huge(3),
        ranges: Ranges::Backwards(BLOCK),
        place: GIGA - HUGE - PAGE,
    },
    // One extent of 1 GiB where an entry of that size would fit.
    "mappings.giga" giga: Shape {
        source: Source::Giga,
        ranges: Ranges::Whole,
        place: GIGA,
    },
    // And where it would not.
    "mappings.giga_across" giga_across: Shape {
        source: Source::Giga,
        ranges: Ranges::Whole,
        place: GIGA + 3 * HUGE,
    },
    // Two of them, next to each other.
    "mappings.giga_twice" giga_twice: Shape {
        source: Source::Giga,
        ranges: Ranges::Repeated(2),
        place: GIGA,
    },
}

/// Which memory a buffer is of.
enum Source {
    /// Pages of 4 KiB.
    Pages(usize),
    /// Pages of 2 MiB.
    Huge(usize),
    /// A page of 1 GiB.
    Giga,
}

/// In which order the buffer has it.
enum Ranges {
    /// As it is.
    Whole,
    /// In pieces of this number of pages, the last one first: no two of them are one extent.
    Backwards(usize),
    /// As it is, this number of times.
    Repeated(usize),
}

/// A buffer, and where it is mapped.
struct Shape {
    source: Source,
    ranges: Ranges,
    /// A place in the arena.
    place: usize,
}

const SEED: u64 = 40;
const SHARED: i32 = libc::MAP_SHARED;
/// From the mapping to places where it is moved to.
const AWAY: usize = 4 * GIGA;

/// What there is to see at a part of the arena.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    /// The buffer from this page on.
    Buffer(usize),
    /// The same, which cannot be written.
    ReadOnly(usize),
    /// Nothing can be read or written.
    Nothing,
}

/// A buffer, its memory, and where it is mapped.
struct Case {
    arena: Arena,
    place: usize,
    len: usize,
    buffer: Buffer,
    memory: Memory,
    /// Pages of a piece, and how many there are; the pieces are in reverse order.
    piece: usize,
    pieces: usize,
    copier: Copier,
    _pool: Option<HugePool>,
}

/// What access to it gave.
type Probed<T> = std::result::Result<T, Signal>;

impl Case {
    fn new(shape: &Shape) -> Result<Self> {
        let huge = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        let (pool, memory) = match shape.source {
            Source::Pages(pages) => (None, Memory::small_pages(pages * PAGE)?),
            Source::Huge(pages) => {
                let pool = HugePool::with_free(i64::try_from(pages)?)?;
                (Some(pool), Memory::map(pages * HUGE, RW, huge, None, 0)?)
            }
            Source::Giga => {
                let pool = HugePool::with_giga()?;
                let flags = huge | libc::MAP_HUGE_1GB;
                (Some(pool), Memory::map(GIGA, RW, flags, None, 0)?)
            }
        };
        // Pinned huge pages would have to be copied, and there are no more.
        memory.advise(0, memory.len(), libc::MADV_DONTFORK)?;
        let pages = memory.len() / PAGE;
        let (piece, ranges): (usize, Vec<Range>) = match shape.ranges {
            Ranges::Whole => (pages, vec![memory.range()]),
            Ranges::Repeated(times) => (pages, vec![memory.range(); times]),
            Ranges::Backwards(piece) => {
                let part = |index| memory.part(index * piece * PAGE, piece * PAGE);
                (piece, (0..pages / piece).rev().map(part).collect())
            }
        };
        // Before the call, as pages that it brings in itself are set apart from those of other processes.
        for page in 0..pages {
            memory.set(page * PAGE, stamp(SEED, page as u64));
        }
        let buffer = Device::open()?.create(&ranges).context("PINBUF_CREATE")?;
        Ok(Self {
            arena: Arena::new(0, 16 * GIGA)?,
            place: shape.place,
            len: buffer.len()?,
            buffer,
            memory,
            piece,
            pieces: pages / piece,
            copier: Copier::new()?,
            _pool: pool,
        })
    }

    /// The page of the memory that is this page of the buffer.
    fn source(&self, page: usize) -> usize {
        let piece = page / self.piece % self.pieces;
        (self.pieces - 1 - piece) * self.piece + page % self.piece
    }

    /// Maps all of the buffer.
    fn map_at(&self, at: usize) -> Result<()> {
        self.arena
            .map(at, self.len, RW, SHARED, Some(self.buffer.as_fd()), 0)
            .context("mapping the buffer")
    }

    /// Maps it where it belongs, and touches some of it, or nothing.
    fn fresh(&self, touched: bool) -> Result<()> {
        self.arena.unmap(0, self.arena.len())?;
        self.map_at(self.place)?;
        if touched {
            self.shows(self.place, self.len, Seen::Buffer(0))
                .context("a new mapping")?;
        }
        Ok(())
    }

    /// Checks what there is in a part of the arena. Of many pages it takes some: those at both ends, some between, and
    /// those around the boundaries of blocks, of which it leaves most out in the middle of very many.
    fn shows(&self, at: usize, len: usize, seen: Seen) -> Result<()> {
        let pages = len / PAGE;
        let first_block = at / HUGE;
        let last_block = (at + len.max(PAGE) - PAGE) / HUGE;
        let near = |page: usize| {
            let (block, in_block) = ((at / PAGE + page) / BLOCK, (at / PAGE + page) % BLOCK);
            let at_end = block < first_block + 2 || block + 2 > last_block;
            let in_sample = at_end || block % 64 == 0 || block % 64 == 63;
            pages <= 64
                || pages <= 1200 && page % 7 == 0
                || page < 2
                || page + 2 >= pages
                || in_sample && (in_block < 2 || in_block == 511)
        };
        for page in (0..pages).filter(|&page| near(page)) {
            self.shows_page(at + page * PAGE, page, seen)
                .with_context(|| format!("page {page:#x} of {pages:#x} at {at:#x}"))?;
        }
        if len > 0 && seen == Seen::Nothing {
            for at in [at, at + len - 8] {
                let refused = (Err(Errno::EFAULT), Err(Errno::EFAULT));
                let copied = self.arena.copies(&self.copier, at);
                check_eq!(copied, refused, "system calls that copy at {at:#x}");
            }
        }
        Ok(())
    }

    fn shows_page(&self, at: usize, page: usize, seen: Seen) -> Result<()> {
        let (first, writable) = match seen {
            Seen::Buffer(first) => (first, true),
            Seen::ReadOnly(first) => (first, false),
            Seen::Nothing => {
                let read = self.arena.peek(at);
                check!(read.is_err(), "read {read:x?} where nothing is");
                let written = self.arena.poke(at + 8, 1);
                check!(written.is_err(), "written where nothing is");
                return Ok(());
            }
        };
        let source = self.source(first + page);
        let expected: Probed<u64> = Ok(stamp(SEED, source as u64));
        check_eq!(self.arena.peek(at), expected, "what is read");
        let number = self.memory.get(source * PAGE + 8) + 1;
        let written = self.arena.poke(at + 8, number);
        check_eq!(written.is_ok(), writable, "whether it can be written");
        let expected = number - u64::from(!writable);
        check_eq!(
            self.memory.get(source * PAGE + 8),
            expected,
            "what the memory got"
        );
        Ok(())
    }

    /// The whole mapping but for a part shows the buffer.
    fn rest_shows(&self, at: usize, without: (usize, usize)) -> Result<()> {
        let (start, len) = without;
        let end = start + len;
        self.shows(at, start, Seen::Buffer(0))
            .context("before the part")?;
        self.shows(at + end, self.len - end, Seen::Buffer(end / PAGE))
            .context("behind the part")
    }

    /// Parts of the mapping: pages, and more than pages, at both ends and across boundaries.
    fn parts(&self) -> Vec<(usize, usize)> {
        let pages = self.len / PAGE;
        let mut parts = vec![
            (0, PAGE),
            (self.len - PAGE, PAGE),
            (pages / 2 * PAGE, PAGE),
            (0, pages.div_ceil(2) * PAGE),
            (pages / 3 * PAGE, (pages / 3).max(1) * PAGE),
        ];
        for align in [HUGE, GIGA] {
            let first = self.place.next_multiple_of(align) - self.place;
            let last = (self.place + self.len) / align * align;
            // Two pages around the boundary, a block, and a block with a page on either side.
            for boundary in [first, last.saturating_sub(self.place)] {
                parts.extend([
                    (boundary.wrapping_sub(PAGE), 2 * PAGE),
                    (boundary, align),
                    (boundary.wrapping_sub(PAGE), align + 2 * PAGE),
                ]);
            }
        }
        parts.retain(|&(start, len)| start < self.len && len <= self.len - start);
        parts.sort_unstable();
        parts.dedup();
        parts
    }

    /// Each part, in a mapping that was touched and in one that was not.
    fn each_part(&self, action: impl Fn(usize, usize) -> Result<()>) -> Result<()> {
        for touched in [true, false] {
            for (start, len) in self.parts() {
                let what = || format!("part {start:#x}+{len:#x}, touched: {touched}");
                self.fresh(touched)
                    .and_then(|()| action(start, len))
                    .with_context(what)?;
            }
        }
        Ok(())
    }

    /// A part is protected, and made accessible again.
    fn protect(&self) -> Result<()> {
        self.each_part(|start, len| {
            let (at, page) = (self.place + start, start / PAGE);
            for (prot, seen) in [
                (libc::PROT_READ, Seen::ReadOnly(page)),
                (libc::PROT_NONE, Seen::Nothing),
                (RW, Seen::Buffer(page)),
            ] {
                self.arena.protect(at, len, prot).context("mprotect")?;
                self.shows(at, len, seen)
                    .with_context(|| format!("with protection {prot}"))?;
                self.rest_shows(self.place, (start, len))?;
            }
            let executable = self
                .arena
                .protect(at, len, libc::PROT_READ | libc::PROT_EXEC);
            check_eq!(executable, Err(Errno::EACCES), "mprotect to executable");
            self.shows(at, len, Seen::Buffer(page))
        })
    }

    /// A part is unmapped, then all else.
    fn unmap(&self) -> Result<()> {
        self.each_part(|start, len| {
            let at = self.place + start;
            self.arena.unmap(at, len).context("munmap")?;
            self.shows(at, len, Seen::Nothing)
                .context("what was unmapped")?;
            self.rest_shows(self.place, (start, len))?;
            self.arena.unmap(self.place, self.len)?;
            self.shows(self.place, self.len, Seen::Nothing)
                .context("all unmapped")
        })
    }

    /// Moves with `MREMAP_FIXED`.
    fn go(&self, from: usize, len: usize, to: usize) -> Result<()> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let place = self.arena.remap(from, len, len, flags, to);
        check_eq!(place, Ok(to), "mremap of {len:#x} from {from:#x}");
        Ok(())
    }

    /// Parts and all of it move to where they fit and to where they do not, onto nothing, onto other
    /// memory, and onto another mapping of the buffer.
    fn move_elsewhere(&self) -> Result<()> {
        let away = self.place + AWAY;
        // All of it first: a part would split what is moved.
        let mut parts = self.parts();
        parts.insert(0, (0, self.len));
        for (start, len) in parts {
            let (at, page) = (self.place + start, start / PAGE);
            for (turn, to) in [away + start, away + start + PAGE, away + start + HUGE]
                .into_iter()
                .enumerate()
            {
                self.fresh(turn != 1)?;
                match turn {
                    0 => {}
                    1 => {
                        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                        self.arena.map(to, len, RW, flags, None, 0)?;
                        check_eq!(self.arena.poke(to, 1), Ok(()), "other memory");
                    }
                    _ => {
                        self.map_at(away)?;
                        self.shows(away, self.len, Seen::Buffer(0))?;
                    }
                }
                let what = || format!("part {start:#x}+{len:#x} to {to:#x}");
                self.go(at, len, to).with_context(what)?;
                self.shows(at, len, Seen::Nothing)
                    .context("the old place")
                    .with_context(what)?;
                self.shows(to, len, Seen::Buffer(page))
                    .context("the new place")
                    .with_context(what)?;
                self.rest_shows(self.place, (start, len))
                    .with_context(what)?;
                // And back.
                self.go(to, len, at).with_context(what)?;
                self.shows(to, len, Seen::Nothing).with_context(what)?;
                self.shows(self.place, self.len, Seen::Buffer(0))
                    .context("moved back")
                    .with_context(what)?;
            }
        }
        Ok(())
    }

    /// A target that overlaps is refused, and one part may replace another.
    fn move_onto_itself(&self) -> Result<()> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        self.fresh(true)?;
        let mut distances = vec![0, PAGE, HUGE, self.len / 2 / PAGE * PAGE, self.len - PAGE];
        distances.retain(|&distance| distance < self.len);
        for distance in distances {
            for to in [self.place + distance, self.place - distance.min(self.place)] {
                let moved = self.arena.remap(self.place, self.len, self.len, flags, to);
                check_eq!(moved, Err(Errno::EINVAL), "mremap onto itself, {to:#x}");
            }
            self.shows(self.place, self.len, Seen::Buffer(0))?;
        }
        // The second half replaces the first one, and a page in it another page.
        let half = self.len / 2 / PAGE * PAGE;
        if half == 0 {
            return Ok(());
        }
        for touched in [true, false] {
            self.fresh(touched)?;
            self.go(self.place + half, half, self.place)?;
            self.shows(self.place + half, half, Seen::Nothing)
                .context("the second half")?;
            self.shows(self.place, half, Seen::Buffer(half / PAGE))
                .context("the first half")?;
            let (from, to) = (self.place + half - PAGE, self.place);
            self.go(from, PAGE, to)?;
            self.shows(from, PAGE, Seen::Nothing)?;
            self.shows(to, PAGE, Seen::Buffer(self.len / 2 / PAGE * 2 - 1))?;
            let second = half / PAGE + 1;
            self.shows(to + PAGE, half - 2 * PAGE, Seen::Buffer(second))?;
        }
        Ok(())
    }

    /// A mapping becomes smaller, never larger, and leaves nothing behind when it moves.
    fn resize(&self) -> Result<()> {
        let away = self.place + AWAY;
        let maymove = libc::MREMAP_MAYMOVE;
        let fixed = maymove | libc::MREMAP_FIXED;
        self.fresh(true)?;
        for (flags, old) in [
            (0, self.len),
            (maymove, self.len),
            (fixed, self.len),
            (maymove, PAGE),
            (maymove, 0),
            (fixed, 0),
        ] {
            for new in [old + PAGE, old + HUGE, old + GIGA] {
                let grown = self.arena.remap(self.place, old, new, flags, away);
                check!(grown.is_err(), "{old:#x} grew to {new:#x}, flags {flags}");
            }
        }
        let kept = fixed | libc::MREMAP_DONTUNMAP;
        let moved = self.arena.remap(self.place, self.len, self.len, kept, away);
        check_eq!(moved, Err(Errno::EINVAL), "MREMAP_DONTUNMAP");
        self.shows(away, self.len, Seen::Nothing)?;
        self.shows(self.place, self.len, Seen::Buffer(0))
            .context("after what was refused")?;
        let mut smaller: Vec<usize> = self.parts().iter().map(|part| part.0).collect();
        smaller.retain(|&len| len > 0);
        smaller.dedup();
        for new in smaller {
            let gone = self.len - new;
            for touched in [true, false] {
                let what = || format!("to {new:#x} bytes, touched: {touched}");
                self.fresh(touched)?;
                let place = self.arena.remap(self.place, self.len, new, 0, 0);
                check_eq!(place, Ok(self.place), "mremap in place");
                self.shows(self.place + new, gone, Seen::Nothing)
                    .with_context(what)?;
                self.shows(self.place, new, Seen::Buffer(0))
                    .with_context(what)?;
                // Shrunk and moved at once.
                self.fresh(touched)?;
                let place = self.arena.remap(self.place, self.len, new, fixed, away);
                check_eq!(place, Ok(away), "mremap to another place");
                self.shows(self.place, self.len, Seen::Nothing)
                    .with_context(what)?;
                self.shows(away, new, Seen::Buffer(0)).with_context(what)?;
                self.shows(away + new, gone, Seen::Nothing)
                    .with_context(what)?;
            }
        }
        Ok(())
    }

    /// No advice takes pages away or brings others, and what would need that is refused.
    fn advise(&self) -> Result<()> {
        /// Poisons pages.
        const TESTING: [i32; 2] = [libc::MADV_HWPOISON, libc::MADV_SOFT_OFFLINE];
        /// `MADV_GUARD_INSTALL`.
        const GUARD: i32 = 102;
        let refused = [
            libc::MADV_DONTNEED,
            libc::MADV_FREE,
            libc::MADV_REMOVE,
            libc::MADV_DOFORK,
            libc::MADV_DODUMP,
            libc::MADV_WIPEONFORK,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_DONTNEED_LOCKED,
            libc::MADV_COLLAPSE,
            GUARD,
        ];
        let parts = [(0, self.len), (self.len / 2 / PAGE * PAGE, PAGE)];
        for (start, len) in parts {
            self.fresh(true)?;
            for advice in (0..=26).chain(100..=104).filter(|n| !TESTING.contains(n)) {
                let what = || format!("advice {advice} for {start:#x}+{len:#x}");
                let answer = self.arena.advise(self.place + start, len, advice);
                check!(
                    answer.is_err() || !refused.contains(&advice),
                    "{} was taken",
                    what()
                );
                self.shows(self.place, self.len, Seen::Buffer(0))
                    .with_context(what)?;
                // Advice may change what faults enter: there and back, with all entries anew. (Without
                // huge entries, of which 1 GiB has too many for each advice.)
                let askew = if len < GIGA { PAGE } else { HUGE };
                let (from, to) = (self.place + start, self.place + AWAY + start + askew);
                self.go(from, len, to).with_context(what)?;
                self.shows(from, len, Seen::Nothing).with_context(what)?;
                self.shows(to, len, Seen::Buffer(start / PAGE))
                    .with_context(what)?;
                self.go(to, len, from).with_context(what)?;
            }
        }
        Ok(())
    }

    /// A child inherits the mapping; what either does to its own does not change the other's.
    fn fork(&self) -> Result<()> {
        let turn = Turn::new()?;
        for (start, len) in self.parts() {
            let what = || format!("part {start:#x}+{len:#x}");
            let (at, page) = (self.place + start, start / PAGE);
            self.fresh(true)?;
            turn.set(0);
            let child = turn.child(|| {
                self.child_shows(self.place, self.len, 0)?;
                self.go(at, len, at + AWAY)?;
                self.child_shows_nothing(at, len)?;
                self.child_shows(at + AWAY, len, page)?;
                turn.set(1);
                turn.wait(2)?;
                // The parent has moved and unmapped its own.
                self.child_shows_nothing(at, len)?;
                self.child_shows(at + AWAY, len, page)
            })?;
            turn.wait(1).with_context(what)?;
            self.shows(self.place, self.len, Seen::Buffer(0))
                .context("the child moved its own")
                .with_context(what)?;
            self.shows(at + AWAY, len, Seen::Nothing)?;
            self.go(at, len, at + AWAY + HUGE)?;
            self.shows(at, len, Seen::Nothing).with_context(what)?;
            self.arena.unmap(at + AWAY + HUGE, len)?;
            self.shows(at + AWAY + HUGE, len, Seen::Nothing)?;
            turn.set(2);
            child.join().with_context(what)?;
            self.rest_shows(self.place, (start, len))
                .with_context(what)?;
            // What is not to be inherited is not there.
            self.fresh(true)?;
            self.arena.advise(at, len, libc::MADV_DONTFORK)?;
            Child::run(|| self.child_shows_nothing(at, len))?
                .join()
                .context("MADV_DONTFORK")
                .with_context(what)?;
            self.shows(self.place, self.len, Seen::Buffer(0))
                .with_context(what)?;
        }
        Ok(())
    }

    /// As [`shows`](Self::shows) in a child, which has not inherited the memory.
    fn child_shows(&self, at: usize, len: usize, first: usize) -> Result<()> {
        let pages = len / PAGE;
        for page in (0..pages).filter(|page| pages < 600 || page % 511 < 2 || page + 1 == pages) {
            let expected = Ok(stamp(SEED, self.source(first + page) as u64));
            let seen = self.arena.peek(at + page * PAGE);
            check_eq!(seen, expected, "in the child, {page:#x} pages from {at:#x}");
        }
        Ok(())
    }

    fn child_shows_nothing(&self, at: usize, len: usize) -> Result<()> {
        for page in (0..len / PAGE).filter(|page| len < 2 * HUGE || page % 511 < 2) {
            let seen = self.arena.peek(at + page * PAGE);
            check!(seen.is_err(), "in the child, at {at:#x}+{page:#x} pages");
        }
        Ok(())
    }
}

/// What the new owner writes.
const SECRET: u64 = 0x7365_6372_6574_2121;

/// Pages of a buffer that are looked at: all, unless there are too many.
fn places_in(len: usize) -> impl Iterator<Item = usize> {
    let every = if len < GIGA { PAGE } else { 251 * PAGE };
    (0..len).step_by(every)
}

/// The frames of these pages.
fn frames_of(memory: &Memory) -> Result<Vec<u64>> {
    let all = frames::all_frames(memory)?;
    Ok(places_in(memory.len()).map(|at| all[at / PAGE]).collect())
}

/// Takes memory of the kind, filled with the secret, until it has most of the frames. If there are few of
/// them, the kernel itself may have used them meanwhile.
fn take(source: &Source, wanted: &HashSet<u64>) -> Result<Vec<Memory>> {
    let huge = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let mut taken = Vec::new();
    let mut got = 0;
    let few = wanted.len() < 64;
    let mut room = if few {
        64 * HUGE
    } else {
        kernel::available()? / 8 * 7
    };
    while got < wanted.len().div_ceil(2) {
        let memory = match source {
            Source::Pages(_) => Memory::small_pages(HUGE)?,
            Source::Huge(pages) => Memory::map(pages * HUGE, RW, huge, None, 0)?,
            Source::Giga => Memory::map(GIGA, RW, huge | libc::MAP_HUGE_1GB, None, 0)?,
        };
        if few && memory.len() > room {
            println!("# {got} of {} frames came", wanted.len());
            break;
        }
        check!(
            memory.len() <= room,
            "{got} of {} frames came",
            wanted.len()
        );
        room -= memory.len();
        for at in places_in(memory.len()) {
            memory.set(at, SECRET);
            memory.set(at + 8, SECRET);
        }
        got += frames_of(&memory)?
            .iter()
            .filter(|frame| wanted.contains(frame))
            .count();
        taken.push(memory);
        if taken.len() == 16 {
            // Small pages may wait for the processor that freed them.
            processor::on(0)?;
        }
    }
    Ok(taken)
}

/// The memory of a closed buffer goes to another process. From no address that the mapping ever had can
/// it be read or written.
fn gone(shape: &Shape) -> Result<()> {
    // The other process is on the other processor: on this one it would drop stale translations.
    processor::on(0)?;
    let case = Case::new(shape)?;
    // Also lets go of pages that wait for their place in the lists of all pages.
    kernel::write("/proc/sys/vm/compact_memory", "1")?;
    let wanted: HashSet<u64> = frames_of(&case.memory)?.into_iter().collect();
    let turn = Turn::new()?;
    let child = {
        let (wanted, turn) = (&wanted, &turn);
        // It must not keep the buffer.
        let fd = case.buffer.as_fd();
        turn.child(move || {
            processor::on(1)?;
            nix::unistd::close(std::os::fd::AsRawFd::as_raw_fd(&fd))?;
            turn.wait(1)?;
            let taken = take(&shape.source, wanted)?;
            turn.set(2);
            turn.wait(3)?;
            for memory in &taken {
                for word in places_in(memory.len()).flat_map(|at| [at, at + 8]) {
                    check_eq!(memory.get(word), SECRET, "another process's memory");
                }
            }
            Ok(())
        })?
    };
    let Case {
        arena,
        place,
        len,
        buffer,
        memory,
        _pool: pool,
        ..
    } = case;
    let map = |at| arena.map(at, len, RW, SHARED, Some(buffer.as_fd()), 0);
    let touch = |at: usize, len: usize| -> Result<()> {
        for at in places_in(len).map(|page| at + page) {
            check!(arena.peek(at).is_ok(), "nothing at {at:#x}");
        }
        Ok(())
    };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let places = [0, AWAY, 2 * AWAY + PAGE, 3 * AWAY, 2 * GIGA].map(|away| place + away);
    // Moved twice, taken apart, and unmapped, all of it after every page was touched.
    let go = |from: usize, to: usize| {
        let place = arena.remap(from, len, len, flags, to);
        place.with_context(|| format!("mremap from {from:#x} to {to:#x}"))
    };
    map(places[0]).context("mapping the buffer")?;
    touch(places[0], len)?;
    go(places[0], places[1])?;
    touch(places[1], len)?;
    go(places[1], places[2])?;
    touch(places[2], len)?;
    if len > PAGE {
        let protected = arena.protect(places[2] + PAGE, PAGE, libc::PROT_READ);
        protected.context("mprotect")?;
        arena.unmap(places[2], PAGE).context("munmap of a page")?;
    }
    arena.unmap(places[2], len).context("munmap")?;
    // A few pages touched, moved, and unmapped untouched: nothing after the move, nor the memory's end, makes
    // the processor forget what it knows of the old place.
    drop(memory);
    map(places[3]).context("mapping the buffer again")?;
    let few = [0, len / 2 / PAGE * PAGE, len - PAGE].map(|page| places[3] + page);
    for at in few {
        touch(at, PAGE)?;
    }
    go(places[3], places[4])?;
    for at in few {
        let read = arena.peek(at);
        check!(
            read.is_err(),
            "moved, and {read:x?} is still read at {at:#x}"
        );
    }
    arena.unmap(places[4], len).context("munmap")?;
    drop(buffer);
    turn.set(1);
    turn.wait(2)?;
    let mut reached = Vec::new();
    let all = places
        .into_iter()
        .flat_map(|place| places_in(len).map(move |page| place + page));
    for at in few.into_iter().chain(all) {
        let read = arena.peek(at);
        let written = arena.poke(at + 8, 666);
        if read.is_ok() || written.is_ok() {
            reached.push((at, read, written));
        }
    }
    turn.set(3);
    let ended = child.join();
    drop(pool);
    if let Some((at, read, written)) = reached.first() {
        bail!(
            "{} pages of closed buffers are reachable, at {at:#x} first: read {read:x?} (the other \
             process wrote {SECRET:x}), write {written:?}",
            reached.len()
        );
    }
    ended.context("the other process")
}
