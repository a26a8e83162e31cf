// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where calls went in the module: the kernel's coverage of one task, by program counter.
//!
//! See `Documentation/dev-tools/kcov.rst`. Only what was compiled with `KCOV_INSTRUMENT` is seen,
//! and on the debug kernel that is pinbuf alone.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::kernel;

const PATH: &str = "/sys/kernel/debug/kcov";
/// Program counters that are kept of one execution; the rest of a longer one is not seen.
const ENTRIES: usize = 1 << 17;
/// Edges that are recognised without a search.
const RECENT: usize = 4096;
const TRACE_PC: libc::c_int = 0;

nix::ioctl_write_int_bad!(
    init_trace,
    nix::request_code_read!(b'c', 1, size_of::<libc::c_ulong>())
);
nix::ioctl_write_int_bad!(enable, nix::request_code_none!(b'c', 100));

/// Two points of the module that followed each other, relative to where it is loaded.
pub type Edge = (u32, u32);

/// The coverage of one task at a time.
#[derive(Debug)]
pub struct Kcov {
    file: File,
    area: *mut u64,
    module: Range<u64>,
}

impl Kcov {
    /// Prepares it. `None` if the kernel has none.
    pub fn open() -> Result<Option<Self>> {
        if !Path::new(PATH).exists() {
            return Ok(None);
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open(PATH)
            .with_context(|| format!("opening {PATH}"))?;
        // SAFETY: takes a number.
        unsafe { init_trace(file.as_raw_fd(), ENTRIES as libc::c_int) }
            .context("KCOV_INIT_TRACE")?;
        // SAFETY: a new mapping, of what was made above.
        let area = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ENTRIES * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if area == libc::MAP_FAILED {
            bail!("mapping {PATH}: {}", Errno::last());
        }
        Ok(Some(Self {
            file,
            area: area.cast(),
            module: module()?,
        }))
    }

    /// Forgets what was seen so far.
    pub fn clear(&self) {
        self.word(0).store(0, Ordering::Relaxed);
    }

    /// In the task itself: it is seen from here on, until it ends.
    pub fn enable(&self) -> Result<()> {
        // SAFETY: takes a number.
        unsafe { enable(self.file.as_raw_fd(), TRACE_PC) }.context("KCOV_ENABLE")?;
        Ok(())
    }

    /// What the task went through since the last [`clear`](Self::clear): its edges, each once; how many program counters
    /// there were, and how many of them in the module.
    pub fn edges(&self) -> (Vec<Edge>, (usize, usize)) {
        let count = (self.word(0).load(Ordering::Relaxed) as usize).min(ENTRIES - 1);
        let mut seen = HashSet::new();
        // Loops go through the same few edges again and again: those are recognised without a search.
        let mut recent = [(0, 0); RECENT];
        let mut edges = Vec::new();
        let mut last = 0;
        let mut inside = 0;
        for index in 1..=count {
            let at = self.word(index).load(Ordering::Relaxed);
            if self.module.contains(&at) {
                inside += 1;
                let point = (at - self.module.start) as u32;
                let edge = (last, point);
                last = point;
                let slot = &mut recent[(edge.0.wrapping_mul(31) ^ edge.1) as usize % RECENT];
                if *slot != edge {
                    *slot = edge;
                    if seen.insert(edge) {
                        edges.push(edge);
                    }
                }
            }
        }
        (edges, (count, inside))
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < ENTRIES);
        // SAFETY: inside of the mapping, which lives as long as `self`.
        let word = unsafe { self.area.add(index) };
        // SAFETY: aligned, and accessed atomically alone, as the kernel writes to it.
        unsafe { AtomicU64::from_ptr(word) }
    }
}

impl Drop for Kcov {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's.
        unsafe { libc::munmap(self.area.cast(), ENTRIES * 8) };
    }
}

/// Where the module is loaded.
fn module() -> Result<Range<u64>> {
    for line in kernel::read("/proc/modules")?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.first() == Some(&"pinbuf") {
            let size: u64 = words.get(1).context("/proc/modules")?.parse()?;
            let start = words.get(5).context("/proc/modules")?;
            let start = u64::from_str_radix(start.trim_start_matches("0x"), 16)?;
            return Ok(start..start + size);
        }
    }
    bail!("the module is not loaded")
}

/// The module's functions that no edge leads to, by their names.
pub fn not_entered(edges: &BTreeSet<Edge>) -> Result<Vec<String>> {
    let module = module()?;
    let mut functions: Vec<(u64, String)> = Vec::new();
    for line in kernel::read("/proc/kallsyms")?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, "t" | "T", name, "[pinbuf]"] = words[..] else {
            continue;
        };
        let address = u64::from_str_radix(address, 16)?;
        if module.contains(&address) {
            functions.push((address - module.start, name.to_owned()));
        }
    }
    functions.sort();
    functions.dedup_by_key(|function| function.0);
    let points: BTreeSet<u64> = edges.iter().map(|edge| u64::from(edge.1)).collect();
    let mut missing = Vec::new();
    for (index, (start, name)) in functions.iter().enumerate() {
        let end = functions.get(index + 1).map_or(u64::MAX, |next| next.0);
        if points.range(start..&end).next().is_none() {
            missing.push(format!("{:#}", rustc_demangle::demangle(name)));
        }
    }
    Ok(missing)
}
