// SPDX-License-Identifier: MIT OR Apache-2.0

//! All kinds of memory side by side, in random lists of ranges, against a model of pins, extents and charge.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use nix::errno::Errno;
use nix::unistd::ftruncate;
use pinbuf_uapi::{Backing, Range};

use pinbuf_test_harness::support::kernel::{
    has_transparent_huge_pages, transparent_size, HugePool, Setting,
};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, stamp, BLOCK, GIGA, HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, frames, kernel, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "mixed":
    kinds_side_by_side within 120,
    parts_of_a_page_of_1_gib,
    kinds_that_change_meanwhile,
}

/// The number of blocks of [`HUGE`] bytes of the memory.
const SEGMENTS: usize = 10;
/// Pages of a folio of 64 KiB with pages of 4 KiB.
const MIDDLE: usize = 16;
/// `KPF_COMPOUND_TAIL`.
const TAIL: u64 = 1 << 16;

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Replaces the segment `at` by anonymous memory.
fn place(memory: &Memory, at: usize, len: usize, flags: i32) -> Result<()> {
    let flags = ANONYMOUS | flags | libc::MAP_FIXED;
    // SAFETY: this replaces a part of the test's own mapping.
    let got = unsafe { libc::mmap(memory.at(at * HUGE).cast(), len, RW, flags, -1, 0) };
    check!(
        got != libc::MAP_FAILED,
        "mmap of segment {at}: {}",
        Errno::last()
    );
    Ok(())
}

/// A page of the memory, as the driver has to take it.
struct Page {
    pfn: u64,
    hugetlb: bool,
    /// The first frame and the number of pages of its folio, if that is large and not hugetlb.
    folio: Option<(u64, usize)>,
    /// The number of its file, and its index there.
    file: Option<(usize, usize)>,
}

/// The large folio that a frame is in.
fn folio_of(pfn: u64) -> Result<Option<(u64, usize)>> {
    if frames::flags(pfn)? & (TAIL | frames::HEAD) == 0 {
        return Ok(None);
    }
    let mut head = pfn;
    while frames::flags(head)? & frames::HEAD == 0 {
        head -= 1;
    }
    let mut size = 1;
    while frames::flags(head + size as u64)? & TAIL != 0 {
        size += 1;
    }
    Ok(Some((head, size)))
}

/// A range, in pages of the memory, and the file and page that it is said to map.
type Part = (usize, usize, Option<(usize, usize)>);

/// What the driver has to report of a buffer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    pages: usize,
    pins: usize,
    extents: usize,
    /// In pages.
    held: usize,
}

fn figures(parts: &[Part], pages: &[Page]) -> Figures {
    // Adjacent ranges are one, so that a huge page that both have is pinned once.
    let mut joined: Vec<Part> = Vec::new();
    for &(first, count, file) in parts {
        match joined.last_mut() {
            Some(last)
                if last.0 + last.1 == first
                    && last.2.map(|(number, page)| (number, page + last.1)) == file =>
            {
                last.1 += count
            }
            _ => joined.push((first, count, file)),
        }
    }
    let mut figures = Figures::default();
    let mut next = None;
    let mut folios: HashMap<u64, (usize, usize)> = HashMap::new();
    for (first, count, _) in joined {
        let mut at = first;
        while at < first + count {
            let page = &pages[at];
            let (run, joins) = if page.hugetlb {
                let place = at % BLOCK;
                ((BLOCK - place).min(first + count - at), place == 0)
            } else {
                (1, true)
            };
            if !joins || next != Some((page.pfn, page.hugetlb)) {
                figures.extents += 1;
            }
            next = Some((page.pfn + run as u64, page.hugetlb));
            figures.pins += 1;
            figures.pages += run;
            if let Some((head, size)) = page.folio {
                folios.entry(head).or_insert((size, 0)).1 += 1;
            }
            at += run;
        }
    }
    let rest = folios
        .values()
        .map(|(size, used)| size.saturating_sub(*used));
    figures.held = figures.pages + rest.sum::<usize>();
    figures
}

fn backings(parts: &[Part], files: &[RawFd]) -> Vec<Backing> {
    let named = parts.iter().filter_map(|part| part.2);
    named
        .map(|(number, page)| Backing {
            fd: files[number],
            offset: (page * PAGE) as u64,
            ..Backing::default()
        })
        .collect()
}

/// Small and large pages, anonymous and of files, and hugetlb: each list of ranges becomes the buffer that the model
/// says, and none if a single backing is wrong.
fn kinds_side_by_side() -> Result<()> {
    let rounds = if kernel::has_checkers() { 30 } else { 200 };
    let _pool = HugePool::with_free(5)?;
    let transparent = has_transparent_huge_pages();
    let mut settings = Vec::new();
    if transparent {
        let shmem = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        settings.push(Setting::choice(shmem, "advise")?);
        settings.push(Setting::choice(transparent_size(MIDDLE * PAGE), "madvise")?);
    }
    let large = |memory: &Memory, at: usize, len: usize| -> Result<()> {
        if transparent {
            memory.advise(at * HUGE, len, libc::MADV_HUGEPAGE)?;
        }
        Ok(())
    };
    let (huge, small, transparent_file) = (huge_memfd(2 * HUGE)?, memfd(HUGE, 0)?, memfd(HUGE, 0)?);
    let files = [&huge, &small, &transparent_file].map(AsRawFd::as_raw_fd);
    let memory = Memory::map_aligned(SEGMENTS * HUGE, HUGE, RW, ANONYMOUS, None, 0)?;
    memory.keep_small(0, SEGMENTS * HUGE)?;
    memory.replace_by(HUGE, 2 * HUGE, huge.as_fd(), 0)?;
    place(&memory, 3, HUGE, 0)?;
    large(&memory, 3, HUGE)?;
    memory.replace_by(4 * HUGE, HUGE, small.as_fd(), 0)?;
    memory.keep_small(4 * HUGE, HUGE)?;
    place(&memory, 5, HUGE, libc::MAP_HUGETLB)?;
    memory.replace_by(7 * HUGE, HUGE, huge.as_fd(), HUGE)?;
    memory.replace_by(8 * HUGE, HUGE, transparent_file.as_fd(), 0)?;
    large(&memory, 8, HUGE)?;
    // In half of a block no huge page fits.
    place(&memory, 9, HUGE / 2, 0)?;
    large(&memory, 9, HUGE / 2)?;
    for page in 0..SEGMENTS * BLOCK {
        memory.set(page * PAGE, stamp(5, page as u64));
    }

    let mut pages: Vec<Page> = Vec::new();
    for (at, pfn) in frames::all_frames(&memory)?.into_iter().enumerate() {
        let hugetlb = [1, 2, 5, 7].contains(&(at / BLOCK));
        let found = frames::flags(pfn)? & frames::HUGETLB != 0;
        check_eq!(found, hugetlb, "whether page {at} is hugetlb");
        let last = pages.last().and_then(|page| page.folio);
        let folio = match last {
            _ if hugetlb => None,
            Some((head, size)) if (head..head + size as u64).contains(&pfn) => last,
            _ => folio_of(pfn)?,
        };
        let file = match at / BLOCK {
            1 | 2 => Some((0, at - BLOCK)),
            4 => Some((1, at - 4 * BLOCK)),
            7 => Some((0, at - 6 * BLOCK)),
            8 => Some((2, at - 8 * BLOCK)),
            _ => None,
        };
        pages.push(Page {
            pfn,
            hugetlb,
            folio,
            file,
        });
    }
    for size in [BLOCK, MIDDLE].into_iter().filter(|_| transparent) {
        let is_there = |page: &Page| page.folio.is_some_and(|folio| folio.1 == size);
        check!(pages.iter().any(is_there), "no folio of {size} pages");
    }

    // Some kernels keep no mapcount for each page of a folio.
    let exact = !transparent || kernel::has_page_mapcounts()?;
    let device = Device::open()?;
    let before = kernel::pins()?;
    let mut random = fastrand::Rng::with_seed(77);
    for round in 0..rounds {
        let checked = round % 2 == 1;
        let most = [2, 3, 12, 60][random.usize(0..4)];
        let count = random.usize(1..most);
        let mut parts: Vec<Part> = Vec::new();
        while parts.len() < count {
            let first = match parts.last() {
                // Where the last one ended, about the beginning of a block, or anywhere.
                Some(&(first, count, _)) if random.bool() && first + count < pages.len() => {
                    first + count
                }
                _ if random.bool() => {
                    let block = random.usize(0..SEGMENTS) * BLOCK;
                    (block + random.usize(0..4)).saturating_sub(random.usize(0..3))
                }
                _ => random.usize(0..pages.len()),
            };
            let most = [2, 20, BLOCK + 4, 3 * BLOCK][random.usize(0..4)];
            let mut count = random.usize(1..most).min(pages.len() - first);
            let mut file = None;
            if checked {
                let Some((number, page)) = pages[first].file else {
                    continue;
                };
                let ends = |n: &usize| pages[first + n].file != Some((number, page + n));
                count = (1..count).find(ends).unwrap_or(count);
                file = Some((number, page));
            }
            parts.push((first, count, file));
        }
        let ranges: Vec<Range> = parts
            .iter()
            .map(|&(first, count, _)| memory.part(first * PAGE, count * PAGE))
            .collect();
        let made = match checked {
            true => device.create_checked(&ranges, &backings(&parts, &files)),
            false => device.create(&ranges),
        };
        let buffer = made.with_context(|| format!("round {round}: {parts:?}"))?;
        let info = device.describe(&buffer)?;
        let reported = Figures {
            pages: info.pages as usize,
            pins: info.pins as usize,
            extents: info.extents as usize,
            held: info.held_bytes as usize / PAGE,
        };
        let expected = figures(&parts, &pages);
        check_eq!(reported, expected, "figures, round {round}: {parts:?}");
        let pinned = kernel::pins()? - before;
        check_eq!(pinned, expected.pins as i64, "pins, round {round}");
        let unsure = if exact { info.unsure_bytes } else { 0 };
        let gone = (info.discarded_bytes, unsure);
        check_eq!(gone, (0, 0), "discarded, round {round}: {parts:?}");
        let mapped = buffer.map()?;
        let mut at = 0;
        for &(first, count, _) in &parts {
            let mut page = 0;
            while page < count {
                let (seen, owner) = (
                    mapped.get((at + page) * PAGE),
                    memory.get((first + page) * PAGE),
                );
                check_eq!(
                    seen,
                    owner,
                    "page {page} from {first} on, round {round}: {parts:?}"
                );
                // The last one of each range, too.
                page += if page + 1 == count {
                    1
                } else {
                    random.usize(1..40).min(count - 1 - page)
                };
            }
            at += count;
        }
        drop((buffer, mapped));
        check_eq!(kernel::pins()?, before, "pins afterwards, round {round}");
        if !checked {
            continue;
        }
        let wrong = random.usize(0..parts.len());
        let (number, page) = parts[wrong].2.context("no file")?;
        parts[wrong].2 = Some(match random.u32(0..5) {
            0 => (number, page + 1),
            1 => (number, page.checked_sub(1).unwrap_or(page + 2)),
            2 => (number, page + BLOCK),
            3 => ((number + 1) % files.len(), page),
            _ => (number, page ^ random.usize(1..BLOCK)),
        });
        match device.create_checked(&ranges, &backings(&parts, &files)) {
            Err(Errno::EAGAIN) => {}
            other => bail!("{:?} with a wrong backing: {parts:?}", other.map(|_| ())),
        }
        check_eq!(kernel::pins()?, before, "pins after a wrong backing");
    }
    Ok(())
}

/// Any part of a page of 1 GiB is one extent and one pin, and is the expected part of the file or refused.
fn parts_of_a_page_of_1_gib() -> Result<()> {
    let _pool = HugePool::with_giga()?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_1GB;
    // SAFETY: a terminated name.
    let fd = unsafe { libc::memfd_create(c"giga".as_ptr(), flags) };
    check!(fd >= 0, "memfd_create: {}", Errno::last());
    // SAFETY: a new descriptor.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    ftruncate(&file, GIGA as i64)?;
    let memory = Memory::map_aligned(GIGA, GIGA, RW, libc::MAP_SHARED, Some(file.as_fd()), 0)?;
    let device = Device::open()?;
    let pages = GIGA / PAGE;
    let before = kernel::pins()?;
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..30 {
        let first = random.usize(0..pages);
        let count = random.usize(1..=pages - first);
        let ranges = [memory.part(first * PAGE, count * PAGE)];
        let create = |page: usize| {
            let backings = backings(&[(first, count, Some((0, page)))], &[file.as_raw_fd()]);
            device.create_checked(&ranges, &backings)
        };
        let last = (first + count - 1) * PAGE;
        memory.set(last, round);
        let buffer = create(first)?;
        let info = device.describe(&buffer)?;
        let figures = (info.pages, info.pins, info.extents);
        check_eq!(
            figures,
            (count as u64, 1, 1),
            "{count} pages from {first} on"
        );
        let mapped = buffer.map()?;
        check_eq!(mapped.get((count - 1) * PAGE), round, "the last page");
        drop((buffer, mapped));
        for wrong in [first + 1, first ^ 1, first ^ BLOCK, first + pages] {
            let result = create(wrong).map(|_| ());
            check_eq!(result, Err(Errno::EAGAIN), "page {first} as {wrong}");
        }
        check_eq!(kernel::pins()?, before, "pins afterwards");
    }
    Ok(())
}

/// Another thread replaces memory by memory of other kinds during creates: no pin is lost, and each create ends.
fn kinds_that_change_meanwhile() -> Result<()> {
    const BLOCKS: usize = 4;
    const FOR: Duration = Duration::from_secs(3);
    let _pool = HugePool::with_free(24)?;
    let (huge, small) = (huge_memfd(BLOCKS * HUGE)?, memfd(BLOCKS * HUGE, 0)?);
    let memory = Memory::map_aligned(BLOCKS * HUGE, HUGE, RW, ANONYMOUS, None, 0)?;
    let device = Device::open()?;
    let before = kernel::pins()?;
    let stop = AtomicBool::new(false);
    let mut succeeded = 0;
    std::thread::scope(|scope| -> Result<()> {
        let changes = scope.spawn(|| -> Result<()> {
            let mut random = fastrand::Rng::with_seed(1);
            while !stop.load(Ordering::Relaxed) {
                let at = random.usize(0..BLOCKS);
                match random.u32(0..5) {
                    0 => place(&memory, at, HUGE, 0)?,
                    1 => memory.replace_by(at * HUGE, HUGE, small.as_fd(), at * HUGE)?,
                    2 => {
                        place(&memory, at, HUGE, 0)?;
                        if has_transparent_huge_pages() {
                            memory.advise(at * HUGE, HUGE, libc::MADV_HUGEPAGE)?;
                        }
                    }
                    _ => memory.replace_by(at * HUGE, HUGE, huge.as_fd(), at * HUGE)?,
                }
            }
            Ok(())
        });
        let mut creates = || -> Result<()> {
            let mut random = fastrand::Rng::with_seed(2);
            let start = Instant::now();
            while start.elapsed() < FOR || (succeeded == 0 && start.elapsed() < 5 * FOR) {
                let file = if random.bool() { &huge } else { &small };
                let checked = random.u32(0..3) == 0;
                let parts: Vec<Part> = (0..random.usize(1..8))
                    .map(|_| {
                        let first = random.usize(0..BLOCKS * BLOCK);
                        let most = (BLOCKS * BLOCK - first).min(2 * BLOCK);
                        (first, random.usize(1..=most), Some((0, first)))
                    })
                    .collect();
                let ranges: Vec<Range> = parts
                    .iter()
                    .map(|&(first, count, _)| memory.part(first * PAGE, count * PAGE))
                    .collect();
                let made = match checked {
                    true => device.create_checked(&ranges, &backings(&parts, &[file.as_raw_fd()])),
                    false => device.create(&ranges),
                };
                match made {
                    Ok(buffer) => {
                        succeeded += 1;
                        let info = device.describe(&buffer)?;
                        let pages: usize = parts.iter().map(|part| part.1).sum();
                        check_eq!(info.pages, pages as u64, "pages");
                        check_eq!(kernel::pins()? - before, info.pins as i64, "pins");
                    }
                    // Of another kind than the file, or replaced while it was faulted in.
                    Err(Errno::EAGAIN) if checked => {}
                    Err(error) => bail!("{error}: {parts:?}, checked: {checked}"),
                }
                check_eq!(kernel::pins()?, before, "pins afterwards");
            }
            Ok(())
        };
        let result = creates();
        stop.store(true, Ordering::Relaxed);
        changes
            .join()
            .map_err(|_| anyhow!("the thread panicked"))??;
        result
    })?;
    check!(succeeded > 0, "no create succeeded");
    Ok(())
}
