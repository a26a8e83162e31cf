// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that have yet to come are waited for in the order of their addresses.
//!
//! A virtual machine that arrives by postcopy migration runs before its memory has come: its monitor registers the
//! memory with userfaultfd, and requests each page that is touched from the other side, which sends that page and
//! continues with those behind it. The driver faults pages in one after the other, in the order of the buffer. A screen of
//! 2,025 pieces, in any order, would have each piece requested and waited for, although the pages between its lowest and
//! its highest address may be on their way already. So where the program has registered memory with userfaultfd, the shim
//! has the driver make a buffer of the same pages in the order of their addresses first, and closes it.
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
use core::sync::atomic::{AtomicUsize, Ordering};

use pinbuf_uapi as uapi;

use crate::call::Call;
use crate::log::log;
use crate::sys;

/// `UFFDIO_REGISTER` and `UFFDIO_UNREGISTER`.
pub const REGISTER: u32 = 0xc020_aa00;
pub const UNREGISTER: u32 = 0x8010_aa01;

/// Where `struct uffdio_register` has its mode.
const MODE: usize = 16;

/// `UFFDIO_REGISTER_MODE_MISSING` and `_MINOR`: pages that are not there are waited for.
const WAITS: u64 = 1 | 4;

/// The number of ranges that the program has registered. If it closes the userfaultfd instead of unregistering them,
/// buffers are made twice although all pages are there: that costs time, and nothing else.
static REGISTERED: AtomicUsize = AtomicUsize::new(0);

/// Takes note of a call of the program's that succeeded.
///
/// # Safety
///
/// `arg` must be the argument of that call.
pub unsafe fn noticed(number: u32, arg: usize) {
    if number == UNREGISTER {
        let one_less = |count: usize| count.checked_sub(1);
        let _ = REGISTERED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        return;
    }
    let mode = (arg + MODE) as *const u64;
    // SAFETY: the kernel has just read it; the program may have unmapped it since, at its own risk.
    let mode = unsafe { mode.read_unaligned() };
    if mode & WAITS != 0 {
        REGISTERED.fetch_add(1, Ordering::Relaxed);
    }
}

/// May some of the program's pages have yet to come?
pub fn is_expected() -> bool {
    REGISTERED.load(Ordering::Relaxed) > 0
}

/// Waits for the pages of a call, in the order of their addresses, if some of them may have yet to come and the call
/// itself would wait in another order.
///
/// What fails here fails again in the call, which reports it.
pub fn wait(device: c_int, call: &Call) {
    if is_expected() && !call.ascends() {
        wait_ascending(device, call);
    }
}

#[cold]
#[inline(never)]
fn wait_ascending(device: c_int, call: &Call) {
    let mut sorted = Call::new();
    if call.ascending(&mut sorted).is_err() {
        return;
    }
    let flags = uapi::CREATE_CHECK_BACKING | uapi::CREATE_CLOEXEC;
    if let Ok(dmabuf) = sorted.make(device, flags) {
        sys::close(dmabuf);
        log!(
            "waited for {} ranges in the order of their addresses: memory is registered with userfaultfd",
            sorted.ranges.len()
        );
    }
}
