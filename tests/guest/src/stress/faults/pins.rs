// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_CREATE` when the function that pins fails: each call of `pin_user_pages_fast` in turn, it alone or
//! all from it on, with every kind of error that it has.
//!
//! The kernel's fault injection does not do this; the test importer does, with kprobes, on any kernel. The
//! contract does not say how often the driver calls it: numbers of faults are lower bounds.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{pin_cost, FailingPins, PinFailure};
use pinbuf_uapi::{Backing, Range};

use super::inject::Burst;
use super::sweep::{Allowed, Call};
use crate::kinds::{few, is_of, Kind};
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, HUGE, PAGE};
use pinbuf_test_harness::support::process::{drop_ipc_lock, set_memlock};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "faults":
    pins_of_many_pages_at_once,
    pins_fail_for_one_thread,
    pins_of_anonymous within 300,
    pins_of_shmem within 300,
    pins_of_transparent within 300,
    pins_of_hugetlb_private within 300,
    pins_of_hugetlb_shared within 300,
    pins_of_many_ranges within 300,
    pins_of_checked_backing within 300,
    pins_of_checked_hugetlb within 300,
    pins_of_missing_pages within 300,
    pins_within_memlock within 300,
    pins_that_fail_again_and_again,
}

/// More than a batch of the driver's.
const MANY: usize = 600;

/// Retries: few, so that a lasting failure ends after milliseconds.
const RETRIES: u32 = 3;

/// How a pin fails.
#[derive(Clone, Copy, Debug)]
struct Failure {
    /// The errno; zero: nothing is pinned.
    error: i32,
    burst: Burst,
    /// Pins for a short time do not fail.
    brief: bool,
}

impl Failure {
    const fn new(error: i32, burst: Burst) -> Self {
        Self {
            error,
            burst,
            brief: false,
        }
    }

    fn name(self) -> String {
        let error = match self.error {
            0 => "nothing pinned".to_owned(),
            error => format!("{:?}", Errno::from_raw(error)),
        };
        let but = if self.brief { ", but briefly" } else { "" };
        format!("{:?} {error}{but}", self.burst)
    }
}

/// Errors that may pass.
const PASSING: [i32; 4] = [libc::ENOMEM, libc::EAGAIN, libc::EBUSY, 0];
/// Errors that do not.
const FINAL: [i32; 2] = [libc::EFAULT, libc::EHWPOISON];

/// The results of failures that are not compensated for.
fn refused(calls: usize, errors: &[Errno]) -> Allowed<'_> {
    Allowed {
        errors,
        failed: calls,
        recovered: 0,
        heard: true,
    }
}

/// All failures, with the errors that the contract allows for each. `calls` is the minimum number of calls that the driver
/// needs.
fn contract(calls: usize) -> Vec<(Failure, Allowed<'static>)> {
    const EFAULT: &[Errno] = &[Errno::EFAULT];
    const EBUSY: &[Errno] = &[Errno::EBUSY];
    const ENOMEM: &[Errno] = &[Errno::ENOMEM];
    const EINTR: &[Errno] = &[Errno::EINTR];
    let recovered = Allowed {
        errors: &[],
        failed: 0,
        recovered: calls,
        heard: false,
    };
    let refused = |errors| refused(calls, errors);
    let single = |error| Failure::new(error, Burst::Single);
    let lasting = |error| Failure::new(error, Burst::Lasting);

    let mut all = Vec::new();
    for error in PASSING {
        all.push((single(error), recovered));
        all.push((lasting(error), refused(ENOMEM)));
        // The same pages can be had briefly: it was not memory that was short.
        let brief = Failure {
            brief: true,
            ..lasting(error)
        };
        all.push((brief, refused(EBUSY)));
    }
    for error in FINAL {
        // That a page is not there, where many were asked for, only means that it has to be faulted in,
        // alone. The first page is asked for alone.
        let mut once = refused(EFAULT);
        if error == libc::EFAULT {
            (once.failed, once.heard) = (1, false);
        }
        all.push((single(error), once));
        all.push((lasting(error), refused(EFAULT)));
    }
    // Of a fatal signal, whose task sees no result.
    all.push((single(libc::EINTR), refused(EINTR)));
    all.push((lasting(libc::EINTR), refused(EINTR)));
    all
}

/// Those of them that take each way through the driver, where all would take minutes.
fn essential(calls: usize) -> Vec<(Failure, Allowed<'static>)> {
    let mut all = contract(calls);
    all.retain(|(failure, _)| [libc::ENOMEM, libc::EFAULT].contains(&failure.error));
    all
}

/// The same where the driver does not try again: what passes is refused, too.
fn impatient(calls: usize) -> Vec<(Failure, Allowed<'static>)> {
    let allowed = refused(calls, &[Errno::EBUSY]);
    PASSING
        .into_iter()
        .map(|error| (Failure::new(error, Burst::Single), allowed))
        .collect()
}

impl<Given, Made, Prepare, Make, Verify> Call<Prepare, Make, Verify>
where
    Prepare: Fn() -> Result<Given>,
    Make: Fn(&Given) -> nix::Result<Made>,
    Verify: Fn(&Given, &Made) -> Result<()>,
{
    /// Makes the call with each of its pins failing in turn, in each of these ways.
    fn sweep_pins(&self, all: &[(Failure, Allowed<'_>)]) -> Result<()> {
        let pins = FailingPins::new().context("opening the test importer")?;
        for (failure, allowed) in all {
            let what = failure.name();
            self.one_by_one(&what, allowed, |n, call| {
                let failure = PinFailure {
                    nth: u32::try_from(n)?,
                    lasting: failure.burst == Burst::Lasting,
                    longterm_only: failure.brief,
                    error: failure.error,
                };
                let ((), counts) = pins.during(failure, call).context("letting pins fail")?;
                Ok(counts.failed > 0)
            })
            .with_context(|| format!("{}, {what}", self.name))?;
        }
        Ok(())
    }

    /// With retries, and without.
    fn sweep_all_pins(&self, calls: usize) -> Result<()> {
        let patient = Setting::parameter("pin_retries", RETRIES)?;
        self.sweep_pins(&contract(calls))?;
        drop(patient);
        let _impatient = Setting::parameter("pin_retries", 0)?;
        self.sweep_pins(&impatient(calls))
    }
}

/// The retries of a call, in terms of those for the same pages: as `docs/limits-and-accounting.md` says.
const IN_ALL: u64 = 4;

/// Each of these pages can be pinned at the second try: a call retries up to its limit, and no more.
fn pins_that_fail_again_and_again() -> Result<()> {
    let _patient = Setting::parameter("pin_retries", RETRIES)?;
    let pins = FailingPins::new()?;
    let device = Device::open()?;
    let memory = Memory::small_pages(128 * PAGE)?;
    memory.touch_to_write();
    // Single pages, of which no two are neighbours.
    let ranges: Vec<Range> = (0..64)
        .rev()
        .map(|n| memory.part(2 * n * PAGE, PAGE))
        .collect();
    let (result, counts) = pins.every_other(libc::EAGAIN, || device.create(&ranges).map(drop))?;
    check_eq!(result, Err(Errno::EBUSY), "create");
    let most = IN_ALL * u64::from(RETRIES);
    check!(
        (most..=most + 2).contains(&counts.failed),
        "{} pins failed before it was given up, and not {most}",
        counts.failed
    );
    Ok(())
}

/// Pages that are there are pinned many at once: a page alone is only the first one, which may be of hugetlb.
fn pins_of_many_pages_at_once() -> Result<()> {
    const PAGES: usize = 2048;
    /// What the driver asks GUP for at once.
    const BATCH: usize = 512;
    let pins = FailingPins::new()?;
    let device = Device::open()?;
    let memory = Memory::small_pages(PAGES * PAGE)?;
    memory.touch_to_write();
    let none = PinFailure {
        nth: u32::MAX,
        lasting: false,
        longterm_only: false,
        error: libc::EFAULT,
    };
    let (result, counts) = pins.during(none, || device.create(&[memory.range()]).map(drop))?;
    result?;
    check!(
        counts.failed == 0 && counts.seen <= 2 + (PAGES / BATCH) as u64,
        "{counts:?} for {PAGES} pages"
    );
    Ok(())
}

/// Only the thread that asked for it has its pins failing, and only until it ends that; and they fail as it
/// asked for.
fn pins_fail_for_one_thread() -> Result<()> {
    let pins = FailingPins::new()?;
    let device = Device::open()?;
    let memory = Kind::Anonymous.present(few(Kind::Anonymous))?;
    let failure = PinFailure {
        nth: 2,
        lasting: true,
        longterm_only: false,
        error: libc::EHWPOISON,
    };
    let pin = || pin_cost(memory.addr(), PAGE as u64, PAGE as u64);
    let (result, counts) = pins.during(failure, || {
        let first = pin().context("the first pin")?;
        check_eq!(first.pages, 1, "pages of the first pin");
        let error = pin().err().context("the second pin succeeds")?;
        check_eq!(error.raw_os_error(), Some(libc::EHWPOISON), "its error");
        let made = device.create(&[memory.range()]).map(drop);
        check_eq!(made, Err(Errno::EFAULT), "a create");
        let elsewhere = std::thread::scope(|scope| scope.spawn(pin).join());
        let elsewhere = elsewhere.expect("it does not panic");
        check_eq!(
            elsewhere.context("another thread's pin")?.pages,
            1,
            "its pages"
        );
        Ok(())
    })?;
    result?;
    check!(
        counts.seen >= 3 && counts.failed == counts.seen - 1,
        "{counts:?} of three calls or more, of which the first succeeds"
    );
    pin().context("a pin afterwards")?;
    is_of(&device, &device.create(&[memory.range()])?, &memory)
}

/// `PINBUF_CREATE` of all of the memory.
fn pins_of(memory: &Memory, calls: usize) -> Result<()> {
    let device = Device::open()?;
    Call {
        name: "memory that is there",
        prepare: || Ok(()),
        make: |(): &()| device.create(&[memory.range()]),
        verify: |(): &(), buffer: &Buffer| is_of(&device, buffer, memory),
    }
    .sweep_all_pins(calls)
}

/// Some small pages of it, all of them there.
fn filled(memory: Memory) -> Memory {
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.set(offset, stamp(8, offset as u64));
    }
    memory
}

fn pins_of_anonymous() -> Result<()> {
    let memory = filled(Memory::small_pages(MANY * PAGE)?);
    pins_of(&memory, 2)
}

fn pins_of_shmem() -> Result<()> {
    let memory = filled(Memory::shared(memfd(MANY * PAGE, 0)?, MANY * PAGE)?);
    pins_of(&memory, 2)
}

fn pins_of_transparent() -> Result<()> {
    pins_of(&Kind::Transparent.present(few(Kind::Transparent))?, 2)
}

fn pins_of_hugetlb_private() -> Result<()> {
    let _pool = Kind::HugePrivate.pool(few(Kind::HugePrivate))?;
    pins_of(&Kind::HugePrivate.present(few(Kind::HugePrivate))?, 2)
}

fn pins_of_hugetlb_shared() -> Result<()> {
    let _pool = Kind::HugeShared.pool(few(Kind::HugeShared))?;
    pins_of(&Kind::HugeShared.present(few(Kind::HugeShared))?, 2)
}

/// Ranges of memory of all kinds, and single pages: what was pinned before an error is of all kinds.
fn pins_of_many_ranges() -> Result<()> {
    /// Single pages, every other one.
    const SINGLE: usize = 3;
    let _pool = HugePool::with_free(4)?;
    let _patience = Setting::parameter("pin_retries", RETRIES)?;
    let device = Device::open()?;
    let kinds = [
        Kind::HugePrivate,
        Kind::Anonymous,
        Kind::HugeShared,
        Kind::Transparent,
        Kind::Shmem,
    ];
    let mut memories = Vec::new();
    for kind in kinds {
        memories.push(kind.present(few(kind))?);
    }
    let pages = filled(Memory::small_pages(2 * SINGLE * PAGE)?);
    let ranges: Vec<Range> = memories
        .iter()
        .map(Memory::range)
        .chain((0..SINGLE).map(|page| pages.part(2 * page * PAGE, PAGE)))
        .collect();
    Call {
        name: "ranges of all kinds",
        prepare: || Ok(()),
        make: |(): &()| device.create(&ranges),
        verify: |(): &(), buffer: &Buffer| {
            let mapped = buffer.map()?;
            let mut place = 0;
            for (index, memory) in memories.iter().enumerate() {
                let last = memory.len() - PAGE;
                memory.set(last, stamp(9, index as u64));
                check_eq!(
                    mapped.get(place + last),
                    stamp(9, index as u64),
                    "range {index}"
                );
                place += memory.len();
            }
            for page in 0..SINGLE {
                pages.set(2 * page * PAGE, stamp(10, page as u64));
                check_eq!(
                    mapped.get(place + page * PAGE),
                    stamp(10, page as u64),
                    "single page {page}"
                );
            }
            Ok(())
        },
    }
    // One for each range, and one for each second huge page.
    .sweep_pins(&essential(kinds.len() + 2 + SINGLE))
}

/// Pages of files, with what they are expected to be; not in a file's order, so that no two ranges
/// belong together.
fn pins_of_checked(
    file: impl Fn() -> Result<OwnedFd>,
    len: usize,
    step: usize,
    calls: usize,
) -> Result<()> {
    let device = Device::open()?;
    let files = [file()?, file()?];
    let memories = [
        filled(Memory::shared(&files[0], len)?),
        filled(Memory::shared(&files[1], len)?),
    ];
    let places: Vec<(usize, usize)> = (0..len)
        .step_by(step)
        .rev()
        .flat_map(|offset| [(0, offset), (1, offset)])
        .collect();
    let ranges: Vec<Range> = places
        .iter()
        .map(|(file, offset)| memories[*file].part(*offset, PAGE))
        .collect();
    let backing: Vec<Backing> = places
        .iter()
        .map(|(file, offset)| Backing {
            fd: files[*file].as_raw_fd(),
            offset: *offset as u64,
            ..Default::default()
        })
        .collect();
    Call {
        name: "with its backing checked",
        prepare: || Ok(()),
        make: |(): &()| device.create_checked(&ranges, &backing),
        verify: |(): &(), buffer: &Buffer| {
            let mapped = buffer.map()?;
            for (index, (file, offset)) in places.iter().enumerate() {
                memories[*file].set(*offset, stamp(11, index as u64));
                check_eq!(
                    mapped.get(index * PAGE),
                    stamp(11, index as u64),
                    "range {index}"
                );
            }
            Ok(())
        },
    }
    .sweep_all_pins(calls)
}

fn pins_of_checked_backing() -> Result<()> {
    pins_of_checked(|| memfd(3 * PAGE, 0), 3 * PAGE, PAGE, 6)
}

fn pins_of_checked_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    pins_of_checked(|| huge_memfd(2 * HUGE), 2 * HUGE, HUGE, 4)
}

/// Memory whose pages are not there yet.
fn pins_of_missing_pages() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let _patience = Setting::parameter("pin_retries", RETRIES)?;
    let device = Device::open()?;
    for kind in [
        Kind::Anonymous,
        Kind::Shmem,
        Kind::Transparent,
        Kind::HugePrivate,
        Kind::HugeShared,
    ] {
        Call {
            name: "memory that is not there",
            prepare: || kind.fresh(few(kind)),
            make: |memory: &Memory| device.create(&[memory.range()]),
            verify: |memory: &Memory, buffer: &Buffer| is_of(&device, buffer, memory),
        }
        .sweep_pins(&essential(2))
        .with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

/// A limit with room for the buffer and nothing else: the same call, after one that failed, succeeds only if
/// all of the charge was given back.
fn pins_within_memlock() -> Result<()> {
    let device = Device::open()?;
    let memory = filled(Memory::small_pages(MANY * PAGE)?);
    let _no_allowance = Setting::parameter("allowance_mb", 0)?;
    drop_ipc_lock()?;
    set_memlock(MANY * PAGE)?;
    let full = device.create(&[memory.range()])?;
    let more = device.create(&[memory.part(0, PAGE)]).map(drop);
    check!(
        more == Err(Errno::ENOMEM),
        "a page beyond the limit: {more:?}"
    );
    drop(full);
    pins_of(&memory, 2)
}
