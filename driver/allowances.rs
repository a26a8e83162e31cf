// SPDX-License-Identifier: GPL-2.0

//! How much of their allowances users have.

use kernel::{
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode,
        RBTreeNodeReservation, //
    }, //
};

/// What may be taken at most, in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    /// By one user.
    pub(crate) user: usize,
    /// By all users together.
    pub(crate) system: usize,
}

/// What users have of their allowances.
pub(crate) struct Allowances {
    /// Pages by user; a user is here while it has some. `None` until the first (a tree cannot be
    /// made at compile time).
    users: Option<RBTree<u32, usize>>,
    /// The sum.
    total: usize,
}

impl Allowances {
    /// Nobody has any.
    pub(crate) const fn new() -> Self {
        Self {
            users: None,
            total: 0,
        }
    }

    /// The pages that a user has.
    pub(crate) fn used_by(&self, uid: u32) -> usize {
        let pages = self.users.as_ref().and_then(|users| users.get(&uid));
        pages.copied().unwrap_or(0)
    }

    /// Gives `pages` to a user, for whom `spare` becomes an entry if it has none; returns `spare`
    /// otherwise. `ENOMEM` if one of `caps` would be exceeded.
    pub(crate) fn take(
        &mut self,
        uid: u32,
        pages: usize,
        caps: Caps,
        spare: RBTreeNodeReservation<u32, usize>,
    ) -> (Result, Option<RBTreeNodeReservation<u32, usize>>) {
        let (Some(total), Some(used)) = (
            self.total.checked_add(pages),
            self.used_by(uid).checked_add(pages),
        ) else {
            return (Err(ENOMEM), Some(spare));
        };
        if total > caps.system || used > caps.user {
            return (Err(ENOMEM), Some(spare));
        }
        self.total = total;
        let users = self.users.get_or_insert_with(RBTree::new);
        if let Some(entry) = users.get_mut(&uid) {
            *entry = used;
            return (Ok(()), Some(spare));
        }
        users.insert(spare.into_node(uid, used));
        (Ok(()), None)
    }

    /// Takes `pages` back, and returns the user's entry if that were all.
    pub(crate) fn give_back(&mut self, uid: u32, pages: usize) -> Option<RBTreeNode<u32, usize>> {
        self.total -= pages;
        let users = self.users.as_mut()?;
        let entry = users.get_mut(&uid)?;
        *entry -= pages;
        if *entry == 0 {
            users.remove_node(&uid)
        } else {
            None
        }
    }
}
