// SPDX-License-Identifier: MIT OR Apache-2.0

//! What users are charged for, as far as the module reports or shows it.
//!
//! A process of each user asks. It lives as long as there are questions: a fork and an exit take longer than
//! all the questions, above all on a kernel with checkers.

use std::os::fd::AsFd;

use anyhow::{bail, Context, Result};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::Signal;

use crate::support::process::{become_user, drop_ipc_lock, Child, End, Link, PATIENCE};
use crate::support::{Device, Memory, PAGE};

/// What a user is charged for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charges {
    /// Any locked page at all, in the kernel's count for this user.
    pub locked: bool,
    /// Bytes of the allowance.
    pub allowance: u64,
    /// Whether one more buffer fits under the system-wide allowance.
    pub room: bool,
}

/// A process of each of some users, without `CAP_IPC_LOCK`.
#[derive(Debug)]
pub struct Accounts<const N: usize>([(u32, Option<Account>); N]);

impl<const N: usize> Accounts<N> {
    /// Starts with these users.
    pub fn of(users: [u32; N]) -> Self {
        Self(users.map(|uid| (uid, None)))
    }

    /// What the users are charged for, in the same order.
    pub fn charges(&mut self) -> Result<[Charges; N]> {
        let mut charges = [Charges::default(); N];
        for ((uid, account), charges) in self.0.iter_mut().zip(&mut charges) {
            *charges = Account::ask(account, *uid)?;
        }
        Ok(charges)
    }
}

/// A process of a user's.
#[derive(Debug)]
struct Account {
    child: Child,
    link: End,
}

impl Account {
    /// Asks the process, or a new one: a test may have killed it.
    fn ask(account: &mut Option<Self>, uid: u32) -> Result<Charges> {
        let asked = match account.take() {
            Some(asked) => asked.or_new(uid)?,
            None => Self::start(uid)?,
        };
        match asked.answer() {
            Ok(charges) => {
                *account = Some(asked);
                Ok(charges)
            }
            Err(error) => {
                let (status, said) = asked.child.end(PATIENCE)?;
                bail!("user {uid}: {error:#}: {status:?} {said}")
            }
        }
    }

    /// This process, if it still runs.
    fn or_new(mut self, uid: u32) -> Result<Self> {
        match self.child.runs() {
            Ok(true) => return Ok(self),
            Ok(false) => {}
            // The runner has waited for it already: its number may belong to another process by now.
            Err(_) => std::mem::forget(self.child),
        }
        Self::start(uid)
    }

    /// Passes the device, which only root may open, and receives the answer.
    fn answer(&self) -> Result<Charges> {
        self.link.send(Device::open()?.as_fd())?;
        let (locked, room) = (self.link.hear()? != 0, self.link.hear()? != 0);
        let allowance = self.link.hear()?;
        Ok(Charges {
            locked,
            allowance,
            room,
        })
    }

    fn start(uid: u32) -> Result<Self> {
        let Link { ours, theirs } = Link::new()?;
        let child = Child::run(|| {
            if uid == 0 {
                drop_ipc_lock()?;
            } else {
                become_user(uid)?;
            }
            set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
            let memory = Memory::anonymous(PAGE)?;
            // A test may take long.
            theirs.wait_for_ever()?;
            loop {
                let charges = look(&Device::from(theirs.receive()?), &memory)?;
                theirs.say(charges.locked.into())?;
                theirs.say(charges.room.into())?;
                theirs.say(charges.allowance)?;
            }
        })?;
        Ok(Self { child, link: ours })
    }
}

/// A page is charged to the user's locked pages while they stay within `RLIMIT_MEMLOCK`: with a limit
/// of one page, only if there was none.
fn look(device: &Device, memory: &Memory) -> Result<Charges> {
    set_soft_memlock(PAGE)?;
    let allowance = device.query()?.allowance_used;
    let charge = match device.create(&[memory.range()]) {
        Ok(buffer) => u64::from(device.describe(&buffer)?.charge),
        Err(_) => u64::MAX,
    };
    set_soft_memlock(0)?;
    let room = device.create(&[memory.range()]).is_ok();
    Ok(Charges {
        locked: charge != u64::from(pinbuf_uapi::CHARGE_USER),
        allowance,
        room,
    })
}

/// Sets the soft `RLIMIT_MEMLOCK`, in bytes.
fn set_soft_memlock(bytes: usize) -> Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes as u64, PAGE as u64).context("setting RLIMIT_MEMLOCK")
}
