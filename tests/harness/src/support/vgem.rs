// SPDX-License-Identifier: MIT OR Apache-2.0

//! vgem, a driver without a device: an exporter besides pinbuf, and fences that a program signals.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;

use anyhow::{bail, Context, Result};
use drm::buffer::{Buffer as _, DrmFourcc};
use drm::control::Device as _;

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
}
