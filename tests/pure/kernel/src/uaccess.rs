// SPDX-License-Identifier: GPL-2.0

//! A caller's memory, copied from and to by the byte.

use crate::error::{code::EFAULT, Result};
use crate::transmute::FromBytes;
use std::cell::RefCell;
use std::mem::MaybeUninit;

/// All memory of the calling process: some bytes at [`User::BASE`], and nothing around them.
#[derive(Clone, Debug, Default)]
pub struct User {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether they can be written.
    pub writable: bool,
    /// How often each was read.
    pub reads: Vec<u32>,
    /// What another thread puts over the first bytes, once they have been read for the first time.
    pub change: Option<[u8; 4]>,
}

thread_local! {
    static USER: RefCell<User> = RefCell::default();
}

impl User {
    /// Where the bytes are.
    pub const BASE: usize = 0x1000;

    /// Memory that can be written.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            reads: vec![0; bytes.len()],
            bytes,
            writable: true,
            change: None,
        }
    }

    /// Calls `action` as a process whose memory this is. Returns its result, and the memory afterwards.
    pub fn call<T>(self, action: impl FnOnce(UserPtr) -> T) -> (T, Self) {
        USER.set(self);
        let result = action(UserPtr::from_addr(Self::BASE));
        (result, USER.take())
    }

    fn read(&mut self, address: usize) -> Result<u8> {
        let index = address.checked_sub(Self::BASE).ok_or(EFAULT)?;
        let byte = *self.bytes.get(index).ok_or(EFAULT)?;
        self.reads[index] += 1;
        if index == 3 {
            if let Some(change) = self.change.take() {
                self.bytes[..4].copy_from_slice(&change);
            }
        }
        Ok(byte)
    }

    fn write(&mut self, address: usize, byte: u8) -> Result {
        let index = address.checked_sub(Self::BASE).ok_or(EFAULT)?;
        let writable = self.writable;
        let place = self.bytes.get_mut(index).filter(|_| writable);
        *place.ok_or(EFAULT)? = byte;
        Ok(())
    }
}

/// An address of the caller's.
#[derive(Clone, Copy, Debug)]
pub struct UserPtr(usize);

impl UserPtr {
    /// The address.
    pub fn from_addr(address: usize) -> Self {
        Self(address)
    }
}

/// Part of the caller's memory, if it is there.
pub struct UserSlice {
    start: usize,
    length: usize,
}

impl UserSlice {
    /// `length` bytes at an address, not checked yet.
    pub fn new(start: UserPtr, length: usize) -> Self {
        Self {
            start: start.0,
            length,
        }
    }

    /// To read them, once.
    pub fn reader(self) -> UserSliceReader {
        UserSliceReader(self)
    }

    /// To write them, once.
    pub fn writer(self) -> UserSliceWriter {
        UserSliceWriter(self)
    }

    /// The addresses of the next `length` bytes.
    fn advance(&mut self, length: usize) -> Result<std::ops::Range<usize>> {
        self.length = self.length.checked_sub(length).ok_or(EFAULT)?;
        let start = self.start;
        self.start += length;
        Ok(start..self.start)
    }
}

/// Reads a [`UserSlice`].
pub struct UserSliceReader(UserSlice);

impl UserSliceReader {
    /// The bytes that are left.
    pub fn len(&self) -> usize {
        self.0.length
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads bytes.
    pub fn read_slice(&mut self, out: &mut [u8]) -> Result {
        let addresses = self.0.advance(out.len())?;
        USER.with_borrow_mut(|user| {
            for (address, byte) in addresses.zip(out) {
                *byte = user.read(address)?;
            }
            Ok(())
        })
    }

    /// Reads bytes into memory that may hold anything.
    pub fn read_raw(&mut self, out: &mut [MaybeUninit<u8>]) -> Result {
        let mut bytes = vec![0; out.len()];
        self.read_slice(&mut bytes)?;
        out.iter_mut().zip(bytes).for_each(|(place, byte)| {
            place.write(byte);
        });
        Ok(())
    }

    /// Reads a value.
    pub fn read<T: FromBytes>(&mut self) -> Result<T> {
        let mut bytes = vec![0; size_of::<T>()];
        self.read_slice(&mut bytes)?;
        // SAFETY: This number of bytes is there, and all of them are values of the type.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

/// Writes a [`UserSlice`].
pub struct UserSliceWriter(UserSlice);

impl UserSliceWriter {
    /// The bytes that are left.
    pub fn len(&self) -> usize {
        self.0.length
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes bytes.
    pub fn write_slice(&mut self, data: &[u8]) -> Result {
        let addresses = self.0.advance(data.len())?;
        USER.with_borrow_mut(|user| {
            for (address, byte) in addresses.zip(data) {
                user.write(address, *byte)?;
            }
            Ok(())
        })
    }
}
