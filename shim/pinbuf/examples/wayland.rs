// SPDX-License-Identifier: MIT OR Apache-2.0

//! A window whose pixels lie in ordinary memory, which the compositor gets by `zwp_linux_dmabuf_v1`. It needs no GPU,
//! and no memory from one.

use std::error::Error;
use std::os::fd::AsFd;

use pinbuf::{Access, Device, DrmFourcc, DrmModifier, Image, Region};
use wayland_client::globals::{registry_queue_init, GlobalListContents};
use wayland_client::protocol::{wl_buffer, wl_compositor, wl_registry, wl_surface};
use wayland_client::{delegate_noop, event_created_child, Connection, Dispatch, QueueHandle};
use wayland_protocols::wp::linux_dmabuf::zv1::client::{
    zwp_linux_buffer_params_v1 as params, zwp_linux_dmabuf_v1 as dmabuf,
};
use wayland_protocols::xdg::shell::client::{xdg_surface, xdg_toplevel, xdg_wm_base};

/// What the compositor has said.
#[derive(Default)]
struct App {
    /// Layouts of `Xrgb8888` that it takes.
    modifiers: Vec<DrmModifier>,
    configured: bool,
    buffer: Option<wl_buffer::WlBuffer>,
    refused: bool,
    closed: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let connection = Connection::connect_to_env()?;
    let (globals, mut queue) = registry_queue_init::<App>(&connection)?;
    let handle = queue.handle();
    let compositor: wl_compositor::WlCompositor = globals.bind(&handle, 1..=4, ())?;
    let shell: xdg_wm_base::XdgWmBase = globals.bind(&handle, 1..=1, ())?;
    let importer: dmabuf::ZwpLinuxDmabufV1 = globals.bind(&handle, 3..=3, ())?;
    let mut app = App::default();

    let surface = compositor.create_surface(&handle, ());
    let role = shell.get_xdg_surface(&surface, &handle, ());
    let window = role.get_toplevel(&handle, ());
    window.set_title("pinbuf".to_owned());
    surface.commit();
    while !app.configured {
        queue.blocking_dispatch(&mut app)?;
    }

    // Rows one after another, or what the compositor's driver takes that for.
    let modifier = [DrmModifier::Linear, DrmModifier::Invalid]
        .into_iter()
        .find(|modifier| app.modifiers.contains(modifier))
        .ok_or("the compositor takes no linear Xrgb8888")?;

    // Red from left to right, green from top to bottom.
    let image = Image::with_stride_align(DrmFourcc::Xrgb8888, 320, 240, 256)?;
    let memory = Region::anonymous(image.size())?;
    let buffer = Device::open()?.export(&memory)?;
    let access = buffer.begin_cpu_access(Access::Write)?;
    for y in 0..image.height() {
        let row = (0..image.width()).flat_map(|x| [0x80, y as u8, x as u8, 0]);
        memory.write_at(image.row_offset(0, y)?, &row.collect::<Vec<_>>())?;
    }
    access.finish()?;

    let (width, height) = (image.width() as i32, image.height() as i32);
    let (plane, modifier) = (image.planes()[0], u64::from(modifier));
    let request = importer.create_params(&handle, ());
    let (high, low) = ((modifier >> 32) as u32, modifier as u32);
    request.add(
        buffer.as_fd(),
        0,
        plane.offset as u32,
        plane.stride as u32,
        high,
        low,
    );
    request.create(width, height, image.format() as u32, params::Flags::empty());
    while app.buffer.is_none() && !app.refused {
        queue.blocking_dispatch(&mut app)?;
    }
    request.destroy();

    surface.attach(
        Some(
            app.buffer
                .as_ref()
                .ok_or("the compositor cannot import the buffer")?,
        ),
        0,
        0,
    );
    surface.damage(0, 0, width, height);
    surface.commit();
    while !app.closed {
        queue.blocking_dispatch(&mut app)?;
    }
    Ok(())
}

impl Dispatch<dmabuf::ZwpLinuxDmabufV1, ()> for App {
    fn event(
        app: &mut Self,
        _: &dmabuf::ZwpLinuxDmabufV1,
        event: dmabuf::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let dmabuf::Event::Modifier {
            format,
            modifier_hi,
            modifier_lo,
        } = event
        {
            if format == DrmFourcc::Xrgb8888 as u32 {
                let modifier = u64::from(modifier_hi) << 32 | u64::from(modifier_lo);
                app.modifiers.push(modifier.into());
            }
        }
    }
}

impl Dispatch<params::ZwpLinuxBufferParamsV1, ()> for App {
    fn event(
        app: &mut Self,
        _: &params::ZwpLinuxBufferParamsV1,
        event: params::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        match event {
            params::Event::Created { buffer } => app.buffer = Some(buffer),
            _ => app.refused = true,
        }
    }

    event_created_child!(App, params::ZwpLinuxBufferParamsV1, [
        params::EVT_CREATED_OPCODE => (wl_buffer::WlBuffer, ()),
    ]);
}

impl Dispatch<xdg_wm_base::XdgWmBase, ()> for App {
    fn event(
        _: &mut Self,
        shell: &xdg_wm_base::XdgWmBase,
        event: xdg_wm_base::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let xdg_wm_base::Event::Ping { serial } = event {
            shell.pong(serial);
        }
    }
}

impl Dispatch<xdg_surface::XdgSurface, ()> for App {
    fn event(
        app: &mut Self,
        role: &xdg_surface::XdgSurface,
        event: xdg_surface::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let xdg_surface::Event::Configure { serial } = event {
            role.ack_configure(serial);
            app.configured = true;
        }
    }
}

impl Dispatch<xdg_toplevel::XdgToplevel, ()> for App {
    fn event(
        app: &mut Self,
        _: &xdg_toplevel::XdgToplevel,
        event: xdg_toplevel::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        app.closed |= matches!(event, xdg_toplevel::Event::Close);
    }
}

impl Dispatch<wl_registry::WlRegistry, GlobalListContents> for App {
    fn event(
        _: &mut Self,
        _: &wl_registry::WlRegistry,
        _: wl_registry::Event,
        _: &GlobalListContents,
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
    }
}

delegate_noop!(App: wl_compositor::WlCompositor);
delegate_noop!(App: ignore wl_surface::WlSurface);
delegate_noop!(App: ignore wl_buffer::WlBuffer);
