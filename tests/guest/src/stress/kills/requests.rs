// SPDX-License-Identifier: MIT OR Apache-2.0

//! What victims do with buffers until they are killed.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::unistd::{dup, pipe};
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Backing, Range};

use super::may_fail;
use super::victims::Scene;
use crate::kinds::{few, Kind};
use pinbuf_test_harness::support::memory::{memfd, PAGE, RW};
use pinbuf_test_harness::support::process::Link;
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::{bail, Buffer, Device, Memory, Sync};

/// What a victim does repeatedly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A buffer of a few pages.
    Short,
    /// A buffer of many pages, each of which has to be faulted in.
    Long,
    /// A buffer of many ranges.
    Ranges,
    /// A buffer whose pages are compared with a file.
    Checked,
    /// A buffer of a page that a pipe holds in `ZONE_MOVABLE`: the call retries, with pauses.
    Held,
    /// A buffer with pages whose faults userfaultfd never resolves.
    Waiting,
    /// A buffer of transparent huge pages or of hugetlb.
    Huge,
    /// Mapping a buffer and touching its pages.
    Map,
    /// Synchronising a buffer that a device has mapped.
    Sync,
    /// Attaching a device, mapping for it, unmapping and detaching.
    Device,
    /// Mapping into the kernel.
    Kernel,
    /// Closing buffers of which there are several descriptors.
    Close,
    /// Passing descriptors: in a cycle of sockets, and to a process that survives.
    Pass,
}

/// All of them.
pub const REQUESTS: &[Request] = &[
    Request::Short,
    Request::Long,
    Request::Ranges,
    Request::Checked,
    Request::Held,
    Request::Waiting,
    Request::Huge,
    Request::Map,
    Request::Sync,
    Request::Device,
    Request::Kernel,
    Request::Close,
    Request::Pass,
];

impl Request {
    /// Whether it leaves no mapping of a buffer in the address space, which another process may share.
    pub fn leaves_no_mapping(self) -> bool {
        !matches!(self, Self::Map)
    }
}

/// What a victim was doing when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Step {
    /// Getting ready.
    Setup,
    /// `PINBUF_CREATE`.
    Create,
    /// `mmap` of a buffer.
    Map,
    /// Faults in a mapping, and `munmap`.
    Fault,
    /// `DMA_BUF_IOCTL_SYNC`.
    Sync,
    /// Attaching a device.
    Attach,
    /// Mapping for a device.
    MapDevice,
    /// Unmapping and detaching.
    Detach,
    /// Mapping into the kernel.
    Vmap,
    /// Undoing that.
    Vunmap,
    /// `close`.
    Close,
    /// Passing a descriptor.
    Pass,
    /// Something between these.
    Between,
}

/// All of them.
pub const STEPS: &[Step] = &[
    Step::Setup,
    Step::Create,
    Step::Map,
    Step::Fault,
    Step::Sync,
    Step::Attach,
    Step::MapDevice,
    Step::Detach,
    Step::Vmap,
    Step::Vunmap,
    Step::Close,
    Step::Pass,
    Step::Between,
];

/// What victims have done and are doing, in memory that all processes share.
pub struct Progress(Memory);

impl Progress {
    const SLOTS: usize = 16;

    /// Nobody has done anything.
    pub fn new() -> Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Ok(Self(Memory::map(PAGE, RW, flags, None, 0)?))
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: aligned, inside of the page, which is mapped as long as `self` lives, and accessed as
        // an atomic alone.
        unsafe { AtomicU64::from_ptr(self.0.at(index * 8).cast()) }
    }

    fn slot(&self, slot: usize) -> &AtomicU64 {
        self.word(slot)
    }

    /// How often a request was completed.
    pub fn rounds(&self, request: Request) -> u64 {
        self.word(Self::SLOTS + request as usize)
            .load(Ordering::Relaxed)
    }

    /// How many were killed in a step.
    pub fn deaths(&self, step: Step) -> u64 {
        self.word(2 * Self::SLOTS + step as usize)
            .load(Ordering::Relaxed)
    }

    /// A victim begins.
    pub fn born(&self, slot: usize) {
        self.slot(slot).store(Step::Setup as u64, Ordering::Relaxed);
    }

    /// A victim has been killed.
    pub fn died(&self, slot: usize) {
        let step = self.slot(slot).load(Ordering::Relaxed) as usize;
        self.word(2 * Self::SLOTS + step)
            .fetch_add(1, Ordering::Relaxed);
    }
}

/// A victim at work.
pub struct Work<'a> {
    /// What all have.
    pub scene: &'a Scene,
    /// Where the current step is recorded.
    pub progress: &'a Progress,
    /// The victim's index there.
    pub slot: usize,
    /// What to do.
    pub request: Request,
}

/// A buffer, if the call gave one.
fn made(result: nix::Result<Buffer>) -> Result<Option<Buffer>> {
    match result {
        Ok(buffer) => Ok(Some(buffer)),
        Err(error) if may_fail(error) => Ok(None),
        Err(error) => Err(error).context("create"),
    }
}

impl Work<'_> {
    fn at(&self, step: Step) {
        self.progress
            .slot(self.slot)
            .store(step as u64, Ordering::Relaxed);
    }

    fn device(&self) -> &Device {
        &self.scene.device
    }

    fn create(&self, ranges: &[Range]) -> Result<Option<Buffer>> {
        self.at(Step::Create);
        let result = self.device().create(ranges);
        self.at(Step::Between);
        made(result)
    }

    fn close<T>(&self, what: T) {
        self.at(Step::Close);
        drop(what);
        self.at(Step::Between);
    }

    /// Counts a completed round.
    fn done(&self) {
        self.progress
            .word(Progress::SLOTS + self.request as usize)
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Does it until the process ends. `ready` is called before the first round.
    pub fn go_on(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        match self.request {
            Request::Short => self.buffers(rng, 40, 3, ready),
            Request::Long => self.buffers(rng, 1024, 2, ready),
            Request::Ranges => self.ranges(rng, ready),
            Request::Checked => self.checked(ready),
            Request::Held => self.held(ready),
            Request::Waiting => self.waiting(ready),
            Request::Huge => self.huge(rng, ready),
            Request::Map => self.map(rng, ready),
            Request::Sync => self.sync(rng, ready),
            Request::Device => self.devices(rng, ready),
            Request::Kernel => self.kernel(ready),
            Request::Close => self.descriptors(rng, ready),
            Request::Pass => self.pass(ready),
        }
    }

    /// Creates buffers of new pages, and keeps up to `kept` of them.
    fn buffers(
        &self,
        rng: &mut Rng,
        most: usize,
        kept: usize,
        ready: impl FnOnce() -> Result<()>,
    ) -> Result<Infallible> {
        let memory = Memory::small_pages(most * PAGE)?;
        let mut held = Vec::new();
        ready()?;
        loop {
            let pages = rng.usize(most / 2..=most);
            if let Some(buffer) = self.create(&[memory.part(0, pages * PAGE)])? {
                held.push(buffer);
                self.done();
            }
            if held.len() >= kept {
                self.close(std::mem::take(&mut held));
            }
            // Pages that are present take another path than pages that have to be faulted in.
            if most > 64 || rng.bool() {
                memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
            }
        }
    }

    fn ranges(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        const PAGES: usize = 1024;
        let memory = Memory::small_pages(PAGES * PAGE)?;
        let mut ranges: Vec<_> = (0..PAGES)
            .map(|page| memory.part(page * PAGE, PAGE))
            .collect();
        rng.shuffle(&mut ranges);
        ready()?;
        loop {
            if let Some(buffer) = self.create(&ranges)? {
                self.done();
                self.close(buffer);
            }
            if rng.bool() {
                memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
            }
        }
    }

    fn checked(&self, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        const PAGES: usize = 256;
        let file = memfd(PAGES * PAGE, 0)?;
        let memory = Memory::shared(&file, PAGES * PAGE)?;
        memory.keep_small(0, memory.len())?;
        let backing = [Backing {
            fd: file.as_raw_fd(),
            reserved: 0,
            offset: 0,
        }];
        ready()?;
        loop {
            self.at(Step::Create);
            let result = self.device().create_checked(&[memory.range()], &backing);
            self.at(Step::Between);
            if let Some(buffer) = made(result)? {
                self.done();
                self.close(buffer);
            }
            memory.advise(0, memory.len(), libc::MADV_REMOVE)?;
        }
    }

    /// The pipe's reference prevents the migration of a page out of `ZONE_MOVABLE`. In other zones the page is
    /// pinned where it is.
    fn held(&self, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        const PAGES: usize = 64;
        let memory = Memory::small_pages(PAGES * PAGE)?;
        ready()?;
        loop {
            memory.touch_to_write();
            let (reader, writer) = pipe()?;
            let vector = libc::iovec {
                iov_base: memory.at((PAGES / 2) * PAGE).cast(),
                iov_len: PAGE,
            };
            // SAFETY: the kernel reads the vector and takes a reference on mapped memory.
            let count = unsafe { libc::vmsplice(writer.as_raw_fd(), &vector, 1, 0) };
            Errno::result(count).context("vmsplice")?;
            let buffer = self.create(&[memory.range()])?;
            // The page may be moved from here on.
            drop((reader, writer));
            let again = match &buffer {
                None => self.create(&[memory.range()])?,
                Some(_) => None,
            };
            if buffer.is_some() || again.is_some() {
                self.done();
            }
            self.close((buffer, again));
            memory.advise(0, memory.len(), libc::MADV_DONTNEED)?;
        }
    }

    /// The call has pinned the first half of the pages when it begins to wait.
    fn waiting(&self, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        const PAGES: usize = 96;
        let memory = Memory::small_pages(PAGES * PAGE)?;
        for page in 0..PAGES / 2 {
            memory.set(page * PAGE, 1);
        }
        ready()?;
        if let Some(buffer) = self.create(&[memory.part(0, PAGES / 2 * PAGE)])? {
            self.done();
            self.close(buffer);
        }
        let part = (PAGES / 2 * PAGE, PAGES / 2 * PAGE);
        let _faults = Faults::of_range(memory.part(part.0, part.1), Mode::Missing)?;
        loop {
            if self.create(&[memory.range()])?.is_some() {
                bail!("a create completed without pages that userfaultfd never provided");
            }
        }
    }

    fn huge(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let kinds = [Kind::Transparent, Kind::HugePrivate, Kind::HugeShared];
        let kind = kinds[rng.usize(..kinds.len())];
        ready()?;
        loop {
            // Other victims may have reserved all huge pages.
            let Ok(memory) = kind.fresh(few(kind)) else {
                std::thread::yield_now();
                continue;
            };
            // A fault during a long-term pin takes no huge page of the pool in ZONE_MOVABLE; an earlier fault does.
            if rng.bool() {
                memory.set(0, 1);
                memory.set(memory.len() / 2, 1);
            }
            self.at(Step::Create);
            // A part of a huge page, the whole of another.
            let odd = memory.part(PAGE * rng.usize(1..512), PAGE * rng.usize(1..512));
            let result = self.device().create(&[odd]);
            self.at(Step::Between);
            match result {
                Ok(buffer) => {
                    self.done();
                    self.close(buffer);
                }
                // The pool may have no page outside of ZONE_MOVABLE.
                Err(Errno::EFAULT) if kind != Kind::Transparent => {}
                Err(error) if may_fail(error) => {}
                Err(error) => return Err(error).context("create of huge pages"),
            }
        }
    }

    /// A buffer for all rounds, of pages in random order in its first half.
    fn buffer(&self, rng: &mut Rng, memory: &Memory) -> Result<Buffer> {
        let pages = memory.len() / PAGE;
        let mut ranges: Vec<_> = (0..pages)
            .map(|page| memory.part(page * PAGE, PAGE))
            .collect();
        rng.shuffle(&mut ranges[..pages / 2]);
        loop {
            if let Some(buffer) = self.create(&ranges)? {
                return Ok(buffer);
            }
            std::thread::yield_now();
        }
    }

    fn map(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(512 * PAGE)?;
        ready()?;
        let buffer = self.buffer(rng, &memory)?;
        loop {
            self.at(Step::Map);
            let mapped = buffer.map()?;
            self.at(Step::Fault);
            if rng.bool() {
                mapped.touch_to_write();
            } else {
                // A fault that fills a page table, and a partial unmap, which splits a huge entry.
                mapped.set(mapped.len() / 2, 1);
                mapped.unmap(mapped.len() / 4, PAGE)?;
            }
            drop(mapped);
            self.at(Step::Between);
            self.done();
        }
    }

    fn sync(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(256 * PAGE)?;
        ready()?;
        let buffer = self.buffer(rng, &memory)?;
        self.at(Step::Attach);
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
        self.at(Step::MapDevice);
        importer.map(Direction::Bidirectional).context("mapping")?;
        loop {
            self.at(Step::Sync);
            for mode in [Sync::Read, Sync::Write, Sync::ReadWrite] {
                buffer.synced(mode, || {})?;
            }
            self.at(Step::Between);
            self.done();
        }
    }

    fn devices(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(256 * PAGE)?;
        ready()?;
        let mut buffer = self.buffer(rng, &memory)?;
        loop {
            self.at(Step::Attach);
            let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
            if rng.bool() {
                // From here on the importer holds the last reference to the first buffer.
                self.close(std::mem::replace(&mut buffer, self.buffer(rng, &memory)?));
            }
            self.at(Step::MapDevice);
            let (mapping, _) = importer.map(Direction::ToDevice).context("mapping")?;
            importer.map(Direction::FromDevice).context("mapping")?;
            self.at(Step::Detach);
            importer.unmap(mapping).context("unmapping")?;
            drop(importer);
            self.at(Step::Between);
            self.done();
        }
    }

    fn kernel(&self, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(256 * PAGE)?;
        let mut rng = Rng::with_seed(0);
        ready()?;
        let buffer = self.buffer(&mut rng, &memory)?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attaching")?;
        loop {
            self.at(Step::Vmap);
            importer.vmap().context("mapping into the kernel")?;
            self.at(Step::Vunmap);
            importer.vunmap().context("unmapping from the kernel")?;
            self.at(Step::Between);
            self.done();
        }
    }

    fn descriptors(&self, rng: &mut Rng, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(128 * PAGE)?;
        ready()?;
        loop {
            let mut all: Vec<OwnedFd> = Vec::new();
            for _ in 0..4 {
                if let Some(buffer) = self.create(&[memory.range()])? {
                    all.push(dup(&buffer)?);
                    all.push(buffer.into());
                    self.done();
                }
            }
            rng.shuffle(&mut all);
            self.close(all);
        }
    }

    /// Sockets that are in flight in each other, and a buffer with them, are freed by the kernel's garbage
    /// collector alone.
    fn pass(&self, ready: impl FnOnce() -> Result<()>) -> Result<Infallible> {
        let memory = Memory::small_pages(16 * PAGE)?;
        ready()?;
        loop {
            let Some(buffer) = self.create(&[memory.range()])? else {
                continue;
            };
            self.at(Step::Pass);
            match self.pass_on(&buffer) {
                Ok(()) => self.done(),
                // The number of descriptors in flight is limited for each user, and the garbage collector is asynchronous.
                Err(error) if error.downcast_ref() == Some(&Errno::ETOOMANYREFS) => {}
                Err(error) => return Err(error),
            }
            self.close(buffer);
        }
    }

    fn pass_on(&self, buffer: &Buffer) -> Result<()> {
        let Link { ours, theirs } = Link::new()?;
        ours.send(buffer.as_fd())?;
        drop(theirs.receive()?);
        ours.send(buffer.as_fd())?;
        ours.send(ours.as_fd())?;
        theirs.send(theirs.as_fd())?;
        self.scene.send(buffer.as_fd())
    }
}
