// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine sleeps and wakes while buffers of all kinds live: mapped by the process, by a device and
//! into the kernel.
//!
//! Afterwards each byte is what it was, through each of these, what one writes the others read, the counters
//! are the same, and closing gives everything back. The kernel needs `PM_DEBUG` and hibernation, and a disk of the
//! serial number `swap` for the image. No driver of 9p's device suspends it: nothing may be used of a shared
//! directory from here on.
//!
//! The guest cannot wake itself from suspend-to-idle in QEMU: with ACPI, Linux relies on the alarm's ACPI event, which
//! QEMU raises in S3 alone, and does not let the alarm's interrupt wake. So the kernel's own test mode `platform` is used,
//! which does everything but the idling: tasks and devices are suspended, for five seconds, and resumed.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{umount2, MntFlags};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::time::{clock_gettime, ClockId};
use pinbuf_test_importer::{Direction, Importer, Limits, Mapping};

use crate::kinds::{few, scattered, Kind};
use pinbuf_test_harness::support::frames::frames;
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{pattern, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{Child, Link};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::view::{
    agree_sampled, holds, DeviceView, KernelView, Mapped, Source, View,
};
use pinbuf_test_harness::support::{bail, check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "suspend":
    to_idle within 900,
    to_memory within 900,
    to_disk within 1800,
    not_while_a_create_waits within 120 allowing ["refusing to freeze"],
}

/// What is compared at once.
const CHUNK: usize = 4 << 20;

/// Tasks and devices sleep, as for suspend-to-idle.
fn to_idle() -> Result<()> {
    slept_through(|| {
        let _test = Setting::choice("/sys/power/pm_test", "platform")?;
        suspended(|| kernel::write("/sys/power/state", "freeze"))
    })
}

/// Only the memory keeps its power, until the clock's alarm.
fn to_memory() -> Result<()> {
    slept_through(|| {
        let _deep = Setting::choice("/sys/power/mem_sleep", "deep")?;
        let before = slept()?;
        suspended(|| run("rtcwake", &["-m", "mem", "-s", "3"]))?;
        check!(slept()? > before, "no time was slept through");
        Ok(())
    })
}

/// The memory is written to a disk, and read from there.
fn to_disk() -> Result<()> {
    let disk = swap_disk()?;
    let path = disk.display().to_string();
    run("mkswap", &[&path])?;
    run("swapon", &[&path])?;
    let result = slept_through(|| {
        let _test = Setting::choice("/sys/power/disk", "test_resume")?;
        // Without this, the kernel does not say whether it has restored the image.
        let _messages = Setting::set("/sys/power/pm_debug_messages", 1)?;
        let before = restored()?;
        kernel::write("/sys/power/state", "disk")?;
        check_eq!(restored()?, before + 1, "images that were restored");
        Ok(())
    });
    run("swapoff", &[&path])?;
    result
}

/// A create that waits for a userfault cannot be frozen. The kernel gives up the suspend, and the next one
/// succeeds once the create was killed.
fn not_while_a_create_waits() -> Result<()> {
    let _test = Setting::choice("/sys/power/pm_test", "freezer")?;
    let _timeout = Setting::set("/sys/power/pm_freeze_timeout", 2000)?;
    let pins = kernel::pins()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(2 * PAGE)?;
        memory.set(0, 1);
        let faults = Faults::of_range(memory.part(PAGE, PAGE), Mode::Missing)?;
        link.theirs.send(faults.as_fd())?;
        bail!("create returned {:?}", device.create(&[memory.range()]))
    })?;
    let faults = link.ours.receive()?;
    let mut waiting = [PollFd::new(faults.as_fd(), PollFlags::POLLIN)];
    check_eq!(
        poll(&mut waiting, PollTimeout::from(20_000_u16))?,
        1,
        "faults that wait"
    );
    let refused = fs::write("/sys/power/state", "freeze").map_err(|error| error.raw_os_error());
    check_eq!(
        refused,
        Err(Some(libc::EBUSY)),
        "a suspend while a create waits"
    );
    drop(child);
    check_eq!(kernel::pins()?, pins, "pins of a create that was killed");
    suspended(|| kernel::write("/sys/power/state", "freeze"))
}

/// Runs a program of the machine's.
fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    check!(
        output.status.success(),
        "{program} {}: {}: {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}

/// Runs an action that has to suspend the machine once.
fn suspended(action: impl FnOnce() -> Result<()>) -> Result<()> {
    const COUNT: &str = "/sys/power/suspend_stats/success";
    let before = kernel::number(COUNT)?;
    action()?;
    check_eq!(kernel::number(COUNT)?, before + 1, "suspends");
    Ok(())
}

/// The time that the machine has slept, in seconds.
fn slept() -> Result<i64> {
    let now = |clock| clock_gettime(clock).context("clock_gettime");
    Ok((now(ClockId::CLOCK_BOOTTIME)? - now(ClockId::CLOCK_MONOTONIC)?).tv_sec())
}

/// How often the kernel's log says that an image was restored.
fn restored() -> Result<usize> {
    let output = Command::new("dmesg").output().context("running dmesg")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.matches("image restored successfully").count())
}

/// The disk for the image.
fn swap_disk() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if serial.trim() == "swap" {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    bail!("there is no disk of the serial number `swap`: the row `suspend` has one")
}

/// Unmounts shared directories, before the first subtest: their device does not answer after a sleep, so a
/// process whose working directory is there would hang when it ends.
pub fn leave_shares() -> Result<()> {
    std::env::set_current_dir("/")?;
    for line in kernel::read("/proc/mounts")?.lines() {
        if let [_, path, "9p", ..] = line.split(' ').collect::<Vec<_>>()[..] {
            umount2(path, MntFlags::empty()).with_context(|| {
                format!("{path} cannot be unmounted: only this program may use it, so start it without a shell")
            })?;
        }
    }
    Ok(())
}

/// A buffer, and all views of its bytes.
struct Used {
    name: &'static str,
    pieces: Vec<(Memory, usize)>,
    buffer: Buffer,
    mapped: Memory,
    importer: Importer,
    mapping: Mapping,
    seed: u64,
}

impl Used {
    /// A buffer of pieces of memory, each from its beginning.
    fn new(device: &Device, name: &'static str, pieces: Vec<(Memory, usize)>) -> Result<Self> {
        let ranges: Vec<_> = pieces
            .iter()
            .map(|(memory, len)| memory.part(0, *len))
            .collect();
        let buffer = device
            .create(&ranges)
            .with_context(|| format!("create: {name}"))?;
        let mapped = buffer.map()?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
        let (mapping, _) = importer.map(Direction::Bidirectional).context("mapping")?;
        importer.vmap().context("mapping into the kernel")?;
        Ok(Self {
            name,
            pieces,
            buffer,
            mapped,
            importer,
            mapping,
            seed: name.len() as u64,
        })
    }

    /// Calls `action` with all views of the buffer.
    fn with_views<T>(&self, action: impl FnOnce(&[&dyn View]) -> Result<T>) -> Result<T> {
        let source = Source {
            buffer: &self.buffer,
            pieces: self
                .pieces
                .iter()
                .map(|(memory, len)| (memory, 0, *len))
                .collect(),
        };
        let mapped = Mapped::of(&self.buffer, &self.mapped);
        let device = DeviceView::of(&self.importer, self.mapping);
        let views: [&dyn View; 4] = [&source, &mapped, &device, &KernelView(&self.importer)];
        action(&views).context(self.name)
    }

    fn len(&self) -> usize {
        self.mapped.len()
    }

    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> {
        let len = self.len();
        (0..len)
            .step_by(CHUNK)
            .map(move |at| (at, CHUNK.min(len - at)))
    }

    fn fill(&self) -> Result<()> {
        self.with_views(|views| {
            self.chunks()
                .try_for_each(|(at, len)| views[0].write(at, &pattern(self.seed, at as u64, len)))
        })
    }

    /// Compares each byte through each view.
    fn is_whole(&self) -> Result<()> {
        self.with_views(|views| {
            views.iter().try_for_each(|view| {
                self.chunks()
                    .try_for_each(|(at, len)| holds(*view, self.seed, at, len))
            })
        })
    }

    /// Every view writes, and the others must read it.
    fn agrees(&self) -> Result<()> {
        self.with_views(|views| agree_sampled(views, self.len(), 128))
    }

    /// What the driver reports of it, and a sample of its page frames.
    fn state(&self, device: &Device) -> Result<String> {
        let mut frames_of_all = Vec::new();
        for (memory, len) in &self.pieces {
            for page in (0..len / PAGE).step_by((len / PAGE / 64).max(1)) {
                frames_of_all.extend(frames(memory, page * PAGE, PAGE)?);
            }
        }
        let info = device.describe(&self.buffer)?;
        Ok(format!("{info:?} {frames_of_all:x?}"))
    }
}

/// What the kernel counts, with the buffers alive.
fn counters() -> Result<[i64; 5]> {
    Ok([
        kernel::pins()?,
        kernel::dma_bufs()?,
        kernel::module_references()?.unwrap_or(-1),
        kernel::vm_pin()?,
        kernel::bounce_slots()?,
    ])
}

/// Buffers of all kinds of memory.
fn buffers(device: &Device, giga: bool) -> Result<Vec<Used>> {
    const SCATTERED: usize = 1024;
    let [memory, _between] = scattered(SCATTERED)?;
    let one = |memory: Memory| {
        let len = memory.len();
        vec![(memory, len)]
    };
    let mut all = vec![Used::new(device, "scattered pages", one(memory))?];
    all.push(Used::new(
        device,
        "one page",
        one(Memory::anonymous(PAGE)?),
    )?);
    for (name, kind) in [
        ("shmem", Kind::Shmem),
        ("transparent huge pages", Kind::Transparent),
        ("private hugetlb", Kind::HugePrivate),
        ("shared hugetlb", Kind::HugeShared),
    ] {
        all.push(Used::new(device, name, one(kind.present(few(kind))?))?);
    }
    let mixed = [Kind::Anonymous, Kind::HugeShared, Kind::Shmem]
        .map(|kind| kind.present(few(kind)).map(|memory| (memory, 30 * PAGE)));
    let mixed = mixed.into_iter().collect::<Result<_>>()?;
    all.push(Used::new(device, "parts of several kinds", mixed)?);
    if giga {
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
        let memory = Memory::map(GIGA, RW, flags, None, 0).context("mapping 1 GiB")?;
        all.push(Used::new(device, "a page of 1 GiB", one(memory))?);
    }
    check!(all.iter().any(|used| used.len() > HUGE), "no large buffer");
    Ok(all)
}

/// Calls `sleep` while buffers live, and compares before and after.
fn slept_through(sleep: impl FnOnce() -> Result<()>) -> Result<()> {
    let pool = HugePool::with_free(8)?;
    // A guest that did not set such a page aside at its boot may have none.
    let set_aside = kernel::read("/proc/cmdline")?.contains("hugepagesz=1G");
    let giga = set_aside.then(HugePool::with_giga).transpose()?;
    let none = counters()?;
    let device = Device::open()?;
    let all = buffers(&device, giga.is_some())?;
    for used in &all {
        used.fill()?;
    }
    let state = || {
        all.iter()
            .map(|used| used.state(&device))
            .collect::<Result<Vec<_>>>()
    };
    let (before, counted) = (state()?, counters()?);
    check!(counted[0] > none[0], "nothing is pinned");
    sleep()?;
    check_eq!(counters()?, counted, "counters, with the buffers alive");
    check_eq!(state()?, before, "what the buffers are");
    for used in &all {
        used.is_whole().context("after the sleep")?;
        used.agrees().context("after the sleep")?;
    }
    // Buffers that are made after the sleep work too.
    let fresh = Used::new(
        &device,
        "made later",
        vec![(Memory::anonymous(64 * PAGE)?, 64 * PAGE)],
    )?;
    fresh.fill()?;
    fresh.is_whole()?;
    let sizes: Vec<_> = all
        .iter()
        .map(|used| format!("{} {}", used.name, used.len()))
        .collect();
    println!("# bytes compared four times: {}", sizes.join(", "));
    drop((fresh, all, device));
    check_eq!(counters()?, none, "counters, with all closed");
    drop((pool, giga));
    Ok(())
}
