// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pinning populates: memory that was never touched is allocated, memory that cannot be allocated is an error
//! and no signal, and nothing besides the ranges is touched.

use std::mem::size_of;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use nix::mount::{mount, umount, MsFlags};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::Signal;
use nix::sys::stat::fstat;
use nix::sys::wait::WaitStatus;
use nix::unistd::close;
use pinbuf_test_importer::{Direction, EmptyExporter, Importer, Limits};
use pinbuf_uapi::Range;

use crate::common::{refused, views_agree};
use crate::frames::{entries, Entry};
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::kinds::huge_private;
use pinbuf_test_harness::support::memory::{file_in, memfd, punch_hole, stamp, HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{become_user, in_child, set_memlock, Child, USER};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "populate":
    without_a_write,
    plugged_blocks_anonymous,
    plugged_blocks_memfd,
    plugged_blocks_hugetlb,
    pool_runs_out,
    tmpfs_runs_out,
    memlock_runs_out,
    kernel_memory_is_charged within 120,
    small_objects_are_charged within 120,
    arguments_of_a_waiting_call_are_charged,
    memory_cgroup_kills_anonymous within 120,
    memory_cgroup_kills_shmem within 120,
    memory_cgroup_bounds_discarded_memory within 120,
    hugetlb_cgroup_runs_out within 120,
}

/// No write fault of the caller's own, and every byte is zero.
fn without_a_write() -> Result<()> {
    let memory = Memory::small_pages(512 * PAGE)?;
    let file = memfd(512 * PAGE, 0)?;
    let shared = Memory::shared(&file, 512 * PAGE)?;
    shared.advise(0, shared.len(), libc::MADV_NOHUGEPAGE)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range(), shared.range()])?;
    let blocks = (shared.len() / 512) as i64;
    check_eq!(fstat(&file)?.st_blocks, blocks, "blocks of the memfd");
    let present = |memory: &Memory| -> Result<usize> {
        let entries = entries(memory, 0, memory.len())?;
        Ok(entries
            .iter()
            .filter(|entry| matches!(entry, Entry::Present(_)))
            .count())
    };
    check_eq!(present(&memory)?, 512, "pages that are there");
    check_eq!(present(&shared)?, 512, "pages of the memfd that are there");
    let mapped = buffer.map()?;
    let mut seen = vec![1; PAGE];
    for page in 0..1024 {
        mapped.read(page * PAGE, &mut seen);
        check!(
            seen.iter().all(|byte| *byte == 0),
            "page {page} is not zero"
        );
    }
    views_agree(
        &buffer,
        &[(&memory, 0, 512 * PAGE), (&shared, 0, 512 * PAGE)],
    )
}

/// As virtio-mem's: at least a huge page.
const BLOCK: usize = if HUGE > 4 << 20 { HUGE } else { 4 << 20 };
/// Where virtio-mem has plugged blocks.
const PLUGGED: [usize; 5] = [3, 4, 100, 777, 2047];
const BLOCKS: usize = 2048;

/// The parts of a sparse mapping of 8 GiB, or of more where blocks are larger.
fn plugged(memory: &Memory) -> Vec<Range> {
    PLUGGED
        .iter()
        .map(|block| memory.part(block * BLOCK, BLOCK))
        .collect()
}

/// Pages that are there: in the plugged blocks, and elsewhere.
fn there(memory: &Memory) -> Result<(usize, usize)> {
    let mut counts = (0, 0);
    for block in 0..BLOCKS {
        let present = entries(memory, block * BLOCK, BLOCK)?
            .iter()
            .filter(|entry| **entry != Entry::Absent)
            .count();
        if PLUGGED.contains(&block) {
            counts.0 += present;
        } else {
            counts.1 += present;
        }
    }
    Ok(counts)
}

fn plugged_works(memory: &Memory) -> Result<()> {
    check_eq!(there(memory)?, (0, 0), "pages before");
    let device = Device::open()?;
    let buffer = device.create(&plugged(memory))?;
    let pages = PLUGGED.len() * BLOCK / PAGE;
    check_eq!(
        there(memory)?,
        (pages, 0),
        "pages in plugged blocks, and in others"
    );
    let pieces: Vec<_> = PLUGGED
        .iter()
        .map(|block| (memory, block * BLOCK, BLOCK))
        .collect();
    views_agree(&buffer, &pieces)?;
    drop(buffer);
    check_eq!(there(memory)?, (pages, 0), "pages after release");
    Ok(())
}

fn plugged_blocks_anonymous() -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let memory = Memory::map(BLOCKS * BLOCK, RW, flags, None, 0)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    plugged_works(&memory)
}

fn plugged_blocks_memfd() -> Result<()> {
    let file = memfd(BLOCKS * BLOCK, 0)?;
    let memory = Memory::shared(&file, BLOCKS * BLOCK)?;
    plugged_works(&memory)?;
    let blocks = (PLUGGED.len() * BLOCK / 512) as i64;
    check_eq!(fstat(&file)?.st_blocks, blocks, "blocks of the memfd");
    Ok(())
}

/// In huge pages, of which the pool has just as many as are plugged.
fn plugged_blocks_hugetlb() -> Result<()> {
    let huge = PLUGGED.len() * BLOCK / HUGE;
    let _pool = HugePool::with_free(huge as i64)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let memory = Memory::map(BLOCKS * BLOCK, RW, flags, None, 0)?;
    plugged_works(&memory)?;
    check_eq!(HugePool::free()?, 0, "free huge pages");
    Ok(())
}

/// The program continues after it, with what could be allocated.
fn pool_runs_out() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let memory = Memory::map(5 * HUGE, RW, flags, None, 0)?;
    let small = Memory::small_pages(600 * PAGE)?;
    refused(
        "more huge pages than there are",
        Errno::EFAULT,
        &[small.range(), memory.range(), small.range()],
    )?;
    refused(
        "huge pages in a row, more than there are",
        Errno::EFAULT,
        &[memory.range()],
    )?;
    let buffer = Device::open()?.create(&[memory.part(0, 3 * HUGE)])?;
    views_agree(&buffer, &[(&memory, 0, 3 * HUGE)])?;
    drop((buffer, memory));
    check_eq!(HugePool::free()?, 3, "free huge pages after all");
    Ok(())
}

fn tmpfs_runs_out() -> Result<()> {
    let place = std::env::temp_dir().join(format!("pinbuf-small-{}", std::process::id()));
    std::fs::create_dir(&place)?;
    mount(
        Some("small"),
        &place,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=4M"),
    )?;
    let result = (|| {
        let file = file_in(&place, 16 << 20)?;
        let memory = Memory::shared(&file, 16 << 20)?;
        // In the third of GUP's batches.
        refused("more than the tmpfs has", Errno::EFAULT, &[memory.range()])?;
        let buffer = Device::open()?.create(&[memory.part(0, 4 << 20)])?;
        views_agree(&buffer, &[(&memory, 0, 4 << 20)])
    })();
    umount(&place).context("the tmpfs is still in use")?;
    std::fs::remove_dir(&place)?;
    result
}

/// All is charged before anything is pinned, so nothing is allocated either.
fn memlock_runs_out() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    in_child(|| {
        let device = Device::open()?;
        become_user(USER)?;
        // Otherwise it may not read its own page map. SAFETY: no memory is passed.
        Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) })?;
        set_memlock(100 * PAGE)?;
        let memory = Memory::small_pages(101 * PAGE)?;
        let ranges = [memory.part(0, 60 * PAGE), memory.part(60 * PAGE, 41 * PAGE)];
        check_eq!(
            device.create(&ranges).map(drop),
            Err(Errno::ENOMEM),
            "one page over the limit"
        );
        check!(
            entries(&memory, 0, memory.len())?
                .iter()
                .all(|entry| *entry == Entry::Absent),
            "memory was allocated"
        );
        check_eq!(kernel::vm_pin()?, 0, "VmPin");
        let buffer = device.create(&[memory.part(0, 100 * PAGE)])?;
        memory.set(99 * PAGE, 5);
        check_eq!(buffer.map()?.get(99 * PAGE), 5, "the last page");
        Ok(())
    })
}

/// A control group of the test's own, removed when dropped: which fails while anything is charged
/// to a process in it.
pub struct Group(PathBuf);

impl Group {
    pub fn new(controller: &str) -> Result<Self> {
        kernel::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            format!("+{controller}"),
        )?;
        let path = PathBuf::from(format!("/sys/fs/cgroup/memtest-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn set(&self, file: &str, value: impl ToString) -> Result<()> {
        kernel::write(self.0.join(file), value)
    }

    pub fn number(&self, file: &str) -> Result<i64> {
        kernel::number(self.0.join(file))
    }

    pub fn event(&self, file: &str, key: &str) -> Result<i64> {
        kernel::field(&self.0.join(file).to_string_lossy(), key)
    }

    /// Puts the calling process into it.
    pub fn join(&self) -> Result<()> {
        self.set("cgroup.procs", std::process::id())
    }

    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir(&self.0).context("removing the control group")
    }
}

/// What the group of [`killed_by_cgroup`] may have.
const LIMIT: usize = 24 << 20;

/// Expects that the kernel kills a member of a control group that takes more memory than the group may have, and
/// that nothing is left behind.
fn killed_by_cgroup(take: impl FnOnce() -> Result<()>) -> Result<()> {
    let group = Group::new("memory")?;
    group.set("memory.max", LIMIT)?;
    group.set("memory.swap.max", 0)?;
    let (pins, buffers) = (kernel::pins()?, kernel::dma_bufs()?);
    let child = Child::run(|| {
        group.join()?;
        take()
    })?;
    let (status, said) = child.end(Duration::from_secs(60))?;
    check!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        "ended by {status:?}: {said}"
    );
    let kills = group.event("memory.events", "oom_kill")?;
    check!(kills > 0, "no process was killed for lack of memory");
    check_eq!(kernel::pins()?, pins, "pins after the kill");
    check_eq!(kernel::dma_bufs()?, buffers, "dma-bufs after the kill");
    // Pages in the processors' lists are uncharged late.
    let mut left = 0;
    for _ in 0..100 {
        left = group.number("memory.current")?;
        if left < 4 << 20 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    check!(
        left < 4 << 20,
        "{left} bytes are still charged to the group"
    );
    println!("# memory.max {LIMIT}: oom_kill {kills}, pins +0, memory.current {left} after");
    group.remove()
}

/// Create exceeds the group's limit: the kernel kills, as for any fault.
fn killed_in_create(make: impl Fn(usize) -> Result<Memory>) -> Result<()> {
    killed_by_cgroup(|| {
        let device = Device::open()?;
        let memory = make(4 * LIMIT)?;
        // What fits succeeds.
        drop(device.create(&[memory.part(0, LIMIT / 4)])?);
        let result = device.create(&[memory.range()]);
        anyhow::bail!("create came back: {result:?}")
    })
}

/// Memory that is discarded under a buffer and filled again, repeatedly. Root has no limit, but what its buffers
/// keep stays charged to its control group.
fn memory_cgroup_bounds_discarded_memory() -> Result<()> {
    const MEMORY: usize = 2 << 20;
    let rounds = Memory::map(PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?;
    rounds.set(0, 0);
    killed_by_cgroup(|| {
        let device = Device::open()?;
        let file = memfd(MEMORY, 0)?;
        let memory = Memory::shared(&file, MEMORY)?;
        let mut kept = Vec::new();
        loop {
            memory.touch_to_write();
            kept.push(device.create(&[memory.range()])?);
            punch_hole(&file, 0, MEMORY)?;
            rounds.set(0, kept.len() as u64);
        }
    })?;
    let kept = rounds.get(0) as usize * MEMORY;
    check!(
        (LIMIT / 2..LIMIT).contains(&kept),
        "{kept} bytes were kept in a group that may have {LIMIT}"
    );
    Ok(())
}

/// The kernel's memory that is charged to a group, in bytes.
fn kernel_memory_of(group: &Group) -> Result<i64> {
    // The kernel sums what its processors have counted, up to 64 pages each, every two seconds.
    if PAGE > 4096 {
        std::thread::sleep(Duration::from_millis(2500));
    }
    group.event("memory.stat", "kernel")
}

/// What a buffer and a device's mapping take of the kernel's memory counts for the group of the process that
/// makes them.
fn kernel_memory_is_charged() -> Result<()> {
    const PAGES: usize = 30_000;
    let group = Group::new("memory")?;
    let member = &group;
    in_child(|| {
        member.join()?;
        let memory = Memory::small_pages(2 * PAGES * PAGE)?;
        memory.touch_to_write();
        // No two are adjacent: the one between them is left out.
        let ranges: Vec<Range> = (0..PAGES)
            .map(|n| memory.part(2 * n * PAGE, PAGE))
            .collect();
        let device = Device::open()?;
        let charged = || kernel_memory_of(member);
        let before = charged()?;
        let buffer = device.create(&ranges)?;
        let info = device.describe(&buffer)?;
        check!(
            info.extents >= PAGES as u64 / 2,
            "too few extents: {info:?}"
        );
        let with_buffer = charged()?;
        check!(
            with_buffer - before >= info.kernel_bytes as i64 * 9 / 10,
            "{} bytes are charged for a list of {}",
            with_buffer - before,
            info.kernel_bytes
        );
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        importer.map(Direction::Bidirectional)?;
        let with_mapping = charged()?;
        // An entry of a scatterlist takes 32 bytes.
        check!(
            with_mapping - with_buffer >= 32 * info.extents as i64 * 9 / 10,
            "{} bytes are charged for a scatterlist of {} entries",
            with_mapping - with_buffer,
            info.extents
        );
        Ok(())
    })?;
    group.remove()
}

/// So does what each buffer and each mapping takes, however small it is. A buffer is compared with a dma-buf that has no
/// memory, of which the group pays for what the core takes.
fn small_objects_are_charged() -> Result<()> {
    const BUFFERS: usize = 2000;
    const IMPORTERS: usize = 150;
    const MAPPINGS: usize = 8;
    // Less than a buffer takes; and than a mapping's record, its node in the list and its scatterlist together, of which
    // no two are that large.
    const OF_BUFFER: i64 = 160;
    const OF_MAPPING: i64 = 128;
    let group = Group::new("memory")?;
    let member = &group;
    in_child(|| {
        member.join()?;
        let most = (2 * BUFFERS + 4 * IMPORTERS) as u64;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        // The table of descriptors grows now, and not later.
        let highest = fcntl(std::io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(most as i32 - 1))?;
        close(highest)?;
        let memory = Memory::anonymous(PAGE)?;
        let ranges = [memory.range()];
        let (device, empty) = (Device::open()?, EmptyExporter::new()?);
        drop((device.create(&ranges)?, empty.export()?));
        // The kernel adds small amounts up every two seconds.
        let charged = || {
            std::thread::sleep(Duration::from_secs(3));
            member.event("memory.stat", "slab")
        };

        let before = charged()?;
        let others = (0..BUFFERS).map(|_| empty.export());
        let others = others.collect::<std::io::Result<Vec<_>>>()?;
        let with_others = charged()?;
        let buffers = (0..BUFFERS).map(|_| device.create(&ranges));
        let buffers = buffers.collect::<nix::Result<Vec<_>>>()?;
        let (core, ours) = (with_others - before, charged()? - with_others);
        check!(
            ours - core >= OF_BUFFER * BUFFERS as i64,
            "{ours} bytes are charged for {BUFFERS} buffers, and {core} for dma-bufs without memory"
        );
        drop((others, buffers));

        let buffer = device.create(&ranges)?;
        let importers = (0..IMPORTERS).map(|_| Importer::attach(buffer.as_fd(), Limits::NONE));
        let importers = importers.collect::<std::io::Result<Vec<_>>>()?;
        let before = charged()?;
        for importer in &importers {
            for _ in 0..MAPPINGS {
                importer.map(Direction::Bidirectional)?;
            }
        }
        let (count, ours) = (IMPORTERS * MAPPINGS, charged()? - before);
        check!(
            ours >= OF_MAPPING * count as i64,
            "{ours} bytes are charged for {count} mappings"
        );
        Ok(())
    })?;
    group.remove()
}

/// A call copies its list of ranges, and may wait for ever: so the copy counts for the caller's group, too.
fn arguments_of_a_waiting_call_are_charged() -> Result<()> {
    const COUNT: usize = pinbuf_uapi::MAX_RANGES as usize;
    let group = Group::new("memory")?;
    let member = &group;
    in_child(|| {
        member.join()?;
        let device = Device::open()?;
        let (late, memory) = (Memory::small_pages(PAGE)?, Memory::small_pages(PAGE)?);
        memory.set(0, 1);
        let mut ranges = vec![memory.range(); COUNT];
        ranges[0] = late.range();
        let faults = Faults::of(&late, Mode::Missing)?;
        let before = kernel_memory_of(member)?;
        let more = std::thread::scope(|scope| {
            let caller = scope.spawn(|| device.create(&ranges));
            let more = faults
                .wait()
                .and_then(|()| Ok(kernel_memory_of(member)? - before));
            // Nobody waits for a userfaultfd that is closed.
            drop(faults);
            caller.join().expect("the caller panicked")?;
            more
        })?;
        let list = (COUNT * size_of::<Range>()) as i64;
        check!(
            more >= list / 2,
            "{more} bytes are charged while a call waits with a list of {list}"
        );
        Ok(())
    })?;
    group.remove()
}

fn memory_cgroup_kills_anonymous() -> Result<()> {
    killed_in_create(Memory::small_pages)
}

fn memory_cgroup_kills_shmem() -> Result<()> {
    killed_in_create(|len| Memory::shared(memfd(len, 0)?, len))
}

/// As an exhausted pool: an error.
fn hugetlb_cgroup_runs_out() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    let group = Group::new("hugetlb")?;
    let file = |what: &str| format!("hugetlb.{}MB.{what}", HUGE >> 20);
    group.set(&file("max"), 2 * HUGE)?;
    let group = &group;
    in_child(|| {
        group.join()?;
        let memory = huge_private(4)?;
        refused(
            "more huge pages than the group may have",
            Errno::EFAULT,
            &[memory.range()],
        )?;
        let buffer = Device::open()?.create(&[memory.part(0, 2 * HUGE)])?;
        memory.set(HUGE, stamp(1, 1));
        check_eq!(buffer.map()?.get(HUGE), stamp(1, 1), "the second huge page");
        Ok(())
    })?;
    check_eq!(
        group.number(&file("current"))?,
        0,
        "bytes still charged to the group"
    );
    check_eq!(HugePool::free()?, 4, "free huge pages");
    std::fs::remove_dir(&group.0).context("removing the control group")
}
