// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answering calls: what is not for udmabuf is the kernel's, a request for a buffer is answered as udmabuf would.

use std::collections::HashMap;
use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{bail, Context};
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::sys::sysinfo::sysinfo;
use nix::unistd::Pid;
use pinbuf::Device;
use pinbuf_udmabuf::call::{as_udmabuf, each_part, flags_of, Call as DriversCall, TRIES};
use pinbuf_udmabuf::plan::Plan;
use pinbuf_udmabuf::request::{self, MAX_ITEMS};
use pinbuf_udmabuf::spans::Spans;
use pinbuf_udmabuf::sys;
use pinbuf_udmabuf::window::Window;

use super::filter::{self, Opening};
use super::late::{self, Guard};
use super::listener::{Answer, Call, Listener};
use super::log::Lines;
use super::target::Target;
use crate::access::{number_of, Credentials, Node};
use crate::process::character_device;
use crate::text::complain;

const UDMABUF: &[u8] = b"/dev/udmabuf\0";
/// [`Device::PATH`].
const PINBUF: &CStr = c"/dev/pinbuf";

/// The number of items from which on lists are answered one after the other: the longest take 100 MB each meanwhile.
const LONG: u32 = 10_000;

/// Answers the calls of a tree of processes.
pub struct Answers {
    /// pinbuf's device, open.
    device: Device,
    /// Its number, which is nobody else's while it is open.
    number: u64,
    /// Nothing that we make is charged, so it is not made for processes without that privilege.
    unlimited: bool,
    log: Lines,
    /// It was reported that a process cannot be served.
    complained: AtomicBool,
    /// It was reported that a process cannot be looked into when it opens something.
    hidden: AtomicBool,
    /// The right to answer a request with a list of more than [`LONG`] items.
    long: Mutex<()>,
}

/// What is not answered by an error: the thread was killed.
struct Gone;

impl Answers {
    /// Answers calls with this device.
    pub fn new(device: Device, log: Lines) -> anyhow::Result<Self> {
        // What is read of processes by their numbers would be of other ones.
        let ours = std::fs::read_link("/proc/self").context("/proc/self")?;
        if ours != Path::new(&std::process::id().to_string()) {
            bail!(
                "/proc belongs to another PID namespace: mount it again (`unshare --mount-proc`)"
            );
        }
        let unlimited = Credentials::of("self")?.locks_memory;
        let number = fstat(&device)?.st_rdev;
        Ok(Self {
            device,
            number,
            unlimited,
            log,
            complained: AtomicBool::new(false),
            hidden: AtomicBool::new(false),
            long: Mutex::new(()),
        })
    }

    /// Answers a call.
    pub fn answer(&self, call: &Call, listener: &Listener) {
        let answer = match filter::opening(&call.data) {
            Some(opening) => self.open(call, listener, opening),
            None => self.request(call, listener),
        };
        let Ok((answer, report)) = answer else {
            return;
        };
        // Before the program goes on, which may end at once, and the supervisor with it.
        let tell = |outcome: nix::Result<i32>| {
            if let Some(report) = &report {
                self.log.line(&match outcome {
                    Ok(fd) => report.made(fd),
                    Err(error) => report.failed(error),
                });
            }
        };
        if let Answer::Error(error) = &answer {
            tell(Err(*error));
        }
        let sent = listener.answer(call, &answer, |fd| tell(Ok(fd)));
        // The program's own descriptors are used up, or a security module refuses it the buffer. (Nobody waits for this answer
        // if the thread was killed.)
        if let Err(error) = sent {
            if matches!(answer, Answer::Descriptor { .. }) {
                tell(Err(error));
            }
            let _ = listener.answer(call, &Answer::Error(error), drop);
        }
    }

    /// A call that opens something: udmabuf's device is pinbuf's.
    ///
    /// Only a name that is exactly this is looked at, and every other call is the kernel's, with whatever the program
    /// has in its memory then: nothing is kept from it.
    fn open(
        &self,
        call: &Call,
        listener: &Listener,
        opening: Opening,
    ) -> Result<(Answer, Option<Report>), Gone> {
        const KERNELS: (Answer, Option<Report>) = (Answer::TheKernels, None);
        let [first, second, third, fourth, ..] = call.data.args;
        let path = match opening {
            Opening::Open | Opening::Creat => first,
            Opening::Openat | Opening::Openat2 => second,
        };
        let mut name = [0; UDMABUF.len()];
        let target = match self.target(call, listener)? {
            Ok(target) => target,
            Err(error) => {
                // For a name no descriptor is needed.
                let read = Target::read_of(Pid::from_raw(call.pid as i32), path, &mut name);
                let is_device = read.is_ok() && name == UDMABUF && listener.is_waiting(call);
                return Ok(match is_device && is_shortage(error) {
                    true => (Answer::Error(error), None),
                    false => KERNELS,
                });
            }
        };
        match target.read(path, &mut name) {
            Ok(()) if name == UDMABUF => {}
            Err(Errno::EPERM) if listener.is_waiting(call) => {
                // Most of these processes open something else.
                if !self.hidden.swap(true, Ordering::Relaxed) {
                    complain!(
                        "what process {} opens cannot be seen, because its memory cannot be read (it is not dumpable, or \
                         Yama forbids that): if it opens /dev/udmabuf, the kernel answers it",
                        call.pid
                    );
                }
                return Ok(KERNELS);
            }
            _ => return Ok(KERNELS),
        }
        let way = match opening {
            Opening::Open => Way::Flags(second as i32),
            Opening::Creat => Way::Flags(libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC),
            Opening::Openat => Way::Flags(third as i32),
            Opening::Openat2 => {
                let most = sys::page_size();
                // What is wrong with such a size, or such an address, is the kernel's to say.
                let Some(len) = Some(fourth).filter(|len| (Way::LEAST..=most).contains(len)) else {
                    return Ok(KERNELS);
                };
                let mut how = vec![0; len as usize];
                if target.read(third, &mut how).is_err() {
                    return Ok(KERNELS);
                }
                Way::How(how)
            }
        };
        if !listener.is_waiting(call) {
            return Err(Gone);
        }
        if way.is_the_kernels() {
            return Ok(KERNELS);
        }
        match self.may_serve(&target, call, listener)? {
            Ok(true) => {}
            Ok(false) => return Ok(KERNELS),
            Err(error) => return Ok((Answer::Error(error), None)),
        }
        let opened = way.open().and_then(|file| {
            // With O_PATH, too: what it gets can be used.
            may_open(&target)?;
            Ok(file)
        });
        Ok(match opened {
            Ok(file) if self.is_ours(&file) => (
                Answer::Descriptor {
                    file,
                    cloexec: way.closes_on_exec(),
                },
                Some(Report::opened(&target)),
            ),
            // Without pinbuf's device the program gets what it gets without us.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ELOOP) => KERNELS,
            Err(error) => (Answer::Error(error), None),
        })
    }

    /// One of udmabuf's requests, for whatever file.
    fn request(&self, call: &Call, listener: &Listener) -> Result<(Answer, Option<Report>), Gone> {
        const KERNELS: (Answer, Option<Report>) = (Answer::TheKernels, None);
        let [descriptor, number, argument, ..] = call.data.args;
        let target = match self.target(call, listener)? {
            Ok(target) => target,
            Err(error) if is_shortage(error) => return Ok((Answer::Error(error), None)),
            Err(_) => return Ok(KERNELS),
        };
        let device = match target.file(descriptor as i32) {
            Ok(device) => device,
            Err(error) if is_shortage(error) => return Ok((Answer::Error(error), None)),
            // A number without a file: the kernel says so.
            Err(Errno::EBADF) => return Ok(KERNELS),
            Err(_) if !listener.is_waiting(call) => return Err(Gone),
            Err(error) => {
                self.complain(&format!(
                    "process {} cannot be served, because its descriptors cannot be copied: {error}",
                    call.pid
                ));
                return Ok(KERNELS);
            }
        };
        if !self.is_ours(&device) {
            return Ok(KERNELS);
        }
        match self.may_serve(&target, call, listener)? {
            Ok(true) => {}
            Ok(false) => return Ok(KERNELS),
            Err(error) => return Ok((Answer::Error(error), None)),
        }
        let mut report = Report::created(&target);
        let made = self.create(
            &target,
            call,
            listener,
            number as u32,
            argument,
            &mut report,
        );
        // Nothing that was read or taken is of use if the number is another thread's meanwhile.
        if !listener.is_waiting(call) {
            return Err(Gone);
        }
        Ok((
            match made {
                Ok((file, cloexec)) => Answer::Descriptor { file, cloexec },
                Err(error) => Answer::Error(error),
            },
            Some(report),
        ))
    }

    /// The thread that made a call, or why it cannot be served.
    fn target(&self, call: &Call, listener: &Listener) -> Result<nix::Result<Target>, Gone> {
        match Target::of(call, listener) {
            Ok(Some(target)) => Ok(Ok(target)),
            Ok(None) => Err(Gone),
            Err(error) => {
                self.complain(&format!("process {} cannot be served: {error}", call.pid));
                Ok(Err(error))
            }
        }
    }

    fn complain(&self, what: &str) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            complain!("{what}");
        }
    }

    /// Is it pinbuf's device, or the kernel's udmabuf, and can it be used for requests?
    fn is_ours(&self, device: &OwnedFd) -> bool {
        // Any file may be at that number, and the file system of some never answers (FUSE).
        let path = format!("/proc/self/fd/{}", device.as_raw_fd());
        let number = character_device(Path::new(&path));
        let known = number.is_some() && [Some(self.number), number_of("udmabuf")].contains(&number);
        // SAFETY: no memory is involved.
        let flags = unsafe { libc::fcntl(device.as_raw_fd(), libc::F_GETFL) };
        known && flags & libc::O_PATH == 0
    }

    /// A buffer that we make is charged to our user. Where that means that it is charged to nobody, only processes of
    /// which the same holds are served: a program that has given up root's rights has limits. An error if there is too
    /// little of something to know that.
    fn may_serve(
        &self,
        target: &Target,
        call: &Call,
        listener: &Listener,
    ) -> Result<nix::Result<bool>, Gone> {
        if !self.unlimited {
            return Ok(Ok(true));
        }
        let served = match Credentials::of(&target.number().to_string()) {
            Ok(who) => who.locks_memory,
            Err(error) => match shortage(&error) {
                Some(errno) => return Ok(Err(errno)),
                None => false,
            },
        };
        if !served {
            // A thread that was killed has no rights, and its number may be another's.
            if !listener.is_waiting(call) {
                return Err(Gone);
            }
            self.complain(&format!(
                "process {} has given up rights that `pinbuf run` has, so its buffers could not be charged to its user, \
                 and the kernel's udmabuf, if there is one, answers it: start `pinbuf run` as that user",
                target.number()
            ));
        }
        Ok(Ok(served))
    }

    /// Makes a buffer as udmabuf does, and says whether its descriptor is closed on `exec`.
    fn create(
        &self,
        target: &Target,
        call: &Call,
        listener: &Listener,
        number: u32,
        argument: u64,
        report: &mut Report,
    ) -> nix::Result<(OwnedFd, bool)> {
        let (bytes, _long) = self.copy(target, number, argument)?;
        let mut plan = Plan::new();
        let from = bytes.as_ptr() as usize;
        let flags = match number {
            request::CREATE => request::read_single(plan.items(), from),
            _ => request::read_list(plan.items(), from),
        }
        .map_err(errno)?;
        drop(bytes);
        // From here on the files are ours, whatever other threads put at the numbers. A number without a file stays
        // one, so that the checks find it in their turn.
        let mut files: HashMap<u32, Option<OwnedFd>> = HashMap::new();
        for item in plan.items().iter_mut() {
            let file = match files.get(&item.memfd) {
                Some(file) => file,
                None => {
                    let file = match target.file(item.memfd as i32) {
                        Ok(file) => Some(file),
                        Err(Errno::EBADF) => None,
                        Err(_) => return Err(Errno::ENOMEM),
                    };
                    files.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                    files.entry(item.memfd).or_insert(file)
                }
            };
            item.memfd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd) as u32;
        }
        plan.check().map_err(errno)?;
        report.asked(&plan);
        let fd = self.make(target, call, listener, flags_of(flags), &plan);
        // SAFETY: the driver has just returned it.
        let buffer = unsafe { OwnedFd::from_raw_fd(fd.map_err(|error| errno(as_udmabuf(error)))?) };
        Ok((buffer, flags & request::FLAGS_CLOEXEC != 0))
    }

    /// Copies a request from the program's memory, each byte of it once. With a long list comes the right to answer one,
    /// which is given back when the request is answered.
    fn copy(
        &self,
        target: &Target,
        number: u32,
        argument: u64,
    ) -> nix::Result<(Vec<u8>, Option<MutexGuard<'_, ()>>)> {
        let head = if number == request::CREATE { 24 } else { 8 };
        let mut bytes = vec![0; head];
        target.read(argument, &mut bytes)?;
        let mut long = None;
        if number == request::CREATE_LIST {
            let count = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            // udmabuf compares the count with its limit before it reads any further.
            if count > MAX_ITEMS {
                return Err(Errno::EINVAL);
            }
            if count > LONG {
                long = Some(self.long.lock().unwrap_or_else(PoisonError::into_inner));
            }
            let len = count as usize * size_of::<request::Item>();
            // Without memory this process would end, and nobody would be served any more.
            bytes.try_reserve_exact(len).map_err(|_| Errno::ENOMEM)?;
            bytes.resize(head + len, 0);
            target.read(argument.wrapping_add(head as u64), &mut bytes[head..])?;
        }
        Ok((bytes, long))
    }

    /// The size that no buffer of ours can exceed.
    fn most(&self) -> u64 {
        let ours = self.device.query().map_or(u64::MAX, |limits| {
            limits.memlock.unwrap_or(u64::MAX).max(limits.allowance)
        });
        sysinfo().map_or(ours, |machine| machine.ram_total().min(ours))
    }

    /// Asks the driver, with mappings of our own, once the program has what it waits for.
    fn make(
        &self,
        target: &Target,
        call: &Call,
        listener: &Listener,
        flags: u32,
        plan: &Plan,
    ) -> sys::Result<i32> {
        // Our copy is not the program's.
        let flags = flags | pinbuf_uapi::CREATE_CLOEXEC;
        let device = self.device.as_fd().as_raw_fd();
        // What the driver will refuse is not waited for: that would give memory to all pages of the program's that have
        // none.
        if plan.pieces().len() > pinbuf_uapi::MAX_RANGES as usize {
            return Err(sys::Errno(libc::EINVAL));
        }
        if plan.bytes > self.most() {
            return Err(sys::Errno(libc::ENOMEM));
        }
        let mut drivers = DriversCall::new();
        let mut result = Err(sys::Errno(libc::EFAULT));
        // Whether a page may be missing because it comes later is asked once one is.
        let mut later = true;
        for _ in 0..TRIES {
            if !listener.is_waiting(call) {
                return Err(sys::Errno(libc::EINTR));
            }
            let mapped = late::mappings(target, plan).map_err(|error| sys::Errno(error as i32))?;
            let registered = late::registered_mappings(target, plan);
            let may_come = || !registered.is_empty() || late::may_come_later(target, &mapped);
            let wait = |spans| late::wait(target, plan, spans, || listener.is_waiting(call));
            // Those that are registered come first: then no page is missing in the others.
            let waited = wait(&registered).and_then(|both| Ok(wait(&mapped)? || both));
            let guarded = match waited {
                Ok(guarded) => guarded && later,
                // Another thread changed the mappings, or the memory cannot be had.
                Err(Errno::EFAULT) if later => {
                    later = may_come();
                    continue;
                }
                Err(Errno::EFAULT) => false,
                Err(error) => return Err(sys::Errno(error as i32)),
            };
            let guard = if guarded { Guard::new().ok() } else { None };
            result = drivers.make_by_window(device, flags, plan, |window| match &guard {
                Some(guard) => watch(guard, window, plan, &mapped)
                    .and_then(|()| watch(guard, window, plan, &registered)),
                None => Ok(()),
            });
            if guard.is_none() || result != Err(sys::Errno(libc::EFAULT)) {
                break;
            }
            later = may_come();
        }
        result
    }
}

/// Guards what the program has mapped.
fn watch(guard: &Guard, window: &Window, plan: &Plan, mapped: &Spans) -> sys::Result<()> {
    let mut joined: Option<(u64, u64)> = None;
    let register = |(start, len): (u64, u64)| {
        // Files of other kinds have no late pages.
        let _ = guard.watch(start, len);
    };
    each_part(plan, mapped, |piece, address| {
        if address.is_some() {
            if let Some((start, len)) = window.pages(piece) {
                joined = match joined {
                    Some((first, before)) if first + before == start => Some((first, before + len)),
                    Some(before) => {
                        register(before);
                        Some((start, len))
                    }
                    None => Some((start, len)),
                };
            }
        }
        Ok(())
    })?;
    if let Some(last) = joined {
        register(last);
    }
    Ok(())
}

fn errno(error: sys::Errno) -> Errno {
    Errno::from_raw(error.0)
}

/// What a line of the log says.
struct Report {
    process: i32,
    opened: bool,
    bytes: u64,
    items: usize,
    pieces: usize,
}

impl Report {
    fn created(target: &Target) -> Self {
        Self {
            process: target.number().as_raw(),
            opened: false,
            bytes: 0,
            items: 0,
            pieces: 0,
        }
    }

    fn opened(target: &Target) -> Self {
        Self {
            opened: true,
            ..Self::created(target)
        }
    }

    fn asked(&mut self, plan: &Plan) {
        (self.bytes, self.items, self.pieces) = (plan.bytes, plan.asked, plan.pieces().len());
    }

    fn made(&self, fd: i32) -> String {
        if self.opened {
            return format!(
                "/dev/udmabuf opened as /dev/pinbuf: fd {fd} of process {}",
                self.process
            );
        }
        self.of_request(&format!("created fd {fd}"))
    }

    fn failed(&self, error: Errno) -> String {
        if self.opened {
            let process = self.process;
            return format!("/dev/pinbuf cannot be given to process {process}: {error}");
        }
        self.of_request(&format!("failed with errno {}", error as i32))
    }

    fn of_request(&self, outcome: &str) -> String {
        format!(
            "{outcome}: {} bytes, {} items, {} pieces, by the supervisor for process {}",
            self.bytes, self.items, self.pieces, self.process
        )
    }
}

/// We have opened the device; may the program, which has perhaps become another user, or has left groups?
fn may_open(target: &Target) -> nix::Result<()> {
    let opens = || -> std::io::Result<bool> {
        let who = Credentials::of(&target.number().to_string())?;
        let we = Credentials::of("self")?;
        Ok(Node::of("self", Device::PATH)?.opens_for(&who, &we))
    };
    match opens() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Errno::EACCES),
        Err(error) => Err(shortage(&error).unwrap_or(Errno::EACCES)),
    }
}

/// Is this what the kernel returns as well when it has too little of something?
fn is_shortage(error: Errno) -> bool {
    matches!(error, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}

fn shortage(error: &std::io::Error) -> Option<Errno> {
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.filter(|errno| is_shortage(*errno))
}

/// How a program opens the device, besides its name.
enum Way {
    /// By `open`, `creat` or `openat`, with these flags.
    Flags(i32),
    /// By `openat2`, with this `struct open_how`: flags, the mode of a new file, the ways in which a path may be resolved,
    /// and what later kernels have behind these.
    How(Vec<u8>),
}

impl Way {
    /// The size of the first `struct open_how`.
    const LEAST: u64 = 24;

    /// The struct's first three numbers.
    fn numbers(how: &[u8]) -> [u64; 3] {
        [0, 8, 16].map(|at| {
            let bytes = how.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            u64::from_ne_bytes(bytes.unwrap_or_default())
        })
    }

    fn flags(&self) -> u64 {
        match self {
            Self::Flags(flags) => u64::from(*flags as u32),
            Self::How(how) => Self::numbers(how)[0],
        }
    }

    fn has(&self, flags: i32) -> bool {
        let flags = u64::from(flags as u32);
        self.flags() & flags == flags
    }

    fn closes_on_exec(&self) -> bool {
        self.has(libc::O_CLOEXEC)
    }

    /// Is the answer the kernel's, whatever the file is? It may be that an absolute path means another file than it does for
    /// us, and that the kernel refuses the flags before it looks at the path.
    fn is_the_kernels(&self) -> bool {
        /// The ways to resolve a path that do not change what an absolute one means.
        const PLAIN: u64 =
            libc::RESOLVE_NO_XDEV | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
        let resolve = match self {
            Self::Flags(_) => 0,
            Self::How(how) => Self::numbers(how)[2],
        };
        let path_only = matches!(self, Self::Flags(_)) && self.has(libc::O_PATH);
        resolve & !PLAIN != 0 || self.has(libc::O_CREAT | libc::O_DIRECTORY) && !path_only
    }

    /// Opens pinbuf's device in this way, by the same call, so that the kernel checks what it would check for udmabuf's.
    /// But no file is created or cut.
    fn open(&self) -> nix::Result<OwnedFd> {
        let path_only = self.has(libc::O_PATH);
        if path_only {
            // The kernel gives no process a descriptor of another one that was opened with O_PATH (`EBADF`): it gets one
            // for reading, whose file is the same.
            self.call(0, 0)?;
            return Self::Flags(libc::O_RDONLY).call(0, 0);
        }
        let no_file = libc::O_CREAT | libc::O_EXCL;
        if !self.has(no_file) {
            return self.call(no_file | libc::O_TRUNC, libc::O_NOCTTY);
        }
        // The file is there, which the kernel looks at after the flags, and before the device.
        let of_device = libc::O_DIRECT | libc::O_NOATIME;
        self.call(no_file | libc::O_TRUNC | of_device, libc::O_NOCTTY)?;
        Err(Errno::EEXIST)
    }

    /// Makes the call, without some flags and with others.
    fn call(&self, without: i32, with: i32) -> nix::Result<OwnedFd> {
        let path = PINBUF.as_ptr();
        let with = with | libc::O_CLOEXEC;
        let fd = match self {
            Self::Flags(flags) => {
                let flags = flags & !without | with;
                // SAFETY: a terminated string; without O_CREAT, no mode is read.
                unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, 0) }
            }
            Self::How(how) => {
                let mut how = how.clone();
                let [flags, mode, _] = Self::numbers(&how);
                let flags = flags & !u64::from(without as u32) | u64::from(with as u32);
                how[..8].copy_from_slice(&flags.to_ne_bytes());
                // With O_CREAT there may be such a mode, and without it none.
                if without & libc::O_CREAT != 0 && self.has(libc::O_CREAT) && mode <= 0o7777 {
                    how[8..16].fill(0);
                }
                let (at, len) = (how.as_ptr(), how.len());
                // SAFETY: a terminated string, and a struct of that size.
                unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path, at, len) }
            }
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the call has just returned it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}
