// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines of the log that come again and again.

use std::time::{Duration, Instant};

/// How often each reason is told at most.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps a line out of the log that came less than a second after the last of its kind.
pub(crate) struct LogLimit {
    told_at: Option<Instant>,
    untold: u64,
}

impl LogLimit {
    pub(crate) const fn new() -> Self {
        Self { told_at: None, untold: 0 }
    }

    /// Whether it is to be told now, and how many it was not told of since it was last.
    pub(crate) fn turn(&mut self, now: Instant) -> Option<u64> {
        if self.told_at.is_some_and(|at| now.saturating_duration_since(at) < TELL_INTERVAL) {
            self.untold += 1;
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}
