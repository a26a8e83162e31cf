// SPDX-License-Identifier: MIT OR Apache-2.0

//! Executes an input, in its own process, and compares every result and every byte with the model.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::resource::{setrlimit, Resource, RLIM_INFINITY};
use nix::unistd::{lseek64, Whence};
use pinbuf_test_harness::support::device::{sync_raw, Device};
use pinbuf_test_harness::support::memory::Memory as Mapping;
use pinbuf_test_harness::support::process::{become_user, drop_ipc_lock, USER};
use pinbuf_test_harness::support::{kernel, PAGE};

use crate::access::Access;
use crate::areas::Area;
use crate::contents::{Contents, Id};
use crate::devices::Devices;
use crate::expected::Expected;
use crate::input::{Address, Caller, Descriptor, Input, Memlock, Operation, Who};
use crate::memory::Memory;
use crate::profile::{phase, Phase};
use crate::views::Views;

/// The maximum number of buffers that an input has at once.
const BUFFERS: usize = 16;

/// What a dma-buf consists of, page by page, as far as that is known.
///
/// A create may name the same ranges hundreds of times: the pages of one time are kept, or a buffer of
/// 1 GiB would take longer in this model than in the kernel.
#[derive(Debug)]
pub struct Kept {
    once: Vec<Option<Id>>,
    length: usize,
    /// Of a buffer of distinct pages, those that are known, by their numbers.
    few: HashMap<usize, Id>,
}

impl Kept {
    /// `length` pages: those given, again and again.
    pub fn new(once: Vec<Option<Id>>, length: usize) -> Self {
        assert!(!once.is_empty() || length == 0);
        Self {
            once,
            length,
            few: HashMap::new(),
        }
    }

    /// `length` pages, of which few are known.
    pub fn sparse(few: HashMap<usize, Id>, length: usize) -> Self {
        Self {
            once: vec![None],
            length,
            few,
        }
    }

    /// How many pages there are.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One of them.
    pub fn page(&self, number: usize) -> Option<Id> {
        assert!(number < self.length);
        match self.few.get(&number) {
            Some(id) => Some(*id),
            None => self.once[number % self.once.len()],
        }
    }

    /// Those that there are, each once for each time that it is named, but for repetition as a whole.
    pub fn once(&self) -> &[Option<Id>] {
        &self.once
    }

    /// How often all of them are repeated, at most.
    pub fn repeated(&self) -> usize {
        if !self.few.is_empty() {
            return 1;
        }
        self.length.div_ceil(self.once.len().max(1))
    }
}

/// A descriptor of a dma-buf.
#[derive(Debug)]
pub struct Held {
    /// The descriptor.
    pub fd: OwnedFd,
    /// The buffer.
    pub kept: Rc<Kept>,
}

/// One execution.
pub struct Executor {
    pub(crate) device: Device,
    pub(crate) access: Access,
    pub(crate) contents: Contents,
    pub(crate) memory: Memory,
    pub(crate) structs: Area,
    pub(crate) ranges: Area,
    pub(crate) backings: Area,
    pub(crate) buffers: Vec<Held>,
    pub(crate) views: Views,
    pub(crate) devices: Devices,
    pub(crate) caller: Caller,
    /// The caller's limit in pages.
    pub(crate) limit: u64,
    /// The machine's memory, in bytes: no buffer is larger.
    pub(crate) machine: u64,
    /// The kernel has bounce buffers for devices that do not reach all memory.
    pub(crate) bounces: bool,
    /// This is a child of the process that has the buffers.
    pub(crate) forked: bool,
    /// A file of one page of 1 GiB, if there is one.
    pub(crate) giga: Option<RawFd>,
    /// Its pages, once this input has made a buffer of it.
    pub(crate) giga_kept: Option<Rc<Kept>>,
    trace: bool,
}

impl Executor {
    /// Prepares what inputs share, and becomes the caller. `trace`: prints each step to standard error.
    pub fn new(who: Who, giga: Option<RawFd>, trace: bool) -> Result<Self> {
        let fixture = phase(Phase::Fixture);
        let executor = Self {
            device: Device::open()?,
            access: Access::new()?,
            contents: Contents::default(),
            memory: Memory::default(),
            structs: Area::new(0)?,
            ranges: Area::new(1)?,
            backings: Area::new(2)?,
            buffers: Vec::new(),
            views: Views::default(),
            devices: Devices::default(),
            caller: Caller {
                who,
                ..Caller::default()
            },
            limit: u64::MAX,
            machine: (kernel::field("/proc/meminfo", "MemTotal")? as u64) << 10,
            bounces: has_bounce_buffers(),
            forked: false,
            giga,
            giga_kept: None,
            trace,
        };
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
            .context("RLIMIT_MEMLOCK")?;
        drop(fixture);
        let _caller = phase(Phase::Caller);
        match who {
            Who::Root => {}
            Who::Uncapable => drop_ipc_lock()?,
            Who::User => become_user(USER)?,
        }
        Ok(executor)
    }

    /// Executes an input, then compares all that is there, and releases it. After an error this object is of no
    /// further use.
    pub fn execute(&mut self, input: &Input) -> Result<()> {
        assert_eq!(self.caller.who, input.caller.who);
        self.caller = input.caller;
        let soft = limit_bytes(input.caller.memlock);
        setrlimit(Resource::RLIMIT_MEMLOCK, soft, RLIM_INFINITY).context("RLIMIT_MEMLOCK")?;
        self.limit = soft / PAGE as u64;
        self.contents = Contents::default();
        self.views = Views::default();
        self.giga_kept = None;
        self.memory = Memory::new(&input.memory, &self.access, &mut self.contents)
            .context("preparing the memory")?;
        for (index, operation) in input.operations.iter().enumerate() {
            self.say(|| format!("{index}: {operation:?}"));
            self.step(operation)
                .with_context(|| format!("operation {index}, {operation:?}"))?;
        }
        self.finish().context("at the end")
    }

    /// Prints something, if the trace is on.
    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{}", text());
        }
    }

    fn step(&mut self, operation: &Operation) -> Result<()> {
        let _timer = match operation {
            Operation::Create(_) | Operation::Giga => None,
            Operation::Query(_)
            | Operation::Info(..)
            | Operation::Other(..)
            | Operation::Sync(..)
            | Operation::Seek(..)
            | Operation::Duplicate(_)
            | Operation::Close(_) => Some(phase(Phase::Ask)),
            Operation::Map { .. }
            | Operation::Touch(..)
            | Operation::Remap(..)
            | Operation::Unmap(..)
            | Operation::Protect(..)
            | Operation::Advise(..) => Some(phase(Phase::Views)),
            Operation::Attach(..) | Operation::Detach(_) => Some(phase(Phase::Attach)),
            Operation::DeviceMap(..) | Operation::DeviceUnmap(..) => Some(phase(Phase::DeviceMap)),
            Operation::KernelMap(_) | Operation::KernelUnmap(_) => Some(phase(Phase::KernelMap)),
            Operation::DeviceTouch(..) | Operation::KernelTouch(..) | Operation::Bracket(..) => {
                Some(phase(Phase::Devices))
            }
            Operation::Fork(..) => Some(phase(Phase::Children)),
            Operation::Write(..)
            | Operation::Discard(..)
            | Operation::Punch(..)
            | Operation::Release(..)
            | Operation::Restrict(..)
            | Operation::Shift(..)
            | Operation::Late(..)
            | Operation::Bring(..) => Some(phase(Phase::Memory)),
        };
        match operation {
            Operation::Create(create) => self.create(create),
            Operation::Giga => self.create_giga(),
            Operation::Query(envelope) => self.query(envelope),
            Operation::Info(descriptor, envelope) => self.info(*descriptor, envelope),
            Operation::Other(number, argument) => self.other(*number, argument.0),
            Operation::Map {
                buffer,
                offset,
                length,
                protection,
                sharing,
                aligned,
            } => self.map(
                *buffer,
                offset.0,
                length.0,
                protection.0,
                *sharing,
                *aligned,
            ),
            Operation::Touch(view, page, write) => self.touch(*view, page.0, *write),
            Operation::Remap(view, page, old, new, motion) => {
                self.remap(*view, page.0, old.0, new.0, *motion)
            }
            Operation::Unmap(view, page, pages) => self.unmap(*view, page.0, pages.0),
            Operation::Protect(view, page, pages, protection) => {
                self.protect(*view, page.0, pages.0, protection.0)
            }
            Operation::Advise(view, page, pages, advice) => {
                self.advise(*view, page.0, pages.0, *advice)
            }
            Operation::Sync(buffer, flags) => self.sync(*buffer, flags.0),
            Operation::Seek(buffer, offset, whence) => self.seek(*buffer, offset.0, *whence),
            Operation::Duplicate(buffer) => self.duplicate(*buffer),
            Operation::Close(buffer) => {
                if let Some(index) = self.buffer_index(*buffer) {
                    self.buffers.remove(index);
                }
                Ok(())
            }
            Operation::Attach(buffer, bits, segment) => self.attach(*buffer, *bits, *segment),
            Operation::DeviceMap(device, direction) => self.device_map(*device, *direction),
            Operation::DeviceUnmap(device, mapping) => self.device_unmap(*device, *mapping),
            Operation::DeviceTouch(device, mapping, page, write) => {
                self.device_touch(*device, *mapping, page.0, *write)
            }
            Operation::KernelMap(device) => self.kernel_map(*device),
            Operation::KernelUnmap(device) => self.kernel_unmap(*device),
            Operation::KernelTouch(device, page, write) => {
                self.kernel_touch(*device, page.0, *write)
            }
            Operation::Bracket(device, direction, end) => self.bracket(*device, *direction, *end),
            Operation::Detach(device) => {
                self.devices.detach(*device);
                Ok(())
            }
            Operation::Fork(view, page, write, create) => {
                self.fork(*view, page.0, *write, create.as_ref())
            }
            Operation::Write(region, page) => {
                let address = self.memory.address(*region, page.0);
                self.memory.write(address, &self.access, &mut self.contents)
            }
            Operation::Discard(region, page, pages) => {
                let (page, pages) = (page.0, pages.0);
                let done = self
                    .memory
                    .discard(*region, page, pages, &mut self.contents);
                self.say(|| format!("   {done:?}"));
                Ok(())
            }
            Operation::Punch(region, page, pages) => {
                self.memory
                    .punch(*region, page.0, pages.0, &mut self.contents)
            }
            Operation::Release(region, page, pages) => {
                let done = self.memory.release(*region, page.0, pages.0);
                self.say(|| format!("   {done:?}"));
                Ok(())
            }
            Operation::Shift(region, page, pages) => self.memory.shift(*region, page.0, pages.0),
            Operation::Late(region, page, pages, answered) => {
                let done =
                    self.memory
                        .delay(*region, page.0, pages.0, *answered, &mut self.contents)?;
                self.say(|| format!("   {done:?}"));
                Ok(())
            }
            Operation::Bring(region, page) => {
                self.memory.bring(*region, page.0, &mut self.contents)
            }
            Operation::Restrict(region, page, pages, protection) => {
                let done = self.memory.restrict(*region, page.0, pages.0, protection.0);
                self.say(|| format!("   {done:?}"));
                Ok(())
            }
        }
    }

    /// The index of the buffer that an operation's number stands for.
    pub(crate) fn buffer_index(&self, number: u8) -> Option<usize> {
        usize::from(number).checked_rem(self.buffers.len())
    }

    /// Keeps a buffer, and lets the oldest go if there are too many.
    pub(crate) fn keep(&mut self, held: Held) {
        if self.buffers.len() == BUFFERS {
            self.buffers.remove(0);
        }
        self.buffers.push(held);
    }

    /// The address that an operation names.
    pub(crate) fn resolve(&self, address: Address) -> u64 {
        match address {
            Address::Region(region, page) => self.memory.address(region, page.0),
            Address::Inside(region, page, byte) => {
                self.memory.address(region, page.0) + u64::from(byte)
            }
            Address::View(view, page) => self.views.address(view, page.0),
            Address::Raw(raw) => raw.0,
        }
    }

    /// The descriptor that an operation names.
    pub(crate) fn descriptor(&self, descriptor: Descriptor) -> RawFd {
        match descriptor {
            Descriptor::Buffer(number) => self
                .buffer_index(number)
                .map_or(-1, |index| self.buffers[index].fd.as_raw_fd()),
            Descriptor::Region(number) => self.memory.descriptor(number).unwrap_or(-1),
            Descriptor::Device => self.device.as_fd().as_raw_fd(),
            Descriptor::Raw(raw) => raw,
        }
    }

    /// Looks at some pages of a buffer through a mapping of all of it.
    pub(crate) fn compare(&mut self, fd: BorrowedFd<'_>, kept: &Kept) -> Result<()> {
        let _timer = phase(Phase::Compare);
        const SAMPLES: usize = 6;
        let pages = kept.length();
        let mapping = Mapping::map(
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            Some(fd),
            0,
        )
        .context("mapping all of a buffer")?;
        let samples = SAMPLES.min(pages);
        for sample in 0..samples {
            let page = sample * (pages - 1) / (samples - 1).max(1);
            let Some(id) = kept.page(page) else { continue };
            if let Some(word) = self.contents.get(id) {
                let seen = mapping.get(page * PAGE);
                if seen != word {
                    bail!("page {page} of {pages}: expected {word:#x}, seen {seen:#x}");
                }
            }
            // And the other way: every other user of the page sees it too. The parent's model would not know.
            if self.forked {
                continue;
            }
            let word = self.contents.stamp();
            mapping.set(page * PAGE, word);
            self.contents.set(id, word);
        }
        Ok(())
    }

    fn sync(&mut self, buffer: u8, flags: u64) -> Result<()> {
        const END: u64 = 1 << 2;
        let Some(index) = self.buffer_index(buffer) else {
            return Ok(());
        };
        let mut expected = Expected::default();
        expected.must_if(flags & !(3 | END) != 0 || flags & 3 == 0, Errno::EINVAL);
        expected.check(
            "DMA_BUF_IOCTL_SYNC",
            &sync_raw(&self.buffers[index].fd, flags),
        )
    }

    fn seek(&mut self, buffer: u8, offset: u64, whence: u8) -> Result<()> {
        let Some(index) = self.buffer_index(buffer) else {
            return Ok(());
        };
        let held = &self.buffers[index];
        let whence = [Whence::SeekSet, Whence::SeekCur, Whence::SeekEnd][usize::from(whence % 3)];
        let answer = lseek64(&held.fd, offset as i64, whence);
        let size = (held.kept.length() * PAGE) as i64;
        match (whence, offset, answer) {
            (Whence::SeekEnd, 0, Ok(end)) if end == size => Ok(()),
            (Whence::SeekSet, 0, Ok(0)) => Ok(()),
            (Whence::SeekEnd | Whence::SeekSet, 0, other) => {
                bail!("lseek: {other:?}, expected 0 or {size}")
            }
            (_, _, Ok(end)) => bail!("lseek by {offset:#x} gave {end}"),
            (_, _, Err(_)) => Ok(()),
        }
    }

    fn duplicate(&mut self, buffer: u8) -> Result<()> {
        if let Some(index) = self.buffer_index(buffer) {
            let held = &self.buffers[index];
            let again = Held {
                fd: held.fd.try_clone()?,
                kept: Rc::clone(&held.kept),
            };
            self.keep(again);
        }
        Ok(())
    }

    /// All that is there must still hold what it should. Then it is released, and must leave nothing behind.
    fn finish(&mut self) -> Result<()> {
        for held in std::mem::take(&mut self.buffers) {
            self.compare(held.fd.as_fd(), &held.kept)?;
        }
        let clearing = phase(Phase::Clear);
        self.views.clear()?;
        self.devices.clear();
        self.memory.clear()?;
        drop(clearing);
        Ok(())
    }

    /// Fails if anything of what was executed is still charged.
    pub fn settled(&mut self) -> Result<()> {
        let _charges = phase(Phase::Charges);
        let pinned = kernel::vm_pin()?;
        if pinned != 0 {
            bail!("VmPin is {pinned} when nothing is left");
        }
        self.nothing_charged()
    }

    /// With a limit of one page, one page fits only if nothing else is charged.
    fn nothing_charged(&mut self) -> Result<()> {
        setrlimit(Resource::RLIMIT_MEMLOCK, PAGE as u64, RLIM_INFINITY)?;
        let used = self.device.query().context("PINBUF_QUERY")?.allowance_used;
        if used != 0 {
            bail!("{used} bytes of the allowance are used when nothing is left");
        }
        let page = Mapping::anonymous(PAGE)?;
        let buffer = self.device.create(&[page.range()]).context("one page")?;
        let charge = self.device.describe(&buffer)?.charge;
        let expected = match self.caller.who {
            Who::Root => pinbuf_uapi::CHARGE_NONE,
            Who::Uncapable | Who::User => pinbuf_uapi::CHARGE_USER,
        };
        if charge != expected {
            bail!("pages are still charged: the last page's charge is {charge}, not {expected}");
        }
        Ok(())
    }
}

/// Whether the kernel has bounce buffers; there is a file about them in any case.
fn has_bounce_buffers() -> bool {
    kernel::number("/sys/kernel/debug/swiotlb/io_tlb_nslabs").is_ok_and(|slabs| slabs > 0)
}

/// A limit in bytes.
fn limit_bytes(limit: Memlock) -> u64 {
    match limit {
        Memlock::Unlimited => RLIM_INFINITY,
        Memlock::Bytes(bytes) => bytes.into(),
        Memlock::Pages(pages) => u64::from(pages) * PAGE as u64,
    }
}
