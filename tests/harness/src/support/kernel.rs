// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the kernel reports about itself, and settings that are restored.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;

use super::memory::{Memory, HUGE, PAGE, RW};
use super::{frames, Skip};
use crate::{check, check_eq};

/// A file's text.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Writes a file of the kernel's.
pub fn write(path: impl AsRef<Path>, text: impl ToString) -> Result<()> {
    let path = path.as_ref();
    let text = text.to_string();
    fs::write(path, &text).with_context(|| format!("writing {text:?} to {}", path.display()))
}

/// A file that holds a number.
pub fn number(path: impl AsRef<Path>) -> Result<i64> {
    let path = path.as_ref();
    read(path)?
        .trim()
        .parse()
        .with_context(|| format!("parsing {}", path.display()))
}

/// The number after `key` in a file of lines such as `VmPin:  8 kB` or `nr_free_pages 7`.
pub fn field(path: &str, key: &str) -> Result<i64> {
    fields(path, [key]).map(|[value]| value)
}

/// Several of them, from one reading.
pub fn fields<const N: usize>(path: &str, keys: [&str; N]) -> Result<[i64; N]> {
    let text = read(path)?;
    let mut values = [0; N];
    for (value, key) in values.iter_mut().zip(keys) {
        let found = text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()?.trim_end_matches(':') == key).then(|| words.next())
        });
        let word = found.with_context(|| format!("{path} has no {key}"))?;
        let word = word.with_context(|| format!("{path}: {key} has no value"))?;
        *value = word.parse()?;
    }
    Ok(values)
}

/// Counters of `/proc/vmstat`, exactly: with what each processor has counted for itself.
pub fn vmstats<const N: usize>(names: [&str; N]) -> Result<[i64; N]> {
    write("/proc/sys/vm/stat_refresh", "1")?;
    fields("/proc/vmstat", names)
}

/// One of them.
pub fn vmstat(name: &str) -> Result<i64> {
    vmstats([name]).map(|[value]| value)
}

/// Pages pinned by anyone, exactly.
pub fn pins() -> Result<i64> {
    let [acquired, released] = vmstats(["nr_foll_pin_acquired", "nr_foll_pin_released"])?;
    Ok(acquired - released)
}

/// What this process pinned, as `VmPin` says, in bytes.
pub fn vm_pin() -> Result<i64> {
    Ok(field("/proc/self/status", "VmPin")? * 1024)
}

/// What this process locked, as `VmLck` says, in bytes.
pub fn vm_lck() -> Result<i64> {
    Ok(field("/proc/self/status", "VmLck")? * 1024)
}

/// References that keep the module loaded; `None` if it is not.
pub fn module_references() -> Result<Option<i64>> {
    let path = Path::new("/sys/module/pinbuf/refcnt");
    path.exists().then(|| number(path)).transpose()
}

/// How many dma-bufs there are.
pub fn dma_bufs() -> Result<i64> {
    let text = read("/sys/kernel/debug/dma_buf/bufinfo")?;
    let line = text
        .lines()
        .rev()
        .find(|line| line.starts_with("Total "))
        .context("bufinfo")?;
    let count = line.split_whitespace().nth(1).context("bufinfo's count")?;
    Ok(count.parse()?)
}

/// Open descriptors of this process.
pub fn descriptors() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        // The directory itself is open while it is read.
        if !target.to_string_lossy().ends_with("/fd") {
            found.push(format!("{} -> {}", path.display(), target.display()));
        }
    }
    found.sort();
    Ok(found)
}

/// Bounce buffer slots in use.
pub fn bounce_slots() -> Result<i64> {
    let path = Path::new("/sys/kernel/debug/swiotlb/io_tlb_used");
    if path.exists() {
        number(path)
    } else {
        Ok(0)
    }
}

/// What the kernel holds for buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Pages pinned by anyone.
    pub pins: i64,
    /// All dma-bufs.
    pub dma_bufs: i64,
    /// References that keep the module loaded.
    pub module_references: Option<i64>,
    /// Bounce buffer slots in use.
    pub bounce_slots: i64,
    /// All huge pages of 2 MiB, those that are free, and those that are reserved.
    pub huge_pages: [i64; 3],
}

impl Counters {
    /// As they are now.
    pub fn now() -> Result<Self> {
        Ok(Self {
            pins: pins()?,
            dma_bufs: dma_bufs()?,
            module_references: module_references()?,
            bounce_slots: bounce_slots()?,
            huge_pages: fields(
                "/proc/meminfo",
                ["HugePages_Total", "HugePages_Free", "HugePages_Rsvd"],
            )?,
        })
    }
}

/// Counts of all objects that the kernel counts.
pub fn objects() -> Result<BTreeMap<String, i64>> {
    let mut counts = BTreeMap::new();
    let slabs = read("/proc/slabinfo")?;
    // The version, and the names of the columns.
    for line in slabs.lines().skip(2) {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(count)) = (words.next(), words.next()) {
            // The kernel frees address ranges, those of tasks' stacks for example, in large batches: many wait
            // at any time.
            if name == "vmap_area" {
                continue;
            }
            counts.insert(format!("objects of {name}"), count.parse()?);
        }
    }
    let areas = read("/proc/vmallocinfo")?;
    let ours = areas.lines().filter(|line| line.contains("[pinbuf]"));
    counts.insert(
        "areas of the kernel's addresses".to_owned(),
        i64::try_from(ours.count())?,
    );
    let files = read("/proc/sys/fs/file-nr")?;
    let files = files.split_whitespace().next().context("file-nr")?;
    counts.insert("open files".to_owned(), files.parse()?);
    Ok(counts)
}

/// Whether the kernel checks itself at the cost of most of its time: KASAN, lock debugging, kmemleak.
pub fn has_checkers() -> bool {
    Path::new("/sys/kernel/debug/kmemleak").exists()
}

/// Waits for a grace period of RCU: what was to be freed after one is freed, or soon will be.
pub fn wait_for_rcu() -> Result<()> {
    // SAFETY: the call takes numbers, and no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    Errno::result(result).context("membarrier")?;
    Ok(())
}

/// Whether every device mapping goes through a bounce buffer.
pub fn bounces_always() -> Result<bool> {
    Ok(read("/proc/cmdline")?
        .split_whitespace()
        .any(|word| word == "swiotlb=force"))
}

/// Whether the kernel has transparent huge pages.
pub fn has_transparent_huge_pages() -> bool {
    Path::new("/sys/kernel/mm/transparent_hugepage").exists()
}

/// Skips the test if the kernel has no transparent huge pages. It must then refuse advice about them too. The
/// reason names the kernel: only kernels that are known to have none may skip.
pub fn needs_transparent_huge_pages() -> Result<()> {
    if has_transparent_huge_pages() {
        return Ok(());
    }
    let page = Memory::anonymous(PAGE)?;
    check_eq!(
        page.advise(0, PAGE, libc::MADV_HUGEPAGE),
        Err(Errno::EINVAL),
        "MADV_HUGEPAGE without transparent huge pages"
    );
    let release = read("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    bail!(Skip(format!(
        "the kernel {release} has no transparent huge pages"
    )))
}

/// Whether the kernel counts the mappings of each page of a large folio (`CONFIG_PAGE_MAPCOUNT`). If it does not, the
/// driver cannot know which pages of a folio are mapped, unless all or none are. The answer is the kernel's own, for a
/// page that is unmapped while others of its transparent huge page are not.
pub fn has_page_mapcounts() -> Result<bool> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    if let Some(&known) = KNOWN.get() {
        return Ok(known);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map_aligned(HUGE, HUGE, RW, flags, None, 0)?;
    memory.advise(0, HUGE, libc::MADV_HUGEPAGE)?;
    memory.touch_to_write();
    let page = frames::frames(&memory, PAGE, PAGE)?[0];
    memory.advise(PAGE, PAGE, libc::MADV_DONTNEED)?;
    let count = frames::mappings(page)?;
    check!(
        frames::flags(page)? & frames::THP != 0 && count <= 1,
        "frame {page:#x} is of no huge page, or mapped {count} times"
    );
    Ok(*KNOWN.get_or_init(|| count == 0))
}

/// Page faults of this process without I/O.
pub fn faults() -> Result<i64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    Ok(usage.minor_page_faults())
}

/// Available memory, in bytes.
pub fn available() -> Result<usize> {
    Ok(usize::try_from(field("/proc/meminfo", "MemAvailable")?)? << 10)
}

/// A setting of the kernel's, put back when dropped.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Changes it.
    pub fn set(path: impl AsRef<Path>, value: impl ToString) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let setting = Self {
            before: read(&path)?.trim().to_owned(),
            path,
        };
        write(&setting.path, value)?;
        Ok(setting)
    }

    /// Changes one whose file shows all choices, with the one that is taken in brackets.
    pub fn choice(path: impl AsRef<Path>, value: &str) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let text = read(&path)?;
        let before = text
            .split(['[', ']'])
            .nth(1)
            .context("no choice is taken")?;
        let setting = Self {
            before: before.to_owned(),
            path,
        };
        write(&setting.path, value)?;
        Ok(setting)
    }

    /// Changes one of the module's parameters.
    pub fn parameter(name: &str, value: impl ToString) -> Result<Self> {
        Self::set(format!("/sys/module/pinbuf/parameters/{name}"), value)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = write(&self.path, &self.before) {
            eprintln!("{error:#}");
        }
    }
}

/// The setting for transparent folios of a size.
pub fn transparent_size(bytes: usize) -> String {
    let kib = bytes >> 10;
    format!("/sys/kernel/mm/transparent_hugepage/hugepages-{kib}kB/enabled")
}

/// Free huge pages, put back when dropped.
#[derive(Debug)]
pub struct HugePool(#[allow(dead_code, reason = "held for its Drop")] Setting);

impl HugePool {
    const LARGE: &'static str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";

    /// A file of the pool of huge pages, of the size [`HUGE`].
    fn small(name: &str) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", HUGE >> 10)
    }

    /// Makes this number of free huge pages, and no more.
    pub fn with_free(count: i64) -> Result<Self> {
        let total = number(Self::small("nr_hugepages"))?;
        let free = number(Self::small("free_hugepages"))?;
        let wanted = total - free + count;
        write("/proc/sys/vm/compact_memory", "1")?;
        let pool = Self(Setting::set(Self::small("nr_hugepages"), wanted)?);
        let got = Self::free()?;
        if got != count {
            bail!("asked for {count} free huge pages, got {got}");
        }
        Ok(pool)
    }

    /// Free huge pages, not those of 1 GiB.
    pub fn free() -> Result<i64> {
        number(Self::small("free_hugepages"))
    }

    /// Makes one free huge page of 1 GiB, which a machine may be too small or fragmented for.
    pub fn with_giga() -> Result<Self> {
        let missing = || Skip("no huge page of 1 GiB could be made".to_owned());
        let path = format!("{}/nr_hugepages", Self::LARGE);
        if !Path::new(&path).exists() {
            bail!(missing());
        }
        let free = || number(format!("{}/free_hugepages", Self::LARGE));
        let before = number(&path)?;
        let needed = if free()? > 0 { before } else { before + 1 };
        let pool = Self(Setting::set(&path, needed)?);
        if free()? < 1 {
            bail!(missing());
        }
        Ok(pool)
    }
}
