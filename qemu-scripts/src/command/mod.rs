// SPDX-License-Identifier: MIT OR Apache-2.0

//! The commands beside `test`.

pub mod bench;
pub mod deb;
pub mod demo;
pub mod module;
pub mod vm;
