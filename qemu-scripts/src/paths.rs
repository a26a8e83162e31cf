// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where things are.  All that is made or fetched lives under `build/`.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// The root of the repository: the wrapper scripts say where it is.
pub fn root() -> &'static Path {
    ROOT.get_or_init(|| match std::env::var_os("PINBUF_ROOT") {
        Some(root) => root.into(),
        None => {
            let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
            manifest.parent().unwrap_or(manifest).to_owned()
        }
    })
}

/// Everything that is made or fetched.
pub fn build() -> PathBuf {
    root().join("build")
}

/// The outputs of builds and the consoles of guests.
pub fn logs() -> PathBuf {
    build().join("logs")
}

/// A path as the user sees it: relative to the repository if it is inside.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}
