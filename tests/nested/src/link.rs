// SPDX-License-Identifier: MIT OR Apache-2.0

//! The connection to the first process of the inner guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use crate::pattern::Pattern;
use crate::protocol::{Answer, Request};

/// How long the inner guest may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A screen as the guest has set it up.
#[derive(Debug, Clone, Copy)]
pub struct Shown {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
}

impl Shown {
    /// The picture of this frame.
    pub fn pattern(self, frame: u32) -> Pattern {
        Pattern {
            width: self.width,
            height: self.height,
            frame,
        }
    }
}

/// A connection with the guest's serial port.
pub struct Link {
    lines: BufReader<UnixStream>,
    to: UnixStream,
}

impl Link {
    /// Connects the host's end.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            lines: BufReader::new(stream.try_clone()?),
            to: stream,
        })
    }

    /// Waits until the guest has booted.
    pub fn wait_ready(&mut self) -> Result<()> {
        match self.receive()? {
            Answer::Ready => Ok(()),
            other => bail!("the inner guest is not ready: {other:?}"),
        }
    }

    /// Sends a request to the guest, and returns the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.to
            .write_all(&line)
            .context("writing to the inner guest")?;
        match self.receive().with_context(|| format!("{request:?}"))? {
            Answer::Failed(reason) => bail!("the inner guest, {request:?}: {reason}"),
            // It says this when it has booted.
            Answer::Ready => bail!("the inner guest has restarted; the request was {request:?}"),
            answer => Ok(answer),
        }
    }

    /// Lets the guest set up its screen.
    pub fn show(&mut self, request: &Request) -> Result<Shown> {
        match self.ask(request)? {
            Answer::Shown { width, height } => Ok(Shown { width, height }),
            other => bail!("{request:?}: {other:?}"),
        }
    }

    fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        ensure!(
            read.as_ref().is_ok_and(|&count| count > 0),
            "the inner guest is silent ({read:?})"
        );
        Ok(serde_json::from_str(&line)?)
    }
}
