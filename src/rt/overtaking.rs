// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes over the socket must not overtake what is in the queue.
//!
//! A side that is woken by SyncEvents gets both in order: the SyncEvent goes over the same socket,
//! before whatever follows. With an eventfd, or with nobody being woken at all, nothing orders the
//! two, and it is for the receiver to drain its queue before it handles a message of the socket.
//! This crate does. The crate `shmipc` 0.2.1 does not: what a stream sent over the socket, after
//! its pool ran empty, could come before what it had sent by the queue, and a close before its
//! data.
//!
//! So towards such a peer a stream waits before it first uses the socket, until the peer has
//! handled what the stream put into the queue; and a close that finds the queue full waits for
//! room, instead of going over the socket.
//!
//! When has it? An event is handled for sure when the peer has taken one more behind it. Of the
//! last one it is known by the working flag: this side sets it when it publishes, and the peer
//! clears it behind a drained queue. A peer that does not, since it never sleeps or has no use for
//! the flag, is given [a while](LONGEST_HANDLING) from when it was seen to have taken the event.

use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::doorbell::Doorbell;
use super::session::SessionInner;
use crate::error::Result;
use crate::shm::queue::Progress;
use crate::wire::{Event, EventState};

/// How long a peer may take for an event that it has taken, if it does not say when it is done.
const LONGEST_HANDLING: Duration = Duration::from_millis(20);

/// How far a stream is on its way to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Overtaking {
    /// It has not used the socket.
    #[default]
    Never,
    /// It waits until the peer has handled so many events.
    Until(i64),
    /// The peer has taken the last of them, and was seen to have at this time.
    Taken(i64, Instant),
    /// There is nothing of it left to overtake.
    Nothing,
}

impl SessionInner {
    /// Whether the peer handles what comes over the socket behind what was in the queue before.
    pub(super) fn orders_paths(&self) -> bool {
        matches!(self.doorbell(), Doorbell::Socket) || self.credit.is_known()
    }

    /// Waits until a stream that uses the socket from now on overtakes nothing of its own.
    pub(super) fn poll_overtaking(
        self: &Rc<Self>,
        state: &mut Overtaking,
        context: &Context<'_>,
    ) -> Poll<Result<()>> {
        if *state == Overtaking::Nothing || self.orders_paths() {
            return Poll::Ready(Ok(()));
        }
        self.flush_queue();
        let until = match *state {
            Overtaking::Until(until) | Overtaking::Taken(until, _) => until,
            _ => {
                let producer = self.lanes.producer.borrow();
                // Whom nobody wakes, nobody told that there is something to drain. One that is
                // woken would be taken for awake from then on.
                if matches!(self.doorbell(), Doorbell::Polling(_)) {
                    producer.mark_working();
                }
                producer.published()
            }
        };
        let progress = self.lanes.producer.borrow_mut().progress(until);
        *state = match (progress.map_err(|error| self.broken(error))?, *state) {
            (Progress::Handled, _) => Overtaking::Nothing,
            (Progress::Taken, Overtaking::Taken(_, since))
                if since.elapsed() >= LONGEST_HANDLING =>
            {
                Overtaking::Nothing
            }
            (Progress::Taken, state @ Overtaking::Taken(..)) => state,
            (Progress::Taken, _) => Overtaking::Taken(until, Instant::now()),
            (Progress::Pending, _) => Overtaking::Until(until),
        };
        if *state == Overtaking::Nothing {
            return Poll::Ready(Ok(()));
        }
        // While somebody waits there, the session has its turns with the poller.
        self.activate();
        self.lanes.queue_waiting.register(context, None);
        Poll::Pending
    }

    /// Tells a peer that does not order its paths of a close, by the queue: now, or when there is
    /// room.
    pub(super) fn tell_closed_by_queue(self: &Rc<Self>, stream_id: u32) {
        let status = EventState::Closed.to_status();
        let event = Event { stream_id, offset: 0, status };
        // Not before those that wait already.
        let has_room = self.lanes.kept_closes.borrow().is_empty();
        if !has_room || matches!(self.send_event(event), Ok(false)) {
            self.lanes.kept_closes.borrow_mut().push_back(stream_id);
            self.activate();
        }
    }

    /// Sends the closes that found the queue full, as far as there is room now. There are no more
    /// of them than streams that the peer has heard of.
    pub(super) fn send_kept_closes(self: &Rc<Self>) {
        loop {
            let Some(&stream_id) = self.lanes.kept_closes.borrow().front() else { return };
            let status = EventState::Closed.to_status();
            let event = Event { stream_id, offset: 0, status };
            // An error has ended the session.
            if !matches!(self.send_event(event), Ok(true)) {
                return;
            }
            self.lanes.kept_closes.borrow_mut().pop_front();
        }
    }

    pub(super) fn has_kept_closes(&self) -> bool {
        !self.lanes.kept_closes.borrow().is_empty()
    }
}
