// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reads a file into a buffer by io_uring, and copies the buffer to standard output: `io_uring FILE`.
//!
//! A ring cannot register a dma-buf, nor its mapping (`EFAULT`: page frames cannot be pinned again). It registers the
//! memory that the buffer was made of, so what storage writes is what a device with the buffer reads.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use io_uring::{opcode, types::Fd, IoUring};
use pinbuf::{Access, Device, Region};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: io_uring FILE")?;
    let file = File::open(path)?;
    let len = usize::try_from(file.metadata()?.len())?;
    let memory = Region::anonymous(len)?;
    let buffer = Device::open()?.export(&memory)?;

    let mut ring = IoUring::new(8)?;
    let whole = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: memory.len(),
    };
    // SAFETY: the memory lives longer than the ring, and there is no reference to it.
    unsafe { ring.submitter().register_buffers(&[whole])? };

    let write = buffer.begin_cpu_access(Access::Write)?;
    let mut done = 0;
    while done < len {
        let to = memory.as_ptr().wrapping_add(done);
        let read = opcode::ReadFixed::new(Fd(file.as_raw_fd()), to, u32::try_from(len - done)?, 0)
            .offset(done as u64)
            .build();
        // SAFETY: it writes to registered memory, and the descriptor stays open.
        unsafe { ring.submission().push(&read)? };
        ring.submit_and_wait(1)?;
        let result = ring.completion().next().ok_or("no completion")?.result();
        match usize::try_from(result) {
            Ok(0) => return Err("the file has become shorter".into()),
            Ok(count) => done += count,
            Err(_) => return Err(io::Error::from_raw_os_error(-result).into()),
        }
    }
    write.finish()?;

    // What a device or another process with the buffer sees.
    let mapping = buffer.map()?;
    let access = mapping.begin(Access::Read)?;
    let mut bytes = vec![0; len];
    access.read_at(0, &mut bytes)?;
    access.finish()?;
    io::stdout().write_all(&bytes)?;
    Ok(())
}
