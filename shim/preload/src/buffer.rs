// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for a call: on the stack for short lists, from `mmap` for long ones, never from malloc.

use core::mem::size_of;
use core::ops::{Deref, DerefMut};
use core::slice;

use crate::sys::{self, Errno, Plain, Result};

/// A list with room for a fixed number of elements.
///
/// # Invariants
///
/// `mapped` is 0, or the address of a mapping of `capacity` elements that this list owns alone.
/// `len <= capacity`, and without a mapping `capacity <= N`.
pub struct Buffer<T: Plain, const N: usize> {
    inline: [T; N],
    mapped: usize,
    capacity: usize,
    len: usize,
}

impl<T: Plain, const N: usize> Buffer<T, N> {
    /// An empty list with room for `capacity` elements.
    pub fn with_capacity(capacity: usize) -> Result<Self> {
        let mapped = if capacity <= N {
            0
        } else {
            let bytes = capacity
                .checked_mul(size_of::<T>())
                .ok_or(Errno(libc::ENOMEM))?;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: without an address nothing that exists is replaced.
            unsafe {
                sys::mmap(
                    None,
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags,
                    -1,
                    0,
                )?
            }
        };
        // INVARIANT: the mapping is new and has that size.
        Ok(Self {
            inline: [T::default(); N],
            mapped,
            capacity,
            len: 0,
        })
    }

    /// A list of `len` zeroes.
    pub fn zeroed(len: usize) -> Result<Self> {
        let mut buffer = Self::with_capacity(len)?;
        // INVARIANT: as much as there is room for. A new mapping, and `Plain`'s default, is zero.
        buffer.len = len;
        Ok(buffer)
    }

    /// Appends an element, or says that there is no room.
    pub fn push(&mut self, element: T) -> core::result::Result<(), Full> {
        if self.len == self.capacity {
            return Err(Full);
        }
        self.len += 1;
        let last = self.len - 1;
        self[last] = element;
        Ok(())
    }
}

/// A list has no room.
#[derive(Debug)]
pub struct Full;

impl<T: Plain, const N: usize> Deref for Buffer<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        if self.mapped == 0 {
            &self.inline[..self.len]
        } else {
            // SAFETY: by the invariants: a mapping of ours, of `len` elements at least, filled with
            // zeroes or with elements.
            unsafe { slice::from_raw_parts(self.mapped as *const T, self.len) }
        }
    }
}

impl<T: Plain, const N: usize> DerefMut for Buffer<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        if self.mapped == 0 {
            &mut self.inline[..self.len]
        } else {
            // SAFETY: as for `deref`; `self` is borrowed alone.
            unsafe { slice::from_raw_parts_mut(self.mapped as *mut T, self.len) }
        }
    }
}

impl<T: Plain, const N: usize> Drop for Buffer<T, N> {
    fn drop(&mut self) {
        if self.mapped != 0 {
            // SAFETY: by the invariants it is ours, and no slice of it outlives the list.
            unsafe { sys::munmap(self.mapped, self.capacity * size_of::<T>()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinbuf_uapi::Range;

    #[test]
    fn short_and_long() {
        for n in [0u64, 1, 3, 4, 5, 100_000] {
            let mut list = Buffer::<Range, 4>::with_capacity(n as usize).unwrap();
            for i in 0..n {
                list.push(Range {
                    addr: i,
                    len: 2 * i,
                })
                .unwrap();
            }
            assert!(list.push(Range::default()).is_err());
            assert_eq!(list.len() as u64, n);
            assert!(list
                .iter()
                .zip(0..)
                .all(|(r, i)| r.addr == i && r.len == 2 * i));
            let zeroes = Buffer::<Range, 4>::zeroed(n as usize).unwrap();
            assert!(zeroes.iter().all(|r| *r == Range::default()));
        }
    }
}
