// SPDX-License-Identifier: MIT OR Apache-2.0

//! Looking at a process: did the shim reach it?

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A process, as far as it matters here.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The program that it executes.
    pub program: PathBuf,
    /// It was started with a scrubbed environment: the dynamic linker ignored LD_PRELOAD.
    pub secure: bool,
    /// The shim is loaded.
    pub shim: bool,
    /// pinbuf's device, under whichever name it opened it, or buffers of pinbuf's are open.
    pub uses_pinbuf: bool,
    /// The kernel's own udmabuf is open.
    pub uses_udmabuf: bool,
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
        let maps = fs::read_to_string(path("maps"))?;
        let (mut uses_pinbuf, mut uses_udmabuf) = (false, false);
        for entry in fs::read_dir(path("fd"))? {
            let entry = entry?;
            match fs::read_link(entry.path()) {
                Ok(target) => {
                    let target = target.to_string_lossy().into_owned();
                    uses_udmabuf |= target == "/dev/udmabuf";
                    uses_pinbuf |= target == "/dev/pinbuf"
                        || (target.starts_with("/dmabuf:") && made_by_pinbuf(pid, &entry));
                }
                // Descriptors come and go meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self {
            pid,
            program,
            secure: is_secure(&auxv, is_32_bit(&maps)),
            shim: maps
                .lines()
                .any(|line| line.ends_with("/libudmabuf_shim.so")),
            uses_pinbuf,
            uses_udmabuf,
        })
    }
}

fn made_by_pinbuf(pid: u32, entry: &fs::DirEntry) -> bool {
    let number = entry.file_name();
    fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy()))
        .is_ok_and(|text| text.lines().any(|line| line == "exp_name:\tpinbuf"))
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
fn is_32_bit(maps: &str) -> bool {
    maps.lines()
        .filter(|line| !line.ends_with("[vsyscall]"))
        .filter_map(|line| line.split('-').next())
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
        assert!(!process.secure && !process.shim && !process.uses_udmabuf);
        assert!(Process::find(u32::MAX).is_err());
    }

    #[test]
    fn narrow_processes() {
        assert!(is_32_bit(
            "08048000-08049000 r-xp 0 0:0 1 /a\nf7fd0000-f7fd2000 r-xp 0 0:0 0 [vdso]\n\
             ffffffffff600000-ffffffffff601000 --xp 0 0:0 0 [vsyscall]"
        ));
        assert!(!is_32_bit(
            "00400000-00401000 r-xp 0 0:0 1 /a\n7ffff7fd0000-7ffff7fd2000 r-xp"
        ));
    }
}
