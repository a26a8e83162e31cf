// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which page is which, and what each begins with: the model that everything is compared with.

/// A page of memory, wherever it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(usize);

/// What is known about the first word of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Known(u64),
    /// Until it is written.
    Unknown,
    /// For ever: a bounce buffer may be copied over it at any time.
    Unreliable,
}

/// The first words of all pages.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    words: Vec<Word>,
    stamps: u64,
}

impl Contents {
    /// A page that nobody has seen before.
    pub fn fresh(&mut self, word: Option<u64>) -> Id {
        self.words.push(word.map_or(Word::Unknown, Word::Known));
        Id(self.words.len() - 1)
    }

    /// A page with the contents of another one.
    pub fn copy(&mut self, id: Id) -> Id {
        let word = self.get(id);
        self.fresh(word)
    }

    /// The first word of a page, if it is known.
    pub fn get(&self, id: Id) -> Option<u64> {
        match self.words[id.0] {
            Word::Known(word) => Some(word),
            Word::Unknown | Word::Unreliable => None,
        }
    }

    /// A page's first word was written.
    pub fn set(&mut self, id: Id, word: u64) {
        self.replace(id, Word::Known(word));
    }

    /// A page may hold anything until it is written.
    pub fn forget(&mut self, id: Id) {
        self.replace(id, Word::Unknown);
    }

    /// A page may hold anything from now on.
    pub fn distrust(&mut self, id: Id) {
        self.replace(id, Word::Unreliable);
    }

    fn replace(&mut self, id: Id, word: Word) {
        if self.words[id.0] != Word::Unreliable {
            self.words[id.0] = word;
        }
    }

    /// A word that no page holds.
    pub fn stamp(&mut self) -> u64 {
        self.stamps += 1;
        0x5eed_0000_0000_0000 | self.stamps
    }
}
