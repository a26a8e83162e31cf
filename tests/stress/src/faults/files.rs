// SPDX-License-Identifier: MIT OR Apache-2.0

//! `PINBUF_CREATE` of files.

use std::os::fd::OwnedFd;

use anyhow::Result;
use nix::errno::Errno;

use super::inject::{Fault, Injector};
use super::sweep::{Call, Expected};
use crate::kinds::{create_from, is_of, FEW};
use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{huge_memfd, memfd, HUGE, PAGE};
use pinbuf_test_harness::support::{Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "faults":
    create_from_shmem within 300,
    create_from_hugetlb within 300,
}

/// What is to be expected with pages that are there, and with pages that are not: with patience, and
/// without.
fn from(
    len: usize,
    file: impl Fn() -> Result<OwnedFd>,
    there: &[Expected<'_>],
    not_there: &[Expected<'_>],
) -> Result<()> {
    let injector = Injector::new()?;
    let device = Device::open()?;
    let make = |file: &OwnedFd| create_from(&device, file, 0, len);
    let verify =
        |file: &OwnedFd, buffer: &Buffer| is_of(&device, buffer, &Memory::shared(file, len)?);
    let full = file()?;
    let memory = Memory::shared(&full, len)?;
    for offset in (0..len).step_by(PAGE) {
        memory.set(offset, 1);
    }
    Call {
        name: "pages that are there",
        prepare: || Ok(()),
        make: |(): &()| make(&full),
        verify: |(): &(), buffer: &Buffer| verify(&full, buffer),
    }
    .sweep(&injector, there)?;
    drop((memory, full));
    let fresh = |name| {
        Call {
            name,
            prepare: &file,
            make,
            verify,
        }
        .sweep(&injector, not_there)
    };
    fresh("pages that are not there")?;
    let _impatient = Setting::parameter("pin_retries", 0)?;
    fresh("pages that are not there, without patience")
}

const ENOMEM: &[Errno] = &[Errno::ENOMEM];
const COPIES: Expected<'_> = Expected::single(Fault::UserCopy, &[Errno::EFAULT]).failing(4);

fn create_from_shmem() -> Result<()> {
    let slabs = [
        Expected::single(Fault::Slab, ENOMEM).failing(3),
        Expected::lasting(Fault::Slab, ENOMEM).failing(6),
    ];
    from(
        FEW * PAGE,
        || memfd(FEW * PAGE, 0),
        &[
            slabs[0],
            slabs[1],
            Expected::single(Fault::Page, ENOMEM),
            Expected::lasting(Fault::Page, ENOMEM),
            COPIES,
        ],
        // What cannot be allocated is not tried again.
        &[
            slabs[0],
            slabs[1],
            Expected::single(Fault::Page, ENOMEM).failing(FEW - 2),
            Expected::lasting(Fault::Page, ENOMEM).failing(FEW - 2),
            COPIES,
        ],
    )
}

fn create_from_hugetlb() -> Result<()> {
    /// For hugetlb, the kernel calls it ENOMEM when the pool is empty, and the driver EFAULT.
    const EITHER: &[Errno] = &[Errno::ENOMEM, Errno::EFAULT];
    let _pool = HugePool::with_free(2)?;
    let there = [
        Expected::single(Fault::Slab, ENOMEM).failing(5),
        Expected::lasting(Fault::Slab, ENOMEM).failing(5),
        Expected::single(Fault::Page, ENOMEM),
        Expected::lasting(Fault::Page, ENOMEM),
        COPIES,
    ];
    // No lasting shortage of slab memory: when a new page cannot be added to the page cache,
    // memfd_alloc_folio(), up to 7.2 at least, takes its reservation from the pool twice, which
    // then has less than none.
    let not_there = [
        Expected::single(Fault::Slab, EITHER).failing(4),
        Expected::single(Fault::Page, EITHER),
        Expected::lasting(Fault::Page, EITHER),
        COPIES,
    ];
    from(2 * HUGE, || huge_memfd(2 * HUGE), &there, &not_there)
}
