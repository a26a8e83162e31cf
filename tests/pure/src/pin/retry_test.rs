// SPDX-License-Identifier: GPL-2.0

//! How often `Patience` calls GUP, for how many pages, after which pauses, and with which result.

use super::retry::Patience;
use super::turn::Turn;
use crate::{
    kernel_ext::{
        pages::{CurrentMm, How, PagePin, FAULTS, GUP},
        sched::{LIFE, PAUSES, RANDOM},
    },
    params::PARAMS,
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    bindings::set_time,
    mm::Mm,
    prelude::{
        Error, KVec, Result, EAGAIN, EBUSY, EFAULT, EINTR, EINVAL, ENOMEM, GFP_KERNEL_ACCOUNT,
    },
};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};

const ADDR: usize = 0x7000_0000;
const MAX: usize = 512;

/// A call of GUP: the number of pages that were asked for, and how.
type Call = (usize, How);

/// The turn is one for all tests.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    RANDOM.set(0);
    LIFE.set(usize::MAX);
    PAUSES.take();
    FAULTS.take();
    set_time(1);
    alone
}

/// Sets what GUP returns for each call, and returns the list of calls.
fn gup(mut does: impl FnMut(Call) -> Result<usize> + 'static) -> Rc<RefCell<Vec<Call>>> {
    let calls = Rc::new(RefCell::new(Vec::new()));
    let log = Rc::clone(&calls);
    GUP.set(Some(Box::new(move |addr, max, how| {
        assert_eq!(addr, ADDR);
        log.borrow_mut().push((max, how));
        does((max, how))
    })));
    calls
}

fn patience(retries: u32) -> Patience {
    PARAMS.set((0, 0, retries));
    Patience::new()
}

/// The number of pages that are pinned.
fn pin(patience: &mut Patience, max: usize) -> Result<usize> {
    let mut out = KVec::<PagePin>::new();
    out.reserve(max, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
    patience.pin(&CurrentMm(&Mm::default()), ADDR, max, &mut out)?;
    Ok(out.len())
}

fn long_fails(error: Error) -> impl FnMut(Call) -> Result<usize> {
    move |(max, how)| match how {
        How::Short => Ok(max),
        _ => Err(error),
    }
}

#[test]
fn what_is_present_is_pinned_at_once() {
    let _alone = alone();
    let calls = gup(|(max, _)| Ok(max / 2));
    assert_eq!(pin(&mut patience(10), MAX), Ok(MAX / 2));
    assert_eq!(*calls.borrow(), [(MAX, How::LongIfPresent)]);
    assert!(PAUSES.take().is_empty());
    // One page is faulted in without trying first.
    let calls = gup(|(max, _)| Ok(max));
    assert_eq!(pin(&mut patience(10), 1), Ok(1));
    assert_eq!(*calls.borrow(), [(1, How::Long)]);
}

/// The first absent page is pinned alone. Then more and more pages are faulted in before each batch, until pages are
/// present that were not faulted in.
#[test]
fn absent_pages_are_faulted_in_ahead() {
    let _alone = alone();
    let absent = |(max, how): Call| match how {
        How::LongIfPresent => match FAULTS.with_borrow(|faults| faults.last().copied()) {
            None => Err(EFAULT),
            Some(pages) => Ok(pages),
        },
        _ => Ok(max),
    };
    let calls = gup(absent);
    let mut patience = patience(10);
    for pages in [1, 2, 4, 8, 16, 16] {
        assert_eq!(pin(&mut patience, MAX), Ok(pages));
    }
    assert_eq!(
        calls.borrow()[..2],
        [(MAX, How::LongIfPresent), (1, How::Long)]
    );
    assert_eq!(calls.borrow()[2..], [(MAX, How::LongIfPresent); 5]);
    // None before a single page, and none once more pages were there than had been faulted in.
    assert_eq!(pin(&mut patience, 1), Ok(1));
    assert_eq!(FAULTS.take(), [2, 4, 8, 16, 16]);
    gup(|(_, _)| Ok(17));
    for _ in 0..2 {
        assert_eq!(pin(&mut patience, MAX), Ok(17));
    }
    assert_eq!(FAULTS.take(), [16]);

    // No more than are needed; and none before the first batch of another part.
    gup(absent);
    for pages in [1, 2, 4, 8, 10] {
        assert_eq!(pin(&mut patience, pages.max(10)), Ok(pages));
    }
    patience.begin_part();
    gup(|(max, _)| Ok(max));
    assert_eq!(pin(&mut patience, 10), Ok(10));
    assert_eq!(FAULTS.take(), [2, 4, 8, 10]);

    // What cannot be faulted in is left to GUP, whose errors say why.
    let calls = gup(|(max, how)| match how {
        How::LongIfPresent => Err(EFAULT),
        _ => Ok(max),
    });
    for _ in 0..3 {
        assert_eq!(pin(&mut patience, MAX), Ok(1));
    }
    assert_eq!(calls.borrow().len(), 6);
    assert_eq!(FAULTS.take(), [2, 2]);
}

#[test]
fn pauses_double_and_batches_shrink() {
    for error in [ENOMEM, EAGAIN, EBUSY] {
        let _alone = alone();
        let calls = gup(long_fails(error));
        let mut patience = patience(5);
        assert_eq!(pin(&mut patience, MAX), Err(EBUSY));
        assert_eq!(PAUSES.take(), [1, 2, 4, 8, 16]);
        assert_eq!(
            *calls.borrow(),
            [
                (512, How::LongIfPresent),
                (64, How::LongIfPresent),
                (8, How::LongIfPresent),
                (1, How::Long),
                (1, How::Long),
                (1, How::Long),
                (1, How::Short),
            ]
        );
        // The number of pages doubles after each success.
        let calls = gup(|(max, _)| Ok(max));
        for pages in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512] {
            assert_eq!(pin(&mut patience, MAX), Ok(pages));
        }
        assert_eq!(calls.borrow().len(), 11);
    }
}

#[test]
fn a_retry_that_succeeds() {
    let _alone = alone();
    let mut left = 3;
    let calls = gup(move |(max, _)| {
        left -= 1;
        match left {
            0 => Ok(max),
            _ => Err(ENOMEM),
        }
    });
    assert_eq!(pin(&mut patience(10), MAX), Ok(8));
    assert_eq!(PAUSES.take(), [1, 2]);
    assert_eq!(calls.borrow().len(), 3);
}

#[test]
fn a_call_has_four_times_as_many_retries() {
    let _alone = alone();
    let calls = gup(long_fails(ENOMEM));
    let mut patience = patience(3);
    // The number of attempts for each page, the one for EBUSY included.
    for attempts in [5, 5, 5, 5, 2, 2] {
        calls.borrow_mut().clear();
        assert_eq!(pin(&mut patience, MAX), Err(EBUSY));
        assert_eq!(calls.borrow().len(), attempts);
    }
    assert_eq!(PAUSES.take(), [1, 2, 4].repeat(4));
    // None at all.
    let calls = gup(long_fails(ENOMEM));
    assert_eq!(pin(&mut self::patience(0), MAX), Err(EBUSY));
    assert_eq!(
        *calls.borrow(),
        [(MAX, How::LongIfPresent), (1, How::Short)]
    );
}

#[test]
fn what_the_last_attempt_says() {
    for (long, short, result) in [
        (ENOMEM, None, EBUSY),
        (ENOMEM, Some(ENOMEM), ENOMEM),
        (EBUSY, Some(EBUSY), ENOMEM),
        (EAGAIN, Some(EAGAIN), ENOMEM),
        (ENOMEM, Some(EFAULT), EFAULT),
        (ENOMEM, Some(EINTR), EINTR),
    ] {
        let _alone = alone();
        gup(move |(max, how)| match (how, short) {
            (How::Short, None) => Ok(max),
            (How::Short, Some(error)) => Err(error),
            _ => Err(long),
        });
        assert_eq!(pin(&mut patience(2), MAX), Err(result));
    }
}

#[test]
fn errors_that_stay_end_it() {
    for (error, result) in [(EFAULT, EFAULT), (EINVAL, EFAULT), (EINTR, EINTR)] {
        let _alone = alone();
        let calls = gup(long_fails(error));
        assert_eq!(pin(&mut patience(10), 1), Err(result));
        assert_eq!(*calls.borrow(), [(1, How::Long)]);
        assert!(PAUSES.take().is_empty());
    }
}

#[test]
fn a_kill_ends_a_pause() {
    let _alone = alone();
    gup(long_fails(ENOMEM));
    LIFE.set(3);
    assert_eq!(pin(&mut patience(10), MAX), Err(EINTR));
    assert_eq!(PAUSES.take(), [1, 2, 4]);
}

#[test]
fn pauses_are_shortened_by_half_at_most() {
    for (random, expected) in [
        (0, [1, 2, 4, 8]),
        (1, [1, 1, 3, 7]),
        // Multiples of 1, 2, 3 and 5, less one.
        (29, [1, 1, 2, 4]),
    ] {
        let _alone = alone();
        RANDOM.set(random);
        gup(long_fails(ENOMEM));
        assert_eq!(pin(&mut patience(4), MAX), Err(EBUSY));
        assert_eq!(PAUSES.take(), expected, "{random}");
    }
}

/// A caller without the turn makes its first and its last attempt only.
#[test]
fn one_caller_retries_at_a_time() {
    let _alone = alone();
    let turn = Turn::take();
    assert!(turn.is_some());
    let calls = gup(long_fails(ENOMEM));
    let mut patience = patience(4);
    assert_eq!(pin(&mut patience, MAX), Err(EBUSY));
    assert_eq!(calls.borrow().len(), 3);
    assert_eq!(PAUSES.take(), [1, 2, 4, 8]);
    // Once it is free, the caller keeps it.
    drop(turn);
    calls.borrow_mut().clear();
    assert_eq!(pin(&mut patience, MAX), Err(EBUSY));
    assert_eq!(calls.borrow().len(), 6);
    assert!(Turn::take().is_none());
    drop(patience);
    assert!(Turn::take().is_some());
}

/// A turn is over after a second, and does not end the next one then.
#[test]
fn a_turn_ends() {
    const SECOND: i64 = 1_000_000_000;
    let _alone = alone();
    set_time(5);
    let first = Turn::take();
    assert!(first.is_some());
    set_time(4 + SECOND);
    assert!(Turn::take().is_none());
    set_time(5 + SECOND);
    let second = Turn::take();
    assert!(second.is_some());
    drop(first);
    assert!(Turn::take().is_none());
    drop(second);
    // Also when the clock starts.
    set_time(0);
    let third = Turn::take();
    assert!(third.is_some());
    assert!(Turn::take().is_none());
}
