// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the files of a kernel are.

use std::path::{Path, PathBuf};

use crate::paths;

/// Where a kernel's files are.
pub fn directory(release: &str) -> PathBuf {
    paths::build().join("kernels").join(release)
}

/// Where the modules of a release are below a root.
pub fn modules(root: &Path, release: &str) -> PathBuf {
    root.join("usr/lib/modules").join(release)
}
