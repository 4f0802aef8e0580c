// SPDX-License-Identifier: MIT OR Apache-2.0
//! When a stream leaves shared memory for the socket, and when it comes back.
//!
//! It leaves when the pool has had no slices for as long as the configuration says. It comes back
//! when the peer's reader has taken what went over the socket, since nothing can overtake that any
//! more; only a peer of this crate says so.
//!
//! Both are waits that a dropped future may leave behind, and that the next one does not continue.
//! Where the driver has futures they end their waits when they are dropped; a write through
//! `AsyncWrite` has no future to do that, so a wait that was left alone for long counts as dropped.

use std::time::{Duration, Instant};

use crate::proto::session::RunningSession;
use crate::proto::session::driver::Driver;
use crate::proto::session::stream::StreamEntry;
use crate::wire::Deframer;

/// How long a stream that uses the socket waits at first for the peer's reader to take something of
/// what went that way, so that it can come back to shared memory when all is taken. It is doubled
/// up to [`RETURN_DOUBLINGS`] times for a reader that comes later.
const RETURN_WAIT: Duration = Duration::from_millis(10);
const RETURN_DOUBLINGS: u32 = 6;

/// A wait that nothing came back to for so long after its end was that of a write that has been
/// dropped.
const ABANDONED_AFTER: Duration = Duration::from_millis(20);
/// But only so often in a row: the executor may be that slow.
const MAX_ABANDONED: u8 = 3;

/// Parts of what may wait unread in a session, in sixteenths. Up to the first mark every stream may
/// send. Up to [`FAIR`] each may have a share of its own unread. Beyond, one may send a short
/// message whose reader has taken everything, and any message whose reader is known to wait. So
/// however many streams stop being read, whatever they were sent before leaves room for those.
const PARTS: u64 = 16;
const FREE: u64 = 3;
const FAIR: u64 = 14;
/// How short such a message is: a part in so many of what is left, so that there is always room for
/// a shorter one.
const SHORT_SHARE: u64 = 1024;
/// What each stream may have unread up to [`FAIR`]: enough for a request of 64 KiB that is written
/// as a whole before its answer is read, in pieces of a kilobyte or more, and for that answer. With
/// the default of 64 MiB there is room for 560 streams that have that, whatever others had before.
const FAIR_BYTES: u64 = 80 << 10;
/// How long a short message is at most.
pub const SHORT_MESSAGE: usize = 4096;

/// What a message costs the peer until it is taken, when it goes over the socket, as the peer
/// counts it.
fn cost_over_socket(len: usize) -> u64 {
    Deframer::cost_of(len) as u64
}

/// A wait for slices.
#[derive(Debug, Default)]
pub struct PoolWait {
    until: Option<Instant>,
    /// How many waits in a row were taken for those of writes that had been dropped.
    abandoned: u8,
}

impl PoolWait {
    /// Until when the present write waits, which begins to now if it does not wait yet; then the
    /// second value is true.
    pub fn until(&mut self, now: Instant, wait: Duration) -> (Instant, bool) {
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
    pub fn end(&mut self) {
        self.until = None;
    }

    /// It lasted as long as it may.
    pub fn expire(&mut self) {
        *self = Self::default();
    }
}

/// A stream's attempts to leave the socket.
#[derive(Debug, Default)]
pub struct ReturnAttempts {
    /// Until when the present attempt waits for the peer's reader.
    until: Option<Instant>,
    /// What the peer's reader had taken at the last look. While it takes more, it is waited for.
    seen: u64,
    /// How many attempts in a row were in vain.
    failures: u32,
    /// The next attempt is made when the peer's reader has taken so much.
    not_before: u64,
}

/// Where a stream that uses the socket sends next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnStep {
    /// Through shared memory again.
    ToMemory,
    /// Over the socket.
    StayOnSocket,
    /// Nowhere until this time, unless the stream's writer is woken before.
    Wait(Instant),
}

impl<D: Driver> RunningSession<D> {
    /// Whether a stream goes back to shared memory now, or stays on the socket.
    ///
    /// While a sender goes on sending there is always something on its way. So it stops for a
    /// moment, as soon as there are slices to come back to. A reader that does not come in time is
    /// not waited for again before it has taken what was sent by then, and the window is used
    /// meanwhile.
    pub fn try_return(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        attempts: &mut ReturnAttempts,
        now: Instant,
    ) -> ReturnStep {
        // What is free is for those that are in shared memory.
        if driver.is_memory_short() {
            return ReturnStep::StayOnSocket;
        }
        // Only when the peer's reader has taken what went over the socket can nothing overtake it.
        if self.credit.is_known() && stream.sending.is_socket_done() {
            stream.state().return_to_memory();
            return ReturnStep::ToMemory;
        }
        let credited = stream.sending.credited();
        let is_worth_it =
            self.credit.is_known() && credited >= attempts.not_before && driver.might_allocate();
        if !is_worth_it {
            return ReturnStep::StayOnSocket;
        }
        let is_abandoned = |until| now > until + ABANDONED_AFTER && attempts.failures == 0;
        if attempts.until.is_none_or(is_abandoned) || attempts.seen != credited {
            let until = now + RETURN_WAIT * (1 << attempts.failures.min(RETURN_DOUBLINGS));
            (attempts.until, attempts.seen) = (Some(until), credited);
        }
        let until = attempts.until.unwrap_or(now);
        if now >= until {
            attempts.until = None;
            attempts.failures += 1;
            attempts.not_before = stream.sending.sent();
            return ReturnStep::StayOnSocket;
        }
        ReturnStep::Wait(until)
    }

    /// Little memory is free. It is for short messages of streams whose readers have taken
    /// everything, so that those who do not read hold up themselves only. If the message has to
    /// wait for its reader, the peer is asked how far that is, and the stream's writer is woken
    /// when it says so.
    #[cold]
    pub fn reserve_gate(&self, driver: &D, stream: &StreamEntry<D>, len: usize) -> ReserveGate {
        if !self.credit.is_known() {
            return ReserveGate::Open;
        }
        if !stream.sending.is_all_taken() {
            self.ask_for_credit(driver, stream);
            return ReserveGate::AwaitReader;
        }
        if len <= driver.smallest_slice() { ReserveGate::Open } else { ReserveGate::TooLong }
    }

    /// Whether a message may go over the socket without holding up others: the peer stops reading
    /// the socket when too much of all streams together waits unread.
    pub(super) fn has_socket_budget(&self, stream: &StreamEntry<D>, len: usize) -> bool {
        let is_spent = self.is_socket_budget_spent() && !stream.sending.is_wanted();
        !is_spent || self.credit.socket_unread.get() < self.budget_for(stream, len)
    }

    /// The message may go when less than this is unread of what went over the socket, even if
    /// nothing is heard of its reader.
    fn budget_for(&self, stream: &StreamEntry<D>, len: usize) -> u64 {
        let limit = self.limits.unread_fallback_bytes as u64;
        let part = |parts: u64| parts * limit / PARTS;
        let cost = cost_over_socket(len);
        let held = stream.sending.held() + cost;
        let fair = if held <= FAIR_BYTES.min(part(1)) { part(FAIR) } else { part(FREE) };
        let is_current = stream.sending.is_all_taken();
        let short = if is_current { cost.saturating_mul(SHORT_SHARE) } else { limit };
        fair.max(limit.saturating_sub(short))
    }

    /// Has those woken that wait for the budget when there is enough for this message.
    pub(super) fn wait_for_budget(&self, stream: &StreamEntry<D>, len: usize) {
        let mark = &self.credit.budget_mark;
        mark.set(mark.get().max(self.budget_for(stream, len)));
    }

    /// Whether streams have to look for what is left for them.
    fn is_socket_budget_spent(&self) -> bool {
        let limit = self.limits.unread_fallback_bytes as u64;
        self.credit.is_known() && self.credit.socket_unread.get() >= FREE * limit / PARTS
    }

    /// How many of so many bytes that could be cut anywhere go over the socket in one piece.
    pub fn socket_piece(&self, stream: &StreamEntry<D>, len: usize) -> usize {
        let is_scarce = self.is_socket_budget_spent() && !stream.sending.is_wanted();
        if is_scarce { len.min(SHORT_MESSAGE) } else { len }
    }

    /// Counts a message of a stream that went over the socket.
    pub(super) fn on_sent_over_socket(&self, stream: &StreamEntry<D>, len: usize, now: Instant) {
        let cost = cost_over_socket(len);
        stream.sending.record_sent_over_socket(len as u64, cost);
        stream.record_unanswered(len as u64);
        self.credit.last_over_socket.set(Some(now));
        self.credit.socket_unread.set(self.credit.socket_unread.get() + cost);
    }

    /// Whether nothing of what a stream was used for is left on it: so its next user begins
    /// afresh.
    ///
    /// A peer that does not know the extension never returns to memory on a stream whose data went
    /// over the socket, whichever side began with that, nor can this side
    /// (`docs/protocol.md#fallback`).
    pub fn is_reusable(&self, stream: &StreamEntry<D>) -> bool {
        let may_use_memory = self.credit.is_known() || !stream.has_used_socket();
        stream.state().is_open() && may_use_memory && !self.is_over()
    }
}

/// Whether the last free slices are for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReserveGate {
    /// They are.
    Open,
    /// Not before its stream's reader has taken everything.
    AwaitReader,
    /// Not for one that is so long.
    TooLong,
}
