// SPDX-License-Identifier: MIT OR Apache-2.0

//! A minimal Wayland compositor: one client with one window, whose pixels are in a dma-buf.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use wayland_protocols::wp::linux_dmabuf::zv1::server::{
    zwp_linux_buffer_params_v1::{self as params, ZwpLinuxBufferParamsV1},
    zwp_linux_dmabuf_v1::{self as dmabuf, ZwpLinuxDmabufV1},
};
use wayland_protocols::xdg::shell::server::{
    xdg_surface::{self, XdgSurface},
    xdg_toplevel::XdgToplevel,
    xdg_wm_base::{self, XdgWmBase},
};
use wayland_server::protocol::{
    wl_buffer::WlBuffer,
    wl_compositor::{self, WlCompositor},
    wl_region::WlRegion,
    wl_surface::{self, WlSurface},
};
use wayland_server::{
    Client, DataInit, Dispatch, Display, DisplayHandle, GlobalDispatch, ListeningSocket, New,
    Resource,
};

/// `XR24`, the only format that it takes.
const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");

/// A picture in a dma-buf, as the client describes it.
#[derive(Debug)]
pub struct Frame {
    /// The dma-buf.
    pub fd: OwnedFd,
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Bytes before the first row.
    pub offset: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

/// The state of the client's objects.
#[derive(Debug, Default)]
pub struct Screen {
    refuses: bool,
    role: Option<XdgSurface>,
    window: Option<XdgToplevel>,
    plane: Option<(OwnedFd, usize, usize)>,
    frame: Option<Frame>,
    attached: bool,
    shown: bool,
}

/// A compositor with a socket.
#[derive(Debug)]
pub struct Compositor {
    socket: ListeningSocket,
    display: Display<Screen>,
    screen: Screen,
}

impl Compositor {
    /// Listens on a socket. With `refuses`, it imports no buffer.
    pub fn listen(path: PathBuf, refuses: bool) -> Result<Self> {
        let display = Display::new()?;
        let handle = display.handle();
        handle.create_global::<Screen, WlCompositor, ()>(4, ());
        handle.create_global::<Screen, XdgWmBase, ()>(1, ());
        handle.create_global::<Screen, ZwpLinuxDmabufV1, ()>(3, ());
        Ok(Self {
            socket: ListeningSocket::bind_absolute(path).context("listening")?,
            display,
            screen: Screen {
                refuses,
                ..Screen::default()
            },
        })
    }

    /// Answers the requests that have arrived, and waits 2 ms. Returns the frame when it is on the screen, and then
    /// requests that the window closes.
    pub fn turn(&mut self) -> Result<Option<Frame>> {
        if let Some(stream) = self.socket.accept()? {
            self.display
                .handle()
                .insert_client(stream, Arc::new(()))
                .context("a client")?;
        }
        self.display.dispatch_clients(&mut self.screen)?;
        let frame = match self.screen.shown {
            true => self.screen.frame.take(),
            false => None,
        };
        if let (Some(_), Some(window)) = (&frame, &self.screen.window) {
            window.close();
        }
        self.display.flush_clients()?;
        std::thread::sleep(Duration::from_millis(2));
        Ok(frame)
    }
}

/// Implements the requests of an object of the protocol.
macro_rules! on {
    ($interface:ty, ($screen:pat, $object:pat, $request:pat, $init:pat, $of:pat) => $action:expr) => {
        impl Dispatch<$interface, ()> for Screen {
            fn request(
                $screen: &mut Self,
                client: &Client,
                $object: &$interface,
                $request: <$interface as Resource>::Request,
                (): &(),
                display: &DisplayHandle,
                $init: &mut DataInit<'_, Self>,
            ) {
                let $of = (client, display);
                $action
            }
        }
    };
    ($interface:ty) => {
        on!($interface, (_, _, _, _, _) => ());
    };
}

on!(WlCompositor, (_, _, request, init, _) => match request {
    wl_compositor::Request::CreateSurface { id } => drop(init.init(id, ())),
    wl_compositor::Request::CreateRegion { id } => drop(init.init(id, ())),
    _ => {}
});
on!(WlSurface, (screen, _, request, _, _) => match request {
    wl_surface::Request::Attach { buffer, .. } => screen.attached = buffer.is_some(),
    // The first one asks for the window's size, and has no buffer.
    wl_surface::Request::Commit if !screen.attached => {
        if let Some(role) = &screen.role {
            role.configure(1);
        }
    }
    wl_surface::Request::Commit => screen.shown = true,
    _ => {}
});
on!(XdgWmBase, (screen, _, request, init, _) => {
    if let xdg_wm_base::Request::GetXdgSurface { id, .. } = request {
        screen.role = Some(init.init(id, ()));
    }
});
on!(XdgSurface, (screen, _, request, init, _) => {
    if let xdg_surface::Request::GetToplevel { id } = request {
        screen.window = Some(init.init(id, ()));
    }
});
on!(ZwpLinuxDmabufV1, (_, _, request, init, _) => {
    if let dmabuf::Request::CreateParams { params_id } = request {
        init.init(params_id, ());
    }
});
on!(ZwpLinuxBufferParamsV1, (screen, object, request, _, (client, display)) => match request {
    params::Request::Add { fd, plane_idx: 0, offset, stride, modifier_hi: 0, modifier_lo: 0 } => {
        screen.plane = Some((fd, offset as usize, stride as usize));
    }
    params::Request::Create { width, height, format: XRGB8888, .. } if !screen.refuses => {
        let buffer = client.create_resource::<WlBuffer, (), Self>(display, 1, ());
        if let (Ok(buffer), Some((fd, offset, stride))) = (buffer, screen.plane.take()) {
            let (width, height) = (width as usize, height as usize);
            screen.frame = Some(Frame { fd, width, height, offset, stride });
            object.created(&buffer);
        }
    }
    params::Request::Create { .. } => object.failed(),
    _ => {}
});
on!(XdgToplevel);
on!(WlBuffer);
on!(WlRegion);

/// Implements the binding of a global object.
macro_rules! global {
    ($interface:ty, $object:pat => $action:expr) => {
        impl GlobalDispatch<$interface, ()> for Screen {
            fn bind(
                _: &mut Self,
                _: &DisplayHandle,
                _: &Client,
                new: New<$interface>,
                (): &(),
                init: &mut DataInit<'_, Self>,
            ) {
                let $object = init.init(new, ());
                $action
            }
        }
    };
}

global!(WlCompositor, _ => ());
global!(XdgWmBase, _ => ());
global!(ZwpLinuxDmabufV1, importer => {
    importer.format(XRGB8888);
    // Linear.
    importer.modifier(XRGB8888, 0, 0);
});
