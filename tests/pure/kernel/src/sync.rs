// SPDX-License-Identifier: GPL-2.0

//! Locks, atomic variables and references.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use crate::global_lock;

/// A lock that is declared with [`global_lock!`].
#[derive(Debug)]
pub struct GlobalLock<T>(Mutex<T>);

impl<T> GlobalLock<T> {
    /// A lock around a value.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Prepares the lock.
    ///
    /// # Safety
    ///
    /// Called once, before all other functions.
    pub unsafe fn init(&self) {}

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Declares a lock.
#[macro_export]
macro_rules! global_lock {
    (unsafe(uninit) static $name:ident: Mutex<$type:ty> = $value:expr;) => {
        static $name: $crate::sync::GlobalLock<$type> = $crate::sync::GlobalLock::new($value);
    };
}

/// Atomic variables.
pub mod atomic {
    use std::sync::atomic::{AtomicI64, Ordering};

    /// The order of accesses to others.
    #[derive(Debug, Clone, Copy)]
    pub struct Relaxed;

    /// An atomic variable.
    #[derive(Debug)]
    pub struct Atomic<T>(AtomicI64, std::marker::PhantomData<T>);

    impl Atomic<i64> {
        /// A variable.
        pub const fn new(value: i64) -> Self {
            Self(AtomicI64::new(value), std::marker::PhantomData)
        }

        /// Its value.
        pub fn load(&self, _: Relaxed) -> i64 {
            self.0.load(Ordering::Relaxed)
        }

        /// Replaces `old` by `new`; returns the value if it is another one.
        pub fn cmpxchg(&self, old: i64, new: i64, _: Relaxed) -> Result<i64, i64> {
            let order = Ordering::Relaxed;
            self.0.compare_exchange(old, new, order, order)
        }
    }
}

/// References.
pub mod aref {
    use std::ptr::NonNull;

    /// A type that counts its references.
    pub trait AlwaysRefCounted {
        /// One reference more.
        fn inc_ref(&self);
        /// One reference less.
        fn dec_ref(&self);
    }

    /// A reference. (What it refers to has to stay: nothing is freed with the last one.)
    #[derive(Debug)]
    pub struct ARef<T: AlwaysRefCounted>(NonNull<T>);

    impl<T: AlwaysRefCounted> From<&T> for ARef<T> {
        fn from(value: &T) -> Self {
            value.inc_ref();
            Self(value.into())
        }
    }

    impl<T: AlwaysRefCounted> core::ops::Deref for ARef<T> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: The value stays while there are references.
            unsafe { self.0.as_ref() }
        }
    }

    impl<T: AlwaysRefCounted> Drop for ARef<T> {
        fn drop(&mut self) {
            self.dec_ref();
        }
    }
}
