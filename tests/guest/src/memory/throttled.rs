// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that its control group slows down while it allocates memory, in a fault or for a device, delays no
//! other process that has the same buffer.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use pinbuf_test_importer::{Direction, Importer, Limits};

use crate::populate::Group;
use pinbuf_test_harness::support::memory::{HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::{check, Buffer, Device, Memory, Sync};
use pinbuf_test_harness::tests;

tests! { "throttled":
    fault_delays_no_other_process within 120,
    mapping_delays_no_access within 120,
}

/// The number of charged pages after which the kernel throttles a task inside of a system call, and not only at the
/// return from it: it charges batches of 64 pages, and the excess has to be more than one batch.
const IN_A_CALL: usize = 2 * 64;
/// The number of page tables that a mapping of the buffer takes.
const TABLES: usize = IN_A_CALL + 72;
/// Threads in the group.
const THREADS: usize = 4;
/// How long the processes run without a limit.
const USUAL: Duration = Duration::from_secs(4);
/// How long they run with it: until the group has waited for this often, but at least and at most for these times.
const ENOUGH: u64 = 4;
const LEAST: Duration = Duration::from_secs(4);
const MOST: Duration = Duration::from_secs(30);
/// What the group may have: less than its processes take.
const HIGH: usize = 64 << 10;
/// The control group causes waits of two seconds.
const LONG: Duration = Duration::from_secs(1);

/// Maps a page of the buffer once in each of many blocks: each takes a page table, and is too small for a huge entry.
/// A buffer that fills the page tables would need more than the memory of the machine where pages have 16 KiB.
fn map_in_many_blocks(buffer: &Buffer) -> Result<Memory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let area = Memory::map(TABLES * HUGE, libc::PROT_NONE, flags, None, 0)
        .context("reserving addresses")?;
    for table in 0..TABLES {
        area.replace_by(table * HUGE, PAGE, buffer.as_fd(), 0)
            .context("mapping a page of the buffer")?;
    }
    Ok(area)
}

/// Makes the kernel write to each page of a new mapping, in one system call, so that the control group throttles in a
/// fault. Returns the time that the call took.
fn fault_in_the_kernel(buffer: &Buffer, zero: &File) -> Result<Duration> {
    let mapped = map_in_many_blocks(buffer)?;
    let mut pieces: Vec<_> = (0..TABLES)
        .map(|table| libc::iovec {
            iov_base: mapped.at(table * HUGE).cast(),
            iov_len: 1,
        })
        .collect();
    let start = Instant::now();
    // SAFETY: the pieces lie in the mapping, which no Rust object is in.
    let read = unsafe {
        libc::readv(
            zero.as_raw_fd(),
            pieces.as_mut_ptr(),
            i32::try_from(pieces.len())?,
        )
    };
    Errno::result(read).context("reading zeroes into the mapping")?;
    Ok(start.elapsed())
}

/// A child in the group does something with several threads, and counts in `waits` how often that took long.
fn child_in(
    group: &Group,
    waits: &Memory,
    act: impl Fn() -> Result<Duration> + std::marker::Sync,
) -> Result<Child> {
    Child::run(|| {
        group.join()?;
        std::thread::scope(|scope| {
            let run = |thread| -> Result<()> {
                loop {
                    let long = u64::from(act()? >= LONG);
                    waits.set(thread * 8, waits.get(thread * 8) + long);
                }
            };
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || run(thread)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("a thread panicked"))
        })
    })
}

/// Expects that what this process does takes no longer while the control group of a child throttles the child than
/// while the group has enough memory. The time without throttling depends on the machine: the two processes share its
/// processors, and they hold the driver's locks while they work.
fn delays_nobody(
    theirs: impl Fn() -> Result<Duration> + std::marker::Sync,
    mut ours: impl FnMut() -> Result<Duration>,
) -> Result<()> {
    let waits = Memory::map(PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?;
    let group = Group::new("memory")?;
    let mut child = child_in(&group, &waits, theirs)?;
    // Returns the longest time of this process, and the number of long waits of the child.
    let mut run = |least, most| -> Result<(Duration, u64)> {
        let counted = || {
            (0..THREADS)
                .map(|thread| waits.get(thread * 8))
                .sum::<u64>()
        };
        let (start, before) = (Instant::now(), counted());
        let mut longest = Duration::ZERO;
        while start.elapsed() < least || (start.elapsed() < most && counted() - before < ENOUGH) {
            longest = longest.max(ours()?);
            // A wait takes seconds: this meets it all the same, and leaves the processors to other guests.
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok((longest, counted() - before))
    };
    let (usual, slow) = run(USUAL, USUAL)?;
    group.set("memory.high", HIGH)?;
    let (longest, throttled) = run(LEAST, MOST)?;
    if !child.runs()? {
        child.join()?;
        bail!("the child in the group came to an end");
    }
    child.kill(Signal::SIGKILL)?;
    child.end(Duration::from_secs(20))?;
    println!(
        "# with enough memory {slow} long waits in the group, and up to {usual:?} outside; \
         throttled {throttled}, and up to {longest:?}"
    );
    check!(throttled > 0, "the control group throttled nothing");
    check!(
        longest < usual + LONG,
        "a process outside of the group waited for {longest:?}; without throttling for {usual:?} at most"
    );
    group.remove()
}

fn fault_delays_no_other_process() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let zero = File::open("/dev/zero")?;
    let fault = || {
        let mapped = map_in_many_blocks(&buffer)?;
        let mut longest = Duration::ZERO;
        for table in 0..TABLES {
            let start = Instant::now();
            mapped.set(table * HUGE, 1);
            longest = longest.max(start.elapsed());
        }
        Ok(longest)
    };
    delays_nobody(|| fault_in_the_kernel(&buffer, &zero), fault)
}

/// Attaches a device that is coherent with caches. With one that is not, an access by the CPU maintains the caches of
/// all mappings: of 20,000 pages of 16 KiB, an emulated processor takes 0.4 s for each mapping. A throttled process
/// keeps its mappings for longer, so the access takes longer, and not because of a lock.
fn attach(buffer: &Buffer) -> io::Result<Importer> {
    match Importer::attach_coherent(buffer.as_fd(), true) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Importer::attach(buffer.as_fd(), Limits::NONE)
        }
        attached => attached,
    }
}

/// A device's mapping allocates an entry for each extent.
fn mapping_delays_no_access() -> Result<()> {
    /// The size of `struct scatterlist`.
    const ENTRY: usize = 32;
    // As few as possible: with more of them, few mappings are finished in time.
    const EXTENTS: usize = IN_A_CALL * PAGE / ENTRY;
    let device = Device::open()?;
    let memory = Memory::small_pages(PAGE)?;
    // No two are adjacent: the same page again and again.
    let buffer = device.create(&vec![memory.range(); EXTENTS])?;
    // The importer measures the time in the kernel, without the return to the program.
    let map = || Ok(attach(&buffer)?.map(Direction::Bidirectional)?.1);
    let access = || {
        let start = Instant::now();
        buffer.synced(Sync::ReadWrite, || ())?;
        Ok(start.elapsed())
    };
    delays_nobody(map, access)
}
