// SPDX-License-Identifier: GPL-2.0

//! Users, and the counters of memory that they and their processes have locked.
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
// SAFETY: A shared reference gives access to atomic fields only.
unsafe impl Sync for User {}

impl User {
    /// The current task's real user, to which the task's locked memory is charged.
    pub(crate) fn current() -> Self {
        // SAFETY: Always allowed in process context; returns a new reference.
        let user = unsafe { ffi::pinbuf_get_current_user() };
        // SAFETY: Every task has a user. INVARIANT: The new value owns the reference.
        Self(unsafe { NonNull::new_unchecked(user) })
    }

    /// The number of pages that count against the user's `RLIMIT_MEMLOCK`. io_uring, iommufd, perf
    /// and AF_XDP charge the same counter.
    pub(crate) fn locked_vm(&self) -> LockedPages<'_> {
        // SAFETY: The user is valid for as long as `self`, and the counter is only accessed
        // atomically.
        LockedPages(unsafe { Atomic::from_ptr(&raw mut (*self.0.as_ptr()).locked_vm.counter) })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, this value owns the reference.
        unsafe { bindings::free_uid(self.0.as_ptr()) }
    }
}

/// The number of pages that the process has pinned, `VmPin` in `/proc/PID/status`.
pub(crate) fn pinned_vm(mm: &Mm) -> LockedPages<'_> {
    // SAFETY: `mm` is valid, and the counter is only accessed atomically.
    LockedPages(unsafe {
        Atomic::from_ptr(&raw mut (*mm.as_raw()).__bindgen_anon_1.pinned_vm.counter)
    })
}

/// A counter of locked pages.
pub(crate) struct LockedPages<'a>(&'a Atomic<i64>);

impl LockedPages<'_> {
    /// Adds `pages`, unless the sum would exceed `limit`. Returns whether they were added.
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

    /// Subtracts `pages`, which were added before.
    pub(crate) fn sub(&self, pages: usize) {
        self.0.add(-(pages as i64), Relaxed);
    }
}

/// The current process's soft `RLIMIT_MEMLOCK` in bytes; `usize::MAX` if it is unlimited.
pub(crate) fn rlimit_memlock() -> usize {
    // SAFETY: Reads a limit of the current process.
    unsafe { ffi::pinbuf_rlimit(bindings::RLIMIT_MEMLOCK) }
}

/// Whether the current task has `CAP_IPC_LOCK` in the initial user namespace, which lifts the
/// limit. The check is not audited.
pub(crate) fn may_lock_without_limit() -> bool {
    // SAFETY: Always allowed in process context; that namespace always exists.
    unsafe {
        bindings::ns_capable_noaudit(
            &raw mut bindings::init_user_ns,
            bindings::CAP_IPC_LOCK as kernel::ffi::c_int,
        )
    }
}

/// The UID, in the initial user namespace, of the user that the current task belongs to there.
///
/// In the initial namespace, this is the task's own UID. In any other, the outermost namespace that
/// stands for one user decides. A namespace stands for its owner. If that is root, which creates
/// namespaces for other users (containers), it stands for the UID that the namespace's root has in
/// the initial one, and for no single user if that root is the host's root or is not mapped. If no
/// namespace stands for one user, this is the task's own UID.
pub(crate) fn current_host_uid() -> u32 {
    const ROOT: u32 = 0;
    const NOBODY: u32 = u32::MAX;
    let mut uid = kernel::current!().uid().into_raw().val;
    let init = &raw mut bindings::init_user_ns;
    // SAFETY: Always allowed in process context. The task's credentials hold the namespace, a
    // namespace holds its parent, and the initial one ends the chain. None of the fields that are
    // read changes while a namespace lives.
    unsafe {
        let mut ns = ffi::pinbuf_current_user_ns();
        while ns != init {
            if (*ns).owner.val != ROOT {
                uid = (*ns).owner.val;
            } else {
                match ffi::pinbuf_make_kuid(ns, ROOT).val {
                    ROOT | NOBODY => {}
                    container => uid = container,
                }
            }
            ns = (*ns).parent;
        }
    }
    uid
}

/// The machine's memory in pages.
pub(crate) fn total_pages() -> usize {
    // SAFETY: Reads a counter.
    unsafe { ffi::pinbuf_totalram_pages() }
}

/// The number of whole pages in `bytes`.
pub(crate) const fn pages_in(bytes: usize) -> usize {
    bytes >> PAGE_SHIFT
}
