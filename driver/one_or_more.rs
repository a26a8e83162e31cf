// SPDX-License-Identifier: GPL-2.0

//! A list that allocates memory only from the second element on: most calls name one range, and
//! most buffers of huge pages have one extent.
//!
//! This file is also compiled for the host, with the files that use it.

use core::ops::Deref;
use kernel::{
    alloc::{
        Flags,
        KVVec, //
    },
    prelude::*, //
};

/// A list of elements.
pub(crate) enum OneOrMore<T> {
    One([T; 1]),
    /// Any number, including none.
    More(KVVec<T>),
}

impl<T: Copy> OneOrMore<T> {
    /// An empty list.
    pub(crate) const fn new() -> Self {
        Self::More(KVVec::new())
    }

    /// The number of elements that there is allocated memory for.
    pub(crate) fn capacity(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::More(list) => list.capacity(),
        }
    }

    /// Appends an element, if that needs no memory.
    #[inline(always)]
    pub(crate) fn push_within_capacity(&mut self, element: T) -> Result<(), T> {
        match self {
            Self::More(list) => list.push_within_capacity(element).map_err(|_| element),
            Self::One(_) => Err(element),
        }
    }

    /// Makes room for `more` further elements. An error leaves the list unchanged.
    pub(crate) fn reserve(&mut self, more: usize, flags: Flags) -> Result {
        match self {
            Self::More(list) => list.reserve(more, flags)?,
            Self::One(first) => {
                let room = more.checked_add(1).ok_or(ENOMEM)?;
                let mut list = KVVec::with_capacity(room, flags)?;
                list.extend_from_slice(first, flags)?;
                *self = Self::More(list);
            }
        }
        Ok(())
    }
}

impl<T> Deref for OneOrMore<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match self {
            Self::One(list) => list,
            Self::More(list) => list,
        }
    }
}
