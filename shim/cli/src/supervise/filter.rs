// SPDX-License-Identifier: MIT OR Apache-2.0

//! The filter of system calls: which calls of the program the supervisor gets to see.
//!
//! A filter sees numbers, no paths and no files. Of `ioctl` it lets udmabuf's two requests be reported, whatever file
//! they are for; of all other calls, nothing, or the opening ones where there is no udmabuf to be opened. The kernel
//! finds out by itself which calls a filter allows whatever their arguments are, and does not run it for these.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use pinbuf_udmabuf::request;

/// How programs of one kind call the kernel.
struct Abi {
    /// `AUDIT_ARCH_*`.
    arch: u32,
    /// The numbers of `ioctl`.
    ioctl: &'static [u32],
    /// The numbers of the calls that open.
    opening: &'static [(u32, Opening)],
}

/// A call that opens, by its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// `open(path, flags)`.
    Open,
    /// `creat(path)`.
    Creat,
    /// `openat(directory, path, flags)`.
    Openat,
    /// `openat2(directory, path, how)`.
    Openat2,
}

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const AARCH64: u32 = 0xc000_00b7;
const ARM: u32 = 0x4000_0028;
/// `__X32_SYSCALL_BIT`.
const X32: u32 = 0x4000_0000;

/// Every kind that a kernel of ours can run. Numbers of another architecture do no harm: its kernels have other ones
/// in `arch`.
const ABIS: &[Abi] = &[
    Abi {
        arch: X86_64,
        ioctl: &[16, X32 | 514],
        opening: &[
            (2, Opening::Open),
            (85, Opening::Creat),
            (257, Opening::Openat),
            (437, Opening::Openat2),
            (X32 | 2, Opening::Open),
            (X32 | 85, Opening::Creat),
            (X32 | 257, Opening::Openat),
            (X32 | 437, Opening::Openat2),
        ],
    },
    Abi {
        arch: I386,
        ioctl: &[54],
        opening: &[
            (5, Opening::Open),
            (8, Opening::Creat),
            (295, Opening::Openat),
            (437, Opening::Openat2),
        ],
    },
    Abi {
        arch: AARCH64,
        ioctl: &[29],
        opening: &[(56, Opening::Openat), (437, Opening::Openat2)],
    },
    Abi {
        arch: ARM,
        ioctl: &[54],
        opening: &[
            (5, Opening::Open),
            (8, Opening::Creat),
            (322, Opening::Openat),
            (437, Opening::Openat2),
        ],
    },
];

/// What a reported call is; `None` if it is `ioctl`.
pub fn opening(call: &libc::seccomp_data) -> Option<Opening> {
    let abi = ABIS.iter().find(|abi| abi.arch == call.arch)?;
    let known = abi.opening.iter();
    known
        .clone()
        .find(|(number, _)| *number == call.nr as u32)
        .map(|(_, opening)| *opening)
}

/// Where `struct seccomp_data` has the number, the architecture, and the lower half of the second argument: all
/// architectures of [`ABIS`] are little-endian.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const SECOND: u32 = 24;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

const REPORT: libc::sock_filter = step(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF);
const ALLOW: libc::sock_filter = step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);

/// The filter's program.
fn program(opening: bool) -> Vec<libc::sock_filter> {
    // What follows once a call is known to be `ioctl`.
    let of_ioctl = [
        step(LOAD, 0, 0, SECOND),
        step(IS, 1, 0, request::CREATE),
        step(IS, 0, 1, request::CREATE_LIST),
        REPORT,
        ALLOW,
    ];
    let mut program = vec![step(LOAD, 0, 0, ARCH)];
    for abi in ABIS {
        let mut block = vec![step(LOAD, 0, 0, NUMBER)];
        for number in abi.ioctl {
            block.push(step(IS, 0, of_ioctl.len() as u8, *number));
            block.extend(of_ioctl);
        }
        for (number, _) in abi.opening.iter().filter(|_| opening) {
            block.extend([step(IS, 0, 1, *number), REPORT]);
        }
        block.push(ALLOW);
        program.push(step(IS, 0, block.len() as u8, abi.arch));
        program.extend(block);
    }
    program.push(ALLOW);
    program
}

/// A filter, ready for [`Filter::enter`].
pub struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// A filter that reports udmabuf's requests, and with `opening` all calls that open.
    pub fn new(opening: bool) -> Self {
        Self(program(opening))
    }

    /// Puts the calling thread, and all that comes of it, under the filter for good, and returns the descriptor at
    /// which its calls are reported. Without memory from malloc, as it is called after `fork`.
    pub fn enter(&mut self) -> nix::Result<OwnedFd> {
        const FLAGS: libc::c_ulong =
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
        // SAFETY: no memory is involved.
        Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        let program = libc::sock_fprog {
            len: self.0.len() as u16,
            filter: self.0.as_mut_ptr(),
        };
        // SAFETY: the kernel reads the program, of that length.
        let fd = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                FLAGS,
                &raw const program,
            )
        })?;
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a call, as the kernel does.
    fn run(opening: bool, arch: u32, number: u32, second: u64) -> u32 {
        let program = program(opening);
        let (mut at, mut value) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match (code, k) {
                (LOAD, ARCH) => value = arch,
                (LOAD, NUMBER) => value = number,
                (LOAD, SECOND) => value = second as u32,
                (IS, _) => at += usize::from(if value == k { jt } else { jf }),
                (RETURN, _) => return k,
                _ => panic!("{code} {k}"),
            }
        }
    }

    #[test]
    fn udmabufs_requests_are_reported() {
        let requests = [u64::from(request::CREATE), u64::from(request::CREATE_LIST)];
        for (arch, number) in [
            (X86_64, 16),
            (X86_64, X32 | 514),
            (I386, 54),
            (AARCH64, 29),
            (ARM, 54),
        ] {
            for request in requests {
                // The kernel looks at 32 bits.
                for request in [request, request | 7 << 40] {
                    for opening in [false, true] {
                        let verdict = run(opening, arch, number, request);
                        assert_eq!(verdict, libc::SECCOMP_RET_USER_NOTIF, "{arch:x} {number}");
                    }
                }
            }
            for other in [0, 0x5401, u64::from(pinbuf_uapi::CREATE), requests[0] + 1] {
                assert_eq!(run(true, arch, number, other), libc::SECCOMP_RET_ALLOW);
            }
        }
        // `write` with such a length; `ioctl` by another architecture's number.
        for (arch, number) in [(X86_64, 1), (X86_64, 54), (I386, 16), (0xc000_0015, 54)] {
            assert_eq!(
                run(true, arch, number, requests[0]),
                libc::SECCOMP_RET_ALLOW
            );
        }
    }

    #[test]
    fn opening_calls_are_reported_if_asked_for() {
        for abi in ABIS {
            for &(number, expected) in abi.opening {
                assert_eq!(run(false, abi.arch, number, 0), libc::SECCOMP_RET_ALLOW);
                let verdict = run(true, abi.arch, number, 0);
                assert_eq!(verdict, libc::SECCOMP_RET_USER_NOTIF);
                let call = libc::seccomp_data {
                    nr: number as i32,
                    arch: abi.arch,
                    instruction_pointer: 0,
                    args: [0; 6],
                };
                assert_eq!(opening(&call), Some(expected));
            }
            for &number in abi.ioctl {
                let call = libc::seccomp_data {
                    nr: number as i32,
                    arch: abi.arch,
                    instruction_pointer: 0,
                    args: [0; 6],
                };
                assert_eq!(opening(&call), None);
            }
        }
    }

    /// The numbers of calls in a header of the kernel's, by their names.
    #[cfg(target_arch = "x86_64")]
    fn numbers(header: &str) -> std::collections::BTreeMap<String, u32> {
        let include = std::path::Path::new("/usr/include");
        let text = ["x86_64-linux-gnu", ""]
            .iter()
            .find_map(|place| std::fs::read_to_string(include.join(place).join(header)).ok())
            .unwrap_or_else(|| panic!("there is no {header}: install linux-libc-dev"));
        let numbers = text.lines().filter_map(|line| {
            let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
            // x32's are written as a sum.
            let number = match number.strip_prefix("(__X32_SYSCALL_BIT + ") {
                Some(rest) => X32 + rest.strip_suffix(')')?.parse::<u32>().ok()?,
                None => number.trim().parse().ok()?,
            };
            Some((name.to_owned(), number))
        });
        numbers.collect()
    }

    /// A wrong number lets a call pass unseen, or has the supervisor take another call for one that opens.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn numbers_are_the_kernels() {
        let with_x32 = |own: &str| {
            let (own, x32) = (numbers(own), numbers("asm/unistd_x32.h"));
            own.into_iter().chain(x32).collect::<Vec<_>>()
        };
        for (arch, all) in [
            (X86_64, with_x32("asm/unistd_64.h")),
            (I386, numbers("asm/unistd_32.h").into_iter().collect()),
            (
                AARCH64,
                numbers("asm-generic/unistd.h").into_iter().collect(),
            ),
        ] {
            let of = |wanted: &str| -> std::collections::BTreeSet<u32> {
                let found = all.iter().filter(|(name, _)| name == wanted);
                found.map(|(_, number)| *number).collect()
            };
            let abi = ABIS.iter().find(|abi| abi.arch == arch).unwrap();
            let ioctl: std::collections::BTreeSet<u32> = abi.ioctl.iter().copied().collect();
            assert_eq!(ioctl, of("ioctl"), "{arch:x}");
            for (name, kind) in [
                ("open", Opening::Open),
                ("creat", Opening::Creat),
                ("openat", Opening::Openat),
                ("openat2", Opening::Openat2),
            ] {
                let known = abi.opening.iter().filter(|(_, known)| *known == kind);
                let known: std::collections::BTreeSet<u32> =
                    known.map(|(number, _)| *number).collect();
                assert_eq!(known, of(name), "{name} of {arch:x}");
            }
        }
    }

    #[test]
    fn jumps_fit() {
        assert!(program(true).len() < usize::from(u8::MAX));
    }
}
