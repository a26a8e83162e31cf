// SPDX-License-Identifier: MIT OR Apache-2.0

//! Every kind of memory that a virtual machine monitor may have: the same bytes in all views, both
//! ways, and nothing left behind; or the error that the contract names.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::stat::{fstat, FileStat};
use pinbuf_uapi::Range;

use crate::common::{refused, refused_anywhere, views_agree, works, works_whole};
use crate::frames::{all_frames, entries, flags, with_flag, Entry, HEAD, HUGETLB, KSM, ZERO_PAGE};
use crate::swap::{force_out, page_out, Ext4, Swap};
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::kinds::{huge_private, transparent};
use pinbuf_test_harness::support::memory::{
    file_in, huge_memfd, memfd, pattern, BLOCK, GIGA, HUGE, PAGE, RW,
};
use pinbuf_test_harness::support::process::{in_child, Child};
use pinbuf_test_harness::support::uffd::{Faults, Mode};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, kernel, udmabuf, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "kinds":
    private_anonymous,
    private_hugetlb,
    private_hugetlb_file,
    shared_hugetlb,
    shared_hugetlb_file,
    shared_memfd,
    shared_tmpfs_file,
    shared_anonymous,
    system_v,
    shared_disk_file,
    disk_file_behind_sparse_memory,
    frozen_disk_file_behind_sparse_memory,
    private_disk_file,
    transparent_huge,
    transparent_64k,
    gigantic,
    same_page_merged,
    zero_page,
    zero_page_huge,
    locked,
    locked_on_fault,
    swapped_out,
    shmem_swapped_out,
    droppable,
    secret,
    read_only,
    no_access,
    page_frames,
    device_registers,
    own_mapping,
    mapping_of_udmabuf,
    userfault_missing,
    userfault_minor,
    userfault_write_protected,
    several_kinds_in_a_range,
    several_kinds_in_a_call,
    hole_in_the_middle,
    fork_private_hugetlb,
    fork_private_hugetlb_no_spare,
    fork_private_hugetlb_not_inherited,
}

const SMALL: usize = 100 * PAGE;

fn private_anonymous() -> Result<()> {
    let memory = Memory::small_pages(SMALL)?;
    memory.write(0, &pattern(1, 0, SMALL / 2));
    works_whole(&memory)?;
    Ok(())
}

/// Proves that the memory belongs to hugetlb, and uses it as a whole and from odd offsets.
fn hugetlb_works(memory: &Memory) -> Result<()> {
    memory.touch();
    let pfns = all_frames(memory)?;
    check_eq!(with_flag(&pfns, HUGETLB)?, pfns.len(), "pages of hugetlb");
    check_eq!(with_flag(&pfns, HEAD)?, pfns.len() / BLOCK, "huge pages");
    let info = works_whole(memory)?;
    check_eq!(info.pins, memory.len() as u64 / HUGE as u64, "pins");
    works(&[(memory, 511 * PAGE, 3 * PAGE), (memory, 7 * PAGE, PAGE)])?;
    Ok(())
}

fn private_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    hugetlb_works(&huge_private(2)?)?;
    check_eq!(HugePool::free()?, 2, "free huge pages after all");
    Ok(())
}

fn huge_file() -> Result<File> {
    file_in("/dev/hugepages", 2 * HUGE)
}

/// As QEMU's `memory-backend-file,mem-path=/dev/hugepages` without `share=on`.
fn private_hugetlb_file() -> Result<()> {
    let _pool = HugePool::with_free(4)?;
    let file = huge_file()?;
    let shared = Memory::shared(&file, 2 * HUGE)?;
    shared.set(PAGE, 77);
    let memory = Memory::private(&file, 2 * HUGE)?;
    // Reading it maps the file's own page; the pin has to make it private first.
    check_eq!(memory.get(PAGE), 77, "the file's bytes");
    let info = works_whole(&memory)?;
    check_eq!(info.pins, 2, "pins");
    check_eq!(shared.get(PAGE), 77, "the file after its copy was written");
    Ok(())
}

fn shared_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let memory = Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE)?;
    hugetlb_works(&memory)?;
    drop(memory);
    check_eq!(HugePool::free()?, 2, "free huge pages after all");
    Ok(())
}

fn shared_hugetlb_file() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let file = huge_file()?;
    hugetlb_works(&Memory::shared(&file, 2 * HUGE)?)
}

fn shared_memfd() -> Result<()> {
    let file = memfd(SMALL, 0)?;
    let memory = Memory::shared(&file, SMALL)?;
    works_whole(&memory)?;
    agrees_with_file(&memory, &file)
}

fn agrees_with_file(memory: &Memory, file: &impl AsFd) -> Result<()> {
    let mut seen = vec![0; memory.len()];
    let count = nix::sys::uio::pread(file, &mut seen, 0)?;
    let mut expected = vec![0; memory.len()];
    memory.read(0, &mut expected);
    same("the file", 0, &seen[..count], &expected)
}

fn shared_tmpfs_file() -> Result<()> {
    let file = file_in("/dev/shm", SMALL)?;
    let memory = Memory::shared(&file, SMALL)?;
    works_whole(&memory)?;
    agrees_with_file(&memory, &file)
}

fn shared_anonymous() -> Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    works_whole(&Memory::map(SMALL, RW, flags, None, 0)?)?;
    Ok(())
}

/// A System V segment, attached over memory that the test owns.
fn system_v() -> Result<()> {
    // SAFETY: no memory is passed.
    let id = Errno::result(unsafe { libc::shmget(libc::IPC_PRIVATE, SMALL, 0o600) })?;
    let memory = Memory::anonymous(SMALL)?;
    // SAFETY: replaces the test's own mapping, which is as large.
    let attached = unsafe { libc::shmat(id, memory.at(0).cast(), libc::SHM_REMAP) };
    // SAFETY: no memory is passed; the segment goes with its last user.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    check_eq!(attached.cast::<u8>(), memory.at(0), "shmat's address");
    works_whole(&memory)?;
    Ok(())
}

/// The kernel does not pin these for long; what the file holds is not touched.
fn shared_disk_file() -> Result<()> {
    let disk = Ext4::new()?;
    let file = file_in(disk.path(), SMALL)?;
    let memory = Memory::shared(&file, SMALL)?;
    refused_anywhere("a sparse file on ext4", Errno::EFAULT, memory.range())?;
    memory.write(0, &pattern(2, 0, SMALL));
    refused_anywhere("a dirty file on ext4", Errno::EFAULT, memory.range())?;
    file.sync_all()?;
    refused_anywhere("a clean file on ext4", Errno::EFAULT, memory.range())?;
    agrees_with_file(&memory, &file)?;
    let mut seen = vec![0; SMALL];
    memory.read(0, &mut seen);
    same("the file", 0, &seen, &pattern(2, 0, SMALL))
    // That the file system can be unmounted shows that nothing holds its pages.
}

/// What is not pinned is not written to either: no block of the file is allocated, and its time does not change.
fn disk_file_behind_sparse_memory() -> Result<()> {
    let disk = Ext4::new()?;
    let file = file_in(disk.path(), SMALL)?;
    let memory = Memory::small_pages(2 * SMALL)?;
    memory.replace_by(SMALL, SMALL, file.as_fd(), 0)?;
    let before = fstat(&file)?;
    refused("a file on ext4 behind it", Errno::EFAULT, &[memory.range()])?;
    let after = fstat(&file)?;
    let seen = |stat: &FileStat| (stat.st_blocks, stat.st_mtime, stat.st_mtime_nsec);
    check_eq!(seen(&after), seen(&before), "blocks and time of the file");
    Ok(())
}

nix::ioctl_readwrite!(
    /// FIFREEZE.
    freeze, b'X', 119, libc::c_int
);
nix::ioctl_readwrite!(
    /// FITHAW.
    thaw, b'X', 120, libc::c_int
);

/// A file system that stops all writes to it.
struct Frozen(File);

impl Frozen {
    fn new(disk: &Ext4) -> Result<Self> {
        let root = File::open(disk.path())?;
        // SAFETY: the argument is not used.
        unsafe { freeze(root.as_raw_fd(), std::ptr::null_mut()) }.context("freezing")?;
        Ok(Self(root))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: the argument is not used.
        if let Err(error) = unsafe { thaw(self.0.as_raw_fd(), std::ptr::null_mut()) } {
            eprintln!("thawing: {error}");
        }
    }
}

/// A write fault there cannot be killed. Create makes none.
fn frozen_disk_file_behind_sparse_memory() -> Result<()> {
    let disk = Ext4::new()?;
    let file = file_in(disk.path(), SMALL)?;
    let frozen = Frozen::new(&disk)?;
    let mut child = Child::run(|| {
        let memory = Memory::small_pages(2 * SMALL)?;
        memory.replace_by(SMALL, SMALL, file.as_fd(), 0)?;
        refused("a file on ext4 behind it", Errno::EFAULT, &[memory.range()])
    })?;
    let start = Instant::now();
    while child.runs()? && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let waits = child.runs()?;
    drop(frozen);
    check!(!waits, "create waits for a frozen file system");
    child.join()
}

fn private_disk_file() -> Result<()> {
    let disk = Ext4::new()?;
    let file = file_in(disk.path(), SMALL)?;
    nix::sys::uio::pwrite(&file, &pattern(3, 0, SMALL), 0)?;
    let memory = Memory::private(&file, SMALL)?;
    memory.touch();
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mut seen = vec![0; SMALL];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(3, 0, SMALL))?;
    views_agree(&buffer, &[(&memory, 0, SMALL)])?;
    nix::sys::uio::pread(&file, &mut seen, 0)?;
    same("the file", 0, &seen, &pattern(3, 0, SMALL))
}

fn transparent_huge() -> Result<()> {
    let memory = transparent(2)?;
    let info = works_whole(&memory)?;
    check!(info.extents <= 2, "{} extents", info.extents);
    check_eq!(info.pins, 2 * BLOCK as u64, "pins, one a page");
    works(&[(&memory, (BLOCK - 12) * PAGE, 24 * PAGE)])?;
    Ok(())
}

/// Says when transparent huge pages of a size are used. The file shows all choices, with the one
/// that is taken in brackets.
fn sizes(size: usize, choice: &str) -> Result<impl Drop> {
    struct Restore(String, String);
    impl Drop for Restore {
        fn drop(&mut self) {
            if let Err(error) = kernel::write(&self.0, &self.1) {
                eprintln!("{error:#}");
            }
        }
    }
    let path = kernel::transparent_size(size);
    let text = kernel::read(&path)?;
    let before = text
        .split(['[', ']'])
        .nth(1)
        .context("no choice is taken")?;
    let restore = Restore(path.clone(), before.to_owned());
    kernel::write(&path, choice)?;
    Ok(restore)
}

/// Pages of 64 KiB.
fn transparent_64k() -> Result<()> {
    let size = 16;
    let _small = sizes(size * PAGE, "always")?;
    let _large = sizes(HUGE, "never")?;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(64 * size * PAGE, HUGE, RW, private, None, 0)?;
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.set(offset, 1);
    }
    let pfns = all_frames(&memory)?;
    let mut large = 0;
    for chunk in pfns.chunks_exact(size) {
        let whole = chunk.windows(2).all(|pair| pair[1] == pair[0] + 1);
        large += usize::from(whole && chunk[0] % 16 == 0 && flags(chunk[0])? & HEAD != 0);
    }
    check!(large >= 32, "{large} of 64 pages are pages of 64 KiB");
    println!("# {large} of 64 are pages of 64 KiB");
    let info = works_whole(&memory)?;
    let most = 64 + 16 * (64 - large as u64);
    check!(info.extents <= most, "{} extents, not {most}", info.extents);
    // Parts of them.
    works(&[(&memory, 5 * PAGE, 20 * PAGE), (&memory, 63 * PAGE, PAGE)])?;
    Ok(())
}

/// 1 GiB, which the guest has in its pool from its start.
fn gigantic() -> Result<()> {
    let path = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    check!(
        kernel::number(path)? > 0,
        "no free page of 1 GiB: boot with hugepagesz=1G hugepages=1"
    );
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_1GB;
    let memory = Memory::map(GIGA, RW, flags, None, 0)?;
    let info = works_whole(&memory)?;
    check_eq!((info.pins, info.extents), (1, 1), "pins and extents");
    check!(info.kernel_bytes <= 256, "{} bytes", info.kernel_bytes);
    works(&[
        (&memory, GIGA - PAGE, PAGE),
        (&memory, 511 * PAGE, 2 * PAGE),
    ])?;
    drop(memory);
    check!(kernel::number(path)? > 0, "the page did not come back");
    Ok(())
}

/// Pages that were merged are the writer's own again; their twins stay as they were.
fn same_page_merged() -> Result<()> {
    let memory = Memory::small_pages(32 * PAGE)?;
    for page in 0..32 {
        memory.write(page * PAGE, &pattern(5, 0, PAGE));
    }
    memory.advise(0, memory.len(), libc::MADV_MERGEABLE)?;
    let _scan = Setting::set("/sys/kernel/mm/ksm/pages_to_scan", 10_000)?;
    let _pause = Setting::set("/sys/kernel/mm/ksm/sleep_millisecs", 10)?;
    let run = Setting::set("/sys/kernel/mm/ksm/run", 1)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let merged = with_flag(&all_frames(&memory)?, KSM)?;
        if merged == 32 {
            break;
        }
        check!(Instant::now() < deadline, "{merged} of 32 pages merged");
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = all_frames(&memory)?;
    check!(
        before.iter().all(|pfn| *pfn == before[0]),
        "merged pages in several frames"
    );
    let device = Device::open()?;
    let buffer = device.create(&[memory.part(0, 16 * PAGE)])?;
    let after = all_frames(&memory)?;
    check_eq!(
        with_flag(&after[..16], KSM)?,
        0,
        "pinned pages still merged"
    );
    let mut own = after[..16].to_vec();
    own.sort_unstable();
    own.dedup();
    check_eq!(own.len(), 16, "frames of the pinned pages");
    check_eq!(
        with_flag(&after[16..], KSM)?,
        16,
        "merged pages besides the buffer"
    );
    views_agree(&buffer, &[(&memory, 0, 16 * PAGE)])?;
    let mut seen = vec![0; PAGE];
    for page in 16..32 {
        memory.read(page * PAGE, &mut seen);
        same("a twin", page * PAGE, &seen, &pattern(5, 0, PAGE))?;
    }
    // Pinned pages are not merged again, although their contents are equal.
    for page in 0..16 {
        memory.write(page * PAGE, &pattern(5, 0, PAGE));
    }
    let scans = kernel::number("/sys/kernel/mm/ksm/full_scans")?;
    while kernel::number("/sys/kernel/mm/ksm/full_scans")? < scans + 3 {
        check!(Instant::now() < deadline, "ksmd does not scan");
        std::thread::sleep(Duration::from_millis(20));
    }
    check_eq!(
        all_frames(&memory)?[..16],
        after[..16],
        "frames of the buffer's pages after three scans"
    );
    drop(run);
    Ok(())
}

/// A page that was only read is the zero page, which must never be written.
fn zero_page() -> Result<()> {
    let memory = Memory::small_pages(16 * PAGE)?;
    memory.touch();
    check_eq!(
        with_flag(&all_frames(&memory)?, ZERO_PAGE)?,
        16,
        "pages that are the zero page"
    );
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    check_eq!(
        with_flag(&all_frames(&memory)?, ZERO_PAGE)?,
        0,
        "pinned pages that are the zero page"
    );
    views_agree(&buffer, &[(&memory, 0, 16 * PAGE)])?;
    let other = Memory::small_pages(PAGE)?;
    let mut seen = vec![1; PAGE];
    other.read(0, &mut seen);
    same("the zero page", 0, &seen, &vec![0; PAGE])
}

fn zero_page_huge() -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    memory.touch();
    check_eq!(
        with_flag(&all_frames(&memory)?, ZERO_PAGE)?,
        BLOCK,
        "pages of the huge zero page"
    );
    works(&[(&memory, 100 * PAGE, 200 * PAGE)])?;
    check_eq!(
        with_flag(&all_frames(&memory)?[100..300], ZERO_PAGE)?,
        0,
        "pinned pages of the huge zero page"
    );
    Ok(())
}

/// Uses locked memory, which is accounted separately from pinned memory.
fn locked_with(flags: u32) -> Result<()> {
    let memory = Memory::small_pages(SMALL)?;
    let before = kernel::vm_lck()?;
    // SAFETY: locks the test's own mapping.
    let result = unsafe { libc::mlock2(memory.at(0).cast(), SMALL, flags) };
    Errno::result(result).context("mlock2")?;
    works_whole(&memory)?;
    check_eq!(kernel::vm_lck()? - before, SMALL as i64, "VmLck");
    Ok(())
}

fn locked() -> Result<()> {
    locked_with(0)
}

fn locked_on_fault() -> Result<()> {
    locked_with(libc::MLOCK_ONFAULT)
}

fn swapped_out() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let memory = Memory::small_pages(SMALL)?;
    memory.write(0, &pattern(6, 0, SMALL));
    force_out(&memory)?;
    check!(
        entries(&memory, 0, SMALL)?
            .iter()
            .all(|entry| *entry == Entry::Swapped),
        "not all pages are swapped out"
    );
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mut seen = vec![0; SMALL];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(6, 0, SMALL))?;
    views_agree(&buffer, &[(&memory, 0, SMALL)])
}

fn shmem_swapped_out() -> Result<()> {
    let _swap = Swap::on(64 << 20)?;
    let file = memfd(SMALL, 0)?;
    let memory = Memory::shared(&file, SMALL)?;
    memory.write(0, &pattern(7, 0, SMALL));
    force_out(&memory)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mut seen = vec![0; SMALL];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(7, 0, SMALL))?;
    views_agree(&buffer, &[(&memory, 0, SMALL)])
}

/// `MAP_DROPPABLE`: memory that the kernel may take away, but not while it is pinned.
fn droppable() -> Result<()> {
    const MAP_DROPPABLE: i32 = 8;
    let flags = MAP_DROPPABLE | libc::MAP_ANONYMOUS;
    let memory = Memory::map(SMALL, RW, flags, None, 0).context("MAP_DROPPABLE")?;
    memory.write(0, &pattern(8, 0, SMALL));
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    page_out(&memory)?;
    let mut seen = vec![0; SMALL];
    memory.read(0, &mut seen);
    same("pinned droppable memory", 0, &seen, &pattern(8, 0, SMALL))?;
    views_agree(&buffer, &[(&memory, 0, SMALL)])
}

fn secret() -> Result<()> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    Errno::result(fd).context("memfd_secret")?;
    // SAFETY: the call has just returned it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    nix::unistd::ftruncate(&fd, 2 * PAGE as i64)?;
    let memory = Memory::shared(&fd, 2 * PAGE)?;
    refused_anywhere("untouched secret memory", Errno::EFAULT, memory.range())?;
    memory.set(0, 9);
    refused_anywhere("secret memory", Errno::EFAULT, memory.range())?;
    check_eq!(memory.get(0), 9, "the secret");
    Ok(())
}

/// Of every kind that can be mapped read-only.
fn read_only() -> Result<()> {
    let anonymous = Memory::small_pages(2 * PAGE)?;
    anonymous.set(0, 1);
    anonymous.protect(0, 2 * PAGE, libc::PROT_READ)?;
    refused_anywhere("read-only memory", Errno::EFAULT, anonymous.range())?;
    let file = memfd(2 * PAGE, 0)?;
    let shared = libc::MAP_SHARED;
    let memory = Memory::map(2 * PAGE, libc::PROT_READ, shared, Some(file.as_fd()), 0)?;
    refused_anywhere("a read-only memfd", Errno::EFAULT, memory.range())?;
    let _pool = HugePool::with_free(1)?;
    let file = huge_memfd(HUGE)?;
    let memory = Memory::map(HUGE, libc::PROT_READ, shared, Some(file.as_fd()), 0)?;
    refused_anywhere("read-only huge pages", Errno::EFAULT, memory.range())
}

fn no_access() -> Result<()> {
    let memory = Memory::small_pages(2 * PAGE)?;
    memory.set(0, 1);
    memory.protect(0, 2 * PAGE, libc::PROT_NONE)?;
    refused_anywhere("PROT_NONE", Errno::EFAULT, memory.range())?;
    memory.protect(0, 2 * PAGE, RW)?;
    check_eq!(memory.get(0), 1, "memory that was refused");
    works_whole(&memory)?;
    Ok(())
}

/// `VM_PFNMAP` of ordinary memory.
fn page_frames() -> Result<()> {
    let importer = pinbuf_test_importer::open()?;
    let memory = Memory::shared(&importer, PAGE)?;
    memory.set(0, 3);
    refused_anywhere("a page frame mapping", Errno::EFAULT, memory.range())?;
    check_eq!(memory.get(0), 3, "the page");
    Ok(())
}

/// `VM_IO`: a PCI device's own memory.
fn device_registers() -> Result<()> {
    let mut tried = 0;
    for entry in std::fs::read_dir("/sys/bus/pci/devices")? {
        let directory = entry?.path();
        for bar in 0..6 {
            let file = File::options()
                .read(true)
                .write(true)
                .open(directory.join(format!("resource{bar}")));
            let Ok(file) = file else { continue };
            // A port range cannot be mapped.
            let Ok(memory) = Memory::shared(&file, PAGE) else {
                continue;
            };
            refused_anywhere("a device's memory", Errno::EFAULT, memory.range())?;
            tried += 1;
        }
    }
    check!(tried > 0, "no device with memory that can be mapped");
    Ok(())
}

fn own_mapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    refused_anywhere("our own mapping, untouched", Errno::EFAULT, mapped.range())?;
    mapped.touch();
    refused_anywhere("our own mapping", Errno::EFAULT, mapped.range())?;
    // There is no alternative: the file cannot be mapped privately.
    let private = buffer.map_as(0, PAGE, RW, libc::MAP_PRIVATE).map(drop);
    check!(private.is_err(), "a private mapping of a buffer");
    Ok(())
}

fn mapping_of_udmabuf() -> Result<()> {
    let file = udmabuf::sealed_memfd(4 * PAGE)?;
    let other = udmabuf::buffer(&file, 4 * PAGE)?;
    let memory = Memory::shared(&other, 4 * PAGE)?;
    memory.set(0, 5);
    refused_anywhere("udmabuf's mapping", Errno::EFAULT, memory.range())?;
    check_eq!(memory.get(0), 5, "the page");
    Ok(())
}

/// Create waits for each page, and has what it was given.
fn answered(
    memory: &Memory,
    faults: &Faults,
    seed: u64,
    answer: impl Fn(&Faults, u64) -> Result<()>,
) -> Result<()> {
    let device = Device::open()?;
    let pages = memory.len() / PAGE;
    let buffer = std::thread::scope(|scope| {
        let caller = scope.spawn(|| device.create(&[memory.range()]));
        for page in 0..pages {
            let addr = faults.take()?;
            check_eq!(addr, memory.addr() + (page * PAGE) as u64, "what faulted");
            check!(!caller.is_finished(), "create did not wait");
            answer(faults, addr)?;
        }
        anyhow::Ok(caller.join().expect("the caller panicked"))
    })?;
    let buffer = buffer.context("PINBUF_CREATE")?;
    let mut seen = vec![0; memory.len()];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(seed, 0, memory.len()))?;
    views_agree(&buffer, &[(memory, 0, memory.len())])
}

fn userfault_missing() -> Result<()> {
    let memory = Memory::small_pages(6 * PAGE)?;
    let faults = Faults::of(&memory, Mode::Missing)?;
    answered(&memory, &faults, 10, |faults, addr| {
        faults.copy(addr, &pattern(10, addr - memory.addr(), PAGE))
    })
}

/// The pages are in the file already, as postcopy with shared memory has it.
fn userfault_minor() -> Result<()> {
    let file = memfd(6 * PAGE, 0)?;
    let memory = Memory::shared(&file, 6 * PAGE)?;
    let other = Memory::shared(&file, 6 * PAGE)?;
    other.write(0, &pattern(11, 0, 6 * PAGE));
    let faults = Faults::of(&memory, Mode::Minor)?;
    answered(&memory, &faults, 11, |faults, addr| {
        faults.resume(addr, PAGE)
    })
}

/// A pin is a write. What devices write afterwards is not seen.
fn userfault_write_protected() -> Result<()> {
    let memory = Memory::small_pages(6 * PAGE)?;
    memory.write(0, &pattern(12, 0, 6 * PAGE));
    let faults = Faults::of(&memory, Mode::Protected)?;
    faults.protect(memory.addr(), memory.len(), true)?;
    answered(&memory, &faults, 12, |faults, addr| {
        faults.protect(addr, PAGE, false)
    })
}

/// Anonymous memory, shmem, a private file and huge pages, next to each other.
fn mixed() -> Result<(HugePool, Memory)> {
    let pool = HugePool::with_free(2)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(3 * HUGE, HUGE, RW, flags, None, 0)?;
    let shmem = memfd(64 * PAGE, 0)?;
    memory.replace_by(64 * PAGE, 64 * PAGE, shmem.as_fd(), 0)?;
    memory.replace_by(HUGE, HUGE, huge_memfd(HUGE)?.as_fd(), 0)?;
    memory.advise(2 * HUGE, PAGE, libc::MADV_DONTDUMP)?;
    Ok((pool, memory))
}

fn several_kinds_in_a_range() -> Result<()> {
    let (_pool, memory) = mixed()?;
    works_whole(&memory)?;
    works(&[(&memory, 100 * PAGE, 60 * PAGE)])?;
    works(&[(&memory, HUGE - 5 * PAGE, 9 * PAGE)])?;
    works(&[(&memory, 2 * HUGE - 5 * PAGE, 9 * PAGE)])?;
    Ok(())
}

fn several_kinds_in_a_call() -> Result<()> {
    let (_pool, memory) = mixed()?;
    let file = file_in("/dev/shm", SMALL)?;
    let shmem = Memory::shared(&file, SMALL)?;
    let transparent = transparent(1)?;
    works(&[
        (&shmem, 7 * PAGE, 20 * PAGE),
        (&memory, HUGE + 9 * PAGE, 5 * PAGE),
        (&transparent, 3 * PAGE, 30 * PAGE),
        (&memory, HUGE + 14 * PAGE, 5 * PAGE),
        (&memory, 0, 70 * PAGE),
        (&shmem, 0, 7 * PAGE),
    ])?;
    Ok(())
}

/// Refused as a whole, in small pages and in huge ones.
fn hole_in_the_middle() -> Result<()> {
    let memory = Memory::small_pages(1200 * PAGE)?;
    memory.unmap(600 * PAGE, PAGE)?;
    refused("a hole in small pages", Errno::EFAULT, &[memory.range()])?;
    let (_pool, memory) = mixed()?;
    memory.unmap(HUGE, HUGE)?;
    refused("a hole between kinds", Errno::EFAULT, &[memory.range()])?;
    let pieces = [(0, HUGE), (2 * HUGE, HUGE)].map(|(at, len)| memory.part(at, len));
    let buffer = Device::open()?.create(&pieces)?;
    drop(buffer);
    let gap: Vec<Range> = vec![pieces[0], memory.part(HUGE, PAGE), pieces[1]];
    refused("a range in the hole", Errno::EFAULT, &gap)
}

/// The child gets its copy at once; parent and buffer still agree.
fn fork_private_hugetlb() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let memory = huge_private(1)?;
    memory.write(0, &pattern(13, 0, HUGE));
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let before = all_frames(&memory)?;
    in_child(|| {
        let mut seen = vec![0; HUGE];
        memory.read(0, &mut seen);
        same("the child's memory", 0, &seen, &pattern(13, 0, HUGE))?;
        check!(
            all_frames(&memory)? != before,
            "the child has the pinned page"
        );
        memory.write(0, &pattern(14, 0, HUGE));
        Ok(())
    })?;
    check_eq!(all_frames(&memory)?, before, "the parent's frames");
    let mut seen = vec![0; HUGE];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(13, 0, HUGE))?;
    views_agree(&buffer, &[(&memory, 0, HUGE)])
}

/// Without a page for the copy the fork fails, and parent and buffer still agree.
fn fork_private_hugetlb_no_spare() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let memory = huge_private(1)?;
    memory.write(0, &pattern(15, 0, HUGE));
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let before = all_frames(&memory)?;
    let result = in_child(|| Ok(()));
    let error = result.err().context("fork without a spare huge page")?;
    check_eq!(
        error.downcast_ref::<Errno>(),
        Some(&Errno::ENOMEM),
        "errno of fork"
    );
    check_eq!(all_frames(&memory)?, before, "the parent's frames");
    views_agree(&buffer, &[(&memory, 0, HUGE)])
}

/// With `MADV_DONTFORK`, as the header recommends, no spare page is needed.
fn fork_private_hugetlb_not_inherited() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let memory = huge_private(1)?;
    memory.write(0, &pattern(16, 0, HUGE));
    memory.advise(0, HUGE, libc::MADV_DONTFORK)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let before = all_frames(&memory)?;
    in_child(|| {
        let mapped = buffer.map()?;
        mapped.set(8, 5);
        check!(all_frames(&memory).is_err(), "the child has the memory");
        Ok(())
    })?;
    check_eq!(memory.get(8), 5, "what the child wrote through the buffer");
    check_eq!(all_frames(&memory)?, before, "the parent's frames");
    views_agree(&buffer, &[(&memory, 0, HUGE)])?;
    let fd = buffer.as_fd().as_raw_fd();
    check_eq!(device.info(fd)?.pins, 1, "pins");
    Ok(())
}
