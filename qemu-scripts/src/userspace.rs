// SPDX-License-Identifier: MIT OR Apache-2.0

//! What cargo builds: the programs and libraries that guests get, and the guests' first process.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::paths;
use crate::ui::step;

/// The packages that belong to the host.
const HOST_ONLY: [&str; 2] = ["pinbuf-guest", "pinbuf-guest-init"];

/// cargo, at the root of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root());
    // Set by the `cargo run` that started this program; they would make cargo build all anew.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Where cargo puts what the repository's users see.
fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => paths::root().join(directory),
        None => paths::root().join("target"),
    }
}

/// Builds the programs and libraries, and tells where they are.
pub fn build() -> Result<Vec<PathBuf>> {
    step("userspace", |step| {
        let mut command = cargo();
        command.args(["build", "--release", "--workspace"]);
        for package in HOST_ONLY {
            command.args(["--exclude", package]);
        }
        step.run(&mut command, "userspace.log")
            .context("userspace does not compile")
    })?;
    built()
}

/// The programs and libraries that were built last.
pub fn built() -> Result<Vec<PathBuf>> {
    let directory = target().join("release");
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(&directory) else {
        return Ok(found);
    };
    for entry in entries {
        let path = entry?.path();
        let metadata = fs::metadata(&path)?;
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let Some(name) = name else { continue };
        let program = !name.contains('.') && metadata.permissions().mode() & 0o111 != 0;
        let ours = !["guest", "guest-init", "pinbuf-guest-init"].contains(&name.as_str());
        if metadata.is_file() && ours && (program || name.ends_with(".so")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Builds the guests' first process, which needs no library, and tells where it is.
pub fn init() -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let target = paths::build().join("guest-target");
    let program = target.join(TRIPLE).join("release/pinbuf-guest-init");
    let key = Key::new()
        .text("1")
        .files(&paths::root().join("qemu-scripts/init"))?;
    cache::ensure("init", "guests' first process", key, |step| {
        let mut command = cargo();
        command
            .args([
                "build",
                "--release",
                "--package",
                "pinbuf-guest-init",
                "--target",
                TRIPLE,
            ])
            .arg("--target-dir")
            .arg(&target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
        step.run(&mut command, "userspace.log").context(
            "the guests' first process does not compile; it needs gcc and libc6-dev \
             (`apt-get install gcc libc6-dev` as root)",
        )
    })?;
    Ok(program)
}

/// Where a file goes in the guest.
pub fn place(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?;
    let library = path.extension().is_some_and(|extension| extension == "so");
    Some(Path::new(if library { "usr/lib/pinbuf" } else { "usr/bin" }).join(name))
}
