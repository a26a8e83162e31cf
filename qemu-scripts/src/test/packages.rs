// SPDX-License-Identifier: MIT OR Apache-2.0

//! `packages`: the Debian packages, on a machine that firmware, GRUB and systemd start from its disk.
//!
//! `packaging/build-deb` builds them in two versions. They are installed and purged in a Debian tree,
//! then on a disk made of that tree, step by step: `tests/packages/run` has what happens in each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use super::ktap::{self, Report};
use crate::cache::{lock, Key};
use crate::debian::arch::Arch;
use crate::debian::archive::{self, Stock};
use crate::debian::tree::{inside, remove, Tree};
use crate::guest::{qemu, watch};
use crate::paths;
use crate::ui::{say, seconds, step, tail, Step};

/// What the machine has, beside its kernels. The packages that `pinbuf-dkms` depends on are among them,
/// since the guest has no network.
const PACKAGES: &[&str] = &[
    "acl",
    "apparmor",
    "bash-completion",
    "bc",
    "bindgen",
    "bison",
    "dbus",
    "dkms",
    "dwarves",
    "fish",
    "flex",
    "gcc-14",
    "grub-efi-amd64-bin",
    "grub-efi-amd64-signed",
    "grub2-common",
    "initramfs-tools",
    "kmod",
    "libc6-dev",
    "libclang-19-dev",
    "libelf-dev",
    "libpam-systemd",
    "libssl-dev",
    "linux-base/trixie-backports",
    "login",
    "make",
    "mokutil",
    "pkgconf",
    "procps",
    "python3",
    "rust-src",
    "rustc",
    "shim-signed",
    "systemd-sysv",
    "udev",
    "xz-utils",
    "zsh",
    "zstd",
];

/// What makes disks and firmware.
const DISK_TOOLS: &[&str] = &[
    "dosfstools",
    "fdisk",
    "mtools",
    "ovmf",
    "python3-virt-firmware",
    "qemu-utils",
];

/// A version below any that is released, for upgrades.
const OLD: &str = "0.0.1";

/// The firmware that a machine starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Firmware {
    Plain,
    /// Secure Boot, with Microsoft's keys, which Debian's shim is signed with.
    SecureBoot,
    /// The same, and the key of the machine's DKMS is enrolled.
    Enrolled,
}

/// The starts of the machine, in this order, and for how long each may last. The disk keeps what a step did.
const STARTS: &[(&str, Firmware, u64)] = &[
    ("old", Firmware::Plain, 2400),
    ("upgrade", Firmware::Plain, 2400),
    ("signed", Firmware::SecureBoot, 1200),
    ("enrolled", Firmware::Enrolled, 1200),
    ("second", Firmware::Plain, 3600),
    ("next", Firmware::Plain, 1200),
    ("without", Firmware::Plain, 1200),
    ("purge", Firmware::Plain, 1200),
    ("purged", Firmware::Plain, 1200),
];

/// The step before them, in the tree that the disk is made of.
const IN_TREE: &str = "chroot";

/// Everything that the row makes; what it needs again is in caches elsewhere.
fn place() -> PathBuf {
    paths::build().join("packages")
}

/// The machine's disk after a step passed, as a layer over the disk after the step before it.
fn layer(step: &str) -> PathBuf {
    place().join(format!("after-{step}.qcow2"))
}

/// Runs the steps, and returns what each reported. On the machine, each needs those before it, so the row ends with
/// the first one that fails.
///
/// With filters, only the steps that they name run, and those before them that did not pass in an earlier run with
/// the same packages: a row that was interrupted continues, and the last step is run again without the others.
/// Without filters, all steps run, and the machine is removed if they pass.
pub fn test(filters: &[String]) -> Result<Vec<(String, Report)>> {
    let wanted = |name: &str| filters.iter().any(|part| name.contains(part.as_str()));
    let starts = match STARTS.iter().rposition(|(name, ..)| wanted(name)) {
        Some(last) => &STARTS[..=last],
        None if filters.is_empty() => STARTS,
        None if wanted(IN_TREE) => &[],
        None => bail!("no step has such a name; tests/packages/run has the names"),
    };
    let tools = Tree::tools()?;
    tools.require("disks", DISK_TOOLS)?;
    let stocks = archive::kernels(&tools, Arch::Amd64)?;
    let first = archive::select(&stocks, "default-cloud")?;
    let second = archive::select(&stocks, "newest-cloud")?;
    let mut reports = Vec::new();
    let in_tree_passed = place().join("after-chroot");
    let made = place().join("made-of");
    let key = key(first, second)?;
    let kept = !filters.is_empty() && fs::read_to_string(&made).is_ok_and(|found| found == key);
    if !kept || wanted(IN_TREE) {
        remove(&place())?;
        let report = make(&tools, first, second)?;
        if is_well(&report) {
            fs::write(&in_tree_passed, "")?;
        }
        reports.push((IN_TREE.to_owned(), report));
        fs::write(&made, &key)?;
    } else if in_tree_passed.exists() {
        say(&format!(
            "  ... packages: {IN_TREE} passed in an earlier run"
        ));
    } else {
        say(&format!(
            "  ... packages: {IN_TREE} FAILED in an earlier run; `--filter {IN_TREE}` repeats it"
        ));
    }
    step("disk with the packages", |step| media_disk(&tools, step))?;
    let mut below = place().join("disk.img");
    let mut passed_before = true;
    for (index, &(name, firmware, limit)) in starts.iter().enumerate() {
        passed_before &= kept && !wanted(name) && layer(name).exists();
        if passed_before {
            say(&format!("  ... packages: {name} passed in an earlier run"));
        } else {
            // The layers above the one that is replaced are worthless.
            for (later, ..) in &STARTS[index..] {
                remove(&layer(later))?;
            }
            let report = step(format!("packages: {name}"), |step| {
                start_layer(&tools, step, &below)?;
                boot(&tools, step, name, firmware, Duration::from_secs(limit))
            })?;
            let passed = is_well(&report);
            reports.push((name.to_owned(), report));
            if !passed {
                return Ok(reports);
            }
            fs::rename(place().join("run.qcow2"), layer(name))?;
        }
        below = layer(name);
    }
    if filters.is_empty() && reports.iter().all(|(_, report)| is_well(report)) {
        remove(&place())?;
    }
    Ok(reports)
}

fn is_well(report: &Report) -> bool {
    report.failed.is_empty() && report.problems.is_empty()
}

/// What the machine is made of. `run` and `hold.c` are left out: each run copies them again.
fn key(first: &Stock, second: &Stock) -> Result<String> {
    let mut key = Key::new()
        .texts(PACKAGES)
        .text(&first.release)
        .text(&second.release);
    for name in [
        "Cargo.lock",
        "Cargo.toml",
        "Kbuild",
        "Makefile",
        "driver",
        "packaging",
        "shim",
        "tests/packages/disk",
        "uapi",
    ] {
        key = key.files(&paths::root().join(name))?;
    }
    Ok(key.finish())
}

/// Builds the packages, runs the step in a Debian tree, and makes a disk of the tree.
fn make(tools: &Tree, first: &Stock, second: &Stock) -> Result<Report> {
    let media = place().join("media");
    for (version, name) in [(env!("CARGO_PKG_VERSION"), "new"), (OLD, "old")] {
        let target = media.join(name);
        fs::create_dir_all(&target)?;
        build(version, &target)?;
    }
    let tree = machine(first, second, &media)?;
    let report = step("packages in a Debian tree", |step| in_tree(&tree, step))?;
    step("disk of a machine", |step| {
        disk(tools, step, &tree, &first.release)
    })?;
    remove(&tree.path)?;
    Ok(report)
}

/// Builds the packages in a version, and puts them into a directory.
fn build(version: &str, target: &Path) -> Result<()> {
    let mut command = Command::new(paths::root().join("packaging/build-deb"));
    command.args(["--version", version]);
    step(format!("packages of version {version}"), |step| {
        step.run(&mut command, "deb.log")
    })
    .context("packaging/build-deb failed")?;
    for entry in fs::read_dir(paths::build().join("deb").join(version))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".deb") && !name.contains("-dbgsym_") {
            fs::copy(&path, target.join(&*name))?;
        }
    }
    Ok(())
}

/// A copy of the machine's tree, and in `media` the packages of the kernels that it gets later.
fn machine(first: &Stock, second: &Stock, media: &Path) -> Result<Tree> {
    let packages_of =
        |kernel: &str| ["image", "headers"].map(|kind| format!("linux-{kind}-{kernel}"));
    let of_first = packages_of(&first.release);
    let mut packages = PACKAGES.to_vec();
    packages.extend(of_first.iter().map(String::as_str));
    let whole = Tree::with_packages("guest-disk", &packages)?;
    let tree = whole.copy("packages-machine")?;
    download(&tree, &media.join("kernel"), &packages_of(&second.release))?;
    // Debian's own kernel has no Rust.
    let without = media.join("without");
    download(&tree, &without, &packages_of("cloud-amd64/trixie"))?;
    let release = fs::read_dir(&without)?
        .flatten()
        .find_map(|entry| release_of(&entry.file_name().to_string_lossy()))
        .context("no kernel was downloaded from trixie")?;
    fs::write(
        media.join("kernels"),
        format!("{}\n{}\n{release}\n", first.release, second.release),
    )?;
    scripts(media)?;
    Ok(tree)
}

/// Copies what runs on the machine to the packages.
fn scripts(media: &Path) -> Result<()> {
    for name in ["run", "hold.c"] {
        let from = paths::root().join("tests/packages").join(name);
        fs::copy(&from, media.join(name)).with_context(|| format!("copying {from:?}"))?;
    }
    Ok(())
}

/// The kernel's release, if this is the file of its package, and not that of a package that depends on the newest.
fn release_of(file: &str) -> Option<String> {
    let (release, _) = file.strip_prefix("linux-image-")?.split_once('_')?;
    release
        .starts_with(|first: char| first.is_ascii_digit())
        .then(|| release.to_owned())
}

/// Downloads packages, and those that they depend on and the tree lacks, into a directory.
fn download(tree: &Tree, directory: &Path, packages: &[String]) -> Result<()> {
    fs::create_dir_all(directory.join("partial"))?;
    let archives = format!("Dir::Cache::archives={}", inside(directory)?);
    let mut arguments = vec!["apt-get", "install", "--yes", "--download-only"];
    arguments.extend(["--no-install-recommends", "-o", &archives]);
    arguments.extend(packages.iter().map(String::as_str));
    let mut command = tree.network(&arguments)?;
    step(format!("packages {}", packages.join(", ")), |step| {
        step.run(&mut command, "deb.log")
    })?;
    remove(&directory.join("partial"))
}

/// What is installed and purged in the tree.
fn in_tree(tree: &Tree, step: &Step) -> Result<Report> {
    // Trees share their cache of packages.
    let _lock = lock("apt")?;
    let media = inside(&place().join("media"))?;
    let log = format!("test-packages-{IN_TREE}.log");
    let output = paths::logs().join(&log);
    remove(&output)?;
    let mut command = tree.network(&[&format!("{media}/run"), IN_TREE])?;
    let ran = step.run(command.env("PINBUF_MEDIA", &media), &log);
    let report = ktap::parse(&String::from_utf8_lossy(&fs::read(&output)?));
    if is_well(&report) {
        ran?;
    }
    Ok(report)
}

/// Enrolls the key of the machine's DKMS, which the step before printed, as a user does in the menu of
/// shim after `mokutil --import`.
fn enroll(tools: &Tree) -> Result<()> {
    let output = fs::read_to_string(paths::logs().join("test-packages-signed.log"))?;
    let lines: Vec<&str> = output
        .lines()
        .filter_map(|line| line.strip_prefix("# key: "))
        .map(str::trim)
        .collect();
    fs::write(place().join("key.pem"), lines.join("\n") + "\n")?;
    let variables = inside(&place().join("variables.fd"))?;
    // Any owner will do.
    const OWNER: &str = "12345678-1234-4234-8234-123456789abc";
    let output = tools
        .command(&[
            "virt-fw-vars",
            "--inplace",
            &variables,
            "--add-mok",
            OWNER,
            &inside(&place().join("key.pem"))?,
        ])?
        .output()?;
    if !output.status.success() {
        bail!("virt-fw-vars: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The machine's disk, before its first start.
fn disk(tools: &Tree, step: &Step, tree: &Tree, kernel: &str) -> Result<()> {
    let script = place().join("disk");
    fs::copy(paths::root().join("tests/packages/disk"), &script)?;
    let mut command = tools.command(&[
        "sh",
        &inside(&script)?,
        &inside(&tree.path)?,
        &inside(&place().join("disk.img"))?,
        kernel,
    ])?;
    step.run(&mut command, "deb.log")
}

/// The disk with the packages, and with what the steps run.
fn media_disk(tools: &Tree, step: &Step) -> Result<()> {
    let (media, image) = (place().join("media"), place().join("media.img"));
    scripts(&media)?;
    remove(&image)?;
    let (media, image) = (inside(&media)?, inside(&image)?);
    let mut command = tools.command(&[
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-L",
        "pinbuf-media",
        "-d",
        &media,
        &image,
        "3G",
    ])?;
    step.run(&mut command, "deb.log")
}

/// An empty layer over the disk that a step starts with.
fn start_layer(tools: &Tree, step: &Step, below: &Path) -> Result<()> {
    let name = below.file_name().unwrap_or_default().to_string_lossy();
    let format = if name.ends_with(".img") {
        "raw"
    } else {
        "qcow2"
    };
    let top = place().join("run.qcow2");
    remove(&top)?;
    let mut command = tools.command(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &name,
        "-F",
        format,
        &inside(&top)?,
    ])?;
    step.run(&mut command, "deb.log")
}

/// Starts the machine, and returns what the step in it reported.
fn boot(
    tools: &Tree,
    step: &Step,
    name: &str,
    firmware: Firmware,
    limit: Duration,
) -> Result<Report> {
    let path = |name: &str| place().join(name).display().to_string();
    let ovmf = |name: &str| tools.path.join("usr/share/OVMF").join(name);
    let (code, variables) = match firmware {
        Firmware::Plain => ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
        _ => ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"),
    };
    fs::copy(ovmf(variables), place().join("variables.fd"))?;
    if firmware == Firmware::Enrolled {
        enroll(tools)?;
    }
    fs::write(place().join("step"), name)?;
    let mut command = qemu::command(tools, Arch::Amd64, false);
    command.args(["-smp", "2", "-m", "2G", "-machine"]);
    if firmware == Firmware::Plain {
        command.arg("q35");
    } else {
        // Only code in system management mode may write the firmware's variables.
        command.args([
            "q35,smm=on",
            "-global",
            "driver=cfi.pflash01,property=secure,value=on",
        ]);
    }
    command.arg("-drive").arg(format!(
        "if=pflash,unit=0,format=raw,readonly=on,file={}",
        ovmf(code).display()
    ));
    for drive in [
        format!("if=pflash,unit=1,format=raw,file={}", path("variables.fd")),
        format!("if=none,id=disk,format=qcow2,file={}", path("run.qcow2")),
        format!(
            "if=none,id=media,format=raw,readonly=on,file={}",
            path("media.img")
        ),
    ] {
        command.arg("-drive").arg(drive);
    }
    for device in [
        "virtio-blk-pci,drive=disk,bootindex=0",
        "virtio-blk-pci,drive=media",
        "virtio-rng-pci",
        "VGA",
    ] {
        command.arg("-device").arg(device);
    }
    let console = paths::logs().join(format!("packages-{name}-console.log"));
    let output = paths::logs().join(format!("test-packages-{name}.log"));
    for file in [&console, &output] {
        remove(file)?;
        command
            .arg("-serial")
            .arg(format!("file:{}", file.display()));
    }
    command
        .arg("-fw_cfg")
        .arg(format!("name=opt/pinbuf-step,file={}", path("step")));
    let mut child = qemu::spawn(&mut command, &paths::logs().join("packages-qemu.log"))?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            bail!(
                "the machine did not power off within {}; its console: {}; what the step did last:\n{}",
                seconds(limit),
                paths::shown(&console),
                tail(&output, 10)
            );
        }
        step.progress(&tail(&output, 1));
        sleep(Duration::from_millis(200));
    }
    let mut report = ktap::parse(&String::from_utf8_lossy(&fs::read(&output)?));
    let log = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
    for complaint in watch::complaints(&log) {
        report
            .problems
            .push(format!("the kernel complained: {complaint}"));
    }
    Ok(report)
}
