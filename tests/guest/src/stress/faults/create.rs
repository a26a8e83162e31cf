// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_CREATE` of addresses.

use std::os::fd::AsRawFd;

use anyhow::Result;
use nix::errno::Errno;
use pinbuf_uapi::{Backing, Range, CHARGE_ALLOWANCE};

use super::inject::{Fault, Injector};
use super::sweep::{Call, Expected, Held};
use crate::kinds::{few, is_of, scattered, Kind, FEW};
use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::{memfd, stamp, PAGE, RW};
use pinbuf_test_harness::support::process::{drop_ipc_lock, set_memlock};
use pinbuf_test_harness::support::{check, check_eq, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "faults":
    create_anonymous within 300,
    create_shmem within 300,
    create_transparent within 300,
    create_hugetlb_private within 300,
    create_hugetlb_shared within 300,
    // With a stack, where an array of more than a page cannot be had in any way.
    create_of_many_extents within 300 allowing ["vmalloc error:"],
    create_of_many_ranges within 300,
    create_with_checked_backing within 300,
    create_on_the_allowance within 300,
    pinning_any_page within 300,
}

const ENOMEM: &[Errno] = &[Errno::ENOMEM];
const EFAULT: &[Errno] = &[Errno::EFAULT];

/// What faults in the driver's own work, and in what it calls but GUP, do: `slabs` allocations for
/// which there is no other way when memory is short for long, and user copies.
fn own(slabs: usize, copies: usize) -> [Expected<'static>; 5] {
    [
        // What the core allocates for a dma-buf.
        Expected::single(Fault::Slab, ENOMEM).failing(CORE),
        Expected::lasting(Fault::Slab, ENOMEM).failing(CORE + slabs),
        Expected::single(Fault::Page, ENOMEM),
        Expected::lasting(Fault::Page, ENOMEM),
        Expected::single(Fault::UserCopy, EFAULT).failing(copies),
    ]
}

/// What the core allocates for a dma-buf: itself, its inode, name and file; and the driver's part.
const CORE: usize = 5;

/// Memory that is there already: all faults are in the driver's own work. Then memory that is not:
/// faults are also in what GUP allocates, with patience, and without.
fn create(kind: Kind, pages: usize) -> Result<()> {
    // The list of what a call of GUP pins, and that of the extents, for which the buffer has room
    // itself if they are two at most.
    let slabs = match kind {
        Kind::Anonymous | Kind::Shmem => 2,
        Kind::Transparent => 1,
        Kind::HugePrivate | Kind::HugeShared => 0,
    };
    let injector = Injector::new()?;
    let device = Device::open()?;
    let _pool = kind.pool(few(kind))?;
    let memory = kind.present(few(kind))?;
    Call {
        name: "memory that is there",
        prepare: || Ok(()),
        make: |(): &()| device.create(&[memory.range()]),
        verify: |(): &(), buffer: &Buffer| is_of(&device, buffer, &memory),
    }
    .sweep(&injector, &own(slabs, 3))?;
    drop(memory);

    let fresh = |name, all: &[Expected<'_>]| {
        Call {
            name,
            prepare: || kind.fresh(few(kind)),
            make: |memory: &Memory| device.create(&[memory.range()]),
            verify: |memory: &Memory, buffer: &Buffer| is_of(&device, buffer, memory),
        }
        .sweep(&injector, all)
    };
    // What GUP cannot have once is tried again. (Each time there are other pages, hence as many
    // extents more or less, and allocations for them: a fault may be passed over here.)
    let patient = [
        Expected::single(Fault::Slab, ENOMEM).failing(CORE - 2),
        Expected::single(Fault::Page, ENOMEM).recovering(pages),
    ];
    fresh("memory that is not there", &patient)?;
    // When GUP says ENOMEM, a second look, which finds memory again, makes that EBUSY; where it finds
    // none, it stays ENOMEM. (hugetlb also takes its pool for empty when it cannot note that it
    // uses a page of it.)
    let either = &[Errno::ENOMEM, Errno::EBUSY];
    let lasting = match kind {
        Kind::HugePrivate | Kind::HugeShared => &[Errno::ENOMEM, Errno::EFAULT][..],
        Kind::Anonymous | Kind::Shmem | Kind::Transparent => ENOMEM,
    };
    let impatient = [
        Expected::single(Fault::Slab, either).failing(CORE - 2),
        Expected::single(Fault::Page, either).recovering(pages / 2),
        Expected::lasting(Fault::Slab, lasting).failing(CORE),
        Expected::lasting(Fault::Page, lasting).failing(pages / 2),
    ];
    let _impatient = Setting::parameter("pin_retries", 0)?;
    fresh("memory that is not there, without patience", &impatient)
}

fn create_anonymous() -> Result<()> {
    create(Kind::Anonymous, FEW)
}

fn create_shmem() -> Result<()> {
    create(Kind::Shmem, FEW)
}

fn create_transparent() -> Result<()> {
    create(Kind::Transparent, 2)
}

fn create_hugetlb_private() -> Result<()> {
    create(Kind::HugePrivate, 0)
}

fn create_hugetlb_shared() -> Result<()> {
    create(Kind::HugeShared, 0)
}

/// The map of extents takes the one form, then the other, and more than a chunk of it.
fn create_of_many_extents() -> Result<()> {
    const PAGES: usize = 9000;
    let injector = Injector::new()?;
    let device = Device::open()?;
    let [memory, _between] = scattered(PAGES)?;
    Call {
        name: "many extents",
        prepare: || Ok(()),
        make: |(): &()| device.create(&[memory.range()]),
        verify: |(): &(), buffer: &Buffer| {
            let extents = device.describe(buffer)?.extents as usize;
            check!(extents > PAGES / 2, "{extents} extents");
            is_of(&device, buffer, &memory)
        },
    }
    .sweep(&injector, &own(3, 3))
}

fn create_of_many_ranges() -> Result<()> {
    const PAGES: usize = 100;
    let injector = Injector::new()?;
    let device = Device::open()?;
    let memory = Memory::small_pages(PAGES * PAGE)?;
    memory.touch();
    let ranges: Vec<Range> = (0..PAGES)
        .rev()
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    Call {
        name: "many ranges",
        prepare: || Ok(()),
        make: |(): &()| device.create(&ranges),
        verify: |(): &(), buffer: &Buffer| {
            let mapped = buffer.map()?;
            for page in 0..PAGES {
                memory.set(page * PAGE, stamp(2, page as u64));
                check_eq!(
                    mapped.get((PAGES - 1 - page) * PAGE),
                    stamp(2, page as u64),
                    "page {page}"
                );
            }
            Ok(())
        },
    }
    .sweep(&injector, &own(2, 3))
}

fn create_with_checked_backing() -> Result<()> {
    const PAGES: usize = 20;
    let injector = Injector::new()?;
    let device = Device::open()?;
    let file = memfd(PAGES * PAGE, 0)?;
    let memory = Memory::shared(&file, PAGES * PAGE)?;
    memory.touch();
    let ranges: Vec<Range> = (0..PAGES)
        .map(|page| memory.part(page * PAGE, PAGE))
        .collect();
    let backing: Vec<Backing> = (0..PAGES)
        .map(|page| Backing {
            fd: file.as_raw_fd(),
            offset: (page * PAGE) as u64,
            ..Default::default()
        })
        .collect();
    Call {
        name: "with its backing checked",
        prepare: || Ok(()),
        make: |(): &()| device.create_checked(&ranges, &backing),
        verify: |(): &(), buffer: &Buffer| is_of(&device, buffer, &memory),
    }
    .sweep(&injector, &own(3, 4))
}

/// The user's entry in the table of allowances is allocated, too.
fn create_on_the_allowance() -> Result<()> {
    let injector = Injector::new()?;
    let device = Device::open()?;
    let memory = Kind::Anonymous.present(few(Kind::Anonymous))?;
    drop_ipc_lock()?;
    set_memlock(0)?;
    Call {
        name: "on the allowance",
        prepare: || {
            check_eq!(device.query()?.allowance_used, 0, "allowance used before");
            Ok(())
        },
        make: |(): &()| device.create(&[memory.range()]),
        verify: |(): &(), buffer: &Buffer| {
            let info = device.describe(buffer)?;
            check_eq!(info.charge, CHARGE_ALLOWANCE, "what is charged");
            is_of(&device, buffer, &memory)
        },
    }
    .sweep(&injector, &own(3, 3))
}

/// The pin of one page fails, be it the first, the last, or one at the end of a batch.
fn pinning_any_page() -> Result<()> {
    /// The driver pins 33 pages in one go, or else up to 512.
    const BATCHES: [(usize, &[usize]); 2] = [(33, &[0, 16, 33]), (1100, &[0, 33, 512, 1024, 1100])];
    let device = Device::open()?;
    for (pages, places) in BATCHES {
        let [memory, _between] = scattered(pages)?;
        let near = |page: usize| places.iter().any(|place| page.abs_diff(*place) <= 4);
        for page in (0..pages).filter(|page| near(*page)) {
            memory.protect(page * PAGE, PAGE, libc::PROT_READ)?;
            let before = Held::now()?;
            let result = device.create(&[memory.range()]).map(drop);
            check_eq!(result, Err(Errno::EFAULT), "create without page {page}");
            check_eq!(Held::now()?, before, "what is left behind by page {page}");
            memory.protect(page * PAGE, PAGE, RW)?;
        }
        is_of(&device, &device.create(&[memory.range()])?, &memory)?;
    }
    Ok(())
}
