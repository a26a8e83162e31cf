// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf run` itself, while the program runs: it passes signals on to the program, stops when the program stops, and
//! ends as the program ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::prctl;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{kill, raise, signal, SigHandler, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{dup2_stdin, dup2_stdout, getpid, getsid, Pid};

use super::{adopt_orphans, close_inherited, state_and_parent, Outcome};
use crate::text::complain;

/// What the supervisor tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The program was started, by this number.
    Started(Pid),
    /// The program has ended, stopped or continued: a status as of `waitpid`.
    Changed(i32),
    NoFilter(Errno),
    NoProgram(Errno),
}

impl Message {
    /// Writes it, in one piece.
    pub fn send(self, mut to: &File) -> std::io::Result<()> {
        let (kind, value) = match self {
            Self::Started(program) => (0, program.as_raw()),
            Self::Changed(status) => (1, status),
            Self::NoFilter(errno) => (2, errno as i32),
            Self::NoProgram(errno) => (3, errno as i32),
        };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&i32::to_ne_bytes(kind));
        bytes[4..].copy_from_slice(&value.to_ne_bytes());
        to.write_all(&bytes)
    }

    /// Reads one; `None` if the supervisor has ended.
    fn receive(mut from: &File) -> Option<Self> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes).ok()?;
        let [kind, value] =
            [0, 4].map(|at| i32::from_ne_bytes([0, 1, 2, 3].map(|i: usize| bytes[at + i])));
        match kind {
            0 => Some(Self::Started(Pid::from_raw(value))),
            1 => Some(Self::Changed(value)),
            2 => Some(Self::NoFilter(Errno::from_raw(value))),
            3 => Some(Self::NoProgram(Errno::from_raw(value))),
            _ => None,
        }
    }
}

/// Are there messages that were sent, and not received? Both ends of the pipe may ask.
pub fn is_unread(messages: &File) -> bool {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes a number.
    let asked = unsafe { libc::ioctl(messages.as_raw_fd(), libc::FIONREAD, &mut bytes) };
    asked == 0 && bytes > 0
}

/// The program.
struct Program {
    number: Pid,
    /// None if it had ended, and been waited for, before we could ask for one.
    pidfd: Option<OwnedFd>,
}

impl Program {
    /// The child of `supervisor` with this number.
    fn of(number: Pid, supervisor: Pid) -> nix::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, number.as_raw(), 0) });
        let pidfd = match fd {
            // SAFETY: the call has just returned it.
            Ok(fd) => Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
            Err(Errno::ESRCH) => None,
            Err(error) => return Err(error),
        };
        // If it was waited for before, the number may be a stranger's. (It is our child where the supervisor was killed. /proc may
        // hide it from us.)
        let is_child = state_and_parent(number)
            .is_none_or(|(_, parent)| [supervisor, getpid()].contains(&parent));
        let pidfd = pidfd.filter(|_| is_child);
        Ok(Self { number, pidfd })
    }

    /// Sends it a signal, unless it has ended.
    fn send(&self, signal: i32) {
        if let Some(pidfd) = &self.pidfd {
            let fd = pidfd.as_raw_fd();
            // SAFETY: without further information no memory is involved.
            let _ = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, 0, 0) };
        }
    }
}

/// Leaves the program's input and output to the program: who waits for the end of its output need not wait for ours.
/// Messages of ours may still follow on standard error.
fn leave_the_output() -> nix::Result<()> {
    let nothing = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    dup2_stdin(&nothing)?;
    dup2_stdout(&nothing)
}

/// Waits for the children that this process had before it became `pinbuf run`, and for those that it has adopted since,
/// without which they would stay in the list of processes. Not for the supervisor and the program.
fn reap_others(supervisor: Pid, program: Pid) {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    loop {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        // Not by nix, which takes the status of a child that a real-time signal has killed for an error.
        // SAFETY: the information is written.
        let found = unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), flags) };
        // SAFETY: written by the kernel, or zeroes.
        let info = unsafe { info.assume_init() };
        // SAFETY: the information is that of a child, or zeroes.
        let ended = Pid::from_raw(unsafe { info.si_pid() });
        // One of these ends this process's work soon.
        if found != 0 || [Pid::from_raw(0), supervisor, program].contains(&ended) {
            return;
        }
        let _ = waitpid(ended, None);
    }
}

/// Waits until the program has ended.
pub fn wait(messages: File, supervisor: Pid) -> Result<Outcome> {
    // Should the supervisor be killed, its children become ours.
    adopt_orphans()?;
    // Without /proc the supervisor says so.
    let _ = close_inherited();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&SigSet::all(), flags)?;
    let mut messages = Some(messages);
    let mut program: Option<Program> = None;
    let mut early = true;
    loop {
        let wanted = match &program {
            Some(_) => PollFlags::POLLIN,
            None => PollFlags::empty(),
        };
        let mut fds = vec![PollFd::new(signals.as_fd(), wanted)];
        fds.extend(
            messages
                .as_ref()
                .map(|messages| PollFd::new(messages.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        let spoken = fds.len() > 1 && fds[1].revents().is_some_and(|events| !events.is_empty());
        let mut statuses = Vec::new();
        if let Some(from) = messages.as_ref().filter(|_| spoken) {
            match Message::receive(from) {
                Some(Message::Started(number)) => {
                    program = Some(Program::of(number, supervisor)?);
                    // The supervisor has it as well. Without it the program's output ends later.
                    let _ = leave_the_output();
                }
                Some(Message::Changed(status)) => statuses.push(status),
                Some(Message::NoFilter(errno)) => return Ok(Outcome::NoFilter(errno)),
                Some(Message::NoProgram(errno)) => return Ok(Outcome::NoProgram(errno)),
                None if program.is_none() => {
                    anyhow::bail!("the supervisor ended before the program was started")
                }
                None => {
                    complain!(
                        "the supervisor has ended: the program's requests for buffers fail from now on (ENOSYS), and without \
                         /dev/udmabuf all its calls that open files"
                    );
                    messages = None;
                }
            }
        }
        // Until there is a program, signals for it are kept; and while there is a message, which may say that it has ended. But
        // before a stop of our own they are passed on: the kernel drops signals that stop and continue a process for each other.
        // (One that comes between this and the stop is lost.)
        let stops = statuses.iter().any(|status| libc::WIFSTOPPED(*status));
        let is_told = !stops && messages.as_ref().is_some_and(is_unread);
        if let Some(program) = program.as_ref().filter(|_| !is_told) {
            let alive = messages.as_ref().map(|_| supervisor);
            while let Some(signal) = signals.read_signal()? {
                pass_on(&signal, program, alive, early);
            }
            early = false;
            if messages.is_some() {
                reap_others(supervisor, program.number);
            }
        }
        if let Some(program) = program.as_ref().filter(|_| messages.is_none()) {
            statuses.extend(changes(program.number));
            // Once the supervisor has been waited for, the program is our child, unless the supervisor had waited for it.
            let is_no_child = |process: Pid| {
                let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                let (id, none) = (process.as_raw() as libc::id_t, std::ptr::null_mut());
                // SAFETY: nothing is written.
                let found = unsafe { libc::waitid(libc::P_PID, id, none, flags) };
                Errno::result(found) == Err(Errno::ECHILD)
            };
            if statuses.is_empty() && is_no_child(supervisor) && is_no_child(program.number) {
                anyhow::bail!("the program has ended, and the supervisor before it could tell how");
            }
        }
        for status in statuses {
            if libc::WIFSTOPPED(status) {
                // SIGCONT, by which somebody continues us, is passed on. (Process 1 of a namespace does not stop.)
                raise(Signal::SIGSTOP)?;
            } else if libc::WIFEXITED(status) {
                let code = libc::WEXITSTATUS(status);
                return Ok(Outcome::Ended(ExitCode::from(code as u8)));
            } else if libc::WIFSIGNALED(status) {
                end_by(libc::WTERMSIG(status))?;
            }
        }
    }
}

/// Passes a signal on that somebody has sent to us. Most of the kernel's own, such as those of a terminal, go to the whole
/// group of processes, to which the program belongs as well. The supervisor continues us after the program went on:
/// passed on, that would undo a stop that came since.
///
/// What came early, before the program was a member of the group, has not reached it.
fn pass_on(
    signal: &libc::signalfd_siginfo,
    program: &Program,
    supervisor: Option<Pid>,
    early: bool,
) {
    let number = signal.ssi_signo as i32;
    // An alarm outlives `exec`, and the end of a terminal is reported to the leader of its session.
    let ours_alone = match number {
        libc::SIGALRM => true,
        libc::SIGHUP | libc::SIGCONT => getsid(None) == Ok(getpid()),
        _ => false,
    };
    let sent = signal.ssi_code <= 0 || ours_alone || early;
    let by = |process: Pid| signal.ssi_pid == process.as_raw() as u32;
    let of_our_own = number == libc::SIGCONT && supervisor.is_some_and(by);
    // Of a message of ours that nobody reads, or for which a file may not grow.
    let of_our_output = by(getpid()) && !early;
    let is_ours = of_our_own || of_our_output || number == libc::SIGCHLD;
    if !sent || by(program.number) || is_ours {
        return;
    }
    program.send(number);
    if let Some(supervisor) = supervisor.filter(|_| number == libc::SIGCONT) {
        // A SIGSTOP to the whole group has stopped it as well.
        let _ = kill(supervisor, Signal::SIGCONT);
    }
}

/// What has become of the program, now that it is our own child.
fn changes(program: Pid) -> Vec<i32> {
    let mut found = Vec::new();
    loop {
        let mut status = 0;
        // SAFETY: the status is written to `status`.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::WUNTRACED) } {
            child if child == program.as_raw() => found.push(status),
            child if child > 0 => {}
            _ => return found,
        }
    }
}

/// Ends this process by a signal, as the program was.
fn end_by(number: i32) -> Result<()> {
    // The program's memory may be worth a file, ours is not.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Where files are made by a program (`core_pattern`), that limit does not bind.
    prctl::set_dumpable(false)?;
    if let Ok(ending) = Signal::try_from(number) {
        if ending != Signal::SIGKILL {
            // SAFETY: no handler is set.
            unsafe { signal(ending, SigHandler::SigDfl) }?;
        }
        let mut only = SigSet::empty();
        only.add(ending);
        raise(ending)?;
        only.thread_unblock()?;
    }
    // A signal for programs' own use (real-time).
    std::process::exit(128 + number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn strangers_get_no_signals() {
        let mut child = Command::new("sleep").arg("50").spawn().unwrap();
        let number = Pid::from_raw(child.id() as i32);
        assert_eq!(state_and_parent(number).unwrap().1, getpid());
        let program = Program::of(number, getpid()).unwrap();
        assert!(program.pidfd.is_some());
        program.send(libc::SIGTERM);
        child.wait().unwrap();
        let stranger = Program::of(getpid(), getpid()).unwrap();
        assert!(stranger.pidfd.is_none());
    }
}
