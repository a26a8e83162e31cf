// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the query and info calls return.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::resource::{getrlimit, Resource};
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Info, Query};

use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::memory::{self, memfd, HUGE, PAGE};
use pinbuf_test_harness::support::process::{become_user, in_child, set_memlock, USER};
use pinbuf_test_harness::support::{check, check_eq, foreign, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "info":
    query_fields,
    query_of_a_user,
    query_sizes,
    info_fields,
    info_sizes,
    info_counts_mappings,
    foreign_descriptors,
    foreign_dma_buf,
    kernel_memory_contiguous,
    kernel_memory_scattered,
    kernel_memory_of_scattered_pages_and_huge_ones,
}

/// Whether the kernel checks page tables, as only our debug kernel does: it forbids huge entries of page
/// frames.
fn checks_page_tables() -> Result<bool> {
    let debug = kernel::read("/proc/sys/kernel/osrelease")?.contains("-pinbuf-debug");
    Ok(debug && !kernel::read("/proc/cmdline")?.contains("page_table_check=off"))
}

fn query_fields() -> Result<()> {
    let query = Device::open()?.query()?;
    check_eq!(query.size as usize, size_of::<Query>(), "size");
    check_eq!(query.version, pinbuf_uapi::VERSION, "version");
    let mut features = pinbuf_uapi::FEATURE_CHECK_BACKING | pinbuf_uapi::FEATURE_DISCARDS;
    // Huge entries of frames are a part of the code for transparent huge pages.
    if kernel::has_transparent_huge_pages() && !checks_page_tables()? {
        features |= pinbuf_uapi::FEATURE_HUGE_MMAP;
    }
    check_eq!(query.features, features, "features");
    check_eq!(
        query.create_flags,
        u64::from(pinbuf_uapi::CREATE_FLAGS),
        "flags of create"
    );
    check_eq!(query.max_ranges, pinbuf_uapi::MAX_RANGES, "ranges");
    check_eq!(query.page_size as usize, PAGE, "page size");
    check_eq!(
        query.charge_mode,
        pinbuf_uapi::CHARGE_USER,
        "charge mode by default"
    );
    check_eq!(query.reserved, 0, "reserved");
    check_eq!(
        query.memlock_bytes,
        u64::MAX,
        "memlock limit with CAP_IPC_LOCK"
    );
    let parameter = |name| kernel::number(format!("/sys/module/pinbuf/parameters/{name}"));
    let mib = |value: i64| (value as u64) << 20;
    check_eq!(
        query.allowance_bytes,
        mib(parameter("allowance_mb")?),
        "allowance"
    );
    // Zero stands for a share of the machine's memory.
    let system = match mib(parameter("allowance_system_mb")?) {
        0 => {
            let total = (kernel::field("/proc/meminfo", "MemTotal")? as u64) << 10;
            total / 16 / PAGE as u64 * PAGE as u64
        }
        bytes => bytes,
    };
    check_eq!(query.allowance_system, system, "all allowances");
    check_eq!(query.allowance_used, 0, "allowance used by root");
    Ok(())
}

fn query_of_a_user() -> Result<()> {
    in_child(|| {
        let device = Device::open()?;
        become_user(USER)?;
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK)?.0;
        check_eq!(
            device.query()?.memlock_bytes,
            limit,
            "the limit that was inherited"
        );
        set_memlock(7 * PAGE)?;
        check_eq!(
            device.query()?.memlock_bytes,
            7 * PAGE as u64,
            "the limit that was set"
        );
        Ok(())
    })
}

/// Longer structs are answered, shorter ones than version 1's are not.
fn query_sizes() -> Result<()> {
    let device = Device::open()?;
    let page = Memory::anonymous(2 * PAGE)?;
    let query = |size: usize| {
        page.write(0, &vec![0; 2 * PAGE]);
        page.write(0, &(size as u32).to_ne_bytes());
        ioctl(&device, pinbuf_uapi::QUERY, page.addr())
    };
    for size in [size_of::<Query>(), 80, 4096] {
        check_eq!(query(size), Ok(0), "a struct of {size} bytes");
        let word = page.get(0);
        check_eq!(
            word as usize & 0xffff_ffff,
            size_of::<Query>(),
            "the size for {size}"
        );
        check_eq!(
            word >> 32,
            u64::from(pinbuf_uapi::VERSION),
            "the version for {size}"
        );
        check_eq!(page.get(size_of::<Query>()), 0, "what is behind the struct");
    }
    for size in [0, 4, size_of::<Query>() - 8, size_of::<Query>() - 1] {
        check_eq!(query(size), Err(Errno::EINVAL), "a struct of {size} bytes");
    }
    check_eq!(query(80), Ok(0), "a struct of 80 bytes");
    page.set(72, 1);
    page.write(0, &80u32.to_ne_bytes());
    let result = ioctl(&device, pinbuf_uapi::QUERY, page.addr());
    check_eq!(
        result,
        Err(Errno::E2BIG),
        "a longer struct with an unknown field"
    );
    Ok(())
}

fn info_fields() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(37 * PAGE)?;
    let buffer = device.create(&[memory.part(0, 30 * PAGE), memory.part(0, 37 * PAGE)])?;
    let info = device.describe(&buffer)?;
    check_eq!(info.size as usize, size_of::<Info>(), "size");
    check_eq!(info.fd, buffer.as_fd().as_raw_fd(), "descriptor");
    check_eq!(info.bytes, 67 * PAGE as u64, "bytes");
    check_eq!(info.pages, 67, "pages");
    check!(
        (1..=67).contains(&info.extents),
        "{} extents of 67 pages",
        info.extents
    );
    check_eq!(info.pins, 67, "references, one for each small page");
    check_eq!(info.charged_pages, 67, "pages charged");
    check_eq!(info.charge, pinbuf_uapi::CHARGE_NONE, "what is charged");
    check_eq!(info.mappings, 0, "devices' mappings");
    check_eq!(info.state, 0, "state");
    check_eq!(info.discarded_bytes, 0, "bytes discarded");
    check_eq!(info.unsure_bytes, 0, "bytes not known of");
    Ok(())
}

fn info_sizes() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let page = Memory::anonymous(2 * PAGE)?;
    let fill = |size: usize| {
        page.write(0, &vec![0; 2 * PAGE]);
        page.write(0, &(size as u32).to_ne_bytes());
        page.write(4, &buffer.as_fd().as_raw_fd().to_ne_bytes());
    };
    for size in [size_of::<Info>(), 104, 4096] {
        fill(size);
        check_eq!(
            ioctl(&device, pinbuf_uapi::INFO, page.addr()),
            Ok(0),
            "{size} bytes"
        );
        check_eq!(
            page.get(0) as usize & 0xffff_ffff,
            size_of::<Info>(),
            "the size for {size}"
        );
        check_eq!(page.get(8), PAGE as u64, "the buffer's bytes");
    }
    for size in [0, 8, size_of::<Info>() - 1] {
        fill(size);
        let result = ioctl(&device, pinbuf_uapi::INFO, page.addr());
        check_eq!(result, Err(Errno::EINVAL), "a struct of {size} bytes");
    }
    fill(104);
    page.set(96, 1 << 40);
    let result = ioctl(&device, pinbuf_uapi::INFO, page.addr());
    check_eq!(
        result,
        Err(Errno::E2BIG),
        "a longer struct with an unknown field"
    );
    Ok(())
}

fn info_counts_mappings() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(5 * PAGE)?;
    let buffer = device.create(&[memory.range()])?;
    let mappings = || -> Result<u32> { Ok(device.describe(&buffer)?.mappings) };
    let first = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let second = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    check_eq!(mappings()?, 0, "mappings while attached");
    let one = first.map(Direction::ToDevice)?.0;
    let two = first.map(Direction::FromDevice)?.0;
    let three = second.map(Direction::ToDevice)?.0;
    check_eq!(mappings()?, 3, "mappings of two devices");
    first.unmap(one)?;
    check_eq!(mappings()?, 2, "mappings after one went");
    second.unmap(three)?;
    first.unmap(two)?;
    check_eq!(mappings()?, 0, "mappings after all went");
    Ok(())
}

/// A descriptor that is not one of our dma-bufs is reported as such.
fn foreign_descriptors() -> Result<()> {
    let device = Device::open()?;
    let file = memfd(PAGE, 0)?;
    let null = OwnedFd::from(File::open("/dev/null")?);
    let directory = OwnedFd::from(File::open("/")?);
    let (reader, _writer) = nix::unistd::pipe()?;
    let path = nix::fcntl::open(
        "/",
        nix::fcntl::OFlag::O_PATH,
        nix::sys::stat::Mode::empty(),
    )?;
    for (what, fd) in [
        ("a memfd", &file),
        ("/dev/null", &null),
        ("a directory", &directory),
        ("a pipe", &reader),
    ] {
        check_eq!(
            device.info(fd.as_raw_fd()).err(),
            Some(Errno::EINVAL),
            "{what}"
        );
    }
    let itself = device.info(device.as_fd().as_raw_fd()).err();
    check_eq!(itself, Some(Errno::EINVAL), "the device itself");
    let error = device.info(path.as_raw_fd()).err();
    check!(
        matches!(error, Some(Errno::EBADF | Errno::EINVAL)),
        "an O_PATH descriptor gives {error:?}"
    );
    for fd in [-1, 1_000_000, i32::MIN] {
        check_eq!(device.info(fd).err(), Some(Errno::EBADF), "descriptor {fd}");
    }
    let closed = file.as_raw_fd();
    drop(file);
    check_eq!(
        device.info(closed).err(),
        Some(Errno::EBADF),
        "a closed descriptor"
    );
    Ok(())
}

/// A dma-buf of another exporter.
fn foreign_dma_buf() -> Result<()> {
    let other = foreign::dma_buf()?;
    check_eq!(
        Device::open()?.info(other.as_raw_fd()).err(),
        Some(Errno::EINVAL),
        "a foreign dma-buf"
    );
    Ok(())
}

/// One extent costs next to nothing, whatever its size.
fn kernel_memory_contiguous() -> Result<()> {
    let _pool = kernel::HugePool::with_free(1)?;
    let device = Device::open()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, memory::RW, flags, None, 0)?;
    let buffer = device.create(&[memory.range()])?;
    let info = device.describe(&buffer)?;
    check_eq!(info.extents, 1, "extents of a huge page");
    check!(
        info.kernel_bytes <= 256,
        "{} bytes of kernel memory for one extent",
        info.kernel_bytes
    );
    Ok(())
}

/// What is reserved for further extents while pages lie apart is given back if the rest does not.
fn kernel_memory_of_scattered_pages_and_huge_ones() -> Result<()> {
    const PAGES: usize = 300;
    let _pool = kernel::HugePool::with_free(1)?;
    let device = Device::open()?;
    let memory = Memory::small_pages(2 * PAGES * PAGE)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let huge = Memory::map(HUGE, memory::RW, flags, None, 0)?;
    let mut ranges: Vec<_> = (0..PAGES)
        .rev()
        .map(|page| memory.part(2 * page * PAGE, PAGE))
        .collect();
    ranges.push(huge.range());
    let buffer = device.create(&ranges)?;
    let info = device.describe(&buffer)?;
    // An eighth may stay.
    let limit = 16 * (info.extents + info.extents / 8 + 8);
    check!(
        info.kernel_bytes <= limit,
        "{} bytes of kernel memory for {} extents; at most {limit}",
        info.kernel_bytes,
        info.extents
    );
    Ok(())
}

/// Pages that all lie apart cost sixteen bytes each.
fn kernel_memory_scattered() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(4096 * PAGE)?;
    for pages in [1, 2, 100, 511, 512, 513, 1000, 4096] {
        let ranges: Vec<_> = (0..pages)
            .rev()
            .map(|page| memory.part(page * PAGE, PAGE))
            .collect();
        let buffer = device.create(&ranges)?;
        let info = device.describe(&buffer)?;
        let limit = 16 * pages as u64;
        check!(
            info.kernel_bytes <= limit,
            "{} bytes of kernel memory for {pages} pages in {} extents; at most {limit}",
            info.kernel_bytes,
            info.extents
        );
        // A single extent takes none but the buffer's own.
        let least = if info.extents > 1 {
            16 * info.extents
        } else {
            0
        };
        check!(
            info.kernel_bytes >= least,
            "{} bytes of kernel memory for {} extents; at least {least}",
            info.kernel_bytes,
            info.extents
        );
    }
    Ok(())
}
