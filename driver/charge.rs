// SPDX-License-Identifier: GPL-2.0

//! Who answers for pinned pages, and how many they may be.
//!
//! Pages are charged before they are pinned, to the process that makes the call, whoever opened
//! the device. A [`Charge`] remembers whom and how much, so that it can be given back by anyone,
//! anywhere, later.
//!
//! Every page of a call counts, also one that is there twice or is pinned by somebody else too, as
//! for iommufd. io_uring counts compound pages whole; a framebuffer scattered over a guest's 2 MiB
//! pages would then be charged gigabytes. The other side of it: one 4 KiB page that is pinned in a
//! transparent huge page keeps 2 MiB in place.
//!
//! In this order:
//!
//! 1. *The limit.* The user's `locked_vm`, which io_uring, iommufd, perf and AF_XDP share, may not
//!    exceed the caller's `RLIMIT_MEMLOCK`; with the parameter `charge_process` the process's own
//!    `pinned_vm` takes its place, for services that run many virtual machines under one user.
//!    (iommufd compares `mm->locked_vm` in that mode. RDMA compares `pinned_vm`, as here: it takes
//!    no mmap lock, which a release in task work could not wait for, and it does not count
//!    what vfio type1 charges for the same memory, so that a virtual machine with both needs no
//!    more than each needs.) `CAP_IPC_LOCK` lifts the limit.
//! 2. *The allowance.* A buffer for which the limit has no room may be charged to an allowance of
//!    its user, by default 128 MiB, as long as all users together stay below a cap, by default a
//!    sixteenth of memory. udmabuf charges nothing; with Debian's default limit of 8 MiB a
//!    desktop user would lose the 4K framebuffers (32 MiB) that it gives. It is safe: what any
//!    number of users (65,536 subordinate ones for each are common) can pin beyond their limits is
//!    bounded by the cap, the pages are charged to their memory cgroup as ever, and who wants none
//!    of it sets `allowance_mb=0`. These pages are not added to `locked_vm`, or a user's
//!    framebuffers would keep io_uring from its own few pages.
//!
//! In every case they are added to the process's `pinned_vm`, `VmPin` in `/proc/PID/status`, as
//! io_uring's and iommufd's are.
//!
//! # Locks
//!
//! [`ALLOWANCES`] is a leaf: nothing else is taken under it, and it is held for a look-up.

use crate::{
    kernel_ext::user::{
        self,
        LockedPages,
        User, //
    },
    params, //
};
use kernel::{
    mm::Mm,
    prelude::*,
    rbtree::RBTree,
    sync::aref::ARef, //
};

/// To what pages are charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Account {
    /// The user's locked pages, under the limit.
    User,
    /// The process's pinned pages, under the limit.
    Process,
    /// The user's allowance beyond the limit.
    Allowance,
}

/// Pages charged to somebody, until the value is dropped.
///
/// # Invariants
///
/// `pages` pages are charged to `mm`'s `pinned_vm` and, according to `account`, to `user`'s
/// `locked_vm` or allowance.
pub(crate) struct Charge {
    user: User,
    mm: ARef<Mm>,
    pages: usize,
    account: Account,
}

impl Charge {
    /// Charges `pages` to the current process, or fails with `ENOMEM`.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let user = User::current();
        // A kernel thread has no pages to pin.
        let mm = user::current_mm().ok_or(EFAULT)?;
        // INVARIANT: Each branch charges what it names.
        if params::charge_process() {
            if within_limit(&user::pinned_vm(&mm), pages) {
                return Ok(Self {
                    user,
                    mm,
                    pages,
                    account: Account::Process,
                });
            }
        } else if within_limit(&user.locked_vm(), pages) {
            user::pinned_vm(&mm).add(pages);
            return Ok(Self {
                user,
                mm,
                pages,
                account: Account::User,
            });
        }
        ALLOWANCES.lock().take(user.id(), pages)?;
        user::pinned_vm(&mm).add(pages);
        Ok(Self {
            user,
            mm,
            pages,
            account: Account::Allowance,
        })
    }

    /// The pages charged.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// To what they are charged.
    pub(crate) fn account(&self) -> Account {
        self.account
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        user::pinned_vm(&self.mm).sub(self.pages);
        match self.account {
            Account::User => self.user.locked_vm().sub(self.pages),
            Account::Process => {}
            Account::Allowance => ALLOWANCES.lock().give_back(self.user.id(), self.pages),
        }
    }
}

/// Adds `pages` to `counter` if the caller's limit has room for them, or if none applies. Asks for
/// the capability last, as security modules may write that down.
fn within_limit(counter: &LockedPages<'_>, pages: usize) -> bool {
    let limit = match user::rlimit_memlock() {
        usize::MAX => usize::MAX,
        bytes => user::pages_in(bytes),
    };
    counter.try_add(pages, limit)
        || (limit != usize::MAX
            && user::may_lock_without_limit()
            && counter.try_add(pages, usize::MAX))
}

/// The caller's limit in bytes; `u64::MAX` if none applies.
pub(crate) fn limit_bytes() -> u64 {
    match user::rlimit_memlock() {
        usize::MAX => u64::MAX,
        _ if user::may_lock_without_limit() => u64::MAX,
        bytes => bytes as u64,
    }
}

/// The pages that the current user has of its allowance.
pub(crate) fn allowance_used() -> usize {
    ALLOWANCES.lock().used_by(User::current().id())
}

kernel::sync::global_lock! {
    // SAFETY: `init` initialises it before the device is registered.
    unsafe(uninit) static ALLOWANCES: Mutex<Allowances> = Allowances::new();
}

/// Prepares the accounts.
///
/// # Safety
///
/// Called once, when the module is loaded, before anything else of this file.
pub(crate) unsafe fn init() {
    // SAFETY: By the function's requirements.
    unsafe { ALLOWANCES.init() };
}

/// What users have of their allowances.
struct Allowances {
    /// Pages by [`User::id`]; `None` until the first (a tree cannot be made at compile time). A user is here while it has some; the charges then hold the user, so
    /// that its number is not another's.
    users: Option<RBTree<usize, usize>>,
    /// The sum.
    total: usize,
}

impl Allowances {
    const fn new() -> Self {
        Self {
            users: None,
            total: 0,
        }
    }

    fn used_by(&self, user: usize) -> usize {
        let pages = self.users.as_ref().and_then(|users| users.get(&user));
        pages.copied().unwrap_or(0)
    }

    fn take(&mut self, user: usize, pages: usize) -> Result {
        let total = self.total.checked_add(pages).ok_or(ENOMEM)?;
        let used = self.used_by(user).checked_add(pages).ok_or(ENOMEM)?;
        if total > params::allowance_system_pages() || used > params::allowance_pages() {
            return Err(ENOMEM);
        }
        let users = self.users.get_or_insert_with(RBTree::new);
        match users.get_mut(&user) {
            Some(entry) => *entry = used,
            None => {
                users.try_create_and_insert(user, used, GFP_KERNEL_ACCOUNT)?;
            }
        }
        self.total = total;
        Ok(())
    }

    fn give_back(&mut self, user: usize, pages: usize) {
        self.total -= pages;
        let used = self.used_by(user) - pages;
        let Some(users) = &mut self.users else {
            return;
        };
        if used == 0 {
            users.remove(&user);
        } else if let Some(entry) = users.get_mut(&user) {
            *entry = used;
        }
    }
}
