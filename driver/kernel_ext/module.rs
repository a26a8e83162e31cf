// SPDX-License-Identifier: GPL-2.0

//! This module, to be held by what it gives away.
//!
//! The `module!` macro of 7.2 defines `THIS_MODULE` at the crate's root, that of 7.3 in a trait; what
//! `init` is given is the same on both, and is kept here.

use kernel::{
    prelude::*,
    sync::SetOnce, //
};

static THIS_MODULE: SetOnce<&'static ThisModule> = SetOnce::new();

/// Remembers the module, when it is loaded.
pub(crate) fn remember(module: &'static ThisModule) {
    THIS_MODULE.populate(module);
}

/// The module. `ENODEV` before [`remember`], when nobody can call it yet.
pub(crate) fn this_module() -> Result<&'static ThisModule> {
    THIS_MODULE.as_ref().copied().ok_or(ENODEV)
}
