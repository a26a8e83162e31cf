// SPDX-License-Identifier: MIT OR Apache-2.0

//! Checks of the source that run none of it: rustfmt, clippy (of user space and of the kernel module), rustdoc,
//! the crates' packages, the kernel's checkpatch for C, and the links and commands of documents.

mod documents;
mod sizes;

use std::fs;
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::debian::tree::{Tree, BUILD};
use crate::image::userspace;
use crate::kernel::module;
use crate::kernel::Kernel;
use crate::paths;

/// clippy for the compiler that kernels are built with, what checkpatch is written in, and the checker
/// of manual pages.
const PACKAGES: &[&str] = &["mandoc", "perl", "rust-clippy"];

/// The crates that programs and distributions use.
const CRATES: &[&str] = &[
    "pinbuf-uapi",
    "pinbuf-udmabuf",
    "pinbuf",
    "pinbuf-preload",
    "pinbuf-capi",
    "pinbuf-cli",
];

/// The manual pages that are written by hand.
const PAGES: &str = "docs/man";

/// The C of the kernel modules.  checkpatch would have `BIT()` in the uapi header, which user space
/// does not know.
const C: &[&str] = &[
    "driver/helpers.c",
    "driver/helpers.h",
    "tests/importer/failing_pins.c",
    "tests/importer/failing_pins.h",
    "tests/importer/importer.c",
    "tests/importer/importer.h",
    "tests/importer/syncs.c",
    "tests/importer/syncs.h",
    "uapi/pinbuf.h",
];

/// How a check ended.
pub enum Outcome {
    /// No complaint.
    Clean,
    /// The tool is not there.
    Skipped(&'static str),
    /// What the tool reports.
    Dirty(String),
}

/// A check: its name, and what it does.
type Check = (&'static str, fn() -> Result<Outcome>);

/// All checks.
pub const CHECKS: &[Check] = &[
    ("rustfmt.userspace", format_userspace),
    ("rustfmt.driver", format_driver),
    ("clippy.userspace", clippy_userspace),
    ("clippy.driver", clippy_driver),
    ("rustdoc", rustdoc),
    ("packages", packages),
    ("checkpatch", checkpatch),
    ("documents", documents),
    ("sizes", sizes),
    ("manuals", manuals),
];

fn format_userspace() -> Result<Outcome> {
    let mut command = userspace::cargo();
    command.args(["fmt", "--all", "--check"]);
    of_host(
        &mut command,
        &["fmt", "--version"],
        "this cargo has no rustfmt",
    )
}

fn format_driver() -> Result<Outcome> {
    let mut command = Command::new("rustfmt");
    command.current_dir(paths::root()).args([
        "--check",
        "--edition",
        "2021",
        "driver/pinbuf_main.rs",
    ]);
    of_host(
        &mut command,
        &["fmt", "--version"],
        "this cargo has no rustfmt",
    )
}

fn clippy_userspace() -> Result<Outcome> {
    let mut command = userspace::cargo();
    command.args(["clippy", "--workspace", "--all-targets", "--quiet"]);
    command.args(["--", "--deny", "warnings"]);
    of_host(
        &mut command,
        &["clippy", "--version"],
        "this cargo has no clippy",
    )
}

fn clippy_driver() -> Result<Outcome> {
    let tools = Tree::tools()?;
    tools.require("lint", PACKAGES)?;
    let kernel = Kernel::select(&tools, "default")?;
    let (arguments, _) = kernel.build_tree(&tools)?;
    let name = format!("lint/{}", kernel.release);
    module::copy(&paths::build().join(&name))?;
    let inside = format!("M={BUILD}/{name}");
    let mut make = vec!["make"];
    make.extend(arguments.iter().map(String::as_str));
    // All packages again: for those that were compiled before, clippy reports nothing the second time.
    let mut clean = make.clone();
    clean.extend([inside.as_str(), "clean"]);
    run(&mut tools.command(&clean)?)?;
    make.extend([inside.as_str(), "CLIPPY=1", "modules"]);
    let (well, text) = run(&mut tools.command(&make)?)?;
    if well && !text.contains("warning:") {
        return Ok(Outcome::Clean);
    }
    Ok(Outcome::Dirty(text))
}

fn rustdoc() -> Result<Outcome> {
    let mut command = userspace::cargo();
    command.env("RUSTDOCFLAGS", "--deny warnings");
    command.args(["doc", "--workspace", "--no-deps", "--quiet"]);
    let (well, text) = run(&mut command)?;
    Ok(if well {
        Outcome::Clean
    } else {
        Outcome::Dirty(text)
    })
}

/// `cargo package` makes a package of each crate, with a readme and the licences. Nothing is compiled in its place, and
/// there is no lock file in it: both need the crates' dependencies on crates.io, where pinbuf is not published.
fn packages() -> Result<Outcome> {
    const OPTIONS: [&str; 5] = [
        "package",
        "--no-verify",
        "--exclude-lockfile",
        "--allow-dirty",
        "--package",
    ];
    let mut complaints = String::new();
    for name in CRATES {
        let (well, text) = run(userspace::cargo().args(OPTIONS).arg(name))?;
        if !well {
            complaints += &text;
            continue;
        }
        let (_, files) = run(userspace::cargo().args(OPTIONS).args([name, "--list"]))?;
        for wanted in ["README", "LICENSE-"] {
            if !files.lines().any(|file| file.starts_with(wanted)) {
                complaints += &format!("the package of {name} has no {wanted}\n");
            }
        }
    }
    Ok(match complaints.is_empty() {
        true => Outcome::Clean,
        false => Outcome::Dirty(complaints),
    })
}

fn checkpatch() -> Result<Outcome> {
    let tools = Tree::tools()?;
    tools.require("lint", PACKAGES)?;
    let kernel = Kernel::select(&tools, "default")?;
    let (_, _) = kernel.build_tree(&tools)?;
    let name = format!("lint/{}", kernel.release);
    module::copy(&paths::build().join(&name))?;
    let script = format!(
        "{BUILD}/kbuild/{}/source/scripts/checkpatch.pl",
        kernel.release
    );
    let files: Vec<String> = C
        .iter()
        .map(|file| format!("{BUILD}/{name}/{file}"))
        .collect();
    let mut words = vec!["perl", &script, "--no-tree", "--strict", "--terse"];
    words.extend(["--show-types", "--ignore", "BIT_MACRO", "--file"]);
    words.extend(files.iter().map(String::as_str));
    let (well, text) = run(&mut tools.command(&words)?)?;
    Ok(if well {
        Outcome::Clean
    } else {
        Outcome::Dirty(text)
    })
}

fn documents() -> Result<Outcome> {
    let complaints = documents::check(paths::root())?;
    Ok(if complaints.is_empty() {
        Outcome::Clean
    } else {
        Outcome::Dirty(complaints.join("\n"))
    })
}

fn sizes() -> Result<Outcome> {
    let complaints = sizes::check(paths::root())?;
    Ok(if complaints.is_empty() {
        Outcome::Clean
    } else {
        Outcome::Dirty(complaints.join("\n"))
    })
}

/// The pages of `docs/man`, and those that are made of the command line.
fn manuals() -> Result<Outcome> {
    let tools = Tree::tools()?;
    tools.require("lint", PACKAGES)?;
    let place = paths::build().join("lint/man");
    let _ = fs::remove_dir_all(&place);
    let mut command = userspace::cargo();
    command.args(["run", "--quiet", "--package", "pinbuf-cli"]);
    command.args(["--example", "manual", "--"]).arg(&place);
    let (well, text) = run(&mut command)?;
    if !well {
        return Ok(Outcome::Dirty(text));
    }
    for page in fs::read_dir(paths::root().join(PAGES)).context(PAGES)? {
        let page = page?;
        fs::copy(page.path(), place.join(page.file_name()))?;
    }
    // The completions of shells are there as well. Style is not checked: it includes references to pages of
    // other packages, which are not installed in the tree.
    let mut words = vec!["mandoc".to_owned(), "-T".to_owned(), "lint".to_owned()];
    words.extend(["-W".to_owned(), "warning".to_owned()]);
    for page in fs::read_dir(&place)? {
        let name = page?.file_name().to_string_lossy().into_owned();
        if name.ends_with(|c: char| c.is_ascii_digit()) {
            words.push(format!("{BUILD}/lint/man/{name}"));
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (well, text) = run(&mut tools.command(&words)?)?;
    Ok(if well {
        Outcome::Clean
    } else {
        Outcome::Dirty(text)
    })
}

/// A tool of the host's, which may lack it.
fn of_host(command: &mut Command, probe: &[&str], missing: &'static str) -> Result<Outcome> {
    let (there, _) = run(userspace::cargo().args(probe))?;
    if !there {
        return Ok(Outcome::Skipped(missing));
    }
    let (well, text) = run(command)?;
    Ok(if well {
        Outcome::Clean
    } else {
        Outcome::Dirty(text)
    })
}

/// Whether it succeeded, and what it printed.
fn run(command: &mut Command) -> Result<(bool, String)> {
    let output = command
        .output()
        .with_context(|| format!("running {:?}", command.get_program()))?;
    if output.status.code().is_none() {
        bail!("{:?} was killed", command.get_program());
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), text))
}
