// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a buffer is made of: sizes, order, overlap, kinds of memory, and the same bytes everywhere.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag, OFlag};
use nix::sys::stat::fstat;
use pinbuf_test_importer::{pin_cost, Direction, Importer, Limits};
use pinbuf_uapi::{Create, Discard, Range, STATE_DISCARDED};

use pinbuf_test_harness::support::device::{create, ioctl};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{
    self, file_in, huge_memfd, memfd, pattern, stamp, HUGE, PAGE,
};
use pinbuf_test_harness::support::view::{
    agree, agree_sampled, holds, same, DeviceView, KernelView, Mapped, Source, View,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "create":
    one_page,
    sizes within 240,
    order,
    overlap,
    several_mappings_in_one_range,
    vectors_of_a_program,
    private_anonymous,
    shared_anonymous,
    memfd_shared,
    tmpfs_file,
    memfd_private,
    disk_file_private,
    stack_and_data,
    sparse_anonymous,
    sparse_memfd,
    present_memory_is_not_faulted_in,
    a_page_a_million_times within 300,
    ranges_65536 within 400,
    one_gib within 300,
    more_than_4_gib,
    descriptor,
    opened_read_only,
    longer_struct,
    same_memory_twice,
    again_and_again within 240,
}

/// Makes a buffer of all of the memory, and compares all four views, both ways: each byte, or, if there are many, a word
/// of each page.
fn all_views_agree(memory: &Memory) -> Result<()> {
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()]).context("PINBUF_CREATE")?;
    check_eq!(buffer.len()?, memory.len(), "the buffer's size");
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    let source = Source::whole(&buffer, memory);
    let cpu = Mapped::of(&buffer, &mapped);
    let sg = DeviceView::of(&importer, mapping);
    let views: [&dyn View; 4] = [&source, &cpu, &sg, &KernelView(&importer)];
    match memory.len() / PAGE {
        ..=64 => agree(&views, memory.len()),
        pages => agree_sampled(&views, memory.len(), pages),
    }
}

fn one_page() -> Result<()> {
    all_views_agree(&Memory::anonymous(PAGE)?)
}

fn sizes() -> Result<()> {
    for pages in [2, 3, 15, 16, 17, 511, 512, 513, 1025] {
        let memory = Memory::anonymous(pages * PAGE)?;
        all_views_agree(&memory).with_context(|| format!("with {pages} pages"))?;
    }
    Ok(())
}

/// The buffer's bytes are the ranges' in the order of the call.
fn order() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(64 * PAGE)?;
    memory.write(0, &pattern(1, 0, memory.len()));
    // In pieces of 1, 2, 3 … pages, last piece first.
    let mut pieces = Vec::new();
    let mut at = 0;
    for pages in 1.. {
        if at + pages > 64 {
            break;
        }
        pieces.push((at * PAGE, pages * PAGE));
        at += pages;
    }
    pieces.reverse();
    let ranges: Vec<Range> = pieces
        .iter()
        .map(|&(at, len)| memory.part(at, len))
        .collect();
    let buffer = device.create(&ranges)?;
    let mapped = buffer.map()?;
    check_eq!(mapped.len(), at * PAGE, "the sum of the lengths");
    let mut offset = 0;
    for &(at, len) in &pieces {
        let mut seen = vec![0; len];
        mapped.read(offset, &mut seen);
        same("the mapping", offset, &seen, &pattern(1, at as u64, len))?;
        offset += len;
    }
    // And each piece is found where it was taken from.
    mapped.write(0, &pattern(2, 0, offset));
    let mut offset = 0;
    for &(at, len) in &pieces {
        let mut seen = vec![0; len];
        memory.read(at, &mut seen);
        same("the memory", at, &seen, &pattern(2, offset as u64, len))?;
        offset += len;
    }
    Ok(())
}

/// A page that is named several times is in the buffer several times.
fn overlap() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(4 * PAGE)?;
    let parts = [(0, 3), (1, 3), (2, 1), (0, 4), (2, 1)];
    let ranges: Vec<Range> = parts
        .iter()
        .map(|&(page, pages)| memory.part(page * PAGE, pages * PAGE))
        .collect();
    let buffer = device.create(&ranges)?;
    let mapped = buffer.map()?;
    let pages: Vec<usize> = parts
        .iter()
        .flat_map(|&(page, pages)| page..page + pages)
        .collect();
    check_eq!(mapped.len(), pages.len() * PAGE, "the buffer's size");
    check_eq!(device.describe(&buffer)?.pages, pages.len() as u64, "pages");
    for (index, &page) in pages.iter().enumerate() {
        let value = stamp(7, index as u64);
        mapped.set(index * PAGE + 8 * index, value);
        check_eq!(
            memory.get(page * PAGE + 8 * index),
            value,
            "page {page} of the memory"
        );
        for (other, _) in pages
            .iter()
            .enumerate()
            .filter(|(_, other)| **other == page)
        {
            let seen = mapped.get(other * PAGE + 8 * index);
            check_eq!(
                seen,
                value,
                "page {other} of the buffer, which is page {page}"
            );
        }
    }
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::ToDevice)?.0;
    let device_view = DeviceView::of(&importer, mapping);
    for (index, _) in pages.iter().enumerate() {
        let mut seen = [0; 8];
        device_view.read(index * PAGE + 8 * index, &mut seen)?;
        check_eq!(
            u64::from_ne_bytes(seen),
            stamp(7, index as u64),
            "page {index}, by the device"
        );
    }
    Ok(())
}

/// One range may span mappings of different kinds.
fn several_mappings_in_one_range() -> Result<()> {
    let memory = Memory::anonymous(12 * PAGE)?;
    let file = memfd(4 * PAGE, 0)?;
    memory.replace_by(4 * PAGE, 4 * PAGE, file.as_fd(), 0)?;
    memory.advise(9 * PAGE, PAGE, libc::MADV_DONTFORK)?;
    all_views_agree(&memory)
}

/// A `struct iovec` is a range as it is.
fn vectors_of_a_program() -> Result<()> {
    check_eq!(
        size_of::<libc::iovec>(),
        size_of::<Range>(),
        "size of struct iovec"
    );
    let device = Device::open()?;
    let memory = [Memory::anonymous(PAGE)?, Memory::anonymous(2 * PAGE)?];
    let vectors = [1, 0].map(|index: usize| libc::iovec {
        iov_base: memory[index].at(0).cast(),
        iov_len: memory[index].len(),
    });
    let argument = Create {
        ranges: vectors.as_ptr() as u64,
        count: 2,
        ..create()
    };
    let buffer = device.create_raw(&argument)?;
    let mapped = buffer.map()?;
    memory[0].set(0, 10);
    memory[1].set(0, 11);
    memory[1].set(PAGE, 12);
    check_eq!(
        [0, 1, 2].map(|page| mapped.get(page * PAGE)),
        [11, 12, 10],
        "first words"
    );
    Ok(())
}

fn private_anonymous() -> Result<()> {
    let memory = Memory::small_pages(256 * PAGE)?;
    memory.write(0, &pattern(3, 0, memory.len()));
    all_views_agree(&memory)
}

fn shared_anonymous() -> Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    all_views_agree(&Memory::map(100 * PAGE, memory::RW, flags, None, 0)?)
}

fn memfd_shared() -> Result<()> {
    let file = memfd(100 * PAGE, 0)?;
    let memory = Memory::shared(&file, 100 * PAGE)?;
    all_views_agree(&memory)?;
    // The file has what was written last.
    let mut seen = vec![0; PAGE];
    nix::sys::uio::pread(&file, &mut seen, 50 * PAGE as i64)?;
    let mut expected = vec![0; PAGE];
    memory.read(50 * PAGE, &mut expected);
    same("the file", 50 * PAGE, &seen, &expected)
}

fn tmpfs_file() -> Result<()> {
    let file = file_in("/dev/shm", 33 * PAGE)?;
    all_views_agree(&Memory::shared(&file, 33 * PAGE)?)
}

/// A private mapping's own copy is pinned, and the file stays as it was.
fn memfd_private() -> Result<()> {
    let file = memfd(8 * PAGE, 0)?;
    nix::sys::uio::pwrite(&file, &pattern(4, 0, 8 * PAGE), 0)?;
    let memory = Memory::private(&file, 8 * PAGE)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 4, 0, 8 * PAGE)?;
    all_views_agree(&memory)?;
    let mut seen = vec![0; 8 * PAGE];
    nix::sys::uio::pread(&file, &mut seen, 0)?;
    same("the file", 0, &seen, &pattern(4, 0, 8 * PAGE))
}

/// So it is with a file on disk.
fn disk_file_private() -> Result<()> {
    let file = std::env::current_exe()?;
    let file = std::fs::File::open(file)?;
    let memory = Memory::private(&file, 16 * PAGE)?;
    let mut before = vec![0; memory.len()];
    memory.read(0, &mut before);
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let mapped = buffer.map()?;
    let mut seen = vec![0; memory.len()];
    mapped.read(0, &mut seen);
    same("the buffer", 0, &seen, &before)?;
    all_views_agree(&memory)?;
    nix::sys::uio::pread(&file, &mut seen, 0)?;
    same("the file", 0, &seen, &before)
}

/// Memory that the program did not map itself.
fn stack_and_data() -> Result<()> {
    // As large a page as there is.
    #[repr(align(65536))]
    struct Page([u8; PAGE]);
    let device = Device::open()?;
    let mut stack = Page([5; PAGE]);
    let mut heap = Box::new(Page([6; PAGE]));
    let addresses = [
        std::ptr::from_mut(&mut stack) as u64,
        std::ptr::from_mut(&mut *heap) as u64,
    ];
    let ranges = addresses.map(|addr| Range {
        addr,
        len: PAGE as u64,
    });
    let buffer = device.create(&ranges)?;
    let mapped = buffer.map()?;
    let mut seen = vec![0; 2 * PAGE];
    mapped.read(0, &mut seen);
    same("the buffer", 0, &seen[..PAGE], &[5; PAGE])?;
    same("the buffer", PAGE, &seen[PAGE..], &[6; PAGE])?;
    stack.0[17] = 70;
    heap.0[18] = 71;
    std::hint::black_box((&mut stack, &mut heap));
    mapped.read(0, &mut seen);
    check_eq!(
        (seen[17], seen[PAGE + 18]),
        (70, 71),
        "what the program wrote"
    );
    Ok(())
}

/// Memory that was never touched is there after the call, and zero.
fn sparse_anonymous() -> Result<()> {
    let memory = Memory::small_pages(64 * PAGE)?;
    let device = Device::open()?;
    let buffer = device.create(&[memory.range()])?;
    let faults = kernel::faults()?;
    for page in 0..64 {
        memory.set(page * PAGE, page as u64 + 1);
    }
    let faults = kernel::faults()? - faults;
    check!(
        faults < 8,
        "the pages were not present: {faults} faults on 64 of them"
    );
    let mapped = buffer.map()?;
    let mut seen = vec![0; PAGE - 8];
    for page in 0..64 {
        check_eq!(mapped.get(page * PAGE), page as u64 + 1, "page {page}");
        mapped.read(page * PAGE + 8, &mut seen);
        same(
            "an untouched page",
            page * PAGE + 8,
            &seen,
            &vec![0; PAGE - 8],
        )?;
    }
    all_views_agree(&memory)
}

/// Only the named part of a sparse file is allocated.
fn sparse_memfd() -> Result<()> {
    let file = memfd(256 * PAGE, 0)?;
    let memory = Memory::shared(&file, 256 * PAGE)?;
    memory.keep_small(0, memory.len())?;
    check_eq!(fstat(&file)?.st_blocks, 0, "blocks of the new file");
    let device = Device::open()?;
    let buffer = device.create(&[memory.part(16 * PAGE, 32 * PAGE)])?;
    check_eq!(
        fstat(&file)?.st_blocks,
        32 * (PAGE / 512) as i64,
        "blocks after 32 pages were pinned"
    );
    let mapped = buffer.map()?;
    let mut seen = vec![1; 32 * PAGE];
    mapped.read(0, &mut seen);
    same("new pages", 0, &seen, &vec![0; 32 * PAGE])
}

/// Ranges whose pages are present are not faulted in, also if a range before them has none.
fn present_memory_is_not_faulted_in() -> Result<()> {
    const EACH: usize = 16;
    const RANGES: usize = 100;
    let device = Device::open()?;
    let sparse = Memory::small_pages(64 * PAGE)?;
    let memory = Memory::small_pages(2 * EACH * RANGES * PAGE)?;
    memory.touch_to_write();
    let mut ranges = vec![sparse.range()];
    ranges.extend((0..RANGES).map(|range| memory.part(2 * range * EACH * PAGE, EACH * PAGE)));
    let faults = kernel::faults()?;
    let buffer = device.create(&ranges)?;
    let faults = kernel::faults()? - faults;
    // Those of the test itself, besides.
    check!(faults < 64 + 50, "{faults} faults for 64 pages");
    drop(buffer);
    Ok(())
}

/// As many ranges as a call takes, each a page, backwards, so that none continues the one before.
fn ranges_65536() -> Result<()> {
    const COUNT: usize = pinbuf_uapi::MAX_RANGES as usize;
    let device = Device::open()?;
    let memory = Memory::small_pages(COUNT * PAGE)?;
    for page in 0..COUNT {
        memory.set(page * PAGE, stamp(8, page as u64));
    }
    let ranges: Vec<Range> = (0..COUNT)
        .rev()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    let buffer = device.create(&ranges)?;
    let info = device.describe(&buffer)?;
    check_eq!(info.bytes, (COUNT * PAGE) as u64, "bytes");
    check_eq!(info.pages, COUNT as u64, "pages");
    check!(
        info.kernel_bytes <= 16 * COUNT as u64,
        "{} bytes of kernel memory for {COUNT} scattered pages in {} extents",
        info.kernel_bytes,
        info.extents
    );
    let mapped = buffer.map()?;
    for index in 0..COUNT {
        let page = (COUNT - 1 - index) as u64;
        check_eq!(
            mapped.get(index * PAGE),
            stamp(8, page),
            "page {index} of the buffer"
        );
    }
    if kernel::bounces_always()? {
        return Ok(());
    }
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    check_eq!(
        importer.report(mapping)?.total,
        info.bytes,
        "the device's bytes"
    );
    importer.vmap()?;
    let pieces = (0..COUNT)
        .rev()
        .map(|page| (&memory, page * PAGE, PAGE))
        .collect();
    let source = Source {
        buffer: &buffer,
        pieces,
    };
    let cpu = Mapped::of(&buffer, &mapped);
    let sg = DeviceView::of(&importer, mapping);
    agree_sampled(
        &[&source, &cpu, &sg, &KernelView(&importer)],
        COUNT * PAGE,
        97,
    )
}

/// 1 GiB, or what the machine can spare if that is less than 1.25 times it.
fn one_gib() -> Result<()> {
    let device = Device::open()?;
    let len = (1 << 30).min(kernel::available()? / 5 * 4 / HUGE * HUGE);
    check!(
        len >= 256 << 20,
        "the machine has only {len} bytes to spare"
    );
    let memory = Memory::map_aligned(
        len,
        HUGE,
        memory::RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    if kernel::has_transparent_huge_pages() {
        memory.advise(0, len, libc::MADV_HUGEPAGE)?;
    }
    let buffer = device.create(&[memory.range()])?;
    let info = device.describe(&buffer)?;
    check_eq!(info.bytes, len as u64, "bytes");
    check_eq!(info.charged_pages, (len / PAGE) as u64, "pages charged");
    let mapped = buffer.map()?;
    for offset in (0..len).step_by(16 * PAGE) {
        memory.set(offset, stamp(9, offset as u64));
    }
    for offset in (0..len).step_by(16 * PAGE) {
        check_eq!(
            mapped.get(offset),
            stamp(9, offset as u64),
            "the mapping at {offset:#x}"
        );
    }
    if kernel::bounces_always()? {
        return Ok(());
    }
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    check_eq!(
        importer.report(mapping)?.total,
        len as u64,
        "the device's bytes"
    );
    importer.vmap()?;
    let source = Source::whole(&buffer, &memory);
    let cpu = Mapped::of(&buffer, &mapped);
    let sg = DeviceView::of(&importer, mapping);
    agree_sampled(&[&source, &cpu, &sg, &KernelView(&importer)], len, 203)
}

/// Sizes and offsets do not fit into 32 bits. A huge page, named again and again, makes up the buffer.
fn more_than_4_gib() -> Result<()> {
    const LEN: usize = (4 << 30) + HUGE;
    let total = kernel::field("/proc/meminfo", "MemTotal")? << 10;
    if usize::try_from(total)? < LEN {
        // A buffer is no larger than memory.
        return Ok(());
    }
    let device = Device::open()?;
    let pool = HugePool::with_free(1)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, memory::RW, flags, None, 0).context("mapping a huge page")?;
    memory.set(5 * PAGE, 7);
    let buffer = device.create(&vec![memory.range(); LEN / HUGE])?;
    check_eq!(buffer.len()?, LEN, "the buffer's size");
    let info = device.describe(&buffer)?;
    let bytes = [info.bytes, info.held_bytes, PAGE as u64 * info.pages];
    check_eq!(
        bytes,
        [LEN as u64; 3],
        "bytes, bytes held, and bytes of all pages"
    );
    check_eq!(info.charged_pages, (LEN / PAGE) as u64, "pages charged");
    let mapped = buffer.map_part(4 << 30, HUGE)?;
    check_eq!(mapped.get(5 * PAGE), 7, "what is there behind 4 GiB");
    if !kernel::bounces_always()? {
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
        let mapping = importer.map(Direction::Bidirectional)?.0;
        let report = importer.report(mapping)?;
        check_eq!(report.total, LEN as u64, "the device's bytes");
    }
    drop(memory);
    let all = Discard {
        offset: 0,
        len: LEN as u64,
        state: STATE_DISCARDED,
        reserved: 0,
    };
    check_eq!(device.discards(&buffer, 1)?, [all], "what is discarded");
    let discarded = device.describe(&buffer)?.discarded_bytes;
    check_eq!(discarded, LEN as u64, "bytes discarded");
    drop(pool);
    Ok(())
}

/// The properties of the descriptor.
fn descriptor() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(3 * PAGE)?;
    for (flags, expected) in [
        (0, FdFlag::empty()),
        (pinbuf_uapi::CREATE_CLOEXEC, FdFlag::FD_CLOEXEC),
    ] {
        let buffer = device.create_with(&[memory.range()], flags)?;
        let seen = FdFlag::from_bits_truncate(fcntl(&buffer, FcntlArg::F_GETFD)?);
        check_eq!(seen, expected, "descriptor flags with {flags:#x}");
        let status = OFlag::from_bits_truncate(fcntl(&buffer, FcntlArg::F_GETFL)?);
        check_eq!(status & OFlag::O_ACCMODE, OFlag::O_RDWR, "access mode");
        check_eq!(buffer.len()?, 3 * PAGE, "size by lseek");
        // Programs tell by this name that it is one of pinbuf's.
        let fdinfo = kernel::read(format!("/proc/self/fdinfo/{}", buffer.as_fd().as_raw_fd()))?;
        let name = fdinfo
            .lines()
            .find_map(|line| line.strip_prefix("exp_name:"));
        check_eq!(name.map(str::trim), Some("pinbuf"), "the exporter's name");
    }
    Ok(())
}

/// How the device was opened makes no difference.
fn opened_read_only() -> Result<()> {
    for flags in [OFlag::O_RDONLY, OFlag::O_WRONLY] {
        let device = Device::open_with(flags)?;
        let memory = Memory::anonymous(PAGE)?;
        let buffer = device.create(&[memory.range()])?;
        let mapped = buffer.map()?;
        mapped.set(0, 0x1234);
        check_eq!(memory.get(0), 0x1234, "written through the mapping");
        check_eq!(device.query()?.version, pinbuf_uapi::VERSION, "version");
        check_eq!(device.describe(&buffer)?.pages, 1, "pages");
    }
    Ok(())
}

/// A struct of a later version, whose new fields are zero.
fn longer_struct() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(PAGE)?;
    let ranges = [memory.range()];
    for size in [40, 128, 4096] {
        let page = Memory::anonymous(2 * PAGE)?;
        let argument = Create {
            size,
            ranges: ranges.as_ptr() as u64,
            count: 1,
            ..Default::default()
        };
        page.write(0, &bytes_of(&argument));
        let buffer = device
            .create_at(page.addr())
            .with_context(|| format!("a struct of {size} bytes, all zero behind the known ones"))?;
        check_eq!(buffer.len()?, PAGE, "size of the buffer");
        // The number of the call holds the size as well, as the program's header has it.
        let command = pinbuf_uapi::CREATE & !(0x3fff << 16) | size << 16;
        let fd = ioctl(&device, command, page.addr())
            .with_context(|| format!("with {size} bytes in its number"))?;
        // SAFETY: the call has just returned it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    Ok(())
}

/// A create argument's bytes.
pub fn bytes_of(argument: &Create) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&argument.size.to_ne_bytes());
    bytes.extend_from_slice(&argument.flags.to_ne_bytes());
    bytes.extend_from_slice(&argument.ranges.to_ne_bytes());
    bytes.extend_from_slice(&argument.count.to_ne_bytes());
    bytes.extend_from_slice(&argument.reserved.to_ne_bytes());
    bytes.extend_from_slice(&argument.backing.to_ne_bytes());
    bytes
}

/// Two buffers over the same pages are independent but for the bytes.
fn same_memory_twice() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(16 * PAGE)?;
    let first = device.create(&[memory.range()])?;
    let second = device.create(&[memory.part(4 * PAGE, 8 * PAGE)])?;
    let (first_map, second_map) = (first.map()?, second.map()?);
    first_map.set(4 * PAGE, 44);
    check_eq!(second_map.get(0), 44, "the second buffer's first word");
    drop((first, first_map));
    second_map.set(PAGE, 45);
    check_eq!(
        memory.get(5 * PAGE),
        45,
        "written after the first buffer was gone"
    );
    let pins = kernel::pins()?;
    drop((second, second_map));
    check_eq!(
        pins - kernel::pins()?,
        8,
        "pins that the second buffer gave back"
    );
    Ok(())
}

/// Nothing is lost in any number of repetitions.
fn again_and_again() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::small_pages(64 * PAGE)?;
    let bad = [
        memory.range(),
        Range {
            addr: memory.addr(),
            len: 1,
        },
    ];
    let pins = kernel::pins()?;
    for round in 0..300 {
        let buffer = device.create(&[memory.range()])?;
        check_eq!(
            device.describe(&buffer)?.pages,
            64,
            "pages in round {round}"
        );
        drop(buffer);
        check_eq!(
            device.create(&bad).err(),
            Some(nix::Error::EINVAL),
            "a bad call"
        );
    }
    check_eq!(kernel::pins()?, pins, "pinned pages after all");
    // The same with pages in huge memory, whose pins count differently.
    if let Ok(pool) = HugePool::with_free(2) {
        let file = huge_memfd(2 * HUGE)?;
        let memory = Memory::shared(&file, 2 * HUGE)?;
        for _ in 0..100 {
            drop(device.create(&[memory.part(PAGE, HUGE)])?);
        }
        check_eq!(kernel::pins()?, pins, "pinned pages after huge ones");
        drop((memory, file, pool));
    }
    Ok(())
}

/// A page has a limited number of references, each pin takes 1,024 of them, and the kernel warns when they run
/// out. The driver leaves half of them to others: an error, and nothing in the log.
fn a_page_a_million_times() -> Result<()> {
    const COUNT: usize = pinbuf_uapi::MAX_RANGES as usize;
    /// Buffers that together use all that the driver may take.
    const MOST: usize = (1 << 20) / COUNT;
    let device = Device::open()?;
    let memory = Memory::small_pages(2 * PAGE)?;
    memory.set(0, 7);
    let ranges = vec![memory.part(0, PAGE); COUNT];
    let mut buffers = Vec::new();
    let error = loop {
        match device.create(&ranges) {
            Ok(buffer) => buffers.push(buffer),
            Err(error) => break error,
        }
        check!(buffers.len() <= MOST, "{} pins", buffers.len() * COUNT);
    };
    check_eq!(error, Errno::ENOMEM, "one buffer too many");
    check_eq!(buffers.len(), MOST - 1, "buffers of {COUNT} pages each");
    check_eq!(
        device.describe(&buffers[0])?.pages as usize,
        COUNT,
        "pages of a buffer"
    );
    // Neither its neighbour nor short-term references are affected.
    drop(device.create(&[memory.part(PAGE, PAGE)])?);
    let cost = pin_cost(memory.addr(), PAGE as u64, PAGE as u64)?;
    check_eq!(cost.pages, 1, "pages that somebody else pins");
    buffers.pop();
    drop(device.create(&ranges).context("after one has gone")?);
    check_eq!(memory.get(0), 7, "what is there");
    Ok(())
}
