// SPDX-License-Identifier: MIT OR Apache-2.0

//! `libudmabuf_shim.so`: with `LD_PRELOAD`, programs written for `/dev/udmabuf` run on pinbuf.
//!
//! The shim stands between a program and libc for the calls that lead to `/dev/udmabuf`: opening
//! it, asking whether it is there, its two ioctls, and mapping what they return. Every other call
//! goes on to the next library at the cost of a comparison.
//!
//! # What it keeps
//!
//! No table of descriptors. `open("/dev/udmabuf")` returns a descriptor of `/dev/pinbuf`, which is
//! told apart later by its device number; so copies of it, passed by `fork`, `dup`, `exec` or a
//! socket, work without the shim's knowing. What is kept is written once and only saves time: the
//! next library's functions, the device number, and where to log.
//!
//! # How a buffer is made
//!
//! udmabuf takes (memfd, offset, size), and so does pinbuf with `PINBUF_CREATE_FROM_FILES`. The shim
//! makes the checks that udmabuf makes and the driver has no need of (`F_SEAL_SHRINK`), in
//! udmabuf's order, and joins items that are neighbours. The program needs no mapping of the file,
//! and the shim makes none.
//!
//! # Signals, threads, allocation
//!
//! Nothing here allocates with malloc or takes a lock. Memory for long lists comes from `mmap`.
//! The program's pointers are read by the kernel on our behalf, so that bad ones give `EFAULT`.

#![cfg_attr(test, allow(dead_code))] // The interposed functions are not in tests.

mod align;
mod buffer;
mod create;
mod device;
#[cfg(not(test))]
mod interpose;
mod log;
#[cfg(not(test))]
mod next;
mod plan;
mod request;
mod sys;
