// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that the program's memory has yet to get.
//!
//! A mapping may be registered with userfaultfd: a page that nobody has touched comes from elsewhere, as in the
//! postcopy migration of a virtual machine. A mapping of ours is not registered; the first access to it would fill the
//! page with zeroes, and what arrives later would be refused (`EEXIST`). So the pages that the program itself has
//! mapped are read by the program's own addresses first, one byte of each: the kernel then has the fault in the
//! program's address space, and waits there as the program would.
//!
//! Such a page can vanish again before it is pinned, if another thread punches a hole. So our mapping is registered
//! with a userfaultfd of our own there, which makes such a page an error in place of zeroes ([`Guard`]).

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::statfs::{statfs, HUGETLBFS_MAGIC};
use pinbuf_udmabuf::call::each_part;
use pinbuf_udmabuf::plan::{self, Piece, Plan};
use pinbuf_udmabuf::procmap;
use pinbuf_udmabuf::spans::{Span, Spans};
use pinbuf_udmabuf::sys;

use super::target::Target;

/// Entries of `/proc/PID/pagemap` that are read at once.
const ENTRIES: usize = 1024;
/// Pages that are asked for at once, in between of which the program may have been killed.
const AT_ONCE: usize = 16;
/// The page is in the page table.
const PRESENT: u64 = 1 << 63;
/// Something else is: an entry that moves, or a marker (of poison, a guard, write protection).
const MARKED: u64 = 1 << 62;

/// Where the program has the files of a request mapped, shared and writable.
///
/// An error if that cannot be known: a page that is late in a mapping which is not known would be filled with zeroes.
pub fn mappings(target: &Target, plan: &Plan) -> nix::Result<Spans> {
    let mut spans = Spans::new();
    let maps = target.proc("maps").map_err(errno)?;
    let of_call = |id| plan.files.iter().any(|file| file.id == id);
    procmap::ask(maps.as_raw_fd(), usize::MAX, of_call, &mut spans);
    Ok(spans)
}

/// The mappings of a request's files that are registered with userfaultfd, if these are not the only ones of a file that
/// may lack pages: a page that is read by another address would be filled.
pub fn registered_mappings(target: &Target, plan: &Plan) -> Spans {
    let mut spans = Spans::new();
    let Ok(maps) = target.proc("maps") else {
        return spans;
    };
    let of_call = |span: &Span| plan.files.iter().any(|file| file.id == span.id);
    let complete = !plan.files.iter().any(plan::File::may_have_holes);
    if complete || procmap::ask_all(maps.as_raw_fd(), of_call, &mut Spans::new()) == Ok(true) {
        return spans;
    }
    // What can be read of it is better than nothing.
    let smaps = target.proc("smaps").into_iter();
    let ranges: Vec<_> = smaps
        .flat_map(|file| registered(BufReader::new(file)).map_while(Result::ok))
        .collect();
    let is_registered = |span: &Span| {
        let holds = |(start, end): &(u64, u64)| (*start..*end).contains(&span.addr);
        of_call(span) && ranges.iter().any(holds)
    };
    let _ = procmap::ask_all(maps.as_raw_fd(), is_registered, &mut spans);
    spans
}

/// Waits until the program has every page of a request that it has mapped. Returns whether that can be relied on: not
/// if there is a marker in the place of a page, behind which the file's page is what udmabuf takes.
pub fn wait(
    target: &Target,
    plan: &Plan,
    mapped: &Spans,
    is_waiting: impl Fn() -> bool,
) -> nix::Result<bool> {
    if mapped.is_empty() {
        return Ok(false);
    }
    let pagemap = target.proc("pagemap").map_err(errno)?;
    let blocks: Vec<u64> = plan.files.iter().map(|file| block(file.fd)).collect();
    let mut unmarked = true;
    let mut late = Vec::new();
    let mut result = Ok(());
    let walked = each_part(plan, mapped, |piece, address| {
        if let Some(address) = address {
            let block = blocks[piece.file];
            result = missing(&pagemap, address, piece, block, &mut late, &mut unmarked);
        }
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(sys::Errno(error as i32)),
        }
    });
    result?;
    walked.map_err(|error| Errno::from_raw(error.0))?;
    // Whoever sends a page on request often continues with those behind it.
    late.sort_unstable();
    let mut rest: &[u64] = &late;
    while !rest.is_empty() {
        // If the program is killed while it waits, nobody answers any more, and its pages are filled.
        if !is_waiting() {
            return Err(Errno::EINTR);
        }
        let touched = target.touch(&rest[..rest.len().min(AT_ONCE)])?;
        if touched == 0 {
            return Err(Errno::EFAULT);
        }
        rest = &rest[touched..];
    }
    Ok(unmarked)
}

/// How much of a file comes at once: a page of hugetlb's, or a page. (`st_blksize` does not say that: it is the size of a
/// huge page for shmem as well where that may have huge pages.)
fn block(file: i32) -> u64 {
    match statfs(format!("/proc/self/fd/{file}").as_str()) {
        Ok(found) if found.filesystem_type() == HUGETLBFS_MAGIC => found.block_size() as u64,
        _ => 0,
    }
    .max(sys::page_size())
}

/// Has the program registered any of these mappings with userfaultfd for pages that are missing? The kernel says that
/// in `/proc/PID/smaps` alone, which takes it long: this is not asked without a reason. `true` if it is not known.
pub fn may_come_later(target: &Target, mapped: &Spans) -> bool {
    let Ok(smaps) = target.proc("smaps") else {
        return true;
    };
    registered(BufReader::new(smaps)).any(|range| match range {
        Ok((start, end)) => mapped
            .iter()
            .any(|span| span.addr < end && start < span.addr + span.len),
        Err(_) => true,
    })
}

/// The mappings with the flag `um` in a text of smaps, line by line: of a program with many mappings, it takes megabytes.
fn registered(text: impl BufRead) -> impl Iterator<Item = io::Result<(u64, u64)>> {
    let mut mapping = None;
    text.split(b'\n').filter_map(move |line| {
        let line = match line {
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        let mut words = line
            .split(|&byte| byte == b' ')
            .map(|word| std::str::from_utf8(word).unwrap_or_default());
        let first = words.next()?;
        if first == "VmFlags:" {
            let range = mapping.filter(|_| words.any(|word| word == "um"));
            return range.map(Ok);
        }
        // A mapping begins with its addresses; names of files have no place in front.
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).ok();
            mapping = number(start).zip(number(end));
        }
        None
    })
}

/// Adds an address of each page that is not in the program's page table.
fn missing(
    pagemap: &File,
    address: u64,
    piece: Piece,
    block: u64,
    late: &mut Vec<u64>,
    unmarked: &mut bool,
) -> nix::Result<()> {
    let page = sys::page_size();
    let mut bytes = [0; 8 * ENTRIES];
    let mut at = address;
    let end = address + piece.len;
    while at < end {
        let count = (((end - at) / page) as usize).min(ENTRIES);
        let some = &mut bytes[..8 * count];
        pagemap.read_exact_at(some, at / page * 8).map_err(errno)?;
        for entry in some.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if entry & MARKED != 0 {
                *unmarked = false;
            } else if entry & PRESENT == 0 {
                // One address of a huge page is enough.
                let offset = piece.offset + (at - address);
                if offset % block == 0 || at == address {
                    late.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                    late.push(at);
                }
            }
            at += page;
        }
    }
    Ok(())
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// `UFFDIO_API` and `UFFDIO_REGISTER`.
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const MISSING: u64 = 1;
/// `UFFD_USER_MODE_ONLY`: every user may have that, and a fault in the kernel is an error then.
const USER_MODE_ONLY: libc::c_int = 1;

/// A userfaultfd that nobody answers: where it is registered, a page that the file lacks is not made by pinning, which
/// fails with `EFAULT`.
pub struct Guard(OwnedFd);

impl Guard {
    /// A guard of nothing; an error where the kernel or a sandbox has no userfaultfd.
    pub fn new() -> nix::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: no memory is involved.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // SAFETY: the call has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = [0xaa_u64, 0, 0];
        // SAFETY: the kernel reads and writes three numbers.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), API, api.as_mut_ptr()) })?;
        Ok(Self(fd))
    }

    /// Guards a mapping, of whole pages of its file.
    pub fn watch(&self, address: u64, len: u64) -> nix::Result<()> {
        let mut register = [address, len, MISSING, 0];
        // SAFETY: the kernel reads and writes four numbers; the mapping's contents do not change.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), REGISTER, register.as_mut_ptr()) })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registered_mappings_are_found() {
        let text = b"7f00-8f00 rw-s 00000000 00:01 7    /memfd:a b (deleted)\nSize: 4 kB\nVmFlags: rd wr sh \n\
            9000-a000 rw-s 00000000 00:01 7    /\xff um\nSize: 4 kB\nVmFlags: rd wr sh um \n";
        let found: Vec<_> = registered(&text[..]).map(Result::unwrap).collect();
        assert_eq!(found, [(0x9000, 0xa000)]);
    }
}
