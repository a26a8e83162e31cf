// SPDX-License-Identifier: MIT OR Apache-2.0

//! Looking at a program: can the shim reach it?

use std::ffi::CString;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

/// Why the shim cannot reach a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Set-user-ID, set-group-ID.
    SetId,
    /// It gains capabilities from its file.
    FileCapabilities,
    /// No dynamic linker is asked for.
    Static,
    /// Go's runtime makes its own system calls.
    Go,
    /// A program for 32-bit systems.
    Bits32,
    /// A program for another machine.
    OtherMachine,
    /// Linked with musl, whose programs cannot load libraries made for glibc.
    Musl,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SetId => {
                "it is set-user-ID or set-group-ID, so the dynamic linker ignores LD_PRELOAD; \
                 run it as the user that it becomes, without the bit"
            }
            Self::FileCapabilities => {
                "its file has capabilities (getcap), so the dynamic linker ignores LD_PRELOAD; \
                 start it from a service that gives it AmbientCapabilities instead"
            }
            Self::Static => {
                "it is statically linked, so nothing can be preloaded; use a dynamically linked \
                 build, or teach it /dev/pinbuf"
            }
            Self::Go => {
                "it is written in Go, which makes system calls without libc; teach it /dev/pinbuf"
            }
            Self::Bits32 => {
                "it is a 32-bit program, and the shim is for 64 bits; use a 64-bit build"
            }
            Self::OtherMachine => "it is for another kind of machine",
            Self::Musl => "it is linked with musl, and the shim with glibc",
        })
    }
}

/// A program, as far as it matters here.
#[derive(Debug)]
pub struct Program {
    /// The file that would be executed.
    pub path: PathBuf,
    /// The interpreters of a script, outermost last, and the file that is loaded in the end.
    pub loaded: PathBuf,
    /// Why the shim cannot reach it.
    pub obstacles: Vec<Obstacle>,
}

impl Program {
    /// Finds a command as a shell would, and looks at it.
    pub fn find(command: &Path) -> Result<Self> {
        let path = locate(command)?;
        let mut loaded = path.clone();
        let mut obstacles = Vec::new();
        // The kernel follows four scripts.
        for _ in 0..5 {
            match inspect(&loaded)? {
                Kind::Program(found) => {
                    obstacles.extend(found);
                    break;
                }
                Kind::Script(interpreter) => loaded = locate(&interpreter)?,
            }
        }
        Ok(Self {
            path,
            loaded,
            obstacles,
        })
    }
}

fn locate(command: &Path) -> Result<PathBuf> {
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if command.as_os_str().as_bytes().contains(&b'/') {
        if !command.exists() {
            bail!("{}: no such file", command.display());
        }
        if !is_program(command) {
            bail!("{}: not executable", command.display());
        }
        return Ok(command.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|directory| directory.join(command))
        .find(|path| is_program(path))
        .with_context(|| format!("{}: command not found", command.display()))
}

enum Kind {
    Program(Vec<Obstacle>),
    Script(PathBuf),
}

fn inspect(path: &Path) -> Result<Kind> {
    let file = File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut start = Vec::new();
    (&file).take(256).read_to_end(&mut start)?;
    if let Some(line) = start.strip_prefix(b"#!") {
        return Ok(Kind::Script(
            interpreter(line).context("a script without an interpreter")?,
        ));
    }
    let mut obstacles = elf(&file, &start).with_context(|| format!("{}", path.display()))?;
    let metadata = file.metadata()?;
    // A file's bits do nothing for those that it gives nothing new.
    let set_user =
        metadata.mode() & 0o4000 != 0 && metadata.uid() != nix::unistd::geteuid().as_raw();
    let set_group =
        metadata.mode() & 0o2010 == 0o2010 && metadata.gid() != nix::unistd::getegid().as_raw();
    if set_user || set_group {
        obstacles.push(Obstacle::SetId);
    }
    if has_capabilities(path) && !nix::unistd::geteuid().is_root() {
        obstacles.push(Obstacle::FileCapabilities);
    }
    Ok(Kind::Program(obstacles))
}

/// The program that runs a script; of `env`, the one that env runs.
fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|&byte| byte == b'\n').next()?;
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_whitespace();
    let first = PathBuf::from(words.next()?);
    if first.file_name().is_some_and(|name| name == "env") {
        if let Some(word) = words.find(|word| !word.starts_with('-') && !word.contains('=')) {
            return Some(word.into());
        }
    }
    Some(first)
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    let name = c"security.capability";
    // SAFETY: terminated strings, and no buffer to write to.
    unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "riscv64")]
const MACHINE: u16 = 243;

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// Reads an ELF file's headers.
fn elf(file: &File, start: &[u8]) -> Result<Vec<Obstacle>> {
    if start.get(..4) != Some(b"\x7fELF") || start.len() < 64 {
        bail!("neither a program nor a script");
    }
    if start[4] == 1 {
        return Ok(vec![Obstacle::Bits32]);
    }
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u64_at = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    if u16_at(start, 18) != MACHINE {
        return Ok(vec![Obstacle::OtherMachine]);
    }
    let (offset, size, count) = (u64_at(start, 32), u16_at(start, 54), u16_at(start, 56));
    if size < 56 {
        bail!("a damaged program");
    }
    let mut headers = vec![0; usize::from(size) * usize::from(count)];
    file.read_exact_at(&mut headers, offset)
        .context("a damaged program")?;
    let mut obstacles = Vec::new();
    let mut interpreter = None;
    let mut go = false;
    for header in headers.chunks_exact(usize::from(size)) {
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut content = vec![0; u64_at(header, 32).min(4096) as usize];
        if matches!(kind, PT_INTERP | PT_NOTE) {
            file.read_exact_at(&mut content, u64_at(header, 8))
                .context("a damaged program")?;
        }
        match kind {
            PT_INTERP => interpreter = Some(String::from_utf8_lossy(&content).into_owned()),
            // The build's number, which Go's linker puts into every program.
            PT_NOTE => go |= content.windows(8).any(|w| w == b"\x04\0\0\0Go\0\0"),
            _ => {}
        }
    }
    // A note's type precedes its name; Go's is 4.
    if go {
        obstacles.push(Obstacle::Go);
    }
    match interpreter {
        None => obstacles.push(Obstacle::Static),
        Some(interpreter) if interpreter.contains("ld-musl") => obstacles.push(Obstacle::Musl),
        Some(_) => {}
    }
    Ok(obstacles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters() {
        let of = |line: &str| interpreter(line.as_bytes()).unwrap();
        assert_eq!(of("/bin/sh\nrest"), Path::new("/bin/sh"));
        assert_eq!(of(" /usr/bin/perl -w\n"), Path::new("/usr/bin/perl"));
        assert_eq!(of("/usr/bin/env python3\n"), Path::new("python3"));
        assert_eq!(of("/usr/bin/env -S A=1 node --x\n"), Path::new("node"));
        assert_eq!(interpreter(b"\n"), None);
    }

    #[test]
    fn this_program_can_be_reached() {
        let program = Program::find(&std::env::current_exe().unwrap()).unwrap();
        assert_eq!(program.obstacles, []);
        assert!(Program::find(Path::new("no-such-command")).is_err());
        assert!(Program::find(Path::new("/etc/passwd")).is_err());
    }
}
