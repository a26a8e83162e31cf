// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device as udev gives it, with the rule that pinbuf is installed with.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::unistd::Group;

const RULE: &str = include_str!("../../../packaging/60-pinbuf.rules");

/// How long udev may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Installs the rule as `make install` does, starts udev, and waits until it has seen to the device.
pub fn install() -> Result<()> {
    if is_for_kvm()? {
        return Ok(());
    }
    fs::write("/usr/lib/udev/rules.d/60-pinbuf.rules", RULE).context("installing udev's rule")?;
    if !fs::exists("/run/udev/control")? {
        run(Command::new("/usr/lib/systemd/systemd-udevd").arg("--daemon"))?;
    }
    // The daemon may be there before it takes requests.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = run(Command::new("udevadm").args(["control", "--reload"])) {
        ensure!(Instant::now() < deadline, error);
        std::thread::sleep(Duration::from_millis(200));
    }
    run(Command::new("udevadm").args(["trigger", "/dev/pinbuf"]))?;
    wait()
}

/// Has udev make the link `/dev/udmabuf`, or remove it, by the line of the rule that is off, as docs/installing.md says.
pub fn link(wanted: bool) -> Result<()> {
    const COPY: &str = "/etc/udev/rules.d/61-pinbuf-link.rules";
    if wanted {
        let line = RULE.lines().last().and_then(|line| line.strip_prefix('#'));
        fs::write(COPY, line.context("the rule's last line is not off")?)?;
    } else {
        fs::remove_file(COPY)?;
    }
    run(Command::new("udevadm").args(["control", "--reload"]))?;
    run(Command::new("udevadm").args(["trigger", "--settle", "/dev/pinbuf"]))?;
    ensure!(
        fs::exists("/dev/udmabuf")? == wanted,
        "udev has not {} the link",
        if wanted { "made" } else { "removed" }
    );
    Ok(())
}

/// Waits until udev has seen to the device, as after loading the module.
pub fn wait() -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_for_kvm()? {
        ensure!(
            Instant::now() < deadline,
            "udev did not give /dev/pinbuf to the group kvm"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Whether the device is the group's, as the rule says.
fn is_for_kvm() -> Result<bool> {
    let group = Group::from_name("kvm")?.context("there is no group kvm")?;
    Ok(fs::metadata("/dev/pinbuf")
        .is_ok_and(|device| device.gid() == group.gid.as_raw() && device.mode() & 0o777 == 0o660))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
