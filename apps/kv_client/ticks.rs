// SPDX-License-Identifier: MIT OR Apache-2.0
//! One timer for all connections of an executor whose requests come at the same times.
//!
//! Timers of their own would go off one after the other, a little apart, and what they send would
//! go out in as many pieces.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use glommio::Task;

/// The times at which requests come: each multiple of an interval.
pub(crate) struct Ticks {
    start: Instant,
    /// Seconds.
    interval: f64,
    /// The last one of which connections were told.
    passed: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
    /// The task that tells them, while nobody waits.
    teller: RefCell<Option<Waker>>,
}

impl Ticks {
    /// Starts with the task that tells connections. It ends when it is dropped.
    pub(crate) fn start(start: Instant, interval: Duration) -> (Rc<Self>, Task<()>) {
        let ticks = Rc::new(Self {
            start,
            interval: interval.as_secs_f64(),
            passed: Cell::new(0),
            waiting: RefCell::default(),
            teller: RefCell::default(),
        });
        let task = glommio::spawn_local(tell(Rc::clone(&ticks)));
        (ticks, task)
    }

    /// The first tick that is not before so many seconds from the start.
    pub(crate) fn after(&self, seconds: f64) -> Instant {
        self.at((seconds / self.interval).ceil())
    }

    fn at(&self, number: f64) -> Instant {
        self.start + Duration::from_secs_f64(number * self.interval)
    }

    /// Wakes the task of this context at the next tick, once.
    pub(crate) fn wake_at_next(&self, context: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.push(context.waker().clone());
        }
        if let Some(teller) = self.teller.take() {
            teller.wake();
        }
    }
}

async fn tell(ticks: Rc<Ticks>) {
    loop {
        poll_fn(|context| {
            if !ticks.waiting.borrow().is_empty() {
                return Poll::Ready(());
            }
            *ticks.teller.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        // Those that wait have seen all that was due before now.
        let now = ticks.start.elapsed().as_secs_f64();
        let next = ((now / ticks.interval) as u64 + 1).max(ticks.passed.get() + 1);
        let due = ticks.at(next as f64);
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            glommio::timer::sleep(left).await;
        }
        ticks.passed.set(next);
        for waker in ticks.waiting.take() {
            waker.wake();
        }
    }
}
