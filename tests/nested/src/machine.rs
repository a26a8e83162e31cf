// SPDX-License-Identifier: MIT OR Apache-2.0

//! An inner virtual machine: stock QEMU, and our program as its guest's first process.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use nix::sys::wait::{waitid, Id, WaitPidFlag};
use nix::unistd::Pid;
use pinbuf_test_qmp::Qmp;
use pinbuf_uapi::Info;
use serde_json::json;

use crate::evidence::{self, Buffer};
use crate::initramfs;
use crate::link::{Link, Shown, PATIENCE};
use crate::pattern::Pattern;
use crate::picture::Picture;
use crate::protocol::{Answer, DiskPlan, Request, PORT};

/// The kind of the inner guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// An ordinary memfd.
    Memfd,
    /// A memfd of 2 MiB pages.
    Huge,
}

/// The user that runs QEMU, and its limit.
#[derive(Debug, Clone, Copy)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// RLIMIT_MEMLOCK in bytes.
    pub memlock: u64,
}

/// The configuration of a virtual machine.
#[derive(Debug, Clone)]
pub struct Setup {
    /// A name for its files.
    pub name: String,
    /// QEMU's program.
    pub program: String,
    /// Words before QEMU's program: none, or `pinbuf run`.
    pub pinbuf: bool,
    /// Memory in MiB.
    pub memory: u64,
    /// The kind of this memory.
    pub backend: Backend,
    /// The screen's size.
    pub screen: (u32, u32),
    /// QEMU's display.
    pub display: Vec<String>,
    /// Whether the screen's resources are the guest's memory, not copies of it.
    pub blob: bool,
    /// QEMU's environment.
    pub environment: Vec<(&'static str, String)>,
    /// A device of the outer guest to pass through from the start.
    pub vfio: Option<String>,
    /// Further arguments.
    pub more: Vec<String>,
    /// Further modules in the inner guest.
    pub modules: Vec<&'static str>,
    /// Whether the kernel's console is shown on the screen, too.
    pub console: bool,
    /// Another user than root.
    pub user: Option<User>,
}

impl Setup {
    /// The ordinary one.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            program: "qemu-system-x86_64".to_owned(),
            pinbuf: true,
            memory: 512,
            backend: Backend::Memfd,
            screen: (1920, 1080),
            display: vec!["none".to_owned()],
            blob: true,
            environment: Vec::new(),
            vfio: None,
            more: Vec::new(),
            modules: Vec::new(),
            console: false,
            user: None,
        }
    }
}

/// A virtual machine that runs.
pub struct Machine {
    child: Child,
    directory: PathBuf,
    /// QEMU's control protocol.
    pub qmp: Qmp,
    link: Link,
    screen: Option<Shown>,
    dumps: u32,
}

/// The QEMU command for this setup.
fn command(setup: &Setup, directory: &Path) -> Result<Command> {
    let path = |name: &str| directory.join(name).display().to_string();
    let mut words: Vec<String> = Vec::new();
    let mut add = |text: &[&str]| words.extend(text.iter().map(|&word| word.to_owned()));
    if let Some(user) = setup.user {
        let limit = format!("--memlock={0}:{0}", user.memlock);
        let uid = user.uid.to_string();
        add(&[
            "prlimit",
            &limit,
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
        ]);
    }
    if setup.pinbuf {
        add(&[
            "pinbuf",
            "run",
            &format!("--log={}", path("shim.log")),
            "--",
        ]);
    }
    add(&[
        &setup.program,
        "-nodefaults",
        "-no-user-config",
        "-vga",
        "none",
    ]);
    add(&[
        "-machine",
        "q35,accel=kvm,memory-backend=ram",
        "-cpu",
        "host",
        "-smp",
        "1",
    ]);
    add(&["-m", &format!("{}M", setup.memory)]);
    let huge = match setup.backend {
        Backend::Memfd => "",
        Backend::Huge => ",hugetlb=on,hugetlbsize=2M",
    };
    let size = setup.memory;
    add(&[
        "-object",
        &format!("memory-backend-memfd,id=ram,size={size}M,share=on{huge}"),
    ]);
    let (width, height) = setup.screen;
    let blob = setup.blob;
    add(&[
        "-device",
        &format!("virtio-gpu-pci,id=gpu,blob={blob},xres={width},yres={height}"),
    ]);
    for display in &setup.display {
        add(&["-display", display]);
    }
    add(&["-device", "pcie-root-port,id=plug,slot=1,chassis=1"]);
    if let Some(address) = &setup.vfio {
        add(&["-device", &format!("vfio-pci,id=disk,host={address}")]);
    }
    add(&["-kernel", &initramfs::kernel()?.display().to_string()]);
    add(&["-initrd", &path("initramfs")]);
    let console = if setup.console {
        "console=tty0"
    } else {
        "drm_client_lib.active=none"
    };
    add(&[
        "-append",
        &format!(
            "{console} console=ttyS0 quiet mitigations=off panic=-1 no_timer_check tsc=reliable"
        ),
    ]);
    add(&["-serial", &format!("file:{}", path("console"))]);
    add(&["-device", "virtio-serial-pci"]);
    add(&[
        "-chardev",
        &format!("socket,id=link,path={},server=on,wait=off", path("link")),
    ]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=link,name={PORT}"),
    ]);
    add(&["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))]);
    // Logs the state of processors before each reset: a guest that restarts without a message has had a triple fault.
    add(&["-d", "cpu_reset,guest_errors", "-D", &path("resets")]);
    words.extend(setup.more.iter().cloned());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    Ok(command)
}

/// Starts QEMU.
fn spawn(setup: &Setup) -> Result<(Child, PathBuf)> {
    let directory = Path::new("/tmp/nested").join(&setup.name);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    if let Some(user) = setup.user {
        std::os::unix::fs::chown(&directory, Some(user.uid), Some(user.uid))?;
    }
    initramfs::write(&directory.join("initramfs"), &setup.modules)?;
    let messages = File::create(directory.join("messages"))?;
    let mut command = command(setup, &directory)?;
    command
        .envs(setup.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(messages.try_clone()?)
        .stderr(messages)
        .current_dir(&directory);
    let child = command.spawn().context("starting QEMU")?;
    Ok((child, directory))
}

/// Starts a QEMU that must refuse to start, and returns its output.
pub fn refusal(setup: &Setup) -> Result<String> {
    let (mut child, directory) = spawn(setup)?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > Duration::from_secs(20) {
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let _ = child.kill();
    child.wait()?;
    let said = fs::read_to_string(directory.join("messages"))?;
    match status {
        Some(status) if !status.success() => Ok(said),
        _ => bail!("QEMU started, although it should have refused: {said}"),
    }
}

impl Machine {
    /// Starts it, and waits until its guest is ready.
    pub fn start(setup: &Setup) -> Result<Self> {
        let mut machine = Self::start_qemu(setup)?;
        machine.wait_ready()?;
        Ok(machine)
    }

    /// Starts QEMU without a guest, which waits for one by migration.
    pub fn incoming(setup: &Setup) -> Result<Self> {
        let mut setup = setup.clone();
        setup.more.extend(["-incoming", "defer"].map(str::to_owned));
        Self::start_qemu(&setup)
    }

    /// Takes over the screen's state from the source of the migration.
    pub fn shows_what(&mut self, source: &Self) {
        self.screen = source.screen;
    }

    fn start_qemu(setup: &Setup) -> Result<Self> {
        let (mut child, directory) = spawn(setup)?;
        let connected = connect(&mut child, &directory);
        let (qmp, link) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(directory.join("messages")).unwrap_or_default();
                return Err(error.context(format!("QEMU said: {}", said.trim_end())));
            }
        };
        Ok(Self {
            child,
            directory,
            qmp,
            link: Link::new(link)?,
            screen: None,
            dumps: 0,
        })
    }

    /// Waits until the guest has booted.
    pub fn wait_ready(&mut self) -> Result<()> {
        let result = self.link.wait_ready();
        result.map_err(|error| self.explain(error))
    }

    /// QEMU's process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// A file of this machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The current screen.
    pub fn screen(&self) -> Result<Shown> {
        self.screen.context("nothing is shown yet")
    }

    /// Sends a request to the guest, and returns the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        let result = self.link.ask(request);
        result.map_err(|error| self.explain(error))
    }

    /// Lets the guest set up its screen.
    pub fn show(&mut self, request: &Request) -> Result<Shown> {
        let result = self.link.show(request);
        let shown = result.map_err(|error| self.explain(error))?;
        self.screen = Some(shown);
        Ok(shown)
    }

    /// Adds the last messages of the guest's kernel, QEMU, the shim and the outer kernel, and QEMU's state, to an error.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let [console, messages, resets, shim] = ["console", "messages", "resets", "shim.log"]
            .map(|name| evidence::tail(&self.path(name)));
        let process = Pid::from_raw(self.process() as i32);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let qemu = match waitid(Id::Pid(process), flags) {
            Ok(status) => format!("{status:?}"),
            Err(error) => error.to_string(),
        };
        let events = self.qmp.events();
        error.context(format!(
            "its console:\n{console}\nQEMU said:\n{messages}\nits resets of processors:\n{resets}\nQEMU: {qemu}, {events:?}\nthe \
             shim said:\n{shim}\nthe outer kernel said:\n{}",
            evidence::kernel_log()
        ))
    }

    /// Lets the guest draw a frame, and returns what must then be seen.
    pub fn draw(&mut self, frame: u32) -> Result<Pattern> {
        self.ask(&Request::Draw(frame))?;
        Ok(self.screen()?.pattern(frame))
    }

    /// The same, but the guest does not notify its driver.
    pub fn draw_quietly(&mut self, frame: u32) -> Result<Pattern> {
        self.ask(&Request::DrawQuietly(frame))?;
        Ok(self.screen()?.pattern(frame))
    }

    /// The picture that QEMU shows.
    pub fn picture(&mut self) -> Result<Picture> {
        self.dumps += 1;
        let file = self.path(&format!("screen-{}.ppm", self.dumps));
        let arguments = json!({"filename": file.display().to_string()});
        self.qmp.execute("screendump", arguments)?;
        let picture = Picture::parse(&fs::read(&file)?);
        fs::remove_file(&file)?;
        picture
    }

    /// Draws frames, and compares each with what QEMU shows of it.
    pub fn frames(&mut self, frames: std::ops::Range<u32>) -> Result<()> {
        for frame in frames {
            let expected = self.draw(frame)?;
            let compared = self.picture()?.compare(expected);
            compared.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    /// QEMU's dma-bufs: at least one, all of pinbuf's, one as large as the screen.
    pub fn buffers(&self) -> Result<Vec<(Buffer, Info)>> {
        let screen = self.screen()?;
        let process = self.process();
        let mut found = evidence::buffers(process)?;
        let bytes = u64::from(screen.width) * u64::from(screen.height) * 4;
        let bytes = bytes.next_multiple_of(4096);
        // QEMU 11 also has dma-bufs of the passed-through device's registers, from vfio.
        found.retain(|buffer| buffer.exporter != "vfio_pci_core");
        ensure!(
            found.iter().all(|buffer| buffer.exporter == "pinbuf"),
            "some buffers are not pinbuf's: {found:?}"
        );
        if !found.iter().any(|buffer| buffer.size == bytes) {
            // A guest that restarted has lost its screen.
            let error = anyhow!("none has the screen's {bytes} bytes: {found:?}");
            return Err(self.explain(error));
        }
        found
            .into_iter()
            .map(|buffer| {
                let info = evidence::info(process, &buffer)?;
                ensure!(info.bytes == buffer.size, "{info:?} is not {buffer:?}");
                Ok((buffer, info))
            })
            .collect()
    }

    /// `PINBUF_INFO` of the buffer that is scanned out.
    pub fn screen_buffer(&self) -> Result<Info> {
        self.scanned_out().map(|(_, info)| info)
    }

    /// A descriptor of this buffer.
    pub fn screen_fd(&self) -> Result<Buffer> {
        self.scanned_out().map(|(buffer, _)| buffer)
    }

    fn scanned_out(&self) -> Result<(Buffer, Info)> {
        let screen = self.screen()?;
        let bytes = u64::from(screen.width) * u64::from(screen.height) * 4;
        let bytes = bytes.next_multiple_of(4096);
        // The newest, if there are several of this size.
        let mut buffers = self.buffers()?;
        buffers.retain(|(buffer, _)| buffer.size == bytes);
        buffers.sort_by_key(|(buffer, _)| buffer.fd);
        buffers.pop().context("no buffer")
    }

    /// For each buffer, from the shim's log: the number of items in QEMU's request, and of pieces that they became.
    pub fn items(&self) -> Result<Vec<(u64, u64)>> {
        let log = fs::read_to_string(self.path("shim.log")).context("the shim's log")?;
        let number = |line: &str, unit: &str| -> Option<u64> {
            line.split(", ")
                .find_map(|part| part.strip_suffix(unit)?.parse().ok())
        };
        Ok(log
            .lines()
            .filter(|line| line.contains(": created fd "))
            .filter_map(|line| Some((number(line, " items")?, number(line, " pieces")?)))
            .collect())
    }

    /// QEMU's exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails unless the guest itself finds this frame in its screen's memory.
    pub fn guest_finds(&mut self, frame: u32) -> Result<()> {
        match self.ask(&Request::Wrong(frame))? {
            Answer::Count(0) => Ok(()),
            Answer::Count(wrong) => bail!("the guest finds {wrong} wrong pixels of frame {frame}"),
            other => bail!("{other:?}"),
        }
    }

    /// Starts work on the disk.
    pub fn disk_start(&mut self, plan: DiskPlan) -> Result<()> {
        self.ask(&Request::DiskStart(plan)).map(drop)
    }

    /// Ends it. Returns the bytes that were read and found right, and the bytes that were written.
    pub fn disk_stop(&mut self) -> Result<(u64, u64)> {
        match self.ask(&Request::DiskStop)? {
            Answer::Disk { read, written } => Ok((read, written)),
            other => bail!("{other:?}"),
        }
    }

    /// Resets the machine, and waits for the guest.
    pub fn reset(&mut self) -> Result<()> {
        self.screen = None;
        self.qmp.execute("system_reset", json!({}))?;
        self.wait_ready()
    }

    /// Ends QEMU regularly.
    pub fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", json!({}))?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "QEMU ended with {status}");
                return Ok(());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "QEMU does not end"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(child: &mut Child, directory: &Path) -> Result<(Qmp, UnixStream)> {
    let start = Instant::now();
    let mut stream = |name: &str| loop {
        match UnixStream::connect(directory.join(name)) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                if let Some(status) = child.try_wait()? {
                    bail!("QEMU ended with {status}");
                }
                ensure!(start.elapsed() < PATIENCE, "QEMU's socket {name}: {error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    let link = stream("link")?;
    Ok((Qmp::over(stream("qmp")?, Duration::from_secs(120))?, link))
}
