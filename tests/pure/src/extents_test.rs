// SPDX-License-Identifier: GPL-2.0

//! `ExtentMap` against a list of pages.

use crate::extents::{ExtentMap, Granularity, Run};
use kernel::alloc::fail_after;
use proptest::prelude::*;

/// What a buffer consists of, page by page, and where its extents begin.
#[derive(Default)]
struct Model {
    pages: Vec<(usize, Granularity)>,
    firsts: Vec<bool>,
}

impl Model {
    fn push(&mut self, run: Run, joinable: bool) {
        for n in 0..run.pages {
            let page = (run.pfn + n, run.granularity);
            let follows = self
                .pages
                .last()
                .is_some_and(|last| (last.0 + 1, last.1) == page);
            self.firsts.push(!(follows && (n > 0 || joinable)));
            self.pages.push(page);
        }
    }

    fn extents(&self) -> usize {
        self.firsts.iter().filter(|first| **first).count()
    }

    fn find(&self, page: usize, max: usize) -> Option<Run> {
        let (pfn, granularity) = *self.pages.get(page)?;
        let pages = 1
            + (page + 1..self.pages.len().min(page.saturating_add(max)))
                .take_while(|next| !self.firsts[*next])
                .count();
        Some(Run {
            pfn,
            pages,
            granularity,
        })
    }
}

/// Bytes that the larger of the tables of chunks may take, and what the last chunk may waste.
const SLACK: usize = 4096;

fn check(map: &ExtentMap, model: &Model, lookups: &[(usize, usize)]) {
    assert_eq!(map.pages(), model.pages.len());
    assert_eq!(map.extents(), model.extents());
    let mut page = 0;
    let mut extents = 0;
    let runs: Vec<Run> = map.iter().collect();
    for run in runs.iter().copied() {
        assert_eq!(
            Some(run),
            model.find(page, usize::MAX),
            "extent at page {page}"
        );
        page += run.pages;
        extents += 1;
    }
    assert_eq!((page, extents), (map.pages(), map.extents()));
    // From outside, from inside, and from inside after some from outside.
    let mut outside = map.iter();
    let mut left = &runs[..];
    for at in 0.. {
        if at < 3 || at % 61 == 0 || left.len() < 2 {
            let mut inside = Vec::new();
            outside.clone().for_each(|run| inside.push(run));
            assert_eq!(inside, left, "from extent {at} on");
        }
        assert_eq!(outside.next(), left.first().copied(), "extent {at}");
        if left.is_empty() {
            break;
        }
        left = &left[1..];
    }
    assert_eq!(outside.next(), None);
    for (page, max) in lookups {
        let page = page % (model.pages.len() + 2);
        let max = max % 600 + 1;
        assert_eq!(
            map.find(page, max),
            model.find(page, max),
            "page {page}, at most {max}"
        );
    }
    for (page, room) in lookups {
        let page = page % (model.pages.len() + 2);
        let mut frames = vec![0; room % 100 + 1];
        let count = map.frames(page, &mut frames);
        assert_eq!(count == 0, page >= model.pages.len());
        for (n, frame) in frames[..count].iter().enumerate() {
            assert_eq!(*frame, model.pages[page + n].0, "frame {n} from {page} on");
        }
    }
    let mut frames = [0; 64];
    let mut page = 0;
    while page < model.pages.len() {
        let count = map.frames(page, &mut frames);
        assert!(count > 0);
        for (n, frame) in frames[..count].iter().enumerate() {
            assert_eq!(*frame, model.pages[page + n].0, "frame {}", page + n);
        }
        page += count;
    }
    assert_eq!(map.frames(page, &mut frames), 0);
    for page in [0, model.pages.len().saturating_sub(1), model.pages.len()] {
        assert_eq!(map.find(page, usize::MAX), model.find(page, usize::MAX));
    }
}

fn check_size(map: &ExtentMap) {
    if map.extents() <= 2 {
        assert_eq!(map.bytes(), 0);
    }
    let mut page = 0;
    let starts = map.iter().fold(0, |starts, run| {
        let start = page;
        page += run.pages;
        starts | start
    });
    let unit = 1 << starts.trailing_zeros().min(63);
    let bound = (8 * map.pages().div_ceil(unit)).min(32 * map.extents()) + SLACK;
    assert!(
        map.bytes() <= bound,
        "{} bytes for {} pages in {} extents",
        map.bytes(),
        map.pages(),
        map.extents()
    );
}

/// The most runs of one test; Miri takes a thousand times as long.
const MOST_RUNS: usize = if cfg!(miri) { 24 } else { 900 };

/// Runs that often touch each other: `(gap, pages, folio, joinable)`.
fn runs() -> impl Strategy<Value = Vec<(Run, bool)>> {
    let length = prop_oneof![4 => 1usize..3, 2 => 1usize..40, 1 => 512usize..513];
    let gap = prop_oneof![3 => Just(0usize), 2 => 1usize..1000];
    proptest::collection::vec(
        (gap, length, any::<bool>(), any::<bool>(), 0u8..8),
        1..MOST_RUNS,
    )
    .prop_map(|steps| {
        let mut next = 1 << 20;
        let mut folio = false;
        steps
            .into_iter()
            .map(|(gap, pages, back, joinable, kind)| {
                if kind == 0 {
                    folio = !folio;
                }
                // Also backwards, as physical memory comes.
                let pfn = if back && gap > 0 {
                    next - gap
                } else {
                    next + gap
                };
                next = pfn + pages;
                let granularity = if folio {
                    Granularity::Folio
                } else {
                    Granularity::Page
                };
                (
                    Run {
                        pfn,
                        pages,
                        granularity,
                    },
                    joinable,
                )
            })
            .collect()
    })
}

/// Runs of which all but the last consist of units of `1 << shift` pages, hardly two adjacent.
fn unit_runs() -> impl Strategy<Value = (u32, Vec<(Run, bool)>)> {
    // Dense has to be the smaller form nearly always.
    let units = prop_oneof![6 => Just(1usize), 1 => 2usize..4];
    let gap = prop_oneof![1 => Just(0usize), 5 => 1usize..5];
    let steps =
        proptest::collection::vec((units, gap, any::<bool>(), any::<bool>()), 1..MOST_RUNS / 4);
    (0u32..10, any::<usize>(), steps).prop_map(|(shift, last, steps)| {
        let count = steps.len();
        let mut next = 1 << 20;
        let runs = steps
            .into_iter()
            .enumerate()
            .map(|(at, (units, gap, folio, joinable))| {
                let pfn = next + gap;
                let pages = if at + 1 == count {
                    last % (units << shift) + 1
                } else {
                    units << shift
                };
                next = pfn + pages;
                let granularity = if folio {
                    Granularity::Folio
                } else {
                    Granularity::Page
                };
                let run = Run {
                    pfn,
                    pages,
                    granularity,
                };
                (run, joinable)
            })
            .collect();
        (shift, runs)
    })
}

proptest! {
    #[test]
    fn units_agree_with_a_list_of_pages(
        (shift, runs) in unit_runs(),
        allocations in proptest::option::of(0usize..40),
        lookups in proptest::collection::vec((any::<usize>(), any::<usize>()), 30),
        more in runs(),
    ) {
        let sum = |runs: &[(Run, bool)]| runs.iter().map(|(run, _)| run.pages).sum::<usize>();
        let mut map = ExtentMap::new(sum(&runs) + sum(&more));
        let mut model = Model::default();
        for (run, joinable) in runs {
            map.push(run, joinable).unwrap();
            model.push(run, joinable);
        }
        fail_after(allocations);
        map.finish();
        fail_after(None);
        check(&map, &model, &lookups);
        if allocations.is_none() {
            check_size(&map);
            let most = 8 * map.pages().div_ceil(1 << shift).min(4 * map.extents());
            prop_assert!(map.bytes() <= most + 256, "{} of {most}", map.bytes());
        }
        // Nothing that a caller does, but what would be right.
        fail_after(allocations);
        for (run, joinable) in more {
            if map.push(run, joinable).is_err() {
                break;
            }
            model.push(run, joinable);
        }
        fail_after(None);
        check(&map, &model, &lookups);
        map.finish();
        check(&map, &model, &lookups);
    }

    #[test]
    fn map_agrees_with_a_list_of_pages(
        runs in runs(),
        lookups in proptest::collection::vec((any::<usize>(), any::<usize>()), 30),
    ) {
        let mut map = ExtentMap::new(runs.iter().map(|(run, _)| run.pages).sum());
        let mut model = Model::default();
        for (run, joinable) in runs {
            map.push(run, joinable).unwrap();
            model.push(run, joinable);
        }
        check(&map, &model, &lookups);
        map.finish();
        check(&map, &model, &lookups);
        check_size(&map);
    }

    #[test]
    fn a_failed_push_changes_nothing(runs in runs(), allocations in 0usize..60) {
        let mut map = ExtentMap::new(runs.iter().map(|(run, _)| run.pages).sum());
        let mut model = Model::default();
        fail_after(Some(allocations));
        for (run, joinable) in runs {
            if map.push(run, joinable).is_ok() {
                model.push(run, joinable);
            } else {
                break;
            }
        }
        check(&map, &model, &[]);
        // Shrinking is not allowed to need memory.
        map.finish();
        fail_after(None);
        check(&map, &model, &[]);
    }

    #[test]
    fn pages_in_batches_are_as_pages_one_by_one(
        runs in runs(),
        batch in 1usize..600,
        allocations in proptest::option::of(0usize..60),
        lookups in proptest::collection::vec((any::<usize>(), any::<usize>()), 30),
    ) {
        let mut map = ExtentMap::new(runs.iter().map(|(run, _)| run.pages).sum());
        let mut model = Model::default();
        fail_after(allocations);
        'push: for (at, (run, joinable)) in runs.iter().enumerate() {
            if run.granularity == Granularity::Folio {
                if map.push(*run, *joinable).is_err() {
                    break;
                }
                model.push(*run, *joinable);
                continue;
            }
            if at > 0 && runs[at - 1].0.granularity == Granularity::Page {
                // Was in the batches before.
                continue;
            }
            if !joinable {
                map.end_extent();
            }
            let mut joins = *joinable;
            let pfns: Vec<usize> = runs[at..]
                .iter()
                .take_while(|(run, _)| run.granularity == Granularity::Page)
                .flat_map(|(run, _)| run.pfn..run.pfn + run.pages)
                .collect();
            for pfns in pfns.chunks(batch) {
                let taken = map.push_frames(pfns);
                for pfn in &pfns[..taken] {
                    model.push(page(*pfn), joins);
                    joins = true;
                }
                if taken < pfns.len() {
                    break 'push;
                }
            }
        }
        map.finish();
        fail_after(None);
        check(&map, &model, &lookups);
        if allocations.is_none() {
            prop_assert_eq!(map.pages(), runs.iter().map(|(run, _)| run.pages).sum::<usize>());
        }
    }
}

fn page(pfn: usize) -> Run {
    Run {
        pfn,
        pages: 1,
        granularity: Granularity::Page,
    }
}

#[test]
#[cfg_attr(miri, ignore = "a million pages take hours")]
fn scattered_pages_cost_eight_bytes_each() {
    let mut map = ExtentMap::new(1 << 20);
    for n in 0..1 << 20 {
        map.push(page(2 * n), true).unwrap();
    }
    map.finish();
    assert_eq!(map.extents(), 1 << 20);
    // The table of chunks is a 2,700th of it.
    assert!(map.bytes() <= (8 << 20) + 8192, "{}", map.bytes());
}

/// Pages, pushed in two batches that meet at every place, with every number of allocations.
#[test]
#[cfg_attr(miri, ignore = "hundreds of thousands of pages take hours")]
fn batches_may_meet_anywhere() {
    let scattered: Vec<usize> = (0..40).map(|n| 1000 - 3 * n).collect();
    let pairs: Vec<usize> = (0..40).map(|n| 1000 + n / 2 * 5 + n % 2).collect();
    let adjacent: Vec<usize> = (0..40).collect();
    let mixed: Vec<usize> = adjacent.iter().chain(&scattered).copied().collect();
    let backwards: Vec<usize> = scattered.iter().chain(&adjacent).copied().collect();
    for pfns in [scattered, pairs, adjacent, mixed, backwards] {
        for split in 0..=pfns.len() {
            for allocations in 0..12 {
                let mut map = ExtentMap::new(pfns.len());
                let mut model = Model::default();
                fail_after(Some(allocations));
                let mut all = true;
                for pfns in [&pfns[..split], &pfns[split..]] {
                    let taken = if all { map.push_frames(pfns) } else { 0 };
                    all &= taken == pfns.len();
                    for pfn in &pfns[..taken] {
                        model.push(page(*pfn), true);
                    }
                }
                fail_after(None);
                check(&map, &model, &[(7, 70), (41, 3)]);
                // What failed for want of memory can be done again.
                let rest = &pfns[map.pages()..];
                assert_eq!(map.push_frames(rest), rest.len());
                rest.iter().for_each(|pfn| model.push(page(*pfn), true));
                map.finish();
                check(&map, &model, &[(7, 70), (41, 3)]);
                assert!(all || allocations < 11);
            }
        }
    }
}

/// More than one chunk in each form, one of them full to its end.
#[test]
#[cfg_attr(miri, ignore = "thousands of pages take hours")]
fn chunks_follow_each_other() {
    // A chunk has 8,192 units or 4,096 extents. The last page may be alone.
    for (count, pages) in [(8192, 1), (20_000, 1), (4096, 3), (9000, 3), (20_000, 4)] {
        let mut map = ExtentMap::new(count * pages + 1);
        let mut model = Model::default();
        let pfns: Vec<usize> = (0..count * pages)
            .map(|n| 1000 + n / pages * (pages + 1) + n % pages)
            .collect();
        for batch in pfns.chunks(500) {
            assert_eq!(map.push_frames(batch), batch.len());
        }
        pfns.iter().for_each(|pfn| model.push(page(*pfn), true));
        let lookups: Vec<_> = (0..count).step_by(7).map(|n| (n * 4099, n)).collect();
        check(&map, &model, &lookups);
        map.finish();
        check(&map, &model, &lookups);
        check_size(&map);
        map.push(page(0), true).unwrap();
        model.push(page(0), true);
        check(&map, &model, &lookups);
    }
}

/// Whatever the form, and however they come, pages of one kind never join those of the other.
#[test]
fn folios_and_pages_stay_apart() {
    // None before, three a run, scattered.
    for (before, together) in [(0, 1), (60, 3), (60, 1)] {
        for (pages, finished) in [(1, false), (3, false), (1, true), (3, true)] {
            let mut map = ExtentMap::new(1000);
            let mut model = Model::default();
            let frames: Vec<usize> = (0..before)
                .map(|n| n / together * 5 + n % together)
                .collect();
            assert_eq!(map.push_frames(&frames), frames.len());
            frames.iter().for_each(|pfn| model.push(page(*pfn), true));
            if finished {
                map.finish();
            }
            let folio = |pfn| Run {
                pfn,
                pages,
                granularity: Granularity::Folio,
            };
            // A folio behind pages, pages behind it, and another behind those.
            let at = frames.last().map_or(50, |last| last + 1);
            let behind = [at + pages, at + pages + 1];
            map.push(folio(at), true).unwrap();
            model.push(folio(at), true);
            assert_eq!(map.push_frames(&behind), 2);
            behind.iter().for_each(|pfn| model.push(page(*pfn), true));
            map.push(folio(at + pages + 2), true).unwrap();
            model.push(folio(at + pages + 2), true);
            check(&map, &model, &[(before, 9), (before + 2, 9)]);
            map.finish();
            check(&map, &model, &[(before, 9), (before + 2, 9)]);
            assert!(!map.is_scattered());
        }
    }
}

/// A run of which a part still fits in a chunk, when no other can be had.
#[test]
#[cfg_attr(miri, ignore = "thousands of pages take hours")]
fn a_run_that_fits_in_part_is_not_taken_in_part() {
    let mut map = ExtentMap::new(9000);
    let mut model = Model::default();
    let frames: Vec<usize> = (0..8190).map(|n| 2 * n).collect();
    assert_eq!(map.push_frames(&frames), frames.len());
    frames.iter().for_each(|pfn| model.push(page(*pfn), true));
    let run = Run {
        pfn: 1 << 20,
        pages: 4,
        granularity: Granularity::Folio,
    };
    fail_after(Some(0));
    assert!(map.push(run, true).is_err());
    assert_eq!(map.push_frames(&[8, 9, 20]), 2);
    fail_after(None);
    model.push(page(8), true);
    model.push(page(9), true);
    check(&map, &model, &[]);
    map.push(run, true).unwrap();
    model.push(run, true);
    check(&map, &model, &[(8190, 5)]);
}

#[test]
fn two_extents_cost_nothing() {
    let mut map = ExtentMap::new(1000);
    assert_eq!(map.push_frames(&[7, 8, 9, 100, 101]), 5);
    let run = Run {
        pfn: 102,
        pages: 995,
        granularity: Granularity::Page,
    };
    // None can be had, none is asked for.
    fail_after(Some(0));
    map.push(run, true).unwrap();
    map.finish();
    fail_after(None);
    assert_eq!((map.extents(), map.pages(), map.bytes()), (2, 1000, 0));
    assert!(!map.is_scattered());
}

#[test]
fn scattered_huge_pages_cost_eight_bytes_each() {
    for granularity in [Granularity::Folio, Granularity::Page] {
        for huge in [64, 512] {
            let mut map = ExtentMap::new(512 * huge);
            for n in 0..huge {
                let run = Run {
                    pfn: 1024 * n,
                    pages: 512,
                    granularity,
                };
                map.push(run, true).unwrap();
            }
            assert!(map.bytes() <= 16 * huge + 128, "{}", map.bytes());
            map.finish();
            assert_eq!((map.extents(), map.pages()), (huge, 512 * huge));
            assert_eq!(map.bytes(), 8 * huge);
            // Scattered, but not by pages.
            assert!(!map.is_scattered());
            let last = map.find(512 * huge - 1, 9).unwrap();
            assert_eq!((last.pfn, last.pages), (1024 * (huge - 1) + 511, 1));
        }
    }
}

#[test]
fn what_is_scattered_is_told_by_frames() {
    let mut map = ExtentMap::new(4096);
    let frames: Vec<usize> = (0..4096).map(|n| 2 * n).collect();
    for batch in frames.chunks(512) {
        assert_eq!(map.push_frames(batch), batch.len());
    }
    map.finish();
    assert!(map.is_scattered());
    assert_eq!(map.bytes(), 8 * 4096);
    // One extent that is not of pages for themselves.
    let mut map = ExtentMap::new(4097);
    map.push_frames(&frames);
    map.push(
        Run {
            granularity: Granularity::Folio,
            ..page(9000)
        },
        true,
    )
    .unwrap();
    map.finish();
    assert!(!map.is_scattered());
}

#[test]
fn adjacent_huge_pages_cost_next_to_nothing() {
    let mut map = ExtentMap::new(512 * 512);
    for n in 0..512 {
        let run = Run {
            pfn: 512 * n,
            pages: 512,
            granularity: Granularity::Folio,
        };
        map.push(run, true).unwrap();
    }
    map.finish();
    assert_eq!((map.extents(), map.pages()), (1, 262_144));
    assert_eq!(map.bytes(), 0);
}

#[test]
fn two_pins_of_one_folio_stay_two_extents() {
    let mut map = ExtentMap::new(512);
    for (pfn, joinable) in [(1024, true), (1280, false)] {
        let run = Run {
            pfn,
            pages: 256,
            granularity: Granularity::Folio,
        };
        map.push(run, joinable).unwrap();
    }
    assert_eq!(map.extents(), 2);
}

#[test]
fn a_long_run_after_scattered_pages_does_not_stay_dense() {
    // The second fills a chunk of the sparse form to its end.
    for pages in [1000, 4096, 10_000] {
        let mut map = ExtentMap::new(pages + (1 << 28));
        for n in 0..pages {
            map.push(page(2 * n), true).unwrap();
        }
        let huge = Run {
            pfn: 1 << 30,
            pages: 1 << 28,
            granularity: Granularity::Folio,
        };
        // Dense, this would take 2 GiB meanwhile.
        map.push(huge, true).unwrap();
        assert!(map.bytes() < 1 << 20, "{}", map.bytes());
        assert_eq!(
            map.find(pages + (1 << 27), usize::MAX).unwrap().pfn,
            (1 << 30) + (1 << 27)
        );
    }
}
