// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes that are killed.

use std::convert::Infallible;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sched::{setns, unshare, CloneFlags};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{kill, killpg, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{getppid, pause, setgroups, setpgid, setresgid, setresuid, Gid, Pid, Uid};

use super::baseline::USERS;
use super::requests::{Progress, Request, Work, REQUESTS};
use pinbuf_test_harness::accounts::Accounts;
use pinbuf_test_harness::support::kernel::{self, HugePool, Setting};
use pinbuf_test_harness::support::memory::PAGE;
use pinbuf_test_harness::support::process::{
    become_user, drop_ipc_lock, set_memlock, Child, End, Link, PATIENCE, USER,
};
use pinbuf_test_harness::support::{check, device, Device};

/// Users of a namespace: subordinate users of the host beside its owner, and the user nobody in it.
const LENT: u32 = 100_000;
const COUNT: u32 = 65_536;
const NOBODY: u32 = 65_534;
/// The first host user of a container.
const OTHERS: u32 = 300_000;

/// What all victims have.
pub struct Scene {
    /// The open device.
    pub device: Device,
    namespaces: Vec<Namespace>,
    /// The test's process receives descriptors at one end that victims send at the other.
    keeper: Link,
    _pool: HugePool,
    /// Victims without privileges need userfaultfd for faults of the kernel, and the devices.
    _faults: Setting,
    _devices: [OpenToAll; 2],
}

/// A device node that all users may open, until this is dropped.
struct OpenToAll(&'static str, Permissions);

impl OpenToAll {
    fn new(path: &'static str) -> Result<Self> {
        let before = fs::metadata(path).context(path)?.permissions();
        fs::set_permissions(path, Permissions::from_mode(0o666)).context(path)?;
        Ok(Self(path, before))
    }
}

impl Drop for OpenToAll {
    fn drop(&mut self) {
        if let Err(error) = fs::set_permissions(self.0, self.1.clone()) {
            eprintln!("{}: {error}", self.0);
        }
    }
}

/// A user namespace, kept by its process.
struct Namespace {
    file: File,
    child: Child,
    link: End,
}

impl Namespace {
    /// Makes one, once: joining it takes much less time.
    fn new(owner: u32, map: &str) -> Result<Self> {
        let Link { ours, theirs } = Link::new()?;
        let child = Child::run(|| {
            if owner != 0 {
                become_user(owner)?;
            }
            unshare(CloneFlags::CLONE_NEWUSER).context("making a user namespace")?;
            theirs.signal()?;
            theirs.wait_for_ever()?;
            theirs.wait()
        })?;
        ours.wait()?;
        for kind in ["uid", "gid"] {
            kernel::write(format!("/proc/{}/{kind}_map", child.pid()), map)?;
        }
        let file = File::open(format!("/proc/{}/ns/user", child.pid()))?;
        Ok(Self {
            file,
            child,
            link: ours,
        })
    }

    fn join(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWUSER).context("joining a user namespace")?;
        setgroups(&[]).context("setgroups")?;
        let gid = Gid::from_raw(NOBODY);
        setresgid(gid, gid, gid).context("setresgid")?;
        let uid = Uid::from_raw(NOBODY);
        setresuid(uid, uid, uid).context("setresuid")
    }
}

impl Scene {
    /// Sets it up.
    pub fn new() -> Result<Self> {
        // Orphans of victims become children of this process, which waits for them.
        set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")?;
        let pool = HugePool::with_free(8)?;
        let keeper = Link::new()?;
        fcntl(keeper.ours.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl")?;
        let namespaces = vec![
            Namespace::new(USER, &format!("0 {USER} 1\n1 {LENT} {COUNT}"))?,
            Namespace::new(0, &format!("0 {OTHERS} {COUNT}"))?,
        ];
        Ok(Self {
            device: Device::open()?,
            namespaces,
            keeper,
            _pool: pool,
            _faults: Setting::set("/proc/sys/vm/unprivileged_userfaultfd", 1)?,
            _devices: [
                OpenToAll::new(device::PATH)?,
                OpenToAll::new(pinbuf_test_importer::PATH)?,
            ],
        })
    }

    /// The accounts of all users that victims run as. Charges of the first namespace count for its owner as
    /// well.
    pub fn accounts(&self) -> Result<Accounts<USERS>> {
        Ok(Accounts::of([USER, 0, LENT + NOBODY - 1, OTHERS + NOBODY]))
    }

    /// Passes a buffer to the test's process, which holds it whatever happens to the sender.
    pub fn send(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.keeper.theirs.send(fd)
    }

    /// Receives and closes what victims sent.
    pub fn take_what_was_sent(&self) -> Result<()> {
        loop {
            match self.keeper.ours.receive() {
                Ok(fd) => drop(fd),
                Err(error) => match error.downcast_ref() {
                    Some(Errno::EAGAIN) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes it down.
    pub fn end(self) -> Result<()> {
        for namespace in self.namespaces {
            namespace.link.signal()?;
            namespace.child.join()?;
        }
        Ok(())
    }
}

/// The credentials and limit of a victim, which decide what its pages are charged to.
#[derive(Clone, Copy, Debug)]
enum Caller {
    /// Root, which has no limit.
    Root,
    /// Root without `CAP_IPC_LOCK`: its limit, and its allowance beyond.
    Limited,
    /// A user with a limit that has room.
    User,
    /// A user with a limit of zero: the allowance.
    Poor,
    /// The user nobody of a namespace.
    Nobody(usize),
}

impl Caller {
    fn any(rng: &mut Rng) -> Self {
        match rng.u32(..8) {
            0 => Self::Root,
            1 => Self::Limited,
            2 | 3 => Self::User,
            4 | 5 => Self::Poor,
            _ => Self::Nobody(rng.usize(..2)),
        }
    }

    fn become_it(self, scene: &Scene) -> Result<()> {
        match self {
            Self::Root => Ok(()),
            Self::Limited => {
                set_memlock(2048 * PAGE)?;
                drop_ipc_lock()
            }
            Self::User => {
                set_memlock(64 << 20)?;
                become_user(USER)
            }
            Self::Poor => {
                set_memlock(0)?;
                become_user(USER)
            }
            Self::Nobody(namespace) => {
                // Small buffers are charged to the limit, large ones to the allowance.
                set_memlock(512 * PAGE)?;
                scene.namespaces[namespace].join()
            }
        }
    }
}

/// Where a victim does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A process.
    Process,
    /// Two processes of a process group, which is killed as a whole.
    Group,
    /// Several threads of a process.
    Threads,
    /// A process that shares the address space of another one, which is killed later.
    SharedMemory,
}

/// A process that does something until it is killed.
pub struct Victim {
    child: Child,
    place: Place,
    slot: usize,
    request: Request,
    /// The process that shares the child's memory.
    inner: Option<Pid>,
}

impl Victim {
    /// Starts one.
    pub fn start(scene: &Scene, progress: &Progress, slot: usize, rng: &mut Rng) -> Result<Self> {
        let request = REQUESTS[rng.usize(..REQUESTS.len())];
        let caller = Caller::any(rng);
        let place = match rng.u32(..8) {
            0..=3 => Place::Process,
            4 => Place::Group,
            5 | 6 => Place::Threads,
            _ if request.leaves_no_mapping() => Place::SharedMemory,
            _ => Place::Process,
        };
        // Some are killed before they are ready.
        let early = rng.u32(..10) == 0 && place != Place::SharedMemory;
        let work = Work {
            scene,
            progress,
            slot,
            request,
        };
        Self::begin(&work, caller, place, rng.u64(..), early)
    }

    /// Starts a process of root's that does this.
    pub fn alone(scene: &Scene, progress: &Progress, request: Request) -> Result<Self> {
        let work = Work {
            scene,
            progress,
            slot: 0,
            request,
        };
        Self::begin(&work, Caller::Root, Place::Process, 0, false)
    }

    fn begin(
        work: &Work<'_>,
        caller: Caller,
        place: Place,
        seed: u64,
        early: bool,
    ) -> Result<Self> {
        let request = work.request;
        work.progress.born(work.slot);
        let link = Link::new()?;
        let child = Child::run(|| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            caller.become_it(work.scene)?;
            // The kernel clears this when a process changes its user: so it comes after that.
            die_with_parent()?;
            let Err(error) = live(work, place, seed, &link.theirs);
            Err(error.context(format!("{request:?} as {caller:?} in {place:?}")))
        })?;
        // The child does the same: the order of the two does not matter.
        let _ = setpgid(child.pid(), child.pid());
        drop(link.theirs);
        let mut victim = Self {
            child,
            place,
            slot: work.slot,
            request,
            inner: None,
        };
        if early {
            return Ok(victim);
        }
        // With shared memory the process reports the pid of the other one too, in any order.
        let messages = if place == Place::SharedMemory { 2 } else { 1 };
        for _ in 0..messages {
            match link.ours.hear() {
                Ok(0) => {}
                Ok(number) => victim.inner = Some(Pid::from_raw(i32::try_from(number)?)),
                Err(_) => {
                    let (status, said) = victim.child.end(PATIENCE)?;
                    bail!("a victim ended before it was killed: {request:?}: {status:?} {said}");
                }
            }
        }
        Ok(victim)
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(self, scene: &Scene, progress: &Progress) -> Result<()> {
        let (pid, request) = (self.child.pid(), self.request);
        if let Some(inner) = self.inner {
            kill(inner, Signal::SIGKILL).context("killing one that shares its memory")?;
            self.memory_is_let_go(scene)?;
        }
        match self.place {
            Place::Group => killpg(pid, Signal::SIGKILL).context("killing a group")?,
            _ => self.child.kill(Signal::SIGKILL)?,
        }
        let ended = self.child.end(PATIENCE);
        let (status, said) =
            ended.with_context(|| format!("a victim cannot be killed: {request:?}"))?;
        check!(
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            "a victim ended by itself: {request:?}: {status:?} {said}"
        );
        // Its children are this process's now, and members of its group.
        while waitpid(Pid::from_raw(-pid.as_raw()), None).is_ok() {}
        progress.died(self.slot);
        Ok(())
    }

    /// The address space survives the process that pinned its pages, and VmPin must fall to zero after that
    /// process has ended.
    fn memory_is_let_go(&self, scene: &Scene) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let path = format!("/proc/{}/status", self.child.pid());
        loop {
            scene.take_what_was_sent()?;
            collect_sockets()?;
            let pinned = kernel::field(&path, "VmPin")?;
            if pinned == 0 {
                return Ok(());
            }
            check!(
                Instant::now() < deadline,
                "{:?}: {pinned} kB stay pinned in the memory of a process that was killed",
                self.request
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Works until the process is killed.
fn live(work: &Work<'_>, place: Place, seed: u64, link: &End) -> Result<Infallible> {
    let mut rng = Rng::with_seed(seed);
    match place {
        Place::Process => work.go_on(&mut rng, || link.signal()),
        Place::Group => {
            let mut other = rng.fork();
            let _child = Child::run(|| {
                let Err(error) = die_with_parent().and_then(|()| work.go_on(&mut other, || Ok(())));
                eprintln!("{error:#}");
                // The test sees how the leader of the group ends, and not how this one does.
                kill(getppid(), Signal::SIGABRT).context("ending the group")
            })?;
            work.go_on(&mut rng, || link.signal())
        }
        Place::Threads => std::thread::scope(|scope| {
            for _ in 0..2 {
                let mut rng = rng.fork();
                scope.spawn(move || {
                    let Err(error) = work.go_on(&mut rng, || Ok(()));
                    eprintln!("{error:#}");
                    // SAFETY: ends the process, whose other threads never do.
                    unsafe { libc::_exit(2) }
                });
            }
            work.go_on(&mut rng, || link.signal())
        }),
        Place::SharedMemory => share_memory(work, rng, link),
    }
}

/// Starts a process that shares the memory of this one, which then does nothing but wait: the other one may be
/// killed while it holds locks in this memory, the allocator's for instance.
fn share_memory(work: &Work<'_>, mut rng: Rng, link: &End) -> Result<Infallible> {
    let mut stack = vec![0_u8; 256 << 10];
    let top = stack.as_mut_ptr_range().end;
    let mut inner = Inner {
        work,
        rng: &mut rng,
        link,
    };
    // SAFETY: the stack is used by the new process alone; it and the argument live as long as this process
    // does, which never returns from here. The new process has no memory of its own, so no thread's either: this
    // one uses none from here on.
    let inner = unsafe {
        libc::clone(
            Inner::run,
            top.cast(),
            libc::CLONE_VM | libc::SIGCHLD,
            (&raw mut inner).cast(),
        )
    };
    let inner = Pid::from_raw(Errno::result(inner).context("a process that shares the memory")?);
    // A system call, on nothing that the other process may be using.
    link.say(u64::try_from(inner.as_raw())?)?;
    let _ = waitpid(inner, None);
    loop {
        pause();
    }
}

/// What a process does that shares another one's memory.
struct Inner<'a> {
    work: &'a Work<'a>,
    rng: &'a mut Rng,
    link: &'a End,
}

impl Inner<'_> {
    extern "C" fn run(this: *mut libc::c_void) -> i32 {
        // SAFETY: the argument of `clone`, which lives for ever, and is this process's alone.
        let Self { work, rng, link } = unsafe { &mut *this.cast::<Self>() };
        let Err(error) = die_with_parent().and_then(|()| work.go_on(rng, || link.signal()));
        eprintln!("{error:#}");
        // SAFETY: ends the process, and leaves its memory as it is.
        unsafe { libc::_exit(2) }
    }
}

/// Starts the kernel's garbage collection of sockets that are in flight in each other: closing any other
/// socket does so.
pub fn collect_sockets() -> Result<()> {
    Link::new().map(drop)
}

/// Has this process killed when its parent ends.
fn die_with_parent() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")
}
