// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pixels in ordinary memory: what `Vec` gets from `malloc`.

use std::convert::Infallible;

use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Size};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::Pixel;

/// Pixels of one page.
const PER_PAGE: usize = 1024;

/// One page of pixels, XRGB8888.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u32; PER_PAGE]);

/// An image, XRGB8888, whose rows follow each other.
pub struct Canvas {
    pages: Vec<Page>,
    width: usize,
    height: usize,
}

impl Canvas {
    /// A black one.
    pub fn new(width: usize, height: usize) -> Self {
        let pages = vec![Page([0; PER_PAGE]); (width * height).div_ceil(PER_PAGE)];
        Self {
            pages,
            width,
            height,
        }
    }

    /// Pixels from left to right.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Pixels from top to bottom.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Bytes from one row to the next.
    pub fn pitch(&self) -> usize {
        self.width * size_of::<u32>()
    }

    /// How many pages it takes.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Where it is.
    pub fn addr(&self) -> u64 {
        self.pages.as_ptr() as u64
    }

    /// Its size in bytes, in whole pages.
    pub fn len(&self) -> u64 {
        size_of_val(&self.pages[..]) as u64
    }

    /// The memory's bytes, row by row: blue, green, red and none of each pixel.
    pub fn bytes(&self) -> Vec<u8> {
        self.pages
            .iter()
            .flat_map(|page| page.0)
            .take(self.width * self.height)
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    /// Sets a pixel, red, green and blue; nothing happens outside.
    pub fn set(&mut self, x: i32, y: i32, [red, green, blue]: [u8; 3]) {
        let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else {
            return;
        };
        if x < self.width && y < self.height {
            let index = y * self.width + x;
            let value = u32::from_be_bytes([0, red, green, blue]);
            self.pages[index / PER_PAGE].0[index % PER_PAGE] = value;
        }
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width as u32, self.height as u32)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            self.set(at.x, at.y, [colour.r(), colour.g(), colour.b()]);
        }
        Ok(())
    }
}
