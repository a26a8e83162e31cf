// SPDX-License-Identifier: GPL-2.0

//! The reference to this module that its dma-bufs need in order to keep it loaded.
//!
//! The `module!` macro of 7.2 defines `THIS_MODULE` at the crate's root, that of 7.3 in a trait.
//! The reference that `init` gets is the same on both, and is stored here.

use kernel::{
    prelude::*,
    sync::SetOnce, //
};

static THIS_MODULE: SetOnce<&'static ThisModule> = SetOnce::new();

/// Stores the reference, when the module is loaded.
pub(crate) fn remember(module: &'static ThisModule) {
    THIS_MODULE.populate(module);
}

/// The module. Fails with `ENODEV` before [`remember`], when the device does not exist yet.
pub(crate) fn this_module() -> Result<&'static ThisModule> {
    THIS_MODULE.as_ref().copied().ok_or(ENODEV)
}
