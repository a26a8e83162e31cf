// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf doctor`: what it says of programs that the shim cannot reach, and that it is true.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::tests;
use serde_json::Value;

use crate::process::Start;

tests!("doctor":
    finds_nothing_bad_for_a_good_program,
    knows_set_user_id_programs,
    knows_programs_with_capabilities,
    knows_static_programs,
    knows_go_programs,
    knows_32_bit_programs,
    knows_profiles_that_refuse_the_device,
    knows_profiles_that_allow_it,
    knows_processes_that_were_started_securely,
    knows_processes_without_the_shim,
);

/// The program written for udmabuf.
const CLIENT: &str = "/usr/bin/pinbuf-udmabuf-client";

/// What the doctor found.
#[derive(Debug)]
pub struct Findings {
    all: Vec<Value>,
    status: Option<i32>,
}

impl Findings {
    fn from(start: Start) -> Result<Self> {
        let end = start.end()?;
        let all = serde_json::from_str(&end.out).with_context(|| format!("{end:?}"))?;
        Ok(Self {
            all,
            status: end.status,
        })
    }

    /// Of a program, as the user sees it who would start it.
    fn of_program(program: &str) -> Result<Self> {
        Self::from(Start::program(&["pinbuf", "doctor", "--json", program]).by_kvm_user())
    }

    /// Of a process, as root sees it.
    pub fn of_process(pid: u32) -> Result<Self> {
        let pid = pid.to_string();
        Self::from(Start::program(&[
            "pinbuf", "doctor", "--json", "--pid", &pid,
        ]))
    }

    /// Fails unless this was found, and the exit status tells whether anything bad was.
    pub fn expect(&self, what: &str, state: &str, text: &str) -> Result<()> {
        let found = self.all.iter().any(|finding| {
            let says = |field: &str| {
                finding[field]
                    .as_str()
                    .is_some_and(|seen| seen.contains(text))
            };
            finding["what"] == what && finding["state"] == state && (says("text") || says("mend"))
        });
        ensure!(
            found,
            "no {state} finding on {what} with {text:?} in {self:#?}"
        );
        let bad = self.all.iter().any(|finding| finding["state"] == "bad");
        ensure!(self.status == Some(i32::from(bad)), "{self:#?}");
        Ok(())
    }
}

/// A copy of a program, removed when dropped.
struct Copy(String);

impl Copy {
    fn of(program: &str, name: &str) -> Result<Self> {
        let path = format!("/usr/local/bin/{name}");
        fs::copy(program, &path).with_context(|| format!("copying {program}"))?;
        Ok(Self(path))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn run(words: &[&str]) -> Result<()> {
    let end = Start::program(words).end()?;
    ensure!(end.status == Some(0), "{words:?}: {end:?}");
    Ok(())
}

/// Fails unless the program, started with the shim, looks for the kernel's own udmabuf in vain.
fn is_not_reached(program: &str) -> Result<()> {
    let end = Start::program(&["pinbuf", "run", "--anyway", "--", program])
        .by_kvm_user()
        .end()?;
    ensure!(
        end.status == Some(1)
            && end.err.contains("opening /dev/udmabuf")
            && end.err.contains("No such file"),
        "{end:?}"
    );
    Ok(())
}

fn finds_nothing_bad_for_a_good_program() -> Result<()> {
    let findings = Findings::of_program(CLIENT)?;
    findings.expect("command", "good", "can be reached")?;
    ensure!(findings.status == Some(0), "{findings:#?}");
    Ok(())
}

fn knows_set_user_id_programs() -> Result<()> {
    let copy = Copy::of(CLIENT, "set-user-id")?;
    fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o4755))?;
    Findings::of_program(&copy.0)?.expect("command", "bad", "set-user-ID")?;
    is_not_reached(&copy.0)?;
    // For root, who gains nothing by it, it is as any other.
    let end = Start::program(&[&copy.0]).on_pinbuf().end()?;
    ensure!(end.status == Some(0), "{end:?}");
    Ok(())
}

fn knows_programs_with_capabilities() -> Result<()> {
    let copy = Copy::of(CLIENT, "capable")?;
    run(&["setcap", "cap_net_raw+ep", &copy.0])?;
    Findings::of_program(&copy.0)?.expect("command", "bad", "capabilities")?;
    is_not_reached(&copy.0)
}

fn knows_static_programs() -> Result<()> {
    Findings::of_program("busybox")?.expect("command", "bad", "statically linked")
}

fn knows_go_programs() -> Result<()> {
    Findings::of_program("/usr/sbin/gosu")?.expect("command", "bad", "written in Go")
}

fn knows_32_bit_programs() -> Result<()> {
    // A library that can be executed, and says its version.
    let program = "/usr/lib32/libc.so.6";
    Findings::of_program(program)?.expect("command", "bad", "32-bit program")?;
    let end = Start::program(&["pinbuf", "run", "--anyway", "--", program])
        .by_kvm_user()
        .end()?;
    ensure!(
        end.status == Some(0) && end.err.contains("wrong ELF class"),
        "{end:?}"
    );
    Ok(())
}

/// A profile, in force until it is dropped.
struct Profile(String);

impl Profile {
    /// Loads what the text declares, as Debian's packages do.
    fn load(name: &str, text: &str) -> Result<Self> {
        let profile = Self(format!("/etc/apparmor.d/{name}"));
        fs::write(&profile.0, format!("abi <abi/4.0>,\n{text}"))?;
        run(&["apparmor_parser", "--replace", "--skip-cache", &profile.0])?;
        Ok(profile)
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if let Err(error) = run(&["apparmor_parser", "--remove", &self.0]) {
            eprintln!("{error:#}");
        }
        let _ = fs::remove_file(&self.0);
    }
}

fn knows_profiles_that_refuse_the_device() -> Result<()> {
    let copy = Copy::of(CLIENT, "confined-1")?;
    let _profile = Profile::load(
        "refusing",
        "profile refusing /usr/local/{,s}bin/confined-[0-9] { /** mrix, deny /dev/pinbuf rw, }",
    )?;
    Findings::of_program(&copy.0)?.expect(
        "command",
        "bad",
        "`refusing`, which refuses /dev/pinbuf",
    )?;
    let end = Start::program(&[&copy.0]).on_pinbuf().by_kvm_user().end()?;
    ensure!(
        end.status == Some(1) && end.err.contains("Permission denied"),
        "{end:?}"
    );
    Ok(())
}

/// With the two lines of docs/operators.md.
fn knows_profiles_that_allow_it() -> Result<()> {
    let copy = Copy::of(CLIENT, "confined")?;
    let _profile = Profile::load(
        "allowing",
        &format!(
            "{} {{ /usr/{{lib,local}}/** mr, /etc/** r, /proc/** r, /dev/pinbuf rw, \
             /usr/lib/pinbuf/*.so mr, }}",
            copy.0
        ),
    )?;
    Findings::of_program(&copy.0)?.expect("command", "good", "allows what is needed")?;
    let end = Start::program(&[&copy.0]).on_pinbuf().by_kvm_user().end()?;
    ensure!(end.status == Some(0), "{end:?}");
    Ok(())
}

/// A process that runs, until it is dropped.
struct Running(Child);

impl Running {
    /// Starts what says the same as it hears, and waits until it does.
    fn echo(start: &Start, shim: bool) -> Result<Self> {
        let mut command = start.command();
        if shim {
            command.env("LD_PRELOAD", "/usr/lib/pinbuf/libudmabuf_shim.so");
        }
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut running = Self(child);
        let to = running.0.stdin.as_mut().context("stdin")?;
        to.write_all(b"!")?;
        let from = running.0.stdout.as_mut().context("stdout")?;
        from.read_exact(&mut [0])
            .with_context(|| format!("{start:?} says nothing"))?;
        Ok(running)
    }

    fn findings(&self) -> Result<Findings> {
        Findings::of_process(self.0.id())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A confined shell starts a program, whose profile is another, and either has the environment
/// scrubbed or not.
fn knows_processes_that_were_started_securely() -> Result<()> {
    let shell = Copy::of("/bin/sh", "starting")?;
    let cat = Copy::of("/usr/bin/cat", "started")?;
    for (transition, state, text) in [("Px", "bad", "(AT_SECURE)"), ("px", "note", "has the shim")]
    {
        let _profile = Profile::load(
            "starting",
            &format!(
                "profile starting {} {{ /** mrw, {} {transition} -> begun, }}\n\
                 profile begun {{ /** mrw, }}",
                shell.0, cat.0
            ),
        )?;
        let start = Start::program(&[&shell.0, "-c", &format!("exec {}", cat.0)]).by_kvm_user();
        let findings = Running::echo(&start, true)?.findings()?;
        findings.expect("process", state, text)?;
        findings.expect("process", "good", "`begun`, which allows what is needed")?;
    }
    Ok(())
}

fn knows_processes_without_the_shim() -> Result<()> {
    let running = Running::echo(&Start::program(&["cat"]).by_kvm_user(), false)?;
    let findings = running.findings()?;
    findings.expect("process", "bad", "without the shim")?;
    findings.expect("process", "bad", "start it with `pinbuf run`")?;
    let running = Running::echo(&Start::program(&["busybox", "cat"]).by_kvm_user(), true)?;
    running
        .findings()?
        .expect("process", "bad", "statically linked")
}
