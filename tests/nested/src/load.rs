// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the kernel does to memory while virtual machines run: it merges pages, compacts memory, and splits huge pages.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, ensure, Context, Result};
use nix::errno::Errno;

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
const SIZE: usize = 16 * HUGE;

/// The pause between two rounds of work, each of which scans all of memory.
const PAUSE: Duration = Duration::from_secs(2);

/// Files that configure this work, with the value during the test and the value afterwards.
const SETTINGS: [(&str, &str, &str); 3] = [
    ("/sys/kernel/mm/ksm/run", "1", "2"),
    ("/sys/kernel/mm/ksm/pages_to_scan", "2000", "100"),
    // Of memfds too, so that QEMU's guest has huge pages to split.
    (
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always",
        "never",
    ),
];

/// A thread that makes the kernel do this work.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
    before: Counters,
}

/// The kernel's counters of this work.
struct Counters {
    split: u64,
    migrated: u64,
    compacted: u64,
}

impl Counters {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/vmstat")?;
        let number = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .with_context(|| format!("/proc/vmstat has no {name}"))
        };
        Ok(Self {
            split: number("thp_split_page ")?,
            migrated: number("pgmigrate_success ")?,
            compacted: number("compact_migrate_scanned ")?,
        })
    }
}

/// Private memory with advice for all of it.
struct Memory(*mut u8);

impl Memory {
    fn new(advice: i32) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory, wherever the kernel chooses.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, access, flags, -1, 0) };
        ensure!(memory != libc::MAP_FAILED, "mmap: {}", Errno::last());
        // SAFETY: the memory that was just mapped.
        Errno::result(unsafe { libc::madvise(memory, SIZE, advice) }).context("madvise")?;
        Ok(Self(memory.cast()))
    }

    /// Writes a byte at every `step`th offset.
    fn touch(&self, step: usize, byte: u8) {
        for offset in (0..SIZE).step_by(step) {
            // SAFETY: inside of the mapping, which is this value's alone.
            unsafe { self.0.wrapping_add(offset).write_volatile(byte) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone.
        unsafe { libc::munmap(self.0.cast(), SIZE) };
    }
}

fn put(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("{value} to {path}"))
}

/// Works until `stop`. Returns the maximum number of pages that were merged at one time.
fn work(stop: &AtomicBool) -> Result<u64> {
    let equal = Memory::new(libc::MADV_MERGEABLE)?;
    let mut most = 0;
    for round in (0..=u8::MAX).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let huge = Memory::new(libc::MADV_HUGEPAGE)?;
        huge.touch(PAGE, round);
        put("/sys/kernel/debug/split_huge_pages", "1")?;
        put("/proc/sys/vm/compact_memory", "1")?;
        // Some merged pages are written to, and merged again.
        equal.touch(if round == 0 { PAGE } else { 4 * PAGE }, round);
        std::thread::sleep(PAUSE);
        let merged = fs::read_to_string("/sys/kernel/mm/ksm/pages_sharing")?;
        most = most.max(merged.trim().parse()?);
    }
    Ok(most)
}

impl Load {
    /// Begins.
    pub fn start() -> Result<Self> {
        let before = Counters::now()?;
        for (path, meanwhile, _) in SETTINGS {
            put(path, meanwhile)?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || work(&seen));
        Ok(Self {
            stop,
            thread,
            before,
        })
    }

    /// Ends it, and returns what was done. Fails if the kernel did none of this work.
    pub fn end(self) -> Result<String> {
        self.stop.store(true, Ordering::Relaxed);
        let merged = self.thread.join().map_err(|_| anyhow!("panicked"))??;
        for (path, _, afterwards) in SETTINGS {
            put(path, afterwards)?;
        }
        let (before, now) = (self.before, Counters::now()?);
        let split = now.split - before.split;
        let migrated = now.migrated - before.migrated;
        let compacted = now.compacted - before.compacted;
        let said = format!(
            "{split} huge pages split, {migrated} pages migrated, {compacted} looked at by compaction, up to {merged} \
             pages merged by KSM"
        );
        ensure!(
            split > 0 && migrated > 0 && compacted > 0 && merged > 0,
            "the kernel had nothing to do: {said}"
        );
        Ok(said)
    }
}
