// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel's fault injection: the n-th of the things that can fail does.
//!
//! `Documentation/fault-injection/fault-injection.rst` of the kernel describes it. A number written to
//! a task's `fail-nth` counts down whenever that task comes to a place where a fault can be
//! injected, and at the last one it is. All kinds of faults count down the same number. Here, one
//! kind at a time does: the others are limited to callers that do not exist.
//!
//! What follows is left to probability, which is nought or certainty here: so either that one fault
//! is injected, or it and all that come after it in the call. Much is tried again in another way when
//! it fails (`kvmalloc` does, and so does `kvrealloc`, on which Rust's vectors stand), so that a lasting
//! shortage leads where a single fault does not.
//!
//! That a call meets the same places each time, and none is passed over, takes `slab_debug=F` on the
//! kernel's command line: without it the slab allocator refills its stocks now and then.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;

use pinbuf_test_harness::support::kernel::{self, Setting};

/// What can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kmalloc and the like.
    Slab,
    /// Whole pages: page tables, user memory, large or vmalloc'ed arrays.
    Page,
    /// Copying from or to user memory.
    UserCopy,
}

impl Fault {
    const ALL: [Self; 3] = [Self::Slab, Self::Page, Self::UserCopy];

    fn file(self, name: &str) -> String {
        let directory = match self {
            Self::Slab => "failslab",
            Self::Page => "fail_page_alloc",
            Self::UserCopy => "fail_usercopy",
        };
        format!("/sys/kernel/debug/{directory}/{name}")
    }
}

/// How many faults a call meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Burst {
    /// One fault.
    Single,
    /// One, and every later one.
    Lasting,
}

impl Burst {
    /// Faults at most. Not endless: when a page fault of user space fails, it is tried again for ever.
    fn times(self) -> i64 {
        match self {
            Self::Single => 1,
            Self::Lasting => 1000,
        }
    }
}

/// Where a function of the kernel's begins, and the next one does.
pub fn function(name: &str) -> Result<(u64, u64)> {
    let text = kernel::read("/proc/kallsyms")?;
    let address = |line: &str| u64::from_str_radix(line.split_whitespace().next()?, 16).ok();
    let start = text
        .lines()
        .find(|line| line.split_whitespace().nth(2) == Some(name))
        .and_then(address)
        .filter(|start| *start != 0)
        .with_context(|| format!("/proc/kallsyms has no {name}"))?;
    let end = text.lines().filter_map(address).filter(|end| *end > start);
    Ok((start, end.min().context("the last function")?))
}

/// The checkers' own caches: they allocate with every other allocation, or now and then.
const CHECKERS: [&str; 3] = [
    "kmemleak_object",
    "kmemleak_scan_area",
    "debug_objects_cache",
];

/// Lets allocations from all caches fail except for the checkers' own. Has no effect by itself.
fn mark_caches() -> Result<()> {
    for entry in std::fs::read_dir("/sys/kernel/slab")? {
        let path = entry?.path();
        let checker = CHECKERS.iter().any(|name| path.ends_with(name));
        let mark = i32::from(!checker);
        kernel::write(path.join("failslab"), mark)?;
    }
    Ok(())
}

/// Callers up to which a stack is walked; the kernel's maximum.
const DEPTH: u32 = 32;

/// Fault injection, for the thread that made this value; settings are put back when it is dropped.
#[derive(Debug)]
pub struct Injector {
    /// Of this thread: at which fault it begins.
    nth: File,
    /// Of this thread: whether probability applies to it.
    fails: File,
    settings: Vec<Setting>,
}

impl Injector {
    /// Gets ready; nothing fails yet.
    pub fn new() -> Result<Self> {
        if !Path::new(&Fault::Slab.file("probability")).exists() {
            bail!("no fault injection: boot the debug kernel");
        }
        if kernel::number("/sys/kernel/slab/kmalloc-64/sheaf_capacity")? != 0 {
            bail!("the slab allocator keeps stocks: boot with slab_debug=F");
        }
        let mut settings = Vec::new();
        let mut set = |path: String, value: String| -> Result<()> {
            settings.push(Setting::set(path, value)?);
            Ok(())
        };
        for fault in Fault::ALL {
            // Without these the kernel shows each fault with a stack.
            set(fault.file("verbose"), "0".to_owned())?;
            set(fault.file("task-filter"), "Y".to_owned())?;
            set(fault.file("interval"), "1".to_owned())?;
            set(fault.file("space"), "0".to_owned())?;
            set(fault.file("times"), "1".to_owned())?;
            set(fault.file("probability"), "100".to_owned())?;
            set(fault.file("require-start"), "0".to_owned())?;
            set(fault.file("require-end"), u64::MAX.to_string())?;
            set(fault.file("reject-start"), "0".to_owned())?;
            set(fault.file("reject-end"), "0".to_owned())?;
            set(fault.file("stacktrace-depth"), DEPTH.to_string())?;
        }
        // By default only what cannot sleep fails, and no memory of user space.
        set(Fault::Slab.file("ignore-gfp-wait"), "N".to_owned())?;
        set(Fault::Page.file("ignore-gfp-wait"), "N".to_owned())?;
        set(Fault::Page.file("ignore-gfp-highmem"), "N".to_owned())?;
        set(Fault::Page.file("min-order"), "0".to_owned())?;
        mark_caches()?;
        set(Fault::Slab.file("cache-filter"), "Y".to_owned())?;
        // The DMA API's checker switches itself off, with a complaint, when it gets no memory. It
        // has no part in what is tested.
        let (start, end) = function("debug_dma_map_sg")?;
        for fault in [Fault::Slab, Fault::Page] {
            set(fault.file("reject-start"), start.to_string())?;
            set(fault.file("reject-end"), end.to_string())?;
        }

        let of_thread = |name: &str| {
            File::options()
                .read(true)
                .write(true)
                .open(format!("/proc/thread-self/{name}"))
                .with_context(|| format!("opening {name}"))
        };
        let injector = Self {
            nth: of_thread("fail-nth")?,
            fails: of_thread("make-it-fail")?,
            settings,
        };
        injector.select(Fault::Slab)?;
        Ok(injector)
    }

    /// From now on only this kind is injected.
    pub fn select(&self, fault: Fault) -> Result<()> {
        for other in Fault::ALL {
            // No caller is below 1: a kind that requires one there never gets to counting.
            let (end, depth) = if other == fault {
                (u64::MAX, DEPTH)
            } else {
                (1, 0)
            };
            kernel::write(other.file("require-end"), end)?;
            kernel::write(other.file("stacktrace-depth"), depth)?;
        }
        Ok(())
    }

    /// Makes the call with its `n`-th fault of this kind injected, and perhaps those after it. Returns whether
    /// the call met that many.
    pub fn during<T>(
        &self,
        fault: Fault,
        burst: Burst,
        n: usize,
        call: impl FnOnce() -> T,
    ) -> Result<(T, bool)> {
        // The first fault counts, too.
        kernel::write(fault.file("times"), burst.times())?;
        let text = n.to_string();
        if burst == Burst::Lasting {
            // While `fail-nth` is above zero, it alone decides.
            self.nth
                .write_at(UNREACHED, 0)
                .and_then(|_| self.fails.write_at(b"1", 0))
                .context("writing make-it-fail")?;
        }
        self.nth
            .write_at(text.as_bytes(), 0)
            .context("writing fail-nth")?;
        let result = call();
        let mut left = [0; 16];
        // To read what is left is a user copy, too: it fails when one is.
        let injected = match self.nth.read_at(&mut left, 0) {
            Ok(count) => left[..count].trim_ascii() == b"0",
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => false,
            Err(error) => return Err(error).context("reading fail-nth"),
        };
        self.disarm()?;
        Ok((result, injected))
    }

    fn disarm(&self) -> Result<()> {
        self.fails
            .write_at(b"0", 0)
            .context("resetting make-it-fail")?;
        // The second time there is nothing left that could fail.
        let again = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EFAULT) => self.nth.write_at(b"0", 0),
            _ => Err(error),
        };
        self.nth
            .write_at(b"0", 0)
            .or_else(again)
            .context("resetting fail-nth")?;
        Ok(())
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        // Backwards: probability goes before what confines it to one thread.
        while self.settings.pop().is_some() {}
    }
}

/// A number to which no call counts.
const UNREACHED: &[u8] = b"1000000000";

/// Allocations of pages that this thread makes below a function of the kernel's fail, a number of
/// times.
#[derive(Debug)]
pub struct Refusal {
    settings: Vec<Setting>,
}

impl Refusal {
    /// From now on.
    pub fn new(function_name: &str, times: i64) -> Result<Self> {
        let (start, end) = function(function_name)?;
        let file = |name| Fault::Page.file(name);
        let settings = [
            (file("verbose"), "0".to_owned()),
            (file("ignore-gfp-wait"), "N".to_owned()),
            (file("ignore-gfp-highmem"), "N".to_owned()),
            (file("min-order"), "0".to_owned()),
            (file("stacktrace-depth"), DEPTH.to_string()),
            (file("require-start"), start.to_string()),
            (file("require-end"), end.to_string()),
            (file("task-filter"), "Y".to_owned()),
            ("/proc/thread-self/make-it-fail".to_owned(), "1".to_owned()),
            (file("interval"), "1".to_owned()),
            (file("space"), "0".to_owned()),
            (file("times"), times.to_string()),
            // The last one: it begins.
            (file("probability"), "100".to_owned()),
        ]
        .into_iter()
        .map(|(path, value)| Setting::set(path, value))
        .collect::<Result<_>>()?;
        Ok(Self { settings })
    }

    /// How many times are left.
    pub fn left(&self) -> Result<i64> {
        kernel::number(Fault::Page.file("times"))
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        // What began last ends first.
        while self.settings.pop().is_some() {}
    }
}

/// The errno of an importer's call.
pub fn errno<T>(result: std::io::Result<T>) -> nix::Result<T> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}
