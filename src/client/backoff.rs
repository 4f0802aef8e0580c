// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long to wait before the next attempt to connect.
//!
//! Exponential, with a cap, and with full jitter: each wait is a random part of the bound, so that
//! clients which lost the same server at the same time do not come back at the same time.

use std::time::Duration;

/// The bounds of the waits. Knows no clock and no chance; both are handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    pub(crate) most: Duration,
}

impl Backoff {
    /// The most that the wait after so many failures in a row takes. The first failure is number 1;
    /// 0 is a session that ended after it had lived for a while.
    pub(crate) fn bound(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.most)
    }

    /// The wait, given a random number.
    pub(crate) fn wait(&self, failures: u32, random: u64) -> Duration {
        // As a fraction of 2^32 it keeps all the precision that a clock has.
        let fraction = (random >> 32) as f64 / f64::from(u32::MAX);
        self.bound(failures).mul_f64(fraction.min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff =
        Backoff { first: Duration::from_millis(5), most: Duration::from_secs(2) };

    #[test]
    fn the_bound_doubles_up_to_the_cap() {
        let bounds: Vec<_> = (0..12).map(|failures| BACKOFF.bound(failures).as_millis()).collect();
        assert_eq!(bounds, [5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        assert_eq!(BACKOFF.bound(u32::MAX), BACKOFF.most);
        let huge = Backoff { first: Duration::MAX, most: Duration::MAX };
        assert_eq!(huge.bound(u32::MAX), Duration::MAX);
    }

    #[test]
    fn the_wait_is_any_part_of_the_bound() {
        for failures in [0, 1, 5, 100] {
            let bound = BACKOFF.bound(failures);
            assert_eq!(BACKOFF.wait(failures, 0), Duration::ZERO);
            assert_eq!(BACKOFF.wait(failures, u64::MAX), bound);
            let half = BACKOFF.wait(failures, u64::MAX / 2);
            assert!(half > bound.mul_f64(0.49) && half < bound.mul_f64(0.51), "{half:?}");
        }
    }
}
