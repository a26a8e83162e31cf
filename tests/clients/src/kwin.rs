// SPDX-License-Identifier: MIT OR Apache-2.0

//! KWin, which makes a dma-buf of the memory that a client shares with it, and draws from that.

use anyhow::{ensure, Result};
use pinbuf_test_harness::support::vgem;
use pinbuf_test_harness::tests;

use crate::doctor::Findings;
use crate::evidence;
use crate::gstreamer::{self, picture, pipeline};
use crate::process::{no_udmabuf, Start, DEBIAN_MEMLOCK};
use crate::wayland::{compositor, Buffers, Place, Running, HEIGHT, SOCKET, WIDTH};

tests!("kwin":
    draws_from_memory_of_clients within 500,
    makes_no_buffers_without_pinbuf within 500,
);

const PROGRAM: &str = "/usr/bin/kwin_wayland";

/// KWin without a screen.
fn kwin() -> Start {
    Start::program(&[
        PROGRAM,
        "--virtual",
        "--no-lockscreen",
        "--no-global-shortcuts",
        &format!("--width={WIDTH}"),
        &format!("--height={HEIGHT}"),
        &format!("--socket={SOCKET}"),
    ])
}

/// As a user with access to the graphics card too, as on a desktop.
fn user(start: Start) -> Start {
    start
        .memlock(DEBIAN_MEMLOCK, DEBIAN_MEMLOCK)
        .by_user(Some("kvm,video"))
}

/// What a KWin needs here: a graphics card, and no capability, with which nothing is preloaded.
fn prepare() -> Result<()> {
    no_udmabuf()?;
    ensure!(vgem::load()?, "modprobe finds no vgem");
    let found =
        Findings::from(Start::program(&["pinbuf", "doctor", "--json", PROGRAM]).by_kvm_user())?;
    if found.expect("command", "bad", "`setcap -r FILE`").is_ok() {
        let end = Start::program(&["setcap", "-r", PROGRAM]).end()?;
        ensure!(end.status == Some(0), "{end:?}");
    }
    Ok(())
}

/// Waits until KWin's screen shows a client that draws into shared memory, and returns KWin and its buffers.
fn with_client(place: &Place, kwin: &Start) -> Result<(Running, Buffers)> {
    let picture = picture(place)?;
    let mut kwin = compositor(place, kwin)?;
    let start = pipeline("", "waylandsink fullscreen=true");
    let _client = Running::of(place, "client", gstreamer::command(place, &start))?;
    let buffers = kwin.until("showing the picture", |kwin| {
        let buffers = kwin.buffers(&picture)?;
        // The screen is a buffer of the graphics card's driver.
        Ok((!buffers.foreign_with_picture.is_empty()).then_some(buffers))
    })?;
    Ok((kwin, buffers))
}

fn draws_from_memory_of_clients() -> Result<()> {
    prepare()?;
    let place = gstreamer::place("kwin")?;
    let (kwin, buffers) = with_client(&place, &user(kwin().on_pinbuf()))?;
    println!("# {buffers:?}");
    ensure!(!buffers.with_picture.is_empty(), "{buffers:?}");
    ensure!(
        kwin.mapped_buffers("rw-s")? > 0,
        "KWin's renderer has no buffer mapped"
    );
    ensure!(
        evidence::has_device(kwin.process())?,
        "KWin has not opened pinbuf's device"
    );
    Ok(())
}

fn makes_no_buffers_without_pinbuf() -> Result<()> {
    prepare()?;
    let place = gstreamer::place("kwin")?;
    let (_kwin, buffers) = with_client(&place, &user(kwin()))?;
    ensure!(
        buffers.with_picture.is_empty() && buffers.others.is_empty(),
        "{buffers:?}"
    );
    Ok(())
}
