// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf run`: limits, statuses, and its error messages.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use anyhow::{ensure, Context, Result};
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use pinbuf_test_harness::tests;

use crate::process::{End, Start};
use crate::udev;

tests!("run":
    raises_memlock_to_the_hard_limit,
    leaves_an_equal_limit_alone,
    passes_arguments_and_status_on,
    tells_missing_from_not_executable,
    keeps_what_is_preloaded_already,
    keeps_signals_that_are_ignored,
    ends_without_a_panic_if_nobody_reads,
    logs_what_is_made_and_what_is_refused,
    says_that_the_device_is_missing,
    says_that_the_module_is_not_loaded,
    says_that_root_alone_may,
    refuses_what_nothing_can_reach,
);

fn shell(script: &str) -> Start {
    Start::program(&["sh", "-c", script])
}

/// Fails unless `pinbuf run` itself ended, without the command, and printed all of this.
fn refused(end: &End, texts: &[&str]) -> Result<()> {
    ensure!(end.status == Some(125) && end.out.is_empty(), "{end:?}");
    for text in texts {
        ensure!(end.err.contains(text), "expected {text:?} in {end:?}");
    }
    Ok(())
}

/// As a user: root needs no limits.
fn raises_memlock_to_the_hard_limit() -> Result<()> {
    let end = shell("ulimit -S -l; ulimit -H -l")
        .on_pinbuf()
        .by_user(Some("kvm"))
        .memlock(64 << 10, 32 << 20)
        .end()?;
    ensure!(
        end.status == Some(0) && end.out == "32768\n32768\n",
        "{end:?}"
    );
    Ok(())
}

fn leaves_an_equal_limit_alone() -> Result<()> {
    let end = shell("ulimit -S -l; ulimit -H -l")
        .on_pinbuf()
        .by_user(Some("kvm"))
        .memlock(64 << 10, 64 << 10)
        .end()?;
    ensure!(end.status == Some(0) && end.out == "64\n64\n", "{end:?}");
    Ok(())
}

fn passes_arguments_and_status_on() -> Result<()> {
    let end = Start::program(&[
        "sh",
        "-c",
        "echo \"$0|$1|$2\"; exit 7",
        "--log=x",
        "a b",
        "--",
    ])
    .on_pinbuf()
    .by_kvm_user()
    .end()?;
    ensure!(
        end.status == Some(7) && end.out == "--log=x|a b|--\n",
        "{end:?}"
    );
    Ok(())
}

fn tells_missing_from_not_executable() -> Result<()> {
    for (name, status) in [
        ("no-such-command", 127),
        ("/no/such", 127),
        ("/etc/passwd", 126),
    ] {
        let end = Start::program(&[name]).on_pinbuf().by_kvm_user().end()?;
        ensure!(
            end.status == Some(status) && end.err.contains(name),
            "{name}: {end:?}"
        );
    }
    Ok(())
}

fn keeps_what_is_preloaded_already() -> Result<()> {
    let output = shell("echo \"$LD_PRELOAD\"")
        .on_pinbuf()
        .by_kvm_user()
        .command()
        .env("LD_PRELOAD", "libm.so.6")
        .output()?;
    let end = End::from(output);
    ensure!(
        end.out == "/usr/lib/pinbuf/libudmabuf_shim.so:libm.so.6\n",
        "{end:?}"
    );
    Ok(())
}

fn keeps_signals_that_are_ignored() -> Result<()> {
    for trap in ["trap '' PIPE HUP", "trap '' HUP", ":"] {
        let ignored = "grep SigIgn /proc/self/status";
        let script = format!("{trap}; {ignored}; exec pinbuf run -- {ignored}");
        let end = shell(&script).by_kvm_user().end()?;
        let lines: Vec<&str> = end.out.lines().collect();
        ensure!(lines.len() == 2 && lines[0] == lines[1], "{trap}: {end:?}");
    }
    Ok(())
}

fn ends_without_a_panic_if_nobody_reads() -> Result<()> {
    for words in ["doctor", "doctor --json", "info", "info --json"] {
        // The reader has gone; and the disk is full.
        let (reader, writer) = nix::unistd::pipe()?;
        drop(reader);
        let full = fs::File::options().write(true).open("/dev/full")?;
        for (out, said) in [
            (writer.into(), ""),
            (
                Stdio::from(full),
                "pinbuf: cannot write to standard output: ",
            ),
        ] {
            let words: Vec<&str> = ["pinbuf"].into_iter().chain(words.split(' ')).collect();
            let mut command = Start::program(&words).command();
            let end = End::from(command.stdout(out).stderr(Stdio::piped()).output()?);
            let is_said = end.err.starts_with(said) && end.err.is_empty() == said.is_empty();
            ensure!(end.status == Some(125) && is_said, "{words:?}: {end:?}");
        }
    }
    Ok(())
}

/// By the program that asks for everything that udmabuf refuses.
fn logs_what_is_made_and_what_is_refused() -> Result<()> {
    for (case, line) in [
        ("extent/one-page", "created fd"),
        ("extent/size-1", "failed with errno 22: "),
        ("extent/end-beyond", "failed with errno 22: "),
        ("kind/closed", "failed with errno 77: "),
        ("pointer/single-null", "failed with errno 14: "),
    ] {
        let words = [
            "pinbuf",
            "run",
            "--log",
            "--",
            "udmabuf-conformance",
            "--only",
            case,
        ];
        let end = Start::program(&words).by_kvm_user().end()?;
        ensure!(end.status == Some(0), "{case}: {end:?}");
        ensure!(
            end.err.contains("/dev/udmabuf opened as /dev/pinbuf") && end.err.contains(line),
            "{case}: {end:?}"
        );
    }
    Ok(())
}

/// As in a container that the device was not passed into.
fn says_that_the_device_is_missing() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    fs::create_dir_all("/run/no-devices")?;
    mount(
        Some("/run/no-devices"),
        "/dev",
        none,
        MsFlags::MS_BIND,
        none,
    )?;
    fs::write("/dev/null", "")?;
    fs::set_permissions("/dev/null", fs::Permissions::from_mode(0o666))?;
    let end = shell("echo ran").on_pinbuf().by_kvm_user().end()?;
    refused(&end, &["/dev/pinbuf is missing", "--device /dev/pinbuf"])
}

fn says_that_the_module_is_not_loaded() -> Result<()> {
    let modprobe = |words: &[&str]| -> Result<()> {
        let end = Start::program(words).end()?;
        ensure!(end.status == Some(0), "{end:?}");
        Ok(())
    };
    modprobe(&["modprobe", "-r", "pinbuf"])?;
    let end = shell("echo ran").on_pinbuf().by_kvm_user().end();
    modprobe(&["modprobe", "pinbuf"])?;
    udev::wait()?;
    refused(
        &end?,
        &[
            "pinbuf.ko is installed but not loaded",
            "`modprobe pinbuf` as root",
        ],
    )
}

fn says_that_root_alone_may() -> Result<()> {
    // Replaces the device's permissions, in a mount namespace, without udev.
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let number = nix::sys::stat::stat("/dev/pinbuf")?.st_rdev;
    mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), none)?;
    nix::sys::stat::mknod(
        "/mnt/pinbuf",
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o600),
        number,
    )
    .context("mknod")?;
    mount(
        Some("/mnt/pinbuf"),
        "/dev/pinbuf",
        none,
        MsFlags::MS_BIND,
        none,
    )?;
    let end = shell("echo ran").on_pinbuf().by_kvm_user().end()?;
    refused(
        &end,
        &["/dev/pinbuf is for root only (mode 600", "60-pinbuf.rules"],
    )
}

fn refuses_what_nothing_can_reach() -> Result<()> {
    let program = "/usr/local/bin/set-user-id";
    fs::copy("/usr/bin/echo", program)?;
    fs::set_permissions(program, fs::Permissions::from_mode(0o4755))?;
    let ended = || -> Result<(End, End)> {
        let refused = Start::program(&[program, "ran"]).on_pinbuf();
        let anyway = ["pinbuf", "run", "--anyway", "--", program, "ran"];
        Ok((
            refused.by_kvm_user().end()?,
            Start::program(&anyway).by_kvm_user().end()?,
        ))
    };
    let ended = ended();
    fs::remove_file(program)?;
    let (end, anyway) = ended?;
    refused(&end, &[program, "set-user-ID", "--anyway"])?;
    ensure!(
        anyway.status == Some(0) && anyway.out == "ran\n" && anyway.err.contains("set-user-ID"),
        "{anyway:?}"
    );
    Ok(())
}
