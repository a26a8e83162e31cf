// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose faults a program answers: a create that waits for an answer holds nobody up, and
//! can be killed.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use pinbuf_uapi::Range;

use pinbuf_test_harness::support::memory::{pattern, PAGE};
use pinbuf_test_harness::support::process::{Child, Link};
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

const API: u64 = 0xAA;
const USER_MODE_ONLY: i32 = 1;
const FEATURE_SIGBUS: u64 = 1 << 7;
const REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(uffd_api, 0xAA, 0x3F, ApiArgument);
nix::ioctl_readwrite!(uffd_register, 0xAA, 0x00, RegisterArgument);
nix::ioctl_readwrite!(uffd_copy, 0xAA, 0x03, CopyArgument);

/// A userfaultfd that has the missing pages of some memory.
pub struct Faults(OwnedFd);

impl Faults {
    /// Takes them over.
    pub fn of(memory: &Memory, flags: i32, features: u64) -> Result<Self> {
        Self::of_range(memory.range(), flags, features)
    }

    /// Takes over those of a part.
    pub fn of_part(memory: &Memory, offset: usize, len: usize) -> Result<Self> {
        Self::of_range(memory.part(offset, len), 0, 0)
    }

    fn of_range(range: Range, flags: i32, features: u64) -> Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | flags,
            )
        };
        Errno::result(fd).context("userfaultfd")?;
        // SAFETY: the call has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
        let mut argument = ApiArgument {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the struct.
        unsafe { uffd_api(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_API")?;
        let mut argument = RegisterArgument {
            start: range.addr,
            len: range.len,
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: as above; faults in the memory wait from here on.
        unsafe { uffd_register(fd.as_raw_fd(), &mut argument) }.context("UFFDIO_REGISTER")?;
        Ok(Self(fd))
    }

    /// Waits until someone waits for an answer.
    pub fn wait(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(20_000u16))?;
        check_eq!(
            fds[0].revents(),
            Some(PollFlags::POLLIN),
            "faults that wait for an answer"
        );
        Ok(())
    }

    /// Takes the message of a fault, and tells its address.
    fn take(&self) -> Result<u64> {
        self.wait()?;
        let mut message = [0; 32];
        let count = nix::unistd::read(&self.0, &mut message)?;
        check_eq!(
            (count, message[0]),
            (32, 0x12),
            "a message of a fault: its size and kind"
        );
        let address = message[16..24].try_into().expect("eight bytes");
        Ok(u64::from_ne_bytes(address))
    }

    /// Gives pages.
    fn answer(&self, addr: u64, data: &[u8]) -> Result<()> {
        let mut argument = CopyArgument {
            dst: addr,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the kernel puts new pages where there were none, in memory that the test maps.
        unsafe { uffd_copy(self.0.as_raw_fd(), &mut argument) }.context("UFFDIO_COPY")?;
        check_eq!(argument.copied, i64::try_from(data.len())?, "bytes copied");
        Ok(())
    }
}

/// Create waits for the pages, and has them.
fn answered() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let faults = Faults::of(&memory, 0, 0)?;
    let result = std::thread::scope(|scope| {
        let caller = scope.spawn(|| device.create(&[memory.range()]));
        let answers = (|| {
            for page in 0..4 {
                let addr = memory.addr() + (page * PAGE) as u64;
                check_eq!(
                    faults.take()? / PAGE as u64 * PAGE as u64,
                    addr,
                    "the page it waits for"
                );
                check!(!caller.is_finished(), "create did not wait for page {page}");
                faults.answer(addr, &pattern(1, (page * PAGE) as u64, PAGE))?;
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
    holds(
        &Mapped {
            buffer: &buffer,
            memory: &mapped,
        },
        1,
        0,
        4 * PAGE,
    )
}

/// A process that calls create on memory whose second half nobody answers for. What it pinned
/// until then, it pinned.
fn stuck(link: &Link, held: usize) -> Result<Child> {
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(held * PAGE)?;
        let missing = Memory::small_pages(4 * PAGE)?;
        let faults = Faults::of(&missing, 0, 0)?;
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

/// Expects that a create is quick, though another is stuck.
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
        "a create beside the stuck one took {took:?}"
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

/// So it is for another thread of the same process.
fn stuck_thread_holds_no_thread_up() -> Result<()> {
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let missing = Memory::small_pages(4 * PAGE)?;
        let other = Memory::anonymous(64 * PAGE)?;
        let faults = Faults::of(&missing, 0, 0)?;
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
    let _faults = Faults::of(&memory, USER_MODE_ONLY, 0)?;
    let error = device.create(&[memory.range()]).err();
    check_eq!(error, Some(Errno::EFAULT), "create");
    Ok(())
}

/// The program wants a signal for a fault; a system call gets an error.
fn by_signal() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let faults = Faults::of(&memory, 0, FEATURE_SIGBUS)?;
    let error = device.create(&[memory.range()]).err();
    check_eq!(error, Some(Errno::EFAULT), "create");
    faults.answer(memory.addr(), &pattern(2, 0, 4 * PAGE))?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    holds(
        &Mapped {
            buffer: &buffer,
            memory: &mapped,
        },
        2,
        0,
        4 * PAGE,
    )
}
