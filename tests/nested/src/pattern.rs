// SPDX-License-Identifier: MIT OR Apache-2.0

//! The picture as a function of place and time, which both sides compute.

/// White, yellow, cyan, green, magenta, red, blue, grey.
const BARS: [u32; 8] = [
    0xf8f8f8, 0xf8f800, 0x00f8f8, 0x00f800, 0xf800f8, 0xf80000, 0x0000f8, 0x505050,
];

/// The low three bits of each colour. They differ between places and between frames, so that a page that is stale or
/// of another buffer is noticed.
const NOISE: u32 = 0x070707;

/// A picture: its size and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// The number of the frame.
    pub frame: u32,
}

impl Pattern {
    /// The pixels of a row, 0x00RRGGBB: colour bars, a grey ramp that moves below them, a box that
    /// moves over both, and noise everywhere.
    pub fn row(self, y: u32) -> impl Iterator<Item = u32> {
        let Self {
            width,
            height,
            frame,
        } = self;
        let side = (height / 8).max(1);
        let left = frame.wrapping_mul(width / 20 + 1) % width.saturating_sub(side).max(1);
        let top = frame.wrapping_mul(height / 15 + 1) % height.saturating_sub(side).max(1);
        let ramp = y >= height / 4 * 3;
        let in_box = y >= top && y < top + side;
        (0..width).map(move |x| {
            let plain = if in_box && x >= left && x < left + side {
                0xf88020
            } else if ramp {
                let grey = (x + frame * 24) / 4 % 256;
                grey << 16 | grey << 8 | grey
            } else {
                BARS[(x * 8 / width) as usize]
            };
            plain & !NOISE | noise(x, y, frame) & NOISE
        })
    }
}

fn noise(x: u32, y: u32, frame: u32) -> u32 {
    let mut value = x
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(y.wrapping_mul(0x85eb_ca6b))
        .wrapping_add(frame.wrapping_mul(0xc2b2_ae35));
    value ^= value >> 15;
    value = value.wrapping_mul(0x2c1b_3c6d);
    value ^ value >> 13
}

/// The 64-bit words that a disk holds from this byte on.
pub fn fill(words: &mut [u64], seed: u64, offset: u64) {
    for (word, number) in words.iter_mut().zip(offset / 8..) {
        *word = (number ^ seed << 40)
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_every_frame_differs() {
        let rows = |frame, y| {
            let pattern = Pattern {
                width: 1920,
                height: 1080,
                frame,
            };
            pattern.row(y).collect::<Vec<u32>>()
        };
        assert_eq!(rows(3, 5), rows(3, 5));
        for y in 0..1080 {
            let differ = rows(1, y)
                .iter()
                .zip(rows(2, y))
                .filter(|(a, b)| **a != *b)
                .count();
            assert!(differ > 1600, "row {y}: {differ}");
        }
        assert_ne!(rows(1, 7), rows(1, 8));
    }
}
