// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vm`: one guest, one command, with the command's own streams and status.

use std::io::{stderr, stdin, stdout, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg};
use pinbuf_guest_init::Request;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::guest::{End, Guest, Options, Outcome, Requests, Streams};
use crate::image::userspace::{Build, Profile};
use crate::ui::{say, seconds, tail};
use crate::{cleanup, paths};

/// The command did not end because the machine stopped.
const CRASHED: i32 = 98;
/// The command succeeded, but a checker of the kernel reported a problem.
const COMPLAINED: i32 = 99;
/// The timeout expired, as with timeout(1).
const TIMED_OUT: i32 = 124;

/// The number of lines of the kernel's log that are shown when something went wrong.
const TAIL: usize = 60;

/// Boot a guest with pinbuf installed, and run a command or a shell in it.
#[derive(Debug, Args)]
pub struct Vm {
    /// Kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` prints it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Memory of the guest, with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    mem: String,
    /// Processors of the guest.
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Parameters to add to the kernel's command line.
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// Arguments for QEMU, quoted as in a shell; may be given several times.
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    qemu: Vec<String>,
    /// Directory to share read-write with the guest, at the same path, and to run the command
    /// in.  [default: the current directory]
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Seconds after which the guest is stopped; 0 means never.  [default: 600, or never for a shell]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Install neither the module nor the programs of pinbuf.
    #[arg(long)]
    bare: bool,
    /// Use optimised programs without assertions, as users get them.
    #[arg(long)]
    release: bool,
    /// Use the user space that was built last, without building it.
    #[arg(long)]
    no_build: bool,
    /// Image of the guest: base, or qemu for nested virtual machines.
    #[arg(long, value_name = "NAME", default_value = "base")]
    image: String,
    /// Make QEMU's control protocol (QMP) available on this socket.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Give the guest an empty disk of this size (the last of /dev/vd?, serial number `disk`).
    #[arg(long, value_name = "SIZE")]
    disk: Option<String>,
    /// Load a module before the command runs; may be given several times.
    #[arg(long, value_name = "NAME")]
    modprobe: Vec<String>,
    /// Do not fail if a checker of the kernel reports a problem; the report is still shown.
    #[arg(long)]
    expect_splat: bool,
    /// Give the command a terminal.
    #[arg(long)]
    tty: bool,
    /// Command to run.  [default: a shell]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Vm {
    /// Runs it, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        let shell = self.command.is_empty();
        let wants_terminal = (shell || self.tty) && stdin().is_terminal();
        let mut options = Options {
            kernel: self.kernel,
            memory: self.mem,
            processors: self.cpus,
            cmdline: self.cmdline,
            qemu: Vec::new(),
            share: Some(match self.share {
                Some(share) => share,
                None => std::env::current_dir().context("the current directory")?,
            }),
            timeout: match self.timeout {
                Some(0) => None,
                None if shell => None,
                given => Some(Duration::from_secs(given.unwrap_or(600))),
            },
            boot_limit: None,
            bare: self.bare,
            profile: if self.release {
                Profile::Release
            } else {
                Profile::Dev
            },
            build: Build::unless(self.no_build),
            image: self.image,
            qmp: self.qmp.map(std::path::absolute).transpose()?,
            disk: self.disk,
            modules: self.modprobe,
            command: self.command,
            terminal: wants_terminal.then(terminal_size),
        };
        for words in &self.qemu {
            options
                .qemu
                .extend(shell_words::split(words).context("--qemu")?);
        }
        if shell && !wants_terminal {
            // Commands come from standard input, as with any shell.
            options.command = vec!["/bin/bash".to_owned()];
        }
        let streams = Streams {
            input: Some(Box::new(stdin())),
            output: Box::new(stdout()),
            error: if wants_terminal {
                Box::new(stdout())
            } else {
                Box::new(stderr())
            },
        };
        let guest = Guest::start(&options, streams)?;
        if let Some(path) = &options.qmp {
            say(&format!("  QMP: {}", path.display()));
        }
        if wants_terminal {
            make_terminal_raw()?;
            follow_size(guest.requests()?)?;
        }
        let outcome = guest.wait();
        cleanup::restore_terminal();
        let outcome = outcome?;
        report(&outcome, self.expect_splat);
        Ok(status(&outcome, self.expect_splat))
    }
}

/// The exit status of the run.
fn status(outcome: &Outcome, expect_splat: bool) -> i32 {
    let complained = !outcome.complaints.is_empty() && !expect_splat;
    match &outcome.end {
        End::Exited(0) if complained => COMPLAINED,
        End::Exited(status) => *status,
        End::Killed(signal) => 128 + signal,
        End::Failed(_) | End::Crashed(_) => CRASHED,
        End::TimedOut | End::NotBooted => TIMED_OUT,
    }
}

/// Prints what went wrong, if anything, and the path of the log.
fn report(outcome: &Outcome, expect_splat: bool) {
    let mut out = stderr().lock();
    let mut line = |text: &str| {
        let _ = writeln!(out, "{text}");
    };
    if let Some(problem) = outcome.problem() {
        line(&format!(
            "--- last lines of the kernel's log:\n{}",
            tail(&outcome.log, TAIL)
        ));
        line(&format!("--- {problem}"));
    }
    if !outcome.complaints.is_empty() {
        let expected = if expect_splat { " (expected)" } else { "" };
        line(&format!("--- the kernel reported problems{expected}:"));
        for complaint in &outcome.complaints {
            line(complaint);
        }
    }
    let boot = outcome.boot.map_or("never".to_owned(), seconds);
    line(&format!(
        "  guest: command started after {boot}, total {}; kernel's log: {}",
        seconds(outcome.total),
        paths::shown(&outcome.log)
    ));
}

fn make_terminal_raw() -> Result<()> {
    let settings = tcgetattr(stdin()).context("reading the terminal's settings")?;
    cleanup::remember_terminal(settings.clone());
    let mut raw = settings;
    cfmakeraw(&mut raw);
    tcsetattr(stdin(), SetArg::TCSANOW, &raw).context("setting the terminal")
}

/// Informs the guest of changes of the terminal's size.
fn follow_size(mut requests: Requests) -> Result<()> {
    let mut signals = Signals::new([SIGWINCH])?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            let (rows, columns) = terminal_size();
            if requests.send(Request::Resize(rows, columns)).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Rows and columns of the terminal.
fn terminal_size() -> (u16, u16) {
    let ask = || -> Option<(u16, u16)> {
        let output = std::process::Command::new("stty")
            .arg("size")
            .stdin(std::process::Stdio::inherit())
            .output()
            .ok()?;
        let mut text = String::new();
        output.stdout.as_slice().read_to_string(&mut text).ok()?;
        let (rows, columns) = text.trim().split_once(' ')?;
        Some((rows.parse().ok()?, columns.parse().ok()?))
    };
    ask().unwrap_or((25, 80))
}
