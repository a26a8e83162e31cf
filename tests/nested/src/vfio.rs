// SPDX-License-Identifier: MIT OR Apache-2.0

//! An nvme of the outer guest that is passed through: its data, and its change of drivers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::disk;
use crate::protocol::DiskPlan;

const DEVICES: &str = "/sys/bus/pci/devices";

/// The disk's contents: two parts of 8 MiB.
pub const PLAN: DiskPlan = DiskPlan {
    part: 8 << 20,
    read_seed: 11,
    write_seed: 23,
};

/// Loads a module.
pub fn modprobe(name: &str) -> Result<()> {
    let output = Command::new("/usr/sbin/modprobe").arg(name).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "modprobe {name}: {}",
        said.trim_end()
    );
    Ok(())
}

/// An nvme.
#[derive(Debug, Clone)]
pub struct Nvme {
    /// Its address on the bus.
    pub address: String,
}

impl Nvme {
    /// The first one.
    pub fn find() -> Result<Self> {
        for entry in fs::read_dir(DEVICES)? {
            let entry = entry?;
            let class = fs::read_to_string(entry.path().join("class"))?;
            if class.trim() == "0x010802" {
                let address = entry.file_name().to_string_lossy().into_owned();
                return Ok(Self { address });
            }
        }
        anyhow::bail!("there is no nvme: boot the outer guest with one (see runs.rs)")
    }

    fn path(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.address)
    }

    fn bind(&self, driver: &str) -> Result<()> {
        let path = self.path();
        fs::write(path.join("driver_override"), driver)?;
        if path.join("driver").exists() {
            fs::write(path.join("driver/unbind"), &self.address)?;
        }
        fs::write("/sys/bus/pci/drivers_probe", &self.address)?;
        let bound = fs::read_link(path.join("driver")).context("no driver took the nvme")?;
        ensure!(bound.ends_with(driver), "{} took the nvme", bound.display());
        Ok(())
    }

    /// Fills the part that the inner guest reads, and binds the device to vfio.
    pub fn prepare(&self) -> Result<()> {
        ensure!(
            self.path().join("iommu_group").exists(),
            "the nvme has no IOMMU group: boot with intel_iommu=on and -device intel-iommu"
        );
        for module in ["nvme", "vfio-pci", "vfio_iommu_type1"] {
            modprobe(module)?;
        }
        self.bind("nvme")?;
        let disk = disk::wait(Duration::from_secs(30))?;
        disk::write(&disk, PLAN.read_seed, 0, PLAN.part)?;
        disk::write(&disk, 0, PLAN.part, PLAN.part)?;
        self.bind("vfio-pci")
    }

    /// Binds the device to nvme again, and compares what the inner guest wrote.
    pub fn take_back(&self) -> Result<()> {
        self.bind("nvme")?;
        let disk = disk::wait(Duration::from_secs(30))?;
        disk::verify(&disk, PLAN.read_seed, 0, PLAN.part)?;
        disk::verify(&disk, PLAN.write_seed, PLAN.part, PLAN.part)
            .context("what the inner guest wrote")
    }

    /// The group's device file, which QEMU's user must be able to open.
    pub fn group(&self) -> Result<PathBuf> {
        let group = fs::read_link(self.path().join("iommu_group"))?;
        let number = group.file_name().context("a group without a number")?;
        Ok(Path::new("/dev/vfio").join(number))
    }
}
