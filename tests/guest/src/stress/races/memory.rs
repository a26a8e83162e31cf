// SPDX-License-Identifier: MIT OR Apache-2.0

//! Create against other threads that change the same memory: every page of a buffer was the caller's, at that
//! address, at some moment of the call.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::unistd::ftruncate;
use pinbuf_uapi::Backing;

use super::{race, Count};
use pinbuf_test_harness::support::memory::{memfd, punch_hole, stamp, PAGE};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "races":
    munmap,
    mremap,
    discard,
    punched_hole,
    punched_file,
    truncated_file,
    fork,
}

/// What create returns for a hole.
const HOLE: &[Errno] = &[Errno::EFAULT];

/// Pages of the memory that is changed.
const PAGES: usize = 512;

/// Milliseconds for a word that is being written to be complete: its writer may not be running.
const PATIENCE: u32 = 2000;

/// Counts of the results.
#[derive(Debug, Default)]
struct Outcomes {
    buffers: Count,
    refused: Count,
}

impl Outcomes {
    /// Checks each page of a buffer, whose first page is number `first` of the memory; create may have been
    /// refused instead.
    fn take(
        &self,
        result: nix::Result<Buffer>,
        first: usize,
        refusals: &[Errno],
        expected: impl Fn(usize, u64) -> bool,
    ) -> Result<()> {
        let buffer = match result {
            Ok(buffer) => buffer,
            Err(error) if refusals.contains(&error) => {
                self.refused.up();
                return Ok(());
            }
            Err(error) => return Err(error).context("create"),
        };
        self.buffers.up();
        let mapped = buffer.map()?;
        for page in 0..mapped.len() / PAGE {
            let read = || mapped.get(page * PAGE);
            let mut seen = read();
            // The other thread may be writing that very word, byte by byte: then it will be right. A
            // page that is somebody else's never is.
            for _ in 0..PATIENCE {
                if expected(first + page, seen) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
                seen = read();
            }
            check!(
                expected(first + page, seen),
                "page {page} of a buffer from page {first} holds {seen:#x}: not the caller's"
            );
        }
        Ok(())
    }

    /// Expects both results, so that there was a race, and prints the counts.
    fn both(&self) -> Result<()> {
        self.tell();
        check!(self.refused.get() > 0, "create was never refused");
        check!(self.buffers.get() > 0, "not one buffer");
        Ok(())
    }

    fn tell(&self) {
        println!(
            "# {} buffers, {} times refused",
            self.buffers.get(),
            self.refused.get()
        );
    }
}

/// Memory that may get holes: it lies where the kernel places nothing, so that no other mapping appears in
/// them.
fn low_memory() -> Result<Memory> {
    let memory = Memory::low(PAGES * PAGE)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    Ok(memory)
}

/// Writes its number to every page.
fn stamped(memory: &Memory, seed: u64) {
    for page in 0..memory.len() / PAGE {
        memory.set(page * PAGE, stamp(seed, page as u64));
    }
}

/// Part of the memory: first page and number of pages.
fn part(rng: &mut Rng) -> (usize, usize) {
    let first = rng.usize(..PAGES);
    (first, rng.usize(1..=PAGES - first))
}

/// Makes a buffer of a part, and checks each page of it, unless there was a hole.
fn create(
    device: &Device,
    memory: &Memory,
    rng: &mut Rng,
    outcomes: &Outcomes,
    refusals: &[Errno],
    expected: impl Fn(usize, u64) -> bool,
) -> Result<()> {
    let (first, pages) = part(rng);
    let result = device.create(&[memory.part(first * PAGE, pages * PAGE)]);
    outcomes.take(result, first, refusals, expected)
}

/// Unmapped in part, and mapped again, new.
fn munmap() -> Result<()> {
    let device = Device::open()?;
    let memory = low_memory()?;
    stamped(&memory, 1);
    let outcomes = Outcomes::default();
    race(&[
        ("create", &|rng| {
            create(&device, &memory, rng, &outcomes, HOLE, |page, seen| {
                [0, stamp(1, page as u64), stamp(2, page as u64)].contains(&seen)
            })
        }),
        ("munmap", &|rng| {
            let (first, pages) = part(rng);
            memory.unmap(first * PAGE, pages * PAGE)?;
            super::pause(rng);
            memory.replace(first * PAGE, pages * PAGE)?;
            for page in first..first + pages / 2 {
                memory.set(page * PAGE, stamp(2, page as u64));
            }
            Ok(())
        }),
    ])?;
    outcomes.both()
}

/// Moved away, and back: the pages keep their numbers.
fn mremap() -> Result<()> {
    let device = Device::open()?;
    let (memory, aside) = (low_memory()?, low_memory()?);
    stamped(&memory, 1);
    let outcomes = Outcomes::default();
    let own = |page: usize, seen: u64| seen == stamp(1, page as u64);
    let move_pages = |from: &Memory, to: &Memory, first: usize, pages: usize| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let len = pages * PAGE;
        // SAFETY: both places belong to this test, and no Rust object lies in them.
        let result = unsafe {
            libc::mremap(
                from.at(first * PAGE).cast(),
                len,
                len,
                flags,
                to.at(first * PAGE),
            )
        };
        if result == libc::MAP_FAILED {
            bail!("mremap: {}", Errno::last());
        }
        Ok(())
    };
    race(&[
        ("create", &|rng| {
            create(&device, &memory, rng, &outcomes, HOLE, own)
        }),
        ("mremap", &|rng| {
            let (first, pages) = part(rng);
            move_pages(&memory, &aside, first, pages)?;
            super::pause(rng);
            move_pages(&aside, &memory, first, pages)
        }),
    ])?;
    for page in 0..PAGES {
        check!(own(page, memory.get(page * PAGE)), "page {page} in the end");
    }
    outcomes.both()
}

/// Dropped, and written again: there is never a hole.
fn discard() -> Result<()> {
    let device = Device::open()?;
    let memory = low_memory()?;
    stamped(&memory, 1);
    let outcomes = Outcomes::default();
    let dropped = Count::default();
    race(&[
        ("create", &|rng| {
            create(&device, &memory, rng, &outcomes, &[], |page, seen| {
                [0, stamp(1, page as u64)].contains(&seen)
            })
        }),
        ("MADV_DONTNEED", &|rng| {
            let (first, pages) = part(rng);
            memory.advise(first * PAGE, pages * PAGE, libc::MADV_DONTNEED)?;
            dropped.add(pages);
            for page in first..first + pages / 2 {
                memory.set(page * PAGE, stamp(1, page as u64));
            }
            Ok(())
        }),
    ])?;
    outcomes.tell();
    check!(dropped.get() > 0, "nothing was dropped");
    Ok(())
}

/// The same with a file, whose pages go while it stays mapped.
fn punched_hole() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    stamped(&memory, 1);
    let outcomes = Outcomes::default();
    let punched = Count::default();
    race(&[
        ("create", &|rng| {
            create(&device, &memory, rng, &outcomes, &[], |page, seen| {
                [0, stamp(1, page as u64)].contains(&seen)
            })
        }),
        ("punch a hole", &|rng| {
            let (first, pages) = part(rng);
            punch_hole(file.as_fd(), first * PAGE, pages * PAGE)?;
            punched.add(pages);
            for page in first..first + pages / 2 {
                memory.set(page * PAGE, stamp(1, page as u64));
            }
            Ok(())
        }),
    ])?;
    outcomes.tell();
    check!(punched.get() > 0, "nothing was punched");
    Ok(())
}

/// A file that a buffer is made of, with its backing checked, and that loses pages meanwhile. `lose`
/// takes them from a part of it; `refusals` is what create may say.
fn of_file(
    lose: impl Fn(&OwnedFd, &mut Rng) -> Result<()> + Sync,
    refusals: &[Errno],
) -> Result<Outcomes> {
    let device = Device::open()?;
    let file = File::from(memfd(PAGES * PAGE, 0)?);
    let write = |first: usize, pages: usize| -> Result<()> {
        for page in first..first + pages {
            let bytes = stamp(1, page as u64).to_ne_bytes();
            file.write_all_at(&bytes, (page * PAGE) as u64)?;
        }
        Ok(())
    };
    write(0, PAGES)?;
    let outcomes = Outcomes::default();
    let descriptor = OwnedFd::from(file.try_clone()?);
    let memory = Memory::shared(&descriptor, PAGES * PAGE)?;
    race(&[
        ("create", &|rng| {
            let (first, pages) = part(rng);
            let backing = Backing {
                fd: descriptor.as_raw_fd(),
                offset: (first * PAGE) as u64,
                ..Default::default()
            };
            let range = memory.part(first * PAGE, pages * PAGE);
            let result = device.create_checked(&[range], &[backing]);
            outcomes.take(result, first, refusals, |page, seen| {
                [0, stamp(1, page as u64)].contains(&seen)
            })
        }),
        ("lose pages", &|rng| {
            lose(&descriptor, rng)?;
            let (first, pages) = part(rng);
            write(first, pages / 2)
        }),
    ])?;
    Ok(outcomes)
}

/// What was punched out is allocated anew; a page that was pinned before does not belong to the file any more.
fn punched_file() -> Result<()> {
    let lose = |file: &OwnedFd, rng: &mut Rng| {
        let (first, pages) = part(rng);
        punch_hole(file, first * PAGE, pages * PAGE)
    };
    of_file(lose, &[Errno::EAGAIN])?.tell();
    Ok(())
}

/// What is beyond the end is refused.
fn truncated_file() -> Result<()> {
    let lose = |file: &OwnedFd, rng: &mut Rng| -> Result<()> {
        ftruncate(file, (rng.usize(..PAGES) * PAGE).try_into()?)?;
        super::pause(rng);
        ftruncate(file, (PAGES * PAGE).try_into()?)?;
        Ok(())
    };
    of_file(lose, &[Errno::EFAULT, Errno::EAGAIN])?.both()
}

/// A child that writes to its copy of the memory and ends.
fn child(memory: &Memory, rng: &mut Rng) -> Result<()> {
    let first = rng.usize(..PAGES);
    let pages = rng.usize(..=(PAGES - first).min(64));
    // SAFETY: the child makes no call but the one that ends it, and takes no lock.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::last()).context("fork"),
        0 => {
            for page in first..first + pages {
                memory.set(page * PAGE, u64::MAX);
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            Errno::result(unsafe { libc::waitpid(pid, &mut status, 0) })?;
            check_eq!(status, 0, "the child's status");
            Ok(())
        }
    }
}

/// The process forks: the buffer's pages stay the parent's, before, while and after a child writes to
/// its own.
fn fork() -> Result<()> {
    let device = Device::open()?;
    let memory = low_memory()?;
    stamped(&memory, 1);
    let buffers = Count::default();
    let token = AtomicBool::new(false);
    let look = |buffer: &Buffer, first: usize, pages: usize| -> Result<()> {
        let mapped = buffer.map()?;
        for page in 0..pages {
            let at = (first + page) * PAGE;
            check_eq!(
                mapped.get(page * PAGE),
                stamp(1, (first + page) as u64),
                "what page {page} of a buffer from page {first} holds"
            );
            // What is written on one side is seen on the other.
            let value = 2 + u64::from(token.fetch_xor(true, Ordering::Relaxed));
            mapped.set(page * PAGE + 8, value);
            check_eq!(
                memory.get(at + 8),
                value,
                "page {page}, written to the buffer"
            );
            memory.set(at + 16, value + 2);
            check_eq!(
                mapped.get(page * PAGE + 16),
                value + 2,
                "page {page}, written to the memory"
            );
        }
        Ok(())
    };
    race(&[
        ("create", &|rng| {
            let (first, pages) = part(rng);
            let buffer = device
                .create(&[memory.part(first * PAGE, pages * PAGE)])
                .context("create")?;
            buffers.up();
            super::pause(rng);
            look(&buffer, first, pages)
        }),
        ("fork", &|rng| child(&memory, rng)),
    ])?;
    println!("# {} buffers", buffers.get());
    check!(buffers.get() > 0, "not one buffer");
    Ok(())
}
