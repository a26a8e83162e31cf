// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs that lock themselves in: system calls that kill, no `/proc`, no `/dev/pinbuf`.

use std::ffi::{c_int, c_ulong, CStr};
use std::fs;
use std::ptr;

use anyhow::{Context, Result};

use crate::cases::{device, unavailable, File, Spec, Table, HUGE, HUGETLB, OK, PLAIN};
use crate::run::Outcome;
use crate::udmabuf::{self as u, check, create, create_list, ioctl, open, Item, Map, PAGE};

pub fn cases(t: &mut Table) {
    seccomp(t);
    without_proc(t);
    without_pinbuf(t);
}

fn seen() -> Outcome {
    Outcome {
        ret: "0".to_owned(),
        ..Outcome::default()
    }
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Where `struct seccomp_data` has the call's number, and its second argument.
const NUMBER: u32 = 0;
const SECOND: u32 = 24;

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Allows these calls and `fcntl(F_GET_SEALS)`; whatever else is made kills the process.
fn allow_only(calls: &[i64]) -> c_int {
    let mut program = vec![
        step(LOAD, 0, 0, NUMBER),
        step(IS, 0, 3, libc::SYS_fcntl as u32),
        step(LOAD, 0, 0, SECOND),
        step(IS, 0, 1, libc::F_GET_SEALS as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        step(LOAD, 0, 0, NUMBER),
    ];
    for call in calls {
        program.push(step(IS, 0, 1, *call as u32));
        program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no memory is involved.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the kernel reads the program.
    unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    }
}

/// Runs something in a child that may make these calls and end. Tells how it ended: 0 if all was right.
fn confined(calls: &[i64], run: impl FnOnce() -> bool) -> Result<String> {
    let calls = [calls, &[libc::SYS_exit_group]].concat();
    // SAFETY: this process has one thread, so the child may go on as any program.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = match allow_only(&calls) {
            0 => c_int::from(!run()),
            _ => 77,
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the status is written to `status`.
    check(i64::from(unsafe { libc::waitpid(child, &mut status, 0) }))?;
    Ok(if libc::WIFSIGNALED(status) {
        format!("killed by signal {}", libc::WTERMSIG(status))
    } else {
        libc::WEXITSTATUS(status).to_string()
    })
}

/// What crosvm's policy for its GPU process has of what a create may need.
const FOR_UDMABUF: &[i64] = &[
    libc::SYS_ioctl,
    libc::SYS_fstat,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_rt_sigprocmask,
    libc::SYS_close,
];

fn seccomp(t: &mut Table) {
    let outcome = |ended: String| {
        let mut outcome = seen();
        outcome.fact("all was right", ended == "0");
        outcome.fact("ended", ended);
        outcome
    };
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
                    let ended = confined(FOR_UDMABUF, || {
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
        let ended = confined(FOR_UDMABUF, || {
            create(device, file.fd, 0, 2 * HUGE, 0)
                .is_ok_and(|dmabuf| Map::shared(dmabuf, 2 * HUGE).is_ok())
        })?;
        Ok(outcome(ended))
    });
    // A program that has nothing to do with udmabuf, and makes these calls only.
    t.custom("seccomp/never-udmabuf", OK, move || {
        let memfd = u::memfd(0, 4 * HUGE)?;
        let calls = &[
            libc::SYS_openat,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_close,
        ];
        let ended = confined(calls, || {
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
        let ended = confined(&[libc::SYS_ioctl], || {
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

/// Where `/dev/pinbuf` cannot be had, the program has the kernel's udmabuf.
fn without_pinbuf(t: &mut Table) {
    type Hide = fn() -> Result<()>;
    let cases: [(&str, Hide); 2] = [
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
    ];
    for (name, hide) in cases {
        t.custom(format!("no-pinbuf/{name}"), OK, move || {
            if !fs::exists("/dev/pinbuf")? {
                return unavailable("there is no /dev/pinbuf to hide");
            }
            let file = File::new(0, PLAIN)?;
            own_mounts()?;
            // The path is not one that the shim knows.
            fs::write("/run/kernels-udmabuf", "")?;
            mount(
                c"/dev/udmabuf",
                c"/run/kernels-udmabuf",
                c"none",
                libc::MS_BIND,
            )?;
            hide()?;
            let mut outcome = seen();
            // SAFETY: a terminated string.
            let access = unsafe { libc::access(u::DEVICE.as_ptr(), libc::R_OK | libc::W_OK) };
            outcome.fact("access", access);
            let lowest = open(c"/", libc::O_RDONLY)?;
            u::close(lowest)?;
            let device = device()?;
            outcome.fact("lowest free descriptor", device == lowest);
            let dmabuf = create(device, file.fd, 0, PAGE, 0)?;
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{dmabuf}"))?;
            outcome.fact("made by udmabuf", text.contains("exp_name:\tudmabuf"));
            Ok(outcome)
        });
    }
}
