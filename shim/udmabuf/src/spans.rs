// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which parts of files are mapped where.

use crate::buffer::Buffer;
use crate::sys::{Plain, Result};

/// A file, as `fstat` and the maps of a process identify it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// The number of its device.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
}

/// A part of a file that is mapped at consecutive addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The file.
    pub id: FileId,
    /// The first byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The address of the first byte.
    pub addr: u64,
}

// SAFETY: integers without padding.
unsafe impl Plain for Span {}

impl Span {
    fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Spans, as a map from (file, offset) to addresses.
///
/// # Invariants
///
/// Once `finish` was called, spans are sorted by file and offset, not empty, and do not overlap.
pub struct Spans(Buffer<Span, 4>);

impl core::ops::Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.0
    }
}

impl Spans {
    /// No spans.
    pub const fn new() -> Self {
        Self(Buffer::new())
    }

    /// Adds a span; `finish` has to follow before `at` is called. One that continues the last one becomes
    /// a part of it, since the kernel splits mappings where their attributes differ.
    pub fn push(&mut self, span: Span) -> Result<()> {
        if span.len == 0 || span.offset.checked_add(span.len).is_none() {
            return Ok(());
        }
        if let Some(last) = self.0.last_mut() {
            let next = (last.id, last.end(), last.addr.wrapping_add(last.len));
            if next == (span.id, span.offset, span.addr) {
                last.len += span.len;
                return Ok(());
            }
        }
        self.0.push(span)
    }

    /// Sorts, and cuts off what an earlier span has as well. Returns whether there was such a part.
    pub fn finish(&mut self) -> bool {
        // Of two that begin alike the longer one comes first, so that it makes the other one empty.
        self.0.sort_by_key(|span| (span.id, span.offset, !span.len));
        let (mut kept, mut overlap) = (0, false);
        for i in 0..self.0.len() {
            let mut span = self.0[i];
            let previous = if kept > 0 { self.0.get(kept - 1) } else { None };
            if let Some(previous) = previous.filter(|previous| previous.id == span.id) {
                let cut = previous.end().saturating_sub(span.offset);
                overlap |= cut > 0;
                if cut >= span.len {
                    continue;
                }
                span.offset += cut;
                span.addr = span.addr.wrapping_add(cut);
                span.len -= cut;
            }
            self.0[kept] = span;
            kept += 1;
        }
        // INVARIANT: sorted above, and each begins where the one before has ended, or later.
        self.0.truncate(kept);
        overlap
    }

    /// The spans of a file.
    pub fn of(&self, id: FileId) -> &[Span] {
        let first = self.0.partition_point(|span| span.id < id);
        let end = self.0.partition_point(|span| span.id <= id);
        &self.0[first..end]
    }

    /// [`at`] for the spans of the file `id`.
    pub fn at(&self, id: FileId, offset: u64) -> (Option<u64>, u64) {
        at(self.of(id), offset)
    }
}

/// The address at which the byte `offset` of a file is mapped, if it is, and for how many bytes that
/// answer holds. `spans` are those of the file ([`Spans::of`]).
#[inline]
pub fn at(spans: &[Span], offset: u64) -> (Option<u64>, u64) {
    let behind = spans.partition_point(|span| span.offset <= offset);
    if let Some(span) = behind.checked_sub(1).map(|before| &spans[before]) {
        if offset < span.end() {
            let address = span.addr.wrapping_add(offset - span.offset);
            return (Some(address), span.end() - offset);
        }
    }
    match spans.get(behind) {
        Some(next) => (None, next.offset - offset),
        None => (None, u64::MAX - offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: FileId = FileId { dev: 1, ino: 7 };
    const B: FileId = FileId { dev: 1, ino: 8 };

    fn spans(list: &[(FileId, u64, u64, u64)]) -> Spans {
        finished(list).0
    }

    fn finished(list: &[(FileId, u64, u64, u64)]) -> (Spans, bool) {
        let mut spans = Spans::new();
        for &(id, offset, len, addr) in list {
            let span = Span {
                id,
                offset,
                len,
                addr,
            };
            spans.push(span).unwrap();
        }
        let overlap = spans.finish();
        (spans, overlap)
    }

    #[test]
    fn offsets_become_addresses() {
        let spans = spans(&[(B, 100, 50, 9000), (A, 10, 20, 5000), (A, 200, 10, 7000)]);
        assert_eq!(spans.at(A, 0), (None, 10));
        assert_eq!(spans.at(A, 10), (Some(5000), 20));
        assert_eq!(spans.at(A, 29), (Some(5019), 1));
        assert_eq!(spans.at(A, 30), (None, 170));
        assert_eq!(spans.at(A, 205), (Some(7005), 5));
        assert_eq!(spans.at(A, 210), (None, u64::MAX - 210));
        assert_eq!(spans.at(B, 0), (None, 100));
        assert_eq!(spans.at(B, 149), (Some(9049), 1));
        assert_eq!(Spans::new().at(A, 5), (None, u64::MAX - 5));
    }

    #[test]
    fn neighbours_are_joined() {
        let joined = spans(&[(A, 0, 10, 1000), (A, 10, 10, 1010), (A, 20, 10, 5000)]);
        assert_eq!(joined.len(), 2);
        assert_eq!(joined.at(A, 5), (Some(1005), 15));
        assert_eq!(joined.at(A, 20), (Some(5000), 10));
        // The same addresses, but of another file, or another part of it.
        assert_eq!(spans(&[(A, 0, 10, 1000), (B, 10, 10, 1010)]).len(), 2);
        assert_eq!(spans(&[(A, 0, 10, 1000), (A, 30, 10, 1010)]).len(), 2);
    }

    #[test]
    fn overlapping_spans_answer_once() {
        // Against a model that asks each span.
        let mut seed = 12345u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..500 {
            let list: Vec<_> = (0..random(9))
                .map(|i| {
                    let id = if random(3) == 0 { B } else { A };
                    (id, random(40), random(30), 1000 * (i + 1))
                })
                .collect();
            let (spans, overlap) = finished(&list);
            let mut twice = false;
            for id in [A, B] {
                for offset in 0..80 {
                    let covers = |&(other, start, len, addr): &(FileId, u64, u64, u64)| {
                        (other == id && (start..start + len).contains(&offset))
                            .then(|| addr + offset - start)
                    };
                    twice |= list.iter().filter_map(covers).count() > 1;
                    let right: Vec<u64> = list.iter().filter_map(covers).collect();
                    let (address, reach) = spans.at(id, offset);
                    assert!(reach > 0);
                    match address {
                        Some(address) => assert!(right.contains(&address), "{list:?} {offset}"),
                        None => assert!(right.is_empty(), "{list:?} {offset}"),
                    }
                    for step in 1..reach.min(80) {
                        let expected = address.map(|address| address + step);
                        assert_eq!(spans.at(id, offset + step).0, expected);
                    }
                }
            }
            assert_eq!(overlap, twice, "{list:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_ignored() {
        assert!(spans(&[(A, 0, 0, 1000), (A, u64::MAX, 2, 1000)]).is_empty());
    }
}
