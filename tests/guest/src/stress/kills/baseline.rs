// SPDX-License-Identifier: MIT OR Apache-2.0

//! Counters and kernel objects that victims must leave as they were.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};

use super::victims::collect_sockets;
use pinbuf_test_harness::accounts::{Accounts, Charges};
use pinbuf_test_harness::support::{check, kernel};

/// The tests' user, root, and users of namespaces.
pub const USERS: usize = 4;

/// How long the kernel may take to release what the last victims held.
const PATIENCE: Duration = Duration::from_secs(30);

/// Memory that may be missing, as caches of allocators grow with use.
const SLACK: i64 = 48 << 20;
/// The same where KASAN quarantines freed memory, up to a thirty-second of all memory.
const SLACK_OF_CHECKERS: i64 = 256 << 20;

/// Kills in an interval from which on a leak for each exceeds the noise, which is some tens of objects.
const ENOUGH: usize = 100;

/// With fewer intervals, a number may grow in all of them by chance.
const FEW: usize = 6;

/// Whether the kernel finds leaks itself.
fn has_kmemleak() -> bool {
    Path::new("/sys/kernel/debug/kmemleak").exists()
}

/// What must have its old value once the last victim is gone.
#[derive(Clone, Debug, PartialEq)]
struct Counters {
    kernel: kernel::Counters,
    vm_pin: i64,
    /// For each user: whether a page can be locked up to the limit, and the allowance.
    charges: [Charges; USERS],
}

/// The state before the first victim, and the kernel objects after each interval.
pub struct Baseline {
    accounts: Accounts<USERS>,
    counters: Counters,
    /// Kills between two comparisons.
    interval: usize,
    /// Numbers of objects of the kernel's after each interval.
    objects: Vec<BTreeMap<String, i64>>,
    free: i64,
}

impl Baseline {
    /// The state of the moment.
    pub fn new(mut accounts: Accounts<USERS>, interval: usize) -> Result<Self> {
        let counters = Self::count(&mut accounts)?;
        for charges in &counters.charges {
            check!(
                !charges.locked && charges.room && charges.allowance == 0,
                "a user of the test's has something already: {charges:?}"
            );
        }
        Ok(Self {
            accounts,
            counters,
            interval,
            objects: Vec::new(),
            free: 0,
        })
    }

    fn count(accounts: &mut Accounts<USERS>) -> Result<Counters> {
        Ok(Counters {
            kernel: kernel::Counters::now()?,
            vm_pin: kernel::vm_pin()?,
            charges: accounts.charges()?,
        })
    }

    /// Waits until all counters are back.
    pub fn is_reached(&mut self, number: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            collect_sockets()?;
            let now = Self::count(&mut self.accounts)?;
            if now == self.counters {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "left behind after {PATIENCE:?}: expected {:#?}, seen {now:#?}",
                    self.counters
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let free = give_back_stocks()?;
        let objects = kernel::objects()?;
        // Caches are filled in the first interval: later ones are compared with its end.
        if number == 1 {
            self.free = free;
        } else {
            let slack = if has_kmemleak() {
                SLACK_OF_CHECKERS
            } else {
                SLACK
            };
            check!(
                free > self.free - slack,
                "memory is lost: {} MiB were free after {} kills, and {} MiB are now",
                self.free >> 20,
                self.interval,
                free >> 20
            );
        }
        self.objects.push(objects);
        Ok(())
    }

    /// No number of objects may have grown in every interval, by one for fifty kills, or by one for five if there
    /// are fewer than [`FEW`] intervals.
    ///
    /// On kernels with kmemleak, kmemleak finds such objects, and KASAN delays the freeing of others.
    pub fn is_kept(&self) -> Result<()> {
        if has_kmemleak() || self.objects.len() < 3 || self.interval < ENOUGH {
            return Ok(());
        }
        let each = if self.objects.len() < FEW { 5 } else { 50 };
        let least = i64::try_from(self.interval / each)?;
        let at = |objects: &BTreeMap<String, i64>, name: &str| *objects.get(name).unwrap_or(&0);
        let grown: Vec<_> = self.objects[0]
            .keys()
            .filter(|name| {
                self.objects
                    .windows(2)
                    .all(|pair| at(&pair[1], name) - at(&pair[0], name) >= least)
            })
            .map(|name| {
                let numbers: Vec<_> = self.objects.iter().map(|all| at(all, name)).collect();
                format!("{name}: {numbers:?}")
            })
            .collect();
        check!(
            grown.is_empty(),
            "of these there are more after each {} kills: {}",
            self.interval,
            grown.join("; ")
        );
        Ok(())
    }
}

/// Waits for an RCU grace period, and for the callbacks, which run soon after it.
fn wait_for_rcu() {
    // SAFETY: takes no memory.
    unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) };
    std::thread::sleep(Duration::from_millis(200));
}

/// Empties the caches of allocators, so that objects can be counted, and returns how much memory is free.
fn give_back_stocks() -> Result<i64> {
    kernel::write("/proc/sys/vm/drop_caches", "3")?;
    wait_for_rcu();
    if let Ok(caches) = std::fs::read_dir("/sys/kernel/slab") {
        for cache in caches {
            // A cache may be destroyed meanwhile.
            let _ = std::fs::write(cache?.path().join("shrink"), "1");
        }
    }
    // Each file that was opened there leaves a `struct kernfs_open_node`, which is freed after a grace period, and counts
    // until a batch of sixty is full. So the caches of its size are emptied once more, in two steps.
    for _ in 0..2 {
        wait_for_rcu();
        for size in [64, 128, 96] {
            let _ = std::fs::write(format!("/sys/kernel/slab/kmalloc-{size}/shrink"), "1");
        }
    }
    Ok(kernel::field("/proc/meminfo", "MemFree")? << 10)
}
