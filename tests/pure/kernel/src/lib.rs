// SPDX-License-Identifier: GPL-2.0

//! As much of the `kernel` crate as the driver's pure parts use, for tests on the host.
//!
//! The names and behaviour are those of the files of the same names in `rust/kernel`, with some
//! additions: [`alloc::fail_after`] makes an allocation fail, to see what the callers do then,
//! [`uaccess::User`] is the memory of a caller, and [`bindings::set_time`] sets the clock.

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

    /// Memory for the driver. A caller determines how much of it there is and how long it stays: so it has to be charged
    /// to the caller's memory cgroup.
    pub(crate) fn allocate(flags: Flags) -> Result<(), AllocError> {
        assert!(
            flags.has(flags::GFP_KERNEL_ACCOUNT),
            "memory that no memory cgroup is charged for"
        );
        match LEFT.get() {
            None => Ok(()),
            Some(0) => Err(AllocError),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }

    /// Memory for a list, whose length a caller determines: so a lack of it is no line in the log.
    fn allocate_list(flags: Flags) -> Result<(), AllocError> {
        assert!(
            flags.has(flags::__GFP_NOWARN),
            "a list whose length a caller determines, and a line in the log if there is no memory"
        );
        allocate(flags)
    }

    /// No memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AllocError;

    /// Flags of an allocation.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub struct Flags(u8);

    impl Flags {
        /// Has it all of these?
        fn has(self, flags: Self) -> bool {
            self | flags == self
        }
    }

    impl std::ops::BitOr for Flags {
        type Output = Self;

        fn bitor(self, other: Self) -> Self {
            Self(self.0 | other.0)
        }
    }

    /// The flags by name.
    pub mod flags {
        /// Ordinary memory.
        pub const GFP_KERNEL: super::Flags = super::Flags(0);
        /// Ordinary memory, charged to the memory cgroup.
        pub const GFP_KERNEL_ACCOUNT: super::Flags = super::Flags(1);
        /// No line in the log if there is none.
        pub const __GFP_NOWARN: super::Flags = super::Flags(2);
    }

    /// Vectors do not differ here by where their memory comes from.
    pub type KVec<T> = KVVec<T>;

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
        pub fn with_capacity(capacity: usize, flags: Flags) -> Result<Self, AllocError> {
            if capacity > 0 {
                allocate_list(flags)?;
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

        /// Room for more values.
        pub fn spare_capacity_mut(&mut self) -> &mut [MaybeUninit<T>] {
            let room = self.capacity - self.inner.len();
            self.inner.reserve_exact(room);
            &mut self.inner.spare_capacity_mut()[..room]
        }

        /// Declares that the next `additional` values are there.
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

        /// Drops all values, and keeps the room.
        pub fn clear(&mut self) {
            self.inner.clear();
        }

        /// Appends a value, if there is room for it.
        pub fn push_within_capacity(&mut self, value: T) -> Result<(), T> {
            if self.inner.len() == self.capacity {
                return Err(value);
            }
            self.inner.push(value);
            Ok(())
        }

        /// Makes room for more values, at least twice as many as there was room for.
        pub fn reserve(&mut self, additional: usize, flags: Flags) -> Result<(), AllocError> {
            let least = self.inner.len() + additional;
            if least > self.capacity {
                allocate_list(flags)?;
                self.capacity = least.max(2 * self.capacity);
            }
            Ok(())
        }

        /// Appends the values of a slice.
        pub fn extend_from_slice(&mut self, other: &[T], flags: Flags) -> Result<(), AllocError>
        where
            T: Clone,
        {
            self.reserve(other.len(), flags)?;
            self.inner.extend_from_slice(other);
            Ok(())
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

/// Functions of the kernel.
pub mod bindings {
    use std::cell::Cell;

    thread_local! {
        static TIME: Cell<i64> = const { Cell::new(0) };
    }

    /// Sets what [`ktime_get`] returns in this thread.
    pub fn set_time(nanoseconds: i64) {
        TIME.set(nanoseconds);
    }

    /// The time since boot, in nanoseconds.
    ///
    /// # Safety
    ///
    /// Always allowed.
    pub unsafe fn ktime_get() -> i64 {
        TIME.get()
    }
}

pub mod mm;
pub mod rbtree;
pub mod sync;
pub mod uaccess;

/// Error numbers.
pub mod error {
    use crate::alloc::AllocError;

    /// An error number.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Error(i32);

    /// What calls return.
    pub type Result<T = (), E = Error> = core::result::Result<T, E>;

    impl From<AllocError> for Error {
        fn from(_: AllocError) -> Self {
            code::ENOMEM
        }
    }

    /// The error numbers by name.
    pub mod code {
        use super::Error;

        /// A fatal signal.
        pub const EINTR: Error = Error(-4);
        /// Too long, or not known.
        pub const E2BIG: Error = Error(-7);
        /// Try again.
        pub const EAGAIN: Error = Error(-11);
        /// No memory, or the limit is reached.
        pub const ENOMEM: Error = Error(-12);
        /// A bad address.
        pub const EFAULT: Error = Error(-14);
        /// In use.
        pub const EBUSY: Error = Error(-16);
        /// A bad argument.
        pub const EINVAL: Error = Error(-22);
        /// A number that does not fit.
        pub const EOVERFLOW: Error = Error(-75);
    }
}

/// Pages.
pub mod page {
    /// The size of a page, as a power of two.
    pub const PAGE_SHIFT: usize = 12;
    /// The size of a page.
    pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
}

/// Values as bytes.
pub mod transmute {
    /// A type for which all bytes are values.
    ///
    /// # Safety
    ///
    /// They are.
    pub unsafe trait FromBytes: Sized {}

    /// A type without padding.
    ///
    /// # Safety
    ///
    /// It has none.
    pub unsafe trait AsBytes {
        /// Its bytes.
        fn as_bytes(&self) -> &[u8] {
            let size = size_of_val(self);
            // SAFETY: A type without padding.
            unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast(), size) }
        }

        /// Its bytes.
        fn as_bytes_mut(&mut self) -> &mut [u8]
        where
            Self: FromBytes,
        {
            let size = size_of_val(self);
            // SAFETY: A type without padding, for which all bytes are values.
            unsafe { core::slice::from_raw_parts_mut(core::ptr::from_mut(self).cast(), size) }
        }
    }

    // SAFETY: An integer.
    unsafe impl FromBytes for u32 {}
}

/// What every driver file imports.
pub mod prelude {
    pub use crate::alloc::flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT};
    pub use crate::alloc::KVec;
    pub use crate::error::{code::*, Error, Result};
}
