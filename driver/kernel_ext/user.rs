// SPDX-License-Identifier: GPL-2.0

//! Users, and the counters of memory that they and their processes hold locked.
//!
//! C headers: [`include/linux/sched/user.h`](srctree/include/linux/sched/user.h),
//! [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h).

use crate::ffi;
use core::ptr::NonNull;
use kernel::{
    bindings,
    mm::Mm,
    page::PAGE_SHIFT,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// A reference to the accounting record of a user, `struct user_struct`.
///
/// # Invariants
///
/// The pointer is valid, and this value owns one of its references.
pub(crate) struct User(NonNull<bindings::user_struct>);

// SAFETY: `user_struct` is reference-counted and may be used and released by any task.
unsafe impl Send for User {}
// SAFETY: All that a shared reference gives access to is atomic.
unsafe impl Sync for User {}

impl User {
    /// The current task's real user, who answers for what the task locks.
    pub(crate) fn current() -> Self {
        // SAFETY: Always allowed in process context; returns a new reference.
        let user = unsafe { ffi::pinbuf_get_current_user() };
        // SAFETY: Every task has a user. INVARIANT: The reference becomes ours.
        Self(unsafe { NonNull::new_unchecked(user) })
    }

    /// The pages that count against the user's `RLIMIT_MEMLOCK`, whoever charged them: this
    /// counter is shared with io_uring, iommufd, perf and AF_XDP.
    pub(crate) fn locked_vm(&self) -> LockedPages<'_> {
        // SAFETY: The user is valid for as long as `self`, and the counter is only accessed
        // atomically.
        LockedPages(unsafe { Atomic::from_ptr(&raw mut (*self.0.as_ptr()).locked_vm.counter) })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours to drop.
        unsafe { bindings::free_uid(self.0.as_ptr()) }
    }
}

/// The pages that the process has pinned, `VmPin` in `/proc/PID/status`.
pub(crate) fn pinned_vm(mm: &Mm) -> LockedPages<'_> {
    // SAFETY: `mm` is valid, and the counter is only accessed atomically.
    LockedPages(unsafe {
        Atomic::from_ptr(&raw mut (*mm.as_raw()).__bindgen_anon_1.pinned_vm.counter)
    })
}

/// A counter of locked pages.
pub(crate) struct LockedPages<'a>(&'a Atomic<i64>);

impl LockedPages<'_> {
    /// Adds `pages`, unless the sum would exceed `limit`; whether it was added.
    pub(crate) fn try_add(&self, pages: usize, limit: usize) -> bool {
        let Ok(pages) = i64::try_from(pages) else {
            return false;
        };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut seen = self.0.load(Relaxed);
        loop {
            let Some(sum) = seen.checked_add(pages).filter(|sum| *sum <= limit) else {
                return false;
            };
            match self.0.cmpxchg(seen, sum, Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }

    /// Adds `pages`, without a limit.
    pub(crate) fn add(&self, pages: usize) {
        self.0.add(pages as i64, Relaxed);
    }

    /// Takes off `pages` that were added before.
    pub(crate) fn sub(&self, pages: usize) {
        self.0.add(-(pages as i64), Relaxed);
    }
}

/// The current process's soft `RLIMIT_MEMLOCK` in bytes; `usize::MAX` for none.
pub(crate) fn rlimit_memlock() -> usize {
    // SAFETY: Reads a limit of the current process.
    unsafe { ffi::pinbuf_rlimit(bindings::RLIMIT_MEMLOCK) }
}

/// Whether the current task has `CAP_IPC_LOCK` in the initial user namespace, which lifts the
/// limit. Leaves no trace in an audit log.
pub(crate) fn may_lock_without_limit() -> bool {
    // SAFETY: Always allowed in process context; that namespace is always there.
    unsafe {
        bindings::ns_capable_noaudit(
            &raw mut bindings::init_user_ns,
            bindings::CAP_IPC_LOCK as kernel::ffi::c_int,
        )
    }
}

/// The number, in the initial user namespace, of the user that the current task belongs to there.
///
/// Its own, or, in a user namespace, that of the user who made the outermost one. Where that is root, who
/// made it for others (a container), it is the container's root, as the initial namespace knows it, or
/// the task's own where the two are the same.
pub(crate) fn current_host_uid() -> u32 {
    const ROOT: u32 = 0;
    const NOBODY: u32 = u32::MAX;
    let own = kernel::current!().uid().into_raw().val;
    let init = &raw mut bindings::init_user_ns;
    // SAFETY: Always allowed in process context. The task's credentials hold the namespace, a
    // namespace holds its parent, and the initial one ends the chain. None of the fields that are read
    // changes while a namespace lives.
    unsafe {
        let mut ns = ffi::pinbuf_current_user_ns();
        if ns == init {
            return own;
        }
        while (*ns).parent != init {
            ns = (*ns).parent;
        }
        if (*ns).owner.val != ROOT {
            return (*ns).owner.val;
        }
        match bindings::make_kuid(ns, ROOT).val {
            ROOT | NOBODY => own,
            container => container,
        }
    }
}

/// The machine's memory in pages.
pub(crate) fn total_pages() -> usize {
    // SAFETY: Reads a counter.
    unsafe { ffi::pinbuf_totalram_pages() }
}

/// Bytes to whole pages.
pub(crate) const fn pages_in(bytes: usize) -> usize {
    bytes >> PAGE_SHIFT
}
