// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a stream may send, which way, and what is recorded when it has.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::payload::SentChain;
use crate::proto::session::RunningSession;
use crate::proto::session::driver::Driver;
use crate::proto::session::path_order::PathBarrier;
use crate::proto::session::stream::StreamEntry;
use crate::proto::stream_state::{DataPath, HalfState};
use crate::wire::{Event, EventState};

/// What the next message of a stream has to wait for.
#[derive(Debug)]
pub enum SendGate<S> {
    /// Nothing: there is room for its event.
    Open(S),
    /// The stream uses the socket: see [`socket_gate`](RunningSession::socket_gate).
    OnSocket,
    /// The peer's reader is too far behind. The stream's writer is woken.
    Window,
    /// The send queue is full.
    Queue,
}

/// What the next message of a stream over the socket has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketGate {
    /// Nothing. Everything that was sent by the queue is published.
    Open,
    /// The peer's reader is too far behind. The stream's writer is woken.
    Window,
    /// Too much of all streams waits unread at the peer. Both the stream's writer and those that
    /// wait for the budget are woken.
    Budget,
    /// The socket takes nothing at present, and enough is kept for it.
    Outbox,
    /// The peer has to take what is in the queue. Room there shows it.
    Barrier,
}

impl<D: Driver> RunningSession<D> {
    /// Whether this side may send on a stream.
    ///
    /// # Errors
    ///
    /// It may not: the stream is closed, by either side, or the session is over.
    #[inline]
    pub fn check_open(&self, stream: &StreamEntry<D>) -> Result<()> {
        if stream.state().can_send() && !self.is_over() {
            return Ok(());
        }
        Err(self.why_not_open(stream))
    }

    #[cold]
    fn why_not_open(&self, stream: &StreamEntry<D>) -> Error {
        match (stream.state().here(), stream.state().peer()) {
            (HalfState::HalfClosed | HalfState::Closed | HalfState::Reset, _) => {
                Error::StreamClosed
            }
            (_, HalfState::Closed) => Error::StreamClosedByPeer,
            (_, HalfState::Reset) => Error::StreamReset,
            (_, HalfState::Open | HalfState::HalfClosed) => self.end_error(),
        }
    }

    /// Why nothing that is sent on a stream reaches a reader any more, if that is so.
    pub fn write_end(&self, stream: &StreamEntry<D>) -> Option<Error> {
        match (stream.state().here(), stream.state().peer()) {
            (HalfState::Closed | HalfState::Reset, _) => Some(Error::StreamClosed),
            (_, HalfState::Reset) => Some(Error::StreamReset),
            (_, HalfState::Closed) => Some(Error::StreamClosedByPeer),
            _ => self.end_reason(),
        }
    }

    /// Whether something may still come that is read on a stream.
    #[inline]
    pub fn may_receive(&self, stream: &StreamEntry<D>) -> bool {
        stream.state().can_receive() && !self.is_over()
    }

    /// Why a reader that has taken everything reads nothing more, if that is so. `Some(Ok(()))` is
    /// the end.
    pub fn read_end(&self, stream: &StreamEntry<D>) -> Option<Result<()>> {
        if self.may_receive(stream) { None } else { Some(self.why_no_more(stream)) }
    }

    #[cold]
    fn why_no_more(&self, stream: &StreamEntry<D>) -> Result<()> {
        if stream.state().can_receive() {
            return Err(self.end_error());
        }
        match (stream.state().here(), stream.state().peer()) {
            (HalfState::Closed, _) => Err(Error::StreamClosed),
            (_, HalfState::Reset) => Err(Error::StreamReset),
            _ => Ok(()),
        }
    }

    /// What the next message of a stream has to wait for.
    ///
    /// # Errors
    ///
    /// As [`check_open`](Self::check_open).
    #[inline]
    pub fn send_gate<'a>(
        &self,
        driver: &'a D,
        stream: &StreamEntry<D>,
    ) -> Result<SendGate<D::Slot<'a>>> {
        match self.send_path(stream)? {
            DataPath::Socket => Ok(SendGate::OnSocket),
            DataPath::SharedMemory => self.queue_gate(driver, stream),
        }
    }

    /// Which way the next data of a stream goes.
    ///
    /// # Errors
    ///
    /// As [`check_open`](Self::check_open).
    #[inline]
    pub fn send_path(&self, stream: &StreamEntry<D>) -> Result<DataPath> {
        self.check_open(stream)?;
        Ok(stream.state().path())
    }

    /// What the next event of a stream has to wait for, whichever way its data goes.
    ///
    /// # Errors
    ///
    /// The queue does not hold together; the session has ended by that.
    #[inline]
    pub fn queue_gate<'a>(
        &self,
        driver: &'a D,
        stream: &StreamEntry<D>,
    ) -> Result<SendGate<D::Slot<'a>>> {
        if !self.has_window(stream) {
            return Ok(SendGate::Window);
        }
        match driver.reserve() {
            Ok(Some(slot)) => Ok(SendGate::Open(slot)),
            Ok(None) => Ok(SendGate::Queue),
            Err(error) => Err(self.fail_memory(driver, error)),
        }
    }

    /// Sends the event that hands slices to the peer, through the room that an open
    /// [gate](Self::send_gate) has given.
    #[inline(always)]
    pub fn send_slices(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        slot: D::Slot<'_>,
        slices: &SentChain,
    ) {
        let status = EventState::Open.to_status();
        let event = Event { stream_id: stream.id(), offset: slices.offset, status };
        driver.commit(slot, event, slices.len);
        stream.on_sent(slices.offset, slices.occupies);
    }

    /// As [`send_slices`](Self::send_slices), where the gate was open a moment ago.
    ///
    /// # Errors
    ///
    /// The queue does not hold together; the session has ended by that.
    #[inline]
    pub fn send_written(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        slices: &SentChain,
    ) -> Result<()> {
        let slot = driver.reserve().map_err(|error| self.fail_memory(driver, error))?;
        let slot = slot.expect("only this side takes room in its queue");
        self.send_slices(driver, stream, slot, slices);
        Ok(())
    }

    /// What a message of so many bytes has to wait for to go over the socket. Asks the peer for
    /// credit, and sends a barrier, where that is needed to go on.
    ///
    /// # Errors
    ///
    /// As [`check_open`](Self::check_open).
    pub fn socket_gate(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        barrier: &mut PathBarrier,
        len: usize,
    ) -> Result<SocketGate> {
        self.check_open(stream)?;
        if !self.has_window(stream) {
            // The credit comes by the queue.
            driver.activate();
            return Ok(SocketGate::Window);
        }
        if !self.has_socket_budget(stream, len) {
            driver.activate();
            self.ask_for_credit(driver, stream);
            self.wait_for_budget(stream, len);
            return Ok(SocketGate::Budget);
        }
        if driver.is_outbox_full() {
            return Ok(SocketGate::Outbox);
        }
        if !self.may_use_socket(driver, barrier)? {
            // While a stream waits for room, the session has its turns with the reactor.
            driver.activate();
            return Ok(SocketGate::Barrier);
        }
        // Everything that was pushed before must be seen before: the peer drains its queue when the
        // message comes.
        driver.flush_queue();
        Ok(SocketGate::Open)
    }

    /// Sends data of a stream over the socket. The [gate](Self::socket_gate) was open for the first
    /// piece of the message that this is a part of.
    pub fn send_over_socket(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        piece: &[u8],
        now: Instant,
    ) {
        self.send_fallback(driver, stream.id(), piece, EventState::Open.to_status());
        stream.set_known_to_peer();
        self.on_sent_over_socket(stream, piece.len(), now);
    }
}
