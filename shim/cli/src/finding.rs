// SPDX-License-Identifier: MIT OR Apache-2.0

//! What was looked at, and what came of it.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing is to be done.
    Good,
    /// It works, but not everything, or not everywhere.
    Note,
    /// Something is to be done.
    Bad,
}

/// Something that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub what: &'static str,
    pub state: State,
    /// What was found.
    pub text: String,
    /// What can be done about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// Does it keep pinbuf from working?
    pub fn is_bad(&self) -> bool {
        self.state == State::Bad
    }
}

/// What is as it should be.
pub fn good(what: &'static str, text: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Good,
        text: text.into(),
        remedy: None,
    }
}

/// What works only in part, and what can be done.
pub fn note(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Note,
        text: text.into(),
        remedy: Some(remedy.into()),
    }
}

/// What does not work, and what can be done.
pub fn bad(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Bad,
        text: text.into(),
        remedy: Some(remedy.into()),
    }
}
