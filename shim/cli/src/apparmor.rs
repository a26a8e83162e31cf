// SPDX-License-Identifier: MIT OR Apache-2.0

//! AppArmor: which profile confines a program, and what that allows.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::text::of_bytes;

const KERNEL: &str = "/sys/kernel/security/apparmor";

/// Does the kernel use it?
pub fn in_use() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.trim() == "Y")
}

/// How a process is confined; `None` if it is not.
pub fn of_process(pid: &str) -> Option<Confinement> {
    let text = fs::read(format!("/proc/{pid}/attr/apparmor/current"))
        .or_else(|_| fs::read(format!("/proc/{pid}/attr/current")))
        .ok()?;
    Confinement::parse(of_bytes(&text).trim_end_matches(['\0', '\n']))
}

/// The profile that the kernel would choose for a program that an unconfined process starts.
pub fn of_program(program: &Path) -> Option<Confinement> {
    let path = program.canonicalize().ok()?;
    let declared = declarations();
    let read = |file: PathBuf| {
        fs::read(file)
            .ok()
            .map(|text| of_bytes(text.trim_ascii_end()))
    };
    fs::read_dir(Path::new(KERNEL).join("policy/profiles"))
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = read(entry.path().join("name"))?;
            let mode = read(entry.path().join("mode"))?;
            let attachment = match read(entry.path().join("attach"))? {
                // The kernel has the expression only in the form that it matches with.
                text if text == "<unknown>" => declared.get(&name)?.clone(),
                text => text,
            };
            let fits = matches(attachment.as_bytes(), path.as_os_str().as_bytes());
            // Of several, the kernel takes the most exact one; roughly the longest.
            (fits && mode != "unconfined").then_some((attachment.len(), Confinement { name, mode }))
        })
        .max_by_key(|(exactness, _)| *exactness)
        .map(|(_, confinement)| confinement)
}

/// Where profiles are kept.
const FILES: &str = "/etc/apparmor.d";

/// What profiles are attached to, by name, as their files say.
fn declarations() -> HashMap<String, String> {
    let files = fs::read_dir(FILES).into_iter().flatten().flatten();
    files
        .filter_map(|entry| fs::read(entry.path()).ok())
        .flat_map(|text| {
            of_bytes(&text)
                .lines()
                .filter_map(declaration)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// A line such as `profile NAME ATTACHMENT flags=(complain) {`.
fn declaration(line: &str) -> Option<(String, String)> {
    let rest = line.trim_start().strip_prefix("profile ")?;
    let mut words = rest.split_whitespace().map(|word| word.trim_matches('"'));
    let (name, attachment) = (words.next()?, words.next()?);
    attachment
        .starts_with('/')
        .then(|| (name.to_owned(), attachment.to_owned()))
}

/// A profile, and whether it is enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// The profile's name.
    pub name: String,
    /// `enforce`, `complain`, `kill`, …
    pub mode: String,
}

/// What a profile allows for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Opening it for reading and writing.
    pub read_write: bool,
    /// Reading and mapping it as a library.
    pub library: bool,
}

impl Confinement {
    /// From what /proc says: `profile (mode)`, or `unconfined`.
    fn parse(text: &str) -> Option<Self> {
        let (name, mode) = match text.rsplit_once(" (") {
            Some((name, mode)) => (name, mode.trim_end_matches(')')),
            None => (text, "unconfined"),
        };
        (mode != "unconfined" && !name.is_empty()).then(|| Self {
            name: name.to_owned(),
            mode: mode.to_owned(),
        })
    }

    /// Does it only write down what it would refuse?
    pub fn only_complains(&self) -> bool {
        self.mode == "complain"
    }

    /// Asks the kernel what the profile allows; `None` if it does not tell.
    pub fn allows(&self, file: &Path) -> Option<Allowed> {
        let mut query = b"label\0".to_vec();
        query.extend(self.name.as_bytes());
        query.extend([0, CLASS_FILE]);
        query.extend(file.as_os_str().as_bytes());
        // The answer belongs to the descriptor that the question was written to.
        let mut kernel = File::options()
            .read(true)
            .write(true)
            .open(Path::new(KERNEL).join(".access"))
            .ok()?;
        kernel.write_all(&query).ok()?;
        let mut answer = String::new();
        kernel.read_to_string(&mut answer).ok()?;
        granted(&answer)
    }
}

/// The kernel's number for rules about files, and for what they allow.
const CLASS_FILE: u8 = 2;
const EXECUTE_MAP: u32 = 1 << 16;
const WRITE: u32 = 1 << 1;
const READ: u32 = 1 << 2;

/// Lines such as `allow 0x00000006` and `deny 0x00000000`.
fn granted(answer: &str) -> Option<Allowed> {
    let mask = |kind: &str| -> Option<u32> {
        let value = answer.lines().find_map(|line| line.strip_prefix(kind))?;
        u32::from_str_radix(value.trim().trim_start_matches("0x"), 16).ok()
    };
    let bits = mask("allow ")? & !mask("deny ")?;
    Some(Allowed {
        read_write: bits & (READ | WRITE) == READ | WRITE,
        library: bits & (READ | EXECUTE_MAP) == READ | EXECUTE_MAP,
    })
}

/// Does a path match one of AppArmor's expressions?
fn matches(expression: &[u8], path: &[u8]) -> bool {
    let Some((&first, rest)) = expression.split_first() else {
        return path.is_empty();
    };
    let next = |wanted: &dyn Fn(u8) -> bool, rest: &[u8]| {
        path.split_first()
            .is_some_and(|(&byte, path)| wanted(byte) && matches(rest, path))
    };
    match first {
        b'*' => {
            let (deep, rest) = match rest.strip_prefix(b"*") {
                Some(rest) => (true, rest),
                None => (false, rest),
            };
            let reach = if deep {
                path.len()
            } else {
                path.iter()
                    .position(|&byte| byte == b'/')
                    .unwrap_or(path.len())
            };
            (0..=reach).any(|skip| matches(rest, &path[skip..]))
        }
        b'?' => next(&|byte| byte != b'/', rest),
        b'[' => match rest.iter().position(|&byte| byte == b']') {
            Some(end) => next(&|byte| one_of(&rest[..end], byte), &rest[end + 1..]),
            None => false,
        },
        b'{' => match alternatives(rest) {
            Some((alternatives, rest)) => alternatives
                .iter()
                .any(|alternative| matches(&[alternative, rest].concat(), path)),
            None => false,
        },
        b'\\' => match rest.split_first() {
            Some((&literal, rest)) => next(&|byte| byte == literal, rest),
            None => false,
        },
        literal => next(&|byte| byte == literal, rest),
    }
}

/// A set such as `a-z_` or `^/`.
fn one_of(set: &[u8], byte: u8) -> bool {
    let (negated, set) = match set.strip_prefix(b"^") {
        Some(set) => (true, set),
        None => (false, set),
    };
    let mut found = false;
    let mut rest = set;
    while let Some((&first, after)) = rest.split_first() {
        if let [b'-', last, after @ ..] = after {
            found |= (first..=*last).contains(&byte);
            rest = after;
        } else {
            found |= first == byte;
            rest = after;
        }
    }
    found != negated
}

/// Splits what follows a `{` into the alternatives and what follows the `}`.
fn alternatives(text: &[u8]) -> Option<(Vec<&[u8]>, &[u8])> {
    let mut found = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, &byte) in text.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b'}' => {
                found.push(&text[start..at]);
                return Some((found, &text[at + 1..]));
            }
            b',' if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        for (expression, path, wanted) in [
            ("/usr/bin/man", "/usr/bin/man", true),
            ("/usr/bin/man", "/usr/bin/mandb", false),
            ("/usr/{bin,sbin}/x", "/usr/sbin/x", true),
            ("/usr/{bin,sbin}/x", "/usr/lib/x", false),
            ("/{,usr/}{,s}bin/x", "/bin/x", true),
            ("/{,usr/}{,s}bin/x", "/usr/sbin/x", true),
            ("/a{b{c,d},e}f", "/abdf", true),
            ("/opt/*/x", "/opt/a/x", true),
            ("/opt/*/x", "/opt/a/b/x", false),
            ("/opt/**/x", "/opt/a/b/x", true),
            ("/opt/**", "/opt/a/b", true),
            ("/o?t", "/opt", true),
            ("/o?t", "/o/t", false),
            ("/py[23].[0-9]", "/py3.7", true),
            ("/py[^2]", "/py2", false),
            (r"/a\*", "/a*", true),
            (r"/a\*", "/ab", false),
            ("/a{b", "/ab", false),
            ("/a[b", "/ab", false),
        ] {
            let seen = matches(expression.as_bytes(), path.as_bytes());
            assert_eq!(seen, wanted, "{expression} {path}");
        }
    }

    #[test]
    fn declared_attachments() {
        let of = |line: &str| declaration(line);
        let wanted = Some(("man".to_owned(), "/usr/bin/man".to_owned()));
        assert_eq!(of("profile man /usr/bin/man flags=(complain) {"), wanted);
        assert_eq!(of("  profile man \"/usr/bin/man\" {"), wanted);
        assert_eq!(of("profile man {"), None);
        assert_eq!(of("profile man flags=(complain) {"), None);
        assert_eq!(of("# profile man /usr/bin/man"), None);
    }

    #[test]
    fn confinements() {
        assert_eq!(Confinement::parse("unconfined"), None);
        assert_eq!(Confinement::parse(""), None);
        assert_eq!(Confinement::parse("firefox (unconfined)"), None);
        let found = Confinement::parse("/usr/bin/a (b) (enforce)").unwrap();
        assert_eq!(
            (found.name.as_str(), found.mode.as_str()),
            ("/usr/bin/a (b)", "enforce")
        );
        assert!(!found.only_complains());
    }

    #[test]
    fn answers() {
        let all = "allow 0x00010006\ndeny 0x00000000\naudit 0x00000000\nquiet 0x00000000\n";
        let yes = Allowed {
            read_write: true,
            library: true,
        };
        assert_eq!(granted(all), Some(yes));
        let denied = granted("allow 0x00010006\ndeny 0x00000002\n").unwrap();
        assert!(!denied.read_write && denied.library);
        assert_eq!(granted("nonsense"), None);
    }
}
