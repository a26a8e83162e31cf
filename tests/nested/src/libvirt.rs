// SPDX-License-Identifier: MIT OR Apache-2.0

//! A virtual machine that libvirt runs, set up as docs/operators.md describes: as another user, in a /dev of its own,
//! confined by Debian's AppArmor profiles.

use std::fs::{self, File};
use std::os::unix::fs::{chown, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::evidence;
use crate::initramfs;
use crate::link::{Link, PATIENCE};
use crate::picture::Picture;
use crate::protocol::{Request, PORT};
use crate::scenarios::{note, timed};

/// The domain's name.
const NAME: &str = "pinbuf";

/// Where a domain may have its files.
const IMAGES: &str = "/var/lib/libvirt/images";

const LINK: &str = "/run/libvirt/qemu/pinbuf-link";
const CONSOLE: &str = "/var/log/libvirt/qemu/pinbuf-console";
const LOG: &str = "/var/log/libvirt/qemu/pinbuf.log";
const PID: &str = "/run/libvirt/qemu/pinbuf.pid";

/// Added to /etc/libvirt/qemu.conf.
const CONFIGURATION: &str = r#"
cgroup_device_acl = [
    "/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev/urandom",
    "/dev/ptmx", "/dev/kvm", "/dev/userfaultfd", "/dev/pinbuf"
]
"#;

/// The rules for AppArmor, in `abstractions/libvirt-qemu.d`.
const RULES: &str = "\
/dev/pinbuf rw,
/usr/lib/pinbuf/*.so mr,
";

/// Runs a program to its end.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        said.trim_end()
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn virsh(arguments: &[&str]) -> Result<String> {
    run(
        "virsh",
        &[&["--connect", "qemu:///system"], arguments].concat(),
    )
}

/// A daemon, which runs in the foreground until this is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(program: &str) -> Result<Self> {
        let messages = File::create(messages(program))?;
        let child = Command::new(program)
            .stdin(Stdio::null())
            .stdout(messages.try_clone()?)
            .stderr(messages)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        Ok(Self(child))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a daemon prints.
fn messages(program: &str) -> PathBuf {
    Path::new("/tmp").join(format!("{program}-messages"))
}

/// Does what the boot of a Debian system does, and then the operator.
fn set_up() -> Result<()> {
    // As the udev rules do.
    let group = nix::unistd::Group::from_name("kvm")?.context("there is no group kvm")?;
    for device in ["/dev/kvm", "/dev/pinbuf"] {
        chown(device, Some(0), Some(group.gid.as_raw()))?;
        fs::set_permissions(device, fs::Permissions::from_mode(0o660))?;
    }
    let path = "/etc/libvirt/qemu.conf";
    let text = fs::read_to_string(path)?;
    fs::write(path, text + CONFIGURATION)?;
    let directory = Path::new("/etc/apparmor.d/abstractions/libvirt-qemu.d");
    fs::create_dir_all(directory)?;
    fs::write(directory.join("pinbuf"), RULES)?;
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled")?;
    ensure!(enabled.trim() == "Y", "the kernel has no AppArmor");
    for profile in ["usr.sbin.libvirtd", "usr.lib.libvirt.virt-aa-helper"] {
        run(
            "apparmor_parser",
            &["--replace", &format!("/etc/apparmor.d/{profile}")],
        )?;
    }
    Ok(())
}

/// How the domain asks for blob resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blob {
    /// By libvirt's own attribute, for which libvirt itself wants a `/dev/udmabuf`.
    Model,
    /// By an override of QEMU's property, where there is none.
    Override,
}

/// The domain, as docs/operators.md describes it.
fn domain(kernel: &Path, initrd: &Path, blob: Blob) -> String {
    let (kernel, initrd) = (kernel.display(), initrd.display());
    let (attribute, property) = match blob {
        Blob::Model => (" blob='on'", ""),
        Blob::Override => (
            "",
            "  <qemu:override>
    <qemu:device alias='video0'>
      <qemu:frontend>
        <qemu:property name='blob' type='bool' value='true'/>
      </qemu:frontend>
    </qemu:device>
  </qemu:override>
",
        ),
    };
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAME}</name>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>drm_client_lib.active=none console=ttyS0 quiet mitigations=off panic=-1 \
no_timer_check tsc=reliable</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{CONSOLE}'/><target port='0'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{LINK}'/>
      <target type='virtio' name='{PORT}'/>
    </channel>
    <video>
      <model type='virtio' heads='1' primary='yes'{attribute}>
        <resolution x='1920' y='1080'/>
      </model>
    </video>
  </devices>
  <qemu:commandline>
    <qemu:env name='LD_PRELOAD' value='/usr/lib/pinbuf/libudmabuf_shim.so'/>
  </qemu:commandline>
{property}</domain>
"
    )
}

/// Waits until libvirt answers.
fn wait_for_libvirt(daemon: &mut Daemon) -> Result<()> {
    let start = Instant::now();
    loop {
        match virsh(&["version"]) {
            Ok(version) => {
                note(&version);
                return Ok(());
            }
            Err(error) => {
                if let Some(status) = daemon.0.try_wait()? {
                    bail!("libvirtd ended with {status}");
                }
                ensure!(start.elapsed() < PATIENCE, "{error:#}");
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// QEMU under libvirt shows its guest's screen through pinbuf.
pub fn confined_by_libvirt() -> Result<()> {
    timed("AppArmor's profiles and libvirt's configuration", set_up)?;
    let _log = Daemon::start("virtlogd")?;
    let mut daemon = Daemon::start("libvirtd")?;
    timed("libvirtd starts", || wait_for_libvirt(&mut daemon)).map_err(explain)?;
    shown(Blob::Model).map_err(explain)?;
    // Stock kernels have the device. This is what operators without it do.
    fs::remove_file("/dev/udmabuf").context("there is no /dev/udmabuf to begin with")?;
    shown(Blob::Override).map_err(explain)?;
    let denied = denied()?;
    note(&format!("AppArmor denied: {}", denied.join("\n")));
    ensure!(
        !denied.iter().any(|line| line.contains("pinbuf")
            || line.contains("memfd")
            || line.contains("/proc/")),
        "AppArmor denied what the shim does"
    );
    Ok(())
}

/// What AppArmor refused since the boot.
fn denied() -> Result<Vec<String>> {
    let log = run("dmesg", &[])?;
    Ok(log
        .lines()
        .filter(|line| line.contains("apparmor=\"DENIED\""))
        .map(str::to_owned)
        .collect())
}

/// Adds QEMU's and libvirt's output and AppArmor's refusals to an error.
fn explain(error: anyhow::Error) -> anyhow::Error {
    // Nothing keeps running when this fails.
    let _ = virsh(&["destroy", NAME]);
    let denied = denied().unwrap_or_default();
    error.context(format!(
        "AppArmor denied:\n{}\nQEMU's log:\n{}\nlibvirtd's output:\n{}\nthe guest's console:\n{}",
        denied.join("\n"),
        evidence::tail(LOG.as_ref()),
        evidence::tail(&messages("libvirtd")),
        evidence::tail(CONSOLE.as_ref()),
    ))
}

/// Runs the domain, and compares what libvirt shows of it.
fn shown(blob: Blob) -> Result<()> {
    note(&format!("blob resources by {blob:?}"));
    let (kernel, initrd) = (
        Path::new(IMAGES).join("vmlinuz"),
        Path::new(IMAGES).join("initrd.img"),
    );
    fs::create_dir_all(IMAGES)?;
    fs::copy(initramfs::kernel()?, &kernel)?;
    initramfs::write(&initrd, &[])?;
    let file = Path::new("/tmp/pinbuf-domain.xml");
    fs::write(file, domain(&kernel, &initrd, blob))?;
    timed("virsh create", || {
        virsh(&["create", &file.display().to_string()])
    })?;
    let process: u32 = fs::read_to_string(PID)?.trim().parse()?;
    let mut link = Link::new(UnixStream::connect(LINK).context(LINK)?)?;
    timed("the guest is ready", || link.wait_ready())?;

    let screen = link.show(&Request::Show)?;
    ensure!((screen.width, screen.height) == (1920, 1080), "{screen:?}");
    for frame in 1..4 {
        link.ask(&Request::Draw(frame))?;
        screenshot()?.compare(screen.pattern(frame))?;
    }
    note("3 frames drawn, taken by `virsh screenshot` and compared: every pixel right");
    let buffers = evidence::buffers(process)?;
    let bytes = u64::from(screen.width) * u64::from(screen.height) * 4;
    note(&format!("QEMU's dma-bufs: {buffers:?}"));
    ensure!(
        buffers.iter().all(|buffer| buffer.exporter == "pinbuf")
            && buffers.iter().any(|buffer| buffer.size == bytes),
        "{buffers:?}"
    );
    let others = evidence::dma_bufs("udmabuf")?;
    ensure!(others == 0, "{others} buffers are udmabuf's");
    check_confined(process)?;
    virsh(&["destroy", NAME]).map(drop)
}

/// The picture that libvirt gives its users.
fn screenshot() -> Result<Picture> {
    let file = "/tmp/pinbuf-screenshot";
    virsh(&["screenshot", NAME, file])?;
    let bytes = fs::read(file)?;
    if bytes.starts_with(b"P6") {
        Picture::parse(&bytes)
    } else {
        Picture::parse_png(&bytes)
    }
}

/// Fails unless QEMU runs as its own user, under AppArmor.
fn check_confined(process: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let uid = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().next())
        .context("no Uid")?;
    let user = nix::unistd::User::from_uid(uid.parse::<u32>()?.into())?
        .map_or_else(|| uid.to_owned(), |user| user.name);
    let profile = fs::read_to_string(format!("/proc/{process}/attr/apparmor/current"))?;
    let profile = profile.trim();
    let limits = fs::read_to_string(format!("/proc/{process}/limits"))?;
    let locked = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"))
        .context("no limit")?;
    note(&format!(
        "QEMU's user: {user}; AppArmor: {profile}; {locked}"
    ));
    ensure!(user == "libvirt-qemu", "QEMU runs as {user}");
    ensure!(
        profile.starts_with("libvirt-") && profile.ends_with("(enforce)"),
        "AppArmor: {profile}"
    );
    Ok(())
}
