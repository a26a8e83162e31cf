// SPDX-License-Identifier: GPL-2.0

//! `Allowances` against a map and a sum.

use crate::allowances::{Allowances, Caps};
use kernel::{
    prelude::{ENOMEM, GFP_KERNEL},
    rbtree::RBTreeNodeReservation,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    /// A user wants pages.
    Take { user: u32, pages: usize },
    /// Some buffer, of those that there are, goes.
    GiveBack(usize),
    /// Somebody sets the parameters.
    Cap(Caps),
}

fn amount() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 0usize..40,
        1 => Just(usize::MAX),
        1 => (usize::MAX - 50)..usize::MAX,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0u32..4, amount()).prop_map(|(user, pages)| Step::Take { user, pages }),
        4 => any::<usize>().prop_map(Step::GiveBack),
        1 => (amount(), amount()).prop_map(|(user, system)| Step::Cap(Caps { user, system })),
    ]
}

proptest! {
    #[test]
    fn allowances_agree_with_a_map(steps in proptest::collection::vec(step(), 1..200)) {
        let mut allowances = Allowances::new();
        let mut caps = Caps { user: 100, system: 250 };
        let mut buffers: Vec<(u32, usize)> = Vec::new();
        for step in steps {
            match step {
                Step::Cap(new) => caps = new,
                Step::Take { user, pages } => {
                    // Wide enough for every sum.
                    let sum = |of: &dyn Fn(u32) -> bool| -> u128 {
                        let those = buffers.iter().filter(|buffer| of(buffer.0));
                        those.map(|buffer| buffer.1 as u128).sum()
                    };
                    let fits = sum(&|owner| owner == user) + pages as u128 <= caps.user as u128
                        && sum(&|_| true) + pages as u128 <= caps.system as u128;
                    let first = allowances.used_by(user) == 0;
                    let spare = RBTreeNodeReservation::new(GFP_KERNEL).unwrap();
                    let (result, spare) = allowances.take(user, pages, caps, spare);
                    prop_assert_eq!(result, if fits { Ok(()) } else { Err(ENOMEM) });
                    // The memory is used for the user's entry, or comes back.
                    if !fits {
                        prop_assert!(spare.is_some());
                    } else if first && pages > 0 {
                        prop_assert!(spare.is_none() || buffers.contains(&(user, 0)));
                    }
                    if fits {
                        buffers.push((user, pages));
                    }
                }
                Step::GiveBack(index) => {
                    if !buffers.is_empty() {
                        let (user, pages) = buffers.swap_remove(index % buffers.len());
                        let node = allowances.give_back(user, pages);
                        if let Some(node) = node {
                            prop_assert_eq!(node.to_key_value(), (user, 0));
                        }
                    }
                }
            }
            let mut used = BTreeMap::new();
            for (user, pages) in &buffers {
                *used.entry(*user).or_insert(0) += *pages;
            }
            for user in 0..4 {
                prop_assert_eq!(allowances.used_by(user), used.get(&user).copied().unwrap_or(0));
            }
        }
    }
}

#[test]
fn an_entry_lives_as_long_as_it_is_needed() {
    let mut allowances = Allowances::new();
    let caps = Caps {
        user: 10,
        system: 10,
    };
    let take = |allowances: &mut Allowances, pages| {
        let spare = RBTreeNodeReservation::new(GFP_KERNEL).unwrap();
        allowances.take(7, pages, caps, spare)
    };
    let (result, spare) = take(&mut allowances, 4);
    assert!(result.is_ok() && spare.is_none());
    let (result, spare) = take(&mut allowances, 6);
    assert!(result.is_ok() && spare.is_some());
    assert_eq!(take(&mut allowances, 1).0, Err(ENOMEM));
    assert!(allowances.give_back(7, 4).is_none());
    assert!(allowances.give_back(7, 6).is_some());
    let (result, spare) = take(&mut allowances, 10);
    assert!(result.is_ok() && spare.is_none());
}
