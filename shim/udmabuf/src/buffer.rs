// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for a call: on the stack for short lists, from `mmap` for long ones, never from malloc.
//!
//! A few mappings are kept for the next call: to map, fault in and unmap memory costs more than all else that
//! is done with a list of a few hundred elements.

use core::mem::{size_of, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::slice;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::{self, Errno, Plain, Result};

/// The size of a mapping that is kept, in bytes: a list of 682 items.
const SPARE: usize = 16 << 10;

/// The addresses of mappings of [`SPARE`] bytes that no list owns; 0 for none. A call has three lists.
///
/// There is no lock: a list owns the mapping whose address it has taken out. A signal handler that comes
/// between, or a child of a fork, finds less here, and maps memory of its own.
static SPARES: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

/// A mapping of [`SPARE`] bytes that is the caller's alone then.
fn take_spare() -> Option<usize> {
    let spares = SPARES.iter();
    let mut taken = spares.map(|spare| spare.swap(0, Ordering::Acquire));
    taken.find(|address| *address != 0)
}

/// Keeps a mapping of [`SPARE`] bytes that the caller owns, if there is room; says whether it did.
fn keep_spare(address: usize) -> bool {
    SPARES.iter().any(|spare| {
        spare
            .compare_exchange(0, address, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    })
}

/// A list that is short as a rule.
///
/// # Invariants
///
/// `mapped` is 0, or the address of a mapping that this list owns alone, of [`SPARE`] bytes or, where
/// `capacity` elements take more, of that size. `len <= capacity`, and without a mapping `capacity <= N`. The
/// first `len` elements are filled in.
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

    /// Makes room for `capacity` elements. Lists are filled where they are: moving one copies all of it.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        if capacity > self.capacity {
            self.grow(capacity)?;
        }
        Ok(())
    }

    /// Appends `len` elements that the program has at the address `from`, which may be anything.
    pub fn read_from_program(&mut self, len: usize, from: usize) -> Result<()> {
        let all = self.len.checked_add(len).ok_or(Errno(libc::ENOMEM))?;
        self.reserve(all)?;
        let place = self.place().wrapping_add(self.len);
        // SAFETY: there is room for that many elements more.
        unsafe { sys::copy_from_program(place, len, from)? };
        // INVARIANT: just filled in.
        self.len = all;
        Ok(())
    }

    /// Appends an element; there is more room then, if need be.
    #[inline(always)]
    pub fn push(&mut self, element: T) -> Result<()> {
        if self.len == self.capacity {
            self.grow(2 * self.capacity.max(32))?;
        }
        let last = self.place().wrapping_add(self.len);
        // SAFETY: there is room for one more.
        unsafe { last.write(element) };
        // INVARIANT: just filled in.
        self.len += 1;
        Ok(())
    }

    /// Forgets the elements from `len` on.
    pub fn truncate(&mut self, len: usize) {
        // INVARIANT: fewer elements than are filled in.
        self.len = self.len.min(len);
    }

    /// Sorts the list in its place.
    pub fn sort_by_key<K: Ord>(&mut self, key: impl Fn(&T) -> K) {
        let list: &mut [T] = self;
        if !list.is_sorted_by_key(&key) {
            heap_sort(list, list.len(), |list, i| key(&list[i]), <[T]>::swap);
        }
    }

    /// Moves the list to a mapping of `capacity` elements, more than it has room for now.
    #[cold]
    fn grow(&mut self, capacity: usize) -> Result<()> {
        let bytes = capacity
            .checked_mul(size_of::<T>())
            .ok_or(Errno(libc::ENOMEM))?;
        let spare = if bytes <= SPARE { take_spare() } else { None };
        let mapped = match spare {
            Some(spare) => spare,
            None => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                sys::mmap(None, bytes.max(SPARE), access, flags, -1, 0)?
            }
        };
        // SAFETY: nobody else has the mapping, and it has room for more than these.
        unsafe { (mapped as *mut T).copy_from_nonoverlapping(self.start(), self.len) };
        self.unmap();
        // INVARIANT: nobody else has the mapping, and it has that size.
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

    fn place(&mut self) -> *mut T {
        if self.mapped == 0 {
            self.inline.as_mut_ptr().cast()
        } else {
            self.mapped as *mut T
        }
    }

    fn unmap(&mut self) {
        let bytes = (self.capacity * size_of::<T>()).max(SPARE);
        if self.mapped != 0 && !(bytes == SPARE && keep_spare(self.mapped)) {
            // SAFETY: by the invariants it is ours, and the callers use it no more.
            let _ = unsafe { sys::munmap(self.mapped, bytes) };
        }
    }
}

/// Sorts `len` elements of a list by a heap in their place: the standard library's functions take kilobytes of stack.
pub fn heap_sort<L: ?Sized, K: Ord>(
    list: &mut L,
    len: usize,
    key: impl Fn(&L, usize) -> K,
    swap: impl Fn(&mut L, usize, usize),
) {
    // The parent of `i` is `(i - 1) / 2`, and no less than it.
    let sink = |list: &mut L, mut parent: usize, len: usize| loop {
        let mut child = 2 * parent + 1;
        if child >= len {
            return;
        }
        if child + 1 < len && key(list, child) < key(list, child + 1) {
            child += 1;
        }
        if key(list, child) <= key(list, parent) {
            return;
        }
        swap(list, parent, child);
        parent = child;
    };
    for parent in (0..len / 2).rev() {
        sink(list, parent, len);
    }
    for end in (1..len).rev() {
        swap(list, 0, end);
        sink(list, 0, end);
    }
}

impl<T: Plain, const N: usize> Deref for Buffer<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: by the invariants this number of elements is filled in.
        unsafe { slice::from_raw_parts(self.start(), self.len) }
    }
}

impl<T: Plain, const N: usize> DerefMut for Buffer<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; `self` is borrowed alone.
        unsafe { slice::from_raw_parts_mut(self.place(), self.len) }
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
    fn sorted_as_the_standard_library_does() {
        let mut seed = 1u64;
        for n in (0..70).chain([1000, 5000]) {
            let mut list = Buffer::<Range, 4>::new();
            for _ in 0..n {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                let (addr, len) = ((seed >> 33) % (n + 3), seed >> 60);
                list.push(Range { addr, len }).unwrap();
            }
            let mut sorted = list.to_vec();
            sorted.sort_by_key(|range| (range.addr, range.len));
            list.sort_by_key(|range| (range.addr, range.len));
            assert_eq!(*list, *sorted);
        }
    }

    /// Lists of all lengths, more at a time than are kept: what is mapped is unmapped, whole.
    #[test]
    fn memory_is_given_back() {
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // Other tests' threads are not here, so nobody maps anything in between.
            let mut left = false;
            for n in [5, 100, SPARE / 16 - 1, SPARE / 16, SPARE / 16 + 1, 5000] {
                let mut mapped = [(0, 0); 8];
                {
                    let mut lists = [const { Buffer::<Range, 4>::new() }; 8];
                    for (list, place) in lists.iter_mut().zip(&mut mapped) {
                        left |= list.reserve(n).is_err();
                        *place = (list.mapped, (n * 16).max(SPARE));
                    }
                }
                let kept = SPARES.each_ref().map(|spare| spare.load(Ordering::Relaxed));
                for (start, len) in mapped {
                    let is_kept = kept.contains(&start);
                    for page in (start..start + len).step_by(sys::page_size() as usize) {
                        // SAFETY: it says whether something is mapped, and changes nothing.
                        let ret = unsafe { libc::msync(page as *mut _, 1, libc::MS_ASYNC) };
                        left |= (ret == 0) != is_kept;
                    }
                }
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(left.into()) }
        }
        let mut status = -1;
        // SAFETY: the status is written.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(status, 0);
    }

    #[test]
    fn short_and_long() {
        for n in [0u64, 1, 3, 4, 5, 100_000] {
            let mut list = Buffer::<Range, 4>::new();
            list.reserve(n as usize).unwrap();
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
            list.truncate(1);
            assert_eq!(list.len(), 1.min(2 * n as usize + 10));
            let more = vec![Range { addr: 5, len: 6 }; n as usize];
            list.read_from_program(more.len(), more.as_ptr() as usize)
                .unwrap();
            assert_eq!(list.len() as u64, n + 1);
            assert_eq!(list[1..], more);
            let efault = Err(Errno(libc::EFAULT));
            assert_eq!(list.read_from_program(1, 8), efault);
            assert_eq!(list.len() as u64, n + 1);
        }
    }
}
