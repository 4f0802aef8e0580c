// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the two sides of a session know of each other beyond the protocol, and the credit that
//! readers give for what they have taken. The arithmetic of one stream is in
//! [`flow_control`](crate::proto::flow_control).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Instant;

use crate::proto::flow_control::CreditUpdate;
use crate::proto::session::RunningSession;
use crate::proto::session::driver::{Counted, Driver, Inbound, Payload};
use crate::proto::session::stream::StreamEntry;
use crate::wire::{Event, EventState, READER_WAITS_STATUS};

/// Until the peer has said what it knows, every stream has room.
const UNBOUNDED: u64 = u64::MAX;
/// How many batches of events are also an occasion to look whether the peer has said what it knows.
/// A client of version 2 goes on before the server has mapped the memory.
const LOOKS: u32 = 4;

/// The windows of a session's streams.
pub(super) struct Credit {
    /// This side's window.
    ours: u64,
    /// What this side gives credit by: its own window when the peer knows of credit.
    window_here: Cell<u64>,
    /// How much the peer lets wait unread.
    window_there: Cell<u64>,
    looks: Cell<u32>,
    /// Streams whose credit found the queue full, each once.
    deferred: RefCell<VecDeque<u32>>,
    /// Streams whose credit is not worth waking the peer, each once.
    waiting: RefCell<Vec<u32>>,
    /// What this side has sent over the socket and the peer's readers have not taken, of all
    /// streams, as the peer counts it.
    pub(super) socket_unread: Cell<u64>,
    /// Bytes over the socket of streams that were closed here of which nothing shows that they were
    /// read.
    pub(super) unconfirmed: Cell<u64>,
    /// When something last went over the socket.
    pub(super) last_over_socket: Cell<Option<Instant>>,
    /// Below what the unread part has to fall for the first of those that wait for it.
    pub(super) budget_mark: Cell<u64>,
}

impl Credit {
    pub(super) fn new(ours: u64) -> Self {
        Self {
            ours,
            window_here: Cell::new(UNBOUNDED),
            window_there: Cell::new(UNBOUNDED),
            looks: Cell::new(LOOKS),
            deferred: RefCell::default(),
            waiting: RefCell::default(),
            socket_unread: Cell::new(0),
            unconfirmed: Cell::new(0),
            last_over_socket: Cell::new(None),
            budget_mark: Cell::new(0),
        }
    }

    /// Whether the peer is known to have the extension too.
    #[inline]
    pub(super) fn is_known(&self) -> bool {
        self.window_there.get() != UNBOUNDED
    }

    pub(super) fn has_deferred(&self) -> bool {
        !self.deferred.borrow().is_empty()
    }
}

impl<D: Driver> RunningSession<D> {
    /// Whether the peer is known to have the extension too, as far as it has said by the last look.
    #[inline]
    pub fn is_extension_known(&self) -> bool {
        self.credit.is_known()
    }

    /// Events came. Looks at the first batches only, since the peer's byte is in a line that both
    /// sides write.
    #[inline]
    pub fn look_for_extension_early(&self, driver: &D) {
        let looks = self.credit.looks.get();
        if looks > 0 {
            self.credit.looks.set(looks - 1);
            self.look_for_extension(driver);
        }
    }

    /// Looks whether the peer has said by now what it knows. Before something that depends on it.
    pub fn look_for_extension(&self, driver: &D) {
        if self.credit.is_known() {
            return;
        }
        let Some(extension) = driver.peer_extension() else { return };
        self.credit.looks.set(0);
        self.credit.window_here.set(self.credit.ours);
        self.credit.window_there.set(extension.window());
        // What it could not have been told before.
        for stream in self.all_streams() {
            if stream.owes_end.take() {
                self.tell_half_closed(driver, &stream);
            }
        }
    }

    /// Whether the peer has the extension too, as far as it has said by now.
    pub fn peer_knows_extension(&self, driver: &D) -> bool {
        self.look_for_extension(driver);
        self.credit.is_known()
    }

    /// Whether a server that this client does not wait for may still say what it knows.
    pub fn may_learn_extension(&self) -> bool {
        self.is_unanswered() && !self.credit.is_known() && !self.is_over()
    }

    /// Whether the peer's reader of this stream is near enough.
    #[inline]
    pub fn has_window(&self, stream: &StreamEntry<D>) -> bool {
        stream.sending.has_room(self.credit.window_there.get())
    }

    /// Asks the peer for the credit that it keeps until it is worth an event, when memory is short
    /// and a stream needs to know whether its reader is behind, and to be told when its reader
    /// waits. The event is credit for nothing.
    pub fn ask_for_credit(&self, driver: &D, stream: &StreamEntry<D>) {
        if !stream.sending.may_ask() || self.is_over() {
            return;
        }
        let status = EventState::Credit.to_status();
        let event = Event { stream_id: stream.id(), offset: 0, status };
        if matches!(self.push(driver, event), Ok(true)) {
            // It opens the stream, if nothing has.
            stream.set_known_to_peer();
            stream.sending.on_asked();
        }
    }

    /// The peer asks for credit.
    #[cold]
    fn answer_for_credit(&self, driver: &D, stream: &StreamEntry<D>) {
        stream.receiving.set_wants_reader(true);
        let credit = stream.receiving.take();
        if credit > 0 || self.is_waited_for(driver, stream) {
            self.send_credit(driver, stream, credit);
        } else {
            stream.receiving.on_asked();
        }
    }

    /// Whether what comes next will be taken, or dropped, at once.
    fn is_waited_for(&self, driver: &D, stream: &StreamEntry<D>) -> bool {
        !stream.has_reader()
            || driver.is_reader_waiting(stream) && stream.inbound.borrow().is_empty()
    }

    /// A reader begins to wait. Tells the peer, if it wants to know that.
    #[inline]
    pub fn on_reader_waits(&self, driver: &D, stream: &StreamEntry<D>) {
        if stream.receiving.wants_reader() {
            self.tell_reader_waits(driver, stream);
        }
    }

    #[cold]
    pub(super) fn tell_reader_waits(&self, driver: &D, stream: &StreamEntry<D>) {
        self.send_credit(driver, stream, stream.receiving.take());
    }

    /// A reader took a message as a whole.
    #[inline]
    pub fn on_taken(&self, driver: &D, stream: &StreamEntry<D>, payload: &D::Payload) {
        self.on_unread_freed(driver, payload.socket_cost());
        self.give_credit(driver, stream, payload.occupies(), !payload.is_shared());
    }

    /// A reader took messages that occupied so much together, some of them from the socket. Tells
    /// the peer when that is due.
    #[inline]
    pub fn give_credit(
        &self,
        driver: &D,
        stream: &StreamEntry<D>,
        occupied: u64,
        over_socket: bool,
    ) {
        let window = self.credit.window_here.get();
        // While the peer has not said that it knows of credit, none is due, but it is counted.
        let is_known = window != UNBOUNDED;
        let done = over_socket && is_known && stream.inbound.borrow().socket_len() == 0;
        match stream.receiving.record_taken(occupied, over_socket, done, window) {
            CreditUpdate::Not => {}
            // It would take the event for data, whatever came over the socket.
            _ if !is_known => {}
            CreditUpdate::Soon => self.give_credit_soon(driver, stream),
            CreditUpdate::Now => self.send_credit(driver, stream, stream.receiving.take()),
        }
    }

    #[inline(never)]
    fn give_credit_soon(&self, driver: &D, stream: &StreamEntry<D>) {
        if !driver.is_peer_asleep() {
            self.send_credit(driver, stream, stream.receiving.take());
        } else if !stream.has_waiting_credit.replace(true) {
            self.credit.waiting.borrow_mut().push(stream.id());
        }
    }

    /// A message of a stream came. Its sender may have come to the end of its credit.
    #[inline]
    pub(super) fn on_arrival(&self, driver: &D, stream: &StreamEntry<D>, payload: &D::Payload) {
        stream.receiving.record_arrival(payload.occupies());
        if stream.has_waiting_credit.get()
            && stream.receiving.is_sender_near_its_end(self.credit.window_here.get())
        {
            self.send_credit(driver, stream, stream.receiving.take());
        }
    }

    /// Sends the credit that found the queue full, as far as there is room now, and the credit that
    /// waits until the peer is awake, or about to be woken anyway. Once a turn.
    #[inline]
    pub fn send_due_credit(&self, driver: &D) {
        if self.credit.has_deferred() {
            self.send_deferred_credit(driver);
        }
        if self.credit.waiting.borrow().is_empty() {
            return;
        }
        if driver.has_unflushed() || !driver.is_peer_asleep() {
            self.send_all_waiting_credit(driver);
        }
    }

    #[inline(never)]
    fn send_all_waiting_credit(&self, driver: &D) {
        // The list does not grow meanwhile: credit goes out, or is deferred for the queue.
        for stream_id in self.credit.waiting.take() {
            let Some(stream) = self.stream(stream_id) else { continue };
            stream.has_waiting_credit.set(false);
            // It may have been sent since.
            let credit = stream.receiving.take();
            if credit > 0 {
                self.send_credit(driver, &stream, credit);
            }
        }
    }

    #[inline(never)]
    fn send_credit(&self, driver: &D, stream: &StreamEntry<D>, credit: u32) {
        let says_reader_waits =
            stream.receiving.wants_reader() && self.is_waited_for(driver, stream);
        // Credit for nothing would ask for some.
        if self.is_over() || (credit == 0 && !says_reader_waits) {
            return;
        }
        let credit_status = EventState::Credit.to_status();
        let status = if says_reader_waits { READER_WAITS_STATUS } else { credit_status };
        let event = Event { stream_id: stream.id(), offset: credit, status };
        match self.push(driver, event) {
            Ok(true) => {
                if says_reader_waits {
                    stream.receiving.set_wants_reader(false);
                }
                driver.record(Counted::CreditSent);
            }
            Ok(false) => {
                stream.receiving.put_back(credit);
                if !stream.owes_credit.replace(true) {
                    self.credit.deferred.borrow_mut().push_back(stream.id());
                }
                driver.activate();
            }
            // The session is over.
            Err(_) => {}
        }
    }

    #[inline(never)]
    fn send_deferred_credit(&self, driver: &D) {
        while let Some(stream_id) = { self.credit.deferred.borrow_mut().pop_front() } {
            let Some(stream) = self.stream(stream_id) else { continue };
            stream.owes_credit.set(false);
            self.send_credit(driver, &stream, stream.receiving.take());
            if stream.owes_credit.get() {
                // Still full.
                return;
            }
        }
    }

    /// The peer's reader has taken so much of a stream, or waits, or the peer wants to know that.
    pub(super) fn on_credit(&self, driver: &D, event: Event) {
        let says_reader_waits = event.says_reader_waits();
        let asks = event.offset == 0 && !says_reader_waits;
        match self.stream(event.stream_id) {
            Some(stream) if asks => self.answer_for_credit(driver, &stream),
            Some(stream) => {
                let taken = stream.sending.credit(u64::from(event.offset));
                if says_reader_waits {
                    stream.sending.on_reader_wanted();
                }
                self.on_socket_taken(driver, taken);
                driver.wake_writer(&stream);
            }
            None if asks => self.open_by_asking(driver, event.stream_id),
            None => {}
        }
    }

    /// Less of what went over the socket waits at the peer.
    pub(super) fn on_socket_taken(&self, driver: &D, cost: u64) {
        if cost > 0 {
            let unread = self.credit.socket_unread.get().saturating_sub(cost);
            self.credit.socket_unread.set(unread);
            if unread < self.credit.budget_mark.get() {
                self.credit.budget_mark.set(0);
                driver.wake_budget_waiters();
            }
        }
    }
}
