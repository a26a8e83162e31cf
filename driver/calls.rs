// SPDX-License-Identifier: GPL-2.0

//! The calls of `/dev/pinbuf`. What each one means is written in `uapi/pinbuf.h`.

use crate::{
    buffer::Buffer,
    charge::{
        self,
        Account,
        Charge, //
    },
    kernel_ext::{
        dma_buf::DmaBuf,
        misc,
        module,
        pfn_map, //
    },
    order::{
        joined,
        Order,
        Part, //
    },
    params,
    pins::{
        Expected,
        Pinner,
        Pins, //
    },
    ranges::{
        check_backings,
        total_pages,
        Element, //
    },
    uapi,
    user_array::UserArray,
    user_struct::{
        self,
        Extensible, //
    }, //
};
use kernel::{
    ffi::c_long,
    fs::file::LocalFile,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::aref::ARef,
    uaccess::UserPtr, //
};

// SAFETY: Fixed-width integers without padding, the first of them the size.
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

/// The device's calls.
pub(crate) struct Calls;

impl misc::Calls for Calls {
    fn ioctl(command: u32, argument: UserPtr) -> Result<c_long> {
        // The size in the number is that of the caller's struct, which says it itself too.
        match command & !SIZE_MASK {
            CREATE => create(argument),
            QUERY => query(argument),
            INFO => info(argument),
            _ => Err(ENOTTY),
        }
    }
}

/// The bits of an ioctl number that hold the argument's size.
const SIZE_MASK: u32 = 0x3fff << 16;
const CREATE: u32 = uapi::CREATE & !SIZE_MASK;
const QUERY: u32 = uapi::QUERY & !SIZE_MASK;
const INFO: u32 = uapi::INFO & !SIZE_MASK;

fn create(argument: UserPtr) -> Result<c_long> {
    let (create, _) = user_struct::read::<uapi::Create>(argument)?;
    if create.flags & !uapi::CREATE_FLAGS != 0 || create.reserved != 0 {
        return Err(EINVAL);
    }
    let from_files = create.flags & uapi::CREATE_FROM_FILES != 0;
    let check_backing = create.flags & uapi::CREATE_CHECK_BACKING != 0;
    let backed = from_files || check_backing;
    if (create.backing != 0 && !backed) || (from_files && check_backing) {
        return Err(EINVAL);
    }
    if create.count == 0 || create.count > uapi::MAX_RANGES {
        return Err(EINVAL);
    }
    let count = create.count as usize;
    let ranges = UserArray::<Element<uapi::Range>>::read(create.ranges, count)?;
    let pages = total_pages(&ranges)?;
    if from_files && ranges.iter().any(|Element(range)| range.addr != 0) {
        return Err(EINVAL);
    }
    let backings = if backed {
        let backings = UserArray::<Element<uapi::Backing>>::read(create.backing, count)?;
        check_backings(&ranges, &backings)?;
        Some(backings)
    } else {
        None
    };

    let charge = Charge::new(pages)?;
    let pins = match &backings {
        Some(backings) if check_backing => pin_checked(pages, &ranges, backings)?,
        backings => {
            let part = |number: usize| part(&ranges, backings.as_deref(), number);
            pin_in_order(pages, count, from_files, part)?
        }
    };
    drop((ranges, backings));

    let buffer = Buffer::new(pins, charge);
    let fd = DmaBuf::export(module::this_module()?, buffer)?
        .into_fd(create.flags & uapi::CREATE_CLOEXEC != 0)?;
    Ok(fd as c_long)
}

/// What the range `number` names: of its file, or else of the caller's address space.
fn part(
    ranges: &[Element<uapi::Range>],
    backings: Option<&[Element<uapi::Backing>]>,
    number: usize,
) -> Part {
    // INVARIANT: `total_pages` and `check_backings` have looked for overflow.
    match backings {
        Some(backings) => Part {
            space: backings[number].0.fd,
            start: backings[number].0.offset,
            len: ranges[number].0.len,
        },
        None => Part {
            space: 0,
            start: ranges[number].0.addr,
            len: ranges[number].0.len,
        },
    }
}

/// Pins ranges one by one, each of whose pages has to be its backing's.
fn pin_checked(
    pages: usize,
    ranges: &[Element<uapi::Range>],
    backings: &[Element<uapi::Backing>],
) -> Result<Pins> {
    let mut pinner = Pinner::new(pages, Pinner::patience());
    let mut files = Files(None);
    for (Element(range), Element(backing)) in ranges.iter().zip(backings) {
        let expected = Expected {
            file: files.get(backing.fd)?,
            page: (backing.offset >> PAGE_SHIFT) as usize,
        };
        let pages = (range.len >> PAGE_SHIFT) as usize;
        pinner.pin(range.addr as usize, pages, Some(expected))?;
    }
    Ok(pinner.finish().0)
}

/// Pins `count` parts of `pages` pages in all, in whatever order is quickest.
fn pin_in_order(
    pages: usize,
    count: usize,
    from_files: bool,
    part: impl Fn(usize) -> Part,
) -> Result<Pins> {
    let mut patience = Pinner::patience();
    if let Some(order) = Order::of(count, pages, &part) {
        let sorted = order.numbers().map(&part);
        let (pins, left) = pin_parts(pages, patience, from_files, sorted)?;
        if pins.are_plain() {
            let place = |number| (order.pages_before(number), part(number).pages());
            let places = order.numbers().map(place);
            return pins.rearranged(places);
        }
        // Huge pages, whose parts would each need a pin of its own now. There are few of them: what
        // was done for nothing was little.
        patience = left;
    }
    let (pins, _) = pin_parts(pages, patience, from_files, (0..count).map(part))?;
    Ok(pins)
}

/// Pins parts of `pages` pages in all in this order, and may try again so often; returns the tries that
/// are left, too.
fn pin_parts(
    pages: usize,
    patience: u32,
    from_files: bool,
    parts: impl Iterator<Item = Part>,
) -> Result<(Pins, u32)> {
    let mut pinner = Pinner::new(pages, patience);
    let mut files = Files(None);
    for part in joined(parts) {
        if from_files {
            let page = (part.start >> PAGE_SHIFT) as usize;
            pinner.pin_file(files.get(part.space)?, page, part.pages())?;
        } else {
            pinner.pin(part.start as usize, part.pages(), None)?;
        }
    }
    Ok(pinner.finish())
}

/// The file of the last descriptor that was asked for: callers mostly name one for all ranges.
struct Files(Option<(i32, ARef<LocalFile>)>);

impl Files {
    fn get(&mut self, fd: i32) -> Result<&LocalFile> {
        if self.0.as_ref().is_none_or(|(last, _)| *last != fd) {
            let number = u32::try_from(fd).map_err(|_| EBADF)?;
            self.0 = Some((fd, LocalFile::fget(number)?));
        }
        self.0.as_ref().map(|(_, file)| &**file).ok_or(EBADF)
    }
}

fn query(argument: UserPtr) -> Result<c_long> {
    let (query, claimed) = user_struct::read::<uapi::Query>(argument)?;
    if query.reserved != 0 {
        return Err(EINVAL);
    }
    let bytes = |pages: usize| (pages as u64) << PAGE_SHIFT;
    let answer = uapi::Query {
        size: size_of::<uapi::Query>() as u32,
        version: uapi::VERSION,
        features: uapi::FEATURE_CHECK_BACKING
            | uapi::FEATURE_FROM_FILES
            | if pfn_map::huge_entries_allowed() {
                uapi::FEATURE_HUGE_MMAP
            } else {
                0
            },
        create_flags: uapi::CREATE_FLAGS.into(),
        max_ranges: uapi::MAX_RANGES,
        page_size: PAGE_SIZE as u32,
        charge_mode: if params::charge_process() {
            uapi::CHARGE_PROCESS
        } else {
            uapi::CHARGE_USER
        },
        reserved: 0,
        memlock_bytes: charge::limit_bytes(),
        allowance_bytes: bytes(params::allowance_pages()),
        allowance_used: bytes(charge::allowance_used()),
        allowance_system: bytes(params::allowance_system_pages()),
    };
    user_struct::write(argument, answer, claimed)?;
    Ok(0)
}

fn info(argument: UserPtr) -> Result<c_long> {
    let (info, claimed) = user_struct::read::<uapi::Info>(argument)?;
    if info.reserved != [0; 3] {
        return Err(EINVAL);
    }
    let dma_buf = DmaBuf::from_fd(info.fd)?;
    let (buffer, mappings) = dma_buf.inspect::<Buffer>().ok_or(EINVAL)?;
    let (pins, charge) = (buffer.pins(), buffer.charge());
    let pages = pins.map().pages() as u64;
    let answer = uapi::Info {
        size: size_of::<uapi::Info>() as u32,
        fd: info.fd,
        bytes: pages << PAGE_SHIFT,
        pages,
        extents: pins.map().extents() as u64,
        pins: pins.count() as u64,
        kernel_bytes: pins.map().bytes() as u64,
        charged_pages: charge.pages() as u64,
        charge: match charge.account() {
            Account::User(_) => uapi::CHARGE_USER,
            Account::Process => uapi::CHARGE_PROCESS,
            Account::Allowance(_) => uapi::CHARGE_ALLOWANCE,
            Account::Nothing => uapi::CHARGE_NONE,
        },
        mappings: mappings as u32,
        state: 0,
        reserved: [0; 3],
    };
    user_struct::write(argument, answer, claimed)?;
    Ok(0)
}
