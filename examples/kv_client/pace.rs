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
    /// Seconds between the times at which requests come, several at once. Zero: each at its own.
    tick: f64,
    /// How many requests were made, and when the next one is due.
    made: u64,
    due: Instant,
    timer: Option<Timer>,
}

impl Pace {
    /// The pace of one of so many connections, which take turns and have `rate` together.
    pub(crate) fn new(
        start: Instant,
        rate: f64,
        tick: Duration,
        connection: usize,
        connections: usize,
    ) -> Self {
        let first = connection as f64 / rate;
        let interval = connections as f64 / rate;
        let tick = tick.as_secs_f64();
        let mut pace = Self { start, first, interval, tick, made: 0, due: start, timer: None };
        pace.due = pace.next_due();
        pace
    }

    fn next_due(&self) -> Instant {
        let mut after = self.first + self.made as f64 * self.interval;
        if self.tick > 0.0 {
            after = (after / self.tick).ceil() * self.tick;
        }
        self.start + Duration::from_secs_f64(after)
    }

    /// When the next request was due, if it is. The one behind it is next then.
    #[inline]
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due;
        if now < due {
            return None;
        }
        self.made += 1;
        self.due = self.next_due();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn due_times(tick: Duration) -> Vec<u128> {
        let start = Instant::now();
        // The second of two connections that have 1 000 requests a second together.
        let mut pace = Pace::new(start, 1000.0, tick, 1, 2);
        let late = start + Duration::from_secs(1);
        let due = |_| pace.take_due(late).unwrap().duration_since(start).as_micros();
        (0..6).map(due).collect()
    }

    #[test]
    fn requests_are_due_each_at_its_time_or_several_at_a_tick() {
        assert_eq!(due_times(Duration::ZERO), [1000, 3000, 5000, 7000, 9000, 11_000]);
        let ticks = due_times(Duration::from_millis(4));
        assert_eq!(ticks, [4000, 4000, 8000, 8000, 12_000, 12_000]);
    }
}
