// SPDX-License-Identifier: MIT OR Apache-2.0

//! Discards that are rare, memory that only seems to be discarded, and what the mm core does to pinned
//! memory meanwhile.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::{ftruncate, Pid};
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Discard, Discards, STATE_DISCARDED};

use crate::discards::{
    buffer_of, forked_before, huge_file, is_gone, is_gone_or_unsure, transparent, COUNT, FOLIO,
    LEN, MADV_COLLAPSE,
};
use crate::poison::Broken;
use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::frames::{all_frames, flags, THP};
use pinbuf_test_harness::support::kernel::{
    needs_transparent_huge_pages, transparent_size, HugePool, Setting,
};
use pinbuf_test_harness::support::memory::{
    file_in, huge_memfd, memfd, pattern, punch_hole, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::process::{signal_of, Child, Link, PATIENCE};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "discards_more":
    executed,
    an_address_space_of_two,
    an_address_space_that_vhost_keeps,
    a_private_file_is_truncated,
    truncated_within_a_huge_page,
    parts_of_a_medium_folio,
    moved_and_kept_mapped,
    shrunk,
    locked_memory,
    system_v,
    a_file_system_is_unmounted,
    caches_are_dropped,
    written_by_a_debugger,
    moved_by_userfaultfd,
    some_pages_forked_before,
    huge_page_forked_before,
    hugetlb_forked_before,
    broken_private_page,
    broken_private_huge_page,
    broken_page_of_a_file,
    broken_hugetlb,
    nothing_is_lost_in_turmoil within 180,
    a_hole_ends_within_a_huge_page,
    partial_answers,
    longer_structs,
    info_with_old_answers,
    a_list_that_waits,
}

/// Waits until all of the buffer is gone.
fn is_gone_soon(device: &Device, buffer: &Buffer) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while device.describe(buffer)?.discarded_bytes < buffer.len()? as u64 {
        if Instant::now() > deadline {
            bail!("{:?}", device.describe(buffer)?);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// What is reported of the buffer.
fn reported(device: &Device, buffer: &Buffer) -> Result<Vec<Discard>> {
    device.discards(buffer, 64)
}

/// `execve` takes the memory away while the process goes on.
fn executed() -> Result<()> {
    let device = Device::open()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(LEN)?;
        memory.touch_to_write();
        let buffer = device.create(&[memory.range()])?;
        link.theirs.send(buffer.as_fd())?;
        link.theirs.wait()?;
        nix::unistd::execv(c"/bin/sleep", &[c"sleep", c"100"])?;
        Ok(())
    })?;
    let buffer = Buffer::from_fd(link.ours.receive()?);
    is_gone(&device, &buffer, &[])?;
    link.ours.signal()?;
    is_gone_soon(&device, &buffer)?;
    child.kill(Signal::SIGKILL)?;
    child.end(PATIENCE)?;
    Ok(())
}

/// The process that made the buffer ends; one that shares its address space (`CLONE_VM`) has the memory.
fn an_address_space_of_two() -> Result<()> {
    extern "C" fn pause(_: *mut libc::c_void) -> libc::c_int {
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    }
    let device = Device::open()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(LEN)?;
        memory.touch_to_write();
        let buffer = device.create(&[memory.range()])?;
        let stack = Memory::anonymous(64 * PAGE)?;
        // SAFETY: the new task has a stack of its own, and only waits.
        let other = unsafe {
            libc::clone(
                pause,
                stack.at(60 * PAGE).cast(),
                libc::CLONE_VM | libc::SIGCHLD,
                std::ptr::null_mut(),
            )
        };
        Errno::result(other).context("clone")?;
        link.theirs.say(other as u64)?;
        link.theirs.send(buffer.as_fd())?;
        // SAFETY: ends this process, and leaves its memory to the other.
        unsafe { libc::_exit(0) }
    })?;
    let other = Pid::from_raw(link.ours.hear()? as i32);
    let buffer = Buffer::from_fd(link.ours.receive()?);
    child.join()?;
    let seen = is_gone(&device, &buffer, &[]);
    kill(other, Signal::SIGKILL)?;
    seen?;
    is_gone_soon(&device, &buffer)
}

/// The kernel keeps the address space of a process that has ended for a vhost device, which uses it.
fn an_address_space_that_vhost_keeps() -> Result<()> {
    const SET_OWNER: u32 = 0xaf01;
    let device = Device::open()?;
    let status = std::process::Command::new("modprobe")
        .args(["--quiet", "vhost_vsock"])
        .status()?;
    if !status.success() {
        let release = kernel::read("/proc/sys/kernel/osrelease")?;
        bail!(Skip(format!(
            "the kernel {} has no vhost_vsock",
            release.trim()
        )));
    }
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let memory = Memory::small_pages(LEN)?;
        memory.touch_to_write();
        let buffer = device.create(&[memory.range()])?;
        let vhost = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-vsock")?;
        ioctl(&vhost, SET_OWNER, 0)?;
        link.theirs.send(buffer.as_fd())?;
        link.theirs.send(vhost.as_fd())?;
        link.theirs.wait()?;
        // It ends with the memory mapped.
        std::mem::forget(memory);
        Ok(())
    })?;
    let buffer = Buffer::from_fd(link.ours.receive()?);
    let vhost = link.ours.receive()?;
    link.ours.signal()?;
    child.join()?;
    // Its process has ended: only a kernel thread still uses the memory.
    is_gone(&device, &buffer, &[])?;
    drop(vhost);
    is_gone_soon(&device, &buffer)
}

/// Truncation takes the copies of private mappings away as well; a hole does not.
fn a_private_file_is_truncated() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::private(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    ftruncate(&file, 6 * PAGE as i64)?;
    is_gone(&device, &buffer, &[(6, COUNT - 6)])?;
    ftruncate(&file, LEN as i64)?;
    memory.touch_to_write();
    is_gone(&device, &buffer, &[(6, COUNT - 6)])
}

/// A truncation that ends within a huge page clears the rest of it and leaves it in the file: when the file
/// grows again, it is the same memory.
fn truncated_within_a_huge_page() -> Result<()> {
    let device = Device::open()?;
    let (file, memory, buffer, _setting) = huge_file(&device, 1)?;
    ftruncate(&file, 8 * PAGE as i64)?;
    let mapped = buffer.map()?;
    check_eq!(mapped.get(9 * PAGE), 0, "the buffer beyond the end");
    let other = Memory::shared(&file, HUGE)?;
    let signal = signal_of(|| {
        std::hint::black_box(other.get(9 * PAGE));
    })?;
    println!(
        "# beyond the end of the file: {signal:?}, reported {:?}",
        reported(&device, &buffer)?
    );
    ftruncate(&file, HUGE as i64)?;
    mapped.set(9 * PAGE, 5);
    check_eq!(memory.get(9 * PAGE), 5, "the memory");
    check_eq!(other.get(9 * PAGE), 5, "the memory, mapped elsewhere");
    is_gone(&device, &buffer, &[])
}

/// Two holes that meet within a huge page, as large as that together.
fn a_hole_ends_within_a_huge_page() -> Result<()> {
    let device = Device::open()?;
    let (file, memory, buffer, _setting) = huge_file(&device, 1)?;
    punch_hole(&file, 0, 100 * PAGE)?;
    punch_hole(&file, 100 * PAGE, HUGE - 100 * PAGE)?;
    is_gone(&device, &buffer, &[])?;
    let mapped = buffer.map()?;
    for page in 0..FOLIO {
        check_eq!(mapped.get(page * PAGE), 0, "page {page}");
        mapped.set(page * PAGE, page as u64);
        check_eq!(memory.get(page * PAGE), page as u64, "page {page}");
    }
    Ok(())
}

/// Folios between a page and a huge page are always mapped by the page.
fn parts_of_a_medium_folio() -> Result<()> {
    const MEDIUM: usize = 16;
    needs_transparent_huge_pages()?;
    let _setting = Setting::choice(transparent_size(MEDIUM * PAGE), "always")?;
    let device = Device::open()?;
    let flags_ = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let len = 4 * MEDIUM * PAGE;
    let memory = Memory::map_aligned(len, MEDIUM * PAGE, RW, flags_, None, 0)?;
    memory.touch_to_write();
    let buffer = device.create(&[memory.range()])?;
    check!(
        flags(all_frames(&memory)?[3])? & THP != 0,
        "there is no folio of 64 KiB"
    );
    let all = [(0, 4 * MEDIUM)];
    is_gone_or_unsure(&device, &buffer, &[], &all)?;
    memory.advise(3 * PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
    memory.unmap((MEDIUM - 1) * PAGE, 3 * PAGE)?;
    is_gone_or_unsure(&device, &buffer, &[(3, 2), (MEDIUM - 1, 3)], &all)?;
    memory.advise(2 * MEDIUM * PAGE, MEDIUM * PAGE, libc::MADV_DONTNEED)?;
    let parts = [(3, 2), (MEDIUM - 1, 3), (2 * MEDIUM, MEDIUM)];
    let others = [(0, 2 * MEDIUM), (3 * MEDIUM, MEDIUM)];
    is_gone_or_unsure(&device, &buffer, &parts, &others)
}

/// `MREMAP_DONTUNMAP` leaves an empty mapping behind.
fn moved_and_kept_mapped() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    // SAFETY: moves the pages of the test's own mapping to a new one.
    let moved = unsafe {
        let hint = std::ptr::null_mut::<libc::c_void>();
        libc::mremap(memory.at(0).cast(), LEN, LEN, flags, hint)
    };
    check!(moved != libc::MAP_FAILED, "mremap: {}", Errno::last());
    memory.touch_to_write();
    is_gone(&device, &buffer, &[])?;
    // SAFETY: the new mapping, which nothing uses.
    Errno::result(unsafe { libc::munmap(moved, LEN) })?;
    is_gone(&device, &buffer, &[(0, COUNT)])
}

/// `mremap` to a smaller size.
fn shrunk() -> Result<()> {
    let device = Device::open()?;
    let mut memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.remap(5 * PAGE, 0)?;
    is_gone(&device, &buffer, &[(5, COUNT - 5)])
}

fn locked_memory() -> Result<()> {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    // SAFETY: locks the test's own mapping.
    Errno::result(unsafe { libc::mlock(memory.at(0).cast(), LEN) })?;
    is_gone(&device, &buffer, &[])?;
    memory.advise(PAGE, PAGE, MADV_DONTNEED_LOCKED)?;
    is_gone(&device, &buffer, &[(1, 1)])
}

/// A removed segment exists as long as it is attached.
fn system_v() -> Result<()> {
    let device = Device::open()?;
    // SAFETY: a new segment.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, LEN, 0o600) };
    Errno::result(id).context("shmget")?;
    // SAFETY: attached anywhere.
    let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    check!(address as isize != -1, "shmat: {}", Errno::last());
    let range = pinbuf_uapi::Range {
        addr: address as u64,
        len: LEN as u64,
    };
    let buffer = device.create(&[range])?;
    is_gone(&device, &buffer, &[])?;
    // SAFETY: nothing uses the segment.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    is_gone(&device, &buffer, &[])?;
    // SAFETY: as above.
    Errno::result(unsafe { libc::shmdt(address) })?;
    is_gone(&device, &buffer, &[(0, COUNT)])
}

/// A tmpfs that is unmounted while files on it are open.
fn a_file_system_is_unmounted() -> Result<()> {
    let device = Device::open()?;
    let directory = std::env::temp_dir().join(format!("pinbuf-tmpfs-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let none = None::<&str>;
    mount(none, &directory, Some("tmpfs"), MsFlags::empty(), none)?;
    let file = file_in(&directory, LEN)?;
    let named = directory.join("named");
    std::fs::write(&named, pattern(1, 0, LEN))?;
    let named = std::fs::File::options()
        .read(true)
        .write(true)
        .open(named)?;
    let buffers = [
        buffer_of(&device, &Memory::shared(&file, LEN)?)?,
        buffer_of(&device, &Memory::shared(&named, LEN)?)?,
    ];
    umount2(&directory, MntFlags::MNT_DETACH)?;
    std::fs::remove_dir(&directory)?;
    for buffer in &buffers {
        is_gone(&device, buffer, &[])?;
    }
    drop((file, named));
    for buffer in &buffers {
        is_gone_soon(&device, buffer)?;
    }
    Ok(())
}

fn caches_are_dropped() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let shared = Memory::shared(&file, LEN)?;
    // Pages that were only read are clean.
    shared.touch();
    let memories = [shared, Memory::small_pages(LEN)?];
    memories[1].touch_to_write();
    let all: Vec<_> = memories.iter().map(Memory::range).collect();
    let buffer = device.create(&all)?;
    kernel::write("/proc/sys/vm/drop_caches", 3)?;
    kernel::write("/proc/sys/vm/compact_memory", 1)?;
    is_gone(&device, &buffer, &[])
}

/// A debugger writes to memory that is read-only, and so to the pinned page.
fn written_by_a_debugger() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    for memory in [Memory::small_pages(LEN)?, Memory::private(&file, LEN)?] {
        let link = Link::new()?;
        let child = Child::run(|| {
            let buffer = buffer_of(&Device::open()?, &memory)?;
            memory.protect(0, LEN, libc::PROT_READ)?;
            link.theirs.send(buffer.as_fd())?;
            link.theirs.wait_for_ever()?;
            link.theirs.wait()
        })?;
        let buffer = Buffer::from_fd(link.ours.receive()?);
        let mapped = buffer.map()?;
        let pid = child.pid().as_raw();
        let debug = |request, address: u64, word: u64| {
            // SAFETY: of a child that waits, in memory that nothing else uses.
            Errno::result(unsafe { libc::ptrace(request, pid, address, word) })
        };
        debug(libc::PTRACE_ATTACH, 0, 0).context("attaching")?;
        let mut status = 0;
        // SAFETY: the status is written to a variable.
        Errno::result(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) })?;
        for page in 0..COUNT {
            let address = memory.addr() + (page * PAGE) as u64;
            debug(libc::PTRACE_POKEDATA, address, 7).context("writing")?;
        }
        debug(libc::PTRACE_DETACH, 0, 0).context("detaching")?;
        for page in 0..COUNT {
            check_eq!(mapped.get(page * PAGE), 7, "page {page}");
        }
        is_gone(&device, &buffer, &[])?;
        link.ours.signal()?;
        child.join()?;
    }
    Ok(())
}

/// `UFFDIO_MOVE` does not take pinned pages.
fn moved_by_userfaultfd() -> Result<()> {
    let device = Device::open()?;
    let huge = transparent(&device, 1)?;
    let small = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &small)?;
    for (memory, buffer) in [(&small, &buffer), (&huge.0, &huge.1)] {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let target = Memory::map_aligned(memory.len(), HUGE, RW, flags, None, 0)?;
        let moved = Faults::of(&target, Mode::Missing)?
            .move_pages(target.addr(), memory.addr(), memory.len())
            .map_err(|error| error.downcast::<Errno>());
        check!(
            matches!(moved, Err(Ok(Errno::EBUSY))),
            "UFFDIO_MOVE: expected EBUSY, seen {moved:?}"
        );
        is_gone(&device, buffer, &[])?;
        let mapped = buffer.map()?;
        mapped.set(PAGE, 77);
        check_eq!(memory.get(PAGE), 77, "the memory");
    }
    Ok(())
}

/// A fork shares some pages of a folio before the buffer is made: those are copied for it, the child keeps
/// them, and none of it confuses what is the owner's.
fn some_pages_forked_before() -> Result<()> {
    let device = Device::open()?;
    needs_transparent_huge_pages()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    memory.touch_to_write();
    memory.advise(0, HUGE / 2, libc::MADV_DONTFORK)?;
    let discard = || {
        memory.advise(10 * PAGE, 5 * PAGE, libc::MADV_DONTNEED)?;
        Ok(memory.advise(HUGE / 2 + 10 * PAGE, 5 * PAGE, libc::MADV_DONTNEED)?)
    };
    let parts = [(10, 5), (FOLIO / 2 + 10, 5)];
    // The others are copies.
    forked_before(&device, &memory, discard, &parts, &[(0, FOLIO / 2)])
}

/// The child keeps the huge page mapped that the parent had; the buffer has copies.
fn huge_page_forked_before() -> Result<()> {
    let device = Device::open()?;
    needs_transparent_huge_pages()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    memory.touch_to_write();
    let discard = || Ok(memory.advise(0, HUGE, libc::MADV_DONTNEED)?);
    forked_before(&device, &memory, discard, &[(0, FOLIO)], &[])?;
    // And after it: the child has copies, and the parent unmaps its pages.
    let (memory, buffer) = transparent(&device, 1)?;
    let link = Link::new()?;
    let child = Child::run(|| link.theirs.wait())?;
    // To copy its pages, the fork splits the parent's mapping of the huge page.
    is_gone_or_unsure(&device, &buffer, &[], &[(0, FOLIO)])?;
    memory.unmap(0, HUGE)?;
    is_gone(&device, &buffer, &[(0, FOLIO)])?;
    link.ours.signal()?;
    child.join()
}

fn hugetlb_forked_before() -> Result<()> {
    let _pool = HugePool::with_free(6)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    memory.touch_to_write();
    let discard = || Ok(memory.advise(0, HUGE, libc::MADV_DONTNEED)?);
    forked_before(&device, &memory, discard, &[(0, FOLIO)], &[])
}

fn broken_private_page() -> Result<()> {
    let mut broken = Broken::none()?;
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    broken.add(&memory, 5 * PAGE)?;
    let signal = signal_of(|| {
        std::hint::black_box(memory.get(5 * PAGE));
    })?;
    println!("# {signal:?}, reported {:?}", reported(&device, &buffer)?);
    check_eq!(signal, Some(Signal::SIGBUS), "the owner's access");
    is_gone(&device, &buffer, &[(5, 1)])
}

fn broken_private_huge_page() -> Result<()> {
    let mut broken = Broken::none()?;
    let device = Device::open()?;
    let (memory, buffer) = transparent(&device, 1)?;
    broken.add(&memory, 5 * PAGE)?;
    println!("# reported {:?}", reported(&device, &buffer)?);
    is_gone(&device, &buffer, &[])
}

fn broken_page_of_a_file() -> Result<()> {
    let mut broken = Broken::none()?;
    let device = Device::open()?;
    let file = memfd(LEN, 0)?;
    let memory = Memory::shared(&file, LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    broken.add(&memory, 5 * PAGE)?;
    let signal = signal_of(|| {
        std::hint::black_box(memory.get(5 * PAGE));
    })?;
    println!("# {signal:?}, reported {:?}", reported(&device, &buffer)?);
    check_eq!(signal, Some(Signal::SIGBUS), "the owner's access");
    // It still belongs to the file.
    is_gone(&device, &buffer, &[])
}

fn broken_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(6)?;
    let device = Device::open()?;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    for shared in [false, true] {
        let mut broken = Broken::none()?;
        let memory = if shared {
            Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE)?
        } else {
            Memory::map(2 * HUGE, RW, private, None, 0)?
        };
        let buffer = buffer_of(&device, &memory)?;
        broken.add(&memory, HUGE + 5 * PAGE)?;
        let signal = signal_of(|| {
            std::hint::black_box(memory.get(HUGE + PAGE));
        })?;
        println!("# {signal:?}, reported {:?}", reported(&device, &buffer)?);
        check_eq!(signal, Some(Signal::SIGBUS), "the owner's access");
        if shared {
            is_gone(&device, &buffer, &[])?;
        } else {
            is_gone(&device, &buffer, &[(FOLIO, FOLIO)])?;
        }
        drop((memory, buffer));
    }
    Ok(())
}

/// Whatever the kernel and the program do to memory that the program keeps, no part of it is ever
/// reported as discarded.
fn nothing_is_lost_in_turmoil() -> Result<()> {
    const TIME: Duration = Duration::from_secs(3);
    let device = Device::open()?;
    let (mut huge, huge_buffer) = transparent(&device, 2)?;
    let mut small = Memory::small_pages(4 * LEN)?;
    let small_buffer = buffer_of(&device, &small)?;
    let (file, shared, shared_buffer, _setting) = huge_file(&device, 1)?;
    let may_be_unsure = !kernel::has_page_mapcounts()?;
    let end = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| -> Result<u64> {
        let poll = scope.spawn(|| -> Result<u64> {
            let mut asked = 0;
            while !end.load(Ordering::Relaxed) {
                let buffers = [
                    (&huge_buffer, may_be_unsure),
                    (&small_buffer, false),
                    (&shared_buffer, false),
                ];
                for (buffer, may_be_unsure) in buffers {
                    let seen = reported(&device, buffer)?;
                    let lost = seen.iter().find(|part| part.state == STATE_DISCARDED);
                    check!(lost.is_none(), "after {asked} calls: {lost:?}");
                    check!(may_be_unsure || seen.is_empty(), "{seen:?}");
                    asked += 1;
                }
            }
            Ok(asked)
        });
        let begin = Instant::now();
        let mut round = 0usize;
        let turmoil = || -> Result<()> {
            while begin.elapsed() < TIME && !poll.is_finished() {
                let page = round * 7 % FOLIO;
                huge.protect(page * PAGE, PAGE, libc::PROT_READ)?;
                huge.protect(page * PAGE, PAGE, RW)?;
                let _ = huge.advise(0, HUGE, MADV_COLLAPSE);
                let _ = shared.advise(0, HUGE, MADV_COLLAPSE);
                for memory in [&huge, &small, &shared] {
                    memory.advise(0, memory.len(), libc::MADV_COLD)?;
                    memory.advise(0, memory.len(), libc::MADV_PAGEOUT)?;
                }
                if round % 3 == 0 {
                    small.advise(0, small.len(), libc::MADV_FREE)?;
                    small.advise(0, small.len(), libc::MADV_PAGEOUT)?;
                }
                for memory in [&mut huge, &mut small] {
                    let len = memory.len();
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    let align = if round % 2 == 0 { HUGE } else { PAGE };
                    let target =
                        Memory::map_congruent(len, HUGE, align % HUGE, RW, flags, None, 0)?;
                    memory.remap_onto(target, 0)?;
                }
                if round % 8 == 0 {
                    kernel::write("/proc/sys/vm/compact_memory", 1)?;
                    kernel::write("/proc/sys/vm/drop_caches", 1)?;
                }
                if round % 4 == 0 {
                    Child::run(|| {
                        huge.touch_to_write();
                        small.touch_to_write();
                        Ok(())
                    })?
                    .join()?;
                }
                punch_hole(&file, page.max(1) * PAGE, PAGE)?;
                huge.touch_to_write();
                small.touch_to_write();
                round += 1;
            }
            Ok(())
        };
        let mut turmoil = turmoil;
        let done = turmoil();
        end.store(true, Ordering::Relaxed);
        let asked = match poll.join() {
            Ok(result) => result?,
            Err(_) => bail!("the thread that asks panicked"),
        };
        done?;
        println!("# {round} rounds");
        Ok(asked)
    })?;
    println!("# asked {asked} times");
    Ok(())
}

/// A call that fails in the middle of its list, or at its end, leaves the struct as it was, so that a caller
/// can repeat it.
fn partial_answers() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    for page in [1, 4, 9] {
        memory.advise(page * PAGE, PAGE, libc::MADV_DONTNEED)?;
    }
    let lists = Memory::anonymous(2 * PAGE)?;
    lists.touch_to_write();
    lists.unmap(PAGE, PAGE)?;
    let element = size_of::<Discard>();
    let mut call = Discards {
        size: size_of::<Discards>() as u32,
        fd: buffer.as_fd().as_raw_fd(),
        offset: 0,
        list: lists.addr() + (PAGE - 2 * element - 8) as u64,
        count: 3,
        reserved: 0,
    };
    let before = call;
    check_eq!(
        device.discards_raw(&mut call),
        Err(Errno::EFAULT),
        "a list that ends"
    );
    check_eq!(call, before, "the struct");
    check_eq!(
        lists.get(PAGE - 2 * element - 8),
        PAGE as u64,
        "the first element"
    );
    // With room for two it works, and goes on with the third.
    call.count = 2;
    device.discards_raw(&mut call)?;
    check_eq!(
        (call.count, call.offset),
        (2, 9 * PAGE as u64),
        "two of three"
    );
    call.count = 5;
    device.discards_raw(&mut call)?;
    check_eq!((call.count, call.offset), (1, LEN as u64), "the third");
    // The struct cannot be written: the list has been filled in all the same.
    let fixed = Memory::anonymous(PAGE)?;
    let bytes = bytes_of(&Discards {
        count: 1,
        offset: 0,
        ..before
    });
    fixed.write(0, &bytes);
    fixed.protect(0, PAGE, libc::PROT_READ)?;
    let failed = ioctl(&device, pinbuf_uapi::DISCARDS, fixed.addr());
    check_eq!(
        failed.err(),
        Some(Errno::EFAULT),
        "a struct that cannot be written"
    );
    Ok(())
}

/// A caller with a later version of the struct.
fn longer_structs() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    let place = Memory::anonymous(2 * PAGE)?;
    let known = size_of::<Discards>();
    for (size, tail, expected) in [
        (known + 8, 0, None),
        (known + 1, 0, None),
        (PAGE, 0, None),
        (PAGE + 1, 0, Some(Errno::E2BIG)),
        (known + 8, 1, Some(Errno::E2BIG)),
        (known - 1, 0, Some(Errno::EINVAL)),
        (0, 0, Some(Errno::EINVAL)),
        (usize::try_from(u32::MAX)?, 0, Some(Errno::E2BIG)),
    ] {
        let call = Discards {
            size: u32::try_from(size)?,
            fd: buffer.as_fd().as_raw_fd(),
            ..Discards::default()
        };
        place.write(0, &bytes_of(&call));
        place.set(known, tail);
        let result = ioctl(&device, pinbuf_uapi::DISCARDS, place.addr());
        check_eq!(result.err(), expected, "size {size}, tail {tail}");
        if expected.is_none() {
            let first = place.get(0) as u32;
            check_eq!(first as usize, known, "the kernel's size");
            check_eq!(place.get(8), LEN as u64, "the end");
            check_eq!(place.get(known), 0, "the tail");
        }
    }
    Ok(())
}

/// The struct of the previous call can be used again, with the fields that the kernel filled in.
fn info_with_old_answers() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(0, PAGE, libc::MADV_DONTNEED)?;
    let mut info = device.describe(&buffer)?;
    let before = info;
    (info.state, info.unsure_bytes, info.discarded_bytes) = (u64::MAX, u64::MAX, u64::MAX);
    ioctl(
        &device,
        pinbuf_uapi::INFO,
        std::ptr::from_mut(&mut info) as u64,
    )?;
    check_eq!(info, before, "what is described");
    Ok(())
}

/// A list whose memory waits for a userfaultfd blocks no user of the buffer, and its caller can be killed.
fn a_list_that_waits() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(LEN)?;
    let buffer = buffer_of(&device, &memory)?;
    memory.advise(0, PAGE, libc::MADV_DONTNEED)?;
    let child = Child::run(|| {
        let list = Memory::anonymous(PAGE)?;
        let _faults = Faults::of(&list, Mode::Missing)?;
        let mut call = Discards {
            size: size_of::<Discards>() as u32,
            fd: buffer.as_fd().as_raw_fd(),
            offset: 0,
            list: list.addr(),
            count: 1,
            reserved: 0,
        };
        device.discards_raw(&mut call)?;
        bail!("the call returned")
    })?;
    std::thread::sleep(Duration::from_millis(300));
    is_gone(&device, &buffer, &[(0, 1)])?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    importer.unmap(importer.map(Direction::Bidirectional)?.0)?;
    buffer.map()?.touch();
    drop((importer, buffer));
    child.kill(Signal::SIGKILL)?;
    let (status, said) = child.end(PATIENCE)?;
    check!(
        matches!(status, nix::sys::wait::WaitStatus::Signaled(..)),
        "{status:?}: {said}"
    );
    Ok(())
}

/// A struct as it lies in memory.
pub(crate) fn bytes_of(call: &Discards) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&call.size.to_ne_bytes());
    bytes.extend_from_slice(&call.fd.to_ne_bytes());
    bytes.extend_from_slice(&call.offset.to_ne_bytes());
    bytes.extend_from_slice(&call.list.to_ne_bytes());
    bytes.extend_from_slice(&call.count.to_ne_bytes());
    bytes.extend_from_slice(&call.reserved.to_ne_bytes());
    bytes
}
