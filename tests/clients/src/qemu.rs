// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's virtio-gpu, which looks for udmabuf when it starts with `blob=true`.

use std::process::Stdio;

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::tests;
use pinbuf_test_qmp::Qmp;
use serde_json::json;

use crate::doctor::Findings;
use crate::evidence;
use crate::process::{no_udmabuf, Start};

tests!("qemu":
    starts_on_pinbuf within 120,
    refuses_without_pinbuf within 120,
);

/// The emulator of this processor's machines, and one of these.
#[cfg(target_arch = "x86_64")]
const MACHINE: (&str, &str) = ("qemu-system-x86_64", "q35,accel=tcg,memory-backend=ram");
#[cfg(target_arch = "aarch64")]
const MACHINE: (&str, &str) = ("qemu-system-aarch64", "virt,accel=tcg,memory-backend=ram");

/// A virtual machine that does not run, with a blob device, controlled over standard streams.
fn machine() -> Start {
    Start::program(&[
        MACHINE.0,
        "-nodefaults",
        "-no-user-config",
        "-S",
        "-display",
        "none",
        "-machine",
        MACHINE.1,
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

fn starts_on_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let mut child = machine()
        .on_pinbuf()
        .by_kvm_user()
        .command()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let input = child.stdin.take().context("stdin")?;
    let output = child.stdout.take().context("stdout")?;
    let mut qmp = Qmp::new(output, input)?;
    let version = qmp.execute("query-version", json!({}))?;
    println!("# QEMU {}", version["qemu"]);
    ensure!(qmp.execute("query-status", json!({}))?["status"] == "prelaunch");
    ensure!(
        evidence::has_device(child.id())?,
        "QEMU has not opened pinbuf's device"
    );
    let findings = Findings::of_process(child.id())?;
    findings.expect("process", "good", "runs on pinbuf")?;
    qmp.execute("quit", json!({}))?;
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
