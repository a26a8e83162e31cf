// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's virtio-gpu, which looks for udmabuf when it starts with `blob=true`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::tests;
use serde_json::{json, Value};

use crate::doctor::Findings;
use crate::evidence;
use crate::process::{no_udmabuf, Start};

tests!("qemu":
    starts_on_pinbuf within 120,
    refuses_without_pinbuf within 120,
);

/// A virtual machine that does not run, with a blob device, controlled over standard streams.
fn machine() -> Start {
    Start::program(&[
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-S",
        "-display",
        "none",
        "-machine",
        "q35,accel=tcg,memory-backend=ram",
        "-m",
        "64M",
        "-object",
        "memory-backend-memfd,id=ram,size=64M,share=on",
        "-device",
        "virtio-gpu-pci,blob=true",
        "-qmp",
        "stdio",
    ])
}

/// QEMU's control protocol.
struct Qmp {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Qmp {
    fn of(child: &mut Child) -> Result<Self> {
        let mut qmp = Self {
            to: child.stdin.take().context("stdin")?,
            from: BufReader::new(child.stdout.take().context("stdout")?),
        };
        qmp.call("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Only what is all set up answers.
    fn call(&mut self, command: &str) -> Result<Value> {
        writeln!(self.to, "{}", json!({ "execute": command }))?;
        loop {
            let mut line = String::new();
            let count = self.from.read_line(&mut line)?;
            ensure!(count > 0, "QEMU has ended");
            let mut answer: Value = serde_json::from_str(&line).context(line)?;
            if let Some(error) = answer.get("error") {
                anyhow::bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

fn starts_on_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let mut child = machine()
        .on_pinbuf()
        .by_kvm_user()
        .command()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut qmp = Qmp::of(&mut child)?;
    let version = qmp.call("query-version")?;
    println!("# QEMU {}", version["qemu"]);
    ensure!(qmp.call("query-status")?["status"] == "prelaunch");
    ensure!(
        evidence::has_device(child.id())?,
        "QEMU has not opened pinbuf's device"
    );
    let findings = Findings::of_process(child.id())?;
    findings.expect("process", "good", "runs on pinbuf")?;
    qmp.call("quit")?;
    let status = child.wait()?;
    ensure!(status.success(), "QEMU ended by {status}");
    Ok(())
}

fn refuses_without_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let end = machine().by_kvm_user().end()?;
    ensure!(end.status == Some(1), "{end:?}");
    ensure!(
        end.err
            .contains("need rutabaga or udmabuf for blob resources"),
        "{end:?}"
    );
    Ok(())
}
