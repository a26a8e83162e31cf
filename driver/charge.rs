// SPDX-License-Identifier: GPL-2.0

//! Charging of pinned pages, and limits on how many may be pinned.
//!
//! Pages are charged before they are pinned, to the process that makes the call, whichever process
//! opened the device. A [`Charge`] records what was charged to which user and process, so that any
//! task can uncharge it later.
//!
//! What a call is checked against, in this order:
//!
//! 1. *The capability.* A process with `CAP_IPC_LOCK` has no limit, and nothing is charged to its
//!    user, as in io_uring: otherwise its pages would use up the limit of the user's processes
//!    without the capability.
//! 2. *The limit.* The pages of a buffer count against `RLIMIT_MEMLOCK`, as those of iommufd do.
//!    Each page of a call counts, also one that the call names twice or that is pinned elsewhere
//!    too. The limit is that of the calling process. It is compared with two numbers: the user's
//!    `locked_vm`, a counter shared with io_uring, iommufd, perf and AF_XDP, and the pages that all
//!    processes of the same user of the host have pinned under their limits through this driver.
//!    The latter is needed because a user namespace gives its creator 65,536 more users, each with
//!    its own `locked_vm`. (A process that runs as one of these users in the initial namespace, by
//!    means of a set-user-ID file, counts as that user: the kernel keeps no link from there to the
//!    creator. The cap for all users together bounds the allowances that are gained in this way;
//!    the limits of these users add up, as in the other subsystems that charge `locked_vm`.)
//! 3. *The allowance.* A buffer that does not fit under the limit may be charged to an allowance of
//!    its host user, by default 128 MiB, as long as all users together stay within a cap, by
//!    default a sixteenth of memory. It exists because udmabuf charges nothing: with Debian's limit
//!    of 8 MiB, a desktop user would lose the 4K framebuffers (32 MiB) that udmabuf provides. The
//!    allowance is defined by this driver alone, so it can bound the memory that is kept in place,
//!    and not only the pages that are named: large folios count as a whole ([`crate::pin`]), and
//!    each buffer counts for at least [`LEAST`] pages, which stand for the other kernel memory that
//!    it keeps.
//!
//! Pages that are charged to the allowance are not added to `locked_vm`: a user's framebuffers
//! would leave no room for the few pages that io_uring needs. In every case, pages are added to the
//! process's `pinned_vm` (`VmPin` in `/proc/PID/status`), as those of io_uring and iommufd are, and
//! memory stays charged to its memory cgroup. perf, RDMA and vhost-vdpa compare `pinned_vm` with
//! the limit: a process that uses one of these needs a limit with room for its buffers too.
//!
//! # Locks
//!
//! [`LEDGER`] is a leaf: while it is held, no other lock is taken and no memory is allocated or
//! freed. It is held for one lookup.

use crate::{
    allowances::{
        Account,
        Caps,
        Ledger, //
    },
    kernel_ext::{
        pages::CurrentMm,
        user::{
            self,
            User, //
        }, //
    },
    params, //
};
use kernel::{
    mm::Mm,
    prelude::*,
    rbtree::RBTreeNodeReservation,
    sync::aref::ARef, //
};

/// The minimum number of pages that a buffer counts for, where it is charged to an allowance: a
/// buffer whose process has exited keeps the process's `mm_struct`. With that, it takes 7.5 KiB on
/// two processors (tests/bench/RESULTS.md), and more where there are more.
const LEAST: usize = 8;

/// What pages are charged to, besides the process's `pinned_vm`.
pub(crate) enum To {
    /// The user's limit.
    Limit(User),
    /// The allowance beyond the limit.
    Allowance,
    /// Nothing: the capability lifts the limit.
    Nothing,
}

/// Pages that are charged until the value is dropped.
///
/// # Invariants
///
/// `pages` are charged to `mm`'s `pinned_vm`. If `to` is the limit, `pages` are charged to the
/// user's `locked_vm` and, in the ledger, to `uid`'s limit; if it is the allowance,
/// `pages + besides` are charged to `uid`'s allowance in the ledger.
pub(crate) struct Charge {
    mm: ARef<Mm>,
    /// The host user that the caller belongs to.
    uid: u32,
    pages: usize,
    besides: usize,
    to: To,
}

impl Charge {
    /// Charges `pages` to the current process, or fails with `ENOMEM`.
    pub(crate) fn new(mm: &CurrentMm<'_>, pages: usize) -> Result<Self> {
        let uid = user::current_host_uid();
        let (to, besides) = if user::may_lock_without_limit() {
            (To::Nothing, 0)
        } else if let Some(user) = charge_limit(uid, pages) {
            (To::Limit(user), 0)
        } else {
            let besides = LEAST.saturating_sub(pages);
            let all = pages.checked_add(besides).ok_or(ENOMEM)?;
            take(uid, Account::Allowance, all, allowance_caps())?;
            (To::Allowance, besides)
        };
        let mm: &Mm = mm.mm();
        user::pinned_vm(mm).add(pages);
        // INVARIANT: Each branch above charged what its value of `to` stands for.
        Ok(Self {
            mm: ARef::from(mm),
            uid,
            pages,
            besides,
            to,
        })
    }

    /// Makes sure that `besides` pages, which the buffer keeps in place besides its own, are
    /// charged if the buffer is charged to an allowance. Fails with `ENOMEM` if the allowance has
    /// no room.
    pub(crate) fn hold_besides(&mut self, besides: usize) -> Result {
        let more = besides.saturating_sub(self.besides);
        if more == 0 || !matches!(self.to, To::Allowance) {
            return Ok(());
        }
        take(self.uid, Account::Allowance, more, allowance_caps())?;
        // INVARIANT: `take` charged them.
        self.besides += more;
        Ok(())
    }

    /// Uncharges what was charged besides the buffer's own pages and exceeds both `besides` pages
    /// and what [`LEAST`] requires.
    pub(crate) fn settle(&mut self, besides: usize) {
        let least = LEAST.saturating_sub(self.pages);
        let less = self.besides.saturating_sub(besides.max(least));
        if less > 0 {
            // INVARIANT: `give_back` uncharges the same number of pages. (`besides` is zero unless
            // an allowance is charged.)
            self.besides -= less;
            give_back(self.uid, Account::Allowance, less);
        }
    }

    /// The number of pages that are charged.
    pub(crate) fn pages(&self) -> usize {
        self.pages + self.besides
    }

    /// What they are charged to.
    pub(crate) fn to(&self) -> &To {
        &self.to
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        user::pinned_vm(&self.mm).sub(self.pages);
        match &self.to {
            To::Limit(user) => {
                user.locked_vm().sub(self.pages);
                give_back(self.uid, Account::Limit, self.pages);
            }
            To::Allowance => give_back(self.uid, Account::Allowance, self.pages + self.besides),
            To::Nothing => {}
        }
    }
}

/// Charges `pages` to the current user's limit, if there is room.
fn charge_limit(uid: u32, pages: usize) -> Option<User> {
    let limit = limit_pages();
    let user = User::current();
    if !user.locked_vm().try_add(pages, limit) {
        return None;
    }
    let caps = Caps {
        user: limit,
        system: usize::MAX,
    };
    if take(uid, Account::Limit, pages, caps).is_err() {
        user.locked_vm().sub(pages);
        return None;
    }
    Some(user)
}

/// Charges `pages` in the ledger, or fails with `ENOMEM`.
fn take(uid: u32, account: Account, pages: usize, caps: Caps) -> Result {
    let spare = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?;
    let (result, spare) = LEDGER.lock().take(uid, account, pages, caps, Some(spare));
    // If it was not used, it is freed here, after the lock was released.
    drop(spare);
    result
}

fn give_back(uid: u32, account: Account, pages: usize) {
    let node = LEDGER.lock().give_back(uid, account, pages);
    // Freed here, after the lock was released.
    drop(node);
}

fn allowance_caps() -> Caps {
    Caps {
        user: params::allowance_pages(),
        system: params::allowance_system_pages(),
    }
}

/// The caller's limit in pages; `usize::MAX` if it is unlimited.
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

/// The number of pages that are charged to the current user's allowance.
pub(crate) fn allowance_used() -> usize {
    let usage = LEDGER.lock().of(user::current_host_uid());
    usage.of(Account::Allowance)
}

kernel::sync::global_lock! {
    // SAFETY: `init` initialises it before the device is registered.
    unsafe(uninit) static LEDGER: Mutex<Ledger> = Ledger::new();
}

/// Prepares the ledger.
///
/// # Safety
///
/// Called once, when the module is loaded, before any other function of this file.
pub(crate) unsafe fn init() {
    // SAFETY: By the function's requirements.
    unsafe { LEDGER.init() };
}
