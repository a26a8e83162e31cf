// SPDX-License-Identifier: MIT OR Apache-2.0

//! Starting programs: as whom, with which limit, on pinbuf or not.

use std::fs;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use pinbuf_test_harness::support::process::USER;

/// Debian's default for RLIMIT_MEMLOCK, bytes.
pub const DEBIAN_MEMLOCK: u64 = 8 << 20;

/// A program that is to be started.
#[derive(Clone, Debug, Default)]
pub struct Start {
    before: Vec<String>,
    words: Vec<String>,
}

impl Start {
    /// A program and its arguments.
    pub fn program(words: &[&str]) -> Self {
        Self {
            before: Vec::new(),
            words: words.iter().map(|&word| word.to_owned()).collect(),
        }
    }

    /// On pinbuf, as docs/operators.md says.
    pub fn on_pinbuf(self) -> Self {
        self.on_pinbuf_with(&[])
    }

    /// The same with these options.
    pub fn on_pinbuf_with(mut self, options: &[&str]) -> Self {
        let words = ["pinbuf", "run"].iter().chain(options).chain(&["--"]);
        let words: Vec<String> = words.map(|&word| word.to_owned()).collect();
        self.words.splice(0..0, words);
        self
    }

    /// As a user without any privileges, in this group or in none.
    pub fn by_user(mut self, group: Option<&str>) -> Self {
        let uid = USER.to_string();
        let groups = group.map_or("--clear-groups".to_owned(), |name| {
            format!("--groups={name}")
        });
        let words = ["setpriv", "--reuid", &uid, "--regid", &uid, &groups];
        self.before
            .extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// As a user who may use virtual machines, with Debian's limits.
    pub fn by_kvm_user(self) -> Self {
        self.memlock(DEBIAN_MEMLOCK, DEBIAN_MEMLOCK)
            .by_user(Some("kvm"))
    }

    /// With a capability that its file does not give. Call it after [`Self::by_user`].
    pub fn give(&mut self, capability: &str) {
        for kind in ["--inh-caps", "--ambient-caps"] {
            self.before
                .extend([kind.to_owned(), format!("+{capability}")]);
        }
    }

    /// With this limit on locked memory, soft and hard, in bytes.
    pub fn memlock(mut self, soft: u64, hard: u64) -> Self {
        let limit = format!("--memlock={soft}:{hard}");
        self.before.splice(0..0, ["prlimit".to_owned(), limit]);
        self
    }

    /// The command. Every program on the way executes the next, so the number of the process that
    /// it starts is the program's.
    pub fn command(&self) -> Command {
        let mut words = self.before.iter().chain(&self.words);
        let mut command = Command::new(words.next().expect("a program has a name"));
        command
            .args(words)
            .stdin(Stdio::null())
            .current_dir("/tmp")
            .env("HOME", "/tmp")
            .env_remove("LD_PRELOAD");
        command
    }

    /// Runs it to its end.
    pub fn end(&self) -> Result<End> {
        let output = self
            .command()
            .output()
            .with_context(|| format!("starting {self:?}"))?;
        Ok(End::from(output))
    }
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct End {
    /// Its exit status, if no signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for End {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl End {
    /// Shows what it said on standard output, as remarks among the results.
    pub fn show(&self) {
        for line in self.out.lines() {
            println!("# {line}");
        }
    }
}

/// Makes this process one of a user in the group kvm.
pub fn become_kvm_user() -> Result<()> {
    let group = nix::unistd::Group::from_name("kvm")?.context("there is no group kvm")?;
    nix::unistd::setgroups(&[group.gid])?;
    let user = nix::unistd::Uid::from_raw(USER);
    nix::unistd::setresgid(USER.into(), USER.into(), USER.into())?;
    nix::unistd::setresuid(user, user, user)?;
    // Otherwise /proc/self is root's.
    nix::sys::prctl::set_dumpable(true)?;
    Ok(())
}

/// Fails unless the kernel has no udmabuf at all: what works then works through pinbuf.
pub fn no_udmabuf() -> Result<()> {
    anyhow::ensure!(
        !fs::exists("/dev/udmabuf")? && !fs::exists("/sys/class/misc/udmabuf")?,
        "there is a udmabuf: boot with initcall_blacklist=udmabuf_dev_init"
    );
    Ok(())
}
