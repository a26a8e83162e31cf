// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that have yet to come are requested before the first of them is waited for.
//!
//! A virtual machine that arrives by postcopy migration runs before its memory has come: its monitor registers the
//! memory with userfaultfd, and requests each page that is touched from the other side. The driver faults pages in one
//! after the other, so that a screen of 2,025 pieces would wait 2,025 times. Where the program has registered memory with
//! userfaultfd, the shim therefore touches the pages of a buffer, in many threads at the same time, before it asks the
//! driver. The threads end before the call does.
//!
//! Only a program that answers its faults in another thread, or another process, gets here. Others start no thread.
//!
//! # Why threads
//!
//! `handle_userfault()` of mm/userfaultfd.c writes no message for a fault that may not wait (`FOLL_NOWAIT`, as for KVM's
//! asynchronous page faults), and takes the message back when the waiting task is interrupted before it was read. So
//! each page that is requested at the same time needs a task that waits. `MADV_WILLNEED` reads swap alone in memory of
//! files; `MADV_POPULATE_READ`, `process_madvise`, AIO and `vmsplice` wait in the caller; io_uring starts threads as well,
//! which stay for five seconds, and is forbidden in many places. A child of `fork` does not have the userfaultfd and
//! would put zeroes in the place of late pages; a child that shares memory is a process for seccomp filters: QEMU's `-sandbox
//! spawn=deny`, which libvirt sets, kills for it, and allows threads.

use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

use pinbuf_uapi::Range;

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
/// creates touch pages that are there: that costs time, and nothing else.
static REGISTERED: AtomicUsize = AtomicUsize::new(0);

/// The maximum number of threads that touch pages, the caller's among them: the number of pages that are requested at
/// the same time.
const THREADS: usize = 32;

/// The number of pages that a thread touches one after the other. The other side sends the pages behind a page that was
/// requested, too.
const IN_A_ROW: u64 = 8;

/// Room for a thread's stack, which needs a few hundred bytes, and its thread-local storage.
const STACK: usize = 128 << 10;

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

/// What a thread touches.
#[derive(Clone, Copy)]
struct Share<'a> {
    ranges: &'a [Range],
    number: usize,
    of: usize,
}

impl Share<'_> {
    fn touch(self) {
        let page = sys::page_size();
        let mut row = 0;
        for range in self.ranges {
            let mut at = range.addr;
            let end = range.addr.saturating_add(range.len);
            while at < end {
                let next = end.min(at.saturating_add(IN_A_ROW * page));
                if row % self.of == self.number {
                    let mut address = at;
                    while address < next {
                        // What cannot be read, the driver refuses.
                        let _ = sys::can_read(address as usize);
                        address += page;
                    }
                }
                row += 1;
                at = next;
            }
        }
    }
}

extern "C" fn run(share: *mut c_void) -> *mut c_void {
    // SAFETY: `request` passes a share that lives until the thread has ended.
    unsafe { *share.cast::<Share<'_>>() }.touch();
    ptr::null_mut()
}

/// The maximum number of bytes to touch: to touch a page that nobody delivers is to allocate it, and the driver has not
/// yet compared the size with any limit. A screen of 8K has half of that.
const MOST: u64 = 256 << 20;

/// Touches the pages of these ranges, if some of them may have yet to come, and waits until all have.
pub fn request(ranges: &[Range]) {
    if REGISTERED.load(Ordering::Relaxed) == 0 {
        return;
    }
    let row = IN_A_ROW * sys::page_size();
    let rows: u64 = ranges.iter().map(|range| range.len.div_ceil(row)).sum();
    let bytes: u64 = ranges.iter().map(|range| range.len).sum();
    if rows > 1 && bytes <= MOST {
        touch_all(ranges, THREADS.min(rows as usize));
    }
}

#[cold]
#[inline(never)]
fn touch_all(ranges: &[Range], of: usize) {
    let mut shares = [Share {
        ranges,
        number: 0,
        of,
    }; THREADS];
    let mut threads = [None; THREADS];
    let attributes = Attributes::new();
    // The threads use this function's memory: it must not be left before they have ended.
    let cancellation = Cancellation::disable();
    // The program's signals are not for these threads.
    let mask = Mask::all();
    for (number, (share, thread)) in shares
        .iter_mut()
        .zip(&mut threads)
        .enumerate()
        .take(of)
        .skip(1)
    {
        share.number = number;
        *thread = attributes.start(share);
    }
    drop(mask);
    shares[0].touch();
    let mut started = 1;
    for (share, thread) in shares.iter().zip(threads).take(of).skip(1) {
        match thread {
            Some(thread) => {
                started += 1;
                // SAFETY: this function started it, and waits for it once.
                unsafe { libc::pthread_join(thread, ptr::null_mut()) };
            }
            // It could not be started.
            None => share.touch(),
        }
    }
    drop(cancellation);
    log!(
        "touched the pages of {} ranges in {started} threads: memory is registered with userfaultfd",
        ranges.len()
    );
}

/// What threads are started with.
struct Attributes(MaybeUninit<libc::pthread_attr_t>);

impl Attributes {
    fn new() -> Self {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: room for the attributes.
        unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) };
        // If this is too small for the program's thread-local storage, threads do not start.
        // SAFETY: just initialised.
        unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK) };
        Self(attributes)
    }

    /// Starts a thread, which has to end while its share lives.
    fn start(&self, share: &mut Share<'_>) -> Option<libc::pthread_t> {
        let mut thread = MaybeUninit::uninit();
        let share = ptr::from_mut(share).cast();
        // SAFETY: initialised attributes, and a function that takes such a share.
        let error =
            unsafe { libc::pthread_create(thread.as_mut_ptr(), self.0.as_ptr(), run, share) };
        // SAFETY: the call succeeded.
        (error == 0).then(|| unsafe { thread.assume_init() })
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised attributes.
        unsafe { libc::pthread_attr_destroy(self.0.as_mut_ptr()) };
    }
}

extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// The calling thread cannot be cancelled until this is dropped: `pthread_join` is a cancellation point, `ioctl` is none.
struct Cancellation(c_int);

impl Cancellation {
    fn disable() -> Self {
        /// `PTHREAD_CANCEL_DISABLE`.
        const DISABLE: c_int = 1;
        let mut before = 0;
        // SAFETY: the state before is written.
        unsafe { pthread_setcancelstate(DISABLE, &mut before) };
        Self(before)
    }
}

impl Drop for Cancellation {
    fn drop(&mut self) {
        let mut disabled = 0;
        // SAFETY: the state before is written.
        unsafe { pthread_setcancelstate(self.0, &mut disabled) };
    }
}

/// Signals that were blocked, until it is dropped.
struct Mask(MaybeUninit<libc::sigset_t>);

impl Mask {
    fn all() -> Self {
        let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: room for a set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: room for a set, and one that is filled in.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        Self(before)
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        // SAFETY: the set that the kernel filled in.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, self.0.as_ptr(), ptr::null_mut()) };
    }
}
