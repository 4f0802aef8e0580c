// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session wakes its peer, and how it learns that the peer has woken it, apart from the
//! socket: by eventfds, or by polling the queue at an interval (version 4;
//! `docs/protocol.md#wake-ups`).

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future::{or, yield_now};

use crate::exec::runtime::sleep;
use crate::net::eventfd::{EventFdListener, EventFdNotifier};
use crate::session::state::SessionInner;
use shmipc_core::error::Error;

/// After how many wake-ups in a row that bring nothing the next ones are handled more slowly. An
/// honest peer causes one now and then, when its event was seen before its wake-up arrived.
const MAX_WAKEUPS_IN_VAIN: u32 = 16;

/// How long the session waits between wake-ups from then on.
const PAUSE: Duration = Duration::from_millis(1);

/// How the two sides of a session wake each other.
pub(crate) enum Doorbell {
    /// By SyncEvents on the socket alone.
    Socket,
    /// By an eventfd each way.
    EventFds {
        /// Wakes the peer. Boxed: the bookkeeping of its ring is large, and few sessions have one.
        theirs: Box<EventFdNotifier>,
        /// The one that the peer writes to, until the session listens to it.
        ours: Cell<Option<OwnedFd>>,
    },
    /// Not at all: each side polls its queue at this interval.
    Polling(Duration),
}

impl Doorbell {
    /// Takes over the eventfd that the peer reads and the one that this side reads. The caller has
    /// checked that they are eventfds.
    pub(crate) fn event_fds(theirs: OwnedFd, ours: OwnedFd) -> Result<Self, Error> {
        let theirs = Box::new(EventFdNotifier::new(&theirs)?);
        Ok(Self::EventFds { theirs, ours: Cell::new(Some(ours)) })
    }

    /// Whether a wake-up of the peer is still to be sent, because the last try failed.
    pub(crate) fn take_owed(&self) -> bool {
        matches!(self, Self::EventFds { theirs, .. } if theirs.take_owed())
    }
}

impl SessionInner {
    /// Wakes the peer, which sleeps.
    pub(crate) fn ring_event_fd(&self, notifier: &EventFdNotifier) {
        if let Err(error) = notifier.notify() {
            return self.fail(error);
        }
        if notifier.is_owed() {
            // The next turn tries again.
            self.queues.must_look.set(true);
        }
    }

    /// Starts what the session needs besides its socket to be woken by the peer.
    pub(crate) fn listen_at_doorbell(self: &Rc<Self>) {
        match &self.doorbell {
            Doorbell::Socket => {}
            Doorbell::EventFds { ours, .. } => {
                if let Some(ours) = ours.take() {
                    self.reactor.spawn(read_event_fd(Rc::clone(self), ours));
                }
            }
            Doorbell::Polling(interval) => {
                self.reactor.look_at_intervals(self, *interval);
            }
        }
    }
}

/// Reads the eventfd for as long as the session lives.
async fn read_event_fd(session: Rc<SessionInner>, fd: OwnedFd) {
    let listener = match EventFdListener::new(fd) {
        Ok(listener) => listener,
        Err(error) => return session.fail(error),
    };
    let reading = async {
        let mut in_vain = 0;
        loop {
            if let Err(error) = listener.notified().await {
                return session.fail(error);
            }
            in_vain = if session.has_events() { 0 } else { in_vain + 1 };
            session.proto.on_wakeup(&*session);
            if in_vain < MAX_WAKEUPS_IN_VAIN {
                // Other tasks run, also while the peer writes without end.
                yield_now().await;
            } else {
                // The peer wakes this side for nothing, or the eventfd never becomes zero.
                sleep(PAUSE).await;
            }
        }
    };
    or(async { drop(session.over().await) }, reading).await;
    listener.close().await;
}
