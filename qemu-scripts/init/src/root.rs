// SPDX-License-Identifier: MIT OR Apache-2.0

//! From the initramfs to the root that the command sees.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::kmod::{finit_module, ModuleInitFlags};
use nix::mount::{mount, MsFlags};
use nix::unistd::{chdir, chroot, sethostname};
use pinbuf_guest_init::{Config, Sharing, BOOT_MODULES};

const NEW_ROOT: &str = "/newroot";

/// How long a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(30);

fn mount_at(source: &str, path: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
    mount(Some(source), path, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} ({options}) on {path}"))
}

/// Mounts what the kernel shows of itself.
pub fn mount_kernel_file_systems() -> Result<()> {
    let none = MsFlags::empty();
    for (kind, path) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        match mount_at(kind, path, kind, none, "") {
            // The kernel may have mounted /dev itself.
            Err(error) if error.downcast_ref() == Some(&Errno::EBUSY) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Loads the modules that the initramfs brings along.
pub fn load_boot_modules(config: &Config) -> Result<()> {
    for name in &config.boot_modules {
        let path = Path::new(BOOT_MODULES).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => bail!("loading {name}: {error}"),
        }
    }
    Ok(())
}

/// Makes the overlay of all layers the root.
pub fn switch(config: &Config) -> Result<()> {
    let none = MsFlags::empty();
    let mut lower = Vec::new();
    for (index, serial) in config.layers.iter().enumerate() {
        let device = find_disk(serial)?;
        let path = format!("/layers/{index}");
        mount_at(&device, &path, "ext4", MsFlags::MS_RDONLY, "")?;
        lower.push(path);
    }
    mount_at("writable", "/writable", "tmpfs", none, "mode=0755,size=75%")?;
    fs::create_dir("/writable/upper")?;
    fs::create_dir("/writable/work")?;
    let options = format!(
        "lowerdir={},upperdir=/writable/upper,workdir=/writable/work",
        lower.join(":")
    );
    mount_at("root", NEW_ROOT, "overlay", none, &options)?;

    for path in ["/dev", "/proc", "/sys"] {
        let target = format!("{NEW_ROOT}{path}");
        fs::create_dir_all(&target)?;
        mount(
            Some(path),
            target.as_str(),
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .with_context(|| format!("moving {path}"))?;
    }
    chdir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("moving root")?;
    chroot(".").context("changing root")?;
    chdir("/")?;
    Ok(())
}

/// The device node of the virtio disk with this serial number.
fn find_disk(serial: &str) -> Result<String> {
    let start = Instant::now();
    loop {
        if let Ok(disks) = fs::read_dir("/sys/block") {
            for disk in disks {
                let disk = disk?;
                let found = fs::read_to_string(disk.path().join("serial")).unwrap_or_default();
                let device = format!("/dev/{}", disk.file_name().to_string_lossy());
                if found.trim_end() == serial && fs::exists(&device)? {
                    return Ok(device);
                }
            }
        }
        if start.elapsed() > PATIENCE {
            bail!("no disk has the serial number {serial}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Mounts what a command may expect, and the shares.
pub fn mount_the_rest(config: &Config) -> Result<()> {
    let none = MsFlags::empty();
    for (kind, path, options) in [
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("tmpfs", "/run", "mode=0755"),
        ("tmpfs", "/tmp", "mode=1777"),
    ] {
        mount_at(kind, path, kind, none, options)?;
    }
    // These depend on the kernel's configuration. A command that needs a missing one fails.
    for (kind, path) in [
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
        ("securityfs", "/sys/kernel/security"),
        ("configfs", "/sys/kernel/config"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("hugetlbfs", "/dev/hugepages"),
    ] {
        if kind == "hugetlbfs" || Path::new(path).exists() {
            let _ = mount_at(kind, path, kind, none, "");
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        if !fs::exists(link)? {
            symlink(target, link).with_context(|| format!("linking {link}"))?;
        }
    }
    sethostname("guest")?;
    if let Some(share) = &config.share {
        let (kind, options) = match share.sharing {
            // cache=mmap: without it programs cannot map files of the share for writing.
            Sharing::NineP => (
                "9p",
                "trans=virtio,version=9p2000.L,msize=524288,cache=mmap",
            ),
            Sharing::VirtioFs => ("virtiofs", ""),
        };
        mount_at(&share.tag, &share.path, kind, none, options)?;
    }
    Ok(())
}

/// Loads the modules that the command needs.
pub fn load_modules(config: &Config) -> Result<()> {
    for name in &config.modules {
        let output = Command::new("/usr/sbin/modprobe")
            .arg(name)
            .stdin(Stdio::null())
            .output()
            .context("running modprobe")?;
        if !output.status.success() {
            bail!(
                "modprobe {name}: {}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
    }
    Ok(())
}
