// SPDX-License-Identifier: MIT OR Apache-2.0

//! A display: imports a dma-buf by PRIME and scans it out.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use drm::buffer::{Handle, PlanarBuffer};
use drm::control::{connector, crtc, framebuffer, ClipRect, Device as _, FbCmd2Flags, Mode};
use drm::Device as _;
use drm_fourcc::{DrmFourcc, DrmModifier};

use crate::canvas::Canvas;
use crate::export::Export;

/// Where the displays' devices are.
const DIRECTORY: &str = "/dev/dri";

/// A display's device.
#[derive(Debug)]
pub struct Card {
    file: File,
    path: PathBuf,
    driver: String,
}

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// A buffer of the display's, in the canvas's format.
struct Imported {
    handle: Handle,
    size: (u32, u32),
    pitch: u32,
}

impl PlanarBuffer for Imported {
    fn size(&self) -> (u32, u32) {
        self.size
    }

    fn format(&self) -> DrmFourcc {
        DrmFourcc::Xrgb8888
    }

    fn modifier(&self) -> Option<DrmModifier> {
        None
    }

    fn pitches(&self) -> [u32; 4] {
        [self.pitch, 0, 0, 0]
    }

    fn handles(&self) -> [Option<Handle>; 4] {
        [Some(self.handle), None, None, None]
    }

    fn offsets(&self) -> [u32; 4] {
        [0; 4]
    }
}

/// A picture on the screen; gone when dropped.
#[derive(Debug)]
pub struct Screen<'a> {
    card: &'a Card,
    handle: Handle,
    framebuffer: framebuffer::Handle,
    crtc: crtc::Handle,
    mode: Mode,
}

impl Card {
    /// Opens a display's device.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("opening {}", path.display()))?;
        let mut card = Self {
            file,
            path: path.to_owned(),
            driver: String::new(),
        };
        let driver = card
            .get_driver()
            .with_context(|| format!("asking {}", path.display()))?;
        card.driver = driver.name().to_string_lossy().into_owned();
        Ok(card)
    }

    /// Opens the first display whose driver's name begins so.
    pub fn find(driver: &str) -> Result<Self> {
        let mut paths: Vec<PathBuf> = std::fs::read_dir(DIRECTORY)
            .with_context(|| format!("looking for a display in {DIRECTORY}"))?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?;
        paths.retain(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("card"))
        });
        paths.sort();
        let mut others = Vec::new();
        for path in paths {
            let card = Self::open(&path)?;
            if card.driver.starts_with(driver) {
                return Ok(card);
            }
            others.push(card.describe());
        }
        bail!(
            "no display is driven by {driver}; is its module loaded? There are: [{}]; choose with \
             --card",
            others.join(", ")
        )
    }

    /// Its driver's name.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// For a person.
    pub fn describe(&self) -> String {
        format!("{} ({})", self.path.display(), self.driver)
    }

    /// Imports a buffer and scans it out.
    pub fn show(&self, export: &Export, canvas: &Canvas) -> Result<Screen<'_>> {
        let size = (canvas.width() as u32, canvas.height() as u32);
        let (connector, crtc, mode) = self.output(size)?;
        let handle = self
            .prime_fd_to_buffer(export.as_fd())
            .context("importing the dma-buf")?;
        let imported = Imported {
            handle,
            size,
            pitch: canvas.pitch() as u32,
        };
        let framebuffer = self
            .add_planar_framebuffer(&imported, FbCmd2Flags::empty())
            .context("making a framebuffer of it (AddFB2, XR24)")?;
        let screen = Screen {
            card: self,
            handle,
            framebuffer,
            crtc,
            mode,
        };
        self.set_crtc(crtc, Some(framebuffer), (0, 0), &[connector], Some(mode))
            .context("setting the mode (SetCrtc)")?;
        screen.refresh()?;
        Ok(screen)
    }

    /// A connected output, what drives it, and its largest mode that the picture fills.
    fn output(
        &self,
        (width, height): (u32, u32),
    ) -> Result<(connector::Handle, crtc::Handle, Mode)> {
        let resources = self.resource_handles().context("asking for outputs")?;
        for &handle in resources.connectors() {
            let connector = self
                .get_connector(handle, true)
                .context("asking a connector")?;
            if connector.state() != connector::State::Connected {
                continue;
            }
            let mode = connector
                .modes()
                .iter()
                .filter(|mode| {
                    let (across, down) = mode.size();
                    u32::from(across) <= width && u32::from(down) <= height
                })
                .max_by_key(|mode| {
                    let (across, down) = mode.size();
                    (u32::from(across) * u32::from(down), mode.vrefresh())
                });
            let crtcs = connector.encoders().iter().filter_map(|&encoder| {
                let encoder = self.get_encoder(encoder).ok()?;
                resources
                    .filter_crtcs(encoder.possible_crtcs())
                    .first()
                    .copied()
            });
            if let (Some(mode), Some(crtc)) = (mode, crtcs.into_iter().next()) {
                return Ok((handle, crtc, *mode));
            }
        }
        bail!(
            "{} has no connected output with a mode up to {width}x{height}",
            self.describe()
        )
    }
}

impl Screen<'_> {
    /// The mode, for a person.
    pub fn mode(&self) -> String {
        let (across, down) = self.mode.size();
        format!("{across}x{down} at {} Hz", self.mode.vrefresh())
    }

    /// Tells the driver that all of the picture may have changed.
    pub fn refresh(&self) -> Result<()> {
        let (across, down) = self.mode.size();
        self.card
            .dirty_framebuffer(self.framebuffer, &[ClipRect::new(0, 0, across, down)])
            .context("refreshing the screen (DirtyFB)")
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        let undone = self
            .card
            .set_crtc(self.crtc, None, (0, 0), &[], None)
            .and_then(|()| self.card.destroy_framebuffer(self.framebuffer))
            .and_then(|()| self.card.close_buffer(self.handle));
        if let Err(error) = undone {
            eprintln!("taking the picture off the screen: {error}");
        }
    }
}
