// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the peer learns of the end of a stream, or of one of its directions.

use crate::error::Result;
use crate::proto::session::RunningSession;
use crate::proto::session::driver::{Counted, Driver};
use crate::proto::session::stream::StreamEntry;
use crate::proto::stream_state::{CloseNotice, DataPath};
use crate::proto::stream_table::Role;
use crate::wire::{
    Event, EventState, Message, ProtocolVersion, RESET_STATUS, fallback_header, sync_event,
};

/// So many streams that were dropped unused are told of at once.
const TELL_UNUSED: usize = 1024;
/// And so many may wait for room in the queue.
const MAX_UNUSED: usize = 1 << 16;

/// An event that closes a stream.
pub(super) fn closed(stream_id: u32) -> Event {
    Event { stream_id, offset: 0, status: EventState::Closed.to_status() }
}

impl<D: Driver> RunningSession<D> {
    /// [`push`](Self::push), counted as an event of a stream.
    #[inline]
    pub(super) fn push_counted(&self, driver: &D, event: Event) -> Result<bool> {
        let sent = self.push(driver, event)?;
        if sent {
            driver.record(Counted::EventSent);
        }
        Ok(sent)
    }

    /// Tells a client that does not wait for an answer (version 2), and may want to know what this
    /// side knows, that this side is there.
    pub fn announce_server(&self, driver: &D) {
        if self.role == Role::Server
            && self.negotiated.version == ProtocolVersion::V2
            && self.credit.is_known()
        {
            driver.send_message(&sync_event(self.version_byte()));
        }
    }

    pub(super) fn send_fallback(&self, driver: &D, stream_id: u32, data: &[u8], status: u32) {
        // Fits: the caller sends pieces of bounded length.
        let header = fallback_header(self.version_byte(), stream_id, status, data.len() as u32);
        let mut message = Vec::with_capacity(header.len() + data.len());
        message.extend_from_slice(&header);
        message.extend_from_slice(data);
        driver.record(Counted::FallbackSent);
        driver.send_message(&message);
    }

    /// This side closes a stream: strikes it out, drops what it has not read, and tells the peer.
    pub fn close_stream(&self, driver: &D, stream: &StreamEntry<D>) {
        self.end_stream(driver, stream, |path| self.tell_closed_when_read(driver, stream, path));
    }

    /// As [`close_stream`](Self::close_stream), and what was sent must not be taken for all there
    /// was. A peer that is not of this crate sees a close.
    pub fn reset_stream(&self, driver: &D, stream: &StreamEntry<D>) {
        self.end_stream(driver, stream, |path| {
            if self.peer_knows_extension(driver) {
                self.tell_reset(driver, stream.id(), path);
            } else {
                self.tell_closed(driver, stream.id(), path);
            }
        });
    }

    fn end_stream(&self, driver: &D, stream: &StreamEntry<D>, tell: impl FnOnce(DataPath)) {
        self.on_unread_freed(driver, stream.discard());
        self.on_socket_taken(driver, stream.sending.take_socket_cost());
        let on_close = stream.state().close();
        driver.wake_reader(stream);
        driver.wake_writer(stream);
        if self.streams.borrow_mut().remove(stream.id()).is_none() || self.is_over() {
            return;
        }
        let CloseNotice::Tell(path) = on_close else { return };
        // A stream on which nothing was sent is one that the peer never heard of.
        if !stream.is_known_to_peer() {
            return self.on_unused(driver, stream.id());
        }
        // One that was about to use the socket may still have something in the queue.
        let has_used = stream.sending.has_used_socket();
        let path =
            if has_used || self.orders_paths(driver) { path } else { DataPath::SharedMemory };
        tell(path);
    }

    /// A stream was closed that the peer has never heard of. Its number is a gap that the peer has
    /// to remember, so it is told of many such at once, as far as there is room in the queue.
    fn on_unused(&self, driver: &D, stream_id: u32) {
        if !self.credit.is_known() {
            return;
        }
        let mut unused = self.closes.unused.borrow_mut();
        unused.push(stream_id);
        if unused.len() < TELL_UNUSED {
            return;
        }
        while let Some(&stream_id) = unused.last() {
            match self.push(driver, closed(stream_id)) {
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
    pub fn half_close_stream(&self, driver: &D, stream: &StreamEntry<D>) {
        let on_close = stream.state().half_close();
        self.look_for_extension(driver);
        driver.wake_writer(stream);
        match on_close {
            CloseNotice::Nothing => {}
            CloseNotice::Tell(_) if self.credit.is_known() => self.tell_half_closed(driver, stream),
            // A server that is met in version 2 may say later that it knows of this.
            CloseNotice::Tell(_) => stream.owes_end.set(true),
        }
    }

    pub(super) fn tell_half_closed(&self, driver: &D, stream: &StreamEntry<D>) {
        if self.is_over() {
            return;
        }
        // A stream on which nothing was sent is opened by its end.
        let status = EventState::HalfClosed.to_status();
        let event = Event { stream_id: stream.id(), offset: 0, status };
        let is_by_socket = match stream.state().path() {
            // Behind everything that is in a full queue: the peer drains it before it handles a
            // message.
            DataPath::SharedMemory => matches!(self.push_counted(driver, event), Ok(false)),
            DataPath::Socket => true,
        };
        if is_by_socket {
            driver.flush_queue();
            self.send_fallback(driver, stream.id(), &[], status);
        }
        stream.set_known_to_peer();
    }

    /// The receiving half of a stream's handle is gone, and the other is not: what comes from now
    /// on is dropped on arrival, and the sender gets credit for it.
    pub fn on_reader_dropped(&self, driver: &D, stream: &StreamEntry<D>) {
        driver.wake_reader(stream);
        while let Some(payload) = stream.pop_inbound() {
            self.on_taken(driver, stream, &payload);
        }
        self.on_reader_waits(driver, stream);
    }

    pub(super) fn tell_reset(&self, driver: &D, stream_id: u32, path: DataPath) {
        let event = Event { stream_id, offset: 0, status: RESET_STATUS };
        if path == DataPath::SharedMemory && !matches!(self.push_counted(driver, event), Ok(false))
        {
            return;
        }
        driver.flush_queue();
        self.send_fallback(driver, stream_id, &[], RESET_STATUS);
    }

    pub(super) fn tell_closed(&self, driver: &D, stream_id: u32, path: DataPath) {
        if path == DataPath::SharedMemory {
            if !self.orders_paths(driver) {
                return self.tell_closed_by_queue(driver, stream_id);
            }
            match self.push_counted(driver, closed(stream_id)) {
                // In the second case the session is over.
                Ok(true) | Err(_) => return,
                Ok(false) => {}
            }
        }
        // What is in the queue was sent before, so it must be seen before.
        driver.flush_queue();
        let mut message = Vec::new();
        let close = Message::StreamClose { stream_id };
        close.encode(self.version_byte(), &mut message).expect("a message without paths");
        driver.send_message(&message);
    }
}
