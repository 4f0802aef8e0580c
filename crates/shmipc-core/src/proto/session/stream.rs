// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a session keeps of each stream.

use std::cell::{Cell, RefCell};

use crate::proto::flow_control::{ReceiveWindow, SendWindow};
use crate::proto::session::driver::{Driver, Inbound, Payload};
use crate::proto::stream_state::{HalfState, StreamState};

/// A stream of a running session.
pub struct StreamEntry<D: Driver> {
    id: u32,
    state: StreamState,
    /// What its reader has not taken.
    pub inbound: RefCell<D::Inbound>,
    /// The tasks that wait for it.
    pub tasks: D::StreamTasks,
    /// What was sent, and what of it the peer's reader has taken.
    pub sending: SendWindow,
    /// What came, and for what of it credit is due.
    pub receiving: ReceiveWindow,
    /// Whether its credit waits for room in the queue.
    pub(super) owes_credit: Cell<bool>,
    /// Whether its credit waits until the peer is awake.
    pub(super) has_waiting_credit: Cell<bool>,
    /// Whether this side's direction has ended and the peer is not known to understand that.
    pub(super) owes_end: Cell<bool>,
    /// The offset of the first slice of the last message through shared memory; 0: there was none.
    pub(super) last_sent: Cell<u32>,
    /// Bytes that went over the socket since the peer last sent something.
    unanswered: Cell<u64>,
    /// Whether something of it came over the socket.
    has_come_by_socket: Cell<bool>,
    /// Whether the peer has heard of the stream, and so must hear of its end.
    is_known_to_peer: Cell<bool>,
    /// Whether something came since [`take_mid_request`](Self::take_mid_request) was last asked.
    has_received: Cell<bool>,
    /// What had been sent at that time.
    sent_before: Cell<u64>,
    halves: Cell<Halves>,
}

/// Which halves of a stream's handle are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halves {
    /// Both.
    Both,
    /// This one.
    Only(Half),
    /// None: no handle is left.
    None,
}

/// One half of a stream's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The receiving one.
    Read,
    /// The sending one.
    Write,
}

impl<D: Driver> StreamEntry<D> {
    pub(super) fn new(id: u32, inbound: D::Inbound) -> Self {
        Self {
            id,
            state: StreamState::new(),
            inbound: RefCell::new(inbound),
            tasks: D::StreamTasks::default(),
            sending: SendWindow::default(),
            receiving: ReceiveWindow::default(),
            owes_credit: Cell::new(false),
            has_waiting_credit: Cell::new(false),
            owes_end: Cell::new(false),
            last_sent: Cell::new(0),
            unanswered: Cell::new(0),
            has_come_by_socket: Cell::new(false),
            is_known_to_peer: Cell::new(false),
            has_received: Cell::new(false),
            sent_before: Cell::new(0),
            halves: Cell::new(Halves::Both),
        }
    }

    /// Its number.
    #[inline]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What either side may still do with it.
    #[inline]
    pub fn state(&self) -> &StreamState {
        &self.state
    }

    /// Whether the peer has heard of it.
    #[inline]
    pub fn is_known_to_peer(&self) -> bool {
        self.is_known_to_peer.get()
    }

    #[inline]
    pub(super) fn set_known_to_peer(&self) {
        self.is_known_to_peer.set(true);
    }

    /// Whether a handle is left that could read what comes.
    #[inline]
    pub fn has_reader(&self) -> bool {
        matches!(self.halves.get(), Halves::Both | Halves::Only(Half::Read))
    }

    /// How many bytes went over the socket of which nothing shows that the peer has read them: it
    /// has neither sent anything since, nor closed the stream. Only a peer of this crate says what
    /// it has read.
    pub fn unconfirmed(&self) -> u64 {
        match self.state.peer() {
            HalfState::Open | HalfState::HalfClosed => self.unanswered.get(),
            HalfState::Closed | HalfState::Reset => 0,
        }
    }

    pub(super) fn record_unanswered(&self, len: u64) {
        self.unanswered.set(self.unanswered.get().saturating_add(len));
    }

    #[inline]
    pub(super) fn on_answer(&self) {
        self.unanswered.set(0);
    }

    /// A message went through shared memory.
    #[inline]
    pub(super) fn on_sent(&self, offset: u32, occupies: u64) {
        self.set_known_to_peer();
        self.last_sent.set(offset);
        self.sending.record_sent(occupies);
    }

    /// Something of it came.
    #[inline]
    pub(super) fn on_received(&self) {
        self.set_known_to_peer();
        self.on_answer();
        self.has_received.set(true);
    }

    /// Something of it came over the socket.
    pub(super) fn on_socket_used_by_peer(&self) {
        self.has_come_by_socket.set(true);
    }

    /// Whether either side has used the socket for it.
    pub fn has_used_socket(&self) -> bool {
        self.sending.has_used_socket() || self.has_come_by_socket.get()
    }

    #[inline]
    pub(super) fn receive(&self, data: D::Payload) {
        self.on_received();
        self.inbound.borrow_mut().push(data);
    }

    /// Takes the oldest message.
    #[inline]
    pub fn pop_inbound(&self) -> Option<D::Payload> {
        self.inbound.borrow_mut().pop()
    }

    /// Whether its reader has something to do: data, or an end.
    #[inline]
    pub fn has_news(&self) -> bool {
        !self.inbound.borrow().is_empty() || !self.state.can_receive()
    }

    /// Whether the peer is in the middle of something: it has sent since this was last asked and
    /// was not answered, or what it sent waits to be read. Forgets what came before.
    pub(super) fn take_mid_request(&self) -> bool {
        let sent = self.sending.sent();
        let has_sent = self.sent_before.replace(sent) != sent;
        let has_unread = !self.inbound.borrow().is_empty();
        // When it is read, a peer that waited for that goes on.
        self.has_received.replace(has_unread) && !has_sent || has_unread
    }

    /// Drops what was not read. Returns what of it cost that had come over the socket.
    pub(super) fn discard(&self) -> usize {
        let mut inbound = self.inbound.borrow_mut();
        let mut cost = 0;
        while let Some(payload) = inbound.pop() {
            cost += payload.socket_cost();
        }
        cost
    }

    /// Which halves of the handle are left.
    pub fn halves(&self) -> Halves {
        self.halves.get()
    }

    /// One half of the handle is gone. Returns what is left.
    pub fn drop_half(&self, half: Half) -> Halves {
        let left = match self.halves.get() {
            Halves::Both if half == Half::Read => Halves::Only(Half::Write),
            Halves::Both => Halves::Only(Half::Read),
            Halves::Only(_) | Halves::None => Halves::None,
        };
        self.halves.set(left);
        left
    }
}
