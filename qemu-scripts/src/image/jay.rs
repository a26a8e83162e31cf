// SPDX-License-Identifier: MIT OR Apache-2.0

//! Jay, a compositor in Rust that Debian does not have, with its own tests: built from its crate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::cache::{self, Key};
use crate::debian::tree::{remove, Suite, Tree};
use crate::image::userspace::{cargo, cargo_home, without_host_s_rust};
use crate::paths;

const CRATE: &str = "jay-compositor";

/// Not the newest: `tests/clients/src/jay.rs` knows the tests of this one. Its `Cargo.lock` fixes the versions of the
/// crates that it needs.
const VERSION: &str = "1.15.0";

/// A cargo that is new enough for it, which that of the stable release is not, and what it is linked with.
const PACKAGES: &[&str] = &[
    "cargo",
    "gcc",
    "libcairo2-dev",
    "libfontconfig-dev",
    "libgbm-dev",
    "libglib2.0-dev",
    "libinput-dev",
    "libpango1.0-dev",
    "libudev-dev",
];

/// Where its source is, in the tree as in guests: the program has this path compiled in, and its tests read pictures
/// and write logs there.
const SOURCE: &str = "usr/src/jay";

/// The pictures that the tests compare with, below the source.
const PICTURES: &str = "src/it/tests";

/// Builds it with its tests, and returns a directory with everything where it goes in a guest.
pub fn ensure() -> Result<PathBuf> {
    let tree = Tree::of_suite(Suite::Testing, "jay", PACKAGES)?;
    let stamp = fs::read_to_string(paths::build().join("stamps/tree/jay"))?;
    let directory = paths::build().join("jay");
    let key = Key::new().text("1").text(&stamp).text(VERSION);
    cache::ensure("jay", &format!("{CRATE} {VERSION}"), key, |step| {
        let home = cargo_home()?;
        // This downloads the crate and unpacks it. `cargo install` would do so too, but also compile it here, where
        // there may be no compiler that is new enough.
        let version = format!("{CRATE}@{VERSION}");
        step.run(
            cargo().args(["info", "--registry", "crates-io", &version]),
            "userspace.log",
        )
        .context("downloading Jay's crate")?;
        let source = tree.path.join(SOURCE);
        remove(&source)?;
        fs::create_dir_all(source.parent().context("a path")?)?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(unpacked(&home)?).arg(&source);
        step.run(&mut copy, "userspace.log")?;
        // Otherwise cargo takes it for a member of the workspace around it.
        let manifest = source.join("Cargo.toml");
        let text = fs::read_to_string(&manifest)?;
        fs::write(&manifest, format!("{text}\n[workspace]\n"))?;
        step.run(
            cargo()
                .args(["fetch", "--locked", "--manifest-path"])
                .arg(&manifest),
            "userspace.log",
        )
        .context("fetching the crates that Jay needs")?;

        let manifest = format!("/{SOURCE}/Cargo.toml");
        let words = [
            "/usr/bin/cargo",
            "build",
            "--offline",
            "--locked",
            "--features",
            "it",
            "--manifest-path",
            &manifest,
        ];
        let mut build = tree.command_on(&[&home], &words)?;
        without_host_s_rust(&mut build)
            .env("CARGO_HOME", &home)
            .env("CARGO_TARGET_DIR", "/tmp/jay")
            .env("CARGO_INCREMENTAL", "0")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            // Each of its tests has 5 s, and guests are emulated.
            .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        step.run(&mut build, "userspace.log")
            .context("Jay does not compile")?;

        remove(&directory)?;
        let programs = directory.join("usr/bin");
        fs::create_dir_all(&programs)?;
        let target = tree.path.join("tmp/jay");
        fs::copy(target.join("debug/jay"), programs.join("jay"))?;
        let there = directory.join(SOURCE);
        fs::create_dir_all(&there)?;
        let mut pictures = Command::new("cp");
        pictures
            .current_dir(&source)
            .args(["-a", "--parents", PICTURES]);
        step.run(pictures.arg(&there), "userspace.log")?;
        remove(&target)
    })?;
    Ok(directory)
}

/// Where cargo has unpacked the crate: below a directory for each registry.
fn unpacked(home: &Path) -> Result<PathBuf> {
    let registries = home.join("registry/src");
    for entry in fs::read_dir(&registries).context("cargo's registries")? {
        let path = entry?.path().join(format!("{CRATE}-{VERSION}"));
        if path.join("Cargo.toml").exists() {
            return Ok(path);
        }
    }
    bail!(
        "cargo has not unpacked {CRATE} {VERSION} below {}",
        registries.display()
    )
}
