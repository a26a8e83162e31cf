// SPDX-License-Identifier: MIT OR Apache-2.0

//! GStreamer's udmabuf allocator: buffers that one element writes and another one imports.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{ensure, Result};
use pinbuf_test_harness::tests;

use crate::evidence;
use crate::process::{no_udmabuf, End, Start};
use crate::wayland::{compare_png, compositor, weston, Place, Running, FRAME, HEIGHT, WIDTH};

tests!("gstreamer":
    frames_are_right within 240,
    frames_are_right_by_the_supervisor within 240,
    frames_are_imported_by_gl within 240,
    buffers_are_pinbufs within 240,
    weston_shows_frames within 400,
    has_no_buffers_without_pinbuf within 400,
);

/// The plugins whose elements the pipelines use. A scan of all plugins takes minutes.
const PLUGINS: [&str; 4] = ["coreelements", "opengl", "videotestsrc", "waylandsink"];
const DIRECTORY: &str = "/usr/lib/x86_64-linux-gnu/gstreamer-1.0";

/// What `glupload` makes of frames in buffers of its udmabuf allocator, and of no others.
const DMABUF: &str = "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format=XR24";

/// The renderer makes textures of the frames, and frames of the textures. Only for buffers, it
/// makes textures in another format.
const GL: &str = "glupload ! gldownload ! video/x-raw";

/// A directory in which GStreamer finds these plugins.
pub fn place(name: &str) -> Result<Place> {
    let place = Place::new(name)?;
    let plugins = place.path("plugins");
    fs::create_dir(&plugins)?;
    for plugin in PLUGINS {
        let file = format!("libgst{plugin}.so");
        symlink(format!("{DIRECTORY}/{file}"), plugins.join(file))?;
    }
    Ok(place)
}

/// `gst-launch-1.0` with a source of a picture that does not change, and more elements.
pub fn pipeline(source: &str, elements: &str) -> Start {
    let text = format!(
        "gst-launch-1.0 -q videotestsrc pattern=colors {source} ! \
         video/x-raw,format=BGRx,width={WIDTH},height={HEIGHT},framerate=5/1 ! {elements}"
    );
    Start::program(&text.split_whitespace().collect::<Vec<_>>()).by_kvm_user()
}

/// A command that has GStreamer draw by EGL, without a display.
pub fn command(place: &Place, start: &Start) -> Command {
    let mut command = place.command(start);
    command
        .env("GST_PLUGIN_SYSTEM_PATH_1_0", place.path("plugins"))
        .env("GST_REGISTRY", place.path("registry"))
        .env("GST_GL_PLATFORM", "egl")
        .env("GST_GL_WINDOW", "surfaceless")
        .env("GST_GL_API", "gles2");
    command
}

/// What a pipeline writes into a file, and how it ended.
fn frames(place: &Place, start: &Start) -> Result<(Vec<u8>, End)> {
    let end = End::from(command(place, start).output()?);
    let bytes = fs::read(place.path("frames")).unwrap_or_default();
    Ok((bytes, end))
}

/// An element that writes frames into a file.
fn file(place: &Place) -> String {
    format!("filesink location={}", place.path("frames").display())
}

/// The picture, as it is in memory of no special kind.
pub fn picture(place: &Place) -> Result<Vec<u8>> {
    let (picture, end) = frames(place, &pipeline("num-buffers=1", &file(place)))?;
    ensure!(end.status == Some(0) && picture.len() == FRAME, "{end:?}");
    let mut colors: Vec<_> = picture.chunks_exact(4).collect();
    colors.sort_unstable();
    colors.dedup();
    ensure!(colors.len() > 1000, "only {} colours", colors.len());
    Ok(picture)
}

/// Fails unless the pipeline has written frames of this picture, from buffers of pinbuf's, served in this way.
fn check(place: &Place, elements: &str, picture: &[u8], way: &str) -> Result<()> {
    const COUNT: usize = 8;
    let source = format!("num-buffers={COUNT}");
    let elements = format!("{elements} ! {}", file(place));
    let start = pipeline(&source, &elements).on_pinbuf_with(&["--log", "--by", way]);
    let (written, end) = frames(place, &start)?;
    ensure!(end.status == Some(0), "{end:?}");
    ensure!(
        written == picture.repeat(COUNT),
        "{} bytes are not {COUNT} frames; {end:?}",
        written.len()
    );
    let made = evidence::made(&end.err, FRAME);
    println!("# {COUNT} frames are right, {made} buffers");
    ensure!(made >= 2, "{end:?}");
    // GStreamer closes the file that a buffer was made of, and nobody else sees its pages.
    ensure!(!end.err.contains("shows old pages"), "{end:?}");
    Ok(())
}

fn frames_are_right() -> Result<()> {
    frames_are_right_by("preload")
}

fn frames_are_right_by_the_supervisor() -> Result<()> {
    frames_are_right_by("supervisor")
}

fn frames_are_right_by(way: &str) -> Result<()> {
    no_udmabuf()?;
    let place = place("gstreamer")?;
    let picture = picture(&place)?;
    check(&place, &format!("glupload ! {DMABUF}"), &picture, way)
}

/// The renderer makes textures of the buffers, and has them mapped for that.
fn frames_are_imported_by_gl() -> Result<()> {
    no_udmabuf()?;
    let place = place("gstreamer")?;
    let picture = picture(&place)?;
    let rgba: Vec<u8> = picture
        .chunks_exact(4)
        .flat_map(|bgrx| [bgrx[2], bgrx[1], bgrx[0], bgrx[3]])
        .collect();
    check(&place, GL, &rgba, "preload")?;
    let start = pipeline("", &format!("{GL} ! fakesink sync=true")).on_pinbuf();
    let mut running = Running::of(&place, "pipeline", command(&place, &start))?;
    running.until("importing buffers", |running| {
        let buffers = running.buffers(&picture)?;
        let imported = running.mapped_buffers("rw-s")?;
        Ok((buffers.with_picture.len() >= 2 && imported >= 2).then_some(()))
    })
}

/// Looks into the buffers themselves, while frames are made.
fn buffers_are_pinbufs() -> Result<()> {
    no_udmabuf()?;
    let place = place("gstreamer")?;
    let picture = picture(&place)?;
    let start = pipeline("", &format!("glupload ! {DMABUF} ! fakesink sync=true")).on_pinbuf();
    let mut running = Running::of(&place, "pipeline", command(&place, &start))?;
    let buffers = running.until("writing frames", |running| {
        let buffers = running.buffers(&picture)?;
        Ok((buffers.with_picture.len() >= 2).then_some(buffers))
    })?;
    println!("# {buffers:?}");
    ensure!(
        evidence::has_device(running.process())?,
        "GStreamer has not opened pinbuf's device"
    );
    Ok(())
}

/// From GStreamer's buffers to Weston's renderer, and from there to a picture in another buffer.
fn weston_shows_frames() -> Result<()> {
    no_udmabuf()?;
    let place = place("gstreamer")?;
    let picture = picture(&place)?;
    let mut weston = compositor(&place, &weston().on_pinbuf().by_kvm_user())?;
    let start = pipeline("", "waylandsink fullscreen=true").on_pinbuf();
    let mut running = Running::of(&place, "pipeline", command(&place, &start))?;
    let shared = running.until("showing frames", |running| {
        let mut buffers = running.buffers(&picture)?.with_picture;
        let theirs = weston.buffers(&picture)?.with_picture;
        buffers.retain(|buffer| theirs.contains(buffer));
        Ok((buffers.len() >= 2).then_some(buffers.len()))
    })?;
    let mapped = weston.mapped_buffers("rw-s")?;
    println!("# Weston has {shared} buffers of GStreamer's, and {mapped} mappings");
    ensure!(mapped > 0, "Weston's renderer has no buffer mapped");
    compare_png(&crate::weston::capture(&place)?, &picture)
}

/// The same pipelines end with an error, or show frames from memory of another kind.
fn has_no_buffers_without_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let place = place("gstreamer")?;
    let picture = picture(&place)?;
    fs::remove_file(place.path("frames"))?;
    let elements = format!("glupload ! {DMABUF} ! {}", file(&place));
    let (written, end) = frames(&place, &pipeline("num-buffers=8", &elements))?;
    ensure!(end.status == Some(1) && written.is_empty(), "{end:?}");
    let elements = format!("{GL} ! {}", file(&place));
    let (written, end) = frames(&place, &pipeline("num-buffers=1", &elements))?;
    ensure!(end.status == Some(0) && written == picture, "{end:?}");
    let mut weston = compositor(&place, &weston().by_kvm_user())?;
    let start = pipeline("", "waylandsink fullscreen=true");
    let mut running = Running::of(&place, "pipeline", command(&place, &start))?;
    running.until("showing frames", |running| {
        let memory = evidence::open_on(running.process(), |file| file.contains("memfd:gst-shm"))?;
        Ok((memory.len() >= 2).then_some(()))
    })?;
    let (ours, theirs) = (running.buffers(&picture)?, weston.buffers(&picture)?);
    ensure!(ours.count() + theirs.count() == 0, "{ours:?}, {theirs:?}");
    Ok(())
}
