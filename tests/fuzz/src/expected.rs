// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results that a call may have. Where several errors apply, the contract does not say which one is
//! returned.

use anyhow::{bail, Result};
use nix::errno::Errno;

use crate::areas::Argument;
use crate::input::{Claim, Envelope};

/// The results that are right.
#[derive(Debug, Default)]
pub struct Expected {
    must: Vec<Errno>,
    may: Vec<Errno>,
}

impl Expected {
    /// This error applies: the call cannot succeed.
    pub fn must(&mut self, errno: Errno) {
        if !self.must.contains(&errno) {
            self.must.push(errno);
        }
    }

    /// This error applies if the condition holds.
    pub fn must_if(&mut self, condition: bool, errno: Errno) {
        if condition {
            self.must(errno);
        }
    }

    /// Whether this error applies is unknown.
    pub fn may(&mut self, errno: Errno) {
        if !self.may.contains(&errno) {
            self.may.push(errno);
        }
    }

    /// All that `other` says holds too.
    pub fn and(&mut self, other: Self) {
        other.must.into_iter().for_each(|errno| self.must(errno));
        other.may.into_iter().for_each(|errno| self.may(errno));
    }

    /// Fails if the answer is wrong.
    pub fn check<T>(&self, what: &str, answer: &nix::Result<T>) -> Result<()> {
        match answer {
            Ok(_) if self.must.is_empty() => Ok(()),
            Err(errno) if self.must.contains(errno) || self.may.contains(errno) => Ok(()),
            Ok(_) => bail!("{what}: succeeded, expected one of {:?}", self.must),
            Err(errno) if self.must.is_empty() => bail!(
                "{what}: {errno:?}, expected success or one of {:?}",
                self.may
            ),
            Err(errno) => bail!(
                "{what}: {errno:?}, expected one of {:?} {:?}",
                self.must,
                self.may
            ),
        }
    }
}

/// A struct as its caller lays it out.
#[derive(Debug)]
pub struct Struct {
    /// Its bytes, and those behind it that it claims.
    pub bytes: Vec<u8>,
    /// The size that it claims.
    pub claim: usize,
    known: usize,
    dirty: bool,
}

impl Struct {
    /// The most that the kernel reads.
    const MOST: usize = 4096;

    /// Lays a struct out, of which the kernel knows all.
    pub fn new(known: &[u8], envelope: &Envelope) -> Self {
        let claim = match envelope.claim {
            Claim::Right => known.len(),
            Claim::Bytes(bytes) => bytes as usize,
        };
        let mut bytes = known.to_vec();
        bytes.resize(claim.clamp(known.len(), Self::MOST + 64), 0);
        bytes[..4].copy_from_slice(&(claim as u32).to_ne_bytes());
        let mut dirty = false;
        if let Some(tail) = envelope.tail {
            if let Some(byte) = bytes.get_mut(known.len() + usize::from(tail)) {
                *byte = 1;
                dirty = true;
            }
        }
        Self {
            bytes,
            claim,
            known: known.len(),
            dirty,
        }
    }

    /// The error that the layout causes, if any, and whether the kernel gets to reading fields.
    pub fn expect(&self, argument: Argument, writes: bool, expected: &mut Expected) -> bool {
        if argument.readable < 4 {
            expected.must(Errno::EFAULT);
            return false;
        }
        if self.claim < self.known {
            // Version 1 is all there is.
            expected.must(Errno::EINVAL);
            return false;
        }
        expected.must_if(self.claim > Self::MOST || self.dirty, Errno::E2BIG);
        expected.must_if(argument.readable < self.claim, Errno::EFAULT);
        expected.must_if(writes && !argument.writable, Errno::EFAULT);
        argument.readable >= self.known
    }
}
