// SPDX-License-Identifier: MIT OR Apache-2.0

//! udmabuf's requests, answered by pinbuf.
//!
//! udmabuf takes (memfd, offset, size), pinbuf takes addresses. A request is read ([`request`]) and checked as udmabuf
//! checks it, in its order and with its errors ([`plan`]); files that the caller has not mapped are mapped for the
//! length of the call ([`window`]); and pinbuf is asked with `PINBUF_CREATE_CHECK_BACKING` ([`call`]).
//!
//! The preloaded shim uses this inside of the program, and the supervisor of `pinbuf run` outside of it. The former
//! decides the style: nothing here allocates with malloc or takes a lock, and little stack is used.

#![allow(clippy::new_without_default)] // `new` is const.

pub mod buffer;
pub mod call;
pub mod plan;
pub mod procmap;
pub mod request;
pub mod spans;
pub mod sys;
pub mod window;
