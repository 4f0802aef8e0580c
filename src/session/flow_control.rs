// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the two sides of a session know of each other beyond the protocol, and the credit that
//! readers give for what they have taken. The arithmetic is in
//! [`window`](shmipc_core::proto::flow_control).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::exec::runtime::sleep;
use crate::exec::wakers::WakerList;
use crate::session::state::SessionInner;
use crate::session::stream::StreamInner;
use shmipc_core::config::{Config, ProtocolVersion};
use shmipc_core::proto::flow_control::CreditUpdate;
use shmipc_core::proto::stream_table::Role;
use shmipc_core::shm::chain::{Chain, SOCKET_MESSAGE_COST};
use shmipc_core::shm::pool::SlicePool;
use shmipc_core::wire::layout::{MANAGER_CLIENT_EXTENSION_OFFSET, MANAGER_SERVER_EXTENSION_OFFSET};
use shmipc_core::wire::{Deframer, Event, EventState, Extension, READER_WAITS_STATUS};

/// Without a word from the peer, everything has room.
const UNBOUNDED: u64 = u64::MAX;
/// How often a peer that has not said what it knows is asked again. A client of version 2 goes on
/// before the server has mapped the memory.
const LOOKS: u32 = 4;

/// How long a server that a client of version 2 does not wait for may take to map the memory, and
/// how often that is looked for.
const TIME_TO_SAY: Duration = Duration::from_millis(200);
const TIME_BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// The windows of a session's streams.
pub(crate) struct Credit {
    ours: u64,
    /// What this side gives credit by: its own window when the peer knows of credit.
    window_here: Cell<u64>,
    /// How much the peer lets wait unread.
    window_there: Cell<u64>,
    looks: Cell<u32>,
    /// Whether the peer had its time to say what it knows.
    had_time: Cell<bool>,
    /// Streams whose credit found the queue full, each once.
    kept: RefCell<VecDeque<u32>>,
    /// Streams whose credit is not worth waking the peer, each once.
    waiting: RefCell<Vec<u32>>,
    /// What this side has sent over the socket and the peer's readers have not taken, of all
    /// streams, as the peer counts it.
    socket_unread: Cell<u64>,
    /// What of it nothing shows to have been read, of streams that were closed here.
    pub(crate) unconfirmed: Cell<u64>,
    /// When something last went over the socket.
    pub(crate) last_over_socket: Cell<Option<Instant>>,
    /// Tasks that wait until less is unread of that, and how little it must be for the first.
    pub(crate) budget_waiting: WakerList,
    budget_mark: Cell<u64>,
    /// Tasks that wait until a time whether their streams can leave the socket.
    pub(crate) returning: WakerList,
}

/// Parts of what may wait unread in a session, in sixteenths. Up to the first mark every stream may
/// send. Up to [`FAIR`] each may have a share of its own unread. Beyond, one may send a short
/// message whose reader has taken everything, and any message whose reader is known to wait. So
/// however many streams stop being read, whatever they were sent before leaves room for those.
const PARTS: u64 = 16;
const FREE: u64 = 3;
const FAIR: u64 = 14;
/// How short such a message is: a part in so many of what is left, so that there is always room for
/// a shorter one.
const SHORT_SHARE: u64 = 1024;
/// What each stream may have unread up to [`FAIR`]: enough for a request of 64 KiB that is written
/// as a whole before its answer is read, in pieces of a kilobyte or more, and for that answer. With
/// the default of 64 MiB there is room for 560 streams that have that, whatever others had before.
const FAIR_BYTES: u64 = 80 << 10;
/// How long a short message is at most.
pub(crate) const SHORT_MESSAGE: usize = 4096;

/// Where this side's byte stands, and the peer's.
const fn places(role: Role) -> (usize, usize) {
    match role {
        Role::Client => (MANAGER_CLIENT_EXTENSION_OFFSET, MANAGER_SERVER_EXTENSION_OFFSET),
        Role::Server => (MANAGER_SERVER_EXTENSION_OFFSET, MANAGER_CLIENT_EXTENSION_OFFSET),
    }
}

/// What a message costs the peer until it is taken, when it goes over the socket, as the peer
/// counts it.
fn cost_of(len: usize) -> u64 {
    (Deframer::held_by(len) + SOCKET_MESSAGE_COST) as u64
}

fn extension(manager: &SlicePool, config: &Config) -> Extension {
    let default = manager.memory_len() as u64 / 16;
    Extension::with_window(config.settings().limits.stream_window.unwrap_or(default))
}

/// Tells the peer that this side has the extension. Before the peer is told that the memory is
/// there, or mapped.
pub(crate) fn show_extension(manager: &SlicePool, config: &Config, role: Role) {
    manager.show_extension(places(role).0, extension(manager, config));
}

impl Credit {
    pub(crate) fn new(manager: &SlicePool, config: &Config, role: Role) -> Self {
        let credit = Self {
            ours: extension(manager, config).window(),
            window_here: Cell::new(UNBOUNDED),
            window_there: Cell::new(UNBOUNDED),
            looks: Cell::new(LOOKS),
            had_time: Cell::new(false),
            kept: RefCell::default(),
            waiting: RefCell::default(),
            socket_unread: Cell::new(0),
            unconfirmed: Cell::new(0),
            last_over_socket: Cell::new(None),
            returning: WakerList::default(),
            budget_waiting: WakerList::default(),
            budget_mark: Cell::new(0),
        };
        credit.look(manager, role);
        credit
    }

    /// Looks whether the peer has said by now what it knows.
    fn look(&self, manager: &SlicePool, role: Role) {
        if let Some(extension) = manager.peer_extension(places(role).1) {
            self.looks.set(0);
            self.window_here.set(self.ours);
            self.window_there.set(extension.window());
        }
    }

    /// Whether the peer has the extension too.
    #[inline]
    pub(crate) fn is_known(&self) -> bool {
        self.window_there.get() != UNBOUNDED
    }

    pub(crate) fn has_kept(&self) -> bool {
        !self.kept.borrow().is_empty()
    }
}

impl SessionInner {
    /// Events came. Looks at the first of them only, since the line is one that both sides write.
    #[inline]
    pub(crate) fn look_for_extension_at_first(self: &Rc<Self>) {
        let looks = self.credit.looks.get();
        if looks > 0 {
            self.credit.looks.set(looks - 1);
            self.look_for_extension();
        }
    }

    /// Before something that depends on what the peer knows.
    pub(crate) fn look_for_extension(self: &Rc<Self>) {
        if self.credit.is_known() {
            return;
        }
        self.credit.look(&self.channels.manager, self.role);
        if self.credit.is_known() {
            // What it could not have been told before.
            let streams = self.streams.borrow().all();
            for stream in streams {
                if stream.owes_end.take() {
                    self.tell_half_closed(&stream);
                }
            }
        }
    }

    /// Whether the peer has the extension too, as far as it has said by now.
    pub(crate) fn peer_knows_extension(self: &Rc<Self>) -> bool {
        self.look_for_extension();
        self.credit.is_known()
    }

    /// Gives a peer that has not said what it knows a moment to do so, once. A server says it when
    /// it maps the memory, which a client of version 2 does not wait for.
    pub(crate) async fn give_time_to_say(self: &Rc<Self>) {
        let is_unanswered =
            (self.role, self.agreement.version) == (Role::Client, ProtocolVersion::V2);
        if !is_unanswered || self.credit.had_time.get() {
            return;
        }
        let end = Instant::now() + TIME_TO_SAY;
        loop {
            self.look_for_extension();
            if self.credit.is_known() || self.is_over() || Instant::now() >= end {
                break;
            }
            sleep(TIME_BETWEEN_LOOKS).await;
        }
        self.credit.had_time.set(true);
    }

    /// Whether the peer's reader of this stream is near enough.
    #[inline]
    pub(crate) fn has_window(&self, stream: &StreamInner) -> bool {
        stream.sending.has_room(self.credit.window_there.get())
    }

    /// Whether a stream that used the socket may go through shared memory again: only when the
    /// peer's reader has taken what went over the socket can nothing overtake it.
    pub(crate) fn may_return_to_memory(&self, stream: &StreamInner) -> bool {
        self.credit.is_known() && stream.sending.is_socket_done()
    }

    /// Whether a message may go over the socket without holding up others: the peer stops reading
    /// the socket when too much of all streams together waits unread, whoever is behind.
    pub(crate) fn has_socket_budget(&self, stream: &StreamInner, len: usize) -> bool {
        let is_spent = self.is_socket_budget_spent() && !stream.sending.is_wanted();
        !is_spent || self.credit.socket_unread.get() < self.goes_below(stream, len)
    }

    /// The message may go when less than this is unread of what went over the socket, even if
    /// nothing is heard of its reader.
    fn goes_below(&self, stream: &StreamInner, len: usize) -> u64 {
        let limit = self.config.settings().limits.unread_fallback_bytes as u64;
        let part = |parts: u64| parts * limit / PARTS;
        let cost = cost_of(len);
        let held = stream.sending.held() + cost;
        let fair = if held <= FAIR_BYTES.min(part(1)) { part(FAIR) } else { part(FREE) };
        let is_current = stream.sending.is_all_taken();
        let short = if is_current { cost.saturating_mul(SHORT_SHARE) } else { limit };
        fair.max(limit.saturating_sub(short))
    }

    /// Has the task woken that finds no budget for a message.
    pub(crate) fn note_waits_for_budget(&self, stream: &StreamInner, len: usize) {
        let mark = &self.credit.budget_mark;
        mark.set(mark.get().max(self.goes_below(stream, len)));
    }

    /// Whether streams have to look for what is left for them.
    pub(crate) fn is_socket_budget_spent(&self) -> bool {
        let limit = self.config.settings().limits.unread_fallback_bytes as u64;
        self.credit.is_known() && self.credit.socket_unread.get() >= FREE * limit / PARTS
    }

    /// Counts a message of a stream that went over the socket.
    pub(crate) fn note_sent_over_socket(&self, stream: &StreamInner, len: usize) {
        let cost = cost_of(len);
        stream.sending.note_sent_over_socket(len as u64, cost);
        stream.note_unanswered(len as u64);
        self.credit.last_over_socket.set(Some(Instant::now()));
        self.credit.socket_unread.set(self.credit.socket_unread.get() + cost);
    }

    /// Less of what went over the socket waits at the peer.
    pub(crate) fn note_socket_taken(&self, cost: u64) {
        if cost > 0 {
            let unread = self.credit.socket_unread.get().saturating_sub(cost);
            self.credit.socket_unread.set(unread);
            if unread < self.credit.budget_mark.get() {
                self.credit.budget_mark.set(0);
                self.credit.budget_waiting.wake_all();
            }
        }
    }

    /// Asks the peer for the credit that it keeps until it is worth an event, when memory is short
    /// and a stream needs to know whether its reader is behind, and to be told when its reader
    /// waits. An event of credit for nothing.
    pub(crate) fn ask_for_credit(self: &Rc<Self>, stream: &StreamInner) {
        if !stream.sending.may_ask() || self.is_over() {
            return;
        }
        let status = EventState::Credit.to_status();
        let event = Event { stream_id: stream.id(), offset: 0, status };
        if matches!(self.put_event(event), Ok(true)) {
            // It opens the stream, if nothing has.
            stream.note_known_to_peer();
            stream.sending.note_asked();
        }
    }

    /// The peer asks for credit.
    #[cold]
    fn answer_for_credit(self: &Rc<Self>, stream: &StreamInner) {
        stream.receiving.set_wants_reader(true);
        let credit = stream.receiving.take();
        if credit > 0 || stream.is_waited_for() {
            self.send_credit(stream, credit);
        } else {
            stream.receiving.note_asked();
        }
    }

    /// Tells the peer, which wants to know it, that a reader waits now.
    #[cold]
    pub(crate) fn tell_reader_waits(self: &Rc<Self>, stream: &StreamInner) {
        self.send_credit(stream, stream.receiving.take());
    }

    /// A reader took a message.
    #[inline]
    pub(crate) fn note_taken(self: &Rc<Self>, stream: &StreamInner, chain: &Chain) {
        self.note_unread(chain.socket_cost());
        self.give_credit(stream, chain.occupies(), !chain.is_shared());
    }

    /// Tells the peer how much a reader has taken, when that is due.
    #[inline]
    pub(crate) fn give_credit(
        self: &Rc<Self>,
        stream: &StreamInner,
        occupied: u64,
        over_socket: bool,
    ) {
        let window = self.credit.window_here.get();
        // While the peer has not said that it knows of credit, none is due, but it is counted.
        let is_known = window != UNBOUNDED;
        let done = over_socket && is_known && stream.inbound.borrow().socket_len() == 0;
        match stream.receiving.note_taken(occupied, over_socket, done, window) {
            CreditUpdate::Not => {}
            // It would take the event for data, whatever came over the socket.
            _ if !is_known => {}
            CreditUpdate::Soon => self.give_credit_soon(stream),
            CreditUpdate::Now => self.send_credit(stream, stream.receiving.take()),
        }
    }

    #[inline(never)]
    fn give_credit_soon(self: &Rc<Self>, stream: &StreamInner) {
        if !self.channels.producer.borrow().is_peer_asleep() {
            self.send_credit(stream, stream.receiving.take());
        } else if !stream.has_waiting_credit.replace(true) {
            self.credit.waiting.borrow_mut().push(stream.id());
        }
    }

    /// A message of a stream came. Whoever sent it may have come to the end of its credit.
    #[inline]
    pub(crate) fn note_come(self: &Rc<Self>, stream: &StreamInner, chain: &Chain) {
        stream.receiving.note_come(chain.occupies());
        if stream.has_waiting_credit.get()
            && stream.receiving.is_sender_near_its_end(self.credit.window_here.get())
        {
            self.send_credit(stream, stream.receiving.take());
        }
    }

    /// Sends the credit that waits until the peer is awake, or about to be woken anyway.
    #[inline]
    pub(crate) fn send_waiting_credit(self: &Rc<Self>) {
        if self.credit.waiting.borrow().is_empty() {
            return;
        }
        let is_woken = self.channels.must_look.get();
        if is_woken || !self.channels.producer.borrow().is_peer_asleep() {
            self.send_all_waiting_credit();
        }
    }

    #[inline(never)]
    fn send_all_waiting_credit(self: &Rc<Self>) {
        // The list does not grow meanwhile: credit goes out, or is kept for the queue.
        for stream_id in self.credit.waiting.take() {
            let stream = self.streams.borrow().get(stream_id).cloned();
            let Some(stream) = stream else { continue };
            stream.has_waiting_credit.set(false);
            // It may have been sent since.
            let credit = stream.receiving.take();
            if credit > 0 {
                self.send_credit(&stream, credit);
            }
        }
    }

    #[inline(never)]
    fn send_credit(self: &Rc<Self>, stream: &StreamInner, credit: u32) {
        let says_reader_waits = stream.receiving.wants_reader() && stream.is_waited_for();
        // Credit for nothing would ask for some.
        if self.is_over() || (credit == 0 && !says_reader_waits) {
            return;
        }
        let credit_status = EventState::Credit.to_status();
        let status = if says_reader_waits { READER_WAITS_STATUS } else { credit_status };
        let event = Event { stream_id: stream.id(), offset: credit, status };
        match self.put_event(event) {
            Ok(true) => {
                if says_reader_waits {
                    stream.receiving.set_wants_reader(false);
                }
                self.counters.credits_sent.add(1);
            }
            Ok(false) => {
                stream.receiving.put_back(credit);
                if !stream.owes_credit.replace(true) {
                    self.credit.kept.borrow_mut().push_back(stream.id());
                }
                self.activate();
            }
            // The session is over.
            Err(_) => {}
        }
    }

    /// Sends the credit that found the queue full, as far as there is room now.
    pub(crate) fn send_kept_credit(self: &Rc<Self>) {
        while let Some(stream_id) = { self.credit.kept.borrow_mut().pop_front() } {
            let stream = self.streams.borrow().get(stream_id).cloned();
            let Some(stream) = stream else { continue };
            stream.owes_credit.set(false);
            self.send_credit(&stream, stream.receiving.take());
            if stream.owes_credit.get() {
                // Still full.
                return;
            }
        }
    }

    /// The peer's reader has taken so much of a stream, or waits, or the peer wants to know that.
    pub(crate) fn take_credit(self: &Rc<Self>, event: Event) {
        let says_reader_waits = event.says_reader_waits();
        let asks = event.offset == 0 && !says_reader_waits;
        let stream = self.streams.borrow().get(event.stream_id).cloned();
        match stream {
            Some(stream) if asks => self.answer_for_credit(&stream),
            Some(stream) => {
                let taken = stream.sending.credit(u64::from(event.offset));
                if says_reader_waits {
                    stream.sending.note_wanted();
                }
                self.note_socket_taken(taken);
                stream.writer.wake();
            }
            None if asks => self.open_by_asking(event.stream_id),
            None => {}
        }
    }
}
