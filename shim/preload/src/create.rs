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
//! mapping that is registered with userfaultfd makes the call wait for it, as the program would. Where the program has
//! registered memory, a file that may have holes is not accessed in any other way ([`create_unfilled`]).

use core::ffi::c_int;

use pinbuf_uapi as uapi;

use crate::call::{as_udmabuf, each_part, flags_of, Call, TRIES};
use crate::hints::HINTS;
use crate::log::log;
use crate::maps::MAPS;
use crate::plan::{File, Plan};
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
    let late = late::is_expected();
    if late && plan.files.iter().any(File::may_have_holes) {
        return create_unfilled(device, flags, plan, call);
    }
    let of_call = |id: FileId| plan.files.iter().any(|file| file.id == id);

    let mut known = Spans::new();
    // Where the file was, another one may be mapped now, of which the driver would wait for a page, or fill it.
    if !late {
        HINTS.recall(of_call, &mut known);
    }
    if !known.is_empty() && call.locate(plan, &known)? && call.missing == 0 {
        match call.make(device, flags) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    let mut found = Spans::new();
    if !late || MAPS.are_own() {
        MAPS.ask(of_call, &mut found);
    }
    if !known.is_empty() || !found.is_empty() {
        HINTS.replace(of_call, &found);
    }
    if !found.is_empty() && call.locate(plan, &found)? {
        if call.missing == 0 {
            late::wait(device, call, plan, &found)?;
        }
        match call.make_with(device, flags, plan, &found, |_| Ok(())) {
            Err(Errno(libc::EAGAIN | libc::EFAULT)) => {}
            result => return result,
        }
    }

    call.make_by_window(device, flags, plan, |_| Ok(()))
}

/// Creates a buffer in a program that has registered memory with userfaultfd, of files that may have holes: a page
/// that is missing is faulted in through a mapping that may be the registered one, or not at all.
///
/// A file that the program has mapped nowhere is mapped here: nobody can supply its pages. If a part of it is mapped, the
/// rest is not taken to be free: where files have huge pages, a fault there allocates the pages around it, too.
#[cold]
#[inline(never)]
fn create_unfilled(device: c_int, flags: u32, plan: &Plan, call: &mut Call) -> Result<c_int> {
    let of = |id: FileId, holes: bool| {
        let mut files = plan.files.iter().filter(|file| file.id == id);
        files.clone().next().is_some() && files.any(File::may_have_holes) == holes
    };
    let mut why = "";
    for _ in 0..TRIES {
        if !MAPS.are_own() {
            why = UNKNOWN;
            continue;
        }
        let mut found = Spans::new();
        let Some(once) = MAPS.ask_all(|id| of(id, true), &mut found) else {
            return Err(late::refuse(UNKNOWN));
        };
        MAPS.ask(|id| of(id, false), &mut found);
        if !call.locate(plan, &found)? {
            if plan.pieces().len() > uapi::MAX_RANGES as usize {
                return Err(Errno(libc::EINVAL));
            }
            return Err(late::refuse(
                "its mappings divide the request into too many ranges",
            ));
        }
        if !once || (call.missing > 0 && is_partly_mapped(plan, &found)) {
            why = "a file with holes is mapped more than once, in part only, or not shared and writable";
            continue;
        }
        if call.missing == 0 {
            late::wait(device, call, plan, &found)?;
        }
        why = match call.make_with(device, flags, plan, &found, |_| Ok(())) {
            Err(Errno(libc::EAGAIN)) => "the mappings change all the time",
            Err(Errno(libc::EFAULT)) => {
                "the kernel may not fault it in (UFFD_USER_MODE_ONLY, UFFD_FEATURE_SIGBUS, poison, no memory)"
            }
            result => return result,
        };
    }
    Err(late::refuse(why))
}

const UNKNOWN: &str =
    "the shim cannot see the program's mappings. Set RLIMIT_NOFILE to 1024 or more, keep \
    descriptors open, or open the device after fork()";

/// Is a file with holes, of which a part is asked for that is not mapped, mapped elsewhere?
fn is_partly_mapped(plan: &Plan, mapped: &Spans) -> bool {
    let elsewhere = each_part(plan, mapped, |piece, address| {
        let file = &plan.files[piece.file];
        if address.is_none() && file.may_have_holes() && !mapped.of(file.id).is_empty() {
            return Err(Errno(libc::EBUSY));
        }
        Ok(())
    });
    elsewhere.is_err()
}
