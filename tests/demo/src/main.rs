// SPDX-License-Identifier: MIT OR Apache-2.0

//! Draws a picture in ordinary memory and shows it: pinbuf makes a dma-buf of that memory, a
//! display driver imports it, and scans out the very pages that the picture was drawn in.
//!
//! Standard output gets one line, when the picture is on the screen; it stays there until standard
//! input ends or SIGTERM arrives.

mod canvas;
mod card;
mod export;
mod picture;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use canvas::Canvas;
use card::Card;
use export::Export;

/// What is printed when the picture is on the screen.
const SHOWING: &str = "pinbuf-demo: showing";

/// The time from one picture to the next with `--animate`.
const FRAME: Duration = Duration::from_millis(33);

/// Shows a picture, drawn in ordinary memory, on a display that reads those very pages.
#[derive(Debug, Parser)]
struct Options {
    /// Device of the display  [default: the first one of bochs-drm]
    #[arg(long, value_name = "PATH")]
    card: Option<PathBuf>,

    /// Width of the picture in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 1024,
          value_parser = clap::value_parser!(u16).range(320..=7680))]
    width: u16,

    /// Height of the picture in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 768,
          value_parser = clap::value_parser!(u16).range(240..=4320))]
    height: u16,

    /// Also write the pixels in memory to this file: four bytes each (blue, green, red, unused),
    /// row by row
    #[arg(long, value_name = "PATH")]
    copy: Option<PathBuf>,

    /// Continue to draw into the same memory
    #[arg(long)]
    animate: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let start = Instant::now();
    let step = |text: String| eprintln!("[{:7.3} s] {text}", start.elapsed().as_secs_f64());

    let mut canvas = Canvas::new(options.width.into(), options.height.into());
    picture::draw(&mut canvas);
    step(format!(
        "drew {}x{} pixels into {} pages of ordinary memory at {:#x}",
        options.width,
        options.height,
        canvas.pages(),
        canvas.addr()
    ));

    let export = Export::of(&canvas)?;
    let info = export.info();
    step(format!(
        "pinned them: a dma-buf of {} bytes, {} pages in {} physical pieces, {} bytes of kernel \
         memory",
        info.bytes, info.pages, info.extents, info.kernel_bytes
    ));

    let card = match &options.card {
        Some(path) => Card::open(path)?,
        None => Card::find("bochs")?,
    };
    step(format!("opened {}", card.describe()));
    // Drawn after the export: the display shows this only if it reads the memory itself.
    export.bracket(|| picture::caption(&mut canvas, &info, card.driver()))?;

    if let Some(path) = &options.copy {
        std::fs::write(path, canvas.bytes())
            .with_context(|| format!("writing {}", path.display()))?;
    }

    let screen = card.show(&export, &canvas)?;
    step(format!(
        "imported it, made a framebuffer and set the mode {}",
        screen.mode()
    ));
    println!("{SHOWING}");
    io::stdout().flush()?;

    wait(|frame| {
        if !options.animate {
            return Ok(());
        }
        export.bracket(|| picture::animate(&mut canvas, frame))?;
        screen.refresh()
    })?;
    step("leaving".to_owned());
    Ok(())
}

/// Calls `draw` for one frame after the other until standard input ends or a signal asks to leave.
fn wait(mut draw: impl FnMut(u32) -> Result<()>) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("blocking signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("signalfd")?;
    let mut input = io::stdin().lock();
    for frame in 0.. {
        draw(frame)?;
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::try_from(FRAME)?) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let [signal, typed] = fds.map(|fd| fd.any().unwrap_or(true));
        if signal || (typed && input.read(&mut [0; 256]).context("reading input")? == 0) {
            break;
        }
    }
    Ok(())
}
