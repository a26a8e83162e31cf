// SPDX-License-Identifier: GPL-2.0

//! The driver's pure parts, compiled for the host from the driver's own files, and held against
//! naive models.

#[path = "../../../driver/allowances.rs"]
#[allow(dead_code)]
mod allowances;
#[path = "../../../driver/chunked_vec.rs"]
#[allow(dead_code)]
mod chunked_vec;
#[path = "../../../driver/extents.rs"]
#[allow(dead_code)]
mod extents;
#[path = "../../../driver/order.rs"]
#[allow(dead_code)]
mod order;
#[path = "../../../driver/ranges.rs"]
#[allow(dead_code)]
mod ranges;
#[path = "../../../uapi/src/contract.rs"]
#[allow(dead_code)]
mod uapi;
#[path = "../../../driver/user_struct.rs"]
#[allow(dead_code)]
mod user_struct;

#[cfg(test)]
mod allowances_test;
#[cfg(test)]
mod extents_test;
#[cfg(test)]
mod order_test;
#[cfg(test)]
mod ranges_test;
#[cfg(test)]
mod user_struct_test;
