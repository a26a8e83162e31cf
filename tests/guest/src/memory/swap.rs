// SPDX-License-Identifier: MIT OR Apache-2.0

//! Swap and a disk file system, each on compressed memory (zram).

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount, MsFlags};

use crate::frames::{entries, Entry};
use crate::holders::modprobe;
use pinbuf_test_harness::support::kernel::vmstat;
use pinbuf_test_harness::support::{check, kernel, processor, Memory, PAGE};

/// A block device in memory.
#[derive(Debug)]
struct Zram(i64);

impl Zram {
    fn new(bytes: usize) -> Result<Self> {
        if !Path::new("/sys/class/zram-control").exists() {
            modprobe(&["zram", "num_devices=0"])?;
        }
        // Reading makes one.
        let zram = Self(kernel::number("/sys/class/zram-control/hot_add")?);
        kernel::write(format!("/sys/block/zram{}/disksize", zram.0), bytes)?;
        Ok(zram)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.0))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        if let Err(error) = kernel::write("/sys/class/zram-control/hot_remove", self.0) {
            eprintln!("{error:#}");
        }
    }
}

fn run(program: &str, arguments: &[&str], device: &Path) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .arg(device)
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Swap space, for as long as the value lives.
#[derive(Debug)]
pub struct Swap {
    path: CString,
    _zram: Zram,
}

impl Swap {
    /// Switches this number of bytes of it on.
    pub fn on(bytes: usize) -> Result<Self> {
        let zram = Zram::new(bytes)?;
        run("mkswap", &[], &zram.path())?;
        let path = CString::new(zram.path().to_string_lossy().as_bytes())?;
        // SAFETY: the path is a string that ends with a zero byte.
        Errno::result(unsafe { libc::swapon(path.as_ptr(), 0) }).context("swapon")?;
        Ok(Self { path, _zram: zram })
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: the path is a string that ends with a zero byte.
        if let Err(error) = Errno::result(unsafe { libc::swapoff(self.path.as_ptr()) }) {
            eprintln!("swapoff: {error}");
        }
    }
}

/// Swap space on a loop device, from which pages are read through the swap cache, where they stay.
#[derive(Debug)]
pub struct SlowSwap {
    path: CString,
    _file: std::fs::File,
}

impl SlowSwap {
    /// Switches this number of bytes of it on.
    pub fn on(bytes: usize) -> Result<Self> {
        modprobe(&["loop"])?;
        let name = Path::new("/dev/shm").join(format!("pinbuf-swap-{}", std::process::id()));
        let file = std::fs::File::create(&name)?;
        // All of it is there, as a read of a hole would be quick.
        file.set_len(bytes as u64)?;
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&name)
            .output()
            .context("running losetup")?;
        std::fs::remove_file(&name)?;
        if !output.status.success() {
            bail!("losetup: {}", String::from_utf8_lossy(&output.stderr));
        }
        let device = String::from_utf8(output.stdout)?.trim().to_owned();
        run("mkswap", &[], Path::new(&device))?;
        let path = CString::new(device)?;
        // SAFETY: the path is a string that ends with a zero byte.
        Errno::result(unsafe { libc::swapon(path.as_ptr(), 0) }).context("swapon")?;
        Ok(Self { path, _file: file })
    }
}

impl Drop for SlowSwap {
    fn drop(&mut self) {
        // SAFETY: the path is a string that ends with a zero byte.
        if let Err(error) = Errno::result(unsafe { libc::swapoff(self.path.as_ptr()) }) {
            eprintln!("swapoff: {error}");
        }
        let device = self.path.to_string_lossy().into_owned();
        if let Err(error) = run("losetup", &["--detach"], Path::new(&device)) {
            eprintln!("{error:#}");
        }
    }
}

/// How many pages of some memory are resident, as `mincore` reports it for page cache and memory.
pub fn resident(memory: &Memory) -> Result<usize> {
    let mut pages = vec![0u8; memory.len() / PAGE];
    // SAFETY: the vector has a byte for each page of the mapping.
    let result =
        unsafe { libc::mincore(memory.at(0).cast(), memory.len(), pages.as_mut_ptr().cast()) };
    Errno::result(result).context("mincore")?;
    Ok(pages.iter().filter(|page| **page & 1 != 0).count())
}

/// Moves all pages to where advice reaches them. One that has just come, or been given up, waits with
/// some others on a list of the processor where that happened (`cpu_fbatches`), with a reference;
/// advice empties the list of its own processor only, and the scheduler may have moved the program.
fn settle() -> Result<()> {
    let other = Memory::anonymous(PAGE)?;
    processor::on_each(|| Ok(other.advise(0, PAGE, libc::MADV_PAGEOUT)?))
}

/// Asks for all of some memory to be paged out.
pub fn page_out(memory: &Memory) -> Result<()> {
    settle()?;
    Ok(memory.advise(0, memory.len(), libc::MADV_PAGEOUT)?)
}

/// Allows the kernel to drop what all of some memory holds.
pub fn give_up(memory: &Memory) -> Result<()> {
    settle()?;
    memory.advise(0, memory.len(), libc::MADV_FREE)?;
    settle()
}

/// Forces all of some memory out, and proves that it went.
pub fn force_out(memory: &Memory) -> Result<()> {
    let before = vmstat("pswpout")?;
    let pages = memory.len() / PAGE;
    for _ in 0..20 {
        page_out(memory)?;
        let present = entries(memory, 0, memory.len())?
            .iter()
            .filter(|entry| matches!(entry, Entry::Present(_)))
            .count();
        if present == 0 && resident(memory)? == 0 {
            let out = vmstat("pswpout")? - before;
            check!(
                out >= pages as i64,
                "{out} of {pages} pages were written to swap, the others dropped"
            );
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    bail!("{} of {pages} pages stay in memory", resident(memory)?)
}

/// A directory on ext4.
#[derive(Debug)]
pub struct Ext4 {
    directory: PathBuf,
    _zram: Zram,
}

impl Ext4 {
    /// Makes a file system of 64 MiB.
    pub fn new() -> Result<Self> {
        let zram = Zram::new(64 << 20)?;
        run("mke2fs", &["-q", "-t", "ext4"], &zram.path())?;
        let directory = std::env::temp_dir().join(format!("pinbuf-ext4-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        mount(
            Some(&zram.path()),
            &directory,
            Some("ext4"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("mounting ext4")?;
        Ok(Self {
            directory,
            _zram: zram,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        if let Err(error) = umount(&self.directory) {
            eprintln!("unmounting ext4: {error}");
        }
        let _ = std::fs::remove_dir(&self.directory);
    }
}
