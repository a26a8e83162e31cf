// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a run does, as plain data. What a step refers to, it names by numbers that are taken modulo what
//! there is, so that a list still means something when steps are left out of it.

use fastrand::Rng;
use pinbuf_test_harness::support::memory::RW;

/// Which memory a buffer is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Private and anonymous, in pages of 4 KiB.
    Small,
    /// A shared memfd.
    Memfd,
    /// Private and anonymous, in transparent huge pages where the kernel has them.
    Transparent,
    /// Private, in pages of 2 MiB.
    Huge,
    /// A shared memfd in pages of 2 MiB.
    HugeFile,
    /// The page of 1 GiB.
    Giga,
}

/// Where in the arena something begins.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    /// Which mapping.
    pub pick: u16,
    /// Where in it.
    pub edge: Edge,
    /// This number of pages away from that.
    pub shift: i16,
}

/// A place in a mapping.
#[derive(Clone, Copy, Debug)]
pub enum Edge {
    /// Its beginning.
    Start,
    /// Its end.
    End,
    /// A multiple of 2 MiB in it.
    Block,
    /// A multiple of 1 GiB in it.
    Giga,
    /// Any page.
    Inside(u32),
    /// Not in a mapping: this block of the arena.
    Anywhere(u16),
}

/// How far something reaches.
#[derive(Clone, Copy, Debug)]
pub enum Extent {
    /// This number of pages.
    Pages(u16),
    /// To the end of the mapping that it begins in.
    Rest,
    /// This number of blocks of 2 MiB.
    Blocks(u8),
    /// 1 GiB.
    Giga,
}

/// Where something is put.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// At this block of the arena.
    Block(u16),
    /// At this GiB of the arena.
    Giga(u8),
    /// In this block, so that huge entries still fit.
    Congruent(u16),
    /// Over what is there.
    Over(Spot),
}

/// What is done to the memory behind a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// `munmap`.
    Unmap,
    /// `mmap` of other memory over it.
    Replace,
    /// `MADV_DONTNEED`.
    Drop,
    /// A hole in the file, or what comes next to it.
    Punch,
    /// The file becomes shorter.
    Truncate,
    /// `MADV_MERGEABLE`.
    Merge,
    /// `MADV_COLLAPSE`.
    Collapse,
    /// `mprotect` of a part, there and back, which splits huge pages.
    Split,
    /// The process writes to it.
    Write,
    /// The kernel compacts all memory.
    Compact,
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A buffer of new memory, instead of the one in the slot.
    Create {
        slot: u8,
        kind: Kind,
        pages: u16,
        piece: u16,
        reversed: bool,
    },
    /// The buffer's descriptor is closed.
    Close { slot: u8 },
    /// Something happens to the memory.
    Harm {
        slot: u8,
        harm: Harm,
        page: u32,
        pages: u16,
    },
    /// `mmap` of a buffer.
    Map {
        slot: u8,
        page: u32,
        extent: Extent,
        to: Target,
        prot: i32,
        flags: i32,
        only_if_empty: bool,
    },
    /// `mmap` of other memory.
    MapOther { to: Target, pages: u16 },
    /// `munmap`.
    Unmap { at: Spot, extent: Extent },
    /// `mremap` with `MREMAP_FIXED`; to a size that differs by this number of pages.
    Move {
        at: Spot,
        extent: Extent,
        to: Target,
        difference: i16,
        keep: bool,
    },
    /// `mremap` in place.
    Resize {
        at: Spot,
        extent: Extent,
        difference: i16,
        may_move: bool,
    },
    /// `mprotect`.
    Protect { at: Spot, extent: Extent, prot: i32 },
    /// `madvise`.
    Advise {
        at: Spot,
        extent: Extent,
        advice: i32,
    },
    /// `mlock` and `munlock`.
    Lock {
        at: Spot,
        extent: Extent,
        lock: bool,
    },
    /// Pages are read, or written.
    Touch {
        at: Spot,
        extent: Extent,
        write: bool,
    },
    /// `fork`; the child does steps of its own, and perhaps execs.
    Fork { seed: u16, execs: bool },
    /// Another process gets the memory that was freed.
    Recycle,
}

/// All advice, but what poisons pages.
const ADVICE: &[i32] = &[
    0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 102, 103,
];

fn spot(rng: &mut Rng) -> Spot {
    Spot {
        pick: rng.u16(..),
        edge: match rng.u32(..12) {
            0..=3 => Edge::Start,
            4 => Edge::End,
            5 | 6 => Edge::Block,
            7 => Edge::Giga,
            8..=10 => Edge::Inside(rng.u32(..)),
            _ => Edge::Anywhere(rng.u16(..)),
        },
        shift: match rng.u32(..8) {
            0 => -1,
            1 => 1,
            2 => rng.i16(-600..600),
            _ => 0,
        },
    }
}

fn extent(rng: &mut Rng) -> Extent {
    match rng.u32(..12) {
        0..=3 => Extent::Rest,
        4..=6 => Extent::Pages(rng.u16(1..=8)),
        7 => Extent::Pages(rng.u16(500..=1100)),
        8 => Extent::Pages(512),
        9 | 10 => Extent::Blocks(rng.u8(1..=5)),
        _ => Extent::Giga,
    }
}

fn target(rng: &mut Rng) -> Target {
    match rng.u32(..8) {
        0 | 1 => Target::Block(rng.u16(..)),
        2 | 3 => Target::Giga(rng.u8(..)),
        4 | 5 => Target::Congruent(rng.u16(..)),
        _ => Target::Over(spot(rng)),
    }
}

fn protection(rng: &mut Rng) -> i32 {
    match rng.u32(..8) {
        0 => libc::PROT_NONE,
        1 | 2 => libc::PROT_READ,
        3 => libc::PROT_READ | libc::PROT_EXEC,
        _ => RW,
    }
}

impl Step {
    /// A random step that changes nothing but mappings.
    pub fn layout(rng: &mut Rng) -> Self {
        match rng.u32(..10) {
            0..=2 => Self::Unmap {
                at: spot(rng),
                extent: extent(rng),
            },
            3..=6 => Self::Move {
                at: spot(rng),
                extent: extent(rng),
                to: target(rng),
                difference: match rng.u32(..6) {
                    0 => rng.i16(-600..600),
                    1 => rng.i16(-2..=2),
                    _ => 0,
                },
                keep: rng.u32(..8) == 0,
            },
            7 => Self::Resize {
                at: spot(rng),
                extent: extent(rng),
                difference: match rng.u32(..2) {
                    0 => rng.i16(-600..600),
                    _ => rng.i16(-2..=2),
                },
                may_move: rng.bool(),
            },
            _ => Self::Protect {
                at: spot(rng),
                extent: extent(rng),
                prot: protection(rng),
            },
        }
    }

    fn any(rng: &mut Rng) -> Self {
        match rng.u32(..100) {
            0..=5 => Self::Create {
                slot: rng.u8(..),
                kind: *rng
                    .choice(&[
                        Kind::Small,
                        Kind::Small,
                        Kind::Memfd,
                        Kind::Transparent,
                        Kind::Huge,
                        Kind::HugeFile,
                        Kind::Giga,
                        Kind::Giga,
                    ])
                    .unwrap_or(&Kind::Small),
                pages: match rng.u32(..4) {
                    0 => 1,
                    1 => rng.u16(1..=16),
                    _ => rng.u16(1..=1300),
                },
                piece: *rng.choice(&[1, 4, 100, 512, u16::MAX]).unwrap_or(&1),
                reversed: rng.bool(),
            },
            6 | 7 => Self::Close { slot: rng.u8(..) },
            8..=15 => Self::Harm {
                slot: rng.u8(..),
                harm: match rng.u32(..40) {
                    0..=3 => Harm::Unmap,
                    4..=7 => Harm::Replace,
                    8..=11 => Harm::Drop,
                    12..=15 => Harm::Punch,
                    16..=18 => Harm::Truncate,
                    19..=22 => Harm::Merge,
                    23..=25 => Harm::Collapse,
                    26..=31 => Harm::Split,
                    32 => Harm::Compact,
                    _ => Harm::Write,
                },
                page: if rng.bool() { 0 } else { rng.u32(..) },
                pages: match rng.u32(..3) {
                    0 => rng.u16(1..=8),
                    1 => 512,
                    _ => u16::MAX,
                },
            },
            16..=31 => Self::Map {
                slot: rng.u8(..),
                page: match rng.u32(..6) {
                    0 => rng.u32(..),
                    1 => rng.u32(..) / 512 * 512,
                    _ => 0,
                },
                extent: if rng.bool() {
                    Extent::Rest
                } else {
                    extent(rng)
                },
                to: match rng.u32(..4) {
                    0 => Target::Giga(rng.u8(..)),
                    _ => target(rng),
                },
                prot: match protection(rng) {
                    prot if prot & libc::PROT_EXEC != 0 => libc::PROT_READ,
                    prot => prot,
                },
                flags: *rng
                    .choice(&[
                        0,
                        0,
                        0,
                        0,
                        libc::MAP_POPULATE,
                        libc::MAP_LOCKED,
                        libc::MAP_NORESERVE,
                    ])
                    .unwrap_or(&0),
                only_if_empty: rng.u32(..8) == 0,
            },
            32..=35 => Self::MapOther {
                to: target(rng),
                pages: rng.u16(1..=40),
            },
            36..=68 => Self::layout(rng),
            69..=77 => Self::Advise {
                at: spot(rng),
                extent: extent(rng),
                advice: *rng.choice(ADVICE).unwrap_or(&0),
            },
            78..=80 => Self::Lock {
                at: spot(rng),
                extent: extent(rng),
                lock: rng.bool(),
            },
            81..=96 => Self::Touch {
                at: spot(rng),
                extent: extent(rng),
                write: rng.bool(),
            },
            97..=98 => Self::Fork {
                seed: rng.u16(..),
                execs: rng.u32(..3) == 0,
            },
            _ => Self::Recycle,
        }
    }
}

/// The steps of a seed: the same ones each time. Fewer of them are the first of more.
pub fn generate(seed: u64, count: usize) -> Vec<Step> {
    let mut rng = Rng::with_seed(seed);
    (0..count).map(|_| Step::any(&mut rng)).collect()
}
