// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages that do not belong to the caller: the kernel's, a driver's, a file system's. None of them becomes part
//! of a buffer, even where the mm core would pin it for long. A private copy of such a page belongs to the
//! caller.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount, MsFlags};

use crate::common::{refused_anywhere, views_agree};
use pinbuf_test_harness::support::memory::{file_in, pattern, PAGE, RW};
use pinbuf_test_harness::support::view::same;
use pinbuf_test_harness::support::{check, check_eq, kernel, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "owners":
    ring_of_io_uring,
    ring_of_a_packet_socket,
    ring_of_perf,
    map_of_bpf,
    memory_of_a_guest,
    file_on_ramfs,
    file_on_ext4_with_dax within 120,
    device_dax within 120,
}

/// How the mm core and the kernel's other long-term users take a page: by the test importer, with
/// the same call.
fn is_pinnable(memory: &Memory) -> bool {
    pinbuf_test_importer::pin_cost(memory.addr(), PAGE as u64, PAGE as u64).is_ok()
}

/// Writes to shared memory that belongs to something else, and expects that it makes no buffer.
fn refuses(what: &str, memory: &Memory) -> Result<()> {
    refused_anywhere(
        &format!("{what}, untouched"),
        Errno::EFAULT,
        memory.part(0, PAGE),
    )?;
    std::hint::black_box(memory.get(0));
    println!(
        "# {what}: the mm core pins it for long: {}",
        is_pinnable(memory)
    );
    refused_anywhere(what, Errno::EFAULT, memory.part(0, PAGE))
}

/// A descriptor that a system call returned.
fn opened(fd: libc::c_long, what: &str) -> Result<OwnedFd> {
    Errno::result(fd).with_context(|| what.to_owned())?;
    // SAFETY: the call has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}

/// Pages that were allocated by the kernel, and mapped with `vm_insert_pages`.
fn ring_of_io_uring() -> Result<()> {
    let _enabled = kernel::Setting::set("/proc/sys/kernel/io_uring_disabled", 0)?;
    let mut parameters = [0u8; 120];
    // SAFETY: the kernel reads and writes the struct, which has 120 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 64, parameters.as_mut_ptr()) };
    let ring = opened(fd, "io_uring_setup")?;
    let memory = Memory::shared(&ring, PAGE).context("mapping the ring")?;
    refuses("io_uring's ring", &memory)?;
    check!(
        is_pinnable(&memory),
        "the mm core does not pin it: this proves nothing of the driver"
    );
    Ok(())
}

fn ring_of_a_packet_socket() -> Result<()> {
    #[repr(C)]
    struct Request {
        block_size: u32,
        blocks: u32,
        frame_size: u32,
        frames: u32,
    }
    const PACKET_RX_RING: i32 = 5;
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let socket = opened(fd.into(), "a packet socket")?;
    let request = Request {
        block_size: 4 * PAGE as u32,
        blocks: 2,
        frame_size: 2048,
        frames: 2 * 4 * PAGE as u32 / 2048,
    };
    // SAFETY: the kernel reads the struct.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_RX_RING,
            (&raw const request).cast(),
            size_of::<Request>() as u32,
        )
    };
    Errno::result(result).context("PACKET_RX_RING")?;
    let memory = Memory::shared(&socket, 8 * PAGE).context("mapping the ring")?;
    refuses("a packet socket's ring", &memory)
}

fn ring_of_perf() -> Result<()> {
    // struct perf_event_attr: a software event that counts nothing.
    let mut attributes = [0u32; 32];
    attributes[0] = 1;
    attributes[1] = 128;
    attributes[2] = 9;
    // SAFETY: the kernel reads the struct, which has 128 bytes as it says.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    let event = opened(fd, "perf_event_open")?;
    let memory = Memory::shared(&event, 2 * PAGE).context("mapping the ring")?;
    refuses("perf's ring", &memory)
}

/// An array in `vmalloc` memory, which user space may write.
fn map_of_bpf() -> Result<()> {
    const MMAPABLE: u32 = 1 << 10;
    // BPF_MAP_CREATE: an array of 1024 entries of 4 bytes, with keys of 4.
    let attributes: [u32; 32] = {
        let mut all = [0; 32];
        all[..5].copy_from_slice(&[2, 4, 4, 1024, MMAPABLE]);
        all
    };
    // SAFETY: the kernel reads the struct.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            0,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    let map = opened(fd, "BPF_MAP_CREATE")?;
    let memory = Memory::shared(&map, PAGE).context("mapping the array")?;
    refuses("a map of BPF's", &memory)?;
    check!(
        is_pinnable(&memory),
        "the mm core does not pin it: this proves nothing of the driver"
    );
    Ok(())
}

/// A module from the kernel's package, loaded while this value lives.
struct Module(&'static str);

impl Module {
    fn load(name: &'static str) -> Result<Self> {
        let status = std::process::Command::new("modprobe").arg(name).status()?;
        check!(status.success(), "modprobe {name}: {status}");
        Ok(Self(name))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = std::process::Command::new("modprobe")
            .args(["-r", self.0])
            .output();
    }
}

/// `guest_memfd`, which may become inaccessible to the host at any time.
fn memory_of_a_guest() -> Result<()> {
    #[repr(C)]
    struct Create {
        size: u64,
        flags: u64,
        reserved: [u64; 6],
    }
    const MMAP: u64 = 1;
    const INIT_SHARED: u64 = 2;
    // On arm64, KVM is no module.
    #[cfg(target_arch = "x86_64")]
    let _module = Module::load("kvm_amd")?;
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("KVM")?;
    nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xAE, 0x01));
    nix::ioctl_readwrite!(create_guest_memfd, 0xAE, 0xd4, Create);
    // SAFETY: no memory is passed.
    let vm = unsafe { create_vm(kvm.as_raw_fd(), 0) }.context("KVM_CREATE_VM")?;
    let vm = opened(vm.into(), "KVM_CREATE_VM")?;
    let mut argument = Create {
        size: 4 * PAGE as u64,
        flags: MMAP | INIT_SHARED,
        reserved: [0; 6],
    };
    // SAFETY: the kernel reads the struct.
    let fd = unsafe { create_guest_memfd(vm.as_raw_fd(), &mut argument) };
    let file = opened(fd.context("KVM_CREATE_GUEST_MEMFD")?.into(), "guest_memfd")?;
    let memory = Memory::shared(&file, 4 * PAGE).context("mapping guest_memfd")?;
    memory.set(0, 9);
    refuses("guest_memfd", &memory)?;
    check_eq!(memory.get(0), 9, "what is there");
    Ok(())
}

/// A mounted file system.
struct Mounted(PathBuf);

impl Mounted {
    fn new(source: Option<&Path>, kind: &str, options: Option<&str>) -> Result<Self> {
        let name = format!("pinbuf-{kind}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)?;
        let mounted = Self(directory);
        mount(source, &mounted.0, Some(kind), MsFlags::empty(), options)
            .with_context(|| format!("mounting {kind} with {options:?}"))?;
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount(&self.0) {
            eprintln!("umount: {error}");
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A file's pages are the file system's, also where there is no disk; a private mapping's are
/// copies, which the file does not see.
fn is_the_file_systems(what: &str, directory: &Path, copies: bool) -> Result<()> {
    const LEN: usize = 20 * PAGE;
    let file = file_in(directory, LEN)?;
    let memory = Memory::shared(&file, LEN)?;
    memory.write(0, &pattern(51, 0, LEN));
    refuses(what, &memory)?;

    let copy = Memory::private(&file, LEN)?;
    copy.touch();
    if !copies {
        let what = format!("a private mapping of {what}");
        return refused_anywhere(&what, Errno::EFAULT, copy.range());
    }
    let device = Device::open()?;
    let buffer = device
        .create(&[copy.range()])
        .context("a private mapping")?;
    let mut seen = vec![0; LEN];
    buffer.map()?.read(0, &mut seen);
    same("the buffer", 0, &seen, &pattern(51, 0, LEN))?;
    views_agree(&buffer, &[(&copy, 0, LEN)])?;
    nix::sys::uio::pread(&file, &mut seen, 0)?;
    same("the file", 0, &seen, &pattern(51, 0, LEN))
    // That it can be unmounted shows that nothing holds its pages.
}

fn file_on_ramfs() -> Result<()> {
    let disk = Mounted::new(None, "ramfs", None)?;
    is_the_file_systems("a file on ramfs", &disk.0, true)
}

/// A memory range that the guest's command line declares persistent (`memmap=`).
const PMEM: &str = "/dev/pmem0";

/// Loads the driver for such memory.
fn persistent() -> Result<[Module; 2]> {
    if cfg!(target_arch = "aarch64") {
        // It has no such option, and QEMU describes memory of this kind in tables of ACPI alone, which only
        // firmware passes on.
        bail!(Skip(
            "this arm64 machine has no persistent memory".to_owned()
        ));
    }
    let modules = [Module::load("nd_e820")?, Module::load("nd_pmem")?];
    for _ in 0..100 {
        if Path::new(PMEM).exists() {
            return Ok(modules);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    check!(false, "no {PMEM}: boot with memmap=128M!2G");
    Ok(modules)
}

fn file_on_ext4_with_dax() -> Result<()> {
    let _modules = persistent()?;
    let status = std::process::Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", PMEM])
        .status()?;
    check!(status.success(), "mke2fs: {status}");
    let disk = Mounted::new(Some(Path::new(PMEM)), "ext4", Some("dax=always"))?;
    // The mm core has a private mapping read the device itself, and pins no page there.
    is_the_file_systems("a file on ext4 with dax", &disk.0, false)
}

/// Writes a file of the kernel's which takes one word.
fn tell(path: &str, word: &str) -> Result<()> {
    let mut file = File::options()
        .write(true)
        .open(path)
        .with_context(|| path.to_owned())?;
    file.write_all(word.as_bytes())
        .with_context(|| format!("{word} to {path}"))
}

/// Memory that a device brings, with `struct page`s of its own.
fn device_dax() -> Result<()> {
    let _modules = persistent()?;
    let _dax = [Module::load("dax_pmem")?, Module::load("device_dax")?];
    let nd = "/sys/bus/nd";
    tell(&format!("{nd}/drivers/nd_pmem/unbind"), "namespace0.0")?;
    // As `ndctl create-namespace -m devdax` does.
    let seed = format!("{nd}/devices/dax0.0");
    let make = || -> Result<()> {
        tell(&format!("{seed}/align"), "4096")?;
        tell(&format!("{seed}/mode"), "ram")?;
        tell(
            &format!("{seed}/uuid"),
            "5d6d2b3c-7f3f-4a5e-9d4f-1f6f0f6f0f6f",
        )?;
        tell(&format!("{seed}/namespace"), "namespace0.0")?;
        tell(&format!("{nd}/drivers/dax_pmem/bind"), "dax0.0")
    };
    let made = make();
    let result = made.and_then(|()| {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/dax0.0")
            .context("the device")?;
        let memory = Memory::map_aligned(
            1 << 21,
            1 << 21,
            RW,
            libc::MAP_SHARED,
            Some(file.as_fd()),
            0,
        )
        .context("mapping it")?;
        memory.set(0, 5);
        refuses("device-dax", &memory)?;
        check_eq!(memory.get(0), 5, "what is there");
        Ok(())
    });
    let _ = tell(&format!("{nd}/drivers/dax_pmem/unbind"), "dax0.0");
    let _ = tell(&format!("{seed}/namespace"), "");
    let _ = tell(&format!("{nd}/drivers/nd_pmem/bind"), "namespace0.0");
    result
}
