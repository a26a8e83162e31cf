// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs under `pinbuf run` that are killed, and `pinbuf run` itself. With the shim, it executes the program in its own
//! process, so the signal arrives in either, or in the loader and the constructor of the shim between them. With the
//! supervisor these are three processes, and each of them is killed in turn.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::sys::signal::{kill, killpg, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::baseline::Baseline;
use super::victims::Scene;
use super::{intervals, may_fail, moment};
use crate::settings::Settings;
use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::support::{check, udmabuf, Buffer, Memory, Sync};

/// Starting a program takes as long as some of the other kills: one in this number.
const SHARE: usize = 20;
/// More than a start takes.
const START: Duration = Duration::from_millis(400);
/// What the program under the shim prints when it has made a buffer.
const AT_WORK: &[u8] = b"!";

/// What a program under the shim is called with.
const OPTION: &str = "--udmabuf-client";

/// Kills programs that use udmabuf's interface under the shim.
pub fn under_the_shim() -> Result<()> {
    under(one)
}

/// Kills programs that use udmabuf's interface under the supervisor, the supervisor, and `pinbuf run` above it.
pub fn under_the_supervisor() -> Result<()> {
    under(one_supervised)
}

/// Kills until there were as many as asked for. `one` starts a program, kills, and returns whether the program had
/// made a buffer.
fn under(one: fn(&mut Rng) -> Result<bool>) -> Result<()> {
    let Settings { kills, seed, .. } = Settings::get();
    let kills = (kills / SHARE).max(15);
    let (interval, count) = intervals(kills);
    let scene = Scene::new()?;
    let before = files()?;
    let mut baseline = Baseline::new(scene.accounts()?, interval)?;
    let mut rng = Rng::with_seed(seed);
    let (mut killed, mut at_work) = (0, 0);
    for number in 1..=count {
        let target = (number * interval).min(kills);
        while killed < target {
            at_work += usize::from(
                one(&mut rng).with_context(|| format!("after {killed} kills (--seed {seed})"))?,
            );
            killed += 1;
        }
        baseline
            .is_reached(number)
            .with_context(|| format!("after {killed} kills (--seed {seed})"))?;
    }
    baseline.is_kept()?;
    println!("# {killed} kills, {at_work} of them after the program had made a buffer");
    check!(at_work > 0, "no program lived until it had made a buffer");
    let left: Vec<_> = files()?.difference(&before).cloned().collect();
    check!(left.is_empty(), "files are left behind: {left:?}");
    drop(baseline);
    scene.end()
}

/// Starts a program and kills it. Returns whether it had made a buffer.
fn one(rng: &mut Rng) -> Result<bool> {
    let wait = rng.bool();
    let mut command = Command::new("pinbuf");
    let own = std::env::current_exe().context("this program's file")?;
    command.args(["run", "--"]).arg(own);
    command.args([OPTION, &rng.u64(..).to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    if rng.bool() {
        command.uid(USER).gid(USER);
    }
    let mut child = command.spawn().context("starting `pinbuf run`")?;
    let said = if wait { hear(&mut child)? } else { false };
    std::thread::sleep(if wait {
        moment(rng)
    } else {
        START.mul_f64(rng.f64() * rng.f64())
    });
    child.kill().context("kill")?;
    let mut rest = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_end(&mut rest)?;
    }
    let status = child.wait()?;
    check!(
        status.signal() == Some(libc::SIGKILL),
        "a program under the shim ended by itself: {status}"
    );
    Ok(said || rest == AT_WORK)
}

/// Starts a program under the supervisor, and kills one of the processes; then the others.
fn one_supervised(rng: &mut Rng) -> Result<bool> {
    let wait = rng.bool();
    let mut command = Command::new("pinbuf");
    let own = std::env::current_exe().context("this program's file")?;
    command.args(["run", "--by", "supervisor", "--"]).arg(own);
    command.args([OPTION, &rng.u64(..).to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // What the others say of the one that is killed.
    command.stderr(Stdio::null()).process_group(0);
    if rng.bool() {
        command.uid(USER).gid(USER);
    }
    let mut child = command.spawn().context("starting `pinbuf run`")?;
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let said = if wait { hear(&mut child)? } else { false };
    std::thread::sleep(if wait {
        moment(rng)
    } else {
        START.mul_f64(rng.f64() * rng.f64())
    });
    // `pinbuf run`, the supervisor or the program; the last of them that there is already.
    let mut victim = group;
    for _ in 0..rng.u32(0..3) {
        victim = child_of(victim).unwrap_or(victim);
    }
    kill(victim, Signal::SIGKILL).context("kill")?;
    std::thread::sleep(moment(rng));
    killpg(group, Signal::SIGKILL).context("killing what is left")?;
    let mut rest = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_end(&mut rest)?;
    }
    let status = child.wait()?;
    // The others became children of this process, as their parents ended.
    let others = Pid::from_raw(-group.as_raw());
    while !matches!(waitpid(others, None), Err(Errno::ECHILD)) {}
    // Where the supervisor was killed, the program may have ended by the error that it got.
    check!(
        status.signal() == Some(libc::SIGKILL) || victim != group,
        "a program under the supervisor ended by itself: {status}"
    );
    Ok(said || rest == AT_WORK)
}

/// The first child of a process.
fn child_of(process: Pid) -> Option<Pid> {
    let path = format!("/proc/{process}/task/{process}/children");
    let text = std::fs::read_to_string(path).ok()?;
    let number = text.split_whitespace().next()?.parse().ok()?;
    Some(Pid::from_raw(number))
}

/// Waits until the program has made a buffer.
fn hear(child: &mut Child) -> Result<bool> {
    let mut byte = [0];
    let output = child.stdout.as_mut().context("no output")?;
    if output.read(&mut byte)? == 0 {
        let status = child.wait()?;
        bail!("a program under the shim ended before it was killed: {status}");
    }
    Ok(byte == AT_WORK)
}

/// Files in places where a program could leave some.
fn files() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for directory in ["/dev/shm", "/tmp", "/run", "/var/tmp"] {
        for entry in std::fs::read_dir(directory)? {
            found.insert(entry?.path().display().to_string());
        }
    }
    Ok(found)
}

const PAGES: usize = 256;
const ITEMS: usize = 64;

/// A dma-buf, or `None` if the limit has no room for it.
fn made(buffer: nix::Result<OwnedFd>) -> Result<Option<Buffer>> {
    match buffer {
        Ok(fd) => Ok(Some(Buffer::from_fd(fd))),
        Err(error) if may_fail(error) => Ok(None),
        Err(error) => Err(error).context("udmabuf"),
    }
}

/// The program: makes, maps and closes buffers of memfds until it is killed.
pub fn client(seed: u64) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let file = udmabuf::sealed_memfd(PAGES * PAGE)?;
    // The shim uses the mapping of the program, if there is one.
    let _mapped = match rng.bool() {
        true => Some(Memory::shared(&file, PAGES * PAGE)?),
        false => None,
    };
    let memfd = u32::try_from(file.as_raw_fd())?;
    let mut at_work = false;
    loop {
        let buffer = if rng.bool() {
            udmabuf::Create::new(&file, 0, PAGES * PAGE).call(&device)
        } else {
            let item = |index: usize| udmabuf::Item {
                memfd,
                pad: 0,
                offset: ((ITEMS - 1 - index) * PAGE) as u64,
                size: PAGE as u64,
            };
            udmabuf::List::new((0..ITEMS).map(item)).call(&device)
        };
        let Some(buffer) = made(buffer)? else {
            continue;
        };
        let view = buffer.map_part(0, ITEMS * PAGE).context("mmap")?;
        buffer.synced(Sync::ReadWrite, || view.touch_to_write())?;
        if !at_work {
            at_work = true;
            std::io::stdout().write_all(AT_WORK)?;
            std::io::stdout().flush()?;
        }
    }
}
