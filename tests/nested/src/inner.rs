// SPDX-License-Identifier: MIT OR Apache-2.0

//! The first process of the inner guest: draws on its screen and uses its disk on request.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::mount::{mount, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};

use crate::balloon;
use crate::disk;
use crate::fragment;
use crate::initramfs;
use crate::protocol::{Answer, DiskPlan, Request, PORT};
use crate::screen::Screen;

/// How long a device may take to appear.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first page frame above 4 GiB.
const HIGH: u64 = 1 << 20;

/// Never returns: the kernel panics without its first process.
pub fn main() -> ! {
    if let Err(error) = run() {
        log(&format!("inner: {error:#}"));
    }
    log("inner: end");
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn log(line: &str) {
    if let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg") {
        let _ = kmsg.write_all(format!("<3>{line}\n").as_bytes());
    }
}

fn run() -> Result<()> {
    for (kind, path) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        match mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>) {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(error) => bail!("mounting {path}: {error}"),
        }
    }
    // Plugged memory is put online, for all uses.
    fs::write(
        "/sys/devices/system/memory/auto_online_blocks",
        "online_kernel",
    )
    .context("auto_online_blocks")?;
    initramfs::load_modules()?;
    let path = port()?;
    // The port can be opened once.
    let mut to = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {path}"))?;
    let mut lines = BufReader::new(to.try_clone()?).lines();
    let mut guest = Guest::default();
    send(&mut to, &Answer::Ready)?;
    loop {
        match lines.next() {
            Some(Ok(line)) => {
                let answer = serde_json::from_str(&line)
                    .context("request")
                    .and_then(|request| guest.answer(request))
                    .unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
                send(&mut to, &answer)?;
            }
            Some(Err(error)) => return Err(error).context("reading the port"),
            // The host's end is not connected.
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn send(to: &mut File, answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    to.write_all(&line).context("writing to the port")
}

/// The port's device.
fn port() -> Result<String> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
        {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            if name.trim_end() == PORT && Path::new(&device).exists() {
                return Ok(device);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("there is no port {PORT}")
}

#[derive(Default)]
struct Guest {
    screen: Option<Screen>,
    work: Option<Work>,
    held: Vec<fragment::Held>,
}

/// The disk is being read and written.
struct Work {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, u64)>>,
}

impl Guest {
    fn answer(&mut self, request: Request) -> Result<Answer> {
        Ok(match request {
            Request::Show | Request::ShowExported => {
                self.screen = None;
                let screen = if request == Request::Show {
                    Screen::dumb(PATIENCE)?
                } else {
                    Screen::exported(PATIENCE)?
                };
                let (width, height) = screen.size();
                self.screen = Some(screen);
                Answer::Shown { width, height }
            }
            Request::ShowAnother => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                screen.another()?;
                let (width, height) = screen.size();
                Answer::Shown { width, height }
            }
            Request::Draw(frame) => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                screen.draw(frame)?;
                screen.flush()?;
                Answer::Done
            }
            Request::DrawQuietly(frame) => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                screen.draw(frame)?;
                Answer::Done
            }
            Request::Wrong(frame) => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                Answer::Count(screen.wrong(frame))
            }
            Request::Fragment(size) => {
                let held = fragment::fragment((size as usize) << 20)?;
                let freed = held.freed;
                self.held.push(held);
                Answer::Freed(freed)
            }
            Request::DiskStart(plan) => {
                ensure!(self.work.is_none(), "the disk is busy");
                self.work = Some(start(plan)?);
                Answer::Done
            }
            Request::DiskStop => {
                let work = self.work.take().context("the disk is idle")?;
                work.stop.store(true, Ordering::Relaxed);
                let result = work.thread.join();
                let (read, written) = result.map_err(|_| anyhow::anyhow!("panicked"))??;
                Answer::Disk { read, written }
            }
            Request::Disks => Answer::Count(disk::namespaces()?.len()),
            Request::Inflate(pages) => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                let frames = screen.frames()?;
                let frame = |page: usize| frames.get(page).copied().context("no such page");
                let frames = pages.into_iter().map(frame).collect::<Result<Vec<_>>>()?;
                balloon::inflate(&frames)?;
                Answer::Done
            }
            Request::HighPages => {
                let screen = self.screen.as_mut().context("there is no screen yet")?;
                let frames = screen.frames()?;
                let high = frames.iter().filter(|&&frame| frame >= HIGH);
                Answer::Count(high.count())
            }
            Request::Churn(size) => {
                let pages = vec![[1u8; 4096]; size << 8];
                std::hint::black_box(&pages);
                Answer::Done
            }
        })
    }
}

fn start(plan: DiskPlan) -> Result<Work> {
    let path = disk::wait(PATIENCE)?;
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let thread = std::thread::spawn(move || disk::exercise(&path, plan, &seen));
    Ok(Work { stop, thread })
}
