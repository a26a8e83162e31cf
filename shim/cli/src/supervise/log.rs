// SPDX-License-Identifier: MIT OR Apache-2.0

//! `--log`, for what the supervisor does: lines as those of the shim.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// Where lines go.
#[derive(Clone, Debug)]
pub enum Log {
    Off,
    Stderr,
    File(PathBuf),
}

impl Log {
    /// Writes a line, in one call, so that lines of several processes do not mix.
    pub fn line(&self, text: &str) {
        let line = format!("pinbuf: {text}\n");
        // A line that cannot be written is not worth an error to the program.
        let _ = match self {
            Self::Off => Ok(()),
            Self::Stderr => std::io::stderr().write_all(line.as_bytes()),
            Self::File(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .and_then(|mut file| file.write_all(line.as_bytes())),
        };
    }
}
