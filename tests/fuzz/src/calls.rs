// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device's own calls, and what each may answer.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::unistd::{lseek64, Whence};
use pinbuf_test_harness::support::device::ioctl;
use pinbuf_test_harness::support::memory::RW;
use pinbuf_test_harness::support::{kernel, PAGE};
use pinbuf_uapi as uapi;

use crate::access::map_at;
use crate::areas::{Area, Argument};
use crate::executor::{Executor, Held, Kept};
use crate::expected::{Expected, Struct};
use crate::input::{Backing, Create, Descriptor, Envelope, Piece, Place, Who};
use crate::memory::{Pin, SLOTS, SLOT_PAGES};
use crate::profile::{phase, Phase};

const PAGE_BYTES: u64 = PAGE as u64;
/// Where a page of 1 GiB is mapped, and its size.
const GIGA_BASE: u64 = 0x0468_0000_0000;
const GIGA: usize = 1 << 30;
/// The maximum number of pages that a create pins, so that none takes seconds.
const MOST_PAGES: u64 = 1536;
/// The same if all of them are huge, each of which is pinned at once: more than 1 GiB.
const MOST_HUGE_PAGES: u64 = 540_000;
/// The maximum number of ranges that are laid out; a create may say that there are more.
const MOST_RANGES: usize = 4000;
/// The bits of an ioctl number that hold the argument's size.
const SIZE_MASK: u32 = 0x3fff << 16;

/// A struct or an array of the contract as bytes.
fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: what the contract consists of are integers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// A struct of the contract from the bytes that there are; the rest is zero.
fn value_of<T: Copy + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    let length = bytes.len().min(size_of::<T>());
    // SAFETY: integers: all byte patterns are values, and both sides have this number of bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast(), length) };
    value
}

/// The number of a call, perhaps with another size in it.
fn command(number: u32, envelope: &Envelope) -> u32 {
    match envelope.number {
        Some(size) => number & !SIZE_MASK | u32::from(size) << 16 & SIZE_MASK,
        None => number,
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: the kernel checks the number.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// The minimum number of pages that a buffer counts for where an allowance is charged.
const LEAST_CHARGE: u64 = 8;
/// The maximum number of pages that one page keeps in place.
const MOST_OF_FOLIO: u64 = 512;

/// Whether all pages are charged, and all that is kept in place where that counts.
fn charged_rightly(info: &uapi::Info) -> bool {
    let held = info.held_bytes / PAGE_BYTES;
    let charged = match info.charge {
        uapi::CHARGE_ALLOWANCE => held.max(LEAST_CHARGE),
        _ => info.pages,
    };
    held >= info.pages && info.charged_pages == charged
}

/// What is known about a create before it is called.
struct Forecast {
    expected: Expected,
    /// The addresses of its pages, each time that the ranges are named.
    sources: Vec<u64>,
    /// Bytes in all.
    bytes: u64,
    /// Whether the ranges end in the middle of a repetition.
    cut: bool,
}

impl Executor {
    /// Makes a call, and traces its result.
    fn call(&self, number: u32, argument: u64) -> nix::Result<i32> {
        let answer = ioctl(&self.device, number, argument);
        self.say(|| format!("   ioctl {number:#x}: {answer:?}"));
        answer
    }

    /// `PINBUF_CREATE`.
    pub(crate) fn create(&mut self, create: &Create) -> Result<()> {
        let flags = create.flags.0;
        let named = flags & uapi::CREATE_CHECK_BACKING != 0;
        let mut list: Vec<(uapi::Range, uapi::Backing)> = create
            .pieces
            .iter()
            .map(|piece| self.piece(piece))
            .collect();
        let most = MOST_RANGES / list.len().max(1);
        let pages: u64 = list.iter().map(|(range, _)| bounded_pages(range)).sum();
        let huge = list
            .iter()
            .all(|(range, _)| self.memory.is_scarce(range.addr));
        let limit = if huge { MOST_HUGE_PAGES } else { MOST_PAGES };
        let most = most.min((limit / pages.max(1)).max(1) as usize);
        let once = list.len();
        list = list.repeat(usize::from(create.repeat).min(most));
        let count = create.count.unwrap_or(list.len() as u32);

        let (ranges, backings): (Vec<_>, Vec<_>) = list.iter().copied().unzip();
        let ranges_at = self.ranges.put(bytes_of(&ranges), create.ranges);
        let place = create.backing.unwrap_or_default();
        let backings_at = match (named, create.backing) {
            (false, None) => self.backings.put(&[], Place::default()),
            _ => self.backings.put(bytes_of(&backings), place),
        };
        let argument = uapi::Create {
            size: 0,
            flags,
            ranges: ranges_at.address,
            count,
            reserved: create.envelope.reserved,
            backing: if named || create.backing.is_some() {
                backings_at.address
            } else {
                0
            },
        };
        let laid_out = Struct::new(bytes_of(&[argument]), &create.envelope);
        let at = self.structs.put(&laid_out.bytes, create.envelope.place);

        let forecasting = phase(Phase::Forecast);
        let mut forecast = Forecast {
            expected: Expected::default(),
            sources: Vec::new(),
            bytes: 0,
            cut: count as usize % once.max(1) != 0,
        };
        if laid_out.expect(at, false, &mut forecast.expected) {
            self.expect_fields(&argument, named, &mut forecast.expected);
            if (1..=uapi::MAX_RANGES).contains(&count) {
                let backings_at = named.then_some(backings_at);
                expect_arrays(count, list.len(), ranges_at, backings_at, &mut forecast);
                list.truncate(count as usize);
                self.expect_ranges(&list, once, flags, &mut forecast);
            }
        }
        let charges = self.expect_charge(&mut forecast)?;
        drop(forecasting);
        let creating = phase(Phase::Create);
        let answer = self.call(command(uapi::CREATE, &create.envelope), at.address);
        drop(creating);
        // SAFETY: the call has just returned it.
        let answer = answer.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        forecast.expected.check("PINBUF_CREATE", &answer)?;
        match answer {
            Ok(fd) => self.created(fd, flags, forecast, &charges),
            // What is left behind shows in the end.
            Err(_) => Ok(()),
        }
    }

    /// `PINBUF_CREATE` of one page of 1 GiB, whose contents other inputs have left.
    pub(crate) fn create_giga(&mut self) -> Result<()> {
        const PAGES: usize = GIGA / PAGE;
        let (Some(file), Who::Root, false) = (self.giga, self.caller.who, self.forked) else {
            return Ok(());
        };
        // SAFETY: nothing of Rust's lies there.
        unsafe { map_at(GIGA_BASE, GIGA, RW, libc::MAP_SHARED, file, 0) }
            .context("mapping 1 GiB")?;
        let range = uapi::Range {
            addr: GIGA_BASE,
            len: GIGA as u64,
        };
        let creating = phase(Phase::Create);
        let buffer = self.device.create(&[range]).context("creating 1 GiB")?;
        drop(creating);
        let info = self.device.describe(&buffer)?;
        if info.pages != PAGES as u64 || info.pins != 1 || info.extents != 1 {
            bail!("a page of 1 GiB, but {info:?}");
        }
        // The first pages and the last one of each 2 MiB.
        let kept = match &self.giga_kept {
            Some(kept) => Rc::clone(kept),
            None => {
                let edges = (0..PAGES).filter(|page| matches!(page % 512, 0..=1 | 511));
                let few = edges
                    .map(|page| (page, self.contents.fresh(None)))
                    .collect();
                Rc::new(Kept::sparse(few, PAGES))
            }
        };
        self.giga_kept = Some(Rc::clone(&kept));
        let fd = buffer.as_fd().try_clone_to_owned()?;
        self.keep(Held { fd, kept });
        Ok(())
    }

    /// A range and its backing.
    fn piece(&self, piece: &Piece) -> (uapi::Range, uapi::Backing) {
        let address = self.resolve(piece.at);
        let (fd, offset) = self.memory.backing(address).unwrap_or((-1, 0));
        let backing = |offset| uapi::Backing {
            fd,
            reserved: 0,
            offset,
        };
        let backing = match piece.backing {
            Backing::Right => backing(offset),
            Backing::Off(pages) => {
                backing(offset.wrapping_add_signed(i64::from(pages) * PAGE_BYTES as i64))
            }
            Backing::Other {
                descriptor,
                reserved,
                offset,
            } => uapi::Backing {
                fd: self.descriptor(descriptor),
                reserved,
                offset: offset.0,
            },
        };
        let len = piece.length.0;
        (uapi::Range { addr: address, len }, backing)
    }

    fn expect_fields(&self, create: &uapi::Create, named: bool, expected: &mut Expected) {
        expected.must_if(
            create.flags & !uapi::CREATE_FLAGS != 0
                || create.reserved != 0
                || create.backing != 0 && !named
                || create.count == 0
                || create.count > uapi::MAX_RANGES,
            Errno::EINVAL,
        );
    }

    /// The pages that the ranges lead to. After the first ones they are repeated.
    fn expect_ranges(
        &self,
        list: &[(uapi::Range, uapi::Backing)],
        once: usize,
        flags: u32,
        forecast: &mut Forecast,
    ) {
        let checked = flags & uapi::CREATE_CHECK_BACKING != 0;
        let expected = &mut forecast.expected;
        let mut sum = 0u64;
        for (index, (range, backing)) in list.iter().enumerate() {
            let crooked = range.len == 0 || (range.addr | range.len) % PAGE_BYTES != 0;
            expected.must_if(crooked, Errno::EINVAL);
            expected.must_if(
                range.addr.checked_add(range.len).is_none(),
                Errno::EOVERFLOW,
            );
            match sum.checked_add(range.len) {
                Some(more) => sum = more,
                None => expected.must(Errno::EOVERFLOW),
            }
            if checked {
                expected.must_if(
                    backing.reserved != 0 || backing.offset % PAGE_BYTES != 0,
                    Errno::EINVAL,
                );
                match backing.offset.checked_add(range.len) {
                    Some(end) => expected.must_if(i64::try_from(end).is_err(), Errno::EINVAL),
                    None => expected.must(Errno::EOVERFLOW),
                }
                expected.must_if(index < once && !is_open(backing.fd), Errno::EBADF);
            }
            if crooked || index >= once {
                continue;
            }
            // Memory ends, if nowhere else, behind the last slot.
            let pages = (range.len / PAGE_BYTES).min((SLOTS * SLOT_PAGES) as u64 + 1);
            for page in 0..pages {
                let Some(address) = range.addr.checked_add(page * PAGE_BYTES) else {
                    break;
                };
                match self.memory.pin(address) {
                    Pin::Refused => {
                        expected.must(Errno::EFAULT);
                        break;
                    }
                    Pin::Pinned(_) => forecast.sources.push(address),
                }
                if self.memory.may_be_refused(address) {
                    expected.may(Errno::EFAULT);
                }
                if self.memory.is_scarce(address) {
                    expected.may(Errno::EFAULT);
                    expected.may(Errno::ENOMEM);
                }
                if checked {
                    let offset = backing.offset.wrapping_add(page * PAGE_BYTES);
                    match self.memory.is_backed_by(address, backing.fd, offset) {
                        Some(true) => {}
                        Some(false) => expected.must(Errno::EAGAIN),
                        None => expected.may(Errno::EAGAIN),
                    }
                }
            }
        }
        expected.must_if(i64::try_from(sum).is_err(), Errno::EOVERFLOW);
        expected.must_if(sum > self.machine, Errno::ENOMEM);
        forecast.bytes = sum;
    }

    /// Whether there is room for the charge, and what it may be charged to.
    fn expect_charge(&self, forecast: &mut Forecast) -> Result<Vec<u32>> {
        let pages = forecast.bytes / PAGE_BYTES;
        if self.caller.who == Who::Root {
            return Ok(vec![uapi::CHARGE_NONE]);
        }
        if self.forked || self.memory.is_charged() {
            // Pages of the parent, and secret memory, are charged to the same user.
            forecast.expected.may(Errno::ENOMEM);
            return Ok(vec![uapi::CHARGE_USER, uapi::CHARGE_ALLOWANCE]);
        }
        // This process has pinned everything that is charged to this user. The allowance used is higher than
        // the number of pinned pages: it includes the rest of large folios, and the minimum for small buffers.
        let pinned = kernel::vm_pin()? as u64 / PAGE_BYTES;
        let query = self.device.query().context("PINBUF_QUERY")?;
        let used = query.allowance_used / PAGE_BYTES;
        let fits = |counted: u64| {
            let sum = counted.checked_add(pages);
            sum.is_some_and(|sum| sum <= self.limit)
        };
        if fits(pinned) {
            return Ok(vec![uapi::CHARGE_USER]);
        }
        let mut charges = vec![uapi::CHARGE_ALLOWANCE];
        let within = fits(pinned.saturating_sub(used));
        if within {
            charges.push(uapi::CHARGE_USER);
        }
        let room = query.allowance_bytes.min(query.allowance_system) / PAGE_BYTES;
        let has_room = |pages: u64| used.checked_add(pages).is_some_and(|sum| sum <= room);
        if !has_room(pages.max(LEAST_CHARGE)) && !within {
            forecast.expected.must(Errno::ENOMEM);
        } else if !has_room(pages.saturating_mul(MOST_OF_FOLIO).max(LEAST_CHARGE)) {
            forecast.expected.may(Errno::ENOMEM);
        }
        Ok(charges)
    }

    /// Checks that a new buffer is the one that was asked for.
    fn created(
        &mut self,
        fd: OwnedFd,
        flags: u32,
        forecast: Forecast,
        charges: &[u32],
    ) -> Result<()> {
        let addresses = forecast.sources;
        let mut pages = Vec::new();
        for address in &addresses {
            pages.push(self.memory.pinned(*address, &mut self.contents));
        }
        let count = forecast.bytes / PAGE_BYTES;
        let once = pages.len() as u64;
        if once == 0 || count % once != 0 && !forecast.cut {
            bail!("the model has {once} pages, not {count}, however often");
        }
        let size = lseek64(&fd, 0, Whence::SeekEnd).context("lseek")?;
        if size as u64 != forecast.bytes {
            bail!("the buffer has {size} bytes, expected {}", forecast.bytes);
        }
        let close = fcntl(&fd, FcntlArg::F_GETFD)? & FdFlag::FD_CLOEXEC.bits() != 0;
        if close != (flags & uapi::CREATE_CLOEXEC != 0) {
            bail!("close-on-exec is {close}");
        }
        let info = self.device.info(fd.as_raw_fd()).context("PINBUF_INFO")?;
        if info.pages != count
            || !charged_rightly(&info)
            || !(1..=count).contains(&info.extents)
            || !(1..=count).contains(&info.pins)
            || info.pins < info.extents
            || info.mappings != 0
            || !charges.contains(&info.charge)
        {
            bail!("{count} pages, to be charged to one of {charges:?}, but {info:?}");
        }
        let kept = Rc::new(Kept::new(pages, count as usize));
        self.compare(fd.as_fd(), &kept)?;
        for address in addresses.iter().step_by(addresses.len() / 8 + 1) {
            let word = self.access.read(*address).context("what was pinned")?;
            let known = self.memory.seen(*address);
            if let Some(expected) = known.and_then(|id| self.contents.get(id)) {
                if word != expected {
                    bail!("the memory at {address:#x}: expected {expected:#x}, seen {word:#x}");
                }
            }
        }
        self.keep(Held { fd, kept });
        Ok(())
    }

    /// `PINBUF_QUERY`.
    pub(crate) fn query(&mut self, envelope: &Envelope) -> Result<()> {
        let argument = uapi::Query {
            reserved: envelope.reserved,
            ..Default::default()
        };
        let answer: uapi::Query = match self.ask(
            uapi::QUERY,
            &argument,
            envelope,
            envelope.reserved != 0,
            Expected::default(),
        )? {
            Some(answer) => answer,
            None => return Ok(()),
        };
        let plain = self.device.query().context("PINBUF_QUERY")?;
        if answer != plain || plain.version != uapi::VERSION || plain.page_size != PAGE as u32 {
            bail!("{answer:?}, but before {plain:?}");
        }
        Ok(())
    }

    /// `PINBUF_INFO`.
    pub(crate) fn info(&mut self, descriptor: Descriptor, envelope: &Envelope) -> Result<()> {
        let fd = self.descriptor(descriptor);
        // What the kernel fills in may be anything before.
        let argument = uapi::Info {
            fd,
            unsure_bytes: envelope.reserved.into(),
            ..Default::default()
        };
        let mut expected = Expected::default();
        let held = self.buffers.iter().find(|held| held.fd.as_raw_fd() == fd);
        let kept = held.map(|held| Rc::clone(&held.kept));
        if !is_open(fd) {
            expected.must(Errno::EBADF);
        } else if kept.is_none() {
            expected.must(Errno::EINVAL);
        }
        let answer = self.ask(uapi::INFO, &argument, envelope, false, expected)?;
        let (Some(answer), Some(kept)): (Option<uapi::Info>, _) = (answer, kept) else {
            return Ok(());
        };
        let pages = kept.length() as u64;
        let mappings = self.devices.mappings(&kept) as u32;
        if answer.fd != fd
            || answer.bytes != pages * PAGE_BYTES
            || answer.pages != pages
            || !charged_rightly(&answer)
            || answer.mappings != mappings
        {
            bail!("{answer:?}, expected {pages} pages and {mappings} mappings");
        }
        self.discards(fd, &answer, envelope)
    }

    /// `PINBUF_DISCARDS`, which has to say the same in detail, a few parts a call.
    fn discards(&self, fd: RawFd, info: &uapi::Info, envelope: &Envelope) -> Result<()> {
        let room = envelope.reserved as usize % 5 + 1;
        let mut bytes = [0; 2];
        let mut offset = 0;
        let mut last = None;
        while offset < info.bytes {
            let mut list = vec![uapi::Discard::default(); room];
            let mut call = uapi::Discards {
                size: size_of::<uapi::Discards>() as u32,
                fd,
                offset,
                list: list.as_mut_ptr() as u64,
                count: room as u32,
                reserved: 0,
            };
            let address = std::ptr::from_mut(&mut call) as u64;
            self.call(uapi::DISCARDS, address)
                .context("PINBUF_DISCARDS")?;
            list.truncate(call.count as usize);
            let is_full = list.len() == room;
            for part in list {
                let end = part.offset.saturating_add(part.len);
                let index = match part.state {
                    uapi::STATE_DISCARDED => 0,
                    uapi::STATE_UNSURE => 1,
                    state => bail!("a part is in state {state}"),
                };
                if part.len == 0 || part.reserved != 0 || part.offset < offset || end > call.offset
                {
                    bail!("{part:?} from {offset:#x} to {:#x}", call.offset);
                }
                if last == Some((part.offset, part.state)) {
                    bail!("{part:?} is a part of the one before");
                }
                last = Some((end, part.state));
                bytes[index] += part.len;
                offset = end;
            }
            if call.offset < info.bytes && !is_full {
                bail!("PINBUF_DISCARDS ended at {:#x}", call.offset);
            }
            offset = call.offset;
        }
        let states = [uapi::STATE_DISCARDED, uapi::STATE_UNSURE];
        let state: u32 = states
            .iter()
            .zip(bytes)
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(state, _)| state)
            .sum();
        if bytes != [info.discarded_bytes, info.unsure_bytes] || info.state != u64::from(state) {
            bail!("{bytes:?} bytes in all, but {info:?}");
        }
        Ok(())
    }

    /// A call that answers in its struct. `None` if it is an error, as it should be.
    fn ask<T: Copy + Default>(
        &mut self,
        number: u32,
        value: &T,
        envelope: &Envelope,
        reserved: bool,
        mut of_fields: Expected,
    ) -> Result<Option<T>> {
        let laid_out = Struct::new(bytes_of(std::slice::from_ref(value)), envelope);
        let at = self.structs.put(&laid_out.bytes, envelope.place);
        let mut expected = Expected::default();
        if laid_out.expect(at, true, &mut expected) {
            of_fields.must_if(reserved, Errno::EINVAL);
            expected.and(of_fields);
        }
        let answer = self.call(command(number, envelope), at.address);
        expected.check("a question", &answer)?;
        if answer.is_err() {
            return Ok(None);
        }
        let bytes = self.structs.get(at, laid_out.claim);
        let size = u32::from_ne_bytes(bytes[..4].try_into()?) as usize;
        if answer != Ok(0) || size != size_of::<T>() {
            bail!("the answer is {answer:?}, of {size} bytes");
        }
        if bytes.iter().skip(size).any(|byte| *byte != 0) {
            bail!("something was written behind the answer");
        }
        Ok(Some(value_of(&bytes)))
    }

    /// Any ioctl of the device's own type, with a pointer to no memory.
    pub(crate) fn other(&mut self, number: u32, argument: u64) -> Result<()> {
        // The VFS knows some of the other types.
        let number = number & !0xff00 | uapi::IOC_TYPE << 8;
        let known = [uapi::CREATE, uapi::QUERY, uapi::INFO, uapi::DISCARDS]
            .into_iter()
            .any(|known| (known ^ number) & !SIZE_MASK == 0);
        let mut expected = Expected::default();
        expected.must(if known { Errno::EFAULT } else { Errno::ENOTTY });
        expected.check("an ioctl", &self.call(number, argument))
    }
}

/// The pages of a range, as far as there can be memory in it.
fn bounded_pages(range: &uapi::Range) -> u64 {
    (range.len / PAGE_BYTES).min((SLOTS * SLOT_PAGES) as u64)
}

/// What the kernel returns when the arrays are not completely mapped.
fn expect_arrays(
    count: u32,
    present: usize,
    ranges: Argument,
    backings: Option<Argument>,
    forecast: &mut Forecast,
) {
    const ELEMENT: usize = 16;
    const { assert!(MOST_RANGES * ELEMENT <= Area::most()) };
    let count = count as usize;
    for array in [Some(ranges), backings].into_iter().flatten() {
        let expected = &mut forecast.expected;
        expected.must_if(array.readable < count * ELEMENT, Errno::EFAULT);
    }
    // They are followed by zeroes, hence by empty ranges.
    forecast.expected.must_if(count > present, Errno::EINVAL);
}
