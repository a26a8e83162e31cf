// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program that makes system calls itself where libc has functions for them, as programs built on rustix do:
//! it opens udmabuf's device, and prints the error.

use std::arch::asm;

fn main() {
    let path = c"/dev/udmabuf";
    let result: isize;
    // SAFETY: the kernel reads a terminated string, and changes these registers.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        asm!(
            "svc #0",
            in("x8") libc::SYS_openat,
            inlateout("x0") libc::AT_FDCWD as isize => result,
            in("x1") path.as_ptr(),
            in("x2") libc::O_RDWR as isize,
            in("x3") 0,
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_openat as isize => result,
            in("rdi") libc::AT_FDCWD as isize,
            in("rsi") path.as_ptr(),
            in("rdx") libc::O_RDWR as isize,
            in("r10") 0,
            out("rcx") _,
            out("r11") _,
        );
    }
    if result >= 0 {
        println!("opened");
        return;
    }
    let error = std::io::Error::from_raw_os_error(-result as i32);
    eprintln!("opening /dev/udmabuf: {error}");
    std::process::exit(1);
}
