// SPDX-License-Identifier: GPL-2.0

//! Prototypes of `driver/helpers.c`, which bindgen generates from its header when the module is
//! built.
//!
//! Only [`crate::kernel_ext`] and [`crate::params`] call these functions.

#![allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::bindings::*;

include!("helpers_generated.rs");
