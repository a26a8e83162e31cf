// SPDX-License-Identifier: GPL-2.0

//! As much of the `kernel` crate as the driver's pure parts use, for tests on the host.
//!
//! The names and behaviour are those of `rust/kernel/alloc/kvec.rs`, with one addition:
//! [`alloc::fail_after`] makes an allocation fail, to see what the callers do then.

/// Allocation.
pub mod alloc {
    use std::{cell::Cell, mem::MaybeUninit};

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Lets this thread's next `left` allocations succeed and the ones after them fail; `None`: all
    /// succeed.
    pub fn fail_after(left: Option<usize>) {
        LEFT.set(left);
    }

    fn allocate() -> Result<(), AllocError> {
        match LEFT.get() {
            None => Ok(()),
            Some(0) => Err(AllocError),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }

    /// No memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AllocError;

    /// Flags of an allocation.
    #[derive(Clone, Copy)]
    pub struct Flags;

    /// The flags by name.
    pub mod flags {
        /// Ordinary memory.
        pub const GFP_KERNEL: super::Flags = super::Flags;
        /// Ordinary memory, charged to the memory cgroup.
        pub const GFP_KERNEL_ACCOUNT: super::Flags = super::Flags;
    }

    /// A vector that reports when there is no memory.
    #[derive(Debug)]
    pub struct KVVec<T> {
        inner: Vec<T>,
        capacity: usize,
    }

    impl<T> KVVec<T> {
        /// An empty vector.
        pub const fn new() -> Self {
            Self {
                inner: Vec::new(),
                capacity: 0,
            }
        }

        /// An empty vector with room for `capacity` values.
        pub fn with_capacity(capacity: usize, _: Flags) -> Result<Self, AllocError> {
            if capacity > 0 {
                allocate()?;
            }
            Ok(Self {
                inner: Vec::new(),
                capacity,
            })
        }

        /// The number of values that there is room for.
        pub const fn capacity(&self) -> usize {
            self.capacity
        }

        /// Makes room for `additional` more values.
        pub fn reserve(&mut self, additional: usize, _: Flags) -> Result<(), AllocError> {
            if self.inner.len() + additional > self.capacity {
                allocate()?;
                self.capacity = (self.capacity * 2)
                    .max(self.inner.len() + additional)
                    .max(4);
            }
            Ok(())
        }

        /// Room for more values.
        pub fn spare_capacity_mut(&mut self) -> &mut [MaybeUninit<T>] {
            let room = self.capacity - self.inner.len();
            self.inner.reserve_exact(room);
            &mut self.inner.spare_capacity_mut()[..room]
        }

        /// Takes so many values as there.
        ///
        /// # Safety
        ///
        /// They have been written to [`Self::spare_capacity_mut`].
        pub unsafe fn inc_len(&mut self, additional: usize) {
            let len = self.inner.len() + additional;
            assert!(len <= self.capacity);
            // SAFETY: By the function's requirements.
            unsafe { self.inner.set_len(len) };
        }

        /// Takes the last value off.
        pub fn pop(&mut self) -> Option<T> {
            self.inner.pop()
        }

        /// Appends a value.
        pub fn push(&mut self, value: T, _: Flags) -> Result<(), AllocError> {
            if self.inner.len() == self.capacity {
                allocate()?;
                self.capacity = (self.capacity * 2).max(4);
            }
            self.inner.push(value);
            Ok(())
        }

        /// Appends copies of all values of a slice.
        pub fn extend_from_slice(&mut self, other: &[T], flags: Flags) -> Result<(), AllocError>
        where
            T: Clone,
        {
            for value in other {
                self.push(value.clone(), flags)?;
            }
            Ok(())
        }

        /// Drops the values from `len` on.
        pub fn truncate(&mut self, len: usize) {
            self.inner.truncate(len);
        }
    }

    impl<T> Default for KVVec<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    impl<T> core::ops::Deref for KVVec<T> {
        type Target = [T];
        fn deref(&self) -> &[T] {
            &self.inner
        }
    }

    impl<T> core::ops::DerefMut for KVVec<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            &mut self.inner
        }
    }
}

/// What every driver file imports.
pub mod prelude {
    pub use crate::alloc::flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT};
}
