// SPDX-License-Identifier: MIT OR Apache-2.0

//! The initramfs: the first process, its configuration, and the modules that it loads first.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pinbuf_guest_init::{Config, BOOT_MODULES, CONFIG_PATH};

const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;
const FILE: u32 = 0o100644;

/// An archive in the format that the kernel unpacks ("newc" of cpio).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            contents.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// Writes an initramfs.
pub fn write(
    path: &Path,
    init: &Path,
    config: &Config,
    modules: impl Iterator<Item = impl AsRef<Path>>,
) -> Result<()> {
    let mut archive = Archive::default();
    archive.add("/dev", DIRECTORY, &[]);
    archive.add(BOOT_MODULES, DIRECTORY, &[]);
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    archive.add("/init", PROGRAM, &read(init)?);
    archive.add(CONFIG_PATH, FILE, &serde_json::to_vec(config)?);
    for module in modules {
        let module = module.as_ref();
        let name = module
            .file_name()
            .context("module without a name")?
            .to_string_lossy();
        archive.add(&format!("{BOOT_MODULES}/{name}"), FILE, &read(module)?);
    }
    fs::write(path, archive.finish()).with_context(|| format!("writing {}", path.display()))
}
