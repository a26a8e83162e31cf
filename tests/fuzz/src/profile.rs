// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the time goes, by phase, in the parent and in its children alike.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Instant;

/// What takes time. The names are in [`NAMES`].
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Phase {
    /// Making up inputs.
    Mutate,
    /// Writing the inputs that run to a file.
    Record,
    /// `fork`, as the parent sees it.
    Fork,
    /// What an executor needs before it has an input.
    Fixture,
    /// Mapping an input's regions.
    Regions,
    /// Writing their first pages.
    Populate,
    /// Becoming the caller.
    Caller,
    /// `PINBUF_CREATE` itself.
    Create,
    /// What a create may answer.
    Forecast,
    /// Comparing the pages of a buffer with the model.
    Compare,
    /// `PINBUF_QUERY`, `PINBUF_INFO` and other ioctls.
    Ask,
    /// Mappings of buffers.
    Views,
    /// Attaching and removing importers.
    Attach,
    /// Mapping for importers.
    DeviceMap,
    /// The kernel's mappings.
    KernelMap,
    /// What importers do besides.
    Devices,
    /// Forks that an input asks for.
    Children,
    /// The memory behind the buffers.
    Memory,
    /// Giving everything back.
    Clear,
    /// Counters of the process and of the user.
    Charges,
    /// Reading what KCOV wrote.
    Coverage,
    /// The corpus.
    Corpus,
    /// All counters of the kernel.
    Check,
}

const NAMES: &[&str] = &[
    "mutate", "record", "fork", "fixture", "regions", "populate", "caller", "create", "forecast",
    "compare", "ask", "views", "attach", "devmap", "vmap", "devices", "children", "memory",
    "clear", "charges", "coverage", "corpus", "check",
];

/// Nanoseconds and how often, of each phase; shared with all children.
fn counters() -> Option<&'static [[AtomicU64; 2]]> {
    static COUNTERS: OnceLock<Option<&'static [[AtomicU64; 2]]>> = OnceLock::new();
    *COUNTERS.get_or_init(|| {
        let length = NAMES.len() * 16;
        // SAFETY: a new mapping.
        let area = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if area == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: of that length, aligned, zeroed, and never unmapped.
        Some(unsafe { std::slice::from_raw_parts(area.cast(), NAMES.len()) })
    })
}

/// Prepares it. Without this call before the first fork, children count for themselves.
pub fn start() {
    counters();
}

/// Counts until it is dropped.
#[derive(Debug)]
pub struct Timer(Phase, Instant);

/// Counts a phase from here on.
pub fn phase(phase: Phase) -> Timer {
    Timer(phase, Instant::now())
}

/// Adds to a phase what was measured otherwise.
pub fn add(phase: Phase, nanoseconds: u64) {
    if let Some(counters) = counters() {
        counters[phase as usize][0].fetch_add(nanoseconds, Ordering::Relaxed);
        counters[phase as usize][1].fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        add(self.0, self.1.elapsed().as_nanos() as u64);
    }
}

/// A line for each phase that took time, the longest first. Phases may lie in one another.
pub fn report(executions: u64) -> String {
    let mut rows: Vec<(u64, u64, &str)> = Vec::new();
    for (name, [time, count]) in NAMES.iter().zip(counters().unwrap_or_default()) {
        let count = count.load(Ordering::Relaxed);
        if count > 0 {
            rows.push((time.load(Ordering::Relaxed), count, name));
        }
    }
    rows.sort_unstable_by(|one, other| other.cmp(one));
    let mut text = String::from("time by phase (ms for each input, times, us each):\n");
    for (time, count, name) in rows {
        let _ = writeln!(
            text,
            "  {name:9} {:8.3} {count:9} {:9.1}",
            time as f64 / 1e6 / executions.max(1) as f64,
            time as f64 / 1e3 / count as f64
        );
    }
    text
}
