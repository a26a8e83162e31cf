// SPDX-License-Identifier: GPL-2.0

//! The driver's pure parts, compiled for the host from the driver's own files, and held against
//! naive models.

#[path = "../../../driver/chunked_vec.rs"]
#[allow(dead_code)]
mod chunked_vec;
#[path = "../../../driver/extents.rs"]
#[allow(dead_code)]
mod extents;

#[cfg(test)]
mod extents_test;
