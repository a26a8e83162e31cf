// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tests of user space that run no guest, under AddressSanitizer: those of the library, of the shim, and of
//! the driver's pure parts.
//!
//! What happens in a guest happens in the kernel, whose own sanitizers the debug kernel has. The library for C
//! has no tests on the host, and the `unsafe` code of programs consists of system calls.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};

use crate::image::userspace;
use crate::paths;

/// The packages whose tests run.
const PACKAGES: &[&str] = &["pinbuf", "pinbuf-preload", "pinbuf-pure"];

/// With a target named, build scripts and procedural macros are compiled without the sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The option. Stable compilers accept it with `RUSTC_BOOTSTRAP`, which changes nothing else in how the code is compiled.
const OPTION: &str = "-Zsanitizer=address";

/// AddressSanitizer's report on [`FAULTY`].
const FOUND: &str = "heap-use-after-free";

/// A program with an error that the sanitizer has to report.
const FAULTY: &str = r#"
fn main() {
    let gone = Box::into_raw(Box::new(std::hint::black_box(1_u8)));
    // SAFETY: it comes from `into_raw`, and is taken back once.
    drop(unsafe { Box::from_raw(gone) });
    // SAFETY: none: the memory is freed, which is the error to be noticed.
    println!("{}", unsafe { gone.read_volatile() });
}
"#;

/// The outcome of the tests.
pub enum Tested {
    /// The toolchain cannot do it.
    Skipped(&'static str),
    /// cargo's output, and whether all tests passed.
    Ran(String, bool),
}

/// Runs the tests, if the sanitizer reports an error at all.
pub fn test(filter: &[String]) -> Result<Tested> {
    let directory = paths::build().join("sanitize");
    fs::create_dir_all(&directory)?;
    if !notices(&directory)? {
        return Ok(Tested::Skipped("this Rust has no AddressSanitizer"));
    }
    let mut command = userspace::cargo();
    command
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", OPTION)
        .env("RUSTDOCFLAGS", OPTION)
        .args(["test", "--no-fail-fast", "--color=never"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&directory);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    let output = command
        .arg("--")
        .args(filter)
        .stdin(Stdio::null())
        .output()
        .context("running cargo")?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    Ok(Tested::Ran(text, output.status.success()))
}

/// Whether the sanitizer reports an error; false if there is no sanitizer to link with.
fn notices(directory: &Path) -> Result<bool> {
    let source = directory.join("faulty.rs");
    let program = directory.join("faulty");
    fs::write(&source, FAULTY)?;
    let compiled = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["--edition", "2021", "--target", TARGET, OPTION])
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .output()
        .context("running rustc")?;
    let said = String::from_utf8_lossy(&compiled.stderr);
    if !compiled.status.success() {
        // The message names the missing file or symbol. Other errors are errors.
        if said.contains("rt.asan") || said.contains("__asan_") {
            return Ok(false);
        }
        bail!("a program for AddressSanitizer does not compile:\n{said}");
    }
    let output = Command::new(&program).output().context("running it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() || !said.contains(FOUND) {
        bail!("AddressSanitizer does not detect a {FOUND} in a program that has one, so its results are worthless");
    }
    Ok(true)
}
