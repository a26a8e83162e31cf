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
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        Ok(events.contains(PollFlags::POLLHUP))
    }

    /// Does the thread that made a call still wait for its answer? What was read by the thread's number before
    /// belongs to that thread then.
    pub fn is_waiting(&self, call: &Call) -> bool {
        // SAFETY: the kernel reads the number.
        unsafe { notif_id_valid(self.0.as_raw_fd(), &call.id) }.is_ok()
    }

    /// Answers a call, and returns the number of the program's new descriptor. `ENOENT`: the thread was killed.
    pub fn answer(&self, call: &Call, answer: &Answer) -> nix::Result<i32> {
        match answer {
            Answer::TheKernels => {
                let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
                self.send(call, 0, flags)
            }
            Answer::Error(error) => self.send(call, -(*error as i32), 0),
            Answer::Descriptor { file, cloexec } => {
                let addfd = libc::seccomp_notif_addfd {
                    id: call.id,
                    flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
                    srcfd: file.as_raw_fd() as u32,
                    newfd: 0,
                    newfd_flags: if *cloexec { libc::O_CLOEXEC as u32 } else { 0 },
                };
                // SAFETY: the kernel reads this struct.
                unsafe { notif_addfd(self.0.as_raw_fd(), &addfd) }
            }
        }
    }

    fn send(&self, call: &Call, error: i32, flags: u32) -> nix::Result<i32> {
        let mut answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error,
            flags,
        };
        // SAFETY: the kernel reads this struct.
        unsafe { notif_send(self.0.as_raw_fd(), &mut answer) }
    }
}
