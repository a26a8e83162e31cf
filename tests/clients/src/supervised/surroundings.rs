// SPDX-License-Identifier: MIT OR Apache-2.0

//! What surrounds `pinbuf run` and its supervisor: limits, descriptors, terminals, signals of the kernel's, and the end of
//! each party.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag, OFlag};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::tests;

use super::{becomes, handled, run, state, supervisor_of, Running, MADE};
use crate::process::{no_udmabuf, Start};

tests!("supervised":
    memory_beyond_the_limit_is_not_filled,
    long_list_without_memory_ends_no_service,
    ways_to_find_the_device_are_the_kernels,
    ways_to_open_the_device_are_the_kernels,
    stops_of_the_supervisor_change_no_answer,
    stops_of_the_supervisor_do_not_end_it,
    other_files_are_not_created_or_cut,
    inherited_descriptors_are_closed,
    a_dev_without_null_is_reported,
    is_not_started_without_threads,
    continues_after_a_stop_of_the_group,
    program_of_process_1_can_be_stopped,
    alarm_that_was_set_before_is_passed_on,
    hangup_of_a_session_leader_is_passed_on,
    killed_with_the_command,
);

pub const ODD: &str = "pinbuf-odd-client";
const STATIC: &str = "pinbuf-c-client-static";

/// The driver would refuse the buffer, so there is nothing to wait for.
fn memory_beyond_the_limit_is_not_filled() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "sparse"]).end()?;
    ensure!(end.out == "ENOMEM 0\n", "{end:?}");
    Ok(())
}

/// There is room for a copy of the list, and not for two.
fn long_list_without_memory_ends_no_service() -> Result<()> {
    let mut running = Running::start(&run(&["--by", "supervisor", "--", ODD, "long"]))?;
    ensure!(running.line()? == "ready\n", "it did not start");
    let supervisor = supervisor_of(running.pid()?)?;
    let text = fs::read_to_string(format!("/proc/{supervisor}/status"))?;
    let size = text.lines().find_map(|line| line.strip_prefix("VmData:"));
    let size: u64 = size
        .and_then(|size| size.split_whitespace().next())
        .context("no VmData")?
        .parse()?;
    let limit = (size << 10) + (40 << 20);
    let words = [
        "prlimit",
        "--pid",
        &supervisor.to_string(),
        &format!("--data={limit}:{limit}"),
    ];
    ensure!(Start::program(&words).end()?.status == Some(0), "prlimit");
    let end = running.end()?;
    ensure!(end.out == "ENOMEM\nmade\n", "{end:?}");
    Ok(())
}

fn ways_to_find_the_device_are_the_kernels() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "openat2"]).end()?;
    let expected = [
        "made", "EXDEV", "ENOENT", "EINVAL", "EINVAL", "EINVAL", "EINVAL", "EINVAL", "EAGAIN",
        "made", "EXDEV", "EINVAL", "made", "EINVAL", "made", "E2BIG", "made", "E2BIG",
    ];
    let seen: Vec<&str> = end.out.lines().collect();
    ensure!(seen == expected, "{end:?}");
    Ok(())
}

/// As udmabuf's own device would be opened.
fn ways_to_open_the_device_are_the_kernels() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "open"]).end()?;
    let mut expected = vec![
        "r false made",
        "w false made",
        "rw true made",
        "rw false made",
        "rw false made",
        "EEXIST",
        "ENOTDIR",
        // The supervisor cannot give a descriptor that is a path only.
        "r false made",
        "r true made",
        "ENOTDIR",
        "none false made",
        "rw+append+nonblock false made",
        "rw+sync+nofollow false made",
        "rw false made",
        "EINVAL",
        "EPERM",
        "EEXIST",
        "ENOTDIR",
        "EINVAL",
        "EINVAL",
        "ENOENT",
        "ENOENT",
        "ENOENT",
        "ENOENT",
        "EFAULT",
    ];
    if cfg!(target_arch = "x86_64") {
        expected.extend(["rw false made", "w false made"]);
    }
    let seen: Vec<&str> = end.out.lines().collect();
    ensure!(seen == expected, "{end:?}");
    Ok(())
}

/// Where the device should be there is nothing, and then an ordinary file.
fn other_files_are_not_created_or_cut() -> Result<()> {
    no_udmabuf()?;
    let inside = "mount -t tmpfs none /dev && : >/dev/udmabuf && ls /dev && rm /dev/udmabuf &&
         echo kept >/dev/pinbuf && : >/dev/udmabuf && cat /dev/pinbuf";
    let words = "unshare --mount pinbuf run --by supervisor -- sh -c";
    let words: Vec<&str> = words.split(' ').chain([inside]).collect();
    let end = Start::program(&words).end()?;
    ensure!(end.out == "udmabuf\nkept\n", "{end:?}");
    Ok(())
}

/// A stop interrupts what the supervisor asks the kernel, as the freezer and a tracer do.
fn stops_of_the_supervisor_change_no_answer() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "stopped"]).end()?;
    ensure!(end.out == "end\n", "{end:?}");
    Ok(())
}

/// A stop interrupts the supervisor's wait for the end of all programs as well.
fn stops_of_the_supervisor_do_not_end_it() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "left"]).end()?;
    ensure!(end.out == "end\n", "{end:?}");
    Ok(())
}

/// Whoever reads a pipe of which the program has inherited the other end waits for the program, not for what serves it.
fn inherited_descriptors_are_closed() -> Result<()> {
    // The first child of the program stays, without the pipe.
    let script = "sleep 50 3>&- >/dev/null 2>&1 & echo $!; exit 5";
    let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let mut command = run(&words).command();
    let fd = theirs.as_raw_fd();
    let inherit = move || -> std::io::Result<()> {
        // SAFETY: the child has nothing at this number.
        Errno::result(unsafe { libc::dup2(fd, 3) })?;
        Ok(())
    };
    // SAFETY: a system call.
    unsafe { command.pre_exec(inherit) };
    let output = command.output()?;
    drop((command, theirs));
    ensure!(output.status.code() == Some(5), "{output:?}");
    let child: i32 = String::from_utf8(output.stdout)?.trim().parse()?;
    let reader = thread::spawn(move || File::from(ours).read_to_end(&mut Vec::new()));
    let result = becomes("all have closed the pipe", || Ok(reader.is_finished()));
    kill(Pid::from_raw(child), Signal::SIGTERM)?;
    result
}

/// The supervisor cannot do without it, and the program is not started.
fn a_dev_without_null_is_reported() -> Result<()> {
    let script = format!(
        "mount -t tmpfs none /mnt && cp -a /dev/pinbuf /mnt && mount --bind /mnt /dev &&
         exec pinbuf run --by supervisor -- {STATIC}"
    );
    let end = Start::program(&["unshare", "--mount", "sh", "-c", &script]).end()?;
    ensure!(
        end.status == Some(125) && end.err.contains("/dev/null: ENOENT"),
        "{end:?}"
    );
    Ok(())
}

/// The user's processes, with those that have ended and that nobody has waited for.
fn processes_of_user() -> Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path().join("task");
        for task in fs::read_dir(path).into_iter().flatten().flatten() {
            count += u64::from(task.metadata().is_ok_and(|task| task.uid() == USER));
        }
    }
    Ok(count)
}

/// A program whose calls nobody would answer.
fn is_not_started_without_threads() -> Result<()> {
    no_udmabuf()?;
    let mut statuses = Vec::new();
    for more in 0..8 {
        let limit = processes_of_user()? + more;
        let start = run(&["--by", "supervisor", "--", STATIC]);
        let mut words = vec!["prlimit".to_owned(), format!("--nproc={limit}:{limit}")];
        let command = start.command();
        let rest = std::iter::once(command.get_program()).chain(command.get_args());
        words.extend(rest.map(|word| word.to_string_lossy().into_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let end = Start::program(&words).end()?;
        let served = end.status == Some(0) && end.out == MADE;
        let not_started = end.status == Some(125) && !end.err.contains("opening /dev/udmabuf");
        ensure!(served || not_started, "{limit}: {end:?}");
        statuses.push(end.status);
    }
    ensure!(
        statuses.first() == Some(&Some(125)) && statuses.last() == Some(&Some(0)),
        "{statuses:?}"
    );
    Ok(())
}

/// SIGSTOP stops the supervisor as well, if it is sent to the whole group of processes.
fn continues_after_a_stop_of_the_group() -> Result<()> {
    let script = "echo $$; read line; cat /dev/null; echo opened";
    let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
    let mut command = run(&words).command();
    let mut running = Running::of(command.process_group(0))?;
    let program = Pid::from_raw(running.line()?.trim().parse()?);
    let front = running.pid()?;
    let supervisor = supervisor_of(front)?;
    // Passed on once `pinbuf run` knows the program.
    kill(front, Signal::SIGCONT)?;
    handled(front)?;
    kill(Pid::from_raw(-front.as_raw()), Signal::SIGSTOP)?;
    let states = || [front, supervisor, program].map(|pid| state(pid).unwrap_or('?'));
    becomes("all stop", || Ok(states() == ['T'; 3]))?;
    kill(front, Signal::SIGCONT)?;
    let result = becomes("all continue", || Ok(!states().contains(&'T')))
        .with_context(|| format!("{:?}", states()));
    kill(Pid::from_raw(-front.as_raw()), Signal::SIGCONT)?;
    let end = running.end()?;
    result?;
    ensure!(end.out == "opened\n", "{end:?}");
    Ok(())
}

/// The kernel does not stop process 1 of a namespace.
fn program_of_process_1_can_be_stopped() -> Result<()> {
    let words = "unshare --pid --fork --mount-proc pinbuf run --by supervisor -- busybox sh -c";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push("echo; read line; echo $line");
    let mut running = Running::start(&Start::program(&words))?;
    running.line()?;
    let front = supervisor_of(running.pid()?)?;
    let program = supervisor_of(supervisor_of(front)?)?;
    for _ in 0..5 {
        kill(program, Signal::SIGSTOP)?;
        thread::sleep(Duration::from_millis(300));
        ensure!(state(program)? == 'T', "it is {}", state(program)?);
        kill(program, Signal::SIGCONT)?;
        becomes("it continues", || Ok(state(program)? != 'T'))?;
    }
    let end = running.end()?;
    ensure!(end.out == "\n", "{end:?}");
    Ok(())
}

/// `alarm` outlives `exec`, and is a usual way to limit the time of a command.
fn alarm_that_was_set_before_is_passed_on() -> Result<()> {
    let mut command = run(&["--by", "supervisor", "--", "busybox", "sleep", "20"]).command();
    let limit = || -> std::io::Result<()> {
        nix::unistd::alarm::set(2);
        Ok(())
    };
    // SAFETY: a system call.
    unsafe { command.pre_exec(limit) };
    let status = command.status()?;
    ensure!(status.signal() == Some(libc::SIGALRM), "{status}");
    Ok(())
}

/// When a terminal is closed, the kernel tells the leader of its session alone.
fn hangup_of_a_session_leader_is_passed_on() -> Result<()> {
    const FILE: &str = "/tmp/hung-up";
    let _ = fs::remove_file(FILE);
    let script =
        format!("trap 'echo hup >{FILE}; exit' HUP; echo ready; while :; do sleep 0.1; done");
    let terminal = nix::pty::openpty(None, None)?;
    for fd in [&terminal.master, &terminal.slave] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    let mut command = run(&["--by", "supervisor", "--", "busybox", "sh", "-c", &script]).command();
    let stdio = || -> Result<Stdio> { Ok(OwnedFd::try_clone(&terminal.slave)?.into()) };
    command
        .stdin(stdio()?)
        .stdout(stdio()?)
        .stderr(Stdio::null());
    let lead = || -> std::io::Result<()> {
        nix::unistd::setsid()?;
        // SAFETY: no memory is involved.
        Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        Ok(())
    };
    // SAFETY: system calls.
    unsafe { command.pre_exec(lead) };
    let mut child = command.spawn()?;
    drop(command);
    drop(terminal.slave);
    let mut master = File::from(terminal.master);
    let mut line = [0; 5];
    master.read_exact(&mut line)?;
    ensure!(&line == b"ready", "{line:?}");
    drop(master);
    let result = becomes("the program hears of it", || Ok(fs::exists(FILE)?));
    if result.is_err() {
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    }
    child.wait()?;
    result?;
    fs::remove_file(FILE)?;
    Ok(())
}

/// As if the command had been executed in the place of `pinbuf run`.
fn killed_with_the_command() -> Result<()> {
    let script = "(sleep 1; cat /dev/null; echo child) & echo $$; read line; wait";
    let words = ["--by", "supervisor", "--", "busybox", "sh", "-c", script];
    // The first line may come before the supervisor has reported the program's start, or after that.
    for _ in 0..5 {
        let mut running = Running::start(&run(&words))?;
        let program = Pid::from_raw(running.line()?.trim().parse()?);
        kill(running.pid()?, Signal::SIGKILL)?;
        let result = becomes("the program ends", || {
            Ok(state(program).is_ok_and(|state| state == 'Z')
                || !fs::exists(format!("/proc/{program}"))?)
        });
        if result.is_err() {
            kill(program, Signal::SIGKILL)?;
        }
        // What it has started is served all the same.
        let end = running.end()?;
        result?;
        ensure!(end.out == "child\n", "{end:?}");
    }
    Ok(())
}
