// SPDX-License-Identifier: MIT OR Apache-2.0

//! `weston-screenshooter`, which has Weston draw into a buffer that it makes by udmabuf.

use std::fs;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use pinbuf_test_harness::tests;

use crate::evidence;
use crate::gstreamer::{self, picture, pipeline};
use crate::process::{no_udmabuf, End, Start};
use crate::wayland::{compare_png, compositor, weston, Place, Running, FRAME};

tests!("weston":
    draws_into_pinbufs_buffer within 300,
    draws_into_no_buffer_without_pinbuf within 300,
);

fn screenshooter() -> Start {
    Start::program(&["weston-screenshooter", "--buffer-type=dmabuf"])
}

/// Takes a picture of the screen in a buffer of pinbuf's, and returns its path.
pub fn capture(place: &Place) -> Result<PathBuf> {
    for earlier in pictures(place)? {
        fs::remove_file(earlier)?;
    }
    let start = screenshooter().on_pinbuf_with(&["--log"]).by_kvm_user();
    let end = End::from(place.command(&start).output()?);
    // It writes an empty picture if Weston reports an error.
    ensure!(
        end.status == Some(0)
            && evidence::made(&end.err, FRAME) >= 1
            && !end.err.contains("capture error"),
        "{end:?}"
    );
    pictures(place)?.pop().context("no picture was written")
}

/// The pictures that were taken.
fn pictures(place: &Place) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(place.path("."))? {
        let path = entry?.path();
        if path.to_string_lossy().contains("wayland-screenshot-") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Of a client in shared memory.
fn draws_into_pinbufs_buffer() -> Result<()> {
    no_udmabuf()?;
    let place = gstreamer::place("weston")?;
    let picture = picture(&place)?;
    let _weston = compositor(&place, &weston().on_pinbuf().by_kvm_user())?;
    let start = pipeline("", "waylandsink fullscreen=true");
    let mut client = Running::of(&place, "client", gstreamer::command(&place, &start))?;
    let mut last = Ok(());
    let shown = client.until("showing the picture", |_| {
        last = compare_png(&capture(&place)?, &picture);
        Ok(last.is_ok().then_some(()))
    });
    last.and(shown)
}

fn draws_into_no_buffer_without_pinbuf() -> Result<()> {
    no_udmabuf()?;
    let place = Place::new("weston")?;
    let _weston = compositor(&place, &weston().by_kvm_user())?;
    let end = End::from(place.command(&screenshooter().by_kvm_user()).output()?);
    ensure!(
        end.status != Some(0) && end.err.contains("udmabuf not supported"),
        "{end:?}"
    );
    let pictures = pictures(&place)?;
    ensure!(pictures.is_empty(), "{pictures:?}");
    Ok(())
}
