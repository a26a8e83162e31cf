// SPDX-License-Identifier: MIT OR Apache-2.0

//! `bench`: measures pinbuf beside udmabuf in a guest.

use std::io::{stderr, stdout, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use clap::Args;

use crate::guest::{End, Guest, Options, Streams};
use crate::image::userspace::{Build, Profile};
use crate::paths;
use crate::ui::{say, seconds, tail};

/// Run pinbuf-bench in a guest: the table goes to standard output, progress to standard error.
#[derive(Debug, Args)]
pub struct Bench {
    /// Count the guest's instructions instead of measuring time: these figures repeat on a busy
    /// machine too. The guest has one processor.
    #[arg(long)]
    icount: bool,
    /// Measure every line once, with little memory.
    #[arg(long)]
    quick: bool,
    /// Measure only lines whose title contains this; may be given several times.
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,
    /// Write the figures to this file, below the current directory.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw a chart (SVG) to this file, below the current directory.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` prints it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Memory of the guest; it bounds the sizes for which the growth of costs is measured.
    #[arg(long, value_name = "SIZE", default_value = "11G")]
    mem: String,
    /// Processors of the guest.  [default: 2, or 1 with --icount]
    #[arg(long, value_name = "N", conflicts_with = "icount")]
    cpus: Option<u32>,
    /// Parameters to add to the kernel's command line.
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// Minutes after which the guest is stopped.
    #[arg(long, value_name = "MINUTES", default_value_t = 120)]
    timeout: u64,
    /// Use the user space that was built last, without building it.
    #[arg(long)]
    no_build: bool,
    /// More arguments for pinbuf-bench (`-- --help` lists them).
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Bench {
    /// Runs it, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        // A device behind an IOMMU, which nothing else uses.
        let iommu = [
            "-device",
            "intel-iommu,intremap=off",
            "-device",
            "virtio-rng-pci",
        ];
        let mut qemu: Vec<String> = iommu.map(str::to_owned).into();
        if self.icount {
            // One nanosecond of the guest's clock is one instruction.
            qemu.extend(["-icount", "shift=0"].map(str::to_owned));
        }
        let options = Options {
            command: self.command(),
            processors: self.cpus.unwrap_or(if self.icount { 1 } else { 2 }),
            kernel: self.kernel,
            memory: self.mem,
            cmdline: format!("intel_iommu=on {}", self.cmdline),
            qemu,
            share: Some(std::env::current_dir()?),
            build: Build::unless(self.no_build),
            profile: Profile::Release,
            timeout: Some(Duration::from_secs(self.timeout * 60)),
            modules: vec!["pinbuf_test_importer".to_owned()],
            ..Options::default()
        };
        let streams = Streams {
            input: None,
            output: Box::new(stdout()),
            error: Box::new(Stamped::new(stderr())),
        };
        let outcome = Guest::start(&options, streams)?.wait()?;
        for complaint in &outcome.complaints {
            say(&format!("the kernel reported: {complaint}"));
        }
        match (&outcome.end, outcome.complaints.is_empty()) {
            (End::Exited(0), true) => Ok(0),
            (End::Exited(status @ 1..), _) => Ok(*status),
            _ => {
                say(&format!(
                    "--- last lines of the kernel's log:\n{}",
                    tail(&outcome.log, 60)
                ));
                let problem = outcome
                    .problem()
                    .unwrap_or_else(|| format!("pinbuf-bench ended with {:?}", outcome.end));
                bail!(
                    "{problem}; the kernel's log: {}",
                    paths::shown(&outcome.log)
                )
            }
        }
    }

    /// What runs in the guest.
    fn command(&self) -> Vec<String> {
        let mut command = vec!["pinbuf-bench".to_owned()];
        let flags = [(self.icount, "--instructions"), (self.quick, "--quick")];
        let flags = flags.into_iter().filter(|(given, _)| *given);
        command.extend(flags.map(|(_, flag)| flag.to_owned()));
        let files = [("--json", &self.json), ("--chart", &self.chart)];
        for (name, file) in files {
            if let Some(file) = file {
                command.extend([name.to_owned(), file.display().to_string()]);
            }
        }
        for part in &self.filter {
            command.extend(["--filter".to_owned(), part.clone()]);
        }
        command.extend(self.arguments.iter().cloned());
        command
    }
}

/// Puts the host's time before every line: the guest's clock may count instructions.
struct Stamped<W> {
    to: W,
    start: Instant,
    fresh: bool,
}

impl<W: Write> Stamped<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            start: Instant::now(),
            fresh: true,
        }
    }
}

impl<W: Write> Write for Stamped<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.fresh {
                write!(self.to, "  {:>12}  ", seconds(self.start.elapsed()))?;
            }
            self.to.write_all(line)?;
            self.fresh = line.ends_with(b"\n");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_gets_the_time_once() {
        let mut stamped = Stamped::new(Vec::new());
        for part in ["one ", "line\nand", " another\n"] {
            stamped.write_all(part.as_bytes()).unwrap();
        }
        let text = String::from_utf8(stamped.to).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].ends_with("  one line") && lines[1].ends_with("  and another"));
    }
}
