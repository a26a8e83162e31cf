// SPDX-License-Identifier: MIT OR Apache-2.0

//! What keeps a buffer alive, what it shows when its memory is gone, and when the module may go.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::kmod::{delete_module, DeleteModuleFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::stat;
use nix::sys::wait::WaitStatus;
use nix::unistd::execv;
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::memory::{memfd, pattern, punch_hole, PAGE};
use pinbuf_test_harness::support::process::{become_user, in_child, Child, Link, PATIENCE, USER};
use pinbuf_test_harness::support::view::{holds, DeviceView, Mapped};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "lifetime":
    mapping_keeps_it,
    duplicate_keeps_it,
    memory_unmapped,
    memory_dropped,
    hole_punched,
    file_truncated,
    memory_replaced,
    in_flight_between_processes,
    exec_closes_it,
    exec_keeps_it,
    maker_exits,
    maker_is_killed,
    created_while_unmapped within 120,
    killed_while_much_is_created,
    killed_while_creating within 120,
    module_in_use,
    module_goes_and_comes,
    root_alone_may_at_first,
}

fn mapping_keeps_it() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(20 * PAGE)?;
    let pins = kernel::pins()?;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(kernel::pins()?, pins + 20, "pinned pages");
    let (first, second) = (buffer.map()?, buffer.map_part(PAGE, PAGE)?);
    drop(buffer);
    check_eq!(kernel::pins()?, pins + 20, "pinned pages after close");
    first.set(PAGE, 1);
    check_eq!(memory.get(PAGE), 1, "what was written after close");
    drop(first);
    check_eq!(
        kernel::pins()?,
        pins + 20,
        "pinned pages with one mapping left"
    );
    check_eq!(second.get(0), 1, "the other mapping");
    drop(second);
    check_eq!(kernel::pins()?, pins, "pinned pages after all");
    Ok(())
}

fn duplicate_keeps_it() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let pins = kernel::pins()?;
    let buffer = device.create(&[memory.range()])?;
    let copy = Buffer::from_fd(buffer.as_fd().try_clone_to_owned()?);
    drop(buffer);
    check_eq!(
        kernel::pins()?,
        pins + 4,
        "pinned pages with a duplicate left"
    );
    check_eq!(
        device.describe(&copy)?.pages,
        4,
        "pages, as reported for the duplicate"
    );
    copy.map()?.set(0, 2);
    check_eq!(memory.get(0), 2, "what was written");
    drop(copy);
    check_eq!(kernel::pins()?, pins, "pinned pages after all");
    Ok(())
}

/// The buffer keeps its pages; the address maps something else now.
fn memory_unmapped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    memory.write(0, &pattern(1, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    memory.unmap(0, 16 * PAGE)?;
    memory.replace(0, 16 * PAGE)?;
    memory.write(0, &pattern(2, 0, 16 * PAGE));
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 1, 0, 16 * PAGE)?;
    mapped.write(0, &pattern(3, 0, 16 * PAGE));
    holds(&Mapped::of(&buffer, &memory), 2, 0, 16 * PAGE)
}

fn memory_dropped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    memory.write(0, &pattern(4, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    memory.advise(0, 16 * PAGE, libc::MADV_DONTNEED)?;
    for page in 0..16 {
        check_eq!(
            memory.get(page * PAGE + 8),
            0,
            "page {page}, which was dropped"
        );
    }
    holds(&Mapped::of(&buffer, &mapped), 4, 0, 16 * PAGE)?;
    memory.write(0, &pattern(5, 0, 16 * PAGE));
    holds(&Mapped::of(&buffer, &mapped), 4, 0, 16 * PAGE)?;
    // A new buffer has the new pages.
    let again = device.create(&[memory.range()])?;
    let mapped = again.map()?;
    holds(&Mapped::of(&again, &mapped), 5, 0, 16 * PAGE)
}

fn hole_punched() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(16 * PAGE, 0)?;
    let memory = Memory::shared(&file, 16 * PAGE)?;
    memory.write(0, &pattern(6, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    punch_hole(&file, 4 * PAGE, 8 * PAGE)?;
    check_eq!(memory.get(5 * PAGE), 0, "the hole");
    holds(&Mapped::of(&buffer, &mapped), 6, 0, 16 * PAGE)?;
    memory.set(5 * PAGE, 7);
    memory.set(15 * PAGE, 8);
    check_eq!(mapped.get(15 * PAGE), 8, "a page outside of the hole");
    check!(
        mapped.get(5 * PAGE) != 7,
        "the hole's new page is the buffer's"
    );
    Ok(())
}

fn file_truncated() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(16 * PAGE, 0)?;
    let memory = Memory::shared(&file, 16 * PAGE)?;
    memory.write(0, &pattern(9, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    nix::unistd::ftruncate(&file, 0)?;
    holds(&Mapped::of(&buffer, &mapped), 9, 0, 16 * PAGE)?;
    drop((file, memory));
    holds(&Mapped::of(&buffer, &mapped), 9, 0, 16 * PAGE)
}

fn memory_replaced() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(16 * PAGE)?;
    memory.write(0, &pattern(10, 0, 16 * PAGE));
    let buffer = device.create(&[memory.range()])?;
    let other = memfd(16 * PAGE, 0)?;
    memory.replace_by(0, 16 * PAGE, other.as_fd(), 0)?;
    memory.write(0, &pattern(11, 0, 16 * PAGE));
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::ToDevice)?.0;
    holds(&DeviceView::of(&importer, mapping), 10, 0, 16 * PAGE)
}

/// A descriptor in a socket's queue counts as well.
fn in_flight_between_processes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    memory.write(0, &pattern(12, 0, 4 * PAGE));
    let pins = kernel::pins()?;
    let link = Link::new()?;
    {
        let buffer = device.create(&[memory.range()])?;
        link.ours.send(buffer.as_fd())?;
        link.ours.send(buffer.as_fd())?;
    }
    check_eq!(kernel::pins()?, pins + 4, "pinned pages in flight");
    let buffer = Buffer::from_fd(link.theirs.receive()?);
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 12, 0, 4 * PAGE)?;
    drop((buffer, mapped));
    check_eq!(
        kernel::pins()?,
        pins + 4,
        "pinned pages with one still in flight"
    );
    drop(link);
    check_eq!(
        kernel::pins()?,
        pins,
        "pinned pages when the socket is gone"
    );
    Ok(())
}

/// What an executed program reports of the descriptor: it is open, or it is not.
const KEPT: i32 = 42;
const CLOSED: i32 = 43;

/// Runs as another program, which [`exec`] starts.
pub fn after_exec(fd: i32) -> Result<()> {
    // SAFETY: only asks whether it is open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        check_eq!(Errno::last(), Errno::EBADF, "the descriptor");
        std::process::exit(CLOSED);
    }
    // SAFETY: it is open, and no other code in this program knows it.
    let buffer = Buffer::from_fd(unsafe { OwnedFd::from_raw_fd(fd) });
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 13, 0, 8 * PAGE)?;
    check_eq!(kernel::vm_pin()?, 0, "VmPin after execve");
    std::process::exit(KEPT);
}

/// Makes a buffer and executes another program; returns its report.
fn exec(flags: u32) -> Result<i32> {
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(8 * PAGE)?;
        memory.write(0, &pattern(13, 0, 8 * PAGE));
        let buffer = device.create_with(&[memory.range()], flags)?;
        let fd = buffer.as_fd().as_raw_fd();
        let program = CString::new(
            std::env::current_exe()?
                .into_os_string()
                .into_encoded_bytes(),
        )?;
        let option = CString::new(format!("--after-exec={fd}"))?;
        match execv(&program, &[program.clone(), option])? {}
    })?;
    match child.end(PATIENCE)? {
        (WaitStatus::Exited(_, code), said) => {
            check!(code == KEPT || code == CLOSED, "exit code {code} {said}");
            Ok(code)
        }
        other => bail!("the child ended by {other:?}"),
    }
}

fn exec_closes_it() -> Result<()> {
    check_eq!(
        exec(pinbuf_uapi::CREATE_CLOEXEC)?,
        CLOSED,
        "the new program's descriptor"
    );
    Ok(())
}

/// The pages outlive the address space that they were pinned in.
fn exec_keeps_it() -> Result<()> {
    check_eq!(exec(0)?, KEPT, "the new program's descriptor");
    Ok(())
}

fn maker_exits() -> Result<()> {
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(64 * PAGE)?;
        memory.write(0, &pattern(14, 0, 64 * PAGE));
        let buffer = device.create(&[memory.range()])?;
        link.theirs.send(buffer.as_fd())
    })?;
    let buffer = Buffer::from_fd(link.ours.receive()?);
    child.join()?;
    let other = Memory::small_pages(512 * PAGE)?;
    other.write(0, &pattern(15, 0, 512 * PAGE));
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 14, 0, 64 * PAGE)?;
    mapped.write(0, &pattern(16, 0, 64 * PAGE));
    holds(&Mapped::of(&buffer, &other), 15, 0, 512 * PAGE)?;
    check_eq!(Device::open()?.describe(&buffer)?.pages, 64, "pages");
    Ok(())
}

fn maker_is_killed() -> Result<()> {
    let pins = kernel::pins()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(64 * PAGE)?;
        let buffer = device.create(&[memory.range()])?;
        let mapped = buffer.map()?;
        mapped.touch();
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        importer.map(Direction::Bidirectional)?;
        importer.vmap()?;
        link.theirs.signal()?;
        loop {
            std::thread::park();
        }
    })?;
    link.ours.wait()?;
    check_eq!(kernel::pins()?, pins + 64, "pinned pages while it runs");
    drop(child);
    check_eq!(kernel::pins()?, pins, "pinned pages after it was killed");
    Ok(())
}

/// Another thread unmaps the memory during the call: success or EFAULT, and nothing is lost.
fn created_while_unmapped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(256 * PAGE)?;
    let pins = kernel::pins()?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let result = std::thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| -> Result<()> {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                memory.unmap(100 * PAGE, 100 * PAGE)?;
                std::thread::yield_now();
                memory.replace(100 * PAGE, 100 * PAGE)?;
                memory.advise(0, 256 * PAGE, libc::MADV_DONTNEED)?;
            }
            Ok(())
        });
        let mut results = [0; 2];
        let mut outcome = Ok(());
        for _ in 0..80 {
            match device.create(&[memory.range()]) {
                Ok(_) => results[0] += 1,
                Err(Errno::EFAULT) => results[1] += 1,
                Err(error) => outcome = Err(error),
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        other.join().expect("a thread panicked")?;
        outcome.context("neither a buffer nor EFAULT")
    });
    result?;
    check_eq!(kernel::pins()?, pins, "pinned pages");
    Ok(())
}

/// A process that dies at any point of the call leaves nothing behind.
fn killed_while_creating() -> Result<()> {
    let pins = kernel::pins()?;
    for round in 0..20 {
        let link = Link::new()?;
        let child = Child::run(|| {
            let device = Device::open()?;
            let memory = Memory::small_pages(4096 * PAGE)?;
            link.theirs.signal()?;
            loop {
                drop(device.create(&[memory.range()])?);
                memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
            }
        })?;
        link.ours.wait()?;
        std::thread::sleep(Duration::from_micros(1700 * round));
        drop(child);
    }
    check_eq!(kernel::pins()?, pins, "pinned pages");
    Ok(())
}

/// A call over much memory that is all present, which never has to wait, ends soon after its process was
/// killed.
fn killed_while_much_is_created() -> Result<()> {
    const LEN: usize = 16 << 20;
    let memory = Memory::small_pages(LEN)?;
    memory.touch_to_write();
    // As often as a buffer may contain it, or as it takes a while.
    let total = usize::try_from(kernel::field("/proc/meminfo", "MemTotal")?)? * 1024;
    let most = (total / LEN).saturating_sub(1).min(256);
    let device = Device::open()?;
    let (mut ranges, mut whole) = (Vec::new(), Duration::ZERO);
    let time = |ranges: &[pinbuf_uapi::Range]| -> Result<Duration> {
        let start = Instant::now();
        drop(device.create(ranges)?);
        Ok(start.elapsed())
    };
    while whole < Duration::from_secs(1) && ranges.len() < most {
        ranges = vec![memory.range(); (2 * ranges.len()).clamp(8, most)];
        whole = time(&ranges)?;
    }
    // A call that was slow by chance says nothing of others.
    whole = whole.min(time(&ranges)?);
    // How long a process with the same memory takes from SIGKILL to its end.
    let end_of = |busy: bool| -> Result<Duration> {
        let link = Link::new()?;
        let child = Child::run(|| {
            // Pages that are shared with the parent would have to be copied first.
            memory.touch_to_write();
            link.theirs.signal()?;
            loop {
                if busy {
                    drop(device.create(&ranges)?);
                } else {
                    std::thread::sleep(PATIENCE);
                }
            }
        })?;
        link.ours.wait()?;
        std::thread::sleep(whole / 8);
        let start = Instant::now();
        child.kill(Signal::SIGKILL)?;
        let (status, _) = child.end(PATIENCE)?;
        check!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            "the child ended by {status:?}"
        );
        Ok(start.elapsed())
    };
    let (mut rest, mut idle) = (Duration::ZERO, Duration::ZERO);
    // Twice at most, as the machine may have other work.
    for _ in 0..2 {
        idle = end_of(false)?;
        rest = end_of(true)?;
        if rest < idle + whole / 2 {
            return Ok(());
        }
    }
    bail!(
        "a call that takes {whole:?} ended {rest:?} after SIGKILL, and a process without one {idle:?}"
    )
}

/// `rmmod`, without waiting.
fn remove_module() -> nix::Result<()> {
    delete_module(c"pinbuf", DeleteModuleFlags::O_NONBLOCK)
}

/// Where the module was loaded from, so that it can be loaded again.
fn load_module() -> Result<()> {
    let status = Command::new("modprobe")
        .arg("pinbuf")
        .status()
        .context("running modprobe")?;
    check!(status.success(), "modprobe pinbuf: {status}");
    Ok(())
}

/// The module stays while any part of it is in use.
fn module_in_use() -> Result<()> {
    let expect_busy = |what: &str| -> Result<()> {
        let result = remove_module();
        if result.is_ok() {
            load_module()?;
        }
        check_eq!(result, Err(Errno::EAGAIN), "rmmod with {what}");
        Ok(())
    };
    let device = Device::open()?;
    expect_busy("an open device")?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    drop(device);
    expect_busy("a buffer")?;
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    drop(buffer);
    expect_busy("a mapping and a device's")?;
    drop(mapped);
    expect_busy("a device's mapping")?;
    importer.write(mapping, 0, &pattern(17, 0, 4 * PAGE))?;
    drop(importer);
    let mut seen = vec![0; 4 * PAGE];
    memory.read(0, &mut seen);
    pinbuf_test_harness::support::view::same("the memory", 0, &seen, &pattern(17, 0, 4 * PAGE))
}

/// Without users it can be unloaded, and works when it is loaded again.
fn module_goes_and_comes() -> Result<()> {
    let parameters = ["allowance_mb", "allowance_system_mb", "pin_retries"];
    let path = |name| format!("/sys/module/pinbuf/parameters/{name}");
    let before = parameters.map(|name| kernel::read(path(name)).unwrap_or_default());
    for round in 0..3 {
        let result = remove_module();
        check_eq!(result, Ok(()), "rmmod in round {round}");
        check!(
            !std::path::Path::new(pinbuf_test_harness::support::device::PATH).exists(),
            "the device stayed"
        );
        load_module()?;
        for (name, value) in parameters.iter().zip(&before) {
            kernel::write(path(name), value.trim())?;
        }
        let device = Device::open()?;
        let flags = FdFlag::from_bits_truncate(fcntl(&device, FcntlArg::F_GETFD)?);
        check!(
            flags.contains(FdFlag::FD_CLOEXEC),
            "the device's descriptor is inherited"
        );
        let memory = Memory::anonymous(4 * PAGE)?;
        let buffer = device.create(&[memory.range()])?;
        buffer.map()?.set(0, 5);
        check_eq!(memory.get(0), 5, "what was written");
    }
    Ok(())
}

/// Until udev changes it, as it does by a rule that is installed: whoever loads the module lets nobody else use it, or
/// set its parameters, which have the values that the documentation names.
fn root_alone_may_at_first() -> Result<()> {
    let path = pinbuf_test_harness::support::device::PATH;
    check_eq!(remove_module(), Ok(()), "rmmod");
    load_module()?;
    let device = stat(path)?;
    check_eq!(
        (device.st_mode & 0o7777, device.st_uid, device.st_gid),
        (0o600, 0, 0),
        "mode, owner and group of the device"
    );
    for entry in std::fs::read_dir("/sys/module/pinbuf/parameters")? {
        let path = entry?.path();
        let found = stat(&path)?;
        check_eq!(
            (found.st_mode & 0o7777, found.st_uid),
            (0o644, 0),
            "mode and owner of {}",
            path.display()
        );
    }
    for (name, value) in [
        ("allowance_mb", 128),
        ("allowance_system_mb", 0),
        ("pin_retries", 10),
    ] {
        let found = kernel::number(format!("/sys/module/pinbuf/parameters/{name}"))?;
        check_eq!(found, value, "{name} by default");
    }
    in_child(|| {
        become_user(USER)?;
        let opened = std::fs::File::options().read(true).write(true).open(path);
        let error = opened.err().and_then(|error| error.raw_os_error());
        check_eq!(error, Some(libc::EACCES), "opened by a user");
        Ok(())
    })
}
