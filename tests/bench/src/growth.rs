// SPDX-License-Identifier: MIT OR Apache-2.0

//! How cost grows: with a buffer's size, with its ranges, with the buffers that live already.

use std::os::fd::OwnedFd;

use anyhow::Result;
use pinbuf_test_harness::support::kernel;
use pinbuf_test_harness::support::memory::{HUGE, PAGE};
use pinbuf_uapi::MAX_RANGES;

use crate::memory::{memfd, shuffled, sorted_pool, whole};
use crate::report::{Curve, Point};
use crate::run::measure;
use crate::task::{Item, Shape, Side, What};

/// What a curve's points are.
pub struct Plan {
    /// What is measured.
    pub title: String,
    /// What there is more and more of.
    pub unit: &'static str,
    /// The memory, of all points.
    shape: Shape,
    /// Which sides can do it.
    sides: Vec<Side>,
    points: Vec<u64>,
    at: fn(u64) -> (Vec<Item>, What),
}

/// Calls in a sample: more of them if they are short.
fn times(pages: u64) -> u32 {
    (16_384 / pages.max(1)).clamp(1, 256) as u32
}

fn of_size(bytes: u64) -> (Vec<Item>, What) {
    let times = times(bytes / PAGE as u64);
    (whole(bytes), What::Cycle { times })
}

fn of_huge(bytes: u64) -> (Vec<Item>, What) {
    let times = times(bytes / HUGE as u64 * 16);
    (whole(bytes), What::Cycle { times })
}

fn of_ranges(count: u64) -> (Vec<Item>, What) {
    let times = times(count);
    (
        shuffled(count * PAGE as u64, PAGE as u64),
        What::Cycle { times },
    )
}

fn among(others: u64) -> (Vec<Item>, What) {
    let others = others as u32 - 1;
    (whole(PAGE as u64), What::Among { others, times: 500 })
}

/// 1, 4, 16, … times `from`, and `to`.
fn steps(from: u64, to: u64) -> Vec<u64> {
    let mut points: Vec<u64> = std::iter::successors(Some(from), |n| n.checked_mul(4))
        .take_while(|n| *n < to)
        .collect();
    points.push(to);
    points
}

/// The curves, as far as the guest has memory for them.
pub fn plans(quick: bool) -> Result<Vec<Plan>> {
    let room = kernel::available()? as u64;
    // The rest of memory has to suffice for udmabuf's lists, page tables and so on.
    let largest = |limit: u64| {
        let mut bytes = limit;
        while bytes > room / 8 * 7 {
            bytes /= 2;
        }
        bytes
    };
    let small = largest(if quick { 16 << 20 } else { 4 << 30 });
    let huge = largest(if quick { 64 << 20 } else { 8 << 30 });
    let ranges = u64::from(if quick { 1024 } else { MAX_RANGES });
    let shape = |bytes, huge| Shape {
        bytes,
        huge,
        mapped: true,
        sparse: false,
        scattered: false,
    };
    let both = || vec![Side::Udmabuf, Side::Pinbuf];
    Ok(vec![
        Plan {
            title: "create + close, by size, 4 KiB shmem".to_owned(),
            unit: "byte",
            shape: shape(small, false),
            sides: both(),
            points: steps(PAGE as u64, small),
            at: of_size,
        },
        Plan {
            title: "create + close, by size, 2 MiB hugetlb".to_owned(),
            unit: "byte",
            shape: shape(huge, true),
            sides: both(),
            points: steps(HUGE as u64, huge),
            at: of_huge,
        },
        Plan {
            title: "create + close, by ranges of one page, shuffled".to_owned(),
            unit: "range",
            shape: shape(ranges * PAGE as u64, false),
            sides: both(),
            points: steps(1, ranges),
            at: of_ranges,
        },
        Plan {
            title: "create + close of 4 KiB, by buffers that live".to_owned(),
            unit: "buffer",
            shape: shape(PAGE as u64, false),
            sides: both(),
            points: steps(1, if quick { 64 } else { 1000 }),
            at: among,
        },
    ])
}

/// Measures a curve.
pub fn run(plan: &Plan, rounds: usize, mut progress: impl FnMut(u64)) -> Result<Curve> {
    let _pool = plan
        .shape
        .huge
        .then(|| sorted_pool(plan.shape.bytes))
        .transpose()?;
    let memory: OwnedFd = memfd(plan.shape)?;
    let mut points = Vec::new();
    for &x in &plan.points {
        progress(x);
        let (items, what) = (plan.at)(x);
        let shape = Shape {
            bytes: items.iter().map(|item| item.len).sum(),
            ..plan.shape
        };
        let sides = plan.sides.iter().copied();
        let figures = measure(sides, &memory, shape, &items, what, rounds)?;
        let of = |metrics: std::collections::BTreeMap<_, _>| {
            metrics.get(&crate::task::Metric::Cycle).copied()
        };
        let sides = figures
            .into_iter()
            .filter_map(|(side, metrics)| Some((side, of(metrics)?)))
            .collect();
        points.push(Point { x: x as f64, sides });
    }
    Ok(Curve {
        title: plan.title.clone(),
        unit: plan.unit.to_owned(),
        points,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_where_they_should() {
        assert_eq!(steps(1, 65_536).last(), Some(&65_536));
        assert_eq!(steps(1, 1000), [1, 4, 16, 64, 256, 1000]);
        assert_eq!(steps(4, 4), [4]);
    }
}
