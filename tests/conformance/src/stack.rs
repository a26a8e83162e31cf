// SPDX-License-Identifier: MIT OR Apache-2.0

//! A create in a signal handler, whose stack may have 8 KiB in all.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use anyhow::Result;

use crate::cases::{device, File, Table, OK, PLAIN};
use crate::late::{Faults, Mode};
use crate::run::Outcome;
use crate::udmabuf::{check, close, create_list, list, Item, Map, CREATE_LIST, PAGE};

/// The most that a create may take. What is left of 8 KiB is for the signal's frame.
const MOST: usize = 6800;
/// The size of the stack that is measured.
const ALL: usize = 64 << 10;
const PAINT: u8 = 0xa5;

static DEVICE: AtomicI32 = AtomicI32::new(-1);
static LIST: AtomicUsize = AtomicUsize::new(0);
static MADE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn nothing(_: c_int) {}

extern "C" fn creates(_: c_int) {
    let (device, list) = (DEVICE.load(Ordering::Relaxed), LIST.load(Ordering::Relaxed));
    // SAFETY: udmabuf reads the list.
    let made = unsafe { libc::ioctl(device, CREATE_LIST, list) };
    MADE.store(made, Ordering::Relaxed);
}

/// How much of the stack a handler of a signal takes.
fn taken(handler: extern "C" fn(c_int)) -> Result<usize> {
    let mut stack = vec![PAINT; ALL];
    let alternative = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: ALL,
    };
    // SAFETY: the memory stays until the signal has been handled.
    check(unsafe { libc::sigaltstack(&alternative, ptr::null_mut()) }.into())?;
    // SAFETY: zeroes are an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the handlers make system calls only.
    check(unsafe { libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut()) }.into())?;
    // SAFETY: the signal has a handler.
    check(unsafe { libc::raise(libc::SIGUSR1) }.into())?;
    let none = libc::stack_t {
        ss_sp: ptr::null_mut(),
        ss_flags: libc::SS_DISABLE,
        ss_size: 0,
    };
    // SAFETY: the memory that was given is not used any more.
    check(unsafe { libc::sigaltstack(&none, ptr::null_mut()) }.into())?;
    let read = |byte: &u8| {
        // SAFETY: a reference. The kernel and the handler have written there.
        unsafe { ptr::read_volatile(byte) }
    };
    let untouched = stack.iter().take_while(|byte| read(byte) == PAINT);
    Ok(ALL - untouched.count())
}

pub fn cases(t: &mut Table) {
    for (name, mapped, late) in [
        ("unmapped", false, false),
        ("mapped", true, false),
        ("late", true, true),
    ] {
        t.custom(format!("stack/{name}"), OK, move || {
            let device = device()?;
            let file = File::new(0, PLAIN)?;
            let map = mapped
                .then(|| Map::shared(file.fd, PLAIN.bytes))
                .transpose()?;
            let _faults = match &map {
                Some(map) if late => Some(Faults::of(map, PLAIN.bytes, PAGE, Mode::Missing)?),
                _ => None,
            };
            // In no order.
            let items: Vec<Item> = (0..60)
                .map(|i| file.item(i * 5 % 16 * PAGE, PAGE))
                .collect();
            // What is done once only, by the dynamic linker for example, is not measured.
            close(create_list(device, &items, 0)?)?;
            let list = list(0, items.len() as u32, &items);
            DEVICE.store(device, Ordering::Relaxed);
            LIST.store(list.as_ptr() as usize, Ordering::Relaxed);
            let frame = taken(nothing)?;
            let create = taken(creates)? - frame;
            let mut outcome = Outcome {
                ret: "0".to_owned(),
                ..Outcome::default()
            };
            outcome.fact("made", MADE.load(Ordering::Relaxed) >= 0);
            outcome.fact("little stack", create <= MOST);
            if create > MOST {
                outcome.fact("bytes", create);
            }
            Ok(outcome)
        });
    }
}
