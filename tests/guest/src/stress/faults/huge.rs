// SPDX-License-Identifier: MIT OR Apache-2.0

//! Faults that are served with a huge page-table entry.

use anyhow::Result;
use nix::errno::Errno;
use pinbuf_uapi::FEATURE_HUGE_MMAP;

use super::inject::Injector;
use super::mapping::{alone, failing, recovering, FIONBIO};
use super::sweep::Call;
use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, stamp, HUGE, PAGE};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "huge":
    touched_by_the_kernel within 300,
    touched_by_the_process within 300,
}

/// A buffer of two huge pages.
fn buffer() -> Result<(HugePool, Memory, Buffer)> {
    let pool = HugePool::with_free(2)?;
    let device = Device::open()?;
    check!(
        device.query()?.features & FEATURE_HUGE_MMAP != 0,
        "no huge entries: boot with page_table_check=off"
    );
    let memory = Memory::shared(huge_memfd(2 * HUGE)?, 2 * HUGE)?;
    for page in 0..2 * HUGE / PAGE {
        memory.set(page * PAGE, stamp(6, page as u64) << 8);
    }
    let buffer = device.create(&[memory.range()])?;
    Ok((pool, memory, buffer))
}

/// The other pages of the first huge one are there without another fault.
fn is_huge(mapped: &Memory, memory: &Memory) -> Result<()> {
    let before = kernel::faults()?;
    let same = (0..HUGE)
        .step_by(PAGE)
        .all(|offset| mapped.get(offset) == memory.get(offset));
    // A few of the process's own are possible, hundreds are not.
    let faults = kernel::faults()? - before;
    check!(same, "another page in the buffer");
    check!(faults < 16, "{faults} more faults in a huge page");
    Ok(())
}

fn touched_by_the_kernel() -> Result<()> {
    let injector = Injector::new()?;
    let (_pool, memory, buffer) = buffer()?;
    Call {
        name: "a huge fault in a system call",
        prepare: || alone(&buffer, memory.len()),
        make: |mapped: &Memory| ioctl(&buffer, FIONBIO, mapped.addr()),
        verify: |mapped: &Memory, _: &i32| is_huge(mapped, &memory),
    }
    .sweep(&injector, &failing(&[Errno::EFAULT], 0, 1))
}

fn touched_by_the_process() -> Result<()> {
    let injector = Injector::new()?;
    let (_pool, memory, buffer) = buffer()?;
    Call {
        name: "a huge fault",
        prepare: || alone(&buffer, memory.len()),
        make: |mapped: &Memory| Ok(mapped.get(PAGE)),
        verify: |mapped: &Memory, seen: &u64| {
            check_eq!(*seen, memory.get(PAGE), "the word that was read");
            is_huge(mapped, &memory)
        },
    }
    .sweep(&injector, &recovering(0, 1))
}
