// SPDX-License-Identifier: MIT OR Apache-2.0

//! A fuzzer for pinbuf, guided by the coverage that the kernel reports (KCOV).
//!
//! An input says who calls, which memory there is, and what is done: creates, questions and other
//! ioctls with structs that are right, wrong or cut off, and then everything that can be done with
//! the dma-bufs and the memory. Each is executed in a process of its own ([`executor`]), which keeps
//! a model of which page is where ([`contents`], [`memory`]) and of what each call may answer
//! ([`expected`]). An input fails if an answer is none of those that the contract allows, if a byte
//! is not where it should be, if something is left behind, or if the kernel complains
//! ([`watch`]).
//!
//! Inputs that reach code that no other has reached are mutated further ([`mutate`], [`corpus`]).
//! The input that runs is in a file before it runs, so that it survives the machine.

mod access;
mod areas;
mod calls;
mod contents;
mod corpus;
mod devices;
mod executor;
mod expected;
mod input;
mod kcov;
mod memory;
mod mutate;
mod views;
mod watch;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use clap::Parser;
use fastrand::Rng;
use nix::sys::wait::WaitStatus;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::process::Child;

use crate::corpus::Corpus;
use crate::executor::Executor;
use crate::input::Input;
use crate::kcov::{Edge, Kcov};
use crate::watch::Watch;

/// Huge pages for all that an input may want.
const HUGE_PAGES: i64 = 24;
/// Where it is while it runs.
const RUNNING: &str = "running.json";
/// So many inputs run between two thorough looks at what is left behind.
const BATCH: usize = 16;
/// One that takes so long is mentioned.
const SLOW: Duration = Duration::from_secs(5);
/// An input takes milliseconds; one that takes so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Calls pinbuf in every way there is, guided by the kernel's coverage
#[derive(Debug, Parser)]
struct Options {
    /// Stop after so many seconds (all seeds are executed in any case)
    #[arg(long, value_name = "N", default_value_t = 45)]
    seconds: u64,

    /// The number that all random choices come from  [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// A directory of inputs to begin with; may be given several times
    #[arg(long, value_name = "DIR", default_value = "tests/fuzz/seeds")]
    seeds: Vec<PathBuf>,

    /// Where the input that runs, and those that fail, are written
    #[arg(long, value_name = "DIR", default_value = "build/fuzz")]
    state: PathBuf,

    /// Also write the inputs that reach something new to this directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// In the end, write to this directory, in place of what is there, as few inputs as reach all
    /// that was reached
    #[arg(long, value_name = "DIR")]
    minimise: Option<PathBuf>,

    /// Only execute this input, and tell what it does; may be given several times
    #[arg(long, value_name = "FILE")]
    replay: Vec<PathBuf>,

    /// In the end, name the module's functions that nothing reached
    #[arg(long)]
    missing: bool,

    /// Stop at the first input that fails
    #[arg(long)]
    stop: bool,
}

/// Executes inputs, one after the other.
struct Fuzzer {
    kcov: Kcov,
    watch: Watch,
    state: PathBuf,
    /// The input that runs.
    running: File,
    executions: u64,
    points: (usize, usize),
    failed: Vec<PathBuf>,
    /// What ran since the last thorough look at what is left behind.
    unchecked: Vec<Input>,
}

impl Fuzzer {
    fn new(state: &Path) -> Result<Self> {
        // An ordinary user imports, too.
        fs::set_permissions(
            pinbuf_test_importer::PATH,
            fs::Permissions::from_mode(0o666),
        )
        .context("the test importer's device")?;
        fs::create_dir_all(state).with_context(|| format!("creating {}", state.display()))?;
        Ok(Self {
            kcov: Kcov::open()?,
            watch: Watch::new()?,
            state: state.to_owned(),
            running: File::create(state.join(RUNNING)).context("keeping the input")?,
            executions: 0,
            points: (0, 0),
            failed: Vec::new(),
            unchecked: Vec::new(),
        })
    }

    /// Executes an input, and tells where it went. What is wrong with it is told and kept.
    fn execute(&mut self, input: &Input, trace: bool) -> Result<BTreeSet<Edge>> {
        let edges = self.execute_and_glance(input, trace)?;
        self.unchecked.push(input.clone());
        if self.unchecked.len() == BATCH {
            self.check()?;
        }
        Ok(edges)
    }

    /// Looks for what the last inputs have left behind; if there is something, they run again, one
    /// by one, to see which of them it was.
    fn check(&mut self) -> Result<()> {
        let suspects = std::mem::take(&mut self.unchecked);
        let Err(error) = self.watch.check() else {
            return Ok(());
        };
        let known = self.failed.len();
        for input in &suspects {
            self.execute_and_glance(input, false)?;
            if let Err(error) = self.watch.check() {
                self.fail(input, &error)?;
            }
        }
        if self.failed.len() == known {
            // None does it again; all of them are kept.
            for input in &suspects {
                self.fail(input, &error)?;
            }
        }
        Ok(())
    }

    fn fail(&mut self, input: &Input, error: &anyhow::Error) -> Result<()> {
        let path = corpus::save(&self.state, "failed-", input)?;
        println!("FAILED {}: {error:#}", path.display());
        self.failed.push(path);
        Ok(())
    }

    fn execute_and_glance(&mut self, input: &Input, trace: bool) -> Result<BTreeSet<Edge>> {
        let text = corpus::to_text(input)?;
        self.running.write_all_at(text.as_bytes(), 0)?;
        self.running.set_len(text.len() as u64)?;
        self.kcov.clear();
        let start = Instant::now();
        let executed = self.execute_alone(input, trace);
        let took = start.elapsed();
        if took > SLOW {
            println!("an input took {:.1} s", took.as_secs_f64());
        }
        let edges = self.kcov.edges();
        let (seen, inside) = self.kcov.counts();
        self.points = (self.points.0 + seen, self.points.1 + inside);
        self.executions += 1;
        if let Err(error) = executed.and_then(|()| self.watch.glance()) {
            self.fail(input, &error)?;
        }
        Ok(edges)
    }

    fn execute_alone(&self, input: &Input, trace: bool) -> Result<()> {
        let child = Child::run(|| {
            let executor = Executor::new(input, trace).context("preparing")?;
            self.kcov.enable()?;
            executor.run(&input.operations)
        })?;
        match child.end(PATIENCE)? {
            (WaitStatus::Exited(_, 0), _) => Ok(()),
            (WaitStatus::Exited(..), said) => bail!(said),
            (status, _) => bail!("ended by {status:?}"),
        }
    }
}

/// The inputs in all directories, whose names are told if they are none.
fn read_all(directories: &[PathBuf]) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for directory in directories {
        for path in corpus::list(directory)? {
            inputs.push(corpus::read(&path)?);
        }
    }
    Ok(inputs)
}

/// Inputs in place of those in a directory.
fn replace(directory: &Path, corpus: &Corpus) -> Result<usize> {
    fs::create_dir_all(directory)?;
    for path in corpus::list(directory)? {
        fs::remove_file(path)?;
    }
    let minimal = corpus.minimal();
    for entry in &minimal {
        corpus::save(directory, "", &entry.input)?;
    }
    Ok(minimal.len())
}

fn fuzz(options: &Options, fuzzer: &mut Fuzzer) -> Result<Corpus> {
    let start = Instant::now();
    let mut corpus = Corpus::default();
    for input in read_all(&options.seeds)? {
        let edges = fuzzer.execute(&input, false)?;
        corpus.offer(&input, edges);
    }
    println!(
        "seeds: {} executed in {:.1} s, {} of use, {} edges",
        fuzzer.executions,
        start.elapsed().as_secs_f64(),
        corpus.entries.len(),
        corpus.edges.len()
    );

    let mut rng = Rng::new();
    if let Some(seed) = options.seed {
        rng.seed(seed);
    }
    println!("random numbers: --seed {}", rng.get_seed());
    let deadline = Duration::from_secs(options.seconds);
    let mut told = Instant::now();
    while start.elapsed() < deadline && (fuzzer.failed.is_empty() || !options.stop) {
        let input = if corpus.entries.is_empty() || rng.u32(0..8) == 0 {
            mutate::generate(&mut rng)
        } else {
            let [one, other] =
                [(), ()].map(|()| &corpus.entries[rng.usize(0..corpus.entries.len())].input);
            mutate::mutate(&mut rng, one, other)
        };
        let failures = fuzzer.failed.len();
        let edges = fuzzer.execute(&input, false)?;
        // What fails is not built on: it would only fail again.
        if fuzzer.failed.len() == failures && corpus.offer(&input, edges) {
            if let Some(directory) = &options.keep {
                corpus::save(directory, "", &input)?;
            }
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            println!(
                "{:4} s: {} executed, {} of use, {} edges, {} failed",
                start.elapsed().as_secs(),
                fuzzer.executions,
                corpus.entries.len(),
                corpus.edges.len(),
                fuzzer.failed.len()
            );
        }
    }
    Ok(corpus)
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let pool = HugePool::with_free(HUGE_PAGES)?;
    let mut fuzzer = Fuzzer::new(&options.state)?;
    let mut corpus = Corpus::default();
    if options.replay.is_empty() {
        corpus = fuzz(&options, &mut fuzzer)?;
    }
    for path in &options.replay {
        println!("{}", path.display());
        let input = corpus::read(path)?;
        let edges = fuzzer.execute(&input, true)?;
        corpus.offer(&input, edges);
    }

    fuzzer.check()?;

    let points: BTreeSet<u32> = corpus.edges.iter().map(|edge| edge.1).collect();
    println!(
        "executed {}, kept {}, reached {} points of the module by {} edges, {} failed",
        fuzzer.executions,
        corpus.entries.len(),
        points.len(),
        corpus.edges.len(),
        fuzzer.failed.len()
    );
    if options.missing {
        // What was inlined everywhere is among them: its own copy is never called.
        for function in kcov::not_entered(&corpus.edges)? {
            println!("not reached: {function}");
        }
    }
    if let Some(directory) = &options.minimise {
        println!(
            "{}: {} inputs",
            directory.display(),
            replace(directory, &corpus)?
        );
    }
    let (seen, inside) = fuzzer.points;
    if fuzzer.failed.is_empty() && inside == 0 {
        bail!(
            "none of {seen} program counters lies in the module: was it built without \
             KCOV_INSTRUMENT, or does the kernel move itself (RANDOMIZE_BASE)?"
        );
    }
    for path in &fuzzer.failed {
        println!("to see it again: pinbuf-fuzz --replay {}", path.display());
    }
    fs::remove_file(options.state.join(RUNNING))?;
    drop(pool);
    Ok(if fuzzer.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
