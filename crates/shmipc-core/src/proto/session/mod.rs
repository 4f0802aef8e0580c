// SPDX-License-Identifier: MIT OR Apache-2.0
//! A running session as a state machine: events and time in, actions out.
//!
//! [`RunningSession`] decides what happens when something arrives, is sent, or ends: dispatch to
//! streams, their close and half-close, the order of the two paths, credit, and what a close waits
//! for. It has no executor, no clock and no descriptor. What it wants done it asks of a [`Driver`],
//! whose calls are resolved at compile time; what the driver has to decide by comes back as a
//! value, such as a [`SendGate`](send::SendGate). The payload is generic, so the simulation in
//! `sim` runs two sessions over plain vectors.
//!
//! - [`driver`]: the actions, and what the session asks about queue, memory and socket.
//! - [`stream`]: what is kept of each stream.
//! - [`receive`]: events and messages that come.
//! - [`credit`]: what the two sides know of each other, and the windows of streams.
//! - [`send`]: whether a stream may send, which way, and what is recorded when it has.
//! - [`fallback`]: when a stream leaves shared memory for the socket, and when it returns.
//! - [`transmit`]: how the peer learns of the end of a stream or of a direction.
//! - [`path_order`]: keeps the socket from overtaking the queue.
//! - [`ending`]: whether the peer has taken what was sent, before a session ends.
//! - [`stall`]: detects a peer that takes nothing.
//!
//! State is in cells: handles of streams and the session's tasks share it on one thread.
//!
//! Trust: none in the peer. Whatever it sends ends its own session at most, and what it can make
//! this side keep is bounded by [`SessionLimits`].

pub mod credit;
pub mod driver;
pub mod ending;
pub mod fallback;
pub mod path_order;
pub mod receive;
pub mod send;
#[cfg(any(test, fuzzing, feature = "test-util"))]
pub(crate) mod sim;
pub mod stall;
pub mod stream;
pub mod transmit;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use crate::error::{Error, MemoryError, Result};
use crate::proto::Negotiated;
use crate::proto::session::credit::Credit;
use crate::proto::session::driver::{Driver, SharedStream};
use crate::proto::session::path_order::DeferredClose;
use crate::proto::session::stall::StallClock;
use crate::proto::session::stream::StreamEntry;
use crate::proto::stream_table::{Role, StreamTable};
use crate::wire::{Event, ProtocolVersion};

/// What a peer can make a session keep, and how long it may take.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// How many streams can be open at once.
    pub streams: usize,
    /// How much that came over the socket may wait unread, in bytes, before the socket is not read.
    pub unread_fallback_bytes: usize,
    /// How much of a stream may wait unread, in bytes, as this side tells a peer that knows credit.
    pub stream_window: u64,
    /// How long a peer may take nothing while there is something to take.
    pub stall: Option<Duration>,
}

/// A session whose handshake is done.
pub struct RunningSession<D: Driver> {
    role: Role,
    negotiated: Negotiated,
    limits: SessionLimits,
    streams: RefCell<StreamTable<SharedStream<D>>>,
    accepts: AcceptQueue<D>,
    credit: Credit,
    closes: Closes<D::SliceId>,
    /// What messages that came over the socket and wait in streams cost.
    unread_bytes: Cell<usize>,
    stall: StallClock,
    is_over: Cell<bool>,
    end: RefCell<Option<Error>>,
}

/// Streams that the peer opened and that were not accepted yet.
struct AcceptQueue<D: Driver> {
    ready: RefCell<VecDeque<SharedStream<D>>>,
    /// Whether no more are taken in.
    is_closed: Cell<bool>,
}

/// Closes of streams that are not dealt with yet.
struct Closes<S> {
    /// Closes of the peer that came by the queue, while data of the streams may still be in the
    /// socket.
    from_queue: RefCell<VecDeque<u32>>,
    /// Closes of this side that wait for room in the queue, or until the peer has read.
    deferred: RefCell<VecDeque<DeferredClose<S>>>,
    /// Streams that were dropped unused, and that the peer is not told of yet.
    unused: RefCell<Vec<u32>>,
}

/// Whether a client does not hear whether its server has come to have the memory.
fn is_unanswered(role: Role, negotiated: &Negotiated) -> bool {
    (role, negotiated.version) == (Role::Client, ProtocolVersion::V2)
}

impl<D: Driver> RunningSession<D> {
    /// A session that begins. [`look_for_extension`](Self::look_for_extension) has to follow, once
    /// the driver can be called.
    pub fn new(role: Role, negotiated: Negotiated, limits: SessionLimits) -> Self {
        let is_unanswered = is_unanswered(role, &negotiated);
        Self {
            role,
            negotiated,
            limits,
            streams: RefCell::new(StreamTable::new(role, limits.streams)),
            accepts: AcceptQueue { ready: RefCell::default(), is_closed: Cell::new(false) },
            credit: Credit::new(limits.stream_window),
            closes: Closes {
                from_queue: RefCell::default(),
                deferred: RefCell::default(),
                unused: RefCell::default(),
            },
            unread_bytes: Cell::new(0),
            stall: StallClock::new(is_unanswered),
            is_over: Cell::new(false),
            end: RefCell::new(None),
        }
    }

    /// Which side this is.
    #[inline]
    pub fn role(&self) -> Role {
        self.role
    }

    /// What the handshake agreed on.
    #[inline]
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// The version byte of this session's messages.
    #[inline]
    pub fn version_byte(&self) -> u8 {
        self.negotiated.version.message_byte()
    }

    /// Whether the session has ended.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.is_over.get()
    }

    /// Why the session has ended, if it has.
    pub fn end_reason(&self) -> Option<Error> {
        self.end.borrow().clone()
    }

    /// Why the session has ended. For callers that know that it has.
    #[cold]
    pub fn end_error(&self) -> Error {
        self.end_reason().unwrap_or(Error::SessionClosed)
    }

    /// Ends the session. Every stream is woken; the first reason stays.
    pub fn fail(&self, driver: &D, error: Error) {
        if self.is_over() {
            return;
        }
        // If the mapping is lost, other memory errors are fallout.
        let is_lost = matches!(error, Error::Memory(_)) && driver.is_memory_lost();
        let error = if is_lost { MemoryError::Lost.into() } else { error };
        if error.is_peer_fault() {
            tracing::warn!(%error, "session ends");
        } else {
            tracing::debug!(%error, "session ends");
        }
        self.is_over.set(true);
        *self.end.borrow_mut() = Some(error.clone());
        for stream in self.all_streams() {
            driver.wake_reader(&stream);
            driver.wake_writer(&stream);
        }
        driver.on_end(&error);
    }

    /// Ends the session because its memory does not hold together, and returns the error.
    #[cold]
    pub fn fail_memory(&self, driver: &D, error: MemoryError) -> Error {
        let error = Error::from(error);
        self.fail(driver, error.clone());
        error
    }

    fn is_unanswered(&self) -> bool {
        is_unanswered(self.role, &self.negotiated)
    }

    /// Puts an event into the queue. `Ok(false)`: the queue is full.
    ///
    /// # Errors
    ///
    /// The queue does not hold together; the session has ended by that.
    #[inline]
    fn push(&self, driver: &D, event: Event) -> Result<bool> {
        driver.push_event(event).map_err(|error| self.fail_memory(driver, error))
    }

    /// The stream of this number, if it is open here.
    #[inline]
    pub fn stream(&self, id: u32) -> Option<SharedStream<D>> {
        self.streams.borrow().get(id).cloned()
    }

    /// The streams that are open here, in no order.
    pub fn all_streams(&self) -> Vec<SharedStream<D>> {
        self.streams.borrow().all()
    }

    /// How many streams are open here.
    pub fn stream_count(&self) -> usize {
        self.streams.borrow().len()
    }

    /// Opens a stream. The peer learns of it with the first event that names it.
    ///
    /// # Errors
    ///
    /// The session is over, [`Error::NotClient`] on a server, or [`Error::TooManyStreams`].
    pub fn open_stream(&self, driver: &D) -> Result<SharedStream<D>> {
        if let Some(error) = self.end_reason() {
            return Err(error);
        }
        if self.role == Role::Server {
            return Err(Error::NotClient);
        }
        let make = |id| Rc::new(StreamEntry::new(id, driver.new_inbound()));
        let opened = self.streams.borrow_mut().open(make);
        opened.ok_or(Error::TooManyStreams(self.limits.streams))
    }

    /// The next number that a stream gets that is opened here.
    #[cfg(any(test, feature = "test-util"))]
    pub fn skip_to_stream(&self, next: u32) {
        self.streams.borrow_mut().skip_to(next);
    }

    /// Takes the next stream that the peer has opened. `Ok(None)`: none is there yet. Streams that
    /// came before the end are still handed out.
    ///
    /// # Errors
    ///
    /// The session is over, or takes no more streams.
    pub fn accept_stream(&self) -> Result<Option<SharedStream<D>>> {
        if let Some(stream) = self.accepts.ready.borrow_mut().pop_front() {
            return Ok(Some(stream));
        }
        if let Some(error) = self.end_reason() {
            return Err(error);
        }
        if self.accepts.is_closed.get() {
            return Err(Error::SessionClosed);
        }
        Ok(None)
    }

    /// Takes no more streams than have come by now.
    pub fn stop_accepting(&self, driver: &D) {
        driver.drain_queue();
        self.accepts.is_closed.set(true);
        driver.wake_acceptors();
    }

    /// The last handle is gone: closes the streams that cannot be accepted any more.
    pub fn refuse_unaccepted(&self, driver: &D) {
        self.accepts.is_closed.set(true);
        let waiting = std::mem::take(&mut *self.accepts.ready.borrow_mut());
        for stream in waiting {
            self.close_stream(driver, &stream);
        }
    }

    /// Whether the program has a stream in hand, or half of one.
    pub fn has_streams_in_hand(&self) -> bool {
        self.stream_count() > self.accepts.ready.borrow().len()
    }

    /// Whether so much that came over the socket waits unread that the socket is not read.
    #[inline]
    pub fn has_too_much_unread(&self) -> bool {
        self.unread_bytes.get() >= self.limits.unread_fallback_bytes
    }

    /// Whether work is left that only a turn with the reactor does, later: closes or credit that
    /// found the queue full, closes that wait for the peer or for the socket, a socket that is not
    /// read.
    pub fn has_deferred_work(&self) -> bool {
        self.has_too_much_unread()
            || self.has_waiting_closes()
            || self.credit.has_deferred()
            || self.has_deferred_closes()
    }
}
