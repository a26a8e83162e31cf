// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that measures one thing on one side: it reads a [`Task`], and then takes a sample for each further
//! line. So the sides can take turns, the shim is loaded only where it is measured, and what one side leaves in
//! its address space does not affect the others.

use std::io::{stdin, stdout, BufRead, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::resource::{getrlimit, getrusage, setrlimit, Resource, UsageWho};
use nix::sys::time::TimeSpec;
use nix::sys::wait::waitpid;
use nix::time::{clock_gettime, clock_nanosleep, ClockId, ClockNanosleepFlags};
use nix::unistd::Pid;
use pinbuf_test_harness::support::memory::{Memory, HUGE, PAGE};
use pinbuf_test_harness::support::{device, kernel, processor, Buffer, Device, Sync};
use pinbuf_test_importer::{pin_cost, segment_cost, Direction, Importer, Limits};
use pinbuf_uapi::{Discard, Discards};

use crate::maker::Maker;
use crate::memory;
use crate::task::{Answer, Item, Metric, Sample, Side, Task, What};

/// Serves standard input until it ends.
pub fn serve() -> Result<()> {
    let mut lines = stdin().lock().lines();
    let task = lines.next().context("no task")??;
    let mut worker = Worker::new(serde_json::from_str(&task)?);
    let mut out = stdout().lock();
    for line in lines {
        line?;
        let sample = match &mut worker {
            Ok(worker) => worker.sample(),
            Err(error) => bail!("{error:#}"),
        };
        let answer = match sample {
            Ok(sample) => Answer::Sample(sample),
            Err(error) => Answer::Error(format!("{error:#}")),
        };
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

/// Nanoseconds that something takes, and its result.
fn timed<T>(action: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = action();
    (result, start.elapsed().as_nanos() as f64)
}

struct Worker {
    task: Task,
    memory: Option<Memory>,
    maker: Option<Maker>,
    /// Buffers that live while others are measured.
    others: Vec<OwnedFd>,
}

impl Worker {
    fn new(task: Task) -> Result<Self> {
        processor::on(0)?;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let bytes = usize::try_from(task.shape.bytes)?;
        let memory = if task.shape.mapped && task.side != Side::Unmapped {
            // SAFETY: inherited, and kept open until the process ends.
            let fd = unsafe { BorrowedFd::borrow_raw(task.fd) };
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            let map = Memory::map_aligned(bytes, HUGE, rw, libc::MAP_SHARED, Some(fd), 0)?;
            memory::touch(&map, if task.shape.huge { HUGE } else { PAGE });
            Some(map)
        } else {
            None
        };
        let base = memory.as_ref().map(Memory::addr);
        let maker = match task.side {
            Side::Pin | Side::Own => None,
            side => Some(Maker::new(side, task.fd, base, &task.items)?),
        };
        let mut worker = Self {
            task,
            memory,
            maker,
            others: Vec::new(),
        };
        if let What::Among { others, .. } = worker.task.what {
            for _ in 0..others {
                let other = worker.make()?;
                worker.others.push(other);
            }
        }
        Ok(worker)
    }

    fn make(&self) -> Result<OwnedFd> {
        self.maker
            .as_ref()
            .context("this side makes no buffers")?
            .make()
    }

    fn memfd(&self) -> BorrowedFd<'_> {
        // SAFETY: inherited, and kept open until the process ends.
        unsafe { BorrowedFd::borrow_raw(self.task.fd) }
    }

    /// The size of the buffer.
    fn bytes(&self) -> u64 {
        self.task.items.iter().map(|item| item.len).sum()
    }

    fn sample(&mut self) -> Result<Sample> {
        match (self.task.side, self.task.what) {
            (Side::Pin, What::Cycle { times }) => self.bare_pin(times),
            (Side::Own, What::Touch { aligned }) => self.touch(self.memfd(), aligned),
            (Side::Own, What::Device { max_segment, .. }) => self.bare_segments(max_segment),
            (_, What::Cycle { times } | What::Among { times, .. }) => self.cycle(times),
            (_, What::Life { times }) => self.life(times),
            (_, What::Touch { aligned }) => self.touch(self.make()?.as_fd(), aligned),
            (_, What::Device { max_segment, iommu }) => self.device(max_segment, iommu),
            (_, What::Sync) => self.sync(),
            (_, What::Ask { times }) => self.ask(times),
            (_, What::Vmap) => self.vmap(),
            (_, What::Footprint { buffers, orphans }) => self.footprint(buffers, orphans),
            (_, What::Table { max_segment }) => self.table(max_segment),
            (_, What::Threads { threads, times }) => self.threads(threads, times),
            (_, What::Stretch) => self.stretch(),
        }
    }

    /// What is done before each buffer, and not measured.
    fn prepare(&self) -> Result<()> {
        if self.task.shape.sparse {
            memory::punch(self.memfd(), 0, self.task.shape.bytes)?;
        }
        Ok(())
    }

    /// What a program does that makes a buffer, uses all of it by the CPU, and closes it.
    fn life(&self, times: u32) -> Result<Sample> {
        let len = usize::try_from(self.bytes())?;
        let mut sum = Sample::new();
        for _ in 0..times {
            self.prepare()?;
            let (buffer, create) = timed(|| self.make());
            let buffer = Buffer::from_fd(buffer?);
            let (synced, sync) = timed(|| device::sync_raw(&buffer, Sync::Read as u64));
            synced.context("DMA_BUF_IOCTL_SYNC")?;
            let (map, touch) = timed(|| -> Result<Memory> {
                let map = self.map(&buffer, len).context("mapping")?;
                memory::touch(&map, PAGE);
                Ok(map)
            });
            let map = map?;
            let ((), unmap) = timed(|| drop(map));
            let ((), close) = timed(|| drop(buffer));
            let parts = [
                (Metric::Create, create),
                (Metric::Sync, sync),
                (Metric::Touch, touch),
                (Metric::Unmap, unmap),
                (Metric::Close, close),
            ];
            for (metric, cost) in parts {
                *sum.entry(metric).or_default() += cost / f64::from(times);
                *sum.entry(Metric::Life).or_default() += cost / f64::from(times);
            }
        }
        Ok(sum)
    }

    /// Maps a buffer as its programs do: pinbuf's library at an address for huge page-table entries,
    /// programs that were written for udmabuf at any. (The shim aligns that.)
    fn map(&self, buffer: &Buffer, len: usize) -> nix::Result<Memory> {
        if self.task.side != Side::Pinbuf || len < HUGE {
            return buffer.map_part(0, len);
        }
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let fd = Some(buffer.as_fd());
        Memory::map_aligned(len, HUGE, rw, libc::MAP_SHARED, fd, 0)
    }

    fn cycle(&self, times: u32) -> Result<Sample> {
        let (mut create, mut close) = (0.0, 0.0);
        for _ in 0..times {
            self.prepare()?;
            let (buffer, took) = timed(|| self.make());
            let buffer = buffer?;
            create += took;
            close += timed(|| drop(buffer)).1;
        }
        Ok(cycle(create, close, times))
    }

    /// The same pages, pinned and unpinned without anything else; huge ones once each.
    fn bare_pin(&self, times: u32) -> Result<Sample> {
        let page = if self.task.shape.huge { HUGE } else { PAGE } as u64;
        let memory = self.memory.as_ref().context("the memory is not mapped")?;
        let (mut pin, mut unpin) = (0.0, 0.0);
        for _ in 0..times {
            for Item { offset, len } in &self.task.items {
                let cost = pin_cost(memory.addr() + offset, *len, page).context("PTI_PIN")?;
                pin += cost.pin.as_nanos() as f64;
                unpin += cost.unpin.as_nanos() as f64;
            }
        }
        Ok(cycle(pin, unpin, times))
    }

    fn touch(&self, fd: BorrowedFd<'_>, aligned: bool) -> Result<Sample> {
        let len = usize::try_from(self.bytes())?;
        let remainder = if aligned { 0 } else { PAGE };
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let place = Memory::map_congruent(len, HUGE, remainder, libc::PROT_NONE, reserve, None, 0)?;
        let faults = || getrusage(UsageWho::RUSAGE_SELF).map(|usage| usage.minor_page_faults());
        let before = faults()?;
        let (mapped, map) = timed(|| place.replace_by(0, len, fd, 0));
        mapped.context("mapping")?;
        // SAFETY: inside of the mapping, whose contents do not matter.
        let ((), first) = timed(|| unsafe { place.at(0).write_volatile(1) });
        let ((), rest) = timed(|| memory::touch(&place, PAGE));
        let faults = (faults()? - before) as f64;
        let ((), unmap) = timed(|| drop(place));
        Ok(Sample::from([
            (Metric::Touch, map + first + rest),
            (Metric::First, first),
            (Metric::Faults, faults),
            (Metric::Unmap, unmap),
        ]))
    }

    fn device(&self, max_segment: u32, iommu: bool) -> Result<Sample> {
        let buffer = self.make()?;
        let importer = if iommu {
            let address = behind_iommu()?.context("no device is behind an IOMMU")?;
            Importer::attach_as(address, buffer.as_fd(), max_segment)
                .context("attaching a PCI device")?
        } else {
            attach(&buffer, max_segment)?
        };
        let (mapping, map) = importer.map(Direction::Bidirectional)?;
        let entries = importer.report(mapping)?.count;
        let end = importer.unmap(mapping)?;
        Ok(Sample::from([
            (Metric::Map, map.as_nanos() as f64),
            (Metric::MapEnd, end.as_nanos() as f64),
            (Metric::Entries, entries as f64),
        ]))
    }

    /// A table of as many entries as segments of this length make, and its mapping.
    fn bare_segments(&self, max_segment: u32) -> Result<Sample> {
        let entries = self.bytes().div_ceil(u64::from(max_segment.max(1)));
        let cost = segment_cost(u32::try_from(entries)?).context("PTI_SEGMENTS")?;
        Ok(Sample::from([
            (Metric::Map, cost.map.as_nanos() as f64),
            (Metric::MapEnd, cost.unmap.as_nanos() as f64),
            (Metric::Entries, entries as f64),
        ]))
    }

    fn sync(&self) -> Result<Sample> {
        let buffer = Buffer::from_fd(self.make()?);
        let begin = || timed(|| device::sync_raw(&buffer, Sync::ReadWrite as u64));
        let (done, first) = begin();
        done.context("DMA_BUF_IOCTL_SYNC")?;
        let (done, again) = begin();
        done.context("DMA_BUF_IOCTL_SYNC")?;
        Ok(Sample::from([
            (Metric::Sync, first),
            (Metric::SyncAgain, again),
        ]))
    }

    fn ask(&self, times: u32) -> Result<Sample> {
        let buffer = Buffer::from_fd(self.make()?);
        let device = Device::open()?;
        let mut list = [Discard::default(); 8];
        let mut cost = 0.0;
        for _ in 0..times {
            let mut call = Discards {
                size: size_of::<Discards>() as u32,
                fd: buffer.as_fd().as_raw_fd(),
                list: list.as_mut_ptr() as u64,
                count: list.len() as u32,
                ..Discards::default()
            };
            let (asked, took) = timed(|| device.discards_raw(&mut call));
            asked.context("PINBUF_DISCARDS")?;
            if call.count != 0 || call.offset != self.bytes() {
                bail!(
                    "{} parts up to {:#x} are discarded",
                    call.count,
                    call.offset
                );
            }
            cost += took;
        }
        Ok(Sample::from([(Metric::Ask, cost / f64::from(times))]))
    }

    fn vmap(&self) -> Result<Sample> {
        let buffer = self.make()?;
        let importer = attach(&buffer, u32::MAX)?;
        let map = importer.vmap()?;
        let end = importer.vunmap()?;
        Ok(Sample::from([
            (Metric::Vmap, map.as_nanos() as f64),
            (Metric::Vunmap, end.as_nanos() as f64),
        ]))
    }

    fn footprint(&self, buffers: u32, orphans: bool) -> Result<Sample> {
        let make = || if orphans { self.orphan() } else { self.make() };
        // The first one fills caches that stay.
        drop(make()?);
        give_back_slabs()?;
        let before = memory_in_use()?;
        let live: Vec<OwnedFd> = (0..buffers).map(|_| make()).collect::<Result<_>>()?;
        if orphans {
            // What is left of a task is freed after a grace period of RCU's.
            thread::sleep(Duration::from_millis(200));
        }
        let kernel = (memory_in_use()? - before).max(0.0);
        let mut sample = Sample::from([(Metric::Kernel, kernel / f64::from(buffers))]);
        if self.task.side != Side::Udmabuf {
            let first = live.into_iter().next().context("no buffer")?;
            let info = Device::open()?.describe(&Buffer::from_fd(first))?;
            sample.insert(Metric::Kept, info.kernel_bytes as f64);
            sample.insert(Metric::Extents, info.extents as f64);
            sample.insert(Metric::Pins, info.pins as f64);
        }
        Ok(sample)
    }

    /// A buffer whose maker, a process with an address space of its own, has exited.
    fn orphan(&self) -> Result<OwnedFd> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let answer = Memory::map(PAGE, rw, shared, None, 0)?;
        let nothing: libc::c_long = 0;
        let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
        // SAFETY: as `fork`, of a process with one thread: the child goes on with a copy of the memory.
        let child =
            unsafe { libc::syscall(libc::SYS_clone, flags, nothing, nothing, nothing, nothing) };
        if Errno::result(child).context("clone")? == 0 {
            // The table of descriptors is the parent's own.
            let fd = self.make().map_or(0, IntoRawFd::into_raw_fd);
            answer.set(0, fd as u64);
            // SAFETY: nothing of the parent's is undone.
            unsafe { libc::_exit(0) };
        }
        waitpid(Pid::from_raw(i32::try_from(child)?), None)?;
        let fd = i32::try_from(answer.get(0))?;
        ensure!(fd > 0, "the child could not make a buffer");
        // SAFETY: the child opened it for this process, and no other code knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn table(&self, max_segment: u32) -> Result<Sample> {
        let buffer = self.make()?;
        let importer = attach(&buffer, max_segment)?;
        let map = || importer.map(Direction::Bidirectional);
        importer.unmap(map()?.0)?;
        give_back_slabs()?;
        let before = memory_in_use()?;
        let maps = pinbuf_test_importer::uapi::MAPPINGS;
        let mut last = None;
        for _ in 0..maps {
            last = Some(map()?.0);
        }
        let kernel = memory_in_use()? - before;
        let entries = importer.report(last.context("no mapping")?)?.count;
        Ok(Sample::from([
            (Metric::Kernel, kernel / f64::from(maps)),
            (Metric::Entries, entries as f64),
        ]))
    }

    /// Every thread makes and closes buffers of a part of the memory that is its own, on a processor
    /// of its own.
    fn threads(&self, threads: u32, times: u32) -> Result<Sample> {
        ensure!(
            processors()? >= threads as usize,
            "there are too few processors"
        );
        let alone = self.in_threads(1, times)?;
        let together = self.in_threads(threads, times)?;
        let scaling = alone * f64::from(threads) / together;
        Ok(Sample::from([(Metric::Scaling, scaling)]))
    }

    /// How long it takes `threads` threads to make and close `times` buffers each.
    fn in_threads(&self, threads: u32, times: u32) -> Result<f64> {
        let barrier = Barrier::new(threads as usize);
        let base = self.memory.as_ref().map(Memory::addr);
        let maker = |number: u64| {
            let mut items = self.task.items.clone();
            for item in &mut items {
                item.offset += number * self.bytes();
            }
            Maker::new(self.task.side, self.task.fd, base, &items)
        };
        let makers: Vec<Maker> = (0..threads.into()).map(maker).collect::<Result<_>>()?;
        let work = |number: usize, maker: &Maker| -> Result<f64> {
            let placed = processor::on(number);
            // After an error, too: the others wait here.
            barrier.wait();
            placed?;
            let start = Instant::now();
            for _ in 0..times {
                drop(maker.make()?);
            }
            Ok(start.elapsed().as_nanos() as f64)
        };
        thread::scope(|scope| {
            let spawn = |(number, maker)| scope.spawn(move || work(number, maker));
            let handles: Vec<_> = makers.iter().enumerate().map(spawn).collect();
            let mut longest = 0.0f64;
            for handle in handles {
                longest = longest.max(handle.join().expect("the thread does not panic")?);
            }
            Ok(longest)
        })
    }

    /// A real-time task on the same processor wants to run every half millisecond: how late is it
    /// at most while the buffer is closed?
    fn stretch(&self) -> Result<Sample> {
        const PERIOD: Duration = Duration::from_micros(500);
        let buffer = self.make()?;
        let (ready, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let watch = || -> Result<Duration> {
            real_time()?;
            processor::on(0)?;
            let clock = ClockId::CLOCK_MONOTONIC;
            let absolute = ClockNanosleepFlags::TIMER_ABSTIME;
            let mut latest = Duration::ZERO;
            let mut due = Duration::from(clock_gettime(clock)?);
            while !over.load(Ordering::Acquire) {
                due += PERIOD;
                clock_nanosleep(clock, absolute, &TimeSpec::from(due))?;
                ready.store(true, Ordering::Release);
                let now = Duration::from(clock_gettime(clock)?);
                latest = latest.max(now.saturating_sub(due));
                due = now;
            }
            Ok(latest)
        };
        let (latest, close) = thread::scope(|scope| -> Result<(Duration, f64)> {
            let watcher = scope.spawn(watch);
            while !ready.load(Ordering::Acquire) && !watcher.is_finished() {
                thread::sleep(PERIOD);
            }
            let ((), close) = timed(|| drop(buffer));
            over.store(true, Ordering::Release);
            let latest = watcher.join().expect("the thread does not panic")?;
            Ok((latest, close))
        })?;
        Ok(Sample::from([
            (Metric::Stretch, latest.as_nanos() as f64),
            (Metric::Close, close),
        ]))
    }
}

fn cycle(create: f64, close: f64, times: u32) -> Sample {
    let times = f64::from(times);
    Sample::from([
        (Metric::Create, create / times),
        (Metric::Close, close / times),
        (Metric::Cycle, (create + close) / times),
    ])
}

fn attach(buffer: &OwnedFd, max_segment: u32) -> Result<Importer> {
    let limits = Limits {
        max_segment,
        ..Limits::NONE
    };
    Importer::attach(buffer.as_fd(), limits).context("attaching the test importer")
}

/// The address of a PCI device that an IOMMU translates for, and that the guest can spare: its
/// source of random numbers.
pub fn behind_iommu() -> Result<Option<u32>> {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").context("/sys/bus/pci/devices")?;
    for device in devices {
        let path = device?.path();
        let id = kernel::read(path.join("device"))?;
        let random = ["0x1005", "0x1044"].contains(&id.trim());
        let mode = kernel::read(path.join("iommu_group/type")).unwrap_or_default();
        if random && mode.trim().starts_with("DMA") {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            return Ok(Some(pci_address(&name).with_context(|| name.clone())?));
        }
    }
    Ok(None)
}

/// `0000:00:05.0` as bus, device and function in one number.
fn pci_address(name: &str) -> Option<u32> {
    let (_, rest) = name.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(number(bus)? << 8 | number(device)? << 3 | number(function)?)
}

/// How many processors there are.
pub fn processors() -> Result<usize> {
    let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)?;
    Ok(online.map_or(1, |count| count as usize))
}

/// Gives the memory of empty slabs back, which would hide what is allocated from them next.
fn give_back_slabs() -> Result<()> {
    for cache in std::fs::read_dir("/sys/kernel/slab").context("/sys/kernel/slab")? {
        kernel::write(cache?.path().join("shrink"), "1")?;
    }
    Ok(())
}

/// Bytes that are not free, neither in the page allocator nor in the processors' lists of free
/// pages. (Counters of slabs and of vmalloc would miss what is taken by the page, as scatterlists
/// are.)
fn memory_in_use() -> Result<f64> {
    let free = kernel::vmstat("nr_free_pages")?;
    let listed: i64 = kernel::read("/proc/zoneinfo")?
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"))
        .map(|count| count.trim().parse::<i64>())
        .sum::<Result<_, _>>()?;
    Ok(-((free + listed) as f64) * PAGE as f64)
}

/// Makes the calling thread a real-time one.
fn real_time() -> Result<()> {
    let parameter = libc::sched_param { sched_priority: 50 };
    // SAFETY: of the calling thread; the kernel reads the struct.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) };
    Errno::result(result).context("SCHED_FIFO")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses() {
        assert_eq!(pci_address("0000:00:05.0"), Some(0x28));
        assert_eq!(pci_address("0000:01:1f.7"), Some(0x1ff));
        assert_eq!(pci_address("virtio0"), None);
    }
}
