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

use crate::access::Credentials;
use crate::apparmor;
use crate::command::{self, Obstacle, Program};
use crate::finding::{bad, good, note, Finding, State};
use crate::process::Process;
use crate::run::By;
use crate::security::{self, Refusal};
use crate::setup::{allowance, device, is_loaded, missing, module, of_selinux, read, user_name};
use crate::shim;
use crate::text::{self, of_path, say};

/// Find out what keeps pinbuf, or a program on it, from working, and how to fix it.
///
/// The exit status is 1 if something has to be fixed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// A program that should run on pinbuf.
    #[arg(value_name = "COMMAND")]
    command: Option<PathBuf>,
    /// A process that should be running on pinbuf.
    #[arg(long, value_name = "PID", conflicts_with = "command")]
    pid: Option<u32>,
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
    // A buffer is charged to one of the two, and several buffers to both.
    let largest = hard.max(query.allowance);
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
    if largest < FRAMEBUFFER_4K as u64 {
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
             \"Enroll MOK\" and enter the password. Sign a module that was not built by DKMS with a key that is \
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
        return good(WHAT, "unknown whether it is in use: there is no /sys");
    }
    if !apparmor::in_use() {
        return good(WHAT, "not in use");
    }
    match apparmor::of_process("self") {
        None => good(WHAT, "in use, and this shell is not confined"),
        Some(confinement) => allowance(WHAT, "this shell", &confinement),
    }
}

fn selinux() -> Finding {
    of_selinux("SELinux", "self", "this shell").unwrap_or_else(|| good("SELinux", "not in use"))
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
        "if this is recent, see docs/containers.md for the rules",
    ))
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
    findings.push(match By::fitting(&program) {
        Err(_) => bad(
            WHAT,
            format!("{loaded} cannot be reached by the shim"),
            reasons(&program.obstacles),
        ),
        // What its libraries do is not known.
        Ok((By::Preload, _)) => good(WHAT, format!("{loaded} can be reached by the shim")),
        Ok((by, why)) => note(
            WHAT,
            format!("`pinbuf run` serves {loaded} {}: {why}", by.name()),
            "so it, and what it starts, gets no rights by set-user-ID or file capabilities (no_new_privs)",
        ),
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
            let remedy =
                "give the PID of a running process; for processes of other users, run this as root";
            return vec![bad(WHAT, format!("{error:#}"), remedy)];
        }
    };
    let who = format!("{} ({})", of_path(&process.program), process.pid);
    if let Some(supervisor) = process.supervisor {
        return vec![supervised(&process, &who, supervisor)];
    }
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

/// A process under a supervisor. That it has the kernel's udmabuf open is as it should be.
fn supervised(process: &Process, who: &str, supervisor: u32) -> Finding {
    const WHAT: &str = "process";
    let text = format!(
        "{who} is served by the supervisor of `pinbuf run` (process {supervisor}), and has {} buffers of pinbuf's",
        process.pinbufs_buffers
    );
    match process.udmabufs_buffers {
        0 => good(WHAT, text),
        n => note(
            WHAT,
            format!("{text}, and {n} of the kernel's own udmabuf"),
            "it received them from another process, or the supervisor may not look into it: it has changed its user, is \
             not dumpable, or Yama's ptrace_scope is 2 or higher",
        ),
    }
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
            "give it the device's group; in a rootless container, keep the user's groups (podman: `--group-add \
             keep-groups`)",
        )),
        Ok(_) => None,
    }
}
