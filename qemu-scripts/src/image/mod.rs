// SPDX-License-Identifier: MIT OR Apache-2.0

//! The file systems that guests run on: read-only layers, which the guest joins to its root.

mod foreign;
pub mod initramfs;
mod jay;
pub mod payload;
pub mod userspace;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Result};
use walkdir::WalkDir;

use crate::cache::{self, Key};
use crate::debian::arch::Arch;
use crate::debian::tree::{inside, Suite, Tree};
use crate::paths;
use crate::ui::Step;

/// The images that guests can run on: a name, the release, and the packages beyond a minimal Debian system.
const IMAGES: &[(&str, Suite, &[&str])] = &[
    (
        "base",
        Suite::Stable,
        &[
            "e2fsprogs",
            "iproute2",
            "kmod",
            "make",
            "procps",
            "psmisc",
            "strace",
            "udev",
            "util-linux",
        ],
    ),
    (
        // For virtual machines inside of the guest.
        "qemu",
        Suite::Stable,
        &[
            "e2fsprogs",
            "iproute2",
            "kmod",
            // The Mesa of trixie crashes in QEMU when it imports a dma-buf.
            "libegl-mesa0/trixie-backports",
            "libegl1",
            "libgbm1/trixie-backports",
            "libgl1-mesa-dri/trixie-backports",
            "libglx-mesa0/trixie-backports",
            "mesa-libgallium/trixie-backports",
            "ovmf",
            "procps",
            "psmisc",
            "qemu-system-gui",
            "qemu-system-x86",
            "qemu-system-modules-opengl",
            "qemu-system-modules-spice",
            "qemu-utils",
            "socat",
            "strace",
            "udev",
            "util-linux",
            "xvfb",
        ],
    ),
    (
        // The same with the next QEMU.
        "qemu-next",
        Suite::Stable,
        &[
            "e2fsprogs",
            "iproute2",
            "kmod",
            "libegl-mesa0/trixie-backports",
            "libegl1",
            "libgbm1/trixie-backports",
            "libgl1-mesa-dri/trixie-backports",
            "libglx-mesa0/trixie-backports",
            "mesa-libgallium/trixie-backports",
            "procps",
            "psmisc",
            "qemu-system-common/trixie-backports",
            "qemu-system-data/trixie-backports",
            "qemu-system-gui/trixie-backports",
            "qemu-system-modules-opengl/trixie-backports",
            "qemu-system-modules-spice/trixie-backports",
            "qemu-system-x86/trixie-backports",
            "seabios/trixie-backports",
            "strace",
            "udev",
            "util-linux",
            "xvfb",
        ],
    ),
    (
        // Programs that use udmabuf, for `tests/clients`.
        "clients",
        Suite::Stable,
        &[
            "apparmor",
            "bubblewrap",
            // Programs that the shim cannot reach: a static one, Go's, a 32-bit library that runs.
            "busybox-static",
            // Of podman's runtimes, the one that keeps a user's groups.
            "crun",
            "gosu",
            "kmod",
            "libc6-i386",
            // Of trixie, its virtual camera does not say how long frames are.
            "libcamera-tools/trixie-backports",
            "libcamera-v4l2/trixie-backports",
            "libcap2-bin",
            "libvulkan1",
            "mesa-vulkan-drivers",
            "podman",
            "procps",
            "qemu-system-x86",
            // Compiles the policy for SELinux.
            "secilc",
            "udev",
            "uidmap",
            "util-linux",
        ],
    ),
    (
        // Programs that use udmabuf in Debian's newest release only, for `tests/clients`.
        "programs",
        Suite::Testing,
        &[
            "gstreamer1.0-gl",
            "gstreamer1.0-plugins-bad",
            "gstreamer1.0-plugins-base",
            "gstreamer1.0-tools",
            "gtk-4-tests",
            "kmod",
            "kwin-wayland",
            "libcap2-bin",
            "libgtk-4-bin",
            "procps",
            "strace",
            "udev",
            "util-linux",
            "weston",
        ],
    ),
    (
        // What the compositor Jay is linked with or loads; `jay.rs` builds it. Its tests draw text.
        "jay",
        Suite::Testing,
        &[
            "fonts-dejavu-core",
            "kmod",
            "libcairo2",
            "libfontconfig1",
            "libgbm1",
            "libglib2.0-0t64",
            "libinput10",
            "libpangocairo-1.0-0",
            "libsqlite3-0",
            "procps",
            "strace",
            "udev",
            "util-linux",
        ],
    ),
    (
        // Virtual machines that libvirt runs, confined as Debian confines them.
        "libvirt",
        Suite::Stable,
        &[
            "apparmor",
            "iproute2",
            "kmod",
            "libvirt-clients",
            "libvirt-daemon",
            "libvirt-daemon-common",
            "libvirt-daemon-driver-qemu",
            "procps",
            "psmisc",
            "qemu-system-x86",
            "udev",
            "util-linux",
        ],
    ),
];

/// The package that an image for another architecture has in the place of one of these, if there is one.
fn of_arch(package: &'static str, arch: Arch) -> Option<&'static str> {
    match (arch, package) {
        (Arch::Arm64, "qemu-system-x86") => Some("qemu-system-arm"),
        // 32-bit programs come along, statically linked.
        (Arch::Arm64, "libc6-i386") => None,
        _ => Some(package),
    }
}

/// What images leave out.
const LEFT_OUT: &[&str] = &[
    "var/lib/apt/lists",
    "var/cache/apt",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
];

/// Makes the image of this name for an architecture, and returns its path.
pub fn ensure(tools: &Tree, name: &str, arch: Arch) -> Result<PathBuf> {
    let Some((_, suite, packages)) = IMAGES.iter().find(|(found, ..)| *found == name) else {
        let names: Vec<&str> = IMAGES.iter().map(|(name, ..)| *name).collect();
        bail!(
            "there is no image `{name}`; use one of: {}",
            names.join(", ")
        );
    };
    let packages: Vec<&str> = packages
        .iter()
        .filter_map(|name| of_arch(name, arch))
        .collect();
    let base = name;
    let name = &format!("{name}{}", arch.suffix());
    let tree_name = format!("guest-{name}");
    let tree = if arch.is_native() {
        Tree::of_suite(*suite, &tree_name, &packages)?
    } else {
        Tree::foreign(tools, &tree_name, &packages, arch)?
    };
    let stamp = fs::read_to_string(paths::build().join("stamps/tree").join(tree_name))?;
    let image = paths::build().join(format!("images/{name}.img"));
    let mut key = Key::new().text("1").text(&stamp);
    // What is not Debian's.
    let built = match base {
        "clients" => Some(foreign::ensure(tools, arch)?),
        "jay" => Some(jay::ensure()?),
        _ => None,
    };
    if let Some(programs) = &built {
        key = key.files(programs)?;
    }
    cache::ensure(
        &format!("image/{name}"),
        &format!("guest image `{name}`"),
        key,
        |step| {
            for path in LEFT_OUT {
                crate::debian::tree::remove(&tree.path.join(path))?;
            }
            if let Some(programs) = &built {
                let mut copy = Command::new("cp");
                copy.arg("-a").arg(programs.join(".")).arg(&tree.path);
                step.run(&mut copy, "images.log")?;
            }
            pack(tools, step, &tree.path, &image)
        },
    )?;
    Ok(image)
}

/// Makes an ext4 file system of everything below a directory.  Both are inside of `build/`.
pub fn pack(tools: &Tree, step: &Step, directory: &Path, image: &Path) -> Result<()> {
    let mut bytes: u64 = 0;
    let mut inodes: u64 = 0;
    for entry in WalkDir::new(directory) {
        let entry = entry?;
        bytes += entry.metadata()?.len().next_multiple_of(4096);
        inodes += 1;
    }
    // Room for the file system's own structures.
    let blocks = (bytes + bytes / 16 + inodes * 512 + (8 << 20)) / 4096;
    let new = image.with_extension("new");
    crate::debian::tree::remove(&new)?;
    if let Some(parent) = image.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut command = tools.command(&[
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-O",
        "^has_journal,^metadata_csum",
        "-N",
        &(inodes + 64).to_string(),
        "-d",
        &inside(directory)?,
        &inside(&new)?,
        &blocks.to_string(),
    ])?;
    step.run(&mut command, "images.log")?;
    fs::rename(&new, image)?;
    Ok(())
}
