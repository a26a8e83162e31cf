// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf doctor`: what it reports about programs that the shim cannot reach, and that the report is true.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::vgem::Vgem;
use pinbuf_test_harness::tests;
use serde_json::Value;

use crate::info;
use crate::process::{End, Start};

tests!("doctor":
    finds_nothing_bad_for_a_good_program,
    does_not_add_limit_and_allowance_for_one_buffer,
    knows_set_user_id_programs,
    knows_programs_with_capabilities,
    knows_static_programs,
    knows_go_programs,
    knows_32_bit_programs,
    knows_profiles_that_refuse_the_device,
    knows_profiles_that_allow_it,
    knows_processes_that_were_started_securely,
    knows_processes_without_the_shim,
    knows_programs_with_system_calls_of_their_own,
    has_advice_for_capabilities_that_works,
    knows_processes_that_run_on_pinbuf,
    looks_at_the_process_s_own_dev,
    knows_devices_that_may_not_be_opened,
    does_not_take_a_name_for_an_exporter,
    shows_names_of_any_bytes,
    knows_processes_under_seccomp,
    names_the_profile_that_refuses_the_device,
    names_nodev_mounts,
);

/// The program written for udmabuf.
const CLIENT: &str = "/usr/bin/pinbuf-udmabuf-client";
/// The same, without libc.
const RAW: &str = "/usr/bin/pinbuf-raw-client";
const SHIM: &str = "/usr/lib/pinbuf/libudmabuf_shim.so";

/// What the doctor found.
#[derive(Debug)]
pub struct Findings {
    all: Vec<Value>,
    status: Option<i32>,
}

impl Findings {
    /// The report of any such command.
    pub fn from(start: Start) -> Result<Self> {
        Self::parse(&start.end()?)
    }

    fn parse(end: &End) -> Result<Self> {
        let all = serde_json::from_str(&end.out).with_context(|| format!("{end:?}"))?;
        Ok(Self {
            all,
            status: end.status,
        })
    }

    /// The report on a program, for the user that would start it.
    fn of_program(program: &str) -> Result<Self> {
        Self::from(Start::program(&["pinbuf", "doctor", "--json", program]).by_kvm_user())
    }

    /// The report on a process, for root.
    pub fn of_process(pid: u32) -> Result<Self> {
        let pid = pid.to_string();
        Self::from(Start::program(&[
            "pinbuf", "doctor", "--json", "--pid", &pid,
        ]))
    }

    /// Fails unless this was found, and the exit status says whether there was any problem.
    pub fn expect(&self, what: &str, state: &str, text: &str) -> Result<()> {
        let found = self.all.iter().any(|finding| {
            let says = |field: &str| {
                finding[field]
                    .as_str()
                    .is_some_and(|seen| seen.contains(text))
            };
            finding["what"] == what && finding["state"] == state && (says("text") || says("remedy"))
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

/// A buffer is charged to one of the two. Together they would be enough for it.
fn does_not_add_limit_and_allowance_for_one_buffer() -> Result<()> {
    const LIMIT: u64 = 24 << 20;
    let _setting = Setting::parameter("allowance_mb", 16)?;
    let start = Start::program(&["pinbuf", "doctor", "--json"]).memlock(LIMIT, LIMIT);
    let findings = Findings::from(start.by_user(Some("kvm")))?;
    findings.expect("memlock", "bad", "less than a 4K framebuffer takes")?;
    findings.expect("buffer", "bad", "a 4K framebuffer cannot be made")
}

fn knows_set_user_id_programs() -> Result<()> {
    let copy = Copy::of(CLIENT, "set-user-id")?;
    fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o4755))?;
    Findings::of_program(&copy.0)?.expect("command", "bad", "set-user-ID")?;
    is_not_reached(&copy.0)?;
    // Root gains no privileges by it, so the loader honours LD_PRELOAD.
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
    Findings::of_program("busybox")?.expect(
        "command",
        "note",
        "by the supervisor: it is statically linked",
    )
}

fn knows_go_programs() -> Result<()> {
    Findings::of_program("/usr/sbin/gosu")?.expect(
        "command",
        "note",
        "by the supervisor: it is written in Go",
    )
}

fn knows_32_bit_programs() -> Result<()> {
    // A library that can be executed, and says its version. Where the guest has none for 32 bits, a program that asks
    // no dynamic linker for anything.
    let library = "/usr/lib32/libc.so.6";
    let program = match fs::exists(library)? {
        true => library,
        false => "/usr/bin/pinbuf-c-client-32",
    };
    Findings::of_program(program)?.expect(
        "command",
        "note",
        "by the supervisor: it is a 32-bit program",
    )?;
    let end = Start::program(&["pinbuf", "run", "--by", "preload", "--", program])
        .by_kvm_user()
        .end()?;
    if program != library {
        ensure!(
            end.status == Some(1) && end.err.contains("opening /dev/udmabuf: No such file"),
            "{end:?}"
        );
        return Ok(());
    }
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
pub struct Running(Child);

impl Running {
    /// Starts a program that echoes its input, and waits until it does.
    pub fn echo(start: &Start, shim: bool) -> Result<Self> {
        Self::start(start.command(), shim)
    }

    fn start(mut command: Command, shim: bool) -> Result<Self> {
        if shim {
            command.env("LD_PRELOAD", SHIM);
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
            .with_context(|| format!("{command:?} says nothing"))?;
        Ok(running)
    }

    /// What the doctor reports about it to root.
    pub fn findings(&self) -> Result<Findings> {
        Findings::of_process(self.0.id())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A confined shell starts a program that has another profile, with its environment scrubbed or not.
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

/// It is served in both ways, without being asked to.
fn knows_programs_with_system_calls_of_their_own() -> Result<()> {
    let findings = Findings::of_program(RAW)?;
    findings.expect(
        "command",
        "note",
        "by the preloaded shim and the supervisor: it has ",
    )?;
    findings.expect(
        "command",
        "note",
        "instructions of its own that make system calls",
    )?;
    ensure!(
        findings.expect("command", "good", "").is_err(),
        "{findings:#?}"
    );
    let end = Start::program(&["pinbuf", "run", "--by", "preload", "--", RAW])
        .by_kvm_user()
        .end()?;
    ensure!(
        end.status == Some(1) && end.err.contains("opening /dev/udmabuf"),
        "{end:?}"
    );
    let end = Start::program(&[RAW]).on_pinbuf().by_kvm_user().end()?;
    ensure!(end.status == Some(0) && end.err.is_empty(), "{end:?}");
    Ok(())
}

/// Without the first half of the advice, the second does not help.
fn has_advice_for_capabilities_that_works() -> Result<()> {
    let copy = Copy::of(CLIENT, "capable")?;
    run(&["setcap", "cap_net_raw+ep", &copy.0])?;
    Findings::of_program(&copy.0)?.expect("command", "bad", "`setcap -r FILE`")?;
    let mut ambient = Start::program(&[&copy.0]).by_kvm_user();
    ambient.give("net_raw");
    let end = |start: &Start| -> Result<_> {
        Ok(End::from(start.command().env("LD_PRELOAD", SHIM).output()?))
    };
    let before = end(&ambient)?;
    ensure!(before.status == Some(1), "{before:?}");
    run(&["setcap", "-r", &copy.0])?;
    let after = end(&ambient)?;
    ensure!(after.status == Some(0), "{after:?}");
    Ok(())
}

fn holding() -> Start {
    Start::program(&[CLIENT, "--hold"])
}

fn knows_processes_that_run_on_pinbuf() -> Result<()> {
    let running = Running::echo(&holding().by_kvm_user(), true)?;
    let findings = running.findings()?;
    findings.expect("process", "good", "runs on pinbuf, and has 1 buffers of it")
}

/// Its own /dev has no such device, and what it has open was opened before.
fn looks_at_the_process_s_own_dev() -> Result<()> {
    let script = |before: &str| {
        let script = format!("{before} mount -t tmpfs none /dev && exec setpriv --reuid 61000 cat");
        Start::program(&["unshare", "--mount", "sh", "-c", &script])
    };
    let running = Running::echo(&script("exec 7<>/dev/pinbuf;"), true)?;
    let findings = running.findings()?;
    findings.expect(
        "process",
        "bad",
        "has no /dev/pinbuf in its own /dev: the descriptor that it has",
    )?;
    findings.expect("process", "bad", "--dev-bind /dev/pinbuf")?;
    ensure!(
        findings
            .expect("process", "good", "runs on pinbuf")
            .is_err(),
        "{findings:#?}"
    );
    let findings = Running::echo(&script(""), true)?.findings()?;
    findings.expect(
        "process",
        "bad",
        "in its own /dev: so it gets what it would get without",
    )
}

fn knows_devices_that_may_not_be_opened() -> Result<()> {
    let running = Running::echo(&Start::program(&["cat"]).by_user(None), true)?;
    let findings = running.findings()?;
    findings.expect(
        "process",
        "bad",
        "may not open its /dev/pinbuf (mode 660, group kvm)",
    )?;
    let running = Running::echo(&Start::program(&["cat"]).by_kvm_user(), true)?;
    let findings = running.findings()?;
    findings.expect(
        "process",
        "note",
        "has the shim, and no buffer of pinbuf's now",
    )?;
    ensure!(findings.status == Some(0), "{findings:#?}");
    Ok(())
}

fn does_not_take_a_name_for_an_exporter() -> Result<()> {
    let buffer = Vgem::new()?.buffer;
    info::set_name(&buffer, info::FORGED)?;
    // A child inherits it as one of its three standard descriptors.
    let mut command = Start::program(&["cat"]).command();
    command.stderr(Stdio::from(buffer));
    let findings = Running::start(command, false)?.findings()?;
    findings.expect("process", "bad", "was started without the shim")
}

/// The path of a program, and of a file that the process has mapped.
fn shows_names_of_any_bytes() -> Result<()> {
    use std::os::unix::ffi::OsStrExt;

    let path = std::ffi::OsStr::from_bytes(b"/usr/local/bin/\x1b[2J\x80");
    fs::copy("/usr/bin/cat", path)?;
    let result = (|| {
        let mut command = Command::new(path);
        command.current_dir("/tmp");
        let running = Running::start(command, true)?;
        let pid = running.0.id().to_string();
        let wanted = "/usr/local/bin/\\u{1b}[2J\\x80 (";
        let text = info::clean(&Start::program(&["pinbuf", "doctor", "--pid", &pid]))?;
        ensure!(text.contains(wanted), "{text}");
        let mut doctor = Command::new("pinbuf");
        let output = doctor.arg("doctor").arg(path).output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(
            text.contains("/usr/local/bin/\\u{1b}[2J\\x80 can"),
            "{text:?}"
        );
        ensure!(!text.contains('\x1b'), "{text:?}");
        Ok(())
    })();
    fs::remove_file(path)?;
    result
}

/// Installs a filter that allows all calls: what matters is that there is one.
fn allow_all() -> std::io::Result<()> {
    let mut allow = libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: &raw mut allow,
    };
    // SAFETY: no memory is involved.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the kernel reads the program.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

fn knows_processes_under_seccomp() -> Result<()> {
    let mut command = holding().command();
    // SAFETY: what runs in the child makes two system calls.
    unsafe { command.pre_exec(allow_all) };
    let findings = Running::start(command, true)?.findings()?;
    findings.expect("process", "good", "runs on pinbuf")?;
    findings.expect("process", "note", "runs under 1 filters of system calls")?;
    findings.expect("process", "note", "F_GET_SEALS")?;
    findings.expect("seccomp", "good", "not in use")?;
    let mut command = Start::program(&["pinbuf", "doctor", "--json"]).command();
    // SAFETY: as above.
    unsafe { command.pre_exec(allow_all) };
    let end = End::from(command.output()?);
    Findings::parse(&end)?.expect("seccomp", "note", "runs under filters of system calls")
}

/// The doctor says so when it is confined itself, and afterwards from the kernel's log.
fn names_the_profile_that_refuses_the_device() -> Result<()> {
    let _profile = Profile::load(
        "confining",
        "profile confining { /{usr,etc,lib,lib64,tmp}/** mrix, /{proc,sys,run}/** rw, /dev/null rw, }",
    )?;
    let words = [
        "aa-exec",
        "-p",
        "confining",
        "--",
        "pinbuf",
        "doctor",
        "--json",
    ];
    let findings = Findings::from(Start::program(&words).by_kvm_user())?;
    findings.expect(
        "device",
        "bad",
        "the profile `confining`, which refuses /dev/pinbuf",
    )?;
    let findings = Findings::from(Start::program(&["pinbuf", "doctor", "--json"]))?;
    findings.expect("kernel log", "note", "AppArmor refused: audit: ")?;
    findings.expect("kernel log", "note", "profile=\"confining\"")
}

fn names_nodev_mounts() -> Result<()> {
    let script =
        "mount --bind /dev/pinbuf /dev/pinbuf && mount -o remount,bind,nodev /dev/pinbuf && \
                  exec pinbuf doctor --json";
    let findings = Findings::from(Start::program(&["unshare", "--mount", "sh", "-c", script]))?;
    findings.expect("device", "bad", "mount with `nodev`")?;
    findings.expect("device", "bad", "--dev-bind")
}
