// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the state machine of a session asks for, carried out.

use std::rc::Rc;

use bytes::Bytes;

use crate::session::extension::peer_extension;
use crate::session::queues::QueueSlot;
use crate::session::socket_io::is_gone;
use crate::session::stall::await_first_event_taken;
use crate::session::state::{SessionInner, StreamInner, StreamTasks};
use crate::session::transmit::send_kept;
use crate::session::wakeup::Doorbell;
use shmipc_core::error::{Error, MemoryError};
use shmipc_core::proto::session::driver::{Counted, Driver};
use shmipc_core::shm::chain::Chain;
use shmipc_core::shm::chain::queue::ChainQueue;
use shmipc_core::shm::pool::SliceId;
use shmipc_core::wire::{Deframer, Event, Extension, sync_event};

impl Driver for SessionInner {
    type Payload = Chain;
    type Inbound = ChainQueue;
    type SliceId = SliceId;
    type StreamTasks = StreamTasks;
    type Slot<'a> = QueueSlot<'a>;

    #[inline]
    fn push_event(&self, event: Event) -> Result<bool, MemoryError> {
        let is_pushed = self.queues.push(event)?;
        if is_pushed {
            self.activate();
        }
        Ok(is_pushed)
    }

    #[inline(always)]
    fn reserve(&self) -> Result<Option<QueueSlot<'_>>, MemoryError> {
        self.queues.reserve()
    }

    #[inline(always)]
    fn commit(&self, slot: QueueSlot<'_>, event: Event, len: usize) {
        slot.commit(event);
        self.activate();
        self.counters.events_sent.add(1);
        self.counters.bytes_sent.add(len as u64);
        self.activity.note_sent(len);
    }

    #[inline]
    fn flush_queue(&self) {
        if self.queues.must_look.replace(false) && !self.is_over() {
            self.publish_and_ring();
        }
    }

    #[inline]
    fn has_unflushed(&self) -> bool {
        self.queues.must_look.get()
    }

    fn events_pushed(&self) -> i64 {
        self.queues.producer.borrow().pushed()
    }

    fn in_flight(&self) -> Result<(i64, u32), MemoryError> {
        self.queues.producer.borrow_mut().in_flight()
    }

    #[inline]
    fn is_peer_asleep(&self) -> bool {
        self.queues.producer.borrow().is_peer_asleep()
    }

    fn drain_queue(&self) {
        self.drain_all();
    }

    #[inline(always)]
    fn adopt(&self, offset: u32) -> Result<Chain, MemoryError> {
        let chain = self.memory.pool.adopt(offset)?;
        self.activity.note_received();
        self.counters.bytes_received.add(chain.len() as u64);
        Ok(chain)
    }

    fn received(&self, data: Bytes) -> Chain {
        let held = Deframer::held_by(data.len());
        Chain::received(Rc::clone(&self.memory.pool), data, held)
    }

    fn new_inbound(&self) -> ChainQueue {
        ChainQueue::new(&self.memory.pool)
    }

    fn sent_at(&self, offset: u32) -> Option<SliceId> {
        self.memory.pool.sent_at(offset)
    }

    fn is_with_peer(&self, slice: SliceId) -> bool {
        self.memory.pool.is_with_peer(slice)
    }

    fn find_sent(&self, from: SliceId, found: &mut Vec<SliceId>) -> Option<SliceId> {
        self.memory.pool.find_sent(from, found)
    }

    #[inline]
    fn is_memory_short(&self) -> bool {
        self.memory.pool.is_short()
    }

    fn might_allocate(&self) -> bool {
        self.memory.pool.might_allocate()
    }

    fn smallest_slice(&self) -> usize {
        self.memory.pool.smallest_slice()
    }

    fn is_memory_lost(&self) -> bool {
        self.is_memory_lost()
    }

    fn peer_extension(&self) -> Option<Extension> {
        peer_extension(&self.memory.pool, self.proto.role())
    }

    fn send_message(&self, message: &[u8]) {
        if self.socket.outbox.is_overfull() {
            return self.fail(Error::PeerNotReading);
        }
        match self.socket.outbox.send(&self.socket.socket, message) {
            Ok(false) => {}
            Ok(true) => {
                if let Some(session) = self.shared() {
                    self.reactor.spawn(send_kept(session));
                }
            }
            Err(error) if is_gone(&error) => self.on_hang_up(),
            Err(error) => self.fail(Error::os("send to the peer", error)),
        }
    }

    fn has_sent(&self) -> bool {
        self.counters.events_sent.get() > 0 || self.counters.fallback_sent.get() > 0
    }

    fn socket_bytes(&self) -> u64 {
        self.socket.outbox.taken_in()
    }

    fn unsent_bytes(&self) -> usize {
        self.socket.outbox.len()
    }

    fn bytes_in_socket(&self) -> usize {
        self.socket.socket.unread_by_peer()
    }

    fn is_outbox_full(&self) -> bool {
        self.socket.outbox.is_full()
    }

    fn wakes_through_socket(&self) -> bool {
        matches!(self.doorbell, Doorbell::Socket)
    }

    #[inline]
    fn activate(&self) {
        self.activate();
    }

    #[inline]
    fn wake_reader(&self, stream: &StreamInner) {
        self.wake_reader(stream);
    }

    #[inline]
    fn is_reader_waiting(&self, stream: &StreamInner) -> bool {
        stream.tasks.reader.is_waiting()
    }

    #[inline]
    fn wake_writer(&self, stream: &StreamInner) {
        stream.tasks.writer.wake();
    }

    fn wake_acceptors(&self) {
        self.waiters.accept.wake_all();
    }

    fn wake_budget_waiters(&self) {
        self.waiters.budget.wake_all();
    }

    fn resume_socket_reader(&self) {
        self.socket.paused.wake_all();
    }

    fn on_end(&self, _error: &Error) {
        self.stop();
    }

    #[inline(always)]
    fn record(&self, what: Counted) {
        let counter = match what {
            Counted::EventSent => &self.counters.events_sent,
            Counted::CreditSent => &self.counters.credits_sent,
            Counted::FallbackSent => &self.counters.fallback_sent,
            Counted::FallbackReceived => &self.counters.fallback_received,
            Counted::SyncEventReceived => &self.counters.sync_events_received,
        };
        counter.add(1);
    }
}

impl SessionInner {
    #[inline(never)]
    fn publish_and_ring(&self) {
        self.activity.note_flushed();
        let must_ring = {
            let mut producer = self.queues.producer.borrow_mut();
            if !producer.publish() {
                // It waits for the peer to sleep. The next turn tries again.
                self.queues.must_look.set(true);
            }
            // A peer that looks from time to time is never woken.
            let is_woken = !matches!(self.doorbell, Doorbell::Polling(_));
            is_woken && (producer.must_ring() || self.doorbell.take_owed())
        };
        if must_ring {
            self.counters.sync_events_sent.add(1);
            self.expect_first_event_taken();
            match &self.doorbell {
                Doorbell::EventFds { theirs, .. } => self.ring_event_fd(theirs),
                _ => self.send_message(&sync_event(self.proto.version_byte())),
            }
        }
    }

    /// The peer is about to be woken. If nothing has shown yet that it has mapped the memory, it
    /// has to take its first event in time.
    fn expect_first_event_taken(&self) {
        if self.proto.must_prove_itself(self)
            && let Some(session) = self.shared()
        {
            self.reactor.spawn(await_first_event_taken(Rc::downgrade(&session)));
        }
    }

    /// The peer is gone. The next turn ends the session, behind everything that the peer sent
    /// before it went.
    pub(crate) fn on_hang_up(&self) {
        self.socket.is_hung_up.set(true);
        self.activate();
    }
}
