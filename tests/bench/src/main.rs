// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf-bench`: pinbuf beside the kernel's udmabuf, on the same memory in the same guest, and
//! beside what the pin itself costs.
//!
//! As root, in a guest (`./qemu-scripts/bench`) or on a machine whose kernel has udmabuf, with the
//! test importer module loaded. It sets udmabuf's limits and the pool of huge pages, and puts them
//! back.

mod chart;
mod growth;
mod lines;
mod maker;
mod memory;
mod report;
mod run;
mod stats;
mod task;
mod worker;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use pinbuf_test_harness::support::kernel::{self, Setting};

use crate::lines::{Experiment, Sizes};
use crate::report::{Clock, Missing, Report, Row};
use crate::task::{Shape, What};

/// Measures pinbuf beside the kernel's udmabuf and beside a bare pin of the same memory.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Command {
    #[command(subcommand)]
    command: Option<Action>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Measures one thing as standard input says.
    #[command(hide = true)]
    Worker,
}

#[derive(Debug, Args)]
struct Options {
    /// Measure every line once, with little memory.
    #[arg(long)]
    quick: bool,
    /// Measure only lines and curves whose title contains one of these.
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,
    /// Number of measurements of each line.  [default: 9; 5 of instructions; 1 with --quick]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// The clock counts instructions (QEMU's -icount shift=0): label the figures accordingly.
    #[arg(long)]
    instructions: bool,
    /// Do not measure how costs grow with size.
    #[arg(long)]
    no_growth: bool,
    /// Print the titles of all lines, and exit.
    #[arg(long)]
    list: bool,
    /// Write the (first) figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw a chart (SVG) of whole lives and creates against udmabuf to this file, one panel per clock.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Show the figures of a file that --json wrote, instead of measuring; may be given several times.
    #[arg(long, value_name = "JSON")]
    from: Vec<PathBuf>,
    /// Write the tables to this file, as a page (Markdown) that says how to repeat them.
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
}

impl Options {
    fn wants(&self, title: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|part| title.contains(part))
    }

    fn rounds(&self) -> usize {
        self.rounds
            .unwrap_or(match (self.quick, self.instructions) {
                (true, _) => 1,
                (_, true) => 5,
                _ => 9,
            })
    }

    fn sizes(&self) -> Sizes {
        if self.quick {
            Sizes::QUICK
        } else {
            Sizes::FULL
        }
    }
}

fn main() -> Result<ExitCode> {
    let command = Command::parse();
    if let Some(Action::Worker) = command.command {
        worker::serve()?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = command.options;
    if options.list {
        list(&options)?;
        return Ok(ExitCode::SUCCESS);
    }
    let reports = if options.from.is_empty() {
        vec![measure(&options)?]
    } else {
        let read = |path: &PathBuf| -> Result<Report> {
            let text = fs::read(path).with_context(|| path.display().to_string())?;
            serde_json::from_slice(&text).with_context(|| path.display().to_string())
        };
        options.from.iter().map(read).collect::<Result<_>>()?
    };
    for report in &reports {
        println!("{}", report.text());
    }
    if let Some(path) = &options.page {
        fs::write(path, report::page(&reports)).with_context(|| path.display().to_string())?;
    }
    let first = reports.first().context("no report")?;
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(first)?)
            .with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &options.chart {
        chart::draw(&reports, path)?;
    }
    let mut missing = reports.iter().flat_map(|report| &report.missing);
    let failed = missing.any(|missing| missing.failed);
    Ok(ExitCode::from(u8::from(failed)))
}

fn list(options: &Options) -> Result<()> {
    let titles = lines::all(options.sizes())
        .into_iter()
        .flat_map(|experiment| experiment.lines)
        .map(|line| line.title)
        .chain(
            growth::plans(options.quick)?
                .into_iter()
                .map(|plan| plan.title),
        );
    for title in titles.filter(|title| options.wants(title)) {
        println!("{title}");
    }
    Ok(())
}

/// udmabuf's limits, out of the way. (Its later versions have fewer.)
fn raise_limits() -> Result<Vec<Setting>> {
    let directory = Path::new("/sys/module/udmabuf/parameters");
    [("list_limit", 1 << 20), ("size_limit_mb", 1 << 20)]
        .into_iter()
        .map(|(name, value)| (directory.join(name), value))
        .filter(|(path, _)| path.exists())
        .map(|(path, value)| Setting::set(path, value))
        .collect()
}

fn measure(options: &Options) -> Result<Report> {
    let _limits = raise_limits()?;
    let mut report = Report {
        kernel: kernel::read("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        clock: if options.instructions {
            Clock::Instructions
        } else {
            Clock::Nanoseconds
        },
        memory: kernel::field("/proc/meminfo", "MemTotal")? as u64 * 1024,
        processors: worker::processors()?,
        rounds: options.rounds(),
        quick: options.quick,
        lines: Vec::new(),
        curves: Vec::new(),
        missing: Vec::new(),
    };
    table(options, &mut report)?;
    if !options.no_growth {
        curves(options, &mut report)?;
    }
    Ok(report)
}

fn table(options: &Options, report: &mut Report) -> Result<()> {
    let sizes = options.sizes();
    let experiments: Vec<Experiment> = lines::all(sizes)
        .into_iter()
        .filter(|it| it.lines.iter().any(|line| options.wants(&line.title)))
        .collect();
    // Made before anything else, as long as memory is in one piece, and given back with the last
    // line that wants it.
    let mut pool = None;
    let mut memory: Option<(Shape, OwnedFd)> = None;
    let count = experiments.len();
    for (number, experiment) in experiments.iter().enumerate() {
        let title = experiment
            .lines
            .first()
            .map_or("", |line| line.title.as_str());
        eprintln!("{}/{count} {title}", number + 1);
        let mut missing = |reason: String, failed| {
            report.missing.push(Missing {
                title: title.to_owned(),
                reason,
                failed,
            });
        };
        if let Some(lack) = lack(experiment, report.processors)? {
            missing(lack, false);
            continue;
        }
        let shape = experiment.shape;
        let same = |old: &Shape| {
            let key = |it: &Shape| (it.bytes, it.huge, it.sparse, it.scattered);
            key(old) == key(&shape)
        };
        if !memory.as_ref().is_some_and(|(old, _)| same(old)) {
            drop(memory.take());
            if !shape.huge {
                drop(pool.take());
            } else if pool.is_none() {
                pool = Some(memory::sorted_pool(shape.bytes)?);
            }
            memory = Some((shape, memory::memfd(shape)?));
        }
        let Some((_, memfd)) = &memory else { continue };
        let figures = run::measure(
            experiment.sides(),
            memfd,
            shape,
            &experiment.items,
            experiment.what,
            options.rounds(),
        );
        match figures {
            Ok(figures) => {
                let rows = experiment
                    .lines
                    .iter()
                    .filter_map(|line| Row::new(line, &figures));
                report.lines.extend(rows);
            }
            Err(error) => missing(format!("{error:#}"), true),
        }
    }
    Ok(())
}

/// What the machine lacks for an experiment.
fn lack(experiment: &Experiment, processors: usize) -> Result<Option<String>> {
    if experiment.processors as usize > processors {
        return Ok(Some(format!(
            "it takes {} processors",
            experiment.processors
        )));
    }
    let iommu = matches!(experiment.what, What::Device { iommu: true, .. });
    if iommu && worker::behind_iommu()?.is_none() {
        return Ok(Some("no device is behind an IOMMU".to_owned()));
    }
    Ok(None)
}

fn curves(options: &Options, report: &mut Report) -> Result<()> {
    let plans = growth::plans(options.quick)?;
    for plan in plans.iter().filter(|plan| options.wants(&plan.title)) {
        let progress = |x| eprintln!("{}: {x}", plan.title);
        match growth::run(plan, options.rounds(), progress) {
            Ok(curve) => report.curves.push(curve),
            Err(error) => report.missing.push(Missing {
                title: plan.title.clone(),
                reason: format!("{error:#}"),
                failed: true,
            }),
        }
    }
    Ok(())
}
