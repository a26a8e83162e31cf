// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest, from its start to its end: the one way in which guests are run.

pub mod qemu;
mod tsc;
pub mod watch;

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use pinbuf_guest_init::{port, Config, Event, Request, Share, Sharing, END_MARK};
use pinbuf_test_qmp::Qmp;
use tempfile::TempDir;

use self::qemu::Sockets;
use crate::debian::arch::Arch;
use crate::debian::tree::Tree;
use crate::image::userspace::{self, Build, Profile};
use crate::image::{initramfs, payload};
use crate::kernel::Kernel;
use crate::ui::{seconds, tail};
use crate::{cleanup, image, paths};

/// Consoles of this many runs are kept.
const LOGS_KEPT: usize = 200;

/// How long QEMU may take to execute a command.
const QMP_LIMIT: Duration = Duration::from_secs(60);

/// Devices for `pinbuf-nested`: an nvme behind an IOMMU, whose data is kept in a temporary file.
pub const VFIO: &str = "-machine kernel-irqchip=split -device intel-iommu,intremap=on \
    -drive if=none,id=nvme,file.driver=null-co,file.size=64M,file.read-zeroes=on,format=raw,\
snapshot=on -device nvme,drive=nvme,serial=nested";

/// Without the kernel's own udmabuf: what works then works through pinbuf.
pub const NO_UDMABUF: &str = "initcall_blacklist=udmabuf_dev_init intel_iommu=on";

/// What a guest is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which kernel: see [`crate::debian::archive::select`]; also `debug`.
    pub kernel: String,
    /// Memory, as QEMU takes it.
    pub memory: String,
    /// Processors.
    pub processors: u32,
    /// Words for the kernel's command line.
    pub cmdline: String,
    /// Arguments for QEMU.
    pub qemu: Vec<String>,
    /// The directory that the guest shares, and the command runs in.
    pub share: Option<PathBuf>,
    /// How long it all may take.
    pub timeout: Option<Duration>,
    /// How long the guest may take until it loads its first module from outside of the kernel's tree.
    pub boot_limit: Option<Duration>,
    /// Leave out pinbuf.
    pub bare: bool,
    /// How userspace is built.
    pub profile: Profile,
    /// What is built of userspace first.
    pub build: Build,
    /// The image that the guest runs on.
    pub image: String,
    /// A second connection to QEMU's control protocol, for others.
    pub qmp: Option<PathBuf>,
    /// An empty disk of this size, as QEMU takes it.
    pub disk: Option<String>,
    /// Modules to load.
    pub modules: Vec<String>,
    /// The command; none is a shell on a terminal.
    pub command: Vec<String>,
    /// The terminal's rows and columns, if the command is to run on one.
    pub terminal: Option<(u16, u16)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: "default".into(),
            memory: "2G".into(),
            processors: 2,
            cmdline: String::new(),
            qemu: Vec::new(),
            share: None,
            timeout: Some(Duration::from_secs(600)),
            boot_limit: None,
            bare: false,
            profile: Profile::Dev,
            build: Build::All,
            image: "base".into(),
            qmp: None,
            disk: None,
            modules: Vec::new(),
            command: Vec::new(),
            terminal: None,
        }
    }
}

/// The command's standard streams.
pub struct Streams {
    /// What the command reads.
    pub input: Option<Box<dyn Read + Send>>,
    /// Where its output goes.
    pub output: Box<dyn Write + Send>,
    /// Where its errors go.
    pub error: Box<dyn Write + Send>,
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The command exited with this status.
    Exited(i32),
    /// The command was killed by this signal.
    Killed(i32),
    /// The guest could not run the command.
    Failed(String),
    /// The machine stopped before the command did: how QEMU ended, and what it printed.
    Crashed(String),
    /// The time ran out.
    TimedOut,
    /// No module from outside of the kernel's tree was loaded within [`Options::boot_limit`], and no command started.
    NotBooted,
}

/// The file with what QEMU prints.
const MESSAGES: &str = "qemu-messages";

/// What the kernel prints when it loads the first module from outside of its tree: until then, nothing of pinbuf has run.
const FIRST_MODULE: &str = "loading out-of-tree module taints kernel";

/// The outcome of a run.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// What the kernel's checkers reported.
    pub complaints: Vec<String>,
    /// The kernel's log.
    pub log: PathBuf,
    /// From QEMU's start to the command's.
    pub boot: Option<Duration>,
    /// From QEMU's start to the end.
    pub total: Duration,
}

impl Outcome {
    /// In words, how the guest ended, if the command in it did not end by itself.
    pub fn problem(&self) -> Option<String> {
        match &self.end {
            End::Exited(_) | End::Killed(_) => None,
            End::Failed(reason) => Some(format!("the guest could not run the command: {reason}")),
            End::Crashed(reason) => Some(format!(
                "the guest stopped before the command ended: {reason}"
            )),
            End::NotBooted => Some(format!(
                "the guest did not come to load pinbuf within {}",
                seconds(self.total)
            )),
            End::TimedOut => Some(format!(
                "the guest was stopped after {} (--timeout)",
                seconds(self.total)
            )),
        }
    }
}

/// A guest that runs.
pub struct Guest {
    qemu: Child,
    helper: Option<Child>,
    directory: TempDir,
    qmp: Qmp,
    control: UnixStream,
    events: Receiver<Event>,
    relays: Vec<JoinHandle<()>>,
    start: Instant,
    timeout: Option<Duration>,
    boot_limit: Option<Duration>,
    log: PathBuf,
}

impl Guest {
    /// Makes everything that the guest needs, and starts it.
    pub fn start(options: &Options, streams: Streams) -> Result<Self> {
        let tools = Tree::tools()?;
        let kernel = Kernel::select(&tools, &options.kernel)?;
        let base = image::ensure(&tools, &options.image, kernel.arch)?;
        let init = userspace::init(&tools, kernel.arch)?;
        let mut layers = vec![("modules", kernel.image()), ("base", base)];
        if !options.bare {
            layers.insert(
                0,
                (
                    "pinbuf",
                    payload::ensure(&tools, &kernel, options.profile, options.build)?,
                ),
            );
        }

        // The paths of sockets must be short: not below build/.
        let directory = run_directory()?;
        let log = console(&kernel)?;
        let mut sockets = Sockets::new(directory.path());
        let icount = options.qemu.iter().any(|word| word == "-icount");
        let mut command = qemu::command(&tools, kernel.arch, icount);
        command.args(["-smp", &options.processors.to_string()]);
        command.arg("-serial").arg(format!("file:{}", escape(&log)));
        command.args(["-device", "virtio-rng-pci"]);
        for (serial, path) in &layers {
            let path = escape(path);
            command.arg("-drive").arg(format!(
                "if=none,id={serial},format=raw,readonly=on,file.locking=off,file={path}"
            ));
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive={serial},serial={serial}"));
        }
        if let Some(size) = &options.disk {
            let path = directory.path().join("disk");
            fs::File::create(&path)?.set_len(bytes(size)?)?;
            let path = escape(&path);
            command
                .arg("-drive")
                .arg(format!("if=none,id=disk,format=raw,file={path}"));
            command.args(["-device", "virtio-blk-pci,drive=disk,serial=disk"]);
        }
        command
            .arg("-qmp")
            .arg(format!("unix:{}", escape(&sockets.add("qmp")?)));
        if let Some(path) = &options.qmp {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", escape(path)));
        }
        command.args(["-device", "virtio-serial-pci,max_ports=8"]);
        for name in [port::CONTROL, port::STDIN, port::STDOUT, port::STDERR] {
            let path = sockets.add(name)?;
            command
                .arg("-chardev")
                .arg(format!("socket,id={name},path={}", escape(&path)));
            command
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},name={name}"));
        }
        let mut config = Config {
            layers: layers
                .iter()
                .map(|(serial, _)| (*serial).to_owned())
                .collect(),
            modules: options.modules.clone(),
            command: options.command.clone(),
            directory: "/root".to_owned(),
            environment: environment(&kernel),
            terminal: options.terminal,
            check_leaks: true,
            ..Config::default()
        };
        if !options.bare {
            config.modules.push("pinbuf".to_owned());
        }
        let mut helper = None;
        let mut machine = qemu::machine(kernel.arch).to_owned();
        if let Some(share) = &options.share {
            let share = share
                .canonicalize()
                .with_context(|| format!("the directory to share, {}", share.display()))?;
            config.directory = place_of_share(&share)?;
            let sharing = kernel.sharing()?;
            match sharing {
                Sharing::NineP => {
                    command.arg("-virtfs").arg(format!(
                        "local,id=share,mount_tag=share,security_model=passthrough,\
                         multidevs=remap,path={}",
                        escape(&share)
                    ));
                }
                Sharing::VirtioFs => {
                    let socket = directory.path().join("share");
                    let messages = directory.path().join("share-messages");
                    helper = Some(qemu::share(&tools, &share, &socket, &messages)?);
                    machine += ",memory-backend=memory";
                    command.arg("-object").arg(format!(
                        "memory-backend-memfd,id=memory,share=on,size={}",
                        options.memory
                    ));
                    command
                        .arg("-chardev")
                        .arg(format!("socket,id=share,path={}", escape(&socket)));
                    command.args(["-device", "vhost-user-fs-pci,chardev=share,tag=share"]);
                }
            }
            let path = config.directory.clone();
            config.share = Some(Share {
                tag: "share".to_owned(),
                path,
                sharing,
            });
        }
        command.args(["-machine", &machine, "-m", &options.memory]);
        let modules = kernel.boot_modules()?;
        config.boot_modules = modules
            .iter()
            .filter_map(|path| path.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        let initramfs = directory.path().join("initramfs");
        initramfs::write(&initramfs, &init, &config, modules.iter())?;
        command
            .arg("-kernel")
            .arg(kernel.vmlinuz())
            .arg("-initrd")
            .arg(&initramfs);
        let own = qemu::cmdline(kernel.arch);
        // KASAN's check of addresses asks for LA57, which identify_cpu() clears for a moment: an
        // interrupt at that time is reported, and lock debugging is off for the rest of the run.
        let paging = if options.kernel == "debug" {
            "no5lvl "
        } else {
            ""
        };
        // With `-icount` the counter counts instructions, and nothing disturbs its measurement.
        let counter = if kernel.arch == Arch::Amd64 && !icount {
            format!("tsc_early_khz={} ", tsc::khz())
        } else {
            String::new()
        };
        // An oops ends the run at once; the kernel's own log is complete; and no time goes to
        // workarounds for processors that this one is not.
        command.arg("-append").arg(format!(
            "{own} loglevel=7 printk.devkmsg=on panic=-1 oops=panic mitigations=off \
             {counter}{paging}{}",
            options.cmdline
        ));
        command.args(&options.qemu);

        let start = Instant::now();
        let messages = directory.path().join(MESSAGES);
        let mut qemu = qemu::spawn(&mut command, &messages)?;
        cleanup::register(qemu.id(), directory.path());
        let connected = sockets.accept(&mut qemu, &messages).and_then(|streams| {
            let [qmp, control, input, output, error]: [UnixStream; 5] = streams
                .try_into()
                .map_err(|_| anyhow::anyhow!("a socket is missing"))?;
            Ok((Qmp::over(qmp, QMP_LIMIT)?, control, input, output, error))
        });
        let (qmp, control, input, output, error) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                cleanup::forget(qemu.id());
                if let Some(mut helper) = helper {
                    let _ = helper.kill();
                    let _ = helper.wait();
                }
                return Err(error);
            }
        };
        let relays = vec![relay(output, streams.output), relay(error, streams.error)];
        let events = follow(control.try_clone()?);
        forward(streams.input, input);
        let timeout = options.timeout;
        Ok(Self {
            qemu,
            helper,
            directory,
            qmp,
            control,
            events,
            relays,
            start,
            timeout,
            boot_limit: options.boot_limit,
            log,
        })
    }

    /// QEMU's control protocol.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// The directory of this run, which vanishes with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Whether the machine stopped.
    pub fn ended(&mut self) -> bool {
        !matches!(self.qemu.try_wait(), Ok(None))
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Result<Outcome> {
        let mut boot = None;
        let mut end = loop {
            if self
                .boot_limit
                .is_some_and(|limit| self.start.elapsed() > limit)
            {
                self.boot_limit = None;
                let log = fs::read(&self.log).context("reading the guest's console")?;
                if boot.is_none() && !String::from_utf8_lossy(&log).contains(FIRST_MODULE) {
                    break End::NotBooted;
                }
            }
            if self
                .timeout
                .is_some_and(|timeout| self.start.elapsed() > timeout)
            {
                self.dump_tasks();
                break End::TimedOut;
            }
            let event = match self.events.recv_timeout(Duration::from_millis(50)) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => match self.qemu.try_wait()? {
                    None => continue,
                    // The last event may still be in transit.
                    Some(_) => match self.events.recv_timeout(Duration::from_millis(200)) {
                        Ok(event) => event,
                        Err(_) => break End::Crashed(String::new()),
                    },
                },
                Err(RecvTimeoutError::Disconnected) => break End::Crashed(String::new()),
            };
            match event {
                Event::Ready => boot = Some(self.start.elapsed()),
                Event::Exited(status) => break End::Exited(status),
                Event::Killed(signal) => break End::Killed(signal),
                Event::Failed(reason) => break End::Failed(reason),
            }
        };
        if matches!(end, End::Exited(_) | End::Killed(_) | End::Failed(_)) {
            self.wait_for_log();
        }
        if let End::Crashed(reason) = &mut end {
            // The machine is stopping. If it hangs, QEMU is stopped.
            self.wait_for_qemu(Duration::from_secs(10));
            let status = match self.qemu.try_wait()? {
                // As when the kernel has the machine reset (-no-reboot).
                Some(status) if status.success() => "QEMU ended by itself".to_owned(),
                Some(status) => format!("QEMU ended with {status}"),
                None => "QEMU still ran".to_owned(),
            };
            let said = fs::read_to_string(self.directory.path().join(MESSAGES)).unwrap_or_default();
            *reason = format!("{status}; its output: {:?}", said.trim_end());
        }
        let _ = self.qemu.kill();
        self.qemu.wait()?;
        cleanup::forget(self.qemu.id());
        if let Some(mut helper) = self.helper {
            let _ = helper.kill();
            helper.wait()?;
        }
        for relay in self.relays {
            let _ = relay.join();
        }
        let log = fs::read(&self.log).context("reading the guest's console")?;
        let complaints = watch::complaints(&String::from_utf8_lossy(&log));
        Ok(Outcome {
            end,
            complaints,
            log: self.log,
            boot,
            total: self.start.elapsed(),
        })
    }

    /// A way to ask the guest for something, from any thread.
    pub fn requests(&self) -> Result<Requests> {
        let control = self.control.try_clone()?;
        control.set_write_timeout(Some(Duration::from_secs(1)))?;
        Ok(Requests(control))
    }

    /// Lets the kernel write what hangs to its log.
    fn dump_tasks(&mut self) {
        let asked = self
            .requests()
            .and_then(|mut requests| requests.send(Request::DumpTasks));
        if asked.is_ok() {
            self.wait_for_qemu(Duration::from_secs(5));
        }
    }

    fn wait_for_qemu(&mut self, limit: Duration) {
        let start = Instant::now();
        while start.elapsed() < limit && matches!(self.qemu.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The log may lag behind: wait for its last line.
    fn wait_for_log(&self) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if tail(&self.log, 50).contains(END_MARK) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Asks the guest for something.
pub struct Requests(UnixStream);

impl Requests {
    /// Sends one request.
    pub fn send(&mut self, request: Request) -> Result<()> {
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        self.0
            .write_all(&line)
            .context("writing to the guest's control port")
    }
}

/// A directory for this run.  Those of runs that were killed, and could not tidy up, are removed.
fn run_directory() -> Result<TempDir> {
    const PREFIX: &str = "pinbuf-run-";
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let prefix = format!("{PREFIX}{}-", std::process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir()?)
}

/// A new file for the kernel's console; old ones are removed.
fn console(kernel: &Kernel) -> Result<PathBuf> {
    let directory = paths::logs().join("guests");
    fs::create_dir_all(&directory)?;
    let mut old: Vec<_> = fs::read_dir(&directory)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    old.sort();
    for (_, path) in old.iter().rev().skip(LOGS_KEPT) {
        let _ = fs::remove_file(path);
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_millis();
    let path = directory.join(format!(
        "{now}-{}-{}.log",
        std::process::id(),
        kernel.release
    ));
    fs::write(&path, "")?;
    Ok(path)
}

fn environment(kernel: &Kernel) -> Vec<(String, String)> {
    let mut environment: Vec<(String, String)> = [
        ("HOME", "/root"),
        ("USER", "root"),
        ("SHELL", "/bin/bash"),
        ("LC_ALL", "C.UTF-8"),
        (
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("PINBUF_KERNEL", &kernel.release),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    for name in ["TERM", "RUST_BACKTRACE"] {
        if let Ok(value) = std::env::var(name) {
            environment.push((name.to_owned(), value));
        }
    }
    environment
}

/// A shared directory has the same path in the guest, except where the guest has its own things.
fn place_of_share(share: &Path) -> Result<String> {
    const SYSTEM: [&str; 12] = [
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys",
        "/usr", "/var",
    ];
    let text = share
        .to_str()
        .context("the shared directory's path is not UTF-8")?;
    let system = SYSTEM.iter().any(|path| share.starts_with(path));
    let whole = ["/", "/tmp", "/root"].contains(&text);
    Ok(if system || whole {
        "/share".to_owned()
    } else {
        text.to_owned()
    })
}

/// QEMU's option lists want a comma doubled.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A size as QEMU takes it, in bytes.
fn bytes(size: &str) -> Result<u64> {
    let (digits, shift) = match size.trim_end_matches(['b', 'B']).char_indices().last() {
        Some((at, 'k' | 'K')) => (&size[..at], 10),
        Some((at, 'm' | 'M')) => (&size[..at], 20),
        Some((at, 'g' | 'G')) => (&size[..at], 30),
        _ => (size, 20),
    };
    match digits.parse::<u64>() {
        Ok(number) => Ok(number << shift),
        Err(_) => bail!("`{size}` is not a size: use a number with K, M or G"),
    }
}

/// Copies what comes from a port, in its own thread.
fn relay(mut from: UnixStream, mut to: Box<dyn Write + Send>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut writable = true;
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    // When nothing reads it any more, the guest still must not block.
                    writable = writable
                        && to
                            .write_all(&buffer[..count])
                            .and_then(|()| to.flush())
                            .is_ok();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// Reads the guest's events, in its own thread.
fn follow(control: UnixStream) -> Receiver<Event> {
    let (sender, events) = channel();
    thread::spawn(move || {
        for line in BufReader::new(control).lines() {
            let Ok(line) = line else { return };
            let event = serde_json::from_str(&line).unwrap_or_else(|error| {
                Event::Failed(format!("unexpected message {line:?}: {error}"))
            });
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    events
}

/// Sends standard input in frames, in its own thread.
fn forward(input: Option<Box<dyn Read + Send>>, mut to: UnixStream) {
    thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        let mut input = input.unwrap_or_else(|| Box::new(std::io::empty()));
        loop {
            let count = input.read(&mut buffer).unwrap_or(0);
            let sent = to
                .write_all(&(count as u32).to_le_bytes())
                .and_then(|()| to.write_all(&buffer[..count]));
            if sent.is_err() {
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
            if count == 0 {
                // QEMU may still have to read: the stream stays open until QEMU closes it.
                let _ = to.read(&mut buffer);
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("64").unwrap(), 64 << 20);
        assert_eq!(bytes("64K").unwrap(), 64 << 10);
        assert_eq!(bytes("3g").unwrap(), 3 << 30);
        assert!(bytes("much").is_err());
    }

    #[test]
    fn places_of_shares() {
        for (host, guest) in [
            ("/", "/share"),
            ("/tmp", "/share"),
            ("/tmp/x", "/tmp/x"),
            ("/usr/src", "/share"),
            ("/home/me", "/home/me"),
        ] {
            assert_eq!(place_of_share(Path::new(host)).unwrap(), guest);
        }
    }
}
