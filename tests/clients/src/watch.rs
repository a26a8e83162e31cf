// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf watch`, and what `pinbuf info` and the shim's log say of discarded memory.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use pinbuf::DiscardState;
use pinbuf_test_harness::support::memory::{memfd, punch_hole, HUGE, RW};
use pinbuf_test_harness::support::process::PATIENCE;
use pinbuf_test_harness::support::{foreign, kernel, Buffer, Device, Memory, PAGE};
use pinbuf_test_harness::tests;
use pinbuf_uapi::{Discard, STATE_DISCARDED, STATE_UNSURE};
use serde_json::{json, Value};

use crate::info::{clean, set_name};
use crate::process::Start;

tests!("watch":
    lists_the_parts,
    lists_more_parts_than_a_call_returns,
    listed_by_the_c_library,
    watched_by_the_c_library,
    a_watch_refuses_another_exporters_buffer,
    shows_them_in_info,
    reports_changes_as_they_come,
    passes_nothing_raw_to_the_terminal,
    keeps_buffers_apart_that_share_a_number,
    ends_with_its_process,
    the_shim_logs_them_once,
    reports_a_huge_page_in_parts,
    lists_a_huge_page_in_parts,
);

const COUNT: usize = 32;

/// A buffer of a memfd.
struct Frame {
    file: OwnedFd,
    _memory: Memory,
    buffer: Buffer,
}

impl Frame {
    fn new() -> Result<Self> {
        Self::of(COUNT)
    }

    fn of(pages: usize) -> Result<Self> {
        let file = memfd(pages * PAGE, 0)?;
        let memory = Memory::shared(&file, pages * PAGE)?;
        memory.touch_to_write();
        let buffer = Device::open()?.create(&[memory.range()])?;
        Ok(Self {
            file,
            _memory: memory,
            buffer,
        })
    }

    fn discard(&self, page: usize, pages: usize) -> Result<()> {
        punch_hole(&self.file, page * PAGE, pages * PAGE)
    }

    fn inode(&self) -> Result<u64> {
        Ok(nix::sys::stat::fstat(self.buffer.as_fd())?.st_ino)
    }
}

fn part(page: usize, pages: usize) -> Value {
    part_in_state(page, pages, "discarded")
}

fn part_in_state(page: usize, pages: usize, state: &str) -> Value {
    json!({ "offset": page * PAGE, "len": pages * PAGE, "state": state })
}

/// The lines of `pinbuf watch --json`, by the buffers' numbers.
fn once() -> Result<Vec<(u64, Value)>> {
    let end = Start::program(&["pinbuf", "watch", "--once", "--json"]).end()?;
    ensure!(end.status == Some(0), "{end:?}");
    end.out
        .lines()
        .map(|line| {
            let change: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let inode = change["inode"].as_u64().context("a line without inode")?;
            Ok((inode, change))
        })
        .collect()
}

fn lists_the_parts() -> Result<()> {
    let (whole, holed) = (Frame::new()?, Frame::new()?);
    ensure!(once()?.is_empty(), "a buffer is reported before");
    holed.discard(3, 2)?;
    holed.discard(31, 1)?;
    let all = once()?;
    let [(inode, change)] = &all[..] else {
        bail!("{all:#?}");
    };
    ensure!(*inode == holed.inode()?, "{all:#?}");
    ensure!(
        change["parts"] == json!([part(3, 2), part(31, 1)])
            && change["discarded_bytes"] == 3 * PAGE
            && change["unsure_bytes"] == 0
            && change["bytes"] == COUNT * PAGE
            && change["pid"] == std::process::id(),
        "{change:#?}"
    );
    drop(whole);
    Ok(())
}

/// The library asks for 64 at once.
fn lists_more_parts_than_a_call_returns() -> Result<()> {
    const PARTS: usize = 200;
    let frame = Frame::of(2 * PARTS)?;
    for page in 0..PARTS {
        frame.discard(2 * page, 1)?;
    }
    let all = once()?;
    let [(_, change)] = &all[..] else {
        bail!("{all:#?}");
    };
    let expected: Vec<Value> = (0..PARTS).map(|page| part(2 * page, 1)).collect();
    ensure!(
        change["parts"] == json!(expected) && change["discarded_bytes"] == PARTS * PAGE,
        "{change:#?}"
    );
    Ok(())
}

/// `pinbuf_discards()`, as a C program calls it with a short list.
fn listed_by_the_c_library() -> Result<()> {
    const LEN: usize = 2;
    let frame = Frame::new()?;
    for page in [1, 2, 5, 9, 31] {
        frame.discard(page, 1)?;
    }
    let device = pinbuf_c::pinbuf_open();
    ensure!(device >= 0, "pinbuf_open: {device}");
    let list_from = |fd: i32, offset: &mut u64| -> (i32, Vec<Discard>) {
        let mut list = vec![Discard::default(); LEN];
        // SAFETY: a list of this length, and a number.
        let count =
            unsafe { pinbuf_c::pinbuf_discards(device, fd, list.as_mut_ptr(), LEN, offset) };
        list.truncate(count.max(0) as usize);
        (count, list)
    };
    let fd = frame.buffer.as_fd().as_raw_fd();
    let end = (COUNT * PAGE) as u64;
    let (mut offset, mut found) = (0, Vec::new());
    while offset < end {
        let (count, list) = list_from(fd, &mut offset);
        ensure!(count >= 0, "pinbuf_discards: {count}");
        found.extend(list);
    }
    let expected = [(1, 2), (5, 1), (9, 1), (31, 1)].map(|(page, pages)| Discard {
        offset: (page * PAGE) as u64,
        len: (pages * PAGE) as u64,
        state: STATE_DISCARDED,
        reserved: 0,
    });
    ensure!(found == expected && offset == end, "{found:?}, {offset}");
    let errors = [
        list_from(fd, &mut (end + PAGE as u64)).0,
        list_from(fd, &mut 1).0,
        list_from(frame.file.as_raw_fd(), &mut 0).0,
    ];
    ensure!(errors == [-libc::EINVAL; 3], "{errors:?}");
    // SAFETY: no memory is involved; nothing else has this descriptor.
    unsafe { libc::close(device) };
    Ok(())
}

/// `struct pinbuf_watch`, with room for fewer buffers than change.
fn watched_by_the_c_library() -> Result<()> {
    let frames = [Frame::new()?, Frame::new()?, Frame::new()?];
    let numbers = [0, 1, 2].map(|frame| -> i32 { frames[frame].buffer.as_fd().as_raw_fd() });
    let device = pinbuf_c::pinbuf_open();
    ensure!(device >= 0, "pinbuf_open: {device}");
    let mut watch = std::ptr::null_mut();
    // SAFETY: a place for a pointer.
    let made = unsafe { pinbuf_c::pinbuf_watch_new(&mut watch, device) };
    ensure!(made == 0, "pinbuf_watch_new: {made}");
    // SAFETY: no memory is involved; the watch has a descriptor of its own.
    unsafe { libc::close(device) };
    // SAFETY: this thread's watch.
    let add = |fd: i32| unsafe { pinbuf_c::pinbuf_watch_add(watch, fd) };
    // SAFETY: as above.
    let remove = |fd: i32| unsafe { pinbuf_c::pinbuf_watch_remove(watch, fd) };
    let poll = |count: usize| -> (i32, Vec<i32>) {
        let mut list = vec![-1; count];
        // SAFETY: as above, and a list of this length.
        let changed = unsafe { pinbuf_c::pinbuf_watch_poll(watch, list.as_mut_ptr(), count) };
        list.truncate(changed.max(0) as usize);
        (changed, list)
    };
    let errors = [add(-1), add(frames[0].file.as_raw_fd()), remove(numbers[0])];
    ensure!(
        errors == [-libc::EBADF, -libc::EINVAL, -libc::ENOENT],
        "{errors:?}"
    );
    ensure!(numbers.map(add) == [0; 3], "pinbuf_watch_add");
    let other = foreign::dma_buf()?;
    let refused = add(other.as_raw_fd());
    ensure!(
        refused == -libc::EINVAL,
        "pinbuf_watch_add of another exporter's buffer: {refused}"
    );
    drop(other);
    ensure!(poll(4) == (0, vec![]), "nothing was discarded");
    for frame in &frames {
        frame.discard(3, 2)?;
    }
    let first = poll(2);
    ensure!(first == (2, numbers[..2].to_vec()), "{first:?}");
    // The third one is not forgotten, and nothing is reported twice.
    let rest = poll(2);
    ensure!(rest == (1, numbers[2..].to_vec()), "{rest:?}");
    ensure!(poll(2) == (0, vec![]), "nothing has changed since");
    // Without room, it is kept for the next call; and a buffer that is removed is not reported.
    frames[0].discard(9, 1)?;
    frames[1].discard(9, 1)?;
    ensure!(poll(0) == (0, vec![]), "there was no room");
    ensure!(remove(numbers[0]) == 0, "pinbuf_watch_remove");
    let left = poll(4);
    ensure!(left == (1, vec![numbers[1]]), "{left:?}");
    // SAFETY: nobody uses it after this.
    unsafe { pinbuf_c::pinbuf_watch_free(watch) };
    // The watch kept no buffer.
    drop(frames);
    let buffers = kernel::dma_bufs()?;
    ensure!(buffers == 0, "{buffers} dma-bufs are left");
    Ok(())
}

/// The same in Rust. Without this error, each poll would fail, and not say for which buffer.
fn a_watch_refuses_another_exporters_buffer() -> Result<()> {
    let device = pinbuf::Device::open()?;
    let frame = Frame::new()?;
    let own = pinbuf::DmaBuf::try_from(frame.buffer.as_fd())?;
    let other = pinbuf::DmaBuf::from_fd(foreign::dma_buf()?)?;
    let mut watch = pinbuf::Watch::new(&device);
    watch.add(&own)?;
    let refused = watch.add(&other);
    ensure!(
        refused == Err(pinbuf::Error::NotADmaBuf),
        "Watch::add of another exporter's buffer: {refused:?}"
    );
    frame.discard(3, 2)?;
    let changes = watch.poll().context("poll after a buffer was refused")?;
    ensure!(changes.len() == 1, "{changes:?}");
    Ok(())
}

/// How a line says which parts, by their first page and the page after the last, were discarded.
fn said(parts: &[(usize, usize)]) -> String {
    let pages: usize = parts.iter().map(|(first, end)| end - first).sum();
    let places: Vec<String> = parts
        .iter()
        .map(|(first, end)| format!("{:#x}-{:#x}", first * PAGE, end * PAGE))
        .collect();
    format!(
        "{} KiB discarded: {}",
        (pages * PAGE) >> 10,
        places.join(", ")
    )
}

fn shows_them_in_info() -> Result<()> {
    let frame = Frame::new()?;
    frame.discard(1, 1)?;
    let pid = std::process::id().to_string();
    let text = clean(&Start::program(&["pinbuf", "info", "--pid", &pid]))?;
    ensure!(
        text.contains(&said(&[(1, 2)])),
        "it says nothing of the discard: {text}"
    );
    let end = Start::program(&["pinbuf", "info", "--pid", &pid, "--json"]).end()?;
    let listed: Vec<Value> = serde_json::from_str(&end.out)?;
    let inode = frame.inode()?;
    let this = listed.iter().find(|buffer| buffer["inode"] == inode);
    let this = this.context("the buffer is not listed")?;
    ensure!(
        this["pinned"]["discarded"] == json!([part(1, 1)]),
        "{this:#?}"
    );
    Ok(())
}

/// A running `pinbuf watch`, ended when dropped.
struct Watching {
    child: std::process::Child,
    lines: mpsc::Receiver<String>,
}

impl Watching {
    fn start(words: &[&str]) -> Result<Self> {
        let mut child = Command::new("pinbuf")
            .args(["watch", "--interval", "0.2"])
            .args(words)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("no output")?;
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    fn next(&self) -> Result<String> {
        self.lines.recv_timeout(PATIENCE).context("no line came")
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The thread closes the pipe before it ends, and the sender after that.
        while self.lines.recv().is_ok() {}
    }
}

fn reports_changes_as_they_come() -> Result<()> {
    let frame = Frame::new()?;
    frame.discard(2, 1)?;
    let watching = Watching::start(&[])?;
    let line = watching.next()?;
    let inode = frame.inode()?;
    ensure!(
        line.contains(&format!("buffer {inode} ")) && line.ends_with(&said(&[(2, 3)])),
        "{line}"
    );
    frame.discard(3, 1)?;
    frame.discard(9, 1)?;
    // The two may come apart.
    let mut line = watching.next()?;
    if !line.contains(&format!("{:#x}", 9 * PAGE)) {
        line = watching.next()?;
    }
    ensure!(line.ends_with(&said(&[(2, 4), (9, 10)])), "{line}");
    // Another buffer, and nothing more of the first.
    let other = Frame::new()?;
    other.discard(0, COUNT)?;
    let line = watching.next()?;
    ensure!(
        line.contains(&format!("buffer {} ", other.inode()?)),
        "{line}"
    );
    Ok(())
}

fn passes_nothing_raw_to_the_terminal() -> Result<()> {
    let frame = Frame::new()?;
    set_name(&frame.buffer, "\x1b[2J\n\u{9b}".as_bytes())?;
    frame.discard(0, 1)?;
    for more in [&[][..], &["--json"]] {
        let words = [&["pinbuf", "watch", "--once"], more].concat();
        let text = clean(&Start::program(&words))?;
        ensure!(
            text.contains("\\u{1b}[2J") || text.contains("\\u001b[2J"),
            "the name is missing: {text}"
        );
    }
    Ok(())
}

/// A number may be another buffer's by the time that its descriptor is copied.
fn keeps_buffers_apart_that_share_a_number() -> Result<()> {
    const ROUNDS: usize = 50;
    // Lower than the buffers' own numbers, so that it is asked first.
    let shared = OwnedFd::from(std::fs::File::open("/dev/null")?);
    let (holed, whole) = (Frame::new()?, Frame::new()?);
    holed.discard(0, COUNT)?;
    let number = shared.as_raw_fd();
    ensure!(number < holed.buffer.as_fd().as_raw_fd());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for frame in [&holed, &whole].into_iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                // SAFETY: no memory is involved; the number is this function's.
                unsafe { libc::dup2(frame.buffer.as_fd().as_raw_fd(), number) };
                thread::sleep(Duration::from_micros(500));
            }
        });
        let all: Result<Vec<_>> = (0..ROUNDS).map(|_| once()).collect();
        stop.store(true, Ordering::Relaxed);
        let (inode, all) = (holed.inode()?, all?);
        for (found, change) in all.iter().flatten() {
            ensure!(
                *found == inode && change["parts"] == json!([part(0, COUNT)]),
                "of buffer {inode} alone something is discarded: {change:#?}"
            );
        }
        ensure!(all.concat().len() > ROUNDS / 2, "too few lines: {all:#?}");
        Ok(())
    })
}

fn ends_with_its_process() -> Result<()> {
    let mut sleep = Command::new("sleep").arg("3").spawn()?;
    let pid = sleep.id().to_string();
    let start = Start::program(&["pinbuf", "watch", "--interval", "0.2", "--pid", &pid]);
    let watching = thread::spawn(move || start.end());
    sleep.wait()?;
    let end = watching.join().expect("the thread does not panic")?;
    ensure!(end.status == Some(0) && end.out.is_empty(), "{end:?}");
    let end = Start::program(&["pinbuf", "watch", "--pid", "4194303"]).end()?;
    ensure!(
        end.status == Some(125) && end.err.contains("there is no process 4194303"),
        "{end:?}"
    );
    Ok(())
}

/// Of each buffer, whatever its number was before.
fn the_shim_logs_them_once() -> Result<()> {
    let words = [
        "pinbuf",
        "run",
        "--log",
        "--",
        "pinbuf-udmabuf-client",
        "--discard",
    ];
    let end = Start::program(&words).by_kvm_user().end()?;
    ensure!(end.status == Some(0), "{end:?}");
    let bytes = 3 * PAGE;
    let said = format!("the memory of {bytes} of 33177600 bytes was discarded");
    // Once for each of two buffers, which have the same number one after the other.
    ensure!(end.err.matches(&said).count() == 2, "{end:?}");
    ensure!(end.err.matches("discarded").count() == 2, "{end:?}");
    // At the next request.
    for part in end.err.split("one request later").take(2) {
        ensure!(part.contains(&said), "{end:?}");
    }
    Ok(())
}

/// The number of pages of a huge page.
const FOLIO: usize = HUGE / PAGE;

/// A buffer of private memory in two huge pages.
struct HugePages {
    memory: Memory,
    buffer: Buffer,
}

impl HugePages {
    fn new() -> Result<Self> {
        kernel::needs_transparent_huge_pages()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = Memory::map_aligned(2 * HUGE, HUGE, RW, flags, None, 0)?;
        memory.advise(0, 2 * HUGE, libc::MADV_HUGEPAGE)?;
        memory.touch_to_write();
        let buffer = Device::open()?.create(&[memory.range()])?;
        Ok(Self { memory, buffer })
    }

    /// Discards three pages of the second huge page. Returns the first page of the part that is reported then, the
    /// number of its pages, and its state: a kernel that does not count the mappings of each page knows nothing of the
    /// huge page.
    fn discard_three(&self) -> Result<(usize, usize, DiscardState)> {
        let advice = libc::MADV_DONTNEED;
        self.memory.advise(HUGE + 4 * PAGE, 3 * PAGE, advice)?;
        Ok(if kernel::has_page_mapcounts()? {
            (FOLIO + 4, 3, DiscardState::Discarded)
        } else {
            (FOLIO, FOLIO, DiscardState::Unsure)
        })
    }

    fn discard_all(&self) -> Result<()> {
        Ok(self.memory.advise(0, 2 * HUGE, libc::MADV_DONTNEED)?)
    }
}

/// By the command line.
fn reports_a_huge_page_in_parts() -> Result<()> {
    let huge = HugePages::new()?;
    ensure!(once()?.is_empty(), "a buffer is reported before");
    let (first, pages, state) = huge.discard_three()?;
    let (state, said, bytes) = match state {
        DiscardState::Discarded => ("discarded", "12 KiB discarded", [3 * PAGE, 0]),
        _ => ("unsure", "2.0 MiB possibly discarded", [0, HUGE]),
    };
    let parts = json!([part_in_state(first, pages, state)]);
    let said = format!("{said}: {:#x}-{:#x}", first * PAGE, (first + pages) * PAGE);

    let all = once()?;
    let [(_, change)] = &all[..] else {
        bail!("{all:#?}");
    };
    ensure!(
        change["parts"] == parts
            && change["discarded_bytes"] == bytes[0]
            && change["unsure_bytes"] == bytes[1],
        "{change:#?}"
    );
    let watching = Watching::start(&[])?;
    let line = watching.next()?;
    ensure!(line.ends_with(&format!(": {said}")), "{line}");
    let pid = std::process::id().to_string();
    let info = ["pinbuf", "info", "--pid", &pid];
    let text = clean(&Start::program(&info))?;
    let is_said = text.lines().any(|line| line.trim() == said);
    ensure!(is_said, "`{said}` is not in: {text}");
    let end = Start::program(&[&info[..], &["--json"]].concat()).end()?;
    let listed: Value = serde_json::from_str(&end.out)?;
    ensure!(listed[0]["pinned"]["discarded"] == parts, "{listed:#?}");

    huge.discard_all()?;
    // The two may come apart.
    let mut line = watching.next()?;
    if !line.contains("all discarded") {
        line = watching.next()?;
    }
    ensure!(line.contains(": all discarded, as when"), "{line}");
    let all = once()?;
    ensure!(
        all.len() == 1
            && all[0].1["parts"] == json!([part(0, 2 * FOLIO)])
            && all[0].1["unsure_bytes"] == 0,
        "{all:#?}"
    );
    Ok(())
}

/// By the libraries.
fn lists_a_huge_page_in_parts() -> Result<()> {
    let huge = HugePages::new()?;
    let device = pinbuf::Device::open()?;
    let buffer = pinbuf::DmaBuf::from_fd(huge.buffer.as_fd().try_clone_to_owned()?)?;
    let fd = huge.buffer.as_fd().as_raw_fd();
    let mut watch = pinbuf::Watch::new(&device);
    watch.add(&buffer)?;
    let mut c_watch = std::ptr::null_mut();
    let number = device.as_fd().as_raw_fd();
    // SAFETY: a place for a pointer.
    let made = unsafe { pinbuf_c::pinbuf_watch_new(&mut c_watch, number) };
    ensure!(made == 0, "pinbuf_watch_new: {made}");
    // SAFETY: this thread's watch.
    let added = unsafe { pinbuf_c::pinbuf_watch_add(c_watch, fd) };
    ensure!(added == 0, "pinbuf_watch_add: {added}");

    let (first, pages, state) = huge.discard_three()?;
    let part = ((first * PAGE) as u64, (pages * PAGE) as u64, state);
    let all = (0, 2 * HUGE as u64, DiscardState::Discarded);
    for expected in [part, all] {
        let (offset, len, state) = expected;
        let changes = watch.poll()?;
        let [change] = &changes[..] else {
            bail!("{changes:?}");
        };
        let flat = |part: &pinbuf::Discard| (part.offset, part.len, part.state);
        let seen: Vec<_> = change.discards.iter().map(flat).collect();
        ensure!(seen == [expected], "{seen:?}");
        let listed: Vec<_> = buffer.discarded(&device)?.iter().map(flat).collect();
        ensure!(listed == [expected], "{listed:?}");
        let info = buffer.info(&device)?;
        let is_unsure = state == DiscardState::Unsure;
        let bytes = if is_unsure { [0, len] } else { [len, 0] };
        ensure!(
            [info.discarded_bytes, info.unsure_bytes] == bytes,
            "{info:?}"
        );

        let mut changed = [-1; 2];
        // SAFETY: as above, and a list of this length.
        let count = unsafe { pinbuf_c::pinbuf_watch_poll(c_watch, changed.as_mut_ptr(), 2) };
        ensure!((count, changed[0]) == (1, fd), "{count}, {changed:?}");
        let mut list = [Discard::default(); 2];
        let mut end = 0;
        // SAFETY: a list of this length, and a number.
        let count =
            unsafe { pinbuf_c::pinbuf_discards(number, fd, list.as_mut_ptr(), 2, &mut end) };
        let as_listed = Discard {
            offset,
            len,
            state: if is_unsure {
                STATE_UNSURE
            } else {
                STATE_DISCARDED
            },
            reserved: 0,
        };
        ensure!(count == 1 && list[0] == as_listed, "{count}, {list:?}");
        huge.discard_all()?;
    }
    // SAFETY: nobody uses it after this.
    unsafe { pinbuf_c::pinbuf_watch_free(c_watch) };
    Ok(())
}
