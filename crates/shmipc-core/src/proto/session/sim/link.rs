// SPDX-License-Identifier: MIT OR Apache-2.0
//! What lies between two simulated sides: the IO queues, the slices, and the socket, over plain
//! vectors.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;

use crate::error::MemoryError;
use crate::payload::{Inbound, Payload};
use crate::wire::{Deframer, Event};

/// An IO queue. Both ends keep an index of their own and show it to the other end from time to
/// time.
pub(crate) struct EventQueue {
    capacity: i64,
    /// From the true head to the true tail.
    events: RefCell<VecDeque<Event>>,
    tail: Cell<i64>,
    shown_tail: Cell<i64>,
    /// The shown tail as the consumer last read it.
    known_tail: Cell<i64>,
    head: Cell<i64>,
    shown_head: Cell<i64>,
    /// The working flag of the consumer.
    is_working: Cell<bool>,
    /// Whether the indices do not hold together any more.
    pub(super) is_broken: Cell<bool>,
}

impl EventQueue {
    pub(super) fn new(capacity: i64) -> Self {
        Self {
            capacity,
            events: RefCell::default(),
            tail: Cell::new(0),
            shown_tail: Cell::new(0),
            known_tail: Cell::new(0),
            head: Cell::new(0),
            shown_head: Cell::new(0),
            is_working: Cell::new(false),
            is_broken: Cell::new(false),
        }
    }

    fn check(&self) -> Result<(), MemoryError> {
        let (value, low, high) = (-1, self.shown_head.get(), self.shown_tail.get());
        let error = MemoryError::QueueIndex { index: "head", value, low, high };
        if self.is_broken.get() { Err(error) } else { Ok(()) }
    }

    pub(super) fn push(&self, event: Event) -> Result<bool, MemoryError> {
        if self.is_full()? {
            return Ok(false);
        }
        self.events.borrow_mut().push_back(event);
        self.tail.set(self.tail.get() + 1);
        Ok(true)
    }

    pub(super) fn is_full(&self) -> Result<bool, MemoryError> {
        self.check()?;
        Ok(self.tail.get() - self.shown_head.get() >= self.capacity)
    }

    pub(super) fn unpublished(&self) -> i64 {
        self.tail.get() - self.shown_tail.get()
    }

    pub(super) fn publish(&self) {
        self.shown_tail.set(self.tail.get());
    }

    /// Whether the consumer sleeps and is to be woken: true once per sleep.
    pub(super) fn must_ring(&self) -> bool {
        !self.is_working.replace(true)
    }

    pub(super) fn is_peer_asleep(&self) -> bool {
        !self.is_working.get()
    }

    pub(super) fn pushed(&self) -> i64 {
        self.tail.get()
    }

    pub(super) fn in_flight(&self) -> Result<(i64, u32), MemoryError> {
        self.check()?;
        let head = self.shown_head.get();
        Ok((head, (self.shown_tail.get() - head) as u32))
    }

    /// How many events the consumer knows of, after a look at the tail if it knows of none.
    pub(super) fn available(&self) -> usize {
        if self.known_tail.get() == self.head.get() {
            return self.available_now();
        }
        (self.known_tail.get() - self.head.get()) as usize
    }

    pub(super) fn available_now(&self) -> usize {
        self.known_tail.set(self.shown_tail.get());
        (self.known_tail.get() - self.head.get()) as usize
    }

    pub(super) fn pop(&self) -> Option<Event> {
        if self.head.get() == self.known_tail.get() {
            return None;
        }
        let event = self.events.borrow_mut().pop_front();
        self.head.set(self.head.get() + 1);
        if self.head.get() - self.shown_head.get() >= (self.capacity / 2).max(1) {
            self.show_head();
        }
        event
    }

    /// Gives the slots of taken events back. Whether there were any.
    pub(super) fn show_head(&self) -> bool {
        self.shown_head.replace(self.head.get()) != self.head.get()
    }

    pub(super) fn set_working(&self) {
        self.is_working.set(true);
    }

    pub(super) fn try_sleep(&self) -> bool {
        self.show_head();
        let is_empty = self.available_now() == 0;
        self.is_working.set(!is_empty);
        is_empty
    }

    /// Whether nothing is in it, published or not.
    pub(super) fn is_empty(&self) -> bool {
        self.events.borrow().is_empty()
    }
}

/// Whose a slice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SliceState {
    Free,
    /// Taken by one side, and not sent.
    Held,
    /// Sent by this side, and not given back.
    Sent(usize),
}

struct Slice {
    class: usize,
    /// In whose list it stands.
    list: usize,
    state: SliceState,
}

/// The bytes of a message that was sent, and its slices.
type Parcel = (Vec<u32>, Bytes);

/// The buffer memory of a session: slices of a few sizes.
pub(crate) struct Pool {
    capacities: Vec<usize>,
    slices: RefCell<Vec<Slice>>,
    /// By list, then by class. One list if both sides share them.
    free: RefCell<Vec<Vec<Vec<u32>>>>,
    /// What was sent, by its first slice.
    parcels: RefCell<Vec<Option<Parcel>>>,
    total: usize,
}

/// A part in so many is for short messages of streams whose readers read.
const RESERVE_SHARE: usize = 8;
const OFFSET_STEP: u32 = 64;

impl Pool {
    /// So many slices of each capacity, in one list or in one of each side.
    pub(super) fn new(classes: &[(usize, usize)], lists: usize) -> Rc<Self> {
        let mut slices = Vec::new();
        let mut free = vec![vec![Vec::new(); classes.len()]; lists];
        for (list, free) in free.iter_mut().enumerate() {
            for (class, (_, count)) in classes.iter().enumerate() {
                for _ in 0..*count {
                    free[class].push(slices.len() as u32);
                    slices.push(Slice { class, list, state: SliceState::Free });
                }
            }
        }
        let total = classes.iter().map(|(capacity, count)| capacity * count).sum();
        let parcels = RefCell::new((0..slices.len()).map(|_| None).collect());
        let capacities = classes.iter().map(|(capacity, _)| *capacity).collect();
        let (slices, free) = (RefCell::new(slices), RefCell::new(free));
        Rc::new(Self { capacities, slices, free, parcels, total })
    }

    fn list_of(&self, side: usize) -> usize {
        side % self.free.borrow().len()
    }

    /// Slices that hold so many bytes; fewer, if `partial`, but not none.
    pub(super) fn allocate(&self, side: usize, len: usize, partial: bool) -> Option<Vec<u32>> {
        let list = self.list_of(side);
        let mut taken = Vec::new();
        let mut left = len;
        while left > 0 {
            let mut free = self.free.borrow_mut();
            let of_list = &mut free[list];
            // The smallest that holds it, or the largest that there is.
            let fits =
                |class: &usize| self.capacities[*class] >= left && !of_list[*class].is_empty();
            let any = |class: &usize| !of_list[*class].is_empty();
            let class = (0..self.capacities.len()).find(fits);
            let Some(class) = class.or_else(|| (0..self.capacities.len()).rev().find(any)) else {
                drop(free);
                if partial && !taken.is_empty() {
                    break;
                }
                self.give_back(&taken);
                return None;
            };
            let id = of_list[class].pop()?;
            self.slices.borrow_mut()[id as usize].state = SliceState::Held;
            taken.push(id);
            left = left.saturating_sub(self.capacities[class]);
        }
        Some(taken)
    }

    pub(super) fn capacity_of(&self, slices: &[u32]) -> usize {
        let all = self.slices.borrow();
        slices.iter().map(|&id| self.capacities[all[id as usize].class]).sum()
    }

    /// Puts bytes into slices, which are the peer's from here on. Returns the offset of the first.
    pub(super) fn send(&self, side: usize, slices: Vec<u32>, bytes: Bytes) -> u32 {
        for &id in &slices {
            self.slices.borrow_mut()[id as usize].state = SliceState::Sent(side);
        }
        let first = slices[0];
        self.parcels.borrow_mut()[first as usize] = Some((slices, bytes));
        (first + 1) * OFFSET_STEP
    }

    fn id_at(&self, offset: u32) -> Option<u32> {
        let id = (offset / OFFSET_STEP).checked_sub(1)?;
        let is_one = offset.is_multiple_of(OFFSET_STEP) && (id as usize) < self.slice_count();
        is_one.then_some(id)
    }

    pub(super) fn adopt(&self, offset: u32) -> Result<Parcel, MemoryError> {
        let parcel =
            self.id_at(offset).and_then(|id| self.parcels.borrow_mut()[id as usize].take());
        parcel.ok_or(MemoryError::Field {
            what: "offset of a slice",
            value: offset.into(),
            problem: "no message starts there",
        })
    }

    pub(super) fn give_back(&self, slices: &[u32]) {
        for &id in slices {
            let mut all = self.slices.borrow_mut();
            let slice = &mut all[id as usize];
            assert!(slice.state != SliceState::Free, "slice {id} was given back twice");
            slice.state = SliceState::Free;
            self.free.borrow_mut()[slice.list][slice.class].push(id);
        }
    }

    pub(super) fn slice_count(&self) -> usize {
        self.slices.borrow().len()
    }

    /// How many slices are not free.
    pub(super) fn in_use(&self) -> usize {
        self.slices.borrow().iter().filter(|slice| slice.state != SliceState::Free).count()
    }

    /// How many slices are neither free nor in a message on its way.
    pub(super) fn held(&self) -> usize {
        let parcels = self.parcels.borrow();
        self.in_use() - parcels.iter().flatten().map(|(slices, _)| slices.len()).sum::<usize>()
    }

    pub(super) fn is_with_peer(&self, side: usize, id: u32) -> bool {
        self.slices.borrow()[id as usize].state == SliceState::Sent(side)
    }

    pub(super) fn sent_at(&self, side: usize, offset: u32) -> Option<u32> {
        self.id_at(offset).filter(|&id| self.is_with_peer(side, id))
    }

    pub(super) fn is_short(&self, side: usize) -> bool {
        let free = self.free.borrow();
        let of_class = |(class, ids): (usize, &Vec<u32>)| ids.len() * self.capacities[class];
        let left: usize = free[self.list_of(side)].iter().enumerate().map(of_class).sum();
        left < self.total / RESERVE_SHARE
    }

    pub(super) fn might_allocate(&self, side: usize) -> bool {
        self.free.borrow()[self.list_of(side)].iter().any(|ids| !ids.is_empty())
    }

    pub(super) fn smallest_slice(&self) -> usize {
        self.capacities[0]
    }
}

/// A received message.
pub(crate) struct SimPayload {
    bytes: Bytes,
    from: Origin,
}

enum Origin {
    Slices(Rc<Pool>, Vec<u32>),
    Socket { len: usize },
}

impl SimPayload {
    pub(super) fn of_slices(pool: &Rc<Pool>, (slices, bytes): Parcel) -> Self {
        Self { bytes, from: Origin::Slices(Rc::clone(pool), slices) }
    }

    pub(super) fn of_socket(bytes: Bytes) -> Self {
        Self { from: Origin::Socket { len: bytes.len() }, bytes }
    }

    /// Takes the first bytes of what is unread.
    pub(super) fn read(&mut self, count: usize) -> Bytes {
        self.bytes.split_to(count.min(self.bytes.len()))
    }
}

impl Drop for SimPayload {
    fn drop(&mut self) {
        if let Origin::Slices(pool, slices) = &self.from {
            pool.give_back(slices);
        }
    }
}

impl Payload for SimPayload {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn occupies(&self) -> u64 {
        match &self.from {
            Origin::Slices(pool, slices) => pool.capacity_of(slices) as u64,
            Origin::Socket { len } => *len as u64,
        }
    }

    fn is_shared(&self) -> bool {
        matches!(self.from, Origin::Slices(..))
    }

    fn socket_cost(&self) -> usize {
        match self.from {
            Origin::Slices(..) => 0,
            Origin::Socket { len } => Deframer::cost_of(len),
        }
    }
}

/// What a stream has received.
#[derive(Default)]
pub(crate) struct SimInbound(pub(super) VecDeque<SimPayload>);

impl Inbound<SimPayload> for SimInbound {
    fn push(&mut self, payload: SimPayload) {
        if !payload.is_empty() {
            self.0.push_back(payload);
        }
    }

    fn pop(&mut self) -> Option<SimPayload> {
        self.0.pop_front()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn socket_len(&self) -> usize {
        let by_socket = self.0.iter().filter(|payload| !payload.is_shared());
        by_socket.map(|payload| payload.bytes.len()).sum()
    }
}

/// One direction of the socket.
#[derive(Default)]
pub(crate) struct Pipe {
    bytes: RefCell<VecDeque<u8>>,
    pub(super) capacity: usize,
    pub(super) is_closed: Cell<bool>,
    lost: Cell<usize>,
}

impl Pipe {
    pub(super) fn new(capacity: usize) -> Rc<Self> {
        Rc::new(Self { capacity, ..Self::default() })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.borrow().len()
    }

    /// Puts in as much as there is room for. Returns how much.
    pub(super) fn write(&self, from: &[u8]) -> usize {
        let count = from.len().min(self.capacity - self.len());
        self.bytes.borrow_mut().extend(&from[..count]);
        count
    }

    pub(super) fn read(&self, to: &mut [u8]) -> usize {
        let mut bytes = self.bytes.borrow_mut();
        let count = to.len().min(bytes.len());
        for (to, byte) in to.iter_mut().zip(bytes.drain(..count)) {
            *to = byte;
        }
        count
    }

    /// Whether a read finds something, or the end.
    pub(super) fn is_readable(&self) -> bool {
        self.is_closed.get() || self.len() > 0
    }

    /// The last bytes never arrive.
    pub(super) fn lose_last(&self, count: usize) {
        let left = self.len().saturating_sub(count);
        self.lost.set(self.len() - left);
        self.bytes.borrow_mut().truncate(left);
    }

    /// How many bytes were not read, as its writer sees it.
    pub(super) fn unread(&self) -> usize {
        self.len() + self.lost.get()
    }
}

impl SimInbound {
    /// What its messages occupy.
    pub(super) fn occupied(&self) -> u64 {
        self.0.iter().map(Payload::occupies).sum()
    }
}
