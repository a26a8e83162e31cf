// SPDX-License-Identifier: MIT OR Apache-2.0

//! The libraries for Rust and for C: each function does what its documentation says, on the driver.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use pinbuf::{Access, ChargedTo, Error, FileRange, HugePage, Range, Region};
use pinbuf_c::CRegion;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{pattern, HUGE};
use pinbuf_test_harness::support::process::{
    become_user, in_child, set_memlock, signal_of, PATIENCE, USER,
};
use pinbuf_test_harness::support::vgem::{Vgem, SYNC_WRITE};
use pinbuf_test_harness::support::{foreign, Buffer, Device, Memory, PAGE};
use pinbuf_test_harness::tests;
use pinbuf_uapi as uapi;

tests!("library":
    regions_of_all_kinds,
    regions_of_all_kinds_in_c,
    private_regions_are_not_inherited,
    huge_pages_are_advised,
    files_of_regions_keep_their_size,
    parts_in_their_order,
    parts_of_files,
    what_is_charged,
    answers_are_the_drivers,
    exported_in_c,
    mapped_in_c,
    accesses_begin_and_end,
    signals_end_no_access,
    a_poll_that_fails_forgets_nothing,
);

/// The kinds of `pinbuf_region_new()`.
const ANONYMOUS: i32 = 0;
const TRANSPARENT: i32 = 1;
const HUGETLB_2M: i32 = 2;
const HUGETLB_1G: i32 = 3;

/// A buffer, as the harness has it.
fn as_buffer(buffer: &pinbuf::DmaBuf) -> Result<Buffer> {
    Ok(Buffer::from_fd(buffer.as_fd().try_clone_to_owned()?))
}

/// Fails unless the memory is zeroed, and memory and buffer are the same bytes, also after the memory is gone.
fn agree(region: Region, len: usize, huge: bool) -> Result<()> {
    let device = pinbuf::Device::open()?;
    ensure!(region.len() == len, "{} bytes, not {len}", region.len());
    let mut bytes = vec![1; len];
    region.read_at(0, &mut bytes)?;
    ensure!(bytes.iter().all(|byte| *byte == 0), "it is not zeroed");
    let wanted = pattern(3, 0, len);
    region.write_at(0, &wanted)?;
    let buffer = device.export(&region)?;
    let info = buffer.info(&device)?;
    ensure!(
        info.bytes == len as u64 && info.pages == (len / PAGE) as u64,
        "{info:?}"
    );
    // hugetlb is pinned by the huge page.
    let pins = if huge { len / HUGE } else { len / PAGE };
    ensure!(info.pins == pins as u64, "{info:?}");
    drop(region);
    let mapping = buffer.map()?;
    ensure!(mapping.len() == len, "{} bytes mapped", mapping.len());
    ensure!(
        len < HUGE || mapping.as_ptr() as usize % HUGE == 0,
        "mapped at {:?}",
        mapping.as_ptr()
    );
    let access = mapping.begin(Access::ReadWrite)?;
    access.read_at(0, &mut bytes)?;
    ensure!(bytes == wanted, "the buffer has other bytes");
    access.fill(len - 3, 3, 9)?;
    access.read_at(len - 3, &mut bytes[..3])?;
    ensure!(bytes[..3] == [9; 3], "what was written is not there");
    let outside = access.read_at(len - 3, &mut bytes[..4]);
    ensure!(
        matches!(outside, Err(Error::OutOfBounds { .. })),
        "{outside:?}"
    );
    Ok(access.finish()?)
}

fn regions_of_all_kinds() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    agree(Region::anonymous(PAGE + 1)?, 2 * PAGE, false)?;
    agree(Region::huge_advised(HUGE + 1)?, HUGE + PAGE, false)?;
    agree(Region::memfd("a\0b", 3 * PAGE, None)?, 3 * PAGE, false)?;
    let page = Some(HugePage::Mib2);
    agree(Region::hugetlb(HUGE + 1, HugePage::Mib2)?, 2 * HUGE, true)?;
    agree(Region::memfd("huge", 1, page)?, HUGE, true)?;
    let without = Region::hugetlb(3 * HUGE, HugePage::Mib2).err();
    ensure!(
        matches!(without, Some(Error::NoHugePages { .. })),
        "{without:?}"
    );
    Ok(())
}

/// A region of the C library.
fn region(len: usize, kind: i32) -> Result<CRegion, i32> {
    let mut region = CRegion {
        address: std::ptr::null_mut(),
        len: 0,
    };
    // SAFETY: a place for a region.
    match unsafe { pinbuf_c::pinbuf_region_new(&mut region, len, kind) } {
        0 => Ok(region),
        error => Err(error),
    }
}

/// What the kernel says of the mapping that an address is in, behind a word.
fn smaps_of(address: *mut c_void, word: &str) -> Result<String> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let holds = |line: &&str| {
        let number = |text| u64::from_str_radix(text, 16).ok();
        let range = line.split(' ').next().and_then(|word| word.split_once('-'));
        let range = range.and_then(|(start, end)| Some(number(start)?..number(end)?));
        range.is_some_and(|range| range.contains(&(address as u64)))
    };
    let mapping = text.lines().skip_while(|line| !holds(line));
    let found = mapping.filter_map(|line| line.strip_prefix(word)).next();
    Ok(found.context("nothing is mapped there")?.trim().to_owned())
}

/// The size of the pages that are mapped at an address, in KiB.
fn page_size_at(address: *mut c_void) -> Result<usize> {
    let kib = smaps_of(address, "MMUPageSize:")?;
    Ok(kib.strip_suffix(" kB").unwrap_or(&kib).parse()?)
}

fn regions_of_all_kinds_in_c() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    for (kind, asked, len, kib) in [
        (ANONYMOUS, PAGE + 1, 2 * PAGE, PAGE >> 10),
        (TRANSPARENT, HUGE + 1, HUGE + PAGE, PAGE >> 10),
        (HUGETLB_2M, HUGE + 1, 2 * HUGE, HUGE >> 10),
    ] {
        let mut region = region(asked, kind)
            .map_err(|error| Errno::from_raw(-error))
            .with_context(|| format!("kind {kind}"))?;
        ensure!(region.len == len, "kind {kind} has {} bytes", region.len);
        ensure!(
            page_size_at(region.address)? == kib,
            "kind {kind} has pages of another size"
        );
        ensure!(
            kind != TRANSPARENT || region.address as usize % HUGE == 0,
            "it is not aligned"
        );
        let place = region.address;
        // SAFETY: memory of this test's, of that length.
        let zeroed = unsafe { std::slice::from_raw_parts(place.cast::<u8>(), len) };
        ensure!(zeroed.iter().all(|byte| *byte == 0), "it is not zeroed");
        // SAFETY: it is used no more.
        unsafe { pinbuf_c::pinbuf_region_free(&mut region) };
        ensure!(
            region.address.is_null() && region.len == 0 && page_size_at(place).is_err(),
            "it was not freed"
        );
        // SAFETY: it is empty.
        unsafe { pinbuf_c::pinbuf_region_free(&mut region) };
    }
    for (len, kind, error) in [
        (0, ANONYMOUS, libc::EINVAL),
        (PAGE, 4, libc::EINVAL),
        (PAGE, -1, libc::EINVAL),
        (usize::MAX, ANONYMOUS, libc::EOVERFLOW),
        (isize::MAX as usize, TRANSPARENT, libc::EOVERFLOW),
        (1 << 46, ANONYMOUS, libc::ENOMEM),
        (3 * HUGE, HUGETLB_2M, libc::ENOMEM),
        // The machine has none.
        (PAGE, HUGETLB_1G, libc::ENOMEM),
    ] {
        let failed = region(len, kind).err();
        ensure!(
            failed == Some(-error),
            "{len:#x} bytes of kind {kind}: {failed:?}"
        );
    }
    Ok(())
}

/// Otherwise the first write after a fork would give the writer another page than the buffer's.
fn private_regions_are_not_inherited() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let regions = [
        (Region::anonymous(PAGE)?, true),
        (Region::huge_advised(HUGE)?, true),
        (Region::hugetlb(HUGE, HugePage::Mib2)?, true),
        // Shared memory is the same on both sides.
        (Region::memfd("shared", PAGE, None)?, false),
    ];
    for (number, (region, private)) in regions.iter().enumerate() {
        region.write_at(0, b"parent")?;
        let signal = signal_of(|| {
            let _ = region.write_at(0, b"child!");
        })?;
        let mut bytes = [0; 6];
        region.read_at(0, &mut bytes)?;
        let expected = match private {
            true => (Some(Signal::SIGSEGV), b"parent"),
            false => (None, b"child!"),
        };
        ensure!(
            (signal, &bytes) == expected,
            "region {number}: {signal:?}, {bytes:?}"
        );
    }
    Ok(())
}

/// The kernel is asked for transparent huge pages where a region is made for that, and nowhere else.
fn huge_pages_are_advised() -> Result<()> {
    for (region, advised) in [
        (Region::huge_advised(HUGE)?, true),
        (Region::anonymous(HUGE)?, false),
    ] {
        let flags = smaps_of(region.as_ptr().cast(), "VmFlags:")?;
        let found = flags.split_whitespace().any(|flag| flag == "hg");
        ensure!(
            found == advised,
            "{flags} of memory that is advised: {advised}"
        );
    }
    Ok(())
}

/// No mapping of a region can lose its memory, whoever has the file.
fn files_of_regions_keep_their_size() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    for page in [None, Some(HugePage::Mib2)] {
        let region = Region::memfd("sealed", 1, page)?;
        let file = region.memfd_descriptor().context("no descriptor")?;
        ensure!(is_closed_on_exec(file), "other programs inherit the file");
        for len in [0, region.len() + HUGE] {
            // SAFETY: no memory is involved.
            let ret = unsafe { libc::ftruncate(file.as_raw_fd(), len as i64) };
            ensure!(
                Errno::result(ret) == Err(Errno::EPERM),
                "the file can have {len} bytes"
            );
        }
    }
    ensure!(
        Region::anonymous(1)?.memfd_descriptor().is_none(),
        "private memory has a file"
    );
    Ok(())
}

/// The pages of a buffer, by the number that each of a region begins with.
fn numbers(buffer: &pinbuf::DmaBuf) -> Result<Vec<u8>> {
    let mapping = buffer.map()?;
    let access = mapping.begin(Access::Read)?;
    let mut found = Vec::new();
    for at in (0..mapping.len()).step_by(PAGE) {
        let mut byte = [0];
        access.read_at(at, &mut byte)?;
        found.push(byte[0]);
    }
    Ok(found)
}

/// Marks each page by its number.
fn numbered(region: Region) -> Result<Region> {
    for page in 0..region.len() / PAGE {
        region.write_at(page * PAGE, &[page as u8])?;
    }
    Ok(region)
}

fn parts_in_their_order() -> Result<()> {
    let device = pinbuf::Device::open()?;
    let region = numbered(Region::anonymous(8 * PAGE)?)?;
    let part = |page: usize, pages: usize| region.slice(page * PAGE, pages * PAGE);
    let buffer = device.export_slices(&[part(5, 2)?, part(0, 1)?, part(5, 1)?, part(6, 2)?])?;
    ensure!(
        numbers(&buffer)? == [5, 6, 0, 5, 6, 7],
        "{:?}",
        numbers(&buffer)
    );
    let none = device.export_slices(&[]).err();
    ensure!(none == Some(Error::Empty), "{none:?}");
    let many = vec![part(1, 1)?; uapi::MAX_RANGES as usize + 1];
    let refused = device.export_slices(&many).err();
    ensure!(
        matches!(refused, Some(Error::TooManyRanges { .. })),
        "{refused:?}"
    );
    let most = device.export_slices(&many[1..])?;
    ensure!(
        most.size()? == uapi::MAX_RANGES as usize * PAGE,
        "{:?}",
        most.size()
    );
    Ok(())
}

fn parts_of_files() -> Result<()> {
    let device = pinbuf::Device::open()?;
    let region = numbered(Region::memfd("parts", 8 * PAGE, None)?)?;
    let other = Region::memfd("other", 8 * PAGE, None)?;
    let file = region.memfd_descriptor().context("no descriptor")?;
    let part = |page: usize, pages: usize| FileRange {
        range: Range {
            addr: region.as_ptr() as u64 + (page * PAGE) as u64,
            len: (pages * PAGE) as u64,
        },
        file,
        offset: (page * PAGE) as u64,
    };
    // SAFETY: a region shows its memory through no reference.
    let export = |parts: &[FileRange<'_>]| unsafe { device.export_file_ranges(parts) };
    let buffer = export(&[part(3, 2), part(0, 1), part(7, 1)])?;
    ensure!(numbers(&buffer)? == [3, 4, 0, 7], "{:?}", numbers(&buffer));
    let moved = FileRange {
        offset: 2 * PAGE as u64,
        ..part(3, 1)
    };
    let foreign = FileRange {
        file: other.memfd_descriptor().context("no descriptor")?,
        ..part(3, 1)
    };
    let odd = FileRange {
        offset: 5,
        ..part(0, 1)
    };
    for (part, expected) in [
        (moved, Error::NotTheBacking),
        (foreign, Error::NotTheBacking),
        (
            odd,
            Error::Misaligned {
                value: 5,
                align: PAGE as u64,
            },
        ),
    ] {
        let failed = export(&[part]).err();
        ensure!(failed.as_ref() == Some(&expected), "{failed:?}");
    }
    Ok(())
}

/// What is charged, and to what, is what the documentation says of each user.
fn what_is_charged() -> Result<()> {
    const LIMIT: usize = 16 * PAGE;
    let device = pinbuf::Device::open()?;
    let charged = |pages: usize| -> Result<(ChargedTo, u64)> {
        let buffer = device.export(&Region::anonymous(pages * PAGE)?)?;
        let info = buffer.info(&device)?;
        Ok((info.charged_to, info.charged_pages))
    };
    ensure!(charged(4)?.0 == ChargedTo::Nothing, "{:?}", charged(4)?);
    ensure!(
        device.query()?.memlock.is_none(),
        "root has a limit: {:?}",
        device.query()?
    );
    in_child(|| {
        become_user(USER)?;
        set_memlock(LIMIT)?;
        ensure!(charged(16)? == (ChargedTo::User, 16), "{:?}", charged(16)?);
        ensure!(
            charged(17)? == (ChargedTo::Allowance, 17),
            "{:?}",
            charged(17)?
        );
        let kept = device.export(&Region::anonymous(20 * PAGE)?)?;
        let query = device.query()?;
        ensure!(
            query.memlock == Some(LIMIT as u64) && query.allowance_used == 20 * PAGE as u64,
            "{query:?}"
        );
        let bytes = query.allowance + PAGE as u64;
        let refused = device.export(&Region::anonymous(bytes as usize)?).err();
        ensure!(refused == Some(Error::OverLimit { bytes }), "{refused:?}");
        drop(kept);
        Ok(())
    })
}

/// No field is mixed up with another one.
fn answers_are_the_drivers() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let (device, own) = (pinbuf::Device::open()?, Device::open()?);
    let region = Region::hugetlb(HUGE, HugePage::Mib2)?;
    let small = Memory::small_pages(8 * PAGE)?;
    small.touch_to_write();
    let range = |addr, len| Range { addr, len };
    let ranges = [
        range(region.as_ptr() as u64, HUGE as u64),
        range(small.addr(), 8 * PAGE as u64),
        range(region.as_ptr() as u64 + PAGE as u64, PAGE as u64),
    ];
    // SAFETY: there is no reference to the memory.
    let buffer = unsafe { device.export_ranges(&ranges)? };
    small.advise(PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
    let expected = own.describe(&as_buffer(&buffer)?)?;
    let info = buffer.info(&device)?;
    let seen = [
        info.bytes,
        info.pages,
        info.extents,
        info.pins,
        info.kernel_bytes,
        info.held_bytes,
        info.charged_pages,
        info.mappings.into(),
        info.discarded_bytes,
        info.unsure_bytes,
    ];
    let all = [
        expected.bytes,
        expected.pages,
        expected.extents,
        expected.pins,
        expected.kernel_bytes,
        expected.held_bytes,
        expected.charged_pages,
        expected.mappings.into(),
        expected.discarded_bytes,
        expected.unsure_bytes,
    ];
    ensure!(seen == all, "{info:?}, and not {expected:?}");
    let query = device.query()?;
    let limits = own.query()?;
    ensure!(
        (query.version, query.max_ranges, query.page_size)
            == (limits.version, limits.max_ranges as usize, PAGE),
        "{query:?}"
    );
    ensure!(
        [
            query.allowance,
            query.allowance_used,
            query.allowance_system
        ] == [
            limits.allowance_bytes,
            limits.allowance_used,
            limits.allowance_system
        ],
        "{query:?}"
    );
    let features = [
        (query.huge_mmap, uapi::FEATURE_HUGE_MMAP),
        (query.check_backing, uapi::FEATURE_CHECK_BACKING),
        (query.discards, uapi::FEATURE_DISCARDS),
    ];
    for (has, bit) in features {
        ensure!(has == (limits.features & bit != 0), "{query:?}");
    }
    // The same in C, which fills in the caller's structs.
    let fd = device.as_fd().as_raw_fd();
    let mut info = uapi::Info::default();
    // SAFETY: a struct of this kind.
    let asked = unsafe { pinbuf_c::pinbuf_info(fd, buffer.as_fd().as_raw_fd(), &mut info) };
    let same = info.fd == buffer.as_fd().as_raw_fd();
    info.fd = expected.fd;
    ensure!(asked == 0 && same && info == expected, "{asked}: {info:?}");
    let mut query = uapi::Query::default();
    // SAFETY: a struct of this kind.
    let asked = unsafe { pinbuf_c::pinbuf_query(fd, &mut query) };
    ensure!(asked == 0 && query == limits, "{asked}: {query:?}");
    // SAFETY: as above.
    let wrong = unsafe { pinbuf_c::pinbuf_info(fd, fd, &mut info) };
    // SAFETY: a null pointer is allowed.
    let null = unsafe { pinbuf_c::pinbuf_query(fd, std::ptr::null_mut()) };
    ensure!(
        [wrong, null] == [-libc::EINVAL, -libc::EFAULT],
        "{wrong}, {null}"
    );
    Ok(())
}

/// A descriptor that a function of the C library has returned.
fn owned(fd: i32) -> Result<OwnedFd> {
    ensure!(fd >= 0, "{}", Errno::from_raw(-fd));
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn is_closed_on_exec(fd: impl AsFd) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETFD) == libc::FD_CLOEXEC }
}

fn exported_in_c() -> Result<()> {
    let device = owned(pinbuf_c::pinbuf_open())?;
    ensure!(is_closed_on_exec(&device), "the device");
    let fd = device.as_raw_fd();
    let memory = Memory::small_pages(4 * PAGE)?;
    for page in 0..4 {
        memory.set(page * PAGE, page as u64);
    }
    let at = memory.at(0).cast();
    // SAFETY: there is no reference to the memory.
    let whole = owned(unsafe { pinbuf_c::pinbuf_export(fd, at, 4 * PAGE) })?;
    ensure!(is_closed_on_exec(&whole), "a buffer");
    // SAFETY: as above.
    let misaligned = unsafe { pinbuf_c::pinbuf_export(fd, at, 100) };
    ensure!(misaligned == -libc::EINVAL, "{misaligned}");
    let ranges = [memory.part(2 * PAGE, PAGE), memory.part(0, 2 * PAGE)];
    let export = |count, flags| {
        // SAFETY: as above, and a list of ranges.
        unsafe { pinbuf_c::pinbuf_export_ranges(fd, ranges.as_ptr(), count, flags) }
    };
    let parts = owned(export(2, 0))?;
    ensure!(!is_closed_on_exec(&parts), "flags are ignored");
    ensure!(
        is_closed_on_exec(&owned(export(2, uapi::CREATE_CLOEXEC))?),
        "flags are ignored"
    );
    for (buffer, expected) in [(whole, &[0, 1, 2, 3][..]), (parts, &[2, 0, 1][..])] {
        let seen = Buffer::from_fd(buffer).map()?;
        for (at, page) in expected.iter().enumerate() {
            ensure!(seen.get(at * PAGE) == *page, "page {at} of {expected:?}");
        }
    }
    let errors = [
        export(0, 0),
        export(usize::MAX, 0),
        export(2, uapi::CREATE_CHECK_BACKING),
        export(2, 1 << 31),
    ];
    ensure!(errors == [-libc::EINVAL; 4], "{errors:?}");
    Ok(())
}

fn mapped_in_c() -> Result<()> {
    const LEN: usize = HUGE + PAGE;
    let memory = Memory::anonymous(LEN)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let fd = buffer.as_fd().as_raw_fd();
    let (mut address, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: places for a pointer and a length.
    let mapped = unsafe { pinbuf_c::pinbuf_map(fd, &mut address, &mut len) };
    ensure!(mapped == 0 && len == LEN, "{mapped}: {len} bytes");
    ensure!(address as usize % HUGE == 0, "mapped at {address:?}");
    // The descriptor stays its caller's.
    ensure!(buffer.len()? == LEN, "{:?}", buffer.len());
    let word = address.cast::<u64>();
    memory.set(0, 77);
    // SAFETY: in the mapping, and aligned.
    let seen = unsafe { word.read_volatile() };
    // SAFETY: as above.
    unsafe { word.wrapping_byte_add(HUGE).write_volatile(78) };
    ensure!(
        (seen, memory.get(HUGE)) == (77, 78),
        "it maps other memory: {seen}"
    );
    // SAFETY: the mapping of above, which nothing uses.
    Errno::result(unsafe { libc::munmap(address, len) })?;
    // SAFETY: a place for a pointer; the length may be null.
    let mapped = unsafe { pinbuf_c::pinbuf_map(fd, &mut address, std::ptr::null_mut()) };
    ensure!(mapped == 0, "without a length: {mapped}");
    // SAFETY: as above.
    Errno::result(unsafe { libc::munmap(address, LEN) })?;
    let file = std::fs::File::open("/dev/null")?;
    for (fd, error) in [(-1, libc::EBADF), (file.as_raw_fd(), libc::EINVAL)] {
        // SAFETY: as above.
        let failed = unsafe { pinbuf_c::pinbuf_map(fd, &mut address, &mut len) };
        ensure!(failed == -error, "{fd}: {failed}");
    }
    Ok(())
}

/// The end of an access that has begun.
fn end(buffer: &pinbuf::DmaBuf, access: Access) -> Result<Box<dyn FnOnce() -> i32 + Send + '_>> {
    let guard = buffer.begin_cpu_access(access)?;
    Ok(Box::new(move || guard.finish().map_or(1, |()| 0)))
}

/// A device is still at work: the beginning of an access waits for it, and the end does not.
fn accesses_begin_and_end() -> Result<()> {
    let vgem = Vgem::new()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let of_rust = pinbuf::DmaBuf::try_from(buffer.as_fd())?;
    let fd = buffer.as_fd().as_raw_fd();
    type Call<'a> = (&'static str, bool, Box<dyn FnOnce() -> i32 + Send + 'a>);
    let left = of_rust.begin_cpu_access(Access::Read)?;
    let calls: [Call<'_>; 9] = [
        ("pinbuf_begin(READ)", true, {
            Box::new(move || pinbuf_c::pinbuf_begin(fd, 1))
        }),
        ("pinbuf_begin(WRITE)", true, {
            Box::new(move || pinbuf_c::pinbuf_begin(fd, 2))
        }),
        ("begin", true, {
            Box::new(|| {
                let begun = of_rust.begin_cpu_access(Access::ReadWrite);
                begun.map_or(1, |_| 0)
            })
        }),
        ("pinbuf_end(READ)", false, {
            Box::new(move || pinbuf_c::pinbuf_end(fd, 1))
        }),
        ("pinbuf_end(READ | WRITE)", false, {
            Box::new(move || pinbuf_c::pinbuf_end(fd, 3))
        }),
        ("finish(Read)", false, end(&of_rust, Access::Read)?),
        ("finish(Write)", false, end(&of_rust, Access::Write)?),
        (
            "finish(ReadWrite)",
            false,
            end(&of_rust, Access::ReadWrite)?,
        ),
        ("drop", false, {
            Box::new(move || {
                drop(left);
                0
            })
        }),
    ];
    for (what, waits, call) in calls {
        let fence = vgem.uses(buffer.as_fd(), SYNC_WRITE)?;
        let (done, result) = mpsc::channel();
        thread::scope(|scope| -> Result<()> {
            scope.spawn(move || done.send(call()));
            let patience = match waits {
                true => Duration::from_millis(200),
                // vgem's fences are over after ten seconds.
                false => Duration::from_secs(5),
            };
            let before = result.recv_timeout(patience);
            fence.signal().with_context(|| what)?;
            ensure!(before.is_err() == waits, "{what} before: {before:?}");
            if waits {
                let after = result.recv_timeout(PATIENCE);
                ensure!(after == Ok(0), "{what}: {after:?}");
            }
            Ok(())
        })?;
    }
    for access in [0, 4, -1] {
        let errors = [
            pinbuf_c::pinbuf_begin(fd, access),
            pinbuf_c::pinbuf_end(fd, access),
        ];
        ensure!(errors == [-libc::EINVAL; 2], "{access}: {errors:?}");
    }
    Ok(())
}

/// A signal with a handler during the wait for a device is no error of the access, in Rust and in C.
fn signals_end_no_access() -> Result<()> {
    extern "C" fn notice(_: libc::c_int) {}
    let action = SigAction::new(
        SigHandler::Handler(notice),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    let before = unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let vgem = Vgem::new()?;
    let memory = Memory::anonymous(PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let of_rust = pinbuf::DmaBuf::try_from(buffer.as_fd())?;
    let fd = buffer.as_fd().as_raw_fd();
    for in_c in [false, true] {
        let fence = vgem.uses(buffer.as_fd(), SYNC_WRITE)?;
        let (say, hear) = mpsc::channel();
        let of_rust = &of_rust;
        let result = thread::scope(|scope| -> Result<i32> {
            let waiter = scope.spawn(move || {
                // SAFETY: a call without conditions.
                let _ = say.send(unsafe { libc::pthread_self() });
                match in_c {
                    true => pinbuf_c::pinbuf_begin(fd, 1),
                    false => of_rust.begin_cpu_access(Access::Read).map_or(1, |_| 0),
                }
            });
            let thread = hear.recv()?;
            for _ in 0..3 {
                thread::sleep(Duration::from_millis(50));
                ensure!(!waiter.is_finished(), "the access did not wait");
                // SAFETY: it still runs, as the fence has not been signalled.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            }
            thread::sleep(Duration::from_millis(50));
            fence.signal()?;
            waiter.join().map_err(|_| anyhow::anyhow!("the thread"))
        })?;
        ensure!(result == 0, "in C: {in_c}: {result}");
    }
    // SAFETY: what was there before.
    unsafe { sigaction(Signal::SIGUSR1, &before) }?;
    Ok(())
}

/// What other buffers have lost is returned by the next poll that succeeds.
fn a_poll_that_fails_forgets_nothing() -> Result<()> {
    let device = pinbuf::Device::open()?;
    let memory: Vec<Memory> = (0..3)
        .map(|_| Memory::small_pages(4 * PAGE))
        .collect::<Result<_>>()?;
    let buffers: Vec<pinbuf::DmaBuf> = memory
        .iter()
        .map(|memory| {
            memory.touch_to_write();
            let buffer = Device::open()?.create(&[memory.range()])?;
            Ok(pinbuf::DmaBuf::from_fd(buffer.into())?)
        })
        .collect::<Result<_>>()?;
    let mut watch = pinbuf::Watch::new(&device);
    for buffer in &buffers {
        watch.add(buffer)?;
    }
    for memory in &memory {
        memory.advise(PAGE, PAGE, libc::MADV_DONTNEED)?;
    }
    // Another dma-buf is at the number of the second one meanwhile.
    let number = buffers[1].as_fd().as_raw_fd();
    let kept = buffers[1].as_fd().try_clone_to_owned()?;
    let other = foreign::dma_buf()?;
    // SAFETY: no memory is involved; the number stays a dma-buf's.
    Errno::result(unsafe { libc::dup3(other.as_raw_fd(), number, libc::O_CLOEXEC) })?;
    let failed = watch.poll().map(|changes| changes.len());
    ensure!(failed == Err(Error::NotADmaBuf), "{failed:?}");
    // SAFETY: as above.
    Errno::result(unsafe { libc::dup3(kept.as_raw_fd(), number, libc::O_CLOEXEC) })?;
    let changed = watch.poll()?.len();
    ensure!(changed == 3, "{changed} changes are left of 3");
    let changed = watch.poll()?.len();
    ensure!(changed == 0, "{changed} changes are reported twice");
    Ok(())
}
