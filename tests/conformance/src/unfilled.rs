// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that have yet to arrive, where it cannot be seen that they will, or cannot be waited for. Whatever becomes of the
//! create, it must not fill such a page: the owner could not deliver it any more.

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cases::{device, File, Spec, Table, HUGE, HUGETLB, OK, PLAIN};
use crate::late::{punch, Faults, Made, Mode, SORTS};
use crate::mappings::has;
use crate::run::{Expect, Outcome};
use crate::udmabuf::{check, close, create, create_list, Map, PAGE};

const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Flags and features of userfaultfd.
const USER_MODE_ONLY: c_int = 1;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_SIGBUS: u64 = 1 << 7;

pub fn cases(t: &mut Table) {
    without_maps(t);
    registered_oddly(t);
    forked(t);
    forked_with_event(t);
    refused_faults(t);
    mapped_twice(t);
    many_ranges(t);
    behind_the_end(t);
    beside(t);
}

pub(crate) fn empty(spec: Spec) -> Spec {
    Spec {
        filled: false,
        ..spec
    }
}

/// Creates a buffer while an owner delivers the pages that are asked for. Afterwards the owner delivers the others of
/// `pages`, each of `unit` bytes, none of which may be in its place.
pub(crate) fn owned(
    faults: &Faults,
    unit: u64,
    pages: Range<u64>,
    action: impl FnOnce() -> std::io::Result<c_int>,
) -> Result<(std::io::Result<c_int>, Outcome)> {
    let stop = AtomicBool::new(false);
    let (result, delivered) = thread::scope(|scope| {
        let owner = scope.spawn(|| {
            let mut delivered = BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                match faults.next() {
                    Some(offset) if faults.answer(offset).is_ok() => {
                        delivered.insert(offset);
                    }
                    _ => thread::sleep(Duration::from_millis(1)),
                }
            }
            delivered
        });
        let result = action();
        stop.store(true, Ordering::Relaxed);
        (result, owner.join())
    });
    let mut delivered = delivered.map_err(|_| anyhow::anyhow!("panicked"))?;
    let mut outcome = Outcome::of(&result);
    let filled = pages
        .map(|page| page * unit)
        .filter(|offset| delivered.insert(*offset) && faults.answer(*offset).is_err())
        .count();
    outcome.fact("none was filled", filled == 0);
    Ok((result, outcome))
}

/// A buffer of all of a file, whose pages an owner has yet to deliver.
fn whole(device: c_int, file: &File, bytes: u64, faults: &Faults, unit: u64) -> Result<Outcome> {
    let (result, mut outcome) = owned(faults, unit, 0..bytes / unit, || {
        create(device, file.fd, 0, bytes, 0)
    })?;
    if let Ok(dmabuf) = result {
        outcome.fact("contents", has(dmabuf, 0..bytes / PAGE)?);
    }
    Ok(outcome)
}

fn limit_descriptors(number: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: number,
        rlim_max: number,
    };
    // SAFETY: the struct is read.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }.into())?;
    Ok(())
}

/// Closes what the shim may have opened.
fn close_all_above(lowest: c_int) {
    // Up to the descriptor that the case's outcome is written to, and behind it.
    for fd in (lowest + 1..crate::run::RESULT).chain(crate::run::RESULT + 1..1024) {
        // Most of them are not open.
        let _ = close(fd);
    }
}

/// The program's mappings cannot be asked for.
fn without_maps(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(
            format!("late/unseen-few-descriptors-{sort}"),
            Expect::Compared,
            move || {
                limit_descriptors(64)?;
                let device = device()?;
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
        t.custom(
            format!("late/unseen-closed-{sort}"),
            Expect::Compared,
            move || {
                let device = device()?;
                close_all_above(device);
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
    }
}

/// Registrations that succeed: the result of the call cannot be written; its number was an int, which is extended by its
/// sign, while the kernel looks at 32 bits.
fn registered_oddly(t: &mut Table) {
    let plain = Made::default;
    for (sort, spec, unit) in SORTS {
        for (name, made) in [
            (
                "read-only-argument",
                Made {
                    read_only: true,
                    ..plain()
                },
            ),
            (
                "registered-by-an-int",
                Made {
                    sign_extended: true,
                    ..plain()
                },
            ),
        ] {
            let name = format!("late/unseen-{name}-{sort}");
            t.custom(name, Expect::Compared, move || {
                limit_descriptors(64)?;
                let device = device()?;
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::made(made, &map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            });
        }
    }
}

/// The file has as many blocks as its size says, but some of them are behind its end.
fn behind_the_end(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(
            format!("late/unseen-behind-the-end-{sort}"),
            Expect::Compared,
            move || {
                limit_descriptors(64)?;
                let device = device()?;
                let bytes = 2 * HUGE;
                let file = File::new(0, Spec { bytes, ..spec })?;
                punch(file.fd, unit, unit)?;
                let (mode, more) = (libc::FALLOC_FL_KEEP_SIZE, HUGE as i64 * 2);
                // SAFETY: no memory is involved.
                let ret = unsafe { libc::fallocate(file.fd, mode, bytes as i64, more) };
                check(i64::from(ret)).context("fallocate")?;
                let map = Map::shared(file.fd, bytes)?;
                let faults = Faults::of(&map, bytes, unit, Mode::Missing)?;
                let (result, mut outcome) =
                    owned(&faults, unit, 1..2, || create(device, file.fd, 0, bytes, 0))?;
                if let Ok(dmabuf) = result {
                    outcome.fact("contents", has(dmabuf, 0..bytes / PAGE)?);
                }
                Ok(outcome)
            },
        );
    }
}

/// The rest of the case is the child's.
pub(crate) fn go_on_in_child() -> Result<()> {
    // SAFETY: this process has one thread, so the child may go on as any program.
    let child = check(i64::from(unsafe { libc::fork() }))? as c_int;
    if child == 0 {
        // SAFETY: no memory is involved; a call that waits for ever is a result too.
        unsafe { libc::alarm(120) };
        return Ok(());
    }
    let mut status = 0;
    // SAFETY: the status is written to `status`.
    unsafe { libc::waitpid(child, &mut status, 0) };
    // SAFETY: ends the parent, which has nothing to say.
    unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
}

/// The program has forked after it opened the device.
fn forked(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(
            format!("late/unseen-forked-{sort}"),
            Expect::Compared,
            move || {
                let device = device()?;
                go_on_in_child()?;
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
        // The parent has the file mapped as well, elsewhere.
        t.custom(
            format!("late/unseen-forked-moved-{sort}"),
            Expect::Compared,
            move || {
                let device = device()?;
                let file = File::new(0, empty(spec))?;
                let parents = Map::shared(file.fd, spec.bytes)?;
                parents.set(0, 1);
                close(create(device, file.fd, 0, PAGE, 0)?)?;
                punch(file.fd, 0, unit)?;
                go_on_in_child()?;
                let map = Map::shared(file.fd, spec.bytes)?;
                drop(parents);
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
        // The parent has the file mapped as the child has, which has registered another mapping.
        t.custom(
            format!("late/unseen-forked-twice-{sort}"),
            Expect::Compared,
            move || {
                let device = device()?;
                let file = File::new(0, empty(spec))?;
                let _both = Map::shared(file.fd, spec.bytes)?;
                go_on_in_child()?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
        // What is mapped is faulted in at once.
        t.custom(
            format!("late/unseen-forked-locked-{sort}"),
            Expect::Compared,
            move || {
                let device = device()?;
                go_on_in_child()?;
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                // SAFETY: no memory is involved.
                check(i64::from(unsafe { libc::mlockall(libc::MCL_FUTURE) }))
                    .context("mlockall")?;
                whole(device, &file, spec.bytes, &faults, unit)
            },
        );
        t.custom(
            format!("late/forked-and-opened-{sort}"),
            Expect::Compared,
            move || {
                let first = device()?;
                go_on_in_child()?;
                device()?;
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                whole(first, &file, spec.bytes, &faults, unit)
            },
        );
    }
}

/// The owner of a program's late pages is that of a child's copies, too.
fn forked_with_event(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(
            format!("late/fork-event-{sort}"),
            Expect::Compared,
            move || {
                let file = File::new(0, empty(spec))?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let made = Made {
                    features: FEATURE_EVENT_FORK,
                    ..Made::default()
                };
                let faults = Faults::made(made, &map, spec.bytes, unit, Mode::Missing)?;
                let stop = AtomicBool::new(false);
                // A thread that starts may allocate, which a fork that waits for it does not allow.
                let started = Barrier::new(2);
                let (outcome, delivered) = thread::scope(|scope| {
                    let owner = scope.spawn(|| {
                        started.wait();
                        let mut delivered = BTreeSet::new();
                        let mut childs = None;
                        while !stop.load(Ordering::Relaxed) {
                            // The fork waits until this is read.
                            childs = childs.or_else(|| faults.of_child());
                            match childs.and_then(|childs: Faults| Some((childs, childs.next()?))) {
                                Some((childs, offset)) if childs.answer(offset).is_ok() => {
                                    delivered.insert(offset);
                                }
                                _ => thread::sleep(Duration::from_millis(1)),
                            }
                        }
                        delivered
                    });
                    started.wait();
                    let outcome = of_child(|| {
                        // The shim does not see a child's mappings by what its parent has opened.
                        let device = device().ok()?;
                        let result = create(device, file.fd, 0, spec.bytes, 0);
                        let right = |dmabuf| has(dmabuf, 0..spec.bytes / PAGE).unwrap_or(false);
                        result.map(right).ok()
                    });
                    stop.store(true, Ordering::Relaxed);
                    (outcome, owner.join())
                });
                let mut delivered = delivered.map_err(|_| anyhow::anyhow!("panicked"))?;
                let mut outcome = outcome?;
                let filled = (0..spec.bytes / unit)
                    .map(|page| page * unit)
                    .filter(|page| delivered.insert(*page) && faults.answer(*page).is_err())
                    .count();
                outcome.fact("none was filled", filled == 0);
                Ok(outcome)
            },
        );
    }
}

/// What a child sees: whether its buffer has the right contents, if it has one.
fn of_child(run: impl FnOnce() -> Option<bool>) -> Result<Outcome> {
    // SAFETY: the other thread holds no lock that the child needs.
    let child = check(i64::from(unsafe { libc::fork() }))? as c_int;
    if child == 0 {
        let status = match run() {
            Some(right) => c_int::from(right),
            None => 2,
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the status is written to `status`.
    check(i64::from(unsafe { libc::waitpid(child, &mut status, 0) }))?;
    anyhow::ensure!(libc::WIFEXITED(status), "status {status:#x}");
    let status = libc::WEXITSTATUS(status);
    let ret = if status == 2 { "-1" } else { "fd" };
    let mut outcome = Outcome {
        ret: ret.to_owned(),
        ..Outcome::default()
    };
    outcome.fact("contents", status == 1);
    Ok(outcome)
}

/// A userfaultfd that lets no fault of the kernel's wait.
fn refused_faults(t: &mut Table) {
    let user_mode = Made {
        flags: USER_MODE_ONLY,
        ..Made::default()
    };
    let sigbus = Made {
        features: FEATURE_SIGBUS,
        ..Made::default()
    };
    for (name, made) in [("user-mode", user_mode), ("sigbus", sigbus)] {
        for (sort, spec, unit) in SORTS {
            t.custom(
                format!("late/unseen-{name}-{sort}"),
                Expect::Compared,
                move || {
                    let device = device()?;
                    let file = File::new(0, empty(spec))?;
                    let map = Map::shared(file.fd, spec.bytes)?;
                    let faults = Faults::made(made, &map, spec.bytes, unit, Mode::Missing)?;
                    whole(device, &file, spec.bytes, &faults, unit)
                },
            );
        }
    }
}

/// How a second mapping of the file is made.
#[derive(Clone, Copy)]
struct Second {
    name: &'static str,
    /// Of the one that is registered, and the other.
    prot: [c_int; 2],
    /// Whether the registered one is made first.
    first: bool,
    made: Made,
    mode: Mode,
    /// Whether a part of it is unregistered again.
    unregistered: bool,
}

/// The file is mapped twice, and one of the mappings is registered.
fn mapped_twice(t: &mut Table) {
    let plain = Second {
        name: "twice",
        prot: [READ_WRITE; 2],
        first: true,
        made: Made::default(),
        mode: Mode::Missing,
        unregistered: false,
    };
    let by_device = Made {
        by_device: true,
        ..Made::default()
    };
    let seconds = [
        plain,
        Second {
            name: "twice-then-registered",
            first: false,
            ..plain
        },
        Second {
            name: "read-only",
            prot: [libc::PROT_READ, READ_WRITE],
            ..plain
        },
        Second {
            name: "device",
            made: by_device,
            ..plain
        },
        Second {
            name: "minor",
            mode: Mode::MissingOrMinor,
            ..plain
        },
        Second {
            name: "unregistered-in-parts",
            unregistered: true,
            ..plain
        },
    ];
    for second in seconds {
        for (sort, spec, unit) in SORTS {
            t.custom(
                format!("late/unseen-{}-{sort}", second.name),
                Expect::Compared,
                move || {
                    let device = device()?;
                    let file = File::new(0, empty(spec))?;
                    let map = |prot| Map::new(file.fd, spec.bytes, prot, libc::MAP_SHARED);
                    let [registered, other] = second.prot;
                    let other = (!second.first).then(|| map(other)).transpose()?;
                    let registered = map(registered)?;
                    let _other = match other {
                        Some(other) => other,
                        None => map(second.prot[1])?,
                    };
                    let (made, mode) = (second.made, second.mode);
                    let faults = Faults::made(made, &registered, spec.bytes, unit, mode)?;
                    let mut first = 0;
                    if second.unregistered {
                        faults.unregister(0, unit)?;
                        faults.unregister(unit, unit)?;
                        first = 2;
                    }
                    let pages = first..spec.bytes / unit;
                    let (offset, len) = (first * unit, spec.bytes - first * unit);
                    let (result, mut outcome) = owned(&faults, unit, pages, || {
                        create(device, file.fd, offset, len, 0)
                    })?;
                    if let Ok(dmabuf) = result {
                        let pages = offset / PAGE..spec.bytes / PAGE;
                        outcome.fact("contents", has(dmabuf, pages)?);
                    }
                    Ok(outcome)
                },
            );
        }
    }
}

/// Where udmabuf has a limit on a buffer's size, for a case that needs a large one.
const SIZE_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

/// The program's mappings divide the list into more ranges than pinbuf takes.
fn many_ranges(t: &mut Table) {
    t.custom("late/unseen-many-ranges", Expect::Compared, || {
        const PAGES: u64 = 1024;
        const TIMES: usize = 65;
        let device = device()?;
        let spec = Spec {
            bytes: PAGES * PAGE,
            ..empty(PLAIN)
        };
        let file = File::new(0, spec)?;
        // The pages lie in reverse order, so that none continues another.
        let map = Map::shared(file.fd, spec.bytes)?;
        for page in 0..PAGES {
            let at = map.address() + (page * PAGE) as usize;
            let offset = (PAGES - 1 - page) * PAGE;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: a page of the case's own mapping.
            let ret = unsafe {
                libc::mmap(
                    at as *mut _,
                    PAGE as usize,
                    READ_WRITE,
                    flags,
                    file.fd,
                    offset as i64,
                )
            };
            check(ret as i64)?;
        }
        let faults = Faults::of(&map, spec.bytes, PAGE, Mode::Missing)?;
        let items = [file.item(0, spec.bytes); TIMES];
        let before = std::fs::read_to_string(SIZE_LIMIT);
        if before.is_ok() {
            std::fs::write(SIZE_LIMIT, "2048").context(SIZE_LIMIT)?;
        }
        let owned = owned(&faults, PAGE, 0..PAGES, || create_list(device, &items, 0));
        if let Ok(before) = before {
            std::fs::write(SIZE_LIMIT, before).context(SIZE_LIMIT)?;
        }
        let (result, mut outcome) = owned?;
        if let Ok(dmabuf) = result {
            // What is delivered has the marks of the addresses' order.
            let view = Map::shared(dmabuf, spec.bytes)?;
            let mark = |page| crate::cases::mark(0, PAGES - 1 - page);
            outcome.fact(
                "contents",
                (0..PAGES).all(|page| view.get(page) == mark(page)),
            );
        }
        Ok(outcome)
    });
}

/// What a program does besides, with memory that nobody has registered, or files that have all their pages: as on
/// udmabuf.
fn beside(t: &mut Table) {
    /// Something else that is registered.
    fn registered() -> Result<(File, Map, Faults)> {
        let file = File::new(7, empty(PLAIN))?;
        let map = Map::shared(file.fd, PLAIN.bytes)?;
        let faults = Faults::of(&map, PLAIN.bytes, PAGE, Mode::Missing)?;
        Ok((file, map, faults))
    }
    fn seen(device: c_int, file: &File, bytes: u64, filled: bool) -> Result<Outcome> {
        let result = create(device, file.fd, 0, bytes, 0);
        let mut outcome = Outcome::of(&result);
        let Ok(dmabuf) = result else {
            return Ok(outcome);
        };
        let right = if filled {
            has(dmabuf, 0..bytes / PAGE)?
        } else {
            let (buffer, file) = (Map::shared(dmabuf, bytes)?, Map::shared(file.fd, bytes)?);
            buffer.set(1, 77);
            buffer.get(0) == 0 && file.get(1) == 77
        };
        outcome.fact("contents", right);
        Ok(outcome)
    }
    for (sort, spec) in [("4k", PLAIN), ("2m", HUGETLB)] {
        for (name, mapped) in [("unmapped", false), ("mapped", true)] {
            t.custom(format!("beside-late/{name}-{sort}"), OK, move || {
                let device = device()?;
                let _registered = registered()?;
                let file = File::new(0, empty(spec))?;
                let _map = mapped
                    .then(|| Map::shared(file.fd, spec.bytes))
                    .transpose()?;
                seen(device, &file, spec.bytes, false)
            });
        }
        let spec = spec.whole();
        t.custom(format!("beside-late/without-maps-{sort}"), OK, move || {
            limit_descriptors(64)?;
            let device = device()?;
            let _registered = registered()?;
            let file = File::new(0, spec)?;
            let _map = Map::shared(file.fd, spec.bytes)?;
            seen(device, &file, spec.bytes, true)
        });
        t.custom(format!("beside-late/twice-{sort}"), OK, move || {
            let device = device()?;
            let _registered = registered()?;
            let file = File::new(0, spec)?;
            let _first = Map::shared(file.fd, spec.bytes)?;
            let _second = Map::shared(file.fd, spec.bytes)?;
            seen(device, &file, spec.bytes, true)
        });
    }
}
