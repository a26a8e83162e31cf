// SPDX-License-Identifier: MIT OR Apache-2.0

//! The module and its device: whether they are there, and whether this user may use them.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use pinbuf::{Device, Error};

use crate::access::{Credentials, Node};
use crate::apparmor::{self, Confinement};
use crate::finding::{bad, good, note, Finding, State};
use crate::text;
use crate::{security, shim, version};

/// A file's text without the white space around it.
pub fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read(path).ok()?;
    Some(text::of_bytes(text.trim_ascii()))
}

fn release() -> String {
    read("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Is the module loaded? A sandbox may have neither of the places that say so.
pub fn is_loaded() -> Option<bool> {
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
                    "unknown whether it is loaded: there is no /sys and no /proc; kernel {release}"
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
    if has_rust(Path::new("/"), &release) == Some(false) {
        return bad(
            "module",
            format!("pinbuf.ko is not loaded; kernel {release} was built without Rust (CONFIG_RUST)"),
            "no module can be built for this kernel: boot one with CONFIG_RUST, such as those of Debian's trixie-backports",
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

/// Was a kernel built with Rust? `None` if its configuration is in none of the places where distributions put it.
fn has_rust(root: &Path, release: &str) -> Option<bool> {
    let places = [
        format!("boot/config-{release}"),
        format!("lib/modules/{release}/config"),
        format!("lib/modules/{release}/build/.config"),
    ];
    let text = places.iter().find_map(|place| read(root.join(place)))?;
    Some(text.lines().any(|line| line == "CONFIG_RUST=y"))
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
pub fn missing() -> &'static str {
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

/// What SELinux allows a process; `None` where SELinux is not in use.
pub fn of_selinux(what: &'static str, pid: &str, who: &str) -> Option<Finding> {
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

/// The finding for a process that a profile confines.
pub fn allowance(what: &'static str, who: &str, confinement: &Confinement) -> Finding {
    const RULES: &str = "its profile (for libvirt's machines: \
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
            RULES,
        )
    } else if device.is_none() {
        note(what, text, RULES)
    } else {
        good(what, format!("{text}, which allows what is needed"))
    }
}

/// The user's name, or number.
pub fn user_name() -> String {
    let uid = nix::unistd::getuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_rust_is_recognised() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(has_rust(root.path(), "9.9-a"), None);
        let places = [
            "boot/config-9.9-a",
            "lib/modules/9.9-b/config",
            "lib/modules/9.9-c/build/.config",
        ];
        for (place, release) in places.iter().zip(["9.9-a", "9.9-b", "9.9-c"]) {
            let file = root.path().join(place);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            for (text, expected) in [
                (
                    "CONFIG_RUST_IS_AVAILABLE=y\n# CONFIG_RUST is not set\n",
                    false,
                ),
                ("CONFIG_HAVE_RUST=y\n", false),
                ("CONFIG_HAVE_RUST=y\nCONFIG_RUST=y\n", true),
            ] {
                fs::write(&file, text).unwrap();
                assert_eq!(has_rust(root.path(), release), Some(expected), "{place}");
            }
        }
    }
}
