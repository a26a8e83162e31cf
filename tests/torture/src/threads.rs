// SPDX-License-Identifier: MIT OR Apache-2.0

//! Several threads change and read the same part of the address space. Their order is unknown: what is seen
//! must be a page of a buffer that some thread mapped there, unchanged, or nothing.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use pinbuf_test_harness::support::arena::Arena;
use pinbuf_test_harness::support::memory::{stamp, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};

/// The part of the address space.
const SIZE: usize = 4 * GIGA;
/// Threads that change mappings, and threads that read.
const CHANGING: usize = 2;
const READING: usize = 2;

/// A buffer and its memory, each page of which begins with a word of its own.
struct Stamped {
    buffer: Buffer,
    memory: Memory,
    seed: u64,
}

impl Stamped {
    fn new(memory: Memory, seed: u64) -> Result<Self> {
        for page in 0..memory.len() / PAGE {
            memory.set(page * PAGE, Self::word(seed, page));
        }
        let buffer = Device::open()?.create(&[memory.range()])?;
        Ok(Self {
            buffer,
            memory,
            seed,
        })
    }

    /// The page in the lower half, and a check of it in the upper one.
    fn word(seed: u64, page: usize) -> u64 {
        stamp(seed, page as u64) << 32 | page as u64
    }

    fn has(&self, word: u64) -> bool {
        let page = (word & u64::from(u32::MAX)) as usize;
        page < self.memory.len() / PAGE && word == Self::word(self.seed, page)
    }
}

/// One thing that a thread does to the mappings. Any of it may fail for what another thread did.
fn change(arena: &Arena, buffers: &[Stamped], rng: &mut Rng) -> Result<()> {
    let giga = rng.usize(..SIZE / GIGA) * GIGA;
    let block = giga + rng.usize(..4) * HUGE;
    let at = if rng.bool() { giga } else { block };
    let len = *rng
        .choice(&[PAGE, 7 * PAGE, HUGE, 3 * HUGE + PAGE, GIGA])
        .unwrap_or(&PAGE);
    let len = len.min(SIZE - at);
    let answer = match rng.u32(..10) {
        0..=3 => {
            let stamped = &buffers[rng.usize(..buffers.len())];
            let len = stamped.memory.len().min(SIZE - at);
            let prot = if rng.u32(..4) == 0 {
                libc::PROT_READ
            } else {
                RW
            };
            let fd = Some(stamped.buffer.as_fd());
            arena.map(at, len, prot, libc::MAP_SHARED, fd, 0)
        }
        4..=6 => {
            let to = rng.usize(..SIZE / GIGA) * GIGA + rng.usize(..4) * HUGE;
            let to = (to + rng.usize(..2) * PAGE).min(SIZE - len);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            arena.remap(at, len, len, flags, to).map(drop)
        }
        7 => arena.protect(at, len, *rng.choice(&[RW, libc::PROT_READ]).unwrap_or(&RW)),
        8 => arena.advise(at, len, libc::MADV_NOHUGEPAGE),
        _ => arena.unmap(at, len),
    };
    check!(
        matches!(
            answer,
            Ok(()) | Err(Errno::EFAULT | Errno::EINVAL | Errno::ENOMEM)
        ),
        "{answer:?} at {at:#x}+{len:#x}"
    );
    Ok(())
}

/// Reads somewhere, and writes next to what identifies the page.
fn read(arena: &Arena, buffers: &[Stamped], rng: &mut Rng) -> Result<bool> {
    let at = rng.usize(..SIZE / GIGA) * GIGA + rng.usize(..6) * HUGE + rng.usize(..4) * PAGE;
    let at = if rng.u32(..4) == 0 {
        rng.usize(..SIZE / PAGE) * PAGE
    } else {
        at
    };
    let seen = arena.peek(at);
    let _ = arena.poke(at + 8, rng.u64(..));
    if let Ok(word) = seen {
        let known = buffers.iter().any(|stamped| stamped.has(word));
        check!(known, "{word:#x} at {at:#x} is no buffer's");
    }
    Ok(seen.is_ok())
}

/// Does all of that for this long.
pub fn run(seed: u64, seconds: Duration) -> Result<()> {
    let arena = Arena::new(0, SIZE)?;
    let huge = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let mut memory = vec![
        Memory::small_pages(PAGE)?,
        Memory::small_pages(700 * PAGE)?,
        Memory::map(3 * HUGE, RW, huge, None, 0)?,
    ];
    if let Ok(giga) = Memory::map(GIGA, RW, huge | libc::MAP_HUGE_1GB, None, 0) {
        memory.push(giga);
    }
    let buffers = memory
        .into_iter()
        .enumerate()
        .map(|(index, memory)| Stamped::new(memory, seed + index as u64))
        .collect::<Result<Vec<_>>>()?;
    let end = Instant::now() + seconds;
    let failed = AtomicBool::new(false);
    let counts = [const { AtomicU64::new(0) }; 3];
    let work = |index: usize| -> Result<()> {
        let mut rng = Rng::with_seed(seed.wrapping_mul(1000) + index as u64);
        while Instant::now() < end && !failed.load(Ordering::Relaxed) {
            let done = if index < CHANGING {
                change(&arena, &buffers, &mut rng).map(|()| 0)
            } else {
                read(&arena, &buffers, &mut rng).map(|seen| 1 + usize::from(seen))
            };
            if done.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            counts[done?].fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CHANGING + READING)
            .map(|index| {
                let work = &work;
                scope.spawn(move || work(index))
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("a thread panicked"))
    })?;
    let [changes, nothing, seen] = counts.map(AtomicU64::into_inner);
    println!("# {changes} changes, {seen} pages read, {nothing} times nothing was there");
    check!(changes > 0 && seen > 0, "the threads did nothing");
    arena.unmap(0, SIZE).context("unmapping all")?;
    for at in (0..SIZE / HUGE).flat_map(|block| [block * HUGE, block * HUGE + PAGE]) {
        check_eq!(arena.peek(at).is_ok(), false, "whether {at:#x} can be read");
    }
    Ok(())
}
