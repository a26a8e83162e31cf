// SPDX-License-Identifier: GPL-2.0

//! Arrays that a caller passes by address, copied once.

use core::{
    mem::MaybeUninit,
    ops::Deref, //
};
use kernel::{
    alloc::{
        flags::{
            __GFP_NOWARN, //
            GFP_KERNEL_ACCOUNT,
        },
        KVVec, //
    },
    prelude::*,
    transmute::FromBytes,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// An array of the caller's. Most are short, and such need no memory.
///
/// # Invariants
///
/// `few` holds `count` elements, unless `many` has a capacity: then they are there.
pub(crate) struct UserArray<T> {
    few: [MaybeUninit<T>; FEW],
    many: KVVec<T>,
    count: usize,
}

/// The elements of a short array.
const FEW: usize = 4;

impl<T: FromBytes> UserArray<T> {
    /// Copies `count` elements from the caller's address `address` on.
    pub(crate) fn read(address: u64, count: usize) -> Result<Self> {
        let address = usize::try_from(address).map_err(|_| EFAULT)?;
        let bytes = count.checked_mul(size_of::<T>()).ok_or(EOVERFLOW)?;
        let mut array = Self {
            few: [const { MaybeUninit::uninit() }; FEW],
            many: KVVec::new(),
            count: 0,
        };
        let room = if count <= FEW {
            &mut array.few[..count]
        } else {
            array.many = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
            &mut array.many.spare_capacity_mut()[..count]
        };
        // SAFETY: These are the bytes of `room`, which may hold anything.
        let raw = unsafe { core::slice::from_raw_parts_mut(room.as_mut_ptr().cast(), bytes) };
        UserSlice::new(UserPtr::from_addr(address), bytes)
            .reader()
            .read_raw(raw)?;
        // INVARIANT: All bytes were written, and any bytes make a `T`.
        array.count = count;
        Ok(array)
    }
}

impl<T> Deref for UserArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let first: *const T = if self.many.capacity() > 0 {
            self.many.as_ptr()
        } else {
            self.few.as_ptr().cast()
        };
        // SAFETY: By the type invariant.
        unsafe { core::slice::from_raw_parts(first, self.count) }
    }
}
