// SPDX-License-Identifier: MIT OR Apache-2.0
//! When requests are due, if they come at a rate.
//!
//! The times are fixed at the start and do not wait for answers. A request that is sent late, since
//! those before it are still under way or because timers are coarse, counts from when it was due.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use glommio::timer::Timer;

use super::ticks::Ticks;

pub(crate) struct RateSchedule {
    start: Instant,
    /// Seconds from the start to the first request, and from one to the next.
    first: f64,
    interval: f64,
    /// The times at which requests come, several at once. `None`: each at its own.
    ticks: Option<Rc<Ticks>>,
    /// How many requests were made, and when the next one is due.
    made: u64,
    due: Instant,
    timer: Option<Timer>,
}

impl RateSchedule {
    /// The schedule of one of so many connections, which take turns and have `rate` together.
    pub(crate) fn new(
        start: Instant,
        rate: f64,
        ticks: Option<Rc<Ticks>>,
        connection: usize,
        connections: usize,
    ) -> Self {
        let first = connection as f64 / rate;
        let interval = connections as f64 / rate;
        let mut schedule = Self { start, first, interval, ticks, made: 0, due: start, timer: None };
        schedule.due = schedule.next_due();
        schedule
    }

    fn next_due(&self) -> Instant {
        let after = self.first + self.made as f64 * self.interval;
        match &self.ticks {
            Some(ticks) => ticks.after(after),
            None => self.start + Duration::from_secs_f64(after),
        }
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
        if let Some(ticks) = &self.ticks {
            ticks.wake_at_next(context);
            return Poll::Pending;
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
    use std::future::poll_fn;

    use glommio::{LocalExecutorBuilder, Placement};

    use super::*;

    /// The second of two connections that have 1 000 requests a second together.
    fn schedule(start: Instant, ticks: Option<Rc<Ticks>>) -> RateSchedule {
        RateSchedule::new(start, 1000.0, ticks, 1, 2)
    }

    fn due_times(mut schedule: RateSchedule) -> Vec<u128> {
        let start = schedule.start;
        let late = start + Duration::from_secs(1);
        let due = |_| schedule.take_due(late).unwrap().duration_since(start).as_micros();
        (0..6).map(due).collect()
    }

    fn run(test: impl Future<Output = ()> + 'static) {
        LocalExecutorBuilder::new(Placement::Unbound).make().unwrap().run(test);
    }

    #[test]
    fn requests_are_due_each_at_its_time_or_several_at_a_tick() {
        run(async {
            let start = Instant::now();
            assert_eq!(due_times(schedule(start, None)), [1000, 3000, 5000, 7000, 9000, 11_000]);
            let (ticks, _teller) = Ticks::start(start, Duration::from_millis(4));
            let times = due_times(schedule(start, Some(ticks)));
            assert_eq!(times, [4000, 4000, 8000, 8000, 12_000, 12_000]);
        });
    }

    #[test]
    fn whoever_waits_is_woken_when_a_request_is_due_and_not_before() {
        run(async {
            for tick in [0, 700, 5000] {
                let start = Instant::now();
                let (ticks, _teller) = Ticks::start(start, Duration::from_micros(tick.max(1)));
                let ticks = (tick > 0).then_some(ticks);
                let mut tasks = Vec::new();
                for _ in 0..3 {
                    let mut schedule = schedule(start, ticks.clone());
                    tasks.push(glommio::spawn_local(async move {
                        let mut taken = 0;
                        while taken < 10 {
                            poll_fn(|context| schedule.poll_due(context)).await;
                            // One that waits for ticks is woken by each of them.
                            while schedule.take_due(Instant::now()).is_some() {
                                taken += 1;
                            }
                        }
                    }));
                }
                for task in tasks {
                    task.await;
                }
                // The tenth is due after 19 ms.
                assert!(start.elapsed() >= Duration::from_millis(19), "{tick}");
            }
        });
    }
}
