// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VNC client that reads the screen, with the parts of RFB 3.8 that this needs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use crate::picture::Picture;

/// The encodings that this understands: raw, and a change of the screen's size.
const RAW: i32 = 0;
const DESKTOP_SIZE: i32 = -223;

/// A connection.
pub struct Vnc {
    stream: UnixStream,
    picture: Picture,
}

impl Vnc {
    /// Connects without a password.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("connecting to QEMU's VNC server")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut vnc = Self {
            stream,
            picture: Picture {
                width: 0,
                height: 0,
                pixels: Vec::new(),
            },
        };
        let version: [u8; 12] = vnc.read()?;
        ensure!(version.starts_with(b"RFB 003.008"), "{version:?}");
        vnc.stream.write_all(b"RFB 003.008\n")?;
        let [count] = vnc.read()?;
        let mut kinds = vec![0; count.into()];
        vnc.stream.read_exact(&mut kinds)?;
        ensure!(kinds.contains(&1), "a password is wanted: {kinds:?}");
        vnc.stream.write_all(&[1])?;
        ensure!(vnc.read()? == [0; 4], "refused");
        // Shared with other clients.
        vnc.stream.write_all(&[1])?;
        let [width, height] = [vnc.short()?, vnc.short()?];
        let _format: [u8; 16] = vnc.read()?;
        let name_length = u32::from_be_bytes(vnc.read()?);
        let mut name = vec![0; name_length as usize];
        vnc.stream.read_exact(&mut name)?;
        vnc.resize(width, height);
        // 32 bits for each pixel, 24 of them used, little-endian, red at bit 16.
        vnc.stream.write_all(&[
            0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0,
        ])?;
        let mut encodings = vec![2, 0, 0, 2];
        encodings.extend(RAW.to_be_bytes());
        encodings.extend(DESKTOP_SIZE.to_be_bytes());
        vnc.stream.write_all(&encodings)?;
        Ok(vnc)
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("VNC")?;
        Ok(bytes)
    }

    fn short(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.read()?))
    }

    fn resize(&mut self, width: u16, height: u16) {
        self.picture = Picture {
            width: width.into(),
            height: height.into(),
            pixels: vec![0; usize::from(width) * usize::from(height)],
        };
    }

    /// Requests the whole screen, and reads the answer.
    pub fn picture(&mut self) -> Result<&Picture> {
        let (width, height) = (self.picture.width as u16, self.picture.height as u16);
        let mut request = vec![3, 0, 0, 0, 0, 0];
        request.extend(width.to_be_bytes());
        request.extend(height.to_be_bytes());
        self.stream.write_all(&request)?;
        loop {
            let [kind] = self.read()?;
            match kind {
                0 => break,
                // A bell.
                2 => {}
                other => bail!("VNC message {other}"),
            }
        }
        let _padding: [u8; 1] = self.read()?;
        for _ in 0..self.short()? {
            let [x, y, width, height] =
                [self.short()?, self.short()?, self.short()?, self.short()?];
            match i32::from_be_bytes(self.read()?) {
                RAW => self.rectangle(x.into(), y.into(), width.into(), height.into())?,
                DESKTOP_SIZE => self.resize(width, height),
                other => bail!("VNC encoding {other}"),
            }
        }
        Ok(&self.picture)
    }

    fn rectangle(&mut self, x: usize, y: usize, width: usize, height: usize) -> Result<()> {
        let all = self.picture.width as usize;
        ensure!(
            x + width <= all && y + height <= self.picture.height as usize,
            "a rectangle outside of the screen"
        );
        let mut bytes = vec![0; width * 4];
        for row in y..y + height {
            self.stream.read_exact(&mut bytes)?;
            let pixels = &mut self.picture.pixels[row * all + x..][..width];
            for (pixel, bytes) in pixels.iter_mut().zip(bytes.chunks_exact(4)) {
                *pixel = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
            }
        }
        Ok(())
    }
}
