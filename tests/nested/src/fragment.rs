// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory whose free pages are not adjacent.

use std::fs::File;
use std::io::Write;

use anyhow::Result;
use nix::fcntl::{fcntl, FcntlArg};

const PAGE: usize = 4096;

/// The capacity of a pipe, in bytes.
const PIPE: usize = 1 << 20;

/// Memory that stays allocated, so that the freed pages are not adjacent.
#[derive(Debug)]
pub struct Held {
    /// The number of pages that were freed.
    pub freed: u64,
    _pipes: Vec<(File, File)>,
}

/// Allocates this number of bytes page by page, and then frees every other page.
///
/// These are pages of pipes: the kernel cannot move them to make contiguous memory, and allocates the pages of
/// a screen from the same lists.
pub fn fragment(size: usize) -> Result<Held> {
    let (mut kept, mut given_up) = (Vec::new(), Vec::new());
    for _ in 0..size / PIPE / 2 {
        kept.push(pipe()?);
        given_up.push(pipe()?);
    }
    let mut freed = 0;
    for ((_, stays), (_, goes)) in kept.iter_mut().zip(&mut given_up) {
        for _ in 0..PIPE / PAGE {
            stays.write_all(&[1; PAGE])?;
            goes.write_all(&[2; PAGE])?;
            freed += 1;
        }
    }
    drop(given_up);
    Ok(Held {
        freed,
        _pipes: kept,
    })
}

/// A pipe for [`PIPE`] bytes: where it is read, where it is written.
fn pipe() -> Result<(File, File)> {
    let (read, write) = nix::unistd::pipe()?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE as i32))?;
    Ok((read.into(), write.into()))
}
