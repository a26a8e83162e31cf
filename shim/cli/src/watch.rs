// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf watch`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::Args;
use pinbuf::{Device, Discard, DiscardState};
use serde::Serialize;

use crate::dmabuf::{self, Descriptor};
use crate::info::{command, copy, processes, size};
use crate::text::{self, complain};

/// Report buffers whose memory is discarded, as it happens.
///
/// The owner of the memory, for example a virtual machine monitor, can discard pages under a live buffer: by a
/// balloon, a hole in the file, munmap or MADV_DONTNEED. Devices and viewers then continue with the old pages. A line
/// is printed for each buffer that has such parts, and for each change, until the command is interrupted. Buffers of
/// which no process has a descriptor cannot be checked.
#[derive(Debug, Args)]
pub struct Watch {
    /// Buffers of this process only.  [default: of all processes]
    #[arg(long)]
    pid: Option<u32>,
    /// Seconds between two checks.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// Check once, and exit.
    #[arg(long)]
    once: bool,
    /// Print JSON: one object per line.
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.01..=86_400.0).contains(&value) => Ok(value),
        _ => Err("a number of seconds from 0.01 to 86400 is needed".to_owned()),
    }
}

/// A part of a buffer, as it is printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    offset: u64,
    len: u64,
    state: &'static str,
}

impl From<&Discard> for Part {
    fn from(discard: &Discard) -> Self {
        Self {
            offset: discard.offset,
            len: discard.len,
            state: match discard.state {
                DiscardState::Discarded => "discarded",
                _ => "unsure",
            },
        }
    }
}

/// The parts of a buffer of this size in words, a few of them: all are in the JSON.
///
/// Many programs close the memory's file, or unmap it, once they have the buffer. Then nobody sees other pages,
/// but neither is any page of the buffer the owner's.
pub fn in_words(parts: &[Part], size_of_buffer: u64) -> String {
    const SHOWN: usize = 8;
    if let [Part {
        state: "discarded",
        len,
        ..
    }] = parts
    {
        if *len == size_of_buffer {
            return "all discarded, as when its memory is unmapped or its file closed".to_owned();
        }
    }
    let mut words = Vec::new();
    for (state, verb) in [("discarded", "discarded"), ("unsure", "possibly discarded")] {
        let of: Vec<&Part> = parts.iter().filter(|part| part.state == state).collect();
        let bytes: u64 = of.iter().map(|part| part.len).sum();
        if bytes == 0 {
            continue;
        }
        let mut ranges: Vec<String> = of
            .iter()
            .take(SHOWN)
            .map(|part| format!("{:#x}-{:#x}", part.offset, part.offset + part.len))
            .collect();
        if of.len() > SHOWN {
            ranges.push(format!("{} more", of.len() - SHOWN));
        }
        words.push(format!("{} {verb}: {}", size(bytes), ranges.join(", ")));
    }
    words.join("; ")
}

/// A change of a buffer.
#[derive(Debug, Serialize)]
struct Change {
    inode: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    bytes: u64,
    /// The process whose descriptor was asked.
    pid: u32,
    command: String,
    discarded_bytes: u64,
    unsure_bytes: u64,
    parts: Vec<Part>,
}

impl Watch {
    pub fn run(self) -> Result<ExitCode> {
        let device = Device::open()?;
        if !device.query()?.discards {
            bail!("the kernel's pinbuf does not report discards: install a module of this version");
        }
        let mut known: BTreeMap<u64, Vec<Part>> = BTreeMap::new();
        let mut complained = false;
        let mut asked = false;
        loop {
            let pids = match self.pid {
                Some(pid) if fs::metadata(format!("/proc/{pid}")).is_err() => {
                    if !asked {
                        bail!("there is no process {pid}");
                    }
                    return Ok(ExitCode::SUCCESS);
                }
                Some(pid) => vec![pid],
                None => processes()?,
            };
            let mut now = BTreeMap::new();
            let mut unreadable = 0;
            for pid in pids {
                if ask(&device, pid, &mut now).is_err() {
                    unreadable += 1;
                }
            }
            if unreadable > 0 && !complained {
                complain!("{unreadable} processes of other users could not be examined");
                complained = true;
            }
            for (inode, change) in &now {
                let before = known.get(inode).map_or(&[][..], Vec::as_slice);
                if change.parts == before {
                    continue;
                }
                match self.print(change) {
                    // Nobody reads any more.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        return Ok(ExitCode::SUCCESS);
                    }
                    printed => printed.context("cannot write to standard output")?,
                }
            }
            asked = true;
            known = now
                .into_iter()
                .map(|(inode, change)| (inode, change.parts))
                .collect();
            if self.once {
                return Ok(ExitCode::SUCCESS);
            }
            thread::sleep(Duration::from_secs_f64(self.interval));
        }
    }

    fn print(&self, change: &Change) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.json {
            let line = text::json_line(change).map_err(io::Error::other)?;
            writeln!(out, "{line}")?;
        } else {
            let name = change
                .name
                .as_deref()
                .map(|name| format!(" `{name}`"))
                .unwrap_or_default();
            let what = match in_words(&change.parts, change.bytes) {
                words if words.is_empty() => "nothing discarded".to_owned(),
                words => words,
            };
            let line = format!(
                "buffer {}{name} of {} ({}), {}: {what}",
                change.inode,
                change.command,
                change.pid,
                size(change.bytes)
            );
            writeln!(out, "{}", text::escaped(&line))?;
        }
        out.flush()
    }
}

/// Asks about the buffers that a process has descriptors of, those that no other process was asked about.
fn ask(device: &Device, pid: u32, found: &mut BTreeMap<u64, Change>) -> Result<()> {
    // Another thread's own table cannot be reached through the process's number.
    for descriptor in dmabuf::descriptors(&dmabuf::thread_path(pid, pid))? {
        if descriptor.exporter != dmabuf::PINBUF || found.contains_key(&descriptor.inode) {
            continue;
        }
        // It may be closed at any time.
        let parts = parts(device, pid, &descriptor);
        let Some(parts) = parts else { continue };
        let bytes = |state| -> u64 {
            let of = parts.iter().filter(|part| part.state == state);
            of.map(|part| part.len).sum()
        };
        found.insert(
            descriptor.inode,
            Change {
                inode: descriptor.inode,
                name: (!descriptor.name.is_empty()).then(|| text::of_bytes(&descriptor.name)),
                bytes: descriptor.bytes,
                pid,
                command: command(pid),
                discarded_bytes: bytes("discarded"),
                unsure_bytes: bytes("unsure"),
                parts,
            },
        );
    }
    Ok(())
}

/// The parts of another process's buffer that are discarded, asked through a copy of its descriptor.
fn parts(device: &Device, pid: u32, descriptor: &Descriptor) -> Option<Vec<Part>> {
    let discards = copy(pid, descriptor)?.discarded(device).ok()?;
    Some(discards.iter().map(Part::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_words() {
        let part = |offset, len, state| Part { offset, len, state };
        assert_eq!(in_words(&[], 0x9000), "");
        assert_eq!(
            in_words(
                &[
                    part(0x1000, 0x1000, "discarded"),
                    part(0x4000, 0x2000, "unsure"),
                    part(0x8000, 0x1000, "discarded"),
                ],
                0x9000
            ),
            "8 KiB discarded: 0x1000-0x2000, 0x8000-0x9000; \
             8 KiB possibly discarded: 0x4000-0x6000"
        );
        let many: Vec<Part> = (0..20)
            .map(|page| part(page * 0x2000, 0x1000, "discarded"))
            .collect();
        assert!(in_words(&many, 0x28000).ends_with("0xe000-0xf000, 12 more"));
        let all = |state| in_words(&[part(0, 0x3000, state)], 0x3000);
        assert!(all("discarded").starts_with("all discarded, as when"));
        assert_eq!(all("unsure"), "12 KiB possibly discarded: 0x0-0x3000");
    }

    #[test]
    fn intervals() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for wrong in ["0", "-1", "nan", "inf", "1e9", ""] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
