// SPDX-License-Identifier: GPL-2.0

//! What is checked of ranges, against arithmetic that cannot overflow; and how they are joined,
//! against a list of pages.

use crate::{
    ranges::{check_backings, joined, total_pages, Element, Part},
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

/// Ranges that often follow each other, with their backings: pages of two files.
fn pieces() -> impl Strategy<Value = Vec<(Range, Backing)>> {
    // Whether the range and its backing go on where the last ones ended, how long it is, and which
    // file and places it has otherwise.
    let piece = (any::<[bool; 2]>(), 1u64..5, 0i32..2, 0u64..6, 0u64..6);
    proptest::collection::vec(piece, 0..40).prop_map(|steps| {
        let (mut address, mut file, mut offset) = (0, 0, 0);
        let piece =
            |([adjacent, same], pages, other, place, page): ([bool; 2], u64, i32, u64, u64)| {
                if !adjacent {
                    address = (100 + place) * PAGE;
                }
                if !same {
                    (file, offset) = (other, page * PAGE);
                }
                let len = pages * PAGE;
                let range = Range { addr: address, len };
                let backing = Backing {
                    fd: file,
                    reserved: 0,
                    offset,
                };
                address += len;
                offset += len;
                (range, backing)
            };
        steps.into_iter().map(piece).collect()
    })
}

/// What a page is expected to be: its address, and the page of which file.
type Page = (usize, Option<(i32, usize)>);

/// The pages of a part.
fn pages_of(part: Part) -> impl Iterator<Item = Page> {
    (0..part.pages).map(move |page| {
        let backing = part.backing.map(|(fd, first)| (fd, first + page));
        (part.addr + page * PAGE_SIZE, backing)
    })
}

proptest! {
    #[test]
    fn joined_parts_are_the_same_pages(pieces in pieces(), named in any::<bool>()) {
        let (ranges, backings): (Vec<_>, Vec<_>) = pieces.iter().copied().unzip();
        let (ranges, backings) = (elements(&ranges), elements(&backings));
        let backings = named.then_some(&backings[..]);
        let parts: Vec<Part> = joined(&ranges, backings).collect();

        let single = pieces.iter().flat_map(|(range, backing)| {
            let part = Part {
                addr: range.addr as usize,
                pages: range.len as usize / PAGE_SIZE,
                backing: named.then_some((backing.fd, backing.offset as usize / PAGE_SIZE)),
            };
            pages_of(part)
        });
        let all = parts.iter().copied().flat_map(pages_of);
        prop_assert_eq!(all.collect::<Vec<_>>(), single.collect::<Vec<_>>());
        // As few as there can be, in this order.
        for pair in parts.windows(2) {
            let last = pages_of(pair[0]).last();
            let first = pages_of(pair[1]).next();
            let follows = last.zip(first).is_some_and(|(last, first)| {
                let next = last.1.map(|(fd, page)| (fd, page + 1));
                first == (last.0 + PAGE_SIZE, next)
            });
            prop_assert!(!follows, "{:?} could be one part", pair);
        }
    }
}

/// Address and length are aligned each by itself.
#[test]
fn both_are_aligned() {
    for (addr, len) in [(PAGE + 8, PAGE), (PAGE, PAGE + 8), (PAGE + 8, PAGE + 8)] {
        let result = total_pages(&elements(&[Range { addr, len }]));
        assert_eq!(result, Err(EINVAL), "{addr:#x}, {len:#x}");
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
