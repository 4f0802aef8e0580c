// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session does when something arrives.
//!
//! # Order between the two paths
//!
//! Data of a stream can come by the queue and, once the peer's pool has run empty, over the socket.
//! Neither path knows of the other, so the order is made here:
//!
//! - What comes over the socket was sent after every event that was published before it. So the
//!   queue is drained before a FallbackData or StreamClose is handled.
//! - A close that comes by the queue may overtake data in the socket: shmipc-go closes that way
//!   even when its last data went over the socket. So such a close counts only when the socket has
//!   nothing more to give.

use std::rc::Rc;

use bytes::Bytes;

use crate::error::{Error, HandshakeError, MemoryError, Result};
use crate::proto::session::RunningSession;
use crate::proto::session::driver::{Counted, Driver, Payload, SharedStream};
use crate::proto::session::stream::StreamEntry;
use crate::proto::stream_state::{DataPath, StreamState};
use crate::wire::{Event, EventState, Header, Message, is_reset};

/// How many closes may wait for the socket, beyond one for each stream that can be open.
const SPARE_CLOSES: usize = 1 << 16;

impl<D: Driver> RunningSession<D> {
    /// An event came by the queue.
    ///
    /// # Errors
    ///
    /// It breaks the protocol; the session is to [end](Self::fail) by it.
    #[inline]
    pub fn on_event(&self, driver: &D, event: Event) -> Result<(), MemoryError> {
        if event.state() == EventState::Open {
            self.on_slices(driver, event)
        } else {
            self.on_control_event(driver, event)
        }
    }

    /// An event came that is the next thing that the reader of this stream waits for. Returns the
    /// message without a detour through the stream's queue, if it is one of this stream.
    ///
    /// # Errors
    ///
    /// As [`on_event`](Self::on_event).
    #[inline]
    pub fn on_event_for(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        event: Event,
    ) -> Result<Option<D::Payload>, MemoryError> {
        let is_next = event.stream_id == stream.id()
            && event.state() == EventState::Open
            && !stream.has_news();
        if !is_next {
            self.on_event(driver, event)?;
            return Ok(None);
        }
        let payload = driver.adopt(event.offset)?;
        self.on_arrival(driver, stream, &payload);
        stream.on_received();
        Ok(Some(payload).filter(|payload| !payload.is_empty()))
    }

    #[inline(never)]
    fn on_control_event(&self, driver: &D, event: Event) -> Result<(), MemoryError> {
        match event.state() {
            EventState::Open => self.on_slices(driver, event)?,
            EventState::Closed if event.is_reset() && self.peer_knows_extension(driver) => {
                self.on_peer_reset(driver, event.stream_id);
            }
            EventState::Closed => {
                let mut closes = self.closes.from_queue.borrow_mut();
                // Each stream closes once, and the list is empty whenever the socket is.
                if closes.len() > self.limits.streams + SPARE_CLOSES {
                    return Err(MemoryError::Field {
                        what: "number of closed streams",
                        value: closes.len() as u64,
                        problem: "more than can have been open",
                    });
                }
                closes.push_back(event.stream_id);
            }
            EventState::HalfClosed => {
                // No slice starts at offset 0: an end without data.
                if event.offset != 0 {
                    self.on_slices(driver, event)?;
                }
                // Only a peer of this crate ends one direction, and then nothing of it is still in
                // the socket.
                self.on_peer_half_closed(driver, event.stream_id);
            }
            EventState::Credit => {
                // It may be the first that is heard of the peer.
                self.look_for_extension(driver);
                if !self.credit.is_known() {
                    return Err(MemoryError::Field {
                        what: "stream state of an event",
                        value: u64::from(event.status),
                        problem: "the peer has not said that it knows of credit",
                    });
                }
                self.on_credit(driver, event);
            }
            EventState::Unknown(state) => {
                return Err(MemoryError::Field {
                    what: "stream state of an event",
                    value: u64::from(state),
                    problem: "expected open, closed or half-closed",
                });
            }
        }
        Ok(())
    }

    #[inline]
    fn on_slices(&self, driver: &D, event: Event) -> Result<(), MemoryError> {
        let payload = driver.adopt(event.offset)?;
        self.on_payload(driver, event.stream_id, payload);
        Ok(())
    }

    /// Hands data to its stream. Data of a stream that is closed is dropped, which gives its slices
    /// back.
    #[inline]
    fn on_payload(&self, driver: &D, id: u32, data: D::Payload) {
        match self.stream(id) {
            Some(stream) => self.hand_over(driver, &stream, data),
            None => self.on_first_payload(driver, id, data),
        }
    }

    /// Hands data to a stream that is not in the table, if the peer opens it now.
    #[inline(never)]
    fn on_first_payload(&self, driver: &D, id: u32, data: D::Payload) {
        match self.open_for_peer(driver, id) {
            Some(stream) => {
                self.hand_over(driver, &stream, data);
                self.offer_to_acceptors(driver, stream);
            }
            None => self.on_unread_freed(driver, data.socket_cost()),
        }
    }

    /// Enters a stream that is not in the table, if the peer opens it now and there is room.
    fn open_for_peer(&self, driver: &D, id: u32) -> Option<SharedStream<D>> {
        if !self.streams.borrow().is_new(id) {
            if self.streams.borrow().is_forgotten(id) {
                self.refuse_forgotten(driver, id);
            }
            return None;
        }
        let is_closed = self.accepts.is_closed.get();
        if is_closed || self.streams.borrow().is_full() {
            self.streams.borrow_mut().note_used(id);
            let why = if is_closed { "no more are taken" } else { "too many" };
            tracing::debug!(stream = id, why, "stream refused");
            self.tell_refused(driver, id);
            return None;
        }
        let stream = Rc::new(StreamEntry::new(id, driver.new_inbound()));
        self.streams.borrow_mut().insert(id, Rc::clone(&stream));
        Some(stream)
    }

    /// The peer asks whether a reader waits on a stream that is not in the table, and may open it
    /// this way: it has no message yet that it can send without a reader.
    #[cold]
    pub(super) fn open_by_asking(&self, driver: &D, id: u32) {
        if let Some(stream) = self.open_for_peer(driver, id) {
            stream.set_known_to_peer();
            stream.receiving.set_wants_reader(true);
            self.offer_to_acceptors(driver, stream);
        }
    }

    /// The peer may wait for an answer on a stream that it has used so late that it cannot be told
    /// from one that was closed long ago.
    #[cold]
    fn refuse_forgotten(&self, driver: &D, id: u32) {
        tracing::debug!(stream = id, why = "used too late", "stream refused");
        self.tell_refused(driver, id);
    }

    /// A refused stream must not look as if there were an answer, and it had no bytes.
    #[cold]
    fn tell_refused(&self, driver: &D, id: u32) {
        if self.peer_knows_extension(driver) {
            self.tell_reset(driver, id, DataPath::SharedMemory);
        } else {
            self.tell_closed(driver, id, DataPath::SharedMemory);
        }
    }

    fn offer_to_acceptors(&self, driver: &D, stream: SharedStream<D>) {
        self.accepts.ready.borrow_mut().push_back(stream);
        driver.wake_acceptors();
    }

    #[inline]
    fn hand_over(&self, driver: &D, stream: &StreamEntry<D>, data: D::Payload) {
        self.on_arrival(driver, stream, &data);
        if !stream.has_reader() {
            stream.set_known_to_peer();
            stream.on_answer();
            return self.on_taken(driver, stream, &data);
        }
        stream.receive(data);
        driver.wake_reader(stream);
    }

    /// Messages that came over the socket, and cost so much, were read or dropped.
    #[inline]
    pub fn on_unread_freed(&self, driver: &D, cost: usize) {
        if cost > 0 {
            self.free_unread(driver, cost);
        }
    }

    #[cold]
    fn free_unread(&self, driver: &D, cost: usize) {
        self.unread_bytes.set(self.unread_bytes.get().saturating_sub(cost));
        driver.resume_socket_reader();
    }

    /// How many closes came by the queue and wait until the socket has nothing more for their
    /// streams.
    #[inline]
    pub fn waiting_closes(&self) -> usize {
        self.closes.from_queue.borrow().len()
    }

    /// Whether closes wait for the socket.
    #[inline]
    pub fn has_waiting_closes(&self) -> bool {
        self.waiting_closes() > 0
    }

    /// The socket was read to its end, or is gone, and these first [closes](Self::waiting_closes)
    /// had come before that.
    pub fn on_socket_read(&self, driver: &D, closes: usize) {
        for _ in 0..closes {
            let next = self.closes.from_queue.borrow_mut().pop_front();
            let Some(id) = next else { break };
            self.on_peer_closed(driver, id);
        }
    }

    fn on_peer_closed(&self, driver: &D, id: u32) {
        self.on_peer_ended(driver, id, StreamState::peer_closed);
    }

    /// The peer ended a stream as a failure. Unlike a close, this need not wait for what may still
    /// be in the socket: that is read before the failure when it comes in time, and else is lost.
    #[cold]
    fn on_peer_reset(&self, driver: &D, id: u32) {
        self.on_peer_ended(driver, id, StreamState::peer_reset);
    }

    fn on_peer_ended(&self, driver: &D, id: u32, how: fn(&StreamState)) {
        match self.stream(id) {
            Some(stream) => {
                self.on_socket_taken(driver, stream.sending.take_socket_cost());
                how(stream.state());
                driver.wake_reader(&stream);
                driver.wake_writer(&stream);
            }
            None => {
                self.on_closed_by_both(id);
                self.streams.borrow_mut().note_closed(id, self.credit.is_known());
            }
        }
    }

    /// The peer sends nothing more on a stream, which may be one that it opens this way.
    fn on_peer_half_closed(&self, driver: &D, id: u32) {
        self.look_for_extension(driver);
        match self.stream(id) {
            Some(stream) => {
                stream.state().peer_half_closed();
                driver.wake_reader(&stream);
            }
            // Only a peer of this crate opens a stream to say that nothing comes on it.
            None if self.credit.is_known() => {
                if let Some(stream) = self.open_for_peer(driver, id) {
                    stream.set_known_to_peer();
                    stream.state().peer_half_closed();
                    self.offer_to_acceptors(driver, stream);
                }
            }
            None => {}
        }
    }

    /// A message came over the socket.
    ///
    /// # Errors
    ///
    /// It breaks the protocol; the session is to [end](Self::fail) by it.
    pub fn on_message(&self, driver: &D, header: &Header, message: Message) -> Result<()> {
        if header.version != self.version_byte() {
            return Err(HandshakeError::VersionChanged {
                message: header.message.name(),
                got: header.version,
                agreed: self.version_byte(),
            }
            .into());
        }
        match message {
            Message::SyncEvent => self.on_wakeup(driver),
            Message::FallbackData { stream_id, status, data } => {
                driver.drain_queue();
                self.on_fallback_data(driver, stream_id, status, data)?;
            }
            Message::StreamClose { stream_id } => {
                driver.drain_queue();
                self.on_peer_closed(driver, stream_id);
            }
            Message::HotRestart { epoch } | Message::HotRestartAck { epoch } => {
                // A server that restarts and is not answered goes on serving after two seconds
                // (`docs/protocol.md#hot-restart`).
                tracing::debug!(epoch, "hot restart is not taken part in");
            }
            _ => {
                return Err(HandshakeError::Unexpected {
                    got: header.message.name(),
                    expected: "a message of a running session",
                }
                .into());
            }
        }
        Ok(())
    }

    /// The peer woke this side, by a SyncEvent or another way.
    pub fn on_wakeup(&self, driver: &D) {
        driver.record(Counted::SyncEventReceived);
        self.look_for_extension(driver);
        driver.activate();
    }

    fn on_fallback_data(&self, driver: &D, stream_id: u32, status: u32, data: Bytes) -> Result<()> {
        driver.record(Counted::FallbackReceived);
        self.look_for_extension(driver);
        match EventState::from_status(status) {
            EventState::Closed if is_reset(status) && self.credit.is_known() => {
                self.on_peer_reset(driver, stream_id);
            }
            EventState::Closed => self.on_peer_closed(driver, stream_id),
            state @ (EventState::Open | EventState::HalfClosed) => {
                if !data.is_empty() {
                    let data = driver.received(data);
                    self.unread_bytes.set(self.unread_bytes.get() + data.socket_cost());
                    self.on_payload(driver, stream_id, data);
                    if let Some(stream) = self.stream(stream_id) {
                        stream.on_socket_used_by_peer();
                    }
                }
                if state == EventState::HalfClosed {
                    self.on_peer_half_closed(driver, stream_id);
                }
            }
            EventState::Credit | EventState::Unknown(_) => {
                return Err(MemoryError::Field {
                    what: "stream state of FallbackData",
                    value: u64::from(status & 0xff),
                    problem: "expected open, closed or half-closed",
                }
                .into());
            }
        }
        Ok(())
    }

    /// The socket has ended. What the peer published before is still delivered.
    pub fn on_peer_gone(&self, driver: &D) {
        driver.drain_queue();
        self.on_socket_read(driver, self.waiting_closes());
        self.fail(driver, Error::PeerClosed);
    }
}
