// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the user sees: steps with their times, and failures with their logs.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{stderr, BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::paths;

/// Without a terminal, a long step prints a line at this interval.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// How many lines of a failed command's output are shown.
const TAIL: usize = 25;

/// A step in progress: one line for the user, which ends with the time that it took.
pub struct Step {
    name: String,
    start: Instant,
    bar: Option<ProgressBar>,
    /// When the last line of progress was printed.
    printed: Cell<Instant>,
}

impl Step {
    /// Begins a step and shows its name.
    pub fn begin(name: impl Into<String>) -> Self {
        let name = name.into();
        // A spinner is for people; CI and pipes get plain lines.
        let people = stderr().is_terminal() && std::env::var_os("CI").is_none();
        let bar = people.then(|| {
            let style =
                ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}");
            let bar = ProgressBar::new_spinner().with_prefix(name.clone());
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            say(&format!("  ... {name}"));
        }
        Self {
            name,
            start: Instant::now(),
            bar,
            printed: Cell::new(Instant::now()),
        }
    }

    /// Shows what the step is doing at the moment: without a terminal, as a line at an interval.
    pub fn progress(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.trim().to_owned());
        } else if self.printed.get().elapsed() > SIGN_OF_LIFE {
            self.printed.set(Instant::now());
            say(&format!(
                "  ... {}: {}; {}",
                self.name,
                seconds(self.start.elapsed()),
                shorten(text, 70)
            ));
        }
    }

    /// Ends the step with success.
    pub fn end(self) {
        self.finish("ok ");
    }

    /// Ends the step with a failure.
    pub fn fail(self) {
        self.finish("FAIL");
    }

    fn finish(&self, mark: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        say(&format!(
            "  {mark} {} ({})",
            self.name,
            seconds(self.start.elapsed())
        ));
    }

    /// Runs a command as part of this step, its output going to a log file under `build/logs/`.
    pub fn run(&self, command: &mut Command, log: &str) -> Result<()> {
        let path = paths::logs().join(log);
        fs::create_dir_all(paths::logs())?;
        let mut file = File::options().create(true).append(true).open(&path)?;
        let title = title(command);
        writeln!(file, "$ {title}")?;

        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {title}"))?;
        // The command would hold the far end of the pipe until it is dropped.
        command.stdout(Stdio::null()).stderr(Stdio::null());

        let (lines, output) = channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(File::from(reader));
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
                if lines.send(std::mem::take(&mut line)).is_err() {
                    return;
                }
            }
        });
        let mut last = Vec::new();
        loop {
            match output.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => {
                    file.write_all(&line)?;
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    last.push(text);
                    if last.len() > TAIL {
                        last.remove(0);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.progress(last.last().map_or("", String::as_str));
        }
        let status = child.wait()?;
        if !status.success() {
            let path = paths::shown(&path);
            bail!(
                "{}\n({status}; the whole log: {path})\ncommand: {title}",
                last.join("\n")
            );
        }
        Ok(())
    }
}

/// Runs something as one step.
pub fn step<T>(name: impl Into<String>, work: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
    let step = Step::begin(name);
    match work(&step) {
        Ok(value) => {
            step.end();
            Ok(value)
        }
        Err(error) => {
            let name = step.name.clone();
            step.fail();
            Err(error.context(format!("step failed: {name}")))
        }
    }
}

/// A command as people read it: for a script, its arguments.
fn title(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    for word in command.get_args().map(|word| word.to_string_lossy()) {
        if word.contains('\n') {
            words.clear();
        } else {
            words.push(word);
        }
    }
    words.join(" ")
}

/// Prints a line for the user.  Standard output belongs to what the user asked for.
pub fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// A duration as people read it.
pub fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 99.5 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:02} s", seconds as u64 / 60, seconds as u64 % 60)
    }
}

fn shorten(text: &str, limit: usize) -> &str {
    text.char_indices()
        .nth(limit)
        .map_or(text, |(end, _)| &text[..end])
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
