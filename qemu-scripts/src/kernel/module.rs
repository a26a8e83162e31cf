// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel module, and those of the tests: built for one kernel, outside of the checkout.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use walkdir::WalkDir;

use crate::cache::{self, Key};
use crate::debian::tree::{remove, Tree, BUILD};
use crate::kernel::Kernel;
use crate::paths;
use crate::ui::{step, Step};

/// Asks the root Kbuild for the modules of the tests, too.
const TESTS: &str = "CONFIG_PINBUF_TESTS=m";

/// Builds the modules for this kernel if their source changed, and returns their paths.
pub fn ensure(tools: &Tree, kernel: &Kernel) -> Result<Vec<PathBuf>> {
    if !paths::root().join("Kbuild").exists() {
        bail!(
            "{} has no Kbuild file, so there is nothing to build",
            paths::root().display()
        );
    }
    let (arguments, tree) = kernel.build_tree(tools)?;
    let release = &kernel.release;
    let sources = sources()?;
    let mut key = Key::new()
        .text(&tree.finish())
        .text(TESTS)
        .texts(&arguments);
    for path in &sources {
        key = key
            .text(&path.to_string_lossy())
            .files(&paths::root().join(path))?;
    }
    let place = paths::build().join("modules").join(release);
    cache::ensure(
        &format!("module/{release}"),
        &format!("modules for {release}"),
        key,
        |step| {
            // Kbuild's rules for Rust want source and objects in one directory: the source is copied.
            copy_changed(&sources, &place)?;
            make(tools, kernel, &arguments, &place, step)
        },
    )?;
    let order = fs::read_to_string(place.join("modules.order")).context("no module was built")?;
    Ok(order
        .lines()
        .map(|object| {
            let name = Path::new(object).with_extension("ko");
            if name.is_absolute() {
                name
            } else {
                place.join(name)
            }
        })
        .collect())
}

/// Builds the modules in a directory below `build/` that has the source already.
pub fn build(tools: &Tree, kernel: &Kernel, place: &Path) -> Result<()> {
    let (arguments, _) = kernel.build_tree(tools)?;
    step(format!("modules in {}", paths::shown(place)), |step| {
        make(tools, kernel, &arguments, place, step)
    })
}

fn make(
    tools: &Tree,
    kernel: &Kernel,
    arguments: &[String],
    place: &Path,
    step: &Step,
) -> Result<()> {
    let place = place.strip_prefix(paths::build())?.display();
    let inside = format!("M={BUILD}/{place}");
    let jobs = format!("-j{}", crate::jobs());
    let mut make = vec!["make"];
    make.extend(arguments.iter().map(String::as_str));
    make.extend([inside.as_str(), TESTS, &jobs, "modules"]);
    let mut command = tools.command(&make)?;
    step.run(&mut command, &format!("module-{}.log", kernel.release))
        .context("the module does not compile; its errors are above")
}

/// Copies what modules are built from to a directory.
pub fn copy(place: &Path) -> Result<()> {
    copy_changed(&sources()?, place)
}

/// The files that Kbuild reads, relative to the repository's root.
fn sources() -> Result<BTreeSet<PathBuf>> {
    let root = paths::root();
    let mut sources = BTreeSet::new();
    for name in [
        "Cargo.toml",
        "Kbuild",
        "Makefile",
        "driver",
        "uapi",
        "tests",
    ] {
        let below_tests = name == "tests";
        let walk = WalkDir::new(root.join(name))
            .into_iter()
            .filter_entry(|entry| {
                // Of the tests, only those that are kernel modules.
                !(below_tests
                    && entry.depth() == 1
                    && entry.file_type().is_dir()
                    && !entry.path().join("Kbuild").exists())
            });
        for entry in walk {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if error.depth() == 0 => continue,
                Err(error) => return Err(error.into()),
            };
            let path = entry.path().strip_prefix(root)?;
            let is_userspace =
                below_tests && entry.depth() == 1 && path.file_name() != Some("Kbuild".as_ref());
            if entry.file_type().is_file() && !is_userspace && !is_output(path) {
                sources.insert(path.to_owned());
            }
        }
    }
    Ok(sources)
}

/// What an earlier build in the checkout left behind.
fn is_output(path: &Path) -> bool {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    name.starts_with('.')
        || name == "modules.order"
        || name == "Module.symvers"
        || [".o", ".ko", ".mod", ".mod.c", ".cmd", ".rsi"]
            .iter()
            .any(|end| name.ends_with(end))
}

/// Copies what differs, and removes what an earlier copy left and is no longer there.
fn copy_changed(sources: &BTreeSet<PathBuf>, place: &Path) -> Result<()> {
    fs::create_dir_all(place)?;
    let list = place.join(".pinbuf-sources");
    for old in fs::read_to_string(&list).unwrap_or_default().lines() {
        if !sources.contains(Path::new(old)) {
            remove(&place.join(old))?;
        }
    }
    let mut names = String::new();
    for path in sources {
        let from = paths::root().join(path);
        let to = place.join(path);
        let contents = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
        if fs::read(&to).ok().as_deref() != Some(&contents) {
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&to, contents)?;
        }
        names += &format!("{}\n", path.display());
    }
    fs::write(list, names)?;
    Ok(())
}
