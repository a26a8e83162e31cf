// SPDX-License-Identifier: MIT OR Apache-2.0

//! Running a case in a process of its own, and judging what it saw.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use crate::cases::Case;

/// What a case saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The case.
    pub name: String,
    /// What the call returned: `fd` for a descriptor, else a number.
    pub ret: String,
    /// The name of `errno` if the call failed.
    pub errno: String,
    /// What else was seen: of the buffer, for example.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
    /// Who made the buffers, if it was asked.
    #[serde(default)]
    pub made_by: Option<String>,
    /// Why the case could not be tried here.
    #[serde(default)]
    pub skipped: Option<String>,
}

impl Outcome {
    /// From a call that returns a descriptor.
    pub fn of(result: &std::io::Result<i32>) -> Self {
        let (ret, errno) = match result {
            Ok(_) => ("fd".to_owned(), String::new()),
            Err(error) => ("-1".to_owned(), errno_name(error)),
        };
        Self {
            ret,
            errno,
            ..Self::default()
        }
    }

    /// From a call that returns a number.
    pub fn number(result: &std::io::Result<i32>) -> Self {
        let mut outcome = Self::of(result);
        if let Ok(number) = result {
            outcome.ret = number.to_string();
        }
        outcome
    }

    /// Adds something that was seen.
    pub fn fact(&mut self, name: &str, value: impl ToString) {
        self.facts.insert(name.to_owned(), value.to_string());
    }
}

/// The name of an error's number.
pub fn errno_name(error: &std::io::Error) -> String {
    let number = error.raw_os_error().unwrap_or(0);
    let known = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::ENODEV, "ENODEV"),
        (libc::EINVAL, "EINVAL"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EEXIST, "EEXIST"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EOVERFLOW, "EOVERFLOW"),
        (libc::EBADFD, "EBADFD"),
        (libc::E2BIG, "E2BIG"),
    ];
    match known.iter().find(|(value, _)| *value == number) {
        Some((_, name)) => (*name).to_owned(),
        None => number.to_string(),
    }
}

/// What a case should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The call succeeds, and every fact that is true or false is true.
    Success,
    /// The call fails with this error.
    Error(&'static str),
    /// udmabuf's limits, as they are by default, say EINVAL; without them the call succeeds.
    Limit,
    /// There is nothing to expect: the two are compared.
    Compared,
}

/// A judgement.
pub enum Verdict {
    Pass,
    Skip(String),
    Fail(String),
}

impl Expect {
    /// Judges an outcome.
    pub fn verdict(self, outcome: &Outcome) -> Verdict {
        if let Some(why) = &outcome.skipped {
            return Verdict::Skip(why.clone());
        }
        let failed = outcome.ret == "-1";
        let wrong = outcome.facts.iter().find(|(_, value)| *value == "false");
        let right = match self {
            Self::Success => !failed && wrong.is_none(),
            Self::Error(errno) => failed && outcome.errno == errno,
            Self::Limit => (failed && outcome.errno == "EINVAL") || (!failed && wrong.is_none()),
            Self::Compared => true,
        };
        if right && outcome.ret != "crash" {
            return Verdict::Pass;
        }
        let seen = match (outcome.errno.as_str(), wrong) {
            ("", Some((name, _))) => format!("{} but not {name}", outcome.ret),
            ("", None) => outcome.ret.clone(),
            (errno, _) => errno.to_owned(),
        };
        Verdict::Fail(format!("expected {self:?}, saw {seen}"))
    }
}

/// The descriptor to which a case's result is written; where it disturbs no count of descriptors.
pub const RESULT: i32 = 900;

/// Runs a case in a child.
pub fn isolated(case: &Case) -> Result<Outcome> {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written to `ends`.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        bail!("pipe: {}", std::io::Error::last_os_error());
    }
    // SAFETY: this process has one thread, so the child may go on as any program.
    let child = unsafe { libc::fork() };
    if child < 0 {
        bail!("fork: {}", std::io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: no memory is involved.
        let far = unsafe { libc::fcntl(ends[1], libc::F_DUPFD_CLOEXEC, RESULT) };
        for fd in ends {
            // SAFETY: these ends are not used any more.
            unsafe { libc::close(fd) };
        }
        // SAFETY: a new copy that nothing else owns.
        let mut to = unsafe { File::from_raw_fd(far) };
        // SAFETY: no memory is involved; a call that waits for ever is a result too.
        unsafe { libc::alarm(120) };
        let outcome = match (case.run)() {
            Ok(outcome) => outcome,
            Err(error) => Outcome {
                ret: "-1".to_owned(),
                errno: format!("setup: {error:#}"),
                ..Outcome::default()
            },
        };
        let written = serde_json::to_vec(&outcome).is_ok_and(|text| to.write_all(&text).is_ok());
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(i32::from(!written)) };
    }
    // SAFETY: the child's end.
    unsafe { libc::close(ends[1]) };
    // SAFETY: our end, which nothing else owns.
    let mut from = unsafe { File::from_raw_fd(ends[0]) };
    let mut text = Vec::new();
    from.read_to_end(&mut text)?;
    let mut status = 0;
    // SAFETY: the status is written to `status`.
    if unsafe { libc::waitpid(child, &mut status, 0) } != child {
        bail!("waitpid: {}", std::io::Error::last_os_error());
    }
    let mut outcome: Outcome = if libc::WIFSIGNALED(status) {
        let signal = format!("signal {}", libc::WTERMSIG(status));
        Outcome {
            ret: "crash".to_owned(),
            errno: signal,
            ..Outcome::default()
        }
    } else {
        serde_json::from_slice(&text).with_context(|| format!("the result of {}", case.name))?
    };
    outcome.name.clone_from(&case.name);
    Ok(outcome)
}
