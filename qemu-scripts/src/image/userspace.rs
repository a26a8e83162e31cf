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

/// How programs are built, which is a profile of cargo's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// With assertions and checked arithmetic, for tests.
    Dev,
    /// As users get them, for what is measured.
    Release,
}

impl Profile {
    /// The directory below cargo's target.
    fn directory(self) -> PathBuf {
        target().join(match self {
            Self::Dev => "debug",
            Self::Release => "release",
        })
    }
}

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

/// Builds the programs and libraries, and returns their paths.
pub fn build(profile: Profile) -> Result<Vec<PathBuf>> {
    step("userspace", |step| {
        let mut command = cargo();
        // Everything, although guests do not get this program: with the same packages cargo chooses the same
        // features, and what `cargo test` has compiled is not compiled again.
        command.args(["build", "--workspace"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        step.run(&mut command, "userspace.log")
            .context("userspace does not compile")
    })?;
    built(profile)
}

/// The programs and libraries that were built last.
pub fn built(profile: Profile) -> Result<Vec<PathBuf>> {
    let directory = profile.directory();
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

/// Builds the guests' first process, which needs no library, and returns its path.
pub fn init() -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let target = paths::build().join("guest-target");
    let program = target.join(TRIPLE).join("debug/pinbuf-guest-init");
    let key = Key::new()
        .text("2")
        .files(&paths::root().join("qemu-scripts/init"))?;
    cache::ensure("init", "guests' first process", key, |step| {
        let mut command = cargo();
        command
            .args([
                "build",
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

#[cfg(test)]
mod tests {
    use walkdir::WalkDir;

    use super::*;

    /// A test in a program whose manifest says that it has none would never run.
    #[test]
    fn programs_without_tests_have_none() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut without = 0;
        for directory in ["shim", "tests", "qemu-scripts", "uapi"] {
            for entry in WalkDir::new(root.join(directory)) {
                let path = entry.unwrap().into_path();
                if !path.ends_with("Cargo.toml")
                    || !fs::read_to_string(&path).unwrap().contains("test = false")
                {
                    continue;
                }
                without += 1;
                for source in WalkDir::new(path.with_file_name("src")) {
                    let source = source.unwrap().into_path();
                    if source
                        .extension()
                        .is_some_and(|extension| extension == "rs")
                    {
                        let text = fs::read_to_string(&source).unwrap();
                        assert!(!text.contains("#[test]"), "{}", source.display());
                    }
                }
            }
        }
        assert!(without > 0);
    }
}
