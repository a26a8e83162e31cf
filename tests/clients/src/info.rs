// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf info`: it lists all buffers, whatever their names are, and prints no control character of a name.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{huge_memfd, HUGE};
use pinbuf_test_harness::support::vgem::Vgem;
use pinbuf_test_harness::support::{Buffer, Device, Memory, PAGE};
use pinbuf_test_harness::tests;
use serde_json::Value;

use crate::process::Start;

tests!("info":
    shows_what_the_driver_says,
    shows_names_of_any_bytes,
    passes_nothing_raw_to_the_terminal,
    does_not_take_a_name_for_an_exporter,
    lists_buffers_that_are_only_mapped,
    lists_mapped_buffers_for_their_user,
    lists_buffers_of_threads_with_descriptors_of_their_own,
    lists_buffers_that_no_process_has,
    does_not_take_files_for_buffers,
);

/// A buffer of this process, of this number of pages.
fn buffer(pages: usize) -> Result<Buffer> {
    Ok(Device::open()?.create(&[Memory::anonymous(pages * PAGE)?.range()])?)
}

/// Gives a buffer a name.
pub fn set_name(buffer: impl AsFd, name: &[u8]) -> Result<()> {
    let name = CString::new(name)?;
    let number = nix::request_code_write!(b'b', 1, size_of::<u64>());
    // SAFETY: DMA_BUF_SET_NAME reads a terminated string.
    let result = unsafe { libc::ioctl(buffer.as_fd().as_raw_fd(), number, name.as_ptr()) };
    Errno::result(result).context("DMA_BUF_SET_NAME")?;
    Ok(())
}

fn inode(buffer: impl AsFd) -> Result<u64> {
    Ok(nix::sys::stat::fstat(buffer.as_fd())?.st_ino)
}

/// What it prints, which must be valid UTF-8 without any control character but line breaks.
fn text(words: &[&str]) -> Result<String> {
    clean(&Start::program(&[&["pinbuf"], words].concat()))
}

/// The same for any command.
pub fn clean(start: &Start) -> Result<String> {
    let output = start.command().output()?;
    let mut all = String::new();
    for text in [output.stdout, output.stderr] {
        let text = String::from_utf8(text)?;
        let raw: Vec<char> = text
            .chars()
            .filter(|&c| c.is_control() && c != '\n')
            .collect();
        ensure!(raw.is_empty(), "raw {raw:?} in {text:?}");
        all.push_str(&text);
    }
    Ok(all)
}

/// The buffers that it lists.
fn listed_by(start: &Start) -> Result<Vec<Value>> {
    let end = start.end()?;
    ensure!(end.status == Some(0), "{end:?}");
    serde_json::from_str(&end.out).with_context(|| format!("{end:?}"))
}

fn listed(more: &[&str]) -> Result<Vec<Value>> {
    listed_by(&Start::program(
        &[&["pinbuf", "info", "--json"], more].concat(),
    ))
}

/// The one with this inode number.
fn find(listed: &[Value], inode: u64) -> Result<&Value> {
    let found = listed.iter().find(|buffer| buffer["inode"] == inode);
    found.with_context(|| format!("no buffer {inode} in {listed:#?}"))
}

/// Each number is the driver's of that name, in words too.
fn shows_what_the_driver_says() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let huge = Memory::shared(huge_memfd(HUGE)?, HUGE)?;
    let small = Memory::small_pages(8 * PAGE)?;
    small.touch_to_write();
    let device = Device::open()?;
    let ranges = [huge.range(), small.range(), huge.part(PAGE, PAGE)];
    let buffer = device.create(&ranges)?;
    small.advise(PAGE, 2 * PAGE, libc::MADV_DONTNEED)?;
    let info = device.describe(&buffer)?;
    let pid = std::process::id().to_string();
    let listed = listed(&["--pid", &pid])?;
    let this = find(&listed, inode(&buffer)?)?;
    ensure!(this["bytes"] == info.bytes, "{this:#?}");
    let pinned = &this["pinned"];
    for (name, value) in [
        ("pages", info.pages),
        ("extents", info.extents),
        ("pins", info.pins),
        ("kernel_bytes", info.kernel_bytes),
        ("held_bytes", info.held_bytes),
        ("charged_pages", info.charged_pages),
        ("device_mappings", info.mappings.into()),
    ] {
        ensure!(pinned[name] == value, "{name} is not {value}: {this:#?}");
    }
    ensure!(pinned["charged_to"] == "nothing", "{this:#?}");
    let words = format!(
        "{} pages in {} extents, {} pins, keeps {:.1} MiB in place and {} bytes of kernel memory; \
         {} pages charged to: nothing; mapped by 0 devices",
        info.pages,
        info.extents,
        info.pins,
        info.held_bytes as f64 / 1_048_576.0,
        info.kernel_bytes,
        info.charged_pages
    );
    let text = text(&["info", "--pid", &pid])?;
    ensure!(text.contains(&words), "no `{words}` in {text}");
    Ok(())
}

fn shows_names_of_any_bytes() -> Result<()> {
    let hostile = buffer(1)?;
    set_name(&hostile, b"\x80\xff")?;
    let plain = buffer(1)?;
    set_name(&plain, "b\u{e4}r".as_bytes())?;
    // A file of this name that the process maps.
    let path = std::ffi::OsString::from("/tmp/mapped-");
    let path = [path.as_encoded_bytes(), b"\x80\xff"].concat();
    let path = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&path);
    fs::write(path, [0; PAGE])?;
    let _mapped = Memory::shared(File::options().read(true).write(true).open(path)?, PAGE)?;
    let result = listed(&[]).and_then(|listed| {
        let this = find(&listed, inode(&hostile)?)?;
        ensure!(this["name"] == "\\x80\\xff", "{this:#?}");
        ensure!(this["exporter"] == "pinbuf", "{this:#?}");
        let this = find(&listed, inode(&plain)?)?;
        ensure!(this["name"] == "b\u{e4}r", "{this:#?}");
        let text = text(&["info"])?;
        ensure!(
            text.contains("`\\x80\\xff`") && text.contains("`b\u{e4}r`"),
            "{text}"
        );
        Ok(())
    });
    fs::remove_file(path)?;
    result
}

fn passes_nothing_raw_to_the_terminal() -> Result<()> {
    let buffer = buffer(1)?;
    set_name(&buffer, "\x1b[2J\n\x7f\u{9b}2J".as_bytes())?;
    let own = fs::read("/proc/self/comm")?;
    fs::write("/proc/self/comm", b"\x1b]0;x\x07\xff")?;
    let result = (|| {
        let shown = text(&["info"])?;
        ensure!(shown.contains("`\\u{1b}[2J\\n\\u{7f}\\u{9b}2J`"), "{shown}");
        ensure!(shown.contains("  \\u{1b}]0;x\\u{7}\\xff ("), "{shown}");
        let json = text(&["info", "--json"])?;
        let listed: Vec<Value> = serde_json::from_str(&json)?;
        let this = find(&listed, inode(&buffer)?)?;
        ensure!(this["name"] == "\x1b[2J\n\x7f\u{9b}2J", "{this:#?}");
        ensure!(
            this["holders"][0]["command"] == "\x1b]0;x\x07\\xff",
            "{this:#?}"
        );
        Ok(())
    })();
    fs::write("/proc/self/comm", own)?;
    result
}

/// A name that imitates a line about another exporter's buffer.
pub const FORGED: &[u8] = b"x\nexp_name:\tpinbuf";

fn does_not_take_a_name_for_an_exporter() -> Result<()> {
    let buffer = Vgem::new()?.buffer;
    set_name(&buffer, FORGED)?;
    let inode = inode(&buffer)?;
    let ours = listed(&[])?;
    ensure!(find(&ours, inode).is_err(), "{ours:#?}");
    let all = listed(&["--all"])?;
    let this = find(&all, inode)?;
    ensure!(this["exporter"] != "pinbuf", "{this:#?}");
    ensure!(
        this["name"].as_str().map(str::as_bytes) == Some(FORGED),
        "{this:#?}"
    );
    Ok(())
}

/// The inode number of a buffer that is mapped, without any descriptor.
fn only_mapped() -> Result<(u64, Memory)> {
    let buffer = buffer(3)?;
    Ok((inode(&buffer)?, buffer.map()?))
}

fn lists_buffers_that_are_only_mapped() -> Result<()> {
    let (inode, memory) = only_mapped()?;
    let listed = listed(&[])?;
    let this = find(&listed, inode)?;
    let address = format!("{:#x}", memory.addr());
    ensure!(
        this["holders"][0]["pid"] == std::process::id()
            && this["holders"][0]["mapped"][0][0] == address.as_str(),
        "{this:#?}"
    );
    // debugfs names its exporter.
    ensure!(
        this["exporter"] == "pinbuf" && this["bytes"] == 3 * PAGE as u64,
        "{this:#?}"
    );
    Ok(())
}

/// Users see their own processes, and no debugfs: then the exporter is unknown.
fn lists_mapped_buffers_for_their_user() -> Result<()> {
    let device = Device::open()?;
    crate::process::become_kvm_user()?;
    let buffer = device.create(&[Memory::anonymous(3 * PAGE)?.range()])?;
    let inode = inode(&buffer)?;
    let memory = buffer.map()?;
    drop(buffer);
    let listed = listed(&[])?;
    let this = find(&listed, inode)?;
    ensure!(
        this["exporter"].is_null() && this["bytes"] == 3 * PAGE as u64,
        "{this:#?}"
    );
    let text = text(&["info"])?;
    ensure!(
        text.contains("of an unknown exporter (only mapped)"),
        "{text}"
    );
    drop(memory);
    Ok(())
}

fn lists_buffers_of_threads_with_descriptors_of_their_own() -> Result<()> {
    let (made, inode_of) = mpsc::channel();
    let (done, end) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || -> Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
        let buffer = buffer(1)?;
        made.send(inode(&buffer)?)?;
        let _ = end.recv();
        Ok(())
    });
    let result = inode_of.recv().context("the thread").and_then(|inode| {
        let listed = listed(&[])?;
        let this = find(&listed, inode)?;
        ensure!(this["holders"][0]["pid"] == std::process::id(), "{this:#?}");
        Ok(())
    });
    drop(done);
    thread.join().expect("the thread does not panic")?;
    result
}

/// A buffer in the queue of a socket.
fn lists_buffers_that_no_process_has() -> Result<()> {
    let (to, _from) = UnixStream::pair()?;
    let inode = {
        let buffer = buffer(5)?;
        let fds = [buffer.as_fd().as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let data = [std::io::IoSlice::new(&[1])];
        sendmsg::<()>(to.as_raw_fd(), &data, &control, MsgFlags::empty(), None)?;
        inode(&buffer)?
    };
    let listed = listed(&[])?;
    let this = find(&listed, inode)?;
    ensure!(
        this["holders"].as_array().is_some_and(Vec::is_empty) && this["bytes"] == 5 * PAGE as u64,
        "{this:#?}"
    );
    Ok(())
}

/// A file whose name is like a buffer's.
fn does_not_take_files_for_buffers() -> Result<()> {
    let path = "/dmabuf:x";
    fs::write(path, [0; PAGE])?;
    let file = File::options().read(true).write(true).open(path)?;
    let _mapped = Memory::shared(&file, PAGE)?;
    let inode = inode(&file)?;
    let result = listed(&["--all"]);
    fs::remove_file(path)?;
    let listed = result?;
    ensure!(find(&listed, inode).is_err(), "{listed:#?}");
    Ok(())
}
