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

    /// Appends a value. The memory is charged to the caller's memory cgroup.
    ///
    /// `most` is the number of values that the caller will append at most, this one included: it
    /// limits how much is allocated ahead.
    #[inline]
    pub(crate) fn push(&mut self, value: T, most: usize) -> Result<(), AllocError> {
        if self.tail.len() == self.tail.capacity() {
            self.grow(most)?;
        }
        if let Some(slot) = self.tail.spare_capacity_mut().first_mut() {
            slot.write(value);
            // SAFETY: There was room, and the value was written.
            unsafe { self.tail.inc_len(1) };
        }
        Ok(())
    }

    /// Room for more values, for one at least; `most` is as for [`Self::push`]. What is written there
    /// counts after [`Self::fill`].
    pub(crate) fn room(&mut self, most: usize) -> Result<&mut [MaybeUninit<T>], AllocError> {
        if self.tail.len() == self.tail.capacity() {
            self.grow(most)?;
        }
        Ok(self.tail.spare_capacity_mut())
    }

    /// Makes the first `count` values of the room part of the vector.
    ///
    /// # Safety
    ///
    /// They have been written since [`Self::room`] returned it.
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

    /// Gives back what the last chunk does not use. Keeps it when no memory can be had for that.
    pub(crate) fn shrink_to_fit(&mut self) {
        if self.tail.len() < self.tail.capacity() {
            if let Ok(mut exact) = KVVec::with_capacity(self.tail.len(), GFP_KERNEL_ACCOUNT) {
                // Cannot fail: the capacity is there.
                if exact
                    .extend_from_slice(&self.tail, GFP_KERNEL_ACCOUNT)
                    .is_ok()
                {
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

    /// Makes room for one more value at least.
    #[cold]
    fn grow(&mut self, most: usize) -> Result<(), AllocError> {
        let len = self.tail.len();
        // Chunks double as they fill, since most buffers are small; after the first one they are
        // allocated whole.
        let room = if !self.full.is_empty() || len == Self::PER_CHUNK {
            Self::PER_CHUNK
        } else {
            (2 * len).clamp(4, Self::PER_CHUNK)
        };
        if len == Self::PER_CHUNK {
            let fresh = KVVec::with_capacity(room.min(most), GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
            self.full.reserve(1, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
            // There is room, so nothing can fail, and nothing is lost.
            return self.full.push(
                core::mem::replace(&mut self.tail, fresh),
                GFP_KERNEL_ACCOUNT,
            );
        }
        let mut larger =
            KVVec::with_capacity(room.min(len + most), GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        larger.extend_from_slice(&self.tail, GFP_KERNEL_ACCOUNT)?;
        self.tail = larger;
        Ok(())
    }
}
