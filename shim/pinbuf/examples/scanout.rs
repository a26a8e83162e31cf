// SPDX-License-Identifier: MIT OR Apache-2.0

//! Shows a picture that lies in ordinary memory on a display, until standard input ends: `scanout /dev/dri/card0`.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use drm::buffer::{Buffer, DrmFourcc, Handle};
use drm::control::{connector, Device as _};
use pinbuf::{Access, Device, Image, Region};

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// The picture, as the display's driver knows it.
struct Imported<'a>(&'a Image, Handle);

impl Buffer for Imported<'_> {
    fn size(&self) -> (u32, u32) {
        (self.0.width(), self.0.height())
    }

    fn format(&self) -> DrmFourcc {
        self.0.format()
    }

    fn pitch(&self) -> u32 {
        self.0.planes()[0].stride as u32
    }

    fn handle(&self) -> Handle {
        self.1
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: scanout CARD")?;
    let card = Card(File::options().read(true).write(true).open(path)?);

    // A connected output, its first mode, and what can drive it.
    let resources = card.resource_handles()?;
    let output = resources.connectors().iter().find_map(|&handle| {
        let output = card.get_connector(handle, true).ok()?;
        (output.state() == connector::State::Connected).then_some(output)
    });
    let output = output.ok_or("no output is connected")?;
    let mode = *output.modes().first().ok_or("the output has no mode")?;
    let encoder = *output
        .encoders()
        .first()
        .ok_or("the output has no encoder")?;
    let crtcs = resources.filter_crtcs(card.get_encoder(encoder)?.possible_crtcs());
    let crtc = *crtcs.first().ok_or("nothing can drive the output")?;

    // Red from left to right, green from top to bottom.
    let (width, height) = mode.size();
    let image = Image::new(DrmFourcc::Xrgb8888, width.into(), height.into())?;
    let memory = Region::huge_advised(image.size())?;
    let buffer = Device::open()?.export(&memory)?;
    let access = buffer.begin_cpu_access(Access::Write)?;
    for y in 0..height {
        let row = (0..width).flat_map(|x| [0x80, y as u8, x as u8, 0]);
        memory.write_at(image.row_offset(0, y.into())?, &row.collect::<Vec<_>>())?;
    }
    access.finish()?;

    let handle = card.prime_fd_to_buffer(buffer.as_fd())?;
    let framebuffer = card.add_framebuffer(&Imported(&image, handle), 24, 32)?;
    card.set_crtc(
        crtc,
        Some(framebuffer),
        (0, 0),
        &[output.handle()],
        Some(mode),
    )?;
    println!("{width}x{height}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    card.set_crtc(crtc, None, (0, 0), &[], None)?;
    card.destroy_framebuffer(framebuffer)?;
    card.close_buffer(handle)?;
    Ok(())
}
