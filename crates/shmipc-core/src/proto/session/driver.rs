// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a running session asks of its driver.

use std::rc::Rc;

use bytes::Bytes;

use crate::error::{Error, MemoryError};
use crate::proto::session::stream::StreamEntry;
use crate::wire::{Event, Extension};

pub use crate::payload::{Inbound, Payload};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// An event of a stream was put into the queue.
    EventSent,
    /// An event that returns credit was put into the queue.
    CreditSent,
    /// A FallbackData message was sent.
    FallbackSent,
    /// A FallbackData message came.
    FallbackReceived,
    /// A SyncEvent came.
    SyncEventReceived,
}

/// The actions of a session, and what it has to know of its queue, its memory and its socket.
///
/// Calls are made in the middle of a transition of the session, so an implementation must not call
/// the session back, except where a method says so. None of them waits.
pub trait Driver: Sized {
    /// A received message.
    type Payload: Payload;
    /// The messages of a stream that wait for its reader.
    type Inbound: Inbound<Self::Payload>;
    /// A slice of the buffer memory. The default is the first one.
    type SliceId: Copy + Default;
    /// The tasks that wait for a stream.
    type StreamTasks: Default;
    /// Room for one event in the send queue, kept for it until this is dropped.
    type Slot<'a>
    where
        Self: 'a;

    // The IO queues.

    /// Puts an event into the send queue, and has it published in time. `Ok(false)`: the queue is
    /// full.
    ///
    /// # Errors
    ///
    /// The peer has written nonsense into the queue's header.
    fn push_event(&self, event: Event) -> Result<bool, MemoryError>;

    /// Reserves room for the next event. `None`: the queue is full.
    ///
    /// # Errors
    ///
    /// As [`push_event`](Self::push_event).
    fn reserve(&self) -> Result<Option<Self::Slot<'_>>, MemoryError>;

    /// Puts the event of a message with so many bytes where room was reserved for it, has it
    /// published in time, and counts it.
    fn commit(&self, slot: Self::Slot<'_>, event: Event, len: usize);

    /// Publishes every event so far, and wakes the peer if it sleeps.
    fn flush_queue(&self);

    /// Whether something was put into the queue since the last flush.
    fn has_unflushed(&self) -> bool;

    /// How many events were put into the send queue so far.
    fn events_pushed(&self) -> i64;

    /// How many of them the peer has taken, and how many published ones it has not.
    ///
    /// # Errors
    ///
    /// As [`push_event`](Self::push_event).
    fn in_flight(&self) -> Result<(i64, u32), MemoryError>;

    /// Whether the peer has said that it does not look at its queue.
    fn is_peer_asleep(&self) -> bool;

    /// Takes every event that the peer had published before the call, and hands each to
    /// [`on_event`](super::RunningSession::on_event).
    fn drain_queue(&self);

    // The buffer memory.

    /// Takes over the slices of a message that starts at this offset.
    ///
    /// # Errors
    ///
    /// No message starts there, or what its slice headers say does not hold together.
    fn adopt(&self, offset: u32) -> Result<Self::Payload, MemoryError>;

    /// Makes a message of bytes that came over the socket.
    fn received(&self, data: Bytes) -> Self::Payload;

    /// An empty queue for a new stream.
    fn new_inbound(&self) -> Self::Inbound;

    /// The slice at this offset, if the peer has it and this side can tell when it gives it back.
    fn sent_at(&self, offset: u32) -> Option<Self::SliceId>;

    /// Whether the peer still has this slice.
    fn is_with_peer(&self, slice: Self::SliceId) -> bool;

    /// Looks through some slices from this one on, and adds those that the peer has. Returns where
    /// to go on, until all were looked at.
    fn find_sent(
        &self,
        from: Self::SliceId,
        found: &mut Vec<Self::SliceId>,
    ) -> Option<Self::SliceId>;

    /// Whether little memory is free.
    fn is_memory_short(&self) -> bool;

    /// Whether a slice might be free.
    fn might_allocate(&self) -> bool;

    /// How many bytes the smallest slice holds.
    fn smallest_slice(&self) -> usize;

    /// Whether shared memory is gone, because the peer has cut its file short.
    fn is_memory_lost(&self) -> bool;

    /// What the peer has said that it knows beyond the protocol.
    fn peer_extension(&self) -> Option<Extension>;

    // The socket.

    /// Sends a message behind all others. What the socket does not take is kept.
    fn send_message(&self, message: &[u8]);

    /// Whether anything was sent, by the queue or over the socket.
    fn has_sent(&self) -> bool;

    /// How many bytes were handed to [`send_message`](Self::send_message) so far.
    fn socket_bytes(&self) -> u64;

    /// How many of them the socket has not taken yet.
    fn unsent_bytes(&self) -> usize;

    /// How many bytes the socket has taken that the peer has not read.
    fn bytes_in_socket(&self) -> usize;

    /// Whether so much is kept that senders have to wait.
    fn is_outbox_full(&self) -> bool;

    /// Whether the peer is woken through the socket, and so handles what comes over it behind what
    /// was in the queue before.
    fn wakes_through_socket(&self) -> bool;

    // Tasks.

    /// Has the session driven: its queue drained, its deferred work done.
    fn activate(&self);

    /// Wakes the task that reads a stream.
    fn wake_reader(&self, stream: &StreamEntry<Self>);

    /// Whether a task waits to read a stream.
    fn is_reader_waiting(&self, stream: &StreamEntry<Self>) -> bool;

    /// Wakes the task that waits for the peer's reader, or for the end, of a stream.
    fn wake_writer(&self, stream: &StreamEntry<Self>);

    /// Wakes those that wait for a stream of the peer.
    fn wake_acceptors(&self);

    /// Wakes those that wait until less of what went over the socket is unread.
    fn wake_budget_waiters(&self);

    /// Has the socket read again, which is not while too much of it waits unread.
    fn resume_socket_reader(&self);

    /// The session has ended, for this reason. Called once; wakes whatever else waits, and tells
    /// the peer by shutting the socket down. Streams are woken by the session itself.
    fn on_end(&self, error: &Error);

    /// Counts something.
    fn record(&self, what: Counted);
}

/// A stream, as the table and its handles share it.
pub type SharedStream<D> = Rc<StreamEntry<D>>;
