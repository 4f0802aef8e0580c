// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a peer still moves: one that was stopped, or hangs, tells nothing.

use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::time::Duration;

use crate::exec::runtime::sleep;
use crate::session::state::SessionInner;
use shmipc_core::error::{Error, HandshakeError, MemoryError};

/// How many parts the time is waited in that a server of version 2 has for the first event. When
/// both sides were stopped meanwhile, that counts as one of them.
const PARTS_OF_FIRST: u32 = 8;

/// What is known of how a session's peer moves.
#[derive(Default)]
pub(crate) struct StallClock {
    /// Whether it has to show that it is there at all, by taking the first event.
    is_unproven: Cell<bool>,
    head: Cell<i64>,
    /// For how long the peer has not moved, since there was something for it.
    still: Cell<Option<Duration>>,
}

async fn await_first_event_taken(session: Weak<SessionInner>) {
    for part in 1..=PARTS_OF_FIRST {
        let Some(limit) =
            session.upgrade().map(|session| session.config.settings().limits.handshake_timeout)
        else {
            return;
        };
        sleep(limit / PARTS_OF_FIRST).await;
        let Some(session) = session.upgrade().filter(|session| !session.is_over()) else {
            return;
        };
        if session.has_taken_any() {
            return;
        }
        if part == PARTS_OF_FIRST {
            session.fail(HandshakeError::NeverMapped(limit).into());
        }
    }
}

impl StallClock {
    /// `is_unproven`: nothing has shown yet that the peer is there.
    pub(crate) fn of_peer(is_unproven: bool) -> Self {
        Self { is_unproven: Cell::new(is_unproven), ..Self::default() }
    }
}

impl SessionInner {
    /// The peer is woken. A client of version 2 gets no acknowledgement from its server: what shows
    /// that it has mapped the memory is that it takes the first event. One that does not, in the
    /// time of a handshake, is not there.
    pub(crate) fn expect_first_event_taken(self: &Rc<Self>) {
        if self.movement.is_unproven.take() && !self.has_taken_any() {
            self.poller.spawn(await_first_event_taken(Rc::downgrade(self)));
        }
    }

    fn has_taken_any(&self) -> bool {
        // What is wrong with the queue is found, and named, elsewhere.
        self.channels.producer.borrow_mut().in_flight().map_or(true, |(head, _)| head > 0)
    }

    /// Whether the peer has taken something of what there was to take since the last look, which
    /// was so long ago by this side's timers.
    ///
    /// These are added up, and not the clock asked: when both sides were stopped and go on, it has
    /// gone on without them.
    pub(crate) fn look_after(&self, passed: Duration) {
        if self.channels.are_lost() {
            return self.fail(MemoryError::Lost.into());
        }
        let Some(limit) = self.config.settings().limits.stall else { return };
        let in_flight = self.channels.producer.borrow_mut().in_flight();
        let (head, count) = match in_flight {
            Ok(in_flight) => in_flight,
            Err(error) => return self.fail(error.into()),
        };
        let StallClock { head: last, still, .. } = &self.movement;
        let has_moved = last.replace(head) != head;
        if has_moved || count == 0 {
            return still.set(None);
        }
        // What it has not moved by the first look may have come a moment ago.
        let so_far = still.get().map_or(Duration::ZERO, |still| still.saturating_add(passed));
        still.set(Some(so_far));
        if so_far >= limit {
            self.fail(Error::PeerStalled(limit));
        }
    }
}
