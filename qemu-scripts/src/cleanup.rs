// SPDX-License-Identifier: MIT OR Apache-2.0

//! What has to be undone when this program is stopped by a signal.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use anyhow::Result;
use nix::sys::signal::{kill, Signal};
use nix::sys::termios::{tcsetattr, SetArg, Termios};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

#[derive(Default)]
struct Registered {
    guests: Vec<(u32, PathBuf)>,
    terminal: Option<Termios>,
}

static REGISTERED: Mutex<Registered> = Mutex::new(Registered {
    guests: Vec::new(),
    terminal: None,
});

fn registered() -> MutexGuard<'static, Registered> {
    REGISTERED.lock().unwrap_or_else(|error| error.into_inner())
}

/// A QEMU that runs, and its directory.
pub fn register(qemu: u32, directory: &Path) {
    registered().guests.push((qemu, directory.to_owned()));
}

/// A QEMU that ended.
pub fn forget(qemu: u32) {
    registered().guests.retain(|(found, _)| *found != qemu);
}

/// The terminal's settings, to be restored.
pub fn remember_terminal(settings: Termios) {
    registered().terminal = Some(settings);
}

/// Gives the terminal its settings back.
pub fn restore_terminal() {
    if let Some(settings) = registered().terminal.take() {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &settings);
    }
}

/// From now on, a signal that ends this program ends its guests, too. (Programs in trees die with this program
/// in any case, and QEMU does so if this program is killed.)
pub fn on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            restore_terminal();
            for (qemu, directory) in registered().guests.drain(..) {
                let _ = kill(Pid::from_raw(qemu as i32), Signal::SIGKILL);
                let _ = fs::remove_dir_all(directory);
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
