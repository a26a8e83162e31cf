// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs that confine themselves: system calls that kill, no `/proc`, no `/dev/pinbuf`.

use std::cell::Cell;
use std::ffi::{c_ulong, CStr};
use std::fs;
use std::ptr;

use anyhow::{Context, Result};

use crate::cases::{device, unavailable, File, Spec, Table, HUGE, HUGETLB, OK, PLAIN};
#[cfg(target_arch = "x86_64")]
use crate::crosvm;
use crate::filter::{confined, confined_after, refused, Allowed, Test};
use crate::late::{Faults, Mode};
use crate::run::Outcome;
use crate::udmabuf::{self as u, check, create, create_list, ioctl, open, Item, Map, PAGE};

pub fn cases(t: &mut Table) {
    seccomp(t);
    filters(t);
    #[cfg(target_arch = "x86_64")]
    crosvm(t);
    without_proc(t);
    without_pinbuf(t);
}

fn seen() -> Outcome {
    Outcome {
        ret: "0".to_owned(),
        ..Outcome::default()
    }
}

/// What crosvm's policy for its GPU process has of what a create may need.
fn for_udmabuf() -> Vec<Allowed> {
    let seals = [Test::Is(libc::F_GET_SEALS as u32)];
    let mut all = vec![Allowed::if_any(libc::SYS_fcntl, 1, seals)];
    all.extend(always(&[
        libc::SYS_ioctl,
        libc::SYS_fstat,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_rt_sigprocmask,
        libc::SYS_close,
    ]));
    all
}

fn always(calls: &[i64]) -> Vec<Allowed> {
    calls.iter().copied().map(Allowed::always).collect()
}

/// How a program ended, killed or not.
fn outcome(ended: String) -> Outcome {
    let mut outcome = seen();
    outcome.fact("all was right", ended == "0");
    outcome.fact("ended", ended);
    outcome
}

/// The filters work, and kill.
fn filters(t: &mut Table) {
    let calls = [
        ("udmabuf", for_udmabuf as fn() -> Vec<Allowed>),
        #[cfg(target_arch = "x86_64")]
        ("crosvm-gpu", crosvm::gpu),
        #[cfg(target_arch = "x86_64")]
        ("crosvm-device", crosvm::device),
    ];
    for (name, calls) in calls {
        t.custom(format!("seccomp/{name}-kills"), OK, move || {
            let mut outcome = seen();
            // SAFETY: calls without conditions.
            let other = confined(&calls(), || unsafe { libc::getppid() } != 0)?;
            outcome.fact("another call kills", other == "killed by signal 31");
            // The first of the arguments that are looked at.
            // SAFETY: no memory is involved.
            let argument = confined(&calls(), || unsafe { libc::fcntl(0, 77) } == -1)?;
            outcome.fact("fcntl(77)", argument);
            Ok(outcome)
        });
    }
}

/// Clients within crosvm's policies.
#[cfg(target_arch = "x86_64")]
fn crosvm(t: &mut Table) {
    const BYTES: u64 = 3 * HUGE;
    /// Marks pages of one mapping and sees the marks in the other.
    fn agree(memory: &Map, buffer: &Map) -> bool {
        (0..BYTES / PAGE).all(|page| {
            memory.set(page, !page);
            buffer.get(page) == !page
        })
    }
    // All of it within the policy: memory, the device, the buffer, its mapping.
    for (name, number) in [("create", u::CREATE), ("list", u::CREATE_LIST)] {
        t.custom(format!("crosvm/gpu-{name}"), OK, move || {
            let all = || -> std::io::Result<bool> {
                let memfd = u::memfd(libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC, BYTES)?;
                u::fcntl(memfd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)?;
                let memory = Map::shared(memfd, BYTES)?;
                let device = open(u::DEVICE, libc::O_RDWR | libc::O_CLOEXEC)?;
                let item = |page, pages| Item {
                    memfd: memfd as u32,
                    pad: 0,
                    offset: page * PAGE,
                    size: pages * PAGE,
                };
                let dmabuf = match number {
                    u::CREATE => create(device, memfd, 0, BYTES, u::CLOEXEC)?,
                    _ => create_list(device, &[item(0, 512), item(512, 1024)], u::CLOEXEC)?,
                };
                let buffer = Map::shared(dmabuf, BYTES)?;
                u::sync(dmabuf, u::SYNC_RW)?;
                let right = agree(&memory, &buffer) && u::end(dmabuf)? == BYTES as i64;
                u::sync(dmabuf, u::SYNC_RW | u::SYNC_END)?;
                drop(buffer);
                let refused = create(device, memfd, 1, PAGE, 0).is_err();
                u::close(dmabuf)?;
                u::close(device)?;
                Ok(right && refused)
            };
            Ok(outcome(confined(&crosvm::gpu(), || {
                all().unwrap_or(false)
            })?))
        });
    }
    // udmabuf's requests are on no device process's list: the program gets its buffer before it confines
    // itself.
    t.custom("crosvm/device", OK, move || {
        let spec = Spec {
            bytes: BYTES,
            filled: false,
            ..PLAIN
        };
        let file = File::new(0, spec)?;
        let dmabuf = create(device()?, file.fd, 0, BYTES, 0)?;
        let all = || -> std::io::Result<bool> {
            let right = agree(&Map::shared(file.fd, BYTES)?, &Map::shared(dmabuf, BYTES)?);
            let other = u::memfd(libc::MFD_CLOEXEC, BYTES)?;
            let mapped = Map::shared(other, BYTES)?.get(0) == 0;
            u::close(other)?;
            u::close(dmabuf)?;
            Ok(right && mapped)
        };
        Ok(outcome(confined(&crosvm::device(), || {
            all().unwrap_or(false)
        })?))
    });
}

fn seccomp(t: &mut Table) {
    for (sort, spec) in [("", PLAIN), ("-hugetlb", HUGETLB)] {
        for filled in [true, false] {
            for mapped in [true, false] {
                let state = if filled { "" } else { "-sparse" };
                let how = if mapped { "mapped" } else { "unmapped" };
                t.custom(format!("seccomp/{how}{sort}{state}"), OK, move || {
                    let device = device()?;
                    let file = File::new(0, Spec { filled, ..spec })?;
                    let map = Map::shared(file.fd, spec.bytes)?;
                    if !mapped {
                        drop(map);
                    } else {
                        std::mem::forget(map);
                    }
                    let (fd, size) = (file.fd, spec.bytes);
                    // More than fit on the stack, and some of them twice.
                    let items: Vec<Item> = (0..500)
                        .map(|i| file.item(i * 5 % (size / PAGE) * PAGE, PAGE))
                        .collect();
                    let list = u::list(0, items.len() as u32, &items);
                    let single = u::Create {
                        memfd: fd as u32,
                        flags: 0,
                        offset: 0,
                        size,
                    };
                    let ended = confined(&for_udmabuf(), || {
                        let good = |number, arg: usize| {
                            (0..2).all(|_| {
                                ioctl(device, number, arg).is_ok_and(|dmabuf| {
                                    let mapped = Map::shared(dmabuf, 2 * PAGE).is_ok();
                                    // SAFETY: a descriptor that was just made.
                                    mapped && unsafe { libc::close(dmabuf) } == 0
                                })
                            })
                        };
                        let refused = ioctl(device, u::CREATE, 8).is_err()
                            && create(device, fd, 1, PAGE, 0).is_err()
                            && create(device, 77, 0, PAGE, 0).is_err();
                        good(u::CREATE, &raw const single as usize)
                            && good(u::CREATE_LIST, list.as_ptr() as usize)
                            && refused
                    })?;
                    Ok(outcome(ended))
                });
            }
        }
    }
    // A large mapping of a buffer, which the shim aligns.
    t.custom("seccomp/large-buffer", OK, move || {
        let device = device()?;
        let file = File::new(0, HUGETLB)?;
        let ended = confined(&for_udmabuf(), || {
            create(device, file.fd, 0, 2 * HUGE, 0)
                .is_ok_and(|dmabuf| Map::shared(dmabuf, 2 * HUGE).is_ok())
        })?;
        Ok(outcome(ended))
    });
    // A program that has registered its memory with userfaultfd, and uses it in any order.
    t.custom("seccomp/userfaultfd", OK, move || {
        let file = File::new(0, PLAIN)?;
        let map = Map::shared(file.fd, PLAIN.bytes)?;
        let _faults = Faults::of(&map, PLAIN.bytes, PAGE, Mode::Missing)?;
        let items = [file.item(8 * PAGE, 8 * PAGE), file.item(0, 8 * PAGE)];
        let list = u::list(0, items.len() as u32, &items);
        // Without `close`: there is one buffer, whatever the order.
        let calls: Vec<Allowed> = for_udmabuf()
            .into_iter()
            .filter(|allowed| !allowed.is(libc::SYS_close))
            .collect();
        // By what the parent has opened, the shim would not see the child's mappings.
        let opened = Cell::new(-1);
        let ended = confined_after(
            &calls,
            || device().map(|device| opened.set(device)).is_ok(),
            || (0..2).all(|_| ioctl(opened.get(), u::CREATE_LIST, list.as_ptr() as usize).is_ok()),
        )?;
        Ok(outcome(ended))
    });
    // A program that has nothing to do with udmabuf, and makes only these calls.
    t.custom("seccomp/never-udmabuf", OK, move || {
        let memfd = u::memfd(0, 4 * HUGE)?;
        let calls = always(&[
            libc::SYS_openat,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_close,
        ]);
        let ended = confined(&calls, || {
            let path: &CStr = c"/dev/null";
            let opened = open(path, libc::O_RDWR).is_ok();
            let missing = open(c"/dev/udmabu", libc::O_RDWR).is_err();
            // SAFETY: a bad pointer, which the kernel refuses.
            let bad = unsafe { libc::open(8 as *const _, libc::O_RDWR) } == -1;
            let mapped = Map::shared(memfd, 4 * HUGE).is_ok();
            opened && missing && bad && mapped
        })?;
        Ok(outcome(ended))
    });
    t.custom("seccomp/never-udmabuf-ioctl", OK, move || {
        let zero = open(c"/dev/zero", libc::O_RDWR)?;
        let ended = confined(&always(&[libc::SYS_ioctl]), || {
            ioctl(zero, u::SYNC, 0).is_err() && ioctl(-1, 0, 0).is_err()
        })?;
        Ok(outcome(ended))
    });
}

/// A view of the file system of our own, in which mounts disturb nobody.
fn own_mounts() -> Result<()> {
    // SAFETY: no memory is involved.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return unavailable("no mount namespace");
    }
    mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE)
}

fn mount(what: &CStr, at: &CStr, kind: &CStr, flags: c_ulong) -> Result<()> {
    // SAFETY: terminated strings.
    let ret = unsafe {
        libc::mount(
            what.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            flags,
            ptr::null(),
        )
    };
    check(i64::from(ret)).with_context(|| format!("mounting {at:?}"))?;
    Ok(())
}

fn without_proc(t: &mut Table) {
    for (sort, spec) in [("", PLAIN), ("-hugetlb", HUGETLB)] {
        for mapped in [true, false] {
            let how = if mapped { "mapped" } else { "unmapped" };
            t.custom(format!("no-proc/{how}{sort}"), OK, move || {
                let file = File::new(0, spec)?;
                let _map = mapped
                    .then(|| Map::shared(file.fd, spec.bytes))
                    .transpose()?;
                own_mounts()?;
                mount(c"none", c"/proc", c"tmpfs", 0)?;
                let device = device()?;
                let items = [
                    file.item(3 * PAGE, 2 * PAGE),
                    file.item(0, 4 * PAGE),
                    file.item(spec.bytes - PAGE, PAGE),
                ];
                let dmabuf = create_list(device, &items, 0)?;
                let view = Map::shared(dmabuf, 7 * PAGE)?;
                let last = spec.bytes / PAGE - 1;
                let pages = [3, 4, 0, 1, 2, 3, last];
                let right = (0..7)
                    .zip(pages)
                    .all(|(at, page)| view.get(at) == crate::cases::mark(0, page));
                let mut outcome = seen();
                outcome.fact("pages", right);
                Ok(outcome)
            });
        }
    }
}

/// Hides pinbuf's device, in mounts of this process's own, or denies access to it.
type Hide = fn() -> Result<()>;

/// Puts another file in the place of pinbuf's device.
fn instead_of_pinbuf(path: &CStr) -> Result<()> {
    mount(path, c"/dev/pinbuf", c"none", libc::MS_BIND)
}

const HIDDEN: &[(&str, Hide)] = &[
    ("not-permitted", || {
        let (none, flags) = (c"none", libc::MS_BIND);
        mount(c"/dev/pinbuf", c"/dev/pinbuf", none, flags)?;
        let flags = flags | libc::MS_REMOUNT | libc::MS_NODEV;
        mount(none, c"/dev/pinbuf", none, flags)
    }),
    ("not-there", || {
        fs::create_dir_all("/run/dev-without-pinbuf")?;
        mount(c"none", c"/run/dev-without-pinbuf", c"tmpfs", 0)?;
        let kernels = "/run/dev-without-pinbuf/udmabuf";
        fs::write(kernels, "")?;
        mount(
            c"/run/kernels-udmabuf",
            c"/run/dev-without-pinbuf/udmabuf",
            c"none",
            libc::MS_BIND,
        )?;
        mount(
            c"/run/dev-without-pinbuf",
            c"/dev",
            c"none",
            libc::MS_BIND | libc::MS_REC,
        )
    }),
    ("a-file", || {
        fs::write("/run/no-device", "")?;
        instead_of_pinbuf(c"/run/no-device")
    }),
    ("another-device", || {
        instead_of_pinbuf(c"/dev/cpu_dma_latency")
    }),
    ("no-device-of-that-number", || {
        let path = c"/run/dead-device";
        // SAFETY: a terminated string.
        let ret =
            unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(10, 511)) };
        if ret != 0 && std::io::Error::last_os_error().kind() != std::io::ErrorKind::AlreadyExists {
            return Err(std::io::Error::last_os_error().into());
        }
        instead_of_pinbuf(path)
    }),
];

/// Where `/dev/pinbuf` cannot be opened, the program gets the kernel's udmabuf.
fn without_pinbuf(t: &mut Table) {
    for &(name, hide) in HIDDEN {
        // With one free descriptor there is none left for pinbuf's device besides the kernel's.
        for last in [false, true] {
            let suffix = if last { "-last-descriptor" } else { "" };
            t.custom(format!("no-pinbuf/{name}{suffix}"), OK, move || {
                let file = File::new(0, PLAIN)?;
                hidden(hide)?;
                let mut outcome = seen();
                // SAFETY: a terminated string.
                let access = unsafe { libc::access(u::DEVICE.as_ptr(), libc::R_OK | libc::W_OK) };
                outcome.fact("access", access);
                let lowest = open(c"/", libc::O_RDONLY)?;
                u::close(lowest)?;
                let device = if last {
                    with_descriptors(lowest as u64 + 1, device)??
                } else {
                    device()?
                };
                outcome.fact("lowest free descriptor", device == lowest);
                let dmabuf = create(device, file.fd, 0, PAGE, 0)?;
                outcome.fact("made by udmabuf", made_by_udmabuf(dmabuf)?);
                outcome.fact("refused", create(device, file.fd, 1, PAGE, 0).is_err());
                // The shim makes no request of the device but the program's.
                let inherited = confined(&udmabufs_own(), || {
                    create(device, file.fd, 0, PAGE, 0).is_ok()
                        && create(device, file.fd, 1, PAGE, 0).is_err()
                })?;
                outcome.fact("inherited, on udmabuf's own list", inherited == "0");
                // Nor where the device is opened under the filter, unless there is some other device of pinbuf's name.
                let mut opening = udmabufs_own();
                opening.extend(always(&[libc::SYS_openat, libc::SYS_close]));
                let opened = confined(&opening, || {
                    crate::cases::device()
                        .is_ok_and(|device| create(device, file.fd, 0, PAGE, 0).is_ok())
                })?;
                let other = name == "another-device";
                outcome.fact("opened, on udmabuf's own list", other || opened == "0");
                Ok(outcome)
            });
        }
    }
    // A filter that knows udmabuf's requests, and refuses others.
    t.custom("no-pinbuf/requests-refused", OK, move || {
        let file = File::new(0, PLAIN)?;
        let mut calls = udmabufs_own();
        calls.extend(always(&[
            libc::SYS_openat,
            libc::SYS_close,
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_lseek,
            libc::SYS_statx,
            libc::SYS_getpid,
            libc::SYS_fcntl,
            libc::SYS_brk,
        ]));
        let ended = refused(&calls, libc::EPERM, || {
            device()
                .and_then(|device| Ok(create(device, file.fd, 0, PAGE, 0)?))
                .and_then(made_by_udmabuf)
                .unwrap_or(false)
        })?;
        Ok(outcome(ended))
    });
}

/// The calls of a program that uses udmabuf, and those that the shim makes for it.
fn udmabufs_own() -> Vec<Allowed> {
    let numbers = [u::CREATE, u::CREATE_LIST, u::SYNC].map(|number| Test::Is(number as u32));
    let mut all = vec![Allowed::if_any(libc::SYS_ioctl, 1, numbers)];
    all.extend(always(&[libc::SYS_fstat, libc::SYS_mmap, libc::SYS_munmap]));
    all
}

fn hidden(hide: Hide) -> Result<()> {
    if !fs::exists("/dev/pinbuf")? {
        return unavailable("there is no /dev/pinbuf to hide");
    }
    own_mounts()?;
    // The path is not one that the shim recognises.
    fs::write("/run/kernels-udmabuf", "")?;
    mount(
        c"/dev/udmabuf",
        c"/run/kernels-udmabuf",
        c"none",
        libc::MS_BIND,
    )?;
    hide()
}

fn made_by_udmabuf(dmabuf: i32) -> Result<bool> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{dmabuf}"))?;
    Ok(text.contains("exp_name:\tudmabuf"))
}

/// Does something with at most this number of descriptors.
fn with_descriptors<T>(number: u64, action: impl FnOnce() -> T) -> Result<T> {
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is written.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut before) }.into())?;
    let set = |rlim_cur| {
        let limit = libc::rlimit { rlim_cur, ..before };
        // SAFETY: the struct is read.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }.into())
    };
    set(number)?;
    let result = action();
    set(before.rlim_cur)?;
    Ok(result)
}
