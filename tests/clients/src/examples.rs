// SPDX-License-Identifier: MIT OR Apache-2.0

//! The library's examples that share memory with others: a ring of io_uring, a display, a Wayland compositor.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::pattern;
use pinbuf_test_harness::support::process::{PATIENCE, USER};
use pinbuf_test_harness::support::{Buffer, Device, Memory, Sync, PAGE};
use pinbuf_test_harness::tests;

use crate::compositor::{Compositor, Frame};
use crate::process::Start;

tests!("examples":
    io_uring_reads_a_file_into_a_buffer,
    io_uring_cannot_register_a_mapping,
    a_display_scans_memory_out within 120,
    a_compositor_gets_memory,
    a_compositor_may_refuse,
);

/// A pixel of the examples' pictures: red from left to right, green from top to bottom.
fn pixel(x: usize, y: usize) -> [u8; 4] {
    [0x80, y as u8, x as u8, 0]
}

/// Fails unless the bytes are the picture, with `stride` bytes from one row to the next.
fn check_picture(bytes: &[u8], width: usize, height: usize, stride: usize) -> Result<()> {
    for y in 0..height {
        for x in 0..width {
            let at = y * stride + x * 4;
            // The fourth byte of a pixel is unused.
            let seen = &bytes[at..at + 3];
            ensure!(seen == &pixel(x, y)[..3], "pixel {x}, {y} is {seen:?}");
        }
    }
    Ok(())
}

/// Allows io_uring, which the system's configuration may forbid, until the value is dropped.
fn allow_io_uring() -> Result<Setting> {
    Setting::set("/proc/sys/kernel/io_uring_disabled", 0)
}

fn io_uring_reads_a_file_into_a_buffer() -> Result<()> {
    let _allowed = allow_io_uring()?;
    // Not whole pages.
    let bytes = pattern(7, 0, (3 << 20) + 8 * 5);
    let path = Path::new("/tmp/io_uring.bin");
    fs::write(path, &bytes)?;
    let words = ["pinbuf-example-io-uring", "/tmp/io_uring.bin"];
    let output = Start::program(&words).by_kvm_user().command().output()?;
    fs::remove_file(path)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {text}", output.status);
    ensure!(output.stdout == bytes, "the buffer differs from the file");
    Ok(())
}

/// As the example's documentation says; the memory itself can be registered.
fn io_uring_cannot_register_a_mapping() -> Result<()> {
    let _allowed = allow_io_uring()?;
    let memory = Memory::small_pages(4 * PAGE)?;
    let buffer = Device::open()?.create(&[memory.range()])?;
    let mapping = buffer.map()?;
    let ring = io_uring::IoUring::new(2)?;
    let register = |memory: &Memory| {
        let whole = libc::iovec {
            iov_base: memory.at(0).cast(),
            iov_len: memory.len(),
        };
        // SAFETY: nothing is submitted to the ring.
        unsafe { ring.submitter().register_buffers(&[whole]) }
    };
    let refused = register(&mapping).map_err(|error| error.raw_os_error());
    ensure!(refused == Err(Some(Errno::EFAULT as i32)), "{refused:?}");
    register(&memory).context("the memory itself")?;
    Ok(())
}

/// The display's device, and the PCI device whose memory its screen shows.
fn display() -> Result<(PathBuf, PathBuf)> {
    let status = Command::new("modprobe").arg("bochs").status()?;
    ensure!(status.success(), "modprobe bochs: {status}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        for entry in fs::read_dir("/sys/class/drm").into_iter().flatten() {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let (device, node) = (
                entry.path().join("device"),
                Path::new("/dev/dri").join(&name),
            );
            let driver = fs::read_link(device.join("driver"));
            let is_bochs = driver.is_ok_and(|path| path.ends_with("bochs-drm"));
            if is_bochs && !name.contains('-') && name.starts_with("card") && node.exists() {
                return Ok((node, device));
            }
        }
        ensure!(Instant::now() < deadline, "bochs made no display");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Compares the picture with the display's own memory, which bochs-display scans out.
fn a_display_scans_memory_out() -> Result<()> {
    let (node, device) = display()?;
    let mut child = Command::new("pinbuf-example-scanout")
        .arg(&node)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut line)?;
    let size = line.trim().split_once('x').context("it shows nothing")?;
    let (width, height): (usize, usize) = (size.0.parse()?, size.1.parse()?);
    let screen = File::options()
        .read(true)
        .write(true)
        .open(device.join("resource0"))?;
    let stride = width * 4;
    let memory = Memory::shared(&screen, (stride * height).next_multiple_of(PAGE))?;
    let mut bytes = vec![0; stride * height];
    memory.read(0, &mut bytes);
    check_picture(&bytes, width, height, stride)?;
    drop(child.stdin.take());
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    println!("# {width}x{height} pixels are right");
    Ok(())
}

/// Runs the example with a compositor. Returns the frame that this showed, and the example's output.
fn show(refuses: bool) -> Result<(Option<Frame>, Output)> {
    let path = PathBuf::from("/tmp/wayland-pinbuf");
    let mut compositor = Compositor::listen(path.clone(), refuses)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    chown(&path, Some(USER), None)?;
    let mut child = Start::program(&["pinbuf-example-wayland"])
        .by_kvm_user()
        .command()
        .env("WAYLAND_DISPLAY", &path)
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + PATIENCE;
    let mut shown = None;
    while child.try_wait()?.is_none() {
        if let Some(frame) = compositor.turn()? {
            shown = Some(frame);
        }
        if Instant::now() > deadline {
            child.kill()?;
            bail!("the example does not end: {compositor:?}");
        }
    }
    Ok((shown, child.wait_with_output()?))
}

fn a_compositor_gets_memory() -> Result<()> {
    let (shown, output) = show(false)?;
    ensure!(output.status.success(), "{output:?}");
    let frame = shown.context("the compositor showed nothing")?;
    let buffer = Buffer::from_fd(frame.fd);
    let info = Device::open()?.describe(&buffer)?;
    ensure!(
        info.bytes >= (frame.offset + frame.stride * frame.height) as u64,
        "{info:?}"
    );
    let mapping = buffer.map()?;
    let mut bytes = vec![0; frame.stride * frame.height];
    buffer.synced(Sync::Read, || mapping.read(frame.offset, &mut bytes))?;
    check_picture(&bytes, frame.width, frame.height, frame.stride)
}

fn a_compositor_may_refuse() -> Result<()> {
    let (shown, output) = show(true)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        shown.is_none() && output.status.code() == Some(1),
        "{output:?}"
    );
    ensure!(
        text.contains("the compositor cannot import the buffer"),
        "{text}"
    );
    Ok(())
}
