// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory with tags (`PROT_MTE`): a buffer of it is like one of any memory. Tags belong to the process's own mapping,
//! whose accesses are checked as before. Devices, the buffer's mapping and the kernel neither see nor change them.

use std::arch::asm;
use std::os::fd::AsFd;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::Range;

use pinbuf_test_harness::support::device::sync_raw;
use pinbuf_test_harness::support::memory::{PAGE, RW};
use pinbuf_test_harness::support::probe::{peek, poke};
use pinbuf_test_harness::support::{check_eq, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "mte":
    tagged_memory,
    no_tags_for_mappings,
}

const PROT_MTE: i32 = 0x20;
/// Each granule has a tag.
const GRANULE: usize = 16;
const TAG: u64 = 5;
const OTHER: u64 = 9;
const LEN: usize = 4 * PAGE;

const fn tagged(address: u64, tag: u64) -> u64 {
    address | tag << 56
}

/// Lets this thread's accesses be checked, at once.
fn enable() -> Result<()> {
    const HWCAP2_MTE: u64 = 1 << 18;
    const SET_TAGGED_ADDR_CTRL: i32 = 55;
    const ENABLE: u64 = 1;
    const SYNCHRONOUS: u64 = 1 << 1;
    const ALL_TAGS: u64 = 0xffff << 3;

    // SAFETY: returns a number.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_MTE == 0 {
        bail!(Skip("this machine has no memory tags".to_owned()));
    }
    // SAFETY: changes how this thread's accesses by tagged addresses are treated, of which there are none.
    let result = unsafe {
        libc::prctl(
            SET_TAGGED_ADDR_CTRL,
            ENABLE | SYNCHRONOUS | ALL_TAGS,
            0,
            0,
            0,
        )
    };
    Errno::result(result)
        .context("PR_SET_TAGGED_ADDR_CTRL")
        .map(drop)
}

/// Gives a granule the tag of the address.
///
/// # Safety
///
/// The memory is mapped with `PROT_MTE`, and all who access it know the tag.
unsafe fn set_tag(address: u64) {
    // SAFETY: by the function's requirements.
    unsafe { asm!(".arch_extension memtag", "stg {0}, [{0}]", in(reg) address) };
}

/// The tag of a granule.
///
/// # Safety
///
/// The memory is mapped with `PROT_MTE`.
unsafe fn tag_of(address: u64) -> u64 {
    let mut tagged = address;
    // SAFETY: by the function's requirements.
    unsafe { asm!(".arch_extension memtag", "ldg {0}, [{0}]", inout(reg) tagged) };
    tagged >> 56 & 0xf
}

fn tagged_memory() -> Result<()> {
    enable()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map(LEN, RW | PROT_MTE, flags, None, 0).context("memory with tags")?;
    let base = memory.addr();
    for offset in (0..LEN).step_by(GRANULE) {
        // SAFETY: mapped above, and from here on accessed by tagged addresses alone.
        unsafe { set_tag(tagged(base + offset as u64, TAG)) };
    }
    let device = Device::open()?;
    for address in [base, tagged(base, TAG), tagged(base, OTHER)] {
        let range = Range {
            addr: address,
            len: LEN as u64,
        };
        let buffer = device
            .create(&[range])
            .with_context(|| format!("create at {address:#x}"))?;
        let importer = Importer::attach(buffer.as_fd(), Limits::NONE).context("attach")?;
        let (mapping, _) = importer.map(Direction::Bidirectional).context("map")?;
        let view = buffer.map()?;
        importer.vmap().context("vmap")?;
        for (index, offset) in (0..LEN).step_by(PAGE / 2).enumerate() {
            let (place, value) = (tagged(base + offset as u64, TAG), 0x1234 + index as u64);
            sync_raw(&buffer, 3).context("begin")?;
            // SAFETY: the memory's own bytes, which nothing of Rust's is in.
            check_eq!(
                unsafe { poke(place, value) },
                Ok(()),
                "a write by the process"
            );
            check_eq!(view.get(offset), value, "what the buffer's mapping reads");
            sync_raw(&buffer, 7).context("end")?;
            let mut bytes = [0; 8];
            importer.read(mapping, offset as u64, &mut bytes)?;
            check_eq!(u64::from_ne_bytes(bytes), value, "what the device reads");
            importer.vmap_read(offset as u64, &mut bytes)?;
            check_eq!(u64::from_ne_bytes(bytes), value, "what the kernel reads");
            importer.write(mapping, offset as u64, &(value + 1).to_ne_bytes())?;
            sync_raw(&buffer, 1).context("begin")?;
            check_eq!(
                peek(place),
                Ok(value + 1),
                "what the process reads from the device"
            );
            view.set(offset, value + 2);
            check_eq!(
                peek(place),
                Ok(value + 2),
                "what the process reads from the mapping"
            );
            sync_raw(&buffer, 5).context("end")?;
            // SAFETY: mapped with PROT_MTE.
            check_eq!(unsafe { tag_of(place) }, TAG, "the tag after all that");
            let wrong = peek(tagged(base + offset as u64, OTHER));
            check_eq!(wrong, Err(Signal::SIGSEGV), "an access by another tag");
        }
        check_eq!(device.describe(&buffer)?.state, 0, "the buffer's state");
    }
    Ok(())
}

/// The buffer's own mapping cannot have tags: others map the same memory without.
fn no_tags_for_mappings() -> Result<()> {
    enable()?;
    let memory = Memory::anonymous(LEN)?;
    let buffer = Device::open()?
        .create(&[memory.range()])
        .context("create")?;
    let mapped = buffer.map_as(0, LEN, RW | PROT_MTE, libc::MAP_SHARED);
    check_eq!(mapped.err(), Some(Errno::EINVAL), "a mapping with tags");
    let mapped = buffer.map()?;
    check_eq!(
        mapped.protect(0, LEN, RW | PROT_MTE).err(),
        Some(Errno::EINVAL),
        "tags for a mapping that is there"
    );
    Ok(())
}
