// SPDX-License-Identifier: MIT OR Apache-2.0

//! The header is C, and its example links with the library.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory of the test's own, where `<linux/pinbuf.h>` is the repository's: tests run at the same time.
fn include(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let linux = directory.join("linux");
    std::fs::create_dir_all(&linux).unwrap();
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../uapi/pinbuf.h");
    std::fs::copy(header, linux.join("pinbuf.h")).unwrap();
    directory
}

#[test]
fn the_header_is_c_and_cpp() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for language in ["c", "c++"] {
        let status = Command::new("cc")
            .args([
                "-x",
                language,
                "-fsyntax-only",
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
            ])
            .arg("-I")
            .arg(include("header"))
            .arg(here.join("include/libpinbuf.h"))
            .status();
        match status {
            Ok(status) => assert!(status.success(), "{language}"),
            Err(_) => eprintln!("skipped: there is no C compiler"),
        }
    }
}

#[test]
fn the_example_compiles() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let object = Path::new(env!("CARGO_TARGET_TMPDIR")).join("export.o");
    let status = Command::new("cc")
        .args(["-c", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include("example"))
        .arg("-I")
        .arg(here.join("include"))
        .arg(here.join("examples/export.c"))
        .arg("-o")
        .arg(object)
        .status();
    match status {
        Ok(status) => assert!(status.success()),
        Err(_) => eprintln!("skipped: there is no C compiler"),
    }
}
