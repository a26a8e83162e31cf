// SPDX-License-Identifier: MIT OR Apache-2.0

//! vfio with an IOMMU of type 1, the other usual pin of a virtual machine's memory. It needs a PCI device
//! behind an (emulated) IOMMU: QEMU's `edu`, for which Linux has no driver.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::holders::modprobe;
use pinbuf_test_harness::support::{check, check_eq, kernel, Memory};

const fn command(nr: u64) -> u64 {
    (b';' as u64) << 8 | nr
}

const SET_IOMMU: u64 = command(102);
const GROUP_SET_CONTAINER: u64 = command(104);
const MAP_DMA: u64 = command(113);
const UNMAP_DMA: u64 = command(114);

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: u64 = 3;
/// `VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE`.
const READ_WRITE: u32 = 3;

#[repr(C)]
struct MapDma {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct UnmapDma {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

fn ioctl(fd: RawFd, command: u64, argument: u64) -> nix::Result<i32> {
    // SAFETY: the argument is a number, or the address of a live struct of the command's type.
    Errno::result(unsafe { libc::ioctl(fd, command, argument) })
}

/// A container with one group in it.
#[derive(Debug)]
pub struct Container {
    container: File,
    _group: File,
}

/// QEMU's device `edu`.
fn edu() -> Result<PathBuf> {
    for entry in std::fs::read_dir("/sys/bus/pci/devices")? {
        let path = entry?.path();
        let id = |name: &str| kernel::read(path.join(name)).unwrap_or_default();
        if (id("vendor").trim(), id("device").trim()) == ("0x1234", "0x11e8") {
            return Ok(path);
        }
    }
    anyhow::bail!("no device `edu`: QEMU needs -device intel-iommu,intremap=off -device edu")
}

impl Container {
    /// Takes the device.
    pub fn new() -> Result<Self> {
        // The emulated IOMMU does not remap interrupts, which nobody here uses.
        modprobe(&["vfio_iommu_type1", "allow_unsafe_interrupts=1"])?;
        modprobe(&["vfio-pci"])?;
        let device = edu()?;
        if !device.join("driver").exists() {
            kernel::write(device.join("driver_override"), "vfio-pci")?;
            let name = device.file_name().context("a device's name")?;
            kernel::write("/sys/bus/pci/drivers_probe", name.to_string_lossy())?;
        }
        let group = std::fs::read_link(device.join("iommu_group"))
            .context("no IOMMU: boot with intel_iommu=on")?;
        let group = group.file_name().context("a group's number")?;
        let open = |path: PathBuf| {
            File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("opening {}", path.display()))
        };
        let container = open("/dev/vfio/vfio".into())?;
        let group = open(PathBuf::from("/dev/vfio").join(group))?;
        let fd = container.as_raw_fd();
        ioctl(
            group.as_raw_fd(),
            GROUP_SET_CONTAINER,
            std::ptr::from_ref(&fd) as u64,
        )
        .context("VFIO_GROUP_SET_CONTAINER")?;
        ioctl(fd, SET_IOMMU, TYPE1V2).context("VFIO_SET_IOMMU")?;
        Ok(Self {
            container,
            _group: group,
        })
    }

    /// `VFIO_IOMMU_MAP_DMA`: pins a part of some memory.
    pub fn map(&self, memory: &Memory, offset: usize, len: usize, iova: u64) -> nix::Result<()> {
        let range = memory.part(offset, len);
        let argument = MapDma {
            argsz: size_of::<MapDma>() as u32,
            flags: READ_WRITE,
            vaddr: range.addr,
            iova,
            size: range.len,
        };
        let argument = std::ptr::from_ref(&argument) as u64;
        ioctl(self.container.as_raw_fd(), MAP_DMA, argument).map(drop)
    }

    /// `VFIO_IOMMU_UNMAP_DMA`.
    pub fn unmap(&self, iova: u64, len: usize) -> Result<()> {
        let mut argument = UnmapDma {
            argsz: size_of::<UnmapDma>() as u32,
            flags: 0,
            iova,
            size: len as u64,
        };
        let address = std::ptr::from_mut(&mut argument) as u64;
        ioctl(self.container.as_raw_fd(), UNMAP_DMA, address).context("VFIO_IOMMU_UNMAP_DMA")?;
        check_eq!(argument.size, len as u64, "bytes unmapped");
        check!(len > 0, "nothing to unmap");
        Ok(())
    }
}
