// SPDX-License-Identifier: MIT OR Apache-2.0

//! A 32-bit process, whose calls take the compat path into the kernel: the program of `compat32.c`, for i386 or armhf.

use std::io::{Read, Write};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use pinbuf_uapi::{Discards, Info, Query, Range, STATE_DISCARDED};

use crate::create::bytes_of;
use crate::discards_more;
use pinbuf_test_harness::support::device::{create, sync_raw};
use pinbuf_test_harness::support::memory::{memfd, pattern, punch_hole, PAGE};
use pinbuf_test_harness::support::view::{holds, Mapped};
use pinbuf_test_harness::support::{check_eq, Buffer, Device, Memory, Skip};
use pinbuf_test_harness::tests;

tests! { "compat32":
    query,
    create_and_info,
    checked,
    discards,
    errors,
    memory_above_4_gib,
    sync_of_the_buffer,
}

/// The 32-bit program, which [`Caller`] starts.
const PROGRAM: &str = "pinbuf-compat32";

/// Where both processes map the same memory.
const BASE: u64 = 0x4000_0000;

/// The memory: the struct is written to its beginning, lists come behind it, and buffers are made of the rest.
const LOW: usize = 4 * PAGE;
const SIZE: usize = 16 * PAGE;

/// A 32-bit process with the same descriptors, and memory that it shares with this process.
struct Caller {
    process: Child,
    to: ChildStdin,
    from: ChildStdout,
    file: OwnedFd,
    memory: Memory,
}

impl Caller {
    /// Starts it.
    fn new(device: &Device) -> Result<Self> {
        let file = memfd(SIZE, 0)?;
        let memory = Memory::shared_at(&file, SIZE, BASE).context("memory for both processes")?;
        for fd in [file.as_fd(), device.as_fd()] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).context("passing a descriptor on")?;
        }
        let numbers = [file.as_raw_fd() as u64, BASE, SIZE as u64];
        let started = Command::new(PROGRAM)
            .args(numbers.map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        // Other programs that tests start do not get them.
        for fd in [file.as_fd(), device.as_fd()] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("F_SETFD")?;
        }
        let mut process = match started {
            Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
                bail!(Skip(
                    "this processor or kernel runs no 32-bit programs".to_owned()
                ))
            }
            started => started.with_context(|| format!("starting {PROGRAM}"))?,
        };
        let to = process.stdin.take().context("no standard input")?;
        let from = process.stdout.take().context("no standard output")?;
        Ok(Self {
            process,
            to,
            from,
            file,
            memory,
        })
    }

    /// `ioctl` by a descriptor of that process.
    fn ioctl(&mut self, fd: i32, command: u32, argument: u32) -> Result<nix::Result<i32>> {
        let call: Vec<u8> = [fd as u32, command, argument]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        self.to.write_all(&call).context("sending a call")?;
        let mut result = [0; 4];
        self.from.read_exact(&mut result).context("the result")?;
        let result = i32::from_ne_bytes(result);
        Ok(if result < 0 {
            Err(Errno::from_raw(-result))
        } else {
            Ok(result)
        })
    }

    fn addr(&self, offset: usize) -> u32 {
        (BASE + offset as u64) as u32
    }

    fn put_ranges(&self, offset: usize, ranges: &[Range]) {
        for (index, range) in ranges.iter().enumerate() {
            self.memory.set(offset + index * 16, range.addr);
            self.memory.set(offset + index * 16 + 8, range.len);
        }
    }

    /// Calls create with ranges, and returns the descriptor's number there, and the buffer.
    fn create(&mut self, device: &Device, ranges: &[Range]) -> Result<nix::Result<(i32, Buffer)>> {
        self.put_ranges(1024, ranges);
        let argument = pinbuf_uapi::Create {
            ranges: u64::from(self.addr(1024)),
            count: ranges.len() as u32,
            ..create()
        };
        self.memory.write(0, &bytes_of(&argument));
        let device = device.as_fd().as_raw_fd();
        match self.ioctl(device, pinbuf_uapi::CREATE, self.addr(0))? {
            Ok(fd) => Ok(Ok((fd, self.take(fd)?))),
            Err(error) => Ok(Err(error)),
        }
    }

    /// This process's own descriptor of a buffer.
    fn take(&self, fd: i32) -> Result<Buffer> {
        let open = |call, first: i64, second: i64| -> Result<OwnedFd> {
            // SAFETY: both calls take numbers alone, and return a descriptor that nothing else has.
            let fd = unsafe { libc::syscall(call, first, second, 0) };
            let fd = Errno::result(fd).context("a descriptor of another process")?;
            // SAFETY: as above.
            Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        };
        let process = open(libc::SYS_pidfd_open, i64::from(self.process.id()), 0)?;
        let fd = open(
            libc::SYS_pidfd_getfd,
            i64::from(process.as_raw_fd()),
            i64::from(fd),
        )?;
        Ok(Buffer::from_fd(fd))
    }

    /// What the process has below 4 GiB for buffers.
    fn rest(&self, offset: usize, len: usize) -> Range {
        self.memory.part(LOW + offset, len)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // It has gone, or is to go.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn query() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let fd = device.as_fd().as_raw_fd();
    low.memory
        .write(0, &(size_of::<Query>() as u32).to_ne_bytes());
    check_eq!(
        low.ioctl(fd, pinbuf_uapi::QUERY, low.addr(0))?,
        Ok(0),
        "PINBUF_QUERY"
    );
    // Field by field what a 64-bit caller sees.
    let expected = device.query()?;
    let words = [
        u64::from(expected.size) | u64::from(expected.version) << 32,
        expected.features,
        expected.create_flags,
        u64::from(expected.max_ranges) | u64::from(expected.page_size) << 32,
        u64::from(expected.charge_mode) | u64::from(expected.reserved) << 32,
        expected.memlock_bytes,
        expected.allowance_bytes,
        expected.allowance_used,
        expected.allowance_system,
    ];
    for (index, word) in words.into_iter().enumerate() {
        check_eq!(
            low.memory.get(index * 8),
            word,
            "word {index} of the answer"
        );
    }
    Ok(())
}

fn create_and_info() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let fd = device.as_fd().as_raw_fd();
    let ranges = [low.rest(4 * PAGE, 4 * PAGE), low.rest(0, 4 * PAGE)];
    let (number, buffer) = low.create(&device, &ranges)??;
    low.memory
        .write(LOW, &pattern(1, 4 * PAGE as u64, 4 * PAGE));
    low.memory.write(LOW + 4 * PAGE, &pattern(1, 0, 4 * PAGE));
    let mapped = buffer.map()?;
    holds(&Mapped::of(&buffer, &mapped), 1, 0, 8 * PAGE)?;

    low.memory.write(0, &vec![0; 256]);
    low.memory
        .write(0, &(size_of::<Info>() as u32).to_ne_bytes());
    low.memory.write(4, &number.to_ne_bytes());
    check_eq!(
        low.ioctl(fd, pinbuf_uapi::INFO, low.addr(0))?,
        Ok(0),
        "PINBUF_INFO"
    );
    let expected = device.describe(&buffer)?;
    let words = [
        u64::from(expected.size) | u64::from(number as u32) << 32,
        expected.bytes,
        expected.pages,
        expected.extents,
        expected.pins,
        expected.kernel_bytes,
        expected.charged_pages,
        u64::from(expected.charge) | u64::from(expected.mappings) << 32,
        expected.state,
    ];
    for (index, word) in words.into_iter().enumerate() {
        check_eq!(
            low.memory.get(index * 8),
            word,
            "word {index} of the answer"
        );
    }
    Ok(())
}

fn checked() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let fd = device.as_fd().as_raw_fd();
    let range = low.rest(0, 2 * PAGE);
    low.put_ranges(1024, &[range]);
    let right = LOW as u64;
    for (offset, expected) in [(right, None), (right + PAGE as u64, Some(Errno::EAGAIN))] {
        low.memory.set(2048, u64::from(low.file.as_raw_fd() as u32));
        low.memory.set(2056, offset);
        let argument = pinbuf_uapi::Create {
            flags: pinbuf_uapi::CREATE_CHECK_BACKING | pinbuf_uapi::CREATE_CLOEXEC,
            ranges: u64::from(low.addr(1024)),
            count: 1,
            backing: u64::from(low.addr(2048)),
            ..create()
        };
        low.memory.write(0, &bytes_of(&argument));
        let result = low.ioctl(fd, pinbuf_uapi::CREATE, low.addr(0))?;
        check_eq!(result.err(), expected, "a backing at {offset:#x}");
    }
    Ok(())
}

fn errors() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let fd = device.as_fd().as_raw_fd();
    let range = low.rest(0, 2 * PAGE);
    let cases = [
        ("no range", vec![], Errno::EINVAL),
        (
            "an odd address",
            vec![Range {
                addr: range.addr + 1,
                ..range
            }],
            Errno::EINVAL,
        ),
        (
            "an odd length",
            vec![Range {
                len: range.len + 1,
                ..range
            }],
            Errno::EINVAL,
        ),
        (
            "the zero page",
            vec![
                range,
                Range {
                    addr: 0,
                    len: PAGE as u64,
                },
            ],
            Errno::EFAULT,
        ),
        (
            "a range that wraps",
            vec![Range {
                len: 0u64.wrapping_sub(PAGE as u64),
                ..range
            }],
            Errno::EOVERFLOW,
        ),
    ];
    for (what, ranges, expected) in cases {
        let error = low.create(&device, &ranges)?.err();
        check_eq!(error, Some(expected), "{what}");
    }
    for command in [pinbuf_uapi::CREATE, pinbuf_uapi::QUERY, pinbuf_uapi::INFO] {
        let result = low.ioctl(fd, command, 0x1000)?;
        check_eq!(
            result,
            Err(Errno::EFAULT),
            "command {command:#x} with a bad pointer"
        );
        low.memory.write(0, &3u32.to_ne_bytes());
        let result = low.ioctl(fd, command, low.addr(0))?;
        check_eq!(
            result,
            Err(Errno::EINVAL),
            "command {command:#x} with a short struct"
        );
    }
    let result = low.ioctl(fd, 0x7553, low.addr(0))?;
    check_eq!(result, Err(Errno::ENOTTY), "an unknown command");
    Ok(())
}

/// A range has 64 bits whoever calls: no address is cut off.
fn memory_above_4_gib() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let range = low.rest(0, 2 * PAGE);
    low.create(&device, &[range])?.context("create")?;
    let beyond = Range {
        addr: 1 << 32 | range.addr,
        ..range
    };
    let error = low.create(&device, &[beyond])?.err();
    check_eq!(
        error,
        Some(Errno::EFAULT),
        "memory that the process cannot have"
    );
    Ok(())
}

/// The dma-buf itself answers 32-bit calls.
fn sync_of_the_buffer() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let (number, buffer) = low.create(&device, &[low.rest(0, PAGE)])??;
    for flags in [1u64, 5, 2, 6, 3, 7] {
        low.memory.set(0, flags);
        check_eq!(
            low.ioctl(number, 0x4008_6200, low.addr(0))?,
            Ok(0),
            "sync with {flags}"
        );
        check_eq!(
            sync_raw(&buffer, flags),
            Ok(()),
            "sync with {flags}, by 64 bits"
        );
    }
    Ok(())
}

fn discards() -> Result<()> {
    let device = Device::open()?;
    let mut low = Caller::new(&device)?;
    let fd = device.as_fd().as_raw_fd();
    let (number, _buffer) = low.create(&device, &[low.rest(0, 8 * PAGE)])??;
    punch_hole(&low.file, LOW + PAGE, PAGE)?;
    punch_hole(&low.file, LOW + 5 * PAGE, 2 * PAGE)?;
    let call = Discards {
        size: size_of::<Discards>() as u32,
        fd: number,
        offset: 0,
        list: u64::from(low.addr(PAGE)),
        count: 4,
        reserved: 0,
    };
    low.memory.write(0, &discards_more::bytes_of(&call));
    check_eq!(
        low.ioctl(fd, pinbuf_uapi::DISCARDS, low.addr(0))?,
        Ok(0),
        "PINBUF_DISCARDS"
    );
    check_eq!(low.memory.get(8), 8 * PAGE as u64, "the end");
    check_eq!(low.memory.get(24), 2, "elements");
    let state = u64::from(STATE_DISCARDED);
    for (index, word) in [
        PAGE as u64,
        PAGE as u64,
        state,
        5 * PAGE as u64,
        2 * PAGE as u64,
        state,
    ]
    .into_iter()
    .enumerate()
    {
        check_eq!(
            low.memory.get(PAGE + index * 8),
            word,
            "word {index} of the list"
        );
    }
    // An address that only 64 bits reach is not cut.
    let far = Discards {
        list: 1 << 32 | call.list,
        ..call
    };
    low.memory.write(0, &discards_more::bytes_of(&far));
    let failed = low.ioctl(fd, pinbuf_uapi::DISCARDS, low.addr(0))?;
    check_eq!(failed, Err(Errno::EFAULT), "a list above 4 GiB");
    Ok(())
}
