// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf run` stays where the program would be if it had been started without it. Others must not notice: who reads the
//! program's output, who sent a signal early, children that were there before.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, SigSet, Signal};
use nix::sys::stat::Mode;
use pinbuf_test_harness::tests;

use super::surroundings::ODD;
use super::{becomes, handled, kill_supervisor, run, supervisor_of, Running, PATIENCE};
use crate::process::{no_udmabuf, Start};

tests!("supervised":
    output_ends_when_the_program_closes_it,
    earlier_children_are_waited_for,
    signal_that_was_pending_before_is_passed_on,
    wait_for_the_reader_of_a_log_can_be_ended,
    too_few_descriptors_are_an_error,
    report_is_written_at_once,
    report_that_nobody_reads_ends_no_program,
);

fn output_ends_when_the_program_closes_it() -> Result<()> {
    let script = "exec >&-; read line; exit 4";
    let mut command = run(&["--by", "supervisor", "--", "busybox", "sh", "-c", script]).command();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("no output")?;
    let reader = thread::spawn(move || output.read_to_end(&mut Vec::new()));
    let result = becomes("nobody has the output open", || Ok(reader.is_finished()));
    let runs = child.try_wait()?.is_none();
    drop(child.stdin.take());
    ensure!(child.wait()?.code() == Some(4), "another status");
    result?;
    ensure!(runs, "the program ended before its output");
    Ok(())
}

/// Those of a shell that executes `pinbuf run` in its place, and what these leave behind.
fn earlier_children_are_waited_for() -> Result<()> {
    // One is killed by a real-time signal.
    let script = "sh -c 'kill -40 $$' & (sleep 4 & sleep 4 & sleep 3) &
                  exec pinbuf run --by supervisor -- busybox cat";
    let running = Running::start(&Start::program(&["busybox", "sh", "-c", script]))?;
    let front = running.pid()?;
    let result = becomes("the supervisor alone is left", || {
        let children = fs::read_to_string(format!("/proc/{front}/task/{front}/children"))?;
        let name = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let names: Vec<String> = children.split_whitespace().map(name).collect();
        Ok(names == ["pinbuf-superv\n"])
    });
    let end = running.end()?;
    result?;
    ensure!(end.status == Some(0), "{end:?}");
    Ok(())
}

/// A signal of the kernel's, such as those of a terminal. Without `pinbuf run`, it is pending when the program starts.
fn signal_that_was_pending_before_is_passed_on() -> Result<()> {
    const SET_SIGNAL: libc::c_int = 10;
    let is_pending = r"grep -q 'ShdPnd:.*2$' /proc/$$/status";
    let script = format!("for i in $(seq 100); do {is_pending} && exit 7; sleep 0.1; done");
    for by in ["preload", "supervisor"] {
        let mut command = run(&["--by", by, "--", "busybox", "sh", "-c", &script]).command();
        let (ours, theirs) = nix::unistd::pipe()?;
        let (reads, writes) = (ours.as_raw_fd(), theirs.as_raw_fd());
        let interrupt = move || -> std::io::Result<()> {
            SigSet::from(Signal::SIGINT).thread_block()?;
            for (what, value) in [
                (libc::F_SETOWN, nix::unistd::getpid().as_raw()),
                (SET_SIGNAL, libc::SIGINT),
                (libc::F_SETFL, libc::O_ASYNC),
            ] {
                // SAFETY: no memory is involved.
                Errno::result(unsafe { libc::fcntl(reads, what, value) })?;
            }
            // SAFETY: one byte is read.
            Errno::result(unsafe { libc::write(writes, b"!".as_ptr().cast(), 1) })?;
            Ok(())
        };
        // SAFETY: system calls.
        unsafe { command.pre_exec(interrupt) };
        let status = command.status()?;
        ensure!(status.code() == Some(7), "{by}: {status}");
    }
    Ok(())
}

fn wait_for_the_reader_of_a_log_can_be_ended() -> Result<()> {
    const FIFO: &str = "/tmp/log-without-a-reader";
    let _ = fs::remove_file(FIFO);
    nix::unistd::mkfifo(FIFO, Mode::from_bits_truncate(0o666))?;
    fs::set_permissions(FIFO, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let log = format!("--log={FIFO}");
    let running = Running::start(&run(&["--by", "supervisor", &log, "--", "true"]))?;
    let front = running.pid()?;
    // A call to open is on the kernel's stack.
    becomes("it waits for the reader", || {
        let stack = fs::read_to_string(format!("/proc/{front}/stack"))?;
        Ok(stack.contains("fifo_open") || supervisor_of(front).is_ok())
    })?;
    kill(front, Signal::SIGTERM)?;
    let ended = becomes("it ends", || {
        let stat = fs::read_to_string(format!("/proc/{front}/stat"))?;
        Ok(stat.contains(") Z "))
    });
    if ended.is_err() {
        // Lets it go on.
        drop(fs::File::options().read(true).write(true).open(FIFO)?);
    }
    let end = running.end()?;
    ended?;
    ensure!(end.status.is_none(), "{end:?}");
    fs::remove_file(FIFO)?;
    Ok(())
}

/// Of the supervisor's: the error is one that the kernel has for this as well.
fn too_few_descriptors_are_an_error() -> Result<()> {
    no_udmabuf()?;
    for user in ["root", "kvm"] {
        let words = ["--by", "supervisor", "--", ODD, "ask"];
        let start = match user {
            "root" => {
                let words: Vec<&str> = ["pinbuf", "run"].iter().chain(&words).copied().collect();
                Start::program(&words)
            }
            _ => run(&words),
        };
        let mut running = Running::start(&start)?;
        ensure!(running.line()? == "made made\n", "it did not start");
        let supervisor = supervisor_of(running.pid()?)?;
        let open = fs::read_dir(format!("/proc/{supervisor}/fd"))?;
        let open: Vec<u32> = open
            .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
            .collect::<Result<_>>()?;
        let mut seen = Vec::new();
        // With gaps, if there are any.
        for limit in 3..open.iter().max().context("none")? + 12 {
            let limit = format!("--nofile={limit}:65536");
            let words = ["prlimit", "--pid", &supervisor.to_string(), &limit];
            ensure!(Start::program(&words).end()?.status == Some(0), "prlimit");
            running.say("\n")?;
            let line = running.line()?;
            seen.push(line.trim_end().to_owned());
        }
        let end = running.end()?;
        let odd = seen.iter().find(|line| {
            // ENOMEM where the program's memfd cannot be taken.
            let mut words = line.split(' ');
            !words.all(|word| ["made", "EMFILE", "ENOMEM"].contains(&word))
        });
        ensure!(odd.is_none(), "{user}: {seen:?}, {end:?}");
        let ends = [seen.first(), seen.last()].map(|line| line.map(String::as_str));
        ensure!(
            ends == [Some("EMFILE EMFILE"), Some("made made")],
            "{user}: {seen:?}"
        );
        ensure!(!end.err.contains("given up rights"), "{user}: {end:?}");
    }
    Ok(())
}

/// Others may write there at the same time.
fn report_is_written_at_once() -> Result<()> {
    let (ours, theirs) = UnixDatagram::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    let mut command = run(&["--by", "supervisor", "--", "/etc/hostname"]).command();
    let status = command.stderr(OwnedFd::from(theirs)).status()?;
    drop(command);
    let mut text = [0; 1000];
    let len = ours.recv(&mut text)?;
    let text = String::from_utf8_lossy(&text[..len]);
    ensure!(
        status.code() == Some(126) && text.starts_with("pinbuf: ") && text.ends_with('\n'),
        "{status}: {text:?}"
    );
    Ok(())
}

/// SIGPIPE, which such a report raises, is not the program's.
fn report_that_nobody_reads_ends_no_program() -> Result<()> {
    let mut running = Running::start(&run(&["--by", "supervisor", "--", "busybox", "cat"]))?;
    running.say("started\n")?;
    running.line()?;
    drop(running.child.stderr.take());
    let front = running.pid()?;
    let supervisor = supervisor_of(front)?;
    kill_supervisor(&running)?;
    becomes("`pinbuf run` has seen its end", || {
        Ok(!fs::exists(format!("/proc/{supervisor}"))?)
    })?;
    handled(front)?;
    running.say("goes on\n")?;
    let line = running.line()?;
    let end = running.end()?;
    ensure!(
        line == "goes on\n" && end.status == Some(0),
        "{line:?}, {end:?}"
    );
    Ok(())
}
