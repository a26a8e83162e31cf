// SPDX-License-Identifier: MIT OR Apache-2.0

//! What tests are made of.

pub mod arena;
pub mod device;
pub mod foreign;
pub mod frames;
pub mod kernel;
pub mod kinds;
pub mod memory;
pub mod probe;
pub mod process;
pub mod processor;
pub mod turn;
pub mod udmabuf;
pub mod uffd;
pub mod vgem;
pub mod view;

use std::fmt;

pub use device::{Buffer, Device, Sync};
pub use memory::{Memory, PAGE};

/// Why a test cannot run here; only for things that the documentation says may be missing.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0)
    }
}

impl std::error::Error for Skip {}

/// Fails the test, with both values, unless they are equal.
#[macro_export]
macro_rules! check_eq {
    ($seen:expr, $expected:expr, $($what:tt)+) => {{
        let (seen, expected) = (&$seen, &$expected);
        if seen != expected {
            $crate::support::bail!(
                "{}:{}: {}: expected {:?}, seen {:?}",
                file!(), line!(), format_args!($($what)+), expected, seen
            );
        }
    }};
}

/// Fails the test unless the condition holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            $crate::support::bail!("{}:{}: {}", file!(), line!(), format_args!($($what)+));
        }
    };
}

pub use crate::{check, check_eq};
pub use anyhow::bail;
