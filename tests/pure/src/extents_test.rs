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
    for run in map.iter() {
        assert_eq!(
            Some(run),
            model.find(page, usize::MAX),
            "extent at page {page}"
        );
        page += run.pages;
        extents += 1;
    }
    assert_eq!((page, extents), (map.pages(), map.extents()));
    for (page, max) in lookups {
        let page = page % (model.pages.len() + 2);
        let max = max % 600 + 1;
        assert_eq!(
            map.find(page, max),
            model.find(page, max),
            "page {page}, at most {max}"
        );
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
    let bound = (8 * map.pages()).min(32 * map.extents()) + SLACK;
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

proptest! {
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
                let taken = map.push_frames(&pfns);
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
    assert!(map.bytes() <= 256, "{}", map.bytes());
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
    let mut map = ExtentMap::new(1000 + (1 << 28));
    for n in 0..1000 {
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
        map.find(1000 + (1 << 27), usize::MAX).unwrap().pfn,
        (1 << 30) + (1 << 27)
    );
}
