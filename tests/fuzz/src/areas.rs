// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where arguments lie: in the middle of memory, at its end, where it cannot be written, nowhere.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use pinbuf_test_harness::support::memory::{memfd, RW};
use pinbuf_test_harness::support::PAGE;

use crate::access::map_at;
use crate::input::Place;

/// Where the first area begins.
const BASE: u64 = 0x3579_0000_0000;
/// From one area to the next.
const STEP: u64 = 1 << 24;
/// From an area to where the same memory cannot be written.
const ALIAS: u64 = 1 << 20;
/// The size of an area. Behind it, nothing is mapped.
const LENGTH: usize = 20 * PAGE;

/// Room for one argument at a time.
#[derive(Debug)]
pub struct Area {
    base: u64,
    used: usize,
}

/// An argument.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Where it is.
    pub address: u64,
    /// How many bytes can be read there; behind the argument they are zero.
    pub readable: usize,
    /// Whether they can be written.
    pub writable: bool,
}

impl Area {
    /// The area of this number.
    pub fn new(number: u64) -> Result<Self> {
        let base = BASE + number * STEP;
        let file = memfd(LENGTH, 0)?;
        for (address, protection) in [(base, RW), (base + ALIAS, libc::PROT_READ)] {
            // SAFETY: nothing of Rust's lies in an area.
            unsafe {
                map_at(
                    address,
                    LENGTH,
                    protection,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            }
            .context("mapping an area")?;
        }
        Ok(Self { base, used: 0 })
    }

    /// A child has put arguments into this area, which it shares with this process.
    pub fn used_by_another(&mut self) {
        self.used = LENGTH;
    }

    /// The most bytes that an argument may have.
    pub const fn most() -> usize {
        LENGTH - PAGE
    }

    /// Puts an argument to its place.
    pub fn put(&mut self, bytes: &[u8], place: Place) -> Argument {
        assert!(bytes.len() <= Self::most());
        let (offset, missing) = match place {
            Place::Plain | Place::ReadOnly | Place::Raw(_) => (0, 0),
            Place::Shifted(by) => (usize::from(by) % PAGE, 0),
            Place::AtEnd(missing) => {
                let missing = usize::from(missing).min(bytes.len());
                (LENGTH - (bytes.len() - missing), missing)
            }
        };
        let present = &bytes[..bytes.len() - missing];
        let start = (self.base + offset as u64) as *mut u8;
        // SAFETY: the area is mapped, and only this object writes to it.
        unsafe { std::ptr::write_bytes(self.base as *mut u8, 0, LENGTH.min(self.used)) };
        // SAFETY: `offset` and the length are within the area; `bytes` lies elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(present.as_ptr(), start, present.len()) };
        self.used = offset + present.len();
        match place {
            Place::Raw(address) => Argument {
                address: address.0,
                readable: 0,
                writable: false,
            },
            Place::ReadOnly => Argument {
                address: self.base + ALIAS,
                readable: LENGTH,
                writable: false,
            },
            Place::Plain | Place::Shifted(_) | Place::AtEnd(_) => Argument {
                address: self.base + offset as u64,
                readable: LENGTH - offset,
                writable: true,
            },
        }
    }

    /// What is in the last argument's place now, as far as it could be put there.
    pub fn get(&self, argument: Argument, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length.min(argument.readable)];
        // SAFETY: so much is mapped there.
        unsafe {
            std::ptr::copy_nonoverlapping(
                argument.address as *const u8,
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
        bytes
    }
}
