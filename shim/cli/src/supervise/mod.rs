// SPDX-License-Identifier: MIT OR Apache-2.0

//! The supervisor: udmabuf for programs that make their own system calls.
//!
//! A filter of system calls ([`filter`]) reports udmabuf's two requests, and the supervisor answers them ([`answer`]): it
//! takes the files from the program ([`target`]), makes the buffer of mappings of its own, and gives the program the
//! descriptor. No other call of the program's is slowed down.
//!
//! # Processes
//!
//! ```text
//! pinbuf run            waits; passes signals on, stops and ends as the program does
//!  └─ the supervisor    answers calls until no process is under the filter any more
//!      └─ the program
//! ```
//!
//! The supervisor is an ancestor of everything that it serves, since Yama (`ptrace_scope` 1) lets only ancestors look
//! into a process; processes whose parent has ended become its children (`PR_SET_CHILD_SUBREAPER`). It is a process of
//! its own because what the program leaves running is served further, when `pinbuf run` has ended with the program's
//! status. If the supervisor is killed, the program goes on, and its requests fail with `ENOSYS`. If `pinbuf run` is
//! killed, the supervisor kills the program, as if that had been executed in its place.
//!
//! # Calls
//!
//! Each is answered by a thread, since some wait for long ([`late`]). There are up to [`pool::MOST`] of them; further calls wait in
//! the kernel, and long lists for each other, so that a program which floods the supervisor costs it a bounded amount of memory. What a call has taken (descriptors,
//! mappings, memory) is gone once it is answered, also if the program was killed meanwhile.

mod answer;
mod filter;
mod front;
mod late;
mod listener;
mod log;
mod pool;
mod server;
mod target;

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{signal, SigHandler, SigSet, Signal};
use nix::unistd::{fork, pipe2, ForkResult, Pid};
use pinbuf::Device;
use pinbuf_udmabuf::{request, sys};

use crate::access::number_of;
use crate::text::complain;

pub use log::Log;

/// The supervisor's name in lists of processes.
pub const NAME: &CStr = c"pinbuf-superv";

/// How it went.
pub enum Outcome {
    /// The program ended with this status.
    Ended(ExitCode),
    /// The kernel refuses the filter.
    NoFilter(Errno),
    /// The program cannot be executed.
    NoProgram(Errno),
}

/// Is there a udmabuf that a program can open? Otherwise the calls that open have to be reported as well.
pub fn can_open_udmabuf() -> bool {
    let opened = File::options().read(true).write(true).open("/dev/udmabuf");
    let number = opened.and_then(|file| Ok(file.metadata()?.rdev())).ok();
    number.is_some() && ["udmabuf", "pinbuf"].map(number_of).contains(&number)
}

/// Is this process under a supervisor already? pinbuf's device itself knows no request of udmabuf's.
pub fn is_served(device: &Device) -> bool {
    let device = device.as_fd().as_raw_fd();
    // SAFETY: the request has no memory, which is the only thing that is wrong with it.
    let answer = unsafe { libc::ioctl(device, libc::c_ulong::from(request::CREATE), 0) };
    Errno::result(answer) == Err(Errno::EFAULT)
}

/// Runs a program under the supervisor, to its end.
pub fn run(mut command: Command, device: Device, log: Log) -> Result<Outcome> {
    // The kernel does not report the end of children to a process that ignores SIGCHLD. The program ignores it again.
    // SAFETY: no handler is installed.
    let before = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    if matches!(before, SigHandler::SigIgn) {
        let ignore = || {
            // SAFETY: no handler is installed.
            unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            Ok(())
        };
        // SAFETY: a system call, which is all that there is between fork and exec.
        unsafe { command.pre_exec(ignore) };
    }
    // A FIFO is waited for, which a signal can end.
    let log = log.open().context("the log")?;
    // Signals are read from a descriptor; the program gets the mask that we had.
    let mask = SigSet::thread_get_mask()?;
    SigSet::all().thread_set_mask()?;
    let (from_supervisor, to_us) = pipe2(OFlag::O_CLOEXEC).context("pipe")?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => {
            drop((to_us, device, log));
            front::wait(from_supervisor.into(), child)
        }
        ForkResult::Child => {
            drop(from_supervisor);
            // Open until this process exits, after it has reported its error. At the end of this pipe `pinbuf run` exits, and
            // if that is process 1 of a namespace, the kernel kills this process.
            let front = to_us.into();
            if let Err(error) = server::serve(command, &mask, device, log, &front) {
                complain!("the supervisor: {error:#}");
            }
            // SAFETY: ends this process, without what the parent will do at its end.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Closes what the program inherits, besides the three standard descriptors: whoever has the other end of a pipe would wait
/// for this process.
fn close_inherited() -> io::Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open {
        // Our own ones are closed on exec.
        if fd > libc::STDERR_FILENO && sys::fcntl(fd, libc::F_GETFD, 0) == Ok(0) {
            sys::close(fd);
        }
    }
    Ok(())
}

/// A process's state, as a letter, and its parent; `None` if there is no such process, or /proc does not show it.
fn state_and_parent(process: Pid) -> Option<(char, Pid)> {
    let text = fs::read(format!("/proc/{process}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The name before these may contain anything, and be cut within a letter.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    let state = words.next()?.chars().next()?;
    Some((state, Pid::from_raw(words.next()?.parse().ok()?)))
}

/// Makes this process the parent of all that it has started, directly or not, and whose own parent has ended.
fn adopt_orphans() -> nix::Result<()> {
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) })?;
    Ok(())
}
