// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions that have nothing to do, on a core that is awake for others.
//!
//! They could go to sleep, but then their peers would have to wake them: a system call, and more
//! on the other side; and while the poller spins, an eventfd is not heard before the next look at
//! io_uring. To look at a queue costs a few nanoseconds. So as long as the poller spins for other
//! sessions, these keep it company: they have no turns and do not keep it awake, but do not say
//! that they sleep, and their queues are looked at in each pass. When it has nobody left to spin
//! for, all of them go to sleep.

use std::cell::RefCell;
use std::rc::Rc;

use super::session::SessionInner;

/// How many there are at most. The others sleep.
const MOST: usize = 16;

#[derive(Default)]
pub(super) struct Company {
    sessions: RefCell<Vec<Rc<SessionInner>>>,
}

impl Company {
    /// Takes a session in that is not active any more. Gives it back if there is no room.
    pub(super) fn take_in(&self, session: Rc<SessionInner>) -> Option<Rc<SessionInner>> {
        let mut sessions = self.sessions.borrow_mut();
        if sessions.len() >= MOST {
            return Some(session);
        }
        session.activity.keeps_company.set(true);
        // One that was activated by a task stays in the list until the next look.
        if !sessions.iter().any(|known| Rc::ptr_eq(known, &session)) {
            sessions.push(session);
        }
        None
    }

    /// Puts those before the poller for which something has come.
    #[inline]
    pub(super) fn look(&self) {
        if !self.sessions.borrow().is_empty() {
            self.look_at_all();
        }
    }

    fn look_at_all(&self) {
        // What is dropped here may look at the list.
        let mut sessions = std::mem::take(&mut *self.sessions.borrow_mut());
        sessions.retain(|session| {
            if session.activity.keeps_company.get() && session.has_events() {
                session.activity.note_looked_on();
                session.activate();
            }
            session.activity.keeps_company.get() && !session.is_over()
        });
        let mut added = self.sessions.borrow_mut();
        sessions.append(&mut added);
        *added = sessions;
    }

    /// All of them, which are to sleep now.
    pub(super) fn leave(&self) -> Vec<Rc<SessionInner>> {
        let mut sessions = std::mem::take(&mut *self.sessions.borrow_mut());
        sessions.retain(|session| session.activity.keeps_company.take());
        sessions
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.borrow().is_empty()
    }
}
