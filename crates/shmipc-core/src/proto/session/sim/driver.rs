// SPDX-License-Identifier: MIT OR Apache-2.0
//! The actions of a simulated side: what a front end does for a session, without a runtime. Tasks
//! are flags that say whether they were woken; whoever drives the side polls those.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;

use crate::config::Wakeup;
use crate::error::{Error, MemoryError};
use crate::proto::Negotiated;
use crate::proto::session::driver::{Counted, Driver};
use crate::proto::session::sim::link::{EventQueue, Pipe, Pool, SimInbound, SimPayload};
use crate::proto::session::stream::{Half, Halves, StreamEntry};
use crate::proto::session::{RunningSession, SessionLimits};
use crate::proto::stream_table::Role;
use crate::wire::{Deframer, Event, EventState, Extension, MessageType, sync_event};

/// Payload waits while so much is kept for the socket.
const KEEP_AT_MOST: usize = 2 << 10;
/// So much of other messages is kept.
const KEEP_OF_OTHERS: usize = 4 << 20;
/// The longest message on the socket.
pub(super) const MESSAGE_LEN: u32 = 1 << 16;

/// Whether a task is to be polled.
pub(crate) type Task = Rc<Cell<bool>>;

/// The task that waits for one thing.
#[derive(Default)]
pub(crate) struct TaskSlot {
    task: RefCell<Option<Task>>,
    is_waiting: Cell<bool>,
}

impl TaskSlot {
    /// Whether nothing waited before.
    pub(super) fn register(&self, task: &Task) -> bool {
        *self.task.borrow_mut() = Some(Rc::clone(task));
        !self.is_waiting.replace(true)
    }

    pub(super) fn wake(&self) {
        if self.is_waiting.replace(false)
            && let Some(task) = &*self.task.borrow()
        {
            task.set(true);
        }
    }
}

/// Tasks that wait for the same thing, some of them until a time.
#[derive(Default)]
pub(crate) struct TaskList(RefCell<Vec<(Task, Option<Instant>)>>);

impl TaskList {
    pub(super) fn register(&self, task: &Task, until: Option<Instant>) {
        self.remove(task);
        self.0.borrow_mut().push((Rc::clone(task), until));
    }

    pub(super) fn remove(&self, task: &Task) {
        self.0.borrow_mut().retain(|(other, _)| !Rc::ptr_eq(task, other));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    pub(super) fn wake_all(&self) {
        self.0.take().iter().for_each(|(task, _)| task.set(true));
    }

    pub(super) fn wake_expired(&self, now: Instant) {
        self.0.borrow_mut().retain(|(task, until)| {
            let is_late = until.is_some_and(|until| until <= now);
            task.set(task.get() || is_late);
            !is_late
        });
    }
}

/// The tasks of a stream.
#[derive(Default)]
pub(crate) struct StreamTasks {
    pub(super) reader: TaskSlot,
    pub(super) writer: TaskSlot,
}

/// A stream of a simulated side.
pub(crate) type SimStream = StreamEntry<Side>;

/// Whether a side looks at its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Residency {
    /// It has turns.
    Active,
    /// It is looked at from time to time, and has not said that it sleeps.
    Standby,
    /// It has said that it sleeps.
    Asleep,
}

/// The memory and the connection that two sides share.
pub(crate) struct Link {
    pub(super) pool: Rc<Pool>,
    /// What the client, and what the server sends.
    pub(super) queues: [Rc<EventQueue>; 2],
    pub(super) pipes: [Rc<Pipe>; 2],
    /// The eventfds that the client, and that the server reads.
    pub(super) bells: [Rc<Cell<bool>>; 2],
    /// What the client, and what the server has said that it knows.
    pub(super) extensions: [Rc<Cell<Option<Extension>>>; 2],
    pub(super) clock: Rc<Cell<Instant>>,
}

/// What waits for the socket.
#[derive(Default)]
pub(super) struct Outbox {
    kept: RefCell<VecDeque<u8>>,
    taken_in: Cell<u64>,
    pub(super) is_cut: Cell<bool>,
    pub(super) waiters: TaskList,
}

/// The task that reads the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketTask {
    /// It waits until there is something to read.
    Reading,
    /// It is about to read.
    Woken,
    /// It waits until less of what came is unread.
    Paused,
}

/// One side of a session: the state machine, and what it drives.
pub(crate) struct Side {
    pub(super) number: usize,
    pub(super) proto: RunningSession<Self>,
    pool: Rc<Pool>,
    pub(super) out: Rc<EventQueue>,
    pub(super) inn: Rc<EventQueue>,
    pub(super) must_look: Cell<bool>,
    pub(super) pipe_out: Rc<Pipe>,
    pub(super) pipe_in: Rc<Pipe>,
    pub(super) outbox: Outbox,
    pub(super) deframer: RefCell<Deframer>,
    pub(super) is_hung_up: Cell<bool>,
    pub(super) socket_task: Cell<SocketTask>,
    pub(super) residency: Cell<Residency>,
    pub(super) bell: Rc<Cell<bool>>,
    peer_bell: Rc<Cell<bool>>,
    peer_extension: Rc<Cell<Option<Extension>>>,
    pub(super) clock: Rc<Cell<Instant>>,
    /// Whether it behaves as other implementations do: it does not drain its queue before it
    /// handles a message, and drops what is in it when the connection ends.
    pub(super) is_foreign: bool,
    has_sent: Cell<bool>,
    /// Goes up with everything that happens.
    pub(super) activity: Cell<u64>,
    /// Tasks that wait for room in the queue, for slices, for less that is unread at the peer, and
    /// to leave the socket.
    pub(super) room: TaskList,
    pub(super) memory: TaskList,
    pub(super) budget: TaskList,
    pub(super) returning: TaskList,
    pub(super) accepting: Task,
}

impl Side {
    /// The client's or the server's side of a link.
    pub(super) fn new(
        role: Role,
        negotiated: Negotiated,
        limits: SessionLimits,
        link: &Link,
        is_foreign: bool,
    ) -> Rc<Self> {
        let (number, peer) = if role == Role::Client { (0, 1) } else { (1, 0) };
        let side = Self {
            number,
            proto: RunningSession::new(role, negotiated, limits),
            pool: Rc::clone(&link.pool),
            out: Rc::clone(&link.queues[number]),
            inn: Rc::clone(&link.queues[peer]),
            must_look: Cell::new(false),
            pipe_out: Rc::clone(&link.pipes[number]),
            pipe_in: Rc::clone(&link.pipes[peer]),
            outbox: Outbox::default(),
            deframer: RefCell::new(Deframer::new(MESSAGE_LEN)),
            is_hung_up: Cell::new(false),
            socket_task: Cell::new(SocketTask::Reading),
            residency: Cell::new(Residency::Asleep),
            bell: Rc::clone(&link.bells[number]),
            peer_bell: Rc::clone(&link.bells[peer]),
            peer_extension: Rc::clone(&link.extensions[peer]),
            clock: Rc::clone(&link.clock),
            is_foreign,
            has_sent: Cell::new(false),
            activity: Cell::new(0),
            room: TaskList::default(),
            memory: TaskList::default(),
            budget: TaskList::default(),
            returning: TaskList::default(),
            accepting: Rc::new(Cell::new(role == Role::Server)),
        };
        let side = Rc::new(side);
        side.proto.look_for_extension(&*side);
        side
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.get()
    }

    pub(super) fn note_activity(&self) {
        self.activity.set(self.activity.get() + 1);
    }

    pub(super) fn pool(&self) -> &Rc<Pool> {
        &self.pool
    }

    pub(super) fn is_over(&self) -> bool {
        self.proto.is_over()
    }

    pub(super) fn wakeup(&self) -> Wakeup {
        self.proto.negotiated().wakeup
    }

    /// Sends what is kept, as far as the socket takes it.
    pub(super) fn send_kept(&self) {
        let mut kept = self.outbox.kept.borrow_mut();
        if self.pipe_out.is_closed.get() {
            return;
        }
        let sent = self.pipe_out.write(kept.make_contiguous());
        kept.drain(..sent);
        drop(kept);
        if sent > 0 {
            self.note_activity();
            self.outbox.waiters.wake_all();
        }
    }

    pub(super) fn is_outbox_empty(&self) -> bool {
        self.outbox.kept.borrow().is_empty()
    }

    pub(super) fn note_hung_up(&self) {
        self.is_hung_up.set(true);
        self.activate();
    }

    /// Others close a stream by the queue, also when its last data went over the socket, which has
    /// taken that by then.
    fn close_by_queue(&self, message: &[u8]) -> bool {
        let [.., kind, a, b, c, d] = *message else { return false };
        let is_close = message.len() == 12 && kind == MessageType::StreamClose as u8;
        if !is_close || !self.is_outbox_empty() {
            return false;
        }
        let (stream_id, status) =
            (u32::from_be_bytes([a, b, c, d]), EventState::Closed.to_status());
        self.push_event(Event { stream_id, offset: 0, status }).is_ok_and(|is_pushed| is_pushed)
    }

    /// One half of a handle is gone.
    pub(super) fn drop_half(&self, stream: &SimStream, half: Half) {
        match (stream.drop_half(half), half) {
            (Halves::None, _) => self.proto.close_stream(self, stream),
            (_, Half::Write) => self.proto.half_close_stream(self, stream),
            (_, Half::Read) => self.proto.on_reader_dropped(self, stream),
        }
    }
}

impl Driver for Side {
    type Payload = SimPayload;
    type Inbound = SimInbound;
    type SliceId = u32;
    type StreamTasks = StreamTasks;
    type Slot<'a> = ();

    fn reserve(&self) -> Result<Option<()>, MemoryError> {
        Ok((!self.out.is_full()?).then_some(()))
    }

    fn commit(&self, (): (), event: Event, _len: usize) {
        assert!(self.push_event(event).is_ok_and(|is_pushed| is_pushed), "room was reserved");
        self.record(Counted::EventSent);
    }

    fn push_event(&self, event: Event) -> Result<bool, MemoryError> {
        let is_pushed = self.out.push(event)?;
        if is_pushed {
            self.note_activity();
            if !self.must_look.replace(true) || self.out.unpublished() >= 8 {
                self.out.publish();
            }
            self.activate();
        }
        Ok(is_pushed)
    }

    fn flush_queue(&self) {
        if !self.must_look.replace(false) || self.is_over() {
            return;
        }
        self.out.publish();
        let is_polled = matches!(self.wakeup(), Wakeup::Polling(_));
        if is_polled || !self.out.must_ring() {
            return;
        }
        self.note_activity();
        self.proto.must_prove_itself(self);
        match self.wakeup() {
            Wakeup::EventFd => self.peer_bell.set(true),
            _ => self.send_message(&sync_event(self.proto.version_byte())),
        }
    }

    fn has_unflushed(&self) -> bool {
        self.must_look.get()
    }

    fn events_pushed(&self) -> i64 {
        self.out.pushed()
    }

    fn in_flight(&self) -> Result<(i64, u32), MemoryError> {
        self.out.in_flight()
    }

    fn is_peer_asleep(&self) -> bool {
        self.out.is_peer_asleep()
    }

    fn drain_queue(&self) {
        if !self.is_foreign {
            self.drain_all();
        }
    }

    fn adopt(&self, offset: u32) -> Result<SimPayload, MemoryError> {
        self.pool.adopt(offset).map(|parcel| SimPayload::of_slices(&self.pool, parcel))
    }

    fn received(&self, data: Bytes) -> SimPayload {
        SimPayload::of_socket(data)
    }

    fn new_inbound(&self) -> SimInbound {
        SimInbound::default()
    }

    fn sent_at(&self, offset: u32) -> Option<u32> {
        self.pool.sent_at(self.number, offset)
    }

    fn is_with_peer(&self, slice: u32) -> bool {
        self.pool.is_with_peer(self.number, slice)
    }

    fn find_sent(&self, from: u32, found: &mut Vec<u32>) -> Option<u32> {
        let (count, end) = (self.pool.slice_count() as u32, from + 16);
        found.extend((from..end.min(count)).filter(|&slice| self.is_with_peer(slice)));
        (end < count).then_some(end)
    }

    fn is_memory_short(&self) -> bool {
        self.pool.is_short(self.number)
    }

    fn might_allocate(&self) -> bool {
        self.pool.might_allocate(self.number)
    }

    fn smallest_slice(&self) -> usize {
        self.pool.smallest_slice()
    }

    fn is_memory_lost(&self) -> bool {
        false
    }

    fn peer_extension(&self) -> Option<Extension> {
        self.peer_extension.get().filter(|_| !self.is_foreign)
    }

    fn send_message(&self, message: &[u8]) {
        let outbox = &self.outbox;
        if outbox.kept.borrow().len() > KEEP_OF_OTHERS {
            return self.proto.fail(self, Error::PeerNotReading);
        }
        self.note_activity();
        if self.is_foreign && self.close_by_queue(message) {
            return;
        }
        outbox.taken_in.set(outbox.taken_in.get() + message.len() as u64);
        let is_gone = self.pipe_out.is_closed.get();
        let is_taken = self.is_outbox_empty() && !is_gone;
        let sent = if is_taken { self.pipe_out.write(message) } else { 0 };
        outbox.kept.borrow_mut().extend(&message[sent..]);
        if is_gone {
            self.note_hung_up();
        }
    }

    fn has_sent(&self) -> bool {
        self.has_sent.get()
    }

    fn socket_bytes(&self) -> u64 {
        self.outbox.taken_in.get()
    }

    fn unsent_bytes(&self) -> usize {
        self.outbox.kept.borrow().len()
    }

    fn bytes_in_socket(&self) -> usize {
        self.pipe_out.unread()
    }

    fn is_outbox_full(&self) -> bool {
        self.unsent_bytes() >= KEEP_AT_MOST
    }

    fn wakes_through_socket(&self) -> bool {
        self.wakeup() == Wakeup::Socket
    }

    fn activate(&self) {
        if self.residency.get() == Residency::Active || self.is_over() {
            return;
        }
        // Others look at the queue when they are woken, and at no other time.
        if self.residency.replace(Residency::Active) == Residency::Asleep && !self.is_foreign {
            self.inn.set_working();
        }
    }

    fn wake_reader(&self, stream: &SimStream) {
        stream.tasks.reader.wake();
    }

    fn is_reader_waiting(&self, stream: &SimStream) -> bool {
        stream.tasks.reader.is_waiting.get()
    }

    fn wake_writer(&self, stream: &SimStream) {
        stream.tasks.writer.wake();
    }

    fn wake_acceptors(&self) {
        self.accepting.set(true);
    }

    fn wake_budget_waiters(&self) {
        self.budget.wake_all();
    }

    fn resume_socket_reader(&self) {
        if self.socket_task.get() == SocketTask::Paused {
            self.socket_task.set(SocketTask::Woken);
        }
    }

    fn on_end(&self, _error: &Error) {
        self.note_activity();
        let lists = [&self.room, &self.budget, &self.returning, &self.memory];
        lists.iter().for_each(|list| list.wake_all());
        self.accepting.set(true);
        let kept = self.outbox.kept.take();
        self.outbox.is_cut.set(self.outbox.is_cut.get() || !kept.is_empty());
        self.outbox.waiters.wake_all();
        self.inn.show_head();
        self.pipe_out.is_closed.set(true);
        self.pipe_in.is_closed.set(true);
    }

    fn record(&self, what: Counted) {
        if matches!(what, Counted::EventSent | Counted::FallbackSent) {
            self.has_sent.set(true);
        }
    }
}
