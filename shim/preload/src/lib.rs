// SPDX-License-Identifier: MIT OR Apache-2.0

//! `libudmabuf_shim.so`: with `LD_PRELOAD`, programs written for `/dev/udmabuf` run on pinbuf.
//!
//! The shim stands between a program and libc for the calls that lead to `/dev/udmabuf`: opening
//! it, asking whether it exists, its two ioctls, and mapping the buffers that they return. Every other
//! call continues in the next library at the cost of a comparison.
//!
//! # What it keeps
//!
//! No table of descriptors. `open("/dev/udmabuf")` returns a descriptor of `/dev/pinbuf`, which is
//! recognised later by its device number; so copies of it, passed by `fork`, `dup`, `exec` or a
//! socket, work without any record. What the shim keeps only saves time, and is verified at each use: the next library's
//! functions, a device number, where to log, a descriptor of `/proc/self/maps` ([`maps`]), and where files were mapped
//! ([`hints`]). There are two exceptions: the descriptors that creates have returned ([`align`]), where the shim aligns a
//! mapping of another file if they are out of date; and, with a log, what was reported of discards ([`discards`]).
//!
//! # How a buffer is made
//!
//! udmabuf takes (memfd, offset, size), pinbuf takes addresses. The shim makes the checks that udmabuf makes,
//! in udmabuf's order (the crate `pinbuf_udmabuf`, which the supervisor of `pinbuf run` uses too), finds the addresses at which the program has the files mapped
//! ([`maps`], [`hints`]), and maps the rest itself. The driver
//! compares each page with the file, so wrong addresses cost time and nothing else ([`create`]).
//!
//! # Which system calls it makes
//!
//! Programs confine themselves with seccomp, and are killed for a call that is not on their list. A create makes `ioctl`, `fstat`,
//! `fcntl(F_GET_SEALS)`, `rt_sigprocmask`, `mmap` and `munmap`, and `openat` and `close` for a file that was
//! opened read-only and is not mapped. Everything else happens when the program opens the device. A program that never opens it makes the calls that it makes
//! without the shim.
//!
//! # Signals, threads, allocation
//!
//! Nothing here allocates with malloc, takes a lock or starts a thread. Memory for long lists comes from `mmap`.
//! The kernel checks the program's pointers for the shim, so that invalid ones give `EFAULT`.

#![cfg_attr(test, allow(dead_code))] // The interposed functions are not in tests.

mod align;
mod create;
mod device;
mod discards;
mod hints;
#[cfg(not(test))]
mod interpose;
mod late;
mod log;
mod maps;
#[cfg(not(test))]
mod next;

use pinbuf_udmabuf::{call, plan, procmap, request, spans, sys};
