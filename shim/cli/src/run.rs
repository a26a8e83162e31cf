// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf run`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{bail, Context, Result};
use clap::{Args, ValueEnum};
use nix::errno::Errno;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use pinbuf::{Device, Error};

use crate::command::{Missing, Program};
use crate::finding::Finding;
use crate::supervise::{self, Log, Outcome};
use crate::text::{complain, of_path};
use crate::{setup, shim, OWN_ERROR};

/// Run a program written for udmabuf on pinbuf.
///
/// The program gets /dev/pinbuf when it opens /dev/udmabuf, and its soft limit on locked memory is raised to the hard limit.
/// The exit status is the command's; 125 if it could not be started on pinbuf, 126 if it cannot be
/// executed, 127 if it is not found.
#[derive(Debug, Args)]
pub struct Run {
    /// Write a line for each buffer to FILE, or to standard error if no FILE is given.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "stderr",
          require_equals = true)]
    log: Option<PathBuf>,
    /// How the command's requests are served. By default, this depends on the command's file.
    #[arg(long, value_name = "WAY", value_enum)]
    by: Option<By>,
    /// Print to standard error how the command is served, and why.
    #[arg(short, long)]
    verbose: bool,
    /// Run the command with the shim preloaded even if nothing can serve it.
    #[arg(long, conflicts_with = "by")]
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

/// How a program's requests are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// By a library that is loaded into it (LD_PRELOAD): all calls by libc of dynamically linked 64-bit programs.
    Preload,
    /// By a process to which the kernel reports the requests (seccomp): all programs except set-user-ID ones.
    Supervisor,
    /// By both, for programs that start others of all kinds.
    Both,
}

impl By {
    /// For a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preload => "by the preloaded shim",
            Self::Supervisor => "by the supervisor",
            Self::Both => "by the preloaded shim and the supervisor",
        }
    }

    /// The way that fits a program, and why; the reason alone if none does.
    pub fn fitting(program: &Program) -> Result<(Self, String), String> {
        if let Some(lost) = program.obstacles.iter().find(|found| !found.is_served()) {
            return Err(lost.to_string());
        }
        // What one way cannot reach the other does; but under the supervisor no program gets rights by its file, so
        // it is not chosen without a reason.
        if let Some(obstacle) = program.obstacles.first() {
            return Ok((Self::Supervisor, obstacle.to_string()));
        }
        Ok(match program.system_calls {
            Some(calls @ 1..) => (
                Self::Both,
                format!("it has {calls} instructions of its own that make system calls"),
            ),
            None => (
                Self::Preload,
                "it is dynamically linked with glibc; whether it makes system calls of its own is not known on this \
                 architecture"
                    .to_owned(),
            ),
            Some(0) => (
                Self::Preload,
                "it is dynamically linked with glibc, and makes its system calls by it".to_owned(),
            ),
        })
    }
}

impl Run {
    pub fn run(self) -> Result<ExitCode> {
        let (name, arguments) = self.command.split_first().context("no command")?;
        let device = match open_device()? {
            Ok(device) => device,
            Err(finding) => {
                complain!("{}", finding.text);
                complain!("{}", finding.remedy.unwrap_or_default());
                return Ok(ExitCode::from(OWN_ERROR));
            }
        };
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
        let by = self.way(&program)?;
        raise_memlock();
        let mut command = Command::new(&program.path);
        command.arg0(name).args(arguments);
        let log = self.log()?;
        if by != By::Supervisor {
            let before = std::env::var_os("LD_PRELOAD");
            let shim = shim::find()?;
            command.env("LD_PRELOAD", shim::preload(&shim, before.as_deref()));
            match &log {
                Log::Off => {}
                Log::Stderr => drop(command.env("PINBUF_SHIM_LOG", "stderr")),
                Log::File(path) => drop(command.env("PINBUF_SHIM_LOG", path)),
            }
        }
        if PIPE_IGNORED.load(Ordering::Relaxed) {
            let ignore = || {
                // SAFETY: no handler is installed.
                unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
                Ok(())
            };
            // SAFETY: a system call, which is all that there is between fork and exec.
            unsafe { command.pre_exec(ignore) };
        }
        let served = by != By::Preload && supervise::is_served(&device);
        let error = if by == By::Preload || served {
            command.exec()
        } else {
            match supervise::run(command, device, log)? {
                Outcome::Ended(status) => return Ok(status),
                Outcome::NoFilter(Errno::EBUSY) => bail!(
                    "the kernel reports this process's system calls to a supervisor already (a container's manager), and \
                     allows one; use `--by preload`, or start the command outside of it"
                ),
                Outcome::NoFilter(error) => bail!(
                    "the kernel refuses the filter of system calls that the supervisor needs: {error}; \
                     use `--by preload`"
                ),
                Outcome::NoProgram(error) => error.into(),
            }
        };
        complain!("{}: {error}", of_path(&program.path));
        Ok(ExitCode::from(126))
    }

    /// Chooses the way.
    fn way(&self, program: &Program) -> Result<By> {
        let loaded = of_path(&program.loaded);
        let (by, why) = match (self.by, By::fitting(program)) {
            (Some(by), _) => (by, "as asked for".to_owned()),
            (None, Ok(fitting)) => fitting,
            (None, Err(why)) if self.anyway => {
                complain!("{loaded} cannot be reached: {why}");
                (By::Preload, "as asked for".to_owned())
            }
            (None, Err(why)) => {
                bail!("{loaded} cannot be reached: {why} (--anyway runs it nevertheless)")
            }
        };
        if self.verbose {
            complain!("{loaded} is served {}: {why}", by.name());
        }
        Ok(by)
    }

    fn log(&self) -> Result<Log> {
        Ok(match &self.log {
            None => Log::Off,
            Some(path) if path == Path::new("stderr") => Log::Stderr,
            Some(path) => Log::File(std::path::absolute(path)?),
        })
    }
}

/// Opens the device, or says now what the program would fail with later, and less clearly.
fn open_device() -> Result<Result<Device, Finding>> {
    match Device::open() {
        Ok(device) => Ok(Ok(device)),
        Err(Error::TooManyFiles | Error::NoMemory) => {
            bail!("no descriptor is free (raise `ulimit -n`), or there is not enough memory")
        }
        Err(_) => {
            let [module, device] = [setup::module(), setup::device()];
            Ok(Err(if module.is_bad() { module } else { device }))
        }
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
