// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command: its standard streams, and how it ended.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::{openpty, Winsize};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{pipe2, Pid};
use pinbuf_guest_init::{port, Config, Event, Request};

use crate::ports;

/// The master side of the command's terminal, when it has one.
type Terminal = Arc<Mutex<Option<File>>>;

/// Runs the command and waits for its end and for that of its output.
pub fn run(config: &Config, control: &mut File) -> Result<Event> {
    let mut relays = Vec::new();
    let complaints: File;
    let terminal = Terminal::default();

    let mut command = match config.terminal {
        Some(_) => {
            // setsid gives the shell the terminal that its standard streams are.
            let mut command = Command::new("/usr/bin/setsid");
            command.args(["--ctty", "--wait"]);
            command.args(if config.command.is_empty() {
                &SHELL[..]
            } else {
                &[]
            });
            command.args(&config.command);
            command
        }
        None => {
            let mut command = Command::new(&config.command[0]);
            command.args(&config.command[1..]);
            command
        }
    };
    command
        .current_dir(&config.directory)
        .env_clear()
        .envs(config.environment.iter().cloned());

    if let Some((rows, columns)) = config.terminal {
        let pty = openpty(&window(rows, columns), None).context("making a terminal")?;
        complaints = pty.slave.try_clone()?.into();
        command
            .stdin(pty.slave.try_clone()?)
            .stdout(pty.slave.try_clone()?)
            .stderr(pty.slave);
        let master = File::from(pty.master);
        relays.push(relay(master.try_clone()?, ports::open(port::STDOUT)?));
        relay_frames(ports::open(port::STDIN)?, master.try_clone()?);
        *terminal.lock().unwrap_or_else(|e| e.into_inner()) = Some(master);
    } else {
        let (input, to_input) = pipe()?;
        let (from_output, output) = pipe()?;
        let (from_error, error) = pipe()?;
        complaints = error.try_clone()?.into();
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(error));
        relays.push(relay(from_output.into(), ports::open(port::STDOUT)?));
        relays.push(relay(from_error.into(), ports::open(port::STDERR)?));
        relay_frames(ports::open(port::STDIN)?, to_input.into());
    }

    ports::send(control, &Event::Ready)?;
    let started = command.spawn();
    // Closes this process's copies of the far ends.
    drop(command);
    let event = match started {
        Ok(child) => {
            drop(complaints);
            let child = Pid::from_raw(child.id() as i32);
            follow_requests(control.try_clone()?, terminal);
            reap_until(child)?
        }
        Err(error) => not_started(&config.command, complaints, &error),
    };
    // Ends what the command left running: its output ends, and what it held is released before the guest stops,
    // where the checkers of the kernel's log see it.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    for relay in relays {
        let _ = relay.join();
    }
    Ok(event)
}

const SHELL: [&str; 2] = ["/bin/bash", "--login"];

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).context("making a pipe")
}

fn window(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A command that cannot be started ends as it would in a shell.
fn not_started(command: &[String], mut complaints: File, error: &io::Error) -> Event {
    let _ = writeln!(complaints, "guest: {}: {error}", command.join(" "));
    Event::Exited(if error.kind() == ErrorKind::NotFound {
        127
    } else {
        126
    })
}

/// Copies everything to a port, in its own thread.
fn relay(mut from: File, mut to: File) -> JoinHandle<()> {
    thread::spawn(move || {
        // A terminal whose last user is gone answers EIO: that, too, is the end.
        // (Not io::copy: it would splice, which virtio ports do in their own way.)
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
}

/// Takes the frames of standard input apart, in its own thread.
fn relay_frames(mut from: File, mut to: File) {
    thread::spawn(move || {
        let mut frame = Vec::new();
        loop {
            let mut length = [0; 4];
            if from.read_exact(&mut length).is_err() {
                return;
            }
            frame.resize(u32::from_le_bytes(length) as usize, 0);
            if frame.is_empty() || from.read_exact(&mut frame).is_err() {
                return;
            }
            if to.write_all(&frame).is_err() {
                // Nobody reads any more. Keep the port empty, so that the host does not block.
                let _ = io::copy(&mut from, &mut io::sink());
                return;
            }
        }
    });
}

/// Does what the host asks for, in its own thread.
fn follow_requests(control: File, terminal: Terminal) {
    thread::spawn(move || {
        for line in BufReader::new(control).lines() {
            let Ok(line) = line else { return };
            match serde_json::from_str(&line) {
                Ok(Request::DumpTasks) => {
                    for key in ["w", "l"] {
                        let _ = fs::write("/proc/sysrq-trigger", key);
                    }
                }
                Ok(Request::Resize(rows, columns)) => {
                    if let Some(master) = &*terminal.lock().unwrap_or_else(|e| e.into_inner()) {
                        resize(master, rows, columns);
                    }
                }
                Err(error) => crate::log(&format!("request {line:?}: {error}")),
            }
        }
    });
}

fn resize(master: &File, rows: u16, columns: u16) {
    use std::os::fd::AsRawFd;
    nix::ioctl_write_ptr_bad!(set_window, nix::libc::TIOCSWINSZ, Winsize);
    // SAFETY: the descriptor is open, and the structure outlives the call.
    let result = unsafe { set_window(master.as_raw_fd(), &window(rows, columns)) };
    if let Err(error) = result {
        crate::log(&format!("resizing the terminal: {error}"));
    }
}

/// Collects ended processes, as the first process has to, until this one ends.
fn reap_until(child: Pid) -> Result<Event> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, status)) if pid == child => {
                return Ok(Event::Exited(status))
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(Event::Killed(signal as i32))
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for the command"),
        }
    }
}
