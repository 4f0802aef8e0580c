// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two IO queues of a session (WIRE chapter 3; spec 6.2 to 6.4).
//!
//! Each queue is a single-producer, single-consumer ring. The side that moves an index keeps its true
//! value in private memory and never reads it back from shared memory; of the other side's index it
//! keeps a copy that may be stale, in the safe direction only (the producer sees too little room, the
//! consumer too few events), and reads the shared field when the copy says full or empty.
//!
//! Events and indices are published apart: [`Producer::push`] and [`Consumer::pop`] work on private
//! indices, `publish` stores them, so that a batch costs one store.
//!
//! # The working flag
//!
//! It belongs to the consumer, and means that somebody is draining. The argument that no wake-up is
//! lost is Dekker's: the producer stores the tail, fences, loads the flag; the consumer stores 0 into
//! the flag, fences, loads the tail. Whichever fence comes first, the other side's load comes after
//! it and sees the store before it: either the producer sees 0 and rings, or the consumer sees the
//! event and stays.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::access::{Memory, is_one_access};
use crate::error::MemoryError;
use crate::wire::event::{EVENT_LEN, Event};
use crate::wire::layout::{QUEUE_HEADER_LEN, QueueLayout, queue_len, queue_memory_len};

/// Indices above this are refused: no honest session gets there in a thousand years, and below it no
/// sum of an index and a capacity can wrap.
const INDEX_LIMIT: i64 = 1 << 62;

/// Bytes that the memory of both queues takes.
pub(crate) fn queues_len(capacity: u32) -> usize {
    // Fits: the configuration keeps the capacity below 2^24.
    queue_memory_len(capacity) as usize
}

/// Which half of the memory a side sends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Lays out two empty queues. The client does this before it speaks.
pub(crate) fn create<M: Memory>(
    memory: &Rc<M>,
    capacity: u32,
    layout: QueueLayout,
) -> (Producer<M>, Consumer<M>) {
    let half = queues_len(capacity) / 2;
    debug_assert!(memory.len() >= 2 * half);
    for base in [0, half] {
        // The peer sees none of this before the handshake, whose socket orders it.
        memory.store_u32(base + layout.capacity_offset(), capacity, Ordering::Relaxed);
        memory.store_u32(base + layout.flag_offset(), 0, Ordering::Relaxed);
        memory.store_i64(base + layout.head_offset(), 0);
        memory.store_i64(base + layout.tail_offset(), 0);
    }
    let ring = |base| Ring {
        memory: Rc::clone(memory),
        base,
        capacity,
        layout,
    };
    (
        Producer::starting_at(ring(0), 0, 0),
        Consumer::starting_at(ring(half), 0, 0),
    )
}

/// Checks two queues that the peer laid out, and takes the other ends of them.
pub(crate) fn map<M: Memory>(
    memory: &Rc<M>,
    layout: QueueLayout,
    side: Side,
) -> Result<(Producer<M>, Consumer<M>), MemoryError> {
    let have = memory.len();
    let half = have / 2;
    if half < QUEUE_HEADER_LEN || !half.is_multiple_of(4) || !have.is_multiple_of(2) {
        return Err(MemoryError::TooSmall {
            what: "two queue headers, in halves that are multiples of four,",
            needed: 2 * QUEUE_HEADER_LEN as u64,
            have: have as u64,
        });
    }
    let (send, receive) = match side {
        Side::Client => (0, half),
        Side::Server => (half, 0),
    };
    let (producer, tail, head) = map_ring(memory, layout, send, half)?;
    let (consumer, other_tail, own_head) = map_ring(memory, layout, receive, half)?;
    Ok((
        Producer::starting_at(producer, tail, head),
        Consumer::starting_at(consumer, own_head, other_tail),
    ))
}

/// One queue of a peer's memory, its capacity and its indices, all read once and checked.
fn map_ring<M: Memory>(
    memory: &Rc<M>,
    layout: QueueLayout,
    base: usize,
    half: usize,
) -> Result<(Ring<M>, i64, i64), MemoryError> {
    let capacity = memory.load_u32(base + layout.capacity_offset(), Ordering::Acquire);
    let field = |problem| MemoryError::Field {
        what: "queue capacity",
        value: u64::from(capacity),
        problem,
    };
    if capacity == 0 {
        return Err(field("a queue must hold events"));
    }
    let needed = queue_len(capacity);
    if needed > half as u64 {
        return Err(field("the memory does not hold that many events"));
    }
    let (head_at, tail_at) = (base + layout.head_offset(), base + layout.tail_offset());
    if !is_one_access(head_at) || !is_one_access(tail_at) {
        return Err(field("its indices would cross a cache line"));
    }
    let head = memory.load_i64(head_at);
    let tail = memory.load_i64(tail_at);
    check_index("head", head, 0, INDEX_LIMIT)?;
    check_index("tail", tail, head, head + i64::from(capacity))?;
    Ok((
        Ring {
            memory: Rc::clone(memory),
            base,
            capacity,
            layout,
        },
        tail,
        head,
    ))
}

fn check_index(index: &'static str, value: i64, low: i64, high: i64) -> Result<(), MemoryError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(MemoryError::QueueIndex {
        index,
        value,
        low,
        high,
    })
}

/// Where a queue stands. The capacity is private: what the peer writes over it has no effect.
struct Ring<M> {
    memory: Rc<M>,
    base: usize,
    capacity: u32,
    layout: QueueLayout,
}

impl<M: Memory> Ring<M> {
    fn slot_offset(&self, slot: u32) -> usize {
        self.base + QUEUE_HEADER_LEN + EVENT_LEN * slot as usize
    }

    fn next_slot(&self, slot: u32) -> u32 {
        if slot + 1 == self.capacity {
            0
        } else {
            slot + 1
        }
    }

    fn slot_of(&self, index: i64) -> u32 {
        // Indices are never negative (`check_index`) and a remainder of a u32 fits one.
        (index % i64::from(self.capacity)) as u32
    }

    fn flag(&self) -> usize {
        self.base + self.layout.flag_offset()
    }

    fn head(&self) -> usize {
        self.base + self.layout.head_offset()
    }

    fn tail(&self) -> usize {
        self.base + self.layout.tail_offset()
    }
}

/// The sending end of a queue.
pub(crate) struct Producer<M> {
    ring: Ring<M>,
    /// The true tail. The shared one is behind it by what is not yet published.
    tail: i64,
    published: i64,
    /// The peer's head as last read; the true one may be further.
    known_head: i64,
    slot: u32,
}

impl<M: Memory> Producer<M> {
    fn starting_at(ring: Ring<M>, tail: i64, head: i64) -> Self {
        let slot = ring.slot_of(tail);
        Self {
            ring,
            tail,
            published: tail,
            known_head: head,
            slot,
        }
    }

    /// Puts an event behind the others, unpublished. `Ok(false)`: the queue is full.
    #[inline]
    pub(crate) fn push(&mut self, event: Event) -> Result<bool, MemoryError> {
        if self.is_full()? {
            return Ok(false);
        }
        let at = self.ring.slot_offset(self.slot);
        let [stream_id, offset, status] = event.to_words();
        // Relaxed: `publish` releases them together.
        let memory = &self.ring.memory;
        memory.store_u32(at, stream_id, Ordering::Relaxed);
        memory.store_u32(at + 4, offset, Ordering::Relaxed);
        memory.store_u32(at + 8, status, Ordering::Relaxed);
        self.tail += 1;
        self.slot = self.ring.next_slot(self.slot);
        Ok(true)
    }

    /// Whether there is no room for one more event, by the peer's head of this moment.
    #[inline]
    pub(crate) fn is_full(&mut self) -> Result<bool, MemoryError> {
        let capacity = i64::from(self.ring.capacity);
        if self.tail - self.known_head < capacity {
            return Ok(false);
        }
        // Acquire, pairs with the release store of the head in the peer's `Consumer::publish`: the
        // peer has read the slots that it gives up.
        let head = self.ring.memory.load_i64(self.ring.head());
        check_index("head", head, self.known_head, self.published)?;
        self.known_head = head;
        Ok(self.tail - head >= capacity)
    }

    /// Whether there are events that the peer cannot see yet.
    #[inline]
    pub(crate) fn has_unpublished(&self) -> bool {
        self.tail != self.published
    }

    /// Shows the peer every event so far.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.has_unpublished() {
            // Release, pairs with the acquire load of the tail in the peer's `Consumer::pop`: the
            // events, and the slices they name, are written before.
            self.ring.memory.store_i64(self.ring.tail(), self.tail);
            self.published = self.tail;
        }
    }

    /// Whether the peer sleeps and must be sent a SyncEvent. True once per sleep.
    ///
    /// Call it after [`publish`](Self::publish); the argument is on the module's page.
    #[inline]
    pub(crate) fn must_ring(&self) -> bool {
        let memory = &self.ring.memory;
        memory.full_fence();
        let flag = self.ring.flag();
        // The plain load first: while the peer is awake the line stays shared between both cores.
        memory.load_u32(flag, Ordering::Acquire) == 0
            && memory.compare_exchange_u32(flag, 0, 1).is_ok()
    }

    /// How many published events the peer has not taken yet, by its head of this moment.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn in_flight(&mut self) -> Result<u32, MemoryError> {
        let head = self.ring.memory.load_i64(self.ring.head());
        check_index("head", head, self.known_head, self.published)?;
        self.known_head = head;
        // At most the capacity, by the check.
        Ok((self.published - head) as u32)
    }
}

/// The receiving end of a queue.
pub(crate) struct Consumer<M> {
    ring: Ring<M>,
    /// The true head. The shared one is behind it by what is not yet published.
    head: i64,
    published: i64,
    /// The peer's tail as last read; the true one may be further.
    known_tail: i64,
    slot: u32,
}

impl<M: Memory> Consumer<M> {
    fn starting_at(ring: Ring<M>, head: i64, tail: i64) -> Self {
        let slot = ring.slot_of(head);
        Self {
            ring,
            head,
            published: head,
            known_tail: tail,
            slot,
        }
    }

    /// How many events the queue holds.
    pub(crate) fn capacity(&self) -> u32 {
        self.ring.capacity
    }

    /// Takes the next event, if there is one.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<Event>, MemoryError> {
        if self.head == self.known_tail && !self.look()? {
            return Ok(None);
        }
        let at = self.ring.slot_offset(self.slot);
        let memory = &self.ring.memory;
        // Relaxed: the acquire load of the tail ordered them.
        let event = Event::from_words([
            memory.load_u32(at, Ordering::Relaxed),
            memory.load_u32(at + 4, Ordering::Relaxed),
            memory.load_u32(at + 8, Ordering::Relaxed),
        ]);
        self.head += 1;
        self.slot = self.ring.next_slot(self.slot);
        // A producer that waits for room should not have to wait for the end of the batch.
        if self.head - self.published >= i64::from(self.ring.capacity / 2).max(1) {
            self.publish();
        }
        Ok(Some(event))
    }

    /// Reads the peer's tail. Whether it shows events.
    #[inline]
    fn look(&mut self) -> Result<bool, MemoryError> {
        // Acquire, pairs with the release store of the tail in the peer's `Producer::publish`.
        let tail = self.ring.memory.load_i64(self.ring.tail());
        if tail == self.known_tail {
            return Ok(self.head != tail);
        }
        // The slots up to the published head are the producer's; beyond it must not have written.
        let high = self.published + i64::from(self.ring.capacity);
        check_index("tail", tail, self.known_tail, high.min(INDEX_LIMIT))?;
        self.known_tail = tail;
        Ok(self.head != tail)
    }

    /// Gives the slots of all taken events back to the producer.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.head != self.published {
            // Release, pairs with the acquire load of the head in the peer's `Producer::is_full`:
            // the events have been read.
            self.ring.memory.store_i64(self.ring.head(), self.head);
            self.published = self.head;
        }
    }

    /// Says that this side drains from now on, so that nobody sends it a SyncEvent.
    #[inline]
    pub(crate) fn set_working(&self) {
        // Relaxed: a producer that still sees 0 rings once more, which does no harm.
        self.ring
            .memory
            .store_u32(self.ring.flag(), 1, Ordering::Relaxed);
    }

    /// Says that this side stops draining. `Ok(false)`: an event came meanwhile, and this side goes
    /// on. The argument is on the module's page.
    pub(crate) fn try_sleep(&mut self) -> Result<bool, MemoryError> {
        self.publish();
        self.ring
            .memory
            .store_u32(self.ring.flag(), 0, Ordering::Release);
        self.ring.memory.full_fence();
        if self.look()? {
            self.set_working();
            return Ok(false);
        }
        Ok(true)
    }
}
