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

use std::io;
use std::rc::Rc;
use std::task::Poll;

use futures_lite::future::yield_now;

use crate::net::socket::Received;
use crate::session::state::SessionInner;
use crate::session::stream::StreamInner;
use shmipc_core::error::{Error, HandshakeError, MemoryError};
use shmipc_core::proto::stream_state::{DataPath, StreamState};
use shmipc_core::shm::chain::Chain;
use shmipc_core::wire::{Deframer, Event, EventState, Header, Message, is_reset};

/// The most receives in a row from one socket.
const RECEIVES_PER_TURN: usize = 16;
/// The most receives from a socket whose peer is gone.
const RECEIVES_WHEN_HUNG_UP: usize = 1 << 12;
/// How many closes may wait for the socket, beyond one for each stream that can be open.
const SPARE_CLOSES: usize = 1 << 16;

impl SessionInner {
    #[inline]
    pub(crate) fn handle_event(self: &Rc<Self>, event: Event) -> Result<(), MemoryError> {
        match event.state() {
            EventState::Open => self.receive_slices(event)?,
            EventState::Closed if event.is_reset() && self.peer_knows_extension() => {
                self.peer_reset(event.stream_id);
            }
            EventState::Closed => {
                let closing = &self.inbox.closing;
                // Each stream closes once, and the list is empty whenever the socket is.
                if closing.len() > self.config.settings().limits.streams + SPARE_CLOSES {
                    return Err(MemoryError::Field {
                        what: "number of closed streams",
                        value: closing.len() as u64,
                        problem: "more than can have been open",
                    });
                }
                closing.push(event.stream_id);
            }
            EventState::HalfClosed => {
                // No slice starts at offset 0: an end without data.
                if event.offset != 0 {
                    self.receive_slices(event)?;
                }
                // Only a peer of this crate ends one direction, and then nothing of it is still in
                // the socket.
                self.peer_half_closed(event.stream_id);
            }
            EventState::Credit => {
                // It may be the first that is heard of the peer.
                self.look_for_extension();
                if !self.credit.is_known() {
                    return Err(MemoryError::Field {
                        what: "stream state of an event",
                        value: u64::from(event.status),
                        problem: "the peer has not said that it knows of credit",
                    });
                }
                self.take_credit(event);
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
    fn receive_slices(self: &Rc<Self>, event: Event) -> Result<(), MemoryError> {
        let chain = self.adopt(event.offset)?;
        self.deliver(event.stream_id, chain);
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn adopt(&self, offset: u32) -> Result<Chain, MemoryError> {
        let chain = self.channels.manager.adopt(offset)?;
        self.activity.note_received();
        self.counters.bytes_received.add(chain.len() as u64);
        Ok(chain)
    }

    /// Hands data to its stream. What nobody wants goes back where it came from.
    #[inline]
    fn deliver(self: &Rc<Self>, id: u32, data: Chain) {
        let known = self.streams.borrow().get(id).cloned();
        match known {
            Some(stream) => self.hand_over(&stream, data),
            None => self.deliver_first(id, data),
        }
    }

    /// Hands data to a stream that is not in the table, if the peer opens it now.
    #[inline(never)]
    fn deliver_first(self: &Rc<Self>, id: u32, data: Chain) {
        match self.open_for_peer(id) {
            Some(stream) => {
                self.hand_over(&stream, data);
                self.put_before_acceptors(stream);
            }
            None => self.note_unread(data.socket_cost()),
        }
    }

    /// Enters a stream that is not in the table, if the peer opens it now and there is room.
    fn open_for_peer(self: &Rc<Self>, id: u32) -> Option<Rc<StreamInner>> {
        if !self.streams.borrow().is_new(id) {
            if self.streams.borrow().is_forgotten(id) {
                self.refuse_forgotten(id);
            }
            return None;
        }
        let is_over = self.accepts.is_over.get();
        if is_over || self.streams.borrow().is_full() {
            self.streams.borrow_mut().note_used(id);
            let why = if is_over { "no more are taken" } else { "too many" };
            tracing::debug!(stream = id, why, "stream refused");
            self.tell_refused(id);
            return None;
        }
        let stream = Rc::new(StreamInner::new(id, &self.channels.manager));
        self.streams.borrow_mut().insert(id, Rc::clone(&stream));
        Some(stream)
    }

    /// The peer asks whether a reader waits on a stream that is not in the table, and may open it
    /// this way: it has no message yet that it can send without a reader.
    #[cold]
    pub(crate) fn open_by_asking(self: &Rc<Self>, id: u32) {
        if let Some(stream) = self.open_for_peer(id) {
            stream.note_known_to_peer();
            stream.receiving.set_wants_reader(true);
            self.put_before_acceptors(stream);
        }
    }

    /// The peer may wait for an answer on a stream that it has used so late that it cannot be told
    /// from one that was closed long ago.
    #[cold]
    fn refuse_forgotten(self: &Rc<Self>, id: u32) {
        tracing::debug!(stream = id, why = "used too late", "stream refused");
        self.tell_refused(id);
    }

    /// That nobody takes a stream must not look as if there were an answer, and it had no bytes.
    #[cold]
    fn tell_refused(self: &Rc<Self>, id: u32) {
        if self.peer_knows_extension() {
            self.tell_reset(id, DataPath::SharedMemory);
        } else {
            self.tell_closed(id, DataPath::SharedMemory);
        }
    }

    fn put_before_acceptors(&self, stream: Rc<StreamInner>) {
        self.accepts.ready.borrow_mut().push_back(stream);
        self.accepts.waiting.wake_all();
    }

    #[inline]
    fn hand_over(self: &Rc<Self>, stream: &StreamInner, data: Chain) {
        self.note_come(stream, &data);
        if !stream.has_reader() {
            stream.note_known_to_peer();
            stream.note_answered();
            return self.note_taken(stream, &data);
        }
        stream.receive(data);
        self.wake_reader(stream);
    }

    #[inline]
    pub(crate) fn wake_reader(&self, stream: &StreamInner) {
        let woken = u32::from(stream.reader.wake());
        self.activity.waiting_readers.set(self.activity.waiting_readers.get() - woken);
    }

    /// Notes that bytes which came over the socket were read, or thrown away.
    #[inline]
    pub(crate) fn note_unread(&self, read: usize) {
        if read > 0 {
            self.note_some_unread(read);
        }
    }

    #[cold]
    fn note_some_unread(&self, read: usize) {
        self.inbox.unread_bytes.set(self.inbox.unread_bytes.get().saturating_sub(read));
        self.inbox.paused.wake_all();
    }

    pub(crate) fn has_too_much_unread(&self) -> bool {
        self.inbox.unread_bytes.get() >= self.config.settings().limits.unread_fallback_bytes
    }

    /// Closes the streams whose close came by the queue, once the socket has nothing more for them.
    pub(crate) fn finish_closing(self: &Rc<Self>) {
        // Those that are found while the socket is read came after it was looked at.
        let mut left = self.inbox.closing.len();
        if left > 0 && (self.receive_messages() || self.is_over()) {
            self.inbox.closing.sweep(|&mut id| {
                let is_later = left == 0;
                if !is_later {
                    left -= 1;
                    self.peer_closed(id);
                }
                is_later
            });
        }
    }

    fn peer_closed(&self, id: u32) {
        self.peer_ended(id, StreamState::peer_closed);
    }

    /// The peer ended a stream as a failure. Unlike a close, this need not wait for what may still
    /// be in the socket: that is read before the failure when it comes in time, and else is lost.
    #[cold]
    fn peer_reset(&self, id: u32) {
        self.peer_ended(id, StreamState::peer_reset);
    }

    fn peer_ended(&self, id: u32, how: fn(&StreamState)) {
        let stream = self.streams.borrow().get(id).cloned();
        match stream {
            Some(stream) => {
                self.note_socket_taken(stream.sending.take_socket_cost());
                how(stream.life());
                self.wake_reader(&stream);
                stream.writer.wake();
            }
            None => {
                self.note_closed_by_both(id);
                self.streams.borrow_mut().note_closed(id, self.credit.is_known());
            }
        }
    }

    /// The peer sends nothing more on a stream, which may be one that it opens this way.
    fn peer_half_closed(self: &Rc<Self>, id: u32) {
        self.look_for_extension();
        let known = self.streams.borrow().get(id).cloned();
        match known {
            Some(stream) => {
                stream.life().peer_half_closed();
                self.wake_reader(&stream);
            }
            // Only a peer of this crate opens a stream to say that nothing comes on it.
            None => {
                if self.credit.is_known()
                    && let Some(stream) = self.open_for_peer(id)
                {
                    stream.note_known_to_peer();
                    stream.life().peer_half_closed();
                    self.put_before_acceptors(stream);
                }
            }
        }
    }

    /// Reads messages from the socket and handles them. Whether nothing more is there, and no
    /// message is half there.
    fn receive_messages(self: &Rc<Self>) -> bool {
        for _ in 0..RECEIVES_PER_TURN {
            if self.is_over() || self.has_too_much_unread() {
                return false;
            }
            match self.receive_once() {
                // Less than there was room for is all that there was.
                Ok(Received::Bytes(room)) if room > 0 => {
                    return self.inbox.deframer.borrow().is_empty();
                }
                Ok(Received::Bytes(_)) => {}
                Ok(Received::Nothing) => return self.inbox.deframer.borrow().is_empty(),
                Ok(Received::Descriptors(got)) => {
                    self.fail(HandshakeError::Descriptors { got, expected: 0 }.into());
                    return false;
                }
                Ok(Received::End) => {
                    self.peer_is_gone();
                    return true;
                }
                Err(error) => {
                    self.fail(error);
                    return false;
                }
            }
        }
        false
    }

    /// Receives once. `Bytes` tells how much room was left.
    fn receive_once(self: &Rc<Self>) -> Result<Received, Error> {
        let received = {
            let mut deframer = self.inbox.deframer.borrow_mut();
            let hint = deframer.receive_hint();
            let space = deframer.space(hint);
            let room = space.len();
            match self.socket().try_receive(space) {
                Ok(Received::Bytes(count)) => {
                    deframer.commit(count);
                    Received::Bytes(room - count)
                }
                Ok(other) => other,
                // A peer that died with our bytes unread is gone like any other.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Received::End,
                Err(error) => return Err(Error::os("receive from the peer", error)),
            }
        };
        loop {
            let message = self.inbox.deframer.borrow_mut().next_message()?;
            let Some((header, message)) = message else {
                return Ok(received);
            };
            self.handle_message(&header, message)?;
        }
    }

    fn handle_message(self: &Rc<Self>, header: &Header, message: Message) -> Result<(), Error> {
        if header.version != self.version_byte() {
            return Err(HandshakeError::VersionChanged {
                message: header.message.name(),
                got: header.version,
                agreed: self.version_byte(),
            }
            .into());
        }
        match message {
            Message::SyncEvent => {
                self.counters.sync_events_received.add(1);
                self.look_for_extension();
                self.activate();
            }
            Message::FallbackData { stream_id, status, data } => {
                self.drain_all();
                self.receive_fallback(stream_id, status, data)?;
            }
            Message::StreamClose { stream_id } => {
                self.drain_all();
                self.peer_closed(stream_id);
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

    fn receive_fallback(
        self: &Rc<Self>,
        stream_id: u32,
        status: u32,
        data: bytes::Bytes,
    ) -> Result<(), Error> {
        self.counters.fallback_received.add(1);
        self.look_for_extension();
        match EventState::from_status(status) {
            EventState::Closed if is_reset(status) && self.credit.is_known() => {
                self.peer_reset(stream_id);
            }
            EventState::Closed => self.peer_closed(stream_id),
            EventState::Open | EventState::HalfClosed => {
                if !data.is_empty() {
                    let held = Deframer::held_by(data.len());
                    let data = Chain::received(Rc::clone(&self.channels.manager), data, held);
                    let unread = &self.inbox.unread_bytes;
                    unread.set(unread.get() + data.socket_cost());
                    self.deliver(stream_id, data);
                    if let Some(stream) = self.streams.borrow().get(stream_id) {
                        stream.note_come_by_socket();
                    }
                }
                if EventState::from_status(status) == EventState::HalfClosed {
                    self.peer_half_closed(stream_id);
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

    /// The peer is gone, which somebody else found out than the reader. Takes what it sent before,
    /// also beyond what may wait unread: there is no more of it than the socket holds.
    pub(crate) fn hang_up(self: &Rc<Self>) {
        for _ in 0..RECEIVES_WHEN_HUNG_UP {
            match self.receive_once() {
                Ok(Received::Bytes(_)) => {}
                // Nor is there anything behind descriptors that was worth being delivered.
                Ok(Received::Nothing | Received::End | Received::Descriptors(_)) => break,
                Err(error) => return self.fail(error),
            }
        }
        self.peer_is_gone();
    }

    /// The socket has ended. What the peer published before is still delivered.
    pub(crate) fn peer_is_gone(self: &Rc<Self>) {
        self.drain_all();
        self.inbox.closing.drain(|id| self.peer_closed(id));
        self.fail(Error::PeerClosed);
    }
}

/// Handles what comes over the socket for as long as the session lives.
pub(crate) async fn read_socket(session: Rc<SessionInner>) {
    while !session.is_over() {
        let may_read = || match session.is_over() || !session.has_too_much_unread() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        session.inbox.paused.until(may_read).await;
        // Also after a pause: what came with the last of it is not announced again.
        if session.receive_messages() {
            session.finish_closing();
        }
        // A peer that never stops sending must not keep the core.
        yield_now().await;
        if session.is_over() || session.has_too_much_unread() {
            continue;
        }
        if let Err(error) = session.socket().readable().await {
            session.fail(error);
        }
    }
}
