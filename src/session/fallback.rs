// SPDX-License-Identifier: MIT OR Apache-2.0
//! When a stream leaves shared memory for the socket, and when it comes back.
//!
//! It leaves when the pool has had no slices for as long as the configuration says. It comes back
//! when the peer's reader has taken what went over the socket, since nothing can overtake that any
//! more; only a peer of this crate says so.
//!
//! Both are waits that a dropped future may leave behind, and that the next one does not continue.
//! [`AllocFuture`](crate::session::stream::send::AllocFuture) ends its own when it is dropped; a
//! write has no future to do that.

use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::session::flow_control::SHORT_MESSAGE;
use crate::session::send_wait::{SendWait, WaitsFor};
use crate::session::state::SessionInner;
use crate::session::stream::StreamInner;
use crate::session::stream::write_half::WriteHalf;
use shmipc_core::error::{Error, Result};
use shmipc_core::shm::chain::Chain;
use shmipc_core::wire::EventState;

/// How long a stream that uses the socket waits at first for the peer's reader to take something of
/// what went that way, so that it can come back to shared memory when all is taken. It is doubled
/// up to [`RETURN_DOUBLINGS`] times for a reader that comes later.
const RETURN_WAIT: Duration = Duration::from_millis(10);
const RETURN_DOUBLINGS: u32 = 6;

/// A wait that nobody came back to for so long after its end was that of a write that has been
/// dropped: [`AsyncWrite`](futures_lite::AsyncWrite) has no future that says so.
const ABANDONED_AFTER: Duration = Duration::from_millis(20);
/// But only so often in a row: the executor may be that slow.
const MAX_ABANDONED: u8 = 3;

/// A wait for slices.
#[derive(Default)]
pub(crate) struct PoolWait {
    until: Option<Instant>,
    /// How many waits in a row were taken for those of writes that had been dropped.
    abandoned: u8,
}

impl PoolWait {
    /// Until when the present write waits, which begins to now if it does not wait yet; then the
    /// second value is true.
    pub(crate) fn until(&mut self, now: Instant, wait: Duration) -> (Instant, bool) {
        let is_abandoned = |until: Instant| now > until + ABANDONED_AFTER;
        if self.abandoned < MAX_ABANDONED && self.until.is_some_and(is_abandoned) {
            self.abandoned += 1;
            self.until = None;
        }
        let is_new = self.until.is_none();
        // For ever is as good as a year.
        let wait = wait.min(Duration::from_secs(365 * 24 * 3600));
        (*self.until.get_or_insert(now + wait), is_new)
    }

    /// The wait is over.
    #[inline]
    pub(crate) fn end(&mut self) {
        self.until = None;
    }

    /// It lasted as long as it may.
    pub(crate) fn expire(&mut self) {
        *self = Self::default();
    }
}

/// A stream's attempts to leave the socket.
#[derive(Default)]
pub(crate) struct ComingBack {
    /// Until when the present attempt waits for the peer's reader.
    until: Option<Instant>,
    /// What the peer's reader had taken when it was last looked at. While it takes more, it is
    /// waited for.
    seen: u64,
    /// How many attempts in a row were in vain.
    failures: u32,
    /// The next attempt is made when the peer's reader has taken so much.
    not_before: u64,
}

impl ComingBack {
    /// Whether the stream goes back to shared memory now, or stays on the socket.
    ///
    /// While a sender goes on sending there is always something on its way. So it stops for a
    /// moment, as soon as there are slices to come back to. A reader that does not come in time is
    /// not waited for again before it has taken what was sent by then, and the window is used
    /// meanwhile.
    pub(crate) fn poll(
        &mut self,
        session: &SessionInner,
        stream: &StreamInner,
        waiting: &mut SendWait,
        context: &Context<'_>,
    ) -> Poll<bool> {
        // What is free is for those that are in shared memory.
        if session.channels.manager.is_short() {
            return Poll::Ready(false);
        }
        if session.may_return_to_memory(stream) {
            return Poll::Ready(true);
        }
        let credited = stream.sending.credited();
        let is_worth_it = session.credit.is_known()
            && credited >= self.not_before
            && session.channels.manager.might_allocate();
        if !is_worth_it {
            return Poll::Ready(false);
        }
        let now = Instant::now();
        let is_abandoned = |until| now > until + ABANDONED_AFTER && self.failures == 0;
        if self.until.is_none_or(is_abandoned) || self.seen != credited {
            let until = now + RETURN_WAIT * (1 << self.failures.min(RETURN_DOUBLINGS));
            (self.until, self.seen) = (Some(until), credited);
        }
        let until = self.until.unwrap_or(now);
        if now >= until {
            self.until = None;
            self.failures += 1;
            self.not_before = stream.sending.sent();
            return Poll::Ready(false);
        }
        stream.writer.register(context);
        waiting.begin(session, WaitsFor::Return(until), context);
        Poll::Pending
    }
}

impl WriteHalf {
    /// The pool is empty: waits as long as the configuration says, then leaves shared memory.
    pub(crate) fn poll_pool(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let session = self.session.inner();
        let now = Instant::now();
        let (until, is_new) =
            self.fallback_after.until(now, session.config.settings().fallback_after);
        if is_new {
            session.counters.pool_empty.add(1);
        }
        if now < until {
            self.waiting.begin(session, WaitsFor::Memory(Some(until)), context);
            ready!(self.deadline.poll(context));
            self.fallback_after.end();
            return Poll::Ready(Err(Error::DeadlinePassed));
        }
        self.fallback_after.expire();
        self.inner.life().fall_back();
        Poll::Ready(Ok(()))
    }

    /// Puts a message into slices that was written into private memory, now that there are some.
    /// Returns it as it is if there are not.
    #[cold]
    pub(crate) fn move_to_memory(&self, chain: Chain, context: &Context<'_>) -> Result<Chain> {
        let session = self.session();
        if !chain.is_of(&session.channels.manager) {
            return Err(Error::ForeignLoan);
        }
        session.activate();
        if session.channels.manager.is_short() && !self.may_use_reserve(context, chain.len()) {
            return Ok(chain);
        }
        let slices = session.channels.manager.allocate(chain.len(), false);
        let Some(mut slices) = slices.map_err(|error| session.broken(error))? else {
            return Ok(chain);
        };
        let bytes = chain.into_bytes();
        let count = slices.write(&bytes);
        debug_assert_eq!(count, bytes.len(), "it was allocated for that");
        Ok(slices)
    }

    /// Leaves shared memory for a message of private memory.
    pub(crate) fn fall_back(&self) {
        self.inner.life().fall_back();
    }

    /// Sends bytes over the socket, the first `at_most` of them.
    pub(crate) fn poll_send_fallback(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        at_most: usize,
    ) -> Poll<Result<usize>> {
        let mut count = bytes.len().min(at_most);
        if self.session().is_socket_budget_spent() && !self.inner.sending.is_wanted() {
            count = count.min(SHORT_MESSAGE);
        }
        ready!(self.poll_socket_room(context, count))?;
        self.send_over_socket(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Sends a whole message over the socket, of which there is room for the first piece: in one
    /// piece, since it is one flush, as long as the peer takes messages that long. What is longer
    /// goes all the same, and nothing is waited for in between: half a message is none.
    pub(crate) fn send_whole_over_socket(&self, bytes: &[u8]) {
        let session = self.session();
        let at_most = session.config.settings().limits.message_len as usize - 16;
        for piece in bytes.chunks(at_most) {
            self.send_over_socket(piece);
        }
    }

    fn send_over_socket(&self, piece: &[u8]) {
        self.session().send_fallback(self.inner.id(), piece, EventState::Open);
        self.inner.note_known_to_peer();
        self.session().note_sent_over_socket(&self.inner, piece.len());
    }

    /// Waits until a message of this stream may go over the socket.
    pub(crate) fn poll_socket_room(
        &mut self,
        context: &mut Context<'_>,
        len: usize,
    ) -> Poll<Result<()>> {
        self.check_open()?;
        let session = self.session.inner();
        if !session.has_window(&self.inner) {
            // The credit comes by the queue.
            session.activate();
            if self.inner.writer.register(context) {
                session.counters.window_full.add(1);
            }
            return self.deadline.poll(context).map(|()| Err(Error::DeadlinePassed));
        }
        if !session.has_socket_budget(&self.inner, len) {
            session.activate();
            session.ask_for_credit(&self.inner);
            self.inner.writer.register(context);
            session.note_waits_for_budget(&self.inner, len);
            self.waiting.begin(session, WaitsFor::Readers, context);
            return self.deadline.poll(context).map(|()| Err(Error::DeadlinePassed));
        }
        if session.outbox().is_full() {
            self.waiting.begin(session, WaitsFor::Socket, context);
            return self.deadline.poll(context).map(|()| Err(Error::DeadlinePassed));
        }
        match session.poll_overtaking(&mut self.overtaking, &mut self.waiting, context) {
            Poll::Ready(result) => result?,
            Poll::Pending => {
                return self.deadline.poll(context).map(|()| Err(Error::DeadlinePassed));
            }
        }
        // Everything that was published before must be seen before; the peer drains its queue when
        // the message comes.
        session.flush_queue();
        Poll::Ready(Ok(()))
    }
}
