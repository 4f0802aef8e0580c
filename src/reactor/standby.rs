// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions that have nothing to do, on a core that is awake for others.
//!
//! They could go to sleep, but then their peers would have to wake them: a system call, and more
//! on the other side; and while the poller spins, an eventfd is not heard before the next look at
//! io_uring. To look at a queue costs a few nanoseconds. So as long as the poller spins for other
//! sessions, these keep it company: they have no turns and do not keep it awake, but do not say
//! that they sleep, and their queues are looked at in each pass. When it has nobody left to spin
//! for, all of them go to sleep.

use std::rc::Rc;

use crate::reactor::poll_state::Residency;
use crate::reactor::pollable::Pollable;
use crate::reactor::sweep::SweepList;

/// How many there are at most. The others sleep.
const MOST: usize = 16;

pub(crate) struct Standby<S> {
    sessions: SweepList<Rc<S>>,
}

impl<S> Default for Standby<S> {
    fn default() -> Self {
        Self { sessions: SweepList::default() }
    }
}

impl<S: Pollable> Standby<S> {
    /// Takes a session in that is not active any more. Gives the one for which there is no room
    /// then, which is to sleep: that which has had nothing to do for longest.
    pub(crate) fn take_in(&self, session: Rc<S>) -> Option<Rc<S>> {
        let oldest = if self.sessions.len() < MOST { None } else { self.sessions.pop_first() };
        session.activity().residency.set(Residency::Standby);
        self.sessions.push(session);
        oldest.filter(|oldest| oldest.activity().leave_company())
    }

    /// Puts those before the poller for which something has come.
    #[inline]
    pub(crate) fn look(&self) {
        if !self.sessions.is_empty() {
            self.look_at_all();
        }
    }

    fn look_at_all(&self) {
        self.sessions.sweep(|session| {
            let place = &session.activity().residency;
            if place.get() == Residency::Standby && session.has_events() {
                session.activity().note_looked_on();
                session.activate();
            }
            place.get() == Residency::Standby && !session.is_over()
        });
    }

    /// Adds all of them to those that are to sleep now.
    pub(crate) fn leave(&self, tired: &SweepList<Rc<S>>) {
        self.sessions.drain(|session| {
            if session.activity().leave_company() {
                tired.push(session);
            }
        });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}
