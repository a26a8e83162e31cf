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
//!    more than each needs. All that io_uring, iommufd and pinbuf pinned for the process is in it.)
//! 2. *The capability.* Who has `CAP_IPC_LOCK` may go on without a limit. What it pins then is not
//!    added to `locked_vm`, as nobody adds it there: it would take the room of processes of the
//!    same user that lack the capability, root's containers for example.
//! 3. *The allowance.* A buffer for which there is no room may be charged to an allowance of
//!    its user, by default 128 MiB, as long as all users together stay below a cap, by default a
//!    sixteenth of memory. udmabuf charges nothing; with Debian's default limit of 8 MiB a
//!    desktop user would lose the 4K framebuffers (32 MiB) that it gives. It is safe: what all
//!    users can pin beyond their limits is bounded by the cap, one user cannot have it all (in a
//!    user namespace, allowances are those of who made it, so that subordinate users bring
//!    none of their own), the pages are charged to their memory cgroup as ever, and who wants
//!    none of it sets `allowance_mb=0`. These pages are not added to `locked_vm` either, or a
//!    user's framebuffers would keep io_uring from its own few pages.
//!
//! In every case they are added to the process's `pinned_vm`, `VmPin` in `/proc/PID/status`, as
//! io_uring's and iommufd's are.
//!
//! # Locks
//!
//! [`ALLOWANCES`] is a leaf: nothing else is taken under it, no memory is allocated or freed, and
//! it is held for a look-up.

use crate::{
    allowances::{
        Allowances,
        Caps, //
    },
    kernel_ext::user::{
        self,
        User, //
    },
    params, //
};
use kernel::{
    mm::Mm,
    prelude::*,
    rbtree::RBTreeNodeReservation,
    sync::aref::ARef, //
};

/// To what pages are charged, besides the process's `pinned_vm`.
pub(crate) enum Account {
    /// The user's locked pages, under the limit.
    User(User),
    /// The process's pinned pages, under the limit.
    Process,
    /// The allowance, beyond the limit, of the user of this number.
    Allowance(u32),
    /// Nothing: the limit had no room, and the capability lifts it.
    Nothing,
}

/// Pages charged to somebody, until the value is dropped.
///
/// # Invariants
///
/// `pages` pages are charged to `mm`'s `pinned_vm` and to what `account` names.
pub(crate) struct Charge {
    mm: ARef<Mm>,
    pages: usize,
    account: Account,
}

impl Charge {
    /// Charges `pages` to the current process, or fails with `ENOMEM`.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        // A kernel thread has no pages to pin.
        let mm = user::current_mm().ok_or(EFAULT)?;
        let pinned = user::pinned_vm(&mm);
        let limit = limit_pages();

        // INVARIANT: Each branch charges what it names.
        let account = if params::charge_process() && pinned.try_add(pages, limit) {
            Account::Process
        } else {
            let account = Self::charge_user(pages, limit)?;
            pinned.add(pages);
            account
        };
        Ok(Self { mm, pages, account })
    }

    fn charge_user(pages: usize, limit: usize) -> Result<Account> {
        if !params::charge_process() {
            let user = User::current();
            if user.locked_vm().try_add(pages, limit) {
                return Ok(Account::User(user));
            }
        }
        if user::may_lock_without_limit() {
            return Ok(Account::Nothing);
        }
        let uid = user::current_host_uid();
        let spare = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?;
        let caps = Caps {
            user: params::allowance_pages(),
            system: params::allowance_system_pages(),
        };
        let (result, spare) = ALLOWANCES.lock().take(uid, pages, caps, spare);
        // Freed, if it was not needed, without the lock.
        drop(spare);
        result?;
        Ok(Account::Allowance(uid))
    }

    /// The pages charged.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// To what they are charged.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        user::pinned_vm(&self.mm).sub(self.pages);
        match &self.account {
            Account::User(user) => user.locked_vm().sub(self.pages),
            Account::Allowance(uid) => {
                let node = ALLOWANCES.lock().give_back(*uid, self.pages);
                // Freed without the lock.
                drop(node);
            }
            Account::Process | Account::Nothing => {}
        }
    }
}

/// The caller's limit in pages; `usize::MAX` for none.
fn limit_pages() -> usize {
    match user::rlimit_memlock() {
        usize::MAX => usize::MAX,
        bytes => user::pages_in(bytes),
    }
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
    ALLOWANCES.lock().used_by(user::current_host_uid())
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
