// SPDX-License-Identifier: GPL-2.0

//! `Charge` against a list of what is charged: to whom, and how much.

use crate::{
    charge::{allowance_used, limit_bytes, Charge, To},
    kernel_ext::{
        pages::CurrentMm,
        user::{Caller, User, CALLER},
    },
    params::PARAMS,
};
use kernel::{mm::Mm, page::PAGE_SIZE, prelude::ENOMEM};
use proptest::prelude::*;
use std::sync::{atomic::Ordering, Mutex, MutexGuard, PoisonError};

/// The minimum number of pages that a buffer counts for where an allowance is charged.
const LEAST: usize = 8;

/// The ledger is one for all tests.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages per user, and for all users together.
pub(crate) fn set_allowances(user: usize, system: usize) {
    PARAMS.set((user, system, 0));
}

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    /// A process of a user, of a host user, wants pages.
    New {
        process: usize,
        caller: Caller,
        pages: usize,
    },
    /// A buffer keeps pages besides its own.
    Besides {
        index: usize,
        besides: usize,
    },
    /// Its call ends, with that number of pages.
    Settle {
        index: usize,
        besides: usize,
    },
    Drop {
        index: usize,
    },
    Allow {
        user: usize,
        system: usize,
    },
}

fn pages() -> impl Strategy<Value = usize> {
    prop_oneof![
        16 => 1usize..30,
        2 => 30usize..200,
        1 => Just(1usize << 53),
        1 => Just(usize::MAX - 3),
    ]
}

fn caller() -> impl Strategy<Value = Caller> {
    let limit = prop_oneof![
        4 => 0usize..40 * PAGE_SIZE,
        1 => Just(usize::MAX),
    ];
    (0u32..5, prop::bool::weighted(0.1), limit).prop_map(|(uid, capability, limit)| Caller {
        uid,
        // Some users belong to another one of the host.
        host_uid: uid / 2,
        capability,
        limit,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<usize>();
    let besides = || prop_oneof![6 => 0usize..40, 1 => 100usize..1000];
    prop_oneof![
        6 => (0usize..2, caller(), pages())
            .prop_map(|(process, caller, pages)| Step::New { process, caller, pages }),
        3 => (index, besides()).prop_map(|(index, besides)| Step::Besides { index, besides }),
        2 => (index, besides()).prop_map(|(index, besides)| Step::Settle { index, besides }),
        4 => index.prop_map(|index| Step::Drop { index }),
        1 => (0usize..200, 0usize..400).prop_map(|(user, system)| Step::Allow { user, system }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Account {
    Limit,
    Allowance,
    Nothing,
}

/// What the list knows of a charge.
#[derive(Clone, Copy, Debug)]
struct Entry {
    process: usize,
    uid: u32,
    host_uid: u32,
    account: Account,
    pages: usize,
    besides: usize,
}

impl Entry {
    fn all(&self) -> usize {
        self.pages + self.besides
    }
}

fn sum(list: &[(Charge, Entry)], of: impl Fn(&Entry) -> bool) -> usize {
    let those = list
        .iter()
        .map(|(_, entry)| entry)
        .filter(|entry| of(entry));
    those.map(Entry::all).sum()
}

fn is_charged(list: &[(Charge, Entry)], processes: &[Mm]) {
    for (charge, entry) in list {
        assert_eq!(charge.pages(), entry.all());
        let account = match charge.to() {
            To::Limit(_) => Account::Limit,
            To::Allowance => Account::Allowance,
            To::Nothing => Account::Nothing,
        };
        assert_eq!(account, entry.account);
    }
    for (process, mm) in processes.iter().enumerate() {
        let of = list.iter().filter(|(_, entry)| entry.process == process);
        let pinned: usize = of.clone().map(|(_, entry)| entry.pages).sum();
        assert_eq!(mm.pinned_vm.load(Ordering::Relaxed), pinned as i64);
        assert_eq!(mm.references.load(Ordering::Relaxed), of.count());
    }
    for uid in 0..5 {
        CALLER.set(Caller {
            uid,
            host_uid: uid / 2,
            ..Caller::default()
        });
        let limit = |entry: &Entry| entry.account == Account::Limit && entry.uid == uid;
        let user = User::current();
        assert_eq!(user.locked_vm().get(), sum(list, limit) as i128);
        let references = list.iter().filter(|(_, entry)| limit(entry)).count();
        assert_eq!(user.references(), references);
        let allowance =
            |entry: &Entry| entry.account == Account::Allowance && entry.host_uid == uid / 2;
        assert_eq!(allowance_used(), sum(list, allowance));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn charges_agree_with_a_list(steps in proptest::collection::vec(step(), 1..100)) {
        let _alone = alone();
        let processes = [Mm::default(), Mm::default()];
        let mut allowances = (100, 150);
        set_allowances(allowances.0, allowances.1);
        let mut list: Vec<(Charge, Entry)> = Vec::new();
        for step in steps {
            // Room in the allowances of a host user.
            let room = |list: &[(Charge, Entry)], host_uid| {
                let allowance = |entry: &Entry| entry.account == Account::Allowance;
                let own = |entry: &Entry| allowance(entry) && entry.host_uid == host_uid;
                let left = allowances.0.saturating_sub(sum(list, own));
                left.min(allowances.1.saturating_sub(sum(list, allowance)))
            };
            let count = list.len();
            let at = |index: usize| (count > 0).then(|| index % count);
            match step {
                Step::New { process, caller, pages } => {
                    CALLER.set(caller);
                    let limit = match caller.limit {
                        usize::MAX => usize::MAX,
                        bytes => bytes / PAGE_SIZE,
                    };
                    let limited = |entry: &Entry| entry.account == Account::Limit;
                    let users = sum(&list, |entry| limited(entry) && entry.uid == caller.uid);
                    let hosts = sum(&list, |entry| limited(entry) && entry.host_uid == caller.host_uid);
                    let least = pages.max(LEAST);
                    // No counter has more than 2^63.
                    let fits = i64::try_from(pages).is_ok()
                        && limit.saturating_sub(users.max(hosts)) >= pages;
                    let entry = |account, besides| Entry {
                        process,
                        uid: caller.uid,
                        host_uid: caller.host_uid,
                        account,
                        pages,
                        besides,
                    };
                    let expected = if caller.capability {
                        Some(entry(Account::Nothing, 0))
                    } else if fits {
                        Some(entry(Account::Limit, 0))
                    } else if least <= room(&list, caller.host_uid) {
                        Some(entry(Account::Allowance, least - pages))
                    } else {
                        None
                    };
                    // No process has that many pages, and their sum would overflow.
                    if expected.is_some() && pages > 1 << 60 {
                        continue;
                    }
                    let result = Charge::new(&CurrentMm(&processes[process]), pages);
                    match (result, expected) {
                        (Ok(charge), Some(entry)) => list.push((charge, entry)),
                        (Err(error), None) => prop_assert_eq!(error, ENOMEM),
                        (result, expected) => {
                            prop_assert!(false, "{:?} for {:?}", result.err(), expected);
                        }
                    }
                }
                Step::Besides { index, besides } => {
                    let Some(index) = at(index) else { continue };
                    let entry = list[index].1;
                    let more = besides.saturating_sub(entry.besides);
                    let right = entry.account != Account::Allowance
                        || more <= room(&list, entry.host_uid);
                    let (charge, entry) = &mut list[index];
                    let result = charge.hold_besides(besides);
                    if right {
                        prop_assert_eq!(result, Ok(()));
                        if entry.account == Account::Allowance {
                            entry.besides += more;
                        }
                    } else {
                        prop_assert_eq!(result, Err(ENOMEM));
                    }
                }
                Step::Settle { index, besides } => {
                    let Some(index) = at(index) else { continue };
                    let (charge, entry) = &mut list[index];
                    charge.settle(besides);
                    if entry.account == Account::Allowance {
                        let least = besides.max(LEAST.saturating_sub(entry.pages));
                        entry.besides = entry.besides.min(least);
                    }
                }
                Step::Drop { index } => {
                    if let Some(index) = at(index) {
                        list.swap_remove(index);
                    }
                }
                Step::Allow { user, system } => {
                    allowances = (user, system);
                    set_allowances(user, system);
                }
            }
            is_charged(&list, &processes);
        }
        list.clear();
        is_charged(&list, &processes);
    }
}

/// The limit that `PINBUF_QUERY` reports.
#[test]
fn the_limit_that_is_reported() {
    for (limit, capability, expected) in [
        (5 * PAGE_SIZE + 7, false, 5 * PAGE_SIZE as u64 + 7),
        (5 * PAGE_SIZE, true, u64::MAX),
        (usize::MAX, false, u64::MAX),
        (usize::MAX, true, u64::MAX),
        (0, false, 0),
    ] {
        CALLER.set(Caller {
            limit,
            capability,
            ..Caller::default()
        });
        assert_eq!(limit_bytes(), expected, "{limit} bytes, {capability}");
    }
}
