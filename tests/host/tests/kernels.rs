// SPDX-License-Identifier: MIT OR Apache-2.0

//! For which kernels pinbuf is built: what `Kbuild` says for others, and that everything else says the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(file: &str) -> String {
    fs::read_to_string(repository().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// A variable of `Kbuild`.
fn variable(name: &str) -> String {
    let text = text("Kbuild");
    let start = format!("{name} := ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("{name}")).to_owned()
}

/// What make says when it reads `Kbuild` with such a kernel, and whether it goes on.
fn read(version: (u32, u32), configuration: &[&str]) -> (bool, String) {
    let output = Command::new("make")
        .args(["--no-print-directory", "--file=Kbuild", "--eval=all:"])
        .arg(format!("VERSION={}", version.0))
        .arg(format!("PATCHLEVEL={}", version.1))
        .args(
            configuration
                .iter()
                .map(|option| format!("CONFIG_{option}=y")),
        )
        .arg("all")
        .current_dir(repository())
        .env("LC_ALL", "C")
        .output()
        .expect("make runs");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

const USUAL: [&str; 3] = ["MODULES", "64BIT", "RUST"];

/// A version's two numbers.
fn series(version: &str) -> (u32, u32) {
    let (major, minor) = version.split_once('.').expect("two numbers");
    (
        major.parse().expect("a number"),
        minor.parse().expect("a number"),
    )
}

#[test]
fn supported_kernels_are_built_without_a_word() {
    for name in ["PINBUF_OLDEST", "PINBUF_NEWEST"] {
        let (goes_on, said) = read(series(&variable(name)), &USUAL);
        assert!(goes_on && !said.contains("pinbuf:"), "{said}");
    }
    // Cleaning needs no configuration.
    assert!(read((5, 0), &[]).0);
}

#[test]
fn others_are_refused_in_a_sentence() {
    let newest = series(&variable("PINBUF_NEWEST"));
    let oldest = series(&variable("PINBUF_OLDEST"));
    for (version, configuration, sentence) in [
        (
            (oldest.0, oldest.1 - 1),
            &USUAL[..],
            "the tests do not run on older ones",
        ),
        ((6, 19), &USUAL[..], "this kernel is 6.19"),
        (newest, &["MODULES", "RUST"][..], "this kernel has 32 bits"),
        (
            newest,
            &["MODULES", "RUST", "64BIT", "CPU_BIG_ENDIAN"][..],
            "big-endian",
        ),
        (newest, &["MODULES", "64BIT"][..], "without Rust"),
    ] {
        let (goes_on, said) = read(version, configuration);
        assert!(!goes_on && said.contains(sentence), "{version:?}: {said}");
    }
}

#[test]
fn newer_ones_are_built_and_that_is_said() {
    let newest = series(&variable("PINBUF_NEWEST"));
    for version in [(newest.0, newest.1 + 1), (newest.0, 10), (newest.0 + 1, 0)] {
        let (goes_on, said) = read(version, &USUAL);
        assert!(
            goes_on && said.contains("newer than any"),
            "{version:?}: {said}"
        );
    }
}

#[test]
fn the_minimum_is_the_same_everywhere() {
    let oldest = variable("PINBUF_OLDEST");
    let (major, minor) = series(&oldest);
    for (file, wanted) in [
        (
            "packaging/dkms.conf",
            format!("BUILD_EXCLUSIVE_KERNEL_MIN=\"{oldest}\""),
        ),
        (
            "shim/cli/src/setup.rs",
            format!("series < ({major}, {minor})"),
        ),
        (
            "shim/cli/src/setup.rs",
            format!("pinbuf needs Linux {oldest} or newer"),
        ),
        (
            "qemu-scripts/src/debian/archive.rs",
            format!("OLDEST: (u32, u32) = ({major}, {minor})"),
        ),
        ("README.md", format!("needs a kernel {oldest} or later")),
        (
            "docs/installing.md",
            format!("needs a kernel {oldest} or later"),
        ),
        (
            "docs/known-problems.md",
            format!("Kernels before {oldest} are not supported"),
        ),
    ] {
        assert!(
            text(file).contains(&wanted),
            "{file} does not say `{wanted}`"
        );
    }
}
