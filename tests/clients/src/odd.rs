// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that few programs make, by the word that names them. Each prints what became of it.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use pinbuf_test_harness::support::udmabuf::{self, Create, Item, List};
use pinbuf_test_harness::support::{Memory, PAGE};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["sparse"] => sparse(),
        ["long"] => long(),
        ["openat2"] => openat2(),
        ["open"] => open(),
        ["stopped"] => stopped(),
        ["left"] => left(),
        ["last"] => last(),
        ["hidden"] => hidden(),
        ["ask"] => ask(),
        _ => bail!("sparse, long, openat2, open, stopped, left, last, hidden or ask"),
    }
}

fn outcome<T>(result: nix::Result<T>) -> String {
    match result {
        Ok(_) => "made".to_owned(),
        Err(error) => format!("{error:?}"),
    }
}

/// A buffer larger than any limit, of memory that nobody has touched: prints the error, and the bytes that the file
/// has then.
fn sparse() -> Result<()> {
    const SIZE: usize = 512 << 20;
    let file = udmabuf::sealed_memfd(SIZE)?;
    let _mapping = Memory::shared(&file, SIZE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let made = Create::new(&file, 0, SIZE).call(&device);
    let stat = nix::sys::stat::fstat(&file)?;
    println!("{} {}", outcome(made), stat.st_blocks * 512);
    Ok(())
}

/// The longest list there may be, of parts that do not join, and then a request of one page.
fn long() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let item = Item {
        memfd: file.as_fd().as_raw_fd() as u32,
        pad: 0,
        offset: 0,
        size: PAGE as u64,
    };
    let list = List::new(std::iter::repeat_n(item, 1 << 20));
    println!("ready");
    std::io::stdin().read_line(&mut String::new())?;
    println!("{}", outcome(list.call(&device)));
    println!("{}", outcome(Create::new(&file, 0, PAGE).call(&device)));
    Ok(())
}

#[repr(C)]
struct How {
    flags: u64,
    mode: u64,
    resolve: u64,
    more: u64,
    rest: [u64; PAGE / 8],
}

/// How `/dev/udmabuf` may be found. Prints a line for each way.
fn openat2() -> Result<()> {
    let root = nix::fcntl::open(
        "/tmp",
        nix::fcntl::OFlag::O_PATH,
        nix::sys::stat::Mode::empty(),
    )?;
    let plain = How {
        flags: libc::O_RDWR as u64,
        mode: 0,
        resolve: 0,
        more: 0,
        rest: [0; PAGE / 8],
    };
    // That of the first kernels with this call.
    let (size, flags) = (24, plain.flags);
    let create = libc::O_CREAT as u64;
    for (how, size) in [
        (How { ..plain }, size),
        // The path is absolute.
        (
            How {
                resolve: libc::RESOLVE_BENEATH,
                ..plain
            },
            size,
        ),
        // There is none in that directory.
        (
            How {
                resolve: libc::RESOLVE_IN_ROOT,
                ..plain
            },
            size,
        ),
        // No flag that the kernel knows.
        (
            How {
                flags: flags | 1 << 40,
                ..plain
            },
            size,
        ),
        // A mode without a file to be created.
        (
            How {
                mode: 0o600,
                ..plain
            },
            size,
        ),
        (How { ..plain }, 8),
        // A flag among those of open that no call knows.
        (
            How {
                flags: flags | 1 << 30,
                ..plain
            },
            size,
        ),
        // Only regular files (OPENAT2_REGULAR).
        (
            How {
                flags: flags | 1 << 32,
                ..plain
            },
            size,
        ),
        // What is to be created is not only looked up.
        (
            How {
                flags: flags | create,
                mode: 0o600,
                resolve: libc::RESOLVE_CACHED,
                ..plain
            },
            size,
        ),
        // It is no link, whether links are followed or not.
        (
            How {
                resolve: libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS,
                ..plain
            },
            size,
        ),
        // /dev is a mount.
        (
            How {
                resolve: libc::RESOLVE_NO_XDEV,
                ..plain
            },
            size,
        ),
        (
            How {
                resolve: 1 << 40,
                ..plain
            },
            size,
        ),
        // The device is there: nothing is created, but the mode has to be one.
        (
            How {
                flags: flags | create,
                mode: 0o600,
                ..plain
            },
            size,
        ),
        (
            How {
                flags: flags | create,
                mode: 0o10600,
                ..plain
            },
            size,
        ),
        // A later struct may have more, which has to be zeroes.
        (How { ..plain }, size + 8),
        (How { more: 1, ..plain }, size + 8),
        (How { ..plain }, PAGE),
        (How { ..plain }, PAGE + 8),
    ] {
        let path = c"/dev/udmabuf";
        // SAFETY: a terminated string, and a struct of at least that size.
        let opened = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size,
            )
        });
        ensure!(opened != Ok(-1));
        println!("{}", outcome(opened));
    }
    Ok(())
}

/// Ways to open the device, by calls of which each architecture has some. Prints for each what the descriptor is, or the
/// error.
fn open() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let ways: [(&CStr, i32); 24] = [
        (c"/dev/udmabuf", libc::O_RDONLY),
        (c"/dev/udmabuf", libc::O_WRONLY),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_CLOEXEC),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_CREAT),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_TRUNC),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_CREAT | libc::O_EXCL),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_DIRECTORY),
        (c"/dev/udmabuf", libc::O_PATH),
        // The path alone is looked up, whatever else is said.
        (
            c"/dev/udmabuf",
            libc::O_PATH | libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC,
        ),
        (
            c"/dev/udmabuf",
            libc::O_PATH | libc::O_CREAT | libc::O_DIRECTORY,
        ),
        (c"/dev/udmabuf", libc::O_ACCMODE),
        (
            c"/dev/udmabuf",
            libc::O_RDWR | libc::O_APPEND | libc::O_NONBLOCK,
        ),
        (
            c"/dev/udmabuf",
            libc::O_RDWR | libc::O_SYNC | libc::O_NOFOLLOW,
        ),
        // No call has this flag.
        (c"/dev/udmabuf", libc::O_RDWR | 1 << 30),
        // The device has no blocks, and is another user's.
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_DIRECT),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_NOATIME),
        (
            c"/dev/udmabuf",
            libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_DIRECT,
        ),
        (c"/dev/udmabuf", libc::O_RDWR | libc::O_TMPFILE),
        (c"/dev/udmabuf", libc::O_RDONLY | libc::O_TMPFILE),
        (
            c"/dev/udmabuf",
            libc::O_RDWR | libc::O_TMPFILE & !libc::O_DIRECTORY,
        ),
        (c"/dev/udmabuf0", libc::O_RDWR),
        (c"/dev/udmabuf/", libc::O_RDWR),
        (c"/dev/udmabu", libc::O_RDWR),
        (c"", libc::O_RDWR),
    ];
    let show = |result| -> Result<()> {
        println!("{}", opened(&file, result)?);
        Ok(())
    };
    let cwd = libc::AT_FDCWD;
    for (path, flags) in ways {
        // SAFETY: a terminated string.
        show(unsafe { libc::syscall(libc::SYS_openat, cwd, path.as_ptr(), flags, 0o600) })?;
    }
    // SAFETY: no string, and nothing is written.
    show(unsafe { libc::syscall(libc::SYS_openat, cwd, 1, libc::O_RDWR, 0) })?;
    #[cfg(target_arch = "x86_64")]
    {
        let path = c"/dev/udmabuf".as_ptr();
        // SAFETY: a terminated string.
        show(unsafe { libc::syscall(libc::SYS_open, path, libc::O_RDWR, 0) })?;
        // SAFETY: as above.
        show(unsafe { libc::syscall(libc::SYS_creat, path, 0o600) })?;
    }
    Ok(())
}

/// How a descriptor was opened, whether it is closed on exec, and what becomes of a request by it.
fn opened(file: &OwnedFd, result: i64) -> Result<String> {
    let fd = match Errno::result(result) {
        // SAFETY: the call has just returned it.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd as i32) },
        Err(error) => return Ok(format!("{error:?}")),
    };
    let flags = |command| {
        // SAFETY: no memory is involved.
        Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command) })
    };
    let status = flags(libc::F_GETFL)?;
    let mut mode = match status & (libc::O_ACCMODE | libc::O_PATH) {
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        libc::O_RDWR => "rw",
        libc::O_ACCMODE => "none",
        _ => "path",
    }
    .to_owned();
    for (flag, name) in [
        (libc::O_APPEND, "append"),
        (libc::O_NONBLOCK, "nonblock"),
        (libc::O_SYNC, "sync"),
        (libc::O_NOFOLLOW, "nofollow"),
    ] {
        if status & flag == flag {
            mode += &format!("+{name}");
        }
    }
    let cloexec = flags(libc::F_GETFD)? & libc::FD_CLOEXEC != 0;
    let made = outcome(Create::new(file, 0, PAGE).call(&fd));
    Ok(format!("{mode} {cloexec} {made}"))
}

/// Opens files and makes buffers, from several threads, while the supervisor is stopped and continued all the time. Prints what
/// came of it, other than new descriptors.
fn stopped() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let supervisor = nix::unistd::getppid();
    let (odd, done) = (Mutex::new(BTreeSet::new()), AtomicBool::new(false));
    let end = Instant::now() + Duration::from_secs(5);
    // By raw calls, which return what the standard descriptors have as well.
    let create = Create::new(&file, 0, PAGE);
    let open = |path: &CStr| {
        // SAFETY: a terminated string.
        unsafe {
            libc::syscall(
                libc::SYS_openat,
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::O_RDWR,
            )
        }
    };
    let ask = || {
        while Instant::now() < end {
            let (fd, number) = (device.as_raw_fd(), 0x4018_7542);
            // SAFETY: UDMABUF_CREATE reads the struct.
            let made = unsafe { libc::syscall(libc::SYS_ioctl, fd, number, &raw const create) };
            for (what, result) in [
                ("buffer", made),
                ("/dev/null", open(c"/dev/null")),
                ("/dev/udmabuf", open(c"/dev/udmabuf")),
            ] {
                match Errno::result(result) {
                    // SAFETY: the call has just returned it.
                    Ok(fd @ 3..) => drop(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
                    other => drop(
                        odd.lock()
                            .map(|mut odd| odd.insert(format!("{what}: {other:?}"))),
                    ),
                }
            }
        }
    };
    thread::scope(|scope| {
        let askers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let stops = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = kill(supervisor, Signal::SIGSTOP);
                let _ = kill(supervisor, Signal::SIGCONT);
                thread::sleep(Duration::from_micros(200));
            }
        });
        let ended = || askers.iter().all(|asker| asker.is_finished());
        while Instant::now() < end + Duration::from_secs(8) && !ended() {
            thread::sleep(Duration::from_millis(50));
        }
        done.store(true, Ordering::Relaxed);
        // The supervisor goes on.
        let _ = stops.join();
        for line in odd.lock().into_iter().flat_map(|odd| odd.clone()) {
            println!("{line}");
        }
        println!("{}", if ended() { "end" } else { "no answer" });
        // A call that nobody answers never returns, so its thread is not waited for.
        std::process::exit(0)
    })
}

/// Ends, and leaves a process that opens the device while the supervisor is stopped and continued all the time. Each file is taken
/// by a process whose table of descriptors has to grow, and which has two threads: the kernel holds the lock of the supervisor's
/// listener meanwhile, and waits for all processors. Prints the first error.
fn left() -> Result<()> {
    let supervisor = nix::unistd::getppid();
    if fork()? != 0 {
        return Ok(());
    }
    let start = Instant::now();
    while nix::unistd::getppid() != supervisor {
        ensure!(
            start.elapsed() < Duration::from_secs(10),
            "the program does not end"
        );
        thread::sleep(Duration::from_millis(1));
    }
    // The supervisor has to hear of that end.
    thread::sleep(Duration::from_millis(200));
    let end = Instant::now() + Duration::from_secs(2);
    let stops = fork()?;
    if stops == 0 {
        while Instant::now() < end {
            let _ = kill(supervisor, Signal::SIGSTOP);
            let _ = kill(supervisor, Signal::SIGCONT);
            thread::sleep(Duration::from_micros(200));
        }
        std::process::exit(0);
    }
    let mut error = Errno::from_raw(0);
    while Instant::now() < end && error as i32 == 0 {
        let opener = fork()?;
        if opener == 0 {
            std::process::exit(open_at_256().map_or_else(|error| error as i32, |()| 0));
        }
        let mut status = 0;
        // SAFETY: the status is written to `status`.
        Errno::result(unsafe { libc::waitpid(opener, &mut status, 0) })?;
        ensure!(libc::WIFEXITED(status), "an opener was killed");
        error = Errno::from_raw(libc::WEXITSTATUS(status));
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::waitpid(stops, std::ptr::null_mut(), 0) })?;
    match error as i32 {
        0 => println!("end"),
        _ => println!("{error:?}"),
    }
    Ok(())
}

/// Ends as soon as a request is answered.
fn last() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    let made = Create::new(&file, 0, PAGE).call(&device);
    // SAFETY: ends the process.
    unsafe { libc::_exit(i32::from(made.is_err())) }
}

/// Opens the device while no other process of the user may look into this one.
fn hidden() -> Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    println!("{}", outcome(udmabuf::open()));
    Ok(())
}

/// Makes a buffer and opens the device, and again for each line that it reads.
fn ask() -> Result<()> {
    let file = udmabuf::sealed_memfd(PAGE)?;
    let device = udmabuf::open().context("opening /dev/udmabuf")?;
    loop {
        let made = Create::new(&file, 0, PAGE).call(&device);
        println!("{} {}", outcome(made), outcome(udmabuf::open()));
        if std::io::stdin().read_line(&mut String::new())? == 0 {
            return Ok(());
        }
    }
}

/// The number of the child, or 0 in it. This process has one thread.
fn fork() -> nix::Result<i32> {
    // SAFETY: the child may do what any program may.
    Errno::result(unsafe { libc::fork() })
}

/// Opens the device as the first descriptor for which a table that two threads share has no room.
fn open_at_256() -> nix::Result<()> {
    thread::spawn(thread::park);
    // SAFETY: no memory is involved.
    while Errno::result(unsafe { libc::dup(libc::STDIN_FILENO) })? < 255 {}
    let (cwd, path) = (libc::AT_FDCWD, c"/dev/udmabuf".as_ptr());
    // SAFETY: a terminated string.
    let fd = unsafe { libc::syscall(libc::SYS_openat, cwd, path, libc::O_RDWR) };
    match Errno::result(fd)? {
        256 => Ok(()),
        _ => Err(Errno::EBADF),
    }
}
