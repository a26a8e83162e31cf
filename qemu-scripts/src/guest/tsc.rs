// SPDX-License-Identifier: MIT OR Apache-2.0

//! The frequency of the processor's time stamp counter.
//!
//! Under TCG a guest reads the host's counter. Its kernel measures the frequency against emulated timers for a few
//! milliseconds; where the emulator gets no processor at that time, the result is wrong (226 and 348 MHz were seen instead
//! of 2,300), and the guest's clock runs that much too fast for as long as it lives: whatever waits for
//! something there gives up too early. So the guest's kernel gets the frequency as a parameter.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// How long to measure.
const TIME: Duration = Duration::from_millis(50);

/// A moment, by both clocks.
struct Moment {
    when: Instant,
    counter: u64,
}

impl Moment {
    /// Now. Of a few attempts, the one that was interrupted least.
    fn now() -> Self {
        let attempt = |_| {
            let when = Instant::now();
            // SAFETY: every x86-64 processor has this instruction, and Linux permits it.
            let counter = unsafe { _rdtsc() };
            (when.elapsed(), Self { when, counter })
        };
        let attempts = (0..20).map(attempt);
        let best = attempts.min_by_key(|(error, _)| *error);
        best.map_or_else(|| attempt(0).1, |(_, moment)| moment)
    }
}

/// The frequency in kHz.
pub fn khz() -> u64 {
    let start = Moment::now();
    std::thread::sleep(TIME);
    let end = Moment::now();
    let nanoseconds = end.when.duration_since(start.when).as_nanos().max(1);
    let ticks = u128::from(end.counter.wrapping_sub(start.counter));
    u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn measured_twice() {
        let (one, other) = (super::khz(), super::khz());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(other) < one / 200, "{one} and {other} kHz");
    }
}
