// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the program has mapped, and what becomes of it: udmabuf does not depend on it, and a shim that uses the
//! program's mappings must make the same buffers whatever happens to them.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Result;

use crate::cases::{device, in_child, mark, rounds, File, Table, HUGE, HUGETLB, OK, PLAIN};
use crate::run::Outcome;
use crate::udmabuf::{check, close, create, create_list, fcntl, Item, Map, PAGE};

const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;

pub fn cases(t: &mut Table) {
    pieces(t);
    changes(t);
    forks(t);
    descriptors(t);
}

/// Has the buffer these pages of the case's first file, in this order?
pub(crate) fn has(dmabuf: c_int, pages: impl Iterator<Item = u64>) -> Result<bool> {
    let pages: Vec<u64> = pages.collect();
    let map = Map::new(
        dmabuf,
        pages.len() as u64 * PAGE,
        libc::PROT_READ,
        libc::MAP_SHARED,
    )?;
    let right = |(at, page): (usize, &u64)| map.get(at as u64) == mark(0, *page);
    Ok(pages.iter().enumerate().all(right))
}

/// A buffer of all of the file's pages, and whether they are.
fn whole(device: c_int, file: &File, pages: u64) -> Result<bool> {
    let dmabuf = create(device, file.fd, 0, pages * PAGE, 0)?;
    let right = has(dmabuf, 0..pages)?;
    close(dmabuf)?;
    Ok(right)
}

fn seen() -> Outcome {
    Outcome {
        ret: "0".to_owned(),
        ..Outcome::default()
    }
}

/// Maps a part of a file over an address.
fn map_over(at: usize, len: u64, fd: c_int, offset: u64) -> Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: the callers give places of their own mappings, which nobody reads meanwhile.
    let ret = unsafe {
        libc::mmap(
            at as *mut _,
            len as usize,
            READ_WRITE,
            flags,
            fd,
            offset as i64,
        )
    };
    check(ret as i64)?;
    Ok(())
}

fn pieces(t: &mut Table) {
    for (sort, spec, unit) in [("", PLAIN, PAGE), ("-hugetlb", HUGETLB, HUGE)] {
        t.custom(format!("pieces/of-one-file{sort}"), OK, move || {
            let file = File::new(0, spec)?;
            let part = |from: u64, to: u64| {
                Map::at_offset(
                    file.fd,
                    (to - from) * unit,
                    READ_WRITE,
                    libc::MAP_SHARED,
                    from * unit,
                )
            };
            // The third quarter twice, the first and the last one not.
            let quarter = spec.bytes / unit / 4;
            let _maps = [
                part(2 * quarter, 3 * quarter)?,
                part(quarter, 2 * quarter)?,
                part(2 * quarter, 3 * quarter)?,
            ];
            let mut outcome = seen();
            let device = device()?;
            outcome.fact("whole", whole(device, &file, spec.bytes / PAGE)?);
            let parts = [
                (0, spec.bytes),
                (quarter * unit - PAGE, 2 * PAGE),
                (2 * quarter * unit, PAGE),
            ];
            let items = parts.map(|(offset, size)| file.item(offset, size));
            let dmabuf = create_list(device, &items, 0)?;
            let pages = parts
                .iter()
                .flat_map(|(offset, size)| offset / PAGE..(offset + size) / PAGE);
            outcome.fact("list", has(dmabuf, pages)?);
            Ok(outcome)
        });
    }
    t.custom("pieces/of-one-mapping", OK, || {
        let file = File::new(0, PLAIN)?;
        let map = Map::shared(file.fd, PLAIN.bytes)?;
        // Attributes split a mapping; one part is not writable any more.
        let at = |page: u64| (map.address() + (page * PAGE) as usize) as *mut libc::c_void;
        // SAFETY: our mapping, which is not used meanwhile.
        let ret = unsafe { libc::madvise(at(3), 2 * PAGE as usize, libc::MADV_DONTFORK) };
        check(i64::from(ret))?;
        // SAFETY: as above.
        let ret = unsafe { libc::mprotect(at(8), PAGE as usize, libc::PROT_READ) };
        check(i64::from(ret))?;
        let mut outcome = seen();
        outcome.fact("whole", whole(device()?, &file, 16)?);
        Ok(outcome)
    });
    t.custom("pieces/among-many-mappings", OK, || {
        let file = File::new(0, PLAIN)?;
        let other = File::new(7, PLAIN)?;
        let maps: Result<Vec<Map>, _> = (0..2000)
            .map(|i| Map::at_offset(other.fd, PAGE, READ_WRITE, libc::MAP_SHARED, i % 16 * PAGE))
            .collect();
        let _maps = maps?;
        let _map = Map::shared(file.fd, PLAIN.bytes)?;
        let mut outcome = seen();
        outcome.fact("whole", whole(device()?, &file, 16)?);
        Ok(outcome)
    });
    // As many files as one call can look back to, and more.
    t.custom("pieces/of-mapped-and-other-files", OK, || {
        let files: Result<Vec<File>> = (0..80).map(|_| File::new(0, PLAIN)).collect();
        let files = files?;
        let maps: Result<Vec<Map>, _> = files
            .iter()
            .step_by(2)
            .map(|file| Map::shared(file.fd, 8 * PAGE))
            .collect();
        let _maps = maps?;
        let items: Vec<Item> = (0..160u64)
            .map(|i| files[(i * 7 % 80) as usize].item(i % 16 * PAGE, PAGE))
            .collect();
        let mut outcome = seen();
        let dmabuf = create_list(device()?, &items, 0)?;
        outcome.fact("right", has(dmabuf, (0..160).map(|i| i % 16))?);
        Ok(outcome)
    });
}

fn changes(t: &mut Table) {
    type Change = fn(&Map, &File) -> Result<()>;
    let changes: [(&str, Change); 6] = [
        ("another-file", |map, _| {
            let other = File::new(7, PLAIN)?;
            map_over(map.address(), PLAIN.bytes, other.fd, 0)
        }),
        ("another-offset", |map, file| {
            map_over(map.address(), 8 * PAGE, file.fd, 8 * PAGE)
        }),
        ("private", |map, file| {
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            let (at, len) = (map.address() as *mut _, PLAIN.bytes as usize);
            // SAFETY: our mapping, which nobody reads meanwhile.
            let ret = unsafe { libc::mmap(at, len, READ_WRITE, flags, file.fd, 0) };
            check(ret as i64)?;
            Ok(())
        }),
        ("none", |map, _| {
            // SAFETY: as above.
            let ret = unsafe { libc::munmap(map.address() as *mut _, 5 * PAGE as usize) };
            check(i64::from(ret))?;
            Ok(())
        }),
        ("read-only", |map, _| {
            let (at, len) = (map.address() as *mut _, PLAIN.bytes as usize);
            // SAFETY: as above.
            let ret = unsafe { libc::mprotect(at, len, libc::PROT_READ) };
            check(i64::from(ret))?;
            Ok(())
        }),
        ("moved", |map, _| {
            let len = PLAIN.bytes as usize;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let to = Map::new(-1, PLAIN.bytes, READ_WRITE, anonymous)?;
            let (from, to) = (map.address() as *mut _, to.address() as *mut libc::c_void);
            // SAFETY: as above; the other mapping is unmapped by the move.
            let ret = unsafe { libc::mremap(from, len, len, flags, to) };
            check(ret as i64)?;
            Ok(())
        }),
    ];
    for (name, change) in changes {
        t.custom(format!("remapped/{name}"), OK, move || {
            let file = File::new(0, PLAIN)?;
            let map = Map::shared(file.fd, PLAIN.bytes)?;
            let device = device()?;
            let mut outcome = seen();
            outcome.fact("before", whole(device, &file, 16)?);
            change(&map, &file)?;
            outcome.fact("after", whole(device, &file, 16)?);
            outcome.fact("again", whole(device, &file, 16)?);
            // Something else may be mapped there by now, so it is not unmapped.
            std::mem::forget(map);
            Ok(outcome)
        });
    }
    // The descriptor's number belongs to another file.
    t.custom("remapped/another-file-of-that-descriptor", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let _map = Map::shared(file.fd, PLAIN.bytes)?;
        let mut outcome = seen();
        outcome.fact("before", whole(device, &file, 16)?);
        close(file.fd)?;
        let mut other = File::new(1, PLAIN)?;
        // SAFETY: no memory is involved.
        other.fd = check(i64::from(unsafe { libc::dup2(other.fd, file.fd) }))? as c_int;
        let dmabuf = create(device, file.fd, 0, PAGE, 0)?;
        outcome.fact("after", Map::shared(dmabuf, PAGE)?.get(0) == mark(1, 0));
        Ok(outcome)
    });
    // Holes come and go while buffers are made: a page may lose its file at any moment.
    t.custom("remapped/holes-punched-meanwhile", OK, || {
        for mapped in [false, true] {
            let device = device()?;
            let file = File::new(0, PLAIN)?;
            let _map = mapped
                .then(|| Map::shared(file.fd, PLAIN.bytes))
                .transpose()?;
            let stop = &*Box::leak(Box::new(AtomicBool::new(false)));
            let fd = file.fd;
            let punching = thread::spawn(move || {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: no memory is involved.
                    unsafe { libc::fallocate(fd, mode, 0, PLAIN.bytes as i64) };
                    thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            for _ in rounds(500) {
                let dmabuf = create(device, fd, 0, PLAIN.bytes, 0)?;
                close(dmabuf)?;
            }
            stop.store(true, Ordering::Relaxed);
            let _ = punching.join();
        }
        Ok(seen())
    });
}

fn forks(t: &mut Table) {
    t.custom("fork/child-maps-otherwise", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let other = File::new(7, PLAIN)?;
        let map = Map::shared(file.fd, PLAIN.bytes)?;
        let mut outcome = seen();
        outcome.fact("before", whole(device, &file, 16)?);
        let child = in_child(|| {
            let same = whole(device, &file, 16).unwrap_or(false);
            // In the parent's place lies another file, and the file lies where the parent has nothing.
            let replaced = map_over(map.address(), PLAIN.bytes, other.fd, 0).is_ok();
            let moved = Map::shared(file.fd, PLAIN.bytes);
            same && replaced && moved.is_ok() && whole(device, &file, 16).unwrap_or(false)
        })?;
        outcome.fact("in the child", child);
        outcome.fact("after", whole(device, &file, 16)?);
        Ok(outcome)
    });
    t.custom("fork/child-opens-as-well", OK, || {
        let first = device()?;
        let file = File::new(0, PLAIN)?;
        let child = in_child(|| {
            let Ok(own) = device() else { return false };
            let map = Map::shared(file.fd, PLAIN.bytes);
            map.is_ok()
                && [own, first]
                    .iter()
                    .all(|fd| whole(*fd, &file, 16).unwrap_or(false))
        })?;
        let mut outcome = seen();
        outcome.fact("in the child", child);
        let _map = Map::shared(file.fd, PLAIN.bytes)?;
        outcome.fact("in the parent", whole(first, &file, 16)?);
        Ok(outcome)
    });
    t.custom("fork/parent-is-gone", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let _map = Map::shared(file.fd, PLAIN.bytes)?;
        let mut ends = [0; 2];
        // SAFETY: two descriptors are written to `ends`.
        check(i64::from(unsafe { libc::pipe(ends.as_mut_ptr()) }))?;
        // A grandchild, whose parent ends at once.
        in_child(|| {
            // SAFETY: one thread, as above.
            if unsafe { libc::fork() } == 0 {
                thread::sleep(std::time::Duration::from_millis(50));
                let good = u8::from(whole(device, &file, 16).unwrap_or(false));
                // SAFETY: one byte is read.
                unsafe { libc::write(ends[1], (&raw const good).cast(), 1) };
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) };
            }
            true
        })?;
        let mut good = 0u8;
        // SAFETY: room for one byte.
        check(unsafe { libc::read(ends[0], (&raw mut good).cast(), 1) } as i64)?;
        let mut outcome = seen();
        outcome.fact("in the grandchild", good == 1);
        Ok(outcome)
    });
}

fn descriptors(t: &mut Table) {
    // Programs that close all descriptors that they do not know.
    t.custom("descriptors/all-others-closed", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        for fd in 3..4096 {
            // The case's own result goes to the first number from 900 on.
            if fd != device && fd != file.fd && fd != crate::run::RESULT {
                let _ = close(fd);
            }
        }
        let mut outcome = seen();
        outcome.fact("not mapped", whole(device, &file, 16)?);
        let _map = Map::shared(file.fd, PLAIN.bytes)?;
        outcome.fact("mapped", whole(device, &file, 16)?);
        Ok(outcome)
    });
    for name in ["memfd", "pipe", "device"] {
        t.custom(format!("descriptors/all-others-a-{name}"), OK, move || {
            let device = device()?;
            let file = File::new(0, PLAIN)?;
            let other = File::new(7, PLAIN)?;
            let mut ends = [0; 2];
            // SAFETY: two descriptors are written to `ends`.
            check(i64::from(unsafe { libc::pipe(ends.as_mut_ptr()) }))?;
            let source = match name {
                "memfd" => other.fd,
                "pipe" => ends[0],
                _ => device,
            };
            let keep = [device, file.fd, source, crate::run::RESULT];
            for fd in (3..1024).filter(|fd| !keep.contains(fd)) {
                // SAFETY: no memory is involved.
                check(i64::from(unsafe { libc::dup2(source, fd) }))?;
            }
            for fd in 3..20 {
                if !keep.contains(&fd) {
                    close(fd)?;
                }
            }
            let _map = Map::shared(file.fd, PLAIN.bytes)?;
            let mut outcome = seen();
            outcome.fact("mapped", whole(device, &file, 16)?);
            // The shim opens its own descriptors again, and closes none of the program's.
            let again = crate::cases::device()?;
            outcome.fact("opened again", whole(again, &file, 16)?);
            let others = (20..1024).filter(|fd| !keep.contains(fd));
            let open = others
                .clone()
                .filter(|fd| fcntl(*fd, libc::F_GETFD, 0).is_ok());
            outcome.fact("all open still", open.count() == others.count());
            Ok(outcome)
        });
    }
}
