// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session does when something arrives, and how it sends.
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
use std::time::Instant;

use futures_lite::future::{poll_fn, yield_now};

use super::session::SessionInner;
use super::socket::Received;
use super::stream::StreamInner;
use crate::config::Spin;
use crate::error::{Error, HandshakeError, MemoryError};
use crate::proto::stream::Path;
use crate::shm::chain::Chain;
use crate::wire::{Event, EventState, Header, Message};

/// The most events that one turn takes before the other sessions get theirs.
const EVENTS_PER_TURN: usize = 256;
/// How many events a task takes at once that looks at the queue itself.
const EVENTS_IN_PLACE: usize = 16;
/// After so many events in one go, the queue is looked at again in the same turn.
const WORTH_LOOKING_AGAIN: usize = 16;
/// How many events ahead a slice is brought near.
const LOOK_AHEAD: u32 = 2;
/// How often a task looks at the queue itself before it sleeps: a microsecond or so, within which a
/// peer answers that is at it, even if its own task has to go over its poller.
const IN_PLACE_LOOKS: usize = 250;
/// How many waits are not made in place after some that were in vain.
const IN_PLACE_SKIPS: u32 = 63;
/// What a session's tasks may spend in a row without the poller's turn: less than 50 us, so that
/// other tasks are not kept waiting for longer.
const IN_PLACE_CREDIT: usize = 128;
/// What a message costs of it: itself, and one more for so many bytes.
const IN_PLACE_COST: usize = 1;
const IN_PLACE_BYTES: usize = 8 << 10;
/// The most receives in a row from one socket.
const RECEIVES_PER_TURN: usize = 16;

/// What a session does next with its place among the active ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stay {
    /// It had traffic in this turn.
    Moving,
    /// It had traffic within its spin budget.
    Busy,
    /// Tasks wait for the peer, which tells nobody when it makes room.
    Waiting,
    /// It sleeps until the socket wakes it.
    Asleep,
}

impl SessionInner {
    /// One turn of the poller.
    pub(super) fn turn(self: &Rc<Self>, now: Instant) -> Stay {
        let spins = self.config.spin != Spin::Never;
        self.activity.in_place.credit.set(if spins { IN_PLACE_CREDIT } else { 0 });
        let moved = match self.drain(EVENTS_PER_TURN) {
            Ok(0) => false,
            Ok(count) => {
                self.activity.last_batch.set(count);
                true
            }
            Err(error) => {
                self.fail(error.into());
                false
            }
        };
        if !moved {
            // The peer needs its slots back only when the queue is half full, which `pop` sees to;
            // to write the line that it publishes on more often than that would only slow it down.
            self.lanes.consumer.borrow_mut().publish();
        }
        self.finish_closing();
        self.wake_waiting(now);
        let sent = self.lanes.must_look.get();
        self.flush_queue();
        let stay = self.stay(now, moved || sent);
        // Last, since slices go back when the session comes to rest, too.
        match self.lanes.manager.take_broken() {
            None => stay,
            Some(error) => {
                self.fail(error.into());
                Stay::Asleep
            }
        }
    }

    fn stay(&self, now: Instant, had_traffic: bool) -> Stay {
        if self.is_over() {
            return Stay::Asleep;
        }
        let spins = match self.config.spin {
            Spin::Never => had_traffic,
            Spin::For(budget) => had_traffic || !self.activity.is_idle_for(budget, now),
            Spin::Forever => true,
        };
        if had_traffic {
            self.activity.idle_turns.set(0);
        }
        if spins {
            return if had_traffic { Stay::Moving } else { Stay::Busy };
        }
        if !self.lanes.queue_waiting.is_empty() || !self.lanes.pool_waiting.is_empty() {
            return Stay::Waiting;
        }
        let result = self.lanes.consumer.borrow_mut().try_sleep();
        match result {
            Ok(true) => {
                self.activity.in_place.credit.set(0);
                self.lanes.manager.set_resting(true);
                self.counters.sleeps.add(1);
                Stay::Asleep
            }
            Ok(false) => Stay::Busy,
            Err(error) => {
                self.fail(error.into());
                Stay::Asleep
            }
        }
    }

    /// Takes up to `limit` events from the queue. Gives how many there were.
    #[inline]
    fn drain(self: &Rc<Self>, limit: usize) -> Result<usize, MemoryError> {
        let mut taken = 0;
        while taken < limit && !self.is_over() {
            let available = self.lanes.consumer.borrow_mut().available()? as usize;
            let count = available.min(limit - taken);
            for _ in 0..count {
                let (event, ahead) = {
                    let mut consumer = self.lanes.consumer.borrow_mut();
                    (consumer.pop(), consumer.offset_ahead(LOOK_AHEAD))
                };
                if let Some(offset) = ahead {
                    self.lanes.manager.prefetch(offset);
                }
                if let Some(event) = event {
                    self.handle_event(event)?;
                }
            }
            taken += count;
            // What came while these were handled waits for the next turn, unless it is much.
            if count < WORTH_LOOKING_AGAIN {
                break;
            }
        }
        self.counters.events_received.add(taken as u64);
        Ok(taken)
    }

    /// Whether the peer has published events that nobody took yet.
    #[inline]
    pub(super) fn has_events(&self) -> bool {
        // What is wrong with the queue is found, and named, when it is drained.
        self.lanes.consumer.borrow_mut().has_events().unwrap_or(true)
    }

    /// Waits a moment for data of a stream that the calling task would otherwise sleep for, and
    /// drains the queue itself. Gives the stream's next chain when that is what came; everything
    /// else goes its way, behind it.
    ///
    /// The way over the poller and back costs more than a peer that is at it takes to answer. It
    /// is taken all the same when other streams wait too, since their tasks could run meanwhile;
    /// when the [credit](IN_PLACE_CREDIT) is spent, since a task that never sleeps lets no other
    /// run; and for a while after waits in vain.
    pub(super) fn wait_in_place(self: &Rc<Self>, stream: &StreamInner) -> Option<Chain> {
        let activity = &self.activity;
        let in_place = &activity.in_place;
        if in_place.credit.get() == 0
            || activity.waiting_readers.get() > 0
            || activity.last_batch.get() > 1
        {
            return None;
        }
        let skips = in_place.skips.get();
        if skips > 0 {
            in_place.skips.set(skips - 1);
            return None;
        }
        self.flush_queue();
        for _ in 0..IN_PLACE_LOOKS {
            // Without a pause: it would take longer than the look, and this ends soon.
            if !self.has_events() {
                continue;
            }
            let chain = match self.drain_in_place(stream) {
                Ok(chain) => chain,
                Err(error) => {
                    self.fail(error.into());
                    return None;
                }
            };
            if chain.is_some() || stream.has_news() {
                let len = chain.as_ref().map_or(0, Chain::len);
                let cost = IN_PLACE_COST + len / IN_PLACE_BYTES;
                in_place.credit.set(in_place.credit.get().saturating_sub(cost));
                in_place.penalty.set(0);
                return chain;
            }
        }
        let penalty = (in_place.penalty.get() * 2 + 1).min(IN_PLACE_SKIPS);
        in_place.penalty.set(penalty);
        in_place.skips.set(penalty);
        None
    }

    /// Takes the events that are there, and gives the first chain if it is one of this stream.
    #[inline]
    fn drain_in_place(
        self: &Rc<Self>,
        stream: &StreamInner,
    ) -> Result<Option<Chain>, MemoryError> {
        let available = self.lanes.consumer.borrow_mut().available()? as usize;
        let count = available.min(EVENTS_IN_PLACE);
        let mut chain = None;
        for index in 0..count {
            let event = self.lanes.consumer.borrow_mut().pop();
            let Some(event) = event else { break };
            let is_next = index == 0
                && event.stream_id == stream.id()
                && event.state() == EventState::Open
                && !stream.has_news();
            if is_next {
                chain = Some(self.adopt(event.offset)?).filter(|chain| chain.len() > 0);
                stream.note_known_to_peer();
            } else {
                self.handle_event(event)?;
            }
        }
        self.activity.last_batch.set(count);
        self.counters.events_received.add(count as u64);
        Ok(chain)
    }

    /// Takes every event that was published before now.
    fn drain_all(self: &Rc<Self>) {
        // A peer that goes on publishing meanwhile cannot hold us: there were at most that many.
        let limit = self.lanes.consumer.borrow().capacity();
        if let Err(error) = self.drain(limit as usize) {
            self.fail(error.into());
        }
    }

    #[inline]
    fn handle_event(self: &Rc<Self>, event: Event) -> Result<(), MemoryError> {
        match event.state() {
            EventState::Open => self.receive_slices(event)?,
            EventState::Closed => self.inbox.closing.borrow_mut().push(event.stream_id),
            EventState::HalfClosed => {
                // No slice starts at offset 0: an end without data.
                if event.offset != 0 {
                    self.receive_slices(event)?;
                }
                self.inbox.closing.borrow_mut().push(event.stream_id);
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
    fn adopt(&self, offset: u32) -> Result<Chain, MemoryError> {
        let chain = self.lanes.manager.adopt(offset)?;
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
        if !self.streams.borrow().is_new(id) {
            return;
        }
        if self.streams.borrow().is_full() {
            self.streams.borrow_mut().note_used(id);
            tracing::debug!(stream = id, "refused: too many streams");
            return self.tell_closed(id, Path::SharedMemory);
        }
        let stream = Rc::new(StreamInner::new(id, &self.lanes.manager));
        self.streams.borrow_mut().insert(id, Rc::clone(&stream));
        self.hand_over(&stream, data);
        self.accepts.ready.borrow_mut().push_back(stream);
        self.accepts.waiting.wake_all();
    }

    #[inline]
    fn hand_over(&self, stream: &StreamInner, data: Chain) {
        let socket_len = data.socket_len();
        if socket_len > 0 {
            self.inbox.unread_bytes.set(self.inbox.unread_bytes.get() + socket_len);
        }
        stream.receive(data);
        self.wake_reader(stream);
    }

    #[inline]
    pub(super) fn wake_reader(&self, stream: &StreamInner) {
        let woken = u32::from(stream.wake());
        self.activity.waiting_readers.set(self.activity.waiting_readers.get() - woken);
    }

    /// Notes that bytes which came over the socket were read, or thrown away.
    pub(super) fn note_unread(&self, read: usize) {
        if read > 0 {
            self.inbox.unread_bytes.set(self.inbox.unread_bytes.get().saturating_sub(read));
            self.inbox.paused.wake_all();
        }
    }

    fn has_too_much_unread(&self) -> bool {
        self.inbox.unread_bytes.get() >= self.config.limits.unread_fallback_bytes
    }

    /// Closes the streams whose close came by the queue, once the socket has nothing more for them.
    fn finish_closing(self: &Rc<Self>) {
        if self.inbox.closing.borrow().is_empty() {
            return;
        }
        let is_drained = self.receive_messages();
        if is_drained || self.is_over() {
            let closing = std::mem::take(&mut *self.inbox.closing.borrow_mut());
            for &id in &closing {
                self.peer_closed(id);
            }
            // Keeps the allocation.
            let mut list = self.inbox.closing.borrow_mut();
            if list.is_empty() {
                *list = closing;
                list.clear();
            }
        }
    }

    fn peer_closed(&self, id: u32) {
        if let Some(stream) = self.streams.borrow().get(id) {
            stream.peer_closed();
            self.wake_reader(stream);
        }
    }

    fn wake_waiting(&self, now: Instant) {
        let lanes = &self.lanes;
        if !lanes.queue_waiting.is_empty() {
            let is_full = lanes.producer.borrow_mut().is_full();
            match is_full {
                Ok(true) => {}
                Ok(false) => lanes.queue_waiting.wake_all(),
                Err(error) => self.fail(error.into()),
            }
        }
        if !lanes.pool_waiting.is_empty() {
            if lanes.manager.might_allocate() {
                lanes.pool_waiting.wake_all();
            } else {
                lanes.pool_waiting.wake_expired(now);
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
                // (WIRE chapter 7).
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
        match EventState::from_status(status) {
            EventState::Closed => self.peer_closed(stream_id),
            EventState::Open | EventState::HalfClosed => {
                if !data.is_empty() {
                    let data = Chain::received(Rc::clone(&self.lanes.manager), data);
                    self.deliver(stream_id, data);
                }
                if EventState::from_status(status) == EventState::HalfClosed {
                    self.peer_closed(stream_id);
                }
            }
            EventState::Unknown(state) => {
                return Err(MemoryError::Field {
                    what: "stream state of FallbackData",
                    value: u64::from(state),
                    problem: "expected open, closed or half-closed",
                }
                .into());
            }
        }
        Ok(())
    }

    /// The socket has ended. What the peer published before is still delivered.
    pub(super) fn peer_is_gone(self: &Rc<Self>) {
        self.drain_all();
        let closing = std::mem::take(&mut *self.inbox.closing.borrow_mut());
        for id in closing {
            self.peer_closed(id);
        }
        self.fail(Error::PeerClosed);
    }

    /// Puts the session before the poller.
    #[inline]
    pub(super) fn activate(self: &Rc<Self>) {
        if !self.activity.is_active.get() && !self.is_over() {
            self.poller.activate(self);
        }
    }
}

/// Handles what comes over the socket for as long as the session lives.
pub(super) async fn read_socket(session: Rc<SessionInner>) {
    while !session.is_over() {
        poll_fn(|context| {
            if session.is_over() || !session.has_too_much_unread() {
                return std::task::Poll::Ready(());
            }
            session.inbox.paused.register(context, None);
            std::task::Poll::Pending
        })
        .await;
        if let Err(error) = session.socket().readable().await {
            session.fail(error);
        }
        if session.receive_messages() {
            session.finish_closing();
        }
        // A peer that never stops sending must not keep the core.
        yield_now().await;
    }
}
