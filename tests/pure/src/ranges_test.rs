// SPDX-License-Identifier: GPL-2.0

//! What is checked of ranges, against arithmetic that cannot overflow.

use crate::{
    ranges::{check_backings, total_pages, Element},
    uapi::{Backing, Range},
};
use kernel::{
    page::PAGE_SIZE,
    prelude::{EINVAL, EOVERFLOW},
};
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE as u64;

/// Numbers of bytes: mostly pages, few or very many, and some that are no pages.
fn bytes() -> impl Strategy<Value = u64> {
    let edge = prop_oneof![
        Just(0u64),
        Just(1 << 62),
        Just(1 << 63),
        Just((1 << 63) - PAGE),
        Just(u64::MAX - PAGE + 1),
    ];
    prop_oneof![
        8 => (1u64..100).prop_map(|pages| pages * PAGE),
        2 => edge.clone(),
        2 => (edge, 0u64..3).prop_map(|(edge, pages)| edge.wrapping_sub(pages * PAGE)),
        1 => any::<u64>(),
        1 => any::<u64>().prop_map(|bytes| bytes & !(PAGE - 1)),
    ]
}

fn range() -> impl Strategy<Value = Range> {
    (bytes(), bytes()).prop_map(|(addr, len)| Range { addr, len })
}

fn backing() -> impl Strategy<Value = Backing> {
    let reserved = prop_oneof![9 => Just(0u32), 1 => any::<u32>()];
    (any::<i32>(), reserved, bytes()).prop_map(|(fd, reserved, offset)| Backing {
        fd,
        reserved,
        offset,
    })
}

fn elements<T: Copy>(values: &[T]) -> Vec<Element<T>> {
    values.iter().copied().map(Element).collect()
}

fn is_crooked(range: &Range) -> bool {
    range.len == 0 || range.len % PAGE != 0 || range.addr % PAGE != 0
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 4096 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_sum_is_right_or_an_error_applies(
        ranges in proptest::collection::vec(range(), 0..8),
    ) {
        let crooked = ranges.iter().any(is_crooked);
        let sum: u128 = ranges.iter().map(|range| u128::from(range.len)).sum();
        let too_far = |range: &Range| {
            u128::from(range.addr) + u128::from(range.len) > u128::from(u64::MAX)
        };
        let large = sum > i64::MAX as u128 || ranges.iter().any(too_far);
        match total_pages(&elements(&ranges)) {
            Ok(pages) => {
                prop_assert!(!crooked && !large);
                prop_assert_eq!(pages as u128 * u128::from(PAGE), sum);
            }
            // Where both apply, the contract does not say which one it is.
            Err(error) => prop_assert!(
                crooked && error == EINVAL || large && error == EOVERFLOW,
                "{:?}", error
            ),
        }
    }

    #[test]
    fn parts_of_files_end_where_files_can(
        pairs in proptest::collection::vec((range(), backing()), 0..8),
    ) {
        let (ranges, backings): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let end = |(range, backing): &(Range, Backing)| {
            u128::from(backing.offset) + u128::from(range.len)
        };
        let invalid = |pair: &(Range, Backing)| {
            pair.1.reserved != 0
                || pair.1.offset % PAGE != 0
                || (i64::MAX as u128 + 1..=u128::from(u64::MAX)).contains(&end(pair))
        };
        let invalid = pairs.iter().any(invalid);
        let large = pairs.iter().any(|pair| end(pair) > u128::from(u64::MAX));
        match check_backings(&elements(&ranges), &elements(&backings)) {
            Ok(()) => prop_assert!(!invalid && !large),
            Err(error) => prop_assert!(
                invalid && error == EINVAL || large && error == EOVERFLOW,
                "{:?}", error
            ),
        }
    }
}

#[test]
fn the_largest_sum_fits() {
    let most = (1 << 63) - PAGE;
    let range = |len| Range { addr: 0, len };
    let pages = total_pages(&elements(&[range(most)])).unwrap();
    assert_eq!(pages as u64, most / PAGE);
    let result = total_pages(&elements(&[range(most), range(PAGE)]));
    assert_eq!(result, Err(EOVERFLOW));
}
