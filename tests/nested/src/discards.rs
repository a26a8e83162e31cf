// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest that puts pages of its live screen into the balloon: QEMU discards them and shows old pixels from then on,
//! without an error.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use pinbuf::{Device, Discard, DiscardState, DmaBuf, Watch};
use serde::Deserialize;

use crate::evidence;
use crate::machine::{Machine, Setup};
use crate::pattern::Pattern;
use crate::picture::Picture;
use crate::protocol::Request;
use crate::scenarios::{note, timed};

const PAGE: u64 = 4096;

/// The time within which a loss must be reported.
const SOON: Duration = Duration::from_secs(1);

/// The time after which waiting for a report ends.
const PATIENCE: Duration = Duration::from_secs(60);

/// A part of a buffer, as `pinbuf watch --json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Part {
    offset: u64,
    len: u64,
    state: String,
}

impl From<&Discard> for Part {
    fn from(discard: &Discard) -> Self {
        let state = match discard.state {
            DiscardState::Discarded => "discarded",
            _ => "unsure",
        };
        Self {
            offset: discard.offset,
            len: discard.len,
            state: state.to_owned(),
        }
    }
}

/// A line of `pinbuf watch --json`.
#[derive(Debug, Deserialize)]
struct Line {
    parts: Vec<Part>,
}

/// `pinbuf watch`, which runs until this is dropped.
struct Watcher {
    child: Child,
    lines: Receiver<(Instant, String)>,
}

impl Watcher {
    fn start(process: u32) -> Result<Self> {
        let mut child = watch_command(process)
            .args(["--interval", "0.1"])
            .stdout(Stdio::piped())
            .spawn()
            .context("pinbuf watch")?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// Waits for a line with these parts. Lines before it may have fewer: pages are discarded one after the other.
    fn finds(&self, expected: &[Part]) -> Result<Instant> {
        let mut last = Vec::new();
        let start = Instant::now();
        while let Ok((when, line)) = self
            .lines
            .recv_timeout(PATIENCE.saturating_sub(start.elapsed()))
        {
            let line: Line = serde_json::from_str(&line).with_context(|| line.clone())?;
            if line.parts == expected {
                return Ok(when);
            }
            last = line.parts;
        }
        bail!("`pinbuf watch` last reported {last:?}, not {expected:?}")
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn watch_command(process: u32) -> Command {
    let mut command = Command::new("pinbuf");
    command.args(["watch", "--json", "--pid", &process.to_string()]);
    command
}

/// The 256 pages that go into the balloon: half of them adjacent, the others each by itself.
fn chosen() -> BTreeSet<usize> {
    (100..228).chain((0..128).map(|i| 500 + 3 * i)).collect()
}

/// Pages as parts of a buffer.
fn parts_of(pages: &BTreeSet<usize>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for &page in pages {
        let offset = page as u64 * PAGE;
        match parts.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += PAGE,
            _ => parts.push(Part {
                offset,
                len: PAGE,
                state: "discarded".to_owned(),
            }),
        }
    }
    parts
}

/// The number of pixels that differ from what was drawn, and the pages of the screen that contain them.
fn wrong_pages(picture: &Picture, drawn: Pattern) -> (usize, BTreeSet<usize>) {
    let per_page = PAGE as usize / 4;
    let drawn = (0..drawn.height).flat_map(|y| drawn.row(y));
    let wrong = picture.pixels.iter().zip(drawn).enumerate();
    let wrong: Vec<usize> = wrong
        .filter(|(_, (pixel, drawn))| **pixel & 0xff_ffff != *drawn)
        .map(|(index, _)| index)
        .collect();
    let pages = wrong.iter().map(|index| index / per_page).collect();
    (wrong.len(), pages)
}

/// The time from the end of the discards to the report.
fn needed(what: &str, found: Instant, over: Instant) -> Result<()> {
    let needed = found.saturating_duration_since(over);
    note(&format!(
        "{what} reports all of it {:.2} s after the guest saw its pages in the balloon",
        needed.as_secs_f64()
    ));
    ensure!(needed <= SOON, "{what}: too late");
    Ok(())
}

pub fn balloon() -> Result<()> {
    evidence::no_udmabuf()?;
    // The guest has to know where its screen's pages are: it exports memory of its own.
    let setup = Setup {
        modules: vec!["pinbuf"],
        more: ["-device", "virtio-balloon-pci"]
            .map(str::to_owned)
            .to_vec(),
        ..Setup::new("balloon")
    };
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    machine.show(&Request::ShowExported)?;
    machine.frames(1..3)?;
    let process = machine.process();
    let device = Device::open()?;
    let lost = machine.screen_fd()?;
    let buffer = DmaBuf::from_fd(evidence::copy(process, &lost)?)?;
    let mut watch = Watch::new(&device);
    watch.add(&buffer)?;
    ensure!(
        watch.poll()?.is_empty(),
        "something is reported before anything was discarded"
    );
    let watcher = Watcher::start(process)?;
    let pages = chosen();
    let expected = parts_of(&pages);
    let request = Request::Inflate(pages.iter().copied().collect());
    let (over, by_library) = std::thread::scope(|scope| {
        let library = scope.spawn(|| {
            let start = Instant::now();
            let mut last = Vec::new();
            while start.elapsed() < PATIENCE {
                if let Some(change) = watch.poll()?.first() {
                    last = change.discards.iter().map(Part::from).collect();
                    if last == expected {
                        return Ok(Instant::now());
                    }
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            bail!("the library's watch last found {last:?}, not {expected:?}")
        });
        let asked = machine.ask(&request);
        let over = Instant::now();
        let found = library.join().unwrap_or_else(|_| bail!("panicked"));
        asked?;
        anyhow::Ok((over, found?))
    })?;
    needed("the library's watch", by_library, over)?;
    needed("`pinbuf watch`", watcher.finds(&expected)?, over)?;
    let info = evidence::info(process, &lost)?;
    let bytes = pages.len() as u64 * PAGE;
    ensure!(
        (info.discarded_bytes, info.unsure_bytes) == (bytes, 0),
        "{info:?}, not {bytes} bytes"
    );

    // What a user sees without any report.
    let drawn = machine.draw(3)?;
    let (wrong, where_) = wrong_pages(&machine.picture()?, drawn);
    note(&format!(
        "{wrong} pixels of QEMU's picture are old, in {} pages",
        where_.len()
    ));
    ensure!(
        where_ == pages,
        "the wrong pixels are in other pages than those in the balloon: {where_:?}"
    );
    machine.guest_finds(3)?;

    // One more buffer: the shim, which has a log, reports the loss of the first one at this call.
    machine.show(&Request::ShowAnother)?;
    machine.frames(4..6)?;
    let log = fs::read_to_string(machine.path("shim.log"))?;
    let line = log.lines().find(|line| line.contains("was discarded"));
    note(line.context("the shim's log does not have it")?);

    // The guest makes its screen anew.
    machine.show(&Request::ShowExported)?;
    for frame in 6..9 {
        machine.frames(frame..frame + 1)?;
        machine.guest_finds(frame)?;
    }
    for (buffer, info) in machine.buffers()? {
        ensure!(
            (info.discarded_bytes, info.unsure_bytes) == (0, 0),
            "{buffer:?} was made after the discards: {info:?}"
        );
    }
    let output = watch_command(process).arg("--once").output()?;
    ensure!(
        output.status.success() && output.stdout.is_empty(),
        "`pinbuf watch --once`: {output:?}"
    );
    machine.quit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_as_parts() {
        let parts = parts_of(&chosen());
        assert_eq!(parts.len(), 129);
        assert_eq!((parts[0].offset, parts[0].len), (100 * PAGE, 128 * PAGE));
        let bytes: u64 = parts.iter().map(|part| part.len).sum();
        assert_eq!(bytes, 256 * PAGE);
    }
}
