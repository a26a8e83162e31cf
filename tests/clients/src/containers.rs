// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sandboxes and containers of an ordinary user: what `docs/containers.md` says has to be passed in is
//! sufficient, and the errors where it was not passed in.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

use anyhow::{ensure, Context, Result};
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::unistd::chown;
use pinbuf_test_harness::support::process::USER;
use pinbuf_test_harness::tests;

use crate::process::{End, Start};

tests!("containers":
    bubblewrap_as_flatpak_uses_it,
    bubblewrap_without_proc,
    bubblewrap_without_the_device,
    namespaces_with_a_read_only_root_and_no_proc,
    podman within 300,
    podman_without_the_user_s_groups within 300,
);

const CLIENT: &str = "pinbuf-udmabuf-client";
const SHIM: &str = "/usr/lib/pinbuf/libudmabuf_shim.so";
const MADE: &str = "33177600 bytes by pinbuf\n";

/// What Flatpak gives its programs: all namespaces of their own, a read-only /usr, and a small /dev.
const FLATPAK: &[&str] = &[
    "bwrap",
    "--unshare-all",
    "--die-with-parent",
    "--new-session",
    "--ro-bind",
    "/usr",
    "/usr",
    "--ro-bind",
    "/etc",
    "/etc",
    "--symlink",
    "usr/bin",
    "/bin",
    "--symlink",
    "usr/lib",
    "/lib",
    "--symlink",
    "usr/lib64",
    "/lib64",
    "--tmpfs",
    "/tmp",
    "--chdir",
    "/tmp",
    "--dev",
    "/dev",
];
const PROC: &[&str] = &["--proc", "/proc"];
const DEVICE: &[&str] = &["--dev-bind", "/dev/pinbuf", "/dev/pinbuf"];
const RUN: &[&str] = &["pinbuf", "run", "--log", "--"];

/// Runs all of these words as one command of a user's.
fn by_user(words: &[&[&str]]) -> Result<End> {
    Start::program(&words.concat()).by_kvm_user().end()
}

/// Fails unless the client made its buffer, by the shim. Without /proc it cannot say whose the buffer is.
fn made(end: &End, proc: bool) -> Result<()> {
    let wanted = if proc { MADE } else { "33177600 bytes\n" };
    ensure!(
        end.status == Some(0)
            && end.out == wanted
            && end.err.contains("/dev/udmabuf opened as /dev/pinbuf")
            && end.err.contains("created fd"),
        "{end:?}"
    );
    Ok(())
}

fn bubblewrap_as_flatpak_uses_it() -> Result<()> {
    made(&by_user(&[FLATPAK, PROC, DEVICE, RUN, &[CLIENT]])?, true)
}

fn bubblewrap_without_proc() -> Result<()> {
    made(&by_user(&[FLATPAK, DEVICE, RUN, &[CLIENT]])?, false)
}

/// `pinbuf run` says what to pass in. With the shim alone the program gets the same error as without it.
fn bubblewrap_without_the_device() -> Result<()> {
    let end = by_user(&[FLATPAK, PROC, RUN, &[CLIENT]])?;
    ensure!(
        end.status == Some(125)
            && end.err.contains("/dev/pinbuf is missing")
            && end.err.contains("--dev-bind /dev/pinbuf /dev/pinbuf"),
        "{end:?}"
    );
    let shim = ["--setenv", "LD_PRELOAD", SHIM];
    let with = by_user(&[FLATPAK, PROC, &shim, &[CLIENT]])?;
    let without = by_user(&[FLATPAK, PROC, &[CLIENT]])?;
    ensure!(
        with.status == Some(1) && with.err == without.err,
        "{with:?} {without:?}"
    );
    // Bound as a file, it is a device that may not be opened.
    let bound = ["--ro-bind", "/dev/pinbuf", "/dev/pinbuf"];
    let end = by_user(&[FLATPAK, PROC, &bound, &["pinbuf", "doctor"]])?;
    ensure!(end.out.contains("lies on a mount with `nodev`"), "{end:?}");
    let with = by_user(&[FLATPAK, PROC, &bound, &shim, &[CLIENT]])?;
    ensure!(
        with.status == Some(1) && with.err.contains("Permission denied"),
        "{with:?}"
    );
    Ok(())
}

fn namespaces_with_a_read_only_root_and_no_proc() -> Result<()> {
    let script = "mount -o remount,bind,ro / && mount -t tmpfs -o ro none /proc && ! touch /etc/written 2>/dev/null && \
                  exec pinbuf run --log -- pinbuf-udmabuf-client";
    let spaces = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--net",
        "--ipc",
        "--uts",
        "--cgroup",
        "--fork",
    ];
    made(&by_user(&[&spaces, &["sh", "-c", script]])?, false)
}

/// What podman requires of a user: a name, a home, and subordinate user numbers. And the root directory of the
/// container, which is the guest's own.
fn prepare_podman() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let line = format!("tester:x:{USER}:{USER}::/run/tester/home:/bin/sh\n");
    if !fs::read_to_string("/etc/passwd")?.contains(&line) {
        let append = |path: &str, line: &str| -> Result<()> {
            let mut file = fs::File::options().append(true).create(true).open(path)?;
            file.write_all(line.as_bytes())
                .with_context(|| path.to_owned())
        };
        append("/etc/passwd", &line)?;
        append("/etc/group", &format!("tester:x:{USER}:\n"))?;
        append("/etc/subuid", "tester:200000:65536\n")?;
        append("/etc/subgid", "tester:200000:65536\n")?;
    }
    for directory in ["/run/tester", "/run/tester/home", "/run/tester/run"] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        chown(directory, Some(USER.into()), Some(USER.into()))?;
    }
    fs::create_dir_all("/run/container")?;
    fs::set_permissions("/run/container", fs::Permissions::from_mode(0o755))?;
    mount(Some("/"), "/run/container", none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// A container of a user's, in which the root directory is the guest's own, and read-only.
fn in_podman(more: &[&str], words: &[&str]) -> Result<End> {
    // There is no systemd to make control groups, and no network.
    let podman = [
        "podman",
        "run",
        "--rm",
        "--cgroups=disabled",
        "--network=none",
        "--systemd=false",
        "--runtime=crun",
        "--read-only",
        "--log-driver=none",
    ];
    let words = [&podman, more, &["--rootfs", "/run/container"], words].concat();
    let mut command = Start::program(&words).by_kvm_user().command();
    command
        .env("HOME", "/run/tester/home")
        .env("USER", "tester")
        .env("LOGNAME", "tester")
        .env("XDG_RUNTIME_DIR", "/run/tester/run")
        .env("STORAGE_DRIVER", "vfs");
    Ok(End::from(command.output()?))
}

fn podman() -> Result<()> {
    prepare_podman()?;
    let device = ["--device", "/dev/pinbuf", "--group-add", "keep-groups"];
    made(&in_podman(&device, &[RUN, &[CLIENT]].concat())?, true)
}

fn podman_without_the_user_s_groups() -> Result<()> {
    prepare_podman()?;
    let end = in_podman(&["--device", "/dev/pinbuf"], &[RUN, &[CLIENT]].concat())?;
    ensure!(
        end.status == Some(125) && end.err.contains("podman: `--group-add keep-groups`"),
        "{end:?}"
    );
    let end = in_podman(&[], &[RUN, &[CLIENT]].concat())?;
    ensure!(
        end.status == Some(125)
            && end.err.contains("/dev/pinbuf is missing")
            && end.err.contains("--device /dev/pinbuf"),
        "{end:?}"
    );
    Ok(())
}
