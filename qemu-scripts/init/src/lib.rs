// SPDX-License-Identifier: MIT OR Apache-2.0

//! The messages between the host and a guest's first process.
//!
//! The host writes [`Config`] as JSON into the initramfs.  Host and guest then talk through virtio
//! serial ports: one for each of the command's standard streams, and one ([`port::CONTROL`]) that
//! carries lines: from the guest [`Event`]s, from the host [`Request`]s.

use serde::{Deserialize, Serialize};

/// Where the initramfs holds the [`Config`].
pub const CONFIG_PATH: &str = "/config.json";

/// The directory of the initramfs that holds the modules that the boot itself needs.
pub const BOOT_MODULES: &str = "/boot-modules";

/// The last line that the guest writes to the kernel's log.
pub const END_MARK: &str = "pinbuf-guest: end of run";

/// The names of the virtio serial ports.
pub mod port {
    /// Lines of JSON, both ways.
    pub const CONTROL: &str = "pinbuf.control";
    /// The command's standard input, in frames: the length as a little-endian u32, then the bytes;
    /// an empty frame is the end of file.
    pub const STDIN: &str = "pinbuf.stdin";
    /// The command's standard output.
    pub const STDOUT: &str = "pinbuf.stdout";
    /// The command's standard error.
    pub const STDERR: &str = "pinbuf.stderr";
}

/// What a guest does after it has booted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Config {
    /// Files below [`BOOT_MODULES`], in the order in which they are loaded.
    pub boot_modules: Vec<String>,
    /// Serial numbers of the virtio disks that make up the root, topmost first.  Each is an ext4
    /// file system; the root is an overlay of them, with memory on top.
    pub layers: Vec<String>,
    /// A directory of the host.
    pub share: Option<Share>,
    /// Modules that are loaded by name before the command runs.
    pub modules: Vec<String>,
    /// The command, or a shell on a terminal when there is none.
    pub command: Vec<String>,
    /// Where the command runs.
    pub directory: String,
    /// Environment variables of the command.
    pub environment: Vec<(String, String)>,
    /// Whether to let kmemleak, where the kernel has it, look for leaks after the command.
    pub check_leaks: bool,
    /// The size of the terminal (rows, columns), when the command runs on one.
    pub terminal: Option<(u16, u16)>,
}

/// A directory of the host, seen in the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Share {
    /// The name under which the host offers it.
    pub tag: String,
    /// Where it is mounted.
    pub path: String,
    /// How it is shared.
    pub sharing: Sharing,
}

/// How a directory is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// By QEMU.
    NineP,
    /// By a process beside QEMU, for kernels without 9p.
    VirtioFs,
}

/// What the guest reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The command is about to run.
    Ready,
    /// The command ended with this status.
    Exited(i32),
    /// The command was killed by this signal.
    Killed(i32),
    /// The guest could not be set up.
    Failed(String),
}

/// What the host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Write the stacks of blocked tasks and of all CPUs to the kernel's log.
    DumpTasks,
    /// The terminal's new size: rows, columns.
    Resize(u16, u16),
}
