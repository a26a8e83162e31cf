// SPDX-License-Identifier: MIT OR Apache-2.0

//! The virtio serial ports that connect the guest with the host.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use pinbuf_guest_init::Event;

/// How long a port may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);

/// Opens the port of this name, for reading and writing.
pub fn open(name: &str) -> Result<File> {
    let start = Instant::now();
    loop {
        if let Some(device) = find(name)? {
            return File::options()
                .read(true)
                .write(true)
                .open(&device)
                .with_context(|| format!("opening {device}, the port {name}"));
        }
        if start.elapsed() > PATIENCE {
            bail!("no virtio serial port is named {name}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn find(name: &str) -> Result<Option<String>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(None);
    };
    for entry in ports {
        let entry = entry?;
        // The name appears a moment after the port.
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = format!("/dev/{}", entry.file_name().to_string_lossy());
        if found.trim_end() == name && fs::exists(&device)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Sends one event.
pub fn send(control: &mut File, event: &Event) -> Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    control
        .write_all(&line)
        .context("writing to the control port")
}
