// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs that the shim cannot be loaded into, or that make their own system calls: `pinbuf run` serves them by its
//! supervisor.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::mount::{mount, umount, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use pinbuf_test_harness::accounts::Accounts;
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::tests;

use crate::process::{no_udmabuf, End, Start};
use crate::udev;

pub mod front;
pub mod surroundings;
pub mod users;

tests!("supervised":
    client_on_rustix_is_served,
    client_of_libc_is_served,
    static_client_is_served,
    client_of_32_bits_is_served,
    client_of_musl_is_served,
    client_in_go_is_served,
    programs_of_all_kinds_in_one_tree_are_served,
    way_and_reason_are_printed,
    lines_are_logged,
    last_request_is_logged,
    ancestors_may_look_into_a_process_under_yama,
    signals_are_passed_on,
    end_by_a_signal_is_passed_back,
    stop_and_continue_are_mirrored,
    kill_of_a_stopped_program_ends_the_command,
    stop_right_after_continue_is_passed_on,
    continue_right_after_stop_is_passed_on,
    failing_exec_is_reported,
    nested_runs_are_served_by_the_first,
    what_stays_behind_is_served,
    calls_fail_once_the_supervisor_is_killed,
    a_link_spares_the_reports_of_calls_that_open,
    buffers_are_charged_to_the_program_s_user,
    doctor_recognises_the_supervisor,
    user_that_root_becomes_is_not_served,
    device_that_a_user_may_not_open_is_refused,
    privileges_of_another_namespace_do_not_count,
    device_is_no_directory,
    ends_where_the_end_of_children_is_ignored,
    refuses_a_proc_of_another_namespace,
);

const RUSTIX: &str = "pinbuf-raw-client";
const CLIENT: &str = "pinbuf-udmabuf-client";
const MADE: &str = "33177600 bytes by pinbuf\n";
const PATIENCE: Duration = Duration::from_secs(30);

/// `pinbuf run`, with options and a command.
fn run(words: &[&str]) -> Start {
    let words: Vec<&str> = ["pinbuf", "run"].iter().chain(words).copied().collect();
    Start::program(&words).by_kvm_user()
}

fn made(end: &End) -> Result<()> {
    no_udmabuf()?;
    ensure!(end.status == Some(0) && end.out == MADE, "{end:?}");
    Ok(())
}

fn client_on_rustix_is_served() -> Result<()> {
    made(&run(&["--", RUSTIX]).end()?)?;
    made(&run(&["--by", "supervisor", "--", RUSTIX]).end()?)
}

/// Of each kind that `pinbuf run` has to recognise by itself.
fn served_by_default(program: &str, reason: &str) -> Result<()> {
    let end = run(&["-v", "--", program]).end()?;
    let line = format!("{program} is served by the supervisor: {reason}");
    ensure!(end.err.contains(&line), "{end:?}");
    made(&end)
}

fn static_client_is_served() -> Result<()> {
    served_by_default("pinbuf-c-client-static", "it is statically linked")
}

fn client_of_32_bits_is_served() -> Result<()> {
    served_by_default("pinbuf-c-client-32", "it is a 32-bit program")
}

fn client_of_musl_is_served() -> Result<()> {
    served_by_default("pinbuf-c-client-musl", "it is linked with musl")
}

/// Three threads of it ask at the same time, and its runtime interrupts them by signals.
fn client_in_go_is_served() -> Result<()> {
    served_by_default("pinbuf-go-client", "it is written in Go")
}

/// Its calls reach the kernel, as the shim is not there.
fn client_of_libc_is_served() -> Result<()> {
    made(&run(&["--by", "supervisor", "--", CLIENT]).end()?)
}

/// A static shell, of which others are children and grandchildren, started by `exec` and `fork`, one after the other and at
/// the same time.
fn programs_of_all_kinds_in_one_tree_are_served() -> Result<()> {
    let script = format!(
        "{RUSTIX}; ({CLIENT}); env -u LD_PRELOAD {CLIENT}; sh -c 'exec {RUSTIX}'; \
         for i in 1 2 3; do {RUSTIX} & done; wait; exec {CLIENT}"
    );
    for by in ["supervisor", "both"] {
        let end = run(&["--by", by, "--", "busybox", "sh", "-c", &script]).end()?;
        ensure!(
            end.status == Some(0) && end.out == MADE.repeat(8),
            "{by}: {end:?}"
        );
    }
    Ok(())
}

fn way_and_reason_are_printed() -> Result<()> {
    for (options, program, line) in [
        (
            &["-v"][..],
            "true",
            "true is served by the preloaded shim: it is dynamically",
        ),
        (
            &["-v"],
            "busybox",
            "busybox is served by the supervisor: it is statically linked",
        ),
        (
            &["-v", "--by", "both"],
            "true",
            "true is served by the preloaded shim and the supervisor: as asked for",
        ),
        (&[], "busybox", ""),
    ] {
        let words: Vec<&str> = options
            .iter()
            .copied()
            .chain(["--", program, "true"])
            .collect();
        let end = run(&words).end()?;
        let one = if line.is_empty() { 0 } else { 1 };
        ensure!(
            end.status == Some(0) && end.err.lines().count() == one && end.err.contains(line),
            "{end:?}"
        );
    }
    Ok(())
}

fn lines_are_logged() -> Result<()> {
    for (case, line) in [
        ("extent/one-page", "pinbuf: created fd "),
        ("extent/size-1", "pinbuf: failed with errno 22: "),
        ("kind/closed", "pinbuf: failed with errno 77: "),
        ("pointer/single-null", "pinbuf: failed with errno 14: "),
    ] {
        let words = [
            "--by",
            "supervisor",
            "--log",
            "--",
            "udmabuf-conformance",
            "--only",
            case,
        ];
        let end = run(&words).end()?;
        ensure!(
            end.status == Some(0)
                && end.err.contains("/dev/udmabuf opened as /dev/pinbuf")
                && end.err.contains(line),
            "{case}: {end:?}"
        );
    }
    Ok(())
}

/// The supervisor ends with the program, and has written what it did before that.
fn last_request_is_logged() -> Result<()> {
    for _ in 0..6 {
        let words = [
            "--by",
            "supervisor",
            "--log",
            "--",
            surroundings::ODD,
            "last",
        ];
        let end = run(&words).end()?;
        ensure!(
            end.status == Some(0) && end.err.contains("pinbuf: created fd "),
            "{end:?}"
        );
    }
    Ok(())
}

/// Yama, where it is in the kernel, lets a user's process look into its descendants alone.
fn ancestors_may_look_into_a_process_under_yama() -> Result<()> {
    const SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";
    let before = fs::read_to_string(SCOPE).context("the kernel has no Yama")?;
    fs::write(SCOPE, "1")?;
    // The last one is an orphan.
    let script = format!("{RUSTIX}; ({RUSTIX} & exec true); sleep 3");
    let end = run(&["--by", "supervisor", "--", "busybox", "sh", "-c", &script]).end();
    fs::write(SCOPE, before.trim())?;
    let end = end?;
    ensure!(
        end.status == Some(0) && end.out == MADE.repeat(2),
        "{end:?}"
    );
    Ok(())
}

/// A program that runs, whose lines are read as they come.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn start(start: &Start) -> Result<Self> {
        Self::of(&mut start.command())
    }

    fn of(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, lines })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line)
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no input")?;
        Ok(input.write_all(text.as_bytes())?)
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    fn end(mut self) -> Result<End> {
        drop(self.child.stdin.take());
        let mut out = String::new();
        std::io::Read::read_to_string(&mut self.lines, &mut out)?;
        let mut end = End::from(self.child.wait_with_output()?);
        end.out = out;
        Ok(end)
    }
}

/// The supervisor below a `pinbuf run`.
fn supervisor_of(pid: Pid) -> Result<Pid> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let child = text.split_whitespace().next().context("it has no child")?;
    Ok(Pid::from_raw(child.parse()?))
}

/// Waits until `pinbuf run` has passed on what it was sent: a SIGCONT that comes later would undo the next stop.
fn handled(front: Pid) -> Result<()> {
    becomes("`pinbuf run` has no signal to pass on", || {
        let status = fs::read_to_string(format!("/proc/{front}/status"))?;
        let pending = status
            .lines()
            .find_map(|line| line.strip_prefix("ShdPnd:"))
            .context("no ShdPnd")?;
        Ok(u64::from_str_radix(pending.trim(), 16)? == 0 && state(front)? == 'S')
    })
}

/// Kills the supervisor of a program that runs, once it answers calls and has reported the program's start, which the
/// program's first line may precede: it has a thread that answers, and sleeps.
fn kill_supervisor(running: &Running) -> Result<()> {
    let supervisor = supervisor_of(running.pid()?)?;
    becomes("the supervisor answers calls", || {
        let threads = fs::read_dir(format!("/proc/{supervisor}/task"))?.count();
        Ok(threads > 1 && state(supervisor)? == 'S')
    })?;
    Ok(kill(supervisor, Signal::SIGKILL)?)
}

fn becomes(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_so()? {
        ensure!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn state(pid: Pid) -> Result<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = text.rsplit_once(") ").context("stat")?;
    rest.chars().next().context("stat")
}

fn signals_are_passed_on() -> Result<()> {
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; echo $$; \
                  while :; do sleep 0.1; done";
    let mut running = Running::start(&run(&[
        "--by",
        "supervisor",
        "--",
        "busybox",
        "sh",
        "-c",
        script,
    ]))?;
    running.line()?;
    kill(running.pid()?, Signal::SIGUSR1)?;
    ensure!(running.line()? == "usr1\n", "SIGUSR1 did not arrive");
    kill(running.pid()?, Signal::SIGTERM)?;
    let end = running.end()?;
    ensure!(end.status == Some(9) && end.out == "term\n", "{end:?}");
    Ok(())
}

fn end_by_a_signal_is_passed_back() -> Result<()> {
    use std::os::unix::process::ExitStatusExt;

    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGSEGV, libc::SIGINT] {
        let script = format!("kill -{signal} $$");
        let status = run(&["--by", "supervisor", "--", "busybox", "sh", "-c", &script])
            .command()
            .status()?;
        ensure!(status.signal() == Some(signal), "{signal}: {status}");
    }
    Ok(())
}

fn stop_and_continue_are_mirrored() -> Result<()> {
    let script = "echo $$; read line; echo $line";
    let mut running = Running::start(&run(&[
        "--by",
        "supervisor",
        "--",
        "busybox",
        "sh",
        "-c",
        script,
    ]))?;
    let program = Pid::from_raw(running.line()?.trim().parse()?);
    let front = running.pid()?;
    kill(program, Signal::SIGSTOP)?;
    becomes("`pinbuf run` stops", || Ok(state(front)? == 'T'))?;
    kill(front, Signal::SIGCONT)?;
    becomes("the program continues", || Ok(state(program)? != 'T'))?;
    // Asked to by `kill`, the program stops, and so do we.
    kill(front, Signal::SIGTSTP)?;
    becomes("both stop", || {
        Ok(state(program)? == 'T' && state(front)? == 'T')
    })?;
    // The program alone is continued.
    kill(program, Signal::SIGCONT)?;
    becomes("both continue", || {
        Ok(state(program)? != 'T' && state(front)? != 'T')
    })?;
    let end = running.end()?;
    ensure!(end.out == "\n", "{end:?}");
    Ok(())
}

/// `pinbuf run` has stopped with the program, and nobody else continues it.
fn kill_of_a_stopped_program_ends_the_command() -> Result<()> {
    use std::os::unix::process::ExitStatusExt;

    let words = [
        "--by",
        "supervisor",
        "--",
        "busybox",
        "sh",
        "-c",
        "echo $$; read line",
    ];
    let mut running = Running::start(&run(&words))?;
    let program = Pid::from_raw(running.line()?.trim().parse()?);
    let front = running.pid()?;
    kill(program, Signal::SIGSTOP)?;
    becomes("both stop", || {
        Ok(state(program)? == 'T' && state(front)? == 'T')
    })?;
    kill(program, Signal::SIGKILL)?;
    let ended = becomes("`pinbuf run` ends", || Ok(state(front)? == 'Z'));
    kill(front, Signal::SIGCONT)?;
    let status = running.child.wait()?;
    ended?;
    ensure!(status.signal() == Some(libc::SIGKILL), "{status}");
    Ok(())
}

/// A signal that stops `pinbuf run` may come while the supervisor still reports that the program goes on.
fn stop_right_after_continue_is_passed_on() -> Result<()> {
    let script = "echo $$; read line";
    let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
    let mut running = Running::start(&run(&words))?;
    let program = Pid::from_raw(running.line()?.trim().parse()?);
    let front = running.pid()?;
    let both = |stopped: bool| -> Result<bool> {
        Ok((state(program)? == 'T') == stopped && (state(front)? == 'T') == stopped)
    };
    for round in 0..30 {
        kill(program, Signal::SIGSTOP)?;
        becomes("both stop at first", || both(true))?;
        kill(front, Signal::SIGCONT)?;
        // Without a pause.
        let start = Instant::now();
        while state(program)? == 'T' {
            ensure!(start.elapsed() < PATIENCE, "the program does not continue");
        }
        kill(front, Signal::SIGTSTP)?;
        becomes("both stop", || both(true)).with_context(|| format!("round {round}"))?;
        kill(front, Signal::SIGCONT)?;
        becomes("both continue", || both(false))?;
        handled(front)?;
    }
    running.end()?;
    Ok(())
}

/// The program may be continued before `pinbuf run` has read that it stopped.
fn continue_right_after_stop_is_passed_on() -> Result<()> {
    let script = "echo $$; read line";
    let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
    let mut running = Running::start(&run(&words))?;
    let program = Pid::from_raw(running.line()?.trim().parse()?);
    let front = running.pid()?;
    for round in 0..50 {
        kill(program, Signal::SIGSTOP)?;
        let start = Instant::now();
        while state(program)? != 'T' {
            ensure!(start.elapsed() < PATIENCE, "the program does not stop");
        }
        // From at once to after `pinbuf run` has stopped.
        std::thread::sleep(Duration::from_micros(200 * round));
        kill(program, Signal::SIGCONT)?;
        std::thread::sleep(Duration::from_millis(50));
        becomes("both continue", || {
            Ok(state(program)? != 'T' && state(front)? != 'T')
        })
        .with_context(|| format!("round {round}"))?;
        handled(front)?;
    }
    running.end()?;
    Ok(())
}

/// What can be found and not be executed.
fn failing_exec_is_reported() -> Result<()> {
    let (directory, none) = ("/mnt", None::<&str>);
    mount(
        Some("tmpfs"),
        directory,
        Some("tmpfs"),
        MsFlags::MS_NOEXEC,
        none,
    )?;
    fs::copy("/usr/bin/busybox", "/mnt/busybox")?;
    let end = run(&["--by", "supervisor", "--", "/mnt/busybox", "true"]).end();
    umount(directory)?;
    let end = end?;
    ensure!(
        end.status == Some(126) && end.err.contains("/mnt/busybox: Permission denied"),
        "{end:?}"
    );
    Ok(())
}

fn nested_runs_are_served_by_the_first() -> Result<()> {
    for by in ["supervisor", "both", "preload"] {
        let inner = ["pinbuf", "run", "--by", by, "--", RUSTIX];
        let words: Vec<&str> = ["--by", "supervisor", "--"]
            .iter()
            .copied()
            .chain(inner)
            .collect();
        made(&run(&words).end()?)?;
    }
    Ok(())
}

/// What the program leaves running is served when `pinbuf run` has ended, and the supervisor ends with it.
fn what_stays_behind_is_served() -> Result<()> {
    let file = "/tmp/left-behind";
    let _ = fs::remove_file(file);
    let script = format!(
        "(sleep 2; {RUSTIX} >{file}.new 2>&1; mv {file}.new {file}) >/dev/null 2>&1 & exit 5"
    );
    let started = Instant::now();
    let end = run(&["--by", "supervisor", "--", "busybox", "sh", "-c", &script]).end()?;
    ensure!(end.status == Some(5), "{end:?}");
    ensure!(
        started.elapsed() < Duration::from_secs(2) || !fs::exists(file)?,
        "it waited for what was left"
    );
    becomes("the program left behind ends", || Ok(fs::exists(file)?))?;
    let text = fs::read_to_string(file)?;
    fs::remove_file(file)?;
    ensure!(text == MADE, "{text}");
    // It may stay as a zombie of whoever started this.
    becomes("the supervisor ends", || {
        let end = Start::program(&["pgrep", "-x", "-r", "D,R,S", "pinbuf-superv"]).end()?;
        Ok(end.out.is_empty())
    })
}

fn calls_fail_once_the_supervisor_is_killed() -> Result<()> {
    // There is no /dev/udmabuf, so nothing can be opened either: no library, for example.
    let script = "echo; read line; pinbuf-c-client-static 2>&1; exit 3";
    let mut running = Running::start(&run(&[
        "--by",
        "supervisor",
        "--",
        "busybox",
        "sh",
        "-c",
        script,
    ]))?;
    running.line()?;
    kill_supervisor(&running)?;
    let end = running.end()?;
    ensure!(
        end.status == Some(3)
            && end.out == "opening /dev/udmabuf: Function not implemented\n"
            && end.err.contains("the supervisor has ended"),
        "{end:?}"
    );
    Ok(())
}

/// With the link that udev's rule has a line for, programs of all kinds are served as without it. That no call that opens
/// is reported shows where the supervisor is killed: such calls succeed, and the request alone fails.
fn a_link_spares_the_reports_of_calls_that_open() -> Result<()> {
    no_udmabuf()?;
    udev::link(true)?;
    let result = (|| {
        for (by, program) in [
            ("supervisor", "pinbuf-c-client-static"),
            ("supervisor", "pinbuf-go-client"),
            ("supervisor", RUSTIX),
            ("preload", CLIENT),
            ("both", CLIENT),
        ] {
            let end = run(&["--by", by, "--", program]).end()?;
            ensure!(
                end.status == Some(0) && end.out == MADE,
                "{by} {program}: {end:?}"
            );
        }
        let script = "echo; read line; pinbuf-c-client-static 2>&1; exit 3";
        let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
        let mut running = Running::start(&run(&words))?;
        running.line()?;
        kill_supervisor(&running)?;
        let end = running.end()?;
        ensure!(
            end.status == Some(3) && end.out == "UDMABUF_CREATE: Function not implemented\n",
            "{end:?}"
        );
        Ok(())
    })();
    udev::link(false)?;
    result
}

/// The kilobytes that a process has pinned.
fn pinned(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    Ok(number.context("no VmPin")?.parse()?)
}

/// More than the limit on locked memory, so it is the allowance that is charged. `VmPin` is the supervisor's.
fn buffers_are_charged_to_the_program_s_user() -> Result<()> {
    const BYTES: u64 = 33_177_600;
    let mut accounts = Accounts::of([USER]);
    let [before] = accounts.charges()?;
    let mut running = Running::start(&run(&["--by", "supervisor", "--", CLIENT, "--hold"]))?;
    ensure!(running.line()? == MADE, "no buffer");
    let supervisor = supervisor_of(running.pid()?)?;
    let program = supervisor_of(supervisor)?;
    let [held] = accounts.charges()?;
    let pins = (pinned(supervisor)?, pinned(program)?);
    let end = running.end()?;
    ensure!(end.status == Some(0), "{end:?}");
    ensure!(
        held.allowance == before.allowance + BYTES && pins == (BYTES >> 10, 0),
        "{before:?}, then {held:?}, with {pins:?} KiB pinned by the supervisor and the program"
    );
    becomes("the charge is given back", || {
        Ok(accounts.charges()? == [before])
    })
}

fn doctor_recognises_the_supervisor() -> Result<()> {
    let mut running = Running::start(&run(&["--by", "supervisor", "--", CLIENT, "--hold"]))?;
    ensure!(running.line()? == MADE, "no buffer");
    let supervisor = supervisor_of(running.pid()?)?;
    let program = supervisor_of(supervisor)?;
    let doctor = Start::program(&["pinbuf", "doctor", "--pid", &program.to_string()]).end()?;
    let end = running.end()?;
    ensure!(end.status == Some(0), "{end:?}");
    let line = format!(
        "is served by the supervisor of `pinbuf run` (process {supervisor}), and has 1 buffers"
    );
    ensure!(doctor.out.contains(&line), "{doctor:?}");
    Ok(())
}

/// What root's supervisor makes is charged to nobody, so nobody else gets it.
fn user_that_root_becomes_is_not_served() -> Result<()> {
    no_udmabuf()?;
    let inner = ["setpriv", "--reuid=1000", "--clear-groups", "--", CLIENT];
    let words: Vec<&str> = ["pinbuf", "run", "--by", "supervisor", "--"]
        .iter()
        .copied()
        .chain(inner)
        .collect();
    let end = Start::program(&words).end()?;
    ensure!(
        end.status == Some(1)
            && end.err.contains("No such file")
            && end
                .err
                .contains("has given up rights that `pinbuf run` has"),
        "{end:?}"
    );
    let words = ["pinbuf", "run", "--by", "supervisor", "--", CLIENT];
    let end = Start::program(&words).end()?;
    if end.out != MADE {
        bail!("root itself: {end:?}");
    }
    Ok(())
}

/// A root whose buffers are charged, as in a container, has a supervisor that may open the device. Its program has become a
/// user for whom the device's mode does not allow that.
fn device_that_a_user_may_not_open_is_refused() -> Result<()> {
    no_udmabuf()?;
    let words =
        "setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock -- pinbuf run --by supervisor -- \
                 setpriv --reuid=1000 --regid=1000 --clear-groups --";
    let as_user = |command: &[&str]| {
        let words: Vec<&str> = words
            .split_whitespace()
            .chain(command.iter().copied())
            .collect();
        Start::program(&words).end()
    };
    let end = as_user(&[CLIENT])?;
    ensure!(
        end.status == Some(1) && end.err.contains("Permission denied"),
        "{end:?}"
    );
    // By no flags, O_PATH among them.
    let end = as_user(&[surroundings::ODD, "open"])?;
    ensure!(
        end.out.contains("EACCES") && !end.out.contains("made"),
        "{end:?}"
    );
    Ok(())
}

/// A namespace's root has all privileges there, also one that has the host's numbers of users. What it locks is charged
/// to its user by the kernel, and would be charged to nobody by root's supervisor.
fn privileges_of_another_namespace_do_not_count() -> Result<()> {
    no_udmabuf()?;
    let script = format!(
        "d=$(mktemp -d); mkfifo $d/f
        unshare --user --keep-caps sh -c \"read line <$d/f; exec {CLIENT}\" & p=$!
        while [ $(readlink /proc/$p/ns/user) = $(readlink /proc/$$/ns/user) ]; do sleep 0.1; done
        echo 0 0 4294967295 >/proc/$p/uid_map; echo 0 0 4294967295 >/proc/$p/gid_map
        echo >$d/f; wait $p; status=$?; rm -r $d; exit $status"
    );
    let caps = ["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
    for dropped in [&caps[..], &[]] {
        let words = ["pinbuf", "run", "--by", "supervisor", "--", "setpriv"];
        let words = [&words[..], dropped, &["--", "sh", "-c", &script]].concat();
        let end = Start::program(&words).end()?;
        ensure!(
            end.status == Some(1)
                && end
                    .err
                    .contains("has given up rights that `pinbuf run` has"),
            "{dropped:?}: {end:?}"
        );
    }
    Ok(())
}

fn device_is_no_directory() -> Result<()> {
    no_udmabuf()?;
    let words = "--by supervisor -- dd if=/dev/udmabuf iflag=directory of=/dev/null count=0";
    let words: Vec<&str> = words.split(' ').collect();
    let end = run(&words).end()?;
    ensure!(
        end.status == Some(1) && end.err.contains("Not a directory"),
        "{end:?}"
    );
    Ok(())
}

/// Some programs start others with SIGCHLD ignored, and `wait` then finds no child.
fn ends_where_the_end_of_children_is_ignored() -> Result<()> {
    let words =
        "timeout -s KILL 20 env --ignore-signal=CHLD pinbuf run --by supervisor -- busybox sh -c";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push("exit 3");
    let end = Start::program(&words).by_kvm_user().end()?;
    ensure!(end.status == Some(3), "{end:?}");
    Ok(())
}

/// In such a `/proc`, the numbers are those of other processes, with another user, limits, and memory.
fn refuses_a_proc_of_another_namespace() -> Result<()> {
    let start = |mount: &[&'static str]| {
        let words = ["unshare", "--pid", "--fork"].iter().chain(mount);
        let rest = ["pinbuf", "run", "--by", "supervisor", "--", CLIENT];
        let words: Vec<&str> = words.chain(&rest).copied().collect();
        Start::program(&words).end()
    };
    // Several times: `pinbuf run` is process 1 of the namespace, and the kernel kills the supervisor when it exits. The
    // supervisor's error must be reported before that.
    for _ in 0..10 {
        let end = start(&[])?;
        ensure!(
            end.status == Some(125) && end.out.is_empty() && end.err.contains("/proc"),
            "{end:?}"
        );
    }
    made(&start(&["--mount-proc"])?)
}
