// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose pages come late: userfaultfd, which refuses faults or answers them from a thread.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Result;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::pipe;
use pinbuf_test_harness::support::uffd::{Faults, Mode, UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY};
use pinbuf_test_harness::support::PAGE;
use pinbuf_uapi::Range;

/// The first word of a page that the thread provides.
pub const WORD: u64 = 0x1a7e_0000_0000_0001;

/// Memory whose missing pages come late, or never.
#[derive(Debug)]
pub struct Late {
    faults: Arc<Faults>,
    /// Answers faults until the other end of the pipe is closed.
    thread: Option<(JoinHandle<()>, OwnedFd)>,
}

impl Late {
    /// Takes over faults on `length` bytes. `answered`: a thread brings pages that begin with [`WORD`]; otherwise,
    /// faults fail. An error of the kernel's means that this memory, or this user, cannot have it.
    pub fn new(start: u64, length: usize, answered: bool) -> Result<nix::Result<Self>> {
        let (flags, features) = if answered {
            (0, 0)
        } else {
            (UFFD_USER_MODE_ONLY, UFFD_FEATURE_SIGBUS)
        };
        let len = length as u64;
        let taken = Faults::open(flags, features).and_then(|faults| {
            faults.register(Range { addr: start, len }, Mode::Missing)?;
            Ok(faults)
        });
        let faults = match taken {
            Ok(faults) => Arc::new(faults),
            Err(error) => return Ok(Err(error.downcast()?)),
        };
        let thread = answered.then(|| Self::answer(faults.clone())).transpose()?;
        Ok(Ok(Self { faults, thread }))
    }

    fn answer(faults: Arc<Faults>) -> Result<(JoinHandle<()>, OwnedFd)> {
        let (end, ends) = pipe()?;
        let thread = std::thread::spawn(move || {
            loop {
                let mut fds =
                    [faults.as_fd(), end.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                if poll(&mut fds, PollTimeout::NONE).is_err() {
                    continue;
                }
                if fds[1].any().unwrap_or(true) {
                    return;
                }
                // The page may have been provided meanwhile, or the mapping may be gone.
                if let Ok(address) = faults.read() {
                    let _ = faults.copy(address, &page_of(WORD));
                }
            }
        });
        Ok((thread, ends))
    }

    /// Provides a page that begins with `word`.
    pub fn bring(&self, address: u64, word: u64) -> Result<()> {
        self.faults.copy(address, &page_of(word))
    }
}

/// A page that begins with `word`.
fn page_of(word: u64) -> Vec<u8> {
    let mut page = word.to_ne_bytes().to_vec();
    page.resize(PAGE, 0);
    page
}

impl Drop for Late {
    fn drop(&mut self) {
        if let Some((thread, ends)) = self.thread.take() {
            drop(ends);
            let _ = thread.join();
        }
    }
}
