// SPDX-License-Identifier: MIT OR Apache-2.0

//! `pinbuf bench`.
//!
//! Each side is measured in a process of its own, which gets nothing but the kind and size of the
//! memory: pinbuf's own call, udmabuf's interface on the kernel's own udmabuf, and the same
//! interface under the shim and under the supervisor of `pinbuf run`. The turns of the sides alternate, so that what changes on the machine
//! meanwhile meets all of them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use clap::{Args, ValueEnum};
use pinbuf::{Access, Device, DmaBuf, HugePage, Region};
use pinbuf_udmabuf::request::{self, Create};
use serde::{Deserialize, Serialize};

use crate::shim;
use crate::text::{self, say};

/// Measure creating, mapping and closing buffers, compared with udmabuf if the kernel has it.
#[derive(Debug, Args)]
pub struct Bench {
    /// Size of the buffers in MiB. By default, udmabuf takes at most 64 (up to Linux 7.2).
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    size: usize,
    /// Number of measurements, of which the medians are shown.
    #[arg(long, value_name = "N", default_value_t = 11)]
    repeat: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Measures one side, and prints times.
    #[arg(long, hide = true, requires = "memory")]
    side: Option<Side>,
    #[arg(long, hide = true)]
    memory: Option<Memory>,
}

/// The exporter, and the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Pinbuf,
    Udmabuf,
    Shim,
    Supervisor,
}

/// Of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Memory {
    /// Private, ordinary pages.
    Anonymous,
    /// Private, transparent huge pages.
    AnonymousThp,
    /// Private, pages of 2 MiB.
    Hugetlb,
    /// A memfd that the program has mapped.
    Memfd,
    /// A memfd that no process has mapped.
    MemfdUnmapped,
    /// A memfd with pages of 2 MiB, mapped.
    MemfdHugetlb,
    /// The same, not mapped.
    MemfdHugetlbUnmapped,
}

const ALL: [Memory; 7] = [
    Memory::Anonymous,
    Memory::AnonymousThp,
    Memory::Hugetlb,
    Memory::Memfd,
    Memory::MemfdUnmapped,
    Memory::MemfdHugetlb,
    Memory::MemfdHugetlbUnmapped,
];

impl Memory {
    /// Can this side make a buffer of it?
    fn suits(self, side: Side) -> bool {
        match self {
            Self::Anonymous | Self::AnonymousThp | Self::Hugetlb => side == Side::Pinbuf,
            Self::Memfd | Self::MemfdHugetlb => true,
            // pinbuf's own call takes addresses.
            Self::MemfdUnmapped | Self::MemfdHugetlbUnmapped => side != Side::Pinbuf,
        }
    }

    fn huge(self) -> bool {
        matches!(
            self,
            Self::Hugetlb | Self::MemfdHugetlb | Self::MemfdHugetlbUnmapped
        )
    }

    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }
}

/// Microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Times {
    /// Making the buffer.
    create: f64,
    /// Mapping it and touching every page of 4 KiB, with the accesses' begin and end.
    touch: f64,
    /// Unmapping it.
    unmap: f64,
    /// Closing it, which unpins the pages.
    close: f64,
}

impl Times {
    fn fields(&self) -> [(&'static str, f64); 4] {
        [
            ("create", self.create),
            ("touch", self.touch),
            ("unmap", self.unmap),
            ("close", self.close),
        ]
    }

    fn median(all: &[Self]) -> Self {
        let of = |field: fn(&Self) -> f64| median(all.iter().map(field).collect());
        Self {
            create: of(|t| t.create),
            touch: of(|t| t.touch),
            unmap: of(|t| t.unmap),
            close: of(|t| t.close),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// What a side measured in one process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Turn {
    times: Vec<Times>,
    /// Creates by pinbuf's own call, each of the same memory just after the one by the shim.
    native_creates: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Row {
    memory: Memory,
    /// Medians of each side, microseconds.
    medians: BTreeMap<Side, Times>,
    /// The same, divided by udmabuf's.
    ratios: BTreeMap<Side, BTreeMap<&'static str, f64>>,
    /// What a create by the shim takes, in microseconds, and what one by pinbuf's own call takes, of
    /// the same memory in the same process: medians.
    shim_and_native_create: Option<(f64, f64)>,
    /// Why a side is missing.
    missing: BTreeMap<Side, String>,
}

#[derive(Debug, Serialize)]
struct Report {
    size_bytes: usize,
    repeat: usize,
    kernel: String,
    rows: Vec<Row>,
}

impl Bench {
    pub fn run(self) -> Result<ExitCode> {
        let bytes = self
            .size
            .checked_mul(1 << 20)
            .context("--size is too large")?;
        if bytes == 0 || self.repeat == 0 {
            bail!("--size and --repeat must be greater than zero");
        }
        if let (Some(side), Some(memory)) = (self.side, self.memory) {
            say!(
                "{}",
                serde_json::to_string(&measure(side, memory, bytes, self.repeat)?)?
            );
            return Ok(ExitCode::SUCCESS);
        }
        Device::open().context("cannot measure pinbuf")?;
        let shim = shim::find();
        let mut rows = Vec::new();
        for memory in ALL {
            rows.push(self.row(memory, shim.as_deref().ok()));
        }
        let report = Report {
            size_bytes: bytes,
            repeat: self.repeat,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            rows,
        };
        if self.json {
            text::print_json(&report)?;
        } else {
            print(&report);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn row(&self, memory: Memory, shim: Option<&Path>) -> Row {
        let mut row = Row {
            memory,
            medians: BTreeMap::new(),
            ratios: BTreeMap::new(),
            shim_and_native_create: None,
            missing: BTreeMap::new(),
        };
        let mut times: BTreeMap<Side, Vec<Times>> = BTreeMap::new();
        let mut native = Vec::new();
        let sides = [Side::Pinbuf, Side::Udmabuf, Side::Shim, Side::Supervisor];
        let sides = sides.into_iter().filter(|side| memory.suits(*side));
        // In turns, the first of which only warms up.
        let turns = self.repeat.min(3);
        for turn in 0..=turns {
            for side in sides.clone() {
                if row.missing.contains_key(&side) {
                    continue;
                }
                let repeat = if turn == 0 {
                    1
                } else {
                    self.repeat.div_ceil(turns)
                };
                match self.turn(side, memory, repeat, shim) {
                    Ok(_) if turn == 0 => {}
                    Ok(found) => {
                        times.entry(side).or_default().extend(found.times);
                        native.extend(found.native_creates);
                    }
                    Err(error) => {
                        row.missing.insert(side, format!("{error:#}"));
                    }
                }
            }
        }
        for (side, times) in times {
            row.medians.insert(side, Times::median(&times));
        }
        if let (Some(shim), false) = (row.medians.get(&Side::Shim), native.is_empty()) {
            row.shim_and_native_create = Some((shim.create, median(native)));
        }
        if let Some(base) = row.medians.get(&Side::Udmabuf).copied() {
            for (side, times) in row
                .medians
                .iter()
                .filter(|(side, _)| **side != Side::Udmabuf)
            {
                let ratios = times.fields().into_iter().zip(base.fields());
                let ratios = ratios
                    .map(|((name, time), (_, base))| (name, time / base))
                    .collect();
                row.ratios.insert(*side, ratios);
            }
        }
        row
    }

    /// Runs a side in a process of its own.
    fn turn(&self, side: Side, memory: Memory, repeat: usize, shim: Option<&Path>) -> Result<Turn> {
        let name = |value: Option<clap::builder::PossibleValue>| {
            value
                .map(|value| value.get_name().to_owned())
                .unwrap_or_default()
        };
        let this = std::env::current_exe()?;
        let mut command = Command::new(&this);
        if side == Side::Supervisor {
            command.args(["run", "--by", "supervisor", "--"]).arg(&this);
        }
        command
            .args(["bench", "--side", &name(side.to_possible_value())])
            .args(["--memory", &memory.name()])
            .args([
                "--size",
                &self.size.to_string(),
                "--repeat",
                &repeat.to_string(),
            ])
            .env_remove("LD_PRELOAD")
            .stdin(Stdio::null());
        if side == Side::Shim {
            let shim = shim.context("libudmabuf_shim.so is not installed")?;
            command.env("LD_PRELOAD", shim);
        }
        let output = command.output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("{}", text.strip_prefix("pinbuf: ").unwrap_or(&text));
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn print(report: &Report) {
    say!(
        "{} MiB, medians of {} in microseconds, kernel {}; in parentheses: udmabuf's time divided \
         by it",
        report.size_bytes >> 20,
        report.repeat,
        report.kernel
    );
    say!(
        "{:24}{:12}{:>18}{:>18}{:>18}{:>18}",
        "memory",
        "by",
        "create",
        "map+touch",
        "unmap",
        "close"
    );
    for row in &report.rows {
        for (side, times) in &row.medians {
            let mut line = format!(
                "{:24}{:12}",
                row.memory.name(),
                format!("{side:?}").to_lowercase()
            );
            for (name, time) in times.fields() {
                let ratio = row.ratios.get(side).and_then(|ratios| ratios.get(name));
                let cell = match ratio {
                    Some(ratio) => format!("{time:.1} ({:.1}x)", 1.0 / ratio),
                    None => format!("{time:.1}"),
                };
                line.push_str(&format!("{cell:>18}"));
            }
            say!("{line}");
        }
        if let Some((shim, native)) = row.shim_and_native_create {
            say!(
                "{:24}the same memory: {shim:.1} by the shim, {native:.1} by pinbuf's call, {:+.1}",
                row.memory.name(),
                shim - native
            );
        }
        for (side, why) in &row.missing {
            say!(
                "{:24}{:12}{why}",
                row.memory.name(),
                format!("{side:?}").to_lowercase()
            );
        }
    }
}

fn measure(side: Side, memory: Memory, bytes: usize, repeat: usize) -> Result<Turn> {
    let mut turn = Turn::default();
    if side == Side::Pinbuf {
        let device = Device::open()?;
        let region = region(memory, bytes)?;
        // Filled, as memory in use is.
        region.fill(0, region.len(), 1)?;
        for _ in 0..repeat {
            turn.times
                .push(times(true, || Ok(device.export(&region)?))?);
        }
        return Ok(turn);
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/udmabuf")
        .context("/dev/udmabuf")?;
    let (memfd, mapped) = memfd(memory, bytes)?;
    let native = match mapped.as_ref().filter(|_| side == Side::Shim) {
        Some(region) => Some((Device::open()?, region)),
        None => None,
    };
    for _ in 0..repeat {
        turn.times
            .push(times(false, || udmabuf(&device, &memfd, bytes))?);
        if let Some((device, region)) = &native {
            let start = Instant::now();
            let buffer = device.export(region)?;
            turn.native_creates.push(micros(start));
            drop(buffer);
        }
    }
    Ok(turn)
}

/// The pages of the pool that operators fill (`vm.nr_hugepages`).
fn huge_page() -> Result<HugePage> {
    HugePage::system().context("this kernel has no huge pages of a size that pinbuf knows")
}

fn region(memory: Memory, bytes: usize) -> Result<Region> {
    Ok(match memory {
        Memory::Anonymous => {
            let region = Region::anonymous(bytes)?;
            let at = std::ptr::NonNull::new(region.as_ptr().cast()).context("a null address")?;
            let advice = nix::sys::mman::MmapAdvise::MADV_NOHUGEPAGE;
            // SAFETY: the region's own memory, whose contents the advice does not change.
            unsafe { nix::sys::mman::madvise(at, region.len(), advice)? };
            region
        }
        Memory::AnonymousThp => Region::huge_advised(bytes)?,
        Memory::Hugetlb => Region::hugetlb(bytes, huge_page()?)?,
        _ => {
            let page = memory.huge().then(huge_page).transpose()?;
            Region::memfd("pinbuf-bench", bytes, page)?
        }
    })
}

/// A memfd, filled, and mapped if it should be.
fn memfd(memory: Memory, bytes: usize) -> Result<(OwnedFd, Option<Region>)> {
    let region = region(memory, bytes)?;
    region.fill(0, region.len(), 1)?;
    let fd = region
        .memfd_descriptor()
        .context("a region without a memfd")?
        .try_clone_to_owned()?;
    let mapped = matches!(memory, Memory::Memfd | Memory::MemfdHugetlb);
    Ok((fd, mapped.then_some(region)))
}

fn udmabuf(device: &File, memfd: &OwnedFd, bytes: usize) -> Result<DmaBuf> {
    let create = Create {
        memfd: memfd.as_raw_fd() as u32,
        flags: request::FLAGS_CLOEXEC,
        offset: 0,
        size: bytes as u64,
    };
    // SAFETY: UDMABUF_CREATE reads the struct.
    let fd = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::c_ulong::from(request::CREATE),
            &raw const create,
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("UDMABUF_CREATE");
    }
    // SAFETY: the kernel has just returned it, so it has no other owner.
    Ok(DmaBuf::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })?)
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64 / 1000.0
}

fn times(aligned: bool, make: impl Fn() -> Result<DmaBuf>) -> Result<Times> {
    let start = Instant::now();
    let buffer = make()?;
    let create = micros(start);

    // pinbuf's own side by the library, the others as programs do, without a wish for an address.
    let len = buffer.size()?;
    let start = Instant::now();
    let map = Plain::new(&buffer, len, aligned)?;
    let guard = buffer.begin_cpu_access(Access::ReadWrite)?;
    map.touch();
    guard.finish()?;
    let touch = micros(start);

    let start = Instant::now();
    drop(map);
    let unmap = micros(start);

    let start = Instant::now();
    drop(buffer);
    let close = micros(start);
    Ok(Times {
        create,
        touch,
        unmap,
        close,
    })
}

/// A mapping: the library's, which is aligned, or one by libc, where the shim stands.
struct Plain<'a> {
    mapping: Option<pinbuf::Mapping<'a>>,
    address: *mut u8,
    len: usize,
}

impl<'a> Plain<'a> {
    fn new(buffer: &'a DmaBuf, len: usize, aligned: bool) -> Result<Self> {
        if aligned {
            let mapping = buffer.map()?;
            return Ok(Self {
                address: mapping.as_ptr(),
                len,
                mapping: Some(mapping),
            });
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = buffer.as_fd().as_raw_fd();
        // SAFETY: without an address nothing that exists is replaced.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("mapping the buffer");
        }
        Ok(Self {
            mapping: None,
            address: address.cast(),
            len,
        })
    }

    /// Writes a byte of every page.
    fn touch(&self) {
        for offset in (0..self.len).step_by(pinbuf::page_size()) {
            // SAFETY: inside of the mapping, which has no references.
            unsafe { self.address.wrapping_add(offset).write_volatile(2) };
        }
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        if self.mapping.take().is_none() {
            // SAFETY: mapped by `new`, and nothing keeps its addresses.
            unsafe { libc::munmap(self.address.cast(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let times = |create| Times {
            create,
            ..Times::default()
        };
        assert_eq!(
            Times::median(&[times(3.0), times(1.0), times(2.0)]).create,
            2.0
        );
        assert_eq!(Times::median(&[times(3.0), times(1.0)]).create, 2.0);
        assert_eq!(Times::median(&[]).create, 0.0);
    }
}
