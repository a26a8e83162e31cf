// SPDX-License-Identifier: MIT OR Apache-2.0

//! Callers that end, by themselves or not, at any point of a call.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::Count;
use crate::settings::Settings;
use pinbuf_test_harness::support::memory::{Memory, PAGE};
use pinbuf_test_harness::support::process::{Child, Link, PATIENCE};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device};
use pinbuf_test_harness::tests;

tests! { "races":
    exit within 120,
    sigkill within 120,
}

/// Memory that takes a while to pin: none of it is there.
const LEN: usize = 2048 * PAGE;

/// Makes and drops buffers until the process ends; holds some meanwhile.
fn create_forever(device: &Device, memory: &Memory) -> Result<Infallible> {
    let mut held = Vec::new();
    loop {
        match device.create(&[memory.range()]) {
            Ok(buffer) => held.push((buffer.map()?, buffer)),
            // The call was killed: nobody sees its result.
            Err(Errno::EINTR) => {}
            Err(error) => bail!("create: {error}"),
        }
        if held.len() > 2 {
            held.clear();
        }
        memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
    }
}

/// Lets children live for random times; `die` says how each ends.
fn children(
    die: impl Fn(Duration) -> Result<Child>,
    expected: impl Fn(WaitStatus) -> bool,
) -> Result<()> {
    let Settings { seconds, seed, .. } = Settings::get();
    let mut rng = Rng::with_seed(seed);
    let (end, died) = (Instant::now() + seconds, Count::default());
    let pins = kernel::pins()?;
    while Instant::now() < end {
        let child = die(Duration::from_micros(rng.u64(..20_000)))?;
        let (status, said) = child.end(PATIENCE)?;
        check!(
            expected(status),
            "a child ended with {status:?} {said} (--seed {seed})"
        );
        died.up();
    }
    // The kernel may still be releasing the last of them, which the harness waits for.
    println!(
        "# {} children; {} pinned pages are not released yet",
        died.get(),
        kernel::pins()? - pins
    );
    check!(died.get() > 0, "not one child");
    Ok(())
}

/// One thread is in the call, another one ends the process.
fn exit() -> Result<()> {
    let one = |delay: Duration| {
        Child::run(|| {
            let device = Device::open()?;
            let memory = Memory::small_pages(LEN)?;
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        let Err(error) = create_forever(&device, &memory);
                        eprintln!("{error:#}");
                        // SAFETY: ends the process without any cleanup.
                        unsafe { libc::_exit(1) }
                    });
                }
                std::thread::sleep(delay);
                // SAFETY: ends the process, whatever its threads do.
                unsafe { libc::_exit(0) }
            })
        })
    };
    children(one, |status| matches!(status, WaitStatus::Exited(_, 0)))
}

/// The caller is killed.
fn sigkill() -> Result<()> {
    let one = |delay: Duration| {
        let link = Link::new()?;
        let child = Child::run(|| {
            let device = Device::open()?;
            let memory = Memory::small_pages(LEN)?;
            link.theirs.signal()?;
            let Err(error) = create_forever(&device, &memory);
            Err(error)
        })?;
        link.ours.wait()?;
        std::thread::sleep(delay);
        check_eq!(child.kill(Signal::SIGKILL).is_ok(), true, "kill");
        Ok(child)
    };
    children(one, |status| {
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _))
    })
}
