// SPDX-License-Identifier: GPL-2.0

//! The driver's pure parts, compiled for the host from the driver's own files, and compared with
//! naive models.

#[path = "../../../driver/allowances.rs"]
#[allow(dead_code)]
mod allowances;
#[path = "../../../driver/charge.rs"]
// Nodes of a tree own memory in the kernel.
#[allow(dead_code, clippy::drop_non_drop)]
mod charge;
#[path = "../../../driver/discards.rs"]
#[allow(dead_code)]
mod discards;
#[path = "../../../driver/extents.rs"]
#[allow(dead_code)]
mod extents;
#[allow(dead_code)]
mod kernel_ext;
#[path = "../../../driver/one_or_more.rs"]
#[allow(dead_code)]
mod one_or_more;
#[allow(dead_code)]
mod params;
#[allow(dead_code, unused_qualifications)]
mod pin {
    pub(crate) mod held;
    #[path = "../../../../driver/pin/rest.rs"]
    mod rest;
    #[cfg(test)]
    mod rest_test;
    #[path = "../../../../driver/pin/retry.rs"]
    mod retry;
    #[cfg(test)]
    mod retry_test;
    #[path = "../../../../driver/pin/turn.rs"]
    mod turn;
}
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
mod charge_test;
#[cfg(test)]
mod discards_test;
#[cfg(test)]
mod extents_test;
#[cfg(test)]
mod ranges_test;
#[cfg(test)]
mod uaccess_test;
