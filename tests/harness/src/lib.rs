// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the test programs that run inside guests share: subtests that run each in a process of its
//! own, the look for what they left behind (pins, charges, descriptors, dma-bufs, module references,
//! complaints in the kernel's log), KTAP, and the pieces that tests are made of.

pub mod accounts;
pub mod runner;
pub mod support;

pub use runner::{report, Test};
