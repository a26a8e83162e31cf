// SPDX-License-Identifier: GPL-2.0

//! The driver's pure parts, compiled for the host from the driver's own files, and compared with
//! naive models.

#[path = "../../../driver/allowances.rs"]
#[allow(dead_code)]
mod allowances;
#[path = "../../../driver/extents.rs"]
#[allow(dead_code)]
mod extents;
#[path = "../../../driver/one_or_more.rs"]
#[allow(dead_code)]
mod one_or_more;
#[path = "../../../driver/ranges.rs"]
#[allow(dead_code)]
mod ranges;
#[path = "../../../driver/uaccess.rs"]
#[allow(dead_code)]
mod uaccess;
#[path = "../../../uapi/src/contract.rs"]
#[allow(dead_code)]
mod uapi;

#[cfg(test)]
mod allowances_test;
#[cfg(test)]
mod extents_test;
#[cfg(test)]
mod ranges_test;
#[cfg(test)]
mod uaccess_test;
