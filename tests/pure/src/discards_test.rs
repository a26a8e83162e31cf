// SPDX-License-Identifier: GPL-2.0

//! `survey` against the states of all pages.

use crate::{
    discards::survey,
    extents::{Extents, Kind},
    kernel_ext::{
        pages::{Sight, SIGHTS},
        sched::{BREATHS, LIFE},
    },
    pin::held::Held,
};
use kernel::prelude::{Result, EFAULT, EINTR};
use proptest::prelude::*;
use std::ops::ControlFlow;

/// A buffer of these extents, and the states of its pages; frames are in folios of four.
fn buffer(extents: &[(usize, usize)], sights: &[Sight]) -> (Held, Vec<Sight>) {
    let frames = (0..sights.len()).map(|pfn| (sights[pfn - pfn % 4], 4 - pfn % 4));
    SIGHTS.set(frames.collect());
    let total = extents.iter().map(|(_, pages)| pages).sum();
    let mut list = Extents::new(total);
    let mut pages = Vec::new();
    for (pfn, count) in extents {
        list.push(*pfn, *count, Kind::Pages, true).unwrap();
        pages.extend((*pfn..pfn + count).map(|pfn| sights[pfn - pfn % 4]));
    }
    (Held(list), pages)
}

/// The parts from a page on: first page, pages, state.
fn parts(pages: &[Sight], from: usize) -> Vec<(usize, usize, Sight)> {
    let mut parts: Vec<(usize, usize, Sight)> = Vec::new();
    for (index, sight) in pages.iter().enumerate().skip(from) {
        match parts.last_mut() {
            Some((_, count, last)) if last == sight => *count += 1,
            _ => parts.push((index, 1, *sight)),
        }
    }
    parts
}

fn sight() -> impl Strategy<Value = Sight> {
    prop_oneof![
        Just(Sight::Seen),
        Just(Sight::Discarded),
        Just(Sight::Unsure)
    ]
}

const FRAMES: usize = 64;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        ..ProptestConfig::default()
    })]

    #[test]
    fn parts_agree_with_pages(
        sights in proptest::collection::vec(sight(), FRAMES),
        extents in proptest::collection::vec((0usize..FRAMES - 20, 1usize..20), 1..12),
        from in any::<usize>(),
        stop in 0usize..20,
    ) {
        LIFE.set(usize::MAX);
        let (held, pages) = buffer(&extents, &sights);
        let from = from % (pages.len() + 1);
        let expected = parts(&pages, from);
        let mut seen = Vec::new();
        let end = survey(&held, from, |part| {
            seen.push((part.first, part.pages, part.sight));
            Ok(ControlFlow::Continue(()))
        });
        prop_assert_eq!(end, Ok(pages.len()));
        prop_assert_eq!(&seen, &expected);
        // Stopped at a part, and stopped by an error.
        let mut count = 0;
        let end = survey(&held, from, |_| {
            count += 1;
            Ok(if count > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        let right = expected.get(stop).map_or(pages.len(), |(first, _, _)| *first);
        prop_assert_eq!(end, Ok(right));
        prop_assert_eq!(count, (stop + 1).min(expected.len()));
        let result = survey(&held, from, |_| Err(EFAULT));
        let right = if from < pages.len() { Err(EFAULT) } else { Ok(from) };
        prop_assert_eq!(result, right);
    }
}

/// A fatal signal is noticed after some pages, and others get to run.
#[test]
fn a_long_survey_can_be_killed() -> Result {
    let extents = vec![(0, 4); 10_000];
    let (held, _) = buffer(&extents, &[Sight::Seen; 8]);
    let all = |_: &crate::discards::Part| Ok(ControlFlow::Continue(()));
    LIFE.set(usize::MAX);
    BREATHS.set(0);
    survey(&held, 0, all)?;
    assert_eq!(BREATHS.get(), 9);
    LIFE.set(2);
    assert_eq!(survey(&held, 0, all), Err(EINTR));
    LIFE.set(usize::MAX);
    Ok(())
}
