// SPDX-License-Identifier: MIT OR Apache-2.0

//! All faults of a call, one after the other.

use anyhow::{bail, Context, Result};
use nix::errno::Errno;

use super::inject::{Burst, Fault, Injector};
use pinbuf_test_harness::support::{check, check_eq, kernel};

/// More faults than any of these calls has.
const ENDLESS: usize = 20_000;

/// A call, what it needs before and what must hold after it.
pub struct Call<Prepare, Make, Verify> {
    /// What to call it.
    pub name: &'static str,
    /// Prepares the arguments of the call, anew each time.
    pub prepare: Prepare,
    /// The call, and nothing else: faults are injected into all that it does.
    pub make: Make,
    /// Checks what the call returned when it succeeded.
    pub verify: Verify,
}

/// What is expected of a kind of fault.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The kind.
    pub fault: Fault,
    /// Single faults, or lasting ones.
    pub burst: Burst,
    /// The errors that it may cause.
    pub errors: &'a [Errno],
    /// At least this number of faults cause an error; fewer mean that they are not injected where they should
    /// be.
    pub failed: usize,
    /// At least this number of further faults are compensated for.
    pub recovered: usize,
}

impl<'a> Expected<'a> {
    /// Single faults, of a kind that a call need not meet.
    pub const fn single(fault: Fault, errors: &'a [Errno]) -> Self {
        Self {
            fault,
            burst: Burst::Single,
            errors,
            failed: 0,
            recovered: 0,
        }
    }

    /// Faults from one on.
    pub const fn lasting(fault: Fault, errors: &'a [Errno]) -> Self {
        Self {
            burst: Burst::Lasting,
            ..Self::single(fault, errors)
        }
    }

    /// At least this number cause an error.
    pub const fn failing(self, failed: usize) -> Self {
        Self { failed, ..self }
    }

    /// At least this number are compensated for.
    pub const fn recovering(self, recovered: usize) -> Self {
        Self { recovered, ..self }
    }
}

/// What may come of faults that are injected one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a> {
    /// The errors that they may cause.
    pub errors: &'a [Errno],
    /// At least this number cause one.
    pub failed: usize,
    /// At least this number of further faults are compensated for.
    pub recovered: usize,
    /// Whether each of them causes one.
    pub heard: bool,
}

/// What a process and the system hold, and a call that failed must not.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    pins: i64,
    vm_pin: i64,
    dma_bufs: i64,
    descriptors: Vec<String>,
}

impl Held {
    /// At the moment.
    pub fn now() -> Result<Self> {
        Ok(Self {
            pins: kernel::pins()?,
            vm_pin: kernel::vm_pin()?,
            dma_bufs: kernel::dma_bufs()?,
            descriptors: kernel::descriptors()?,
        })
    }
}

impl<Given, Made, Prepare, Make, Verify> Call<Prepare, Make, Verify>
where
    Prepare: Fn() -> Result<Given>,
    Make: Fn(&Given) -> nix::Result<Made>,
    Verify: Fn(&Given, &Made) -> Result<()>,
{
    /// Makes the call with its first fault of each kind, the second one, and so on, until it succeeds without
    /// meeting one.
    pub fn sweep(&self, injector: &Injector, all: &[Expected<'_>]) -> Result<()> {
        // Everything that is done once per boot or per process is done now.
        let given = (self.prepare)()?;
        let made = (self.make)(&given).with_context(|| format!("{} without faults", self.name))?;
        (self.verify)(&given, &made)?;
        drop(made);
        drop(given);
        for expected in all {
            self.sweep_one(injector, expected).with_context(|| {
                format!("{}, {:?} {:?}", self.name, expected.burst, expected.fault)
            })?;
        }
        Ok(())
    }

    fn sweep_one(&self, injector: &Injector, expected: &Expected<'_>) -> Result<()> {
        injector.select(expected.fault)?;
        let what = format!("{:?} {:?}", expected.burst, expected.fault);
        let allowed = Allowed {
            errors: expected.errors,
            failed: expected.failed,
            recovered: expected.recovered,
            heard: expected.fault == Fault::UserCopy,
        };
        self.one_by_one(&what, &allowed, |n, call| {
            let ((), injected) = injector.during(expected.fault, expected.burst, n, call)?;
            Ok(injected)
        })
    }

    /// Makes the call with its first fault, the second one, and so on, until it succeeds without meeting one.
    /// `inject` makes the call that it is given with the n-th fault, and returns whether the call met that
    /// many.
    pub fn one_by_one(
        &self,
        what: &str,
        allowed: &Allowed<'_>,
        inject: impl Fn(usize, &mut dyn FnMut()) -> Result<bool>,
    ) -> Result<()> {
        let (mut failed, mut recovered) = (0, 0);
        for n in 1..ENDLESS {
            let given = (self.prepare)().context("preparing")?;
            let before = Held::now()?;
            let mut result = None;
            let injected = inject(n, &mut || result = Some((self.make)(&given)))?;
            match result.context("the call was not made")? {
                Ok(made) => {
                    (self.verify)(&given, &made)
                        .with_context(|| format!("after success with fault {n}"))?;
                    drop(made);
                    check_eq!(Held::now()?, before, "what is left after fault {n}");
                    if !injected {
                        println!(
                            "# {}: {what}: {failed} failed, {recovered} recovered from",
                            self.name
                        );
                        check!(
                            failed >= allowed.failed && recovered >= allowed.recovered,
                            "{failed} failed and {recovered} recovered from, of {} and {} at least",
                            allowed.failed,
                            allowed.recovered
                        );
                        return Ok(());
                    }
                    check!(
                        !allowed.heard,
                        "fault {n} was injected and the call succeeded"
                    );
                    recovered += 1;
                }
                Err(error) => {
                    check!(injected, "{error} without a fault");
                    check!(
                        allowed.errors.contains(&error),
                        "fault {n} gives {error}, not {:?}",
                        allowed.errors
                    );
                    check_eq!(Held::now()?, before, "what is left behind by fault {n}");
                    let made = (self.make)(&given)
                        .with_context(|| format!("the same call after fault {n}"))?;
                    (self.verify)(&given, &made)
                        .with_context(|| format!("the same call after fault {n}"))?;
                    failed += 1;
                }
            }
        }
        bail!("there is no end to the faults")
    }
}
