// SPDX-License-Identifier: MIT OR Apache-2.0

//! Eight bars of colour, which move to the left: what libcamera's test camera shows, in NV12.

use anyhow::{ensure, Context, Result};

/// Red, green, blue of each bar.
const COLORS: [[i32; 3]; 8] = [
    [255, 255, 255],
    [255, 255, 0],
    [0, 255, 255],
    [0, 255, 0],
    [255, 0, 255],
    [255, 0, 0],
    [0, 0, 255],
    [0, 0, 0],
];

/// What conversions may differ by: they round in different places.
const LUMA_TOLERANCE: i32 = 1;
const CHROMA_TOLERANCE: i32 = 2;

/// Frames of this size.
#[derive(Clone, Copy, Debug)]
pub struct Bars {
    /// Pixels; a multiple of 16.
    pub width: usize,
    /// Pixels; even.
    pub height: usize,
}

impl Bars {
    /// Bytes of a frame.
    pub fn bytes(self) -> usize {
        self.width * self.height * 3 / 2
    }

    /// The colour of a column when the picture has moved so far.
    fn color(self, shift: usize, x: usize) -> [i32; 3] {
        COLORS[(x + shift) % self.width * COLORS.len() / self.width]
    }

    /// Compares every pixel, and returns how far the picture has moved.
    pub fn check(self, frame: &[u8]) -> Result<usize> {
        ensure!(
            frame.len() == self.bytes(),
            "{} bytes instead of {}",
            frame.len(),
            self.bytes()
        );
        let (y_plane, uv_plane) = frame.split_at(self.width * self.height);
        let shift = (0..self.width)
            .find(|&shift| self.luma_row(shift, &y_plane[..self.width]).is_ok())
            .context("the first row shows no bars")?;
        for (y, row) in y_plane.chunks_exact(self.width).enumerate() {
            self.luma_row(shift, row)
                .with_context(|| format!("row {y}"))?;
        }
        for (y, row) in uv_plane.chunks_exact(self.width).enumerate() {
            self.chroma_row(shift, row)
                .with_context(|| format!("row {y} of the colours"))?;
        }
        Ok(shift)
    }

    fn luma_row(self, shift: usize, row: &[u8]) -> Result<()> {
        for (x, &seen) in row.iter().enumerate() {
            let wanted = luma(self.color(shift, x));
            ensure!(
                (i32::from(seen) - wanted).abs() <= LUMA_TOLERANCE,
                "column {x}: expected {wanted}, seen {seen}"
            );
        }
        Ok(())
    }

    fn chroma_row(self, shift: usize, row: &[u8]) -> Result<()> {
        for (x, seen) in row.chunks_exact(2).enumerate() {
            let (left, right) = (self.color(shift, 2 * x), self.color(shift, 2 * x + 1));
            let mean = [0, 1, 2].map(|part| (left[part] + right[part] + 1) / 2);
            let wanted = chroma(mean);
            ensure!(
                seen.iter()
                    .zip(wanted)
                    .all(|(&seen, wanted)| (i32::from(seen) - wanted).abs() <= CHROMA_TOLERANCE),
                "pair {x}: expected {wanted:?}, seen {seen:?}"
            );
        }
        Ok(())
    }
}

/// BT.601, studio swing.
fn luma([red, green, blue]: [i32; 3]) -> i32 {
    ((66 * red + 129 * green + 25 * blue + 128) >> 8) + 16
}

fn chroma([red, green, blue]: [i32; 3]) -> [i32; 2] {
    [
        ((112 * blue - 74 * green - 38 * red + 128) >> 8) + 128,
        ((112 * red - 94 * green - 18 * blue + 128) >> 8) + 128,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARS: Bars = Bars {
        width: 32,
        height: 4,
    };

    fn frame(shift: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..BARS.height {
            bytes.extend((0..BARS.width).map(|x| luma(BARS.color(shift, x)) as u8));
        }
        for _ in 0..BARS.height / 2 {
            for x in 0..BARS.width / 2 {
                let (left, right) = (BARS.color(shift, 2 * x), BARS.color(shift, 2 * x + 1));
                let mean = [0, 1, 2].map(|part| (left[part] + right[part] + 1) / 2);
                bytes.extend(chroma(mean).map(|part| part as u8));
            }
        }
        bytes
    }

    #[test]
    fn white_and_black_are_known() {
        assert_eq!((luma([255; 3]), chroma([255; 3])), (235, [128, 128]));
        assert_eq!((luma([0; 3]), chroma([0; 3])), (16, [128, 128]));
    }

    #[test]
    fn frames_tell_how_far_they_moved() {
        for shift in [0, 1, 17, 31] {
            assert_eq!(BARS.check(&frame(shift)).unwrap(), shift);
        }
    }

    #[test]
    fn a_wrong_byte_anywhere_is_seen() {
        let right = frame(5);
        for at in 0..right.len() {
            let mut wrong = right.clone();
            wrong[at] ^= 0x10;
            assert!(BARS.check(&wrong).is_err(), "{at}");
        }
        assert!(BARS.check(&vec![0; BARS.bytes()]).is_err());
    }
}
