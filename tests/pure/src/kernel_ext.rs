// SPDX-License-Identifier: GPL-2.0

//! As much of `driver/kernel_ext` as the driver's pure parts use. What the kernel does is what the tests say, each in
//! its thread.

pub(crate) mod pages {
    use kernel::{
        mm::MmWithUser,
        prelude::{Error, KVec, Result, EAGAIN},
    };
    use std::cell::RefCell;

    pub(crate) struct CurrentMm<'t>(pub(crate) &'t MmWithUser);

    impl CurrentMm<'_> {
        pub(crate) fn mm(&self) -> &MmWithUser {
            self.0
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum How {
        Long,
        LongIfPresent,
        Short,
    }

    pub(crate) struct PagePin;

    /// What GUP does: the number of pages that it pins of those asked for at an address.
    type Gup = Box<dyn FnMut(usize, usize, How) -> Result<usize, Error>>;

    thread_local! {
        pub(crate) static GUP: RefCell<Option<Gup>> = const { RefCell::new(None) };
    }

    pub(crate) fn pin_user_pages(
        _: &CurrentMm<'_>,
        addr: usize,
        max: usize,
        how: How,
        out: &mut KVec<PagePin>,
    ) -> Result {
        out.clear();
        let max = max.min(out.capacity());
        let pinned = GUP.with_borrow_mut(|gup| gup.as_mut().map(|gup| gup(addr, max, how)));
        for _ in 0..pinned.unwrap_or(Ok(max))? {
            out.push_within_capacity(PagePin).map_err(|_| EAGAIN)?;
        }
        Ok(())
    }

    thread_local! {
        /// The numbers of pages that were faulted in without being pinned.
        pub(crate) static FAULTS: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    }

    pub(crate) fn fault_in(_: &CurrentMm<'_>, _addr: usize, pages: usize) {
        if pages > 0 {
            FAULTS.with_borrow_mut(|faults| faults.push(pages));
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Folio<'a>(pub(crate) usize, pub(crate) &'a usize);

    impl Folio<'_> {
        pub(crate) fn id(self) -> usize {
            self.0
        }

        pub(crate) fn pages(self) -> usize {
            *self.1
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct PageArray;

    impl PageArray {
        pub(crate) fn get() -> Self {
            Self
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Sight {
        Seen,
        Discarded,
        Unsure,
    }

    thread_local! {
        /// The state of each frame, and the number of frames from it on that are in one folio.
        pub(crate) static SIGHTS: RefCell<Vec<(Sight, usize)>> = const { RefCell::new(Vec::new()) };
    }

    /// # Safety
    ///
    /// Always allowed.
    pub(crate) unsafe fn sight(_: PageArray, pfn: usize, pages: usize) -> (Sight, usize) {
        let (sight, left) = SIGHTS.with_borrow(|sights| sights[pfn]);
        (sight, left.min(pages))
    }
}

pub(crate) mod sched {
    use kernel::prelude::{Result, EINTR};
    use std::cell::{Cell, RefCell};

    thread_local! {
        /// The pauses, in milliseconds.
        pub(crate) static PAUSES: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        /// The next random number.
        pub(crate) static RANDOM: Cell<u32> = const { Cell::new(0) };
        /// The number of calls of [`breathe`] and [`sleep_killable`] until the task is killed.
        pub(crate) static LIFE: Cell<usize> = const { Cell::new(usize::MAX) };
        /// The number of calls of [`breathe`].
        pub(crate) static BREATHS: Cell<usize> = const { Cell::new(0) };
    }

    fn live() -> Result {
        LIFE.set(LIFE.get().saturating_sub(1));
        if LIFE.get() == 0 {
            return Err(EINTR);
        }
        Ok(())
    }

    pub(crate) fn breathe() -> Result {
        BREATHS.set(BREATHS.get() + 1);
        live()
    }

    pub(crate) fn sleep_killable(ms: u32) -> Result {
        PAUSES.with_borrow_mut(|pauses| pauses.push(ms));
        live()
    }

    pub(crate) fn random() -> u32 {
        RANDOM.get()
    }
}

pub(crate) mod user {
    use kernel::{mm::Mm, page::PAGE_SHIFT};
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::sync::Arc;

    /// The caller.
    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct Caller {
        pub(crate) uid: u32,
        pub(crate) host_uid: u32,
        pub(crate) capability: bool,
        /// The limit in bytes.
        pub(crate) limit: usize,
    }

    thread_local! {
        pub(crate) static CALLER: Cell<Caller> = const {
            Cell::new(Caller { uid: 0, host_uid: 0, capability: false, limit: 0 })
        };
        static USERS: RefCell<BTreeMap<u32, Arc<AtomicI64>>> = const { RefCell::new(BTreeMap::new()) };
    }

    pub(crate) struct User(Arc<AtomicI64>);

    impl User {
        pub(crate) fn current() -> Self {
            let uid = CALLER.get().uid;
            Self(USERS.with_borrow_mut(|users| users.entry(uid).or_default().clone()))
        }

        pub(crate) fn locked_vm(&self) -> LockedPages<'_> {
            LockedPages(&self.0)
        }

        /// The number of references besides this one.
        pub(crate) fn references(&self) -> usize {
            Arc::strong_count(&self.0) - 2
        }
    }

    pub(crate) fn pinned_vm(mm: &Mm) -> LockedPages<'_> {
        LockedPages(&mm.pinned_vm)
    }

    pub(crate) struct LockedPages<'a>(&'a AtomicI64);

    impl LockedPages<'_> {
        pub(crate) fn try_add(&self, pages: usize, limit: usize) -> bool {
            let sum = self.get() + pages as i128;
            let fits = sum <= (limit as i128).min(i64::MAX.into());
            if fits {
                self.add(pages);
            }
            fits
        }

        pub(crate) fn add(&self, pages: usize) {
            self.0.fetch_add(pages as i64, Ordering::Relaxed);
        }

        pub(crate) fn sub(&self, pages: usize) {
            self.0.fetch_sub(pages as i64, Ordering::Relaxed);
        }

        pub(crate) fn get(&self) -> i128 {
            self.0.load(Ordering::Relaxed).into()
        }
    }

    pub(crate) fn rlimit_memlock() -> usize {
        CALLER.get().limit
    }

    pub(crate) fn may_lock_without_limit() -> bool {
        CALLER.get().capability
    }

    pub(crate) fn current_host_uid() -> u32 {
        CALLER.get().host_uid
    }

    pub(crate) const fn pages_in(bytes: usize) -> usize {
        bytes >> PAGE_SHIFT
    }
}
