// SPDX-License-Identifier: GPL-2.0

//! `Rest` against a list of folios.

use super::rest::Rest;
use crate::{
    charge::Charge,
    charge_test::{alone, set_allowances},
    kernel_ext::{
        pages::{CurrentMm, Folio},
        user::{Caller, CALLER},
    },
};
use kernel::{alloc::fail_after, mm::Mm, prelude::ENOMEM};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A call that is charged to an allowance, for this number of pages.
fn charge(mm: &Mm, pages: usize) -> Charge {
    CALLER.set(Caller {
        uid: 7,
        host_uid: 7,
        ..Caller::default()
    });
    Charge::new(&CurrentMm(mm), pages).unwrap()
}

/// The pages of large folios that are not in the buffer, from the pages that are.
fn rest_of(pages: &[usize], sizes: &[usize]) -> usize {
    let mut counts = BTreeMap::new();
    for folio in pages {
        *counts.entry(*folio).or_insert(0) += 1;
    }
    let rests = counts
        .iter()
        .map(|(folio, count)| sizes[*folio].saturating_sub(*count));
    rests.sum()
}

const SIZES: [usize; 6] = [2, 4, 16, 16, 64, 512];

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn folios_count_once(
        rows in proptest::collection::vec((0usize..SIZES.len(), 1usize..20, any::<bool>()), 0..30),
    ) {
        let _alone = alone();
        set_allowances(1 << 20, 1 << 20);
        let mm = Mm::default();
        let total = rows.iter().map(|(_, pages, _)| pages).sum::<usize>().max(1);
        let mut charge = charge(&mm, total);
        let mut rest = Rest::new();
        let mut pages = Vec::new();
        for (folio, count, waits) in rows {
            for _ in 0..count {
                rest.count(Folio(folio, &SIZES[folio]), &mut charge).unwrap();
                pages.push(folio);
            }
            if waits {
                rest.catch_up(&mut charge).unwrap();
                // All that is held is charged while the call waits.
                prop_assert!(charge.pages() >= total + rest_of(&pages, &SIZES));
            }
        }
        let expected = rest_of(&pages, &SIZES);
        prop_assert_eq!(rest.finish(&mut charge), Ok(expected));
        prop_assert_eq!(charge.pages(), (total + expected).max(8));
    }
}

/// What does not fit into the allowance is an error, as is a record for which there is no memory.
#[test]
fn errors_are_returned() {
    let _alone = alone();
    let mm = Mm::default();
    set_allowances(100, 100);
    let mut small = charge(&mm, 10);
    let mut rest = Rest::new();
    rest.count(Folio(1, &512), &mut small).unwrap();
    assert_eq!(rest.catch_up(&mut small), Err(ENOMEM));
    drop(small);
    set_allowances(1 << 20, 1 << 20);
    let mut large = charge(&mm, 10);
    let mut rest = Rest::new();
    rest.count(Folio(1, &512), &mut large).unwrap();
    fail_after(Some(0));
    let result = rest.count(Folio(2, &512), &mut large);
    fail_after(None);
    assert_eq!(result, Err(ENOMEM));
}

/// A folio that is in the buffer as a whole needs no room beyond its pages, not even for a moment.
#[test]
fn whole_folios_need_no_more_room() {
    let _alone = alone();
    let mm = Mm::default();
    set_allowances(512, 512);
    let mut charge = charge(&mm, 512);
    let mut rest = Rest::new();
    for _ in 0..512 {
        rest.count(Folio(1, &512), &mut charge).unwrap();
    }
    assert_eq!(rest.finish(&mut charge), Ok(0));
    assert_eq!(charge.pages(), 512);
}
