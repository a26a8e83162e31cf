// SPDX-License-Identifier: MIT OR Apache-2.0

//! Running workers: the sides of a measurement take turns, round by round.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{bail, Context, Result};

use crate::memory::inheritable;
use crate::stats::Summary;
use crate::task::{Answer, Item, Metric, Sample, Shape, Side, Task, What};

/// Summaries of everything that the sides measured.
pub type Figures = BTreeMap<Side, BTreeMap<Metric, Summary>>;

/// A process that measures one side.
struct Worker {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    fn start(task: &Task) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = if matches!(task.side, Side::Shim | Side::Unmapped) {
            let mut command = Command::new(program.with_file_name("pinbuf"));
            command.args(["run", "--"]).arg(&program);
            command
        } else {
            Command::new(&program)
        };
        let mut child = command
            .arg("worker")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let stdout = child.stdout.take().context("no pipe")?;
        let mut worker = Self {
            child,
            answers: BufReader::new(stdout),
        };
        worker.say(&serde_json::to_string(task)?)?;
        Ok(worker)
    }

    fn say(&mut self, line: &str) -> Result<()> {
        let pipe = self.child.stdin.as_mut().context("no pipe")?;
        writeln!(pipe, "{line}").context("the worker is gone")
    }

    fn sample(&mut self) -> Result<Sample> {
        self.say("")?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the worker ended without an answer");
        }
        match serde_json::from_str(&line)? {
            Answer::Sample(sample) => Ok(sample),
            Answer::Error(error) => bail!(error),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It ends when its input ends.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Measures on several sides, `rounds` times each after one round that only warms up.
pub fn measure(
    sides: impl IntoIterator<Item = Side>,
    memfd: &OwnedFd,
    shape: Shape,
    items: &[Item],
    what: What,
    rounds: usize,
) -> Result<Figures> {
    let fd = inheritable(memfd)?;
    let mut workers = Vec::new();
    for side in sides {
        let task = Task {
            side,
            fd,
            shape,
            items: items.to_vec(),
            what,
        };
        let worker = Worker::start(&task).with_context(|| side.to_string())?;
        workers.push((side, worker));
    }
    let mut values: BTreeMap<Side, BTreeMap<Metric, Vec<f64>>> = BTreeMap::new();
    for round in 0..=rounds {
        for (side, worker) in &mut workers {
            let sample = worker.sample().with_context(|| side.to_string())?;
            if round == 0 {
                continue;
            }
            let values = values.entry(*side).or_default();
            for (metric, value) in sample {
                values.entry(metric).or_default().push(value);
            }
        }
    }
    let summarise = |metrics: BTreeMap<Metric, Vec<f64>>| {
        metrics
            .into_iter()
            .filter_map(|(metric, values)| Some((metric, Summary::of(&values)?)))
            .collect()
    };
    Ok(values
        .into_iter()
        .map(|(side, metrics)| (side, summarise(metrics)))
        .collect())
}
