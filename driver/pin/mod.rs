// SPDX-License-Identifier: GPL-2.0

//! Pinning the ranges of a call.
//!
//! Every page comes from GUP at an address of the caller, so everything that the mm core enforces
//! for a mapping (page faults, userfaultfd, guard pages, poison, protection keys, seals, security
//! modules) applies here too. GUP runs without any lock of the driver, and other threads of the
//! caller may map and unmap memory meanwhile. The buffer consists of the pages that were pinned:
//! each was mapped, writable, at its address at the moment of its pin. Nothing is concluded from a
//! VMA.
//!
//! Of the pages that GUP pins, the driver accepts anonymous memory, shmem and hugetlb.
//!
//! * [`retry`]: when GUP is called again, and how its errors are translated; [`turn`]: which caller
//!   retries first;
//! * [`held`]: the pins that a buffer holds, and their release;
//! * [`rest`]: the memory that is kept in place besides the buffer's pages.

pub(crate) mod held;
mod rest;
mod retry;
mod turn;

use crate::{
    charge::Charge,
    kernel_ext::{
        pages::{
            CurrentMm,
            FileMapping,
            Folio,
            FolioFlags,
            PageArray,
            PagePin, //
        },
        sched, //
    },
    ranges::Part, //
};
use held::Held;
use kernel::{
    fs::file::LocalFile,
    page::PAGE_SHIFT,
    prelude::*,
    sync::aref::ARef, //
};
use rest::Rest;
use retry::Patience;

/// The maximum number of pages per call of GUP. With pages of 4 KiB, their pointers fill one page
/// of memory, and they span 2 MiB of address space, which GUP's fast path walks with interrupts
/// disabled.
const BATCH: usize = 512;

/// The fixed cost of a call of GUP, as a number of pages.
const A_CALL: usize = 32;

/// The maximum reference count of a folio that is accepted. A pin of a small folio adds 1,024 to
/// the reference count, and GUP warns in the log when it reaches 2^31. Half of that is left to
/// others.
const MOST_REFERENCES: i32 = 1 << 30;

/// Pins the `pages` pages of `parts`, and adds the memory that they keep in place besides to
/// `charge`. Returns the pins, and the number of pages that are kept in place besides.
pub(crate) fn pin(
    mm: &CurrentMm<'_>,
    pages: usize,
    parts: impl Iterator<Item = Part>,
    charge: &mut Charge,
) -> Result<(Held, usize)> {
    let mut pinner = Pinner {
        mm,
        held: Held::new(pages),
        rest: Rest::new(),
        charge,
        patience: Patience::new(),
        hugetlb: true,
        work: 0,
        array: PageArray::get(),
    };
    let mut batch = KVec::new();
    let mut files = Files(None);
    for part in parts {
        let backing = match part.backing {
            Some((fd, page)) => {
                let file = FileMapping::of(files.get(fd)?);
                Some((file, page.wrapping_sub(pinner.held.extents().pages())))
            }
            None => None,
        };
        pinner.pin_part(part.addr, part.pages, backing, &mut batch)?;
    }
    let rest = pinner.rest.finish(pinner.charge)?;
    pinner.held.finish()?;
    Ok((pinner.held, rest))
}

/// The state of a call that pins part after part.
struct Pinner<'a> {
    mm: &'a CurrentMm<'a>,
    held: Held,
    rest: Rest,
    charge: &'a mut Charge,
    patience: Patience,
    /// Whether hugetlb, which needs one pin per folio, is expected next: the last page belonged to
    /// hugetlb, or no page was pinned yet.
    hugetlb: bool,
    /// The number of pages pinned since the last [`sched::breathe`], plus [`A_CALL`] for each call
    /// of GUP.
    work: usize,
    array: PageArray,
}

/// The file that is expected to be mapped, and the index of an expected page minus the page's index
/// in the buffer (modulo 2^64), which is the same for all pages of a part.
type Backing<'a> = Option<(FileMapping<'a>, usize)>;

impl Pinner<'_> {
    /// Pins a part. `batch` holds the pages that one call of GUP pinned, until they are moved.
    fn pin_part(
        &mut self,
        mut addr: usize,
        mut pages: usize,
        backing: Backing<'_>,
        batch: &mut KVec<PagePin>,
    ) -> Result {
        self.patience.begin_part();
        while pages > 0 {
            if self.work >= BATCH {
                sched::breathe()?;
                self.work = 0;
            }
            let max = if self.hugetlb { 1 } else { pages.min(BATCH) };
            batch.reserve(max, GFP_KERNEL)?;
            self.patience.pin(self.mm, addr, max, batch)?;
            self.work += A_CALL + batch.len();
            let first = self.held.extents().pages();
            if self.hugetlb {
                self.take_hugetlb(batch, addr, pages, backing)?;
            } else {
                self.take_batch(&mut batch.drain_all(), backing)?;
            }
            let done = self.held.extents().pages() - first;
            addr += done << PAGE_SHIFT;
            pages -= done;
        }
        Ok(())
    }

    /// Moves the page of a batch of one, at the address `addr`, to the buffer. If it belongs to
    /// hugetlb, up to `left` pages of its folio are moved with its pin.
    fn take_hugetlb(
        &mut self,
        batch: &mut KVec<PagePin>,
        addr: usize,
        left: usize,
        backing: Backing<'_>,
    ) -> Result {
        let pin = match batch.pop().ok_or(EFAULT)?.into_folio_pin(addr) {
            Ok(pin) => pin,
            // No mapping of hugetlb begins inside a huge page.
            Err(pin) if pin.folio().is_hugetlb() => return Err(EFAULT),
            Err(pin) => {
                self.hugetlb = false;
                batch.push(pin, GFP_KERNEL)?;
                return self.take_batch(&mut batch.drain_all(), backing);
            }
        };
        let next = self.held.extents().pages();
        check(pin.folio(), pin.place(), next, backing)?;
        self.held.push_folio(pin, left, self.array)
    }

    /// Moves the pages of a batch to the buffer, up to the first one of hugetlb; the caller unpins
    /// the others. A folio of hugetlb needs one pin, not one per page, so it is a batch of its own:
    /// if a batch begins with one, no page is moved, and the next batch is that page alone, of which
    /// [`Self::take_hugetlb`] moves at least one.
    #[inline(never)] // In a function of its own, the loop over pages has more registers.
    fn take_batch(
        &mut self,
        pins: &mut impl Iterator<Item = PagePin>,
        backing: Backing<'_>,
    ) -> Result {
        let array = self.array;
        for pin in pins {
            let Some((folio, flags)) = pin.small_folio() else {
                if pin.folio().is_hugetlb() {
                    self.hugetlb = true;
                    break;
                }
                self.take_large(pin, backing)?;
                continue;
            };
            check(folio, 0, self.held.extents().pages(), backing)?;
            check_kind(folio, flags)?;
            self.held.push_page(pin, array)?;
        }
        // Charged before the next call of GUP, in which the caller can wait for any length of time.
        self.rest.catch_up(self.charge)
    }

    /// Moves a page of a large folio to the buffer.
    #[inline(never)] // As `take_batch`.
    fn take_large(&mut self, pin: PagePin, backing: Backing<'_>) -> Result {
        let folio = pin.folio();
        let next = self.held.extents().pages();
        check(folio, folio.place_of(&pin), next, backing)?;
        check_kind(folio, folio.flags())?;
        self.rest.count(folio, self.charge)?;
        self.held.push_page(pin, self.array)
    }
}

/// Refuses memory that is neither anonymous nor shmem: the page cache of a file system, memory of a
/// device, or pages that a driver allocated and mapped.
#[inline(always)] // As `check`.
fn check_kind(folio: Folio<'_>, flags: FolioFlags) -> Result {
    if flags.is_swapbacked() || folio.is_anon() {
        Ok(())
    } else {
        Err(EFAULT)
    }
}

/// Checks the page `place` of a folio, before it becomes the page `next` of the buffer.
#[inline(always)] // Where a folio is one page, its place is constant.
fn check(folio: Folio<'_>, place: usize, next: usize, backing: Backing<'_>) -> Result {
    if folio.references() > MOST_REFERENCES {
        return Err(ENOMEM);
    }
    let Some((file, ahead)) = backing else {
        return Ok(());
    };
    match folio.index_in(file, place) {
        Some(index) if index.wrapping_sub(next) == ahead => Ok(()),
        _ => Err(EAGAIN),
    }
}

/// The file of the last descriptor that was looked up: most callers name the same one for all
/// ranges.
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
