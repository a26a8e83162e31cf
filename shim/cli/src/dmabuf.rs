// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes' dma-bufs, according to /proc.
//!
//! A name alone proves nothing: a file `/dmabuf:x` may exist, and the name of a buffer, which is the last field of its
//! fdinfo, may contain lines that look like fields.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{statfs, FsType};

/// The exporter's name in /proc, for pinbuf's buffers.
pub const PINBUF: &str = "pinbuf";
/// The same for those of the kernel's udmabuf.
pub const UDMABUF: &str = "udmabuf";

const DMA_BUF_MAGIC: FsType = FsType(0x444d_4142);

/// What the name of every dma-buf begins with.
const PREFIX: &[u8] = b"/dmabuf:";

/// A descriptor of a dma-buf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number, in the table of the thread whose it is.
    pub number: u32,
    /// The buffer's number in the dma-bufs' file system.
    pub inode: u64,
    /// That file system's device number.
    pub device: u64,
    pub bytes: u64,
    pub exporter: String,
    pub name: Vec<u8>,
}

/// A mapping of what is called like a dma-buf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub inode: u64,
    /// The device number of its file system: only that of dma-bufs proves that it is one.
    pub device: u64,
    pub start: u64,
    pub bytes: u64,
}

/// A thread's directory in /proc.
pub fn thread_path(pid: u32, thread: u32) -> PathBuf {
    format!("/proc/{pid}/task/{thread}").into()
}

/// The threads of a process that have a table of descriptors of their own: the first, and those that left its table.
/// Where the kernel does not say which these are, all of them.
pub fn tables(pid: u32) -> io::Result<Vec<u32>> {
    let mut tables: Vec<u32> = Vec::new();
    let threads: BTreeSet<u32> = fs::read_dir(format!("/proc/{pid}/task"))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for thread in threads {
        if !tables.iter().any(|&table| same_table(table, thread)) {
            tables.push(thread);
        }
    }
    Ok(tables)
}

fn same_table(one: u32, other: u32) -> bool {
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) == 0 }
}

/// The dma-bufs in a thread's table of descriptors; none of a thread that has ended.
pub fn descriptors(thread: &Path) -> io::Result<Vec<Descriptor>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(thread.join("fd")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries.flatten() {
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // It may be closed, and another file may get its number, at any time.
        if let Some(number) = number {
            found.extend(descriptor(thread, number));
        }
    }
    found.sort_unstable_by_key(|descriptor| descriptor.number);
    Ok(found)
}

fn descriptor(thread: &Path, number: u32) -> Option<Descriptor> {
    let link = thread.join(format!("fd/{number}"));
    let target = fs::read_link(&link).ok()?;
    if !target.as_os_str().as_bytes().starts_with(PREFIX) {
        return None;
    }
    // Read before the file system is asked: that of another user (FUSE) may never answer. Only a dma-buf's fdinfo has
    // these fields.
    let text = fs::read(thread.join(format!("fdinfo/{number}"))).ok()?;
    let fields = fields(&text)?;
    if statfs(&link).ok()?.filesystem_type() != DMA_BUF_MAGIC {
        return None;
    }
    let device = fs::metadata(&link).ok()?.dev();
    Some(Descriptor {
        number,
        device,
        ..fields
    })
}

/// The fields of a dma-buf's fdinfo. The kernel writes the exporter's before the name, which may contain anything:
/// the first of each name counts, and the buffer's name is all that is left.
fn fields(text: &[u8]) -> Option<Descriptor> {
    let mut found = Descriptor::default();
    let mut rest = text;
    loop {
        let end = rest.iter().position(|&byte| byte == b'\n')?;
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        let colon = line.iter().position(|&byte| byte == b':')?;
        let value = line[colon + 1..].trim_ascii();
        let number = || std::str::from_utf8(value).ok()?.parse().ok();
        match &line[..colon] {
            b"ino" => found.inode = number()?,
            b"size" => found.bytes = number()?,
            b"exp_name" => {
                found.exporter = crate::text::of_bytes(value);
                break;
            }
            _ => {}
        }
    }
    if let Some(name) = rest.strip_prefix(b"name:\t") {
        found.name = name.strip_suffix(b"\n").unwrap_or(name).to_vec();
    }
    Some(found)
}

/// What a thread has mapped of what is called like a dma-buf.
pub fn mappings(thread: &Path) -> io::Result<Vec<Mapping>> {
    let text = fs::read(thread.join("maps"))?;
    Ok(text
        .split(|&byte| byte == b'\n')
        .filter_map(mapping)
        .collect())
}

/// A line of /proc/PID/maps: `START-END MODE OFFSET MAJOR:MINOR INODE   NAME`. The kernel escapes line breaks in
/// the name.
fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut words = line
        .split(|&byte| byte == b' ')
        .filter(|word| !word.is_empty());
    let mut word = || std::str::from_utf8(words.next()?).ok();
    let (start, end) = word()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    let (major, minor) = (word()?, word()?, word()?).2.split_once(':')?;
    let device = nix::sys::stat::makedev(hex(major)?, hex(minor)?);
    let inode = word()?.parse().ok()?;
    words.next()?.starts_with(PREFIX).then_some(Mapping {
        inode,
        device,
        start,
        bytes: end.checked_sub(start)?,
    })
}

/// Whether a process maps a dma-buf there. `None` for a user that may not ask; root may.
pub fn is_buffer(pid: u32, mapping: &Mapping) -> Option<bool> {
    let (start, end) = (mapping.start, mapping.start + mapping.bytes);
    let link = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    Some(statfs(link.as_str()).ok()?.filesystem_type() == DMA_BUF_MAGIC)
}

/// A buffer as debugfs lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub inode: u64,
    pub bytes: u64,
    pub exporter: String,
    pub name: Vec<u8>,
}

/// All live buffers; none for a user that may not read the list.
pub fn of_debugfs() -> Vec<Listed> {
    let text = fs::read("/sys/kernel/debug/dma_buf/bufinfo").unwrap_or_default();
    text.split(|&byte| byte == b'\n')
        .filter_map(listed)
        .collect()
}

/// A line such as `00004096\t02000002\t0000001f\t00000001\tpinbuf\t00000042\tname`. The numbers have eight digits at
/// least; so a name, which may contain line breaks and has 31 bytes at most, cannot contain such a line.
fn listed(line: &[u8]) -> Option<Listed> {
    let mut words = line.splitn(7, |&byte| byte == b'\t');
    let mut number = |radix| {
        let word = words.next().filter(|word| word.len() >= 8)?;
        u64::from_str_radix(std::str::from_utf8(word).ok()?, radix).ok()
    };
    let bytes = number(10)?;
    let (_flags, _mode, _count) = (number(16)?, number(16)?, number(10)?);
    let exporter = crate::text::of_bytes(words.next()?);
    let inode = words.next().filter(|word| word.len() >= 8)?;
    let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
    let name = words.next()?;
    Some(Listed {
        inode,
        bytes,
        exporter,
        name: if name == b"<none>" {
            Vec::new()
        } else {
            name.to_vec()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FDINFO: &[u8] =
        b"pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t42\nsize:\t4096\ncount:\t2\n\
                            exp_name:\tudmabuf\n";

    #[test]
    fn only_the_kernel_s_own_fields_count() {
        let of = |rest: &[u8]| fields(&[FDINFO, rest].concat()).unwrap();
        let plain = of(b"");
        assert_eq!(
            (plain.inode, plain.bytes, plain.exporter.as_str()),
            (42, 4096, "udmabuf")
        );
        assert!(plain.name.is_empty());
        assert_eq!(of(b"name:\tscreen\n").name, b"screen");
        let hostile = of(b"name:\tx\nexp_name:\tpinbuf\nino:\t7\n");
        assert_eq!((hostile.inode, hostile.exporter.as_str()), (42, "udmabuf"));
        assert_eq!(hostile.name, b"x\nexp_name:\tpinbuf\nino:\t7");
        assert_eq!(of(b"name:\t\x80\xff\n").name, b"\x80\xff");
        assert_eq!(of(b"name:\t\n\n").name, b"\n");
    }

    #[test]
    fn other_files_have_no_such_fields() {
        assert_eq!(fields(b"pos:\t0\nflags:\t02\nino:\t42\n"), None);
        assert_eq!(fields(b""), None);
        assert_eq!(fields(b"nonsense\n"), None);
    }

    #[test]
    fn lines_of_maps() {
        let line = b"7f00-8f00 rw-s 00000000 00:0f 42                         /dmabuf:na\xff me";
        let wanted = Mapping {
            inode: 42,
            device: 0xf,
            start: 0x7f00,
            bytes: 0x1000,
        };
        assert_eq!(mapping(line), Some(wanted));
        for other in [
            &b"7f00-8f00 rw-p 00000000 00:00 0"[..],
            b"7f00-8f00 r--p 00000000 08:01 7 /usr/bin/dmabuf:",
            b"8f00-7f00 rw-s 00000000 00:0f 42 /dmabuf:",
            b"",
        ] {
            assert_eq!(mapping(other), None);
        }
    }

    #[test]
    fn lines_of_debugfs() {
        let line = b"00004096\t02000002\t0000001f\t00000001\tpinbuf\t00000042\ta\tb\xff";
        let wanted = Listed {
            inode: 42,
            bytes: 4096,
            exporter: "pinbuf".to_owned(),
            name: b"a\tb\xff".to_vec(),
        };
        assert_eq!(listed(line), Some(wanted));
        let unnamed = b"00004096\t02000002\t0000001f\t00000001\tpinbuf\t00000042\t<none>";
        assert_eq!(listed(unnamed).unwrap().name, b"");
        // What fits into a name.
        assert_eq!(listed(b"1\t1\t1\t1\tpinbuf\t1\t"), None);
        assert_eq!(listed(b"\tAttached Devices:"), None);
        assert_eq!(listed(b""), None);
    }

    #[test]
    fn tables_of_threads() {
        let pid = std::process::id();
        let (to_thread, from_thread) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
        let thread = std::thread::spawn(move || {
            // SAFETY: no memory is involved; this thread gets descriptors of its own.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
            // SAFETY: a call without conditions.
            from_thread
                .0
                .send(unsafe { libc::gettid() } as u32)
                .unwrap();
            let _: Result<(), _> = to_thread.1.recv();
        });
        let own = from_thread.1.recv().unwrap();
        let found = tables(pid).unwrap();
        assert!(
            found.contains(&pid) && found.contains(&own),
            "{found:?} {own}"
        );
        drop(to_thread.0);
        thread.join().unwrap();
        assert!(tables(u32::MAX).is_err());
    }
}
