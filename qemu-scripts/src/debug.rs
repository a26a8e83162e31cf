// SPDX-License-Identifier: MIT OR Apache-2.0

//! The debug kernel: Debian's source, built small and with the kernel's own checkers on.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::archive::Stock;
use crate::cache::{self, Key};
use crate::kernel::{directory, modules};
use crate::tree::{remove, Tree, BUILD};
use crate::ui::Step;
use crate::{paths, stock};

/// The options on top of allnoconfig.
const FRAGMENT: &str = include_str!("../debug.config");

/// What make reads before each of the kernel's Makefiles.
const MAKEFILE: &str = include_str!("../debug.mk");

/// Rust and KASAN together need clang.
const COMPILER: &str = "LLVM=-19";
const PACKAGES: &[&str] = &["clang-19", "lld-19", "llvm-19", "lz4"];

/// What `uname -r` says on the debug kernel of this version.
pub fn release(stock: &Stock) -> String {
    let (major, minor, patch) = stock.version;
    format!("{major}.{minor}.{patch}-pinbuf-debug")
}

fn key(stock: &Stock) -> Key {
    Key::new()
        .text("1")
        .text(&stock.source)
        .texts(effective(FRAGMENT))
        .texts(effective(MAKEFILE))
}

/// The lines that are no remarks.
fn effective(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Where the kernel is built.  Modules are built in the same tree.
fn place(stock: &Stock) -> PathBuf {
    paths::build().join("kbuild").join(release(stock))
}

/// Builds the kernel.
pub fn ensure(tools: &Tree, stock: &Stock) -> Result<()> {
    let release = release(stock);
    tools.require("debug", PACKAGES)?;
    let source = stock::source(tools, stock)?;
    let title = format!("kernel {release} (10 to 30 minutes on two processors)");
    cache::ensure(&format!("kernel/{release}"), &title, key(stock), |step| {
        configure(tools, step, stock, &source)?;
        let jobs = format!("-j{}", crate::jobs());
        make(tools, step, stock, &source, &[&jobs, "bzImage", "modules"])?;
        let root = directory(&release).join("root");
        remove(&root)?;
        fs::create_dir_all(root.join("usr/lib/modules"))?;
        let install = format!("INSTALL_MOD_PATH={BUILD}/kernels/{release}/root/usr");
        make(
            tools,
            step,
            stock,
            &source,
            &[&install, "INSTALL_MOD_STRIP=1", "modules_install"],
        )?;
        for link in ["build", "source"] {
            remove(&modules(&root, &release).join(link))?;
        }
        let image = place(stock).join("arch/x86/boot/bzImage");
        fs::copy(image, modules(&root, &release).join("vmlinuz"))?;
        Ok(())
    })
}

/// The tree that modules for the debug kernel are built in.
pub fn build_tree(stock: &Stock) -> Result<(Vec<String>, Key)> {
    let tree = format!("{BUILD}/kbuild/{}", release(stock));
    Ok((vec!["-C".into(), tree, COMPILER.into()], key(stock)))
}

/// Writes the configuration and checks that it has what the fragment asks for: an option whose
/// dependencies are missing would vanish in silence.
fn configure(tools: &Tree, step: &Step, stock: &Stock, source: &str) -> Result<()> {
    let place = place(stock);
    fs::create_dir_all(&place)?;
    fs::write(place.join("debug.config"), FRAGMENT)?;
    fs::write(place.join("debug.mk"), MAKEFILE)?;
    let inside = format!("{BUILD}/kbuild/{}", release(stock));
    let all = format!("KCONFIG_ALLCONFIG={inside}/debug.config");
    make(tools, step, stock, source, &[&all, "allnoconfig"])?;
    let config = fs::read_to_string(place.join(".config")).context("reading .config")?;
    let missing: Vec<&str> = FRAGMENT
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            Some(name) => config
                .lines()
                .any(|found| found.starts_with(&format!("{name}="))),
            None => !config.lines().any(|found| found == *line),
        })
        .collect();
    if !missing.is_empty() {
        bail!(
            "the kernel's configuration does not get these options of \
             qemu-scripts/debug.config; something that they depend on is missing there:\n{}",
            missing.join("\n")
        );
    }
    Ok(())
}

fn make(tools: &Tree, step: &Step, stock: &Stock, source: &str, targets: &[&str]) -> Result<()> {
    let inside = format!("{BUILD}/kbuild/{}", release(stock));
    let output = format!("O={inside}");
    let mut arguments = vec!["nice", "make", "-C", source, &output, COMPILER];
    arguments.extend(targets);
    let mut command: Command = tools.command(&arguments)?;
    // The same source gives the same kernel.
    command
        .env("KBUILD_BUILD_USER", "pinbuf")
        .env("KBUILD_BUILD_HOST", "pinbuf")
        .env("MAKEFILES", format!("{inside}/debug.mk"));
    step.run(&mut command, "kernels.log")
}
