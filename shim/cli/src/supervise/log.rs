// SPDX-License-Identifier: MIT OR Apache-2.0

//! `--log`, for what the supervisor does: lines as those of the shim.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Where lines go.
#[derive(Clone, Debug)]
pub enum Log {
    Off,
    Stderr,
    File(PathBuf),
}

impl Log {
    /// Opens it while the descriptors are there that the program inherits: it may be one of them (`/dev/fd/3`).
    pub fn open(&self) -> io::Result<Lines> {
        Ok(Lines {
            is_stderr: matches!(self, Self::Stderr),
            file: match self {
                Self::Off => None,
                Self::Stderr => Some(io::stderr().as_fd().try_clone_to_owned()?.into()),
                Self::File(path) => Some(OpenOptions::new().append(true).create(true).open(path)?),
            },
        })
    }
}

/// A log that is open.
pub struct Lines {
    is_stderr: bool,
    file: Option<File>,
}

impl Lines {
    /// Is it standard error?
    pub fn is_stderr(&self) -> bool {
        self.is_stderr
    }

    /// Writes a line, in one call, so that lines of several processes do not mix.
    pub fn line(&self, text: &str) {
        if let Some(mut file) = self.file.as_ref() {
            // A line that cannot be written is not worth an error to the program.
            let _ = file.write_all(format!("pinbuf: {text}\n").as_bytes());
        }
    }
}
