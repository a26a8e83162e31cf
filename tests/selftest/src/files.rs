// SPDX-License-Identifier: MIT OR Apache-2.0

//! Buffers of files' pages, named by file and offset: `PINBUF_CREATE_FROM_FILES`.

use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag, SealFlag};
use nix::sys::stat::{fstat, Mode};
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Backing, Create, Range};

use pinbuf_test_harness::support::device::create;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{
    file_in, huge_memfd, memfd, pattern, punch_hole, HUGE, PAGE,
};
use pinbuf_test_harness::support::view::{agree, same, DeviceView, KernelView, Mapped, Source};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "files":
    memfd_agrees within 240,
    tmpfs_file_agrees,
    hugetlb_agrees_at_any_page within 240,
    huge_pages_of_shmem,
    order_and_files,
    never_mapped_is_filled,
    never_mapped_hugetlb_is_filled,
    reserved_is_cleared,
    swapped_by_a_hole,
    beyond_the_end,
    other_files,
    not_open_for_both,
    append_only,
    holes_filled_by_two within 240,
    sealed,
    no_seal_while_pinned,
    store_exhausted,
    pool_exhausted,
    arguments,
    charged,
}

/// Makes a buffer of `len` bytes of a file from `offset` on, and compares all views of it with a
/// mapping of the file, each byte, both ways.
fn all_views_agree(fd: impl AsFd, memory: &Memory, offset: usize, len: usize) -> Result<()> {
    let device = Device::open()?;
    let buffer = device
        .create_from_files(&[(fd.as_fd(), offset, len)])
        .context("PINBUF_CREATE")?;
    check_eq!(buffer.len()?, len, "the buffer's size");
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    let source = Source {
        buffer: &buffer,
        pieces: vec![(memory, offset, len)],
    };
    let cpu = Mapped {
        buffer: &buffer,
        memory: &mapped,
    };
    let sg = DeviceView {
        importer: &importer,
        mapping,
    };
    agree(&[&source, &cpu, &sg, &KernelView(&importer)], len)
}

fn memfd_agrees() -> Result<()> {
    for pages in [1, 2, 17, 513, 1300] {
        let fd = memfd((pages + 3) * PAGE, 0)?;
        let memory = Memory::shared(&fd, (pages + 3) * PAGE)?;
        all_views_agree(&fd, &memory, 0, pages * PAGE)?;
        all_views_agree(&fd, &memory, 3 * PAGE, pages * PAGE)
            .with_context(|| format!("{pages} pages"))?;
    }
    Ok(())
}

fn tmpfs_file_agrees() -> Result<()> {
    let file = file_in("/dev/shm", 40 * PAGE)?;
    let memory = Memory::shared(&file, 40 * PAGE)?;
    all_views_agree(&file, &memory, PAGE, 39 * PAGE)
}

fn hugetlb_agrees_at_any_page() -> Result<()> {
    let _pool = HugePool::with_free(3)?;
    let fd = huge_memfd(3 * HUGE)?;
    let memory = Memory::shared(&fd, 3 * HUGE)?;
    let device = Device::open()?;
    for (offset, len, pins) in [
        (0, 3 * HUGE, 3),
        (PAGE, HUGE, 2),
        (HUGE - PAGE, PAGE, 1),
        (5 * PAGE, 2 * PAGE, 1),
        (HUGE + PAGE, 2 * HUGE - PAGE, 2),
    ] {
        all_views_agree(&fd, &memory, offset, len)
            .with_context(|| format!("{len:#x} bytes at {offset:#x}"))?;
        let buffer = device.create_from_files(&[(fd.as_fd(), offset, len)])?;
        check_eq!(device.describe(&buffer)?.pins, pins, "one pin a huge page");
    }
    Ok(())
}

/// A large folio in the page cache is pinned once, wherever in it the range begins.
fn huge_pages_of_shmem() -> Result<()> {
    let directory = tempfile_directory()?;
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "huge=always,size=64m", "none"])
        .arg(&directory)
        .status()?;
    check!(mount.success(), "mounting tmpfs with huge=always");
    let result = (|| {
        let file = file_in(&directory, 4 * HUGE)?;
        let memory = Memory::shared(&file, 4 * HUGE)?;
        memory.touch();
        let device = Device::open()?;
        let buffer = device.create_from_files(&[(file.as_fd(), 0, 4 * HUGE)])?;
        // Fragmented memory may leave some of them small, not all.
        let info = device.describe(&buffer)?;
        check!(info.pins <= 3 + 512, "{} pins of 4 huge pages", info.pins);
        drop(buffer);
        all_views_agree(&file, &memory, 7 * PAGE, 2 * HUGE + 5 * PAGE)?;
        drop((file, memory));
        // The last huge page reaches beyond the file's end, where nothing may be had of it.
        let file = file_in(&directory, HUGE + 10 * PAGE)?;
        let memory = Memory::shared(&file, HUGE + 10 * PAGE)?;
        memory.touch();
        for (from, pages) in [(0, 1024), (10, 1014), (511, 12), (521, 2)] {
            let named = [(file.as_fd(), from * PAGE, pages * PAGE)];
            let result = device.create_from_files(&named).map(drop);
            check_eq!(result, Err(Errno::EINVAL), "{pages} pages from {from}");
        }
        all_views_agree(&file, &memory, 10 * PAGE, HUGE)
    })();
    let umount = Command::new("umount").arg(&directory).status()?;
    std::fs::remove_dir(&directory)?;
    result?;
    check!(umount.success(), "unmounting tmpfs");
    Ok(())
}

fn tempfile_directory() -> Result<std::path::PathBuf> {
    let path = std::env::temp_dir().join(format!("pinbuf-files-{}", std::process::id()));
    std::fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

fn order_and_files() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let small = memfd(8 * PAGE, 0)?;
    let huge = huge_memfd(HUGE)?;
    let (a, b) = (
        Memory::shared(&small, 8 * PAGE)?,
        Memory::shared(&huge, HUGE)?,
    );
    a.write(0, &pattern(1, 0, a.len()));
    b.write(0, &pattern(2, 0, b.len()));
    // Also twice, overlapping, and backwards.
    let parts = [
        (&small, 1, 4 * PAGE, 2 * PAGE),
        (&huge, 2, 9 * PAGE, 3 * PAGE),
        (&huge, 2, 8 * PAGE, 2 * PAGE),
        (&small, 1, 0, 8 * PAGE),
        (&small, 1, 5 * PAGE, PAGE),
        (&huge, 2, 0, HUGE),
    ];
    let named: Vec<_> = parts
        .iter()
        .map(|&(fd, _, offset, len)| (fd.as_fd(), offset, len))
        .collect();
    let buffer = Device::open()?.create_from_files(&named)?;
    let mapped = buffer.map()?;
    let mut at = 0;
    for (_, seed, offset, len) in parts {
        let mut seen = vec![0; len];
        mapped.read(at, &mut seen);
        same("the mapping", at, &seen, &pattern(seed, offset as u64, len))?;
        at += len;
    }
    check_eq!(mapped.len(), at, "the sum of the lengths");
    Ok(())
}

/// What the file has no page for gets one, of zeros; what lies beside gets none.
fn never_mapped_is_filled() -> Result<()> {
    let fd = memfd(3000 * PAGE, 0)?;
    let buffer = Device::open()?.create_from_files(&[(fd.as_fd(), 1000 * PAGE, 1500 * PAGE)])?;
    let blocks = fstat(&fd)?.st_blocks as usize * 512;
    check_eq!(blocks, 1500 * PAGE, "bytes that the file has");
    let mapped = buffer.map()?;
    let mut seen = vec![1; mapped.len()];
    mapped.read(0, &mut seen);
    check!(seen.iter().all(|&byte| byte == 0), "it is not all zeros");
    mapped.write(7 * PAGE, b"through the dma-buf");
    let mut file = [0; 19];
    nix::sys::uio::pread(&fd, &mut file, 1007 * PAGE as i64)?;
    check_eq!(&file, b"through the dma-buf", "what the file reads");
    Ok(())
}

fn never_mapped_hugetlb_is_filled() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let free = HugePool::free()?;
    let fd = huge_memfd(4 * HUGE)?;
    let buffer = Device::open()?.create_from_files(&[(fd.as_fd(), HUGE - PAGE, 2 * PAGE)])?;
    check_eq!(HugePool::free()?, free - 2, "huge pages that are left");
    let mapped = buffer.map()?;
    mapped.write(PAGE - 4, b"boundary");
    let memory = Memory::shared(&fd, 2 * HUGE)?;
    let mut seen = [0; 8];
    memory.read(HUGE - 4, &mut seen);
    check_eq!(&seen, b"boundary", "what a mapping shows");
    Ok(())
}

/// Pages that `fallocate` reserved hold what was there before until the kernel has a reason to clear
/// them. Where it clears all pages as it allocates them (`init_on_alloc`, Debian's default), this
/// cannot fail; our debug kernel does not.
fn reserved_is_cleared() -> Result<()> {
    const LEN: usize = 16 << 20;
    // What the pages hold from before.
    let memory = Memory::anonymous(2 * LEN)?;
    for page in 0..memory.len() / PAGE {
        memory.write(page * PAGE, &[0xa5; PAGE]);
    }
    drop(memory);
    let fd = memfd(LEN, 0)?;
    // SAFETY: touches no memory of this process.
    Errno::result(unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, LEN as i64) })?;
    let buffer = Device::open()?.create_from_files(&[(fd.as_fd(), 0, LEN)])?;
    let mapped = buffer.map()?;
    let mut seen = vec![0; PAGE];
    for page in 0..LEN / PAGE {
        mapped.read(page * PAGE, &mut seen);
        check!(
            seen.iter().all(|&byte| byte == 0),
            "page {page} shows what it held before"
        );
    }
    Ok(())
}

/// A hole that is punched under the buffer: the file gets new pages, the buffer keeps its own, and
/// a new buffer has the new ones.
fn swapped_by_a_hole() -> Result<()> {
    let fd = memfd(4 * PAGE, 0)?;
    let memory = Memory::shared(&fd, 4 * PAGE)?;
    memory.write(0, &pattern(3, 0, memory.len()));
    let device = Device::open()?;
    let old = device.create_from_files(&[(fd.as_fd(), 0, 4 * PAGE)])?;
    punch_hole(&fd, PAGE, 2 * PAGE)?;
    let new = device.create_from_files(&[(fd.as_fd(), 0, 4 * PAGE)])?;
    let mut seen = vec![0; 4 * PAGE];
    old.map()?.read(0, &mut seen);
    same("the old buffer", 0, &seen, &pattern(3, 0, 4 * PAGE))?;
    new.map()?.read(0, &mut seen);
    let mut expected = pattern(3, 0, 4 * PAGE);
    expected[PAGE..3 * PAGE].fill(0);
    same("the new buffer", 0, &seen, &expected)
}

/// One refusal, and then the same device still works.
fn refused(what: &str, errno: Errno, fd: impl AsFd, offset: usize, len: usize) -> Result<()> {
    let seen = Device::open()?.create_from_files(&[(fd.as_fd(), offset, len)]);
    check_eq!(seen.err(), Some(errno), "{what}");
    Ok(())
}

fn beyond_the_end() -> Result<()> {
    let fd = memfd(4 * PAGE + 5, 0)?;
    refused("one page more", Errno::EINVAL, &fd, 0, 5 * PAGE)?;
    refused("behind the end", Errno::EINVAL, &fd, 8 * PAGE, PAGE)?;
    let far = (1usize << 63) - PAGE;
    refused("the last page there is", Errno::EINVAL, &fd, far, PAGE)?;
    check_eq!(fstat(&fd)?.st_blocks, 0, "pages that the file got");
    // The second of two: the first one's pages are not kept pinned, which the harness looks for.
    let device = Device::open()?;
    let both = [(fd.as_fd(), 0, 4 * PAGE), (fd.as_fd(), 4 * PAGE, PAGE)];
    check_eq!(
        device.create_from_files(&both).err(),
        Some(Errno::EINVAL),
        "the second"
    );
    Ok(())
}

fn other_files() -> Result<()> {
    let disk = file_in("/var/tmp", 4 * PAGE)?;
    refused("a file on disk", Errno::EINVAL, &disk, 0, PAGE)?;
    let (read, write) = nix::unistd::pipe()?;
    refused("a pipe's end", Errno::EINVAL, &write, 0, PAGE)?;
    drop((read, write));
    let device = Device::open()?;
    refused("our device", Errno::EINVAL, &device, 0, PAGE)?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    refused("a dma-buf", Errno::EINVAL, &buffer, 0, PAGE)?;
    let directory = open(
        "/dev/shm",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY,
        Mode::empty(),
    )?;
    refused("a directory", Errno::EINVAL, &directory, 0, PAGE)
}

fn not_open_for_both() -> Result<()> {
    let fd = memfd(PAGE, 0)?;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let readonly = open(path.as_str(), OFlag::O_RDONLY, Mode::empty())?;
    refused(
        "a memfd opened read-only",
        Errno::EACCES,
        &readonly,
        0,
        PAGE,
    )?;
    let named = open(path.as_str(), OFlag::O_PATH, Mode::empty())?;
    refused("a memfd named with O_PATH", Errno::EBADF, &named, 0, PAGE)?;
    // A buffer can be read, too.
    let writeonly = open(path.as_str(), OFlag::O_WRONLY, Mode::empty())?;
    refused(
        "a memfd opened write-only",
        Errno::EACCES,
        &writeonly,
        0,
        PAGE,
    )
}

/// What is in an append-only file can be written to by nobody.
fn append_only() -> Result<()> {
    const FS_APPEND_FL: libc::c_int = 0x20;
    let file = file_in("/dev/shm", PAGE)?;
    let set = |flags: libc::c_int| {
        // SAFETY: the kernel reads one integer.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags) })
    };
    set(FS_APPEND_FL).context("chattr +a")?;
    let seen = refused("an append-only file", Errno::EACCES, &file, 0, PAGE);
    set(0).context("chattr -a")?;
    seen?;
    Device::open()?.create_from_files(&[(file.as_fd(), 0, PAGE)])?;
    Ok(())
}

/// Two who fill the same hole, again and again: the reservations of somebody else stay, which the
/// harness looks for.
fn holes_filled_by_two() -> Result<()> {
    let _pool = HugePool::with_free(8)?;
    // Reserves four, and has none of them.
    let other = Memory::shared(huge_memfd(4 * HUGE)?, 4 * HUGE)?;
    let reserved = kernel::field("/proc/meminfo", "HugePages_Rsvd")?;
    let fd = huge_memfd(2 * HUGE)?;
    for _ in 0..150 {
        let fill = || Device::open().map(|it| it.create_from_files(&[(fd.as_fd(), 0, 2 * HUGE)]));
        std::thread::scope(|scope| -> Result<()> {
            let first = scope.spawn(fill);
            fill()?.context("a create")?;
            first
                .join()
                .expect("the other thread")?
                .context("the other create")?;
            Ok(())
        })?;
        punch_hole(&fd, 0, 2 * HUGE)?;
    }
    check_eq!(
        kernel::field("/proc/meminfo", "HugePages_Rsvd")?,
        reserved,
        "huge pages that others have reserved"
    );
    other.touch();
    Ok(())
}

fn sealed() -> Result<()> {
    for seal in [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE] {
        for flags in [0, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB] {
            let _pool = HugePool::with_free(1)?;
            let fd = memfd(HUGE, flags | libc::MFD_ALLOW_SEALING)?;
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seal))?;
            refused(&format!("{seal:?}"), Errno::EPERM, &fd, 0, PAGE)?;
        }
    }
    // The others do not concern us.
    let fd = memfd(PAGE, libc::MFD_ALLOW_SEALING)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Device::open()?.create_from_files(&[(fd.as_fd(), 0, PAGE)])?;
    Ok(())
}

/// A file cannot be sealed against writing while a device may write to its pages.
fn no_seal_while_pinned() -> Result<()> {
    let fd = memfd(PAGE, libc::MFD_ALLOW_SEALING)?;
    let seal = || fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE));
    let buffer = Device::open()?.create_from_files(&[(fd.as_fd(), 0, PAGE)])?;
    check_eq!(seal().err(), Some(Errno::EBUSY), "sealing a pinned file");
    drop(buffer);
    // Where the release is still under way, the kernel itself waits.
    seal().context("sealing it afterwards")?;
    Ok(())
}

fn store_exhausted() -> Result<()> {
    let directory = tempfile_directory()?;
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&directory)
        .status()?;
    check!(mount.success(), "mounting a small tmpfs");
    let result = (|| {
        let file = file_in(&directory, 2 << 20)?;
        refused(
            "2 MiB of a tmpfs of 1 MiB",
            Errno::EFAULT,
            &file,
            0,
            2 << 20,
        )
    })();
    let umount = Command::new("umount").arg(&directory).status()?;
    std::fs::remove_dir(&directory)?;
    result?;
    check!(umount.success(), "unmounting tmpfs: something holds it");
    Ok(())
}

fn pool_exhausted() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let free = HugePool::free()? as usize;
    let fd = huge_memfd((free + 1) * HUGE)?;
    refused(
        "one huge page more than there are",
        Errno::EFAULT,
        &fd,
        0,
        (free + 1) * HUGE,
    )?;
    // What was taken for it is the file's, and goes with it.
    drop(fd);
    check_eq!(HugePool::free()?, free as i64, "free huge pages afterwards");
    Ok(())
}

fn arguments() -> Result<()> {
    let device = Device::open()?;
    let fd = memfd(4 * PAGE, 0)?;
    let memory = Memory::shared(&fd, 4 * PAGE)?;
    let flags = pinbuf_uapi::CREATE_FROM_FILES;
    let good = (
        Range {
            addr: 0,
            len: PAGE as u64,
        },
        Backing {
            fd: fd.as_raw_fd(),
            reserved: 0,
            offset: 0,
        },
    );
    let call = |flags, range: Range, backing: Option<Backing>| {
        device
            .create_raw(&Create {
                flags,
                ranges: std::ptr::from_ref(&range) as u64,
                count: 1,
                backing: backing
                    .as_ref()
                    .map_or(0, |backing| std::ptr::from_ref(backing) as u64),
                ..create()
            })
            .map(drop)
    };
    check_eq!(call(flags, good.0, Some(good.1)), Ok(()), "as it should be");
    let mut wrong = vec![
        ("no list of files", Errno::EFAULT, flags, good.0, None),
        (
            "both flags",
            Errno::EINVAL,
            flags | pinbuf_uapi::CREATE_CHECK_BACKING,
            good.0,
            Some(good.1),
        ),
    ];
    let addressed = Range {
        addr: memory.addr(),
        ..good.0
    };
    wrong.push(("an address", Errno::EINVAL, flags, addressed, Some(good.1)));
    for (what, errno, backing) in [
        (
            "a descriptor that is not open",
            Errno::EBADF,
            Backing { fd: 999, ..good.1 },
        ),
        ("no descriptor", Errno::EBADF, Backing { fd: -1, ..good.1 }),
        (
            "a reserved field",
            Errno::EINVAL,
            Backing {
                reserved: 1,
                ..good.1
            },
        ),
        (
            "an offset within a page",
            Errno::EINVAL,
            Backing {
                offset: 512,
                ..good.1
            },
        ),
        (
            "an end that does not fit",
            Errno::EOVERFLOW,
            Backing {
                offset: !(PAGE as u64 - 1),
                ..good.1
            },
        ),
    ] {
        wrong.push((what, errno, flags, good.0, Some(backing)));
    }
    let empty = Range { len: 0, ..good.0 };
    wrong.push(("an empty range", Errno::EINVAL, flags, empty, Some(good.1)));
    for (what, errno, flags, range, backing) in wrong {
        check_eq!(call(flags, range, backing), Err(errno), "{what}");
    }
    Ok(())
}

/// Pages of files count as all others do.
fn charged() -> Result<()> {
    let device = Device::open()?;
    let fd = memfd(10 * PAGE, 0)?;
    let before = kernel::vm_pin()?;
    let buffer = device.create_from_files(&[(fd.as_fd(), 0, 10 * PAGE)])?;
    check_eq!(kernel::vm_pin()? - before, 10 * PAGE as i64, "VmPin");
    check_eq!(device.describe(&buffer)?.charged_pages, 10, "charged pages");
    Ok(())
}
