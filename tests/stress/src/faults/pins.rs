// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_CREATE` when the functions that pin fail: each call of `pin_user_pages_fast` and
//! `memfd_pin_folios` in turn, it alone or all from it on, with every kind of error that they have.
//!
//! The kernel's fault injection does not do this; the test importer does, with kprobes, on any kernel.
//! Which of the two functions the driver pins with is its own business, and so is how often it calls
//! them: numbers of faults are lower bounds.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{pin_cost, FailingPins, PinFailure};
use pinbuf_uapi::{Backing, Range};

use super::inject::Burst;
use super::sweep::{Allowed, Call};
use crate::kinds::{is_of, Kind};
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, HUGE, PAGE};
use pinbuf_test_harness::support::process::{drop_ipc_lock, set_memlock};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "faults":
    pins_fail_for_one_thread,
    pins_of_anonymous within 300,
    pins_of_shmem within 300,
    pins_of_transparent within 300,
    pins_of_hugetlb_private within 300,
    pins_of_hugetlb_shared within 300,
    pins_of_many_ranges within 300,
    pins_of_checked_backing within 300,
    pins_of_shmem_files within 300,
    pins_of_hugetlb_files within 300,
    pins_of_missing_pages within 300,
    pins_within_memlock within 300,
}

/// More than a batch of the driver's.
const MANY: usize = 600;

/// New tries: few, so that a lasting failure is given up after milliseconds.
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

/// What passes by itself, at least now and then.
const PASSING: [i32; 4] = [libc::ENOMEM, libc::EAGAIN, libc::EBUSY, 0];
/// What does not.
const FINAL: [i32; 2] = [libc::EFAULT, libc::EHWPOISON];

/// Whose pins they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Those of addresses where no file is mapped, or a private one.
    Private,
    /// Those of addresses where a file is mapped shared, some of them perhaps. The driver may try more
    /// than one way to such, so that a single failure may go unheard; not with so many others.
    Shared { others: usize },
    /// Those of files.
    Files,
}

/// Shared mappings and nothing else.
const SHARED: Way = Way::Shared { others: 0 };

/// What comes of single failures that are not tried again.
fn refused_once(way: Way, calls: usize, errors: &[Errno]) -> Allowed<'_> {
    let (failed, heard) = match way {
        Way::Private | Way::Files => (calls, true),
        Way::Shared { others } => (others, false),
    };
    Allowed {
        errors,
        failed,
        recovered: 0,
        heard,
    }
}

/// All failures, with what the contract says of each. `calls` is how many calls the driver cannot do
/// without.
fn contract(way: Way, calls: usize) -> Vec<(Failure, Allowed<'static>)> {
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
    let refused = |errors| Allowed {
        errors,
        failed: calls,
        recovered: 0,
        heard: true,
    };
    let refused_once = |errors| refused_once(way, calls, errors);
    let single = |error| Failure::new(error, Burst::Single);
    let lasting = |error| Failure::new(error, Burst::Lasting);

    let mut all = Vec::new();
    for error in PASSING {
        all.push((single(error), recovered));
    }
    for error in [libc::EAGAIN, libc::EBUSY, 0] {
        all.push((lasting(error), refused(EBUSY)));
    }
    for error in FINAL {
        all.push((single(error), refused_once(EFAULT)));
        all.push((lasting(error), refused(EFAULT)));
    }
    if way == Way::Files {
        // The file has its pages, so that memory for them is not what is short.
        all.push((lasting(libc::ENOMEM), refused(EBUSY)));
        all.push((single(libc::ENOSPC), refused(EFAULT)));
        // A signal has its turn, then the call begins anew: for ever, if that lasted.
        all.push((single(libc::EINTR), recovered));
    } else {
        all.push((lasting(libc::ENOMEM), refused(ENOMEM)));
        // The same pages can be had briefly: it was not memory that was short.
        let brief = Failure {
            brief: true,
            ..lasting(libc::ENOMEM)
        };
        all.push((brief, refused(EBUSY)));
        // Of a fatal signal, which nobody lives to see.
        all.push((single(libc::EINTR), refused_once(EINTR)));
        all.push((lasting(libc::EINTR), refused(EINTR)));
    }
    all
}

/// Those of them that take each way through the driver, where all would take minutes.
fn essential(way: Way, calls: usize) -> Vec<(Failure, Allowed<'static>)> {
    let mut all = contract(way, calls);
    all.retain(|(failure, _)| [libc::ENOMEM, libc::EFAULT].contains(&failure.error));
    all
}

/// The same where the driver does not try again: what passes is refused, too.
fn impatient(way: Way, calls: usize) -> Vec<(Failure, Allowed<'static>)> {
    let allowed = refused_once(way, calls, &[Errno::EBUSY]);
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

    /// With patience, and without.
    fn sweep_all_pins(&self, way: Way, calls: usize) -> Result<()> {
        let patient = Setting::parameter("pin_retries", RETRIES)?;
        self.sweep_pins(&contract(way, calls))?;
        drop(patient);
        let _impatient = Setting::parameter("pin_retries", 0)?;
        self.sweep_pins(&impatient(way, calls))
    }
}

/// Only the thread that asked for it has its pins failing, and only until it says so; and what it gets
/// is what it asked for, by both functions.
fn pins_fail_for_one_thread() -> Result<()> {
    let pins = FailingPins::new()?;
    let device = Device::open()?;
    let memory = Kind::Anonymous.present()?;
    let file = memfd(PAGE, 0)?;
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
        let parts = [(file.as_fd(), 0, PAGE)];
        let made = device.create_from_files(&parts).map(drop);
        check_eq!(made, Err(Errno::EFAULT), "a create from a file");
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
fn pins_of(memory: &Memory, way: Way, calls: usize) -> Result<()> {
    let device = Device::open()?;
    Call {
        name: "memory that is there",
        prepare: || Ok(()),
        make: |(): &()| device.create(&[memory.range()]),
        verify: |(): &(), buffer: &Buffer| is_of(&device, buffer, memory),
    }
    .sweep_all_pins(way, calls)
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
    pins_of(&memory, Way::Private, 2)
}

fn pins_of_shmem() -> Result<()> {
    let memory = filled(Memory::shared(memfd(MANY * PAGE, 0)?, MANY * PAGE)?);
    pins_of(&memory, SHARED, 2)
}

fn pins_of_transparent() -> Result<()> {
    pins_of(&Kind::Transparent.present()?, Way::Private, 2)
}

fn pins_of_hugetlb_private() -> Result<()> {
    let _pool = Kind::HugePrivate.pool()?;
    pins_of(&Kind::HugePrivate.present()?, Way::Private, 2)
}

fn pins_of_hugetlb_shared() -> Result<()> {
    let _pool = Kind::HugeShared.pool()?;
    pins_of(&Kind::HugeShared.present()?, SHARED, 1)
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
        memories.push(kind.present()?);
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
    // One a range, and one for the second private huge page; two of the ranges are shared.
    .sweep_pins(&essential(
        Way::Shared {
            others: kinds.len() + 1 + SINGLE - 2,
        },
        kinds.len() + 1 + SINGLE,
    ))
}

fn pins_of_checked_backing() -> Result<()> {
    const PAGES: usize = 6;
    let device = Device::open()?;
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = filled(Memory::shared(&file, PAGES * PAGE)?);
    // Not in the file's order: no two belong together.
    let places: Vec<usize> = (0..PAGES).rev().collect();
    let ranges: Vec<Range> = places
        .iter()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    let backing: Vec<Backing> = places
        .iter()
        .map(|page| Backing {
            fd: file.as_raw_fd(),
            offset: (page * PAGE) as u64,
            ..Default::default()
        })
        .collect();
    Call {
        name: "with its backing checked",
        prepare: || Ok(()),
        make: |(): &()| device.create_checked(&ranges, &backing),
        verify: |(): &(), buffer: &Buffer| {
            let mapped = buffer.map()?;
            for (index, page) in places.iter().enumerate() {
                memory.set(page * PAGE, stamp(11, index as u64));
                check_eq!(
                    mapped.get(index * PAGE),
                    stamp(11, index as u64),
                    "range {index}"
                );
            }
            Ok(())
        },
    }
    .sweep_all_pins(SHARED, 1)
}

/// Two parts of a file whose pages are there, and all of another one.
fn pins_of_files(file: impl Fn() -> Result<OwnedFd>, len: usize, calls: usize) -> Result<()> {
    let device = Device::open()?;
    let files = [file()?, file()?];
    let memories = [
        filled(Memory::shared(&files[0], len)?),
        filled(Memory::shared(&files[1], len)?),
    ];
    let parts = [
        (files[0].as_fd(), len / 2, len / 2),
        (files[1].as_fd(), 0, len),
        (files[0].as_fd(), 0, PAGE),
    ];
    Call {
        name: "parts of files",
        prepare: || Ok(()),
        make: |(): &()| device.create_from_files(&parts),
        verify: |(): &(), buffer: &Buffer| {
            let mapped = buffer.map()?;
            let places = [(0, 0, len / 2), (1, len / 2, 0), (0, len / 2 + len, 0)];
            for (file, place, offset) in places {
                let value = stamp(12, place as u64);
                memories[file].set(offset, value);
                check_eq!(mapped.get(place), value, "at {place:#x}");
            }
            Ok(())
        },
    }
    .sweep_all_pins(Way::Files, calls)
}

fn pins_of_shmem_files() -> Result<()> {
    pins_of_files(|| memfd(MANY * PAGE, 0), MANY * PAGE, 1 + 2 + 1)
}

fn pins_of_hugetlb_files() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    pins_of_files(|| huge_memfd(2 * HUGE), 2 * HUGE, 3)
}

/// Memory whose pages are not there yet. A file that lacks them, and cannot have them: that is for
/// want of memory at once, except of huge pages, which are got beforehand.
fn pins_of_missing_pages() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let _patience = Setting::parameter("pin_retries", RETRIES)?;
    let device = Device::open()?;
    for (kind, way, calls) in [
        (Kind::Anonymous, Way::Private, 2),
        (Kind::Shmem, SHARED, 1),
        (Kind::Transparent, Way::Private, 2),
        (Kind::HugePrivate, Way::Private, 2),
        (Kind::HugeShared, SHARED, 1),
    ] {
        Call {
            name: "memory that is not there",
            prepare: || kind.fresh(),
            make: |memory: &Memory| device.create(&[memory.range()]),
            verify: |memory: &Memory, buffer: &Buffer| is_of(&device, buffer, memory),
        }
        .sweep_pins(&essential(way, calls))
        .with_context(|| format!("{kind:?}"))?;
    }

    let once = Failure::new(libc::ENOMEM, Burst::Single);
    let short = |errors, failed, recovered| Allowed {
        errors,
        failed,
        recovered,
        heard: failed > 0,
    };
    Call {
        name: "a file's pages that are not there",
        prepare: || memfd(MANY * PAGE, 0),
        make: |file: &OwnedFd| device.create_from_files(&[(file.as_fd(), 0, MANY * PAGE)]),
        verify: |file: &OwnedFd, buffer: &Buffer| {
            is_of(&device, buffer, &Memory::shared(file, MANY * PAGE)?)
        },
    }
    .sweep_pins(&[(once, short(&[Errno::ENOMEM], 2, 0))])?;
    Call {
        name: "a file's huge pages that are not there",
        prepare: || huge_memfd(2 * HUGE),
        make: |file: &OwnedFd| device.create_from_files(&[(file.as_fd(), 0, 2 * HUGE)]),
        verify: |file: &OwnedFd, buffer: &Buffer| {
            is_of(&device, buffer, &Memory::shared(file, 2 * HUGE)?)
        },
    }
    .sweep_pins(&[(once, short(&[], 0, 1))])
}

/// A limit that has room for the buffer and nothing else: the same call, after one that failed, only
/// works if all of the charge was given back.
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
    pins_of(&memory, Way::Private, 2)
}
