// SPDX-License-Identifier: MIT OR Apache-2.0

//! Planted bugs: each patch in `tests/planted/` breaks a copy of the driver, or of user space (the libraries, the shim,
//! the command `pinbuf`), and some test has to fail.
//!
//! The first line of a patch says what is wrong. An optional second line, `First: ROW [FILTER ...]`, names the
//! row, and the tests of it, that run before all others; this only saves time. Then come the tests of the
//! driver's pure parts on the host, if the patch changes one of these, and the rows [`ROWS`] in guests, each
//! until its first failure. For user space, it is the unit tests of [`PACKAGES`], and [`ROWS_OF_USERSPACE`]. A bug that
//! passes all of them shows a missing test. The [`control`] is the same without any bug: a test that fails there proves
//! nothing.
//!
//! `cargo mutants` plants its own bugs into the pure parts ([`mutants`]).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use walkdir::WalkDir;

use crate::debian::tree::Tree;
use crate::guest::{End, Guest, Options, Outcome, Streams};
use crate::image::userspace::{self, Build};
use crate::kernel::module;
use crate::kernel::Kernel;
use crate::paths;
use crate::test::ktap;
use crate::test::runs::{Run, Verdict, RUNS};
use crate::test::{Collector, BOOTS, BOOT_LIMIT, HANG};
use crate::ui::{say, seconds, step};

/// Where the patches are, from the root of the repository.
const PATCHES: &str = "tests/planted";

/// Mutants that no test needs to notice, and why.
const MUTANTS_MISSED: &str = "tests/planted/mutants-missed.txt";

/// Where the results go.
const RESULTS: &str = "tests/RESULTS-planted.md";

/// The rows that have to catch a bug, in this order: the rows of every change, except for those that differ in
/// the kernel alone.
const ROWS: &[&str] = &[
    "stock",
    "memory",
    "swiotlb",
    "pins",
    "movable",
    "torture",
    "mappings",
    "conformance",
];

/// The same for bugs of user space.
const ROWS_OF_USERSPACE: &[&str] = &["conformance", "clients"];

/// The packages below this directory are user space, and have unit tests.
const USERSPACE: &str = "shim/";
const PACKAGES: &[&str] = &[
    "pinbuf",
    "pinbuf-capi",
    "pinbuf-cli",
    "pinbuf-preload",
    "pinbuf-udmabuf",
];

/// The programs of tests that user space is linked into.
const LINKED: &[&str] = &["pinbuf-clients"];

/// What user space is built from.
const SOURCES: &[&str] = &[
    "driver",
    "packaging",
    "qemu-scripts",
    "shim",
    "tests",
    "uapi",
];

/// Parts of the driver that `tests/pure` compiles for the host.
const PURE: &[&str] = &[
    "driver/allowances.rs",
    "driver/charge.rs",
    "driver/discards.rs",
    "driver/extents.rs",
    "driver/one_or_more.rs",
    "driver/pin/rest.rs",
    "driver/pin/retry.rs",
    "driver/pin/turn.rs",
    "driver/ranges.rs",
    "driver/uaccess.rs",
];

/// Replaces the module that the guest has, or its programs and libraries, by those in its directory, and runs a command.
const SCRIPT: &str = r#"#!/bin/sh
set -eu
modules=$1
shift
if [ -e pinbuf.ko ]; then
	modprobe -r pinbuf
	cp pinbuf.ko "/usr/lib/modules/$(uname -r)/updates/pinbuf.ko"
fi
if [ -e usr ]; then
	cp -r usr/. /usr/
fi
for module in pinbuf $modules; do
	modprobe "$module" || exit 96
done
export PINBUF_FIRST_FAILURE_ENDS=1
exec "$@"
"#;

/// What the script says if the broken module cannot be loaded.
const NOT_LOADED: i32 = 96;

/// A planted bug.
#[derive(Debug)]
pub struct Bug {
    /// The patch's name.
    pub name: String,
    /// What is wrong.
    what: String,
    /// The row to run first, and the tests of it.
    first: Option<(String, Vec<String>)>,
    path: PathBuf,
    /// The files that it changes.
    files: Vec<String>,
}

/// What noticed a bug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caught {
    /// The row, and the test.
    by: String,
    /// From the module's build to the failure, guests' boots included.
    after: Duration,
}

/// All bugs, by their names.
pub fn bugs() -> Result<Vec<Bug>> {
    let mut bugs = Vec::new();
    for entry in fs::read_dir(paths::root().join(PATCHES)).context(PATCHES)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "patch") {
            bugs.push(Bug::read(&path)?);
        }
    }
    bugs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(bugs)
}

impl Bug {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let (head, _) = text
            .split_once("\ndiff --git ")
            .with_context(|| format!("{name}: there is no patch behind the text"))?;
        let mut lines = head.lines().filter(|line| !line.is_empty());
        let what = lines.next().unwrap_or_default().to_owned();
        if !what.ends_with('.') || what.contains('|') {
            bail!("{name}: the first line has to be a sentence that says what is wrong");
        }
        let mut first = None;
        for line in lines {
            let words = line
                .strip_prefix("First: ")
                .with_context(|| format!("{name}: what is `{line}`?"))?;
            let mut words = words.split_whitespace().map(str::to_owned);
            first = words.next().map(|row| (row, words.collect()));
        }
        let files = text
            .lines()
            .filter_map(|line| line.strip_prefix("+++ b/"))
            .map(str::to_owned)
            .collect::<Vec<_>>();
        let of = |part: &str| files.iter().all(|file: &String| file.starts_with(part));
        if !of("driver/") && !of(USERSPACE) {
            bail!("{name}: it has to change the driver alone, or {USERSPACE} alone");
        }
        Ok(Self {
            name: name.into_owned(),
            what,
            first,
            path: path.to_owned(),
            files,
        })
    }

    /// Whether it is one of user space.
    fn is_of_userspace(&self) -> bool {
        self.files.iter().all(|file| file.starts_with(USERSPACE))
    }

    /// `git apply` with these options, in a directory with the sources.
    fn apply(&self, directory: &Path, options: &[&str]) -> Result<()> {
        let output = Command::new("git")
            .arg("apply")
            .args(options)
            .arg(&self.path)
            .current_dir(directory)
            // The directory is no part of a repository: without this, git would look for one above it, and
            // leave out what does not lie in the part of it where it runs.
            .env(
                "GIT_CEILING_DIRECTORIES",
                directory.parent().unwrap_or(directory),
            )
            .stdin(Stdio::null())
            .output()
            .context("running git")?;
        if !output.status.success() {
            bail!(
                "{PATCHES}/{}.patch does not apply:\n{}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(())
    }

    /// The rows, with what is to be run of each: the first one twice, if a part of it comes first.
    fn rows(&self) -> Result<Vec<(&'static Run, Vec<String>)>> {
        let find = |name: &str| {
            RUNS.iter()
                .find(|run| run.name == name)
                .with_context(|| format!("{}: there is no row `{name}`", self.name))
        };
        let mut rows = Vec::new();
        if let Some((row, filters)) = &self.first {
            rows.push((find(row)?, filters.clone()));
        }
        let all = if self.is_of_userspace() {
            ROWS_OF_USERSPACE
        } else {
            ROWS
        };
        for name in all {
            if !rows
                .iter()
                .any(|(run, filters)| run.name == *name && filters.is_empty())
            {
                rows.push((find(name)?, Vec::new()));
            }
        }
        Ok(rows)
    }
}

/// What the module is built from, broken, and built in.
fn place() -> PathBuf {
    paths::build().join("planted/source")
}

/// The same for user space.
fn place_of_userspace() -> PathBuf {
    paths::build().join("planted/userspace")
}

/// Looks for the test that notices a bug; `None` if there is none.
pub fn hunt(bug: &Bug) -> Result<Option<Caught>> {
    if bug.is_of_userspace() {
        let place = place_of_userspace();
        copy_workspace(&place)?;
        bug.apply(&place, &[])?;
        return search_userspace(&place, bug.rows()?);
    }
    let place = place();
    copy(&place)?;
    bug.apply(&place, &[])?;
    let pure = bug.files.iter().any(|file| PURE.contains(&file.as_str()));
    search(&place, pure, bug.rows()?)
}

/// Looks for a test that fails with the driver as it is.
pub fn control() -> Result<Option<Caught>> {
    let place = place();
    copy(&place)?;
    let rows = |names: &[&str]| -> Vec<(&'static Run, Vec<String>)> {
        let runs = RUNS.iter().filter(|run| names.contains(&run.name));
        runs.map(|run| (run, Vec::new())).collect()
    };
    if let Some(caught) = search(&place, true, rows(ROWS))? {
        return Ok(Some(caught));
    }
    let place = place_of_userspace();
    copy_workspace(&place)?;
    search_userspace(&place, rows(ROWS_OF_USERSPACE))
}

/// The first test that fails with the driver in `place`: of the pure parts on the host, if `pure` says so,
/// then of these rows.
fn search(
    place: &Path,
    pure: bool,
    rows: Vec<(&'static Run, Vec<String>)>,
) -> Result<Option<Caught>> {
    let start = Instant::now();
    let caught = |by: String| {
        Some(Caught {
            by,
            after: start.elapsed(),
        })
    };
    if pure {
        if let Some(test) = on_host(place)? {
            return Ok(caught(format!("host: {test}")));
        }
    }
    let tools = Tree::tools()?;
    let mut built = None;
    for (run, filters) in rows {
        if built != Some(run.kernel) {
            let kernel = Kernel::select(&tools, run.kernel)?;
            module::build(&tools, &kernel, place)?;
            built = Some(run.kernel);
        }
        let files = [(place.join("driver/pinbuf.ko"), PathBuf::from("pinbuf.ko"))];
        if let Some(test) = in_guest(run, &filters, &files)? {
            return Ok(caught(format!("{}: {test}", run.name)));
        }
    }
    Ok(None)
}

/// The first test that fails with the user space in `place`: of its own packages on the host, then of these rows.
fn search_userspace(
    place: &Path,
    rows: Vec<(&'static Run, Vec<String>)>,
) -> Result<Option<Caught>> {
    let start = Instant::now();
    let caught = |by: String| {
        Some(Caught {
            by,
            after: start.elapsed(),
        })
    };
    let target = paths::build().join("planted/target-userspace");
    let packages = |names: &[&str]| -> Vec<String> {
        let words = names.iter().flat_map(|name| ["--package", *name]);
        words.map(str::to_owned).collect()
    };
    if let Some(test) = cargo_test(place, &target, &packages(PACKAGES))? {
        return Ok(caught(format!("host: {test}")));
    }
    step("userspace with the bug", |step| {
        let mut command = userspace::cargo();
        command
            .current_dir(place)
            .args(["build", "--target-dir"])
            .arg(&target)
            .args(packages(PACKAGES))
            .args(packages(LINKED));
        step.run(&mut command, "planted.log")
    })?;
    let files: Vec<_> = userspace::programs_in(&target.join("debug"))?
        .into_iter()
        .filter_map(|path| Some((path.clone(), userspace::place(&path)?)))
        .collect();
    for (run, filters) in rows {
        if let Some(test) = in_guest(run, &filters, &files)? {
            return Ok(caught(format!("{}: {test}", run.name)));
        }
    }
    Ok(None)
}

/// Makes `place` a copy of what user space is built from.
fn copy_workspace(place: &Path) -> Result<()> {
    let root = paths::root();
    for directory in SOURCES {
        for entry in WalkDir::new(root.join(directory)) {
            let entry = entry?;
            let to = place.join(entry.path().strip_prefix(root)?);
            if entry.file_type().is_dir() {
                fs::create_dir_all(&to)?;
            } else {
                write_changed(&to, &fs::read(entry.path())?)?;
            }
        }
    }
    for name in ["Cargo.lock", "Cargo.toml"] {
        write_changed(&place.join(name), &fs::read(root.join(name))?)?;
    }
    Ok(())
}

/// Makes `place` a copy of the checkout.
fn copy(place: &Path) -> Result<()> {
    module::copy(place)?;
    let root = paths::root();
    // The tests of the pure parts, as a workspace of their own.
    for entry in WalkDir::new(root.join("tests/pure")) {
        let entry = entry?;
        let to = place.join(entry.path().strip_prefix(root)?);
        if entry.file_type().is_dir() {
            fs::create_dir_all(&to)?;
        } else {
            write_changed(&to, &fs::read(entry.path())?)?;
        }
    }
    write_changed(
        &place.join("Cargo.lock"),
        &fs::read(root.join("Cargo.lock"))?,
    )?;
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let whole = manifest.split_once("members = [").and_then(|(head, tail)| {
        let (_, tail) = tail.split_once(']')?;
        Some(format!(
            "{head}members = [\"tests/pure\", \"tests/pure/kernel\"]{tail}"
        ))
    });
    let whole = whole.context("Cargo.toml has no list of members")?;
    // Profiles for packages that this workspace does not have.
    let whole = whole.split("# Here are the loops").next().unwrap_or(&whole);
    // The tests run for each mutant: what makes their cases is compiled once.
    let whole = whole.replace("opt-level = 0", "opt-level = 2");
    write_changed(&place.join("Cargo.toml"), whole.as_bytes())
}

/// What is built from an unchanged file is not built again.
fn write_changed(path: &Path, contents: &[u8]) -> Result<()> {
    if fs::read(path).ok().as_deref() != Some(contents) {
        fs::write(path, contents).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The first test of the pure parts that fails.
fn on_host(place: &Path) -> Result<Option<String>> {
    cargo_test(place, &paths::build().join("planted/target"), &[])
}

/// The first test of `cargo test` that fails.
fn cargo_test(place: &Path, target: &Path, words: &[String]) -> Result<Option<String>> {
    let output = userspace::cargo()
        .current_dir(place)
        .args(["test", "--color=never", "--target-dir"])
        .arg(target)
        .args(words)
        // A failing case is looked for, and not kept.
        .env("PROPTEST_MAX_SHRINK_ITERS", "0")
        .env("PROPTEST_FAILURE_PERSISTENCE", "off")
        .stdin(Stdio::null())
        .output()
        .context("running cargo")?;
    if output.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = text
        .lines()
        .find_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    match failed {
        Some(name) => Ok(Some(name.to_owned())),
        None => bail!(
            "it does not compile:\n{}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        ),
    }
}

/// The first test of a row that fails, or what else goes wrong with it.
fn in_guest(run: &Run, filters: &[String], files: &[(PathBuf, PathBuf)]) -> Result<Option<String>> {
    say(&format!("  ... {}: {}", run.name, run.command));
    let share = tempfile::Builder::new().prefix("pinbuf-share-").tempdir()?;
    for (path, place) in files {
        let to = share.path().join(place);
        fs::create_dir_all(to.parent().unwrap_or(&to))?;
        fs::copy(path, &to).with_context(|| format!("copying {}", path.display()))?;
    }
    executable(&share.path().join("run"), SCRIPT.as_bytes())?;
    let mut command = vec!["./run".to_owned(), run.modules.join(" ")];
    command.extend(shell_words::split(run.command)?);
    if command[2].starts_with("tests/") {
        let to = share.path().join(&command[2]);
        fs::create_dir_all(to.parent().unwrap_or(&to))?;
        executable(&to, &fs::read(paths::root().join(&command[2]))?)?;
    }
    for filter in filters {
        command.extend(["--filter".to_owned(), filter.clone()]);
    }
    let options = Options {
        kernel: run.kernel.to_owned(),
        memory: run.memory.to_owned(),
        cmdline: run.cmdline.to_owned(),
        qemu: shell_words::split(run.qemu)?,
        image: run.image.to_owned(),
        build: Build::Nothing,
        command,
        timeout: Some(Duration::from_secs(run.timeout)),
        boot_limit: Some(BOOT_LIMIT),
        share: Some(share.path().to_owned()),
        ..Options::default()
    };
    let (outcome, text) = boot(&options)?;
    if outcome.end == End::Exited(NOT_LOADED) {
        bail!("the module does not load: {}", paths::shown(&outcome.log));
    }
    let well = outcome.end == End::Exited(0);
    if run.verdict == Verdict::Ktap {
        let report = ktap::parse(&text);
        if let Some((name, lines)) = report.failed.first() {
            let why = lines.iter().rev().find_map(|line| line.strip_prefix("# "));
            say(&format!("    {name}: {}", why.unwrap_or_default()));
            return Ok(Some(name.clone()));
        }
        if well && report.passed.is_empty() {
            bail!("row {} runs no test with the filters {filters:?}", run.name);
        }
        if outcome.complaints.is_empty() && !well && report.passed.is_empty() {
            // Not even one test began, so no test has noticed anything.
            bail!("{}: {:?}: {text}", run.name, outcome.end);
        }
    }
    if let Some(complaint) = outcome.complaints.first() {
        return Ok(Some(format!("the kernel's log: {complaint}")));
    }
    if let Some(problem) = outcome.problem() {
        return Ok(Some(problem));
    }
    let failed = text.lines().find_map(|line| line.split_once("not ok "));
    if let Some((_, name)) = failed.filter(|_| !well) {
        return Ok(Some(name.to_owned()));
    }
    Ok((!well).then(|| format!("{:?}", outcome.end)))
}

fn executable(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// Runs a guest. Runs it again if the emulator hangs before anything of pinbuf runs.
fn boot(options: &Options) -> Result<(Outcome, String)> {
    for attempt in 1.. {
        let output = Arc::new(Mutex::new(Vec::new()));
        let collector = || -> Box<dyn std::io::Write + Send> {
            Box::new(Collector {
                output: Arc::clone(&output),
                shown: false,
            })
        };
        let streams = Streams {
            input: None,
            output: collector(),
            error: collector(),
        };
        let outcome = Guest::start(options, streams)?.wait()?;
        let only_hangs = outcome
            .complaints
            .iter()
            .all(|line| HANG.iter().any(|part| line.contains(part)));
        if outcome.end == End::NotBooted && only_hangs && attempt < BOOTS {
            continue;
        }
        let text = output.lock().unwrap_or_else(|error| error.into_inner());
        return Ok((outcome, String::from_utf8_lossy(&text).into_owned()));
    }
    unreachable!("a boot ends the loop")
}

/// The results of the mutants.
#[derive(Debug, Default)]
pub struct Mutants {
    /// Those that a test noticed, or that never came to an end.
    pub caught: usize,
    /// Those that do not compile.
    unviable: usize,
    /// Those that nothing noticed, for a known reason.
    excused: Vec<String>,
    /// Those that nothing noticed.
    pub missed: Vec<String>,
    /// For each file, those that a test noticed, and all that compile.
    files: BTreeMap<String, (usize, usize)>,
}

/// Lets `cargo mutants` change the driver's pure parts in each way that it knows, and runs their tests.
/// It is installed below `build/` if it is not there.
pub fn mutants() -> Result<Mutants> {
    let place = place();
    copy(&place)?;
    let home = paths::build().join("cargo-mutants");
    let program = home.join("bin/cargo-mutants");
    if !program.exists() {
        step("cargo-mutants", |step| {
            let mut command = userspace::cargo();
            command
                .args(["install", "--locked", "cargo-mutants", "--root"])
                .arg(&home);
            step.run(&mut command, "mutants.log")
                .context("cargo-mutants cannot be installed")
        })?;
    }
    let out = paths::build().join("planted");
    step("mutants of the pure parts", |step| {
        let mut command = userspace::cargo();
        command
            .current_dir(&place)
            .args(["mutants", "--package", "pinbuf-pure"])
            .args(["--file", "**/driver/**/*.rs", "--colors", "never"])
            // The tests of one mutant run on several processors.
            .args(["--timeout", "120", "--jobs"])
            .arg((crate::jobs() / 2).max(1).to_string())
            .arg("--output")
            .arg(&out)
            .env("PATH", with_path(&home.join("bin"))?)
            .env("PROPTEST_MAX_SHRINK_ITERS", "0")
            .env("PROPTEST_FAILURE_PERSISTENCE", "off");
        // It fails if a mutant was missed. Whether it ran to its end shows below.
        let result = step.run(&mut command, "mutants.log");
        let outcomes = out.join("mutants.out/outcomes.json");
        if !outcomes.exists() {
            result?;
        }
        read_mutants(
            &serde_json::from_slice(&fs::read(outcomes)?)?,
            &fs::read_to_string(paths::root().join(MUTANTS_MISSED)).context(MUTANTS_MISSED)?,
        )
    })
}

fn with_path(directory: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(directory.to_owned()).chain(std::env::split_paths(&path));
    Ok(std::env::join_paths(all)?)
}

/// Reads `outcomes.json`; `reasons` are lines of mutants, below remarks that say why nothing notices them.
fn read_mutants(outcomes: &serde_json::Value, reasons: &str) -> Result<Mutants> {
    let mut mutants = Mutants::default();
    let all = outcomes["outcomes"]
        .as_array()
        .context("no list of outcomes")?;
    let mut baseline = false;
    for outcome in all {
        let summary = outcome["summary"].as_str().unwrap_or_default();
        let Some(mutant) = outcome["scenario"].get("Mutant") else {
            baseline = summary == "Success";
            continue;
        };
        let name = mutant["name"].as_str().unwrap_or_default();
        // Without the place in the file, which every change moves.
        let file = mutant["file"].as_str().unwrap_or_default();
        let file = file.rsplit("../").next().unwrap_or(file);
        let change = name.split_once(": ").map_or(name, |(_, change)| change);
        let name = format!("{file}: {change}");
        if summary == "Unviable" {
            mutants.unviable += 1;
            continue;
        }
        let counts = mutants.files.entry(file.to_owned()).or_default();
        counts.1 += 1;
        match summary {
            "CaughtMutant" | "Timeout" => {
                mutants.caught += 1;
                counts.0 += 1;
            }
            _ if reasons.lines().any(|line| line == name) => mutants.excused.push(name),
            _ => mutants.missed.push(name),
        }
    }
    if !baseline || mutants.caught == 0 {
        bail!("the tests of the pure parts fail without any mutant, or there is none");
    }
    Ok(mutants)
}

impl Mutants {
    /// For the file with the results.
    pub fn text(&self) -> String {
        let viable = self.caught + self.excused.len() + self.missed.len();
        let mut text = format!(
            "Of {viable} mutants of the driver's pure parts that compile ({} do not), `tests/pure` catches {}, and \
             {} change nothing that a test could notice (`{MUTANTS_MISSED}` says why).\n",
            self.unviable,
            self.caught,
            self.excused.len()
        );
        text += "\n| file | mutants | caught |\n|---|---|---|\n";
        for (file, (caught, all)) in &self.files {
            text += &format!("| `{file}` | {all} | {caught} |\n");
        }
        if !self.missed.is_empty() {
            text += "\nNot caught:\n\n";
            for name in &self.missed {
                text += &format!("* `{name}`\n");
            }
        }
        text
    }
}

/// The results of a run, and of earlier ones.
pub struct Results(BTreeMap<String, String>);

/// The head of the file with the results.
const HEAD: &str = "\
<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->
# Planted bugs: which test catches which

Written by `./qemu-scripts/test --run planted`; `qemu-scripts/src/test/planted.rs` says how. Seconds are from the
broken module's build to the failure, boots of guests included, under TCG.

| bug | what is wrong | caught by | seconds |
|---|---|---|---|
";

/// The head of its part about mutants.
const MUTANTS_HEAD: &str = "\n## `cargo mutants`\n\n";

/// The beginning of the row of a table.
const ROW: &str = "| `";

impl Results {
    /// The results in the file, as far as their bugs still exist.
    pub fn read(bugs: &[Bug]) -> Self {
        let text = fs::read_to_string(paths::root().join(RESULTS)).unwrap_or_default();
        let name_of = |line: &str| Some(line.strip_prefix(ROW)?.split_once('`')?.0.to_owned());
        let mut rows: BTreeMap<String, String> = text
            .lines()
            .filter_map(|line| Some((name_of(line)?, line.to_owned())))
            .filter(|(name, _)| bugs.iter().any(|bug| bug.name == *name))
            .collect();
        if let Some((_, mutants)) = text.split_once(MUTANTS_HEAD) {
            rows.insert(MUTANTS_HEAD.to_owned(), mutants.to_owned());
        }
        Self(rows)
    }

    /// Adds one, and writes all.
    pub fn add(&mut self, bug: &Bug, caught: Option<&Caught>) -> Result<()> {
        let (by, after) = match caught {
            Some(caught) => (
                caught.by.replace('|', "\\|"),
                caught.after.as_secs().to_string(),
            ),
            None => ("**nothing**".to_owned(), String::new()),
        };
        let row = format!("{ROW}{}` | {} | {by} | {after} |", bug.name, bug.what);
        self.0.insert(bug.name.clone(), row);
        self.write()
    }

    /// Sets the part about mutants, and writes all.
    pub fn set_mutants(&mut self, text: String) -> Result<()> {
        self.0.insert(MUTANTS_HEAD.to_owned(), text);
        self.write()
    }

    fn write(&self) -> Result<()> {
        let mut text = HEAD.to_owned();
        let rows = self.0.iter().filter(|(name, _)| *name != MUTANTS_HEAD);
        for (_, row) in rows {
            text += row;
            text.push('\n');
        }
        if let Some(mutants) = self.0.get(MUTANTS_HEAD) {
            text += MUTANTS_HEAD;
            text += mutants;
        }
        fs::write(paths::root().join(RESULTS), text).context(RESULTS)
    }
}

impl Caught {
    /// The text for messages.
    pub fn text(&self) -> String {
        format!("{} ({})", self.by, seconds(self.after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutants_are_counted() {
        let mutant = |name: &str, summary: &str| {
            serde_json::json!({
                "scenario": { "Mutant": {
                    "name": format!("tests/pure/src/../../../driver/a.rs:1:2: {name}"),
                    "file": "tests/pure/src/../../../driver/a.rs",
                } },
                "summary": summary,
            })
        };
        let baseline =
            |summary: &str| serde_json::json!({ "scenario": "Baseline", "summary": summary });
        let all = [
            baseline("Success"),
            mutant("replace a", "CaughtMutant"),
            mutant("replace b", "Timeout"),
            mutant("replace c", "Unviable"),
            mutant("replace d", "MissedMutant"),
            mutant("replace e", "MissedMutant"),
        ];
        let outcomes = serde_json::json!({ "outcomes": all });
        let reasons = "# Never reached.\ndriver/a.rs: replace d\n";
        let mutants = read_mutants(&outcomes, reasons).unwrap();
        assert_eq!((mutants.caught, mutants.unviable), (2, 1));
        assert_eq!(mutants.excused, ["driver/a.rs: replace d"]);
        assert_eq!(mutants.missed, ["driver/a.rs: replace e"]);
        assert!(mutants.text().contains("| `driver/a.rs` | 4 | 2 |"));
        let failing = [baseline("Failure"), mutant("replace a", "CaughtMutant")];
        let outcomes = serde_json::json!({ "outcomes": failing });
        assert!(read_mutants(&outcomes, "").is_err());
    }

    /// A patch that no longer applies plants nothing.
    #[test]
    fn patches_apply() {
        let bugs = bugs().unwrap();
        assert!(bugs.len() >= 25);
        let [driver, workspace] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        module::copy(driver.path()).unwrap();
        copy_workspace(workspace.path()).unwrap();
        let mut failed = Vec::new();
        for bug in &bugs {
            let copy = match bug.is_of_userspace() {
                true => &workspace,
                false => &driver,
            };
            if let Err(error) = bug.apply(copy.path(), &["--check"]) {
                failed.push(format!("{error:#}"));
            }
            bug.rows().unwrap();
        }
        assert!(failed.is_empty(), "{}", failed.join("\n"));
    }
}
