// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions that have nothing to do and still keep free slices to themselves, for a while.
//!
//! While a session has no turns, asleep or in company, nobody would give the slices of its
//! magazines back to the peer, so they are given back. But one that has some a moment later, as
//! most do that a clock drives, has given them for nothing: it has to take as many again, and to
//! take a slice is to read a line that the peer has written. So that is done only to sessions that
//! stay without, by one task for all of a core. Until then the peer has to do without what they
//! hold, an eighth or a quarter of each list at most, as while they are awake.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use crate::exec::runtime::sleep;
use crate::exec::wakers::WakerSlot;
use crate::reactor::poll_loop::Reactor;
use crate::reactor::poll_state::Residency;
use crate::reactor::pollable::Pollable;
use crate::reactor::sweep::SweepList;

/// How long a session has no turns, at least, before its magazines are emptied. It is done after
/// twice as long at the most.
const REST_AFTER: Duration = Duration::from_millis(50);

/// The sessions of a core whose magazines are to be emptied.
pub(crate) struct IdleTrim<S> {
    /// Each with the number of times that it had retired when it was looked at.
    sessions: SweepList<(Weak<S>, u64)>,
    is_running: Cell<bool>,
    /// The task, while there is no session.
    task: WakerSlot,
}

impl<S> Default for IdleTrim<S> {
    fn default() -> Self {
        Self {
            sessions: SweepList::default(),
            is_running: Cell::new(false),
            task: WakerSlot::default(),
        }
    }
}

impl<S: Pollable> IdleTrim<S> {
    /// Empties the magazines of those that have had no turn since the last look. Those that have
    /// had some, and have none again, are looked at once more.
    fn look(&self) {
        self.sessions.sweep(|(session, seen)| {
            let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
                return false;
            };
            let retirements = session.activity().retirements.get();
            let is_awake = session.activity().residency.get() == Residency::Active;
            if !is_awake && std::mem::replace(seen, retirements) != retirements {
                return true;
            }
            if !is_awake {
                session.set_resting(true);
            }
            // One that is awake comes back when it has nothing to do.
            session.activity().will_rest.set(false);
            false
        });
    }
}

impl<S: Pollable> Reactor<S> {
    /// Has the magazines of a session emptied that has nothing to do, unless that changes soon.
    #[inline]
    pub(crate) fn rest_soon(self: &Rc<Self>, session: &Rc<S>) {
        if session.activity().will_rest.replace(true) {
            return;
        }
        let rests = self.rests();
        let retirements = session.activity().retirements.get();
        rests.sessions.push((Rc::downgrade(session), retirements));
        if rests.is_running.replace(true) {
            rests.task.wake();
        } else {
            self.spawn(empty_magazines(Rc::clone(self)));
        }
    }
}

async fn empty_magazines<S: Pollable>(poller: Rc<Reactor<S>>) {
    let rests = poller.rests();
    loop {
        poll_fn(|context| {
            if !rests.sessions.is_empty() {
                return Poll::Ready(());
            }
            rests.task.register(context);
            Poll::Pending
        })
        .await;
        sleep(REST_AFTER).await;
        rests.look();
    }
}
