// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose faults a program answers: a create that waits for an answer blocks no other call, and can be
//! killed.

use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use pinbuf_test_harness::support::memory::{pattern, PAGE};
use pinbuf_test_harness::support::process::{Child, Link};
use pinbuf_test_harness::support::uffd::{Faults, Mode, UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY};
use pinbuf_test_harness::support::view::{holds, Mapped};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "uffd":
    answered,
    stuck_holds_nobody_up,
    stuck_thread_holds_no_thread_up,
    user_faults_only,
    by_signal,
}

/// Create waits for the pages, and has them.
fn answered() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let faults = Faults::of(&memory, Mode::Missing)?;
    let result = std::thread::scope(|scope| {
        let caller = scope.spawn(|| device.create(&[memory.range()]));
        let answers = (|| {
            for page in 0..4 {
                let addr = memory.addr() + (page * PAGE) as u64;
                check_eq!(faults.take()?, addr, "the page it waits for");
                check!(!caller.is_finished(), "create did not wait for page {page}");
                faults.copy(addr, &pattern(1, (page * PAGE) as u64, PAGE))?;
            }
            Ok(())
        })();
        // Nobody waits for a userfaultfd that is closed.
        drop(faults);
        let result = caller.join().expect("the caller panicked");
        answers.map(|()| result)
    })?;
    let buffer = result?;
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 1, 0, 4 * PAGE)
}

/// A process that calls create on memory whose second half is never answered for. The pages before are pinned
/// already.
fn stuck(link: &Link, held: usize) -> Result<Child> {
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(held * PAGE)?;
        let missing = Memory::small_pages(4 * PAGE)?;
        let faults = Faults::of(&missing, Mode::Missing)?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let result = device.create(&[memory.range(), missing.range()]);
                eprintln!("create came back with {result:?}");
            });
            faults.wait()?;
            link.theirs.signal()?;
            loop {
                std::thread::park();
            }
        })
    })?;
    Ok(child)
}

/// Expects that a create is quick while another one waits.
fn quick_create() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(64 * PAGE)?;
    let start = Instant::now();
    let buffer = device.create(&[memory.range()])?;
    buffer.map()?.touch();
    drop(buffer);
    let took = start.elapsed();
    check!(
        took < Duration::from_secs(5),
        "a create besides the stuck one took {took:?}"
    );
    Ok(())
}

fn stuck_holds_nobody_up() -> Result<()> {
    let pins = kernel::pins()?;
    let link = Link::new()?;
    let mut child = stuck(&link, 2000)?;
    link.ours.wait()?;
    for _ in 0..5 {
        quick_create()?;
    }
    check!(child.runs()?, "the stuck process is gone");
    let start = Instant::now();
    child.kill(Signal::SIGKILL)?;
    let (status, _) = child.end(Duration::from_secs(10))?;
    check!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        "the stuck process ended by {status:?}"
    );
    check!(
        start.elapsed() < Duration::from_secs(5),
        "it took {:?} to die",
        start.elapsed()
    );
    check_eq!(kernel::pins()?, pins, "pinned pages after it was killed");
    quick_create()
}

/// The same for another thread of the process.
fn stuck_thread_holds_no_thread_up() -> Result<()> {
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let missing = Memory::small_pages(4 * PAGE)?;
        let other = Memory::anonymous(64 * PAGE)?;
        let faults = Faults::of(&missing, Mode::Missing)?;
        std::thread::scope(|scope| {
            scope.spawn(|| drop(device.create(&[missing.range()])));
            faults.wait()?;
            let start = Instant::now();
            let buffer = device.create(&[other.range()])?;
            other.set(0, 5);
            check_eq!(buffer.map()?.get(0), 5, "what was written");
            check!(
                start.elapsed() < Duration::from_secs(5),
                "took {:?}",
                start.elapsed()
            );
            // A mapping can be made meanwhile, so the stuck call does not hold the mmap lock.
            drop(Memory::anonymous(PAGE)?);
            link.theirs.signal()?;
            loop {
                std::thread::park();
            }
        })
    })?;
    if let Err(error) = link.ours.wait() {
        child.join()?;
        return Err(error);
    }
    child.kill(Signal::SIGKILL)?;
    child.end(Duration::from_secs(10))?;
    Ok(())
}

/// The program answers faults of user mode only, which the kernel's are not.
fn user_faults_only() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let faults = Faults::open(UFFD_USER_MODE_ONLY, 0)?;
    faults.register(memory.range(), Mode::Missing)?;
    let error = device.create(&[memory.range()]).err();
    check_eq!(error, Some(Errno::EFAULT), "create");
    Ok(())
}

/// The program wants a signal for a fault; a system call gets an error.
fn by_signal() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let faults = Faults::open(0, UFFD_FEATURE_SIGBUS)?;
    faults.register(memory.range(), Mode::Missing)?;
    let error = device.create(&[memory.range()]).err();
    check_eq!(error, Some(Errno::EFAULT), "create");
    faults.copy(memory.addr(), &pattern(2, 0, 4 * PAGE))?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 2, 0, 4 * PAGE)
}
