// SPDX-License-Identifier: MIT OR Apache-2.0

//! Finding `libudmabuf_shim.so`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{bail, Result};

use crate::text::of_path;

const NAME: &str = "libudmabuf_shim.so";
/// Where packages put it.
const SYSTEM: &str = "/usr/lib/pinbuf";

/// Where it may be: next to this program (a build), beside it as installed, in the system.
fn candidates() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(here) = std::env::current_exe()
        .ok()
        .as_deref()
        .and_then(Path::parent)
    {
        places.push(here.join(NAME));
        places.push(here.join("../lib/pinbuf").join(NAME));
    }
    places.push(Path::new(SYSTEM).join(NAME));
    places
}

/// The shim's path.
pub fn find() -> Result<PathBuf> {
    let places = candidates();
    for place in &places {
        if let Ok(path) = place.canonicalize() {
            // The dynamic linker splits LD_PRELOAD there, and knows no quotes.
            if path.to_string_lossy().contains([' ', ':', '\t', '\n']) {
                bail!(
                    "{} cannot be preloaded, because its path contains a space or a colon: \
                     install it elsewhere",
                    of_path(&path)
                );
            }
            return Ok(path);
        }
    }
    let tried: Vec<_> = places.iter().map(|place| of_path(place)).collect();
    bail!(
        "{NAME} is not installed; run `make install-user`, or install its package (searched: {})",
        tried.join(", ")
    )
}

/// The value for LD_PRELOAD: the shim before what is there already.
pub fn preload(shim: &Path, before: Option<&OsStr>) -> OsString {
    let mut value = shim.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        value.push(":");
        value.push(before);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_stay_preloaded() {
        let shim = Path::new("/lib/shim.so");
        assert_eq!(preload(shim, None), "/lib/shim.so");
        assert_eq!(preload(shim, Some(OsStr::new(""))), "/lib/shim.so");
        assert_eq!(preload(shim, Some(OsStr::new("a.so"))), "/lib/shim.so:a.so");
    }
}
