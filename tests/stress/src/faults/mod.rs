// SPDX-License-Identifier: MIT OR Apache-2.0

//! Each allocation, each user copy and each pin that a call makes fails in turn, one a call: the error
//! must be the one that `uapi/pinbuf.h` names, nothing may be left behind, and the same call must work
//! afterwards.

pub mod create;
pub mod device;
pub mod huge;
pub mod inject;
pub mod mapping;
pub mod pins;
pub mod sweep;
