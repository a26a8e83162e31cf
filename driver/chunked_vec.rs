// SPDX-License-Identifier: GPL-2.0

//! A vector that grows without moving what it holds.
//!
//! A buffer may consist of hundreds of millions of extents. One flat array would need a large
//! contiguous allocation and would be copied each time it grows; this one is a list of chunks of
//! [`CHUNK_BYTES`], so that growing costs one chunk, at most, beyond what is used, and indexing
//! stays constant-time.

use core::mem::{
    size_of,
    MaybeUninit, //
};
use kernel::alloc::{
    flags::{
        __GFP_NOWARN, //
        GFP_KERNEL_ACCOUNT,
    },
    AllocError,
    KVVec, //
};

/// Bytes of a full chunk.
const CHUNK_BYTES: usize = 64 * 1024;

/// Fewer bytes than these are not given back: what is allocated and copied for that costs more than
/// holding them.
pub(crate) const WORTH_GIVING_BACK: usize = 128;

/// A growing sequence of plain values.
///
/// # Invariants
///
/// Every chunk in `full` holds exactly [`Self::PER_CHUNK`] values, and `tail` at most that many.
pub(crate) struct ChunkedVec<T: Copy> {
    full: KVVec<KVVec<T>>,
    tail: KVVec<T>,
}

impl<T: Copy> ChunkedVec<T> {
    /// Values in a full chunk.
    const PER_CHUNK: usize = CHUNK_BYTES / size_of::<T>();

    /// Values that the first allocation has room for, unless the caller knows better.
    const FIRST: usize = 8;

    /// An empty vector. Does not allocate.
    pub(crate) const fn new() -> Self {
        Self {
            full: KVVec::new(),
            tail: KVVec::new(),
        }
    }

    /// The number of values.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.full.len() * Self::PER_CHUNK + self.tail.len()
    }

    /// The values from `index` on that lie in one piece; none behind the end.
    #[inline]
    pub(crate) fn piece(&self, index: usize) -> &[T] {
        let chunk = self.full.get(index / Self::PER_CHUNK).unwrap_or(&self.tail);
        if index >= self.len() {
            return &[];
        }
        chunk.get(index % Self::PER_CHUNK..).unwrap_or(&[])
    }

    /// The value at `index`.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<T> {
        let chunk = self.full.get(index / Self::PER_CHUNK).unwrap_or(&self.tail);
        if index >= self.len() {
            return None;
        }
        chunk.get(index % Self::PER_CHUNK).copied()
    }

    /// How many values `is_before` is true of: those come before all others. Logarithmic.
    pub(crate) fn partition_point(&self, is_before: impl Fn(&T) -> bool) -> usize {
        let begins_before = |chunk: &KVVec<T>| chunk.first().is_some_and(&is_before);
        // The last chunk that begins with such a value is the one in which they end.
        let mut index = self.full.len();
        let mut chunk = &self.tail;
        if !begins_before(chunk) {
            index = self.full.partition_point(begins_before).saturating_sub(1);
            chunk = self.full.get(index).unwrap_or(&self.tail);
        }
        index * Self::PER_CHUNK + chunk.partition_point(is_before)
    }

    /// Appends a value, if there is room for one. The way that is to be quick: it does not allocate.
    #[inline(always)]
    pub(crate) fn push_within(&mut self, value: T) -> bool {
        let Some(slot) = self.tail.spare_capacity_mut().first_mut() else {
            return false;
        };
        slot.write(value);
        // SAFETY: There was room, and the value was written.
        unsafe { self.tail.inc_len(1) };
        true
    }

    /// Room for more values that needs no memory; maybe none. What is written there counts after
    /// [`Self::fill`].
    #[inline(always)]
    pub(crate) fn spare(&mut self) -> &mut [MaybeUninit<T>] {
        self.tail.spare_capacity_mut()
    }

    /// Room for more values, as [`Self::spare`]: for one at least, and for `least` unless chunks are
    /// too small for that. The memory is charged to the caller's memory cgroup.
    ///
    /// `most`, at least one, is the number of values that the caller will append at most: it limits
    /// how much is allocated ahead.
    pub(crate) fn room(
        &mut self,
        least: usize,
        most: usize,
    ) -> Result<&mut [MaybeUninit<T>], AllocError> {
        let capacity = self.tail.capacity();
        let spare = capacity - self.tail.len();
        if spare == 0 || (spare < least.min(most) && capacity < Self::PER_CHUNK) {
            self.grow(least, most)?;
        }
        Ok(self.tail.spare_capacity_mut())
    }

    /// Makes the first `count` values of the room part of the vector.
    ///
    /// # Safety
    ///
    /// They have been written since [`Self::room`] or [`Self::spare`] returned it.
    #[inline(always)]
    pub(crate) unsafe fn fill(&mut self, count: usize) {
        // SAFETY: By the function's requirements.
        unsafe { self.tail.inc_len(count) };
    }

    /// Drops the values from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        while len < self.full.len() * Self::PER_CHUNK {
            let Some(chunk) = self.full.pop() else {
                return;
            };
            self.tail = chunk;
        }
        self.tail.truncate(len - self.full.len() * Self::PER_CHUNK);
    }

    /// Gives back what the last chunk does not use, if that is [worth it](WORTH_GIVING_BACK). Keeps
    /// it when no memory can be had for that.
    pub(crate) fn shrink_to_fit(&mut self) {
        let spare = self.tail.capacity() - self.tail.len();
        if spare * size_of::<T>() >= WORTH_GIVING_BACK {
            let flags = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
            if let Ok(mut exact) = KVVec::with_capacity(self.tail.len(), flags) {
                // Cannot fail: the capacity is there.
                if exact.extend_from_slice(&self.tail, flags).is_ok() {
                    self.tail = exact;
                }
            }
        }
    }

    /// Bytes of memory that the vector holds.
    pub(crate) fn bytes(&self) -> usize {
        self.full.capacity() * size_of::<KVVec<T>>()
            + (self.full.len() * Self::PER_CHUNK + self.tail.capacity()) * size_of::<T>()
    }

    /// Makes room for one more value at least, as [`Self::room`] says.
    #[cold]
    fn grow(&mut self, least: usize, most: usize) -> Result<(), AllocError> {
        let flags = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
        let len = self.tail.len();
        if len == Self::PER_CHUNK {
            let fresh = KVVec::with_capacity(Self::PER_CHUNK.min(most), flags)?;
            self.full.reserve(1, flags)?;
            // There is room, so nothing can fail, and nothing is lost.
            return self
                .full
                .push(core::mem::replace(&mut self.tail, fresh), flags);
        }
        // Chunks double as they fill, since most buffers are small; after the first one they are
        // allocated whole.
        let room = if self.full.is_empty() {
            (2 * len)
                .max(len.saturating_add(least))
                .clamp(Self::FIRST, Self::PER_CHUNK)
        } else {
            Self::PER_CHUNK
        };
        let mut larger = KVVec::with_capacity(room.min(len.saturating_add(most)), flags)?;
        larger.extend_from_slice(&self.tail, flags)?;
        self.tail = larger;
        Ok(())
    }
}
