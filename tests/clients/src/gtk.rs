// SPDX-License-Identifier: MIT OR Apache-2.0

//! GTK, which makes dma-bufs by udmabuf for textures of scenes that are files, and in a test of its own.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{ensure, Result};
use pinbuf_test_harness::tests;

use crate::evidence;
use crate::gstreamer::{self, picture};
use crate::process::{no_udmabuf, End, Start};
use crate::wayland::{compare_png, compositor, weston, Place, FRAME, HEIGHT, WIDTH};

tests!("gtk":
    picture_is_drawn_from_a_buffer within 300,
    picture_is_drawn_from_memory_without_pinbuf within 300,
    test_of_dmabufs_passes within 300,
    test_of_dmabufs_fails_without_pinbuf within 300,
);

/// What GTK reports where it finds no udmabuf.
const NO_DEVICE: &str = "Failed to open /dev/udmabuf";

/// How a program of GTK's ends, on a compositor that knows nothing of pinbuf.
fn run(place: &Place, start: Start, environment: &[(&str, &str)]) -> Result<End> {
    no_udmabuf()?;
    let _weston = compositor(place, &weston().by_kvm_user())?;
    // GTK's tests demand this locale, which no package has.
    let locales = place.path("locales");
    fs::create_dir(&locales)?;
    symlink("/usr/lib/locale/C.utf8", locales.join("en_US.UTF-8"))?;
    let output = place
        .command(&start.by_kvm_user())
        .current_dir(place.path("."))
        .env("GDK_BACKEND", "wayland")
        .env("LOCPATH", &locales)
        .envs(environment.iter().copied())
        .output()?;
    Ok(End::from(output))
}

/// The program that draws a scene into a file.
fn renderer() -> Start {
    Start::program(&["gtk4-rendernode-tool", "render", "scene", "drawn.png"])
}

/// Writes a scene of nothing but the picture, in a dma-buf, and returns the picture.
fn scene(place: &Place) -> Result<Vec<u8>> {
    let picture = picture(place)?;
    let end = Start::program(&[
        "sh",
        "-c",
        "gzip -c \"$0\" | base64 -w0",
        &place.path("frames").to_string_lossy(),
    ])
    .end()?;
    ensure!(end.status == Some(0) && !end.out.is_empty(), "{end:?}");
    let data = end.out;
    let text = format!(
        "texture {{ bounds: 0 0 {WIDTH} {HEIGHT}; texture: dmabuf {{ width: {WIDTH}; height: {HEIGHT}; \
         stride: {}; fourcc: \"XR24\"; data: url(\"data:;base64,{data}\"); }} }}\n",
        WIDTH * 4
    );
    fs::write(place.path("scene"), text)?;
    Ok(picture)
}

fn picture_is_drawn_from_a_buffer() -> Result<()> {
    let place = gstreamer::place("gtk")?;
    let picture = scene(&place)?;
    let end = run(&place, renderer().on_pinbuf_with(&["--log"]), &[])?;
    ensure!(
        end.status == Some(0)
            && evidence::made(&end.err, FRAME) >= 1
            && !end.err.contains(NO_DEVICE),
        "{end:?}"
    );
    compare_png(&place.path("drawn.png"), &picture)
}

/// GTK reports that it has no buffer, and draws all the same.
fn picture_is_drawn_from_memory_without_pinbuf() -> Result<()> {
    let place = gstreamer::place("gtk")?;
    let picture = scene(&place)?;
    let end = run(&place, renderer(), &[])?;
    ensure!(end.err.contains(NO_DEVICE), "{end:?}");
    compare_png(&place.path("drawn.png"), &picture)
}

/// As Debian's package gtk-4-tests installs it.
const TEST: &str = "/usr/libexec/installed-tests/gtk-4.0/gdk/dmabuf-support";
const NAME: &str = "/dmabuf/no-gpu";

/// The test, without a renderer, which makes buffers itself.
fn test(place: &Place, start: Start) -> Result<End> {
    run(place, start, &[("GDK_DISABLE", "gl,vulkan")])
}

fn test_of_dmabufs_passes() -> Result<()> {
    let place = Place::new("gtk")?;
    let end = test(&place, Start::program(&[TEST]).on_pinbuf_with(&["--log"]))?;
    ensure!(
        end.status == Some(0)
            && end.out.contains(&format!("ok 1 {NAME}"))
            && !end.out.contains("not ok"),
        "{end:?}"
    );
    ensure!(evidence::made(&end.err, 4) == 1, "{end:?}");
    Ok(())
}

fn test_of_dmabufs_fails_without_pinbuf() -> Result<()> {
    let place = Place::new("gtk")?;
    let end = test(&place, Start::program(&[TEST]))?;
    ensure!(
        end.status != Some(0) && end.out.contains(&format!("not ok 1 {NAME} - {NO_DEVICE}")),
        "{end:?}"
    );
    Ok(())
}
