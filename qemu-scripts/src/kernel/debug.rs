// SPDX-License-Identifier: MIT OR Apache-2.0

//! The debug kernel: Debian's source, built small and with the kernel's own checkers on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::cache::{self, Key};
use crate::debian::archive::Stock;
use crate::debian::tree::{remove, Tree, BUILD};
use crate::kernel::layout::{directory, modules};
use crate::kernel::stock;
use crate::paths;
use crate::ui::{say, Step};

/// The options on top of allnoconfig.
const FRAGMENT: &str = include_str!("../../debug.config");

/// What make reads before each of the kernel's Makefiles.
const MAKEFILE: &str = include_str!("../../debug.mk");

/// What the kernel is compiled with, and what it compiles once for all files.
const WRAPPER: &str = include_str!("../../debug-cc");
const HEADERS: &str = include_str!("../../debug-cc.h");

/// A warning is printed if more files than this cannot begin with those headers.
const WITHOUT: usize = 50;

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
        .texts(effective(WRAPPER))
        .text(HEADERS)
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
    let title = format!("kernel {release} (10 to 15 minutes on two processors)");
    cache::ensure(&format!("kernel/{release}"), &title, key(stock), |step| {
        configure(tools, step, stock, &source)?;
        let jobs = format!("-j{}", crate::jobs());
        // Until then not all headers are there.
        make(tools, step, stock, &source, &[&jobs, "prepare"])?;
        let precompiled = place(stock).join("precompiled");
        fs::create_dir(&precompiled)?;
        fs::write(precompiled.join("prefix.h"), HEADERS)?;
        make(tools, step, stock, &source, &[&jobs, "bzImage", "modules"])?;
        if let Some(reason) = slow(&precompiled)? {
            say(&format!(
                "  warning: building {release} took longer than necessary: {reason}"
            ));
        }
        remove(&precompiled)?;
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

/// Why compiling the headers once did not save the time that it could have, from the files that the wrapper
/// left.
fn slow(precompiled: &Path) -> Result<Option<String>> {
    let mut failed = 0;
    for entry in fs::read_dir(precompiled)? {
        let place = entry?.path();
        if place.join("lock").exists() && !place.join("prefix.pch").exists() {
            failed += 1;
        }
    }
    if failed > 0 {
        return Ok(Some(format!(
            "the headers of qemu-scripts/debug-cc.h do not compile with {failed} sets of flags \
             (build/logs/kernels.log has the errors)"
        )));
    }
    let without = precompiled.join("without");
    let without = fs::read_to_string(without).map_or(0, |text| text.lines().count());
    Ok((without > WITHOUT).then(|| {
        format!("{without} files could not begin with the headers of qemu-scripts/debug-cc.h")
    }))
}

/// The tree that modules for the debug kernel are built in.
pub fn build_tree(stock: &Stock) -> Result<(Vec<String>, Key)> {
    let tree = format!("{BUILD}/kbuild/{}", release(stock));
    Ok((vec!["-C".into(), tree, COMPILER.into()], key(stock)))
}

/// Writes the configuration, and checks that it has what the fragment asks for: an option with missing
/// dependencies would be dropped without a message.
fn configure(tools: &Tree, step: &Step, stock: &Stock, source: &str) -> Result<()> {
    let place = place(stock);
    fs::create_dir_all(&place)?;
    fs::write(place.join("debug.config"), FRAGMENT)?;
    fs::write(place.join("debug.mk"), MAKEFILE)?;
    remove(&place.join("precompiled"))?;
    let wrapper = place.join("debug-cc");
    fs::write(&wrapper, WRAPPER)?;
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?;
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
    let compiler = format!("CC={inside}/debug-cc");
    let mut arguments = vec!["nice", "make", "-C", source, &output, COMPILER, &compiler];
    arguments.extend(targets);
    let mut command: Command = tools.command(&arguments)?;
    // The same source gives the same kernel.
    command
        .env("KBUILD_BUILD_USER", "pinbuf")
        .env("KBUILD_BUILD_HOST", "pinbuf")
        .env("MAKEFILES", format!("{inside}/debug.mk"));
    step.run(&mut command, "kernels.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_calls_the_same_compiler() {
        let version = COMPILER.strip_prefix("LLVM=").unwrap_or_default();
        assert!(WRAPPER.contains(&format!("\nclang=clang{version}\n")));
        assert!(PACKAGES.contains(&format!("clang{version}").as_str()));
    }

    /// Records how it was called and makes its output. Fails to put headers before a file that says `conflict`,
    /// and to compile them with `HEADER_IS_GONE`.
    const CLANG: &str = r#"#!/bin/sh
echo "$*" >>"$CALLS"
case $* in *-DHEADER_IS_GONE*c-header*) exit 1 ;; esac
for argument; do
    case $argument in
    *.c) ! grep -q conflict "$argument" || case $* in *-include-pch*) exit 1 ;; esac ;;
    esac
done
for argument; do
    [ "$last" != -o ] || : >"$argument"
    last=$argument
done
"#;

    fn script(path: &Path, text: &str) -> Result<()> {
        fs::write(path, text)?;
        Ok(fs::set_permissions(path, Permissions::from_mode(0o755))?)
    }

    /// How the compiler is called for a file of these contents.
    fn calls(place: &Path, flags: &[&str], text: &str) -> Result<Vec<String>> {
        fs::write(place.join("file.c"), text)?;
        let calls = place.join("calls");
        fs::write(&calls, "")?;
        let status = Command::new(place.join("debug-cc"))
            .args(flags)
            .args(["-Wall", "-Idir", "-DKBUILD_BASENAME=\"file\"", "-c", "-o"])
            .args([place.join("file.o"), place.join("file.c")])
            .env("PATH", format!("{}:/usr/bin:/bin", place.display()))
            .env("CALLS", &calls)
            .status()?;
        assert!(status.success());
        Ok(fs::read_to_string(calls)?
            .lines()
            .map(|line| line.replace(&format!("{}/", place.display()), ""))
            .collect())
    }

    #[test]
    fn headers_are_compiled_once() -> Result<()> {
        let place = tempfile::tempdir()?;
        let place = place.path();
        script(&place.join("debug-cc"), WRAPPER)?;
        script(&place.join("clang-19"), CLANG)?;
        let flags = ["-mcmodel=kernel", "-O2"];
        let plain =
            "-mcmodel=kernel -O2 -Wall -Idir -DKBUILD_BASENAME=\"file\" -c -o file.o file.c";
        let file = "#define pr_fmt(fmt) fmt\n#include <a.h>\n#define LATER\n#include <b.h>\n";

        assert_eq!(calls(place, &flags, file)?, [plain], "not yet");
        let store = place.join("precompiled");
        fs::create_dir(&store)?;
        assert_eq!(calls(place, &flags, file)?, [plain], "the first one");
        let second = calls(place, &flags, file)?;
        assert_eq!(second.len(), 2, "{second:?}");
        let made = "-mcmodel=kernel -O2 -Wall -Idir -x c-header precompiled/prefix.h -o ";
        assert!(second[0].starts_with(made), "{second:?}");
        assert!(second[1].starts_with("-include-pch "), "{second:?}");
        assert!(second[1].ends_with(plain), "{second:?}");
        assert_eq!(calls(place, &flags, file)?, second[1..], "the third one");

        let early = format!("  # define MEANS_A_HEADER\n{file}");
        assert_eq!(calls(place, &flags, &early)?, [plain]);
        let other = ["-mcmodel=kernel", "-O2", "-DMODULE"];
        assert!(!calls(place, &other, file)?[0].contains("-include-pch"));
        assert!(!calls(place, &["-O2"], file)?[0].contains("-include-pch"));
        assert!(!calls(place, &["-O2"], file)?[0].contains("-include-pch"));

        assert_eq!(slow(&store)?, None);
        let conflict = calls(place, &flags, "#include <a.h>\nint conflict;\n")?;
        assert_eq!(conflict, [&second[1], plain]);
        let without = fs::read_to_string(store.join("without"))?;
        assert_eq!(without, format!("{}/file.c\n", place.display()));
        assert_eq!(slow(&store)?, None, "one file is nothing");
        fs::write(store.join("without"), "file.c\n".repeat(WITHOUT + 1))?;
        assert!(slow(&store)?.is_some());

        fs::remove_file(store.join("without"))?;
        let newer = ["-mcmodel=kernel", "-O2", "-DHEADER_IS_GONE"];
        let plain = plain.replace("-O2", "-O2 -DHEADER_IS_GONE");
        assert_eq!(calls(place, &newer, file)?, [plain.as_str()]);
        assert_eq!(calls(place, &newer, file)?[1], plain, "headers failed");
        assert_eq!(calls(place, &newer, file)?, [plain.as_str()]);
        assert!(slow(&store)?.is_some_and(|reason| reason.contains("with 1 sets")));
        Ok(())
    }
}
