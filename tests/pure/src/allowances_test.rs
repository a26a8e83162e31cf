// SPDX-License-Identifier: GPL-2.0

//! `Ledger` against a list of what is charged, and sums.

use crate::allowances::{Account, Caps, Ledger, Usage};
use kernel::{
    prelude::{ENOMEM, GFP_KERNEL_ACCOUNT},
    rbtree::RBTreeNodeReservation,
};
use proptest::prelude::*;

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    /// A user wants pages.
    Take {
        user: u32,
        account: Account,
        pages: usize,
        spare: bool,
    },
    /// Some charge, of those that there are, goes, or a part of it.
    GiveBack { index: usize, part: usize },
    /// Somebody sets the limits.
    Cap(Caps),
}

fn amount() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 0usize..40,
        1 => Just(usize::MAX),
        1 => (usize::MAX - 50)..usize::MAX,
    ]
}

fn account() -> impl Strategy<Value = Account> {
    prop_oneof![Just(Account::Limit), Just(Account::Allowance)]
}

fn step() -> impl Strategy<Value = Step> {
    let take = (0u32..4, account(), amount(), prop::bool::weighted(0.9));
    let give_back = (
        any::<usize>(),
        prop_oneof![2 => Just(usize::MAX), 1 => 0usize..40],
    );
    let cap = (amount(), amount());
    prop_oneof![
        5 => take.prop_map(|(user, account, pages, spare)| Step::Take { user, account, pages, spare }),
        4 => give_back.prop_map(|(index, part)| Step::GiveBack { index, part }),
        1 => cap.prop_map(|(user, system)| Step::Cap(Caps { user, system })),
    ]
}

/// Pages that are charged to an account of a user.
#[derive(Clone, Copy, Debug)]
struct Charge {
    user: u32,
    account: Account,
    pages: usize,
}

/// The pages of those charges, wide enough for every sum.
fn sum(charges: &[Charge], of: impl Fn(&Charge) -> bool) -> u128 {
    let those = charges.iter().filter(|charge| of(charge));
    those.map(|charge| charge.pages as u128).sum()
}

proptest! {
    #[test]
    fn ledger_agrees_with_a_list(steps in proptest::collection::vec(step(), 1..200)) {
        let mut ledger = Ledger::new();
        let mut caps = Caps { user: 100, system: 250 };
        let mut charges: Vec<Charge> = Vec::new();
        for step in steps {
            match step {
                Step::Cap(new) => caps = new,
                Step::Take { user, account, pages, spare } => {
                    let used = sum(&charges, |c| c.user == user && c.account == account);
                    let total = sum(&charges, |c| c.account == account);
                    let fits = used + pages as u128 <= caps.user as u128
                        && total + pages as u128 <= caps.system as u128;
                    let is_new = ledger.of(user) == Usage::default();
                    let given = spare.then(|| RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT).unwrap());
                    let (result, back) = ledger.take(user, account, pages, caps, given);
                    if !fits {
                        prop_assert_eq!(result, Err(ENOMEM));
                        prop_assert_eq!(back.is_some(), spare, "the memory comes back");
                        continue;
                    }
                    // Without memory for it, a user that has nothing gets no entry. An entry of
                    // nothing may be left of a charge of no pages.
                    let empty = charges.iter().any(|c| c.user == user);
                    if is_new && !spare && !empty {
                        prop_assert_eq!(result, Err(ENOMEM));
                        continue;
                    }
                    prop_assert_eq!(result, Ok(()));
                    if is_new && !empty {
                        prop_assert!(back.is_none(), "the memory is the user's entry");
                    } else if !is_new {
                        prop_assert_eq!(back.is_some(), spare, "the memory is not needed");
                    }
                    charges.push(Charge { user, account, pages });
                }
                Step::GiveBack { index, part } => {
                    if charges.is_empty() {
                        continue;
                    }
                    let index = index % charges.len();
                    let charge = &mut charges[index];
                    let (user, account) = (charge.user, charge.account);
                    let pages = charge.pages.min(part);
                    charge.pages -= pages;
                    let gone = charge.pages == 0;
                    if gone {
                        charges.swap_remove(index);
                    }
                    let node = ledger.give_back(user, account, pages);
                    let left = sum(&charges, |c| c.user == user);
                    prop_assert_eq!(node.is_some(), left == 0, "the entry goes with the last page");
                    if let Some(node) = node {
                        prop_assert_eq!(node.to_key_value(), (user, Usage::default()));
                        // What was nothing has no entry any more.
                        charges.retain(|c| c.user != user);
                    }
                }
            }
            for user in 0..4 {
                for account in [Account::Limit, Account::Allowance] {
                    let used = sum(&charges, |c| c.user == user && c.account == account);
                    prop_assert_eq!(ledger.of(user).of(account) as u128, used);
                }
            }
        }
    }
}

fn take(
    ledger: &mut Ledger,
    account: Account,
    pages: usize,
) -> (
    kernel::error::Result,
    Option<RBTreeNodeReservation<u32, Usage>>,
) {
    let caps = Caps {
        user: 10,
        system: 10,
    };
    let spare = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT).unwrap();
    ledger.take(7, account, pages, caps, Some(spare))
}

#[test]
fn an_entry_lives_as_long_as_it_is_needed() {
    let mut ledger = Ledger::new();
    let (result, spare) = take(&mut ledger, Account::Allowance, 4);
    assert!(result.is_ok() && spare.is_none());
    let (result, spare) = take(&mut ledger, Account::Allowance, 6);
    assert!(result.is_ok() && spare.is_some());
    assert_eq!(take(&mut ledger, Account::Allowance, 1).0, Err(ENOMEM));
    assert!(ledger.give_back(7, Account::Allowance, 4).is_none());
    assert!(ledger.give_back(7, Account::Allowance, 6).is_some());
    let (result, spare) = take(&mut ledger, Account::Allowance, 10);
    assert!(result.is_ok() && spare.is_none());
}

/// The two accounts of a user have limits of their own, and one entry.
#[test]
fn accounts_are_apart() {
    let mut ledger = Ledger::new();
    assert!(take(&mut ledger, Account::Limit, 10).0.is_ok());
    let (result, spare) = take(&mut ledger, Account::Allowance, 10);
    assert!(result.is_ok() && spare.is_some());
    assert_eq!(take(&mut ledger, Account::Limit, 1).0, Err(ENOMEM));
    assert!(ledger.give_back(7, Account::Limit, 10).is_none());
    assert_eq!(ledger.of(7).of(Account::Allowance), 10);
    assert!(ledger.give_back(7, Account::Allowance, 10).is_some());
}
