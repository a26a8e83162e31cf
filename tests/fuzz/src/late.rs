// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose pages come late: userfaultfd, which refuses faults or answers them from a thread.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::pipe;
use pinbuf_test_harness::support::PAGE;

/// What a page begins with that the thread brings.
pub const WORD: u64 = 0x1a7e_0000_0000_0001;

const USER_MODE_ONLY: libc::c_int = 1;
const FEATURE_SIGBUS: u64 = 1 << 7;
const REGISTER_MISSING: u64 = 1;
const API: u32 = 0xc018_aa3f;
const REGISTER: u32 = 0xc020_aa00;
const COPY: u32 = 0xc028_aa03;
/// The size of a message, and where its kind and its address are.
const MESSAGE: usize = 32;
const PAGEFAULT: u8 = 0x12;
const ADDRESS: usize = 16;

fn call<const N: usize>(fd: RawFd, number: u32, words: &mut [u64; N]) -> nix::Result<()> {
    // SAFETY: the words are the call's argument, in its size.
    let result = unsafe { libc::ioctl(fd, number.into(), words.as_mut_ptr()) };
    Errno::result(result).map(drop)
}

/// Pages of which those that are not there come late, or never.
#[derive(Debug)]
pub struct Late {
    fd: OwnedFd,
    /// Answers faults until the other end of the pipe is closed.
    thread: Option<(JoinHandle<()>, OwnedFd)>,
}

impl Late {
    /// Takes over faults on `length` bytes. `answered`: a thread brings pages that begin with [`WORD`]; otherwise,
    /// faults fail. An error of the kernel's means that this memory, or this user, cannot have it.
    pub fn new(start: u64, length: usize, answered: bool) -> Result<nix::Result<Self>> {
        let mode = if answered { 0 } else { USER_MODE_ONLY };
        // SAFETY: takes flags alone.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | mode,
            )
        };
        let fd = match Errno::result(fd as RawFd) {
            // SAFETY: the call has just returned it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(errno) => return Ok(Err(errno)),
        };
        let features = if answered { 0 } else { FEATURE_SIGBUS };
        call(fd.as_raw_fd(), API, &mut [0xaa, features, 0]).context("UFFDIO_API")?;
        let mut range = [start, length as u64, REGISTER_MISSING, 0];
        if let Err(errno) = call(fd.as_raw_fd(), REGISTER, &mut range) {
            return Ok(Err(errno));
        }
        let thread = answered.then(|| Self::answer(&fd)).transpose()?;
        Ok(Ok(Self { fd, thread }))
    }

    fn answer(fd: &OwnedFd) -> Result<(JoinHandle<()>, OwnedFd)> {
        let fd = fd.try_clone()?;
        let (end, ends) = pipe()?;
        let thread = std::thread::spawn(move || {
            let mut page = vec![0u64; PAGE / 8];
            page[0] = WORD;
            loop {
                let mut fds = [&fd, &end].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
                if poll(&mut fds, PollTimeout::NONE).is_err() {
                    continue;
                }
                if fds[1].any().unwrap_or(true) {
                    return;
                }
                let mut message = [0u8; MESSAGE];
                let Ok(MESSAGE) = nix::unistd::read(&fd, &mut message) else {
                    continue;
                };
                if message[0] == PAGEFAULT {
                    let mut address = [0; 8];
                    address.copy_from_slice(&message[ADDRESS..ADDRESS + 8]);
                    let address = u64::from_ne_bytes(address) & !(PAGE as u64 - 1);
                    // Somebody else may have been faster, or the mapping may be gone.
                    let _ = copy(fd.as_raw_fd(), address, &page);
                }
            }
        });
        Ok((thread, ends))
    }

    /// Brings a page that begins with `word`.
    pub fn bring(&self, address: u64, word: u64) -> nix::Result<()> {
        let mut page = vec![0u64; PAGE / 8];
        page[0] = word;
        copy(self.fd.as_raw_fd(), address, &page)
    }
}

fn copy(fd: RawFd, address: u64, page: &[u64]) -> nix::Result<()> {
    let source = page.as_ptr() as u64;
    call(fd, COPY, &mut [address, source, PAGE as u64, 0, 0])
}

impl Drop for Late {
    fn drop(&mut self) {
        if let Some((thread, ends)) = self.thread.take() {
            drop(ends);
            let _ = thread.join();
        }
    }
}
