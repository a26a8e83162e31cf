// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where files were mapped when the program's mappings were asked last.
//!
//! Nothing here has to be true: the driver compares every page with the file
//! (`PINBUF_CREATE_CHECK_BACKING`), and a hint that is refused is replaced. So hints may be out of date, after
//! `munmap` or `fork`, and are used without asking the kernel. There is no lock: a slot that another thread
//! writes at the moment is passed over, by readers and by writers.

use core::sync::atomic::{fence, AtomicU64, AtomicUsize, Ordering};

use crate::spans::{FileId, Span, Spans};

/// A virtual machine monitor has a few mappings of a few files.
const SLOTS: usize = 16;

/// A hint that is read and written as a whole.
struct Slot {
    /// Odd while it is written. A write that never ends (its thread was not copied by a fork) makes the
    /// slot useless, and nothing worse.
    version: AtomicU64,
    /// The fields of a [`Span`]; an empty one is none.
    words: [AtomicU64; 5],
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            words: [const { AtomicU64::new(0) }; 5],
        }
    }

    fn read(&self) -> Option<Span> {
        let version = self.version.load(Ordering::Acquire);
        let [dev, ino, offset, len, addr] =
            [0, 1, 2, 3, 4].map(|i| self.words[i].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if version % 2 == 1 || len == 0 || self.version.load(Ordering::Relaxed) != version {
            return None;
        }
        Some(Span {
            id: FileId { dev, ino },
            offset,
            len,
            addr,
        })
    }

    fn write(&self, span: Span) {
        let version = self.version.load(Ordering::Relaxed);
        let writing = version | 1;
        if version == writing
            || self
                .version
                .compare_exchange(version, writing, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return;
        }
        fence(Ordering::Release);
        let words = [span.id.dev, span.id.ino, span.offset, span.len, span.addr];
        for (to, word) in self.words.iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        self.version.store(version + 2, Ordering::Release);
    }
}

/// The hints of a process.
pub struct Hints {
    slots: [Slot; SLOTS],
    next: AtomicUsize,
}

/// This process's hints.
pub static HINTS: Hints = Hints::new();

impl Hints {
    const fn new() -> Self {
        Self {
            slots: [const { Slot::new() }; SLOTS],
            next: AtomicUsize::new(0),
        }
    }

    /// Adds what is known of these files.
    pub fn recall(&self, wanted: impl Fn(FileId) -> bool, spans: &mut Spans) {
        for span in self.slots.iter().filter_map(Slot::read) {
            if wanted(span.id) {
                // Without memory there are fewer hints.
                let _ = spans.push(span);
            }
        }
        spans.finish();
    }

    /// Replaces what was known of these files.
    pub fn replace(&self, of: impl Fn(FileId) -> bool, spans: &[Span]) {
        for slot in &self.slots {
            if slot.read().is_some_and(|span| of(span.id)) {
                slot.write(Span::default());
            }
        }
        for span in spans.iter().take(SLOTS) {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            self.slots[next % SLOTS].write(*span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(ino: u64, offset: u64) -> Span {
        Span {
            id: FileId { dev: 1, ino },
            offset,
            len: 10,
            addr: ino * 100 + offset,
        }
    }

    fn recall(hints: &Hints, wanted: impl Fn(FileId) -> bool) -> Vec<Span> {
        let mut spans = Spans::new();
        hints.recall(wanted, &mut spans);
        spans.to_vec()
    }

    #[test]
    fn hints_are_of_one_file() {
        let hints = &Hints::new();
        hints.replace(|_| false, &[span(1, 0), span(1, 50), span(2, 0)]);
        let known = recall(hints, |id| id.ino == 1);
        assert_eq!(known, [span(1, 0), span(1, 50)]);
        hints.replace(|id| id.ino == 1, &[span(1, 70)]);
        assert_eq!(recall(hints, |id| id.ino == 1), [span(1, 70)]);
        assert_eq!(recall(hints, |id| id.ino == 2), [span(2, 0)]);
        hints.replace(|id| id.ino == 1, &[]);
        assert!(recall(hints, |id| id.ino == 1).is_empty());
    }

    #[test]
    fn the_oldest_go_first() {
        let hints = Hints::new();
        let many: Vec<Span> = (0..3 * SLOTS as u64).map(|ino| span(ino, 0)).collect();
        for one in &many {
            hints.replace(|_| false, &[*one]);
        }
        let known = recall(&hints, |_| true);
        assert_eq!(known, many[2 * SLOTS..]);
    }

    #[test]
    fn a_slot_that_is_being_written_is_passed_over() {
        let slot = Slot::new();
        slot.write(span(1, 0));
        slot.version.fetch_add(1, Ordering::Relaxed);
        assert_eq!(slot.read(), None);
        slot.write(span(2, 0));
        slot.version.fetch_add(1, Ordering::Relaxed);
        assert_eq!(slot.read(), Some(span(1, 0)));
    }

    #[test]
    fn threads_see_whole_hints() {
        let slot = Slot::new();
        std::thread::scope(|scope| {
            for thread in 1..=2u64 {
                let slot = &slot;
                scope.spawn(move || {
                    for i in 0..20_000 {
                        slot.write(span(thread, i));
                    }
                });
            }
            for _ in 0..20_000 {
                if let Some(seen) = slot.read() {
                    assert_eq!(seen, span(seen.id.ino, seen.offset));
                }
            }
        });
    }
}
