// SPDX-License-Identifier: MIT OR Apache-2.0

//! SELinux, and what the kernel's log says that it, AppArmor or a filter of system calls refused.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::text;

const SELINUX: &str = "/sys/fs/selinux";

/// Does SELinux refuse anything? `None` where it is not in use.
pub fn selinux_enforces() -> Option<bool> {
    let text = fs::read_to_string(Path::new(SELINUX).join("enforce")).ok()?;
    Some(text.trim() == "1")
}

/// A process's context.
pub fn context_of_process(pid: &str) -> Option<String> {
    let context = fs::read(format!("/proc/{pid}/attr/current")).ok()?;
    label(&context)
}

/// A file's context.
pub fn context_of_file(path: &str) -> Option<String> {
    let path = std::ffi::CString::new(path).ok()?;
    let mut context = [0_u8; 4096];
    // SAFETY: terminated strings, and a buffer of this size.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.selinux".as_ptr(),
            context.as_mut_ptr().cast(),
            context.len(),
        )
    };
    label(&context[..usize::try_from(len).ok()?])
}

fn label(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.split(|&byte| matches!(byte, 0 | b'\n')).next()?;
    (!bytes.is_empty()).then(|| text::of_bytes(bytes))
}

/// What a process needs of the device.
const NEEDED: [&str; 4] = ["open", "read", "write", "ioctl"];

/// Asks SELinux which of the needed permissions a context does not have for a device; `None` if it does not tell.
pub fn selinux_refuses(process: &str, device: &str) -> Option<Vec<&'static str>> {
    let number = |path: &str| -> Option<u32> {
        let text = fs::read_to_string(Path::new(SELINUX).join(path)).ok()?;
        text.trim().parse().ok()
    };
    let class = number("class/chr_file/index")?;
    // The answer belongs to the descriptor that the question was written to.
    let mut kernel = File::options()
        .read(true)
        .write(true)
        .open(Path::new(SELINUX).join("access"))
        .ok()?;
    kernel
        .write_all(format!("{process} {device} {class}").as_bytes())
        .ok()?;
    let mut answer = String::new();
    kernel.read_to_string(&mut answer).ok()?;
    let allowed = allowed(&answer)?;
    let mut refused = Vec::new();
    for name in NEEDED {
        let bit = number(&format!("class/chr_file/perms/{name}"))?;
        if allowed >> (bit.checked_sub(1)?) & 1 == 0 {
            refused.push(name);
        }
    }
    Some(refused)
}

/// The first of the numbers in an answer of SELinux's.
fn allowed(answer: &str) -> Option<u32> {
    u32::from_str_radix(answer.split_whitespace().next()?, 16).ok()
}

/// What was refused, as the kernel's log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub by: &'static str,
    /// The process, where the log says it.
    pub pid: Option<u32>,
    pub line: String,
}

impl Refusal {
    /// Was it a system call that was refused, whatever for?
    pub fn is_seccomp(&self) -> bool {
        self.by == SECCOMP
    }
}

const SECCOMP: &str = "a filter of system calls (seccomp)";

/// Refusals that may have to do with pinbuf, oldest first; none where the log may not be read. A daemon that keeps
/// the audit's records (auditd) has them instead of the log.
pub fn refusals() -> Vec<Refusal> {
    let log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let mut found = Vec::new();
    let Ok(mut log) = log else {
        return found;
    };
    // A record for each call; records that were overwritten meanwhile are an error, and the next call goes on.
    let mut record = [0_u8; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(len) => found.extend(refusal(&record[..len])),
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(_) => break,
        }
    }
    found
}

/// A record: `LEVEL,NUMBER,TIME,FLAGS;TEXT`, and lines with further fields.
fn refusal(record: &[u8]) -> Option<Refusal> {
    let line = record.split(|&byte| byte == b'\n').next()?;
    let start = line.iter().position(|&byte| byte == b';')? + 1;
    let line = text::of_bytes(&line[start..]);
    // Whatever programs write into the log does not come from the audit.
    if !line.starts_with("audit: ") {
        return None;
    }
    let device = |names: &[&str]| names.iter().any(|name| line.contains(name));
    let by = if line.contains("type=1326 ") {
        SECCOMP
    } else if line.contains("apparmor=\"DENIED\"")
        && device(&["name=\"/dev/pinbuf\"", "/libudmabuf_shim.so\""])
    {
        "AppArmor"
    } else if line.contains("avc:  denied")
        && device(&[
            "name=\"pinbuf\"",
            "path=\"/dev/pinbuf\"",
            "name=\"libudmabuf_shim.so\"",
        ])
    {
        "SELinux"
    } else {
        return None;
    };
    let pid = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pid=")?.parse().ok());
    Some(Refusal { by, pid, line })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_log() {
        for (text, by, pid) in [
            (
                "5,9,1,-;audit: type=1400 audit(1.2:3): apparmor=\"DENIED\" operation=\"open\" class=\"file\" \
                 profile=\"a\" name=\"/dev/pinbuf\" pid=42 comm=\"x\" requested_mask=\"wr\"\n KEY=value\n",
                "AppArmor",
                42,
            ),
            (
                "5,9,1,-;audit: type=1400 audit(1.2:3): avc:  denied  { read write } for  pid=43 comm=\"x\" \
                 name=\"pinbuf\" dev=\"devtmpfs\" ino=9 scontext=a tcontext=b tclass=chr_file permissive=0\n",
                "SELinux",
                43,
            ),
            (
                "5,9,1,-;audit: type=1326 audit(1.2:3): auid=0 pid=44 comm=\"x\" exe=\"/x\" sig=31 syscall=5\n",
                "a filter of system calls (seccomp)",
                44,
            ),
        ] {
            let found = refusal(text.as_bytes()).unwrap();
            assert_eq!((found.by, found.pid), (by, Some(pid)));
            assert!(!found.line.contains("KEY"));
        }
        for other in [
            "5,9,1,-;audit: type=1400 audit(1.2:3): apparmor=\"DENIED\" name=\"/dev/kvm\" pid=42\n",
            "5,9,1,-;audit: type=1400 audit(1.2:3): apparmor=\"ALLOWED\" name=\"/dev/pinbuf\" pid=42\n",
            "12,9,1,-;apparmor=\"DENIED\" name=\"/dev/pinbuf\" pid=42\n",
            "",
        ] {
            assert_eq!(refusal(other.as_bytes()), None);
        }
    }

    #[test]
    fn answers_of_selinux() {
        assert_eq!(allowed("3 ffffffff 0 fffffffd 7 0"), Some(3));
        assert_eq!(allowed(""), None);
    }

    #[test]
    fn labels() {
        assert_eq!(label(b"unconfined\n").as_deref(), Some("unconfined"));
        assert_eq!(
            label(b"system_u:object_r:device_t:s0\0").as_deref(),
            Some("system_u:object_r:device_t:s0")
        );
        assert_eq!(label(b"\0"), None);
    }
}
