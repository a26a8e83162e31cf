// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command line's settings for subtests.

use std::sync::OnceLock;
use std::time::Duration;

/// The command line, as far as subtests care.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long a race goes on.
    pub seconds: Duration,
    /// How many are killed.
    pub kills: usize,
    /// Where random numbers begin.
    pub seed: u64,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

impl Settings {
    /// Makes them known, once, before the first subtest.
    pub fn set(self) {
        SETTINGS.get_or_init(|| self);
    }

    /// As they were set.
    pub fn get() -> Self {
        *SETTINGS.get().expect("main() sets them")
    }
}
