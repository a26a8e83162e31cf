// SPDX-License-Identifier: MIT OR Apache-2.0

//! The descriptor at which the filter reports calls: receiving one, and answering it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

nix::ioctl_readwrite!(notif_recv, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(notif_send, b'!', 1, libc::seccomp_notif_resp);
nix::ioctl_write_ptr!(notif_id_valid, b'!', 2, u64);
nix::ioctl_write_ptr!(notif_addfd, b'!', 3, libc::seccomp_notif_addfd);

/// A call that the filter reported. Its thread waits for the answer, and until then only a fatal signal ends the wait.
pub type Call = libc::seccomp_notif;

/// What the program gets.
#[derive(Debug)]
pub enum Answer {
    /// What the kernel answers: the call is made as if there were no filter.
    TheKernels,
    /// An error.
    Error(Errno),
    /// A new descriptor of this file, by the lowest free number.
    Descriptor { file: OwnedFd, cloexec: bool },
}

/// The listener of a filter.
pub struct Listener(OwnedFd);

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// Waits for a call; `None` once no process is under the filter any more.
    pub fn receive(&self) -> nix::Result<Option<Call>> {
        loop {
            let mut call = Call {
                id: 0,
                pid: 0,
                flags: 0,
                data: libc::seccomp_data {
                    nr: 0,
                    arch: 0,
                    instruction_pointer: 0,
                    args: [0; 6],
                },
            };
            // SAFETY: the kernel reads and writes this struct, which has to be zeroes.
            match unsafe { notif_recv(self.0.as_raw_fd(), &mut call) } {
                Ok(_) => return Ok(Some(call)),
                // The thread was killed before its call could be received; or there is none left.
                Err(Errno::ENOENT) if self.is_deserted()? => return Ok(None),
                Err(Errno::ENOENT | Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Is no process under the filter any more?
    fn is_deserted(&self) -> nix::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(says_deserted(&fds[0]))
    }

    /// Does the thread that made a call still wait for its answer? What was read by the thread's number before
    /// belongs to that thread then.
    pub fn is_waiting(&self, call: &Call) -> bool {
        // SAFETY: the kernel reads the number.
        to_its_end(|| unsafe { notif_id_valid(self.0.as_raw_fd(), &call.id) }).is_ok()
    }

    /// Answers a call. `given` is called with the number of the program's new descriptor before the program goes on. `ENOENT` or
    /// `ESRCH`: the thread was killed.
    pub fn answer(&self, call: &Call, answer: &Answer, given: impl FnOnce(i32)) -> nix::Result<()> {
        match answer {
            Answer::TheKernels => {
                let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
                self.send(call, 0, 0, flags)
            }
            // An error that has no name here is a 0, and no error.
            Answer::Error(Errno::UnknownErrno) => self.send(call, 0, -libc::EINVAL, 0),
            Answer::Error(error) => self.send(call, 0, -(*error as i32), 0),
            Answer::Descriptor { file, cloexec } => {
                // Not with SECCOMP_ADDFD_FLAG_SEND: if a stop or the freezer interrupts that before the thread has taken the
                // file, the thread's call returns 0, and no descriptor is made (up to Linux 7.2). Without it, the kernel begins
                // again.
                let addfd = libc::seccomp_notif_addfd {
                    id: call.id,
                    flags: 0,
                    srcfd: file.as_raw_fd() as u32,
                    newfd: 0,
                    newfd_flags: if *cloexec { libc::O_CLOEXEC as u32 } else { 0 },
                };
                // SAFETY: the kernel reads this struct.
                let fd = to_its_end(|| unsafe { notif_addfd(self.0.as_raw_fd(), &addfd) })?;
                given(fd);
                // It is the program's now, also if the thread was killed.
                let _ = self.send(call, fd.into(), 0, 0);
                Ok(())
            }
        }
    }

    fn send(&self, call: &Call, val: i64, error: i32, flags: u32) -> nix::Result<()> {
        let mut answer = libc::seccomp_notif_resp {
            id: call.id,
            val,
            error,
            flags,
        };
        // SAFETY: the kernel reads this struct.
        to_its_end(|| unsafe { notif_send(self.0.as_raw_fd(), &mut answer) }).map(drop)
    }
}

/// Did `poll` of a listener find that no process is under the filter any more? A stop that comes while the kernel waits for the
/// listener's lock is reported as an error (`POLLERR`), and says nothing.
pub fn says_deserted(listener: &PollFd) -> bool {
    listener
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// Makes a call again for as long as it is interrupted. All our signals are blocked, but a stop (SIGSTOP, a tracer, the
/// freezer) interrupts the kernel's wait for a lock of the listener, and nobody would answer the program's call.
fn to_its_end(mut call: impl FnMut() -> nix::Result<i32>) -> nix::Result<i32> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{FromRawFd, IntoRawFd};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    use nix::sys::signal::{kill, sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
    use nix::sys::wait::waitpid;
    use nix::unistd::{getpid, getppid, pipe, Pid};
    use pinbuf_udmabuf::{request, sys};

    use super::*;
    use crate::supervise::filter::Filter;

    /// A child that shares our table of descriptors. It may make system calls only.
    fn clone() -> nix::Result<libc::c_long> {
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: the child has a copy of this stack, and makes system calls only.
        Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })
    }

    /// The listener whose number a child with our table of descriptors writes to a pipe.
    fn listener_in(from: &mut File) -> Listener {
        let mut number = [0; 4];
        from.read_exact(&mut number).unwrap();
        let number = i32::from_ne_bytes(number);
        assert!(number >= 0, "the child has no filter");
        // SAFETY: the child has just made it, and leaves it to us.
        Listener::from(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// A process that makes a number of requests, and writes each answer to a pipe. Its table of descriptors is ours, and so
    /// are its listener and both ends of the pipe.
    pub fn process_with_requests(count: usize) -> (Pid, Listener, [File; 2]) {
        let mut filter = Filter::new(false);
        let (ours, theirs) = pipe().unwrap();
        let (mut ours, mut theirs) = (File::from(ours), File::from(theirs));
        let child = clone().unwrap() as i32;
        if child == 0 {
            let listener = filter.enter().map_or(-1, IntoRawFd::into_raw_fd);
            let _ = theirs.write_all(&listener.to_ne_bytes());
            for _ in 0..count {
                // SAFETY: the supervisor answers for the kernel, and is never given this memory.
                let fd = unsafe { libc::syscall(libc::SYS_ioctl, -1, request::CREATE, 0) } as i32;
                let answer = if fd < 0 { -Errno::last_raw() } else { fd };
                let _ = theirs.write_all(&answer.to_ne_bytes());
                if fd > libc::STDERR_FILENO {
                    sys::close(fd);
                }
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        let listener = listener_in(&mut ours);
        (Pid::from_raw(child), listener, [ours, theirs])
    }

    /// Answers each of a number of calls with a file. An error is the first answer that is none.
    fn answer_all(count: usize, listener: &Listener, mut answers: &File) -> Result<(), String> {
        for at in 0..count {
            let call = listener.receive().unwrap().unwrap();
            let (file, cloexec) = (File::open("/dev/null").unwrap().into(), true);
            let mut given = 0;
            let sent = listener.answer(&call, &Answer::Descriptor { file, cloexec }, |fd| {
                given = fd
            });
            let arrived = to_its_end(|| {
                let mut fds = [PollFd::new(answers.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(10_000u16))
            });
            if arrived != Ok(1) {
                return Err(format!("answer {at}, {given}, {sent:?}, does not arrive"));
            }
            let mut number = [0; 4];
            answers.read_exact(&mut number).unwrap();
            let number = i32::from_ne_bytes(number);
            if sent != Ok(()) || given != number || number <= libc::STDERR_FILENO {
                return Err(format!(
                    "answer {at}, {given}, {sent:?}, arrives as {number}"
                ));
            }
        }
        Ok(())
    }

    /// A process that waits for the answer to a request. It has a table of descriptors of its own, with room for a few, which it
    /// shares with a child.
    fn process_with_a_table() -> (Pid, Listener) {
        let mut filter = Filter::new(false);
        let (ours, theirs) = pipe().unwrap();
        let (mut ours, mut theirs) = (File::from(ours), File::from(theirs));
        let child = clone().unwrap() as i32;
        if child == 0 {
            // The listener is in our table, and in its copy of it.
            let listener = filter.enter().map_or(-1, IntoRawFd::into_raw_fd);
            let parent = getpid();
            // SAFETY: no memory is involved.
            unsafe { libc::unshare(libc::CLONE_FILES) };
            if clone() == Ok(0) {
                // SAFETY: as above.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
                if getppid() == parent {
                    // SAFETY: as above.
                    unsafe { libc::pause() };
                }
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) };
            }
            let _ = theirs.write_all(&listener.to_ne_bytes());
            // SAFETY: the supervisor answers for the kernel, and is never given this memory.
            unsafe { libc::syscall(libc::SYS_ioctl, -1, request::CREATE, 0) };
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        (Pid::from_raw(child), listener_in(&mut ours))
    }

    extern "C" fn nothing(_: libc::c_int) {}

    /// Does something while signals interrupt this thread all the time.
    fn interrupted<T>(what: impl FnOnce() -> T) -> T {
        let handler = SigHandler::Handler(nothing);
        let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        // SAFETY: a call without conditions.
        let this = unsafe { libc::pthread_self() };
        let done = AtomicBool::new(false);
        let result = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // SAFETY: that thread waits for this one.
                    unsafe { libc::pthread_kill(this, libc::SIGUSR1) };
                    thread::sleep(Duration::from_micros(30));
                }
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
            done.store(true, Ordering::Relaxed);
            result
        });
        result.unwrap()
    }

    /// A thread that takes a file holds the listener's lock, and for long where its table of descriptors, which it shares, has to
    /// grow: the kernel waits for all processors then (RCU). A `poll` that waits for the lock and is interrupted reports an error.
    #[test]
    fn interrupted_poll_is_not_the_end() {
        let deserted = (0..10).find(|_| {
            let (process, listener) = process_with_a_table();
            let call = listener.receive().unwrap().unwrap();
            let addfd = libc::seccomp_notif_addfd {
                id: call.id,
                flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
                srcfd: listener.as_fd().as_raw_fd() as u32,
                newfd: 1000,
                newfd_flags: 0,
            };
            let found = thread::scope(|scope| {
                // SAFETY: the kernel reads this struct.
                let given = scope.spawn(|| unsafe { notif_addfd(listener.0.as_raw_fd(), &addfd) });
                let deserted = interrupted(|| {
                    let mut deserted = false;
                    while !given.is_finished() {
                        deserted |= listener.is_deserted() == Ok(true);
                    }
                    deserted
                });
                assert_eq!(given.join().unwrap(), Ok(1000));
                deserted
            });
            kill(process, Signal::SIGKILL).unwrap();
            waitpid(process, None).unwrap();
            found
        });
        assert_eq!(deserted, None);
    }

    /// Signals interrupt the thread that answers all the time, as stops interrupt a supervisor, whose signals are blocked.
    #[test]
    fn interrupted_answers_arrive() {
        const COUNT: usize = 20_000;
        let (process, listener, [answers, _theirs]) = process_with_requests(COUNT);
        let all = interrupted(|| answer_all(COUNT, &listener, &answers));
        kill(process, Signal::SIGKILL).unwrap();
        waitpid(process, None).unwrap();
        assert_eq!(all, Ok(()));
    }
}
