// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages of the program's own mapping that have yet to arrive, as in a machine that is being migrated, and
//! other properties of a page that only the mapping has. udmabuf takes the file's page in any case.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cases::{
    device, free_hugepages, mark, soon, File, Spec, Table, HUGE, HUGETLB, OK, PLAIN,
};
use crate::mappings::has;
use crate::run::{Expect, Outcome};
use crate::udmabuf::{check, close, create, create_list, ioctl, open, Item, Map, PAGE};

pub fn cases(t: &mut Table) {
    missing(t);
    ascending(t);
    signal(t);
    other_modes(t);
    several_files(t);
    beside_a_call(t);
    hole(t);
    killed(t);
    markers(t);
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// The argument of all other calls; those of three words end before the fourth.
#[repr(C)]
struct Words([u64; 5]);

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const NONBLOCK: c_int = libc::O_NONBLOCK | libc::O_CLOEXEC;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `_MINOR_HUGETLBFS`, `_MINOR_SHMEM`, `_WP_HUGETLBFS_SHMEM` and `_POISON`.
const FEATURES: u64 = 1 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 14;

/// `UFFDIO_UNREGISTER`.
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
/// `USERFAULTFD_IOC_NEW`, of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// How a userfaultfd is made.
#[derive(Clone, Copy, Default)]
pub(crate) struct Made {
    /// More flags of the system call.
    pub(crate) flags: c_int,
    /// More features.
    pub(crate) features: u64,
    /// By the device, and not by the system call.
    pub(crate) by_device: bool,
    /// The argument of the registration cannot be written to.
    pub(crate) read_only: bool,
    /// The number of the registration was a (negative) int.
    pub(crate) sign_extended: bool,
}

impl Made {
    fn open(self) -> Result<c_int> {
        let flags = NONBLOCK | self.flags;
        if self.by_device {
            let device = open(c"/dev/userfaultfd", libc::O_RDWR | libc::O_CLOEXEC)?;
            let fd = ioctl(device, USERFAULTFD_IOC_NEW, flags as usize);
            close(device)?;
            return fd.context("USERFAULTFD_IOC_NEW");
        }
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        Ok(check(fd).context("userfaultfd")? as c_int)
    }
}

/// Which faults a userfaultfd has: the value is the mode in which it is registered.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    /// Of pages that the file does not have.
    Missing = 1,
    /// Of these, and of pages that the mapping does not have.
    MissingOrMinor = 5,
    /// Of writes.
    Protected = 2,
    /// Of pages that the file has and the mapping has not.
    Minor = 4,
}

/// A userfaultfd that has the faults of a mapping.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    fd: c_int,
    base: u64,
    /// The size of a page.
    unit: u64,
    mode: Mode,
    /// The file's place in the case, of which the marks speak.
    file: usize,
}

impl Faults {
    pub(crate) fn of(map: &Map, len: u64, unit: u64, mode: Mode) -> Result<Self> {
        Self::made(Made::default(), map, len, unit, mode)
    }

    pub(crate) fn made(made: Made, map: &Map, len: u64, unit: u64, mode: Mode) -> Result<Self> {
        let fd = made.open()?;
        let mut api = Api {
            api: 0xaa,
            features: FEATURES | made.features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct.
        let ret = unsafe { libc::ioctl(fd, UFFDIO_API, &raw mut api) };
        check(i64::from(ret)).context("UFFDIO_API")?;
        let faults = Self {
            fd,
            base: map.address() as u64,
            unit,
            mode,
            file: 0,
        };
        let register = [faults.base, len, mode as u64, 0, 0];
        if made.read_only {
            faults.register_read_only(register)?;
        } else {
            let number = match made.sign_extended {
                true => UFFDIO_REGISTER as c_int as libc::c_ulong,
                false => UFFDIO_REGISTER,
            };
            faults.call(number, register).context("UFFDIO_REGISTER")?;
        }
        if mode == Mode::Protected {
            faults
                .call(UFFDIO_WRITEPROTECT, [faults.base, len, 1, 0, 0])
                .context("UFFDIO_WRITEPROTECT")?;
        }
        Ok(faults)
    }

    fn call(&self, number: libc::c_ulong, words: [u64; 5]) -> Result<()> {
        let mut words = Words(words);
        // SAFETY: the words have room for each of these calls' structs; pages change in mappings of the case's alone.
        check(i64::from(unsafe {
            libc::ioctl(self.fd, number, &raw mut words)
        }))?;
        Ok(())
    }

    /// Registers memory by an argument that cannot be written to: the kernel does so, and reports the error.
    fn register_read_only(&self, words: [u64; 5]) -> Result<()> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let argument = Map::new(-1, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags)?;
        let at = argument.address() as *mut Words;
        // SAFETY: room for the words, and aligned.
        unsafe { at.write(Words(words)) };
        // SAFETY: a page that is only read from here on.
        let ret = unsafe { libc::mprotect(at.cast(), PAGE as usize, libc::PROT_READ) };
        check(i64::from(ret))?;
        let result = ioctl(self.fd, UFFDIO_REGISTER, at as usize);
        let refused = result.is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT));
        anyhow::ensure!(refused, "UFFDIO_REGISTER wrote to read-only memory");
        Ok(())
    }

    /// Unregisters a part of the mapping.
    pub(crate) fn unregister(&self, offset: u64, len: u64) -> Result<()> {
        self.call(UFFDIO_UNREGISTER, [self.base + offset, len, 0, 0, 0])
            .context("UFFDIO_UNREGISTER")
    }

    fn message(&self) -> Option<[u64; 4]> {
        let mut message = [0u64; 4];
        // SAFETY: room for a message of 32 bytes.
        let count = unsafe { libc::read(self.fd, message.as_mut_ptr().cast(), 32) };
        (count == 32).then_some(message)
    }

    /// The offset of the page that is waited for, if one is.
    pub(crate) fn next(&self) -> Option<u64> {
        let message = self.message()?;
        Some((message[2] - self.base) / self.unit * self.unit)
    }

    /// The faults of a child, whose fork is reported next.
    pub(crate) fn of_child(&self) -> Option<Self> {
        const FORK: u64 = 0x13;
        let message = self.message()?;
        (message[0] & 0xff == FORK).then_some(Self {
            fd: message[1] as u32 as c_int,
            ..*self
        })
    }

    /// Delivers a page, with its marks if it is new.
    pub(crate) fn answer(&self, offset: u64) -> Result<()> {
        let (addr, len) = (self.base + offset, self.unit);
        match self.mode {
            Mode::Missing | Mode::MissingOrMinor => {
                let mut page = vec![0u64; len as usize / 8];
                for i in 0..len / PAGE {
                    page[(i * PAGE / 8) as usize] = mark(self.file, offset / PAGE + i);
                }
                self.call(UFFDIO_COPY, [addr, page.as_ptr() as u64, len, 0, 0])
            }
            Mode::Protected => self.call(UFFDIO_WRITEPROTECT, [addr, len, 0, 0, 0]),
            Mode::Minor => self.call(UFFDIO_CONTINUE, [addr, len, 0, 0, 0]),
        }
    }
}

/// Answers what is waited for while `action` runs. Adds to its outcome whether something was waited for, and
/// whether each page could be delivered. `first` is called before the first answer.
fn answering(
    faults: &[Faults],
    first: impl FnOnce() + Send,
    action: impl FnOnce() -> std::io::Result<c_int>,
) -> (std::io::Result<c_int>, Outcome) {
    let stop = AtomicBool::new(false);
    let (delivered, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = Some(first);
            while !stop.load(Ordering::Relaxed) {
                // Late, like pages over a network.
                thread::sleep(Duration::from_millis(5));
                for faults in faults {
                    let Some(offset) = faults.next() else {
                        continue;
                    };
                    if let Some(first) = first.take() {
                        first();
                    }
                    let count = match faults.answer(offset) {
                        Ok(()) => &delivered,
                        Err(_) => &failed,
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let result = action();
        stop.store(true, Ordering::Relaxed);
        result
    });
    let mut outcome = Outcome::of(&result);
    outcome.fact("waited", delivered.load(Ordering::Relaxed) > 0);
    outcome.fact("none came too late", failed.load(Ordering::Relaxed) == 0);
    (result, outcome)
}

/// The sorts of files, and the size of their pages.
pub(crate) const SORTS: [(&str, Spec, u64); 2] = [("4k", PLAIN, PAGE), ("2m", HUGETLB, HUGE)];

fn pages(parts: &[(u64, u64)]) -> impl Iterator<Item = u64> + '_ {
    parts
        .iter()
        .flat_map(|(offset, size)| offset / PAGE..(offset + size) / PAGE)
}

pub(crate) fn punch(fd: c_int, offset: u64, len: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is involved.
    let ret = unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) };
    check(i64::from(ret))?;
    Ok(())
}

/// Pages that do not exist yet.
fn missing(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        let spec = Spec {
            filled: false,
            ..spec
        };
        let parts = vec![(2 * unit, unit), (unit - PAGE, PAGE), (2 * unit, unit)];
        let whole = vec![(0, spec.bytes)];
        for (name, parts) in [("whole", whole), ("list", parts)] {
            // Once when the shim knows nothing of the mapping, once when it remembers it.
            for again in [false, true] {
                let name = format!("late/{sort}-{name}{}", if again { "-again" } else { "" });
                let parts = parts.clone();
                t.custom(name, Expect::Compared, move || {
                    let device = device()?;
                    let file = File::new(0, spec)?;
                    let map = Map::shared(file.fd, spec.bytes)?;
                    if again {
                        // One page that is there, and is taken away afterwards.
                        map.set(0, 1);
                        close(create(device, file.fd, 0, PAGE, 0)?)?;
                        punch(file.fd, 0, unit)?;
                    }
                    let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
                    let items: Vec<Item> = parts
                        .iter()
                        .map(|(offset, size)| file.item(*offset, *size))
                        .collect();
                    let (result, mut outcome) =
                        answering(&[faults], || (), || create_list(device, &items, 0));
                    outcome.fact("contents", has(result?, pages(&parts))?);
                    Ok(outcome)
                });
            }
        }
    }
}

/// Late pages are requested in the order of their addresses, whatever their order in the buffer: an owner that sends
/// memory in this order has most of them on their way already.
fn ascending(t: &mut Table) {
    let both = SORTS.map(|sort| (sort, "", &[][..], Mode::Missing));
    // The shim must not count what is registered and unregistered.
    let in_parts = SORTS.map(|sort| (sort, "-unregistered-in-parts", &[2, 5][..], Mode::Missing));
    // The file has all pages, and the mapping none.
    let minor = SORTS.map(|sort| (sort, "-minor", &[][..], Mode::Minor));
    let all = both.into_iter().chain(in_parts).chain(minor);
    for ((sort, spec, unit), name, unregistered, mode) in all {
        t.custom(
            format!("late/{sort}-ascending{name}"),
            Expect::Compared,
            move || {
                let device = device()?;
                let spec = Spec {
                    filled: mode == Mode::Minor,
                    bytes: 8 * unit,
                    ..spec
                };
                let file = File::new(0, spec)?;
                let map = Map::shared(file.fd, spec.bytes)?;
                let faults = Faults::of(&map, spec.bytes, unit, mode)?;
                for page in unregistered {
                    faults.unregister(page * unit, unit)?;
                }
                let parts = [6, 1, 4, 3, 0, 6].map(|page| (page * unit, unit));
                let items = parts.map(|(offset, size)| file.item(offset, size));
                let stop = AtomicBool::new(false);
                let (result, requested) = thread::scope(|scope| {
                    let owner = scope.spawn(|| {
                        let mut requested = Vec::new();
                        while !stop.load(Ordering::Relaxed) {
                            match faults.next() {
                                Some(offset) => {
                                    requested.push(offset / unit);
                                    faults.answer(offset)?;
                                }
                                None => thread::sleep(Duration::from_millis(1)),
                            }
                        }
                        anyhow::Ok(requested)
                    });
                    let result = create_list(device, &items, 0);
                    stop.store(true, Ordering::Relaxed);
                    (result, owner.join())
                });
                let mut outcome = Outcome::of(&result);
                let requested = requested.map_err(|_| anyhow::anyhow!("panicked"))??;
                outcome.fact("in order of addresses", requested == [0, 1, 3, 4, 6]);
                outcome.fact("contents", has(result?, pages(&parts))?);
                Ok(outcome)
            },
        );
    }
}

extern "C" fn handled(_: c_int) {}

/// The time that this thread has been running.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is written to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A signal with a handler comes while the call waits: the wait goes on, and the processor is not kept busy by it.
fn signal(t: &mut Table) {
    const WAITS: Duration = Duration::from_millis(500);
    for (sort, spec, unit) in SORTS {
        t.custom(format!("late/{sort}-signal"), Expect::Compared, move || {
            let device = device()?;
            let spec = Spec {
                filled: false,
                ..spec
            };
            let file = File::new(0, spec)?;
            let map = Map::shared(file.fd, spec.bytes)?;
            let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
            let handler = handled as extern "C" fn(c_int) as libc::sighandler_t;
            // SAFETY: the handler does nothing.
            unsafe { libc::signal(libc::SIGUSR1, handler) };
            // SAFETY: a call without conditions.
            let creator = unsafe { libc::pthread_self() };
            let first = move || {
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(creator, libc::SIGUSR1) };
                thread::sleep(WAITS);
            };
            let before = processor_time();
            let (result, mut outcome) = answering(&[faults], first, || {
                create(device, file.fd, 0, spec.bytes, 0)
            });
            outcome.fact("at rest", processor_time() - before < WAITS / 2);
            outcome.fact("contents", has(result?, 0..spec.bytes / PAGE)?);
            Ok(outcome)
        });
    }
}

/// Pages that the file has, but of which the owner wants to know the first access, or a write.
fn other_modes(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        for (name, mode) in [("minor", Mode::Minor), ("protected", Mode::Protected)] {
            t.custom(format!("late/{sort}-{name}"), Expect::Compared, move || {
                let device = device()?;
                let file = File::new(0, spec)?;
                let map = Map::shared(file.fd, spec.bytes)?;
                if mode == Mode::Protected {
                    // What is to be protected has to be in the mapping.
                    (0..spec.bytes / PAGE).for_each(|page| map.set(page, mark(0, page)));
                }
                let faults = Faults::of(&map, spec.bytes, unit, mode)?;
                let (result, mut outcome) = answering(
                    &[faults],
                    || (),
                    || create(device, file.fd, 0, spec.bytes, 0),
                );
                outcome.fact("contents", has(result?, 0..spec.bytes / PAGE)?);
                Ok(outcome)
            });
        }
    }
}

/// A list of parts of three files: one has all, of the others nothing has come yet; one is mapped in two pieces.
fn several_files(t: &mut Table) {
    t.custom("late/several-files", Expect::Compared, || {
        let device = device()?;
        let empty = |spec: Spec| Spec {
            filled: false,
            ..spec
        };
        let whole = File::new(0, PLAIN)?;
        let _map = Map::shared(whole.fd, PLAIN.bytes)?;
        let small = File::new(1, empty(PLAIN))?;
        let half = PLAIN.bytes / 2;
        let flags = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let upper = Map::at_offset(small.fd, half, flags.0, flags.1, half)?;
        let lower = Map::shared(small.fd, half)?;
        let huge = File::new(2, empty(HUGETLB))?;
        let map = Map::shared(huge.fd, HUGETLB.bytes)?;
        let of_lower = Faults {
            file: 1,
            ..Faults::of(&lower, half, PAGE, Mode::Missing)?
        };
        let of_upper = Faults {
            file: 1,
            ..Faults::of(&upper, half, PAGE, Mode::Missing)?
        };
        let of_upper = Faults {
            // Offsets are the file's.
            base: of_upper.base - half,
            ..of_upper
        };
        let of_huge = Faults {
            file: 2,
            ..Faults::of(&map, HUGETLB.bytes, HUGE, Mode::Missing)?
        };
        let parts = [
            (&whole, 0, 2 * PAGE, 0),
            (&huge, HUGE - PAGE, 2 * PAGE, 2),
            (&small, half - PAGE, 2 * PAGE, 1),
            (&whole, 5 * PAGE, PAGE, 0),
            (&small, 0, PAGE, 1),
        ];
        let items = parts.map(|(file, offset, size, _)| file.item(offset, size));
        let (result, mut outcome) = answering(
            &[of_lower, of_upper, of_huge],
            || (),
            || create_list(device, &items, 0),
        );
        let expected: Vec<u64> = parts
            .iter()
            .flat_map(|&(_, offset, size, file)| {
                (offset / PAGE..(offset + size) / PAGE).map(move |page| mark(file, page))
            })
            .collect();
        let map = Map::shared(result?, expected.len() as u64 * PAGE)?;
        let right = |(at, value): (u64, &u64)| map.get(at) == *value;
        outcome.fact("contents", (0..).zip(&expected).all(right));
        Ok(outcome)
    });
}

/// A call that waits for a page holds up no other one, so that whoever supplies the page may make buffers, too.
fn beside_a_call(t: &mut Table) {
    const CALLS: usize = 4;
    t.custom("late/beside-a-call", Expect::Compared, || {
        let device = device()?;
        let empty = Spec {
            filled: false,
            ..PLAIN
        };
        let whole = File::new(9, PLAIN)?;
        let mut late = Vec::new();
        for _ in 0..CALLS {
            let file = File::new(0, empty)?;
            let map = Map::shared(file.fd, empty.bytes)?;
            let faults = Faults::of(&map, empty.bytes, PAGE, Mode::Missing)?;
            late.push((file, map, faults));
        }
        // SAFETY: no memory is involved; calls that wait for each other are a result too.
        unsafe { libc::alarm(30) };
        let fds: Vec<c_int> = late.iter().map(|(file, ..)| file.fd).collect();
        let (results, beside, waited) = thread::scope(|scope| {
            let calls: Vec<_> = fds
                .iter()
                .map(|&fd| scope.spawn(move || create(device, fd, 0, PAGE, 0)))
                .collect();
            // udmabuf does not wait.
            let waited = late.iter().zip(&calls).all(|((.., faults), call)| {
                let due = || Ok(faults.next().is_some() || call.is_finished());
                soon(due).unwrap_or(false)
            });
            let beside = create(device, whole.fd, 0, PAGE, 0);
            for (.., faults) in &late {
                // Late where nobody waits: udmabuf has filled it.
                let _ = faults.answer(0);
            }
            let results: Vec<_> = calls.into_iter().map(|call| call.join()).collect();
            (results, beside, waited)
        });
        let mut outcome = Outcome::of(&beside);
        outcome.fact("all of them have begun", waited);
        outcome.fact("the other one's contents", {
            Map::shared(beside?, PAGE)?.get(0) == mark(9, 0)
        });
        let mut right = true;
        for result in results {
            let dmabuf = result.map_err(|_| anyhow::anyhow!("panicked"))??;
            right &= has(dmabuf, 0..1)?;
        }
        outcome.fact("contents", right);
        Ok(outcome)
    });
}

/// While the call waits for a page, two others are punched out of the file: one that was pinned already and one
/// that was not. The buffer keeps the first, and the second is waited for again.
fn hole(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(format!("late/{sort}-hole"), Expect::Compared, move || {
            let device = device()?;
            let spec = Spec {
                filled: false,
                bytes: 4 * unit,
                ..spec
            };
            let file = File::new(0, spec)?;
            let map = Map::shared(file.fd, spec.bytes)?;
            let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
            for page in [0, 1, 3] {
                faults.answer(page * unit)?;
            }
            let fd = file.fd;
            let punched = AtomicBool::new(false);
            let holes = || {
                let both = punch(fd, 0, unit).and_then(|()| punch(fd, 3 * unit, unit));
                punched.store(both.is_ok(), Ordering::Relaxed);
            };
            let (result, mut outcome) = answering(&[faults], holes, || {
                create(device, file.fd, 0, spec.bytes, 0)
            });
            outcome.fact("punched", punched.load(Ordering::Relaxed));
            outcome.fact("contents", has(result?, 0..spec.bytes / PAGE)?);
            Ok(outcome)
        });
    }
}

fn pins() -> Result<i64> {
    std::fs::write("/proc/sys/vm/stat_refresh", "1")?;
    let text = std::fs::read_to_string("/proc/vmstat")?;
    let number = |name: &str| -> i64 {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value
            .and_then(|value| value.trim().parse().ok())
            .unwrap_or(0)
    };
    Ok(number("nr_foll_pin_acquired ") - number("nr_foll_pin_released "))
}

/// A process that waits for pages that only it could deliver waits until it is killed, and leaves nothing
/// behind.
fn killed(t: &mut Table) {
    for (sort, spec, unit) in SORTS {
        t.custom(format!("late/{sort}-killed"), Expect::Compared, move || {
            let file = File::new(
                0,
                Spec {
                    filled: false,
                    ..spec
                },
            )?;
            let map = Map::shared(file.fd, spec.bytes)?;
            let before = (pins()?, free_hugepages());
            // SAFETY: this process has one thread, so the child may go on as any program.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // Registered here: a child's copy of the mapping has no userfaultfd.
                let ended = Faults::of(&map, spec.bytes, unit, Mode::Missing).and_then(|faults| {
                    faults.answer(0)?;
                    // By what the parent has opened, the shim would not see this mapping.
                    let device = device()?;
                    Ok(create(device, file.fd, 0, spec.bytes, 0)?)
                });
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(ended.is_err())) };
            }
            let start = Instant::now();
            let mut status = 0;
            let mut waited = false;
            let mut ended = false;
            while !waited && !ended && start.elapsed() < Duration::from_secs(10) {
                // SAFETY: the status is written to `status`.
                ended = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child;
                let stack = std::fs::read_to_string(format!("/proc/{child}/stack"));
                waited = stack.is_ok_and(|stack| {
                    // Under the supervisor, it is that which waits for the page.
                    stack.contains("handle_userfault") || stack.contains("seccomp")
                });
                thread::sleep(Duration::from_millis(1));
            }
            if !ended {
                // SAFETY: our own child, not yet waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
                // SAFETY: the status is written to `status`.
                unsafe { libc::waitpid(child, &mut status, 0) };
            }
            let mut outcome = Outcome {
                ret: "0".to_owned(),
                ..Outcome::default()
            };
            outcome.fact("waited", waited);
            let signaled = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
            outcome.fact("killed", signaled);
            let nothing_left = soon(|| {
                // The page that did come stays with the file.
                punch(file.fd, 0, spec.bytes)?;
                Ok((pins()?, free_hugepages()) == before)
            })?;
            outcome.fact("nothing left", nothing_left);
            Ok(outcome)
        });
    }
}

/// A page that an access would not reach, because of a guard or a poison marker in the program's mapping:
/// udmabuf sees only the file's page.
fn markers(t: &mut Table) {
    /// `MADV_GUARD_INSTALL`.
    const GUARD: c_int = 102;
    t.custom("markers/guard", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let map = Map::shared(file.fd, PLAIN.bytes)?;
        let at = (map.address() + 3 * PAGE as usize) as *mut libc::c_void;
        // SAFETY: a page of the case's mapping, which is not read there.
        check(i64::from(unsafe {
            libc::madvise(at, PAGE as usize, GUARD)
        }))
        .context("MADV_GUARD_INSTALL")?;
        let result = create(device, file.fd, 0, PLAIN.bytes, 0);
        let mut outcome = Outcome::of(&result);
        outcome.fact("contents", has(result?, 0..16)?);
        Ok(outcome)
    });
    for (sort, spec, unit) in SORTS {
        let expect = Expect::Compared;
        t.custom(format!("markers/poison-{sort}"), expect, move || {
            let device = device()?;
            let spec = Spec {
                filled: false,
                bytes: 4 * unit,
                ..spec
            };
            let file = File::new(0, spec)?;
            let map = Map::shared(file.fd, spec.bytes)?;
            let faults = Faults::of(&map, spec.bytes, unit, Mode::Missing)?;
            for page in [0, 2, 3] {
                faults.answer(page * unit)?;
            }
            faults
                .call(UFFDIO_POISON, [faults.base + unit, unit, 0, 0, 0])
                .context("UFFDIO_POISON")?;
            let result = create(device, file.fd, 0, spec.bytes, 0);
            let mut outcome = Outcome::of(&result);
            let Ok(dmabuf) = result else {
                // The shim cannot know that nobody will supply the page.
                return Ok(outcome);
            };
            let buffer = Map::shared(dmabuf, spec.bytes)?;
            let at = |page: u64| buffer.get(page * unit / PAGE);
            let others = [0, 2, 3]
                .iter()
                .all(|&page| at(page) == mark(0, page * unit / PAGE));
            outcome.fact("the other pages", others);
            outcome.fact("a new page", at(1) == 0);
            Ok(outcome)
        });
    }
}
