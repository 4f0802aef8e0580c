// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a stream's sending half waits for in its session, which is one thing at a time.

use std::task::Context;
use std::time::Instant;

use crate::exec::wakers::{Registration, WakerList};
use crate::session::state::SessionInner;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitsFor {
    /// Room in the event queue.
    Room,
    /// Free slices, until a time if there is one.
    Memory(Option<Instant>),
    /// The socket, which takes no more now.
    Socket,
    /// The peer's reader, to come back to shared memory, until this time.
    Return(Instant),
    /// The peer's readers, who have left too much of the socket unread.
    Readers,
}

/// The present wait. Its owner ends it before it is dropped.
#[derive(Debug, Default)]
pub(crate) struct SendWait {
    present: Option<(WaitsFor, Registration)>,
}

impl SendWait {
    /// Has the task woken when there is what it waits for. An earlier wait for something else ends.
    pub(crate) fn begin(&mut self, session: &SessionInner, what: WaitsFor, context: &Context<'_>) {
        let is_same =
            |before: &WaitsFor| std::mem::discriminant(before) == std::mem::discriminant(&what);
        if self.present.as_ref().is_some_and(|(before, _)| !is_same(before)) {
            self.end(session);
        }
        let (_, registration) = self.present.get_or_insert_with(|| (what, Registration::default()));
        let deadline = match what {
            WaitsFor::Memory(until) => until,
            WaitsFor::Return(until) => Some(until),
            WaitsFor::Room | WaitsFor::Socket | WaitsFor::Readers => None,
        };
        waiting(session, what).register(registration, context, deadline);
    }

    /// Whether a wait was begun and not ended.
    #[inline]
    pub(crate) fn is_present(&self) -> bool {
        self.present.is_some()
    }

    #[cold]
    pub(crate) fn end(&mut self, session: &SessionInner) {
        if let Some((what, mut registration)) = self.present.take() {
            waiting(session, what).remove(&mut registration);
        }
    }
}

fn waiting(session: &SessionInner, what: WaitsFor) -> &WakerList {
    match what {
        WaitsFor::Room => &session.queues.waiters,
        WaitsFor::Memory(_) => &session.memory.waiters,
        WaitsFor::Socket => session.socket.outbox.waiting(),
        WaitsFor::Return(_) => &session.waiters.returning,
        WaitsFor::Readers => &session.waiters.budget,
    }
}
