// SPDX-License-Identifier: MIT OR Apache-2.0

//! `demo`: a picture drawn in ordinary memory, shown by a display driver, as QEMU's screen has it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::guest::{self, End, Guest, Options, Outcome, Streams};
use crate::image::userspace::Build;
use crate::paths;
use crate::ui::{say, seconds, step, tail, Step};

/// What the program prints when its picture is on the screen.
const SHOWING: &str = "pinbuf-demo: showing";

/// A picture has at least this many colours; an empty screen has one, a console two.
const COLOURS: usize = 16;

/// What is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// A program's memory on the guest's screen: build/demo.png.
    Program,
    /// The screen of a virtual machine in the guest, by stock QEMU: build/demo-qemu.png.
    Qemu,
}

/// Make build/demo.png: a program in a guest draws into ordinary memory and shows it, through
/// pinbuf, on the guest's screen.
#[derive(Debug, Args)]
pub struct Demo {
    /// What to show.
    #[arg(value_enum, default_value = "program")]
    mode: Mode,
    /// Kernel: default, debug, a series (7.2, 7.2-cloud), or a release as `uname -r` prints it.
    #[arg(long, value_name = "RELEASE", default_value = "default")]
    kernel: String,
    /// Use the user space that was built last, without building it.
    #[arg(long)]
    no_build: bool,
}

/// Shows the program's picture on a kernel, with userspace as it was built last; fails unless each
/// pixel of the screen is right.
pub fn program(kernel: &str) -> Result<()> {
    let demo = Demo {
        mode: Mode::Program,
        kernel: kernel.to_owned(),
        no_build: true,
    };
    demo.program().map(drop)
}

impl Demo {
    /// Runs it, and returns the status to exit with.
    pub fn run(self) -> Result<i32> {
        match self.mode {
            Mode::Program => self.program(),
            Mode::Qemu => self.qemu(),
        }
    }

    /// A virtual machine in the guest, with a device passed through.
    fn qemu(self) -> Result<i32> {
        const NAME: &str = "screen.png";
        let start = Instant::now();
        let picture = paths::build().join("demo-qemu.png");
        let _ = fs::remove_file(&picture);
        let share = tempfile::Builder::new().prefix("pinbuf-share-").tempdir()?;
        let options = Options {
            kernel: self.kernel,
            memory: "3G".to_owned(),
            cmdline: guest::NO_UDMABUF.to_owned(),
            qemu: shell_words::split(guest::VFIO)?,
            image: "qemu".to_owned(),
            share: Some(share.path().to_owned()),
            command: ["pinbuf-nested", "--demo", NAME]
                .map(str::to_owned)
                .to_vec(),
            build: Build::unless(self.no_build),
            timeout: Some(Duration::from_secs(900)),
            ..Options::default()
        };
        let streams = Streams {
            input: None,
            output: Box::new(io::stderr()),
            error: Box::new(io::stderr()),
        };
        let outcome = Guest::start(&options, streams)?.wait()?;
        check_end(&outcome, "pinbuf-nested")?;
        fs::copy(share.path().join(NAME), &picture)
            .context("QEMU wrote no picture of the screen")?;
        finish(&picture, start)
    }

    fn program(self) -> Result<i32> {
        const COPY: &str = "memory.xrgb";
        let start = Instant::now();
        let share = tempfile::Builder::new().prefix("pinbuf-share-").tempdir()?;
        let picture = paths::build().join("demo.png");
        let _ = fs::remove_file(&picture);
        let options = Options {
            kernel: self.kernel,
            memory: "1G".to_owned(),
            qemu: ["-device", "bochs-display"].map(str::to_owned).to_vec(),
            modules: vec!["bochs".to_owned()],
            share: Some(share.path().to_owned()),
            command: ["pinbuf-demo", "--copy", COPY].map(str::to_owned).to_vec(),
            build: Build::unless(self.no_build),
            timeout: Some(Duration::from_secs(180)),
            ..Options::default()
        };
        // The program runs until its standard input ends.
        let (input, hold) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let (showing, shown) = channel();
        let streams = Streams {
            input: Some(Box::new(File::from(input))),
            output: Box::new(Watcher {
                showing,
                line: Vec::new(),
            }),
            error: Box::new(io::stderr()),
        };
        let guest = Guest::start(&options, streams)?;
        let outcome = show(guest, hold, &shown, &picture)?;
        check_end(&outcome, "pinbuf-demo")?;
        compare(&picture, &share.path().join(COPY))?;
        finish(&picture, start)
    }
}

/// Fails unless the program ended well and the kernel did not complain.
fn check_end(outcome: &Outcome, program: &str) -> Result<()> {
    if outcome.end == End::Exited(0) && outcome.complaints.is_empty() {
        return Ok(());
    }
    say(&format!(
        "--- last lines of the kernel's log:\n{}",
        tail(&outcome.log, 60)
    ));
    for complaint in &outcome.complaints {
        say(&format!("the kernel reported: {complaint}"));
    }
    let problem = outcome
        .problem()
        .unwrap_or_else(|| format!("{program} ended with {:?}", outcome.end));
    bail!(
        "{problem}; the kernel's log: {}",
        paths::shown(&outcome.log)
    );
}

/// Checks the picture, and prints its path.
fn finish(picture: &Path, start: Instant) -> Result<i32> {
    let (width, height, colours) = check(picture)?;
    say(&format!("  total: {}", seconds(start.elapsed())));
    println!(
        "{} ({width}x{height}, {colours} colours)",
        paths::shown(picture)
    );
    Ok(0)
}

/// Waits for the picture, takes it, and lets the program end.
fn show(mut guest: Guest, hold: OwnedFd, shown: &Receiver<()>, picture: &Path) -> Result<Outcome> {
    let boot = Step::begin("guest boots, draws and shows");
    // The sender goes away with the program's output, that is with the guest.
    let is_shown = loop {
        match shown.recv_timeout(Duration::from_millis(100)) {
            Ok(()) => break true,
            Err(RecvTimeoutError::Timeout) if !guest.ended() => {}
            Err(_) => break false,
        }
    };
    if !is_shown {
        boot.fail();
        drop(hold);
        return guest.wait();
    }
    boot.end();
    step("picture of the screen", |_| {
        let file = guest.directory().join("screen.png");
        let arguments = json!({"filename": file.display().to_string(), "format": "png"});
        guest.qmp().execute("screendump", arguments)?;
        fs::copy(&file, picture).context("QEMU wrote no picture of the screen")?;
        Ok(())
    })?;
    drop(hold);
    guest.wait()
}

/// Passes the program's output on, and reports when the picture is complete.
struct Watcher {
    showing: Sender<()>,
    line: Vec<u8>,
}

impl Write for Watcher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(bytes)?;
        for &byte in bytes {
            if byte == b'\n' {
                if String::from_utf8_lossy(&self.line).starts_with(SHOWING) {
                    let _ = self.showing.send(());
                }
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compares the screen with what was in the program's memory, pixel by pixel.
fn compare(picture: &Path, memory: &Path) -> Result<()> {
    let (info, seen) = read(picture)?;
    let expected = fs::read(memory).context("the program left no copy of its memory")?;
    let step = info.color_type.samples() * info.bit_depth as usize / 8;
    if step < 3 || seen.len() / step != expected.len() / 4 {
        bail!(
            "the screen has {} pixels of {step} bytes, the memory {}",
            seen.len() / step.max(1),
            expected.len() / 4
        );
    }
    let pixels = seen.chunks_exact(step).zip(expected.chunks_exact(4));
    let wrong = pixels
        .filter(|(seen, expected)| seen[..3] != [expected[2], expected[1], expected[0]])
        .count();
    if wrong > 0 {
        bail!(
            "{wrong} of {} pixels on the screen differ from the program's memory; see {}",
            expected.len() / 4,
            paths::shown(picture)
        );
    }
    say(&format!(
        "  all {} pixels of the screen equal the program's memory",
        expected.len() / 4
    ));
    Ok(())
}

/// A picture's pixels.
fn read(path: &Path) -> Result<(png::OutputInfo, Vec<u8>)> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info()?;
    let size = reader
        .output_buffer_size()
        .context("the picture is too large")?;
    let mut buffer = vec![0; size];
    let info = reader.next_frame(&mut buffer)?;
    buffer.truncate(info.buffer_size());
    Ok((info, buffer))
}

/// Makes sure that the screen is not empty: width, height, number of colours.
fn check(path: &Path) -> Result<(u32, u32, usize)> {
    let (info, buffer) = read(path)?;
    let pixel = info.color_type.samples() * info.bit_depth as usize / 8;
    let colours: BTreeSet<&[u8]> = buffer.chunks_exact(pixel.max(1)).take(8 << 20).collect();
    if colours.len() < COLOURS {
        bail!(
            "the screen shows only {} colours, fewer than the demo's picture has; see {}",
            colours.len(),
            paths::shown(path)
        );
    }
    Ok((info.width, info.height, colours.len()))
}
