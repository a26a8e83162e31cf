// SPDX-License-Identifier: MIT OR Apache-2.0

//! A fuzzer for pinbuf, guided by the coverage that the kernel reports (KCOV).
//!
//! An input says who calls, which memory there is, and what is done: creates, questions and other
//! ioctls with structs that are right, wrong or cut off, and then everything that can be done with
//! the dma-bufs and the memory. Many inputs of one caller are executed by one process ([`executor`]), which keeps
//! a model of which page is where ([`contents`], [`memory`]) and of what each call may answer
//! ([`expected`]). An input fails if an answer is none of those that the contract allows, if a byte
//! is not where it should be, if something is left behind, or if the kernel complains
//! ([`watch`]).
//!
//! Inputs that reach code that no other has reached are mutated further ([`mutate`], [`corpus`]).
//! The inputs that run are in a file before they run, so that they survive the machine. What one input leaves
//! behind, and an input that fails only after another one, are found by running the batch's inputs again, one by one and in pairs.

mod access;
mod areas;
mod batch;
mod calls;
mod contents;
mod corpus;
mod devices;
mod executor;
mod expected;
mod input;
mod kcov;
mod late;
mod memory;
mod mutate;
mod profile;
mod views;
mod watch;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use clap::Parser;
use fastrand::Rng;
use nix::errno::Errno;
use nix::sys::wait::WaitStatus;
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::memfd;
use pinbuf_test_harness::support::process::Child;

use crate::batch::{Board, Outcome};
use crate::corpus::Corpus;
use crate::executor::Executor;
use crate::input::{Input, Who};
use crate::kcov::{Edge, Kcov};
use crate::profile::{phase, Phase};
use crate::watch::Watch;

/// Huge pages for all that an input may want.
const HUGE_PAGES: i64 = 24;
/// Where it is while it runs.
const RUNNING: &str = "running";
/// This number of inputs run in one process, and between two comparisons of what the kernel holds.
const BATCH: usize = 64;
/// An input that takes longer is reported.
const SLOW: Duration = Duration::from_secs(5);
/// A batch takes a second; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Calls pinbuf in every way there is, guided by the kernel's coverage
#[derive(Debug, Parser)]
struct Options {
    /// Stop after this number of seconds (all seeds are executed in any case)
    #[arg(long, value_name = "N", default_value_t = 45)]
    seconds: u64,

    /// Seed of all random choices  [default: a different one in each run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Directory of inputs to execute first; may be given several times
    #[arg(long, value_name = "DIR", default_value = "tests/fuzz/seeds")]
    seeds: Vec<PathBuf>,

    /// Directory for the input that runs, and for those that fail
    #[arg(long, value_name = "DIR", default_value = "build/fuzz")]
    state: PathBuf,

    /// Also write inputs that reach new code to this directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// At the end, replace the content of this directory with the fewest inputs that reach all code
    /// that was reached
    #[arg(long, value_name = "DIR")]
    minimise: Option<PathBuf>,

    /// Execute only this input, and print what it does; may be given several times
    #[arg(long, value_name = "FILE")]
    replay: Vec<PathBuf>,

    /// At the end, print the module's functions that no input reached
    #[arg(long)]
    missing: bool,

    /// Stop at the first input that fails
    #[arg(long)]
    stop: bool,
}

/// Executes inputs, many in one child.
struct Fuzzer {
    /// None: the kernel has none.
    kcov: Option<Kcov>,
    watch: Watch,
    giga: Option<OwnedFd>,
    board: Board,
    state: PathBuf,
    /// The inputs that run.
    running: File,
    /// All edges that any input went.
    known: HashSet<Edge>,
    start: Instant,
    executions: u64,
    points: (usize, usize),
    failed: Vec<PathBuf>,
}

/// A file of one page of 1 GiB, in place for all inputs, as it takes a second to clear. `None` if the pool has none.
fn giga_page() -> Result<Option<OwnedFd>> {
    const SIZE: usize = 1 << 30;
    let file = memfd(SIZE, libc::MFD_HUGETLB | libc::MFD_HUGE_1GB)?;
    // SAFETY: takes numbers.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, SIZE as i64) };
    match Errno::result(result) {
        Ok(_) => Ok(Some(file)),
        Err(Errno::ENOSPC | Errno::ENOMEM) => {
            println!("note: no huge page of 1 GiB (hugepagesz=1G hugepages=1)");
            Ok(None)
        }
        Err(error) => Err(error).context("a page of 1 GiB"),
    }
}

/// How a batch ended.
struct Ended {
    /// Of each input that was executed without a failure.
    outcomes: Vec<Outcome>,
    /// What was wrong with the input after these, or with all of them.
    failure: Option<Failure>,
}

/// What failed.
enum Failure {
    /// With the input that ran.
    Input(anyhow::Error),
    /// With what is left when all inputs have run.
    Rest(anyhow::Error),
}

impl Failure {
    fn error(&self) -> &anyhow::Error {
        match self {
            Self::Input(error) | Self::Rest(error) => error,
        }
    }
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
            giga: giga_page()?,
            board: Board::new()?,
            state: state.to_owned(),
            running: File::create(state.join(RUNNING)).context("keeping the inputs")?,
            known: HashSet::new(),
            start: Instant::now(),
            executions: 0,
            points: (0, 0),
            failed: Vec::new(),
        })
    }

    /// Executes inputs of one caller, and returns their outcomes. An input that fails is printed and kept; its
    /// outcome is `None`.
    fn execute(&mut self, inputs: &[Input], trace: bool) -> Result<Vec<Option<Outcome>>> {
        let mut outcomes = Vec::new();
        while outcomes.len() < inputs.len() {
            let rest = &inputs[outcomes.len()..];
            let rest = &rest[..rest.len().min(batch::MOST)];
            let ended = self.execute_together(rest, trace)?;
            let count = ended.outcomes.len();
            outcomes.extend(ended.outcomes.into_iter().map(Some));
            match ended.failure {
                None => {}
                Some(Failure::Input(error)) => {
                    self.blame(&rest[..=count], &error)?;
                    outcomes.push(None);
                }
                Some(Failure::Rest(error)) => {
                    let kept = self.blame_any(&rest[..count], &error)?;
                    for input in kept {
                        let index = outcomes.len() - count + input;
                        outcomes[index] = None;
                    }
                }
            }
        }
        for outcome in outcomes.iter().flatten() {
            self.known.extend(&outcome.edges);
        }
        Ok(outcomes)
    }

    /// The last of these inputs failed. If it does not fail when it runs alone, an earlier one has left
    /// something behind, and the two are kept; if there is no such input, all are kept.
    fn blame(&mut self, inputs: &[Input], error: &anyhow::Error) -> Result<()> {
        let Some((last, before)) = inputs.split_last() else {
            return Ok(());
        };
        if before.is_empty() || self.fails(std::slice::from_ref(last))? {
            return self.fail(std::slice::from_ref(last), error);
        }
        for first in before {
            let pair = [first.clone(), last.clone()];
            if self.fails(&pair)? {
                return self.fail(&pair, error);
            }
        }
        self.fail(inputs, error)
    }

    /// Something was left behind by one of these inputs: they run again, one by one, to find which. Returns
    /// those.
    fn blame_any(&mut self, inputs: &[Input], error: &anyhow::Error) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        for (index, input) in inputs.iter().enumerate() {
            let alone = std::slice::from_ref(input);
            if let Some(failure) = self.execute_together(alone, false)?.failure {
                self.fail(alone, failure.error())?;
                found.push(index);
            }
        }
        if found.is_empty() {
            self.fail(inputs, error)?;
            found.extend(0..inputs.len());
        }
        Ok(found)
    }

    fn fails(&mut self, inputs: &[Input]) -> Result<bool> {
        Ok(self.execute_together(inputs, false)?.failure.is_some())
    }

    /// Keeps inputs that failed, several in a directory of their own.
    fn fail(&mut self, inputs: &[Input], error: &anyhow::Error) -> Result<()> {
        let path = match inputs {
            [input] => corpus::save(&self.state, "failed-", input)?,
            _ => corpus::save_all(&self.state, "failed-", inputs)?,
        };
        println!(
            "FAILED {}: {error:#} (after {:.1} s, {} inputs)",
            path.display(),
            self.start.elapsed().as_secs_f64(),
            self.executions
        );
        self.failed.push(path);
        Ok(())
    }

    /// Executes inputs in one child, until one fails.
    fn execute_together(&mut self, inputs: &[Input], trace: bool) -> Result<Ended> {
        let recording = phase(Phase::Record);
        let text = corpus::to_text_all(inputs)?;
        self.running.write_all_at(text.as_bytes(), 0)?;
        self.running.set_len(text.len() as u64)?;
        drop(recording);
        self.board.clear();
        let forking = phase(Phase::Fork);
        let child = Child::run(|| self.in_child(inputs, trace))?;
        drop(forking);
        let ended = child.end(PATIENCE);
        let done = self.board.done();
        let outcomes: Vec<Outcome> = (0..done).map(|input| self.board.outcome(input)).collect();
        for outcome in &outcomes {
            self.points.0 += outcome.points.0;
            self.points.1 += outcome.points.1;
            if outcome.took > SLOW {
                println!("an input took {:.1} s", outcome.took.as_secs_f64());
            }
        }
        self.executions += self.board.begun() as u64;
        let error = match ended {
            Ok((WaitStatus::Exited(_, 0), _)) => None,
            Ok((WaitStatus::Exited(..), said)) => Some(anyhow!(said)),
            Ok((status, _)) => Some(anyhow!("ended by {status:?}")),
            Err(error) => Some(error),
        };
        let _timer = phase(Phase::Check);
        let left = self.watch.listen().and_then(|()| self.watch.check());
        let failure = match (error, left) {
            (Some(error), _) if done < self.board.begun() => Some(Failure::Input(error)),
            (Some(error), _) | (None, Err(error)) if done > 0 => Some(Failure::Rest(error)),
            (Some(error), _) | (None, Err(error)) => return Err(error),
            (None, Ok(())) => None,
        };
        Ok(Ended { outcomes, failure })
    }

    /// The child's part of this.
    fn in_child(&mut self, inputs: &[Input], trace: bool) -> Result<()> {
        let Some(first) = inputs.first() else {
            return Ok(());
        };
        let giga = self.giga.as_ref().map(AsRawFd::as_raw_fd);
        let mut executor = Executor::new(first.caller.who, giga, trace).context("preparing")?;
        if let Some(kcov) = &self.kcov {
            kcov.enable()?;
        }
        for (index, input) in inputs.iter().enumerate() {
            self.board.begin(index);
            let start = Instant::now();
            if let Some(kcov) = &self.kcov {
                kcov.clear();
            }
            executor.execute(input)?;
            self.watch.listen()?;
            let took = start.elapsed();
            let _timer = phase(Phase::Coverage);
            let (edges, points) = self.kcov.as_ref().map(Kcov::edges).unwrap_or_default();
            let board = &self.board;
            if !board.report(index, took, points, &edges, &mut self.known) {
                break;
            }
        }
        executor.settled()
    }
}

/// The inputs in all directories; prints the names of directories without any.
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

/// Inputs that wait until there are enough of one caller.
#[derive(Default)]
struct Queue(HashMap<Who, Vec<Input>>);

impl Queue {
    /// Adds one. Gives a batch, if that is complete.
    fn add(&mut self, input: Input) -> Option<Vec<Input>> {
        let waiting = self.0.entry(input.caller.who).or_default();
        waiting.push(input);
        (waiting.len() == BATCH).then(|| std::mem::take(waiting))
    }

    /// All inputs that still wait, by caller.
    fn rest(self) -> impl Iterator<Item = Vec<Input>> {
        self.0.into_values().filter(|batch| !batch.is_empty())
    }
}

/// Executes a batch, and keeps of it what is new.
fn run_batch(
    options: &Options,
    fuzzer: &mut Fuzzer,
    corpus: &mut Corpus,
    batch: &[Input],
    seeds: bool,
) -> Result<()> {
    let outcomes = fuzzer.execute(batch, false)?;
    let _timer = phase(Phase::Corpus);
    for (input, outcome) in batch.iter().zip(outcomes) {
        // An input that failed is not mutated further: its descendants would only fail again.
        let Some(outcome) = outcome else { continue };
        let blind = fuzzer.kcov.is_none() && seeds;
        let new = corpus.offer(input, outcome.edges, outcome.took, blind);
        if let Some(directory) = options.keep.as_ref().filter(|_| new && !seeds) {
            corpus::save(directory, "", input)?;
        }
    }
    Ok(())
}

fn fuzz(options: &Options, fuzzer: &mut Fuzzer) -> Result<Corpus> {
    let start = Instant::now();
    let mut corpus = Corpus::default();
    let mut queue = Queue::default();
    for input in read_all(&options.seeds)? {
        if let Some(batch) = queue.add(input) {
            run_batch(options, fuzzer, &mut corpus, &batch, true)?;
        }
    }
    for batch in queue.rest() {
        run_batch(options, fuzzer, &mut corpus, &batch, true)?;
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
    let limit = Duration::from_secs(options.seconds);
    let mut reported = Instant::now();
    let mut queue = Queue::default();
    let (begun, before) = (Instant::now(), fuzzer.executions);
    while start.elapsed() < limit && (fuzzer.failed.is_empty() || !options.stop) {
        let mutating = phase(Phase::Mutate);
        let input = if corpus.entries.is_empty() || rng.u32(0..8) == 0 {
            mutate::generate(&mut rng)
        } else {
            let (one, other) = (corpus.choose(&mut rng), corpus.choose(&mut rng));
            mutate::mutate(&mut rng, one, other)
        };
        drop(mutating);
        let Some(batch) = queue.add(input) else {
            continue;
        };
        run_batch(options, fuzzer, &mut corpus, &batch, false)?;
        if reported.elapsed() > Duration::from_secs(10) {
            reported = Instant::now();
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
    let speed = (fuzzer.executions - before) as f64 / begun.elapsed().as_secs_f64().max(1.0);
    let expected = if fuzzer.kcov.is_some() { 50.0 } else { 200.0 };
    println!("speed: {speed:.1} inputs a second");
    if speed < expected / 10.0 && begun.elapsed() > Duration::from_secs(10) {
        println!(
            "note: that is less than a tenth of {expected}, which is usual on this kind of kernel"
        );
    }
    Ok(corpus)
}

/// kmemleak scans all memory now and then, which takes a processor for seconds. It finds nothing that this
/// fuzzer looks for.
fn stop_background_scan() {
    let path = Path::new("/sys/kernel/debug/kmemleak");
    if path.exists() {
        // Refused if it was disabled at the boot.
        let _ = fs::write(path, "scan=off");
    }
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    profile::start();
    stop_background_scan();
    let pool = HugePool::with_free(HUGE_PAGES)?;
    let mut fuzzer = Fuzzer::new(&options.state)?;
    let mut corpus = Corpus::default();
    if options.replay.is_empty() {
        corpus = fuzz(&options, &mut fuzzer)?;
    }
    for path in &options.replay {
        println!("{}", path.display());
        let inputs = if path.is_dir() {
            read_all(std::slice::from_ref(path))?
        } else {
            vec![corpus::read(path)?]
        };
        for (input, outcome) in inputs.iter().zip(fuzzer.execute(&inputs, true)?) {
            if let Some(outcome) = outcome {
                corpus.offer(input, outcome.edges, outcome.took, false);
            }
        }
    }

    let points: BTreeSet<u32> = corpus.edges.iter().map(|edge| edge.1).collect();
    println!(
        "executed {}, kept {}, reached {} points of the module by {} edges, {} failed",
        fuzzer.executions,
        corpus.entries.len(),
        points.len(),
        corpus.edges.len(),
        fuzzer.failed.len()
    );
    println!("{}", profile::report(fuzzer.executions));
    if options.missing {
        // Functions that were inlined everywhere are among them: their own copy is never called.
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
    if fuzzer.kcov.is_none() {
        println!("note: this kernel has no KCOV: nothing is known about where inputs went");
    } else if fuzzer.failed.is_empty() && inside == 0 {
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
