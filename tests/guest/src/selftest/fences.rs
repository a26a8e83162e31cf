// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that are still at work: the CPU's access begins after they are done, and sees what they have
//! written.
//!
//! vgem makes fences that a program signals. They are put into a buffer by a sync file.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::WaitStatus;
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::device::{sync_once, sync_raw};
use pinbuf_test_harness::support::memory::{pattern, PAGE};
use pinbuf_test_harness::support::process::Child;
use pinbuf_test_harness::support::vgem::{self, Fence, Vgem, SYNC_READ, SYNC_WRITE};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Skip, Sync};
use pinbuf_test_harness::tests;

use crate::importer::memory_to_bounce;

tests! { "fences":
    an_access_waits_for_a_device,
    a_read_does_not_wait_for_a_device_that_reads,
    an_access_that_waits_can_be_interrupted,
    an_access_that_waits_can_be_killed,
    an_access_that_waits_holds_up_no_other,
    a_fence_outlives_the_buffer,
}

/// The flag of `DMA_BUF_IOCTL_SYNC` for the end of an access.
const END: u64 = 4;

/// A fence in a buffer, as of a device that writes to it.
fn writes_to<'a>(vgem: &'a Vgem, buffer: BorrowedFd<'_>) -> Result<Fence<'a>> {
    vgem.uses(buffer, SYNC_WRITE)
}

/// A device that has a copy of the memory writes late: an access of any kind that begins meanwhile waits for
/// it, and then for its copy to be copied back.
fn an_access_waits_for_a_device() -> Result<()> {
    const LEN: usize = 4 * PAGE;
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let (memory, ranges) = memory_to_bounce(4)?;
    let buffer = Device::open()?.create(&ranges)?;
    // A device with wide addresses has the memory itself, if nothing is bounced at all.
    let narrow = Limits {
        mask_bits: 32,
        max_segment: 0,
    };
    for direction in [Direction::FromDevice, Direction::Bidirectional] {
        let importer = Importer::attach(buffer.as_fd(), narrow)?;
        let slots = kernel::bounce_slots()?;
        let mapping = importer.map(direction)?.0;
        check!(kernel::bounce_slots()? > slots, "nothing was bounced");
        for (seed, access) in [(1, Sync::Read), (2, Sync::Write), (3, Sync::ReadWrite)] {
            let fence = writes_to(&vgem, buffer.as_fd())?;
            let begun = AtomicBool::new(false);
            let seen = std::thread::scope(|scope| -> Result<Vec<u8>> {
                let cpu = scope.spawn(|| read(&buffer, access, &begun));
                std::thread::sleep(Duration::from_millis(200));
                check!(!begun.load(Ordering::Relaxed), "{access:?} did not wait");
                importer.write(mapping, 0, &pattern(seed, 0, LEN))?;
                fence.signal()?;
                cpu.join().map_err(|_| anyhow::anyhow!("the thread"))?
            })?;
            check_eq!(
                seen == pattern(seed, 0, LEN),
                true,
                "whether {access:?} sees what the device wrote, {direction:?}"
            );
        }
    }
    drop(memory);
    Ok(())
}

/// While a device reads, a read access begins at once, and a write access waits.
fn a_read_does_not_wait_for_a_device_that_reads() -> Result<()> {
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let (_memory, buffer) = &page()?;
    for access in [Sync::Read, Sync::Write, Sync::ReadWrite] {
        let fence = vgem.uses(buffer.as_fd(), SYNC_READ)?;
        let (say, hear) = mpsc::channel();
        std::thread::scope(|scope| -> Result<()> {
            scope.spawn(move || say.send(sync_raw(buffer, access as u64)));
            if access == Sync::Read {
                // vgem gives a fence up after ten seconds.
                hear.recv_timeout(Duration::from_secs(5))
                    .context("a read access waits for a device that reads")??;
                return fence.signal();
            }
            let early = hear.recv_timeout(Duration::from_millis(200));
            check!(early.is_err(), "{access:?} did not wait");
            fence.signal()?;
            hear.recv().context("the thread")?.context("sync")
        })?;
    }
    Ok(())
}

/// A buffer of a page.
fn page() -> Result<(Memory, Buffer)> {
    let memory = Memory::anonymous(PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    Ok((memory, buffer))
}

/// A signal with a handler ends the wait for a device: the call is made again if the handler was installed with
/// SA_RESTART, and fails with `EINTR` otherwise.
fn an_access_that_waits_can_be_interrupted() -> Result<()> {
    extern "C" fn notice(_: libc::c_int) {}
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let (_memory, buffer) = &page()?;
    for (flags, expected) in [
        (SaFlags::empty(), Err(Errno::EINTR)),
        (SaFlags::SA_RESTART, Ok(())),
    ] {
        let handler = SigHandler::Handler(notice);
        let action = SigAction::new(handler, flags, SigSet::empty());
        // SAFETY: the handler does nothing.
        let before = unsafe { sigaction(Signal::SIGUSR1, &action) }?;
        let fence = writes_to(&vgem, buffer.as_fd())?;
        let (say, hear) = mpsc::channel();
        let result = std::thread::scope(|scope| -> Result<nix::Result<()>> {
            scope.spawn(move || {
                // SAFETY: a call without conditions.
                let thread = unsafe { libc::pthread_self() };
                let _ = say.send((thread, None));
                let result = sync_once(buffer, Sync::Read as u64);
                let _ = say.send((thread, Some(result)));
            });
            let (thread, _) = hear.recv()?;
            std::thread::sleep(Duration::from_millis(200));
            // SAFETY: it still runs, as the fence has not been signalled.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            let soon = hear.recv_timeout(Duration::from_millis(500));
            fence.signal()?;
            let (_, result) = soon.or_else(|_| hear.recv())?;
            result.context("no result")
        })?;
        check_eq!(result, expected, "a signal during the wait, {flags:?}");
        // SAFETY: what was there before.
        unsafe { sigaction(Signal::SIGUSR1, &before) }?;
    }
    Ok(())
}

/// SIGKILL ends the wait for a device that is not done.
fn an_access_that_waits_can_be_killed() -> Result<()> {
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let (_memory, buffer) = page()?;
    for access in [Sync::Read, Sync::Write, Sync::ReadWrite] {
        let fence = writes_to(&vgem, buffer.as_fd())?;
        let child = Child::run(|| sync_raw(&buffer, access as u64).context("sync"))?;
        std::thread::sleep(Duration::from_millis(200));
        child.kill(Signal::SIGKILL)?;
        // vgem gives a fence up after ten seconds.
        let (status, said) = child.end(Duration::from_secs(5))?;
        check!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            "{access:?}: {status:?} {said}"
        );
        fence.signal()?;
    }
    Ok(())
}

/// While an access waits for a device that writes, others end, devices map and unmap, and PINBUF_INFO answers.
fn an_access_that_waits_holds_up_no_other() -> Result<()> {
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let device = &Device::open()?;
    let (_memory, buffer) = &page()?;
    let importer = &Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::ToDevice)?.0;
    sync_raw(buffer, Sync::ReadWrite as u64)?;
    let fence = writes_to(&vgem, buffer.as_fd())?;
    let (say, hear) = mpsc::channel();
    let (begun, waiter) = mpsc::channel();
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(move || begun.send(sync_raw(buffer, Sync::Read as u64)));
        let early = waiter.recv_timeout(Duration::from_millis(100));
        check!(early.is_err(), "the access did not wait");
        scope.spawn(move || {
            let act = || -> Result<u32> {
                sync_raw(buffer, Sync::ReadWrite as u64 | END).context("the end of an access")?;
                let second = importer.map(Direction::ToDevice).context("map")?.0;
                let mappings = device.describe(buffer)?.mappings;
                importer.unmap(second).context("unmap")?;
                Ok(mappings)
            };
            say.send(act())
        });
        // vgem gives a fence up after ten seconds.
        let others = hear.recv_timeout(Duration::from_secs(3));
        let early = waiter.try_recv();
        fence.signal()?;
        let mappings = others.context("others wait with the access")??;
        check_eq!(mappings, 2, "mappings");
        check!(early.is_err(), "the access did not wait for the device");
        waiter.recv().context("the thread")?.context("sync")
    })?;
    sync_raw(buffer, Sync::Read as u64 | END)?;
    importer.unmap(mapping)?;
    Ok(())
}

/// What an access of the CPU sees.
fn read(buffer: &Buffer, access: Sync, begun: &AtomicBool) -> Result<Vec<u8>> {
    let mapped = buffer.map()?;
    let mut seen = vec![0; mapped.len()];
    buffer.synced(access, || {
        begun.store(true, Ordering::Relaxed);
        mapped.read(0, &mut seen);
    })?;
    Ok(seen)
}

/// The buffer goes while a device is still at work: at once, or, if a program has polled it, when the device is
/// done. The file of the fence, and a reader of the list of all dma-bufs, use it meanwhile.
fn a_fence_outlives_the_buffer() -> Result<()> {
    if !vgem::load()? {
        bail!(Skip("this kernel has no vgem".to_owned()));
    }
    let vgem = Vgem::new()?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                kernel::read("/sys/kernel/debug/dma_buf/bufinfo")?;
            }
            Ok(())
        });
        let result = (0..60).try_for_each(|round| {
            let (_memory, buffer) = page()?;
            let fence = writes_to(&vgem, buffer.as_fd())?;
            if round % 2 == 1 {
                let flags = PollFlags::POLLIN | PollFlags::POLLOUT;
                let ready = poll(&mut [PollFd::new(buffer.as_fd(), flags)], 0u16)?;
                check_eq!(ready, 0, "events while the device works");
            }
            let file = vgem::fence_of(buffer.as_fd())?;
            drop(buffer);
            let mut fence = Some(fence);
            for signalled in [false, true] {
                if signalled {
                    fence.take().map_or(Ok(()), Fence::signal)?;
                }
                let ready = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], 0u16)?;
                check_eq!(ready, i32::from(signalled), "events of the fence's file");
            }
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("the reader panicked")?;
        result
    })
}
