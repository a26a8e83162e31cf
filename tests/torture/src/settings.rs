// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the command line says, for the subtests, which take no arguments.

use std::sync::OnceLock;
use std::time::Duration;

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// What the command line says.
#[derive(Debug)]
pub struct Settings {
    /// How long a subtest goes on.
    pub seconds: Duration,
    /// Where random numbers begin.
    pub seed: u64,
    /// Steps of a seed.
    pub steps: usize,
    /// The numbers of the only steps to be done.
    pub only: Vec<usize>,
}

impl Settings {
    /// Sets them, once.
    pub fn set(self) {
        SETTINGS.set(self).expect("settings are set once");
    }

    /// They are set before any subtest runs.
    pub fn get() -> &'static Self {
        SETTINGS.get().expect("settings are set at the start")
    }
}
