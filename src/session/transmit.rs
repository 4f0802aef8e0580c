// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a session sends: events into the queue, messages over the socket. Nothing here waits.

use std::io;
use std::rc::Rc;

use crate::session::outbox;
use crate::session::state::SessionInner;
use crate::session::stream::{Half, Halves, StreamInner};
use crate::session::wakeup::Doorbell;
use shmipc_core::config::ProtocolVersion;
use shmipc_core::error::Error;
use shmipc_core::proto::stream_state::{CloseNotice, DataPath};
use shmipc_core::proto::stream_table::Role;
use shmipc_core::wire::{Event, EventState, Message, RESET_STATUS, fallback_header, sync_event};

/// How many events are shown to the peer with one store, in the middle of a batch.
const PUBLISH_EVERY: i64 = 8;

/// So many streams that were dropped unused are told of at once.
const TELL_UNUSED: usize = 1024;
/// And so many may wait for room in the queue.
const MAX_UNUSED: usize = 1 << 16;

impl SessionInner {
    /// Puts an event into the queue. `Ok(false)`: the queue is full.
    ///
    /// The first event since the last turn is shown to the peer at once, for latency. Those that
    /// follow it are shown a few at a time, so that the peer works on them while this side makes
    /// more, and the rest at the next turn, which also looks whether the peer must be woken.
    pub(crate) fn send_event(self: &Rc<Self>, event: Event) -> Result<bool, Error> {
        let sent = self.put_event(event)?;
        self.counters.events_sent.add(u64::from(sent));
        Ok(sent)
    }

    /// [`send_event`](Self::send_event) for events that are not the user's.
    #[inline]
    pub(crate) fn put_event(self: &Rc<Self>, event: Event) -> Result<bool, Error> {
        let mut producer = self.channels.producer.borrow_mut();
        match producer.push(event) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                drop(producer);
                return Err(self.broken(error));
            }
        }
        if !self.channels.must_look.replace(true) || producer.unpublished() >= PUBLISH_EVERY {
            producer.publish();
        }
        drop(producer);
        self.activate();
        Ok(true)
    }

    /// Shows the peer every event so far, and wakes it if it sleeps.
    #[inline]
    pub(crate) fn flush_queue(self: &Rc<Self>) {
        if self.channels.must_look.replace(false) && !self.is_over() {
            self.publish_and_ring();
        }
    }

    #[inline(never)]
    fn publish_and_ring(self: &Rc<Self>) {
        self.activity.note_flushed();
        let must_ring = {
            let mut producer = self.channels.producer.borrow_mut();
            if !producer.publish() {
                // It waits for the peer to sleep. The next turn tries again.
                self.channels.must_look.set(true);
            }
            // A peer that looks from time to time is never woken.
            let is_woken = !matches!(self.doorbell(), Doorbell::Polling(_));
            is_woken && (producer.must_ring() || self.doorbell().take_owed())
        };
        if must_ring {
            self.counters.sync_events_sent.add(1);
            self.expect_first_event_taken();
            match self.doorbell() {
                Doorbell::EventFds { theirs, .. } => self.ring_event_fd(theirs),
                _ => self.send_message(&sync_event(self.version_byte())),
            }
        }
    }

    /// Says that this side is there, to a client that does not wait for an answer (version 2) and
    /// may want to know what this side knows.
    pub(crate) fn show_up(self: &Rc<Self>) {
        if self.role == Role::Server
            && self.agreement.version == ProtocolVersion::V2
            && self.credit.is_known()
        {
            self.send_message(&sync_event(self.version_byte()));
        }
    }

    /// Sends a message over the socket, behind all others.
    fn send_message(self: &Rc<Self>, message: &[u8]) {
        if self.outbox().is_overfull() {
            return self.fail(Error::PeerNotReading);
        }
        match self.outbox().send(self.socket(), message) {
            Ok(false) => {}
            Ok(true) => self.poller.spawn(outbox::send_kept(Rc::clone(self))),
            Err(error) if is_gone(&error) => self.note_hung_up(),
            Err(error) => self.fail(Error::os("send to the peer", error)),
        }
    }

    /// Notes that the peer is gone. The next turn ends the session, behind everything that the peer
    /// sent before it went.
    pub(crate) fn note_hung_up(self: &Rc<Self>) {
        self.inbox.is_hung_up.set(true);
        self.activate();
    }

    /// Sends data of a stream over the socket.
    pub(crate) fn send_fallback(self: &Rc<Self>, stream_id: u32, data: &[u8], state: EventState) {
        self.send_fallback_with_status(stream_id, data, state.to_status());
    }

    fn send_fallback_with_status(self: &Rc<Self>, stream_id: u32, data: &[u8], status: u32) {
        // Fits: the caller sends pieces of bounded length.
        let header = fallback_header(self.version_byte(), stream_id, status, data.len() as u32);
        let mut message = Vec::with_capacity(header.len() + data.len());
        message.extend_from_slice(&header);
        message.extend_from_slice(data);
        self.counters.fallback_sent.add(1);
        self.send_message(&message);
    }

    /// This side closes a stream: strikes it out, gives back what it has not read, and tells the
    /// peer. Never waits.
    pub(crate) fn close_stream(self: &Rc<Self>, stream: &StreamInner) {
        self.end_stream(stream, |path| self.tell_closed_when_read(stream, path));
    }

    /// As [`close_stream`](Self::close_stream), and what was sent must not be taken for all there
    /// was. A peer that is not of this crate sees a close.
    pub(crate) fn reset_stream(self: &Rc<Self>, stream: &StreamInner) {
        self.end_stream(stream, |path| {
            if self.peer_knows_extension() {
                self.tell_reset(stream.id(), path);
            } else {
                self.tell_closed(stream.id(), path);
            }
        });
    }

    fn end_stream(self: &Rc<Self>, stream: &StreamInner, tell: impl FnOnce(DataPath)) {
        self.note_unread(stream.discard());
        self.note_socket_taken(stream.sending.take_socket_cost());
        let on_close = stream.life().close();
        self.wake_reader(stream);
        stream.writer.wake();
        if self.streams.borrow_mut().remove(stream.id()).is_none() || self.is_over() {
            return;
        }
        if let CloseNotice::Tell(path) = on_close {
            // A stream on which nothing was sent is one that the peer never heard of.
            if !stream.is_known_to_peer() {
                self.note_unused(stream.id());
            } else {
                // One that was about to use the socket may still have something in the queue.
                let has_used = stream.sending.has_used_socket();
                let path =
                    if has_used || self.orders_paths() { path } else { DataPath::SharedMemory };
                tell(path);
            }
        }
    }

    /// A stream was closed that the peer has never heard of. Its number is a gap that the peer has
    /// to remember, so it is told of many such at once, as far as there is room in the queue.
    fn note_unused(self: &Rc<Self>, stream_id: u32) {
        if !self.credit.is_known() {
            return;
        }
        let mut unused = self.channels.unused.borrow_mut();
        unused.push(stream_id);
        if unused.len() < TELL_UNUSED {
            return;
        }
        while let Some(&stream_id) = unused.last() {
            let status = EventState::Closed.to_status();
            match self.put_event(Event { stream_id, offset: 0, status }) {
                Ok(true) => unused.pop(),
                // Full, or the session is over. The peer remembers more of them than these.
                Ok(false) | Err(_) => {
                    unused.truncate(MAX_UNUSED);
                    return;
                }
            };
        }
    }

    /// This side sends nothing more on a stream, and tells the peer if that understands it.
    pub(crate) fn half_close_stream(self: &Rc<Self>, stream: &StreamInner) {
        let on_close = stream.life().half_close();
        self.look_for_extension();
        stream.writer.wake();
        match on_close {
            CloseNotice::Nothing => {}
            CloseNotice::Tell(_) if self.credit.is_known() => self.tell_half_closed(stream),
            // A server that is met in version 2 may say later that it knows of this.
            CloseNotice::Tell(_) => stream.owes_end.set(true),
        }
    }

    pub(crate) fn tell_half_closed(self: &Rc<Self>, stream: &StreamInner) {
        if self.is_over() {
            return;
        }
        // A stream on which nothing was sent is opened by its end.
        let state = EventState::HalfClosed;
        let id = stream.id();
        match stream.life().path() {
            DataPath::SharedMemory => {
                let event = Event { stream_id: id, offset: 0, status: state.to_status() };
                if matches!(self.send_event(event), Ok(false)) {
                    // The queue is full: behind everything that is in it, since the peer drains it
                    // before it handles a message.
                    self.flush_queue();
                    self.send_fallback(id, &[], state);
                }
            }
            DataPath::Socket => {
                self.flush_queue();
                self.send_fallback(id, &[], state);
            }
        }
        stream.note_known_to_peer();
    }

    /// One half of a stream's handle is gone.
    pub(crate) fn drop_half(self: &Rc<Self>, stream: &StreamInner, half: Half) {
        match (stream.drop_half(half), half) {
            // A task that panics was not done.
            (Halves::None, _) if std::thread::panicking() => self.reset_stream(stream),
            // How the handler ends that is running decides.
            (Halves::None, _) | (_, Half::Write) if self.supervision.ends.is_on() => {
                let known = self.streams.borrow().get(stream.id()).cloned();
                if let Some(known) = known {
                    self.supervision.ends.push(known);
                }
            }
            (Halves::None, _) => self.close_stream(stream),
            (_, Half::Write) if std::thread::panicking() => self.reset_stream(stream),
            (_, Half::Write) => self.half_close_stream(stream),
            // What comes from now on is thrown away on arrival.
            (_, Half::Read) => {
                self.wake_reader(stream);
                self.discard_unread(stream);
                if stream.receiving.wants_reader() {
                    self.tell_reader_waits(stream);
                }
            }
        }
    }

    /// Throws away what nobody will read, and gives the sender credit for it.
    fn discard_unread(self: &Rc<Self>, stream: &StreamInner) {
        while let Some(chain) = { stream.inbound.borrow_mut().pop() } {
            self.note_taken(stream, &chain);
        }
    }

    pub(crate) fn tell_reset(self: &Rc<Self>, stream_id: u32, path: DataPath) {
        let event = Event { stream_id, offset: 0, status: RESET_STATUS };
        if path == DataPath::SharedMemory && !matches!(self.send_event(event), Ok(false)) {
            return;
        }
        self.flush_queue();
        self.send_fallback_with_status(stream_id, &[], RESET_STATUS);
    }

    pub(crate) fn tell_closed(self: &Rc<Self>, stream_id: u32, path: DataPath) {
        if path == DataPath::SharedMemory && !self.orders_paths() {
            return self.tell_closed_by_queue(stream_id);
        }
        if path == DataPath::SharedMemory {
            let status = EventState::Closed.to_status();
            match self.send_event(Event { stream_id, offset: 0, status }) {
                Ok(true) => return,
                Ok(false) => {}
                // The session is over.
                Err(_) => return,
            }
        }
        // What is in the queue was sent before, so it must be seen before.
        self.flush_queue();
        let mut message = Vec::new();
        let close = Message::StreamClose { stream_id };
        close.encode(self.version_byte(), &mut message).expect("a message without paths");
        self.send_message(&message);
    }
}

pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
