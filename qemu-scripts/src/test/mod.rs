// SPDX-License-Identifier: MIT OR Apache-2.0

//! `test`: unit tests on the host, then guests.

mod ktap;
mod lint;
mod packages;
mod planted;
pub mod runs;
mod sanitize;

use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io::{stderr, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use clap::Args;
use nix::sys::sysinfo::sysinfo;

use self::lint::{Outcome, CHECKS};
use self::runs::{Run, Verdict, When, RUNS};
use self::sanitize::Tested;
use crate::command::demo;
use crate::debian::arch::Arch;
use crate::debian::archive;
use crate::debian::tree::Tree;
use crate::guest::watch;
use crate::guest::{End, Guest, Options, Streams};
use crate::image::userspace::{self, Build, Profile, Target};
use crate::kernel::module;
use crate::kernel::Kernel;
use crate::paths;
use crate::ui::{say, seconds, tail};

/// Reasons for which a test may be skipped.
const ALLOWED_SKIPS: &str = include_str!("../../allowed-skips.txt");

/// Rows that are not among [`RUNS`]: this one is judged from outside of the guest,
const SCREEN: &str = "screen";
/// and these run no guest, or several.
const LINT: &str = "lint";
const SANITIZE: &str = "sanitize";
/// Only with `--long`, or by this name: it is one machine, which starts many times.
const PACKAGES: &str = "packages";
/// Only with `--long`, or by this name.
const PLANTED: &str = "planted";
/// The part of it that has no bug.
const CONTROL: &str = "control";
/// The part of it that `cargo mutants` does.
const MUTANTS: &str = "mutants";

/// A guest comes to load pinbuf within this time, or never: about once in some hundred boots an emulated
/// processor gets no more timer interrupts, and everything that waits for time hangs.
pub const BOOT_LIMIT: Duration = Duration::from_secs(150);

/// What the kernel prints in such a hang. A guest that prints anything else is not started again.
pub const HANG: &[&str] = &["detected stall", "blocked for more than"];

/// How often a guest that hangs in this way is started.
pub const BOOTS: usize = 3;

/// How much of the kernel's log is shown when a guest did not end by itself.
const TAIL: usize = 60;

/// Run all tests, on the host and in guests.
#[derive(Debug, Args)]
pub struct Test {
    /// Include the rows that are too slow for every change.
    #[arg(long)]
    long: bool,
    /// Run guests with this kernel only; may be given several times.
    #[arg(long, value_name = "RELEASE")]
    kernel: Vec<String>,
    /// Run only tests whose names contain this; may be given several times.
    #[arg(long, value_name = "S")]
    filter: Vec<String>,
    /// Run only the row of this name; may be given several times. Besides the rows in guests: `host`
    /// (tests on the host), `sanitize` (some of them under AddressSanitizer), `lint`, `screen` (the demo's
    /// picture), and `planted` (which test catches which planted bug).
    #[arg(long, value_name = "NAME")]
    run: Vec<String>,
    /// Number of guests at the same time.  [default: one per processor, as memory permits]
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Print the names of the rows, and exit.
    #[arg(long)]
    list: bool,
}

/// Whether `--run` takes this name.
pub fn is_run(name: &str) -> bool {
    ["host", SANITIZE, LINT, SCREEN, PACKAGES, PLANTED].contains(&name)
        || RUNS.iter().any(|run| run.name == name)
}

/// Counts of all runs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Test {
    /// Runs them, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        if self.list {
            for run in RUNS {
                let when = if run.when == When::Long {
                    " (--long)"
                } else {
                    ""
                };
                println!("{}: {} on {}{when}", run.name, run.command, run.kernel);
            }
            println!("host: cargo test");
            println!("{SANITIZE}: cargo test, under AddressSanitizer");
            println!(
                "{LINT}: rustfmt, clippy, rustdoc, checkpatch, documents, sizes and manual pages"
            );
            println!("{SCREEN}: pinbuf-demo on default, and its picture on the guest's screen");
            println!(
                "{PACKAGES}: the Debian packages, on a machine that systemd starts from its disk (--long)"
            );
            println!(
                "{PLANTED}: the bugs of tests/planted, one at a time, and cargo mutants (--long)"
            );
            return Ok(0);
        }
        if let Some(name) = self.run.iter().find(|name| !is_run(name)) {
            bail!("there is no row `{name}`; `test --list` prints the names");
        }
        let everywhere = self.kernel.is_empty();
        let on_host: Vec<&'static str> = ["host", SANITIZE, LINT]
            .into_iter()
            .filter(|&name| everywhere && self.wants(name))
            .filter(|&name| name != LINT || self.filter.is_empty())
            .collect();
        let screen = everywhere && self.wants(SCREEN) && self.filter.is_empty();
        let mut jobs: Vec<Job> = RUNS
            .iter()
            .filter(|run| self.chosen(run))
            .flat_map(|run| {
                let kernels = match self.kernel.as_slice() {
                    [] => vec![run.kernel.to_owned()],
                    kernels => kernels.to_vec(),
                };
                kernels.into_iter().map(move |kernel| Job { run, kernel })
            })
            .collect();
        let start = Instant::now();
        let pending = prepare(&jobs);
        // First what takes longest to build, and what runs for longest: the last guests to end are short ones.
        jobs.sort_by_key(|job| Reverse((job.kernel == "debug", job.run.takes())));
        let mut queue = VecDeque::new();
        if !on_host.is_empty() {
            queue.push_back(Work::Host(on_host));
        }
        queue.extend(jobs.into_iter().map(Work::Guest));
        if screen {
            queue.push_back(Work::Screen);
        }
        let slow = self.run.is_empty() && self.long && self.filter.is_empty() && everywhere;
        let named = |wanted| self.run.iter().any(|name| name == wanted);
        if slow || named(PACKAGES) {
            queue.push_back(Work::Packages);
        }
        if slow || named(PLANTED) {
            queue.push_back(Work::Planted);
        }
        let all = self.work(queue, &pending);
        say(&format!("total time: {}", seconds(start.elapsed())));
        println!(
            "{} passed, {} failed, {} skipped",
            all.passed, all.failed, all.skipped
        );
        if all.passed == 0 && all.failed == 0 {
            say("no test matches; check --run, --kernel and --filter against `test --list`");
            return Ok(1);
        }
        Ok(i32::from(all.failed > 0))
    }

    fn wants(&self, name: &str) -> bool {
        self.run.is_empty() || self.run.iter().any(|wanted| wanted == name)
    }

    fn chosen(&self, run: &Run) -> bool {
        let named = self.run.iter().any(|name| name == run.name);
        let by_default = self.run.is_empty() && (self.long || run.when == When::Always);
        // With kernels given, rows that differ only by kernel would run twice.
        let sensible = self.kernel.is_empty() || named || run.kernel == "default";
        let filtered = self.filter.is_empty() || run.filters;
        (named || by_default) && sensible && filtered
    }

    /// `cargo test`.
    fn host(&self) -> Counts {
        say("== host: cargo test");
        let start = Instant::now();
        let mut counts = Counts::default();
        match self.cargo_test() {
            Ok((text, well)) => counts = judge_cargo_test(&text, well),
            Err(error) => {
                say(&format!("{error:#}"));
                counts.failed = 1;
            }
        }
        clear_progress();
        say(&summary("host", counts, start));
        counts
    }

    /// `cargo test` under AddressSanitizer.
    fn sanitize(&self) -> Counts {
        say("== sanitize: cargo test, under AddressSanitizer");
        let start = Instant::now();
        let mut counts = Counts::default();
        match sanitize::test(&self.filter) {
            Ok(Tested::Ran(text, well)) => counts = judge_cargo_test(&text, well),
            Ok(Tested::Skipped(reason)) => {
                if let Some(line) = skip(&mut counts, SANITIZE, reason) {
                    say(&line);
                }
            }
            Err(error) => {
                say(&format!("FAILED {SANITIZE}: {error:#}"));
                counts.failed = 1;
            }
        }
        clear_progress();
        say(&summary(SANITIZE, counts, start));
        counts
    }

    /// Planted bugs: each is a test, which fails if no test notices the bug.
    fn planted(&self) -> Counts {
        say("== planted: bugs of tests/planted");
        let start = Instant::now();
        let mut counts = Counts::default();
        if let Err(error) = self.plant(&mut counts) {
            counts.failed += 1;
            say(&format!("FAILED {PLANTED}: {error:#}"));
        }
        say(&summary(PLANTED, counts, start));
        counts
    }

    fn plant(&self, counts: &mut Counts) -> Result<()> {
        let wanted = |name: &str| {
            self.filter.is_empty() || self.filter.iter().any(|part| name.contains(part.as_str()))
        };
        if wanted(CONTROL) {
            match planted::control()? {
                None => counts.passed += 1,
                Some(caught) => {
                    counts.failed += 1;
                    say(&format!(
                        "FAILED {PLANTED}: {CONTROL}: without any bug, {} fails",
                        caught.text()
                    ));
                }
            }
        }
        let all = planted::bugs()?;
        let mut results = planted::Results::read(&all);
        let bugs: Vec<_> = all.iter().filter(|bug| wanted(&bug.name)).collect();
        for (number, bug) in bugs.iter().enumerate() {
            say(&format!("  ({}/{}) {}", number + 1, bugs.len(), bug.name));
            match planted::hunt(bug) {
                Ok(caught) => {
                    results.add(bug, caught.as_ref())?;
                    match caught {
                        Some(caught) => {
                            counts.passed += 1;
                            say(&format!("  {}: caught by {}", bug.name, caught.text()));
                        }
                        None => {
                            counts.failed += 1;
                            say(&format!(
                                "FAILED {PLANTED}: {}: no test notices it",
                                bug.name
                            ));
                        }
                    }
                }
                Err(error) => {
                    counts.failed += 1;
                    say(&format!("FAILED {PLANTED}: {}: {error:#}", bug.name));
                }
            }
        }
        if wanted(MUTANTS) {
            let mutants = planted::mutants()?;
            counts.passed += mutants.caught;
            counts.failed += mutants.missed.len();
            for name in &mutants.missed {
                say(&format!(
                    "FAILED {PLANTED}: no test notices the mutant {name}"
                ));
            }
            results.set_mutants(mutants.text())?;
        }
        Ok(())
    }

    fn cargo_test(&self) -> Result<(String, bool)> {
        let mut command = userspace::cargo();
        command.args([
            "test",
            "--workspace",
            "--no-fail-fast",
            "--color=never",
            "--",
        ]);
        command.args(&self.filter);
        let output = command
            .stdin(Stdio::null())
            .output()
            .context("running cargo")?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        Ok((text, output.status.success()))
    }

    /// All of it, several at a time: what runs on the host beside the first guests, which keep one
    /// processor busy.
    fn work(&self, queue: VecDeque<Work>, pending: &Pending) -> Counts {
        let workers = self.jobs.map_or_else(guests_at_once, NonZeroUsize::get);
        let queue = Mutex::new(queue);
        let all = Mutex::new(Counts::default());
        let userspace = OnceLock::new();
        let begun = AtomicBool::new(false);
        let next = || loop {
            let mut queue = queue.lock().unwrap_or_else(|error| error.into_inner());
            let place = next_of(&queue, |kernel| !pending.has(kernel));
            if place.is_some() || queue.is_empty() {
                return queue.remove(place?);
            }
            let native = queue.iter().any(Work::is_native);
            drop(queue);
            if native && !begun.swap(true, Ordering::Relaxed) {
                // An error occurs again where the result is needed.
                let _ = build_userspace();
            }
            thread::sleep(Duration::from_millis(200));
        };
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(work) = next() {
                        let counts = self.one(&work, &userspace);
                        all.lock()
                            .unwrap_or_else(|error| error.into_inner())
                            .add(counts);
                    }
                });
            }
        });
        all.into_inner().unwrap_or_else(|error| error.into_inner())
    }

    fn one(&self, work: &Work, userspace: &OnceLock<bool>) -> Counts {
        let mut counts = Counts::default();
        if let Work::Host(names) = work {
            for &name in names {
                counts.add(match name {
                    SANITIZE => self.sanitize(),
                    LINT => lint(),
                    _ => self.host(),
                });
            }
            return counts;
        }
        // These are built from the sources, by Debian's tools.
        if let Work::Packages = work {
            return install_packages(&self.filter);
        }
        // The user space of guests is built once, by the first worker that needs it. If the build fails, that
        // is one failure.
        let mut said = false;
        // Others are built when their kernel is there, which says for which size of pages.
        let built = !work.is_native()
            || *userspace.get_or_init(|| match build_userspace() {
                Ok(()) => true,
                Err(error) => {
                    say(&format!("{error:#}"));
                    said = true;
                    false
                }
            });
        match work {
            _ if !built => counts.failed = usize::from(said),
            Work::Guest(job) => counts = self.guest(job),
            Work::Screen => counts = show(),
            Work::Planted => counts = self.planted(),
            Work::Packages | Work::Host(_) => {}
        }
        counts
    }

    /// Runs one guest. Its output is printed as a whole, since others run meanwhile.
    fn guest(&self, job: &Job) -> Counts {
        let title = job.title();
        say(&format!("== {title}: {}", job.run.command));
        let start = Instant::now();
        let mut report = Vec::new();
        let counts = match self.guest_counts(job, &title, &mut report) {
            Ok(counts) => counts,
            Err(error) => {
                report.push(format!("{title}: {error:#}"));
                Counts {
                    failed: 1,
                    ..Counts::default()
                }
            }
        };
        report.push(summary(&title, counts, start));
        clear_progress();
        say(&report.join("\n"));
        counts
    }

    fn guest_counts(&self, job: &Job, title: &str, lines: &mut Vec<String>) -> Result<Counts> {
        let Job { run, kernel } = job;
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut command = shell_words::split(run.command)?;
        if run.filters {
            for filter in &self.filter {
                command.extend(["--filter".to_owned(), filter.clone()]);
            }
        }
        if run.bare {
            // What such a run installs, it takes from the checkout.
            let tools = Tree::tools()?;
            module::ensure(&tools, &Kernel::select(&tools, kernel)?)?;
        }
        let share = tempfile::Builder::new().prefix("pinbuf-share-").tempdir()?;
        let options = Options {
            kernel: kernel.to_owned(),
            memory: run.memory.to_owned(),
            cmdline: run.cmdline.to_owned(),
            qemu: shell_words::split(run.qemu)?,
            image: run.image.to_owned(),
            bare: run.bare,
            build: match run.package {
                // These were built before.
                _ if archive::arch(kernel).is_native() => Build::Nothing,
                Some(package) => Build::Package(package),
                None => Build::All,
            },
            modules: run.modules.iter().map(|&name| name.to_owned()).collect(),
            command,
            timeout: Some(Duration::from_secs(run.timeout)),
            boot_limit: Some(BOOT_LIMIT),
            // A script of the repository's wants the repository.
            share: Some(
                if run.command.starts_with("tests/") {
                    paths::root()
                } else {
                    share.path()
                }
                .to_owned(),
            ),
            ..Options::default()
        };
        let mut attempt = 1;
        let outcome = loop {
            let streams = Streams {
                input: None,
                output: Box::new(Collector {
                    output: Arc::clone(&output),
                    shown: show_progress(),
                }),
                error: Box::new(Collector {
                    output: Arc::clone(&output),
                    shown: false,
                }),
            };
            let outcome = Guest::start(&options, streams)?.wait()?;
            let only_hangs = outcome
                .complaints
                .iter()
                .all(|line| HANG.iter().any(|part| line.contains(part)));
            if outcome.end != End::NotBooted || !only_hangs || attempt == BOOTS {
                break outcome;
            }
            // In this case nothing of pinbuf has run.
            attempt += 1;
            lines.push(format!(
                "{title}: started again, as the guest had not come to load pinbuf after {}: {}",
                seconds(outcome.total),
                paths::shown(&outcome.log)
            ));
        };
        let output = output.lock().unwrap_or_else(|error| error.into_inner());
        let text = String::from_utf8_lossy(&output).into_owned();
        // Runs that pass have output, too: their figures.
        fs::create_dir_all(paths::logs())?;
        fs::write(paths::logs().join(job.log()), &text)?;

        let mut problems = Vec::new();
        problems.extend(outcome.problem());
        if let End::Killed(signal) = outcome.end {
            problems.push(format!("{} was killed by signal {signal}", run.command));
        }
        for complaint in &outcome.complaints {
            problems.push(format!("the kernel complained: {complaint}"));
        }
        let mut counts = Counts::default();
        match run.verdict {
            Verdict::Ktap => {
                let report = ktap::parse(&text);
                counts.passed = report.passed.len();
                counts.failed = report.failed.len();
                for (name, diagnostics) in &report.failed {
                    lines.push(format!("FAILED {title}: {name}"));
                    for line in diagnostics {
                        lines.push(format!("    {line}"));
                    }
                }
                for (name, reason) in &report.skipped {
                    lines.extend(skip(&mut counts, &format!("{title}: {name}"), reason));
                }
                problems.extend(report.problems);
                if outcome.end != End::Exited(0) && report.failed.is_empty() && problems.is_empty()
                {
                    problems.push(format!("{} ended with {:?}", run.command, outcome.end));
                }
            }
            Verdict::Status if outcome.end == End::Exited(0) => counts.passed += 1,
            Verdict::Status => {
                problems.push(format!("{} ended with {:?}", run.command, outcome.end))
            }
        }
        if !problems.is_empty() {
            // An error of the machine itself counts as one test.
            counts.failed += 1;
            for problem in &problems {
                lines.push(format!("FAILED {title}: {problem}"));
            }
            lines.push(format!(
                "--- the end of the output:\n{}",
                last_lines(&text, 40)
            ));
            lines.push(format!(
                "--- the end of the kernel's log:\n{}",
                tail(&outcome.log, TAIL)
            ));
        }
        if counts.failed > 0 {
            lines.push(format!(
                "--- the kernel's log: {}",
                paths::shown(&outcome.log)
            ));
        }
        Ok(counts)
    }
}

/// Collects output, and shows how far it is.
pub struct Collector {
    /// What there is so far.
    pub output: Arc<Mutex<Vec<u8>>>,
    /// Whether results are shown as they come.
    pub shown: bool,
}

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.output
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .extend_from_slice(bytes);
        if self.shown {
            let text = String::from_utf8_lossy(bytes);
            for line in text.lines().filter(|line| line.contains("ok ")) {
                eprint!("\r\x1b[K  {line:.100}");
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn show_progress() -> bool {
    stderr().is_terminal() && std::env::var_os("CI").is_none()
}

/// The checks of the source.
fn lint() -> Counts {
    say("== lint: rustfmt, clippy, rustdoc, checkpatch, documents, manual pages");
    let start = Instant::now();
    let mut counts = Counts::default();
    for (name, check) in CHECKS {
        match check() {
            Ok(Outcome::Clean) => counts.passed += 1,
            Ok(Outcome::Skipped(reason)) => {
                if let Some(line) = skip(&mut counts, &format!("{LINT}: {name}"), reason) {
                    say(&line);
                }
            }
            Ok(Outcome::Dirty(text)) => {
                counts.failed += 1;
                say(&format!("FAILED {LINT}: {name}\n{}", last_lines(&text, 60)));
            }
            Err(error) => {
                counts.failed += 1;
                say(&format!("FAILED {LINT}: {name}: {error:#}"));
            }
        }
    }
    say(&summary(LINT, counts, start));
    counts
}

/// The demo, whose picture is compared with the program's memory.
fn show() -> Counts {
    say("== screen (default): pinbuf-demo on bochs-display");
    let start = Instant::now();
    let mut counts = Counts::default();
    match demo::program("default") {
        Ok(()) => counts.passed = 1,
        Err(error) => {
            say(&format!("FAILED screen: {error:#}"));
            counts.failed = 1;
        }
    }
    say(&summary("screen (default)", counts, start));
    counts
}

/// The Debian packages, on a machine of their own.
fn install_packages(filters: &[String]) -> Counts {
    say(&format!("== {PACKAGES}: tests/packages/run"));
    let start = Instant::now();
    let mut counts = Counts::default();
    match packages::test(filters) {
        Ok(reports) => {
            for (step, report) in reports {
                counts.passed += report.passed.len();
                counts.failed += report.failed.len();
                for (name, diagnostics) in &report.failed {
                    say(&format!(
                        "FAILED {PACKAGES}: {name}\n    {}",
                        diagnostics.join("\n    ")
                    ));
                }
                for (name, reason) in &report.skipped {
                    let line = skip(&mut counts, &format!("{PACKAGES}: {name}"), reason);
                    line.iter().for_each(|line| say(line));
                }
                for problem in &report.problems {
                    counts.failed += 1;
                    say(&format!("FAILED {PACKAGES}: {step}: {problem}"));
                }
            }
        }
        Err(error) => {
            counts.failed += 1;
            say(&format!("FAILED {PACKAGES}: {error:#}"));
        }
    }
    say(&summary(PACKAGES, counts, start));
    counts
}

fn clear_progress() {
    if show_progress() {
        eprint!("\r\x1b[K");
    }
}

fn summary(title: &str, counts: Counts, start: Instant) -> String {
    format!(
        "== {title}: {} passed, {} failed, {} skipped ({})",
        counts.passed,
        counts.failed,
        counts.skipped,
        seconds(start.elapsed())
    )
}

/// What a worker does at a time.
enum Work {
    /// What needs no guest, by name, one after the other.
    Host(Vec<&'static str>),
    /// A guest.
    Guest(Job),
    /// The demo.
    Screen,
    /// The Debian packages.
    Packages,
    /// The planted bugs.
    Planted,
}

impl Work {
    /// Whether its guest has the host's architecture.
    fn is_native(&self) -> bool {
        match self {
            Self::Guest(job) => archive::arch(&job.kernel).is_native(),
            _ => Arch::Amd64.is_native(),
        }
    }
}

/// The user space of guests of the host's architecture.
fn build_userspace() -> Result<()> {
    userspace::build(&Tree::tools()?, Profile::Dev, Target::HOST, None).map(drop)
}

/// A run on a kernel.
struct Job {
    run: &'static Run,
    kernel: String,
}

impl Job {
    /// The text for messages.
    fn title(&self) -> String {
        format!("{} ({})", self.run.name, self.kernel)
    }

    /// The file that its output goes to.
    fn log(&self) -> String {
        format!("test-{}.log", self.run.name)
    }
}

/// The place of the work to do next: the first that does not have to wait for a kernel's tree, as then others would wait
/// behind it.
fn next_of(queue: &VecDeque<Work>, is_there: impl Fn(&str) -> bool) -> Option<usize> {
    let guests = queue.iter().any(|work| matches!(work, Work::Guest(_)));
    queue.iter().position(|work| match work {
        Work::Host(_) => true,
        Work::Guest(job) => is_there(&job.kernel),
        Work::Screen => is_there("default"),
        // In any case after all others.
        Work::Packages | Work::Planted => !guests,
    })
}

/// The kernels whose trees are still being made.
#[derive(Clone)]
struct Pending(Arc<Mutex<HashSet<String>>>);

impl Pending {
    fn has(&self, kernel: &str) -> bool {
        let kernels = self.0.lock().unwrap_or_else(|error| error.into_inner());
        kernels.contains(kernel)
    }

    /// It is there, or cannot be made.
    fn remove(&self, kernel: &str) {
        let mut kernels = self.0.lock().unwrap_or_else(|error| error.into_inner());
        kernels.remove(kernel);
    }
}

/// Begins to make what the guests will need, the longest first, except for what that needs itself: much of this
/// work keeps at most one processor busy, and so does much of what comes before guests. An error is not
/// reported here: it occurs again where the result is needed.
fn prepare(jobs: &[Job]) -> Pending {
    let mut kernels: Vec<String> = Vec::new();
    for job in jobs {
        if !kernels.contains(&job.kernel) {
            kernels.push(job.kernel.clone());
        }
    }
    let pending = Pending(Arc::new(Mutex::new(kernels.iter().cloned().collect())));
    // The debug kernel's takes longest by far: the guests of others do not wait until it is there.
    let (debug, others) = kernels
        .into_iter()
        .partition(|kernel| kernel.starts_with("debug"));
    for kernels in [debug, others] {
        let trees = Trees {
            kernels,
            pending: pending.clone(),
        };
        thread::spawn(move || trees.make());
    }
    pending
}

/// Trees that are made one after the other.
struct Trees {
    kernels: Vec<String>,
    pending: Pending,
}

impl Trees {
    fn make(self) {
        if self.kernels.is_empty() {
            return;
        }
        let Ok(tools) = Tree::tools() else { return };
        for name in &self.kernels {
            if let Ok(kernel) = Kernel::select(&tools, name) {
                let _ = kernel.build_tree(&tools);
            }
            self.pending.remove(name);
        }
    }
}

impl Drop for Trees {
    fn drop(&mut self) {
        self.kernels
            .iter()
            .for_each(|name| self.pending.remove(name));
    }
}

/// One guest per processor, as far as memory permits: without KVM a guest of 5 GiB touches most of its memory.
fn guests_at_once() -> usize {
    const MEMORY_OF_ONE: u64 = 7 << 30;
    let memory = sysinfo().map_or(0, |info| info.ram_total());
    crate::jobs().min((memory / MEMORY_OF_ONE) as usize).max(1)
}

/// A skipped test is a failed one unless the reason is on the list; then it says so.
fn skip(counts: &mut Counts, name: &str, reason: &str) -> Option<String> {
    let allowed = watch::entries(ALLOWED_SKIPS);
    if allowed
        .iter()
        .any(|pattern| watch::matches(pattern, reason))
    {
        counts.skipped += 1;
        None
    } else {
        counts.failed += 1;
        Some(format!(
            "FAILED {name}: skipped, and the reason is not in qemu-scripts/allowed-skips.txt: {reason}"
        ))
    }
}

/// Counts what `cargo test` prints, and prints it where necessary.
fn judge_cargo_test(text: &str, well: bool) -> Counts {
    let mut counts = read_cargo_test(text);
    if !well || counts.failed > 0 {
        say(text.trim_end());
    }
    if !well && counts.failed == 0 {
        // No test ran, or a test ended the whole program.
        counts.failed = 1;
    }
    counts
}

/// Counts what `cargo test` prints: results by its summaries, reasons for ignored tests by line.
fn read_cargo_test(text: &str) -> Counts {
    let mut counts = Counts::default();
    let mut ignored: i64 = 0;
    for line in text.lines() {
        if let Some(summary) = line.strip_prefix("test result: ") {
            for part in summary.split([';', '.']) {
                match part.trim().split_once(' ') {
                    Some((number, "passed")) => counts.passed += number.parse().unwrap_or(0),
                    Some((number, "failed")) => counts.failed += number.parse().unwrap_or(0),
                    Some((number, "ignored")) => ignored += number.parse().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some((name, reason)) = line.split_once(" ... ignored") {
            if let Some(line) = skip(&mut counts, name, reason.trim_start_matches(", ")) {
                say(&line);
            }
            ignored -= 1;
        }
    }
    if ignored != 0 {
        // An ignored test without a line of its own has no reason that could be on the list.
        counts.failed += 1;
    }
    counts
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_test_is_counted() {
        let text = "running 3 tests\ntest a::b ... ok\ntest c ... FAILED\n\
                    test d ... ignored, no such reason on the list\n\n\
                    test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured\n\
                    test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured\n";
        assert_eq!(
            read_cargo_test(text),
            Counts {
                passed: 5,
                failed: 2,
                skipped: 0
            }
        );
    }

    #[test]
    fn no_worker_waits_while_there_is_other_work() {
        let queue: VecDeque<Work> = ["debug", "debug", "default"]
            .into_iter()
            .map(|kernel| {
                Work::Guest(Job {
                    run: &RUNS[0],
                    kernel: kernel.to_owned(),
                })
            })
            .chain([Work::Screen, Work::Planted])
            .collect();
        assert_eq!(next_of(&queue, |_| false), None);
        assert_eq!(next_of(&queue, |kernel| kernel == "default"), Some(2));
        assert_eq!(next_of(&queue, |_| true), Some(0));
        assert_eq!(
            next_of(&VecDeque::from([Work::Planted]), |_| false),
            Some(0)
        );
        assert_eq!(next_of(&VecDeque::new(), |_| true), None);
    }

    #[test]
    fn only_some_kernels_may_lack_something() {
        let mut counts = Counts::default();
        for (release, allowed) in [
            ("7.2.12+deb13-rt-amd64", true),
            ("7.2.12+deb13-amd64", false),
            ("7.2.12+deb13-cloud-amd64", false),
            ("7.2.12-pinbuf-debug", false),
        ] {
            let reason = format!("the kernel {release} has no transparent huge pages");
            assert_eq!(
                skip(&mut counts, "a test", &reason).is_none(),
                allowed,
                "{release}"
            );
        }
        assert_eq!((counts.skipped, counts.failed), (1, 3));
    }

    #[test]
    fn every_allowed_skip_has_a_reason() {
        let mut reason = false;
        for line in ALLOWED_SKIPS.lines() {
            match line.trim() {
                "" => reason = false,
                remark if remark.starts_with('#') => reason = true,
                entry => assert!(reason, "no reason is given for: {entry}"),
            }
        }
    }
}
