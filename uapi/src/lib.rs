// SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note

//! The contract between pinbuf's kernel module and user space: [`contract`], from which the kernel
//! module is compiled too.

#![no_std]

mod contract;

pub use contract::*;
