// SPDX-License-Identifier: MIT OR Apache-2.0

//! The table of cases.

use std::collections::BTreeSet;
use std::ffi::{c_int, CString};
use std::io::Result as IoResult;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::run::{errno_name, Expect, Outcome};
use crate::udmabuf::{
    self as u, check, close, create, create_list, end, fcntl, ioctl, open, Item, Map, PAGE,
};
use crate::{late, mappings, sandbox, stack, stale, unfilled};

pub(crate) const MIB: u64 = 1 << 20;
/// A size of hugetlb pages that all kernels have: with small pages of 16 KiB the usual one is 32 MiB, of which udmabuf
/// takes two.
pub(crate) const HUGE: u64 = 2 << 20;
/// The size of a file of small pages that has all of them for the shim, too: a multiple of a transparent huge page, which
/// has 32 MiB with small pages of 16 KiB.
const WHOLE: u64 = if PAGE * (PAGE / 8) > 2 * HUGE {
    PAGE * (PAGE / 8)
} else {
    2 * HUGE
};
/// Where the kernel says how many there are.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// The flag for memfds of such pages.
const HUGE_SIZE: u32 = HUGE.trailing_zeros() << libc::MFD_HUGE_SHIFT;

/// The rounds of a race: `most`, or as many as fit into a few seconds. By the supervisor a round takes fifty times as
/// long as by the kernel.
pub(crate) fn rounds(most: usize) -> impl Iterator<Item = usize> {
    const LEAST: usize = 100;
    const TIME: Duration = Duration::from_secs(4);
    let start = Instant::now();
    (0..most).take_while(move |&round| round < LEAST || start.elapsed() < TIME)
}

/// A case: what is done and what must come of it.
pub struct Case {
    pub name: String,
    pub expect: Expect,
    pub run: Box<dyn Fn() -> Result<Outcome>>,
}

/// What is behind a descriptor.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// A memfd that can be sealed.
    Memfd,
    /// A memfd that cannot be sealed (`F_SEAL_SEAL` from the start).
    MemfdUnsealable,
    /// One with pages of 2 MiB.
    Hugetlb,
    /// A memfd that cannot be executed, as compositors make them (`MFD_NOEXEC_SEAL`).
    MemfdNoexec,
    Tmpfs,
    /// A file of the root file system.
    Disk,
    Directory,
    Pipe,
    Eventfd,
    /// `/dev/zero`.
    DevZero,
    /// udmabuf's own device.
    Device,
    /// A dma-buf of udmabuf's.
    Dmabuf,
    /// A number that no descriptor has.
    Closed,
    /// -1.
    Negative,
}

/// What the program has mapped of it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mapped {
    Never,
    Shared,
    ReadOnly,
    Private,
    /// Shared, but not all of it.
    Half,
}

#[derive(Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) seals: c_int,
    pub(crate) mode: c_int,
    pub(crate) mapped: Mapped,
    /// Each page contains its number, so that their order can be checked.
    pub(crate) filled: bool,
}

pub(crate) const PLAIN: Spec = Spec {
    kind: Kind::Memfd,
    bytes: 16 * PAGE,
    seals: libc::F_SEAL_SHRINK,
    mode: libc::O_RDWR,
    mapped: Mapped::Never,
    filled: true,
};

pub(crate) const HUGETLB: Spec = Spec {
    kind: Kind::Hugetlb,
    bytes: 4 * HUGE,
    ..PLAIN
};

impl Spec {
    /// The same, of a size with which the shim knows that a file has all its pages.
    pub(crate) fn whole(self) -> Self {
        let bytes = match self.kind {
            Kind::Hugetlb => 2 * HUGE,
            _ => WHOLE,
        };
        Self { bytes, ..self }
    }
}

/// A file that a case uses.
pub(crate) struct File {
    pub(crate) fd: c_int,
    spec: Spec,
    /// Kept mapped as long as the case runs.
    _map: Option<Map>,
}

/// The number that a page gets.
pub(crate) fn mark(file: usize, page: u64) -> u64 {
    (file as u64 + 1) << 32 | page
}

/// Why a case cannot run here.
#[derive(Debug)]
struct Unavailable(String);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

pub(crate) fn unavailable<T>(why: impl ToString) -> Result<T> {
    Err(Unavailable(why.to_string()).into())
}

/// Prepares the machine: huge pages.
pub fn prepare() {
    // Without the permission, the cases that need huge pages are skipped.
    let _ = std::fs::write(format!("{POOL}/nr_hugepages"), "32");
}

pub(crate) fn free_hugepages() -> u64 {
    let text = std::fs::read_to_string(format!("{POOL}/free_hugepages"));
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

impl File {
    pub(crate) fn new(index: usize, spec: Spec) -> Result<Self> {
        let fd = match spec.kind {
            Kind::Memfd => u::memfd(libc::MFD_ALLOW_SEALING, spec.bytes)?,
            Kind::MemfdUnsealable => u::memfd(0, spec.bytes)?,
            Kind::MemfdNoexec => u::memfd(libc::MFD_NOEXEC_SEAL, spec.bytes)?,
            Kind::Hugetlb => {
                if free_hugepages() < 8 {
                    return unavailable("fewer than 8 free huge pages");
                }
                let flags = libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | HUGE_SIZE;
                u::memfd(flags, spec.bytes)?
            }
            Kind::Tmpfs => {
                let flags = libc::O_TMPFILE | libc::O_RDWR;
                // SAFETY: a terminated string.
                let fd = unsafe { libc::open(c"/dev/shm".as_ptr(), flags, 0o600) };
                if fd < 0 {
                    return unavailable("no tmpfs on /dev/shm");
                }
                // SAFETY: no memory is involved.
                check(i64::from(unsafe { libc::ftruncate(fd, spec.bytes as i64) }))?;
                fd
            }
            Kind::Disk => open(c"/proc/self/exe", libc::O_RDONLY)?,
            Kind::Directory => open(c"/", libc::O_RDONLY | libc::O_DIRECTORY)?,
            Kind::Pipe => {
                let mut ends = [0; 2];
                // SAFETY: two descriptors are written to `ends`.
                check(i64::from(unsafe { libc::pipe(ends.as_mut_ptr()) }))?;
                ends[0]
            }
            // SAFETY: no memory is involved.
            Kind::Eventfd => check(i64::from(unsafe { libc::eventfd(0, 0) }))? as c_int,
            Kind::DevZero => open(c"/dev/zero", libc::O_RDWR)?,
            Kind::Device => device()?,
            Kind::Dmabuf => {
                let memfd = Self::new(index, PLAIN)?;
                create(device()?, memfd.fd, 0, PAGE, 0).context("the dma-buf")?
            }
            Kind::Closed => {
                let fd = fcntl(0, libc::F_DUPFD, 50)?;
                close(fd)?;
                fd
            }
            Kind::Negative => -1,
        };
        let sealable = matches!(spec.kind, Kind::Memfd | Kind::MemfdNoexec | Kind::Hugetlb);
        if spec.filled && (sealable || matches!(spec.kind, Kind::MemfdUnsealable)) {
            let map = Map::shared(fd, spec.bytes).context("mapping to fill it")?;
            for page in 0..spec.bytes / PAGE {
                map.set(page, mark(index, page));
            }
        }
        if spec.seals != 0 && sealable {
            fcntl(fd, libc::F_ADD_SEALS, spec.seals).context("sealing")?;
        }
        let fd = if spec.mode == libc::O_RDWR {
            fd
        } else {
            let path = CString::new(format!("/proc/self/fd/{fd}"))?;
            let other = open(&path, spec.mode)?;
            close(fd)?;
            other
        };
        let read = libc::PROT_READ;
        let map = match spec.mapped {
            Mapped::Never => None,
            Mapped::Shared => Some(Map::shared(fd, spec.bytes)?),
            Mapped::Half => Some(Map::shared(fd, spec.bytes / 2)?),
            Mapped::ReadOnly => Some(Map::new(fd, spec.bytes, read, libc::MAP_SHARED)?),
            Mapped::Private => Some(Map::new(
                fd,
                spec.bytes,
                read | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
            )?),
        };
        Ok(Self {
            fd,
            spec,
            _map: map,
        })
    }

    pub(crate) fn item(&self, offset: u64, size: u64) -> Item {
        Item {
            memfd: self.fd as u32,
            pad: 0,
            offset,
            size,
        }
    }
}

pub(crate) fn device() -> Result<c_int> {
    open(u::DEVICE, libc::O_RDWR).context("opening /dev/udmabuf")
}

/// The result of `fstat`.
fn status(fd: c_int) -> Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: room for the result.
    check(i64::from(unsafe { libc::fstat(fd, stat.as_mut_ptr()) }))?;
    // SAFETY: filled in by the kernel.
    Ok(unsafe { stat.assume_init() })
}

/// The result of `stat` of the device.
fn named() -> Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: a terminated string, and room for the result.
    let ret = unsafe { libc::stat(u::DEVICE.as_ptr(), stat.as_mut_ptr()) };
    check(i64::from(ret))?;
    // SAFETY: filled in by the kernel.
    Ok(unsafe { stat.assume_init() })
}

/// What a call must not leave behind: mappings and descriptors.
fn traces() -> Result<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mappings = maps
        .lines()
        .filter(|line| line.contains("/memfd:") || line.contains(" ---p "))
        .count();
    Ok((mappings, std::fs::read_dir("/proc/self/fd")?.count()))
}

/// A part of the buffer: the file's index in the case's list, offset, size.
pub(crate) type Part = (usize, u64, u64);

/// How a buffer is asked for.
#[derive(Clone)]
pub(crate) struct Ask {
    files: Vec<Spec>,
    parts: Vec<Part>,
    flags: u32,
    /// With `UDMABUF_CREATE`, which takes one part.
    single: bool,
    device: c_int,
}

impl Ask {
    fn single(file: Spec, offset: u64, size: u64) -> Self {
        Self {
            files: vec![file],
            parts: vec![(0, offset, size)],
            flags: u::CLOEXEC,
            single: true,
            device: libc::O_RDWR,
        }
    }

    fn list(files: &[Spec], parts: Vec<Part>) -> Self {
        Self {
            files: files.to_vec(),
            parts,
            flags: 0,
            single: false,
            device: libc::O_RDWR,
        }
    }

    fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    fn device(mut self, mode: c_int) -> Self {
        self.device = mode;
        self
    }

    fn run(&self) -> Result<Outcome> {
        let files = self
            .files
            .iter()
            .enumerate()
            .map(|(i, spec)| File::new(i, *spec));
        let files: Vec<File> = files.collect::<Result<_>>()?;
        let device = open(u::DEVICE, self.device)?;
        let before = traces()?;
        let lowest = fcntl(0, libc::F_DUPFD, 0)?;
        close(lowest)?;
        let result = self.call(device, &files);
        let after = traces()?;
        let mut outcome = Outcome::of(&result);
        outcome.fact("no mapping left", before.0 == after.0);
        outcome.fact("descriptors opened", after.1 - before.1);
        if let Ok(dmabuf) = result {
            outcome.fact("lowest free descriptor", dmabuf == lowest);
            outcome.fact(
                "close-on-exec",
                fcntl(dmabuf, libc::F_GETFD, 0)? & libc::FD_CLOEXEC,
            );
            outcome.fact(
                "access mode",
                fcntl(dmabuf, libc::F_GETFL, 0)? & libc::O_ACCMODE,
            );
            self.look(dmabuf, &files, &mut outcome)?;
        }
        Ok(outcome)
    }

    fn call(&self, device: c_int, files: &[File]) -> IoResult<c_int> {
        if self.single {
            let (file, offset, size) = self.parts[0];
            create(device, files[file].fd, offset, size, self.flags)
        } else {
            let item = |&(file, offset, size): &Part| files[file].item(offset, size);
            let items: Vec<Item> = self.parts.iter().map(item).collect();
            create_list(device, &items, self.flags)
        }
    }

    /// Looks at the buffer: its size, which pages it has in which order, and that they are the
    /// file's own and no copies.
    fn look(&self, dmabuf: c_int, files: &[File], outcome: &mut Outcome) -> Result<()> {
        let size: u64 = self.parts.iter().map(|part| part.2).sum();
        outcome.made_by = u::exporter(dmabuf);
        outcome.fact("size", end(dmabuf)?);
        outcome.fact("size is the parts'", end(dmabuf)? as u64 == size);
        let map = Map::shared(dmabuf, size).context("mapping the buffer")?;
        u::sync(dmabuf, u::SYNC_RW)?;
        let mut at = 0;
        let mut right = true;
        let mut places = Vec::new();
        for &(file, offset, size) in &self.parts {
            for page in offset / PAGE..(offset + size) / PAGE {
                let wanted = if files[file].spec.filled {
                    mark(file, page)
                } else {
                    0
                };
                right &= map.get(at) == wanted;
                places.push((file, page));
                at += 1;
            }
        }
        outcome.fact("pages in order", right);
        // Through the buffer into the file, and back. Files that cannot be mapped for writing are
        // read only.
        let mut through = true;
        for (file, opened) in files.iter().enumerate() {
            let mode = opened.spec.mode;
            let Some(first) = places.iter().position(|place| place.0 == file) else {
                continue;
            };
            let page = places[first].1;
            let prot = if mode == libc::O_RDWR {
                libc::PROT_WRITE
            } else {
                0
            } | libc::PROT_READ;
            if mode == libc::O_WRONLY {
                continue;
            }
            let view = Map::new(opened.fd, opened.spec.bytes, prot, libc::MAP_SHARED)?;
            let value = 0x1234_0000 + file as u64;
            map.set(first as u64, value);
            through &= view.get(page) == value;
            if mode == libc::O_RDWR {
                view.set(page, value + 100);
                through &= map.get(first as u64) == value + 100;
            }
        }
        u::sync(dmabuf, u::SYNC_RW | u::SYNC_END)?;
        outcome.fact("the file's own pages", through);
        Ok(())
    }
}

/// Collects the cases.
pub(crate) struct Table(Vec<Case>);

impl Table {
    pub(crate) fn custom(
        &mut self,
        name: impl ToString,
        expect: Expect,
        run: impl Fn() -> Result<Outcome> + 'static,
    ) {
        let run = move || match run() {
            Err(error) => match error.downcast::<Unavailable>() {
                Ok(why) => Ok(Outcome {
                    skipped: Some(why.0),
                    ..Outcome::default()
                }),
                Err(error) => Err(error),
            },
            outcome => outcome,
        };
        self.0.push(Case {
            name: name.to_string(),
            expect,
            run: Box::new(run),
        });
    }

    fn ask(&mut self, name: impl ToString, expect: Expect, ask: Ask) {
        self.custom(name, expect, move || ask.run());
    }

    fn single(&mut self, name: &str, expect: Expect, file: Spec, offset: u64, size: u64) {
        self.ask(name, expect, Ask::single(file, offset, size));
    }

    pub(crate) fn list(&mut self, name: &str, expect: Expect, files: &[Spec], parts: Vec<Part>) {
        self.ask(name, expect, Ask::list(files, parts));
    }
}

/// All cases.
pub fn all() -> Vec<Case> {
    let mut table = Table(Vec::new());
    extents(&mut table);
    kinds(&mut table);
    seals(&mut table);
    lists(&mut table);
    hugetlb(&mut table);
    flags(&mut table);
    pointers(&mut table);
    devices(&mut table);
    buffers(&mut table);
    surroundings(&mut table);
    limits(&mut table);
    mappings::cases(&mut table);
    late::cases(&mut table);
    unfilled::cases(&mut table);
    stale::cases(&mut table);
    sandbox::cases(&mut table);
    stack::cases(&mut table);
    table.0
}

const EINVAL: Expect = Expect::Error("EINVAL");
const EBADFD: Expect = Expect::Error("EBADFD");
const EFAULT: Expect = Expect::Error("EFAULT");
pub(crate) const OK: Expect = Expect::Success;

fn extents(t: &mut Table) {
    t.single("extent/whole", OK, PLAIN, 0, 16 * PAGE);
    t.single("extent/one-page", OK, PLAIN, 0, PAGE);
    t.single("extent/last-page", OK, PLAIN, 15 * PAGE, PAGE);
    t.single("extent/middle", OK, PLAIN, 3 * PAGE, 5 * PAGE);
    t.single("extent/size-zero", EINVAL, PLAIN, 0, 0);
    t.single("extent/size-zero-behind", EINVAL, PLAIN, 4 * PAGE, 0);
    t.single("extent/size-1", EINVAL, PLAIN, 0, 1);
    t.single("extent/size-4095", EINVAL, PLAIN, 0, 4095);
    t.single("extent/size-4097", EINVAL, PLAIN, 0, 4097);
    t.single("extent/offset-1", EINVAL, PLAIN, 1, PAGE);
    t.single("extent/offset-512", EINVAL, PLAIN, 512, PAGE);
    t.single("extent/offset-4095", EINVAL, PLAIN, 4095, PAGE);
    t.single("extent/end-beyond", EINVAL, PLAIN, 15 * PAGE, 2 * PAGE);
    t.single("extent/size-beyond", EINVAL, PLAIN, 0, 17 * PAGE);
    t.single("extent/offset-at-end", EINVAL, PLAIN, 16 * PAGE, PAGE);
    t.single("extent/offset-beyond", EINVAL, PLAIN, 1 << 40, PAGE);
    t.single("extent/offset-negative", EINVAL, PLAIN, 1 << 63, PAGE);
    t.single("extent/offset-last", EINVAL, PLAIN, !4095, PAGE);
    t.single("extent/size-huge", EINVAL, PLAIN, 0, 1 << 62);
    t.single("extent/size-negative", EINVAL, PLAIN, 0, !4095);
    t.single("extent/both-huge", EINVAL, PLAIN, !4095, !4095);
    // As clients do that round the size up.
    let odd = Spec {
        bytes: PAGE + 1904,
        filled: false,
        ..PLAIN
    };
    t.single("extent/file-not-whole-pages", EINVAL, odd, 0, 2 * PAGE);
    t.single("extent/file-not-whole-pages-inside", OK, odd, 0, PAGE);
    t.single(
        "extent/file-empty",
        EINVAL,
        Spec {
            bytes: 0,
            filled: false,
            ..PLAIN
        },
        0,
        PAGE,
    );
    // Alignment is looked at before the descriptor, the descriptor before the extent.
    let closed = Spec {
        kind: Kind::Closed,
        ..PLAIN
    };
    t.single("order/size-before-fd", EINVAL, closed, 0, 100);
    t.single("order/offset-before-fd", EINVAL, closed, 100, PAGE);
    t.single("order/zero-before-fd", EINVAL, closed, 0, 0);
    t.single("order/fd-before-end", EBADFD, closed, 1 << 40, PAGE);
    let pipe = Spec {
        kind: Kind::Pipe,
        ..PLAIN
    };
    t.single("order/kind-before-end", EBADFD, pipe, 1 << 40, PAGE);
}

fn kinds(t: &mut Table) {
    let not_memfds = [
        ("disk", Kind::Disk),
        ("directory", Kind::Directory),
        ("pipe", Kind::Pipe),
        ("eventfd", Kind::Eventfd),
        ("dev-zero", Kind::DevZero),
        ("the-device", Kind::Device),
        ("dma-buf", Kind::Dmabuf),
        ("closed", Kind::Closed),
        ("negative", Kind::Negative),
    ];
    for (name, kind) in not_memfds {
        let file = Spec {
            kind,
            filled: false,
            ..PLAIN
        };
        t.single(&format!("kind/{name}"), EBADFD, file, 0, PAGE);
    }
    // These are shmem, and only their seals are wrong.
    let tmpfs = Spec {
        kind: Kind::Tmpfs,
        filled: false,
        ..PLAIN
    };
    t.single("kind/tmpfs", EINVAL, tmpfs, 0, PAGE);
    let unsealable = Spec {
        kind: Kind::MemfdUnsealable,
        ..PLAIN
    };
    t.single("kind/memfd-unsealable", EINVAL, unsealable, 0, PAGE);

    for (name, mode) in [("rdonly", libc::O_RDONLY), ("wronly", libc::O_WRONLY)] {
        t.single(
            &format!("mode/{name}"),
            OK,
            Spec { mode, ..PLAIN },
            0,
            4 * PAGE,
        );
        t.single(
            &format!("mode/{name}-hugetlb"),
            OK,
            Spec { mode, ..HUGETLB },
            0,
            4 * PAGE,
        );
    }
    let noexec = Spec {
        kind: Kind::MemfdNoexec,
        ..PLAIN
    };
    t.single("mode/noexec", OK, noexec, 0, 4 * PAGE);
    t.single(
        "mode/noexec-rdonly",
        OK,
        Spec {
            mode: libc::O_RDONLY,
            ..noexec
        },
        0,
        4 * PAGE,
    );
    t.single(
        "mode/path",
        EBADFD,
        Spec {
            mode: libc::O_PATH,
            ..PLAIN
        },
        0,
        PAGE,
    );
    let rdonly = Spec {
        mode: libc::O_RDONLY,
        ..PLAIN
    };
    t.list(
        "mode/rdonly-list",
        OK,
        &[rdonly, PLAIN, rdonly],
        vec![
            (0, 0, PAGE),
            (1, 0, PAGE),
            (2, PAGE, PAGE),
            (0, 4 * PAGE, PAGE),
        ],
    );

    let mapped = [
        ("never", Mapped::Never),
        ("shared", Mapped::Shared),
        ("readonly", Mapped::ReadOnly),
        ("private", Mapped::Private),
        ("half", Mapped::Half),
    ];
    for (name, mapped) in mapped {
        for (sort, spec) in [("", PLAIN), ("-hugetlb", HUGETLB)] {
            for filled in [true, false] {
                let file = Spec {
                    mapped,
                    filled,
                    ..spec
                };
                let state = if filled { "" } else { "-sparse" };
                let name = format!("mapped/{name}{sort}{state}");
                t.single(&name, OK, file, 2 * PAGE, spec.bytes - 2 * PAGE);
            }
        }
    }
    let shared = Spec {
        mapped: Mapped::Shared,
        ..PLAIN
    };
    let readonly = Spec {
        mapped: Mapped::ReadOnly,
        mode: libc::O_RDONLY,
        ..PLAIN
    };
    t.single("mapped/readonly-rdonly", OK, readonly, 0, 16 * PAGE);
    t.list(
        "mapped/some-of-the-files",
        OK,
        &[shared, PLAIN],
        vec![(0, 0, PAGE), (1, PAGE, PAGE), (0, 2 * PAGE, PAGE)],
    );
    t.list(
        "mapped/all-of-the-files",
        OK,
        &[shared, shared],
        vec![(0, 0, PAGE), (1, PAGE, PAGE), (0, 2 * PAGE, PAGE)],
    );
}

fn seals(t: &mut Table) {
    let names = [
        (libc::F_SEAL_SEAL, "seal"),
        (libc::F_SEAL_SHRINK, "shrink"),
        (libc::F_SEAL_GROW, "grow"),
        (libc::F_SEAL_WRITE, "write"),
        (libc::F_SEAL_FUTURE_WRITE, "future_write"),
        (0x20, "exec"),
    ];
    for seals in 0..64 {
        let set = names.iter().filter(|(bit, _)| seals & bit != 0);
        let set: Vec<&str> = set.map(|(_, name)| *name).collect();
        let name = if set.is_empty() {
            "none".to_owned()
        } else {
            set.join("+")
        };
        let denied = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
        // On a memfd that may be executed, F_SEAL_EXEC implies F_SEAL_WRITE.
        let denied = denied | 0x20;
        let good = seals & libc::F_SEAL_SHRINK != 0 && seals & denied == 0;
        let expect = if good { OK } else { EINVAL };
        t.single(
            &format!("seals/{name}"),
            expect,
            Spec { seals, ..PLAIN },
            0,
            4 * PAGE,
        );
    }
    for (name, seals, expect) in [
        ("none", 0, EINVAL),
        ("shrink", libc::F_SEAL_SHRINK, OK),
        ("shrink+grow", libc::F_SEAL_SHRINK | libc::F_SEAL_GROW, OK),
        (
            "shrink+write",
            libc::F_SEAL_SHRINK | libc::F_SEAL_WRITE,
            EINVAL,
        ),
        (
            "shrink+future_write",
            libc::F_SEAL_SHRINK | libc::F_SEAL_FUTURE_WRITE,
            EINVAL,
        ),
    ] {
        t.single(
            &format!("seals-hugetlb/{name}"),
            expect,
            Spec { seals, ..HUGETLB },
            0,
            PAGE,
        );
    }
    // A mapping from before FUTURE_WRITE stays writable, and does not help.
    t.custom("seals/future_write-while-mapped", EINVAL, || {
        let file = File::new(0, PLAIN)?;
        let _map = Map::shared(file.fd, PAGE)?;
        fcntl(file.fd, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE)?;
        Ok(Outcome::of(&create(device()?, file.fd, 0, PAGE, 0)))
    });
}

fn lists(t: &mut Table) {
    t.list("list/one", OK, &[PLAIN], vec![(0, 0, 4 * PAGE)]);
    t.list("list/none", EINVAL, &[PLAIN], vec![]);
    t.list(
        "list/reversed",
        OK,
        &[PLAIN],
        (0..16).rev().map(|i| (0, i * PAGE, PAGE)).collect(),
    );
    t.list(
        "list/adjacent",
        OK,
        &[PLAIN],
        (0..16).map(|i| (0, i * PAGE, PAGE)).collect(),
    );
    t.list(
        "list/every-second",
        OK,
        &[PLAIN],
        (0..8).map(|i| (0, 2 * i * PAGE, PAGE)).collect(),
    );
    t.list(
        "list/same-page-twice",
        OK,
        &[PLAIN],
        vec![(0, PAGE, PAGE), (0, PAGE, PAGE)],
    );
    t.list(
        "list/same-page-100-times",
        OK,
        &[PLAIN],
        vec![(0, PAGE, PAGE); 100],
    );
    t.list(
        "list/overlap",
        OK,
        &[PLAIN],
        vec![
            (0, 0, 4 * PAGE),
            (0, 2 * PAGE, 4 * PAGE),
            (0, PAGE, 8 * PAGE),
        ],
    );
    for (name, mapped) in [("", Mapped::Never), ("-mapped", Mapped::Shared)] {
        let (small, huge) = (Spec { mapped, ..PLAIN }, Spec { mapped, ..HUGETLB });
        t.list(
            &format!("list/overlap-of-two{name}"),
            OK,
            &[small, huge],
            vec![
                (1, HUGE - PAGE, 3 * PAGE),
                (0, 2 * PAGE, 4 * PAGE),
                (1, HUGE, HUGE),
                (0, 3 * PAGE, 8 * PAGE),
                (1, HUGE - PAGE, 3 * PAGE),
                (0, 2 * PAGE, PAGE),
            ],
        );
    }
    t.list(
        "list/two-files",
        OK,
        &[PLAIN, PLAIN],
        vec![
            (1, 0, PAGE),
            (0, 0, PAGE),
            (1, PAGE, 3 * PAGE),
            (0, 9 * PAGE, PAGE),
        ],
    );
    t.list(
        "list/shmem-and-hugetlb",
        OK,
        &[PLAIN, HUGETLB],
        vec![
            (0, 0, PAGE),
            (1, 5 * PAGE, PAGE),
            (0, PAGE, PAGE),
            (1, HUGE - PAGE, 2 * PAGE),
        ],
    );
    t.list(
        "list/100-files",
        OK,
        &[PLAIN; 100],
        (0..100).map(|i| (i, 4 * PAGE, PAGE)).collect(),
    );
    t.list(
        "list/zero-first",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, 0), (0, 0, PAGE)],
    );
    t.list(
        "list/zero-last",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, PAGE), (0, PAGE, 0)],
    );
    t.list(
        "list/all-zero",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, 0), (0, 0, 0)],
    );
    t.list(
        "list/misaligned-last",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, PAGE), (0, 1, PAGE)],
    );
    t.list(
        "list/beyond-last",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, PAGE), (0, 16 * PAGE, PAGE)],
    );
    let closed = Spec {
        kind: Kind::Closed,
        ..PLAIN
    };
    let unsealed = Spec { seals: 0, ..PLAIN };
    t.list(
        "list/closed-last",
        EBADFD,
        &[PLAIN, closed],
        vec![(0, 0, PAGE), (1, 0, PAGE)],
    );
    t.list(
        "list/closed-then-misaligned",
        EINVAL,
        &[closed],
        vec![(0, 0, PAGE), (0, 7, PAGE)],
    );
    t.list(
        "list/closed-then-zero",
        EBADFD,
        &[closed, PLAIN],
        vec![(0, 0, PAGE), (1, 0, 0)],
    );
    t.list(
        "list/zero-then-closed",
        EINVAL,
        &[PLAIN, closed],
        vec![(0, 0, 0), (1, 0, PAGE)],
    );
    t.list(
        "list/beyond-then-closed",
        EINVAL,
        &[PLAIN, closed],
        vec![(0, 1 << 40, PAGE), (1, 0, PAGE)],
    );
    t.list(
        "list/closed-then-beyond",
        EBADFD,
        &[PLAIN, closed],
        vec![(1, 0, PAGE), (0, 1 << 40, PAGE)],
    );
    t.list(
        "list/unsealed-then-closed",
        EINVAL,
        &[unsealed, closed],
        vec![(0, 0, PAGE), (1, 0, PAGE)],
    );
    t.list(
        "list/closed-then-unsealed",
        EBADFD,
        &[unsealed, closed],
        vec![(1, 0, PAGE), (0, 0, PAGE)],
    );
    t.list(
        "list/sum-wraps",
        EINVAL,
        &[PLAIN],
        vec![(0, 0, 1 << 63), (0, 0, 1 << 63), (0, 0, PAGE)],
    );
    let parts = (0..1024)
        .map(|i| (0, (i * 7 % 1024) * PAGE, PAGE))
        .collect();
    t.list(
        "list/1024-scattered",
        OK,
        &[Spec {
            bytes: 1024 * PAGE,
            ..PLAIN
        }],
        parts,
    );
    let parts = (0..1024)
        .map(|i| (0, (i * 7 % 1024) * PAGE, PAGE))
        .collect();
    let mapped = Spec {
        bytes: 1024 * PAGE,
        mapped: Mapped::Shared,
        ..PLAIN
    };
    t.list("list/1024-scattered-mapped", OK, &[mapped], parts);
    t.single(
        "extent/64-mib",
        OK,
        Spec {
            bytes: 64 * MIB,
            ..PLAIN
        },
        0,
        64 * MIB,
    );
}

fn hugetlb(t: &mut Table) {
    t.single("hugetlb/whole", OK, HUGETLB, 0, 4 * HUGE);
    t.single("hugetlb/one-small-page", OK, HUGETLB, 0, PAGE);
    t.single("hugetlb/small-offset", OK, HUGETLB, 5 * PAGE, PAGE);
    t.single("hugetlb/across", OK, HUGETLB, HUGE - PAGE, 2 * PAGE);
    t.single(
        "hugetlb/odd-extent",
        OK,
        HUGETLB,
        3 * PAGE,
        2 * HUGE + 7 * PAGE,
    );
    t.single(
        "hugetlb/last-small-page",
        OK,
        HUGETLB,
        4 * HUGE - PAGE,
        PAGE,
    );
    t.single("hugetlb/beyond", EINVAL, HUGETLB, 4 * HUGE - PAGE, 2 * PAGE);
    t.single("hugetlb/misaligned", EINVAL, HUGETLB, 100, PAGE);
    let sparse = Spec {
        filled: false,
        ..HUGETLB
    };
    t.single("hugetlb/never-touched", OK, sparse, HUGE + PAGE, HUGE);
    t.list(
        "hugetlb/scattered",
        OK,
        &[HUGETLB],
        (0..200)
            .map(|i| (0, (i * 37 % (HUGETLB.bytes / PAGE)) * PAGE, PAGE))
            .collect(),
    );
    t.list(
        "hugetlb/scattered-mapped",
        OK,
        &[Spec {
            mapped: Mapped::Shared,
            ..HUGETLB
        }],
        (0..200)
            .map(|i| (0, (i * 37 % (HUGETLB.bytes / PAGE)) * PAGE, PAGE))
            .collect(),
    );
    // Fewer pages are free.
    t.custom("hugetlb/pool-exhausted", Expect::Error("ENOMEM"), || {
        if free_hugepages() > 100 || free_hugepages() == 0 {
            return unavailable("a pool of other than 1 to 100 huge pages");
        }
        // Not through ftruncate and mmap, which would reserve.
        let flags = libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | HUGE_SIZE;
        let fd = u::memfd(flags, 300 * MIB)?;
        fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)?;
        let items: Vec<Item> = (0..110)
            .map(|i| Item {
                memfd: fd as u32,
                pad: 0,
                offset: i * HUGE,
                size: PAGE,
            })
            .collect();
        let before = free_hugepages();
        let result = create_list(device()?, &items, 0);
        let mut outcome = Outcome::of(&result);
        close(fd)?;
        // What served the case before may have kept its buffer for a moment longer than the case.
        let returned = soon(|| Ok(free_hugepages() >= before))?;
        outcome.fact("pages returned", returned);
        Ok(outcome)
    });
}

/// Does it become true? Another process, which serves this one, may have to get rid of something first.
pub(crate) fn soon(mut is_so: impl FnMut() -> Result<bool>) -> Result<bool> {
    for _ in 0..200 {
        if is_so()? {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(false)
}

fn flags(t: &mut Table) {
    for flags in [0, 1, 2, 3, 0x8000_0000, 0xffff_fffe, 0xffff_ffff] {
        let ask = Ask::single(PLAIN, 0, PAGE).flags(flags);
        t.ask(format!("flags/single-{flags:#x}"), OK, ask);
        let ask = Ask::list(&[PLAIN], vec![(0, 0, PAGE), (0, 4 * PAGE, PAGE)]).flags(flags);
        t.ask(format!("flags/list-{flags:#x}"), OK, ask);
    }
    t.custom("flags/item-padding", OK, || {
        let file = File::new(0, PLAIN)?;
        let item = Item {
            pad: u32::MAX,
            ..file.item(0, PAGE)
        };
        Ok(Outcome::of(&create_list(device()?, &[item], 0)))
    });
}

/// Two pages, of which the second can be touched by nobody.
fn edge() -> Result<Map> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let map = Map::new(-1, 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags)?;
    let second = (map.address() + PAGE as usize) as *mut libc::c_void;
    // SAFETY: the second page of our mapping, which is not used.
    check(i64::from(unsafe {
        libc::mprotect(second, PAGE as usize, libc::PROT_NONE)
    }))?;
    Ok(map)
}

/// Puts words so that `readable` of them lie before the edge, and returns their address.
fn at_edge(map: &Map, words: &[u64], readable: usize) -> usize {
    let address = map.address() + PAGE as usize - readable * 8;
    for (i, word) in words[..readable].iter().enumerate() {
        // SAFETY: in the first page, and aligned.
        unsafe { ((address + i * 8) as *mut u64).write_volatile(*word) };
    }
    address
}

fn pointers(t: &mut Table) {
    let wrong = [
        ("null", 0usize),
        ("one", 1),
        ("low", 4095),
        ("unmapped", 0x10_0000),
        ("kernel", 0xffff_8880_0000_0000),
        ("not-canonical", 0x1234_5678_9abc_def0),
        ("last", usize::MAX),
    ];
    for (name, address) in wrong {
        for (call, request) in [("single", u::CREATE), ("list", u::CREATE_LIST)] {
            t.custom(format!("pointer/{call}-{name}"), EFAULT, move || {
                Ok(Outcome::of(&ioctl(device()?, request, address)))
            });
        }
    }
    for readable in 0..=3 {
        let expect = if readable == 3 { OK } else { EFAULT };
        t.custom(
            format!("pointer/single-cut-{readable}"),
            expect,
            move || {
                let file = File::new(0, PLAIN)?;
                let map = edge()?;
                let words = [file.fd as u64, 0, PAGE];
                Ok(Outcome::of(&ioctl(
                    device()?,
                    u::CREATE,
                    at_edge(&map, &words, readable),
                )))
            },
        );
    }
    for readable in 0..=7 {
        let expect = if readable == 7 { OK } else { EFAULT };
        t.custom(format!("pointer/list-cut-{readable}"), expect, move || {
            let file = File::new(0, PLAIN)?;
            let map = edge()?;
            let words = u::list(0, 2, &[file.item(0, PAGE), file.item(2 * PAGE, PAGE)]);
            Ok(Outcome::of(&ioctl(
                device()?,
                u::CREATE_LIST,
                at_edge(&map, &words, readable),
            )))
        });
    }
    // The count is looked at before the items are read; without a limit EFAULT would be right too.
    t.custom("pointer/list-endless", EINVAL, || {
        let map = edge()?;
        let words = u::list(0, u32::MAX, &[]);
        Ok(Outcome::of(&ioctl(
            device()?,
            u::CREATE_LIST,
            at_edge(&map, &words, 1),
        )))
    });
    t.custom("pointer/list-none-at-edge", EINVAL, || {
        let map = edge()?;
        let words = u::list(0, 0, &[]);
        Ok(Outcome::of(&ioctl(
            device()?,
            u::CREATE_LIST,
            at_edge(&map, &words, 1),
        )))
    });
    t.custom("pointer/unaligned", OK, || {
        let file = File::new(0, PLAIN)?;
        let request = u::Create {
            memfd: file.fd as u32,
            flags: 0,
            offset: 0,
            size: PAGE,
        };
        let mut bytes = vec![0u8; 1 + size_of::<u::Create>()];
        let to = bytes[1..].as_mut_ptr().cast::<u::Create>();
        // SAFETY: a struct of integers, and room for it.
        unsafe { to.write_unaligned(request) };
        Ok(Outcome::of(&ioctl(
            device()?,
            u::CREATE,
            bytes.as_ptr() as usize + 1,
        )))
    });
    t.custom("pointer/read-only", OK, || {
        static REQUEST: [u64; 1] = [0];
        let file = File::new(0, PLAIN)?;
        let memfd = u::memfd(0, PAGE)?;
        let map = Map::shared(memfd, PAGE)?;
        let words = [file.fd as u64, REQUEST[0], PAGE];
        let address = at_edge(&map, &words, 3);
        // SAFETY: our mapping, which is only read from now on.
        let ret =
            unsafe { libc::mprotect(map.address() as *mut _, PAGE as usize, libc::PROT_READ) };
        check(i64::from(ret))?;
        Ok(Outcome::of(&ioctl(device()?, u::CREATE, address)))
    });
    t.custom("pointer/in-the-memfd-itself", OK, || {
        let file = File::new(0, PLAIN)?;
        let map = Map::shared(file.fd, PAGE)?;
        let address = at_edge(&map, &[file.fd as u64, 0, PAGE], 3);
        Ok(Outcome::of(&ioctl(device()?, u::CREATE, address)))
    });
}

fn devices(t: &mut Table) {
    let modes = [
        ("rdonly", libc::O_RDONLY),
        ("wronly", libc::O_WRONLY),
        ("rdwr", libc::O_RDWR),
    ];
    for (name, mode) in modes {
        let ask = Ask::single(PLAIN, 0, 4 * PAGE).device(mode);
        t.ask(format!("device/{name}"), OK, ask);
        let ask = Ask::single(PLAIN, 0, PAGE).device(mode | libc::O_CLOEXEC | libc::O_NONBLOCK);
        t.ask(format!("device/{name}-flags"), OK, ask);
    }
    t.custom("device/close-on-exec", OK, || {
        let with = open(u::DEVICE, libc::O_RDWR | libc::O_CLOEXEC)?;
        let without = open(u::DEVICE, libc::O_RDWR)?;
        let mut outcome = Outcome::of(&Ok(with));
        outcome.fact("with", fcntl(with, libc::F_GETFD, 0)?);
        outcome.fact("without", fcntl(without, libc::F_GETFD, 0)?);
        outcome.fact("mode", fcntl(with, libc::F_GETFL, 0)? & libc::O_ACCMODE);
        Ok(outcome)
    });
    t.custom("device/open-directory", Expect::Compared, || {
        Ok(Outcome::of(&open(
            u::DEVICE,
            libc::O_RDONLY | libc::O_DIRECTORY,
        )))
    });
    t.custom("device/open-exclusive", Expect::Error("EEXIST"), || {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        Ok(Outcome::of(&open(u::DEVICE, flags)))
    });
    t.custom("device/path-only", Expect::Error("EBADF"), || {
        let path = open(u::DEVICE, libc::O_PATH)?;
        let file = File::new(0, PLAIN)?;
        Ok(Outcome::of(&create(path, file.fd, 0, PAGE, 0)))
    });
    t.custom("device/path-only-and-wrong", Expect::Error("EBADF"), || {
        let path = open(u::DEVICE, libc::O_PATH)?;
        let mut outcome = Outcome::of(&create(path, -1, 0, PAGE, 0));
        let bad = ioctl(path, u::CREATE_LIST, 8).err();
        outcome.fact(
            "with a bad pointer",
            bad.as_ref().map_or(String::new(), errno_name),
        );
        Ok(outcome)
    });
    t.custom("device/descriptor-numbers", OK, || {
        let lowest = fcntl(0, libc::F_DUPFD, 0)?;
        close(lowest)?;
        let first = device()?;
        let mut outcome = Outcome::of(&Ok(first));
        outcome.fact("the lowest that is free", first == lowest);
        let next = device()?;
        outcome.fact("then the next", next == lowest + 1);
        outcome.fact("and the one after", device()? == lowest + 2);
        close(first)?;
        outcome.fact("and the first again", device()? == lowest);
        Ok(outcome)
    });
    t.custom(
        "device/opened-with-one-descriptor-free",
        Expect::Error("EMFILE"),
        || {
            let file = File::new(0, PLAIN)?;
            let next = fcntl(0, libc::F_DUPFD, 0)?;
            close(next)?;
            set_limit(libc::RLIMIT_NOFILE, next as u64 + 1)?;
            let device = device()?;
            let mut outcome = Outcome::of(&create(device, file.fd, 0, PAGE, 0));
            outcome.fact("number", device == next);
            let same = status(device)?.st_rdev == named()?.st_rdev;
            outcome.fact("the device of that name", same);
            set_limit(libc::RLIMIT_NOFILE, next as u64)?;
            Ok(outcome)
        },
    );
    t.custom("device/openat", OK, || {
        let root = open(c"/", libc::O_RDONLY)?;
        // SAFETY: a terminated string.
        let fd = unsafe { libc::openat(root, u::DEVICE.as_ptr(), libc::O_RDWR) };
        let file = File::new(0, PLAIN)?;
        Ok(Outcome::of(&create(fd, file.fd, 0, PAGE, 0)))
    });
    t.custom("device/is-there", OK, || {
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        let path = u::DEVICE.as_ptr();
        let cwd = libc::AT_FDCWD;
        for (name, mode) in [
            ("exists", libc::F_OK),
            ("writable", libc::R_OK | libc::W_OK),
        ] {
            // SAFETY: a terminated string.
            outcome.fact(&format!("access {name}"), unsafe {
                libc::access(path, mode)
            });
            // SAFETY: a terminated string.
            let ret = unsafe { libc::faccessat(cwd, path, mode, 0) };
            outcome.fact(&format!("faccessat {name}"), ret);
        }
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: a terminated string and room for the result.
        outcome.fact("stat", unsafe { libc::stat(path, stat.as_mut_ptr()) });
        // SAFETY: zeroes are a value, and so is what the kernel wrote.
        let mode = unsafe { stat.assume_init() }.st_mode & libc::S_IFMT;
        outcome.fact("character device", mode == libc::S_IFCHR);
        // SAFETY: as above.
        outcome.fact("lstat", unsafe { libc::lstat(path, stat.as_mut_ptr()) });
        // SAFETY: as above.
        outcome.fact("fstatat", unsafe {
            libc::fstatat(cwd, path, stat.as_mut_ptr(), 0)
        });
        let mut statx = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: as above.
        let ret = unsafe { libc::statx(cwd, path, 0, libc::STATX_TYPE, statx.as_mut_ptr()) };
        outcome.fact("statx", ret);
        // SAFETY: zeroes are a value, and so is what the kernel wrote.
        let mode = u32::from(unsafe { statx.assume_init() }.stx_mode) & libc::S_IFMT;
        outcome.fact("character device, says statx", mode == libc::S_IFCHR);
        outcome.fact("std", std::path::Path::new("/dev/udmabuf").exists());
        Ok(outcome)
    });
    // Only one name is the device's, and not those that begin or end as it does.
    t.custom("device/other-names", Expect::Error("ENOENT"), || {
        let names = [
            c"/dev/udmabuf0",
            c"/dev/udmabuf-backup",
            c"/dev/udmabuf/",
            c"/dev/udmabu",
            c"/dev/udmabuf/x",
            c"/udmabuf",
            c"",
        ];
        let mut outcome = Outcome::of(&open(names[0], libc::O_RDWR));
        for name in names {
            let shown = name.to_string_lossy();
            let error = open(name, libc::O_RDWR).err();
            outcome.fact(
                &format!("open `{shown}`"),
                error.as_ref().map_or(String::new(), errno_name),
            );
            // SAFETY: a terminated string.
            let ret = unsafe { libc::access(name.as_ptr(), libc::F_OK) };
            outcome.fact(&format!("access `{shown}`"), ret);
            let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
            // SAFETY: a terminated string and room for the result.
            let ret = unsafe { libc::stat(name.as_ptr(), stat.as_mut_ptr()) };
            outcome.fact(&format!("stat `{shown}`"), ret);
        }
        Ok(outcome)
    });
    // The kernel does not read a path that it does not need, so nobody else may.
    for (name, free, flags) in [
        ("", true, 0),
        ("-no-descriptor", false, 0),
        ("-flags", true, -1),
    ] {
        let address = [
            ("null", 0),
            ("low", 1),
            ("kernel", 0xffff_8880_0000_0000_usize),
            ("last", usize::MAX),
            ("edge", 0),
        ];
        for (sort, address) in address {
            let name = format!("device/path-{sort}{name}");
            t.custom(name, Expect::Compared, move || {
                let map = edge()?;
                // A beginning of the name, behind which nothing can be read.
                let edge = map.address() + PAGE as usize - 8;
                // SAFETY: in the first page, and aligned.
                unsafe { (edge as *mut [u8; 8]).write_volatile(*b"/dev/udm") };
                let path = if sort == "edge" { edge } else { address } as *const libc::c_char;
                if !free {
                    let next = fcntl(0, libc::F_DUPFD, 0)?;
                    close(next)?;
                    set_limit(libc::RLIMIT_NOFILE, next as u64)?;
                }
                let cwd = libc::AT_FDCWD;
                let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
                let mut statx = std::mem::MaybeUninit::<libc::statx>::zeroed();
                let (open_flags, mode) = match flags {
                    0 => (libc::O_RDWR, libc::R_OK),
                    // Not a directory, which such a file needs; unknown modes and flags.
                    _ => (libc::O_TMPFILE, 77),
                };
                let mut outcome = Outcome {
                    ret: "0".to_owned(),
                    ..Outcome::default()
                };
                let mut fact = |what: &str, ret: c_int| {
                    let error = check(i64::from(ret)).err();
                    outcome.fact(what, error.as_ref().map_or(String::new(), errno_name));
                };
                // SAFETY: the kernel reads the path, if it can.
                fact("open", unsafe { libc::open(path, open_flags, 0) });
                // SAFETY: as above.
                fact("openat", unsafe { libc::openat(cwd, path, open_flags, 0) });
                // SAFETY: as above.
                fact("access", unsafe { libc::access(path, mode) });
                // SAFETY: as above.
                fact("faccessat", unsafe {
                    libc::faccessat(cwd, path, mode, flags)
                });
                // SAFETY: as above, and room for the result.
                fact("stat", unsafe { libc::stat(path, stat.as_mut_ptr()) });
                // SAFETY: as above.
                fact("fstatat", unsafe {
                    libc::fstatat(cwd, path, stat.as_mut_ptr(), flags)
                });
                // SAFETY: as above.
                fact("statx", unsafe {
                    libc::statx(cwd, path, flags, u32::MAX, statx.as_mut_ptr())
                });
                Ok(outcome)
            });
        }
    }
    t.custom("device/seek", Expect::Compared, || {
        // SAFETY: no memory is involved.
        let ret = unsafe { libc::lseek(device()?, 0, libc::SEEK_END) };
        Ok(Outcome::number(&check(ret).map(|ret| ret as c_int)))
    });
    t.custom("device/read", EINVAL, || {
        let mut byte = 0u8;
        // SAFETY: room for one byte.
        let ret = unsafe { libc::read(device()?, (&raw mut byte).cast(), 1) };
        Ok(Outcome::number(&check(ret as i64).map(|ret| ret as c_int)))
    });
    t.custom("device/mmap", Expect::Compared, || {
        let result = Map::shared(device()?, PAGE).map(|_| 0);
        Ok(Outcome::number(&result))
    });
    let enotty = Expect::Error("ENOTTY");
    for (name, request) in [
        ("zero", 0),
        ("unknown", 0x4008_7544),
        ("wrong-size", 0x4010_7542),
    ] {
        t.custom(format!("device/ioctl-{name}"), enotty, move || {
            Ok(Outcome::of(&ioctl(device()?, request, 0)))
        });
    }
    t.custom("device/ioctl-sign-extended", OK, || {
        let file = File::new(0, PLAIN)?;
        let words = [file.fd as u64, 0, PAGE];
        let request = u::CREATE | 0xffff_ffff_0000_0000;
        Ok(Outcome::of(&ioctl(
            device()?,
            request,
            words.as_ptr() as usize,
        )))
    });
    t.custom("device/closed", Expect::Error("EBADF"), || {
        let fd = device()?;
        close(fd)?;
        Ok(Outcome::of(&create(fd, 0, 0, PAGE, 0)))
    });
    for (name, kind) in [
        ("memfd", Kind::Memfd),
        ("pipe", Kind::Pipe),
        ("zero", Kind::DevZero),
    ] {
        t.custom(format!("device/is-a-{name}"), enotty, move || {
            let other = File::new(
                0,
                Spec {
                    kind,
                    filled: false,
                    ..PLAIN
                },
            )?;
            let file = File::new(0, PLAIN)?;
            Ok(Outcome::of(&create(other.fd, file.fd, 0, PAGE, 0)))
        });
    }
    t.custom("device/dup", OK, || {
        let copy = fcntl(device()?, libc::F_DUPFD_CLOEXEC, 20)?;
        let file = File::new(0, PLAIN)?;
        Ok(Outcome::of(&create(copy, file.fd, 0, PAGE, 0)))
    });
    t.custom("device/fork", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let status = in_child(|| create(device, file.fd, 0, PAGE, 0).is_ok())?;
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact("in the child", status);
        outcome.fact("in the parent", create(device, file.fd, 0, PAGE, 0).is_ok());
        Ok(outcome)
    });
    t.custom("device/exec", OK, || {
        let device = device()?;
        let status = std::process::Command::new("/proc/self/exe")
            .arg("--create-with")
            .arg(device.to_string())
            .status()?;
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact("in the new program", status.success());
        Ok(outcome)
    });
}

/// What the program does that the case `device/exec` starts.
pub fn create_with(device: c_int) -> u8 {
    let file = match File::new(0, PLAIN) {
        Ok(file) => file,
        Err(_) => return 2,
    };
    u8::from(create(device, file.fd, 0, PAGE, 0).is_err())
}

/// Runs something in a child, and returns whether it returned true.
pub(crate) fn in_child(run: impl FnOnce() -> bool) -> Result<bool> {
    // SAFETY: this process has one thread, so the child may go on as any program.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let good = run();
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: the status is written to `status`.
    check(i64::from(unsafe { libc::waitpid(child, &mut status, 0) }))?;
    Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0)
}

fn buffers(t: &mut Table) {
    t.custom("buffer/outlives-all", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let dmabuf = create(device, file.fd, 0, 16 * PAGE, 0)?;
        close(device)?;
        close(file.fd)?;
        let map = Map::shared(dmabuf, 16 * PAGE)?;
        close(dmabuf)?;
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact(
            "still there",
            (0..16).all(|page| map.get(page) == mark(0, page)),
        );
        Ok(outcome)
    });
    let dmabuf = || -> Result<c_int> {
        let file = File::new(0, PLAIN)?;
        Ok(create(device()?, file.fd, 0, 16 * PAGE, 0)?)
    };
    t.custom("buffer/sync-cycle", OK, move || {
        let fd = dmabuf()?;
        for _ in 0..1000 {
            u::sync(fd, u::SYNC_RW)?;
            u::sync(fd, u::SYNC_RW | u::SYNC_END)?;
        }
        Ok(Outcome::number(&u::sync(fd, u::SYNC_READ)))
    });
    t.custom("buffer/sync-end-first", Expect::Compared, move || {
        Ok(Outcome::number(&u::sync(
            dmabuf()?,
            u::SYNC_RW | u::SYNC_END,
        )))
    });
    t.custom("buffer/sync-unknown-flag", EINVAL, move || {
        Ok(Outcome::number(&u::sync(dmabuf()?, 8)))
    });
    t.custom("buffer/map-private", EINVAL, move || {
        let fd = dmabuf()?;
        let map = Map::new(
            fd,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
        );
        Ok(Outcome::number(&map.map(|_| 0)))
    });
    t.custom("buffer/map-private-readonly", EINVAL, move || {
        let map = Map::new(dmabuf()?, PAGE, libc::PROT_READ, libc::MAP_PRIVATE);
        Ok(Outcome::number(&map.map(|_| 0)))
    });
    t.custom("buffer/map-too-long", EINVAL, move || {
        Ok(Outcome::number(
            &Map::shared(dmabuf()?, 17 * PAGE).map(|_| 0),
        ))
    });
    t.custom("buffer/map-behind", EINVAL, move || {
        let map = Map::at_offset(
            dmabuf()?,
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            16 * PAGE,
        );
        Ok(Outcome::number(&map.map(|_| 0)))
    });
    t.custom("buffer/map-odd-length", OK, move || {
        let map = Map::shared(dmabuf()?, 3 * PAGE + 100);
        let mut outcome = Outcome::number(&map.as_ref().map(|_| 0).map_err(again));
        outcome.fact("last page", map.is_ok_and(|map| map.get(3) == mark(0, 3)));
        Ok(outcome)
    });
    t.custom("buffer/map-offset", OK, move || {
        let map = Map::at_offset(
            dmabuf()?,
            2 * PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            5 * PAGE,
        );
        let mut outcome = Outcome::number(&map.as_ref().map(|_| 0).map_err(again));
        outcome.fact("page 6", map.is_ok_and(|map| map.get(1) == mark(0, 6)));
        Ok(outcome)
    });
    t.custom("buffer/map-large", OK, || {
        let size = 6 * MIB + PAGE;
        let file = File::new(
            0,
            Spec {
                bytes: size,
                ..PLAIN
            },
        )?;
        let fd = create(device()?, file.fd, 0, size, 0)?;
        let mut outcome = Outcome::of(&Ok(fd));
        for (name, offset) in [("start", 0), ("offset", 3 * PAGE), ("far", 2 * MIB + PAGE)] {
            let len = size - offset;
            let map = Map::at_offset(fd, len, libc::PROT_READ, libc::MAP_SHARED, offset)?;
            let right = (0..len / PAGE).all(|p| map.get(p) == mark(0, p + offset / PAGE));
            outcome.fact(name, right);
        }
        Ok(outcome)
    });
    t.custom("buffer/grows-with-no-file", OK, || {
        // What the file does after the call is not the buffer's concern.
        let file = File::new(0, PLAIN)?;
        let fd = create(device()?, file.fd, 0, 16 * PAGE, 0)?;
        // SAFETY: no memory is involved.
        let shrunk = unsafe { libc::ftruncate(file.fd, 0) };
        // SAFETY: no memory is involved.
        let grown = unsafe { libc::ftruncate(file.fd, 64 * PAGE as i64) };
        let mut outcome = Outcome::of(&Ok(fd));
        outcome.fact("shrinking", shrunk);
        outcome.fact("growing", grown);
        outcome.fact("size", end(fd)?);
        Ok(outcome)
    });
    t.custom("buffer/hole-punched", OK, || {
        let file = File::new(0, PLAIN)?;
        let fd = create(device()?, file.fd, 0, 16 * PAGE, 0)?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        let ret = unsafe { libc::fallocate(file.fd, mode, 0, PAGE as i64) };
        check(i64::from(ret))?;
        let map = Map::shared(fd, 16 * PAGE)?;
        let view = Map::shared(file.fd, 16 * PAGE)?;
        let mut outcome = Outcome::of(&Ok(fd));
        outcome.fact("the buffer keeps its page", map.get(0) == mark(0, 0));
        outcome.fact("the file has another", view.get(0) == 0);
        Ok(outcome)
    });
    t.custom("buffer/seal-write-after", Expect::Error("EBUSY"), || {
        let file = File::new(0, PLAIN)?;
        create(device()?, file.fd, 0, 16 * PAGE, 0)?;
        Ok(Outcome::number(&fcntl(
            file.fd,
            libc::F_ADD_SEALS,
            libc::F_SEAL_WRITE,
        )))
    });
    t.custom("buffer/seal-write-after-close", OK, || {
        let file = File::new(0, PLAIN)?;
        let fd = create(device()?, file.fd, 0, 16 * PAGE, 0)?;
        close(fd)?;
        Ok(Outcome::number(&fcntl(
            file.fd,
            libc::F_ADD_SEALS,
            libc::F_SEAL_WRITE,
        )))
    });
    t.custom("buffer/resize", Expect::Compared, move || {
        // SAFETY: no memory is involved.
        let ret = unsafe { libc::ftruncate(dmabuf()?, 0) };
        Ok(Outcome::number(
            &check(i64::from(ret)).map(|ret| ret as c_int),
        ))
    });
}

fn again(error: &std::io::Error) -> std::io::Error {
    std::io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(0))
}

pub(crate) fn set_limit(resource: libc::__rlimit_resource_t, value: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: the limit is read from `limit`.
    check(i64::from(unsafe { libc::setrlimit(resource, &limit) }))?;
    Ok(())
}

fn surroundings(t: &mut Table) {
    t.custom(
        "process/no-descriptor-free",
        Expect::Error("EMFILE"),
        || {
            let file = File::new(0, PLAIN)?;
            let device = device()?;
            let next = fcntl(0, libc::F_DUPFD, 0)?;
            close(next)?;
            set_limit(libc::RLIMIT_NOFILE, next as u64)?;
            Ok(Outcome::of(&create(device, file.fd, 0, PAGE, 0)))
        },
    );
    t.custom("process/one-descriptor-free", OK, || {
        let file = File::new(0, PLAIN)?;
        let device = device()?;
        let next = fcntl(0, libc::F_DUPFD, 0)?;
        close(next)?;
        set_limit(libc::RLIMIT_NOFILE, next as u64 + 1)?;
        Ok(Outcome::of(&create(device, file.fd, 0, PAGE, 0)))
    });
    for (name, free, expect) in [("one", 1, OK), ("no", 0, Expect::Error("EMFILE"))] {
        for (sort, spec) in [("", PLAIN), ("-hugetlb", HUGETLB)] {
            let rdonly = Spec {
                mode: libc::O_RDONLY,
                ..spec
            };
            let name = format!("process/{name}-descriptor-free-rdonly{sort}");
            t.custom(name, expect, move || {
                let file = File::new(0, rdonly)?;
                let device = device()?;
                let next = fcntl(0, libc::F_DUPFD, 0)?;
                close(next)?;
                set_limit(libc::RLIMIT_NOFILE, next as u64 + free)?;
                Ok(Outcome::of(&create(device, file.fd, 0, PAGE, 0)))
            });
        }
    }
    t.custom("process/few-addresses", OK, || {
        let bytes = 8 * MIB;
        let file = File::new(0, Spec { bytes, ..PLAIN })?;
        let device = device()?;
        let text = std::fs::read_to_string("/proc/self/statm")?;
        let pages: u64 = text.split(' ').next().unwrap_or("0").parse()?;
        set_limit(libc::RLIMIT_AS, pages * PAGE + bytes + 512 * 1024)?;
        Ok(Outcome::of(&create(device, file.fd, 0, bytes, 0)))
    });
    t.custom("process/mlockall", OK, || {
        let file = File::new(0, PLAIN)?;
        // SAFETY: it only fills memory that is there.
        let ret = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
        if ret != 0 {
            return unavailable("mlockall is not permitted");
        }
        let parts = [file.item(0, PAGE), file.item(8 * PAGE, PAGE)];
        let result = create_list(device()?, &parts, 0);
        Ok(Outcome::of(&result))
    });
    t.custom("process/sparse-stays-sparse", OK, || {
        let file = File::new(
            0,
            Spec {
                bytes: 256 * MIB,
                filled: false,
                ..PLAIN
            },
        )?;
        let parts = [file.item(0, PAGE), file.item(255 * MIB, PAGE)];
        let result = create_list(device()?, &parts, 0);
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: room for the result.
        check(i64::from(unsafe {
            libc::fstat(file.fd, stat.as_mut_ptr())
        }))?;
        let mut outcome = Outcome::of(&result);
        // SAFETY: filled by the kernel.
        outcome.fact("blocks", unsafe { stat.assume_init() }.st_blocks);
        Ok(outcome)
    });
    t.custom("process/threads", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let fd = file.fd;
                thread::spawn(move || {
                    let mut makers = BTreeSet::new();
                    let good = (0..200).all(|i| {
                        let page = (thread * 5 + i) % 12;
                        let Ok(dmabuf) = create(device, fd, page * PAGE, 4 * PAGE, 1) else {
                            return false;
                        };
                        makers.extend(u::exporter(dmabuf));
                        let right = Map::shared(dmabuf, 4 * PAGE)
                            .is_ok_and(|map| (0..4).all(|p| map.get(p) == mark(0, page + p)));
                        right && close(dmabuf).is_ok()
                    });
                    (good, makers)
                })
            })
            .collect();
        let (mut good, mut makers) = (true, BTreeSet::new());
        for thread in threads {
            let (right, others) = thread.join().unwrap_or_default();
            good &= right;
            makers.extend(others);
        }
        let makers: Vec<String> = makers.into_iter().collect();
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            made_by: Some(makers.join(" and ")),
            ..Outcome::default()
        };
        outcome.fact("all buffers right", good);
        Ok(outcome)
    });
    // A thread maps and unmaps the memfd, and maps other things in its place. A shim that uses the program's
    // mappings must not take a wrong page.
    t.custom("process/mappings-change", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let other = File::new(7, PLAIN)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let place = Map::new(-1, 16 * PAGE, libc::PROT_NONE, flags)?;
        let address = place.address();
        let stop = &*Box::leak(Box::new(AtomicBool::new(false)));
        let (fd, other) = (file.fd, other.fd);
        let changing = thread::spawn(move || {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let mut turns = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let (fd, flags) = match turns % 4 {
                    0 => (fd, libc::MAP_SHARED),
                    1 => (other, libc::MAP_SHARED),
                    2 => (fd, libc::MAP_SHARED),
                    _ => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
                };
                let at = address as *mut libc::c_void;
                // SAFETY: the place that was reserved above, which nobody reads.
                unsafe { libc::mmap(at, 16 * PAGE as usize, prot, flags | libc::MAP_FIXED, fd, 0) };
                turns += 1;
            }
            turns
        });
        let mut good = true;
        for _ in rounds(2000) {
            let dmabuf = create(device, fd, 0, 16 * PAGE, 0)?;
            let map = Map::shared(dmabuf, 16 * PAGE)?;
            good &= (0..16).all(|page| map.get(page) == mark(0, page));
            close(dmabuf)?;
        }
        stop.store(true, Ordering::Relaxed);
        let turns = changing.join().unwrap_or(0);
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact("all buffers right", good);
        outcome.fact("mappings changed", turns > 10);
        Ok(outcome)
    });
    // A thread puts another file at the number that a request names. The buffer is of one of the two, which both may be
    // used, and what is made of the wrong one does not stay.
    t.custom("process/files-change", OK, || {
        let device = device()?;
        let files = [File::new(0, PLAIN)?, File::new(7, PLAIN)?];
        let place = fcntl(files[0].fd, libc::F_DUPFD, 0)?;
        let fds = [files[0].fd, files[1].fd];
        let stop = &*Box::leak(Box::new(AtomicBool::new(false)));
        // A thread's stack is kept, so mappings are not compared.
        let before = traces()?.1;
        let changing = thread::spawn(move || {
            let mut turns = 0u64;
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: no memory is involved.
                unsafe { libc::dup2(fds[(turns % 2) as usize], place) };
                turns += 1;
                if turns % 16 == 0 {
                    thread::sleep(Duration::from_micros(200));
                }
            }
            turns
        });
        let (mut good, mut made) = (true, 0);
        for _ in rounds(1000) {
            match create(device, place, 0, 4 * PAGE, 0) {
                Ok(dmabuf) => {
                    let map = Map::shared(dmabuf, 4 * PAGE)?;
                    let is_of = |file| (0..4).all(|page| map.get(page) == mark(file, page));
                    good &= is_of(0) || is_of(7);
                    close(dmabuf)?;
                    made += 1;
                }
                // The shim gives up if that goes on.
                Err(error) => good &= error.raw_os_error() == Some(libc::EBADFD),
            }
        }
        stop.store(true, Ordering::Relaxed);
        let turns = changing.join().unwrap_or(0);
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact("all buffers are of one file", good);
        outcome.fact("some were made", made > 0);
        outcome.fact("the file changed", turns > 100);
        outcome.fact("descriptors are as before", traces()?.1 == before);
        Ok(outcome)
    });
    // A thread changes the count of a list, while udmabuf reads it once: a buffer is of the items that one of the counts
    // names.
    t.custom("process/list-changes", OK, || {
        let device = device()?;
        let file = File::new(0, PLAIN)?;
        let items: Vec<_> = (0..3).map(|page| file.item(page * PAGE, PAGE)).collect();
        let list = u::list(0, 1, &items);
        let list: &[AtomicU64] = Box::leak(list.into_iter().map(AtomicU64::new).collect());
        let stop = &*Box::leak(Box::new(AtomicBool::new(false)));
        let turns = &*Box::leak(Box::new(AtomicU64::new(0)));
        let changing = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let turn = turns.fetch_add(1, Ordering::Relaxed);
                list[0].store([1, 3][(turn % 2) as usize] << 32, Ordering::Relaxed);
            }
        });
        while turns.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let mut good = true;
        for _ in rounds(1000) {
            match ioctl(device, u::CREATE_LIST, list.as_ptr() as usize) {
                Ok(dmabuf) => {
                    let pages = end(dmabuf)? as u64 / PAGE;
                    let map = Map::shared(dmabuf, PAGE * pages)?;
                    good &= [1, 3].contains(&pages);
                    good &= (0..pages).all(|page| map.get(page) == mark(0, page));
                    close(dmabuf)?;
                }
                Err(_) => good = false,
            }
        }
        stop.store(true, Ordering::Relaxed);
        good &= changing.join().is_ok();
        let mut outcome = Outcome {
            ret: "0".to_owned(),
            ..Outcome::default()
        };
        outcome.fact("all buffers are of one count", good);
        outcome.fact("the count changed", turns.load(Ordering::Relaxed) > 10);
        Ok(outcome)
    });
    t.custom("process/in-a-signal-handler", OK, || {
        static mut FDS: [c_int; 3] = [-1; 3];
        extern "C" fn handler(_: c_int) {
            // SAFETY: the handler runs in the one thread that there is, by raise().
            let [device, memfd, _] = unsafe { FDS };
            let request = u::Create {
                memfd: memfd as u32,
                flags: 0,
                offset: 0,
                size: PAGE,
            };
            // SAFETY: the request is valid.
            let dmabuf = unsafe { libc::ioctl(device, u::CREATE, &raw const request) };
            // SAFETY: as above.
            unsafe { FDS[2] = dmabuf };
        }
        let file = File::new(0, PLAIN)?;
        let device = device()?;
        // SAFETY: before the handler can run.
        unsafe { FDS = [device, file.fd, -1] };
        // SAFETY: a handler that makes one system call.
        unsafe { libc::signal(libc::SIGUSR1, handler as *const () as libc::sighandler_t) };
        // SAFETY: the handler returns before this does.
        unsafe { libc::raise(libc::SIGUSR1) };
        // SAFETY: the handler is done.
        let dmabuf = unsafe { FDS[2] };
        if dmabuf < 0 {
            bail!("{}", errno_name(&std::io::Error::last_os_error()));
        }
        Ok(Outcome::of(&Ok(dmabuf)))
    });
    t.custom("process/errno-untouched", OK, || {
        let file = File::new(0, PLAIN)?;
        let device = device()?;
        // SAFETY: a call without conditions.
        let place = unsafe { libc::__errno_location() };
        // SAFETY: libc's pointer is valid.
        unsafe { place.write(77) };
        let result = create(device, file.fd, 0, PAGE, 0);
        // SAFETY: libc's pointer is valid.
        let errno = unsafe { place.read() };
        let mut outcome = Outcome::of(&result);
        outcome.fact("errno is as before", errno == 77);
        Ok(outcome)
    });
}

fn limits(t: &mut Table) {
    let limit = Expect::Limit;
    let bytes = 132 * MIB;
    let file = Spec { bytes, ..PLAIN };
    t.single("limit/132-mib", limit, file, 0, bytes);
    t.single(
        "limit/65-mib",
        limit,
        Spec {
            bytes: 65 * MIB,
            ..PLAIN
        },
        0,
        65 * MIB,
    );
    let mapped = Spec {
        mapped: Mapped::Shared,
        ..file
    };
    t.single("limit/132-mib-mapped", limit, mapped, 0, bytes);
    let two = vec![(0, 0, 40 * MIB), (0, 0, 40 * MIB)];
    t.list(
        "limit/80-mib-of-40",
        limit,
        &[Spec {
            bytes: 40 * MIB,
            ..PLAIN
        }],
        two,
    );
    for count in [1025u64, 1645, 2048, 16_384] {
        let scattered = move |i: u64| (0, (i * 7919 % (2 * count)) * PAGE, PAGE);
        let file = Spec {
            bytes: 2 * count * PAGE,
            ..PLAIN
        };
        for (name, file) in [
            ("", file),
            (
                "-mapped",
                Spec {
                    mapped: Mapped::Shared,
                    ..file
                },
            ),
        ] {
            let parts = (0..count).map(scattered).collect();
            t.list(&format!("limit/{count}-items{name}"), limit, &[file], parts);
        }
    }
    let parts = (0..2000)
        .map(|i| (0, (i * 1009 % 2048) * PAGE, PAGE))
        .collect();
    t.list("limit/2000-items-hugetlb", limit, &[HUGETLB], parts);
}
