// SPDX-License-Identifier: GPL-2.0

//! The ioctls of `/dev/pinbuf`: reading and checking their arguments, and returning the results.
//! `uapi/pinbuf.h` describes them.

use crate::{
    buffer::Buffer,
    charge::{
        self,
        Charge,
        To, //
    },
    discards::{
        survey,
        Part, //
    },
    kernel_ext::{
        dma_buf::DmaBuf,
        miscdevice,
        module,
        pages::{
            CurrentMm,
            Sight, //
        },
        pfn_map,
        user, //
    },
    params,
    pin,
    ranges::{
        check_backings,
        joined,
        total_pages,
        Element, //
    },
    uaccess::{
        self,
        Extensible, //
    },
    uapi, //
};
use core::ops::ControlFlow;
use kernel::{
    ffi::c_long,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    transmute::AsBytes,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

// SAFETY: `repr(C)`, and fixed-width integers without padding, of which the first is the size.
unsafe impl Extensible for uapi::Create {
    const FIRST_SIZE: usize = 32;
}

// SAFETY: As above.
unsafe impl Extensible for uapi::Query {
    const FIRST_SIZE: usize = 72;
}

// SAFETY: As above.
unsafe impl Extensible for uapi::Info {
    const FIRST_SIZE: usize = 96;
}

// SAFETY: As above.
unsafe impl Extensible for uapi::Discards {
    const FIRST_SIZE: usize = 32;
}

// SAFETY: Fixed-width integers without padding.
unsafe impl AsBytes for Element<uapi::Discard> {}

/// The device's ioctls.
pub(crate) struct Calls;

impl miscdevice::Calls for Calls {
    fn ioctl(command: u32, argument: UserPtr) -> Result<c_long> {
        // The size in the number is not compared: the caller's struct contains its size too.
        match command & !SIZE_MASK {
            CREATE => create(argument),
            QUERY => query(argument),
            INFO => info(argument),
            DISCARDS => discards(argument),
            _ => Err(ENOTTY),
        }
    }
}

/// The bits of an ioctl number that hold the argument's size.
const SIZE_MASK: u32 = 0x3fff << 16;
const CREATE: u32 = uapi::CREATE & !SIZE_MASK;
const QUERY: u32 = uapi::QUERY & !SIZE_MASK;
const INFO: u32 = uapi::INFO & !SIZE_MASK;
const DISCARDS: u32 = uapi::DISCARDS & !SIZE_MASK;

fn create(argument: UserPtr) -> Result<c_long> {
    let (create, _) = uaccess::read_struct::<uapi::Create>(argument)?;
    if create.flags & !uapi::CREATE_FLAGS != 0 || create.reserved != 0 {
        return Err(EINVAL);
    }
    if create.count == 0 || create.count > uapi::MAX_RANGES {
        return Err(EINVAL);
    }
    let count = create.count as usize;
    let ranges = uaccess::read_array::<Element<uapi::Range>>(create.ranges, count)?;
    let pages = total_pages(&ranges)?;
    let backings = if create.flags & uapi::CREATE_CHECK_BACKING != 0 {
        let backings = uaccess::read_array::<Element<uapi::Backing>>(create.backing, count)?;
        check_backings(&ranges, &backings)?;
        Some(backings)
    } else if create.backing != 0 {
        return Err(EINVAL);
    } else {
        None
    };
    // Only a call that names pages repeatedly can make a buffer larger than memory. The kernel
    // could not map such a buffer for itself, and cannot pin one page any number of times.
    if pages > user::total_pages() {
        return Err(ENOMEM);
    }

    let task = kernel::current!();
    // A kernel thread has no address space.
    let mm = CurrentMm::of(task).ok_or(EFAULT)?;
    let mut charge = Charge::new(&mm, pages)?;
    let parts = joined(&ranges, backings.as_deref());
    let (held, rest) = pin::pin(&mm, pages, parts, &mut charge)?;
    drop((ranges, backings));

    let buffer = Buffer::new(held, rest, charge);
    let fd = DmaBuf::export(module::this_module()?, buffer)?
        .into_fd(create.flags & uapi::CREATE_CLOEXEC != 0)?;
    Ok(fd as c_long)
}

fn query(argument: UserPtr) -> Result<c_long> {
    let (query, claimed) = uaccess::read_struct::<uapi::Query>(argument)?;
    if query.reserved != 0 {
        return Err(EINVAL);
    }
    let answer = uapi::Query {
        size: size_of::<uapi::Query>() as u32,
        version: uapi::VERSION,
        features: uapi::FEATURE_CHECK_BACKING
            | uapi::FEATURE_DISCARDS
            | if pfn_map::huge_entries_allowed() {
                uapi::FEATURE_HUGE_MMAP
            } else {
                0
            },
        create_flags: uapi::CREATE_FLAGS.into(),
        max_ranges: uapi::MAX_RANGES,
        page_size: PAGE_SIZE as u32,
        charge_mode: uapi::CHARGE_USER,
        reserved: 0,
        memlock_bytes: charge::limit_bytes(),
        allowance_bytes: bytes(params::allowance_pages()),
        allowance_used: bytes(charge::allowance_used()),
        allowance_system: bytes(params::allowance_system_pages()),
    };
    uaccess::write_struct(argument, answer, claimed)?;
    Ok(0)
}

fn info(argument: UserPtr) -> Result<c_long> {
    let (info, claimed) = uaccess::read_struct::<uapi::Info>(argument)?;
    let dma_buf = DmaBuf::from_fd(info.fd)?;
    let buffer = dma_buf.exporter::<Buffer>().ok_or(EINVAL)?;
    let mappings = dma_buf.mappings::<Buffer>().ok_or(EINVAL)?;
    let (held, charge) = (buffer.held(), buffer.charge());
    let (mut discarded, mut unsure) = (0, 0);
    survey(held, 0, |part| {
        match part.sight {
            Sight::Seen => {}
            Sight::Discarded => discarded += part.pages,
            Sight::Unsure => unsure += part.pages,
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let extents = held.extents();
    let answer = uapi::Info {
        size: size_of::<uapi::Info>() as u32,
        fd: info.fd,
        bytes: bytes(extents.pages()),
        pages: extents.pages() as u64,
        extents: extents.count() as u64,
        pins: held.count() as u64,
        kernel_bytes: extents.bytes() as u64,
        charged_pages: charge.pages() as u64,
        charge: match charge.to() {
            To::Limit(_) => uapi::CHARGE_USER,
            To::Allowance => uapi::CHARGE_ALLOWANCE,
            To::Nothing => uapi::CHARGE_NONE,
        },
        mappings: mappings as u32,
        state: state(Sight::Discarded, discarded) | state(Sight::Unsure, unsure),
        held_bytes: bytes(extents.pages() + buffer.rest()),
        discarded_bytes: bytes(discarded),
        unsure_bytes: bytes(unsure),
    };
    uaccess::write_struct(argument, answer, claimed)?;
    Ok(0)
}

fn discards(argument: UserPtr) -> Result<c_long> {
    let (call, claimed) = uaccess::read_struct::<uapi::Discards>(argument)?;
    if call.reserved != 0 || call.offset % PAGE_SIZE as u64 != 0 {
        return Err(EINVAL);
    }
    let dma_buf = DmaBuf::from_fd(call.fd)?;
    let buffer = dma_buf.exporter::<Buffer>().ok_or(EINVAL)?;
    let held = buffer.held();
    if call.offset > bytes(held.extents().pages()) {
        return Err(EINVAL);
    }
    let room = (call.count as usize)
        .checked_mul(size_of::<uapi::Discard>())
        .ok_or(EOVERFLOW)?;
    let list = usize::try_from(call.list).map_err(|_| EFAULT)?;
    let mut list = UserSlice::new(UserPtr::from_addr(list), room).writer();
    let mut count = 0;
    let end = survey(held, (call.offset >> PAGE_SHIFT) as usize, |part: &Part| {
        let state = state(part.sight, part.pages);
        if state == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        if count == call.count {
            return Ok(ControlFlow::Break(()));
        }
        list.write(&Element(uapi::Discard {
            offset: bytes(part.first),
            len: bytes(part.pages),
            state: state as u32,
            reserved: 0,
        }))?;
        count += 1;
        Ok(ControlFlow::Continue(()))
    })?;
    let answer = uapi::Discards {
        size: size_of::<uapi::Discards>() as u32,
        offset: bytes(end),
        count,
        ..call
    };
    uaccess::write_struct(argument, answer, claimed)?;
    Ok(0)
}

/// The `STATE_*` bit for `pages` pages of this state; zero if there are none, or if the owner sees
/// them.
fn state(sight: Sight, pages: usize) -> u64 {
    match sight {
        _ if pages == 0 => 0,
        Sight::Seen => 0,
        Sight::Discarded => uapi::STATE_DISCARDED.into(),
        Sight::Unsure => uapi::STATE_UNSURE.into(),
    }
}

fn bytes(pages: usize) -> u64 {
    (pages as u64) << PAGE_SHIFT
}
