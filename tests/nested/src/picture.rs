// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures of a screen, and the comparison with what was drawn.

use std::io::Cursor;

use anyhow::{bail, ensure, Context, Result};

use crate::pattern::Pattern;

/// A picture: 0x00RRGGBB, row by row.
pub struct Picture {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// The pixels.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// Reads the format that QEMU writes (PPM, "P6").
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes;
        let mut words = Vec::new();
        while words.len() < 4 {
            let end = rest
                .iter()
                .position(u8::is_ascii_whitespace)
                .context("the picture is cut off")?;
            words.push(std::str::from_utf8(&rest[..end])?);
            rest = &rest[end + 1..];
        }
        ensure!(
            words[0] == "P6" && words[3] == "255",
            "no picture: {words:?}"
        );
        let (width, height): (u32, u32) = (words[1].parse()?, words[2].parse()?);
        ensure!(
            rest.len() == width as usize * height as usize * 3,
            "the picture is cut off"
        );
        let pixels = rest
            .chunks_exact(3)
            .map(|rgb| u32::from_be_bytes([0, rgb[0], rgb[1], rgb[2]]))
            .collect();
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Reads a PNG with 8 bits for each colour.
    pub fn parse_png(bytes: &[u8]) -> Result<Self> {
        let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
        let size = reader
            .output_buffer_size()
            .context("the picture is too large")?;
        let mut data = vec![0; size];
        let info = reader.next_frame(&mut data)?;
        let samples = info.color_type.samples();
        ensure!(
            info.bit_depth == png::BitDepth::Eight && samples >= 3,
            "{info:?}"
        );
        let pixels = data[..info.buffer_size()]
            .chunks_exact(samples)
            .map(|rgb| u32::from_be_bytes([0, rgb[0], rgb[1], rgb[2]]))
            .collect();
        Ok(Self {
            width: info.width,
            height: info.height,
            pixels,
        })
    }

    /// The number of pixels that differ from what was drawn, and a description of the first of them.
    pub fn wrong(&self, expected: Pattern) -> Result<(usize, String)> {
        ensure!(
            (self.width, self.height) == (expected.width, expected.height),
            "the picture is {}x{}, the screen {}x{}",
            self.width,
            self.height,
            expected.width,
            expected.height
        );
        let (mut wrong, mut first) = (0, String::new());
        for (y, row) in (0..).zip(self.pixels.chunks_exact(self.width as usize)) {
            for ((x, &pixel), drawn) in (0..).zip(row).zip(expected.row(y)) {
                if pixel & 0xff_ffff != drawn {
                    if wrong == 0 {
                        let x: u32 = x;
                        first = format!("{x},{y} is {pixel:06x} instead of {drawn:06x}");
                    }
                    wrong += 1;
                }
            }
        }
        Ok((wrong, first))
    }

    /// The position at which the drawn picture begins in this one, by its first row.
    pub fn find(&self, expected: Pattern) -> Option<(u32, u32)> {
        let wanted: Vec<u32> = expected.row(0).collect();
        (0..self.height)
            .zip(self.pixels.chunks_exact(self.width as usize))
            .find_map(|(y, row)| {
                let at = row
                    .windows(wanted.len())
                    .position(|part| part.iter().zip(&wanted).all(|(a, b)| a & 0xff_ffff == *b))?;
                Some((at as u32, y))
            })
    }

    /// A part of this picture; what lies outside of it is black.
    pub fn part(&self, start: (u32, u32), size: (u32, u32)) -> Self {
        let pixel = |x: u32, y: u32| {
            let inside = x < self.width && y < self.height;
            let index = y as usize * self.width as usize + x as usize;
            if inside {
                self.pixels[index]
            } else {
                0
            }
        };
        Self {
            width: size.0,
            height: size.1,
            pixels: (start.1..start.1 + size.1)
                .flat_map(|y| (start.0..start.0 + size.0).map(move |x| (x, y)))
                .map(|(x, y)| pixel(x, y))
                .collect(),
        }
    }

    /// Fails unless every pixel is what was drawn.
    pub fn compare(&self, expected: Pattern) -> Result<()> {
        let (wrong, first) = self.wrong(expected)?;
        if wrong != 0 {
            let all = self.pixels.len();
            bail!(
                "frame {}: {wrong} of {all} pixels are wrong; {first}",
                expected.frame
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_pixel_is_found() {
        let pattern = Pattern {
            width: 40,
            height: 30,
            frame: 2,
        };
        let mut picture = Picture {
            width: 40,
            height: 30,
            pixels: (0..30).flat_map(|y| pattern.row(y)).collect(),
        };
        picture.compare(pattern).unwrap();
        picture.pixels[77] ^= 1;
        assert_eq!(picture.wrong(pattern).unwrap().0, 1);
        assert!(picture.compare(pattern).is_err());
        assert!(picture
            .compare(Pattern {
                frame: 3,
                ..pattern
            })
            .is_err());
    }

    #[test]
    fn a_window_is_found() {
        let pattern = Pattern {
            width: 40,
            height: 30,
            frame: 2,
        };
        let mut screen = Picture {
            width: 64,
            height: 48,
            pixels: vec![0; 64 * 48],
        };
        assert_eq!(screen.find(pattern), None);
        for y in 0..30 {
            let start = (y as usize + 7) * 64 + 5;
            let row: Vec<u32> = pattern.row(y).collect();
            screen.pixels[start..start + 40].copy_from_slice(&row);
        }
        assert_eq!(screen.find(pattern), Some((5, 7)));
        screen.part((5, 7), (40, 30)).compare(pattern).unwrap();
        assert!(screen.part((6, 7), (40, 30)).compare(pattern).is_err());
    }

    #[test]
    fn ppm() {
        let picture = Picture::parse(b"P6\n2 1\n255\n\x01\x02\x03\x0a\x0b\x0c").unwrap();
        assert_eq!(picture.pixels, [0x010203, 0x0a0b0c]);
        assert!(Picture::parse(b"P6\n2 1\n255\n\x01\x02\x03\x0a\x0b").is_err());
    }
}
