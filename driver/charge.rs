// SPDX-License-Identifier: GPL-2.0

//! Who is charged for pinned pages, and how many pages may be pinned.
//!
//! Pages are charged before they are pinned, to the process that makes the call, whoever opened
//! the device. A [`Charge`] remembers whom and how much, so that any task can give it back later.
//!
//! In this order:
//!
//! 1. *The capability.* A process with `CAP_IPC_LOCK` has no limit, and nothing is charged to its
//!    user, as in io_uring: it would take the room of processes of the same user without it.
//! 2. *The limit.* The pages of a buffer count against `RLIMIT_MEMLOCK`, as iommufd's do: each page of
//!    a call, also one that is there twice or that others have pinned too. The limit is the caller's
//!    own. It is compared with the user's `locked_vm`, which io_uring, iommufd, perf and AF_XDP share,
//!    and with what all that belongs to the same user of the host has pinned through this driver: a
//!    user namespace brings its maker 65,536 more users, with a `locked_vm` each. (A process that has
//!    left the namespace and runs as one of these users in the initial one, by a set-user-ID file,
//!    counts as that user: nothing in the kernel leads from there back to the maker. The cap
//!    of the allowance for all users together bounds what is gained so.)
//! 3. *The allowance.* A buffer for which the limit has no room may be charged to an allowance of
//!    its host user, by default 128 MiB, as long as all users together stay below a cap, by default a
//!    sixteenth of memory. udmabuf charges nothing; with Debian's limit of 8 MiB a desktop user
//!    would lose the 4K framebuffers (32 MiB) that udmabuf gives. The allowance is the driver's own
//!    promise, so it bounds the memory that is kept in place, and not only the pages that are named:
//!    large folios count as a whole ([`crate::pin`]), and no buffer counts for less than
//!    [`LEAST`], for what else of the kernel's memory it keeps.
//!
//! Pages that are charged to the allowance are not added to `locked_vm`: a user's framebuffers
//! would keep io_uring from its own few pages. In every case pages are added to the process's
//! `pinned_vm` (`VmPin` in `/proc/PID/status`), as io_uring's and iommufd's are, and memory stays
//! charged to its memory cgroup. perf, RDMA and vhost-vdpa compare `pinned_vm` with the limit: beside
//! them, the limit needs room for the buffers too.
//!
//! # Locks
//!
//! [`LEDGER`] is a leaf: nothing else is taken under it, no memory is allocated or freed, and it is
//! held for one look-up.

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

/// Pages that a buffer counts for at least, where it is charged to an allowance: a buffer whose process
/// has exited keeps some 14 KB of the process's `mm_struct`, and 2 KB of its own.
const LEAST: usize = 8;

/// To what pages are charged, besides the process's `pinned_vm`.
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
/// `pages` are charged to `mm`'s `pinned_vm`. If `to` is the limit, `pages` are charged to the user's
/// `locked_vm` and, in the ledger, to `uid`'s limit; if it is the allowance, `pages + besides` are
/// charged to `uid`'s allowance in the ledger.
pub(crate) struct Charge {
    mm: ARef<Mm>,
    /// The caller's user of the host.
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
        // INVARIANT: Each branch charges what it names.
        Ok(Self {
            mm: ARef::from(mm),
            uid,
            pages,
            besides,
            to,
        })
    }

    /// Sees to it that `besides` pages that the buffer keeps in place besides its own are charged
    /// where that counts, or fails with `ENOMEM`.
    pub(crate) fn hold_besides(&mut self, besides: usize) -> Result {
        let more = besides.saturating_sub(self.besides);
        if more == 0 || !matches!(self.to, To::Allowance) {
            return Ok(());
        }
        take(self.uid, Account::Allowance, more, allowance_caps())?;
        // INVARIANT: Charged just now.
        self.besides += more;
        Ok(())
    }

    /// Gives back what was charged besides beyond `besides` pages.
    pub(crate) fn settle(&mut self, besides: usize) {
        let least = LEAST.saturating_sub(self.pages);
        let less = self.besides.saturating_sub(besides.max(least));
        if less > 0 {
            // INVARIANT: Nothing else is charged besides.
            self.besides -= less;
            give_back(self.uid, Account::Allowance, less);
        }
    }

    /// The pages that count.
    pub(crate) fn pages(&self) -> usize {
        self.pages + self.besides
    }

    /// To what they are charged.
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
    // Freed, if it was not needed, without the lock.
    drop(spare);
    result
}

fn give_back(uid: u32, account: Account, pages: usize) {
    let node = LEDGER.lock().give_back(uid, account, pages);
    // Freed without the lock.
    drop(node);
}

fn allowance_caps() -> Caps {
    Caps {
        user: params::allowance_pages(),
        system: params::allowance_system_pages(),
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
/// Called once, when the module is loaded, before anything else of this file.
pub(crate) unsafe fn init() {
    // SAFETY: By the function's requirements.
    unsafe { LEDGER.init() };
}
