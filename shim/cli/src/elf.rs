// SPDX-License-Identifier: MIT OR Apache-2.0

//! As much of an ELF program's headers as says whether a library can be preloaded into it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{bail, ensure, Context, Result};

/// The headers of a program's file, as far as they matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elf {
    /// It is for 32-bit systems (also x32); nothing else is known of it then.
    pub bits32: bool,
    /// It is for a machine other than this.
    pub foreign: bool,
    /// The dynamic linker that it asks for.
    pub interpreter: Option<String>,
    /// It was linked by Go.
    pub go: bool,
    /// Instructions in it that make system calls, past libc; none if this machine's cannot be counted.
    pub system_calls: Option<usize>,
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "riscv64")]
const MACHINE: u16 = 243;

const ELFCLASS32: u8 = 1;
const ELFDATA2LSB: u8 = 1;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// A segment's flag: it is executable.
const PF_X: u32 = 1;

/// So much of a program's code is looked at: more than any that is known.
const MOST_CODE: u64 = 256 << 20;

/// Sizes of ELF's own structures for 64 bits.
const HEADER: usize = 64;
const SEGMENT: usize = 56;
const SECTION: usize = 64;

/// No note, name or path that is looked for is longer.
const MOST: u64 = 64 << 10;

/// What begins a note of Go's linker: its type, 4, precedes its owner's name.
const GO_NOTE: &[u8] = b"\x04\0\0\0Go\0\0";
/// The section with the build's description, which stays when a program is stripped and its
/// build's number, the note, is left out.
const GO_SECTION: &[u8] = b".go.buildinfo";

/// Little-endian numbers in a structure.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[at..at + N]);
        bytes
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// Reads `len` bytes of a file, which must have them.
fn part(file: &File, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len)?];
    file.read_exact_at(&mut bytes, offset)
        .context("the ELF file is damaged")?;
    Ok(bytes)
}

impl Elf {
    /// Reads the headers.
    pub fn read(file: &File) -> Result<Self> {
        let mut start = [0; HEADER];
        let len = file.read_at(&mut start, 0)?;
        if len < 20 || !start.starts_with(b"\x7fELF") {
            bail!("the file is neither an ELF program nor a script");
        }
        let header = Fields(&start);
        if start[4] == ELFCLASS32 {
            return Ok(Self {
                bits32: true,
                ..Self::default()
            });
        }
        if start[5] != ELFDATA2LSB || header.u16(18) != MACHINE {
            return Ok(Self {
                foreign: true,
                ..Self::default()
            });
        }
        ensure!(len == HEADER, "the ELF file is damaged");
        let mut elf = Self::default();
        let (offset, size, count) = (header.u64(32), header.u16(54), header.u16(56));
        ensure!(
            count == 0 || usize::from(size) >= SEGMENT,
            "the ELF file is damaged"
        );
        let table = part(file, offset, u64::from(size) * u64::from(count))?;
        for segment in table.chunks_exact(usize::from(size).max(1)) {
            let segment = Fields(segment);
            let (kind, offset, len) = (segment.u32(0), segment.u64(8), segment.u64(32));
            match kind {
                PT_INTERP => {
                    let path = part(file, offset, len.min(MOST))?;
                    let path = path.split(|&byte| byte == 0).next().unwrap_or_default();
                    elf.interpreter = Some(String::from_utf8_lossy(path).into_owned());
                }
                PT_LOAD if segment.u32(4) & PF_X != 0 => {
                    let code = part(file, offset, len.min(MOST_CODE))?;
                    elf.system_calls =
                        system_calls(&code).map(|calls| calls + elf.system_calls.unwrap_or(0));
                }
                PT_NOTE => {
                    let notes = part(file, offset, len.min(MOST))?;
                    elf.go |= notes.windows(GO_NOTE.len()).any(|bytes| bytes == GO_NOTE);
                }
                _ => {}
            }
        }
        // A program needs no sections, so one whose sections cannot be read may run well.
        elf.go |= has_section(file, &header, GO_SECTION).unwrap_or(false);
        Ok(elf)
    }
}

/// The `syscall` instructions in some code, decoded one after the other: the bytes alone are in
/// many numbers and addresses, too.
#[cfg(target_arch = "x86_64")]
fn system_calls(code: &[u8]) -> Option<usize> {
    use iced_x86::{Code, Decoder, DecoderOptions};

    let count = Decoder::new(64, code, DecoderOptions::NONE)
        .iter()
        .filter(|instruction| instruction.code() == Code::Syscall)
        .count();
    Some(count)
}

/// The `svc #0` instructions in some code. Instructions are aligned words; a constant of this value among them would
/// count too.
#[cfg(target_arch = "aarch64")]
fn system_calls(code: &[u8]) -> Option<usize> {
    const SVC: [u8; 4] = 0xd400_0001_u32.to_le_bytes();
    Some(
        code.chunks_exact(SVC.len())
            .filter(|word| *word == SVC)
            .count(),
    )
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn system_calls(_: &[u8]) -> Option<usize> {
    None
}

/// Is there a section of this name?
fn has_section(file: &File, header: &Fields<'_>, wanted: &[u8]) -> Result<bool> {
    let (offset, size, count) = (header.u64(40), header.u16(58), header.u16(60));
    let names = usize::from(header.u16(62));
    if count == 0 || usize::from(size) < SECTION {
        return Ok(false);
    }
    let size = usize::from(size);
    let table = part(file, offset, size as u64 * u64::from(count))?;
    let mut sections = table.chunks_exact(size).map(Fields);
    let place = sections.nth(names).context("no names")?;
    let names = part(file, place.u64(24), place.u64(32).min(MOST))?;
    Ok(table.chunks_exact(size).map(Fields).any(|section| {
        let name = names.get(section.u32(0) as usize..).unwrap_or_default();
        name.split(|&byte| byte == 0).next() == Some(wanted)
    }))
}

#[cfg(test)]
pub mod tests {
    use std::io::Write;

    use super::*;

    /// A program of this machine's with these segments (type, content) and sections (names).
    pub fn program(segments: &[(u32, &[u8])], sections: &[&str]) -> Vec<u8> {
        let mut names = vec![0];
        let mut places = Vec::new();
        for name in sections.iter().copied().chain([".shstrtab"]) {
            places.push(names.len() as u32);
            names.extend(name.bytes().chain([0]));
        }
        let contents_at = HEADER + SEGMENT * segments.len();
        let contents: usize = segments.iter().map(|(_, content)| content.len()).sum();
        let names_at = contents_at + contents;
        let sections_at = names_at + names.len();

        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend(3_u16.to_le_bytes());
        file.extend(MACHINE.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        file.extend(0_u64.to_le_bytes());
        file.extend((HEADER as u64).to_le_bytes());
        file.extend((sections_at as u64).to_le_bytes());
        file.extend(0_u32.to_le_bytes());
        let counts = [
            HEADER,
            SEGMENT,
            segments.len(),
            SECTION,
            places.len(),
            places.len() - 1,
        ];
        for count in counts {
            file.extend((count as u16).to_le_bytes());
        }
        let mut at = contents_at as u64;
        for (kind, content) in segments {
            let len = content.len() as u64;
            file.extend(kind.to_le_bytes());
            // Readable, and code executable.
            let flags = if *kind == PT_LOAD { 5_u32 } else { 4 };
            file.extend(flags.to_le_bytes());
            for field in [at, 0, 0, len, len, 1] {
                file.extend(field.to_le_bytes());
            }
            at += len;
        }
        for (_, content) in segments {
            file.extend(*content);
        }
        file.extend(&names);
        for place in places {
            file.extend(place.to_le_bytes());
            file.extend(3_u32.to_le_bytes());
            for field in [0, 0, names_at as u64, names.len() as u64, 0, 1, 0] {
                file.extend(u64::to_le_bytes(field));
            }
        }
        file
    }

    /// The segment that asks for a dynamic linker.
    pub const GLIBC: (u32, &[u8]) = (PT_INTERP, b"/lib64/ld-linux-x86-64.so.2\0");

    fn read(bytes: &[u8]) -> Result<Elf> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Elf::read(&file)
    }

    #[test]
    fn ordinary_programs() {
        let gnu = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0aaaaaaaaaaaaaaaaaaaa";
        let elf = read(&program(&[GLIBC, (PT_NOTE, gnu)], &[".text", ".data"])).unwrap();
        assert_eq!(
            elf.interpreter.as_deref(),
            Some("/lib64/ld-linux-x86-64.so.2")
        );
        assert!(!elf.go && !elf.bits32 && !elf.foreign);
        let this = File::open("/proc/self/exe").unwrap();
        assert!(!Elf::read(&this).unwrap().go);
    }

    #[test]
    fn static_programs_ask_for_no_linker() {
        let elf = read(&program(&[(1, b"code")], &[])).unwrap();
        assert_eq!(elf.system_calls.unwrap_or(0), 0);
        let rest = Elf {
            system_calls: None,
            ..elf
        };
        assert_eq!(rest, Elf::default());
    }

    #[test]
    fn go_is_known_by_its_note_or_its_section() {
        let note = b"\x04\0\0\0\x08\0\0\0\x04\0\0\0Go\0\0build-id";
        assert!(read(&program(&[(PT_NOTE, note)], &[])).unwrap().go);
        assert!(read(&program(&[GLIBC, (PT_NOTE, note)], &[])).unwrap().go);
        let stripped = program(&[GLIBC], &[".text", ".go.buildinfo", ".data"]);
        assert!(read(&stripped).unwrap().go);
        assert!(!read(&program(&[GLIBC], &[".go"])).unwrap().go);
    }

    #[test]
    fn other_machines() {
        let mut bytes = program(&[GLIBC], &[]);
        bytes[4] = ELFCLASS32;
        assert!(read(&bytes).unwrap().bits32);
        let mut bytes = program(&[GLIBC], &[]);
        bytes[18] = 8; // MIPS
        assert!(read(&bytes).unwrap().foreign);
        let mut bytes = program(&[GLIBC], &[]);
        bytes[5] = 2;
        assert!(read(&bytes).unwrap().foreign);
    }

    #[test]
    fn damaged_programs_are_errors() {
        let whole = program(&[GLIBC, (PT_NOTE, b"note")], &[".text"]);
        assert!(read(b"").is_err());
        assert!(read(b"#!/bin/sh\n").is_err());
        // Cut off anywhere before the sections.
        for len in 0..HEADER + 2 * SEGMENT + GLIBC.1.len() + 4 {
            assert!(read(&whole[..len]).is_err(), "{len}");
        }
        // Without its sections it still runs.
        assert!(read(&whole[..whole.len() - 1]).is_ok());
        // Numbers that lead nowhere.
        for at in [32, 40, 54, 56, 58, 60, 62] {
            let mut bytes = whole.clone();
            bytes[at..at + 2].fill(0xff);
            let _ = read(&bytes);
        }
    }
}
