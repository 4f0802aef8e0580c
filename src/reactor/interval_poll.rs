// SPDX-License-Identifier: MIT OR Apache-2.0
//! A look at the queues of sessions that nobody wakes (`event_queue_polling` of version 4), from
//! time to time: one timer for all of a core, at the shortest interval of any of them. A look at
//! one that has nothing costs a few nanoseconds.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures_lite::future::or;

use crate::exec::runtime::sleep;
use crate::exec::wakers::WakerSlot;
use crate::reactor::poll_loop::Reactor;
use crate::reactor::poll_state::Residency;
use crate::reactor::pollable::Pollable;
use crate::reactor::sweep::SweepList;

/// The sessions of a core that are looked at.
pub(crate) struct IntervalPoll<S> {
    sessions: SweepList<(Weak<S>, Duration)>,
    is_running: Cell<bool>,
    /// The task, while it sleeps; and whether there is a session that it does not know of.
    task: WakerSlot,
    has_changed: Cell<bool>,
}

impl<S> Default for IntervalPoll<S> {
    fn default() -> Self {
        Self {
            sessions: SweepList::default(),
            is_running: Cell::new(false),
            task: WakerSlot::default(),
            has_changed: Cell::new(false),
        }
    }
}

impl<S: Pollable> IntervalPoll<S> {
    /// Gives those that sleep and have something to drain to the poller. The shortest interval of
    /// those that are left.
    fn look(&self) -> Option<Duration> {
        let mut shortest = None;
        self.sessions.sweep(|(session, interval)| {
            let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
                return false;
            };
            if session.activity().residency.get() != Residency::Active && session.has_events() {
                session.activate();
            }
            shortest =
                Some(shortest.map_or(*interval, |shortest: Duration| shortest.min(*interval)));
            true
        });
        shortest
    }
}

impl<S: Pollable> Reactor<S> {
    /// Looks at a session's queue at this interval, for as long as it lives.
    pub(crate) fn look_at_intervals(self: &Rc<Self>, session: &Rc<S>, interval: Duration) {
        let ticks = self.ticks();
        ticks.sessions.push((Rc::downgrade(session), interval));
        ticks.has_changed.set(true);
        if ticks.is_running.replace(true) {
            ticks.task.wake();
        } else {
            self.spawn(tick(Rc::clone(self)));
        }
    }
}

async fn tick<S: Pollable>(poller: Rc<Reactor<S>>) {
    let ticks = poller.ticks();
    while let Some(interval) = ticks.look() {
        let changed = poll_fn(|context| {
            if ticks.has_changed.take() {
                return Poll::Ready(());
            }
            ticks.task.register(context);
            Poll::Pending
        });
        let due = async {
            sleep(interval).await;
        };
        or(changed, due).await;
    }
    ticks.is_running.set(false);
}
