// SPDX-License-Identifier: MIT OR Apache-2.0

//! The versions of this command and of the loaded module, which are released together.

use std::fs;

use crate::text;

/// The version of this command.
pub const OWN: &str = env!("CARGO_PKG_VERSION");

/// What to do about two versions.
pub const REMEDY: &str =
    "install pinbuf and pinbuf-dkms in the same version, then restart the system, or `modprobe -r pinbuf \
     && modprobe pinbuf` as root while no program uses pinbuf";

/// A line of the loaded module below /sys/module.
fn of_module(name: &str) -> Option<String> {
    let value = fs::read(format!("/sys/module/pinbuf/{name}")).ok()?;
    Some(text::of_bytes(value.trim_ascii()))
}

/// The version of the loaded module.
pub fn loaded() -> Option<String> {
    of_module("version")
}

/// What `pinbuf --version` prints after the command's name.
pub fn text() -> String {
    describe(loaded().as_deref(), of_module("srcversion").as_deref())
}

fn describe(module: Option<&str>, source: Option<&str>) -> String {
    let Some(module) = module else {
        return format!("{OWN}\nmodule: not loaded, or older than 0.1");
    };
    let source = source.unwrap_or("unknown");
    let line = format!("{OWN}\nmodule: {module}, loaded, srcversion {source}");
    if module == OWN {
        line
    } else {
        format!("{line}\nThe versions differ: {REMEDY}.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_differ_are_reported() {
        assert!(!describe(Some(OWN), Some("ABC")).contains("differ"));
        assert!(describe(Some("0.0.1"), Some("ABC")).contains("differ"));
        assert!(describe(None, None).contains("not loaded"));
    }
}
