// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a process and its children take turns without giving the processor away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::memory::RW;
use super::process::Child;
use super::{Memory, PAGE};

/// A number in memory that a process and its children share.
#[derive(Debug)]
pub struct Turn(Memory);

impl Turn {
    /// How long a process waits for the other one.
    const PATIENCE: Duration = Duration::from_secs(200);

    /// Zero at first.
    pub fn new() -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Ok(Self(Memory::map(PAGE, RW, flags, None, 0)?))
    }

    fn number(&self) -> &AtomicU64 {
        // SAFETY: aligned, mapped as long as `self` lives, and accessed as an atomic alone.
        unsafe { AtomicU64::from_ptr(self.0.at(0).cast()) }
    }

    /// A child. After it failed, nothing waits for it.
    pub fn child(&self, action: impl FnOnce() -> Result<()>) -> Result<Child> {
        Child::run(|| {
            let result = action();
            if result.is_err() {
                self.set(u64::MAX);
            }
            result
        })
    }

    /// Changes it.
    pub fn set(&self, number: u64) {
        self.number().store(number, Ordering::Release);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.number().load(Ordering::Acquire)
    }

    /// Waits for this number, or a larger one, without giving up the processor: another task would change the
    /// page tables in use, which drops stale translations.
    pub fn wait(&self, number: u64) -> Result<()> {
        let deadline = Instant::now() + Self::PATIENCE;
        while self.get() < number {
            crate::check!(Instant::now() < deadline, "the other process is late");
            std::hint::spin_loop();
        }
        Ok(())
    }
}
