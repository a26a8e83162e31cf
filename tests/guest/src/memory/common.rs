// SPDX-License-Identifier: MIT OR Apache-2.0

//! What holds for every buffer.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use pinbuf_test_importer::{Direction, Importer, Limits};
use pinbuf_uapi::{Info, Range};

use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::view::{
    agree, agree_sampled, DeviceView, KernelView, Mapped, Source, View,
};
use pinbuf_test_harness::support::{check_eq, kernel, Buffer, Device, Memory};

/// Compares all four views of a buffer, each writing and each reading: every byte up to 1 MiB, a
/// sample beyond.
pub fn views_agree(buffer: &Buffer, pieces: &[(&Memory, usize, usize)]) -> Result<()> {
    let len = pieces.iter().map(|piece| piece.2).sum();
    check_eq!(buffer.len()?, len, "the buffer's size");
    let mapped = buffer.map()?;
    let importer = Importer::attach(buffer.as_fd(), Limits::NONE)?;
    let mapping = importer.map(Direction::Bidirectional)?.0;
    importer.vmap()?;
    let source = Source {
        buffer,
        pieces: pieces.to_vec(),
    };
    let cpu = Mapped::of(buffer, &mapped);
    let device = DeviceView::of(&importer, mapping);
    let views: [&dyn View; 4] = [&source, &device, &cpu, &KernelView(&importer)];
    if len <= 256 * PAGE {
        agree(&views, len)
    } else {
        agree_sampled(&views, len, 151)
    }
}

/// Makes a buffer of pieces of memory, compares all views, and expects nothing to be left.
pub fn works(pieces: &[(&Memory, usize, usize)]) -> Result<Info> {
    let device = Device::open()?;
    let ranges: Vec<Range> = pieces
        .iter()
        .map(|(memory, at, len)| memory.part(*at, *len))
        .collect();
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    let buffer = device.create(&ranges).context("PINBUF_CREATE")?;
    let info = device.describe(&buffer)?;
    let bytes: usize = pieces.iter().map(|piece| piece.2).sum();
    check_eq!(info.charged_pages, (bytes / PAGE) as u64, "pages charged");
    check_eq!(
        kernel::pins()? - pins,
        info.pins as i64,
        "pins by the kernel's count and by ours"
    );
    check_eq!(kernel::vm_pin()? - pinned, bytes as i64, "VmPin");
    views_agree(&buffer, pieces)?;
    drop(buffer);
    check_eq!(kernel::pins()?, pins, "pins after release");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after release");
    Ok(info)
}

/// As [`works`], with all of one piece of memory.
pub fn works_whole(memory: &Memory) -> Result<Info> {
    works(&[(memory, 0, memory.len())])
}

/// Expects an error, and that nothing was kept.
pub fn refused(what: &str, expected: Errno, ranges: &[Range]) -> Result<()> {
    let device = Device::open()?;
    let (pins, pinned) = (kernel::pins()?, kernel::vm_pin()?);
    let (buffers, descriptors) = (kernel::dma_bufs()?, kernel::descriptors()?);
    let result = device.create(ranges).map(drop);
    check_eq!(result, Err(expected), "create with {what}");
    check_eq!(kernel::pins()?, pins, "pins after {what} was refused");
    check_eq!(kernel::vm_pin()?, pinned, "VmPin after {what} was refused");
    check_eq!(
        kernel::dma_bufs()?,
        buffers,
        "dma-bufs after {what} was refused"
    );
    check_eq!(
        kernel::descriptors()?,
        descriptors,
        "descriptors after {what} was refused"
    );
    Ok(())
}

/// Refused alone, behind memory that is fine, and before it.
pub fn refused_anywhere(what: &str, expected: Errno, range: Range) -> Result<()> {
    let fine = Memory::small_pages(3 * PAGE)?;
    refused(what, expected, &[range])?;
    refused(
        &format!("{what}, last"),
        expected,
        &[fine.part(0, PAGE), range],
    )?;
    refused(
        &format!("{what}, first"),
        expected,
        &[range, fine.part(PAGE, PAGE)],
    )
}
