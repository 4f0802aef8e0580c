// SPDX-License-Identifier: MIT OR Apache-2.0
//! When requests are due, if they come at a rate.
//!
//! The times are fixed at the start and do not wait for answers. A request that is sent late, since
//! those before it are still under way or because timers are coarse, counts from when it was due.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use glommio::timer::Timer;

pub(crate) struct Pace {
    start: Instant,
    /// Seconds from the start to the first request, and from one to the next.
    first: f64,
    interval: f64,
    /// How many requests were made, and when the next one is due.
    made: u64,
    due: Instant,
    timer: Option<Timer>,
}

impl Pace {
    /// The pace of one of so many connections, which take turns and have `rate` together.
    pub(crate) fn new(start: Instant, rate: f64, connection: usize, connections: usize) -> Self {
        let first = connection as f64 / rate;
        let interval = connections as f64 / rate;
        let due = start + Duration::from_secs_f64(first);
        Self { start, first, interval, made: 0, due, timer: None }
    }

    /// When the next request was due, if it is. The one behind it is next then.
    #[inline]
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due;
        if now < due {
            return None;
        }
        self.made += 1;
        let after = self.first + self.made as f64 * self.interval;
        self.due = self.start + Duration::from_secs_f64(after);
        self.timer = None;
        Some(due)
    }

    /// Waits until the next request is due.
    pub(crate) fn poll_due(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let left = self.due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Poll::Ready(());
        }
        let timer = self.timer.get_or_insert_with(|| Timer::new(left));
        if Pin::new(timer).poll(context).is_pending() {
            return Poll::Pending;
        }
        self.timer = None;
        Poll::Ready(())
    }
}
