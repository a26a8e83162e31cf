// SPDX-License-Identifier: MIT OR Apache-2.0

//! A test card: colour bars in a circle, ramps, a grid by which a wrong pitch is seen at once, and
//! the project's name.

use embedded_graphics::geometry::{Point, Size};
use embedded_graphics::mono_font::ascii::{FONT_10X20, FONT_9X18};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::{BinaryColor, Rgb888};
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Circle, Line, PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use pinbuf_uapi::Info;

use crate::canvas::Canvas;

/// The classic bars, from the brightest to the darkest.
const BARS: [[u8; 3]; 8] = [
    [235, 235, 235],
    [235, 219, 30],
    [28, 214, 227],
    [46, 204, 82],
    [222, 62, 205],
    [230, 49, 54],
    [49, 76, 228],
    [16, 16, 20],
];

/// A hue, from 0 to 1, as red, green and blue.
fn hue(at: f32) -> [u8; 3] {
    [0.0, 1.0 / 3.0, 2.0 / 3.0].map(|phase| {
        let angle = (at - phase) * std::f32::consts::TAU;
        (127.5 + 127.5 * angle.cos()) as u8
    })
}

/// Sizes that everything else is derived from.
struct Layout {
    width: i32,
    height: i32,
    cell: i32,
    middle: Point,
    radius: i32,
}

impl Layout {
    fn of(canvas: &Canvas) -> Self {
        let (width, height) = (canvas.width() as i32, canvas.height() as i32);
        let cell = (width / 16).min(height / 12).max(8);
        Self {
            width,
            height,
            cell,
            middle: Point::new(width / 2, height / 2),
            radius: (height.min(width) * 5 / 12).max(cell * 2),
        }
    }

    /// The strip that moves with `--animate`.
    fn strip(&self) -> (i32, i32) {
        (self.height - self.cell, self.height)
    }
}

/// Draws all of it.
pub fn draw(canvas: &mut Canvas) {
    let layout = Layout::of(canvas);
    background(canvas, &layout);
    disc(canvas, &layout);
    corners(canvas, &layout);
    name(canvas, &layout);
    strip(canvas, &layout, 0);
}

fn background(canvas: &mut Canvas, layout: &Layout) {
    for y in 0..layout.height {
        for x in 0..layout.width {
            let across = x * 255 / layout.width;
            let down = y * 255 / layout.height;
            let on_grid = (x - layout.middle.x) % layout.cell == 0
                || (y - layout.middle.y) % layout.cell == 0;
            let colour = if on_grid {
                [150, 156, 170]
            } else {
                [24 + across / 8, 30 + down / 7, 64 + (across + down) / 6].map(|level| level as u8)
            };
            canvas.set(x, y, colour);
        }
    }
}

/// The circle: bars above, the name's band in the middle, ramps below.
fn disc(canvas: &mut Canvas, layout: &Layout) {
    let radius = layout.radius;
    for y in -radius..=radius {
        let half = f64::from(radius * radius - y * y).sqrt() as i32;
        for x in -half..=half {
            let across = x + radius;
            let part = (y + radius) * 12 / (2 * radius + 1);
            let colour = match part {
                0..=4 => BARS[(across * 8 / (2 * radius + 1)) as usize],
                5 | 6 => [8, 10, 16],
                7 => [(across * 255 / (2 * radius)) as u8; 3],
                8 => [(across * 15 / (2 * radius) * 17) as u8; 3],
                9 => hue(across as f32 / (2 * radius) as f32),
                // A chequer that gets finer.
                _ => {
                    let size = if part == 10 { 8 } else { 2 };
                    if (across / size + y.rem_euclid(2 * size) / size) % 2 == 0 {
                        [240; 3]
                    } else {
                        [16; 3]
                    }
                }
            };
            canvas.set(layout.middle.x + x, layout.middle.y + y, colour);
        }
    }
    ring(canvas, layout.middle, radius, 4);
}

fn ring(canvas: &mut Canvas, middle: Point, radius: i32, stroke: u32) {
    let style = PrimitiveStyle::with_stroke(Rgb888::WHITE, stroke);
    let Ok(()) = Circle::with_center(middle, 2 * radius as u32)
        .into_styled(style)
        .draw(canvas);
}

/// Rings in the corners and a frame of one pixel: the picture's edges are where they should be.
fn corners(canvas: &mut Canvas, layout: &Layout) {
    let (near, cell) = (layout.cell * 3 / 2, layout.cell);
    for (index, (x, y)) in [
        (near, near),
        (layout.width - near, near),
        (near, layout.height - near - cell),
        (layout.width - near, layout.height - near - cell),
    ]
    .into_iter()
    .enumerate()
    {
        let [red, green, blue] = BARS[1 + index];
        let at = Point::new(x, y);
        let style = PrimitiveStyle::with_fill(Rgb888::new(red, green, blue));
        let Ok(()) = Circle::with_center(at, cell as u32)
            .into_styled(style)
            .draw(canvas);
        ring(canvas, at, cell, 3);
        for (from, to) in [((-cell, 0), (cell, 0)), ((0, -cell), (0, cell))] {
            let line = Line::new(at + Point::from(from), at + Point::from(to));
            let style = PrimitiveStyle::with_stroke(Rgb888::WHITE, 1);
            let Ok(()) = line.into_styled(style).draw(canvas);
        }
    }
    let size = Size::new(layout.width as u32, layout.height as u32);
    let style = PrimitiveStyle::with_stroke(Rgb888::RED, 1);
    let Ok(()) = Rectangle::new(Point::zero(), size)
        .into_styled(style)
        .draw(canvas);
}

/// Takes the pixels of a text, in order to enlarge it.
struct Enlarged<'a> {
    canvas: &'a mut Canvas,
    at: Point,
    scale: i32,
}

impl OriginDimensions for Enlarged<'_> {
    fn size(&self) -> Size {
        self.canvas.size()
    }
}

impl DrawTarget for Enlarged<'_> {
    type Color = BinaryColor;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Self::Error> {
        for Pixel(at, colour) in pixels {
            if colour.is_off() {
                continue;
            }
            let corner = self.at + at * self.scale;
            for y in 0..self.scale {
                for x in 0..self.scale {
                    let at = corner + Point::new(x, y);
                    let shade = hue(at.x as f32 / self.canvas.width() as f32);
                    self.canvas
                        .set(at.x, at.y, shade.map(|level| 127 + level / 2));
                }
            }
        }
        Ok(())
    }
}

fn name(canvas: &mut Canvas, layout: &Layout) {
    const NAME: &str = "pinbuf";
    let font: &MonoFont<'_> = &FONT_10X20;
    let (width, height) = (NAME.len() as i32 * 10, 20);
    let scale = (layout.radius * 2 / 6 / height).max(1);
    let at = layout.middle - Point::new(width, height) * scale / 2;
    let style = MonoTextStyle::new(font, BinaryColor::On);
    let mut enlarged = Enlarged { canvas, at, scale };
    let Ok(_) = Text::with_baseline(NAME, Point::zero(), style, Baseline::Top).draw(&mut enlarged);
}

/// The strip at the bottom, whose colours run with the frames.
fn strip(canvas: &mut Canvas, layout: &Layout, frame: u32) {
    let (top, bottom) = layout.strip();
    for x in 1..layout.width - 1 {
        let at = x as f32 / layout.width as f32 - frame as f32 / 90.0;
        let colour = hue(at.rem_euclid(1.0));
        for y in top..bottom - 1 {
            canvas.set(x, y, colour);
        }
    }
}

/// Says under the circle what the picture is.
pub fn caption(canvas: &mut Canvas, info: &Info, driver: &str) {
    let layout = Layout::of(canvas);
    let text = format!(
        "drawn in ordinary memory: {} pages in {} pieces, shown by {driver} through a dma-buf",
        info.pages, info.extents
    );
    let style = MonoTextStyle::new(&FONT_9X18, Rgb888::BLACK);
    let centred = TextStyleBuilder::new()
        .alignment(Alignment::Center)
        .baseline(Baseline::Middle)
        .build();
    let (top, bottom) = layout.strip();
    let at = Point::new(layout.middle.x, (top + bottom) / 2);
    let size = Size::new(text.len() as u32 * 9 + 16, 24);
    let background = PrimitiveStyle::with_fill(Rgb888::new(240, 240, 236));
    let corner = at - Point::new(size.width as i32 / 2, size.height as i32 / 2);
    let Ok(()) = Rectangle::new(corner, size)
        .into_styled(background)
        .draw(canvas);
    let Ok(_) = Text::with_text_style(&text, at, style, centred).draw(canvas);
}

/// Draws one frame: the strip runs, and a ball goes round the circle.
pub fn animate(canvas: &mut Canvas, frame: u32) {
    let layout = Layout::of(canvas);
    let around = |frame: u32| {
        let angle = frame as f64 / 60.0 * std::f64::consts::TAU;
        let far = f64::from(layout.radius + layout.cell / 3);
        layout.middle + Point::new((far * angle.cos()) as i32, (far * angle.sin()) as i32)
    };
    strip(canvas, &layout, frame);
    let ball = |canvas: &mut Canvas, at: Point, colour: Rgb888| {
        let style = PrimitiveStyle::with_fill(colour);
        let size = (layout.cell / 2) as u32;
        let Ok(()) = Circle::with_center(at, size)
            .into_styled(style)
            .draw(canvas);
    };
    if let Some(before) = frame.checked_sub(1) {
        ball(canvas, around(before), Rgb888::new(40, 48, 100));
    }
    ball(canvas, around(frame), Rgb888::YELLOW);
}
