// SPDX-License-Identifier: GPL-2.0

//! What the users of the host have pinned, beyond their limit and under it.
//!
//! This file knows nothing of tasks or locks, and is compiled for the host too, where `tests/pure`
//! compares it with a map and sums.

use kernel::{
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode,
        RBTreeNodeReservation, //
    }, //
};

/// To what a user's pages are charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Account {
    /// The user's limit on locked memory.
    Limit,
    /// The allowance beyond it.
    Allowance,
}

/// What may be charged to an account at most, in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    /// By one user.
    pub(crate) user: usize,
    /// By all users together.
    pub(crate) system: usize,
}

/// Pages, by account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    limit: usize,
    allowance: usize,
}

impl Usage {
    const NONE: Self = Self {
        limit: 0,
        allowance: 0,
    };

    /// The pages that are charged to an account.
    pub(crate) fn of(&self, account: Account) -> usize {
        match account {
            Account::Limit => self.limit,
            Account::Allowance => self.allowance,
        }
    }

    fn of_mut(&mut self, account: Account) -> &mut usize {
        match account {
            Account::Limit => &mut self.limit,
            Account::Allowance => &mut self.allowance,
        }
    }
}

/// What each user of the host has pinned.
pub(crate) struct Ledger {
    /// By user; a user is here while pages are charged to it. `None` until the first (a tree cannot
    /// be made at compile time).
    users: Option<RBTree<u32, Usage>>,
    total: Usage,
}

impl Ledger {
    /// Nobody has anything.
    pub(crate) const fn new() -> Self {
        Self {
            users: None,
            total: Usage::NONE,
        }
    }

    /// What is charged to a user.
    pub(crate) fn of(&self, uid: u32) -> Usage {
        let usage = self.users.as_ref().and_then(|users| users.get(&uid));
        usage.copied().unwrap_or(Usage::NONE)
    }

    /// Charges `pages` to a user, for which `spare` becomes an entry if it has none; returns `spare`
    /// otherwise. `ENOMEM` if one of `caps` would be exceeded, or if there is neither.
    pub(crate) fn take(
        &mut self,
        uid: u32,
        account: Account,
        pages: usize,
        caps: Caps,
        spare: Option<RBTreeNodeReservation<u32, Usage>>,
    ) -> (Result, Option<RBTreeNodeReservation<u32, Usage>>) {
        let mut usage = self.of(uid);
        let sum = |old: usize, cap: usize| old.checked_add(pages).filter(|new| *new <= cap);
        let (Some(total), Some(used)) = (
            sum(self.total.of(account), caps.system),
            sum(usage.of(account), caps.user),
        ) else {
            return (Err(ENOMEM), spare);
        };
        *usage.of_mut(account) = used;
        let users = self.users.get_or_insert_with(RBTree::new);
        let spare = match (users.get_mut(&uid), spare) {
            (Some(entry), spare) => {
                *entry = usage;
                spare
            }
            (None, Some(spare)) => {
                users.insert(spare.into_node(uid, usage));
                None
            }
            (None, None) => return (Err(ENOMEM), None),
        };
        *self.total.of_mut(account) = total;
        (Ok(()), spare)
    }

    /// Takes `pages` back that were charged, and returns the user's entry if those were all.
    pub(crate) fn give_back(
        &mut self,
        uid: u32,
        account: Account,
        pages: usize,
    ) -> Option<RBTreeNode<u32, Usage>> {
        *self.total.of_mut(account) -= pages;
        let users = self.users.as_mut()?;
        let entry = users.get_mut(&uid)?;
        *entry.of_mut(account) -= pages;
        if *entry == Usage::NONE {
            users.remove_node(&uid)
        } else {
            None
        }
    }
}
