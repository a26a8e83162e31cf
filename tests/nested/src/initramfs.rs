// SPDX-License-Identifier: MIT OR Apache-2.0

//! The inner guest's initramfs: this program, its libraries, and kernel modules.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use cpio::newc::Builder;

/// Where the modules are, and the list of them in the order of loading.
pub const MODULES: &str = "/modules";

/// The modules that the inner guest loads.
const WANTED: &[&str] = &["virtio_gpu", "nvme"];

/// `MODULE_INIT_COMPRESSED_FILE`.
const COMPRESSED_FILE: u32 = 4;

const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;

/// The entries of an archive in the format that the kernel unpacks ("newc" of cpio).
#[derive(Default)]
struct Archive {
    entries: Vec<(Builder, Cursor<Vec<u8>>)>,
    directories: BTreeSet<PathBuf>,
}

impl Archive {
    /// Adds a file, and the directories that it is in.
    fn add(&mut self, path: &Path, contents: Vec<u8>) {
        let parents: Vec<&Path> = path.ancestors().skip(1).collect();
        for parent in parents.into_iter().rev() {
            if parent.parent().is_some() {
                self.directory(parent);
            }
        }
        self.entry(path, PROGRAM, contents);
    }

    fn directory(&mut self, path: &Path) {
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY, Vec::new());
        }
    }

    fn entry(&mut self, path: &Path, mode: u32, contents: Vec<u8>) {
        let name = path.to_string_lossy();
        let builder = Builder::new(name.trim_start_matches('/')).mode(mode);
        self.entries.push((builder, Cursor::new(contents)));
    }
}

/// Writes the archive.  `more` are modules besides the usual ones.
pub fn write(path: &Path, more: &[&str]) -> Result<()> {
    let mut archive = Archive::default();
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    for directory in ["/dev", "/proc", "/sys"] {
        archive.directory(Path::new(directory));
    }
    archive.add(Path::new("/init"), read(Path::new("/proc/self/exe"))?);
    for library in libraries()? {
        archive.add(&library, read(&library)?);
    }
    let mut order = String::new();
    for module in modules(&[WANTED, more].concat())? {
        let name = module.file_name().context("module without a name")?;
        order += &format!("{}\n", name.to_string_lossy());
        archive.add(&Path::new(MODULES).join(name), read(&module)?);
    }
    archive.add(&Path::new(MODULES).join("order"), order.into_bytes());
    let bytes = cpio::write_cpio(archive.entries.into_iter(), Vec::new())?;
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

/// What the dynamic linker loaded for this program, itself included.
fn libraries() -> Result<BTreeSet<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut paths: BTreeSet<PathBuf> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains(".so"))
        .map(PathBuf::from)
        .collect();
    ensure!(!paths.is_empty(), "no library is mapped");
    // The path that is written in the program.
    paths.insert("/lib64/ld-linux-x86-64.so.2".into());
    Ok(paths)
}

/// The files of these modules and of what they need, in the order of loading.
fn modules(names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in names {
        let output = Command::new("/usr/sbin/modprobe")
            .args(["--show-depends", "--ignore-install", name])
            .output()
            .context("running modprobe")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("modprobe --show-depends {name}: {}", said.trim_end());
        }
        for line in String::from_utf8(output.stdout)?.lines() {
            if let Some(file) = line.strip_prefix("insmod ") {
                let file = PathBuf::from(file.trim());
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
    }
    Ok(files)
}

/// The kernel that the outer guest runs, for the inner one.
pub fn kernel() -> Result<PathBuf> {
    let release = nix::sys::utsname::uname()?;
    let release = release.release().to_string_lossy().into_owned();
    let path = Path::new("/usr/lib/modules").join(release).join("vmlinuz");
    ensure!(path.exists(), "{} is missing", path.display());
    Ok(path)
}

/// Loads the modules of the initramfs.
pub fn load_modules() -> Result<()> {
    use nix::kmod::{finit_module, ModuleInitFlags};
    let order = fs::read_to_string(format!("{MODULES}/order"))?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    for name in order.lines() {
        let path = format!("{MODULES}/{name}");
        let file = fs::File::open(&path)?;
        let mut flags = ModuleInitFlags::empty();
        if !name.ends_with(".ko") {
            flags |= ModuleInitFlags::from_bits_retain(COMPRESSED_FILE);
        }
        let parameters = CString::new(parameters(name, &cmdline))?;
        match finit_module(&file, &parameters, flags) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(error) => bail!("loading {name}: {error}"),
        }
    }
    Ok(())
}

/// A module's parameters on the kernel's command line, which modprobe would pass.
fn parameters(file: &str, cmdline: &str) -> String {
    let module = file.split(".ko").next().unwrap_or(file).replace('-', "_");
    let mine = cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(&module)?.strip_prefix('.'));
    mine.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_modules() {
        let cmdline = "quiet virtio_gpu.modeset=1 drm.debug=4 virtio_gpu.x=";
        assert_eq!(parameters("virtio-gpu.ko.xz", cmdline), "modeset=1 x=");
        assert_eq!(parameters("drm.ko", cmdline), "debug=4");
        assert_eq!(parameters("gpu.ko", cmdline), "");
    }
}
