// SPDX-License-Identifier: MIT OR Apache-2.0

//! Looking at a process: did the shim reach it?

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::access::{number_of, Credentials, Node};
use crate::{command, dmabuf, supervise};

/// A process, as far as it matters here.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The program that it executes.
    pub program: PathBuf,
    /// It was started with a scrubbed environment: the dynamic linker ignored LD_PRELOAD.
    pub secure: bool,
    /// Its program's file gives capabilities.
    pub file_capabilities: bool,
    /// The shim is loaded.
    pub shim: bool,
    /// The supervisor of `pinbuf run` that serves it.
    pub supervisor: Option<u32>,
    /// pinbuf's device is open, under whichever name it was opened.
    pub pinbuf_open: bool,
    /// The kernel's own udmabuf is open.
    pub udmabuf_open: bool,
    /// Buffers that it has, of pinbuf's and of the kernel's udmabuf.
    pub pinbufs_buffers: usize,
    pub udmabufs_buffers: usize,
    /// `/dev/pinbuf` as it sees it.
    pub device: io::Result<Node>,
    /// Whom the kernel takes it for.
    pub credentials: Credentials,
}

impl Process {
    /// A path to the very file that it executes, also if that was replaced meanwhile.
    pub fn executable(&self) -> PathBuf {
        format!("/proc/{}/exe", self.pid).into()
    }

    /// Looks at it, for which it must be one of ours, or we be root.
    pub fn find(pid: u32) -> Result<Self> {
        let path = |name: &str| format!("/proc/{pid}/{name}");
        let program = fs::read_link(path("exe")).with_context(|| match fs::exists(path("")) {
            Ok(true) => {
                format!("no permission to examine process {pid}: run this as root or as its user")
            }
            _ => format!("there is no process {pid}"),
        })?;
        let auxv = fs::read(path("auxv"))?;
        let maps = fs::read(path("maps"))?;
        let shim = lines(&maps).any(is_the_shims);
        let (mut pinbuf_open, mut udmabuf_open) = (false, false);
        let (pinbuf, udmabuf) = (number_of("pinbuf"), number_of("udmabuf"));
        for entry in fs::read_dir(path("fd"))? {
            // By its number: a name is the view of another /dev, or that of some other file. Descriptors come and go
            // meanwhile.
            if let Some(number) = character_device(&entry?.path()) {
                pinbuf_open |= Some(number) == pinbuf;
                udmabuf_open |= Some(number) == udmabuf;
            }
        }
        let (pinbufs_buffers, udmabufs_buffers) = buffers(pid)?;
        let credentials = Credentials::of(&pid.to_string())?;
        let supervisor = (credentials.filters > 0).then(|| supervisor(pid)).flatten();
        Ok(Self {
            pid,
            program,
            secure: is_secure(&auxv, is_32_bit(&maps)),
            file_capabilities: File::open(path("exe"))
                .is_ok_and(|file| command::has_capabilities(&file)),
            shim,
            supervisor,
            pinbuf_open,
            udmabuf_open,
            pinbufs_buffers,
            udmabufs_buffers,
            device: Node::of(&pid.to_string(), "/dev/pinbuf"),
            credentials,
        })
    }
}

/// The number of the character device that a path leads to. The file system is not asked for what the kernel knows: that
/// of another user (FUSE) may never answer.
pub fn character_device(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let (flags, mask) = (libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE);
    // SAFETY: a terminated string, and a struct to write to.
    let result = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            mask,
            found.as_mut_ptr(),
        )
    };
    // SAFETY: integers, which are zero where nothing was written.
    let found = unsafe { found.assume_init() };
    let is_device = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    let (major, minor) = (found.stx_rdev_major, found.stx_rdev_minor);
    (result == 0 && is_device).then(|| libc::makedev(major, minor))
}

/// The nearest of a process's ancestors that is a supervisor: it says so by its name.
fn supervisor(pid: u32) -> Option<u32> {
    let mut next = pid;
    loop {
        let status = fs::read(format!("/proc/{next}/status")).ok()?;
        let field = |name: &[u8]| lines(&status).find_map(|line| line.strip_prefix(name));
        if next != pid && field(b"Name:\t") == Some(supervise::NAME.to_bytes()) {
            return Some(next);
        }
        let parent = std::str::from_utf8(field(b"PPid:\t")?).ok()?;
        next = parent.parse().ok().filter(|&parent| parent != 0)?;
    }
}

/// How many buffers of pinbuf's and of udmabuf's a process has descriptors of.
fn buffers(pid: u32) -> io::Result<(usize, usize)> {
    let mut found = std::collections::BTreeMap::new();
    for thread in dmabuf::tables(pid)? {
        for buffer in dmabuf::descriptors(&dmabuf::thread_path(pid, thread))? {
            found.insert(buffer.inode, buffer.exporter);
        }
    }
    let of = |exporter| found.values().filter(|&found| found == exporter).count();
    Ok((of(dmabuf::PINBUF), of(dmabuf::UDMABUF)))
}

/// The lines of a file in /proc, which are bytes: names are in them.
fn lines(maps: &[u8]) -> impl Iterator<Item = &[u8]> {
    maps.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
}

/// Is this the shim's code? Its file may have been replaced since.
fn is_the_shims(line: &[u8]) -> bool {
    let name = line.strip_suffix(b" (deleted)").unwrap_or(line);
    let mode = line.split(|&byte| byte == b' ').nth(1).unwrap_or_default();
    mode.contains(&b'x') && name.ends_with(b"/libudmabuf_shim.so")
}

const AT_SECURE: u64 = 23;

/// Whether the kernel asked the dynamic linker not to trust the environment.
fn is_secure(auxv: &[u8], bits32: bool) -> bool {
    let word = if bits32 { 4 } else { 8 };
    auxv.chunks_exact(2 * word).any(|pair| {
        let (kind, value) = pair.split_at(word);
        let kind = kind
            .iter()
            .rev()
            .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        kind == AT_SECURE && value.iter().any(|&byte| byte != 0)
    })
}

/// Do all mappings lie below 4 GiB, but for the page of the old system calls?
fn is_32_bit(maps: &[u8]) -> bool {
    lines(maps)
        .filter(|line| !line.ends_with(b"[vsyscall]"))
        .filter_map(|line| line.split(|&byte| byte == b'-').next())
        .all(|start| start.len() <= 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_found_in_both_layouts() {
        let wide = |value: u64| -> Vec<u8> {
            [6, 4096, AT_SECURE, value, 0, 0]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes())
                .collect()
        };
        assert!(is_secure(&wide(1), false));
        assert!(!is_secure(&wide(0), false));
        let narrow: Vec<u8> = [23_u32, 1, 0, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert!(is_secure(&narrow, true));
        // A value that looks like the mark.
        let other: Vec<u8> = [6, AT_SECURE, 0, 0]
            .iter()
            .flat_map(|word: &u64| word.to_le_bytes())
            .collect();
        assert!(!is_secure(&other, false));
    }

    #[test]
    fn this_process() {
        let process = Process::find(std::process::id()).unwrap();
        assert_eq!(process.program, std::env::current_exe().unwrap());
        assert_eq!(process.supervisor, None);
        assert!(!process.secure && !process.shim && !process.udmabuf_open);
        assert_eq!((process.pinbufs_buffers, process.udmabufs_buffers), (0, 0));
        assert!(Process::find(u32::MAX).is_err());
    }

    #[test]
    fn devices_are_known_by_their_numbers() {
        let null = nix::sys::stat::makedev(1, 3);
        assert_eq!(character_device(Path::new("/dev/null")), Some(null));
        for other in ["/", "/proc/version", "/no/such/file"] {
            assert_eq!(character_device(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn narrow_processes() {
        assert!(is_32_bit(
            b"08048000-08049000 r-xp 0 0:0 1 /a\nf7fd0000-f7fd2000 r-xp 0 0:0 0 [vdso]\n\
             ffffffffff600000-ffffffffff601000 --xp 0 0:0 0 [vsyscall]"
        ));
        assert!(!is_32_bit(
            b"00400000-00401000 r-xp 0 0:0 1 /a\n7ffff7fd0000-7ffff7fd2000 r-xp"
        ));
    }

    #[test]
    fn the_shim_is_code() {
        let path = "7f00-8f00 r-xp 00000000 08:01 7    /usr/lib/pinbuf/libudmabuf_shim.so";
        for (line, wanted) in [
            (path.to_owned(), true),
            (format!("{path} (deleted)"), true),
            (path.replace("r-xp", "r--p"), false),
            (format!("{path}.bak"), false),
            ("7f00-8f00 rw-p 00000000 00:00 0".to_owned(), false),
        ] {
            assert_eq!(is_the_shims(line.as_bytes()), wanted, "{line}");
        }
    }

    #[test]
    fn names_of_mapped_files_may_be_any_bytes() {
        use std::os::unix::ffi::OsStrExt;

        let directory = tempfile::tempdir().unwrap();
        let name = std::ffi::OsStr::from_bytes(b"\x80\xff\n");
        let path = directory.path().join(name);
        fs::write(&path, [0; 4096]).unwrap();
        let file = File::open(&path).unwrap();
        let len = std::num::NonZero::new(4096).unwrap();
        let (prot, flags) = (
            nix::sys::mman::ProtFlags::PROT_READ,
            nix::sys::mman::MapFlags::MAP_PRIVATE,
        );
        // SAFETY: a new mapping, which nothing uses.
        unsafe { nix::sys::mman::mmap(None, len, prot, flags, &file, 0) }.unwrap();
        Process::find(std::process::id()).unwrap();
    }
}
