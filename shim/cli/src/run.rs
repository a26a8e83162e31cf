// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf run`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{bail, Context, Result};
use clap::Args;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use pinbuf::{Device, Error};

use crate::command::{Missing, Program};
use crate::text::{complain, of_path};
use crate::{doctor, shim, OWN_ERROR};

/// Runs a program written for udmabuf on pinbuf.
///
/// For it, /dev/udmabuf is /dev/pinbuf. Its limit on locked memory is raised as far as it may be.
/// The status is the command's; 125 if it could not be started on pinbuf, 126 if it cannot be
/// executed, 127 if it is not found.
#[derive(Debug, Args)]
pub struct Run {
    /// Writes a line for each buffer to FILE, or to standard error without one.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "stderr",
          require_equals = true)]
    log: Option<PathBuf>,
    /// Runs the command even if the shim cannot reach it.
    #[arg(long)]
    anyway: bool,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// Whether the program was started with SIGPIPE ignored, as services of systemd are. Rust's runtime ignores it before
/// `main`, and gives a command the default.
static PIPE_IGNORED: AtomicBool = AtomicBool::new(false);

#[used]
#[link_section = ".init_array"]
static INIT: extern "C" fn() = note_signals;

extern "C" fn note_signals() {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the action is written, and none is set.
    let result = unsafe { libc::sigaction(libc::SIGPIPE, ptr::null(), action.as_mut_ptr()) };
    // SAFETY: written, or zeroes.
    let handler = unsafe { action.assume_init() }.sa_sigaction;
    PIPE_IGNORED.store(result == 0 && handler == libc::SIG_IGN, Ordering::Relaxed);
}

impl Run {
    pub fn run(self) -> Result<ExitCode> {
        let (name, arguments) = self.command.split_first().context("no command")?;
        let shim = shim::find()?;
        if let Some(finding) = check_device()? {
            complain!("{}", finding.text);
            complain!("{}", finding.remedy.unwrap_or_default());
            return Ok(ExitCode::from(OWN_ERROR));
        }
        let program = match Program::find(Path::new(name)) {
            Ok(program) => program,
            Err(error) => {
                complain!("{error:#}");
                let status = match error.downcast_ref() {
                    Some(Missing::NotFound(_)) => 127,
                    _ => 126,
                };
                return Ok(ExitCode::from(status));
            }
        };
        if let Some(obstacle) = program.obstacles.first() {
            let what = format!("{} cannot be reached: {obstacle}", of_path(&program.loaded));
            if !self.anyway {
                bail!("{what} (--anyway runs it nevertheless)");
            }
            complain!("{what}");
        } else if let Some(calls @ 1..) = program.system_calls {
            complain!(
                "{} has {} instructions of its own that make system calls: if it opens /dev/udmabuf by them, it gets \
                 the kernel's udmabuf or ENOENT, and no buffer of pinbuf's (`pinbuf doctor --pid` says so while it \
                 runs)",
                of_path(&program.loaded),
                calls
            );
        }
        raise_memlock();
        let mut command = Command::new(&program.path);
        command.arg0(name).args(arguments);
        let before = std::env::var_os("LD_PRELOAD");
        command.env("LD_PRELOAD", shim::preload(&shim, before.as_deref()));
        if let Some(log) = &self.log {
            let log = if log == Path::new("stderr") {
                log.clone()
            } else {
                std::path::absolute(log)?
            };
            command.env("PINBUF_SHIM_LOG", log);
        }
        if PIPE_IGNORED.load(Ordering::Relaxed) {
            let ignore = || {
                // SAFETY: no handler is installed.
                unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
                Ok(())
            };
            // SAFETY: a system call; and there is no fork here.
            unsafe { command.pre_exec(ignore) };
        }
        let error = command.exec();
        complain!("{}: {error}", of_path(&program.path));
        Ok(ExitCode::from(126))
    }
}

/// Says now what the program would fail with later, and less clearly.
fn check_device() -> Result<Option<doctor::Finding>> {
    match Device::open() {
        Ok(_) => Ok(None),
        Err(Error::TooManyFiles | Error::NoMemory) => bail!("no descriptor is free, or no memory"),
        Err(_) => {
            let [module, device] = [doctor::module(), doctor::device()];
            Ok(Some(if module.is_bad() { module } else { device }))
        }
    }
}

/// The user's name, or number.
pub fn user_name() -> String {
    let uid = nix::unistd::getuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

/// Raises the limit on locked memory as far as it goes without privileges.
fn raise_memlock() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) {
        if soft < hard {
            // Lower limits only make buffers fail later, which is reported there.
            let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
        }
    }
}
