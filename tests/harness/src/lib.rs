// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the test programs that run inside guests share: subtests that run in processes of their own; the check
//! for what they left behind (pins, charges, descriptors, dma-bufs, module references, reports in the kernel's
//! log); KTAP; and the parts that tests are built from.

pub mod accounts;
pub mod choice;
pub mod runner;
pub mod support;

pub use choice::Choice;
pub use runner::Test;
