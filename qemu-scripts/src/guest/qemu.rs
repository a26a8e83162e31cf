// SPDX-License-Identifier: MIT OR Apache-2.0

//! The QEMU of the tree of tools, run on the host: its version does not depend on the host's.

use std::fs;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::debian::arch::Arch;
use crate::debian::tree::Tree;

/// How long QEMU may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

const LIBRARIES: [&str; 4] = [
    "usr/lib/x86_64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "usr/lib",
    "lib",
];
const DATA: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// A program of the tree, run by the tree's own loader, with its own libraries, on the host's files.
fn program(tree: &Tree, name: &str) -> Command {
    let library_path: Vec<String> = LIBRARIES
        .iter()
        .map(|path| tree.path.join(path).display().to_string())
        .collect();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    command.arg(tree.path.join("lib64/ld-linux-x86-64.so.2"));
    command.args(["--library-path", &library_path.join(":")]);
    command.arg(tree.path.join("usr/bin").join(name));
    command
}

/// QEMU without any device, and the arguments that all guests share.
///
/// With `icount` the guest's clock counts its instructions, which needs one thread for all of its
/// processors.
pub fn command(tree: &Tree, arch: Arch, icount: bool) -> Command {
    let mut command = program(tree, emulator(arch));
    for directory in DATA {
        command.arg("-L").arg(tree.path.join(directory));
    }
    command.env(
        "QEMU_MODULE_DIR",
        tree.path.join("usr/lib/x86_64-linux-gnu/qemu"),
    );
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ]);
    let accelerator = if icount {
        "tcg,thread=single"
    } else {
        "tcg,thread=multi"
    };
    command.args(["-accel", accelerator, "-cpu", processor(arch)]);
    command
}

/// The program that emulates an architecture.
fn emulator(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "qemu-system-x86_64",
        Arch::Arm64 => "qemu-system-aarch64",
    }
}

/// What is emulated at the least cost.
fn processor(arch: Arch) -> &'static str {
    match arch {
        // Without these two features, memory is copied and cleared by eight bytes at a time, and not by one:
        // the emulator counts and executes each as a step.
        Arch::Amd64 => "max,-erms,-fsrm",
        // The architecture's own algorithm for signing pointers takes a third of the emulator's time.
        Arch::Arm64 => "max,pauth-impdef=on",
    }
}

/// The machine.
pub fn machine(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "q35",
        Arch::Arm64 => "virt,gic-version=3",
    }
}

/// Parameters of the kernel's command line for this machine.
pub fn cmdline(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "console=ttyS0 no_timer_check tsc=reliable",
        Arch::Arm64 => "console=ttyAMA0",
    }
}

/// The process that shares a directory by virtiofs.  It ends when QEMU closes the socket.
pub fn share(tree: &Tree, directory: &Path, socket: &Path, messages: &Path) -> Result<Child> {
    tree.require("virtiofs", &["virtiofsd"])?;
    // The package's own place for it is not in PATH.
    let mut command = program(tree, "../libexec/virtiofsd");
    command
        .arg("--shared-dir")
        .arg(directory)
        .arg("--socket-path")
        .arg(socket);
    // Host and guest root are one: what the guest does is what the one who started it may do.
    command.args(["--sandbox", "none", "--log-level", "error"]);
    let mut child = spawn(&mut command, messages)?;
    let start = Instant::now();
    while !socket.exists() {
        if child.try_wait()?.is_some() || start.elapsed() > PATIENCE {
            let _ = child.kill();
            bail!(
                "virtiofsd did not start:\n{}",
                fs::read_to_string(messages)?.trim_end()
            );
        }
        sleep(Duration::from_millis(5));
    }
    Ok(child)
}

/// Sockets that QEMU connects to when it starts.
pub struct Sockets {
    directory: PathBuf,
    listeners: Vec<(String, UnixListener)>,
}

impl Sockets {
    /// Sockets in this directory, whose path is to be short.
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            listeners: Vec::new(),
        }
    }

    /// Adds one, and returns its path.
    pub fn add(&mut self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("making the socket {}", path.display()))?;
        listener.set_nonblocking(true)?;
        self.listeners.push((name.to_owned(), listener));
        Ok(path)
    }

    /// Waits until QEMU is connected to all, in the order in which they were made.
    pub fn accept(self, qemu: &mut Child, messages: &Path) -> Result<Vec<UnixStream>> {
        let start = Instant::now();
        let mut streams = Vec::new();
        for (name, listener) in self.listeners {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false)?;
                        streams.push(stream);
                        break;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
                if let Some(status) = qemu.try_wait()? {
                    let said = fs::read_to_string(messages).unwrap_or_default();
                    bail!("QEMU did not start ({status}):\n{}", said.trim_end());
                }
                if start.elapsed() > PATIENCE {
                    bail!("QEMU did not connect to the socket `{name}`");
                }
                sleep(Duration::from_millis(5));
            }
        }
        Ok(streams)
    }
}

/// Starts a program whose output goes to a file.
pub fn spawn(command: &mut Command, messages: &Path) -> Result<Child> {
    let file = fs::File::create(messages)?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    command
        .spawn()
        .context("starting `setpriv` (of the package util-linux)")
}
