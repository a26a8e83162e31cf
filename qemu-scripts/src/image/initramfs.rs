// SPDX-License-Identifier: MIT OR Apache-2.0

//! The initramfs: the first process, its configuration, and the modules that it loads first.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::Builder;
use pinbuf_guest_init::{Config, BOOT_MODULES, CONFIG_PATH};

const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;
const FILE: u32 = 0o100644;

/// Writes an initramfs.
pub fn write(
    path: &Path,
    init: &Path,
    config: &Config,
    modules: impl Iterator<Item = impl AsRef<Path>>,
) -> Result<()> {
    let entry = |path: &str, mode: u32, contents: Vec<u8>| {
        // The kernel unpacks into its root: paths without the leading slash.
        let name = path.trim_start_matches('/');
        (Builder::new(name).mode(mode), Cursor::new(contents))
    };
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let mut entries = vec![
        entry("/dev", DIRECTORY, Vec::new()),
        entry(BOOT_MODULES, DIRECTORY, Vec::new()),
        entry("/init", PROGRAM, read(init)?),
        entry(CONFIG_PATH, FILE, serde_json::to_vec(config)?),
    ];
    for module in modules {
        let module = module.as_ref();
        let name = module
            .file_name()
            .context("module without a name")?
            .to_string_lossy();
        let path = format!("{BOOT_MODULES}/{name}");
        entries.push(entry(&path, FILE, read(module)?));
    }
    let archive = cpio::write_cpio(entries.into_iter(), Vec::new())?;
    fs::write(path, archive).with_context(|| format!("writing {}", path.display()))
}
