// SPDX-License-Identifier: MIT OR Apache-2.0

//! The threads that answer calls.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;

use super::answer::Answers;
use super::listener::{Answer, Listener};
use crate::text::complain;

/// Calls that are answered at the same time; more wait in the kernel.
pub const MOST: usize = 64;
/// Threads that stay when there are no calls.
const IDLE: usize = 2;
/// A thread's stack: lists of a request, and what is read at once, are on it.
const STACK: usize = 256 << 10;

/// Threads, each of which receives a call, answers it, and goes on.
pub struct Pool {
    listener: Listener,
    answers: Answers,
    threads: AtomicUsize,
    /// Threads that wait for a call.
    idle: AtomicUsize,
}

impl Pool {
    /// A pool without threads.
    pub fn new(listener: Listener, answers: Answers) -> Arc<Self> {
        Arc::new(Self {
            listener,
            answers,
            threads: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
        })
    }

    /// Starts the first thread.
    pub fn start(self: &Arc<Self>) -> std::io::Result<()> {
        self.add()
    }

    /// Where calls are received.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// Starts a thread, unless there are enough.
    fn add(self: &Arc<Self>) -> std::io::Result<()> {
        if self.threads.fetch_add(1, Ordering::AcqRel) >= MOST {
            self.threads.fetch_sub(1, Ordering::AcqRel);
            return Ok(());
        }
        self.idle.fetch_add(1, Ordering::AcqRel);
        let pool = Arc::clone(self);
        let started = thread::Builder::new().stack_size(STACK).spawn(move || {
            pool.work();
            pool.threads.fetch_sub(1, Ordering::AcqRel);
        });
        if started.is_err() {
            self.idle.fetch_sub(1, Ordering::AcqRel);
            self.threads.fetch_sub(1, Ordering::AcqRel);
        }
        started.map(drop)
    }

    fn work(self: &Arc<Self>) {
        loop {
            let call = match self.listener.receive() {
                Ok(Some(call)) => call,
                Ok(None) => break,
                Err(error) => {
                    complain!("receiving a call: {error}");
                    break;
                }
            };
            // Another one waits for calls while this one may wait for memory. Without memory for a thread, this
            // one receives the next call when it is ready.
            if self.idle.fetch_sub(1, Ordering::AcqRel) == 1 {
                let _ = self.add();
            }
            let answered = catch_unwind(AssertUnwindSafe(|| {
                self.answers.answer(&call, &self.listener);
            }));
            if answered.is_err() {
                // A call without an answer would never return.
                let _ = self
                    .listener
                    .answer(&call, &Answer::Error(Errno::EIO), drop);
            }
            // One that leaves must never count as idle, or another one would rely on it.
            let stay = |idle| (idle < IDLE).then_some(idle + 1);
            let idle = self
                .idle
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, stay);
            if idle.is_err() {
                return;
            }
        }
        self.idle.fetch_sub(1, Ordering::AcqRel);
    }
}
