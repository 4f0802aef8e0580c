// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes over the socket must not overtake what is in the queue.
//!
//! A side that is woken by SyncEvents gets both in order: the SyncEvent goes over the same socket,
//! before whatever follows. With an eventfd, or without wake-ups, nothing orders the two, and the
//! receiver has to drain its queue before it handles a message of the socket. This crate does. The
//! crate `shmipc` 0.2.1 does not: what a stream sent over the socket, after its pool ran empty,
//! could come before what it had sent by the queue, and a close before its data.
//!
//! So towards such a peer a stream waits before it first uses the socket, until the peer has
//! handled what the stream put into the queue; and a close that finds the queue full waits for
//! room, instead of going over the socket.
//!
//! When has it? A peer handles its events one after the other, so when it has taken the next one.
//! To be sure that there is a next one, the stream puts a barrier behind its last event: a close of
//! [a stream that never exists](NO_STREAM), which every peer ignores.

use std::cell::LazyCell;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::proto::session::RunningSession;
use crate::proto::session::driver::Driver;
use crate::proto::session::stream::StreamEntry;
use crate::proto::session::transmit::closed;
use crate::proto::stream_state::DataPath;
use crate::proto::stream_table::NO_STREAM;

/// How many closes may wait for room, beyond one for each stream that can be open.
const SPARE_CLOSES: usize = 1 << 16;

/// How long a peer that is not of this crate has to read the last of a stream, once it has taken
/// its event, or read its socket, before it is told of the close. One that keeps what it has read
/// until it hears of the close hears of it that late; so does one to which the last went over the
/// socket, since nothing tells when that was read.
const TIME_TO_READ: Duration = Duration::from_millis(50);
/// How many closes may wait for that. Beyond, they are told at once.
const MAX_UNREAD_CLOSES: usize = 1024;

/// A close of which the peer is told later.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeferredClose<S> {
    stream_id: u32,
    /// What the peer is to have read before.
    unread: Option<Unread<S>>,
}

#[derive(Debug, Clone, Copy)]
struct Unread<S> {
    last: Last<S>,
    /// Until when that is waited for, once it has come to the peer.
    until: Option<Instant>,
}

/// The last of a stream.
#[derive(Debug, Clone, Copy)]
enum Last<S> {
    /// A slice of it, and how many events there were with it. Before the peer has taken them it
    /// cannot read.
    Slice(S, i64),
    /// It went over the socket: so many bytes of which nothing shows that they were read, and how
    /// many had gone that way in all.
    Socket { unconfirmed: u64, until: u64 },
}

/// How far a stream is on its way to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathBarrier {
    /// It has not used the socket.
    #[default]
    Unused,
    /// It waits until the peer has taken its barrier, which is the event of this number.
    WaitsFor(i64),
    /// Nothing of it is left in the queue that could be overtaken.
    Passed,
}

impl<D: Driver> RunningSession<D> {
    /// Whether the peer handles what comes over the socket behind what was in the queue before.
    pub(super) fn orders_paths(&self, driver: &D) -> bool {
        driver.wakes_through_socket() || self.credit.is_known()
    }

    /// Whether a stream that uses the socket from now on overtakes nothing of its own. If not, it
    /// waits for room in the queue, which the peer makes when it takes the barrier.
    ///
    /// # Errors
    ///
    /// The queue does not hold together; the session has ended by that.
    pub(super) fn may_use_socket(&self, driver: &D, barrier: &mut PathBarrier) -> Result<bool> {
        if *barrier == PathBarrier::Passed || self.orders_paths(driver) {
            return Ok(true);
        }
        if *barrier == PathBarrier::Unused && self.push(driver, closed(NO_STREAM))? {
            *barrier = PathBarrier::WaitsFor(driver.events_pushed());
        }
        driver.flush_queue();
        if let PathBarrier::WaitsFor(number) = *barrier
            && self.events_taken(driver)? >= number
        {
            *barrier = PathBarrier::Passed;
            return Ok(true);
        }
        Ok(false)
    }

    /// How many events the peer has taken, of all that were sent.
    pub(super) fn events_taken(&self, driver: &D) -> Result<i64> {
        let in_flight = driver.in_flight();
        in_flight.map(|(taken, _)| taken).map_err(|error| self.fail_memory(driver, error))
    }

    /// Tells a peer that does not order its paths of a close, by the queue: now, or when there is
    /// room.
    pub(super) fn tell_closed_by_queue(&self, driver: &D, stream_id: u32) {
        let waiting = self.closes.deferred.borrow().len();
        // A peer can open and close streams without taking anything.
        if waiting > self.limits.streams.saturating_add(SPARE_CLOSES) {
            return self.fail(driver, Error::PeerNotReading);
        }
        // Not before those that wait already.
        if waiting > 0 || matches!(self.push_counted(driver, closed(stream_id)), Ok(false)) {
            self.defer_close(driver, DeferredClose { stream_id, unread: None });
        }
    }

    fn defer_close(&self, driver: &D, close: DeferredClose<D::SliceId>) {
        self.closes.deferred.borrow_mut().push_back(close);
        driver.activate();
    }

    /// Tells a peer of a close, behind what was sent on this path. One that is not of this crate is
    /// told when it has read the last of it, or has had its time for that: an asynchronous stream
    /// of shmipc-go hands nothing to its user any more once it has seen the close, also of what it
    /// had received before.
    pub(super) fn tell_closed_when_read(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        path: DataPath,
    ) {
        let stream_id = stream.id();
        if !self.credit.is_known() {
            let unconfirmed = stream.unconfirmed();
            let in_all = &self.credit.unconfirmed;
            in_all.set(in_all.get().saturating_add(unconfirmed));
            let last = match path {
                DataPath::Socket if unconfirmed == 0 => None,
                DataPath::Socket => {
                    Some(Last::Socket { unconfirmed, until: driver.socket_bytes() })
                }
                DataPath::SharedMemory => {
                    let slice = driver.sent_at(stream.last_sent.get());
                    slice.map(|slice| Last::Slice(slice, driver.events_pushed()))
                }
            };
            let is_room = self.closes.deferred.borrow().len() < MAX_UNREAD_CLOSES;
            if let Some(last) = last.filter(|_| is_room) {
                let unread = Some(Unread { last, until: None });
                return self.defer_close(driver, DeferredClose { stream_id, unread });
            }
        }
        self.tell_closed(driver, stream_id, path);
    }

    /// The peer has closed a stream that this side has closed too. It needs not be told any more,
    /// and has read what it wanted to.
    pub(super) fn on_closed_by_both(&self, id: u32) {
        self.closes.deferred.borrow_mut().retain(|close| match close.unread {
            Some(Unread { last: Last::Socket { unconfirmed, .. }, .. })
                if close.stream_id == id =>
            {
                let in_all = &self.credit.unconfirmed;
                in_all.set(in_all.get().saturating_sub(unconfirmed));
                false
            }
            _ => true,
        });
    }

    /// How many bytes of what went over the socket the peer has read from it, at least.
    fn read_from_socket(&self, driver: &D) -> u64 {
        let left = driver.unsent_bytes() + driver.bytes_in_socket();
        driver.socket_bytes().saturating_sub(left as u64)
    }

    /// Sends the closes that were deferred, as far as there is room now and the peer has read what
    /// is before them. Once a turn.
    #[inline]
    pub fn send_deferred_closes(&self, driver: &D, now: Instant) {
        if self.has_deferred_closes() {
            self.send_due_closes(driver, now);
        }
    }

    #[inline(never)]
    fn send_due_closes(&self, driver: &D, now: Instant) {
        // What is wrong with the queue is found, and named, when it is used.
        let taken = driver.in_flight().map_or(i64::MAX, |(taken, _)| taken);
        let read = LazyCell::new(|| self.read_from_socket(driver));
        let has_come = |last| match last {
            Last::Slice(_, events) => taken >= events,
            Last::Socket { until, .. } => *read >= until,
        };
        // Those that are told now may be deferred again: they find the list empty, and come behind
        // the others.
        let mut deferred = std::mem::take(&mut *self.closes.deferred.borrow_mut());
        let mut is_full = false;
        deferred.retain_mut(|DeferredClose { stream_id, unread }| match unread {
            Some(unread) if !has_come(unread.last) => true,
            Some(unread) => {
                let until = *unread.until.get_or_insert(now + TIME_TO_READ);
                let (is_unread, path) = match unread.last {
                    Last::Slice(slice, _) => (driver.is_with_peer(slice), DataPath::SharedMemory),
                    Last::Socket { .. } => (true, DataPath::Socket),
                };
                let is_waited_for = now < until && is_unread;
                if !is_waited_for {
                    self.tell_closed(driver, *stream_id, path);
                }
                is_waited_for
            }
            None => {
                // An error has ended the session.
                is_full =
                    is_full || !matches!(self.push_counted(driver, closed(*stream_id)), Ok(true));
                is_full
            }
        });
        let mut again = self.closes.deferred.borrow_mut();
        deferred.append(&mut again);
        *again = deferred;
    }

    /// Whether the peer is yet to be told of closes.
    #[inline]
    pub fn has_deferred_closes(&self) -> bool {
        !self.closes.deferred.borrow().is_empty()
    }
}
