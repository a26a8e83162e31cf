// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's control protocol. The crate qapi parses events and results by the schema of one version of QEMU, and
//! fails on what a newer version adds. It also sends neither out-of-band commands without an asynchronous
//! runtime, nor descriptors.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use serde_json::{json, Value};

/// A connection, over a socket if nothing else is said.
#[derive(Debug)]
pub struct Qmp<R = UnixStream, W = UnixStream> {
    reader: BufReader<R>,
    writer: W,
    /// Events that nobody asked for yet.
    events: Vec<Value>,
}

impl<R: Read, W: Write> Qmp<R, W> {
    /// Negotiates with QEMU on streams that it serves.
    pub fn new(reader: R, writer: W) -> Result<Self> {
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            events: Vec::new(),
        };
        let greeting = qmp.read().context("QEMU's greeting")?;
        // All that is offered: the commands that QEMU executes while its main thread waits ("oob").
        let offered = &greeting["QMP"]["capabilities"];
        qmp.execute("qmp_capabilities", json!({"enable": offered}))?;
        Ok(qmp)
    }

    /// Executes a command and returns its result.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send("execute", command, arguments)
    }

    /// Executes one of the commands that do not need QEMU's main thread.
    pub fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send("exec-oob", command, arguments)
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

    /// The events that nobody has asked for yet.
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    fn send(&mut self, how: &str, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({how: command, "arguments": arguments});
        writeln!(self.writer, "{request}").with_context(|| format!("QMP {command}"))?;
        self.answer(command)
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

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        serde_json::from_str(&line).context(line)
    }
}

impl Qmp {
    /// Negotiates with QEMU. An answer that takes longer than `patience` is an error.
    pub fn over(socket: UnixStream, patience: Duration) -> Result<Self> {
        socket.set_read_timeout(Some(patience))?;
        Self::new(socket.try_clone()?, socket)
    }

    /// Changes how long an answer may take.
    pub fn set_patience(&self, patience: Duration) -> Result<()> {
        Ok(self.writer.set_read_timeout(Some(patience))?)
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
        ensure!(sent == line.len(), "only {sent} bytes of getfd were sent");
        self.answer("getfd").map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;
    const DONE: &str = r#"{"return": {}}"#;

    /// A connection to a QEMU that says these lines, whatever it is asked; and what it was asked.
    fn session(lines: &[&str]) -> Result<Qmp<std::io::Cursor<Vec<u8>>, Vec<u8>>> {
        let text = lines.join("\n") + "\n";
        Qmp::new(std::io::Cursor::new(text.into_bytes()), Vec::new())
    }

    fn requests(written: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(written).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn events_are_kept_until_they_are_asked_for() {
        let stop = r#"{"event": "STOP", "timestamp": {}}"#;
        let status = r#"{"return": {"status": "paused"}}"#;
        let mut qmp = session(&[GREETING, DONE, stop, status]).unwrap();
        let answer = qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(answer["status"], "paused");
        assert_eq!(qmp.event("STOP", Duration::ZERO).unwrap()["event"], "STOP");
        let error = qmp.event("STOP", Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("did not come"), "{error}");
    }

    #[test]
    fn errors_name_the_command() {
        let refused = r#"{"error": {"class": "GenericError", "desc": "no such device"}}"#;
        let mut qmp = session(&[GREETING, DONE, refused]).unwrap();
        let error = qmp.execute("device_del", json!({"id": "x"})).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("device_del") && text.contains("no such device"));
        let error = qmp.execute("quit", json!({})).unwrap_err();
        assert!(format!("{error:#}").contains("closed"), "{error:#}");
    }

    #[test]
    fn requests_are_those_of_the_protocol() {
        let mut qmp = session(&[GREETING, DONE, DONE, DONE]).unwrap();
        qmp.execute("cont", json!({})).unwrap();
        qmp.execute_out_of_band("migrate-pause", json!({})).unwrap();
        assert_eq!(
            requests(&qmp.writer),
            [
                json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}),
                json!({"execute": "cont", "arguments": {}}),
                json!({"exec-oob": "migrate-pause", "arguments": {}}),
            ]
        );
    }
}
