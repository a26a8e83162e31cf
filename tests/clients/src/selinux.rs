// SPDX-License-Identifier: MIT OR Apache-2.0

//! SELinux, with a policy that lets a domain use one type of device and not the other. The kernel's command line needs
//! `security=selinux`: the row `selinux`.

use std::fs;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, MsFlags};
use pinbuf_test_harness::tests;

use crate::doctor::{Findings, Running};
use crate::process::Start;

tests!("selinux":
    doctor_names_the_rights_that_are_missing,
    the_device_s_type_is_enough,
);

const POLICY: &str = include_str!("selinux.cil");
const KERNEL: &str = "/sys/fs/selinux";

/// Loads the policy, and gives the device a type.
fn prepare(device: &str) -> Result<()> {
    let none: Option<&str> = None;
    if !fs::exists(format!("{KERNEL}/load"))? {
        mount(none, KERNEL, Some("selinuxfs"), MsFlags::empty(), none)?;
    }
    fs::write("/tmp/policy.cil", POLICY)?;
    let words = [
        "-o",
        "/tmp/policy",
        "-f",
        "/tmp/contexts",
        "/tmp/policy.cil",
    ];
    let output = Command::new("secilc").args(words).output()?;
    ensure!(output.status.success(), "secilc: {output:?}");
    fs::write(format!("{KERNEL}/load"), fs::read("/tmp/policy")?).context("loading the policy")?;
    fs::write(format!("{KERNEL}/enforce"), "1")?;
    let context = format!("user_u:any_r:{device}\0");
    // SAFETY: terminated strings, of which the value has this length.
    let result = unsafe {
        libc::setxattr(
            c"/dev/pinbuf".as_ptr(),
            c"security.selinux".as_ptr(),
            context.as_ptr().cast(),
            context.len(),
            0,
        )
    };
    Errno::result(result).context("giving the device a type")?;
    Ok(())
}

/// A command in the confined domain.
fn confined(command: &str) -> Start {
    let script = format!("printf user_u:any_r:confined_t > /proc/self/attr/exec; exec {command}");
    Start::program(&["sh", "-c", &script])
}

fn doctor_names_the_rights_that_are_missing() -> Result<()> {
    prepare("device_t")?;
    let text = "context user_u:any_r:confined_t, and /dev/pinbuf has user_u:any_r:device_t: no right to open, write, ioctl";
    let findings = Findings::from(confined("pinbuf doctor --json"))?;
    findings.expect("device", "bad", text)?;
    findings.expect(
        "device",
        "bad",
        "semanage fcontext -a -t kvm_device_t /dev/pinbuf",
    )?;
    // A process in that domain, and the log of the attempt.
    let findings = Running::echo(&confined("cat"), true)?.findings()?;
    findings.expect("process", "bad", text)?;
    findings.expect("SELinux", "good", "context user_u:any_r:kernel_t")?;
    let findings = Findings::from(Start::program(&["pinbuf", "doctor", "--json"]))?;
    findings.expect("kernel log", "note", "SELinux refused: audit: ")?;
    let end = confined("pinbuf run -- pinbuf-udmabuf-client").end()?;
    ensure!(end.status == Some(125) && end.err.contains(text), "{end:?}");
    Ok(())
}

fn the_device_s_type_is_enough() -> Result<()> {
    prepare("kvm_device_t")?;
    let findings = Findings::from(confined("pinbuf doctor --json"))?;
    findings.expect(
        "SELinux",
        "good",
        "/dev/pinbuf has user_u:any_r:kvm_device_t",
    )?;
    let end = confined("pinbuf run -- pinbuf-udmabuf-client").end()?;
    ensure!(
        end.status == Some(0) && end.out == "33177600 bytes by pinbuf\n",
        "{end:?}"
    );
    Ok(())
}
