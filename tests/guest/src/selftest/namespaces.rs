// SPDX-License-Identifier: MIT OR Apache-2.0

//! User namespaces: whatever belongs to one user of the host is bounded as a whole, however many users it
//! creates.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{unshare, CloneFlags};

use pinbuf_test_harness::support::kernel::Setting;
use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::process::{
    become_user, drop_ipc_lock, in_child, set_memlock, Child, End, Link, OTHER_USER, USER,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

tests! { "namespaces":
    subordinates_share_a_limit within 120,
    subordinates_share_an_allowance within 120,
    the_host_user_counts_too,
    nested_namespaces,
    released_in_any_order,
    containers_share_no_limit within 120,
    containers_share_no_allowance within 120,
    a_container_s_own_namespaces,
    a_container_with_the_host_s_users,
    a_container_without_root,
    namespaces_in_a_container_with_the_host_s_users,
}

/// The first subordinate user of a namespace's maker, and how many there are.
const LENT: u32 = 100_000;
pub(crate) const COUNT: u32 = 4000;

/// Pages that are within everybody's limit.
pub(crate) const LIMIT: usize = 16;

/// Lets another process continue once the users of its namespace are set.
fn lend_users(child: &Child, link: &End, map: &str) -> Result<()> {
    link.wait()?;
    for kind in ["uid", "gid"] {
        kernel::write(format!("/proc/{}/{kind}_map", child.pid()), map)?;
    }
    link.signal()
}

/// A process of a user's, which has a limit and gets a namespace with more users. In it the closure
/// runs, as the namespace's root, and can open the device no more.
pub(crate) fn in_namespace(
    limit: usize,
    action: impl FnOnce(&Device, &End) -> Result<()>,
) -> Result<(Child, End)> {
    let map = format!("0 {USER} 1\n1 {LENT} {COUNT}");
    in_namespace_of(USER, limit, &map, action)
}

/// The same in a namespace that root makes for others, as programs for containers do, with the
/// users from a number on.
fn in_container(
    first: u32,
    limit: usize,
    action: impl FnOnce(&Device, &End) -> Result<()>,
) -> Result<(Child, End)> {
    in_namespace_of(0, limit, &format!("0 {first} {COUNT}"), action)
}

fn in_namespace_of(
    owner: u32,
    limit: usize,
    map: &str,
    action: impl FnOnce(&Device, &End) -> Result<()>,
) -> Result<(Child, End)> {
    let Link { ours, theirs } = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        become_user(owner)?;
        set_memlock(limit * PAGE)?;
        unshare(CloneFlags::CLONE_NEWUSER).context("making a user namespace")?;
        theirs.signal()?;
        theirs.wait()?;
        action(&device, &theirs)
    })?;
    if let Err(error) = lend_users(&child, &ours, map) {
        child.join()?;
        return Err(error);
    }
    Ok((child, ours))
}

/// A process of a user that hands a buffer over and ends.
fn buffer_of(uid: u32, device: &Device, pages: usize) -> Result<Option<Buffer>> {
    let link = Link::new()?;
    let child = Child::run(|| {
        become_user(uid)?;
        let memory = Memory::anonymous(pages * PAGE)?;
        match device.create(&[memory.range()]) {
            Ok(buffer) => {
                link.theirs.say(1)?;
                link.theirs.send(buffer.as_fd())
            }
            Err(Errno::ENOMEM) => link.theirs.say(0),
            Err(error) => Err(error).context("create"),
        }
    })?;
    let fd: Option<OwnedFd> = match link.ours.hear() {
        Ok(0) => None,
        Ok(_) => Some(link.ours.receive()?),
        Err(error) => {
            child.join()?;
            return Err(error);
        }
    };
    child.join()?;
    Ok(fd.map(Buffer::from_fd))
}

/// Tries as each of the namespace's users, and returns how much each of them got.
fn buffers_of_all(device: &Device, users: u32, pages: usize) -> Result<Vec<Buffer>> {
    let mut buffers = Vec::new();
    for uid in 1..=users {
        buffers.extend(buffer_of(uid, device, pages)?);
    }
    Ok(buffers)
}

/// Expects that a host user can have this number of pages, and not one more.
fn host_user_gets(uid: u32, limit: usize, pages: usize) -> Result<()> {
    in_child(|| {
        let device = Device::open()?;
        become_user(uid)?;
        set_memlock(limit * PAGE)?;
        let memory = Memory::anonymous((pages + 1) * PAGE)?;
        let error = device.create(&[memory.range()]).err();
        check_eq!(error, Some(Errno::ENOMEM), "{} pages", pages + 1);
        if pages > 0 {
            let buffer = device.create(&[memory.part(0, pages * PAGE)]);
            drop(buffer.with_context(|| format!("{pages} pages"))?);
        }
        Ok(())
    })
}

fn subordinates_share_a_limit() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace(LIMIT, |device, link| {
        let buffers = buffers_of_all(device, 12, 3)?;
        link.say(buffers.len() as u64)?;
        link.wait()?;
        drop(buffers);
        // What one user gave back is available to another.
        let again = buffers_of_all(device, 5, LIMIT)?;
        check_eq!(again.len(), 1, "users that get all of it");
        Ok(())
    })?;
    let Ok(count) = link.hear() else {
        return child.join();
    };
    check_eq!(count, 5, "buffers of 3 pages each, of {LIMIT} pages");
    host_user_gets(USER, LIMIT, 1).context("the namespace's maker")?;
    host_user_gets(USER, LIMIT + 4, 5).context("its maker, with a larger limit")?;
    host_user_gets(OTHER_USER, LIMIT, LIMIT).context("another user")?;
    link.signal()?;
    child.join()?;
    host_user_gets(USER, LIMIT, LIMIT).context("at the end")
}

fn subordinates_share_an_allowance() -> Result<()> {
    const MIB: usize = (1 << 20) / PAGE;
    let _setting = Setting::parameter("allowance_mb", 1)?;
    let (child, _link) = in_namespace(0, |device, _| {
        let buffers = buffers_of_all(device, 16, 30)?;
        check_eq!(buffers.len(), MIB / 30, "buffers of 30 pages");
        let used = device.query()?.allowance_used as usize;
        check_eq!(used, MIB / 30 * 30 * PAGE, "the allowance used");
        drop(buffers);
        check_eq!(device.query()?.allowance_used, 0, "at the end");
        Ok(())
    })?;
    child.join()
}

/// What the namespace's maker has pinned itself is part of the same.
fn the_host_user_counts_too() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let link = Link::new()?;
    let holder = Child::run(|| {
        let device = Device::open()?;
        become_user(USER)?;
        set_memlock(LIMIT * PAGE)?;
        let memory = Memory::anonymous(10 * PAGE)?;
        let buffer = device.create(&[memory.range()])?;
        link.theirs.signal()?;
        link.theirs.wait()?;
        drop(buffer);
        Ok(())
    })?;
    if link.ours.wait().is_err() {
        return holder.join();
    }
    let (child, theirs) = in_namespace(LIMIT, |device, theirs| {
        let some = buffer_of(3, device, 5)?;
        check!(some.is_some(), "5 of 6 pages");
        check!(buffer_of(4, device, 2)?.is_none(), "2 of the last page");
        drop(some);
        theirs.signal()?;
        theirs.wait()?;
        check!(buffer_of(5, device, LIMIT)?.is_some(), "all pages");
        Ok(())
    })?;
    if theirs.wait().is_err() {
        return child.join();
    }
    link.ours.signal()?;
    holder.join()?;
    theirs.signal()?;
    child.join()
}

/// A user of the namespace makes one of its own.
fn nested_namespaces() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace(LIMIT, |device, link| {
        let inner = Link::new()?;
        let nested = Child::run(|| {
            become_user(7)?;
            unshare(CloneFlags::CLONE_NEWUSER).context("making a nested namespace")?;
            let memory = Memory::anonymous(12 * PAGE)?;
            let buffer = device.create(&[memory.range()]).context("nested")?;
            inner.theirs.signal()?;
            inner.theirs.wait()?;
            drop(buffer);
            Ok(())
        })?;
        if inner.ours.wait().is_err() {
            return nested.join();
        }
        check!(buffer_of(8, device, 5)?.is_none(), "5 pages besides 12");
        let four = buffer_of(9, device, 4)?;
        check!(four.is_some(), "4 pages besides 12");
        link.signal()?;
        link.wait()?;
        drop(four);
        inner.ours.signal()?;
        nested.join()
    })?;
    if link.wait().is_err() {
        return child.join();
    }
    host_user_gets(USER, LIMIT, 0).context("the outer namespace's maker")?;
    link.signal()?;
    child.join()?;
    host_user_gets(USER, LIMIT, LIMIT).context("at the end")
}

/// A buffer may outlive its user, the namespace, and all processes of these.
fn released_in_any_order() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace(LIMIT, |device, link| {
        for uid in [11, 12] {
            let buffer = buffer_of(uid, device, 6)?.context("6 pages")?;
            link.send(buffer.as_fd())?;
        }
        Ok(())
    })?;
    let received = || -> Result<[OwnedFd; 2]> { Ok([link.receive()?, link.receive()?]) };
    let Ok([first, second]) = received() else {
        return child.join();
    };
    child.join()?;
    host_user_gets(USER, LIMIT, 4).context("while both live")?;
    drop(first);
    host_user_gets(USER, LIMIT, 10).context("while one lives")?;
    drop(second);
    host_user_gets(USER, LIMIT, LIMIT).context("at the end")
}

/// The first user of a container, and of another one.
const CONTAINERS: [u32; 2] = [200_000, 300_000];

/// Users inside of a container share a limit. Another container has nothing to do with it, though
/// both belong to root; nor has root itself.
fn containers_share_no_limit() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let mut containers = Vec::new();
    for first in CONTAINERS {
        let (child, link) = in_container(first, LIMIT, |device, link| {
            let buffers = buffers_of_all(device, 12, 3)?;
            link.say(buffers.len() as u64)?;
            link.wait()?;
            drop(buffers);
            let again = buffers_of_all(device, 5, LIMIT)?;
            check_eq!(again.len(), 1, "users that get all of it");
            Ok(())
        })?;
        let Ok(count) = link.hear() else {
            return child.join();
        };
        check_eq!(count, 5, "buffers of 3 pages each, of {LIMIT} pages");
        containers.push((first, child, link));
    }
    host_user_gets(USER, LIMIT, LIMIT).context("a user")?;
    in_child(|| {
        let device = Device::open()?;
        drop_ipc_lock()?;
        set_memlock(LIMIT * PAGE)?;
        let memory = Memory::anonymous(LIMIT * PAGE)?;
        drop(device.create(&[memory.range()]).context("root")?);
        Ok(())
    })?;
    for (first, child, link) in containers {
        host_user_gets(first, LIMIT, 1).context("the container's root, outside")?;
        link.signal()?;
        child.join()?;
        host_user_gets(first, LIMIT, LIMIT).context("the container's root, at the end")?;
    }
    Ok(())
}

fn containers_share_no_allowance() -> Result<()> {
    const MIB: usize = (1 << 20) / PAGE;
    let _setting = Setting::parameter("allowance_mb", 1)?;
    let mut containers = Vec::new();
    for first in CONTAINERS {
        let (child, link) = in_container(first, 0, |device, link| {
            let buffers = buffers_of_all(device, 16, 30)?;
            check_eq!(buffers.len(), MIB / 30, "buffers of 30 pages");
            let used = device.query()?.allowance_used as usize;
            check_eq!(used, MIB / 30 * 30 * PAGE, "the allowance used");
            link.signal()?;
            link.wait()?;
            let used = device.query()?.allowance_used as usize;
            check_eq!(used, MIB / 30 * 30 * PAGE, "the allowance used later");
            drop(buffers);
            check_eq!(device.query()?.allowance_used, 0, "at the end");
            Ok(())
        })?;
        if link.wait().is_err() {
            return child.join();
        }
        containers.push((child, link));
    }
    for (child, link) in containers {
        link.signal()?;
        child.join()?;
    }
    Ok(())
}

/// What a user of a container makes belongs to the container.
fn a_container_s_own_namespaces() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, _link) = in_container(CONTAINERS[0], LIMIT, |device, _| {
        for uid in [0, 7] {
            let inner = Link::new()?;
            let nested = Child::run(|| {
                become_user(uid)?;
                unshare(CloneFlags::CLONE_NEWUSER).context("making a nested namespace")?;
                let memory = Memory::anonymous(12 * PAGE)?;
                let buffer = device.create(&[memory.range()]).context("nested")?;
                inner.theirs.signal()?;
                inner.theirs.wait()?;
                drop(buffer);
                Ok(())
            })?;
            if inner.ours.wait().is_err() {
                return nested.join();
            }
            for other in [0, 8] {
                check!(
                    buffer_of(other, device, 5)?.is_none(),
                    "user {other} has 5 pages besides 12"
                );
                check!(
                    buffer_of(other, device, 4)?.is_some(),
                    "user {other} has no 4 pages besides 12"
                );
            }
            inner.ours.signal()?;
            nested.join()?;
        }
        Ok(())
    })?;
    child.join()
}

/// A container whose users are the host's under the same numbers: each counts as itself.
fn a_container_with_the_host_s_users() -> Result<()> {
    counts_each_as_itself("0 0 100000")
}

/// The same without root, so that nobody stands for all of them.
fn a_container_without_root() -> Result<()> {
    counts_each_as_itself("1 1 100000")
}

fn counts_each_as_itself(users: &str) -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace_of(0, LIMIT, users, |device, link| {
        let some = buffer_of(USER, device, 10)?.context("10 pages of a user")?;
        let others = buffer_of(OTHER_USER, device, LIMIT)?.context("another user's")?;
        link.signal()?;
        link.wait()?;
        drop((some, others));
        Ok(())
    })?;
    if link.wait().is_err() {
        return child.join();
    }
    host_user_gets(USER, LIMIT, 6).context("the same user outside")?;
    host_user_gets(OTHER_USER, LIMIT, 0).context("the other user outside")?;
    link.signal()?;
    child.join()?;
    host_user_gets(USER, LIMIT, LIMIT).context("at the end")
}

/// A user of a container whose users are the host's makes a namespace with more users: these count as
/// the user, and not each as itself.
fn namespaces_in_a_container_with_the_host_s_users() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", 0)?;
    let (child, link) = in_namespace_of(0, LIMIT, "0 0 200000", |device, link| {
        let Link { ours, theirs } = Link::new()?;
        let nested = Child::run(|| {
            become_user(USER)?;
            unshare(CloneFlags::CLONE_NEWUSER).context("making a nested namespace")?;
            theirs.signal()?;
            theirs.wait()?;
            let buffers = buffers_of_all(device, 12, 3)?;
            theirs.say(buffers.len() as u64)?;
            theirs.wait()
        })?;
        let map = format!("0 {USER} 1\n1 {LENT} {COUNT}");
        if let Err(error) = lend_users(&nested, &ours, &map) {
            nested.join()?;
            return Err(error);
        }
        let Ok(count) = ours.hear() else {
            return nested.join();
        };
        check_eq!(count, 5, "buffers of 3 pages each, of {LIMIT} pages");
        check!(buffer_of(USER, device, 2)?.is_none(), "2 of the last page");
        check!(
            buffer_of(OTHER_USER, device, LIMIT)?.is_some(),
            "another user of the container"
        );
        link.signal()?;
        link.wait()?;
        ours.signal()?;
        nested.join()
    })?;
    if link.wait().is_err() {
        return child.join();
    }
    host_user_gets(USER, LIMIT, 1).context("the same user outside")?;
    link.signal()?;
    child.join()?;
    host_user_gets(USER, LIMIT, LIMIT).context("at the end")
}
