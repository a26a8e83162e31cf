// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's D-Bus display with `gl=on`: a client that gets the descriptor of the scanout, maps it, and reads the pixels.

use std::os::fd::{AsFd, OwnedFd as StdFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use pinbuf::{Access, DmaBuf};
use pinbuf_test_qmp::Qmp;
use serde_json::json;
use zbus::blocking::{connection, Connection};
use zbus::zvariant::{Fd, OwnedFd};
use zbus::{fdo, interface};

use crate::picture::Picture;

const CONSOLE: &str = "/org/qemu/Display1/Console_0";
const LISTENER: &str = "/org/qemu/Display1/Listener";
const DMABUF2: &str = "org.qemu.Display1.Listener.Unix.ScanoutDMABUF2";

/// `DRM_FORMAT_XRGB8888` and `DRM_FORMAT_XBGR8888`.
const XR24: u32 = u32::from_le_bytes(*b"XR24");
const XB24: u32 = u32::from_le_bytes(*b"XB24");

/// A dma-buf on the screen, as QEMU describes it.
#[derive(Debug)]
pub struct Scanout {
    /// The buffer.
    pub buffer: DmaBuf,
    /// The call that passed it.
    pub call: &'static str,
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// Bytes from row to row.
    pub stride: u32,
    /// Where the first row begins.
    pub offset: u32,
    /// The format of a pixel.
    pub fourcc: u32,
}

impl Scanout {
    fn new(fd: OwnedFd, call: &'static str) -> fdo::Result<Self> {
        let buffer = DmaBuf::from_fd(fd.into());
        Ok(Self {
            buffer: buffer.map_err(|error| fdo::Error::Failed(error.to_string()))?,
            call,
            width: 0,
            height: 0,
            stride: 0,
            offset: 0,
            fourcc: 0,
        })
    }

    /// The format's name.
    pub fn format(&self) -> String {
        String::from_utf8_lossy(&self.fourcc.to_le_bytes()).into_owned()
    }

    /// What the buffer holds now, read through a mapping of it.
    pub fn picture(&self) -> Result<Picture> {
        let swap = match self.fourcc {
            XR24 => false,
            XB24 => true,
            _ => bail!("the format is {}", self.format()),
        };
        let mapping = self.buffer.map().context("mapping the scanout")?;
        let access = mapping.begin(Access::Read)?;
        let mut row = vec![0; self.width as usize * 4];
        let mut pixels = Vec::with_capacity(self.width as usize * self.height as usize);
        for y in 0..self.height as usize {
            access.read_at(self.offset as usize + y * self.stride as usize, &mut row)?;
            pixels.extend(row.chunks_exact(4).map(|bytes| {
                let [blue, green, red] = [bytes[0], bytes[1], bytes[2]];
                u32::from_be_bytes(if swap {
                    [0, blue, green, red]
                } else {
                    [0, red, green, blue]
                })
            }));
        }
        access.finish()?;
        Ok(Picture {
            width: self.width,
            height: self.height,
            pixels,
        })
    }
}

/// QEMU's calls.
#[derive(Debug)]
enum Event {
    /// This is on the screen from now on.
    Scanout(Scanout),
    /// What is on the screen has changed.
    Update,
    /// Nothing is on the screen.
    Disable,
    /// QEMU sends pixels instead of a descriptor.
    Pixels,
}

/// `org.qemu.Display1.Listener`: QEMU calls, and waits for the answer.
struct Listener {
    events: Sender<Event>,
    interfaces: Vec<String>,
}

impl Listener {
    fn tell(&self, event: Event) {
        // There is no receiver any more when the scenario ends.
        let _ = self.events.send(event);
    }
}

#[interface(name = "org.qemu.Display1.Listener", spawn = false)]
impl Listener {
    #[zbus(name = "ScanoutDMABUF")]
    #[allow(clippy::too_many_arguments, reason = "QEMU's interface")]
    fn scanout_dmabuf(
        &self,
        fd: OwnedFd,
        width: u32,
        height: u32,
        stride: u32,
        fourcc: u32,
        _modifier: u64,
        _y0_top: bool,
    ) -> fdo::Result<()> {
        self.tell(Event::Scanout(Scanout {
            width,
            height,
            stride,
            fourcc,
            ..Scanout::new(fd, "ScanoutDMABUF")?
        }));
        Ok(())
    }

    #[zbus(name = "UpdateDMABUF")]
    fn update_dmabuf(&self, _x: i32, _y: i32, _width: i32, _height: i32) {
        self.tell(Event::Update);
    }

    fn disable(&self) {
        self.tell(Event::Disable);
    }

    fn scanout(&self, _width: u32, _height: u32, _stride: u32, _format: u32, _data: Vec<u8>) {
        self.tell(Event::Pixels);
    }

    #[allow(clippy::too_many_arguments, reason = "QEMU's interface")]
    fn update(
        &self,
        _x: i32,
        _y: i32,
        _width: i32,
        _height: i32,
        _stride: u32,
        _format: u32,
        _data: Vec<u8>,
    ) {
        self.tell(Event::Pixels);
    }

    fn mouse_set(&self, _x: i32, _y: i32, _on: i32) {}

    fn cursor_define(&self, _w: i32, _h: i32, _hot_x: i32, _hot_y: i32, _data: Vec<u8>) {}

    #[zbus(property)]
    fn interfaces(&self) -> Vec<String> {
        self.interfaces.clone()
    }
}

/// `org.qemu.Display1.Listener.Unix.ScanoutDMABUF2`, which QEMU 11 prefers when it is offered.
struct Listener2(Sender<Event>);

#[interface(name = "org.qemu.Display1.Listener.Unix.ScanoutDMABUF2", spawn = false)]
impl Listener2 {
    #[zbus(name = "ScanoutDMABUF2")]
    #[allow(clippy::too_many_arguments, reason = "QEMU's interface")]
    fn scanout_dmabuf2(
        &self,
        mut fds: Vec<OwnedFd>,
        _x: u32,
        _y: u32,
        width: u32,
        height: u32,
        offsets: Vec<u32>,
        strides: Vec<u32>,
        _planes: u32,
        fourcc: u32,
        _backing_width: u32,
        _backing_height: u32,
        _modifier: u64,
        _y0_top: bool,
    ) -> fdo::Result<()> {
        if fds.is_empty() || strides.is_empty() {
            return Err(fdo::Error::InvalidArgs("no plane".to_owned()));
        }
        let scanout = Scanout {
            width,
            height,
            stride: strides[0],
            offset: offsets.first().copied().unwrap_or_default(),
            fourcc,
            ..Scanout::new(fds.swap_remove(0), "ScanoutDMABUF2")?
        };
        let _ = self.0.send(Event::Scanout(scanout));
        Ok(())
    }
}

/// A client of QEMU's display.
pub struct Display {
    events: Receiver<Event>,
    _console: Connection,
    _listener: Connection,
}

impl Display {
    /// Connects to a QEMU that was started with `-display dbus,p2p=yes,gl=on`.  `second` offers
    /// the newer interface for descriptors.
    pub fn connect(qmp: &mut Qmp, second: bool) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        qmp.pass_fd("display", theirs.as_fd())?;
        qmp.execute(
            "add_client",
            json!({"protocol": "@dbus-display", "fdname": "display"}),
        )?;
        let console = connection::Builder::unix_stream(ours)
            .p2p()
            .build()
            .context("D-Bus with QEMU")?;
        let (ours, theirs) = UnixStream::pair()?;
        console
            .call_method(
                None::<&str>,
                CONSOLE,
                Some("org.qemu.Display1.Console"),
                "RegisterListener",
                &Fd::from(StdFd::from(theirs)),
            )
            .context("RegisterListener")?;
        // QEMU waits for this connection, and then for the answers to its questions.
        let (sender, events) = channel();
        let interfaces = if second {
            vec![DMABUF2.to_owned()]
        } else {
            Vec::new()
        };
        let mut builder = connection::Builder::unix_stream(ours).p2p().serve_at(
            LISTENER,
            Listener {
                events: sender.clone(),
                interfaces,
            },
        )?;
        if second {
            builder = builder.serve_at(LISTENER, Listener2(sender))?;
        }
        let listener = builder.build().context("D-Bus from QEMU")?;
        Ok(Self {
            events,
            _console: console,
            _listener: listener,
        })
    }

    fn next(&self, until: Instant) -> Result<Option<Event>> {
        match self
            .events
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU closed the connection"),
        }
    }

    /// Waits for a scanout of this size and format.  QEMU 11 begins with a copy in another format.
    pub fn scanout(&self, size: (u32, u32), format: &str, patience: Duration) -> Result<Scanout> {
        let until = Instant::now() + patience;
        let mut seen = Vec::new();
        while let Some(event) = self.next(until)? {
            match event {
                Event::Scanout(scanout)
                    if (scanout.width, scanout.height) == size && scanout.format() == format =>
                {
                    return Ok(scanout)
                }
                other => seen.push(format!("{other:?}")),
            }
        }
        bail!("QEMU passed no dma-buf, only {seen:?}")
    }

    /// Discards the events up to now.
    pub fn forget(&self) -> Result<()> {
        while let Some(event) = self.next(Instant::now())? {
            ensure!(
                matches!(event, Event::Update),
                "unexpected screen: {event:?}"
            );
        }
        Ok(())
    }

    /// Waits until QEMU reports that the scanout's contents changed.
    pub fn updated(&self, patience: Duration) -> Result<()> {
        match self.next(Instant::now() + patience)? {
            Some(Event::Update) => Ok(()),
            other => bail!("expected an update, got {other:?}"),
        }
    }
}
