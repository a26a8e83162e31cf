// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the child that executes a batch of inputs reports about each, in memory that it shares with its
//! parent: so that it is known also if the child dies.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{bail, Result};
use nix::errno::Errno;

use crate::kcov::Edge;

/// The maximum number of inputs in a batch.
pub const MOST: usize = 64;
/// Words that hold edges, for all inputs of a batch.
const EDGES: usize = 1 << 18;
/// Words about each input: nanoseconds, points seen, points inside of the module, where its edges end.
const EACH: usize = 4;
/// Words before these: how many inputs have begun, and how many are done.
const HEAD: usize = 2;
const WORDS: usize = HEAD + MOST * EACH + EDGES;

/// The outcome of an input.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How long it took.
    pub took: Duration,
    /// Program counters, and how many of them lie in the module.
    pub points: (usize, usize),
    /// Where it went, if that is anywhere new; none otherwise.
    pub edges: BTreeSet<Edge>,
}

/// The shared memory.
#[derive(Debug)]
pub struct Board(&'static [AtomicU64]);

impl Board {
    /// Makes it.
    pub fn new() -> Result<Self> {
        // SAFETY: a new mapping.
        let area = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                WORDS * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if area == libc::MAP_FAILED {
            bail!("memory to share with children: {}", Errno::last());
        }
        // SAFETY: of that length, aligned, zeroed, and never unmapped.
        Ok(Self(unsafe {
            std::slice::from_raw_parts(area.cast(), WORDS)
        }))
    }

    fn get(&self, index: usize) -> usize {
        self.0[index].load(Ordering::Acquire) as usize
    }

    fn set(&self, index: usize, value: u64) {
        self.0[index].store(value, Ordering::Release);
    }

    /// The parent: before a batch.
    pub fn clear(&self) {
        self.set(0, 0);
        self.set(1, 0);
    }

    /// The child: an input begins.
    pub fn begin(&self, input: usize) {
        self.set(0, input as u64 + 1);
    }

    /// How many inputs have begun.
    pub fn begun(&self) -> usize {
        self.get(0)
    }

    /// How many inputs are done.
    pub fn done(&self) -> usize {
        self.get(1)
    }

    fn end(&self, input: usize) -> usize {
        match input.checked_sub(1) {
            Some(before) => self.get(HEAD + before * EACH + 3),
            None => 0,
        }
    }

    /// The child: an input is done. Its edges are written only if `known` lacks one of them. Returns whether
    /// there is room for another input.
    pub fn report(
        &self,
        input: usize,
        took: Duration,
        points: (usize, usize),
        edges: &[Edge],
        known: &mut HashSet<Edge>,
    ) -> bool {
        let start = self.end(input);
        let new = edges.iter().any(|edge| !known.contains(edge));
        let written = if new { edges } else { &[] };
        known.extend(written);
        let written = &written[..written.len().min(EDGES - start)];
        for (index, edge) in written.iter().enumerate() {
            let word = u64::from(edge.0) << 32 | u64::from(edge.1);
            self.set(HEAD + MOST * EACH + start + index, word);
        }
        let end = start + written.len();
        let values = [
            took.as_nanos() as u64,
            points.0 as u64,
            points.1 as u64,
            end as u64,
        ];
        for (index, value) in values.into_iter().enumerate() {
            self.set(HEAD + input * EACH + index, value);
        }
        self.set(1, input as u64 + 1);
        end < EDGES / 2
    }

    /// The outcome of an input that is done.
    pub fn outcome(&self, input: usize) -> Outcome {
        let at = HEAD + input * EACH;
        let edges = (self.end(input)..self.get(at + 3))
            .map(|index| self.get(HEAD + MOST * EACH + index) as u64)
            .map(|word| ((word >> 32) as u32, word as u32))
            .collect();
        Outcome {
            took: Duration::from_nanos(self.get(at) as u64),
            points: (self.get(at + 1), self.get(at + 2)),
            edges,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_come_across() {
        let board = Board::new().unwrap();
        let mut known = HashSet::from([(0, 1)]);
        let took = Duration::from_millis(3);
        board.clear();
        board.begin(0);
        assert!(board.report(0, took, (9, 2), &[(0, 1), (1, 7)], &mut known));
        assert!(board.report(1, took, (9, 2), &[(0, 1)], &mut known));
        assert!(board.report(2, took, (9, 2), &[(u32::MAX, 5)], &mut known));
        assert_eq!((board.begun(), board.done()), (1, 3));
        assert_eq!(board.outcome(0).edges, BTreeSet::from([(0, 1), (1, 7)]));
        assert!(board.outcome(1).edges.is_empty());
        assert_eq!(board.outcome(2).edges, BTreeSet::from([(u32::MAX, 5)]));
        assert_eq!(board.outcome(1).took, took);
    }

    #[test]
    fn a_full_board_ends_the_batch() {
        let board = Board::new().unwrap();
        let edges: Vec<Edge> = (0..EDGES as u32 / 2).map(|point| (point, point)).collect();
        let mut known = HashSet::new();
        assert!(!board.report(0, Duration::ZERO, (0, 0), &edges, &mut known));
    }
}
