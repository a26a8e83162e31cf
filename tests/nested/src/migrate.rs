// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest moves from one QEMU to another while its screen is a blob.
//!
//! With postcopy the guest continues in the target before its memory has arrived: QEMU registers the memory
//! with userfaultfd, loads the devices, virtio-gpu's blobs among them, and requests each page that is touched
//! from the source. A call that pins the screen's pages at that moment has to wait for them. The kernel's
//! udmabuf does not: it fills in zeroes, and QEMU fails when the page arrives.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::{json, Value};

use crate::evidence;
use crate::machine::{Backend, Machine, Setup, User};
use crate::scenarios::{
    huge_pages, last_message, note, on_udmabuf, permit, show_fragmented, start, timed,
};

/// How long any step of a migration may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// The time for steps that do not depend on memory that has yet to arrive.
const HANGS: Duration = Duration::from_secs(40);

/// The bandwidth before the switch: so low that the screen is not sent.
const SLOW: u64 = 1 << 20;

/// The bandwidth after the switch, besides requested pages: so low that the test is over before all memory has
/// arrived.
const CAPPED: u64 = 4 << 20;

/// No limit.
const FAST: u64 = 1 << 40;

/// Source and target of a migration.
struct Pair {
    source: Machine,
    target: Machine,
}

/// Measurements of the switch to the target.
struct Switch {
    /// From the stop of the source to the start of the target.
    downtime: Duration,
    /// How often the target was observed to wait for a page of a buffer.
    waits: usize,
}

impl Pair {
    /// Starts both, and lets the source's guest show something.
    fn start(setup: &Setup) -> Result<Self> {
        let mut source = start(setup)?;
        let version = source.qmp.execute("query-version", json!({}))?;
        note(&format!("QEMU {}", version["package"]));
        source.frames(1..3)?;
        let setup = Setup {
            name: format!("{}-target", setup.name),
            ..setup.clone()
        };
        let mut target = Machine::incoming(&setup)?;
        target.shows_what(&source);
        Ok(Self { source, target })
    }

    /// Starts the migration.
    fn begin(&mut self, postcopy: bool, before: u64, after: u64) -> Result<()> {
        self.set("postcopy-ram", postcopy)?;
        self.limit(before, after)?;
        let address = json!({"uri": self.address("migration")});
        self.target
            .qmp
            .execute("migrate-incoming", address.clone())?;
        self.source.qmp.execute("migrate", address)?;
        if postcopy {
            wait(&mut self.source, "active")?;
        }
        Ok(())
    }

    /// Switches a capability of QEMU's migration on or off, on both sides.
    fn set(&mut self, capability: &str, on: bool) -> Result<()> {
        let one = json!({"capability": capability, "state": on});
        let all = json!({"capabilities": [one]});
        for machine in [&mut self.source, &mut self.target] {
            let qmp = &mut machine.qmp;
            qmp.execute("migrate-set-capabilities", all.clone())?;
        }
        Ok(())
    }

    fn limit(&mut self, before: u64, after: u64) -> Result<()> {
        let limits = json!({"max-bandwidth": before, "max-postcopy-bandwidth": after});
        self.source.qmp.execute("migrate-set-parameters", limits)?;
        Ok(())
    }

    fn address(&self, name: &str) -> String {
        format!("unix:{}", self.target.path(name).display())
    }

    /// Switches to the target with the memory that has arrived so far.
    fn switch(&mut self) -> Result<Switch> {
        let qmp = &mut self.source.qmp;
        qmp.execute("migrate-start-postcopy", json!({}))?;
        let process = self.target.process();
        let done = AtomicBool::new(false);
        let (stop, resume, waits) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut waits = 0;
                while !done.load(Ordering::Relaxed) {
                    waits += usize::from(waits_in_create(process).unwrap_or(false));
                    std::thread::sleep(Duration::from_millis(20));
                }
                waits
            });
            let stop = self.source.qmp.event("STOP", PATIENCE);
            let resume = self.target.qmp.event("RESUME", PATIENCE);
            done.store(true, Ordering::Relaxed);
            let waits = watch.join().unwrap_or(0);
            anyhow::Ok((
                moment(&stop?)?,
                moment(&resume.context("the target does not start")?)?,
                waits,
            ))
        })?;
        let downtime = resume.saturating_sub(stop);
        note(&format!(
            "from the source's stop to the target's start: {:.2} s; it was seen {waits} times waiting for a page of a \
             buffer",
            downtime.as_secs_f64()
        ));
        Ok(Switch { downtime, waits })
    }

    /// Waits until all of the guest has arrived.
    fn complete(&mut self) -> Result<()> {
        timed("what was left of the migration", || {
            wait(&mut self.source, "completed")
        })?;
        let all = migration(&mut self.source)?;
        note(&format!(
            "query-migrate: total {} ms, downtime {} ms, {} bytes of memory, {} postcopy requests",
            all["total-time"],
            all["downtime"],
            all["ram"]["transferred"],
            all["ram"]["postcopy-requests"],
        ));
        Ok(())
    }

    /// Ends both.
    fn quit(self) -> Result<()> {
        self.source.quit()?;
        self.target.quit()
    }
}

/// The time of an event of QEMU.
fn moment(event: &Value) -> Result<Duration> {
    let part = |name: &str| {
        let value = event["timestamp"][name].as_u64();
        value.context("an event without a time")
    };
    Ok(Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
}

fn migration(machine: &mut Machine) -> Result<Value> {
    machine.qmp.execute("query-migrate", json!({}))
}

fn status(machine: &mut Machine) -> Result<String> {
    let all = migration(machine)?;
    Ok(all["status"].as_str().unwrap_or("none").to_owned())
}

/// Waits for a state of the migration.
fn wait(machine: &mut Machine, wanted: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let now = status(machine)?;
        if now == wanted {
            return Ok(());
        }
        ensure!(
            !["failed", "cancelled"].contains(&now.as_str()) && start.elapsed() < PATIENCE,
            "the migration is {now}, not {wanted}; QEMU's output: {}",
            last_message(machine)?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a thread of a process waits for a userfault in a call of pinbuf's.
fn waits_in_create(process: u32) -> Result<bool> {
    let stacks = evidence::kernel_stacks(process)?;
    Ok(stacks
        .iter()
        .any(|stack| stack.contains("handle_userfault") && stack.contains("[pinbuf]")))
}

/// A migration without postcopy: all memory has arrived when the target starts.
fn precopy_of(setup: &Setup) -> Result<Pair> {
    let mut pair = Pair::start(setup)?;
    pair.begin(false, FAST, FAST)?;
    pair.complete()?;
    pair.target.qmp.event("RESUME", PATIENCE)?;
    Ok(pair)
}

/// The last frame of the source, and further ones.
fn check_target(pair: &mut Pair, last: u32, frames: std::ops::Range<u32>) -> Result<()> {
    let expected = pair.target.screen()?.pattern(last);
    let picture = pair.target.picture()?;
    picture
        .compare(expected)
        .context("the source's last frame, in the target")?;
    pair.target.guest_finds(last)?;
    for frame in frames {
        pair.target.frames(frame..frame + 1)?;
        pair.target.guest_finds(frame)?;
    }
    Ok(())
}

pub fn precopy() -> Result<()> {
    let mut pair = precopy_of(&Setup::new("precopy"))?;
    check_target(&mut pair, 2, 3..6)?;
    pair.target.buffers()?;
    pair.quit()
}

/// Begins a migration, draws a frame that only the source has, and switches.
fn switched(setup: &Setup, after: u64) -> Result<(Pair, Switch)> {
    let mut pair = Pair::start(setup)?;
    pair.begin(true, SLOW, after)?;
    // This outdates whatever has been sent of the screen.
    pair.source.frames(3..4)?;
    let sent = migration(&mut pair.source)?["ram"]["transferred"].clone();
    note(&format!(
        "{sent} bytes of memory were sent before the switch"
    ));
    let switch = pair.switch()?;
    Ok((pair, switch))
}

/// Postcopy, with every pixel compared before, during and after.
fn postcopy_of(setup: &Setup) -> Result<()> {
    let (mut pair, switch) = switched(setup, CAPPED)?;
    ensure!(
        switch.waits > 0,
        "no page of the screen was late: this proves nothing"
    );
    check_target(&mut pair, 3, 4..7)?;
    let now = status(&mut pair.source)?;
    ensure!(
        now == "postcopy-active",
        "{now} already: nothing was compared during the migration"
    );
    pair.target.buffers()?;
    pair.limit(FAST, FAST)?;
    pair.complete()?;
    check_target(&mut pair, 6, 7..10)?;
    pair.target.buffers()?;
    pair.quit()
}

pub fn postcopy_plain() -> Result<()> {
    postcopy_of(&Setup::new("postcopy"))
}

fn huge_setup(setup: Setup) -> Result<Setup> {
    let setup = Setup {
        backend: Backend::Huge,
        ..setup
    };
    huge_pages(2 * setup.memory)?;
    Ok(setup)
}

pub fn postcopy_huge() -> Result<()> {
    postcopy_of(&huge_setup(Setup::new("postcopy-huge"))?)?;
    huge_pages(0)
}

/// Continues a migration whose connection broke.
fn recover(pair: &mut Pair) -> Result<()> {
    wait(&mut pair.source, "postcopy-paused")?;
    let address = pair.address("recovery");
    let qmp = &mut pair.target.qmp;
    // The target notices later than the source that the connection broke.
    let start = Instant::now();
    while let Err(error) = qmp.execute_out_of_band("migrate-recover", json!({"uri": address})) {
        let patience = start.elapsed() < PATIENCE;
        ensure!(patience, "migrate-recover: {error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let resume = json!({"uri": address, "resume": true});
    pair.source.qmp.execute("migrate", resume)?;
    wait(&mut pair.source, "postcopy-active")
}

/// The connection breaks after the target has started.
pub fn postcopy_paused() -> Result<()> {
    let (mut pair, _) = switched(&Setup::new("postcopy-paused"), CAPPED)?;
    let qmp = &mut pair.source.qmp;
    qmp.execute_out_of_band("migrate-pause", json!({}))?;
    recover(&mut pair)?;
    check_target(&mut pair, 3, 4..6)?;
    pair.limit(FAST, FAST)?;
    pair.complete()?;
    check_target(&mut pair, 5, 6..8)?;
    pair.target.buffers()?;
    pair.quit()
}

/// The connection breaks while the target's main thread waits for the screen's pages. What happens to the guest
/// depends on QEMU: version 10 cannot recover while devices are loaded. The target must not hang in the wait, nor leave
/// a page pinned.
pub fn postcopy_broken_in_create() -> Result<()> {
    let mut pair = Pair::start(&Setup::new("postcopy-broken-in-create"))?;
    pair.begin(true, SLOW, CAPPED)?;
    pair.source.frames(3..4)?;
    let (process, source) = (pair.target.process(), pair.source.process());
    let source = Pid::from_raw(i32::try_from(source)?);
    let qmp = &mut pair.source.qmp;
    qmp.execute("migrate-start-postcopy", json!({}))?;
    let start = Instant::now();
    while !waits_in_create(process)? {
        ensure!(start.elapsed() < PATIENCE, "no create waits for a page");
    }
    // No page arrives any more, so the wait cannot end.
    kill(source, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(2));
    let waits = waits_in_create(process);
    let qmp = &mut pair.target.qmp;
    // QEMU 11 has a state for this (`postcopy-device`), in which a migration cannot be paused: the connection is closed.
    let broken = match qmp.execute_out_of_band("migrate-pause", json!({})) {
        Err(error) if format!("{error:#}").contains("only supported during") => {
            let all = json!({"instances": [{"type": "migration"}]});
            qmp.execute_out_of_band("yank", all)
        }
        result => result,
    };
    kill(source, Signal::SIGCONT)?;
    broken?;
    ensure!(waits?, "the create ended too early: this proves nothing");
    let start = Instant::now();
    loop {
        if let Some(status) = pair.target.ended()? {
            let said = evidence::tail(&pair.target.path("messages"));
            note(&format!(
                "the target ended with {status}; its output:\n{said}"
            ));
            return check_source(&mut pair.source);
        }
        let source = status(&mut pair.source)?;
        if source == "failed" && start.elapsed() > HANGS {
            // QEMU 11: the guest has never left the source. The target waits until it is ended.
            note("the target still waits");
            return check_source(&mut pair.source);
        }
        if source == "postcopy-paused" && start.elapsed() > HANGS {
            break;
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "the target neither ends nor pauses; the source: {}",
            status_and_run_state(&mut pair.source)?
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    recover(&mut pair)?;
    pair.target.qmp.event("RESUME", PATIENCE)?;
    check_target(&mut pair, 3, 4..6)?;
    pair.limit(FAST, FAST)?;
    pair.complete()?;
    check_target(&mut pair, 5, 6..8)?;
    pair.target.buffers()?;
    pair.quit()
}

/// The state of the source after the target has ended.
fn check_source(source: &mut Machine) -> Result<()> {
    let start = Instant::now();
    let running = loop {
        let state = source.qmp.execute("query-status", json!({}))?;
        if state["status"] == "running" || start.elapsed() > HANGS / 2 {
            break state["status"] == "running";
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    note(&format!("the source: {}", status_and_run_state(source)?));
    if running {
        source.frames(4..6)?;
        source.guest_finds(5)?;
        note("the guest continues in the source, every pixel right");
    }
    Ok(())
}

/// The states of a machine's migration and of its guest.
fn status_and_run_state(machine: &mut Machine) -> Result<String> {
    let state = machine.qmp.execute("query-status", json!({}))?;
    Ok(format!("{}, {}", status(machine)?, state["status"]))
}

/// An ordinary user with Debian's limit, who gets userfaultfd in one of two ways.
pub fn postcopy_user() -> Result<()> {
    const UID: u32 = 1002;
    const DEVICE: &str = "/dev/userfaultfd";
    const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
    permit(None, UID)?;
    let user = |name: &str| Setup {
        user: Some(User {
            uid: UID,
            memlock: 8 << 20,
        }),
        ..Setup::new(name)
    };
    std::os::unix::fs::chown(DEVICE, Some(UID), None).context(DEVICE)?;
    let with_device = postcopy_of(&user("postcopy-user-device"));
    std::os::unix::fs::chown(DEVICE, Some(0), None)?;
    with_device.context("by /dev/userfaultfd")?;
    std::fs::write(SYSCTL, "1").context(SYSCTL)?;
    let with_sysctl = postcopy_of(&user("postcopy-user-sysctl"));
    std::fs::write(SYSCTL, "0")?;
    with_sysctl.context("by vm.unprivileged_userfaultfd")?;
    permit(None, 0)
}

/// Migrates a guest by postcopy with this bandwidth after the switch, checks every pixel before and after, and returns
/// how long the guest stood.
fn stands(setup: &Setup, fragmented: bool, preempt: bool, after: u64) -> Result<Duration> {
    let mut pair = Pair::start(setup)?;
    if fragmented {
        show_fragmented(&mut pair.source, setup)?;
    }
    // QEMU accepts this only after the capability that it extends.
    pair.set("postcopy-ram", true)?;
    pair.set("postcopy-preempt", preempt)?;
    pair.begin(true, SLOW, after)?;
    pair.source.frames(3..4)?;
    let switch = pair.switch()?;
    let pieces = if setup.blob {
        pair.source.items()?
    } else {
        Vec::new()
    };
    let limit = match after {
        FAST => "no limit".to_owned(),
        _ => format!("{} MiB/s", after >> 20),
    };
    note(&format!(
        "downtime, {limit}, blob={} {pieces:?}, postcopy-preempt={preempt}: {:.2} s",
        setup.blob,
        switch.downtime.as_secs_f64()
    ));
    check_target(&mut pair, 3, 4..5)?;
    pair.limit(FAST, FAST)?;
    pair.complete()?;
    check_target(&mut pair, 4, 5..6)?;
    pair.quit()?;
    Ok(switch.downtime)
}

/// The cost of waiting, compared with a screen that is a copy of the guest's memory.
fn downtime(fragmented: bool, limits: &[u64]) -> Result<()> {
    /// Beside twice the copy's, what a machine with other work may add.
    const LOAD: Duration = Duration::from_secs(2);
    let screen = Setup::new("downtime");
    let copy = Setup {
        blob: false,
        ..screen.clone()
    };
    for &after in limits {
        let of_copy = stands(&copy, fragmented, false, after)?;
        let downtime = stands(&screen, fragmented, false, after)?;
        // All of the screen has to come before the target starts, and no faster than the limit.
        let (width, height) = screen.screen;
        let bytes = 4.0 * f64::from(width) * f64::from(height);
        let transfer = Duration::from_secs_f64(bytes / after as f64);
        ensure!(
            downtime <= 2 * of_copy + transfer + LOAD,
            "the guest stood for {downtime:?}, with a copy of the screen for {of_copy:?}"
        );
    }
    Ok(())
}

pub fn downtime_few_pieces() -> Result<()> {
    downtime(false, &[FAST, CAPPED])
}

/// Each page of the screen is a piece.
pub fn downtime_many_pieces() -> Result<()> {
    downtime(true, &[FAST])
}

/// With a separate connection for requested pages, which makes each page a round trip: the downtime is printed, not
/// judged.
pub fn preempt_few_pieces() -> Result<()> {
    for after in [FAST, CAPPED] {
        stands(&Setup::new("preempt"), false, true, after)?;
    }
    Ok(())
}

pub fn preempt_many_pieces() -> Result<()> {
    stands(&Setup::new("preempt"), true, true, FAST)?;
    Ok(())
}

/// The comparison for what is seen with it: QEMU reads no memory of the guest before it arrives.
pub fn preempt_of_a_copy() -> Result<()> {
    let setup = Setup {
        blob: false,
        ..Setup::new("preempt-copy")
    };
    stands(&setup, true, true, FAST)?;
    Ok(())
}

pub fn udmabuf_precopy() -> Result<()> {
    let mut pair = precopy_of(&on_udmabuf("udmabuf-precopy")?)?;
    check_target(&mut pair, 2, 3..5)?;
    pair.quit()
}

/// The comparison: fails unless the guest is lost.
fn lost_on_udmabuf(setup: &Setup) -> Result<()> {
    let mut pair = Pair::start(setup)?;
    pair.begin(true, SLOW, CAPPED)?;
    pair.source.frames(3..4)?;
    let qmp = &mut pair.source.qmp;
    qmp.execute("migrate-start-postcopy", json!({}))?;
    let begin = Instant::now();
    let lost = loop {
        if let Some(status) = pair.target.ended()? {
            break format!("the target ended with {status}");
        }
        if begin.elapsed() > HANGS {
            pair.target.qmp.set_patience(HANGS)?;
            match check_target(&mut pair, 3, 4..5) {
                Ok(()) => {
                    bail!("the guest continues in the target: this is no comparison any more")
                }
                Err(error) => break format!("the target runs, but: {error:#}"),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    note(&lost);
    let said = evidence::tail(&pair.target.path("messages"));
    note(&format!("it said:\n{said}"));
    ensure!(
        said.contains("errno=17"),
        "the target failed for another reason than a page that is present already (EEXIST)"
    );
    if let Ok(stack) = evidence::kernel_stack(pair.target.process()) {
        note(&format!("its main thread is in:\n{}", stack.trim_end()));
    }
    note(&format!("the source: {}", status(&mut pair.source)?));
    Ok(())
}

pub fn udmabuf_postcopy_plain() -> Result<()> {
    lost_on_udmabuf(&on_udmabuf("udmabuf-postcopy")?)
}

pub fn udmabuf_postcopy_huge() -> Result<()> {
    lost_on_udmabuf(&huge_setup(on_udmabuf("udmabuf-postcopy-huge")?)?)?;
    huge_pages(0)
}
