// SPDX-License-Identifier: GPL-2.0

//! How many pages the users of the host have pinned, under their limit and beyond it.
//!
//! This file depends on neither tasks nor locks. It is also compiled for the host, where
//! `tests/pure` compares it with a map and sums.

use kernel::{
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode,
        RBTreeNodeReservation, //
    }, //
};

/// The account that a user's pages are charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Account {
    /// The user's limit on locked memory.
    Limit,
    /// The allowance beyond it.
    Allowance,
}

/// The maximum number of pages that may be charged to an account.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    /// For one user.
    pub(crate) user: usize,
    /// For all users together.
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

/// The pages that are charged to each user of the host.
pub(crate) struct Ledger {
    /// By UID. A user has an entry while pages are charged to it. `None` until the first charge,
    /// because a tree cannot be created at compile time.
    users: Option<RBTree<u32, Usage>>,
    total: Usage,
}

impl Ledger {
    /// An empty ledger.
    pub(crate) const fn new() -> Self {
        Self {
            users: None,
            total: Usage::NONE,
        }
    }

    /// The pages that are charged to a user.
    pub(crate) fn of(&self, uid: u32) -> Usage {
        let usage = self.users.as_ref().and_then(|users| users.get(&uid));
        usage.copied().unwrap_or(Usage::NONE)
    }

    /// Charges `pages` to a user. If the user has no entry, `spare` becomes its entry; otherwise
    /// `spare` is returned. Fails with `ENOMEM` if the charge would exceed one of `caps`, or if
    /// there is neither an entry nor `spare`.
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

    /// Uncharges `pages`, which were charged before. If nothing else is charged to the user,
    /// removes the user's entry and returns it.
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
