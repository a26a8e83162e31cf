// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whom pages are charged to, how much a user may pin, and that it is given back.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI64, Ordering};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{unshare, CloneFlags};
use nix::sys::resource::{setrlimit, Resource, RLIM_INFINITY};
use nix::unistd::{setgroups, setresgid, setresuid, Gid, Uid};
use pinbuf_uapi::{CHARGE_ALLOWANCE, CHARGE_NONE, CHARGE_USER};

use pinbuf_test_harness::support::kernel::{HugePool, Setting};
use pinbuf_test_harness::support::memory::{HUGE, PAGE, RW};
use pinbuf_test_harness::support::process::{
    become_user, drop_ipc_lock, in_child, set_memlock, Child, End, Link, OTHER_USER, USER,
};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory};
use pinbuf_test_harness::tests;

/// An allowance of 256 pages: a mebibyte, or several.
const ALLOWANCE: usize = 256 * PAGE;

tests! { "memlock":
    limit,
    limit_zero,
    no_limit,
    limit_within_a_page,
    the_soft_limit_counts,
    users_have_limits_of_their_own,
    failures_charge_nothing,
    across_processes,
    given_back_at_exit,
    given_back_by_another_process,
    charged_to_who_calls,
    charged_to_who_called,
    charged_to_the_real_user,
    overlap_counts_twice,
    huge_pages_count_as_pages,
    root_without_capability,
    capability_lifts_it,
    capability_of_a_namespace_does_not,
    allowance,
    allowance_is_for_what_is_beyond,
    allowance_of_all_users,
    allowance_of_a_namespace,
    the_group_of_a_namespace_s_maker,
    desktop_framebuffer,
    largest_parameters,
    shown_as_vm_pin,
    never_over_the_limit within 120,
    threads_share_it,
    given_back_after_the_pages,
}

/// No allowance, so that the limit alone counts.
fn no_allowance() -> Result<Setting> {
    Setting::parameter("allowance_mb", 0)
}

/// The device, and memory of this number of pages; as a user with this limit.
fn user_with(uid: u32, limit: usize, pages: usize) -> Result<(Device, Memory)> {
    let device = Device::open()?;
    become_user(uid)?;
    set_memlock(limit * PAGE)?;
    Ok((device, Memory::anonymous(pages * PAGE)?))
}

/// Expects a buffer of this number of pages.
fn gets(device: &Device, memory: &Memory, pages: usize) -> Result<Buffer> {
    device
        .create(&[memory.part(0, pages * PAGE)])
        .with_context(|| format!("create with {pages} pages"))
}

/// Expects that this number of pages is too large, and that none of them stays in `VmPin`.
fn too_many(device: &Device, memory: &Memory, pages: usize, when: &str) -> Result<()> {
    let pinned = kernel::vm_pin()?;
    let error = device.create(&[memory.part(0, pages * PAGE)]).err();
    check_eq!(
        error,
        Some(Errno::ENOMEM),
        "create with {pages} pages {when}"
    );
    check_eq!(
        kernel::vm_pin()?,
        pinned,
        "VmPin after {pages} pages {when}"
    );
    Ok(())
}

/// A child that holds a buffer until it gets the message to end.
struct Holder {
    link: End,
    child: Child,
}

impl Holder {
    fn new(uid: u32, limit: usize, pages: usize) -> Result<Self> {
        let Link { ours, theirs } = Link::new()?;
        let child = Child::run(|| {
            let (device, memory) = user_with(uid, limit, pages)?;
            let buffer = gets(&device, &memory, pages)?;
            theirs.signal()?;
            theirs.wait()?;
            drop(buffer);
            Ok(())
        })?;
        // The child has the only copy then, so its end ends the wait.
        drop(theirs);
        match ours.wait() {
            Ok(()) => Ok(Self { link: ours, child }),
            Err(error) => {
                child.join()?;
                Err(error)
            }
        }
    }

    fn release(self) -> Result<()> {
        self.link.signal()?;
        self.child.join()
    }
}

fn limit() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 20)?;
        too_many(&device, &memory, 17, "of 16")?;
        let all = gets(&device, &memory, 16)?;
        check_eq!(
            device.describe(&all)?.charge,
            CHARGE_USER,
            "what is charged"
        );
        check_eq!(device.describe(&all)?.charged_pages, 16, "pages charged");
        too_many(&device, &memory, 1, "when all 16 are taken")?;
        drop(all);
        for _ in 0..3 {
            let half = gets(&device, &memory, 8)?;
            let rest = gets(&device, &memory, 8)?;
            too_many(&device, &memory, 1, "when two buffers have 8 each")?;
            drop(half);
            too_many(&device, &memory, 9, "when 8 are free")?;
            let again = gets(&device, &memory, 8)?;
            drop((rest, again));
        }
        // A mapping keeps the buffer, and so the charge.
        let mapped = gets(&device, &memory, 16)?.map()?;
        too_many(&device, &memory, 1, "when a mapping is left of 16")?;
        drop(mapped);
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })
}

/// Sets the soft `RLIMIT_MEMLOCK` and the hard one, in bytes.
fn set_soft_memlock(soft: usize, hard: usize) -> Result<()> {
    let (soft, hard) = (soft as u64, hard as u64);
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).context("setting RLIMIT_MEMLOCK")
}

/// A page of which only a part is within the limit is not within it.
fn limit_within_a_page() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 20)?;
        set_soft_memlock(3 * PAGE + 1, 16 * PAGE)?;
        too_many(&device, &memory, 4, "of 3 and a byte")?;
        gets(&device, &memory, 3)?;
        set_soft_memlock(4 * PAGE - 1, 16 * PAGE)?;
        too_many(&device, &memory, 4, "of 4 but for a byte")?;
        gets(&device, &memory, 3)?;
        Ok(())
    })
}

/// The hard limit is only what the soft one may be raised to.
fn the_soft_limit_counts() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 20)?;
        set_soft_memlock(4 * PAGE, 16 * PAGE)?;
        let limit = device.query()?.memlock_bytes;
        check_eq!(limit, 4 * PAGE as u64, "the limit that is reported");
        too_many(&device, &memory, 5, "of 4")?;
        gets(&device, &memory, 4)?;
        Ok(())
    })
}

/// One user's pins do not reduce the limit of another one.
fn users_have_limits_of_their_own() -> Result<()> {
    let _setting = no_allowance()?;
    let first = Holder::new(USER, 16, 16)?;
    let second = Holder::new(OTHER_USER, 16, 16).context("besides another user's")?;
    first.release()?;
    second.release()
}

fn limit_zero() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 0, 1)?;
        too_many(&device, &memory, 1, "of none")?;
        check_eq!(device.query()?.memlock_bytes, 0, "the reported limit");
        check_eq!(device.query()?.allowance_bytes, 0, "the reported allowance");
        Ok(())
    })
}

/// A user whose limit is none needs no allowance, however much it pins.
fn no_limit() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let device = Device::open()?;
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
            .context("RLIMIT_MEMLOCK")?;
        become_user(USER)?;
        check_eq!(
            device.query()?.memlock_bytes,
            u64::MAX,
            "the reported limit"
        );
        let memory = Memory::anonymous(600 * PAGE)?;
        let buffer = gets(&device, &memory, 600)?;
        let info = device.describe(&buffer)?;
        check_eq!(info.charge, CHARGE_USER, "what is charged");
        check_eq!(info.charged_pages, 600, "pages charged");
        // What is charged now counts once a limit is set.
        set_memlock(604 * PAGE)?;
        too_many(&device, &memory, 5, "of the 4 that are left")?;
        gets(&device, &memory, 4).map(drop)
    })
}

fn failures_charge_nothing() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 16)?;
        memory.unmap(15 * PAGE, PAGE)?;
        for _ in 0..50 {
            let error = device.create(&[memory.range()]).err();
            check_eq!(error, Some(Errno::EFAULT), "create with a hole at the end");
            let error = device.create(&[memory.part(0, 8 * PAGE); 3]).err();
            check_eq!(error, Some(Errno::ENOMEM), "create with 24 pages of 16");
        }
        memory.replace(15 * PAGE, PAGE)?;
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })
}

fn across_processes() -> Result<()> {
    let _setting = no_allowance()?;
    let first = Holder::new(USER, 16, 8)?;
    let second = Holder::new(USER, 16, 7)?;
    let one_is_left = |other| {
        in_child(|| {
            let (device, memory) = user_with(USER, 16, 17)?;
            too_many(&device, &memory, other, "in a third process")?;
            drop(gets(&device, &memory, other - 1)?);
            Ok(())
        })
    };
    one_is_left(2)?;
    // Each process is held to its own limit.
    in_child(|| {
        let (device, memory) = user_with(USER, 20, 20)?;
        too_many(&device, &memory, 6, "with a limit of 20")?;
        drop(gets(&device, &memory, 5)?);
        Ok(())
    })?;
    // Another user still has all of its limit.
    in_child(|| {
        let (device, memory) = user_with(OTHER_USER, 16, 16)?;
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })?;
    first.release()?;
    one_is_left(10)?;
    second.release()?;
    one_is_left(17)
}

fn given_back_at_exit() -> Result<()> {
    let _setting = no_allowance()?;
    for _ in 0..5 {
        let holder = Holder::new(USER, 16, 16)?;
        // Killed: it runs no code of its own any more.
        drop(holder);
    }
    Holder::new(USER, 16, 16)?.release()
}

/// The maker is charged until the last user, someone else, lets go.
fn given_back_by_another_process() -> Result<()> {
    let _setting = no_allowance()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let (device, memory) = user_with(USER, 16, 12)?;
        link.theirs.send(gets(&device, &memory, 12)?.as_fd())
    })?;
    let buffer = Buffer::from_fd(link.ours.receive()?);
    child.join()?;
    let free = |pages: usize| {
        in_child(|| {
            let (device, memory) = user_with(USER, 16, 17)?;
            too_many(
                &device,
                &memory,
                pages + 1,
                "while another process has the buffer",
            )?;
            drop(gets(&device, &memory, pages)?);
            Ok(())
        })
    };
    free(4)?;
    let mapped = buffer.map()?;
    drop(buffer);
    free(4)?;
    drop(mapped);
    free(16)
}

/// Not the user that opened the device is charged, but the caller.
fn charged_to_who_calls() -> Result<()> {
    let _setting = no_allowance()?;
    let device = Device::open()?;
    let buffer = Holder::new(USER, 16, 16)?;
    in_child(|| {
        become_user(USER)?;
        set_memlock(16 * PAGE)?;
        let memory = Memory::anonymous(PAGE)?;
        too_many(&device, &memory, 1, "through root's descriptor")
    })?;
    in_child(|| {
        become_user(OTHER_USER)?;
        set_memlock(16 * PAGE)?;
        let memory = Memory::anonymous(16 * PAGE)?;
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })?;
    buffer.release()
}

/// A process that changes its user meanwhile gives back to the user that was charged.
fn charged_to_who_called() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let device = Device::open()?;
        let memory = Memory::anonymous(16 * PAGE)?;
        let buffer = gets(&device, &memory, 16)?;
        become_user(USER)?;
        drop(buffer);
        set_memlock(16 * PAGE)?;
        // If it had been given back to this user, more than 16 would be possible, or fewer.
        let all = gets(&device, &memory, 16)?;
        too_many(&device, &memory, 1, "after the change of user")?;
        drop(all);
        Ok(())
    })
}

/// A process whose effective user is another one, as of a set-user-ID file: the user that started it pays, under the
/// limit and beyond it.
fn charged_to_the_real_user() -> Result<()> {
    let setting = no_allowance()?;
    let of_both = |limit: usize, pages: usize| -> Result<(Child, Link)> {
        let link = Link::new()?;
        let child = Child::run(|| {
            let device = Device::open()?;
            setgroups(&[]).context("setgroups")?;
            let (real, effective) = (Uid::from_raw(USER), Uid::from_raw(OTHER_USER));
            setresuid(real, effective, effective).context("setresuid")?;
            set_memlock(limit * PAGE)?;
            let memory = Memory::anonymous(pages * PAGE)?;
            let buffer = gets(&device, &memory, pages)?;
            link.theirs.signal()?;
            link.theirs.wait()?;
            drop(buffer);
            Ok(())
        })?;
        match link.ours.wait() {
            Ok(()) => Ok((child, link)),
            Err(error) => {
                child.join()?;
                Err(error)
            }
        }
    };
    let (child, link) = of_both(16, 16)?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 1)?;
        too_many(&device, &memory, 1, "when the real user's limit is taken")
    })?;
    in_child(|| {
        let (device, memory) = user_with(OTHER_USER, 16, 16)?;
        gets(&device, &memory, 16).map(drop)
    })?;
    link.ours.signal()?;
    child.join()?;
    drop(setting);

    let (child, link) = of_both(0, 16)?;
    for (uid, used) in [(USER, 16 * PAGE), (OTHER_USER, 0)] {
        in_child(|| {
            let (device, _) = user_with(uid, 0, 1)?;
            check_eq!(device.query()?.allowance_used, used as u64, "of user {uid}");
            Ok(())
        })?;
    }
    link.ours.signal()?;
    child.join()
}

fn overlap_counts_twice() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 8)?;
        let buffer = device.create(&[memory.range(), memory.range()])?;
        check_eq!(device.describe(&buffer)?.charged_pages, 16, "pages charged");
        too_many(&device, &memory, 1, "when the same 8 are pinned twice")?;
        drop(buffer);
        let error = device.create(&[memory.range(); 3]).err();
        check_eq!(error, Some(Errno::ENOMEM), "the same 8 three times");
        Ok(())
    })
}

/// The pages that were named are charged, not the huge pages that they lie in.
fn huge_pages_count_as_pages() -> Result<()> {
    let _pool = HugePool::with_free(2)?;
    let _setting = no_allowance()?;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(2 * HUGE, RW, flags, None, 0)?;
    in_child(|| {
        let device = Device::open()?;
        become_user(USER)?;
        set_memlock(16 * PAGE)?;
        let buffer = device.create(&[memory.part(505 * PAGE, 16 * PAGE)])?;
        check_eq!(device.describe(&buffer)?.charged_pages, 16, "pages charged");
        drop(buffer);
        let error = device.create(&[memory.part(505 * PAGE, 17 * PAGE)]).err();
        check_eq!(error, Some(Errno::ENOMEM), "17 pages of 16");
        Ok(())
    })
}

/// Root is a user like any other without the capability.
fn root_without_capability() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let device = Device::open()?;
        drop_ipc_lock()?;
        set_memlock(16 * PAGE)?;
        let memory = Memory::anonymous(17 * PAGE)?;
        too_many(&device, &memory, 17, "as root without CAP_IPC_LOCK")?;
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })
}

fn capability_lifts_it() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let device = Device::open()?;
        set_memlock(16 * PAGE)?;
        check_eq!(
            device.query()?.memlock_bytes,
            u64::MAX,
            "the reported limit"
        );
        let memory = Memory::anonymous(1000 * PAGE)?;
        // Also what would be within the limit.
        let small = gets(&device, &memory, 10)?;
        let info = device.describe(&small)?;
        check_eq!(info.charge, CHARGE_NONE, "what 10 of 16 are charged to");
        check_eq!(info.charged_pages, 10, "pages of 10");
        let large = gets(&device, &memory, 1000)?;
        let info = device.describe(&large)?;
        check_eq!(info.charge, CHARGE_NONE, "what 1000 of 16 are charged to");
        check_eq!(kernel::vm_pin()?, 1010 * PAGE as i64, "VmPin");
        // They do not reduce the limit of the user's processes that lack the capability.
        in_child(|| {
            drop_ipc_lock()?;
            too_many(&device, &memory, 17, "when all 16 are left")?;
            drop(gets(&device, &memory, 16)?);
            Ok(())
        })
    })
}

/// Every user has all capabilities in a user namespace of its own.
fn capability_of_a_namespace_does_not() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 4, 8)?;
        unshare(CloneFlags::CLONE_NEWUSER)
            .context("making a user namespace (kernel.unprivileged_userns_clone=0?)")?;
        check!(
            caps::has_cap(
                None,
                caps::CapSet::Effective,
                caps::Capability::CAP_IPC_LOCK
            )?,
            "no CAP_IPC_LOCK in the new namespace"
        );
        too_many(&device, &memory, 5, "in a user namespace")?;
        check_eq!(
            device.query()?.memlock_bytes,
            4 * PAGE as u64,
            "the reported limit"
        );
        drop(gets(&device, &memory, 4)?);
        Ok(())
    })
}

fn allowance() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    in_child(|| {
        let (device, memory) = user_with(USER, 0, 300)?;
        let query = device.query()?;
        check_eq!(
            query.allowance_bytes,
            ALLOWANCE as u64,
            "the reported allowance"
        );
        check_eq!(query.allowance_used, 0, "the allowance used");
        too_many(&device, &memory, 257, "of an allowance of 256")?;
        let first = gets(&device, &memory, 200)?;
        check_eq!(
            device.describe(&first)?.charge,
            CHARGE_ALLOWANCE,
            "what is charged"
        );
        check_eq!(
            device.query()?.allowance_used,
            200 * PAGE as u64,
            "the allowance used"
        );
        too_many(&device, &memory, 57, "when 56 are left")?;
        let second = gets(&device, &memory, 56)?;
        check_eq!(
            device.query()?.allowance_used,
            ALLOWANCE as u64,
            "the allowance used by two"
        );
        drop(first);
        check_eq!(
            device.query()?.allowance_used,
            56 * PAGE as u64,
            "the allowance used by one"
        );
        drop(second);
        check_eq!(
            device.query()?.allowance_used,
            0,
            "the allowance used at the end"
        );
        Ok(())
    })
}

/// The limit is used first; the allowance is charged for what does not fit into it.
fn allowance_is_for_what_is_beyond() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 300)?;
        let small = gets(&device, &memory, 16)?;
        check_eq!(
            device.describe(&small)?.charge,
            CHARGE_USER,
            "what 16 of 16 are charged to"
        );
        check_eq!(device.query()?.allowance_used, 0, "the allowance used");
        let more = gets(&device, &memory, 10)?;
        check_eq!(
            device.describe(&more)?.charge,
            CHARGE_ALLOWANCE,
            "what 10 more are charged to"
        );
        check_eq!(
            device.query()?.allowance_used,
            10 * PAGE as u64,
            "the allowance used"
        );
        drop(small);
        let small = gets(&device, &memory, 16)?;
        check_eq!(
            device.describe(&small)?.charge,
            CHARGE_USER,
            "what 16 are charged to again"
        );
        Ok(())
    })?;
    // The allowance belongs to the user, not to a process.
    let holder = Holder::new(USER, 0, 200)?;
    in_child(|| {
        let (device, memory) = user_with(USER, 0, 100)?;
        check_eq!(
            device.query()?.allowance_used,
            200 * PAGE as u64,
            "used by another process"
        );
        too_many(&device, &memory, 57, "when another process has 200 of 256")?;
        drop(gets(&device, &memory, 56)?);
        Ok(())
    })?;
    holder.release()
}

fn allowance_of_all_users() -> Result<()> {
    let _one = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    let _all = Setting::parameter("allowance_system_mb", ALLOWANCE >> 20)?;
    let holder = Holder::new(USER, 0, 200)?;
    in_child(|| {
        let (device, memory) = user_with(OTHER_USER, 0, 100)?;
        let query = device.query()?;
        check_eq!(
            query.allowance_system,
            ALLOWANCE as u64,
            "the reported allowance of all users"
        );
        check_eq!(query.allowance_used, 0, "used by this user");
        too_many(&device, &memory, 57, "when another user has 200 of all 256")?;
        let rest = gets(&device, &memory, 56)?;
        too_many(&device, &memory, 1, "when two users have all")?;
        drop(rest);
        // What stays within a user's own limit needs no allowance.
        set_memlock(0)?;
        Ok(())
    })?;
    in_child(|| {
        let (device, memory) = user_with(OTHER_USER, 100, 100)?;
        drop(gets(&device, &memory, 100)?);
        Ok(())
    })?;
    holder.release()?;
    in_child(|| {
        let (device, memory) = user_with(OTHER_USER, 0, 256)?;
        drop(gets(&device, &memory, 256)?);
        Ok(())
    })
}

/// A user namespace brings users of its own, but no allowances: its maker's is used.
fn allowance_of_a_namespace() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let (device, memory) = user_with(USER, 0, 256)?;
        unshare(CloneFlags::CLONE_NEWUSER).context("making a user namespace")?;
        link.theirs.signal()?;
        link.theirs.wait()?;
        // User 1 of the namespace is another user outside of it.
        become_user(1)?;
        let buffer = gets(&device, &memory, 200)?;
        check_eq!(
            device.describe(&buffer)?.charge,
            CHARGE_ALLOWANCE,
            "what is charged"
        );
        let used = device.query()?.allowance_used;
        check_eq!(
            used,
            200 * PAGE as u64,
            "the allowance used, as reported inside"
        );
        too_many(&device, &memory, 57, "when 56 are left")?;
        link.theirs.signal()?;
        link.theirs.wait()?;
        drop(buffer);
        Ok(())
    })?;
    let said =
        |result: Result<()>| -> Result<()> { result.context("the child failed, or is slow") };
    said(link.ours.wait())?;
    let proc = format!("/proc/{}", child.pid());
    kernel::write(
        format!("{proc}/uid_map"),
        format!("0 {USER} 1\n1 {OTHER_USER} 1"),
    )?;
    kernel::write(
        format!("{proc}/gid_map"),
        format!("0 {USER} 1\n1 {OTHER_USER} 1"),
    )?;
    link.ours.signal()?;
    if link.ours.wait().is_err() {
        return child.join();
    }
    let used_by = |uid| {
        let answer = Memory::map(PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?;
        in_child(|| {
            let (device, _) = user_with(uid, 0, 1)?;
            answer.set(0, device.query()?.allowance_used);
            Ok(())
        })?;
        anyhow::Ok(answer.get(0))
    };
    check_eq!(
        used_by(USER)?,
        200 * PAGE as u64,
        "used by the namespace's maker"
    );
    check_eq!(used_by(OTHER_USER)?, 0, "used by the host user behind it");
    link.ours.signal()?;
    child.join()
}

/// A namespace stands for the user that made it, and not for the one whose number the maker's group has.
fn the_group_of_a_namespace_s_maker() -> Result<()> {
    let _setting = Setting::parameter("allowance_mb", ALLOWANCE >> 20)?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        let (user, group) = (Uid::from_raw(USER), Gid::from_raw(OTHER_USER));
        setgroups(&[]).context("setgroups")?;
        setresgid(group, group, group).context("setresgid")?;
        setresuid(user, user, user).context("setresuid")?;
        set_memlock(0)?;
        unshare(CloneFlags::CLONE_NEWUSER).context("making a user namespace")?;
        let memory = Memory::anonymous(100 * PAGE)?;
        let buffer = gets(&device, &memory, 100)?;
        link.theirs.signal()?;
        link.theirs.wait()?;
        drop(buffer);
        Ok(())
    })?;
    if link.ours.wait().is_err() {
        return child.join();
    }
    for (uid, used) in [(USER, 100 * PAGE), (OTHER_USER, 0)] {
        in_child(|| {
            let (device, _) = user_with(uid, 0, 1)?;
            check_eq!(device.query()?.allowance_used, used as u64, "of user {uid}");
            Ok(())
        })?;
    }
    link.ours.signal()?;
    child.join()
}

/// With Debian's default limit of 8 MiB and the module's own defaults, a 4K framebuffer is
/// possible, twice.
fn desktop_framebuffer() -> Result<()> {
    in_child(|| {
        let pages = (3840 * 2160 * 4usize).div_ceil(PAGE);
        let (device, memory) = user_with(USER, (8 << 20) / PAGE, pages)?;
        let front = gets(&device, &memory, pages)?;
        let back = gets(&device, &memory, pages)?;
        front.map()?.set(pages * PAGE - 8, 17);
        check_eq!(back.map()?.get(pages * PAGE - 8), 17, "the last pixels");
        check_eq!(
            device.query()?.allowance_used,
            2 * (pages * PAGE) as u64,
            "the allowance used by two framebuffers"
        );
        Ok(())
    })
}

/// The module's parameters take any number of 32 bits.
fn largest_parameters() -> Result<()> {
    let names = ["allowance_mb", "allowance_system_mb", "pin_retries"];
    let settings = names.map(|name| Setting::parameter(name, u32::MAX));
    let _settings = settings.into_iter().collect::<Result<Vec<_>>>()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 0, 16)?;
        let query = device.query()?;
        let most = u64::from(u32::MAX) << 20;
        check_eq!(query.allowance_bytes, most, "the allowance");
        check_eq!(query.allowance_system, most, "the allowance of all users");
        let buffer = gets(&device, &memory, 16)?;
        check_eq!(
            device.describe(&buffer)?.charge,
            CHARGE_ALLOWANCE,
            "charged to"
        );
        Ok(())
    })
}

fn shown_as_vm_pin() -> Result<()> {
    let device = Device::open()?;
    let memory = Memory::anonymous(33 * PAGE)?;
    check_eq!(kernel::vm_pin()?, 0, "VmPin before");
    let first = gets(&device, &memory, 33)?;
    let second = gets(&device, &memory, 7)?;
    check_eq!(
        kernel::vm_pin()?,
        40 * PAGE as i64,
        "VmPin with two buffers"
    );
    drop(first);
    check_eq!(kernel::vm_pin()?, 7 * PAGE as i64, "VmPin with one");
    in_child(|| {
        check_eq!(
            kernel::vm_pin()?,
            0,
            "VmPin in a child, which pinned nothing"
        );
        Ok(())
    })?;
    drop(second);
    check_eq!(kernel::vm_pin()?, 0, "VmPin after");
    Ok(())
}

/// Several processes of a user try to get as much as possible, and together never have more.
fn never_over_the_limit() -> Result<()> {
    const LIMIT: usize = 16;
    const SHARE: i64 = 50;
    let _setting = no_allowance()?;
    let shared = Memory::map(PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0)?;
    let counters = |index: usize| {
        let word = shared.at(index * 8).cast::<AtomicI64>();
        // SAFETY: aligned, inside of the mapping, and reached as an atomic only.
        unsafe { &*word }
    };
    let (held, most, made) = (counters(0), counters(1), counters(2));
    let children: Vec<Child> = (0..4usize)
        .map(|index| {
            Child::run(|| {
                let (device, memory) = user_with(USER, LIMIT, LIMIT)?;
                // Until each has had its share, whatever the scheduler does: the harness bounds the time.
                let (mut round, mut mine) = (0, 0);
                while mine < SHARE {
                    let pages = 1 + (round * 7 + index * 5) % LIMIT;
                    round += 1;
                    match device.create(&[memory.part(0, pages * PAGE)]) {
                        Ok(buffer) => {
                            let pages = pages as i64;
                            let now = held.fetch_add(pages, Ordering::SeqCst) + pages;
                            most.fetch_max(now, Ordering::SeqCst);
                            made.fetch_add(1, Ordering::SeqCst);
                            mine += 1;
                            std::thread::yield_now();
                            held.fetch_sub(pages, Ordering::SeqCst);
                            drop(buffer);
                        }
                        Err(error) => check_eq!(error, Errno::ENOMEM, "create"),
                    }
                }
                Ok(())
            })
        })
        .collect::<Result<_>>()?;
    for child in children {
        child.join()?;
    }
    let (most, made) = (most.load(Ordering::SeqCst), made.load(Ordering::SeqCst));
    check!(
        most <= LIMIT as i64,
        "{most} pages were pinned at once, of {LIMIT}"
    );
    check_eq!(made, 4 * SHARE, "buffers that were made");
    Holder::new(USER, LIMIT, LIMIT)?.release()
}

fn threads_share_it() -> Result<()> {
    let _setting = no_allowance()?;
    in_child(|| {
        let (device, memory) = user_with(USER, 16, 16)?;
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        for _ in 0..100 {
                            // Four of four pages always fit.
                            drop(gets(&device, &memory, 4)?);
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a thread panicked"))
                .collect()
        });
        results.into_iter().collect::<Result<()>>()?;
        drop(gets(&device, &memory, 16)?);
        Ok(())
    })
}

/// The pages of a buffer are given back before its charge is, or a user would have more in place than its limit: when a
/// create gets the charge of a buffer that is being closed, none of that buffer's pages is pinned any more.
fn given_back_after_the_pages() -> Result<()> {
    const ROUNDS: usize = 3;
    // Enough for their release to take a while.
    let pages = if kernel::has_checkers() {
        8 << 10
    } else {
        64 << 10
    };
    let _setting = no_allowance()?;
    let before = kernel::pins()?;
    let link = Link::new()?;
    let child = Child::run(|| {
        let device = Device::open()?;
        // More than the hard limit that the test has inherited.
        set_memlock(pages * PAGE)?;
        become_user(USER)?;
        let memory = Memory::small_pages(pages * PAGE)?;
        let last = Memory::anonymous(PAGE)?;
        for _ in 0..ROUNDS {
            let buffer = device.create(&[memory.range()])?;
            let begun = AtomicI64::new(0);
            std::thread::scope(|scope| -> Result<()> {
                let taken = scope.spawn(|| -> Result<()> {
                    begun.store(1, Ordering::Release);
                    loop {
                        match device.create(&[last.range()]) {
                            Ok(_one) => {
                                link.theirs.signal()?;
                                return link.theirs.wait();
                            }
                            Err(Errno::ENOMEM) => {}
                            Err(error) => return Err(error).context("create"),
                        }
                    }
                });
                while begun.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
                drop(buffer);
                taken.join().map_err(|_| anyhow::anyhow!("the thread"))?
            })?;
        }
        Ok(())
    })?;
    let mut most = 0;
    for _ in 0..ROUNDS {
        if let Err(error) = link.ours.wait() {
            child.join()?;
            return Err(error);
        }
        most = most.max(kernel::pins()? - before);
        link.ours.signal()?;
    }
    child.join()?;
    check_eq!(most, 1, "pages that were pinned when the charge was free");
    Ok(())
}
