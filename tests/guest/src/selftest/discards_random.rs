// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of every kind, to which things are done at random: what is reported of each page must be what
//! writing to the buffer and reading from the memory shows.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::unistd::ftruncate;
use pinbuf_uapi::{STATE_DISCARDED, STATE_UNSURE};

use crate::discards::{buffer_of, LEN, MADV_COLLAPSE};
use pinbuf_test_harness::support::kernel::{needs_transparent_huge_pages, HugePool, Setting};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, punch_hole, stamp, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::{check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "discards_random":
    at_random within 240,
}

/// The name of private memory in transparent huge pages.
const HUGE_PAGES: &str = "private huge";

/// Memory of a kind, with what can be done to it.
struct Subject {
    name: &'static str,
    memory: Memory,
    file: Option<OwnedFd>,
    shared: bool,
    /// Its smallest part that can be discarded.
    unit: usize,
}

impl Subject {
    fn all() -> Result<Vec<Self>> {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let anonymous = |name, len, unit, flags| -> Result<Self> {
            Ok(Self {
                name,
                memory: Memory::map_aligned(len, HUGE, RW, flags, None, 0)?,
                file: None,
                shared: false,
                unit,
            })
        };
        let of_file = |name, file: OwnedFd, len, unit, shared| -> Result<Self> {
            let flags = if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
            let memory = Memory::map_aligned(len, HUGE, RW, flags, Some(file.as_fd()), 0)?;
            Ok(Self {
                name,
                memory,
                file: Some(file),
                shared,
                unit,
            })
        };
        let small = 2 * LEN;
        let all = vec![
            anonymous("private", small, PAGE, private)?,
            anonymous(HUGE_PAGES, HUGE, PAGE, private)?,
            anonymous(
                "private hugetlb",
                2 * HUGE,
                HUGE,
                private | libc::MAP_HUGETLB,
            )?,
            of_file("file", memfd(small, 0)?, small, PAGE, true)?,
            of_file("huge file", memfd(HUGE, 0)?, HUGE, PAGE, true)?,
            of_file("hugetlb file", huge_memfd(2 * HUGE)?, 2 * HUGE, HUGE, true)?,
            of_file("private of a file", memfd(small, 0)?, small, PAGE, false)?,
            of_file(
                "private of hugetlb",
                huge_memfd(2 * HUGE)?,
                2 * HUGE,
                HUGE,
                false,
            )?,
        ];
        for subject in &all {
            let len = subject.memory.len();
            if len == small {
                subject.memory.keep_small(0, len)?;
            } else if subject.unit == PAGE {
                subject.memory.advise(0, len, libc::MADV_HUGEPAGE)?;
            }
        }
        Ok(all)
    }

    /// Does something to it, which may be refused. Returns what.
    fn disturb(&mut self, number: u64) -> Result<String> {
        const GUARD_INSTALL: i32 = 102;
        const GUARD_REMOVE: i32 = 103;
        let len = self.memory.len();
        let units = len / self.unit;
        let first = (number >> 8) as usize % units;
        let count = 1 + (number >> 20) as usize % (units - first).min(4);
        let (at, part) = (first * self.unit, count * self.unit);
        let memory = &mut self.memory;
        let advices = [
            libc::MADV_DONTNEED,
            libc::MADV_PAGEOUT,
            libc::MADV_COLD,
            libc::MADV_FREE,
            libc::MADV_REMOVE,
            libc::MADV_MERGEABLE,
            MADV_COLLAPSE,
            libc::MADV_POPULATE_WRITE,
        ];
        let kind = number as usize % 20;
        let what = match (kind, &self.file) {
            (0..8, _) => format!(
                "advice {}: {:?}",
                advices[kind],
                memory.advise(at, part, advices[kind])
            ),
            (8, _) => {
                let done = memory.protect(at, part, libc::PROT_READ);
                format!("protect: {done:?} {:?}", memory.protect(at, part, RW))
            }
            (9, Some(file)) => format!("hole: {:?}", punch_hole(file, at, part).err()),
            (10, Some(file)) => {
                format!("uneven hole: {:?}", punch_hole(file, at + 100, part).err())
            }
            (11, Some(file)) => {
                let done = ftruncate(file, at as i64);
                ftruncate(file, len as i64)?;
                format!("truncate: {done:?}")
            }
            (12, _) if !self.shared && self.unit == PAGE => {
                format!("replace: {:?}", memory.replace(at, part))
            }
            (13, _) => {
                let guarded = memory.advise(at, part, GUARD_INSTALL);
                format!(
                    "guard: {guarded:?} {:?}",
                    memory.advise(at, part, GUARD_REMOVE)
                )
            }
            (14, _) => {
                Child::run(|| {
                    memory.write(at, &[1; 64]);
                    Ok(())
                })?
                .join()?;
                "fork".to_owned()
            }
            (15, _) => format!(
                "all paged out: {:?}",
                memory.advise(0, len, libc::MADV_PAGEOUT)
            ),
            (16, _) => format!(
                "clear_refs: {:?}",
                kernel::write("/proc/self/clear_refs", 4).err()
            ),
            (17, _) => format!(
                "compact: {:?}",
                kernel::write("/proc/sys/vm/compact_memory", 1).err()
            ),
            (18, _) => {
                let address = memory.at(at).cast::<libc::c_void>();
                // SAFETY: locks memory of the test.
                let locked = unsafe { libc::mlock(address, part) };
                // SAFETY: and unlocks it.
                let done = (locked, unsafe { libc::munlock(address, part) });
                format!("lock: {done:?}")
            }
            _ => "nothing".to_owned(),
        };
        Ok(format!("{what} of {part:#x} at {at:#x}"))
    }

    /// Compares the report with the facts: through a page that owner and buffer share, a write to the buffer is
    /// read from the memory.
    fn agrees(
        &self,
        device: &Device,
        buffer: &Buffer,
        mapped: &Memory,
        round: u64,
    ) -> Result<usize> {
        let report = device.discards(buffer, 64)?;
        let may_be_unsure = self.name == HUGE_PAGES && !kernel::has_page_mapcounts()?;
        let mut gone = 0;
        for offset in (0..self.memory.len()).step_by(PAGE) {
            let token = 1 << 63 | round << 32 | offset as u64;
            mapped.set(offset + 64, token);
            let is_seen = self.memory.get(offset + 64) == token;
            let state = report
                .iter()
                .find(|part| {
                    part.offset <= offset as u64 && (offset as u64) < part.offset + part.len
                })
                .map_or(0, |part| part.state);
            let expected = if is_seen { 0 } else { STATE_DISCARDED };
            if state != STATE_UNSURE || !may_be_unsure {
                check_eq!(state, expected, "{:#x} of {}", offset, self.name);
            }
            gone += usize::from(!is_seen);
        }
        Ok(gone)
    }
}

/// Whatever is done to memory of any kind, what is reported of each page is what reading and writing shows.
fn at_random() -> Result<()> {
    needs_transparent_huge_pages()?;
    let _setting = Setting::choice(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    )?;
    let _pool = HugePool::with_free(24)?;
    let device = Device::open()?;
    let begin = Instant::now();
    let (mut rounds, mut most) = (0u64, 0);
    while begin.elapsed() < Duration::from_secs(3) {
        for mut subject in Subject::all()? {
            let buffer = buffer_of(&device, &subject.memory)?;
            let mapped = buffer.map()?;
            let mut story = Vec::new();
            for _ in 0..8 {
                rounds += 1;
                story.push(subject.disturb(stamp(5, rounds) >> 1)?);
                let gone = subject
                    .agrees(&device, &buffer, &mapped, rounds)
                    .with_context(|| format!("after {story:#?}"))?;
                most = most.max(gone);
            }
        }
    }
    println!("# {rounds} rounds, at most {most} pages gone");
    Ok(())
}
