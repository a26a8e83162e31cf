// SPDX-License-Identifier: MIT OR Apache-2.0

//! A kernel that guests boot and that modules are built for.

mod debug;
mod layout;
pub mod module;
mod stock;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use pinbuf_guest_init::Sharing;

use crate::cache::{self, Key};
use crate::debian::arch::Arch;
use crate::debian::archive::{self, Stock};
use crate::debian::tree::{Tree, BUILD};
use crate::ui::Step;
use crate::{image, paths};

use self::layout::{directory, modules};

/// What a guest needs of the kernel before its root is there: disks, and the root.  (What a kernel
/// has built in is left out.)
const BOOT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "ext4",
    "overlay",
];

/// How directories can be shared, best first, and the modules for it.
const SHARING: &[(Sharing, &[&str])] = &[
    (Sharing::NineP, &["9pnet_virtio", "9p"]),
    (Sharing::VirtioFs, &["virtiofs"]),
];

/// A kernel that can be booted.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What `uname -r` says.
    pub release: String,
    /// What it runs on.
    pub arch: Arch,
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    Stock(Stock),
    Debug(Stock),
}

impl Kernel {
    /// Finds the kernel that a selector means, and makes ready what booting it takes.
    pub fn select(tools: &Tree, selector: &str) -> Result<Self> {
        tools.refresh_lists(false)?;
        let arch = archive::arch(selector);
        tools.require_arch(arch)?;
        let stocks = archive::kernels(tools, arch)?;
        let kernel = match selector.strip_prefix("debug") {
            Some(series) if series.is_empty() || series.starts_with('-') => {
                let series = series.strip_prefix('-').unwrap_or("default");
                if !arch.is_native() {
                    bail!(
                        "the debug kernel is built for {} only",
                        Arch::Amd64.debian()
                    );
                }
                let stock = archive::select(&stocks, series)?;
                debug::ensure(tools, stock)?;
                let origin = Origin::Debug(stock.clone());
                Self {
                    release: debug::release(stock),
                    arch,
                    origin,
                }
            }
            _ => {
                let stock = archive::select(&stocks, selector)?;
                stock::ensure(tools, stock)?;
                Self {
                    release: stock.release.clone(),
                    arch,
                    origin: Origin::Stock(stock.clone()),
                }
            }
        };
        let release = &kernel.release;
        let key = Key::new()
            .text("1")
            .text(&kernel.stamp()?)
            .texts(BOOT_MODULES)
            .text(&format!("{SHARING:?}"));
        let title = format!("making {release} bootable");
        cache::ensure(&format!("bootable/{release}"), &title, key, |step| {
            make_bootable(tools, step, release)
        })?;
        Ok(kernel)
    }

    /// Changes when the kernel's files do.
    pub fn stamp(&self) -> Result<String> {
        let path = paths::build().join("stamps/kernel").join(&self.release);
        fs::read_to_string(path).context("the kernel's stamp")
    }

    /// Where this kernel's files are.
    pub fn directory(&self) -> PathBuf {
        directory(&self.release)
    }

    /// The size of a page, in KiB.
    pub fn page(&self) -> Result<u32> {
        if self.arch.is_native() {
            return Ok(4);
        }
        let config = modules(&self.directory().join("root"), &self.release).join("config");
        let config =
            fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
        let shift = config
            .lines()
            .find_map(|line| line.strip_prefix("CONFIG_PAGE_SHIFT="))
            .context("the kernel's configuration has no CONFIG_PAGE_SHIFT")?;
        Ok(1 << (shift.parse::<u32>()? - 10))
    }

    /// The compressed kernel.
    pub fn vmlinuz(&self) -> PathBuf {
        let directory = modules(&self.directory().join("root"), &self.release);
        // Packages that Debian has not signed yet call it so.
        let unsigned = directory.join("vmlinuz.unsigned");
        if unsigned.exists() {
            unsigned
        } else {
            directory.join("vmlinuz")
        }
    }

    /// The file system with the kernel's modules.
    pub fn image(&self) -> PathBuf {
        self.directory().join("modules.img")
    }

    /// The modules that a guest loads before its root is there, in the order of loading.
    pub fn boot_modules(&self) -> Result<Vec<PathBuf>> {
        let directory = self.directory().join("boot-modules");
        let order = fs::read_to_string(directory.join("order")).context("list of boot modules")?;
        Ok(order.lines().map(|name| directory.join(name)).collect())
    }

    /// How this kernel can share a directory with the host.
    pub fn sharing(&self) -> Result<Sharing> {
        let directory = self.directory().join("boot-modules");
        let text = fs::read_to_string(directory.join("sharing")).context("way of sharing")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Makes the tree that modules are built in. Returns the arguments of `make` (inside of the tree of tools)
    /// that choose it, and a key that changes when the tree does.
    pub fn build_tree(&self, tools: &Tree) -> Result<(Vec<String>, Key)> {
        match &self.origin {
            Origin::Stock(stock) => stock::build_tree(tools, stock),
            Origin::Debug(stock) => debug::build_tree(stock),
        }
    }
}

/// From a kernel's `root/` with its modules, makes what booting takes: the lists that modprobe
/// reads, an image of the modules, and those that the initramfs holds.
fn make_bootable(tools: &Tree, step: &Step, release: &str) -> Result<()> {
    let directory = directory(release);
    let inside = format!("{BUILD}/kernels/{release}");
    let root = directory.join("root");
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
    }
    step.run(
        &mut tools.command(&["depmod", "-b", &format!("{inside}/root"), release])?,
        "kernels.log",
    )?;

    let boot = directory.join("boot-modules");
    crate::debian::tree::remove(&boot)?;
    fs::create_dir_all(&boot)?;
    let mut order = String::new();
    let (order_of_loading, sharing) = load_order(&modules(&root, release))?;
    fs::write(boot.join("sharing"), serde_json::to_string(&sharing)?)?;
    for module in order_of_loading {
        let name = Path::new(&module)
            .file_name()
            .context("module without a name")?;
        let name = name.to_str().context("module's name is not UTF-8")?;
        let plain = name.split_inclusive(".ko").next().unwrap_or(name);
        let unpack = match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("xz") => "xz -dc",
            Some("zst") => "zstd -dc",
            Some("gz") => "gzip -dc",
            _ => "cat",
        };
        let script =
            format!("{unpack} {inside}/root/usr/lib/modules/{release}/{module} >{inside}/boot-modules/{plain}");
        step.run(&mut tools.command(&["sh", "-c", &script])?, "kernels.log")?;
        order += &format!("{plain}\n");
    }
    fs::write(boot.join("order"), order)?;
    image::pack(tools, step, &root, &directory.join("modules.img"))
}

/// The files of the boot modules and of what they depend on, in the order of loading; and how a
/// directory can be shared.
fn load_order(modules: &Path) -> Result<(Vec<String>, Sharing)> {
    let read = |name: &str| {
        fs::read_to_string(modules.join(name)).with_context(|| format!("reading {name}"))
    };
    let dependencies = read("modules.dep")?;
    let builtin: BTreeSet<String> = read("modules.builtin")?.lines().map(module_name).collect();
    let line_of = |wanted: &str| {
        dependencies.lines().find_map(|line| {
            let (file, needs) = line.split_once(':')?;
            (module_name(file) == module_name(wanted)).then_some((file, needs))
        })
    };
    let is_there = |name: &&str| builtin.contains(&module_name(name)) || line_of(name).is_some();
    if let Some(missing) = BOOT_MODULES.iter().find(|name| !is_there(name)) {
        bail!("this kernel has no {missing}, without which guests cannot boot");
    }
    let Some((sharing, shares)) = SHARING
        .iter()
        .find(|(_, names)| names.iter().all(&is_there))
    else {
        bail!("this kernel has neither 9p nor virtiofs: guests cannot share a directory with it");
    };
    let mut order: Vec<String> = Vec::new();
    for wanted in BOOT_MODULES.iter().chain(*shares).chain(&["virtio_rng"]) {
        let Some((file, needs)) = line_of(wanted) else {
            continue;
        };
        // modules.dep lists what is needed last first.
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.iter().any(|found| found == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok((order, *sharing))
}

/// `kernel/fs/9p/9p.ko.xz` is `9p`; dashes and underscores are the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_modules() {
        assert_eq!(module_name("kernel/fs/9p/9p.ko.xz"), "9p");
        assert_eq!(module_name("kernel/drivers/a-b.ko"), "a_b");
        assert_eq!(module_name("virtio_pci"), "virtio_pci");
    }

    #[test]
    fn modules_load_after_what_they_need() {
        let directory = tempfile::tempdir().unwrap();
        let builtin = "kernel/virtio_pci.ko\nkernel/virtio_console.ko\nkernel/virtio_rng.ko\n\
                       kernel/virtio_blk.ko\nkernel/overlay.ko\n";
        fs::write(directory.path().join("modules.builtin"), builtin).unwrap();
        let dependencies = "k/ext4.ko.xz: k/jbd2.ko.xz k/mbcache.ko.xz\nk/jbd2.ko.xz:\n\
                            k/9p.ko: k/netfs.ko k/9pnet.ko\nk/9pnet_virtio.ko: k/9pnet.ko\n";
        fs::write(directory.path().join("modules.dep"), dependencies).unwrap();
        let (order, sharing) = load_order(directory.path()).unwrap();
        assert_eq!(sharing, Sharing::NineP);
        assert_eq!(
            order,
            [
                "k/mbcache.ko.xz",
                "k/jbd2.ko.xz",
                "k/ext4.ko.xz",
                "k/9pnet.ko",
                "k/9pnet_virtio.ko",
                "k/netfs.ko",
                "k/9p.ko"
            ]
        );
    }

    #[test]
    fn without_9p_there_is_virtiofs() {
        let directory = tempfile::tempdir().unwrap();
        let mut builtin = String::new();
        for name in BOOT_MODULES {
            builtin += &format!("kernel/{name}.ko\n");
        }
        fs::write(directory.path().join("modules.dep"), "").unwrap();
        fs::write(directory.path().join("modules.builtin"), &builtin).unwrap();
        assert!(load_order(directory.path()).is_err());
        builtin += "kernel/fs/fuse/virtiofs.ko\n";
        fs::write(directory.path().join("modules.builtin"), &builtin).unwrap();
        assert_eq!(load_order(directory.path()).unwrap().1, Sharing::VirtioFs);
    }
}
