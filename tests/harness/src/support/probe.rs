// SPDX-License-Identifier: MIT OR Apache-2.0

//! Access to addresses where there may be nothing: a signal becomes an error.
//!
//! The access is one instruction of this thread, so it uses the translations that the processor has at
//! that moment. A system call that copies to or from an address may switch page tables first, and so miss
//! a stale one.

use std::arch::global_asm;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Once;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::memory::memfd;
use super::PAGE;

// Both access one word at the address that is their first argument, as their first instruction. If that raises
// a signal, the handler continues at `pinbuf_probe_failed`, with the signal as the result.
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".text",
    ".globl pinbuf_probe_load",
    ".type pinbuf_probe_load, @function",
    "pinbuf_probe_load:",
    "ldr x2, [x0]",
    "str x2, [x1]",
    "mov w0, #0",
    "ret",
    ".globl pinbuf_probe_store",
    ".type pinbuf_probe_store, @function",
    "pinbuf_probe_store:",
    "str x1, [x0]",
    "mov w0, #0",
    "ret",
    ".globl pinbuf_probe_failed",
    "pinbuf_probe_failed:",
    "ret",
);
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".text",
    ".globl pinbuf_probe_load",
    ".type pinbuf_probe_load, @function",
    "pinbuf_probe_load:",
    "mov (%rdi), %rax",
    "mov %rax, (%rsi)",
    "xor %eax, %eax",
    "ret",
    ".globl pinbuf_probe_store",
    ".type pinbuf_probe_store, @function",
    "pinbuf_probe_store:",
    "mov %rsi, (%rdi)",
    "xor %eax, %eax",
    "ret",
    ".globl pinbuf_probe_failed",
    "pinbuf_probe_failed:",
    "ret",
    options(att_syntax)
);

extern "C" {
    fn pinbuf_probe_load(address: u64, word: *mut u64) -> i32;
    fn pinbuf_probe_store(address: u64, word: u64) -> i32;
    fn pinbuf_probe_failed();
}

/// Lets a probe fail; anything else dies of the signal as it would without a handler.
extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a handler with SA_SIGINFO the interrupted context.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let probes = [
        pinbuf_probe_load as *const () as u64,
        pinbuf_probe_store as *const () as u64,
    ];
    if probes.contains(&position(context)) {
        return_from_probe(context, signal);
    } else {
        // SAFETY: async-signal-safe; the access is repeated, and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// The address of the instruction that was interrupted.
#[cfg(target_arch = "aarch64")]
fn position(context: &libc::ucontext_t) -> u64 {
    context.uc_mcontext.pc
}

#[cfg(target_arch = "x86_64")]
fn position(context: &libc::ucontext_t) -> u64 {
    context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64
}

/// Makes the interrupted probe return the signal.
#[cfg(target_arch = "aarch64")]
fn return_from_probe(context: &mut libc::ucontext_t, signal: i32) {
    context.uc_mcontext.regs[0] = signal as u64;
    context.uc_mcontext.pc = pinbuf_probe_failed as *const () as u64;
}

#[cfg(target_arch = "x86_64")]
fn return_from_probe(context: &mut libc::ucontext_t, signal: i32) {
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RAX as usize] = i64::from(signal);
    registers[libc::REG_RIP as usize] = pinbuf_probe_failed as *const () as i64;
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: all-zero is a valid sigaction.
            let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            // SAFETY: the handler is async-signal-safe.
            let result = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
            assert_eq!(result, 0, "sigaction: {}", Errno::last());
        }
    });
}

fn outcome(signal: i32) -> Result<(), Signal> {
    match signal {
        0 => Ok(()),
        libc::SIGBUS => Err(Signal::SIGBUS),
        _ => Err(Signal::SIGSEGV),
    }
}

/// Reads the word at an address, which is a multiple of eight.
pub fn peek(address: u64) -> Result<u64, Signal> {
    assert!(address % 8 == 0);
    install();
    let mut word = 0;
    // SAFETY: reads one aligned word, wherever it is; a failure is caught. `word` is writable.
    outcome(unsafe { pinbuf_probe_load(address, &mut word) }).map(|()| word)
}

/// Writes the word at an address, which is a multiple of eight.
///
/// # Safety
///
/// No object of Rust's lies there.
pub unsafe fn poke(address: u64, word: u64) -> Result<(), Signal> {
    assert!(address % 8 == 0);
    install();
    // SAFETY: by the function's requirements; a failure is caught.
    outcome(unsafe { pinbuf_probe_store(address, word) })
}

/// Lets the kernel copy between an address and a file.
#[derive(Debug)]
pub struct Copier(OwnedFd);

impl Copier {
    /// Gets ready.
    pub fn new() -> Result<Self> {
        memfd(PAGE, 0).context("a file to copy through").map(Self)
    }

    /// The kernel reads the word at an address.
    pub fn copy_from(&self, address: u64) -> nix::Result<()> {
        // SAFETY: the kernel reads, and checks the address.
        let copied = unsafe { libc::pwrite(self.0.as_raw_fd(), address as *const _, 8, 0) };
        Errno::result(copied).map(drop)
    }

    /// The kernel writes the word at an address.
    ///
    /// # Safety
    ///
    /// No object of Rust's lies there.
    pub unsafe fn copy_to(&self, address: u64) -> nix::Result<()> {
        // SAFETY: the kernel checks the address; otherwise by the function's requirements.
        let copied = unsafe { libc::pread(self.0.as_raw_fd(), address as *mut _, 8, 0) };
        Errno::result(copied).map(drop)
    }
}
