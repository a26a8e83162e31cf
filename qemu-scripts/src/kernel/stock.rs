// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian's own kernels: what booting them takes, and trees that modules can be built in.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, Context, Result};
use walkdir::WalkDir;

use crate::cache::{self, Key};
use crate::debian::arch::Arch;
use crate::debian::archive::{self, Stock};
use crate::debian::tree::{remove, Tree, BUILD};
use crate::kernel::layout::directory;
use crate::paths;
use crate::ui::{say, Step};

/// Changes when what is made of a kernel's packages does.
const FORMAT: &str = "2";

/// Fetches a kernel and its modules.
pub fn ensure(tools: &Tree, stock: &Stock) -> Result<()> {
    let release = &stock.release;
    let packages = [
        stock.binary.clone(),
        stock.base.clone(),
        stock.modules.clone(),
    ];
    let key = Key::new().text(FORMAT).texts(&packages);
    cache::ensure(
        &format!("kernel/{release}"),
        &format!("kernel {release}"),
        key,
        |step| {
            let root = directory(release).join("root");
            remove(&root)?;
            fs::create_dir_all(&root)?;
            tools.unpack(step, &packages, &root)
        },
    )
}

/// Unpacks the kernel's source, and returns its path as seen in trees.
pub fn source(tools: &Tree, stock: &Stock) -> Result<String> {
    let (name, version) = stock
        .source
        .split_once('=')
        .context("source without a version")?;
    let place = format!("sources/{name}_{version}");
    let key = Key::new().text(FORMAT).text(&stock.source);
    cache::ensure(
        &format!("source/{name}_{version}"),
        &format!("unpacking {name} {version}"),
        key,
        |step| {
            let target = paths::build().join(&place);
            let packed = paths::build().join(format!("sources/{name}_{version}.package"));
            remove(&target)?;
            remove(&packed)?;
            fs::create_dir_all(&target)?;
            fs::create_dir_all(&packed)?;
            tools.unpack(step, std::slice::from_ref(&stock.source), &packed)?;
            let tar = format!("{BUILD}/sources/{name}_{version}.package/usr/src/{name}.tar.xz");
            let mut command = tools.command(&[
                "tar",
                "--extract",
                "--xz",
                "--strip-components=1",
                &format!("--file={tar}"),
                &format!("--directory={BUILD}/{place}"),
            ])?;
            step.run(&mut command, "kernels.log")?;
            remove(&packed)
        },
    )?;
    Ok(format!("{BUILD}/{place}"))
}

/// Where the tree for modules is.
fn place(release: &str) -> PathBuf {
    paths::build().join("kbuild").join(release)
}

/// Makes a tree that modules for this kernel can be built in.  Debian's packages lack what Rust
/// needs: it is made from Debian's source, with Debian's configuration, symbols and types.
pub fn build_tree(tools: &Tree, stock: &Stock) -> Result<(Vec<String>, Key)> {
    let release = &stock.release;
    if let Some(mismatch) = stock.source_mismatch() {
        say(&format!("  warning: {mismatch}"));
    }
    let source = source(tools, stock)?;
    let key = Key::new()
        .text(FORMAT)
        .texts([&stock.headers, &stock.source]);
    let title = format!("tree to build modules for {release}");
    cache::ensure(&format!("kbuild/{release}"), &title, key.clone(), |step| {
        make_build_tree(tools, step, stock, &source)
    })?;
    let mut arguments = vec!["-C".into(), format!("{BUILD}/kbuild/{release}")];
    arguments.extend(compiler(stock.arch));
    Ok((arguments, key))
}

/// What Debian builds its kernels with.
fn compiler(arch: Arch) -> [String; 4] {
    let gnu = arch.gnu();
    [
        format!("ARCH={}", arch.kbuild()),
        format!("CROSS_COMPILE={gnu}-"),
        // For the code that 32-bit processes get.
        format!("CROSS_COMPILE_COMPAT={}-", arch.gnu32()),
        format!("CC={gnu}-gcc-14"),
    ]
}

fn make_build_tree(tools: &Tree, step: &Step, stock: &Stock, source: &str) -> Result<()> {
    let release = &stock.release;
    let place = place(release);
    let headers = paths::build()
        .join("kbuild")
        .join(format!("{release}.headers"));
    remove(&place)?;
    remove(&headers)?;
    match sibling(stock)? {
        Some(sibling) => begin_with(step, &sibling, release)?,
        None => fs::create_dir_all(&place)?,
    }
    fs::create_dir_all(&headers)?;
    tools.unpack(step, std::slice::from_ref(&stock.headers), &headers)?;
    let headers_tree = headers
        .join("usr/src")
        .join(format!("linux-headers-{release}"));
    let copy = |name: &str| {
        fs::copy(headers_tree.join(name), place.join(name))
            .with_context(|| format!("{} has no {name}", stock.headers))
    };
    copy(".config")?;
    let config = fs::read_to_string(place.join(".config"))?;
    let jobs = format!("-j{}", crate::jobs());
    let output = format!("O={BUILD}/kbuild/{release}");
    let name = format!("KERNELRELEASE={release}");
    let compiler = compiler(stock.arch);
    let mut make = vec!["make", "-C", source, &output, &name];
    make.extend(compiler.iter().map(String::as_str));
    make.extend([jobs.as_str(), "olddefconfig", "modules_prepare"]);
    step.run(&mut tools.command(&make)?, "kernels.log")?;
    check_config(&config, &fs::read_to_string(place.join(".config"))?)?;
    copy("Module.symvers")?;
    copy("vmlinux")?;
    fs::write(place.join(SOURCE), &stock.source)?;
    remove(&headers)
}

/// A file in a tree that names the source that it was made from.
const SOURCE: &str = "pinbuf-source";

/// Another flavour whose tree is there, made from the same source.
fn sibling(stock: &Stock) -> Result<Option<String>> {
    let stamps = paths::build().join("stamps/kbuild");
    for stamp in fs::read_dir(stamps).into_iter().flatten() {
        let other = stamp?.file_name().to_string_lossy().into_owned();
        let source = fs::read_to_string(place(&other).join(SOURCE));
        let same = archive::arch(&other) == stock.arch;
        if same && other != stock.release && source.is_ok_and(|source| source == stock.source) {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

/// Begins a tree with a copy of another flavour's. make records the command and the configuration options of
/// each file, and makes those again for which they differ. The rest, above all the programs that run on the
/// host, is more than half of the work.
fn begin_with(step: &Step, other: &str, release: &str) -> Result<()> {
    let place = place(release);
    let mut copy = Command::new("cp");
    copy.args(["-a", "--reflink=auto"])
        .arg(self::place(other))
        .arg(&place);
    step.run(&mut copy, "kernels.log")?;
    remove(&place.join(SOURCE))?;
    // Commands and dependencies have the tree's path in them.
    let (from, to) = (
        format!("{BUILD}/kbuild/{other}"),
        format!("{BUILD}/kbuild/{release}"),
    );
    for entry in WalkDir::new(&place) {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        // What is not text was made from files that are the same.
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        if text.contains(&from) && !text.contains('\0') {
            fs::write(entry.path(), text.replace(&from, &to))?;
        }
    }
    Ok(())
}

/// The configuration must still be Debian's: another one is another layout of structures.
fn check_config(debian: &str, ours: &str) -> Result<()> {
    let options = |text: &str| -> Vec<String> {
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| line.contains("CONFIG_"))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let (debian, ours) = (options(debian), options(ours));
    let differ: Vec<String> = ours
        .iter()
        .filter(|line| debian.binary_search(line).is_err())
        .map(|line| format!("+{line}"))
        .chain(
            debian
                .iter()
                .filter(|line| ours.binary_search(line).is_err())
                .map(|line| format!("-{line}")),
        )
        .filter(|line| !harmless(line))
        .collect();
    if !differ.is_empty() {
        bail!(
            "the kernel's configuration changed while its tree was made; the tools in \
             build/trees/tools are not those that Debian builds with:\n{}",
            differ.join("\n")
        );
    }
    Ok(())
}

/// What may differ without any effect on the layout of structures.
fn harmless(line: &str) -> bool {
    [
        "_VERSION_TEXT=",
        "CONFIG_PAHOLE_VERSION=",
        "CONFIG_BINDGEN_VERSION",
    ]
    .iter()
    .any(|name| line.contains(name))
}
