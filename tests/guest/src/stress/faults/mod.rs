// SPDX-License-Identifier: MIT OR Apache-2.0

//! Each allocation, each user copy and each pin of a call fails in turn, one per call: the error must be the
//! one that `uapi/pinbuf.h` names, nothing may be left behind, and the same call must succeed afterwards.

pub mod create;
pub mod device;
pub mod huge;
pub mod inject;
pub mod mapping;
pub mod pins;
pub mod sweep;
