// SPDX-License-Identifier: GPL-2.0

//! `Extents` against a list of pages.

use crate::extents::{growth, Extents, Kind, Run};
use kernel::alloc::fail_after;
use proptest::prelude::*;

/// What a buffer consists of, page by page, and where its extents begin.
#[derive(Default)]
struct Model {
    pages: Vec<(usize, Kind)>,
    firsts: Vec<bool>,
}

impl Model {
    fn push(&mut self, run: Run, joins: bool) {
        for n in 0..run.pages {
            let page = (run.pfn + n, run.kind);
            let follows = self
                .pages
                .last()
                .is_some_and(|last| (last.0 + 1, last.1) == page);
            self.firsts.push(!(follows && (n > 0 || joins)));
            self.pages.push(page);
        }
    }

    /// The rest of the extent that a page is in.
    fn run_at(&self, page: usize) -> Option<Run> {
        let (pfn, kind) = *self.pages.get(page)?;
        let rest = self.firsts[page + 1..].iter().take_while(|first| !**first);
        Some(Run {
            pfn,
            pages: 1 + rest.count(),
            kind,
        })
    }

    /// The extents from a page on.
    fn from(&self, mut page: usize) -> Vec<Run> {
        std::iter::from_fn(|| {
            let run = self.run_at(page)?;
            page += run.pages;
            Some(run)
        })
        .collect()
    }
}

/// Bytes of an extent.
const EXTENT: usize = 16;
/// Room for extents that there may be from the beginning.
const AT_FIRST: usize = 8;

fn check(extents: &Extents, model: &Model, lookups: &[usize]) {
    assert_eq!(extents.pages(), model.pages.len());
    let all = model.from(0);
    assert_eq!(extents.count(), all.len());
    assert_eq!(extents.iter().collect::<Vec<_>>(), all);
    let ends = [
        0,
        model.pages.len().saturating_sub(1),
        model.pages.len(),
        model.pages.len() + 1,
        usize::MAX,
    ];
    let lookups = lookups.iter().map(|page| page % (model.pages.len() + 2));
    for page in lookups.chain(ends) {
        let seen = extents.iter_from(page);
        assert_eq!(seen.clone().next(), model.run_at(page), "page {page}");
        // Also after several runs, from a copy that was made in between.
        let mut on_the_way = seen.clone();
        on_the_way.next();
        let expected = model.from(page);
        let rest = expected.get(1..).unwrap_or(&[]);
        assert_eq!(on_the_way.collect::<Vec<_>>(), rest, "behind page {page}");
        assert_eq!(seen.collect::<Vec<_>>(), expected, "from page {page}");
    }
}

/// The most runs of one test; Miri takes a thousand times as long.
const MOST_RUNS: usize = if cfg!(miri) { 24 } else { 300 };

/// Runs that often follow each other, and whether they may be joined.
fn runs() -> impl Strategy<Value = Vec<(Run, bool)>> {
    let length = prop_oneof![4 => 1usize..3, 2 => 1usize..40, 1 => Just(512)];
    let gap = prop_oneof![3 => Just(0usize), 2 => 1usize..1000];
    let step = (gap, length, any::<bool>(), any::<bool>(), 0u8..8);
    proptest::collection::vec(step, 1..MOST_RUNS).prop_map(|steps| {
        let mut next = 1 << 20;
        let mut kind = Kind::Pages;
        let run = |(gap, pages, back, joins, change)| {
            if change == 0 {
                kind = match kind {
                    Kind::Pages => Kind::Hugetlb,
                    Kind::Hugetlb => Kind::Pages,
                };
            }
            // Also backwards, as physical memory comes.
            let pfn = if back && gap > 0 {
                next - gap
            } else {
                next + gap
            };
            next = pfn + pages;
            (Run { pfn, pages, kind }, joins)
        };
        steps.into_iter().map(run).collect()
    })
}

fn lookups() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(any::<usize>(), 12)
}

proptest! {
    #[test]
    fn extents_agree_with_a_list_of_pages(runs in runs(), lookups in lookups()) {
        let pages = runs.iter().map(|(run, _)| run.pages).sum();
        let mut extents = Extents::new(pages);
        let mut model = Model::default();
        check(&extents, &model, &lookups);
        for (run, joins) in runs {
            extents.push(run.pfn, run.pages, run.kind, joins).unwrap();
            model.push(run, joins);
        }
        check(&extents, &model, &lookups);
        prop_assert!(extents.bytes() <= EXTENT * (2 * pages).max(AT_FIRST));
        extents.shrink().unwrap();
        check(&extents, &model, &lookups);
        let count = extents.count();
        prop_assert!(extents.bytes() <= EXTENT * (count + count / 8).max(pages.min(AT_FIRST)));
    }

    #[test]
    fn a_failed_push_changes_nothing(
        runs in runs(),
        allocations in 0usize..8,
        lookups in lookups(),
    ) {
        // With too little room on purpose.
        let mut extents = Extents::new(1);
        let mut model = Model::default();
        fail_after(Some(allocations));
        let mut left = runs.into_iter();
        for (run, joins) in left.by_ref() {
            if extents.push(run.pfn, run.pages, run.kind, joins).is_err() {
                fail_after(None);
                check(&extents, &model, &lookups);
                // A push that failed because there was no memory can be repeated.
                extents.push(run.pfn, run.pages, run.kind, joins).unwrap();
                model.push(run, joins);
                break;
            }
            model.push(run, joins);
        }
        fail_after(None);
        for (run, joins) in left {
            extents.push(run.pfn, run.pages, run.kind, joins).unwrap();
            model.push(run, joins);
        }
        check(&extents, &model, &lookups);
        fail_after(Some(0));
        let _ = extents.shrink();
        fail_after(None);
        check(&extents, &model, &lookups);
    }
}

/// Room for all pages to come is made at once where those before were scattered.
#[test]
fn room_is_made_by_what_came_before() {
    let mut extents = Extents::new(1000);
    for n in 0..AT_FIRST {
        extents.push(2 * n, 1, Kind::Pages, true).unwrap();
    }
    assert_eq!(extents.bytes(), EXTENT * AT_FIRST);
    extents.push(5000, 1, Kind::Pages, true).unwrap();
    assert_eq!(extents.bytes(), EXTENT * 1000);

    // A quarter as many, where each has four pages.
    let mut extents = Extents::new(4000);
    for n in 0..=AT_FIRST {
        extents.push(8 * n, 4, Kind::Pages, true).unwrap();
    }
    assert_eq!(extents.bytes(), EXTENT * 1000);
}

/// A list grows up to the maximum. It may already be longer: the kernel's `Vec` doubles its capacity, and `vrealloc()`
/// allocates more than `kvmalloc()` does.
#[test]
fn the_longest_list() {
    let most = i32::MAX as usize / EXTENT;
    for len in [2, most - 1, most, most + 1, 2 * most] {
        let more = growth(len, len, 4 * most);
        assert_eq!(more, most.saturating_sub(len), "of {len} extents");
    }
}

/// A list is copied where more than an eighth of it is gained, or it has more room than there are pages; a
/// small one never is.
#[test]
fn room_is_given_back_where_it_is_worth_it() {
    // Extents, pages of each, the pages that were expected, and the room in the end.
    for (count, each, expected, room) in [
        (1, 1, 8, 0),
        (2, 1, 2, 2),
        (7, 100, 700, 8),
        (8, 1, 8, 8),
        (64, 2, 2 * 72, 72),
        (64, 2, 2 * 73, 64),
        (63, 2, 2 * 72, 63),
        (63, 1, 64, 63),
        (64, 1, 64, 64),
    ] {
        let mut extents = Extents::new(expected);
        for n in 0..count {
            extents.push(1000 * n, each, Kind::Pages, true).unwrap();
        }
        extents.shrink().unwrap();
        assert_eq!(
            extents.bytes() / EXTENT,
            room,
            "{count} extents of {each} pages, {expected} pages expected"
        );
    }
    // Room for just as many extents as there are pages stays.
    let mut extents = Extents::new(64);
    for n in 0..63 {
        let pages = if n == 62 { 2 } else { 1 };
        extents.push(1000 * n, pages, Kind::Pages, true).unwrap();
    }
    extents.shrink().unwrap();
    assert_eq!((extents.pages(), extents.bytes() / EXTENT), (64, 64));
}

/// One extent takes no memory, the second one does.
#[test]
fn one_extent_needs_no_memory() {
    let mut extents = Extents::new(1000);
    fail_after(Some(0));
    extents.push(7, 500, Kind::Hugetlb, true).unwrap();
    extents.push(507, 400, Kind::Hugetlb, true).unwrap();
    assert!(extents.push(5000, 1, Kind::Hugetlb, true).is_err());
    assert_eq!(extents.bytes(), 0);
    assert_eq!((extents.pages(), extents.count()), (900, 1));
    fail_after(None);
    extents.push(5000, 1, Kind::Hugetlb, true).unwrap();
    assert_eq!((extents.pages(), extents.count()), (901, 2));
    assert_eq!(extents.bytes(), EXTENT * AT_FIRST);
}

/// Sixteen bytes for each scattered page, and no more than that for contiguous memory of any size.
#[test]
#[cfg_attr(miri, ignore = "a million pages take hours")]
fn what_it_costs() {
    let mut extents = Extents::new(1 << 20);
    for n in 0..1 << 20 {
        extents.push(2 * n, 1, Kind::Pages, true).unwrap();
    }
    extents.shrink().unwrap();
    assert_eq!((extents.count(), extents.bytes()), (1 << 20, 16 << 20));

    let mut extents = Extents::new(1 << 20);
    for n in 0..1 << 11 {
        extents.push(n << 9, 1 << 9, Kind::Hugetlb, true).unwrap();
    }
    extents.shrink().unwrap();
    assert_eq!(extents.count(), 1);
    assert_eq!(extents.bytes(), 0);
    assert_eq!(
        extents.iter_from(12345).next().map(|run| run.pages),
        Some((1 << 20) - 12345)
    );
}

/// Frames that follow each other are one extent only if they are of one kind, and may be joined.
#[test]
fn what_is_joined() {
    let list: [(usize, usize, Kind, bool, usize); 6] = [
        (100, 3, Kind::Pages, true, 1),
        (103, 1, Kind::Pages, true, 1),
        (104, 1, Kind::Hugetlb, true, 2),
        (105, 511, Kind::Hugetlb, false, 3),
        (616, 1, Kind::Hugetlb, true, 3),
        (617, 1, Kind::Pages, true, 4),
    ];
    let mut extents = Extents::new(518);
    for (pfn, pages, kind, joins, count) in list {
        extents.push(pfn, pages, kind, joins).unwrap();
        assert_eq!(extents.count(), count, "after {pfn}");
    }
    // The highest frame that there can be.
    let most = (1 << 40) - 1;
    extents.push(most, 1, Kind::Hugetlb, true).unwrap();
    let last = Run {
        pfn: most,
        pages: 1,
        kind: Kind::Hugetlb,
    };
    assert_eq!(extents.iter().last(), Some(last));
}
