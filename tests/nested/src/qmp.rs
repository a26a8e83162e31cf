// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's control protocol.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use serde_json::{json, Value};

/// A connection.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Value>,
}

impl Qmp {
    /// Greets QEMU.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut qmp = Self {
            writer: stream.try_clone()?,
            reader: BufReader::new(stream),
            events: Vec::new(),
        };
        qmp.read().context("QEMU's greeting")?;
        // Commands that QEMU executes while its main thread waits.
        qmp.execute("qmp_capabilities", json!({"enable": ["oob"]}))?;
        Ok(qmp)
    }

    /// Fails from now on where an answer takes longer.
    pub fn set_patience(&self, patience: Duration) -> Result<()> {
        Ok(self.writer.set_read_timeout(Some(patience))?)
    }

    /// Executes one of the commands that do not need QEMU's main thread.
    pub fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"exec-oob": command, "arguments": arguments});
        writeln!(self.writer, "{request}").with_context(|| format!("QMP {command}"))?;
        self.answer(command)
    }

    /// Executes a command and returns its result.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{request}").with_context(|| format!("QMP {command}"))?;
        self.answer(command)
    }

    /// Gives QEMU a descriptor under a name.
    pub fn pass_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let request = json!({"execute": "getfd", "arguments": {"fdname": name}});
        let line = format!("{request}\n");
        let fds = [fd.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.writer.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .context("QMP getfd")?;
        ensure!(sent == line.len(), "only {sent} bytes went out");
        self.answer("getfd").map(drop)
    }

    fn answer(&mut self, command: &str) -> Result<Value> {
        loop {
            let mut answer = self.read().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            self.events.push(answer);
        }
    }

    /// Waits for an event of this name, which may have come already.
    pub fn event(&mut self, name: &str, patience: Duration) -> Result<Value> {
        let start = Instant::now();
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            if start.elapsed() > patience {
                bail!("QEMU's event {name} did not come");
            }
            // Events come with the answers to commands, too.
            self.execute("query-status", json!({}))?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
