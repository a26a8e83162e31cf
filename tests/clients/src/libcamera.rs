// SPDX-License-Identifier: MIT OR Apache-2.0

//! libcamera's virtual camera, whose frames are buffers that libcamera makes by udmabuf where its
//! user may not open the dma-heaps.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{chown, Pid, Uid};
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::support::Sync;
use pinbuf_test_harness::tests;

use crate::bars::Bars;
use crate::evidence;
use crate::process::{no_udmabuf, Start};

tests!("libcamera":
    frames_are_right within 240,
    buffers_are_pinbufs within 240,
    makes_no_frames_without_pinbuf within 120,
);

/// The frames' size.
const BARS: Bars = Bars {
    width: 640,
    height: 480,
};

/// Where libcamera looks for its virtual cameras.
const CAMERAS: &str = "/usr/share/libcamera/pipeline/virtual/virtual.yaml";

/// A camera that shows colour bars, which move by a column with each frame.
fn camera() -> Result<()> {
    no_udmabuf()?;
    let Bars { width, height } = BARS;
    let text = format!(
        "%YAML 1.1\n---\n\"pinbuf\":\n  supported_formats:\n  - width: {width}\n    \
         height: {height}\n    frame_rates:\n    - 30\n    - 30\n  test_pattern: \"bars\"\n"
    );
    fs::create_dir_all(Path::new(CAMERAS).parent().context("a path")?)?;
    fs::write(CAMERAS, text).context("describing a camera")
}

/// `cam`, with arguments to capture from it.
fn cam(more: &[&str]) -> Start {
    let stream = format!(
        "width={},height={},pixelformat=NV12",
        BARS.width, BARS.height
    );
    let mut words = vec!["cam", "--camera=pinbuf", "--stream", &stream];
    words.extend(more);
    Start::program(&words)
}

/// A directory that the user may write to.
fn directory(name: &str) -> Result<PathBuf> {
    let path = Path::new("/tmp").join(name);
    fs::DirBuilder::new().mode(0o700).create(&path)?;
    chown(&path, Some(Uid::from_raw(USER)), None)?;
    Ok(path)
}

fn frames_are_right() -> Result<()> {
    const COUNT: usize = 12;
    camera()?;
    let frames = directory("frames")?;
    let end = cam(&[
        &format!("--capture={COUNT}"),
        &format!("--file={}/#.bin", frames.display()),
    ])
    .on_pinbuf()
    .by_kvm_user()
    .end()?;
    ensure!(end.status == Some(0), "{end:?}");
    let mut files: Vec<PathBuf> = fs::read_dir(&frames)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    ensure!(files.len() == COUNT, "cam wrote {files:?}; {end:?}");
    let mut expected = None;
    for file in files {
        let shift = BARS
            .check(&fs::read(&file)?)
            .with_context(|| format!("{}", file.display()))?;
        ensure!(
            expected.is_none_or(|expected| expected == shift),
            "{}: shifted by {shift}, expected {expected:?}",
            file.display()
        );
        expected = Some((shift + 1) % BARS.width);
    }
    println!(
        "# {COUNT} frames of {} bytes are right, each a column further than the one before",
        BARS.bytes()
    );
    fs::remove_dir_all(frames)?;
    Ok(())
}

/// Looks into the buffers themselves, while libcamera uses them.
fn buffers_are_pinbufs() -> Result<()> {
    camera()?;
    let mut child = cam(&["--capture"])
        .on_pinbuf()
        .by_kvm_user()
        .command()
        .stdout(Stdio::piped())
        .spawn()?;
    let process = Pid::from_raw(child.id() as i32);
    // A line for each frame; after some dozens every buffer has been filled.
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    for _ in 0..24 {
        lines
            .find(|line| line.as_ref().is_ok_and(|text| text.contains("bytesused")))
            .context("cam ended")??;
    }
    kill(process, Signal::SIGSTOP)?;
    // Of all its threads.
    let stopped = waitpid(process, Some(WaitPidFlag::WUNTRACED))?;
    ensure!(
        stopped == WaitStatus::Stopped(process, Signal::SIGSTOP),
        "{stopped:?}"
    );
    let buffers = evidence::buffers(child.id())?;
    // The one that it was writing to may be incomplete.
    let mut shifts = Vec::new();
    for buffer in &buffers {
        let mapping = buffer.map()?;
        let mut frame = vec![0; BARS.bytes()];
        ensure!(mapping.len() >= frame.len(), "too small a buffer");
        buffer.synced(Sync::Read, || mapping.read(0, &mut frame))?;
        shifts.extend(BARS.check(&frame).ok());
    }
    let whole = shifts.len();
    println!(
        "# {} buffers of pinbuf's, {whole} with whole frames, shifted by {shifts:?}",
        buffers.len()
    );
    ensure!(
        whole >= 2,
        "only {whole} frames in {} buffers",
        buffers.len()
    );
    ensure!(whole + 1 >= buffers.len(), "{whole} whole frames");
    shifts.sort_unstable();
    shifts.dedup();
    ensure!(shifts.len() == whole, "two buffers have the same frame");
    ensure!(
        evidence::has_device(child.id())?,
        "cam has not opened pinbuf's device"
    );
    drop(buffers);
    kill(process, Signal::SIGCONT)?;
    kill(process, Signal::SIGINT)?;
    lines.for_each(drop);
    let status = child.wait()?;
    ensure!(status.success(), "cam ended by {status}");
    Ok(())
}

fn makes_no_frames_without_pinbuf() -> Result<()> {
    camera()?;
    let frames = directory("no-frames")?;
    let end = cam(&["--capture=1", &format!("--file={}/#.bin", frames.display())])
        .by_kvm_user()
        .end()?;
    let written = fs::read_dir(&frames)?.count();
    ensure!(end.status != Some(0) && written == 0, "{written}: {end:?}");
    ensure!(
        end.err.contains("Could not open any dma-buf provider"),
        "{end:?}"
    );
    fs::remove_dir_all(frames)?;
    Ok(())
}
