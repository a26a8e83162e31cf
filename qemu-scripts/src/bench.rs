// SPDX-License-Identifier: MIT OR Apache-2.0

//! `bench`: measures pinbuf in a guest.

use std::io::{stderr, stdout};
use std::time::Duration;

use anyhow::{bail, Result};
use clap::Args;

use crate::guest::{End, Guest, Options, Streams};
use crate::ui::{say, tail};
use crate::{paths, vm};

/// Runs pinbuf-bench in a guest; what it measures goes to standard output.
#[derive(Debug, Args)]
pub struct Bench {
    /// The kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` tells it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Memory.
    #[arg(long, value_name = "SIZE", default_value = "6G")]
    mem: String,
    /// Processors: with one, figures vary least.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Take userspace as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Arguments for pinbuf-bench.
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Bench {
    /// Runs it, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        let mut command = vec!["pinbuf-bench".to_owned()];
        command.extend(self.arguments);
        let options = Options {
            kernel: self.kernel,
            memory: self.mem,
            processors: self.cpus,
            build: !self.no_build,
            timeout: Some(Duration::from_secs(3600)),
            modules: vec!["pinbuf_test_importer".to_owned()],
            command,
            ..Options::default()
        };
        let streams = Streams {
            input: None,
            output: Box::new(stdout()),
            error: Box::new(stderr()),
        };
        let outcome = Guest::start(&options, streams)?.wait()?;
        for complaint in &outcome.complaints {
            say(&format!("the kernel complained: {complaint}"));
        }
        match (&outcome.end, outcome.complaints.is_empty()) {
            (End::Exited(0), true) => Ok(0),
            (End::Exited(status @ 1..), _) => Ok(*status),
            _ => {
                say(&format!(
                    "--- the end of the kernel's log:\n{}",
                    tail(&outcome.log, 60)
                ));
                let problem = vm::problem(&outcome)
                    .unwrap_or_else(|| format!("pinbuf-bench ended with {:?}", outcome.end));
                bail!(
                    "{problem}; the kernel's log: {}",
                    paths::shown(&outcome.log)
                )
            }
        }
    }
}
