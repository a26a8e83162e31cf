// SPDX-License-Identifier: MIT OR Apache-2.0

//! The thread that made a call: its descriptors and its memory.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;

use super::listener::{Call, Listener};

/// A thread that waits for the answer to its call.
///
/// Its number is another thread's once it is killed, so [`Listener::is_waiting`] follows whatever is done by the
/// number. Descriptors are taken by a pidfd, which stays that thread's.
pub struct Target {
    thread: Pid,
    pidfd: OwnedFd,
}

impl Target {
    /// The thread that made a call; `None` if it was killed.
    pub fn of(call: &Call, listener: &Listener) -> nix::Result<Option<Self>> {
        let thread = Pid::from_raw(call.pid as i32);
        // Threads may have tables of descriptors of their own.
        // SAFETY: no memory is involved.
        let pidfd = Errno::result(unsafe {
            libc::syscall(libc::SYS_pidfd_open, thread.as_raw(), libc::PIDFD_THREAD)
        });
        // Owned before the check, so that it is closed also if the thread is gone.
        // SAFETY: the call has just returned it.
        let pidfd = pidfd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) });
        if !listener.is_waiting(call) {
            return Ok(None);
        }
        Ok(Some(Self {
            thread,
            pidfd: pidfd?,
        }))
    }

    /// The file of a descriptor, which is ours then, whatever becomes of the number.
    pub fn file(&self, descriptor: i32) -> nix::Result<OwnedFd> {
        // SAFETY: no memory is involved.
        let fd = Errno::result(unsafe {
            libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), descriptor, 0)
        })?;
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Copies all of this memory, once: `EFAULT` if it cannot be read.
    pub fn read(&self, address: u64, to: &mut [u8]) -> nix::Result<()> {
        Self::read_of(self.thread, address, to)
    }

    /// Copies memory of the thread with this number.
    pub fn read_of(thread: Pid, address: u64, to: &mut [u8]) -> nix::Result<()> {
        let len = to.len();
        let remote = [RemoteIoVec {
            base: address as usize,
            len,
        }];
        let read = process_vm_readv(thread, &mut [IoSliceMut::new(to)], &remote)?;
        if read == len {
            Ok(())
        } else {
            Err(Errno::EFAULT)
        }
    }

    /// Reads a byte at each of these addresses, as many as one call takes, and returns how many could be read. A page
    /// that has yet to arrive (userfaultfd) is waited for, as the thread itself would.
    pub fn touch(&self, addresses: &[u64]) -> nix::Result<usize> {
        let some = &addresses[..addresses.len().min(libc::UIO_MAXIOV as usize)];
        let mut bytes = vec![0; some.len()];
        let remote: Vec<_> = some
            .iter()
            .map(|&address| RemoteIoVec {
                base: address as usize,
                len: 1,
            })
            .collect();
        process_vm_readv(self.thread, &mut [IoSliceMut::new(&mut bytes)], &remote)
    }

    /// A file in the thread's directory of `/proc`.
    pub fn proc(&self, name: &str) -> std::io::Result<File> {
        File::open(format!("/proc/{}/{name}", self.thread))
    }

    /// The thread's number.
    pub fn number(&self) -> Pid {
        self.thread
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{kill, Signal};
    use nix::sys::wait::waitpid;

    use super::*;
    use crate::supervise::listener::tests::process_with_requests;

    /// The number of our pidfds that refer to a process. (Other tests have pidfds of their own.)
    fn pidfds(process: Pid) -> usize {
        let line = format!("Pid:\t{process}");
        let fds = std::fs::read_dir("/proc/self/fdinfo").unwrap();
        fds.filter_map(|fd| std::fs::read_to_string(fd.unwrap().path()).ok())
            .filter(|info| info.lines().any(|other| other == line))
            .count()
    }

    #[test]
    fn a_process_that_is_killed_costs_no_descriptor() {
        let (process, listener, _pipe) = process_with_requests(1);
        let call = listener.receive().unwrap().unwrap();
        assert_eq!(pidfds(process), 0);
        let target = Target::of(&call, &listener).unwrap().unwrap();
        assert_eq!((target.number(), pidfds(process)), (process, 1));
        drop(target);
        assert_eq!(pidfds(process), 0);
        kill(process, Signal::SIGKILL).unwrap();
        while listener.is_waiting(&call) {
            std::thread::yield_now();
        }
        // It has not been waited for, so its number is still its own, and has a pidfd.
        assert!(Target::of(&call, &listener).unwrap().is_none());
        assert_eq!(pidfds(process), 0);
        waitpid(process, None).unwrap();
    }
}
