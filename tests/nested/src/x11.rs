// SPDX-License-Identifier: MIT OR Apache-2.0

//! An X server without a screen, for programs that want a desktop, and pictures of what it shows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::picture::Picture;

/// A display number that no other server in the guest has.
const NUMBER: u32 = 7;

/// A server that runs.
pub struct Server {
    child: Child,
    directory: PathBuf,
}

impl Server {
    /// Starts one with a screen of this size.
    pub fn start(name: &str, size: (u32, u32)) -> Result<Self> {
        let directory = Path::new("/tmp/nested").join(format!("{name}-x11"));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        let messages = fs::File::create(directory.join("messages"))?;
        let screen = format!("{}x{}x24", size.0, size.1);
        let child = Command::new("Xvfb")
            .arg(format!(":{NUMBER}"))
            .args(["-screen", "0", &screen, "-nocursor", "-nolisten", "tcp"])
            .arg("-fbdir")
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(messages.try_clone()?)
            .stderr(messages)
            .spawn()
            .context("starting Xvfb")?;
        let mut server = Self { child, directory };
        let start = Instant::now();
        while !Path::new(&format!("/tmp/.X11-unix/X{NUMBER}")).exists() {
            if let Some(status) = server.child.try_wait()? {
                let said = fs::read_to_string(server.directory.join("messages"))?;
                bail!("Xvfb ended with {status}: {said}");
            }
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "Xvfb does not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    /// The value of DISPLAY.
    pub fn display(&self) -> String {
        format!(":{NUMBER}")
    }

    /// A picture of its screen.
    pub fn picture(&self) -> Result<Picture> {
        parse(&fs::read(self.directory.join("Xvfb_screen0"))?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A killed server leaves these files.
        let _ = fs::remove_file(format!("/tmp/.X11-unix/X{NUMBER}"));
        let _ = fs::remove_file(format!("/tmp/.X{NUMBER}-lock"));
    }
}

/// Reads the format of X's window dumps, version 7, with 32 bits for each pixel.
fn parse(bytes: &[u8]) -> Result<Picture> {
    let word = |index: usize| -> Result<u32> {
        let bytes = bytes
            .get(index * 4..index * 4 + 4)
            .context("the dump is cut off")?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let [header, version, width, height] = [word(0)?, word(1)?, word(4)?, word(5)?];
    let [byte_order, bits, stride, colours] = [word(7)?, word(11)?, word(12)?, word(19)?];
    ensure!(
        (version, byte_order, bits) == (7, 0, 32),
        "version {version}, byte order {byte_order}, {bits} bits for each pixel"
    );
    let start = header as usize + colours as usize * 12;
    let rows = bytes
        .get(start..start + stride as usize * height as usize)
        .context("the dump is cut off")?;
    let pixels = rows
        .chunks_exact(stride as usize)
        .flat_map(|row| row.chunks_exact(4).take(width as usize))
        .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]))
        .collect();
    Ok(Picture {
        width,
        height,
        pixels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dumps() {
        // One colour in the table, a row of two pixels and four bytes of padding.
        let mut words = [0_u32; 25];
        for (index, word) in [
            (0, 100),
            (1, 7),
            (4, 2),
            (5, 1),
            (11, 32),
            (12, 12),
            (19, 1),
        ] {
            words[index] = word;
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        bytes.extend([0xee; 12]);
        bytes.extend([3, 2, 1, 0, 12, 11, 10, 0, 9, 9, 9, 9]);
        let picture = parse(&bytes).unwrap();
        assert_eq!((picture.width, picture.height), (2, 1));
        assert_eq!(picture.pixels, [0x010203, 0x0a0b0c]);
        assert!(parse(&bytes[..bytes.len() - 1]).is_err());
    }
}
