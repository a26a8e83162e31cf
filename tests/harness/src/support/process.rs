// SPDX-License-Identifier: MIT OR Apache-2.0

//! Child processes, their messages, and the descriptors that they pass.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use nix::cmsg_space;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{kill, signal, SigHandler, Signal};
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{fork, pipe, setgroups, setresgid, setresuid, ForkResult, Gid, Pid, Uid};

/// The time limit for a child whose work takes no time.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A user that nothing else runs as.
pub const USER: u32 = 61_000;
/// Another one.
pub const OTHER_USER: u32 = 61_001;

/// A child that runs a closure; killed when dropped.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    said: File,
    /// How it ended, once that is known: the kernel reports it only once.
    done: Option<WaitStatus>,
}

/// The format of a child's error on its way to the parent.
fn describe(result: std::thread::Result<Result<()>>) -> Option<String> {
    match result {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Some(format!(
                "panicked: {}",
                text.unwrap_or("with something that is no text")
            ))
        }
    }
}

impl Child {
    /// Forks, and runs the closure in the child, which ends without the standard library's cleanup.
    ///
    /// A thread that a scope has waited for may still be ending, and hold a lock of the standard library's that
    /// every thread takes at its start and end. In the child nobody releases it: the closure starts threads only
    /// if the caller has started none, or has joined each of them by its handle.
    pub fn run(action: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (said, says) = pipe().context("pipe")?;
        // SAFETY: the caller's other threads, if any, hold no lock that the child needs: the C library releases
        // the allocator's in the child, and see above for the standard library's.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                said: File::from(said),
                done: None,
            }),
            ForkResult::Child => {
                drop(said);
                let result = catch_unwind(AssertUnwindSafe(action));
                let code = match describe(result) {
                    None => 0,
                    Some(text) => {
                        let _ = File::from(says).write_all(text.as_bytes());
                        1
                    }
                };
                // SAFETY: ends the child. `exit` would take the lock named above.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        kill(self.pid, signal).context("kill")
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.poll()?.is_none())
    }

    fn poll(&mut self) -> Result<Option<WaitStatus>> {
        if self.done.is_none() {
            let status = waitpid(self.pid, Some(WaitPidFlag::WNOHANG)).context("waitpid")?;
            self.done = (status != WaitStatus::StillAlive).then_some(status);
        }
        Ok(self.done)
    }

    /// Waits until it ends, however it does.
    pub fn end(mut self, patience: Duration) -> Result<(WaitStatus, String)> {
        let deadline = Instant::now() + patience;
        let mut closed = false;
        let status = loop {
            if let Some(status) = self.poll()? {
                break status;
            }
            if Instant::now() > deadline {
                bail!(
                    "the child still runs after {patience:?} ({})",
                    whereabouts(self.pid)
                );
            }
            // Its end of the pipe is closed when it exits, a moment before it can be reaped. What it says there,
            // and a grandchild that has the pipe, make the rest of this wait a short sleep.
            let mut fds = [PollFd::new(self.said.as_fd(), PollFlags::POLLIN)];
            if closed || poll(&mut fds, PollTimeout::from(10u8))? > 0 {
                closed = true;
                std::thread::sleep(Duration::from_micros(100));
            }
        };
        let mut said = String::new();
        // A grandchild may still hold the other end.
        let mut fds = [PollFd::new(self.said.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO)? > 0 {
            let mut text = vec![0; 1 << 16];
            let count = self.said.read(&mut text)?;
            said = String::from_utf8_lossy(&text[..count]).into_owned();
        }
        Ok((status, said))
    }

    /// Waits until it ends, which must be without an error.
    pub fn join(self) -> Result<()> {
        self.join_within(PATIENCE)
    }

    /// Waits for this long.
    pub fn join_within(self, patience: Duration) -> Result<()> {
        match self.end(patience)? {
            (WaitStatus::Exited(_, 0), _) => Ok(()),
            (WaitStatus::Exited(..), said) => Err(anyhow!("in the child: {said}")),
            (status, _) => Err(anyhow!("the child ended by {status:?}")),
        }
    }
}

impl Child {
    /// How long a killed child may take to end. A child that hangs in the kernel never ends, and its test must
    /// fail all the same.
    const LAST_WORDS: Duration = Duration::from_secs(10);
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.done.is_none() {
            let _ = kill(self.pid, Signal::SIGKILL);
            let deadline = Instant::now() + Self::LAST_WORDS;
            while matches!(self.poll(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// What the threads of a process are doing, as root sees it: state, system call, and stack in the kernel.
fn whereabouts(pid: Pid) -> String {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut text = String::new();
    for thread in threads.into_iter().flatten().flatten() {
        text += &format!("{}thread:", if text.is_empty() { "" } else { "; " });
        for name in ["stat", "syscall", "stack"] {
            let file = std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            // `stat` begins with the number and the name, which is in brackets.
            let file = match file.rsplit_once(") ") {
                Some((_, state)) if name == "stat" => state.get(..1).unwrap_or_default(),
                _ => &file,
            };
            for line in file.lines().take(12) {
                text += &format!(" {}", line.trim_start_matches("[<0>] "));
            }
        }
    }
    text
}

/// Runs a closure in a child and waits for it.
pub fn in_child(action: impl FnOnce() -> Result<()>) -> Result<()> {
    Child::run(action)?.join()
}

/// The signal that a closure, run in a child, dies of; `None` if it returns.
pub fn signal_of(action: impl FnOnce()) -> Result<Option<Signal>> {
    let child = Child::run(|| {
        for fatal in [Signal::SIGSEGV, Signal::SIGBUS] {
            // The standard library's handler would wait for a lock that another thread held at the fork.
            // SAFETY: no handler is installed.
            unsafe { signal(fatal, SigHandler::SigDfl) }?;
        }
        action();
        Ok(())
    })?;
    match child.end(PATIENCE)? {
        (WaitStatus::Exited(_, 0), _) => Ok(None),
        (WaitStatus::Signaled(_, signal, _), _) => Ok(Some(signal)),
        other => bail!("the child ended by {other:?}"),
    }
}

/// Gives up root for a user without any capability.
pub fn become_user(uid: u32) -> Result<()> {
    setgroups(&[]).context("setgroups")?;
    let gid = Gid::from_raw(uid);
    setresgid(gid, gid, gid).context("setresgid")?;
    let uid = Uid::from_raw(uid);
    setresuid(uid, uid, uid).context("setresuid")
}

/// Stays root, but without `CAP_IPC_LOCK`.
pub fn drop_ipc_lock() -> Result<()> {
    for set in [caps::CapSet::Effective, caps::CapSet::Permitted] {
        caps::drop(None, set, caps::Capability::CAP_IPC_LOCK).context("dropping CAP_IPC_LOCK")?;
    }
    Ok(())
}

/// Sets `RLIMIT_MEMLOCK`, in bytes.
pub fn set_memlock(bytes: usize) -> Result<()> {
    let bytes = bytes as u64;
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes).context("setting RLIMIT_MEMLOCK")
}

/// Two ends through which processes take turns and pass descriptors. Create it before a fork; the parent uses
/// one end and the child the other.
#[derive(Debug)]
pub struct Link {
    /// The parent's end.
    pub ours: End,
    /// The child's end.
    pub theirs: End,
}

/// An end of a [`Link`].
#[derive(Debug)]
pub struct End(UnixStream);

impl Link {
    /// A new one.
    pub fn new() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        for end in [&ours, &theirs] {
            end.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Self {
            ours: End(ours),
            theirs: End(theirs),
        })
    }
}

impl End {
    /// Signals the other side to continue.
    pub fn signal(&self) -> Result<()> {
        self.say(0)
    }

    /// Waits for the other side's signal.
    pub fn wait(&self) -> Result<()> {
        self.hear().map(drop)
    }

    /// From now on, the other side may take any time.
    pub fn wait_for_ever(&self) -> Result<()> {
        self.0.set_read_timeout(None).context("without a limit")
    }

    /// Sends a number.
    pub fn say(&self, value: u64) -> Result<()> {
        (&self.0)
            .write_all(&value.to_ne_bytes())
            .context("telling the other process")
    }

    /// Receives a number.
    pub fn hear(&self) -> Result<u64> {
        let mut value = [0; 8];
        (&self.0)
            .read_exact(&mut value)
            .context("waiting for the other process")?;
        Ok(u64::from_ne_bytes(value))
    }

    /// Sends a descriptor.
    pub fn send(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let data = [IoSlice::new(&[1])];
        sendmsg::<()>(self.0.as_raw_fd(), &data, &control, MsgFlags::empty(), None)
            .context("handing a descriptor over")?;
        Ok(())
    }

    /// Receives a descriptor.
    pub fn receive(&self) -> Result<OwnedFd> {
        let mut byte = [0];
        let mut data = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!(i32);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.0.as_raw_fd(), &mut data, Some(&mut space), flags)
            .context("waiting for a descriptor")?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                if let [fd] = fds[..] {
                    // SAFETY: the kernel has just opened it for us.
                    return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        bail!("no descriptor came")
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::memory::{Memory, PAGE};
    use anyhow::ensure;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// While threads start and end all the time, children end, as they mean to or by a signal.
    #[test]
    fn children_of_a_process_with_threads_end() {
        const CHILDREN: usize = 500;
        let memory = Memory::anonymous(PAGE).unwrap();
        memory.protect(0, PAGE, libc::PROT_NONE).unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        thread::scope(|inner| drop(inner.spawn(|| ())));
                    }
                });
            }
            let result = (0..CHILDREN).try_for_each(|_| -> Result<()> {
                let limit = Duration::from_secs(5);
                Child::run(|| Ok(()))?.join_within(limit)?;
                let signal = signal_of(|| {
                    std::hint::black_box(memory.get(0));
                })?;
                ensure!(signal == Some(Signal::SIGSEGV), "{signal:?}");
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            result.unwrap();
        });
    }
}
