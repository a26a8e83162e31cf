// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that have yet to come: they are waited for in the order of their addresses, and never filled.
//!
//! A virtual machine that arrives by postcopy migration runs before its memory has come: its monitor registers the
//! memory with userfaultfd, and requests each page that is touched from the other side, which sends that page and
//! continues with those behind it. From the program's first registration on, two things are done differently.
//!
//! # No page is filled
//!
//! A page that a file does not have is allocated, and filled with zeroes, by the first access through a mapping that is
//! not registered; the page that comes later is then refused (`EEXIST`), and lost. Which mappings are registered cannot be
//! asked (`/proc/self/smaps` has to be read). So a file that may have holes is accessed through the program's mapping if
//! that is the only one, through a mapping of our own if there is none, and otherwise the call fails
//! ([`crate::create`]).
//!
//! # The order
//!
//! The driver faults pages in one after the other, in the order of the buffer. A screen of
//! 2,025 pieces, in any order, would have each piece requested and waited for, although the pages between its lowest and
//! its highest address may be on their way already. So the driver is first asked for the same pages in the order of their
//! addresses, and for one more that is not what is mapped: it waits for all of them, and then refuses the call. No buffer
//! exists in between that a signal handler, a fork or the end of the thread could leave behind.
//!
//! # Why not at the same time
//!
//! `handle_userfault()` of mm/userfaultfd.c writes no message for a fault that may not wait (`FOLL_NOWAIT`, as for KVM's
//! asynchronous page faults), and takes the message back when the waiting task is interrupted before it was read. So
//! each page that is requested at the same time needs a task that waits: `MADV_POPULATE_READ`, `process_madvise`, AIO
//! and `vmsplice` wait in the caller, `MADV_WILLNEED` reads swap alone in memory of files, and io_uring has threads.
//! An earlier version started threads. Sandboxes kill for that (`clone3`), a signal handler may leave the call with
//! `siglongjmp` while they run, and a program that has to have one thread (`setns`, `unshare`) does not expect them.

use core::ffi::c_int;
use core::sync::atomic::{AtomicBool, Ordering};

use pinbuf_uapi as uapi;

use crate::call::Call;
use crate::log::log;
use crate::plan::Plan;
use crate::spans::Spans;
use crate::sys::{self, Errno, Result};

/// `UFFDIO_REGISTER`.
pub const REGISTER: u32 = 0xc020_aa00;

/// Where `struct uffdio_register` has its mode.
const MODE: usize = 16;

/// `UFFDIO_REGISTER_MODE_MISSING` and `_MINOR`: pages that are not there are waited for.
const WAITS: u64 = 1 | 4;

/// Whether the program has ever registered memory. What is unregistered, perhaps in parts, or lost with its userfaultfd
/// cannot be counted; a flag that stays costs time and nothing else, as long as it is known where files are mapped.
static EXPECTED: AtomicBool = AtomicBool::new(false);

/// Can a registration's argument be read?
pub fn is_readable(arg: usize) -> bool {
    sys::can_read(arg.wrapping_add(MODE))
}

/// Takes note of a registration.
///
/// # Safety
///
/// `arg` must be the argument of that call, which the kernel has read.
pub unsafe fn registered(arg: usize) {
    let mode = (arg + MODE) as *const u64;
    // SAFETY: the kernel has just read it; the program may have unmapped it since, at its own risk.
    let mode = unsafe { mode.read_unaligned() };
    if mode & WAITS != 0 {
        EXPECTED.store(true, Ordering::Relaxed);
    }
}

/// May some of the program's pages have yet to come?
pub fn is_expected() -> bool {
    EXPECTED.load(Ordering::Relaxed)
}

/// The error of a call that might fill a page which has yet to come: the one that udmabuf gives when it cannot have a
/// page. (QEMU tries something else after `EINVAL` and `EBADFD` only.)
pub fn refuse(why: &str) -> Errno {
    log!("refused, as late pages (userfaultfd) might be filled with zeroes: {why}");
    Errno(libc::ENOMEM)
}

/// Waits for the pages of a call, which was located in `mapped`, in the order of their addresses, if some of them may have
/// yet to come and the call itself would wait in another order.
///
/// What fails in the driver fails again in the call, which reports it.
pub fn wait(device: c_int, call: &mut Call, plan: &Plan, mapped: &Spans) -> Result<()> {
    if is_expected() && !call.ascends() {
        wait_ascending(device, call)?;
        // In the order of the buffer again.
        call.locate(plan, mapped)?;
    }
    Ok(())
}

#[cold]
#[inline(never)]
fn wait_ascending(device: c_int, call: &mut Call) -> Result<()> {
    let count = call.ranges.len();
    call.sort();
    if !call.spoil()? {
        return Ok(());
    }
    match call.make(device, uapi::CREATE_CHECK_BACKING | uapi::CREATE_CLOEXEC) {
        Err(Errno(libc::EAGAIN)) => log!(
            "waited for {count} ranges in the order of their addresses: memory is registered with userfaultfd"
        ),
        // Another thread has put that page there.
        Ok(dmabuf) => sys::close(dmabuf),
        Err(_) => {}
    }
    Ok(())
}
