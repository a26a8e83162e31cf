// SPDX-License-Identifier: GPL-2.0

//! Copies the caller's structs, which begin with their own size and may be shorter or longer than
//! the driver's, and the arrays that they point to. Everything is read once, except for the size,
//! whose second value is ignored.

use crate::one_or_more::OneOrMore;
use kernel::{
    alloc::{
        flags::{
            __GFP_NOWARN, //
            GFP_KERNEL_ACCOUNT,
        },
        KVVec, //
    },
    page::PAGE_SIZE,
    prelude::*,
    transmute::{
        AsBytes,
        FromBytes, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// A struct of the interface that begins with its own size.
///
/// # Safety
///
/// The type is `repr(C)`, consists of integers without padding, and its first field is the `u32`
/// size.
pub(crate) unsafe trait Extensible: Copy + Default {
    /// The size of the first version of the struct, in bytes.
    const FIRST_SIZE: usize;
}

/// A copy of `T` that the kernel crate may read and write as bytes.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Bytes<T>(T);

// SAFETY: Only integers, by `Extensible`: every bit pattern is a value.
unsafe impl<T: Extensible> FromBytes for Bytes<T> {}
// SAFETY: No padding, by `Extensible`.
unsafe impl<T: Extensible> AsBytes for Bytes<T> {}

/// Reads the struct at `user`, and returns it with the size that the caller passed.
///
/// Fields that the caller does not know read as zero. Fails with `EINVAL` if the struct is shorter
/// than the first version, with `E2BIG` if it is longer than a page or if the part that the driver
/// does not know is not zero, and with `EFAULT` if it cannot be read.
pub(crate) fn read_struct<T: Extensible>(user: UserPtr) -> Result<(T, usize)> {
    let claimed = UserSlice::new(user, size_of::<u32>())
        .reader()
        .read::<u32>()? as usize;
    if claimed < T::FIRST_SIZE {
        return Err(EINVAL);
    }
    if claimed > PAGE_SIZE {
        return Err(E2BIG);
    }
    let known = claimed.min(size_of::<T>());

    let mut value = Bytes(T::default());
    let mut reader = UserSlice::new(user, claimed).reader();
    let bytes = value.as_bytes_mut();
    reader.read_slice(&mut bytes[..known])?;
    // Another thread may have changed the size after it was checked.
    bytes[..size_of::<u32>()].copy_from_slice(&(claimed as u32).to_ne_bytes());

    let mut tail = [0; 64];
    while !reader.is_empty() {
        let part = reader.len().min(tail.len());
        reader.read_slice(&mut tail[..part])?;
        if tail[..part].iter().any(|byte| *byte != 0) {
            return Err(E2BIG);
        }
    }
    Ok((value.0, claimed))
}

/// Writes `value` to the caller's struct of `claimed` bytes at `user`, truncated if that is
/// shorter. If it is longer, its tail is zero already: [`read_struct`] has checked that.
pub(crate) fn write_struct<T: Extensible>(user: UserPtr, value: T, claimed: usize) -> Result {
    let known = claimed.min(size_of::<T>());
    let bytes = Bytes(value);
    UserSlice::new(user, known)
        .writer()
        .write_slice(&bytes.as_bytes()[..known])
}

/// Reads an array of `count` elements at `address` of user space. The caller of this function has
/// to bound `count`.
pub(crate) fn read_array<T: FromBytes>(address: u64, count: usize) -> Result<OneOrMore<T>> {
    let address = usize::try_from(address).map_err(|_| EFAULT)?;
    let bytes = count.checked_mul(size_of::<T>()).ok_or(EOVERFLOW)?;
    let mut reader = UserSlice::new(UserPtr::from_addr(address), bytes).reader();
    if count == 1 {
        return Ok(OneOrMore::One([reader.read()?]));
    }
    let mut array = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
    let room = &mut array.spare_capacity_mut()[..count];
    // SAFETY: These are the bytes of `room`, which need not be initialised.
    let raw = unsafe { core::slice::from_raw_parts_mut(room.as_mut_ptr().cast(), bytes) };
    reader.read_raw(raw)?;
    // SAFETY: All bytes were written, and any bytes are a valid `T`, by `FromBytes`.
    unsafe { array.inc_len(count) };
    Ok(OneOrMore::More(array))
}
