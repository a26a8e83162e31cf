// SPDX-License-Identifier: MIT OR Apache-2.0

//! A long run of an honest guest: QEMU discards memory all the time, and no discard is reported for a buffer whose
//! memory is in use.
//!
//! The guest reports free pages, its balloon grows and shrinks, and memory is plugged and unplugged while the screen is
//! in it. Reports are right during a system reset only: QEMU discards all plugged memory before it drops the screen
//! that is in this memory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use pinbuf::{Device, DiscardState, DmaBuf};
use serde_json::{json, Value};

use crate::evidence;
use crate::load::Load;
use crate::machine::{Machine, Setup};
use crate::protocol::{Answer, Request};
use crate::scenarios::{note, timed};

/// The duration of the test.
pub static SECONDS: AtomicU64 = AtomicU64::new(600);

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Memory of the guest in MiB: what it boots with, and what can be plugged.
const MEMORY: u64 = 384;
const PLUGGED: u64 = 256;

/// The time in which some of it must be plugged or unplugged, and the time after which no more is expected.
const BEGINS: Duration = Duration::from_secs(120);
const ENDS: Duration = Duration::from_secs(15);

/// The thread that asks for discards of a process's buffers while the guest runs.
#[derive(Default)]
struct Sentry {
    /// The machine is being reset.
    reset: AtomicBool,
    done: AtomicBool,
}

/// Its results.
#[derive(Default)]
struct Seen {
    /// The number of requests.
    asked: u64,
    /// The number of buffers.
    buffers: BTreeMap<u64, u64>,
    /// Reports that nothing explains.
    alarms: Vec<String>,
    /// The maximum number of bytes that a buffer had lost during a reset.
    reset: u64,
}

impl Sentry {
    fn watch(&self, process: u32) -> Result<Seen> {
        let device = Device::open()?;
        let mut seen = Seen::default();
        while !self.done.load(Ordering::SeqCst) {
            for buffer in evidence::buffers(process)? {
                if buffer.exporter != "pinbuf" {
                    continue;
                }
                let before = self.reset.load(Ordering::SeqCst);
                // It may be closed at any time.
                let Ok(copy) = evidence::copy(process, &buffer) else {
                    continue;
                };
                let Ok(copy) = DmaBuf::from_fd(copy) else {
                    continue;
                };
                let discards = copy.discarded(&device)?;
                let reset = before || self.reset.load(Ordering::SeqCst);
                seen.asked += 1;
                seen.buffers.insert(buffer.inode, buffer.size);
                let lost: u64 = discards
                    .iter()
                    .filter(|part| part.state == DiscardState::Discarded)
                    .map(|part| part.len)
                    .sum();
                let all: u64 = discards.iter().map(|part| part.len).sum();
                if reset && lost == all {
                    seen.reset = seen.reset.max(lost);
                } else if !discards.is_empty() && seen.alarms.len() < 10 {
                    seen.alarms.push(format!("{buffer:?}: {discards:?}"));
                }
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(seen)
    }
}

/// The memory of QEMU's memfds, in bytes.
fn stored(process: u32) -> Result<u64> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let path = entry?.path();
        let Ok(name) = fs::read_link(&path) else {
            continue;
        };
        if name.to_string_lossy().starts_with("/memfd:memory-backend") {
            let metadata = fs::metadata(&path)?;
            files.insert(metadata.ino(), metadata.blocks() * 512);
        }
    }
    Ok(files.values().sum())
}

/// What happened to the guest's memory.
#[derive(Debug, Default)]
struct Totals {
    rounds: u32,
    resets: u32,
    /// The largest part of a screen that was in plugged memory, in pages.
    screen_in_plugged: usize,
    /// Memory that QEMU gave back to the host because the guest reported it as free, and because of the balloon, and
    /// memory that was unplugged: in MiB, the maximum of a round.
    reported_free: u64,
    ballooned: u64,
    unplugged: u64,
}

struct Honest {
    machine: Machine,
    frame: u32,
    totals: Totals,
}

impl Honest {
    /// Frames that were compared in QEMU and in the guest.
    fn frames(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            self.frame += 1;
            self.machine.frames(self.frame..self.frame + 1)?;
            self.machine.guest_finds(self.frame)?;
        }
        Ok(())
    }

    fn stored(&self) -> Result<u64> {
        Ok(stored(self.machine.process())? / MIB)
    }

    /// Waits until a size has the expected value, or does not change any more, and returns it.
    fn settle(&mut self, wanted: u64, size: impl Fn(&mut Machine) -> Result<u64>) -> Result<u64> {
        let first = size(&mut self.machine)?;
        let (mut last, mut changed) = (first, Instant::now());
        loop {
            // Under emulation, the guest may need a minute to find the first block that it can unplug.
            let patience = if last == first { BEGINS } else { ENDS };
            if last == wanted || changed.elapsed() > patience {
                return Ok(last);
            }
            std::thread::sleep(Duration::from_millis(200));
            let now = size(&mut self.machine)?;
            if now != last {
                (last, changed) = (now, Instant::now());
            }
        }
    }

    /// Plugs or unplugs memory until the guest has this amount, or as near to it as possible.
    fn plug(&mut self, mib: u64) -> Result<u64> {
        let path = "/machine/peripheral/mem";
        let set = json!({"path": path, "property": "requested-size", "value": mib * MIB});
        self.machine.qmp.execute("qom-set", set)?;
        self.settle(mib, |machine| {
            let get = json!({"path": path, "property": "size"});
            number(&machine.qmp.execute("qom-get", get)?)
        })
    }

    /// Leaves this much memory to the guest by the balloon. Returns how much QEMU gave back to the host.
    fn balloon(&mut self, mib: u64) -> Result<u64> {
        let set = json!({"value": mib * MIB});
        self.machine.qmp.execute("balloon", set)?;
        let before = self.stored()?;
        self.settle(mib, |machine| {
            let all = machine.qmp.execute("query-balloon", json!({}))?;
            number(&all["actual"])
        })?;
        Ok(before.saturating_sub(self.stored()?))
    }

    fn round(&mut self, sentry: &Sentry) -> Result<()> {
        let round = self.totals.rounds;
        self.totals.rounds += 1;
        let plugged = self.plug(PLUGGED)?;
        // The kernel allocates plugged memory first, because it is in the highest zone.
        self.machine.show(&Request::ShowExported)?;
        self.frames(2)?;
        let high = match self.machine.ask(&Request::HighPages)? {
            Answer::Count(high) => high,
            other => bail!("{other:?}"),
        };
        self.totals.screen_in_plugged = self.totals.screen_in_plugged.max(high);

        // Free pages are reported two seconds after they were freed.
        self.machine.ask(&Request::Churn(96))?;
        let before = self.stored()?;
        std::thread::sleep(Duration::from_secs(4));
        let given = before.saturating_sub(self.stored()?);
        self.totals.reported_free = self.totals.reported_free.max(given);
        self.frames(1)?;

        self.machine.ask(&Request::Churn(96))?;
        let given = self.balloon(MEMORY + plugged - 192)?;
        self.totals.ballooned = self.totals.ballooned.max(given);
        self.frames(1)?;
        self.balloon(MEMORY + plugged)?;

        // Everything that is not in use: the screen stays.
        self.machine.ask(&Request::Churn(96))?;
        let left = self.plug(0)?;
        self.totals.unplugged = self.totals.unplugged.max(plugged.saturating_sub(left));
        self.frames(1)?;
        // A screen of another kind, in the memory that is left.
        self.machine.show(&Request::Show)?;
        self.frames(1)?;
        note(&format!(
            "round {round}: {plugged} MiB plugged, {high} pages of the screen there, {left} MiB left after unplugging"
        ));

        if round % 3 == 0 {
            self.plug(PLUGGED)?;
            self.machine.show(&Request::ShowExported)?;
            self.frames(1)?;
            self.totals.resets += 1;
            sentry.reset.store(true, Ordering::SeqCst);
            self.machine.reset()?;
            sentry.reset.store(false, Ordering::SeqCst);
            self.machine.show(&Request::Show)?;
            self.frames(1)?;
        }
        Ok(())
    }
}

fn number(value: &Value) -> Result<u64> {
    Ok(value.as_u64().with_context(|| format!("{value}"))? / MIB)
}

pub fn honest() -> Result<()> {
    evidence::no_udmabuf()?;
    let plugged = format!("memory-backend-memfd,id=plugged,size={PLUGGED}M,share=on,reserve=off");
    let setup = Setup {
        memory: MEMORY,
        modules: vec!["pinbuf", "virtio_balloon", "virtio_mem"],
        more: [
            "-m",
            "maxmem=2G",
            "-object",
            &plugged,
            "-device",
            "virtio-mem-pci,id=mem,memdev=plugged,requested-size=0",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Setup::new("honest")
    };
    let machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    let mut honest = Honest {
        machine,
        frame: 0,
        totals: Totals::default(),
    };
    let process = honest.machine.process();
    let end = Instant::now() + Duration::from_secs(SECONDS.load(Ordering::Relaxed));
    // From here on, plugged memory and memory that is allocated again after a discard have huge pages.
    let load = Load::start()?;
    let sentry = Sentry::default();
    let (result, seen) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| sentry.watch(process));
        let mut result = Ok(());
        while result.is_ok() && (Instant::now() < end || honest.totals.rounds < 2) {
            result = honest.round(&sentry);
        }
        sentry.done.store(true, Ordering::SeqCst);
        (result, watch.join())
    });
    let work = load.end();
    let seen = seen.unwrap_or_else(|_| bail!("panicked"))?;
    note(&format!(
        "{} buffers, {} requests; during resets, a buffer had lost up to {} pages",
        seen.buffers.len(),
        seen.asked,
        seen.reset / PAGE
    ));
    let (totals, frames) = (honest.totals, honest.frame);
    note(&format!("{frames} frames; {totals:?}"));
    ensure!(seen.alarms.is_empty(), "false alarms: {:#?}", seen.alarms);
    result?;
    note(&format!("the outer kernel: {}", work?));
    ensure!(
        totals.screen_in_plugged > 0
            && totals.resets > 0
            && totals.reported_free > 0
            && totals.ballooned > 0
            && totals.unplugged > 0,
        "something did not happen: {totals:?}"
    );
    ensure!(
        seen.reset <= totals.screen_in_plugged as u64 * PAGE,
        "a reset discarded more of a screen than was in plugged memory"
    );
    honest.machine.quit()
}
