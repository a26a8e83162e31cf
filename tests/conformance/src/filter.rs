// SPDX-License-Identifier: MIT OR Apache-2.0

//! Filters of system calls, for programs that lock themselves in.

use std::ffi::c_int;

use anyhow::Result;

use crate::udmabuf::check;

/// What is asked of an argument; its lower half is looked at.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// It is this.
    Is(u32),
    /// It has one of these bits, at least.
    Has(u32),
    /// It has none of these bits.
    Lacks(u32),
}

/// A call that may be made.
#[derive(Clone, Debug)]
pub struct Allowed {
    number: i64,
    argument: u32,
    /// One of these must hold; of none, the call is allowed.
    tests: Vec<Test>,
}

impl Allowed {
    /// With any arguments.
    pub fn always(number: i64) -> Self {
        Self {
            number,
            argument: 0,
            tests: Vec::new(),
        }
    }

    /// Is it this call?
    pub fn is(&self, number: i64) -> bool {
        self.number == number
    }

    /// If one of these holds for an argument.
    pub fn if_any(number: i64, argument: u32, tests: impl IntoIterator<Item = Test>) -> Self {
        Self {
            number,
            argument,
            tests: tests.into_iter().collect(),
        }
    }
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const HAS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Where `struct seccomp_data` has the call's number, and its first argument.
const NUMBER: u32 = 0;
const ARGUMENTS: u32 = 16;

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Allows these calls, and to end; whatever else is made ends as `otherwise` says (`SECCOMP_RET_*`).
fn allow_only(calls: &[Allowed], otherwise: u32) -> c_int {
    let allow = step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);
    let mut program = Vec::new();
    for call in calls.iter().chain([&Allowed::always(libc::SYS_exit_group)]) {
        let mut block = vec![step(LOAD, 0, 0, ARGUMENTS + 8 * call.argument)];
        for test in &call.tests {
            block.push(match *test {
                Test::Is(value) => step(IS, 0, 1, value),
                Test::Has(bits) => step(HAS, 0, 1, bits),
                Test::Lacks(bits) => step(HAS, 1, 0, bits),
            });
            block.push(allow);
        }
        if call.tests.is_empty() {
            block.push(allow);
        }
        program.push(step(LOAD, 0, 0, NUMBER));
        program.push(step(IS, 0, block.len() as u8, call.number as u32));
        program.extend(block);
    }
    program.push(step(RETURN, 0, 0, otherwise));
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

/// Runs something in a child that may make these calls and end, and is killed for any other. Returns how it
/// ended: 0 if all was right.
pub fn confined(calls: &[Allowed], run: impl FnOnce() -> bool) -> Result<String> {
    confined_after(calls, || true, run)
}

/// The same for a child that makes other calls before, with all rights.
pub fn confined_after(
    calls: &[Allowed],
    before: impl FnOnce() -> bool,
    run: impl FnOnce() -> bool,
) -> Result<String> {
    confined_by(calls, libc::SECCOMP_RET_KILL_PROCESS, before, run)
}

/// The same, with an error for any other call.
pub fn refused(calls: &[Allowed], error: c_int, run: impl FnOnce() -> bool) -> Result<String> {
    confined_by(calls, libc::SECCOMP_RET_ERRNO | error as u32, || true, run)
}

fn confined_by(
    calls: &[Allowed],
    otherwise: u32,
    before: impl FnOnce() -> bool,
    run: impl FnOnce() -> bool,
) -> Result<String> {
    // SAFETY: this process has one thread, so the child may go on as any program.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // What is freed under the filter would be given back by brk(), if much memory is free at the heap's end.
        // SAFETY: sets a parameter.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, c_int::MAX) };
        let status = match before().then(|| allow_only(calls, otherwise)) {
            Some(0) => c_int::from(!run()),
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
