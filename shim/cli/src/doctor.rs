// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf doctor`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::Args;
use nix::sys::resource::{getrlimit, Resource};
use pinbuf::{Device, Error, Region};
use serde::Serialize;

use crate::access::{Credentials, Node};
use crate::apparmor::{self, Confinement};
use crate::command::{self, Obstacle, Program};
use crate::process::Process;
use crate::run::user_name;
use crate::security::{self, Refusal};
use crate::shim;
use crate::text::{self, of_path, say};
use crate::version;

/// Finds out what keeps pinbuf, or a program on it, from working, and how to fix it.
///
/// The status is 1 if something has to be fixed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// For scripts.
    #[arg(long)]
    json: bool,
    /// A program that should run on pinbuf.
    #[arg(value_name = "COMMAND")]
    command: Option<PathBuf>,
    /// A process that should be running on pinbuf.
    #[arg(long, value_name = "PID", conflicts_with = "command")]
    pid: Option<u32>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Good,
    /// It works, but not everything, or not everywhere.
    Note,
    Bad,
}

/// Something that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    what: &'static str,
    state: State,
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

fn good(what: &'static str, text: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Good,
        text: text.into(),
        remedy: None,
    }
}

fn note(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Note,
        text: text.into(),
        remedy: Some(remedy.into()),
    }
}

fn bad(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        what,
        state: State::Bad,
        text: text.into(),
        remedy: Some(remedy.into()),
    }
}

/// What a 4K framebuffer takes, bytes.
const FRAMEBUFFER_4K: usize = 3840 * 2160 * 4;

impl Doctor {
    pub fn run(self) -> Result<ExitCode> {
        let mut findings = vec![module(), device()];
        let device = Device::open();
        if let Ok(device) = &device {
            findings.push(memlock(device));
            findings.push(buffer(device));
        }
        findings.push(hugepages());
        findings.push(lockdown());
        findings.push(library());
        findings.push(apparmor());
        findings.push(selinux());
        findings.push(seccomp());
        findings.push(qemu());
        findings.extend(libvirt());
        if let Some(name) = &self.command {
            findings.extend(program(name));
        }
        if let Some(pid) = self.pid {
            findings.extend(process(pid));
        }
        findings.extend(refusals(self.pid));
        if self.json {
            text::print_json(&findings)?;
        } else {
            print(&findings);
        }
        let bad = findings.iter().any(|finding| finding.state == State::Bad);
        Ok(if bad {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn print(findings: &[Finding]) {
    for finding in findings {
        let word = match finding.state {
            State::Good => "ok  ",
            State::Note => "note",
            State::Bad => "BAD ",
        };
        say!("{word}  {}: {}", finding.what, finding.text);
        if let Some(remedy) = &finding.remedy {
            say!("      {remedy}");
        }
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read(path).ok()?;
    Some(text::of_bytes(text.trim_ascii()))
}

fn release() -> String {
    read("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Is the module loaded? A sandbox may have neither of the places that say so.
fn is_loaded() -> Option<bool> {
    if Path::new("/sys/module").exists() {
        return Some(Path::new("/sys/module/pinbuf").exists());
    }
    let modules = read("/proc/modules")?;
    Some(modules.lines().any(|line| line.starts_with("pinbuf ")))
}

/// Is the module loaded?
pub fn module() -> Finding {
    let release = release();
    match is_loaded() {
        Some(true) => return loaded(&release),
        Some(false) => {}
        None => {
            return note(
                "module",
                format!(
                    "without /sys and /proc, nothing says whether it is loaded; kernel {release}"
                ),
                "run `pinbuf doctor` outside of this sandbox",
            )
        }
    }
    let mut series = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let series = (series.next().unwrap_or(0), series.next().unwrap_or(0));
    if series < (7, 2) {
        return bad(
            "module",
            format!("pinbuf.ko is not loaded; kernel {release} is too old"),
            "pinbuf needs Linux 7.2 or newer with CONFIG_RUST: in Debian, trixie-backports has one",
        );
    }
    if installed(&release) {
        bad(
            "module",
            "pinbuf.ko is installed but not loaded",
            "`modprobe pinbuf` as root; if that fails, see lockdown below, and the kernel's log (`dmesg`)",
        )
    } else {
        bad(
            "module",
            format!("pinbuf.ko is not installed for kernel {release}"),
            format!(
                "install the packages pinbuf-dkms and linux-headers-{release} (`dkms status` reports whether the build \
                 failed), or build it as docs/installing.md describes; then `modprobe pinbuf` as root"
            ),
        )
    }
}

/// The loaded module, and whether it is of this command's version.
fn loaded(release: &str) -> Finding {
    let own = version::OWN;
    match version::loaded() {
        Some(module) if module == own => good(
            "module",
            format!("version {module} is loaded, on kernel {release}"),
        ),
        module => note(
            "module",
            format!(
                "version {} is loaded, on kernel {release}, and this command has the version {own}",
                module.as_deref().unwrap_or("(unknown)")
            ),
            version::REMEDY,
        ),
    }
}

/// Does modprobe know the module?
fn installed(release: &str) -> bool {
    let lists = ["/lib/modules", "/usr/lib/modules"];
    lists.iter().any(|directory| {
        read(format!("{directory}/{release}/modules.dep")).is_some_and(|text| {
            text.lines().any(|line| {
                let file = line.split(':').next().unwrap_or_default();
                file.rsplit('/')
                    .next()
                    .is_some_and(|name| name.starts_with("pinbuf.ko"))
            })
        })
    })
}

/// What there is to say of a `/dev` without the device.
fn missing() -> &'static str {
    if is_loaded() != Some(false) {
        "udev is missing, the module is not loaded, or this is a sandbox: pass the device in (`--device /dev/pinbuf` for \
         docker and podman, `--dev-bind /dev/pinbuf /dev/pinbuf` for bubblewrap; see docs/containers.md)"
    } else {
        "load the module"
    }
}

/// How to give the device to a group.
const RULE: &str =
    "install packaging/60-pinbuf.rules in /etc/udev/rules.d, then `udevadm control --reload` and \
                    `udevadm trigger /dev/pinbuf`";

/// Is the device there, and open to us?
pub fn device() -> Finding {
    const WHAT: &str = "device";
    let node = match Node::of("self", Device::PATH) {
        Ok(node) => node,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return bad(WHAT, "/dev/pinbuf is missing", missing())
        }
        Err(error) => {
            return bad(
                WHAT,
                format!("stat of /dev/pinbuf failed: {error}"),
                "check the permissions of / and /dev",
            )
        }
    };
    if node.number == 0 {
        return bad(
            WHAT,
            "/dev/pinbuf is no device",
            "remove it, and load the module again",
        );
    }
    let (mode, group) = (node.mode, node.group_name());
    match Device::open() {
        Ok(device) => {
            let version = device.query().map(|query| query.version).unwrap_or(0);
            if version != pinbuf_uapi::VERSION {
                return bad(
                    WHAT,
                    format!(
                        "/dev/pinbuf has version {version} of the interface, and this command needs {}",
                        pinbuf_uapi::VERSION
                    ),
                    version::REMEDY,
                );
            }
            let text = format!("/dev/pinbuf, version {version}, mode {mode:o}, group {group}");
            if mode & 0o060 == 0o060 && group != "root" {
                good(WHAT, text)
            } else {
                note(WHAT, format!("{text}: for root only"), RULE)
            }
        }
        Err(Error::NotPermitted) => {
            let who = Credentials::of("self").unwrap_or_default();
            if node.on_nodev_mount() || node.permits(&who) == Some(true) {
                return refused(&node, "self", "this shell");
            }
            if mode & 0o060 == 0o060 && group != "root" {
                bad(
                    WHAT,
                    format!("/dev/pinbuf is open to the group {group}, and this user is not in it"),
                    format!(
                        "`adduser {} {group}` as root, then log in again; in a container of this user's, have its \
                         groups kept (podman: `--group-add keep-groups`)",
                        user_name()
                    ),
                )
            } else {
                bad(
                    WHAT,
                    format!("/dev/pinbuf is for root only (mode {mode:o}, group {group})"),
                    RULE,
                )
            }
        }
        Err(error) => bad(
            WHAT,
            format!("/dev/pinbuf: {error}"),
            "load the module again",
        ),
    }
}

/// What refuses the device where its mode does not, as far as /proc and /sys show it.
fn refused(node: &Node, pid: &str, who: &str) -> Finding {
    const WHAT: &str = "device";
    if node.on_nodev_mount() {
        return bad(
            WHAT,
            format!("/dev/pinbuf lies on a mount with `nodev`, so {who} may not open it"),
            "bind the device itself into the sandbox, with devices allowed (bubblewrap: `--dev-bind`, not `--bind`)",
        );
    }
    if let Some(refusing) = of_selinux(WHAT, pid, who).filter(Finding::is_bad) {
        return refusing;
    }
    if apparmor::in_use() {
        let confinement = apparmor::of_process(pid);
        let refusing = confinement.map(|confinement| allowance(WHAT, who, &confinement));
        if let Some(refusing) = refusing.filter(|finding| finding.state != State::Good) {
            return refusing;
        }
    }
    bad(
        WHAT,
        format!(
            "mode {:o} of /dev/pinbuf lets {who} open it, but opening it fails",
            node.mode
        ),
        "possible causes: the device controller of its control group (a container without `--device /dev/pinbuf`; a service \
         with DevicePolicy= and without DeviceAllow=/dev/pinbuf), Landlock, or another security module: look for \
         `denied` in the kernel's log (`dmesg`, or ausearch where auditd runs)",
    )
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn memlock(device: &Device) -> Finding {
    let Ok(query) = device.query() else {
        return bad(
            "memlock",
            "the device does not answer",
            "load the module again",
        );
    };
    let Some(limit) = query.memlock else {
        return good("memlock", "no limit on pinned memory");
    };
    let hard = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(limit, |(_, hard)| hard);
    let all = hard.saturating_add(query.allowance);
    let text = format!(
        "{} (at most {}) for each user, and an allowance of {} beyond, of which {} are in use",
        mib(limit),
        if hard == u64::MAX {
            "any".to_owned()
        } else {
            mib(hard)
        },
        mib(query.allowance),
        mib(query.allowance_used)
    );
    let remedy = format!(
        "for more: `{} hard memlock 4194304` (KiB) in /etc/security/limits.d/pinbuf.conf, and log \
         in again; for a service, LimitMEMLOCK=4G",
        user_name()
    );
    if all < FRAMEBUFFER_4K as u64 {
        bad(
            "memlock",
            format!("{text}: less than a 4K framebuffer takes"),
            remedy,
        )
    } else if all < 256 << 20 {
        note("memlock", text, remedy)
    } else {
        good("memlock", text)
    }
}

/// Tries it.
fn buffer(device: &Device) -> Finding {
    let made = Region::anonymous(FRAMEBUFFER_4K).and_then(|region| {
        let buffer = device.export(&region)?;
        buffer.info(device)
    });
    match made {
        Ok(info) => good(
            "buffer",
            format!(
                "a 4K framebuffer was made: {} pages in {} extents",
                info.pages, info.extents
            ),
        ),
        Err(error @ Error::OverLimit { .. }) => bad(
            "buffer",
            format!("a 4K framebuffer cannot be made: {error}"),
            "raise the limit (see memlock), or close other programs that pin memory",
        ),
        Err(error) => bad(
            "buffer",
            format!("a 4K framebuffer cannot be made: {error}"),
            "look for pinbuf in the kernel's log (`dmesg`)",
        ),
    }
}

fn hugepages() -> Finding {
    let pool = |kib: u32| -> (u64, u64) {
        let number = |name| {
            read(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/{name}"))
                .and_then(|text| text.parse().ok())
                .unwrap_or(0)
        };
        (number("free_hugepages"), number("nr_hugepages"))
    };
    let (free, all) = pool(2048);
    let (free_large, all_large) = pool(1 << 20);
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = transparent
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("not available")
        .to_owned();
    let text = format!(
        "{free} of {all} pages of 2 MiB free, {free_large} of {all_large} of 1 GiB; transparent \
         huge pages: {chosen}"
    );
    if all == 0 && all_large == 0 && chosen != "always" {
        note(
            "huge pages",
            text,
            "buffers of huge pages are made and mapped faster: `sysctl vm.nr_hugepages=N`, or \
             `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        )
    } else {
        good("huge pages", text)
    }
}

fn lockdown() -> Finding {
    let lockdown = read("/sys/kernel/security/lockdown").unwrap_or_default();
    let chosen = lockdown
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("none")
        .to_owned();
    let secure_boot = fs::read_dir("/sys/firmware/efi/efivars")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("SecureBoot-")
        })
        .find_map(|entry| fs::read(entry.path()).ok())
        .is_some_and(|value| value.last() == Some(&1));
    let enforced =
        read("/sys/module/module/parameters/sig_enforce").is_some_and(|text| text == "Y");
    let text = format!(
        "Secure Boot {}, kernel lockdown: {chosen}, module signatures {}",
        if secure_boot { "on" } else { "off" },
        if enforced { "enforced" } else { "not enforced" }
    );
    if is_loaded() == Some(false) && (chosen != "none" || enforced) {
        bad(
            "lockdown",
            format!("{text}: an unsigned module is refused"),
            "enroll the key that DKMS signs modules with: `mokutil --import /var/lib/dkms/mok.pub` as root, with a \
             password of your choice; then restart the system, and in the menu of the firmware that appears choose \
             \"Enroll MOK\" and enter the password. A module that was not built by DKMS is to be signed with a key that is \
             enrolled",
        )
    } else {
        good("lockdown", text)
    }
}

fn library() -> Finding {
    match shim::find() {
        Ok(path) => good("shim", of_path(&path)),
        Err(error) => bad(
            "shim",
            error.to_string(),
            "install it there (see README.md)",
        ),
    }
}

fn apparmor() -> Finding {
    const WHAT: &str = "AppArmor";
    if !Path::new("/sys/module").exists() {
        return good(WHAT, "without /sys, nothing says whether it is in use");
    }
    if !apparmor::in_use() {
        return good(WHAT, "not in use");
    }
    match apparmor::of_process("self") {
        None => good(WHAT, "in use, not for us"),
        Some(confinement) => allowance(WHAT, "this shell", &confinement),
    }
}

fn selinux() -> Finding {
    of_selinux("SELinux", "self", "this shell").unwrap_or_else(|| good("SELinux", "not in use"))
}

/// What SELinux allows a process; `None` where SELinux is not in use.
fn of_selinux(what: &'static str, pid: &str, who: &str) -> Option<Finding> {
    let enforces = security::selinux_enforces()?;
    let unknown = || "unknown".to_owned();
    let context = security::context_of_process(pid).unwrap_or_else(unknown);
    let device = security::context_of_file(Device::PATH).unwrap_or_else(unknown);
    let text = format!("{who} runs in SELinux's context {context}, and /dev/pinbuf has {device}");
    let refused = security::selinux_refuses(&context, &device);
    Some(match refused.as_deref() {
        Some([]) => good(what, text),
        Some(refused) if enforces => bad(
            what,
            format!("{text}: no right to {}", refused.join(", ")),
            "give the device a type that it may use (`semanage fcontext -a -t kvm_device_t /dev/pinbuf`, then \
             `restorecon /dev/pinbuf`), or write the rule (`ausearch -m avc | audit2allow`); containers: `setsebool -P \
             container_use_devices on`. See docs/containers.md",
        ),
        Some(refused) => note(
            what,
            format!("{text}: no right to {}, which SELinux only logs (permissive)", refused.join(", ")),
            "see docs/containers.md for the rules",
        ),
        None => note(
            what,
            format!("{text}; this user may not ask what that allows"),
            "ask as root",
        ),
    })
}

/// The system calls that the shim makes.
fn calls() -> String {
    format!(
        "a filter has to allow, besides the program's own calls: ioctl (also {:#x} and {:#x}), fstat, fcntl(F_GET_SEALS), \
         rt_sigprocmask, mmap and munmap, and, while the device is opened, openat, close, getpid and \
         fcntl(F_DUPFD_CLOEXEC). A call that it answers with a signal ends the program; see docs/containers.md",
        pinbuf_uapi::CREATE,
        pinbuf_uapi::QUERY
    )
}

fn seccomp() -> Finding {
    match Credentials::of("self") {
        Ok(Credentials { filters: 0, .. }) => good("seccomp", "not in use"),
        _ => note(
            "seccomp",
            "this shell, and every program that it starts, runs under filters of system calls; the kernel does not report what these allow",
            calls(),
        ),
    }
}

/// What the kernel's log says that was refused, at last; of a process, of it alone.
fn refusals(pid: Option<u32>) -> Option<Finding> {
    let mut found = security::refusals();
    found.retain(|refusal| match pid {
        Some(_) => refusal.pid == pid,
        // Which programs run under filters of their own is none of pinbuf's business.
        None => !refusal.is_seccomp(),
    });
    let Refusal { by, line, .. } = found.pop()?;
    Some(note(
        "kernel log",
        format!("{by} refused: {line}"),
        "if that is not long ago, see docs/containers.md for the rules",
    ))
}

/// What a profile means for who is confined by it.
fn allowance(what: &'static str, who: &str, confinement: &Confinement) -> Finding {
    const MEND: &str = "its profile (for libvirt's machines: \
                        /etc/apparmor.d/abstractions/libvirt-qemu.d/pinbuf) must have \
                        `/dev/pinbuf rw,` and `/usr/lib/pinbuf/*.so mr,`";
    let name = &confinement.name;
    let device = confinement.allows(Path::new(Device::PATH));
    let shim = shim::find().ok().and_then(|shim| confinement.allows(&shim));
    let mut refused = Vec::new();
    if device.is_some_and(|allowed| !allowed.read_write) {
        refused.push(Device::PATH.to_owned());
    }
    if shim.is_some_and(|allowed| !allowed.library) {
        refused.push("the shim".to_owned());
    }
    let text = format!("{who} is confined by the profile `{name}`");
    if confinement.only_complains() {
        good(what, format!("{text}, which only complains"))
    } else if !refused.is_empty() {
        bad(
            what,
            format!("{text}, which refuses {}", refused.join(" and ")),
            MEND,
        )
    } else if device.is_none() {
        note(what, text, MEND)
    } else {
        good(what, format!("{text}, which allows what is needed"))
    }
}

fn qemu() -> Finding {
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let Ok(program) = Program::find(Path::new(&name)) else {
        return good("QEMU", "not installed");
    };
    let version = Command::new(&program.path).arg("--version").output().ok();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = version
        .as_deref()
        .and_then(|text| text.lines().next())
        .unwrap_or("unknown");
    Finding {
        what: "QEMU",
        state: State::Good,
        text: version.to_owned(),
        remedy: Some(
            "with `pinbuf run`, guests need -object memory-backend-memfd,share=on and a \
             virtio-gpu device with blob=on"
                .to_owned(),
        ),
    }
}

fn libvirt() -> Option<Finding> {
    let text = read("/etc/libvirt/qemu.conf")?;
    let list = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n");
    let allowed = list.contains("cgroup_device_acl") && list.contains("/dev/pinbuf");
    Some(if allowed {
        good("libvirt", "cgroup_device_acl has /dev/pinbuf")
    } else {
        note(
            "libvirt",
            "its virtual machines do not get /dev/pinbuf",
            "add \"/dev/pinbuf\" to cgroup_device_acl in /etc/libvirt/qemu.conf, and set the \
             environment by <qemu:env name='LD_PRELOAD' .../> in the domain",
        )
    })
}

fn reasons(obstacles: &[Obstacle]) -> String {
    let reasons: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    reasons.join("; ")
}

fn program(name: &Path) -> Vec<Finding> {
    const WHAT: &str = "command";
    let program = match Program::find(name) {
        Ok(program) => program,
        Err(error) => {
            let remedy = "name it as you would in a shell";
            return vec![bad(WHAT, format!("{error:#}"), remedy)];
        }
    };
    let loaded = of_path(&program.loaded);
    let mut findings = Vec::new();
    findings.push(if !program.obstacles.is_empty() {
        bad(
            WHAT,
            format!("{loaded} cannot be reached by the shim"),
            reasons(&program.obstacles),
        )
    } else if let Some(calls @ 1..) = program.system_calls {
        note(
            WHAT,
            format!(
                "{loaded} has {calls} instructions of its own that make system calls, past libc: if it opens /dev/udmabuf \
                 by them (Rust's rustix, io_uring), the shim does not see it"
            ),
            "start it and run `pinbuf doctor --pid PID`: if it has udmabuf's buffers or none, the program itself has to be changed to open /dev/pinbuf",
        )
    } else if program.system_calls.is_none() {
        note(
            WHAT,
            format!(
                "{loaded} can be reached by the shim; whether it makes system calls of its own, past libc, is not known: \
                 pinbuf does not decode the instructions of this machine"
            ),
            "start it and run `pinbuf doctor --pid PID`, which says whose buffers it has",
        )
    } else {
        // What its libraries do is not known.
        good(WHAT, format!("{loaded} can be reached by the shim"))
    });
    if apparmor::in_use() {
        findings.extend(
            apparmor::of_program(&program.loaded)
                .map(|confinement| allowance(WHAT, &loaded, &confinement)),
        );
    }
    findings
}

fn process(pid: u32) -> Vec<Finding> {
    const WHAT: &str = "process";
    let process = match Process::find(pid) {
        Ok(process) => process,
        Err(error) => {
            let remedy = "give the number of a process that runs; for others' processes, be root";
            return vec![bad(WHAT, format!("{error:#}"), remedy)];
        }
    };
    let who = format!("{} ({})", of_path(&process.program), process.pid);
    let own_device = process.shim.then(|| own_device(&process, &who)).flatten();
    let mut findings = vec![reached(&process, &who, own_device.is_none())];
    findings.extend(own_device);
    if process.udmabuf_open || process.udmabufs_buffers > 0 {
        findings.push(note(
            WHAT,
            format!(
                "{who} has {}",
                match (process.udmabuf_open, process.udmabufs_buffers) {
                    (true, 0) => "the kernel's own udmabuf open".to_owned(),
                    (true, n) => format!("the kernel's own udmabuf open, and {n} buffers of it"),
                    (false, n) => format!("{n} buffers of the kernel's own udmabuf"),
                }
            ),
            "it was opened before the shim was loaded or without it, or the shim could not open /dev/pinbuf",
        ));
    }
    if process.credentials.filters > 0 {
        findings.push(note(
            WHAT,
            format!(
                "{who} runs under {} filters of system calls; the kernel does not report what these allow",
                process.credentials.filters
            ),
            calls(),
        ));
    }
    findings.extend(of_selinux(WHAT, &pid.to_string(), &who));
    if apparmor::in_use() {
        findings.extend(
            apparmor::of_process(&pid.to_string())
                .map(|confinement| allowance(WHAT, &who, &confinement)),
        );
    }
    findings
}

/// Does the process run on pinbuf, and if not, why? `opens` says whether it can open the device.
fn reached(process: &Process, who: &str, opens: bool) -> Finding {
    const WHAT: &str = "process";
    let buffers = process.pinbufs_buffers;
    if process.shim && buffers > 0 {
        good(
            WHAT,
            format!("{who} runs on pinbuf, and has {buffers} buffers of it"),
        )
    } else if process.shim && process.pinbuf_open && opens {
        good(
            WHAT,
            format!("{who} runs on pinbuf: it has the device open, and no buffer now"),
        )
    } else if process.shim {
        note(
            WHAT,
            format!("{who} has the shim, and no buffer of pinbuf's now"),
            "a program may open /dev/udmabuf only when it needs a buffer, and close it soon",
        )
    } else if buffers > 0 || process.pinbuf_open {
        good(
            WHAT,
            format!("{who} has {buffers} buffers of pinbuf's without the shim: it uses pinbuf itself, or received them"),
        )
    } else if process.secure {
        bad(
            WHAT,
            format!(
                "{who} was started with a scrubbed environment (AT_SECURE), so the dynamic linker \
                 ignored LD_PRELOAD"
            ),
            if process.file_capabilities {
                Obstacle::FileCapabilities.to_string()
            } else {
                "it is set-user-ID, its file had capabilities, or AppArmor changed its profile at its \
                 start: in the profile of the program that starts it, use `px`, `cx` or `ux` instead \
                 of `Px`, `Cx` or `Ux`, and `change_profile unsafe`"
                    .to_owned()
            },
        )
    } else {
        let obstacles = command::obstacles_of_file(&process.executable()).unwrap_or_default();
        let remedy = if obstacles.is_empty() {
            "start it with `pinbuf run`, or with LD_PRELOAD=/usr/lib/pinbuf/libudmabuf_shim.so"
                .to_owned()
        } else {
            reasons(&obstacles)
        };
        bad(WHAT, format!("{who} was started without the shim"), remedy)
    }
}

/// Can the process open the device, in its own `/dev`? Nothing is said where it can.
fn own_device(process: &Process, who: &str) -> Option<Finding> {
    const WHAT: &str = "process";
    let have = if process.pinbuf_open {
        "the descriptor that it has was inherited or received"
    } else {
        "so it gets what it would get without the shim: the kernel's udmabuf or an error"
    };
    match &process.device {
        Err(error) if error.kind() == ErrorKind::NotFound => Some(bad(
            WHAT,
            format!("{who} has no /dev/pinbuf in its own /dev: {have}"),
            missing(),
        )),
        // A user that may not read it reports nothing.
        Err(_) => None,
        Ok(node) if Some(node.number) != crate::access::number_of("pinbuf") => Some(bad(
            WHAT,
            format!("/dev/pinbuf in {who}'s own /dev is not pinbuf's device: {have}"),
            "start the sandbox again: the device's number changes when the module is reloaded",
        )),
        Ok(node) if node.on_nodev_mount() => Some(bad(
            WHAT,
            format!("/dev/pinbuf in {who}'s own /dev lies on a mount with `nodev`: {have}"),
            "bind the device with devices allowed (bubblewrap: `--dev-bind`, not `--bind`)",
        )),
        Ok(node) if node.permits(&process.credentials) == Some(false) => Some(bad(
            WHAT,
            format!(
                "{who} may not open its /dev/pinbuf (mode {:o}, group {}): {have}",
                node.mode,
                node.group_name()
            ),
            "let it have the device's group; in a container of a user's, have the groups kept (podman: `--group-add \
             keep-groups`)",
        )),
        Ok(_) => None,
    }
}
