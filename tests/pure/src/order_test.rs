// SPDX-License-Identifier: GPL-2.0

//! The order in which parts are pinned, against sorting and joining them naively.

use crate::order::{joined, Order, Part};
use kernel::alloc::fail_after;
use kernel::page::PAGE_SIZE;
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE as u64;

fn part(space: i32, page: u64, pages: u64) -> Part {
    Part {
        space,
        start: page * PAGE,
        len: pages * PAGE,
    }
}

/// Every page of the parts, in their order.
fn pages(parts: impl IntoIterator<Item = Part>) -> Vec<(i32, u64)> {
    let all = |part: Part| (0..part.len / PAGE).map(move |n| (part.space, part.start / PAGE + n));
    parts.into_iter().flat_map(all).collect()
}

fn order(parts: &[Part]) -> Option<Order> {
    let pages = parts.iter().map(Part::pages).sum();
    Order::of(parts.len(), pages, |number| parts[number])
}

/// A list that is worth sorting, in some order.
fn shuffled() -> impl Strategy<Value = Vec<Part>> {
    let lengths = proptest::collection::vec((1_u64..5, 0_u64..3), 64..300);
    (any::<u32>(), lengths).prop_flat_map(|(first, lengths)| {
        let mut page = u64::from(first);
        let parts: Vec<Part> = lengths
            .into_iter()
            .map(|(pages, gap)| {
                page += pages + gap;
                part(3, page - pages, pages)
            })
            .collect();
        Just(parts).prop_shuffle()
    })
}

proptest! {
    #[test]
    fn joining_keeps_every_page_in_its_place(
        parts in proptest::collection::vec((0..2_i32, 0..12_u64, 1..4_u64), 0..60)
    ) {
        let parts: Vec<Part> = parts.into_iter().map(|(s, p, n)| part(s, p, n)).collect();
        let all: Vec<Part> = joined(parts.iter().copied()).collect();
        prop_assert_eq!(pages(all.iter().copied()), pages(parts.iter().copied()));
        // Nothing is left to join.
        prop_assert!(all
            .windows(2)
            .all(|two| two[0].space != two[1].space || two[0].start + two[0].len != two[1].start));
    }

    #[test]
    fn sorting_sorts(parts in shuffled()) {
        let order = order(&parts);
        let breaks = parts.windows(2).filter(|two| two[0].start + two[0].len != two[1].start);
        if breaks.count() < parts.len() / 2 {
            prop_assert!(order.is_none());
            return Ok(());
        }
        let pages: u64 = parts.iter().map(|part| part.len / PAGE).sum();
        if pages > 4 * parts.len() as u64 {
            prop_assert!(order.is_none());
            return Ok(());
        }
        let order = order.expect("a list that is worth sorting");
        let mut expected: Vec<usize> = (0..parts.len()).collect();
        expected.sort_by_key(|number| parts[*number].start);
        prop_assert_eq!(order.numbers().collect::<Vec<_>>(), expected);
        let mut before = 0;
        for (number, part) in parts.iter().enumerate() {
            prop_assert_eq!(order.pages_before(number), before);
            before += part.pages();
        }
    }
}

#[test]
fn the_most_parts_there_can_be() {
    // The inverse of a permutation that looks random.
    let count = crate::uapi::MAX_RANGES as usize;
    let place = |number: usize| (number * 40_503) % count;
    let order = Order::of(count, count, |number| part(0, place(number) as u64, 1));
    let order = order.expect("an order");
    for (position, number) in order.numbers().enumerate() {
        assert_eq!(place(number), position);
        assert_eq!(order.pages_before(number), number);
    }
}

#[test]
fn overlapping_parts_are_sorted_by_where_they_begin() {
    let parts: Vec<Part> = (0..100)
        .map(|n| part(0, (n * 37) % 100, 1 + n % 3))
        .collect();
    let order = order(&parts).expect("an order");
    let mut expected: Vec<usize> = (0..100).collect();
    expected.sort_by_key(|number| parts[*number].start);
    assert_eq!(order.numbers().collect::<Vec<_>>(), expected);
}

#[test]
fn parts_that_begin_at_the_same_page_have_no_order() {
    let mut parts: Vec<Part> = (0..100).map(|n| part(0, (n * 37) % 100, 1)).collect();
    assert!(order(&parts).is_some());
    parts[99].start = parts[17].start;
    assert!(order(&parts).is_none());
}

#[test]
fn what_is_not_worth_sorting_is_not_sorted() {
    let backwards = |n: u64| part(0, 1000 - n, 1);
    let list = |count: u64, part: &dyn Fn(u64) -> Part| (0..count).map(part).collect::<Vec<_>>();
    assert!(order(&list(200, &backwards)).is_some());
    // Few parts.
    assert!(order(&list(63, &backwards)).is_none());
    // In order.
    assert!(order(&list(200, &|n| part(0, n, 1))).is_none());
    // Far from each other.
    assert!(order(&list(200, &|n| part(0, 10_000 - 5 * n, 1))).is_none());
    // Long ones.
    assert!(order(&list(200, &|n| part(0, 10_000 - 5 * n, 5))).is_none());
    // Of two files.
    assert!(order(&list(200, &|n| part(n as i32 % 2, 1000 - n, 1))).is_none());
    // At the end of what a number can say.
    let last = u64::MAX / PAGE;
    assert!(order(&list(200, &|n| part(0, last - 1 - n, 1))).is_some());
}

#[test]
fn without_memory_there_is_no_order() {
    let parts: Vec<Part> = (0..200).map(|n| part(0, 1000 - 2 * n, 2)).collect();
    for left in 0..2 {
        fail_after(Some(left));
        assert!(order(&parts).is_none(), "{left} allocations");
    }
    fail_after(Some(2));
    assert!(order(&parts).is_some());
    // Single pages need one list less.
    let parts: Vec<Part> = (0..200).map(|n| part(0, 1000 - n, 1)).collect();
    fail_after(Some(0));
    assert!(order(&parts).is_none());
    fail_after(Some(1));
    assert!(order(&parts).is_some());
    fail_after(None);
}
