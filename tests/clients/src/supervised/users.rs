// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes of other users than the supervisor's, and processes that the supervisor may not look into.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use pinbuf_test_harness::tests;

use super::surroundings::ODD;
use super::{run, CLIENT, MADE};
use crate::process::{no_udmabuf, Start, DEBIAN_MEMLOCK};

tests!("supervised":
    access_control_lists_are_the_kernels,
    process_that_is_not_dumpable_is_reported,
    privileges_in_a_namespace_of_its_own_are_no_rights,
);

const DEVICE: &CStr = c"/dev/pinbuf";
const ATTRIBUTE: &CStr = c"system.posix_acl_access";

/// Tags of entries, as in the kernel's `posix_acl.h`.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// The number of an entry that has none.
const NONE: u32 = u32::MAX;

/// Gives the device these entries: tag, bits, number.
fn set_entries(entries: &[(u16, u16, u32)]) -> Result<()> {
    let mut attribute = 2u32.to_le_bytes().to_vec();
    for (tag, bits, number) in entries {
        attribute.extend(tag.to_le_bytes());
        attribute.extend(bits.to_le_bytes());
        attribute.extend(number.to_le_bytes());
    }
    let (path, name) = (DEVICE.as_ptr(), ATTRIBUTE.as_ptr());
    // SAFETY: terminated strings, and a buffer of that length.
    let set = unsafe { libc::setxattr(path, name, attribute.as_ptr().cast(), attribute.len(), 0) };
    Errno::result(set).context("giving the device an access control list")?;
    Ok(())
}

/// The list of the device, which goes with this.
struct Entries {
    mode: u32,
}

impl Drop for Entries {
    fn drop(&mut self) {
        // SAFETY: terminated strings.
        unsafe { libc::removexattr(DEVICE.as_ptr(), ATTRIBUTE.as_ptr()) };
        let _ = fs::set_permissions("/dev/pinbuf", fs::Permissions::from_mode(self.mode));
    }
}

/// A program becomes another user. Where the kernel would not let it open the device, neither does the supervisor of a root
/// whose buffers are charged; and where it would, the program gets its buffer.
fn access_control_lists_are_the_kernels() -> Result<()> {
    const UID: u32 = 1000;
    no_udmabuf()?;
    let device = fs::metadata("/dev/pinbuf")?;
    let _entries = Entries {
        mode: device.mode() & 0o7777,
    };
    let of = |user: (u16, u16, u32), group: u16, mask: u16, other: u16| {
        let mut all = vec![
            (USER_OBJ, 6, NONE),
            user,
            (GROUP_OBJ, group, NONE),
            (MASK, mask, NONE),
            (OTHER, other, NONE),
        ];
        all.sort_by_key(|entry| entry.0);
        all
    };
    let mut lets = 0;
    for (case, entries, gid) in [
        ("another user", of((USER, 6, 4242), 0, 6, 0), device.gid()),
        ("this user", of((USER, 6, UID), 0, 6, 0), UID),
        ("not this user", of((USER, 0, UID), 6, 6, 6), UID),
        ("reading only", of((USER, 6, UID), 6, 4, 6), UID),
        ("this group", of((GROUP, 6, UID), 0, 6, 0), UID),
        (
            "the file's group",
            of((GROUP, 0, UID), 6, 6, 0),
            device.gid(),
        ),
        ("all but a group", of((GROUP, 0, UID), 0, 6, 6), UID),
        ("a mask without bits", of((USER, 6, UID), 6, 0, 6), UID),
    ] {
        set_entries(&entries).context(case)?;
        let (user, group) = (format!("--reuid={UID}"), format!("--regid={gid}"));
        let become_user = ["setpriv", &user, &group, "--clear-groups", "--"];
        let open = ["busybox", "sh", "-c", "exec 3<>/dev/pinbuf"];
        let by_kernel = Start::program(&[&become_user[..], &open].concat()).end()?;
        let drop_right = [
            "setpriv",
            "--bounding-set=-ipc_lock",
            "--inh-caps=-ipc_lock",
            "--",
        ];
        let supervise = ["pinbuf", "run", "--by", "supervisor", "--"];
        let words = [&drop_right[..], &supervise, &become_user, &[CLIENT]].concat();
        let supervised = Start::program(&words).end()?;
        match by_kernel.status {
            Some(0) => {
                ensure!(supervised.out == MADE, "{case}: {supervised:?}");
                lets += 1;
            }
            _ => ensure!(
                supervised.status == Some(1) && supervised.err.contains("Permission denied"),
                "{case}: the kernel says {by_kernel:?}, the supervisor {supervised:?}"
            ),
        }
    }
    ensure!(lets == 4, "the kernel lets the user open it {lets} times");
    Ok(())
}

/// No process of its user may read the memory of a program that has forbidden that, so the supervisor does not know what it
/// opens.
fn process_that_is_not_dumpable_is_reported() -> Result<()> {
    no_udmabuf()?;
    let end = run(&["--by", "supervisor", "--", ODD, "hidden"]).end()?;
    ensure!(
        end.out == "ENOENT\n" && end.err.contains("its memory cannot be read"),
        "{end:?}"
    );
    Ok(())
}

/// A user may open the device by CAP_DAC_OVERRIDE alone. A program of its that gives that up may not, also where it makes a
/// namespace, in which it has all privileges.
fn privileges_in_a_namespace_of_its_own_are_no_rights() -> Result<()> {
    no_udmabuf()?;
    let give_up = ["setpriv", "--inh-caps=-dac_override", "--"];
    let namespace = ["unshare", "--user", "--keep-caps"];
    for (before, may_open) in [
        (&[][..], true),
        (&give_up, false),
        (&[&give_up[..], &namespace].concat(), false),
    ] {
        let supervise = ["pinbuf", "run", "--by", "supervisor", "--"];
        let words = [&supervise[..], before, &[CLIENT]].concat();
        let mut start = Start::program(&words)
            .memlock(DEBIAN_MEMLOCK << 4, DEBIAN_MEMLOCK << 4)
            .by_user(None);
        start.give("dac_override");
        let end = start.end()?;
        match may_open {
            true => ensure!(end.out == MADE, "{before:?}: {end:?}"),
            false => ensure!(
                end.status == Some(1) && end.err.contains("Permission denied"),
                "{before:?}: {end:?}"
            ),
        }
    }
    Ok(())
}
