// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian: its archive, the kernels in it, and trees of its packages.

mod apt;
pub mod arch;
pub mod archive;
pub mod tree;
