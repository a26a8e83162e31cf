// SPDX-License-Identifier: MIT OR Apache-2.0

//! vgem, a driver without a device: an exporter besides pinbuf, and fences that a program signals.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;

use anyhow::{bail, Context, Result};
use drm::buffer::{Buffer as _, DrmFourcc};
use drm::control::Device as _;

/// `struct drm_vgem_fence_attach`.
#[repr(C)]
#[derive(Default)]
struct FenceAttach {
    handle: u32,
    flags: u32,
    out_fence: u32,
    pad: u32,
}

/// `struct drm_vgem_fence_signal`.
#[repr(C)]
#[derive(Default)]
struct FenceSignal {
    fence: u32,
    flags: u32,
}

/// `struct dma_buf_export_sync_file`, and the one for importing.
#[repr(C)]
#[derive(Default)]
struct SyncFile {
    flags: u32,
    fd: i32,
}

nix::ioctl_readwrite!(
    /// DRM_IOCTL_VGEM_FENCE_ATTACH.
    fence_attach, b'd', 0x41, FenceAttach
);
nix::ioctl_write_ptr!(
    /// DRM_IOCTL_VGEM_FENCE_SIGNAL.
    fence_signal, b'd', 0x42, FenceSignal
);
nix::ioctl_readwrite!(
    /// DMA_BUF_IOCTL_EXPORT_SYNC_FILE.
    export_sync_file, b'b', 2, SyncFile
);
nix::ioctl_write_ptr!(
    /// DMA_BUF_IOCTL_IMPORT_SYNC_FILE.
    import_sync_file, b'b', 3, SyncFile
);

/// `DMA_BUF_SYNC_READ`.
pub const SYNC_READ: u32 = 1;
/// `DMA_BUF_SYNC_WRITE`.
pub const SYNC_WRITE: u32 = 2;
/// `VGEM_FENCE_WRITE`.
const FENCE_WRITE: u32 = 1;

/// Loads it; false if the kernel has none.
pub fn load() -> Result<bool> {
    let mut modprobe = Command::new("modprobe");
    Ok(modprobe.args(["--quiet", "vgem"]).status()?.success())
}

/// Its device file.
#[derive(Debug)]
pub struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// An object of vgem's.
#[derive(Debug)]
pub struct Vgem {
    /// Where it was made.
    pub card: Card,
    /// What calls of the card know it by.
    pub handle: u32,
    /// Its dma-buf.
    pub buffer: OwnedFd,
}

impl Vgem {
    /// Makes one, of a page.
    pub fn new() -> Result<Self> {
        if !load()? {
            bail!("modprobe finds no vgem");
        }
        let mut cards = fs::read_dir("/sys/class/drm")?.flatten().filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let device = fs::canonicalize(entry.path()).unwrap_or_default();
            name.starts_with("card") && device.to_string_lossy().contains("/vgem/")
        });
        let card = cards.next().context("vgem has no card")?.file_name();
        let path = format!("/dev/dri/{}", card.to_string_lossy());
        let card = Card(File::options().read(true).write(true).open(path)?);
        let object = card
            .create_dumb_buffer((32, 32), DrmFourcc::Xrgb8888, 32)
            .context("creating an object")?;
        let flags = libc::O_CLOEXEC | libc::O_RDWR;
        let buffer = card
            .buffer_to_prime_fd(object.handle(), flags as u32)
            .context("exporting it")?;
        Ok(Self {
            card,
            handle: object.handle().into(),
            buffer,
        })
    }
    /// A fence in a buffer, as of a device that reads it or writes to it.
    pub fn uses(&self, buffer: BorrowedFd<'_>, how: u32) -> Result<Fence<'_>> {
        let mut attach = FenceAttach {
            handle: self.handle,
            flags: FENCE_WRITE,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes the struct.
        unsafe { fence_attach(self.card.as_fd().as_raw_fd(), &mut attach) }
            .context("making a fence")?;
        let fence = Fence(self, attach.out_fence);
        let exported = fence_of(self.buffer.as_fd())?;
        let file = SyncFile {
            flags: how,
            fd: exported.as_raw_fd(),
        };
        // SAFETY: the kernel reads the struct.
        unsafe { import_sync_file(buffer.as_raw_fd(), &file) }.context("importing")?;
        Ok(fence)
    }
}

/// The file of the fences in a dma-buf.
pub fn fence_of(buffer: BorrowedFd<'_>) -> Result<OwnedFd> {
    let mut file = SyncFile {
        flags: SYNC_WRITE,
        fd: -1,
    };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { export_sync_file(buffer.as_raw_fd(), &mut file) }.context("exporting")?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(file.fd) })
}

/// A fence that has not been signalled.
#[derive(Debug)]
pub struct Fence<'a>(&'a Vgem, u32);

impl Fence<'_> {
    /// Signals it.
    pub fn signal(self) -> Result<()> {
        let signal = FenceSignal {
            fence: self.1,
            flags: 0,
        };
        // SAFETY: the kernel reads the struct. An error after ten seconds says that the fence timed out.
        unsafe { fence_signal(self.0.card.as_fd().as_raw_fd(), &signal) }.context("signalling")?;
        Ok(())
    }
}
