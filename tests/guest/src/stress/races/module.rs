// SPDX-License-Identifier: MIT OR Apache-2.0

//! The module is unloaded and loaded again, again and again, while users come and go.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::kmod::{delete_module, finit_module, DeleteModuleFlags, ModuleInitFlags};

use super::{pause, race, Count};
use pinbuf_test_harness::support::memory::{stamp, PAGE};
use pinbuf_test_harness::support::{check, check_eq, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "races":
    module within 120,
}

/// The file that the module is loaded from.
fn module_file() -> Result<PathBuf> {
    let output = Command::new("modinfo")
        .args(["-n", "pinbuf"])
        .output()
        .context("running modinfo")?;
    check!(
        output.status.success(),
        "modinfo -n pinbuf: {}",
        output.status
    );
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// How users fared.
#[derive(Debug, Default)]
struct Fared {
    worked: Count,
    no_device: Count,
    leaving: Count,
}

/// Comes, uses the device if it is there, and goes.
fn user(memory: &Memory, fared: &Fared, rng: &mut fastrand::Rng) -> Result<()> {
    let device = match Device::open() {
        Ok(device) => device,
        Err(error) => match error.downcast_ref() {
            // Not there, or on its way.
            Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {
                fared.no_device.up();
                return Ok(());
            }
            _ => return Err(error),
        },
    };
    let buffer = match device.create(&[memory.range()]) {
        Ok(buffer) => buffer,
        Err(Errno::ENODEV) => {
            fared.leaving.up();
            return Ok(());
        }
        Err(error) => return Err(error).context("create"),
    };
    drop(device);
    pause(rng);
    let value = rng.u64(..);
    buffer.map()?.set(PAGE, stamp(1, value));
    check_eq!(memory.get(PAGE), stamp(1, value), "what was written");
    fared.worked.up();
    Ok(())
}

fn module() -> Result<()> {
    let file = module_file()?;
    let file = File::open(&file).with_context(|| format!("opening {}", file.display()))?;
    let load = || finit_module(&file, c"", ModuleInitFlags::empty()).context("loading the module");
    let memories = [Memory::anonymous(8 * PAGE)?, Memory::anonymous(8 * PAGE)?];
    let fared = Fared::default();
    let (unloaded, in_use) = (Count::default(), Count::default());
    let result = race(&[
        ("come and go", &|rng| user(&memories[0], &fared, rng)),
        ("come and go", &|rng| user(&memories[1], &fared, rng)),
        ("rmmod and insmod", &|rng| {
            match delete_module(c"pinbuf", DeleteModuleFlags::O_NONBLOCK) {
                Ok(()) => unloaded.up(),
                Err(Errno::EAGAIN) => {
                    in_use.up();
                    return Ok(());
                }
                Err(error) => bail!("rmmod: {error}"),
            }
            pause(rng);
            load()
        }),
    ]);
    println!(
        "# unloaded {} times, {} times in use; {} buffers, {} times no device, {} times ENODEV",
        unloaded.get(),
        in_use.get(),
        fared.worked.get(),
        fared.no_device.get(),
        fared.leaving.get()
    );
    result?;
    check!(unloaded.get() > 0, "the module was never unloaded");
    check!(fared.worked.get() > 0, "no user had a buffer");
    drop(Device::open().context("the device in the end")?);
    Ok(())
}
