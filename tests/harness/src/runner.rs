// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs subtests in processes of their own, and checks that they left nothing behind.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{setpgid, Pid};

use crate::accounts::Accounts;
use crate::support::kernel::Counters;
use crate::support::process::{Child, USER};
use crate::support::{kernel, Skip};

/// A subtest.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Theme and name.
    pub name: &'static str,
    /// What it does.
    pub run: fn() -> Result<()>,
    /// How long it may take.
    pub timeout: Duration,
    /// Parts of lines in the kernel's log that it causes on purpose, and that would otherwise fail it.
    pub allowed: &'static [&'static str],
}

impl Test {
    /// The part of its name before the dot.
    pub fn theme(&self) -> &'static str {
        self.name.split('.').next().unwrap_or_default()
    }
}

/// Makes a file's table of subtests. A name may be followed by a time limit in seconds, and by a list of lines
/// in the kernel's log that the subtest causes on purpose.
#[macro_export]
macro_rules! tests {
    (@timeout) => { 60 };
    (@timeout $seconds:literal) => { $seconds };
    (@allowed) => { &[] };
    (@allowed $allowed:expr) => { &$allowed };
    ($theme:literal: $(
        $name:ident $(within $seconds:literal)? $(allowing $allowed:expr)?
    ),* $(,)?) => {
        /// The subtests of this file.
        pub const TESTS: &[$crate::Test] = &[$($crate::Test {
            name: concat!($theme, ".", stringify!($name)),
            run: $name,
            timeout: std::time::Duration::from_secs($crate::tests!(@timeout $($seconds)?)),
            allowed: $crate::tests!(@allowed $($allowed)?),
        }),*];
    };
}

/// How one subtest ended.
#[derive(Debug)]
pub enum Outcome {
    /// It succeeded.
    Passed,
    /// It could not run, for a documented reason.
    Skipped(String),
    /// It failed: the reasons, line by line.
    Failed(Vec<String>),
}

/// With this in the environment, the run ends at the first failure. It is set for a driver in which a bug was
/// planted.
const FIRST_FAILURE_ENDS: &str = "PINBUF_FIRST_FAILURE_ENDS";

/// Runs `tests` one after the other and reports in KTAP on standard output.
pub(crate) fn report(tests: &[&Test], check_leaks: bool) -> Result<ExitCode> {
    println!("KTAP version 1");
    println!("1..{}", tests.len());
    let mut runner = Runner::new(check_leaks)?;
    let mut code = ExitCode::SUCCESS;
    for (index, test) in tests.iter().enumerate() {
        let number = index + 1;
        let start = Instant::now();
        let outcome = runner.run(test);
        println!("# {}: {} ms", test.name, start.elapsed().as_millis());
        match outcome {
            Outcome::Passed => println!("ok {number} {}", test.name),
            Outcome::Skipped(reason) => println!("ok {number} {} # SKIP {reason}", test.name),
            Outcome::Failed(lines) => {
                for line in lines {
                    println!("# {line}");
                }
                println!("not ok {number} {}", test.name);
                code = ExitCode::FAILURE;
                if runner.lost {
                    println!("Bail out! {} hangs in the kernel", test.name);
                    break;
                }
                if std::env::var_os(FIRST_FAILURE_ENDS).is_some() {
                    println!("Bail out! {} is the first failure", test.name);
                    break;
                }
            }
        }
    }
    Ok(code)
}

/// Marks a skip in the output of a child.
const SKIP_MARK: &str = "\u{1}skip\u{1}";

/// What the kernel still holds, and how the machine is set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    kernel: Counters,
    user_locked: bool,
    root_locked: bool,
    user_allowance: u64,
    root_allowance: u64,
    system_room: bool,
    parameters: Vec<(String, String)>,
}

impl State {
    fn now(accounts: &mut Accounts<2>) -> Result<Self> {
        let [user, root] = accounts.charges().context("asking for charges")?;
        Ok(Self {
            kernel: Counters::now()?,
            user_locked: user.locked,
            root_locked: root.locked,
            user_allowance: user.allowance,
            root_allowance: root.allowance,
            system_room: user.room,
            parameters: parameters()?,
        })
    }

    /// Restores settings that a killed test left changed.
    fn restore(&self) -> Result<()> {
        if kernel::field("/proc/meminfo", "HugePages_Total")? != self.kernel.huge_pages[0] {
            kernel::write("/proc/sys/vm/nr_hugepages", self.kernel.huge_pages[0])?;
        }
        for (name, value) in parameters()? {
            let before = self.parameters.iter().find(|parameter| parameter.0 == name);
            if let Some((_, before)) = before.filter(|before| before.1 != value) {
                kernel::write(format!("{PARAMETERS}/{name}"), before)?;
            }
        }
        Ok(())
    }

    /// The differences, for people.
    fn differences(&self, before: &Self) -> Vec<String> {
        let mut found = Vec::new();
        macro_rules! compare {
            ($($($field:ident).+: $what:literal),* $(,)?) => {$(
                if self.$($field).+ != before.$($field).+ {
                    found.push(format!(
                        "left behind: {}: expected {:?}, seen {:?}",
                        $what, before.$($field).+, self.$($field).+
                    ));
                }
            )*};
        }
        compare! {
            kernel.pins: "pinned pages in the system",
            kernel.dma_bufs: "dma-bufs in the system",
            kernel.module_references: "references on the module",
            kernel.bounce_slots: "bounce buffer slots",
            kernel.huge_pages: "huge pages (total, free, reserved)",
            user_locked: "locked pages of the test's user",
            root_locked: "locked pages of root",
            user_allowance: "allowance used by the test's user",
            root_allowance: "allowance used by root",
            system_room: "room in the allowance of all users",
            parameters: "the module's parameters",
        }
        found
    }
}

/// Where the module's parameters are.
const PARAMETERS: &str = "/sys/module/pinbuf/parameters";

/// The module's parameters.
fn parameters() -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(PARAMETERS)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        found.push((name, kernel::read(entry.path())?.trim().to_owned()));
    }
    found.sort();
    Ok(found)
}

/// Descriptors and accounts of this process.
fn own_state() -> Result<(Vec<String>, i64, i64)> {
    Ok((kernel::descriptors()?, kernel::vm_pin()?, kernel::vm_lck()?))
}

/// The kernel's log from here on.
struct Log(File);

impl Log {
    /// What no test may cause.
    const BAD: &'static [&'static str] = &[
        "WARNING:",
        "BUG:",
        "Oops",
        "kernel BUG",
        "DMA-API:",
        "general protection",
        "KASAN",
        "INFO: task",
        "INFO: rcu",
        "refcount_t:",
        "Bad page",
        "bad page",
        // A page table's entry that the core cannot make sense of, and has dropped.
        "bad pgd",
        "bad p4d",
        "bad pud",
        "bad pmd",
        "Call Trace",
        "possible recursive locking",
        "unable to handle",
    ];

    fn open() -> Result<Self> {
        let mut file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("opening /dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    fn bad_lines(&mut self, allowed: &[&str]) -> Vec<String> {
        let mut found = Vec::new();
        // Whether the stack that follows belongs to a line that was expected.
        let mut wanted = false;
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => break,
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    let line = text.split_once(';').map_or(&*text, |parts| parts.1);
                    let line = line.lines().next().unwrap_or_default();
                    if line.contains("invoked oom-killer")
                        || allowed.iter().any(|part| line.contains(part))
                    {
                        wanted = true;
                    } else if wanted && line.contains("Call Trace") {
                        wanted = false;
                    } else if Self::BAD.iter().any(|bad| line.contains(bad)) {
                        found.push(format!("the kernel says: {line}"));
                    }
                }
                // Records that were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    found.push(format!("reading the kernel's log: {error}"));
                    break;
                }
            }
        }
        found
    }
}

/// Runs subtests one after the other.
pub struct Runner {
    log: Log,
    check_leaks: bool,
    /// Of the tests' user, and of root.
    accounts: Accounts<2>,
    /// The state after the last test, if that was the state before it: reading it takes long on a kernel with
    /// checkers. A change that comes late is then seen after the next test.
    clean: Option<State>,
    /// A test cannot be killed. No further test can succeed, and most would hang too.
    lost: bool,
}

impl Runner {
    /// How long the kernel may take to release what a test held.
    const SETTLE: Duration = Duration::from_secs(3);

    /// Gets ready.
    pub fn new(check_leaks: bool) -> Result<Self> {
        set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
        Ok(Self {
            log: Log::open()?,
            check_leaks,
            accounts: Accounts::of([USER, 0]),
            clean: None,
            lost: false,
        })
    }

    /// Runs one.
    pub fn run(&mut self, test: &Test) -> Outcome {
        self.try_run(test)
            .unwrap_or_else(|error| Outcome::Failed(vec![format!("{error:#}")]))
    }

    fn try_run(&mut self, test: &Test) -> Result<Outcome> {
        let before = match (self.check_leaks, self.clean.take()) {
            (false, _) => None,
            (true, Some(state)) => Some(state),
            (true, None) => Some(State::now(&mut self.accounts).context("before")?),
        };
        let mut outcome = self.run_alone(test)?;
        if self.lost {
            return Ok(outcome);
        }
        let mut faults = Vec::new();
        if let Some(before) = before {
            let left = self.left_behind(&before)?;
            if left.is_empty() {
                self.clean = Some(before);
            } else {
                faults.extend(left);
                before.restore()?;
            }
        }
        faults.extend(self.log.bad_lines(test.allowed));
        if !faults.is_empty() {
            let mut lines = match outcome {
                Outcome::Failed(lines) => lines,
                Outcome::Passed | Outcome::Skipped(_) => Vec::new(),
            };
            lines.extend(faults);
            outcome = Outcome::Failed(lines);
        }
        Ok(outcome)
    }

    /// Runs it in a process group of its own, which does not outlive it.
    fn run_alone(&mut self, test: &Test) -> Result<Outcome> {
        let child = Child::run(|| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            let before = own_state()?;
            if let Err(error) = (test.run)() {
                if let Some(Skip(reason)) = error.downcast_ref::<Skip>() {
                    bail!("{SKIP_MARK}{reason}");
                }
                return Err(error);
            }
            let after = own_state()?;
            if before != after {
                bail!(
                    "left behind in the process (descriptors, VmPin, VmLck): \
                     expected {before:?}, seen {after:?}"
                );
            }
            Ok(())
        })?;
        let group = child.pid();
        // The child does the same; the order of the two does not matter.
        let _ = setpgid(group, group);
        let ended = child.end(test.timeout);
        // A child that still runs is dropped, hence killed, by now.
        let _ = killpg(group, Signal::SIGKILL);
        self.lost = ended.is_err()
            && waitpid(group, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive);
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
        Ok(match ended {
            Ok((WaitStatus::Exited(_, 0), _)) => Outcome::Passed,
            Ok((WaitStatus::Exited(..), said)) => match said.strip_prefix(SKIP_MARK) {
                Some(reason) => Outcome::Skipped(reason.to_owned()),
                None => Outcome::Failed(said.lines().map(str::to_owned).collect()),
            },
            Ok((status, said)) => Outcome::Failed(vec![format!("ended by {status:?} {said}")]),
            Err(error) => Outcome::Failed(vec![format!("{error:#}")]),
        })
    }

    /// Waits for the state before the test, and returns what still differs at the end.
    fn left_behind(&mut self, before: &State) -> Result<Vec<String>> {
        let deadline = Instant::now() + Self::SETTLE;
        loop {
            while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
            {
            }
            let now = State::now(&mut self.accounts).context("after")?;
            let found = now.differences(before);
            if found.is_empty() || Instant::now() > deadline {
                return Ok(found);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
