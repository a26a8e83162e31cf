// SPDX-License-Identifier: MIT OR Apache-2.0

//! The inner guest's screen: a buffer that virtio-gpu scans out.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use drm::buffer::{Buffer as _, Handle, PlanarBuffer};
use drm::control::dumbbuffer::{DumbBuffer, DumbMapping};
use drm::control::{
    connector, crtc, framebuffer, ClipRect, Device as _, FbCmd2Flags, Mode, ModeTypeFlags,
};
use drm::Device as _;
use drm_fourcc::{DrmFourcc, DrmModifier};
use nix::errno::Errno;
use pinbuf_uapi::{Create, Range};

use crate::pagemap;
use crate::pattern::Pattern;

const PAGE: usize = 4096;

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// The memory of the pixels.
enum Memory {
    /// A dumb buffer of the driver.
    Dumb(DumbMapping<'static>),
    /// The process's own, exported by pinbuf.
    Own(Vec<Page>),
}

/// A page of pixels.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u32; PAGE / 4]);

impl Memory {
    fn pixels(&mut self) -> &mut [u32] {
        match self {
            Self::Dumb(mapping) => {
                let bytes: &mut [u8] = mapping.as_mut();
                // SAFETY: any bytes are pixels; what does not fit is left out and checked for below.
                let (before, pixels, _) = unsafe { bytes.align_to_mut() };
                assert!(before.is_empty(), "mappings begin at a page");
                pixels
            }
            Self::Own(pages) => {
                let length = pages.len() * (PAGE / 4);
                // SAFETY: pages are arrays of pixels without gaps.
                unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), length) }
            }
        }
    }
}

/// A buffer on the screen.  It stays there until another one is shown.
pub struct Screen {
    card: Card,
    memory: Memory,
    framebuffer: framebuffer::Handle,
    width: u32,
    height: u32,
    pitch: u32,
    _exported: Option<OwnedFd>,
}

/// A dma-buf as the driver imported it.
struct Imported {
    handle: Handle,
    width: u32,
    height: u32,
}

impl PlanarBuffer for Imported {
    fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    fn format(&self) -> DrmFourcc {
        DrmFourcc::Xrgb8888
    }

    fn modifier(&self) -> Option<DrmModifier> {
        None
    }

    fn pitches(&self) -> [u32; 4] {
        [self.width * 4, 0, 0, 0]
    }

    fn handles(&self) -> [Option<Handle>; 4] {
        [Some(self.handle), None, None, None]
    }

    fn offsets(&self) -> [u32; 4] {
        [0; 4]
    }
}

/// A connected output, and its preferred mode.
struct Output {
    connector: connector::Handle,
    crtc: crtc::Handle,
    mode: Mode,
}

impl Output {
    fn find(card: &Card) -> Result<Self> {
        let resources = card.resource_handles()?;
        for &handle in resources.connectors() {
            let connector = card.get_connector(handle, true)?;
            let mode = connector
                .modes()
                .iter()
                .find(|mode| mode.mode_type().contains(ModeTypeFlags::PREFERRED))
                .or(connector.modes().first());
            if let (connector::State::Connected, Some(mode), Some(&crtc)) =
                (connector.state(), mode, resources.crtcs().first())
            {
                return Ok(Self {
                    connector: handle,
                    crtc,
                    mode: *mode,
                });
            }
        }
        bail!("no output is connected")
    }

    fn size(&self) -> (u32, u32) {
        let (width, height) = self.mode.size();
        (width.into(), height.into())
    }

    fn show(&self, card: &Card, framebuffer: framebuffer::Handle) -> Result<()> {
        let connectors = [self.connector];
        card.set_crtc(
            self.crtc,
            Some(framebuffer),
            (0, 0),
            &connectors,
            Some(self.mode),
        )
        .context("setting the mode")
    }
}

fn open(patience: Duration) -> Result<Card> {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/dev/dri").into_iter().flatten() {
            let path: PathBuf = entry?.path();
            if !path.to_string_lossy().contains("/card") {
                continue;
            }
            let card = Card(File::options().read(true).write(true).open(&path)?);
            if card.get_driver()?.name() == "virtio_gpu" {
                return Ok(card);
            }
        }
        ensure!(start.elapsed() < patience, "virtio-gpu did not appear");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Screen {
    /// Shows a dumb buffer.
    pub fn dumb(patience: Duration) -> Result<Self> {
        let card = open(patience)?;
        let output = Output::find(&card)?;
        let (width, height) = output.size();
        let (memory, framebuffer, pitch) = dumb(&card, (width, height))?;
        output.show(&card, framebuffer)?;
        Ok(Self {
            card,
            memory,
            framebuffer,
            width,
            height,
            pitch,
            _exported: None,
        })
    }

    /// Shows another dumb buffer, and keeps the present one.
    pub fn another(&mut self) -> Result<()> {
        let output = Output::find(&self.card)?;
        let (memory, framebuffer, pitch) = dumb(&self.card, self.size())?;
        output.show(&self.card, framebuffer)?;
        (self.memory, self.framebuffer, self.pitch) = (memory, framebuffer, pitch);
        Ok(())
    }

    /// Makes ordinary memory a dma-buf, by pinbuf, and shows that.
    pub fn exported(patience: Duration) -> Result<Self> {
        let card = open(patience)?;
        let output = Output::find(&card)?;
        let (width, height) = output.size();
        let bytes = width as usize * height as usize * 4;
        let pages = vec![Page([0; PAGE / 4]); bytes.div_ceil(PAGE)];
        let exported = export(&pages)?;
        let handle = card
            .prime_fd_to_buffer(exported.as_fd())
            .context("virtio-gpu does not import the dma-buf")?;
        let imported = Imported {
            handle,
            width,
            height,
        };
        let framebuffer = card.add_planar_framebuffer(&imported, FbCmd2Flags::empty())?;
        output.show(&card, framebuffer)?;
        Ok(Self {
            card,
            memory: Memory::Own(pages),
            framebuffer,
            width,
            height,
            pitch: width * 4,
            _exported: Some(exported),
        })
    }

    /// Width and height.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Draws a frame.
    pub fn draw(&mut self, frame: u32) -> Result<()> {
        let pattern = Pattern {
            width: self.width,
            height: self.height,
            frame,
        };
        let pitch = self.pitch as usize / 4;
        let pixels = self.memory.pixels();
        for y in 0..self.height {
            let row = &mut pixels[y as usize * pitch..][..self.width as usize];
            for (pixel, value) in row.iter_mut().zip(pattern.row(y)) {
                *pixel = value;
            }
        }
        Ok(())
    }

    /// Counts the pixels in its memory that differ from this frame.
    pub fn wrong(&mut self, frame: u32) -> usize {
        let pattern = Pattern {
            width: self.width,
            height: self.height,
            frame,
        };
        let pitch = self.pitch as usize / 4;
        let rows = self.memory.pixels().chunks(pitch);
        (0..self.height)
            .zip(rows)
            .flat_map(|(y, row)| row.iter().zip(pattern.row(y)))
            .filter(|(pixel, drawn)| *pixel != drawn)
            .count()
    }

    /// The page frames of its memory, which has to be the process's own.
    pub fn frames(&mut self) -> Result<Vec<u64>> {
        let pixels = self.memory.pixels();
        let pages = size_of_val(pixels) / PAGE;
        let frames = pagemap::frames("self", pixels.as_ptr() as u64, pages)?;
        frames
            .into_iter()
            .map(|frame| frame.context("the screen is a dumb buffer, or not all of it is present"))
            .collect()
    }

    /// Notifies the driver that all of the screen changed.
    pub fn flush(&self) -> Result<()> {
        let (right, bottom) = (self.width as u16, self.height as u16);
        let all = ClipRect::new(0, 0, right, bottom);
        self.card
            .dirty_framebuffer(self.framebuffer, &[all])
            .context("DirtyFB")
    }
}

/// A black dumb buffer, which lives as long as the descriptor of the card, and its pitch.
fn dumb(card: &Card, size: (u32, u32)) -> Result<(Memory, framebuffer::Handle, u32)> {
    let buffer = card
        .create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32)
        .context("making a dumb buffer")?;
    let framebuffer = card.add_framebuffer(&buffer, 24, 32)?;
    let buffer: &'static mut DumbBuffer = Box::leak(Box::new(buffer));
    let pitch = buffer.pitch();
    let mut mapping = card.map_dumb_buffer(buffer)?;
    mapping.fill(0);
    Ok((Memory::Dumb(mapping), framebuffer, pitch))
}

/// A dma-buf of memory, by pinbuf.
fn export(pages: &[Page]) -> Result<OwnedFd> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/pinbuf")
        .context("opening /dev/pinbuf in the inner guest")?;
    let ranges = [Range {
        addr: pages.as_ptr() as u64,
        len: size_of_val(pages) as u64,
    }];
    let mut create = Create {
        size: size_of::<Create>() as u32,
        flags: pinbuf_uapi::CREATE_CLOEXEC,
        ranges: ranges.as_ptr() as u64,
        count: 1,
        ..Default::default()
    };
    // SAFETY: the command goes with its struct, which points to live ranges.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            pinbuf_uapi::CREATE.into(),
            std::ptr::from_mut(&mut create),
        )
    };
    let fd = Errno::result(result).context("PINBUF_CREATE in the inner guest")?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
