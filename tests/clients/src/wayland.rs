// SPDX-License-Identifier: MIT OR Apache-2.0

//! Compositors without a screen, drawn by Mesa's software renderer, and a picture for their clients.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::sys::stat::fstat;
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{chown, Pid, Uid};
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::support::Sync;

use crate::evidence;
use crate::process::Start;

/// The size of the screen, and of the picture that fills it.
pub const WIDTH: usize = 320;
pub const HEIGHT: usize = 240;
/// Bytes of such a picture.
pub const FRAME: usize = WIDTH * HEIGHT * 4;

/// The name of a compositor's socket.
pub const SOCKET: &str = "compositor";
/// How long a program may take to start, which a processor without KVM emulates.
const PATIENCE: Duration = Duration::from_secs(120);

/// A user's directory for sockets and files. It is removed when dropped.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Place {
    /// A new one, of this name.
    pub fn new(name: &str) -> Result<Self> {
        let path = Path::new("/tmp").join(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("making {}", path.display()))?;
        chown(&path, Some(Uid::from_raw(USER)), Some(USER.into()))?;
        Ok(Self(path))
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A command that finds its files, and the compositor, here.
    pub fn command(&self, start: &Start) -> Command {
        let mut command = start.command();
        command
            .env("HOME", &self.0)
            .env("XDG_RUNTIME_DIR", &self.0)
            .env("XDG_PICTURES_DIR", &self.0)
            .env("WAYLAND_DISPLAY", SOCKET)
            .env("LIBGL_ALWAYS_SOFTWARE", "true");
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What stays is visible to the next test, which fails to make it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program that runs until it is stopped. It is killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts it; what it prints goes into a file.
    pub fn of(place: &Place, name: &str, mut command: Command) -> Result<Self> {
        let log = place.path(&format!("{name}.log"));
        let file = File::create(&log)?;
        let child = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        Ok(Self { child, log })
    }

    /// Its process, which `pinbuf run` has become.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub fn printed(&self) -> String {
        fs::read(&self.log)
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    /// Calls this again and again until it has an answer.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = look(self)? {
                return Ok(answer);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("ended by {status} before {what}: {}", self.printed());
            }
            ensure!(
                Instant::now() < deadline,
                "not {what} within {PATIENCE:?}: {}",
                self.printed()
            );
            thread::sleep(Duration::from_millis(250));
        }
    }

    /// Does this while none of its threads runs.
    pub fn stopped<T>(&mut self, look: impl FnOnce(u32) -> Result<T>) -> Result<T> {
        let process = Pid::from_raw(self.process() as i32);
        kill(process, Signal::SIGSTOP)?;
        let status = waitpid(process, Some(WaitPidFlag::WUNTRACED))?;
        ensure!(
            status == WaitStatus::Stopped(process, Signal::SIGSTOP),
            "{status:?}: {}",
            self.printed()
        );
        let answer = look(self.process());
        kill(process, Signal::SIGCONT)?;
        answer
    }

    /// The buffers that it has open, and which of them have this picture in them.
    pub fn buffers(&mut self, picture: &[u8]) -> Result<Buffers> {
        self.stopped(|process| {
            let mut found = Buffers::default();
            for (exporter, buffer) in evidence::all_buffers(process)? {
                let mapping = buffer.map()?;
                let mut bytes = vec![0; picture.len().min(mapping.len())];
                buffer.synced(Sync::Read, || mapping.read(0, &mut bytes))?;
                let inode = fstat(&buffer)?.st_ino;
                match (exporter == evidence::PINBUF, bytes == picture) {
                    (true, true) => found.with_picture.push(inode),
                    (true, false) => found.others.push(inode),
                    (false, true) => found.foreign_with_picture.push(inode),
                    (false, false) => found.foreign.push(inode),
                }
            }
            Ok(found)
        })
    }

    /// How many times it has parts of dma-bufs mapped in this way: a renderer maps what it imports to read and write.
    pub fn mapped_buffers(&self, way: &str) -> Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.process()))?;
        let mapped = |line: &&str| line.contains("/dmabuf:") && line.contains(way);
        Ok(maps.lines().filter(mapped).count())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Buffers that a process has open, by their inodes' numbers.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Pinbuf's, beginning with the picture.
    pub with_picture: Vec<u64>,
    /// Pinbuf's, with something else in them.
    pub others: Vec<u64>,
    /// Other exporters', beginning with the picture.
    pub foreign_with_picture: Vec<u64>,
    /// Other exporters', with something else in them.
    pub foreign: Vec<u64>,
}

impl Buffers {
    /// How many there are.
    pub fn count(&self) -> usize {
        [
            &self.with_picture,
            &self.others,
            &self.foreign_with_picture,
            &self.foreign,
        ]
        .iter()
        .map(|buffers| buffers.len())
        .sum()
    }
}

/// Starts a compositor, and waits until it takes clients.
pub fn compositor(place: &Place, start: &Start) -> Result<Running> {
    let mut running = Running::of(place, "compositor", place.command(start))?;
    let socket = place.path(SOCKET);
    running.until("taking clients", |_| {
        Ok(UnixStream::connect(&socket).ok().map(drop))
    })?;
    Ok(running)
}

/// Weston, whose clients have the whole screen, and may take pictures of it.
pub fn weston() -> Start {
    let (width, height) = (format!("--width={WIDTH}"), format!("--height={HEIGHT}"));
    Start::program(&[
        "weston",
        "--backend=headless",
        "--renderer=gl",
        "--shell=kiosk",
        "--no-config",
        "--idle-time=0",
        "--debug",
        &format!("--socket={SOCKET}"),
        &width,
        &height,
    ])
}

/// Fails unless a PNG shows this picture, in bytes of blue, green, red, and one that does not count.
pub fn compare_png(path: &Path, picture: &[u8]) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info()?;
    let size = reader.output_buffer_size().context("too large")?;
    let mut data = vec![0; size];
    let info = reader.next_frame(&mut data)?;
    let samples = info.color_type.samples();
    ensure!(
        (info.width as usize, info.height as usize) == (WIDTH, HEIGHT)
            && info.bit_depth == png::BitDepth::Eight
            && samples >= 3,
        "{info:?}"
    );
    let shown = data
        .chunks_exact(samples)
        .map(|rgb| [rgb[2], rgb[1], rgb[0]]);
    let wanted = picture
        .chunks_exact(4)
        .map(|bgrx| [bgrx[0], bgrx[1], bgrx[2]]);
    let wrong: Vec<_> = (0..)
        .zip(shown.zip(wanted))
        .filter(|(_, (shown, wanted))| shown != wanted)
        .collect();
    if let Some((pixel, (shown, wanted))) = wrong.first() {
        bail!(
            "{} of {} pixels are wrong; the first at {},{}: {shown:?} instead of {wanted:?}",
            wrong.len(),
            WIDTH * HEIGHT,
            pixel % WIDTH,
            pixel / WIDTH
        );
    }
    Ok(())
}
