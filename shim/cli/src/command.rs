// SPDX-License-Identifier: MIT OR Apache-2.0

//! Looking at a program: can the shim reach it?

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::elf::Elf;
use crate::text::of_path;

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

impl Obstacle {
    /// Does the supervisor of `pinbuf run` reach it?
    pub fn is_served(self) -> bool {
        match self {
            Self::Static | Self::Go | Self::Bits32 | Self::Musl => true,
            // Under a filter it does not get its rights; on another machine's emulator, requests are not its own.
            Self::SetId | Self::FileCapabilities | Self::OtherMachine => false,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SetId => {
                "it is set-user-ID or set-group-ID, so the dynamic linker ignores LD_PRELOAD, and under the supervisor \
                 it would not get these rights; remove the bit, and run it as the user that it would become"
            }
            Self::FileCapabilities => {
                "its file has capabilities (getcap), so the dynamic linker ignores LD_PRELOAD, and under the \
                 supervisor it would not get them; remove them from the file (`setcap -r FILE`, again after each \
                 update of its package), and give them by AmbientCapabilities= of a service: that does not help as \
                 long as the file has any"
            }
            Self::Static => "it is statically linked, so nothing can be preloaded",
            Self::Go => "it is written in Go, whose runtime makes system calls without libc",
            Self::Bits32 => "it is a 32-bit program, and the shim is built for 64 bits",
            Self::OtherMachine => {
                "it is built for another architecture; use a build for this machine"
            }
            Self::Musl => {
                "it is linked with musl, whose programs cannot load the shim, which is linked with glibc"
            }
        })
    }
}

/// Why there is nothing to execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No such file, or no command of this name.
    NotFound(PathBuf),
    /// A file that may not be executed.
    NotExecutable(PathBuf),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(path) => write!(f, "{}: not found", of_path(path)),
            Self::NotExecutable(path) => write!(f, "{}: not executable", of_path(path)),
        }
    }
}

impl std::error::Error for Missing {}

/// A program, as far as it matters here.
#[derive(Debug)]
pub struct Program {
    /// The file that would be executed.
    pub path: PathBuf,
    /// The interpreters of a script, outermost last, and the file that is loaded in the end.
    pub loaded: PathBuf,
    /// Why the shim cannot reach it.
    pub obstacles: Vec<Obstacle>,
    /// How many instructions of its own make system calls: what it opens by these, the shim does not
    /// see. None where they cannot be counted.
    pub system_calls: Option<usize>,
}

impl Program {
    /// Finds a command as a shell would, and looks at it.
    pub fn find(command: &Path) -> Result<Self> {
        let path = locate(command)?;
        let mut loaded = path.clone();
        let mut obstacles = Vec::new();
        let mut system_calls = None;
        // The kernel follows four scripts.
        for _ in 0..5 {
            match inspect(&loaded)? {
                Kind::Program(found, calls) => {
                    obstacles.extend(found);
                    system_calls = calls;
                    break;
                }
                Kind::Script(interpreter) => loaded = locate(&interpreter)?,
            }
        }
        Ok(Self {
            path,
            loaded,
            obstacles,
            system_calls,
        })
    }
}

fn locate(command: &Path) -> Result<PathBuf, Missing> {
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if command.as_os_str().as_bytes().contains(&b'/') {
        return if is_program(command) {
            Ok(command.to_owned())
        } else if command.exists() {
            Err(Missing::NotExecutable(command.to_owned()))
        } else {
            Err(Missing::NotFound(command.to_owned()))
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|directory| directory.join(command))
        .find(|path| is_program(path))
        .ok_or_else(|| Missing::NotFound(command.to_owned()))
}

enum Kind {
    Program(Vec<Obstacle>, Option<usize>),
    Script(PathBuf),
}

fn inspect(path: &Path) -> Result<Kind> {
    let file = File::open(path).with_context(|| format!("reading {}", of_path(path)))?;
    let mut start = Vec::new();
    (&file).take(256).read_to_end(&mut start)?;
    if let Some(line) = start.strip_prefix(b"#!") {
        return Ok(Kind::Script(
            interpreter(line).context("the script names no interpreter")?,
        ));
    }
    let elf = Elf::read(&file).with_context(|| of_path(path))?;
    let mut obstacles = of_elf(&elf);
    if !ignores_privileges(&file)? {
        let metadata = file.metadata()?;
        // A file's bits do nothing for those that it gives nothing new.
        let set_user =
            metadata.mode() & 0o4000 != 0 && metadata.uid() != nix::unistd::getuid().as_raw();
        let set_group =
            metadata.mode() & 0o2010 == 0o2010 && metadata.gid() != nix::unistd::getgid().as_raw();
        if set_user || set_group {
            obstacles.push(Obstacle::SetId);
        }
        if has_capabilities(&file) && !nix::unistd::getuid().is_root() {
            obstacles.push(Obstacle::FileCapabilities);
        }
    }
    Ok(Kind::Program(obstacles, elf.system_calls))
}

/// The program that runs a script; of `env`, the one that env runs.
fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|&byte| byte == b'\n').next()?;
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let path = |word| PathBuf::from(OsStr::from_bytes(word));
    let first = path(words.next()?);
    if first.file_name().is_some_and(|name| name == "env") {
        if let Some(word) = words.find(|word| word[0] != b'-' && !word.contains(&b'=')) {
            return Some(path(word));
        }
    }
    Some(first)
}

/// Does executing this file never give privileges?  Then it is as any other.
fn ignores_privileges(file: &File) -> Result<bool> {
    let mounted = nix::sys::statvfs::fstatvfs(file)?.flags();
    // SAFETY: no memory is involved.
    let given_up = unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) } == 1;
    Ok(given_up || mounted.contains(nix::sys::statvfs::FsFlags::ST_NOSUID))
}

/// Does a program's file give capabilities?
pub fn has_capabilities(file: &File) -> bool {
    let name = c"security.capability";
    // SAFETY: a terminated string, and no buffer to write to.
    unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

/// What the headers of a program's file say against preloading.
pub fn obstacles_of_file(path: &Path) -> Result<Vec<Obstacle>> {
    Ok(of_elf(&Elf::read(&File::open(path)?)?))
}

fn of_elf(elf: &Elf) -> Vec<Obstacle> {
    if elf.bits32 {
        return vec![Obstacle::Bits32];
    }
    if elf.foreign {
        return vec![Obstacle::OtherMachine];
    }
    let mut obstacles = Vec::new();
    if elf.go {
        obstacles.push(Obstacle::Go);
    }
    match &elf.interpreter {
        None => obstacles.push(Obstacle::Static),
        Some(interpreter) if interpreter.contains("ld-musl") => obstacles.push(Obstacle::Musl),
        Some(_) => {}
    }
    obstacles
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::{program, GLIBC};

    #[test]
    fn interpreters() {
        let of = |line: &str| interpreter(line.as_bytes()).unwrap();
        assert_eq!(of("/bin/sh\nrest"), Path::new("/bin/sh"));
        assert_eq!(of(" /usr/bin/perl -w\n"), Path::new("/usr/bin/perl"));
        assert_eq!(of("/usr/bin/env python3\n"), Path::new("python3"));
        assert_eq!(of("/usr/bin/env -S A=1 node --x\n"), Path::new("node"));
        assert_eq!(interpreter(b"\n"), None);
        let bytes = interpreter(b"/bin/\xff sh\n").unwrap();
        assert_eq!(bytes.as_os_str().as_bytes(), b"/bin/\xff");
    }

    #[test]
    fn this_program_can_be_reached() {
        let program = Program::find(&std::env::current_exe().unwrap()).unwrap();
        assert_eq!(program.obstacles, []);
    }

    #[test]
    fn missing_programs() {
        let of = |name: &str| {
            let error = Program::find(Path::new(name)).unwrap_err();
            error.downcast_ref::<Missing>().cloned()
        };
        for name in ["no-such-command", "/no/such/file"] {
            assert_eq!(of(name), Some(Missing::NotFound(name.into())));
        }
        let name = "/etc/passwd";
        assert_eq!(of(name), Some(Missing::NotExecutable(name.into())));
    }

    /// Writes an executable file and looks at it.
    fn look(content: &[u8]) -> Result<Program> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Program::find(&path)
    }

    #[test]
    fn obstacles_in_headers() {
        let musl: (u32, &[u8]) = (3, b"/lib/ld-musl-x86_64.so.1\0");
        let go = ".go.buildinfo";
        let mut narrow = program(&[GLIBC], &[]);
        narrow[4] = 1;
        let mut foreign = program(&[GLIBC], &[]);
        foreign[18] = 8;
        for (content, wanted) in [
            (program(&[GLIBC], &[]), vec![]),
            (program(&[], &[]), vec![Obstacle::Static]),
            (program(&[musl], &[]), vec![Obstacle::Musl]),
            (program(&[GLIBC], &[go]), vec![Obstacle::Go]),
            (program(&[], &[go]), vec![Obstacle::Go, Obstacle::Static]),
            (narrow, vec![Obstacle::Bits32]),
            (foreign, vec![Obstacle::OtherMachine]),
        ] {
            assert_eq!(look(&content).unwrap().obstacles, wanted);
        }
    }

    #[test]
    fn system_calls_of_its_own_are_counted() {
        // xor eax, eax; syscall; mov eax, 0x050f0f05; ret: the bytes of a number do not count.
        #[cfg(target_arch = "x86_64")]
        let code: &[u8] = b"\x31\xc0\x0f\x05\xb8\x05\x0f\x0f\x05\xc3";
        // mov w0, #0; svc #0; svc #1; ret: Linux takes no other number than 0.
        #[cfg(not(target_arch = "x86_64"))]
        let code: &[u8] = b"\0\0\x80\x52\x01\0\0\xd4\x21\0\0\xd4\xc0\x03\x5f\xd6";
        let program = look(&program(&[GLIBC, (1, code)], &[])).unwrap();
        let counted = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));
        let wanted = counted.then_some(1);
        assert_eq!(program.system_calls, wanted);
        assert_eq!(program.obstacles, []);
    }

    #[test]
    fn scripts_are_as_their_interpreters() {
        let this = std::env::current_exe().unwrap();
        let script = format!("#!{}\n", this.display());
        let program = look(script.as_bytes()).unwrap();
        assert_eq!((program.loaded, program.obstacles), (this, vec![]));
        assert!(look(b"#!\n").is_err());
        assert!(look(b"neither").is_err());
    }
}
