// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program written for udmabuf: makes a dma-buf of a memfd as large as a 4K framebuffer, writes
//! through the one, and reads through the other.  It prints who made the dma-buf.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::support::udmabuf::Create;
use pinbuf_test_harness::support::{udmabuf, Buffer, Memory, Sync, PAGE};

const WIDTH: usize = 3840;
const HEIGHT: usize = 2160;
const SIZE: usize = WIDTH * HEIGHT * 4;

fn main() -> Result<()> {
    let memory = udmabuf::sealed_memfd(SIZE)?;
    let pixels = Memory::shared(&memory, SIZE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let make = || -> Result<Buffer> {
        let buffer = Create::new(&memory, 0, SIZE).call(&device);
        Ok(Buffer::from_fd(buffer.context("UDMABUF_CREATE")?))
    };
    let buffer = make()?;
    ensure!(buffer.len()? == SIZE, "the buffer has another size");
    let value = |page: usize| (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for page in 0..SIZE / PAGE {
        pixels.set(page * PAGE, value(page));
    }
    let seen = buffer.map()?;
    buffer.synced(Sync::Read, || -> Result<()> {
        for page in 0..SIZE / PAGE {
            ensure!(
                seen.get(page * PAGE) == value(page),
                "page {page} is another"
            );
        }
        Ok(())
    })??;
    let fd = buffer.as_fd().as_raw_fd();
    if fs::exists("/proc/self")? {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        let exporter = text
            .lines()
            .find_map(|line| line.strip_prefix("exp_name:"))
            .context("fdinfo names no exporter")?;
        println!("{SIZE} bytes by {}", exporter.trim());
    } else {
        println!("{SIZE} bytes");
    }
    if std::env::args().any(|argument| argument == "--discard") {
        // Three pages, and no more; then two requests that change nothing.
        let discard = || -> Result<()> {
            pixels.advise(8 * PAGE, 3 * PAGE, libc::MADV_REMOVE)?;
            let other = make()?;
            eprintln!("one request later");
            drop((other, make()?));
            Ok(())
        };
        discard()?;
        // Another buffer gets the number, and loses as much.
        let number = buffer.as_fd().as_raw_fd();
        drop((seen, buffer));
        for page in 8..11 {
            pixels.set(page * PAGE, value(page));
        }
        let again = make()?;
        ensure!(again.as_fd().as_raw_fd() == number, "another number");
        discard()?;
    }
    if std::env::args().any(|argument| argument == "--hold") {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    Ok(())
}
