// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answering `UDMABUF_CREATE` and `UDMABUF_CREATE_LIST`.
//!
//! udmabuf names parts of files, pinbuf takes addresses. Three things are tried in turn, each with
//! `PINBUF_CREATE_CHECK_BACKING`, so that the driver refuses every page that is not the file's:
//!
//! 1. the program's own mappings, where they were the last time;
//! 2. the program's own mappings, where the kernel says that they are now, and mappings of our own
//!    for what is not among them;
//! 3. mappings of our own for everything.
//!
//! The program's own come first since a page that is not there yet may have to come from elsewhere: a
//! mapping that is registered with userfaultfd makes the call wait for it, as the program would.

use core::ffi::c_int;

use crate::call::{as_udmabuf, flags_of, Call, TRIES};
use crate::hints::HINTS;
use crate::log::log;
use crate::maps::MAPS;
use crate::plan::Plan;
use crate::request;
use crate::spans::{FileId, Spans};
use crate::sys::{self, Errno, Result};
use crate::{align, device, discards, late};

/// Answers a request for a buffer; `ENOTTY` says that `device` is not pinbuf's.
pub fn answer(device: c_int, request: u32, arg: usize) -> Result<c_int> {
    discards::report(device);
    let mut changed = Errno(libc::EBADFD);
    for _ in 0..TRIES {
        let (dmabuf, checked) = answer_once(device, request, arg)?;
        match checked {
            Ok(()) => return Ok(dmabuf),
            Err(error) => changed = error,
        }
        log!("fd {dmabuf} is closed: another thread changed the files meanwhile");
        sys::close(dmabuf);
    }
    log!(
        "failed with errno {}: the files changed {TRIES} times",
        changed.0
    );
    Err(changed)
}

/// Answers a request once. With the buffer comes whether the files were the same throughout.
#[inline(never)]
fn answer_once(device: c_int, request: u32, arg: usize) -> Result<(c_int, Result<()>)> {
    let mut plan = Plan::new();
    let mut call = Call::new();
    let mut result = match read(&mut plan, request, arg) {
        Ok(flags) => create(device, flags, &plan, &mut call).map_err(as_udmabuf),
        Err(error) => Err(error),
    };
    match result {
        Ok(dmabuf) => {
            align::made(dmabuf);
            discards::made(dmabuf);
        }
        Err(_) if device::is_path_only(device) => result = Err(Errno(libc::EBADF)),
        Err(_) => {}
    }
    let (outcome, number) = match result {
        Ok(fd) => ("created fd", fd),
        Err(Errno(errno)) => ("failed with errno", errno),
    };
    log!(
        "{outcome} {number}: {} bytes, {} items, {} pieces, {} ranges mapped for the call",
        plan.bytes,
        plan.asked,
        plan.pieces().len(),
        call.missing
    );
    result.map(|dmabuf| (dmabuf, plan.check_again()))
}

/// Reads a request and checks it. Returns the flags for pinbuf's call.
fn read(plan: &mut Plan, number: u32, arg: usize) -> Result<u32> {
    let flags = match number {
        request::CREATE => request::read_single(plan.items(), arg)?,
        _ => request::read_list(plan.items(), arg)?,
    };
    plan.check()?;
    Ok(flags_of(flags))
}

fn create(device: c_int, flags: u32, plan: &Plan, call: &mut Call) -> Result<c_int> {
    let of_call = |id: FileId| plan.files.iter().any(|file| file.id == id);

    let mut known = Spans::new();
    HINTS.recall(of_call, &mut known);
    if !known.is_empty() && call.locate(plan, &known)? && call.missing == 0 {
        late::wait(device, call);
        match call.make(device, flags) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    let mut found = Spans::new();
    MAPS.ask(of_call, &mut found);
    if !known.is_empty() || !found.is_empty() {
        HINTS.replace(of_call, &found);
    }
    if !found.is_empty() && call.locate(plan, &found)? {
        if call.missing == 0 {
            late::wait(device, call);
        }
        match call.make_with(device, flags, plan, &found, |_| Ok(())) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    call.make_by_window(device, flags, plan, |_| Ok(()))
}
