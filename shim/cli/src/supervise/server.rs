// SPDX-License-Identifier: MIT OR Apache-2.0

//! The supervisor's process: starts the program under the filter, and serves it and all that it starts.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::prctl;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::signal::{kill, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    recvmsg, sendmsg, socketpair, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags,
    SockFlag, SockType, UnixAddr,
};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, getppid, Pid};
use pinbuf::Device;

use super::answer::Answers;
use super::filter::Filter;
use super::front::{self, Message};
use super::listener::{says_deserted, Listener};
use super::log::Lines;
use super::pool::Pool;
use super::{adopt_orphans, can_open_udmabuf, close_inherited, state_and_parent, NAME};

/// Starts the program, and answers its calls until no process is under the filter any more. What `pinbuf run` has to
/// know is written to `to_front`.
pub fn serve(
    command: Command,
    mask: &SigSet,
    device: Device,
    log: Lines,
    to_front: &File,
) -> Result<()> {
    let parent = getppid();
    adopt_orphans()?;
    let quiet = !log.is_stderr();
    let answers = Answers::new(device, log)?;
    // Opened now: a program that was started cannot be taken back, and uses up descriptors.
    let nothing = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
    let nothing = nothing.context("/dev/null")?;
    let ended = SigSet::from(Signal::SIGCHLD);
    let ended = SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let (program, listener) = match start(command, mask)? {
        Ok(started) => started,
        Err(message) => return Ok(message.send(to_front)?),
    };
    let pool = Pool::new(listener, answers);
    let begin = || -> Result<()> {
        leave_the_surroundings(&nothing)?;
        pool.start().context("starting a thread")
    };
    // Without anybody who answers its calls, the program could open no file. It is killed before the pool goes, whose end
    // would let calls that wait go on without an answer.
    begin().inspect_err(|_| {
        let _ = kill(program, Signal::SIGKILL);
    })?;
    // That nobody reads it any more is noticed below, and what the program has started is served all the same.
    let _ = Message::Started(program).send(to_front);
    let mut front = Some(to_front);
    let mut stopped = false;
    loop {
        let mut fds = vec![
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            // Asked for nothing, it says when nobody is under the filter any more.
            PollFd::new(pool.listener().as_fd(), PollFlags::empty()),
        ];
        // And this one, when nobody reads it any more.
        fds.extend(front.map(|to| PollFd::new(to.as_fd(), PollFlags::empty())));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        let spoken = |fd: &PollFd| fd.revents().is_some_and(|events| !events.is_empty());
        let deserted = says_deserted(&fds[1]);
        let alone = fds.get(2).is_some_and(spoken);
        while ended.read_signal()?.is_some() {}
        for (child, status) in changes() {
            if child != program {
                continue;
            }
            let ended = libc::WIFEXITED(status) || libc::WIFSIGNALED(status);
            if let Some(to) = front {
                // The parent may have been killed.
                let sent = Message::Changed(status).send(to);
                // SIGKILL ends a program that is stopped, too, and the parent with it.
                if sent.is_ok() && (ended && stopped || libc::WIFCONTINUED(status)) {
                    go_on(parent, to);
                }
            }
            stopped = libc::WIFSTOPPED(status);
            if ended {
                front = None;
                if quiet {
                    dup2_stderr(&nothing)?;
                }
            }
        }
        if alone && front.take().is_some() {
            // Before the program's end, nothing ends the parent but SIGKILL.
            let _ = kill(program, Signal::SIGKILL);
        }
        if front.is_none() && deserted {
            return Ok(());
        }
        if deserted {
            // The program's end is still to come: that is a signal, and this would be reported without a pause.
            let mut fds = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                result => drop(result?),
            }
        }
    }
}

/// Continues the parent if it is stopped, or stops because of an earlier message, until it has read all of them: the
/// program was perhaps continued alone. A parent that runs is not sent the signal: the kernel would drop one that stops
/// it and that it has not read yet.
fn go_on(parent: Pid, messages: &File) {
    while getppid() == parent {
        // It is continued also if that is not known.
        if state_and_parent(parent).is_none_or(|(state, _)| state == 'T') {
            let _ = kill(parent, Signal::SIGCONT);
        }
        if !front::is_unread(messages) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Starts the program under the filter.
fn start(mut command: Command, mask: &SigSet) -> Result<Result<(Pid, Listener), Message>> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)?;
    let mut filter = Filter::new(!can_open_udmabuf());
    let mask = *mask;
    let enter = move || -> io::Result<()> {
        let listener = filter.enter()?;
        let fds = [listener.as_raw_fd()];
        let message = [IoSlice::new(b"!")];
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<UnixAddr>(
            theirs.as_raw_fd(),
            &message,
            &control,
            MsgFlags::empty(),
            None,
        )?;
        mask.thread_set_mask()?;
        Ok(())
    };
    // SAFETY: this process has one thread, so the child may do what any program may.
    unsafe { command.pre_exec(enter) };
    let started = command.spawn();
    drop(command);
    let listener = receive(&ours);
    Ok(match (started, listener) {
        (Ok(child), Some(listener)) => Ok((
            Pid::from_raw(i32::try_from(child.id())?),
            Listener::from(listener),
        )),
        (Ok(_), None) => {
            anyhow::bail!("the program was started, and its filter's listener was not received")
        }
        (Err(error), listener) => {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
            Err(match listener {
                Some(_) => Message::NoProgram(errno),
                None => Message::NoFilter(errno),
            })
        }
    })
}

/// The descriptor in a message that is there already.
fn receive(from: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut message = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!(std::os::fd::RawFd);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received =
        recvmsg::<UnixAddr>(from.as_raw_fd(), &mut message, Some(&mut room), flags).ok()?;
    let fd = received.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    })?;
    // SAFETY: the kernel has just installed it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The supervisor may outlive the program, so it keeps neither its directory nor its input and output, nor what else the
/// program has inherited; and it takes as many descriptors as it may have, since it takes the program's.
fn leave_the_surroundings(nothing: &OwnedFd) -> Result<()> {
    prctl::set_name(NAME)?;
    dup2_stdin(nothing)?;
    dup2_stdout(nothing)?;
    close_inherited()?;
    chdir("/")?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}

/// Children that have ended, stopped or continued since this was asked last.
fn changes() -> Vec<(Pid, i32)> {
    let mut found = Vec::new();
    loop {
        let mut status = 0;
        let options = libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED;
        // SAFETY: the status is written to `status`.
        match unsafe { libc::waitpid(-1, &mut status, options) } {
            child if child > 0 => found.push((Pid::from_raw(child), status)),
            _ => return found,
        }
    }
}
