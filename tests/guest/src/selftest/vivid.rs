// SPDX-License-Identifier: MIT OR Apache-2.0

//! A real importer: the kernel's virtual camera captures into a buffer. With `allocators=1` it maps
//! the buffer as a device that needs it in one piece; by default it uses the kernel's mapping.

use std::collections::BTreeSet;
use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use pinbuf_test_importer::{Direction, Importer, Limits};

use pinbuf_test_harness::support::kernel::HugePool;
use pinbuf_test_harness::support::memory::{HUGE, PAGE, RW};
use pinbuf_test_harness::support::{check, check_eq, kernel, Buffer, Device, Memory, Skip, Sync};
use pinbuf_test_harness::tests;

tests! { "vivid":
    as_a_device within 90,
    as_the_kernel within 90,
}

const WIDTH: u32 = 320;
const HEIGHT: u32 = 180;
/// The bytes of a row: two for each pixel.
const ROW: usize = WIDTH as usize * 2;
const CAPTURE: u32 = 1;
const MEMORY_DMABUF: u32 = 4;
/// What no pixel of the camera's picture consists of.
const POISON: u64 = 0x0102_0304_0506_0708;

#[repr(C)]
struct Format {
    kind: u32,
    padding: u32,
    width: u32,
    height: u32,
    pixel_format: u32,
    field: u32,
    bytes_per_line: u32,
    size: u32,
    rest: [u32; 44],
}

#[repr(C)]
struct RequestBuffers {
    count: u32,
    kind: u32,
    memory: u32,
    capabilities: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct VideoBuffer {
    index: u32,
    kind: u32,
    bytes_used: u32,
    flags: u32,
    field: u32,
    padding: u32,
    timestamp: [i64; 2],
    timecode: [u32; 4],
    sequence: u32,
    memory: u32,
    fd: i32,
    padding_of_union: u32,
    length: u32,
    reserved: u32,
    request: i32,
    padding_at_end: u32,
}

const _: () = assert!(size_of::<Format>() == 208);
const _: () = assert!(size_of::<RequestBuffers>() == 20);
const _: () = assert!(size_of::<VideoBuffer>() == 88);

nix::ioctl_readwrite!(set_format, b'V', 5, Format);
nix::ioctl_readwrite!(request_buffers, b'V', 8, RequestBuffers);
nix::ioctl_readwrite!(queue, b'V', 15, VideoBuffer);
nix::ioctl_readwrite!(dequeue, b'V', 17, VideoBuffer);
nix::ioctl_write_ptr!(stream_on, b'V', 18, u32);
nix::ioctl_write_ptr!(stream_off, b'V', 19, u32);

/// The camera's module, gone when dropped.
struct Module;

impl Module {
    fn load(options: &[&str]) -> Result<Self> {
        // The cloud flavour is built without it.
        let known = Command::new("modprobe")
            .args(["-n", "-q", "vivid"])
            .status()?;
        if !known.success() {
            bail!(Skip("this kernel has no vivid".to_owned()));
        }
        let mut command = Command::new("modprobe");
        let status = command.args(["vivid", "n_devs=1"]).args(options).status()?;
        check!(status.success(), "modprobe vivid: {status}");
        Ok(Self)
    }

    /// The camera, once it is there.
    fn camera(&self) -> Result<File> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for entry in std::fs::read_dir("/sys/class/video4linux")? {
                let entry = entry?;
                let name = kernel::read(entry.path().join("name"))?;
                let node = std::path::Path::new("/dev").join(entry.file_name());
                if name.trim() == "vivid-000-vid-cap" && node.exists() {
                    return File::options()
                        .read(true)
                        .write(true)
                        .open(node)
                        .context("the camera");
                }
            }
            check!(Instant::now() < deadline, "vivid made no camera");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // Whatever keeps it is a moment later than the descriptor's close.
        for _ in 0..100 {
            match Command::new("modprobe").args(["-r", "vivid"]).output() {
                Ok(output) if output.status.success() => return,
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        eprintln!("vivid cannot be unloaded");
    }
}

/// The most buffers that the camera wants before it begins.
const MOST_BUFFERS: usize = 4;

/// Captures some pictures into buffers, each of which is at least one picture long. Returns which
/// of the buffers got one.
fn capture(camera: &File, buffers: &[Buffer]) -> Result<BTreeSet<usize>> {
    let fd = camera.as_raw_fd();
    let mut format = Format {
        kind: CAPTURE,
        padding: 0,
        width: WIDTH,
        height: HEIGHT,
        pixel_format: u32::from_le_bytes(*b"YUYV"),
        field: 1,
        bytes_per_line: 0,
        size: 0,
        rest: [0; 44],
    };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { set_format(fd, &mut format) }.context("VIDIOC_S_FMT")?;
    check_eq!(
        (format.width, format.height),
        (WIDTH, HEIGHT),
        "the camera's picture"
    );
    check_eq!(format.bytes_per_line as usize, ROW, "bytes of a row");
    let mut request = RequestBuffers {
        count: 2,
        kind: CAPTURE,
        memory: MEMORY_DMABUF,
        capabilities: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads and writes the struct.
    unsafe { request_buffers(fd, &mut request) }.context("VIDIOC_REQBUFS")?;
    check!(
        request.count as usize <= buffers.len(),
        "the camera wants {} buffers",
        request.count
    );
    let slot = |index: u32| VideoBuffer {
        index,
        kind: CAPTURE,
        memory: MEMORY_DMABUF,
        fd: buffers[index as usize].as_fd().as_raw_fd(),
        ..Default::default()
    };
    let mut filled = BTreeSet::new();
    for index in 0..request.count {
        // SAFETY: the kernel reads and writes the struct; it keeps the dma-buf itself.
        unsafe { queue(fd, &mut slot(index)) }.context("VIDIOC_QBUF")?;
    }
    // SAFETY: the kernel reads the number.
    unsafe { stream_on(fd, &CAPTURE) }.context("VIDIOC_STREAMON")?;
    for picture in 0..4 {
        let mut fds = [PollFd::new(camera.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(30_000u16))? == 0 {
            bail!("the camera gave no picture");
        }
        let mut taken = slot(0);
        // SAFETY: as above.
        unsafe { dequeue(fd, &mut taken) }.context("VIDIOC_DQBUF")?;
        check_eq!(taken.bytes_used, format.size, "bytes of picture {picture}");
        check_eq!(taken.flags & 0x40, 0, "the error flag of picture {picture}");
        filled.insert(taken.index as usize);
        // SAFETY: as above.
        unsafe { queue(fd, &mut slot(taken.index)) }.context("VIDIOC_QBUF, again")?;
    }
    // SAFETY: the kernel reads the number.
    unsafe { stream_off(fd, &CAPTURE) }.context("VIDIOC_STREAMOFF")?;
    Ok(filled)
}

/// The memory has a picture of colour bars, and behind it what was there before.
fn has_picture(buffer: &Buffer, memory: &Memory) -> Result<()> {
    let size = ROW * HEIGHT as usize;
    let mut seen = vec![0; memory.len()];
    buffer.synced(Sync::Read, || memory.read(0, &mut seen))?;
    let words = |bytes: &[u8]| -> Vec<u64> {
        bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().expect("8")))
            .collect()
    };
    check!(
        !words(&seen[..size]).contains(&POISON),
        "part of the picture was not written"
    );
    check!(
        words(&seen[size..]).iter().all(|&word| word == POISON),
        "bytes behind the picture"
    );
    // The camera writes text over the upper rows; in the lower ones there are the bars alone.
    let rows: Vec<&[u8]> = seen[..size].chunks_exact(ROW).collect();
    let last = rows[rows.len() - 1];
    for (index, row) in rows.iter().enumerate().skip(HEIGHT as usize - 20) {
        check!(row == &last, "row {index} is not as the last one");
    }
    let colours: BTreeSet<u64> = words(last).into_iter().collect();
    check!(
        colours.len() >= 8,
        "the bars have {} colours: {colours:x?}",
        colours.len()
    );
    Ok(())
}

fn poison(memory: &Memory) {
    for offset in (0..memory.len()).step_by(8) {
        memory.set(offset, POISON);
    }
}

/// In one piece, so that the camera's DMA engine, which reaches 4 GiB, could take it. Where its
/// pieces of 64 KiB are bounced, to anywhere, the camera may only refuse them: run this in a guest of
/// 2 GiB, which has no memory beyond.
fn as_a_device() -> Result<()> {
    let _pool = HugePool::with_free(1)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = Memory::map(HUGE, RW, flags, None, 0)?;
    poison(&memory);
    let device = Device::open()?;
    let first = |index: usize| (7 + 50 * index) * PAGE;
    let buffers = (0..MOST_BUFFERS)
        .map(|index| device.create(&[memory.part(first(index), 40 * PAGE)]))
        .collect::<Result<Vec<_>, _>>()?;
    let bounced = {
        let limits = Limits {
            mask_bits: 32,
            max_segment: 0,
        };
        let importer = Importer::attach(buffers[0].as_fd(), limits)?;
        let slots = kernel::bounce_slots()?;
        importer.map(Direction::FromDevice)?;
        kernel::bounce_slots()? != slots
    };
    let module = Module::load(&["allocators=1"])?;
    let result = capture(&module.camera()?, &buffers);
    for buffer in &buffers {
        check_eq!(
            device.describe(buffer)?.mappings,
            0,
            "devices' mappings at the end"
        );
    }
    if bounced {
        if let Err(error) = result {
            check_eq!(
                error.downcast::<Errno>().ok(),
                Some(Errno::EFAULT),
                "what the camera makes of bounced pieces"
            );
        }
        // By chance the pieces came to lie behind one another. The camera, which is software, writes
        // through its kernel mapping all the same, and unmapping copies the bounce buffer over that:
        // no picture can be demanded, only that nothing else was written.
    } else {
        for index in result? {
            let buffer = &buffers[index];
            has_picture(buffer, &buffer.map()?).with_context(|| format!("buffer {index}"))?;
        }
    }
    for index in 0..MOST_BUFFERS {
        let (first, end) = (first(index), first(index) + 40 * PAGE);
        check_eq!(memory.get(first - 8), POISON, "the word before a buffer");
        check_eq!(memory.get(end), POISON, "the word behind a buffer");
    }
    Ok(())
}

/// In pieces, through the kernel's mapping.
fn as_the_kernel() -> Result<()> {
    let memory = Memory::small_pages(40 * PAGE * MOST_BUFFERS)?;
    poison(&memory);
    let device = Device::open()?;
    let buffers = (0..MOST_BUFFERS)
        .map(|index| {
            let first = 40 * index;
            let pages = (first..first + 40).rev();
            let ranges: Vec<_> = pages.map(|page| memory.part(page * PAGE, PAGE)).collect();
            device.create(&ranges)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let module = Module::load(&[])?;
    for index in capture(&module.camera()?, &buffers)? {
        let buffer = &buffers[index];
        has_picture(buffer, &buffer.map()?).with_context(|| format!("buffer {index}"))?;
    }
    Ok(())
}
