// SPDX-License-Identifier: MIT OR Apache-2.0

//! Displays that take the dma-buf itself (`gl=on`), not QEMU's mapping of it.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use pinbuf::Device;
use serde_json::json;

use crate::dbus::{Display, Scanout};
use crate::evidence;
use crate::machine::{Machine, Setup};
use crate::pattern::Pattern;
use crate::picture::Picture;
use crate::protocol::Request;
use crate::scenarios::{note, start, timed};
use crate::vfio::modprobe;
use crate::vnc::Vnc;
use crate::x11::Server;

/// How long a display may take to show a frame.
const PATIENCE: Duration = Duration::from_secs(120);

/// The format of the guest's own buffer, and of the copy that OpenGL makes.
const GUESTS: &str = "XR24";
const OPENGLS: &str = "XB24";

/// A render node that needs no GPU.
fn render_node() -> Result<String> {
    modprobe("vgem")?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for entry in fs::read_dir("/dev/dri").into_iter().flatten() {
            let path = entry?.path().display().to_string();
            if path.contains("/renderD") {
                return Ok(path);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    anyhow::bail!("vgem made no render node")
}

fn dbus_setup(name: &str) -> Result<Setup> {
    let node = render_node()?;
    Ok(Setup {
        display: vec![format!("dbus,p2p=yes,gl=on,rendernode={node}")],
        ..Setup::new(name)
    })
}

/// QEMU's major version.
fn version(machine: &mut Machine) -> Result<u64> {
    let answer = machine.qmp.execute("query-version", json!({}))?;
    answer["qemu"]["major"]
        .as_u64()
        .context("QEMU reports no version")
}

/// A client gets the descriptor of the screen, maps it, and compares every pixel.
pub fn dbus_descriptor() -> Result<()> {
    evidence::no_udmabuf()?;
    let setup = dbus_setup("dbus")?;
    let mut machine = start(&setup)?;
    machine.draw(1)?;
    let version = version(&mut machine)?;
    for (second, frames) in [(false, 2..6), (true, 6..8)] {
        let display = Display::connect(&mut machine.qmp, second)?;
        let scanout = display.scanout(setup.screen, GUESTS, PATIENCE)?;
        let newer = second && version >= 11;
        let expected = if newer {
            "ScanoutDMABUF2"
        } else {
            "ScanoutDMABUF"
        };
        ensure!(scanout.call == expected, "{} came", scanout.call);
        check_is_pinbufs(&machine, &scanout)?;
        let count = frames.len();
        timed(
            &format!("QEMU {version}, {expected}: {count} frames read through the descriptor"),
            || {
                for frame in frames {
                    display.forget()?;
                    let expected = machine.draw(frame)?;
                    display.updated(PATIENCE)?;
                    scanout.picture()?.compare(expected)?;
                }
                Ok(())
            },
        )?;
        // Without any call of the guest's driver: these are the pages that the guest draws in.
        let expected = machine.draw_quietly(if second { 21 } else { 20 })?;
        scanout.picture()?.compare(expected)?;
        note("a frame that the guest did not announce: every pixel right");
    }
    machine.buffers()?;
    machine.quit()
}

/// The descriptor is of pinbuf's buffer, the one that QEMU made for the screen.
fn check_is_pinbufs(machine: &Machine, scanout: &Scanout) -> Result<()> {
    let here = evidence::buffer_of(scanout.buffer.as_fd())?;
    let info = scanout
        .buffer
        .info(&Device::open()?)
        .context("PINBUF_INFO of the scanout's descriptor")?;
    note(&format!(
        "{} brought {}x{} {}, stride {}: fdinfo says {}, {} bytes; PINBUF_INFO: {} extents, {} pins",
        scanout.call,
        scanout.width,
        scanout.height,
        scanout.format(),
        scanout.stride,
        here.exporter,
        here.size,
        info.extents,
        info.pins
    ));
    ensure!(here.exporter == "pinbuf", "{here:?}");
    ensure!(
        machine
            .buffers()?
            .iter()
            .any(|(buffer, _)| buffer.inode == here.inode),
        "{here:?} is none of those that QEMU made"
    );
    Ok(())
}

/// The comparison: without blob resources, QEMU passes a copy that OpenGL made.
fn copied(setup: Setup, exporter: &str) -> Result<()> {
    let setup = Setup {
        blob: false,
        ..setup
    };
    let mut machine = start(&setup)?;
    machine.draw(1)?;
    let display = Display::connect(&mut machine.qmp, false)?;
    let scanout = display.scanout(setup.screen, OPENGLS, PATIENCE)?;
    let here = evidence::buffer_of(scanout.buffer.as_fd())?;
    note(&format!(
        "without blob {} brought {} of {}",
        scanout.call,
        scanout.format(),
        here.exporter
    ));
    ensure!(here.exporter == exporter, "{here:?}");
    display.forget()?;
    let shown = machine.draw(2)?;
    display.updated(PATIENCE)?;
    scanout.picture()?.compare(shown)?;
    let quiet = machine.draw_quietly(3)?;
    let picture = scanout.picture()?;
    picture.compare(shown).context("the copy changed")?;
    let (wrong, _) = picture.wrong(quiet)?;
    ensure!(wrong > 0, "that is the guest's memory, without blob");
    note(&format!(
        "a frame that the guest did not announce is not there: {wrong} pixels differ"
    ));
    machine.quit()
}

/// OpenGL in software allocates its copy by `/dev/udmabuf`, which is the shim.
pub fn dbus_without_blob() -> Result<()> {
    evidence::no_udmabuf()?;
    copied(dbus_setup("dbus-copy")?, "pinbuf")
}

/// The same with the kernel's udmabuf: then no descriptor is pinbuf's.
pub fn udmabuf_dbus_without_blob() -> Result<()> {
    let setup = Setup {
        pinbuf: false,
        ..dbus_setup("udmabuf-dbus-copy")?
    };
    copied(setup, "udmabuf")
}

/// Waits until a display shows the frame that was drawn.
fn wait_for(
    machine: &mut Machine,
    what: &str,
    frame: u32,
    mut look: impl FnMut(&mut Machine) -> Result<(usize, String)>,
) -> Result<()> {
    machine.draw(frame)?;
    let start = Instant::now();
    loop {
        let (wrong, first) = look(machine)?;
        let seconds = start.elapsed().as_secs_f64();
        if wrong == 0 {
            note(&format!(
                "{what}: every pixel of frame {frame} right after {seconds:.1} s"
            ));
            return Ok(());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{what}: {wrong} pixels stay wrong; {first}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// QEMU maps its screen's dma-buf for reading; an importer maps it again, for writing too.
fn check_imported(machine: &Machine, imported: bool) -> Result<()> {
    let buffer = machine.screen_fd()?;
    let mappings = evidence::mappings(machine.process(), buffer.inode)?;
    note(&format!(
        "QEMU's mappings of the screen's dma-buf: {}",
        mappings.join(", ")
    ));
    let writable = mappings.iter().any(|mapping| mapping == "rw-s");
    ensure!(writable == imported, "{mappings:?}");
    Ok(())
}

/// OpenGL without a screen imports the dma-buf, and VNC shows what it draws.
pub fn egl_headless() -> Result<()> {
    evidence::no_udmabuf()?;
    let node = render_node()?;
    let socket = "/tmp/nested/egl/vnc-socket";
    let setup = Setup {
        display: vec![format!("egl-headless,rendernode={node}")],
        more: vec!["-vnc".to_owned(), format!("unix:{socket}")],
        ..Setup::new("egl")
    };
    let mut machine = start(&setup)?;
    machine.draw(1)?;
    let mut client = Vnc::connect(socket.as_ref())?;
    for frame in 2..6 {
        wait_for(&mut machine, "egl-headless, by VNC", frame, |machine| {
            client.picture()?.wrong(machine.screen()?.pattern(frame))
        })?;
    }
    check_imported(&machine, true)?;
    machine.quit()
}

/// The window of a desktop, with and without OpenGL.
fn gtk(name: &str, gl: &str, imported: bool) -> Result<()> {
    evidence::no_udmabuf()?;
    render_node()?;
    let server = Server::start(name, (2048, 1152))?;
    let setup = Setup {
        display: vec![format!("gtk,gl={gl},show-menubar=off,show-tabs=off")],
        environment: vec![
            ("DISPLAY", server.display()),
            ("GDK_BACKEND", "x11".to_owned()),
        ],
        ..Setup::new(name)
    };
    let mut machine = timed("QEMU starts and its guest is ready", || {
        Machine::start(&setup)
    })?;
    follow(&mut machine)?;
    for frame in 1..5 {
        let what = format!("gtk,gl={gl}, the X server's screen");
        let mut last = Instant::now();
        wait_for(&mut machine, &what, frame, |machine| {
            let seen = closest(&server.picture()?, machine.screen()?.pattern(frame));
            // The window may have changed its size, and QEMU stretches what it shows.
            if seen.0 > 0 && last.elapsed() > Duration::from_secs(10) {
                note(&format!("{} pixels are wrong; {}", seen.0, seen.1));
                follow(machine)?;
                machine.draw(frame)?;
                last = Instant::now();
            }
            Ok(seen)
        })?;
    }
    check_imported(&machine, imported)?;
    machine.quit()
}

/// Lets the guest take the size that the window asks for, as desktops do.
fn follow(machine: &mut Machine) -> Result<()> {
    let shown = machine.show(&Request::Show)?;
    note(&format!(
        "the window asks the guest for {}x{}",
        shown.width, shown.height
    ));
    Ok(())
}

/// The number of wrong pixels of the window, which may be anywhere on the screen.
fn closest(screen: &Picture, expected: Pattern) -> (usize, String) {
    match screen.find(expected) {
        Some((x, y)) => {
            let window = screen.part((x, y), (expected.width, expected.height));
            window
                .wrong(expected)
                .unwrap_or_else(|error| (1, format!("{error:#}")))
        }
        None => (
            expected.width as usize * expected.height as usize,
            "its first row is nowhere on the screen".to_owned(),
        ),
    }
}

/// The configuration that this project was started for.
pub fn gtk_gl_on() -> Result<()> {
    gtk("gtk-gl", "on", true)
}

/// The same without OpenGL.
pub fn gtk_gl_off() -> Result<()> {
    gtk("gtk", "off", false)
}
