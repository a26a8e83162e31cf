// SPDX-License-Identifier: MIT OR Apache-2.0

//! A balloon driver that lies: it puts pages into the balloon that are in use.
//!
//! The kernel's driver puts in only pages that it has allocated. This one drives the device from user space, through
//! the registers of a transitional virtio device, with one queue and one message.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{fence, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use crate::pagemap;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Vendor and device.
const BALLOON: (&str, &str) = ("0x1af4", "0x1002");

/// Registers of the first BAR.
mod register {
    pub const FEATURES: u64 = 4;
    pub const QUEUE_FRAME: u64 = 8;
    pub const QUEUE_SIZE: u64 = 12;
    pub const QUEUE_SELECT: u64 = 14;
    pub const NOTIFY: u64 = 16;
    pub const STATUS: u64 = 18;
}

/// Values of the status: the device was seen, there is a driver, it is ready.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const READY: u8 = 4;

/// The queue of pages that go into the balloon.
const INFLATE: u16 = 0;

/// Memory that the device may read and write, in one piece.
const MEMORY: usize = 2 << 20;

/// The message's offset in that memory, behind the queue.
const MESSAGE: usize = 64 << 10;

struct Memory(*mut u8);

impl Memory {
    fn new() -> Result<Self> {
        fs::write("/proc/sys/vm/nr_hugepages", "1").context("reserving a huge page")?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
        // SAFETY: new memory, wherever the kernel chooses.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), MEMORY, access, flags, -1, 0) };
        ensure!(
            memory != libc::MAP_FAILED,
            "mapping a huge page: {}",
            Errno::last()
        );
        Ok(Self(memory.cast()))
    }

    /// The frame of its first page.
    fn frame(&self) -> Result<u64> {
        let frames = pagemap::frames("self", self.0 as u64, 1)?;
        frames[0].context("the huge page is not present")
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= MEMORY);
        // SAFETY: inside of the mapping, which is only accessed here.
        unsafe {
            self.0
                .wrapping_add(offset)
                .copy_from(bytes.as_ptr(), bytes.len())
        };
    }

    fn number(&self, offset: usize) -> &AtomicU16 {
        assert!(offset % 2 == 0 && offset + 2 <= MEMORY);
        // SAFETY: inside of the mapping, and aligned.
        unsafe { &*self.0.wrapping_add(offset).cast() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone, and the device was reset.
        unsafe { libc::munmap(self.0.cast(), MEMORY) };
    }
}

/// The device's place in sysfs.
fn find() -> Result<PathBuf> {
    for entry in fs::read_dir(DEVICES)? {
        let path = entry?.path();
        let field = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        if (field("vendor").trim(), field("device").trim()) == BALLOON {
            return Ok(path);
        }
    }
    anyhow::bail!("there is no balloon")
}

/// Puts page frames into the balloon.
pub fn inflate(frames: &[u64]) -> Result<()> {
    let device = find()?;
    let name = device.file_name().context("a device without a name")?;
    if device.join("driver").exists() {
        fs::write(device.join("driver/unbind"), name.as_encoded_bytes()).context("unbind")?;
    }
    fs::write(device.join("enable"), "1").context("enable")?;
    let open = |name: &str| {
        let path = device.join(name);
        let file = File::options().read(true).write(true).open(&path);
        file.with_context(|| path.display().to_string())
    };
    // I/O ports, and access to memory by the device.
    open("config")?.write_all_at(&5u16.to_le_bytes(), 4)?;
    let registers = open("resource0")?;
    let status = |status: u8| registers.write_all_at(&[status], register::STATUS);
    status(0)?;
    status(ACKNOWLEDGE | DRIVER)?;
    registers.write_all_at(&0u32.to_le_bytes(), register::FEATURES)?;
    registers.write_all_at(&INFLATE.to_le_bytes(), register::QUEUE_SELECT)?;
    let mut size = [0; 2];
    registers.read_exact_at(&mut size, register::QUEUE_SIZE)?;
    let size = usize::from(u16::from_le_bytes(size));
    ensure!(size > 0, "the balloon has no queue");

    // Descriptors and the available ring, and in the next page the used ring.
    let available = 16 * size;
    let used = (available + 6 + 2 * size).next_multiple_of(4096);
    let mut memory = Memory::new()?;
    let frame = memory.frame()?;
    let message: Vec<u8> = frames
        .iter()
        .map(|&frame| u32::try_from(frame).map(u32::to_le_bytes))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    memory.write(MESSAGE, &message);
    memory.write(0, &(frame * 4096 + MESSAGE as u64).to_le_bytes());
    memory.write(8, &u32::try_from(message.len())?.to_le_bytes());
    registers.write_all_at(&u32::try_from(frame)?.to_le_bytes(), register::QUEUE_FRAME)?;
    status(ACKNOWLEDGE | DRIVER | READY)?;
    // Makes descriptor 0 available: the ring's first entry is zero already.
    fence(Ordering::SeqCst);
    memory.number(available + 2).store(1, Ordering::SeqCst);
    registers.write_all_at(&INFLATE.to_le_bytes(), register::NOTIFY)?;
    let start = Instant::now();
    let taken = loop {
        if memory.number(used + 2).load(Ordering::SeqCst) == 1 {
            break true;
        }
        if start.elapsed() > Duration::from_secs(60) {
            break false;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    // The device does not use the memory any more.
    status(0)?;
    ensure!(taken, "the balloon does not take the pages");
    Ok(())
}
