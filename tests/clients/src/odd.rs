// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that few programs make, by the word that names them. Each prints what became of it.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::udmabuf::{self, Create, Item, List};
use pinbuf_test_harness::support::{Memory, PAGE};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["sparse"] => sparse(),
        ["long"] => long(),
        ["openat2"] => openat2(),
        _ => bail!("sparse, long or openat2"),
    }
}

fn outcome<T>(result: nix::Result<T>) -> String {
    match result {
        Ok(_) => "made".to_owned(),
        Err(error) => format!("{error:?}"),
    }
}

/// A buffer larger than any limit, of memory that nobody has touched: prints the error, and the bytes that the file
/// has then.
fn sparse() -> Result<()> {
    const SIZE: usize = 512 << 20;
    let file = udmabuf::sealed_memfd(SIZE)?;
    let _mapping = Memory::shared(&file, SIZE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let made = Create::new(&file, 0, SIZE).call(&device);
    let stat = nix::sys::stat::fstat(&file)?;
    println!("{} {}", outcome(made), stat.st_blocks * 512);
    Ok(())
}

/// The longest list there may be, of parts that do not join, and then a request of one page.
fn long() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let item = Item {
        memfd: file.as_fd().as_raw_fd() as u32,
        pad: 0,
        offset: 0,
        size: PAGE as u64,
    };
    let list = List::new(std::iter::repeat_n(item, 1 << 20));
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    println!("{}", outcome(list.call(&device)));
    println!("{}", outcome(Create::new(&file, 0, PAGE).call(&device)));
    Ok(())
}

#[repr(C)]
struct How {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// How `/dev/udmabuf` may be found. Prints a line for each way.
fn openat2() -> Result<()> {
    let root = nix::fcntl::open(
        "/tmp",
        nix::fcntl::OFlag::O_PATH,
        nix::sys::stat::Mode::empty(),
    )?;
    let plain = How {
        flags: libc::O_RDWR as u64,
        mode: 0,
        resolve: 0,
    };
    let (size, flags) = (size_of::<How>(), plain.flags);
    for (how, size) in [
        (How { ..plain }, size),
        // The path is absolute.
        (
            How {
                resolve: libc::RESOLVE_BENEATH,
                ..plain
            },
            size,
        ),
        // There is none in that directory.
        (
            How {
                resolve: libc::RESOLVE_IN_ROOT,
                ..plain
            },
            size,
        ),
        // No flag that the kernel knows.
        (
            How {
                flags: flags | 1 << 40,
                ..plain
            },
            size,
        ),
        // A mode without a file to be created.
        (
            How {
                mode: 0o600,
                ..plain
            },
            size,
        ),
        (How { ..plain }, 8),
    ] {
        let path = c"/dev/udmabuf";
        // SAFETY: a terminated string, and a struct of at least that size.
        let opened = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size,
            )
        });
        ensure!(opened != Ok(-1));
        println!("{}", outcome(opened));
    }
    Ok(())
}
