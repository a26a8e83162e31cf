// SPDX-License-Identifier: MIT OR Apache-2.0

//! Every error of the contract, and that nothing is left after it.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount, MsFlags};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::stat::fstat;
use nix::sys::statfs::{statfs, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC};
use pinbuf_uapi::{Backing, Create, Info, Query, Range};

use crate::create::bytes_of;
use pinbuf_test_harness::support::device::{create, ioctl};
use pinbuf_test_harness::support::frames;
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{self, file_in, huge_memfd, memfd, HUGE, PAGE};
use pinbuf_test_harness::support::process::{become_user, in_child, USER};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "errors":
    struct_too_short,
    struct_too_long,
    bad_struct_pointer,
    answer_not_writable,
    unknown_flags,
    reserved_fields,
    no_range_or_too_many,
    bad_ranges_pointer,
    unaligned_or_empty,
    overflow,
    hole,
    never_mapped,
    larger_than_memory,
    not_writable,
    not_accessible,
    beyond_end_of_file,
    disk_file_shared,
    own_mapping,
    secret_memory,
    device_memory,
    huge_pool_exhausted,
    tmpfs_full,
    no_descriptor_free,
    no_file_free,
    unknown_commands,
    checked_backing,
    checked_backing_of_huge_pages,
    checked_backing_of_large_folios,
    wrong_backing,
    little_is_filled_of_another_file,
    bad_backing,
}

/// Expects an error, and that the failed call kept nothing.
fn refuses(
    device: &Device,
    what: &str,
    expected: Errno,
    call: impl FnOnce(&Device) -> nix::Result<Buffer>,
) -> Result<()> {
    let (pins, descriptors) = (kernel::pins()?, kernel::descriptors()?);
    let (bufs, pinned) = (kernel::dma_bufs()?, kernel::vm_pin()?);
    let result = call(device);
    check_eq!(result.as_ref().err(), Some(&expected), "{what}");
    check_eq!(kernel::pins()?, pins, "pinned pages after: {what}");
    check_eq!(
        kernel::descriptors()?,
        descriptors,
        "descriptors after: {what}"
    );
    check_eq!(kernel::dma_bufs()?, bufs, "dma-bufs after: {what}");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after: {what}");
    Ok(())
}

/// Expects an error of a create over ranges.
fn refuses_ranges(what: &str, expected: Errno, ranges: &[Range]) -> Result<()> {
    refuses(&Device::open()?, what, expected, |device| {
        device.create(ranges)
    })
}

/// Expects an error of a create argument, which is fine but for what the test changed.
fn refuses_argument(what: &str, expected: Errno, argument: Create) -> Result<()> {
    refuses(&Device::open()?, what, expected, |device| {
        device.create_raw(&argument)
    })
}

fn struct_too_short() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let ranges = [memory.range()];
    for size in [0, 1, 4, 8, 24, 31] {
        let argument = Create {
            size,
            ranges: ranges.as_ptr() as u64,
            count: 1,
            ..create()
        };
        refuses_argument(
            &format!("a struct of {size} bytes"),
            Errno::EINVAL,
            argument,
        )?;
    }
    Ok(())
}

fn struct_too_long() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let ranges = [memory.range()];
    let page = Memory::anonymous(2 * PAGE)?;
    for (size, at) in [
        (33, 32),
        (40, 32),
        (40, 39),
        (128, 100),
        (PAGE as u32, PAGE - 1),
    ] {
        page.write(0, &vec![0; 2 * PAGE]);
        let argument = Create {
            size,
            ranges: ranges.as_ptr() as u64,
            count: 1,
            ..create()
        };
        page.write(0, &bytes_of(&argument));
        page.write(at, &[1]);
        let what = format!("a struct of {size} bytes with byte {at} set");
        refuses(&Device::open()?, &what, Errno::E2BIG, |device| {
            device.create_at(page.addr())
        })?;
    }
    Ok(())
}

/// Addresses that no struct can be read from.
fn bad_struct_pointer() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(3 * PAGE)?;
    let ranges = [memory.part(0, PAGE)];
    let argument = Create {
        ranges: ranges.as_ptr() as u64,
        count: 1,
        ..create()
    };
    memory.protect(2 * PAGE, PAGE, libc::PROT_NONE)?;
    // The last byte of the struct, of its size, and of a longer struct's tail are missing.
    memory.write(2 * PAGE - 31, &bytes_of(&argument)[..31]);
    let cut = memory.addr() + 2 * PAGE as u64 - 31;
    let addresses = [
        ("NULL", 0),
        ("an unmapped page", 0x1000),
        (
            "a page that cannot be read",
            memory.addr() + 2 * PAGE as u64,
        ),
        ("the kernel's half", 0xffff_8880_0000_0000),
        ("the last byte of all", u64::MAX),
        ("a struct that is cut off", cut),
        (
            "a size that is cut off",
            memory.addr() + 2 * PAGE as u64 - 3,
        ),
    ];
    for (what, address) in addresses {
        refuses(&device, what, Errno::EFAULT, |device| {
            device.create_at(address)
        })?;
        for command in [pinbuf_uapi::QUERY, pinbuf_uapi::INFO] {
            if what != "a struct that is cut off" {
                let result = ioctl(&device, command, address);
                check_eq!(result, Err(Errno::EFAULT), "{what} for {command:#x}");
            }
        }
    }
    let argument = Create {
        size: 64,
        ..argument
    };
    memory.write(2 * PAGE - 40, &bytes_of(&argument));
    memory.write(2 * PAGE - 8, &[0; 8]);
    let address = memory.addr() + 2 * PAGE as u64 - 40;
    refuses(&device, "a tail that is cut off", Errno::EFAULT, |device| {
        device.create_at(address)
    })
}

/// Addresses that no answer can be written to.
fn answer_not_writable() -> Result<()> {
    let device = Device::open()?;
    let source = Memory::anonymous(PAGE)?;
    let buffer = device.create(&[source.range()])?;
    let memory = Memory::anonymous(PAGE)?;
    let (query, info) = (size_of::<Query>() as u32, size_of::<Info>() as u32);
    memory.write(0, &query.to_ne_bytes());
    memory.write(2048, &info.to_ne_bytes());
    memory.write(2052, &buffer.as_fd().as_raw_fd().to_ne_bytes());
    memory.protect(0, PAGE, libc::PROT_READ)?;
    let result = ioctl(&device, pinbuf_uapi::QUERY, memory.addr());
    check_eq!(
        result,
        Err(Errno::EFAULT),
        "PINBUF_QUERY into read-only memory"
    );
    let result = ioctl(&device, pinbuf_uapi::INFO, memory.addr() + 2048);
    check_eq!(
        result,
        Err(Errno::EFAULT),
        "PINBUF_INFO into read-only memory"
    );
    Ok(())
}

fn unknown_flags() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let ranges = [memory.range()];
    let bits = (0..32).filter(|bit| pinbuf_uapi::CREATE_FLAGS & 1 << bit == 0);
    let mut last = 0;
    refuses(&Device::open()?, "unknown flags", Errno::EINVAL, |device| {
        for bit in bits {
            last = bit;
            let argument = Create {
                flags: 1 << bit,
                ranges: ranges.as_ptr() as u64,
                count: 1,
                ..create()
            };
            match device.create_raw(&argument) {
                Err(Errno::EINVAL) => {}
                other => return other,
            }
        }
        Err(Errno::EINVAL)
    })
    .with_context(|| format!("up to flag bit {last}"))
}

fn reserved_fields() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let ranges = [memory.range()];
    let good = Create {
        ranges: ranges.as_ptr() as u64,
        count: 1,
        ..create()
    };
    for reserved in [1, 1 << 31] {
        refuses_argument("reserved", Errno::EINVAL, Create { reserved, ..good })?;
    }
    let backing = [Backing::default()];
    let unasked = Create {
        backing: backing.as_ptr() as u64,
        ..good
    };
    refuses_argument(
        "a backing that the flags do not announce",
        Errno::EINVAL,
        unasked,
    )?;
    let device = Device::open()?;
    for reserved in [1, 1 << 31] {
        let mut query = Query {
            size: size_of::<Query>() as u32,
            reserved,
            ..Default::default()
        };
        let result = ioctl(&device, pinbuf_uapi::QUERY, &raw mut query as u64);
        check_eq!(result, Err(Errno::EINVAL), "a query with reserved");
    }
    Ok(())
}

fn no_range_or_too_many() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let too_many = vec![memory.range(); pinbuf_uapi::MAX_RANGES as usize + 1];
    refuses_ranges("no range", Errno::EINVAL, &[])?;
    refuses_ranges("a range more than the most", Errno::EINVAL, &too_many)?;
    for count in [1 << 31, u32::MAX] {
        let argument = Create {
            ranges: too_many.as_ptr() as u64,
            count,
            ..create()
        };
        refuses_argument(&format!("{count} ranges"), Errno::EINVAL, argument)?;
    }
    Ok(())
}

fn bad_ranges_pointer() -> Result<()> {
    let memory = Memory::anonymous(3 * PAGE)?;
    memory.protect(PAGE, 2 * PAGE, libc::PROT_NONE)?;
    // One range is readable, the second is not.
    memory.set(PAGE - 16, memory.addr());
    memory.set(PAGE - 8, PAGE as u64);
    let addresses = [
        ("NULL", 0, 1),
        ("an unmapped page", 0x1000, 1),
        ("unreadable memory", memory.addr() + PAGE as u64, 1),
        ("the kernel's half", 0xffff_8880_0000_0000, 1),
        ("an address that wraps", u64::MAX - 7, 1),
        (
            "a list that is cut off",
            memory.addr() + PAGE as u64 - 16,
            2,
        ),
    ];
    for (what, ranges, count) in addresses {
        refuses_argument(
            what,
            Errno::EFAULT,
            Create {
                ranges,
                count,
                ..create()
            },
        )?;
    }
    Ok(())
}

fn unaligned_or_empty() -> Result<()> {
    let memory = Memory::anonymous(4 * PAGE)?;
    let addr = memory.addr();
    let page = PAGE as u64;
    let bad = [
        ("an empty range", addr, 0),
        ("an empty range at zero", 0, 0),
        ("a length of one", addr, 1),
        ("a length beyond a page", addr, page + 8),
        ("a length below a page", addr, page - 1),
        ("an address inside a page", addr + 1, page),
        ("an address half-way", addr + 2048, page),
        ("a half page half-way", addr + 2048, 2048),
    ];
    for (what, addr, len) in bad {
        let bad = Range { addr, len };
        refuses_ranges(what, Errno::EINVAL, &[bad])?;
        refuses_ranges(
            &format!("{what}, last"),
            Errno::EINVAL,
            &[memory.range(), bad],
        )?;
        refuses_ranges(
            &format!("{what}, first"),
            Errno::EINVAL,
            &[bad, memory.range()],
        )?;
    }
    Ok(())
}

fn overflow() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let page = PAGE as u64;
    let end = 0u64.wrapping_sub(page);
    let bad = [
        (
            "a range that wraps",
            Range {
                addr: memory.addr(),
                len: end,
            },
        ),
        (
            "a range that ends at the very end",
            Range {
                addr: end,
                len: page,
            },
        ),
        (
            "a range beyond the very end",
            Range {
                addr: end,
                len: 2 * page,
            },
        ),
        (
            "half of everything",
            Range {
                addr: 0,
                len: 1 << 63,
            },
        ),
    ];
    for (what, range) in bad {
        refuses_ranges(what, Errno::EOVERFLOW, &[range])?;
        refuses_ranges(
            &format!("{what}, last"),
            Errno::EOVERFLOW,
            &[memory.range(), range],
        )?;
    }
    let quarter = Range {
        addr: 0,
        len: 1 << 62,
    };
    refuses_ranges("a sum of 2^63 bytes", Errno::EOVERFLOW, &[quarter; 2])?;
    refuses_ranges("a sum of 2^64 bytes", Errno::EOVERFLOW, &[quarter; 4])?;
    refuses_ranges("a sum of 2^64 bytes and a page", Errno::EOVERFLOW, &{
        [quarter, quarter, quarter, quarter, memory.range()]
    })?;
    let many = vec![
        Range {
            addr: page,
            len: (1 << 56) - 2 * page
        };
        65_536
    ];
    refuses_ranges("a sum of 2^72 bytes", Errno::EOVERFLOW, &many)
}

/// Memory with a hole, at whichever end of the call.
fn hole() -> Result<()> {
    let memory = Memory::anonymous(64 * PAGE)?;
    for page in [0, 31, 63] {
        let memory = Memory::anonymous(64 * PAGE)?;
        memory.set(32 * PAGE, 5);
        memory.unmap(page * PAGE, PAGE)?;
        let what = format!("a hole at page {page} of 64");
        refuses_ranges(&what, Errno::EFAULT, &[memory.range()])?;
        // The pages besides it can still be pinned.
        let page = if page == 0 { 1 } else { 0 };
        drop(Device::open()?.create(&[memory.part(page * PAGE, 16 * PAGE)])?);
        check_eq!(memory.get(32 * PAGE), 5, "memory after a refusal");
    }
    let gone = {
        let gone = Memory::anonymous(PAGE)?;
        gone.range()
    };
    for ranges in [
        vec![gone],
        vec![memory.range(), gone],
        vec![gone, memory.range()],
    ] {
        refuses_ranges("a range that was unmapped", Errno::EFAULT, &ranges)?;
    }
    Ok(())
}

fn never_mapped() -> Result<()> {
    let memory = Memory::anonymous(PAGE)?;
    let nowhere = [
        ("the zero page", 0),
        ("the last page of 47 bits", (1 << 47) - PAGE as u64),
        ("the first non-canonical page", 1 << 56),
        ("the kernel's memory", 0xffff_8880_0000_0000),
        ("the kernel's code", 0xffff_ffff_8100_0000),
        (
            "the last page that has an end",
            0u64.wrapping_sub(2 * PAGE as u64),
        ),
    ];
    for (what, addr) in nowhere {
        let range = Range {
            addr,
            len: PAGE as u64,
        };
        refuses_ranges(what, Errno::EFAULT, &[range])?;
        refuses_ranges(
            &format!("{what}, last"),
            Errno::EFAULT,
            &[memory.range(), range],
        )?;
    }
    // Up to the end of what can be mapped, and beyond.
    let range = Range {
        addr: memory.addr(),
        len: 1 << 47,
    };
    let error = Device::open()?.create(&[range]).err();
    check!(
        matches!(error, Some(Errno::EFAULT | Errno::ENOMEM)),
        "a range of 128 TiB gives {error:?}"
    );
    Ok(())
}

fn not_writable() -> Result<()> {
    let memory = Memory::anonymous(4 * PAGE)?;
    memory.set(0, 1);
    memory.protect(2 * PAGE, PAGE, libc::PROT_READ)?;
    refuses_ranges(
        "a read-only page",
        Errno::EFAULT,
        &[memory.part(2 * PAGE, PAGE)],
    )?;
    refuses_ranges(
        "a read-only page among others",
        Errno::EFAULT,
        &[memory.range()],
    )?;
    let file = memfd(PAGE, 0)?;
    let shared = Memory::map(
        PAGE,
        libc::PROT_READ,
        libc::MAP_SHARED,
        Some(file.as_fd()),
        0,
    )?;
    refuses_ranges("a memfd mapped read-only", Errno::EFAULT, &[shared.range()])?;
    // The program's own code.
    let code = (not_writable as *const () as u64) / PAGE as u64 * PAGE as u64;
    refuses_ranges(
        "code",
        Errno::EFAULT,
        &[Range {
            addr: code,
            len: PAGE as u64,
        }],
    )
}

fn not_accessible() -> Result<()> {
    let memory = Memory::anonymous(4 * PAGE)?;
    memory.protect(3 * PAGE, PAGE, libc::PROT_NONE)?;
    refuses_ranges("PROT_NONE", Errno::EFAULT, &[memory.part(3 * PAGE, PAGE)])?;
    refuses_ranges("PROT_NONE among others", Errno::EFAULT, &[memory.range()])
}

/// Where an access would be SIGBUS.
fn beyond_end_of_file() -> Result<()> {
    let file = memfd(2 * PAGE, 0)?;
    let memory = Memory::shared(&file, 4 * PAGE)?;
    refuses_ranges(
        "pages beyond the end",
        Errno::EFAULT,
        &[memory.part(2 * PAGE, PAGE)],
    )?;
    refuses_ranges(
        "some pages beyond the end",
        Errno::EFAULT,
        &[memory.range()],
    )?;
    drop(Device::open()?.create(&[memory.part(0, 2 * PAGE)])?);
    Ok(())
}

/// A directory on a file system that writes back to somewhere.
fn disk_directory() -> Result<PathBuf> {
    let directory = std::env::current_dir()?;
    let kind = statfs(&directory)?.filesystem_type();
    check!(
        kind != TMPFS_MAGIC && kind != OVERLAYFS_SUPER_MAGIC,
        "{} is not on a file system of its own: run the tests in one",
        directory.display()
    );
    Ok(directory)
}

fn disk_file_shared() -> Result<()> {
    let file = file_in(disk_directory()?, 4 * PAGE)?;
    let memory = Memory::shared(&file, 4 * PAGE)?;
    memory.set(0, 77);
    let anonymous = Memory::anonymous(PAGE)?;
    refuses_ranges("a file on disk", Errno::EFAULT, &[memory.range()])?;
    let ranges = [anonymous.range(), memory.range()];
    refuses_ranges("a file on disk, last", Errno::EFAULT, &ranges)?;
    check_eq!(memory.get(0), 77, "the file's bytes");
    Ok(())
}

/// A buffer's mapping is no memory of its own.
fn own_mapping() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(2 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    refuses_ranges(
        "our own mapping, untouched",
        Errno::EFAULT,
        &[mapped.range()],
    )?;
    mapped.touch();
    refuses_ranges("our own mapping", Errno::EFAULT, &[mapped.range()])?;
    let ranges = [memory.range(), mapped.part(PAGE, PAGE)];
    refuses_ranges("our own mapping, last", Errno::EFAULT, &ranges)
}

fn secret_memory() -> Result<()> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    Errno::result(fd).context("memfd_secret (is the kernel booted with secretmem.enable=0?)")?;
    // SAFETY: the call has just returned it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    nix::unistd::ftruncate(&fd, PAGE as i64)?;
    let memory = Memory::shared(&fd, PAGE)?;
    memory.set(0, 9);
    refuses_ranges("secret memory", Errno::EFAULT, &[memory.range()])?;
    check_eq!(memory.get(0), 9, "the secret");
    Ok(())
}

/// A page frame mapping, as device memory is.
fn device_memory() -> Result<()> {
    let importer = pinbuf_test_importer::open()?;
    let memory = Memory::shared(&importer, PAGE)?;
    memory.set(0, 3);
    refuses_ranges("a page frame mapping", Errno::EFAULT, &[memory.range()])
}

/// An error, no signal; the pages that were taken meanwhile stay in the file, but unpinned.
fn huge_pool_exhausted() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let memory = Memory::map(3 * HUGE, memory::RW, flags, None, 0)?;
    refuses_ranges("three huge pages of two", Errno::EFAULT, &[memory.range()])?;
    let small = Memory::anonymous(PAGE)?;
    let ranges = [small.range(), memory.range()];
    refuses_ranges("small pages before them", Errno::EFAULT, &ranges)?;
    // The program continues, with the pages that could be allocated.
    let buffer = device.create(&[memory.part(0, 2 * HUGE)])?;
    memory.set(HUGE, 12);
    check_eq!(buffer.map()?.get(HUGE), 12, "the second huge page");
    drop((buffer, memory));
    check_eq!(HugePool::free()?, 2, "free huge pages");
    Ok(())
}

fn tmpfs_full() -> Result<()> {
    let place = std::env::temp_dir().join(format!("pinbuf-full-{}", std::process::id()));
    std::fs::create_dir(&place)?;
    mount(
        Some("full"),
        &place,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(&*format!("size={}", 16 * PAGE)),
    )?;
    let result = (|| {
        let file = file_in(&place, 64 * PAGE)?;
        let memory = Memory::shared(&file, 64 * PAGE)?;
        refuses_ranges("64 pages of 16", Errno::EFAULT, &[memory.range()])?;
        // Those 16 belong to the file now.
        let buffer = Device::open()?.create(&[memory.part(0, 16 * PAGE)])?;
        memory.set(15 * PAGE, 13);
        check_eq!(buffer.map()?.get(15 * PAGE), 13, "the last page");
        Ok(())
    })();
    umount(&place).context("the tmpfs is still in use")?;
    std::fs::remove_dir(&place)?;
    result
}

fn no_descriptor_free() -> Result<()> {
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::anonymous(8 * PAGE)?;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let pins = kernel::pins()?;
        setrlimit(
            Resource::RLIMIT_NOFILE,
            device.as_fd().as_raw_fd() as u64 + 1,
            hard,
        )?;
        let error = device.create(&[memory.range()]).err();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(1024), hard)?;
        check_eq!(
            error,
            Some(Errno::EMFILE),
            "create with every descriptor in use"
        );
        check_eq!(kernel::pins()?, pins, "pinned pages");
        check_eq!(kernel::vm_pin()?, 0, "VmPin");
        drop(device.create(&[memory.range()])?);
        Ok(())
    })
}

fn no_file_free() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(8 * PAGE)?;
    let pins = kernel::pins()?;
    let answer = Memory::map(
        PAGE,
        memory::RW,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    // Files are counted per processor, and added up once there are some.
    let files = (0..400)
        .map(|_| File::open("/dev/null"))
        .collect::<std::io::Result<Vec<File>>>()
        .context("opening files")?;
    let setting = Setting::set("/proc/sys/fs/file-max", 1)?;
    let result = in_child(|| {
        become_user(USER)?;
        let error = device
            .create(&[memory.range()])
            .err()
            .unwrap_or(Errno::UnknownErrno);
        answer.set(0, error as u64);
        Ok(())
    });
    drop((setting, files));
    result?;
    check_eq!(
        answer.get(0),
        Errno::ENFILE as u64,
        "errno with every file in use"
    );
    check_eq!(kernel::pins()?, pins, "pinned pages");
    Ok(())
}

fn unknown_commands() -> Result<()> {
    let device = Device::open()?;
    let page = Memory::anonymous(PAGE)?;
    let numbers = (0x40..0x50)
        .chain(0x54..0x60)
        .map(|nr| (u32::from(b'u') << 8) | nr);
    let numbers =
        numbers.flat_map(|low| [0, 1, 2, 3].map(|direction| direction << 30 | 32 << 16 | low));
    let others = [0, u32::MAX, 0x5401, 0x4020_6200, 0x5450_5250];
    // The driver's own numbers, with another direction.
    let known = [
        pinbuf_uapi::CREATE,
        pinbuf_uapi::QUERY,
        pinbuf_uapi::INFO,
        pinbuf_uapi::DISCARDS,
    ];
    let turned = known
        .into_iter()
        .flat_map(|own| [1, 2, 3].map(|turn| own ^ (turn << 30)));
    for command in numbers.chain(others).chain(turned) {
        let result = ioctl(&device, command, page.addr());
        check_eq!(result, Err(Errno::ENOTTY), "command {command:#x}");
    }
    Ok(())
}

/// What a range maps, for the check.
fn backing(fd: BorrowedFd<'_>, offset: usize) -> Backing {
    Backing {
        fd: fd.as_raw_fd(),
        reserved: 0,
        offset: offset as u64,
    }
}

/// Ranges that map what was said are accepted.
fn checked_backing() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(32 * PAGE, 0)?;
    let other = OwnedFd::from(file_in("/dev/shm", 32 * PAGE)?);
    let memory = Memory::shared(&file, 32 * PAGE)?;
    let elsewhere = Memory::shared(&other, 32 * PAGE)?;
    let ranges = [
        memory.part(4 * PAGE, 8 * PAGE),
        elsewhere.part(PAGE, PAGE),
        memory.part(0, PAGE),
    ];
    let names = [
        backing(file.as_fd(), 4 * PAGE),
        backing(other.as_fd(), PAGE),
        backing(file.as_fd(), 0),
    ];
    let buffer = device.create_checked(&ranges, &names)?;
    let mapped = buffer.map()?;
    memory.set(5 * PAGE, 55);
    elsewhere.set(PAGE, 56);
    memory.set(0, 57);
    let seen = [PAGE, 8 * PAGE, 9 * PAGE].map(|offset| mapped.get(offset));
    check_eq!(seen, [55, 56, 57], "words of the three ranges");
    // A file descriptor of its own for the same file names the same pages.
    let again = nix::fcntl::open(
        format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(),
        nix::fcntl::OFlag::O_RDONLY,
        nix::sys::stat::Mode::empty(),
    )?;
    device.create_checked(&[memory.part(PAGE, PAGE)], &[backing(again.as_fd(), PAGE)])?;
    Ok(())
}

fn checked_backing_of_huge_pages() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let device = Device::open()?;
    let file = huge_memfd(2 * HUGE)?;
    let memory = Memory::shared(&file, 2 * HUGE)?;
    is_checked(&device, &file, &memory)
}

/// Shmem in huge pages, each of which is one folio with one index.
fn checked_backing_of_large_folios() -> Result<()> {
    kernel::needs_transparent_huge_pages()?;
    let _huge = Setting::choice(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "advise",
    )?;
    let device = Device::open()?;
    let file = memfd(2 * HUGE, 0)?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let memory = Memory::map_aligned(2 * HUGE, HUGE, prot, flags, Some(file.as_fd()), 0)?;
    memory.advise(0, 2 * HUGE, libc::MADV_HUGEPAGE)?;
    memory.touch();
    let pfns = frames::all_frames(&memory)?;
    let huge = frames::with_flag(&pfns, frames::THP)?;
    check_eq!(huge, pfns.len(), "pages in transparent huge ones");
    is_checked(&device, &file, &memory)
}

/// Parts of two huge pages of a file are what they are, and nothing else.
fn is_checked(device: &Device, file: &OwnedFd, memory: &Memory) -> Result<()> {
    for (offset, len) in [
        (0, 2 * HUGE),
        (5 * PAGE, HUGE),
        (HUGE - PAGE, 2 * PAGE),
        (HUGE, PAGE),
    ] {
        let range = memory.part(offset, len);
        device
            .create_checked(&[range], &[backing(file.as_fd(), offset)])
            .with_context(|| format!("{len:#x} bytes at {offset:#x}"))?;
        for wrong in [offset ^ HUGE, offset ^ PAGE] {
            let what = format!("{offset:#x} called {wrong:#x}");
            let name = backing(file.as_fd(), wrong);
            refuses(device, &what, Errno::EAGAIN, |device| {
                device.create_checked(&[range], &[name])
            })?;
        }
    }
    Ok(())
}

/// Ranges that map something other than what was said.
fn wrong_backing() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(32 * PAGE, 0)?;
    let other = memfd(32 * PAGE, 0)?;
    let memory = Memory::shared(&file, 32 * PAGE)?;
    let private = Memory::private(&file, 32 * PAGE)?;
    let anonymous = Memory::anonymous(8 * PAGE)?;
    let range = memory.part(4 * PAGE, 8 * PAGE);
    let cases = [
        ("an offset too low", range, backing(file.as_fd(), 3 * PAGE)),
        ("an offset too high", range, backing(file.as_fd(), 5 * PAGE)),
        (
            "an offset beyond the file",
            range,
            backing(file.as_fd(), 1 << 40),
        ),
        ("another file", range, backing(other.as_fd(), 4 * PAGE)),
        (
            "anonymous memory",
            anonymous.range(),
            backing(file.as_fd(), 0),
        ),
        (
            "a private copy",
            private.part(4 * PAGE, PAGE),
            backing(file.as_fd(), 4 * PAGE),
        ),
    ];
    for (what, range, name) in cases {
        refuses(&device, what, Errno::EAGAIN, |device| {
            device.create_checked(&[range], &[name])
        })?;
    }
    // One page in the middle is another's. All of them are there, so that they are pinned together.
    memory.replace_by(7 * PAGE, PAGE, other.as_fd(), 7 * PAGE)?;
    memory.touch();
    let name = backing(file.as_fd(), 4 * PAGE);
    refuses(&device, "one foreign page", Errno::EAGAIN, |device| {
        device.create_checked(&[range], &[name])
    })?;
    // Pages that are right, but in the wrong order.
    memory.replace_by(7 * PAGE, PAGE, file.as_fd(), 8 * PAGE)?;
    memory.touch();
    refuses(&device, "one page of elsewhere", Errno::EAGAIN, |device| {
        device.create_checked(&[range], &[name])
    })?;
    memory.replace_by(7 * PAGE, PAGE, file.as_fd(), 7 * PAGE)?;
    device.create_checked(&[range], &[name])?;
    Ok(())
}

/// A file without pages, which is mapped where another one is expected, gets no more than the page that the driver
/// compares. So it is in a later range, too.
fn little_is_filled_of_another_file() -> Result<()> {
    const PAGES: usize = 256;
    let device = Device::open()?;
    for first in [0, 1, 64] {
        let file = memfd(PAGES * PAGE, 0)?;
        let other = memfd(PAGES * PAGE, 0)?;
        let memory = Memory::shared(&file, PAGES * PAGE)?;
        let (right, rest) = (first * PAGE, (PAGES - first) * PAGE);
        let refused = |what: &str, ranges: &[Range], backings: &[Backing]| -> Result<()> {
            refuses(&device, what, Errno::EAGAIN, |device| {
                device.create_checked(ranges, backings)
            })?;
            let filled = fstat(&other)?.st_blocks as usize / (PAGE / 512);
            check!(filled <= 1, "{what}: {filled} pages of it were filled");
            Ok(())
        };
        if first > 0 {
            let wrong = Memory::shared(&other, rest)?;
            let ranges = [memory.part(0, right), wrong.range()];
            let backings = [backing(file.as_fd(), 0), backing(file.as_fd(), right)];
            let what = format!("another file in the range after {first} pages");
            refused(&what, &ranges, &backings)?;
            memory.advise(0, right, libc::MADV_REMOVE)?;
            wrong.advise(0, rest, libc::MADV_REMOVE)?;
        }
        memory.replace_by(right, rest, other.as_fd(), right)?;
        let what = format!("another file from page {first} on");
        refused(&what, &[memory.range()], &[backing(file.as_fd(), 0)])?;
    }
    Ok(())
}

fn bad_backing() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(4 * PAGE, 0)?;
    let memory = Memory::shared(&file, 4 * PAGE)?;
    let good = backing(file.as_fd(), 0);
    let closed = {
        let closed = memfd(PAGE, 0)?;
        closed.as_raw_fd()
    };
    for fd in [-1, closed, i32::MAX, i32::MIN] {
        refuses(
            &device,
            &format!("descriptor {fd}"),
            Errno::EBADF,
            |device| device.create_checked(&[memory.range()], &[Backing { fd, ..good }]),
        )?;
        refuses(
            &device,
            &format!("descriptor {fd}, last"),
            Errno::EBADF,
            |device| device.create_checked(&[memory.range(); 2], &[good, Backing { fd, ..good }]),
        )?;
    }
    refuses(&device, "reserved", Errno::EINVAL, |device| {
        device.create_checked(
            &[memory.range()],
            &[Backing {
                reserved: 1,
                ..good
            }],
        )
    })?;
    let ranges = [memory.range()];
    for address in [0, 0x1000, 0xffff_8880_0000_0000] {
        let argument = Create {
            flags: pinbuf_uapi::CREATE_CHECK_BACKING,
            ranges: ranges.as_ptr() as u64,
            count: 1,
            backing: address,
            ..create()
        };
        refuses_argument(&format!("backing at {address:#x}"), Errno::EFAULT, argument)?;
    }
    Ok(())
}

/// The same pages again and again: the kernel could not even map such a buffer, and the call fails before
/// anything is pinned.
fn larger_than_memory() -> Result<()> {
    const COUNT: usize = pinbuf_uapi::MAX_RANGES as usize;
    let device = Device::open()?;
    let memory = Memory::small_pages(4 << 20)?;
    memory.touch();
    let ranges = vec![memory.range(); COUNT];
    let start = Instant::now();
    let error = device.create(&ranges).err();
    let took = start.elapsed();
    check_eq!(error, Some(Errno::ENOMEM), "256 GiB");
    check!(took < Duration::from_secs(5), "it took {took:?}");
    let total = kernel::field("/proc/meminfo", "MemTotal")? as usize >> 10;
    let error = device.create(&ranges[..total / 4 + 2]).err();
    check_eq!(error, Some(Errno::ENOMEM), "a little more than {total} MiB");
    Ok(())
}
