// SPDX-License-Identifier: GPL-2.0

//! A vector that grows without moving what it holds.
//!
//! A buffer may consist of hundreds of millions of extents. One flat array would need a large
//! contiguous allocation and would be copied each time it grows; this one is a list of chunks of
//! [`CHUNK_BYTES`], so that growing costs one chunk, at most, beyond what is used, and indexing
//! stays constant-time.

use core::mem::size_of;
use kernel::alloc::{
    flags::GFP_KERNEL_ACCOUNT,
    AllocError,
    KVVec, //
};

/// Bytes of a full chunk.
const CHUNK_BYTES: usize = 64 * 1024;

/// A growing sequence of plain values.
///
/// # Invariants
///
/// Every chunk but the last holds exactly [`Self::PER_CHUNK`] values; no chunk is empty.
pub(crate) struct ChunkedVec<T: Copy> {
    chunks: KVVec<KVVec<T>>,
    len: usize,
}

impl<T: Copy> ChunkedVec<T> {
    /// Values in a full chunk.
    const PER_CHUNK: usize = CHUNK_BYTES / size_of::<T>();

    /// An empty vector. Does not allocate.
    pub(crate) const fn new() -> Self {
        Self {
            chunks: KVVec::new(),
            len: 0,
        }
    }

    /// The number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The value at `index`.
    pub(crate) fn get(&self, index: usize) -> Option<T> {
        let chunk = self.chunks.get(index / Self::PER_CHUNK)?;
        chunk.get(index % Self::PER_CHUNK).copied()
    }

    /// Appends a value. The memory is charged to the caller's memory cgroup.
    pub(crate) fn push(&mut self, value: T) -> Result<(), AllocError> {
        if self.len % Self::PER_CHUNK == 0 {
            // The first chunk doubles as it fills, since most buffers are small; the later ones
            // are allocated whole.
            let mut chunk = if self.len == 0 {
                KVVec::new()
            } else {
                KVVec::with_capacity(Self::PER_CHUNK, GFP_KERNEL_ACCOUNT)?
            };
            chunk.push(value, GFP_KERNEL_ACCOUNT)?;
            self.chunks.push(chunk, GFP_KERNEL_ACCOUNT)?;
        } else if let Some(chunk) = self.chunks.last_mut() {
            chunk.push(value, GFP_KERNEL_ACCOUNT)?;
        }
        self.len += 1;
        Ok(())
    }

    /// Drops the values from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.chunks.truncate(len.div_ceil(Self::PER_CHUNK));
        if let Some(last) = self.chunks.last_mut() {
            last.truncate((len - 1) % Self::PER_CHUNK + 1);
        }
        self.len = len;
    }

    /// Gives back what the last chunk does not use. Keeps it when no memory can be had for that.
    pub(crate) fn shrink_to_fit(&mut self) {
        let Some(last) = self.chunks.last_mut() else {
            return;
        };
        if last.len() < last.capacity() {
            if let Ok(mut exact) = KVVec::with_capacity(last.len(), GFP_KERNEL_ACCOUNT) {
                // Cannot fail: the capacity is there.
                if exact.extend_from_slice(last, GFP_KERNEL_ACCOUNT).is_ok() {
                    *last = exact;
                }
            }
        }
    }

    /// Bytes of memory that the vector holds.
    pub(crate) fn bytes(&self) -> usize {
        let table = self.chunks.capacity() * size_of::<KVVec<T>>();
        self.chunks
            .iter()
            .fold(table, |sum, chunk| sum + chunk.capacity() * size_of::<T>())
    }
}
