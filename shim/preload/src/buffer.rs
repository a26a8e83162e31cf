// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for a call: on the stack for short lists, from `mmap` for long ones, never from malloc.

use core::mem::{size_of, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::slice;

use crate::sys::{self, Errno, Plain, Result};

/// A list that is short as a rule.
///
/// # Invariants
///
/// `mapped` is 0, or the address of a mapping of `capacity` elements that this list owns alone.
/// `len <= capacity`, and without a mapping `capacity <= N`. The first `len` elements are filled in.
pub struct Buffer<T: Plain, const N: usize> {
    inline: [MaybeUninit<T>; N],
    mapped: usize,
    capacity: usize,
    len: usize,
}

impl<T: Plain, const N: usize> Buffer<T, N> {
    /// An empty list.
    pub const fn new() -> Self {
        // INVARIANT: nothing is filled in, and there is no mapping.
        Self {
            inline: [const { MaybeUninit::uninit() }; N],
            mapped: 0,
            capacity: N,
            len: 0,
        }
    }

    /// An empty list with room for `capacity` elements.
    pub fn with_capacity(capacity: usize) -> Result<Self> {
        let mut buffer = Self::new();
        if capacity > N {
            buffer.grow(capacity)?;
        }
        Ok(buffer)
    }

    /// A list of `len` zeroes.
    pub fn zeroed(len: usize) -> Result<Self> {
        let mut buffer = Self::with_capacity(len)?;
        if buffer.mapped == 0 {
            buffer.inline[..len].fill(MaybeUninit::new(T::default()));
        }
        // INVARIANT: filled in. A new mapping is zero, as is `Plain`'s default.
        buffer.len = len;
        Ok(buffer)
    }

    /// Appends an element; there is more room then, if need be.
    #[inline]
    pub fn push(&mut self, element: T) -> Result<()> {
        if self.len == self.capacity {
            self.grow(2 * self.capacity.max(32))?;
        }
        // INVARIANT: filled in at once.
        self.len += 1;
        let last = self.len - 1;
        if self.mapped == 0 {
            self.inline[last].write(element);
        } else {
            let place = (self.mapped as *mut T).wrapping_add(last);
            // SAFETY: by the invariants there is room.
            unsafe { place.write(element) };
        }
        Ok(())
    }

    /// Moves the list to a mapping of `capacity` elements, more than it has room for now.
    #[cold]
    fn grow(&mut self, capacity: usize) -> Result<()> {
        let bytes = capacity
            .checked_mul(size_of::<T>())
            .ok_or(Errno(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without an address nothing that exists is replaced.
        let mapped = unsafe { sys::mmap(None, bytes, access, flags, -1, 0)? };
        // SAFETY: the mapping is new, and has room for more than these.
        unsafe { (mapped as *mut T).copy_from_nonoverlapping(self.start(), self.len) };
        self.unmap();
        // INVARIANT: the mapping is new and has that size.
        (self.mapped, self.capacity) = (mapped, capacity);
        Ok(())
    }

    /// The place of the first element.
    fn start(&self) -> *const T {
        if self.mapped == 0 {
            self.inline.as_ptr().cast()
        } else {
            self.mapped as *const T
        }
    }

    fn unmap(&mut self) {
        if self.mapped != 0 {
            // SAFETY: by the invariants it is ours, and the callers use it no more.
            unsafe { sys::munmap(self.mapped, self.capacity * size_of::<T>()) };
        }
    }
}

impl<T: Plain, const N: usize> Deref for Buffer<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: by the invariants so many elements are filled in.
        unsafe { slice::from_raw_parts(self.start(), self.len) }
    }
}

impl<T: Plain, const N: usize> DerefMut for Buffer<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        let first = if self.mapped == 0 {
            self.inline.as_mut_ptr().cast()
        } else {
            self.mapped as *mut T
        };
        // SAFETY: as for `deref`; `self` is borrowed alone.
        unsafe { slice::from_raw_parts_mut(first, self.len) }
    }
}

impl<T: Plain, const N: usize> Drop for Buffer<T, N> {
    fn drop(&mut self) {
        self.unmap();
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
            assert_eq!(list.len() as u64, n);
            assert!(list
                .iter()
                .zip(0..)
                .all(|(r, i)| r.addr == i && r.len == 2 * i));
            for i in n..2 * n + 10 {
                list.push(Range { addr: i, len: i }).unwrap();
            }
            assert_eq!(list.len() as u64, 2 * n + 10);
            assert!(list.iter().zip(0..).all(|(r, i)| r.addr == i));
            list[0].len = 7;
            assert_eq!(list[0].len, 7);
            let zeroes = Buffer::<Range, 4>::zeroed(n as usize).unwrap();
            assert!(zeroes.iter().all(|r| *r == Range::default()));
        }
    }
}
