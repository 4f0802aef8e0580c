// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two IO queues of a session (spec 6.2 to 6.4; `docs/protocol.md#io-queues`).
//!
//! Each queue is a single-producer, single-consumer ring. The side that moves an index keeps its
//! true value in private memory and never reads it back from shared memory; of the other side's
//! index it keeps a copy that may be stale, in the safe direction only (the producer sees too
//! little room, the consumer too few events), and reads the shared field when the copy says full
//! or empty.
//!
//! Events and indices are published apart: [`Producer::push`] and [`Consumer::pop`] work on private
//! indices, `publish` stores them, so that a batch costs one store.
//!
//! # Indices in two cache lines
//!
//! shmipc-go takes a queue capacity of any size. With one that is 2 or 8 modulo 16 an index of the
//! second queue has its halves in two cache lines, and no processor reads or writes it in one go.
//! Only the carry into the upper half, once in 2^32 events, can be seen half done.
//!
//! - What this side reads, it reads upper, lower, upper; what is out of range is read again before
//!   it counts as wrong.
//! - The tail that this side writes carries only while the peer has drained the queue and sleeps
//!   ([`Producer::publish`]).
//! - The head that this side writes: lower half first, so that a peer that reads in between sees a
//!   queue that is full for a moment. What remains is a peer that reads the lower half before and
//!   the upper half after both stores: it sees room that is not there if the queue is full at that
//!   moment, and writes over events that were not taken.
//!
//! As creator this side refuses such capacities.
//!
//! # The working flag
//!
//! It belongs to the consumer, and means that somebody is draining. The argument that no wake-up
//! is lost is Dekker's: the producer stores the tail, fences, loads the flag; the consumer stores
//! 0 into the flag, fences, loads the tail. Whichever fence comes first, the other side's load
//! comes after it and sees the store before it: either the producer sees 0 and rings, or the
//! consumer sees the event and stays.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use crate::error::MemoryError;
use crate::shm::map::memory::{Memory, is_one_access};
use crate::wire::event::{EVENT_LEN, Event};
use crate::wire::layout::{QUEUE_HEADER_LEN, QueueLayout, queue_len, queue_memory_len};

/// How often an index is read again that may have been read in the middle of a carry.
const CARRY_TRIES: usize = 1000;

/// How often in a row a peer has to be seen asleep before the tail carries.
const CARRY_LOOKS: u32 = 1000;

/// Indices above this are refused: no honest session gets there in a thousand years, and below it
/// no sum of an index and a capacity can wrap.
const INDEX_LIMIT: i64 = 1 << 62;

/// Bytes that the memory of both queues takes.
pub fn queues_len(capacity: u32) -> usize {
    // Fits: the configuration keeps the capacity below 2^24.
    queue_memory_len(capacity) as usize
}

/// Lays out two empty queues, and takes the client's ends: it sends on the first. The client does
/// this before it speaks.
pub fn create<M: Memory>(
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
    let ring = |base| Ring::new(memory, base, capacity, layout);
    (Producer::starting_at(ring(0), 0, 0), Consumer::starting_at(ring(half), 0, 0))
}

/// Checks two queues that the client laid out, and takes the server's ends: it sends on the second.
pub fn map<M: Memory>(
    memory: &Rc<M>,
    layout: QueueLayout,
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
    let (producer, tail, head) = map_ring(memory, layout, half, half)?;
    let (consumer, other_tail, own_head) = map_ring(memory, layout, 0, half)?;
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
    let head = memory.load_i64(head_at);
    let tail = memory.load_i64(tail_at);
    check_index("head", head, 0, INDEX_LIMIT)?;
    check_index("tail", tail, head, head + i64::from(capacity))?;
    Ok((Ring::new(memory, base, capacity, layout), tail, head))
}

/// The next tail that has another upper half.
const fn next_carry(tail: i64) -> i64 {
    ((tail >> 32) + 1) << 32
}

fn check_index(index: &'static str, value: i64, low: i64, high: i64) -> Result<(), MemoryError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(MemoryError::QueueIndex { index, value, low, high })
}

/// Where a queue stands. The capacity is private: what the peer writes over it has no effect.
struct Ring<M> {
    memory: Rc<M>,
    capacity: u32,
    /// Offsets of the fields and of the first slot.
    flag: usize,
    head: usize,
    tail: usize,
    slots: usize,
}

impl<M: Memory> Ring<M> {
    fn new(memory: &Rc<M>, base: usize, capacity: u32, layout: QueueLayout) -> Self {
        Self {
            memory: Rc::clone(memory),
            capacity,
            flag: base + layout.flag_offset(),
            head: base + layout.head_offset(),
            tail: base + layout.tail_offset(),
            slots: base + QUEUE_HEADER_LEN,
        }
    }

    /// An index of the peer's, if it is in its range.
    #[inline]
    fn checked(
        &self,
        index: &'static str,
        value: i64,
        low: i64,
        high: i64,
    ) -> Result<i64, MemoryError> {
        if (low..=high).contains(&value) { Ok(value) } else { self.look_again(index, low, high) }
    }

    /// An index that crosses a cache line may have been read while the peer carried into its upper
    /// half. Another is as it is.
    #[cold]
    #[inline(never)]
    fn look_again(&self, index: &'static str, low: i64, high: i64) -> Result<i64, MemoryError> {
        let at = if index == "head" { self.head } else { self.tail };
        let mut value = self.memory.load_i64(at);
        for _ in 0..if is_one_access(at) { 0 } else { CARRY_TRIES } {
            if (low..=high).contains(&value) {
                break;
            }
            self.memory.relax();
            value = self.memory.load_i64(at);
        }
        check_index(index, value, low, high)?;
        Ok(value)
    }

    #[inline]
    fn slot_offset(&self, slot: u32) -> usize {
        self.slots + EVENT_LEN * slot as usize
    }

    #[inline]
    fn next_slot(&self, slot: u32) -> u32 {
        if slot + 1 == self.capacity { 0 } else { slot + 1 }
    }

    fn slot_of(&self, index: i64) -> u32 {
        // Indices are never negative (`check_index`) and a remainder of a u32 fits one.
        (index % i64::from(self.capacity)) as u32
    }

    #[inline]
    fn load(&self, slot: u32) -> Event {
        // Relaxed: the acquire load of the tail orders them.
        Event::from_words(self.memory.load_words(self.slot_offset(slot)))
    }
}

/// The sending end of a queue.
pub struct Producer<M> {
    ring: Ring<M>,
    /// The true tail. The shared one is behind it by what is not yet published.
    tail: i64,
    published: i64,
    /// The peer's head as last read; the true one may be further.
    known_head: i64,
    slot: u32,
    /// The tail that is the next to carry into its upper half, if the halves are in two lines.
    carry: i64,
    /// How often in a row the peer was seen asleep since the carry is due.
    carry_looks: u32,
}

impl<M: Memory> Producer<M> {
    fn starting_at(ring: Ring<M>, tail: i64, head: i64) -> Self {
        let slot = ring.slot_of(tail);
        let carry = if is_one_access(ring.tail) { i64::MAX } else { next_carry(tail) };
        Self { ring, tail, published: tail, known_head: head, slot, carry, carry_looks: 0 }
    }

    /// Puts an event behind the others, unpublished. `Ok(false)`: the queue is full.
    #[inline]
    pub fn push(&mut self, event: Event) -> Result<bool, MemoryError> {
        if self.is_full()? {
            return Ok(false);
        }
        self.push_into_room(event);
        Ok(true)
    }

    /// Puts an event behind the others, unpublished. The queue was seen to be
    /// [not full](Self::is_full) since the last one.
    #[inline(always)]
    pub fn push_into_room(&mut self, event: Event) {
        debug_assert!(self.has_room());
        // Relaxed: `publish` releases them together.
        self.ring.memory.store_words(self.ring.slot_offset(self.slot), event.to_words());
        self.tail += 1;
        self.slot = self.ring.next_slot(self.slot);
    }

    /// Whether there is no room for one more event, by the peer's head of this moment.
    #[inline(always)]
    pub fn is_full(&mut self) -> Result<bool, MemoryError> {
        if self.has_room() { Ok(false) } else { self.look_for_room() }
    }

    #[inline(always)]
    fn has_room(&self) -> bool {
        self.tail - self.known_head < i64::from(self.ring.capacity)
    }

    #[inline(never)]
    fn look_for_room(&mut self) -> Result<bool, MemoryError> {
        // Acquire, pairs with the release store of the head in the peer's `Consumer::publish`: the
        // peer has read the slots that it gives up.
        let head = self.ring.memory.load_i64(self.ring.head);
        self.known_head = self.ring.checked("head", head, self.known_head, self.published)?;
        Ok(!self.has_room())
    }

    /// How many events there are that the peer cannot see yet.
    #[inline]
    pub fn unpublished(&self) -> i64 {
        self.tail - self.published
    }

    /// Shows the peer every event so far. `false` when they have to wait for it to sleep.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.unpublished() > 0 {
            if self.tail >= self.carry && !self.may_carry() {
                return false;
            }
            // Release, pairs with the acquire load of the tail in the peer's `Consumer::pop`: the
            // events, and the slices they name, are written before.
            self.ring.memory.store_i64(self.ring.tail, self.tail);
            self.published = self.tail;
        }
        true
    }

    /// Whether a tail whose halves are in two cache lines may carry into the upper one: only while
    /// the peer has drained the queue and sleeps. A peer that read the halves meanwhile, in the
    /// other order, would see 2^32 events too many. It is woken when the tail is there.
    ///
    /// What is behind the carry waits until then, unpublished.
    #[cold]
    fn may_carry(&mut self) -> bool {
        // It looks at the queue once more after it has said that it sleeps, so this looks for a
        // while that it stays so.
        let is_asleep = self.ring.memory.load_u32(self.ring.flag, Ordering::Acquire) == 0;
        let has_drained = self.in_flight().is_ok_and(|(_, count)| count == 0);
        self.carry_looks = if is_asleep && has_drained { self.carry_looks + 1 } else { 0 };
        if self.carry_looks < CARRY_LOOKS {
            return false;
        }
        self.carry_looks = 0;
        self.carry = next_carry(self.tail);
        true
    }

    /// Whether the peer sleeps and must be woken, by a SyncEvent or an eventfd. True once per
    /// sleep.
    ///
    /// Call it after [`publish`](Self::publish); the argument is on the module's page.
    #[inline]
    pub fn must_ring(&self) -> bool {
        let memory = &self.ring.memory;
        memory.full_fence();
        let flag = self.ring.flag;
        // The plain load first: while the peer is awake the line stays shared between both cores.
        memory.load_u32(flag, Ordering::Acquire) == 0
            && memory.compare_exchange_u32(flag, 0, 1).is_ok()
    }

    /// Whether the peer seems to sleep. It may wake up, or go to sleep, meanwhile.
    pub fn is_peer_asleep(&self) -> bool {
        // Relaxed: nothing is concluded from it but whether something is done sooner or later.
        self.ring.memory.load_u32(self.ring.flag, Ordering::Relaxed) == 0
    }

    /// How many events there are and were, also those that the peer cannot see yet.
    pub fn pushed(&self) -> i64 {
        self.tail
    }

    /// The peer's head of this moment, and how many published events it has not taken yet.
    pub fn in_flight(&mut self) -> Result<(i64, u32), MemoryError> {
        // Acquire, as in `is_full`.
        let head = self.ring.memory.load_i64(self.ring.head);
        let head = self.ring.checked("head", head, self.known_head, self.published)?;
        self.known_head = head;
        // At most the capacity, by the check.
        Ok((head, (self.published - head) as u32))
    }
}

/// The receiving end of a queue.
pub struct Consumer<M> {
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
        Self { ring, head, published: head, known_tail: tail, slot }
    }

    /// Whether a page of the memory was not there, and it is nobody's but ours any more.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.ring.memory.is_lost()
    }

    /// Whether there is an event, by the peer's tail of this moment.
    #[inline]
    pub fn has_events(&mut self) -> Result<bool, MemoryError> {
        if self.head != self.known_tail { Ok(true) } else { self.look() }
    }

    /// How many events there are, by the peer's tail of this moment if none are known.
    #[inline(always)]
    pub fn available(&mut self) -> Result<u32, MemoryError> {
        // At most the capacity, by the check in `look`.
        Ok(if self.has_events()? { (self.known_tail - self.head) as u32 } else { 0 })
    }

    /// How many events there are by the peer's tail of this moment, also when some are known.
    pub fn available_now(&mut self) -> Result<u32, MemoryError> {
        self.look()?;
        // At most the capacity, by the check in `look`.
        Ok((self.known_tail - self.head) as u32)
    }

    /// Takes the next of the events that are [available](Self::available).
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Event> {
        if self.head == self.known_tail {
            return None;
        }
        let event = self.ring.load(self.slot);
        self.slot = self.ring.next_slot(self.slot);
        self.head += 1;
        // A producer that waits for room should not have to wait for the end of the batch.
        if self.head - self.published >= i64::from(self.ring.capacity / 2).max(1) {
            self.publish();
        }
        Some(event)
    }

    /// The slice that the event at `distance` behind the next one names, if there is such an event:
    /// so that it can be brought near before its turn.
    #[inline]
    pub fn offset_ahead(&self, distance: u32) -> Option<u32> {
        if self.known_tail - self.head <= i64::from(distance) {
            return None;
        }
        // No more than the capacity, by the line above, so that one subtraction wraps it.
        let slot = self.slot + distance;
        let slot = if slot >= self.ring.capacity { slot - self.ring.capacity } else { slot };
        Some(self.ring.load(slot).offset)
    }

    /// Reads the peer's tail. Whether it shows events.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, MemoryError> {
        // Acquire, pairs with the release store of the tail in the peer's `Producer::publish`.
        let tail = self.ring.memory.load_i64(self.ring.tail);
        // Before it is known whether the tail shows the slot: both lines are with the peer, and
        // this way they travel at the same time.
        self.ring.memory.prefetch(self.ring.slot_offset(self.slot));
        if tail == self.known_tail {
            return Ok(self.head != tail);
        }
        // The slots up to the published head are the producer's; beyond it must not have written.
        let high = self.published + i64::from(self.ring.capacity);
        let tail = self.ring.checked("tail", tail, self.known_tail, high.min(INDEX_LIMIT))?;
        self.known_tail = tail;
        Ok(self.head != tail)
    }

    /// Gives the slots of all taken events back to the producer.
    #[inline]
    pub fn publish(&mut self) {
        if self.head != self.published {
            // Release, pairs with the acquire load of the head in the peer's `Producer::is_full`:
            // the events have been read.
            self.ring.memory.store_i64(self.ring.head, self.head);
            self.published = self.head;
        }
    }

    /// Says that this side drains from now on, so that nobody sends it a SyncEvent.
    #[inline]
    pub fn set_working(&self) {
        // Relaxed: a producer that still sees 0 rings once more, which does no harm.
        self.ring.memory.store_u32(self.ring.flag, 1, Ordering::Relaxed);
    }

    /// Says that this side stops draining. `Ok(false)`: an event came meanwhile, and this side goes
    /// on. The argument is on the module's page.
    pub fn try_sleep(&mut self) -> Result<bool, MemoryError> {
        self.publish();
        self.ring.memory.store_u32(self.ring.flag, 0, Ordering::Release);
        self.ring.memory.full_fence();
        if self.look()? {
            self.set_working();
            return Ok(false);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::path::Path;
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;
    use crate::shm::map::region::Region;

    const LAYOUTS: [QueueLayout; 2] = if cfg!(all(target_arch = "x86_64", not(miri))) {
        [QueueLayout::PackedX86, QueueLayout::Aligned]
    } else {
        [QueueLayout::Aligned; 2]
    };

    type Ends = (Producer<Region>, Consumer<Region>);

    /// The client's and the server's ends of two queues on the heap.
    fn pair(capacity: u32, layout: QueueLayout) -> (Rc<Region>, Ends, Ends) {
        let memory = Rc::new(Region::heap(queues_len(capacity)));
        let client = create(&memory, capacity, layout);
        let server = map(&memory, layout).unwrap();
        (memory, client, server)
    }

    fn pop(consumer: &mut Consumer<Region>) -> Result<Option<Event>, MemoryError> {
        let available = consumer.available()?;
        let ahead = consumer.offset_ahead(0);
        let event = consumer.pop();
        assert_eq!(event.is_some(), available > 0);
        assert_eq!(ahead, event.map(|event| event.offset));
        Ok(event)
    }

    fn event(number: u32) -> Event {
        Event { stream_id: number, offset: !number, status: number << 8 }
    }

    #[test]
    fn both_directions_carry_events_in_order_and_apart() {
        for layout in LAYOUTS {
            let (_memory, mut client, mut server) = pair(16, layout);
            for number in 0..3 {
                assert!(client.0.push(event(number)).unwrap());
                assert!(server.0.push(event(100 + number)).unwrap());
            }
            client.0.publish();
            server.0.publish();
            for number in 0..3 {
                assert_eq!(pop(&mut server.1).unwrap(), Some(event(number)));
                assert_eq!(pop(&mut client.1).unwrap(), Some(event(100 + number)));
            }
            assert_eq!(pop(&mut server.1).unwrap(), None);
            assert_eq!(pop(&mut client.1).unwrap(), None);
        }
    }

    #[test]
    fn what_is_not_published_is_not_seen() {
        for layout in LAYOUTS {
            let (_memory, mut client, mut server) = pair(16, layout);
            client.0.push(event(1)).unwrap();
            assert_eq!(client.0.unpublished(), 1);
            assert_eq!(pop(&mut server.1).unwrap(), None);
            client.0.publish();
            assert_eq!(pop(&mut server.1).unwrap(), Some(event(1)));
            assert_eq!(client.0.in_flight().unwrap().1, 1);
            server.1.publish();
            assert_eq!(client.0.in_flight().unwrap().1, 0);
        }
    }

    #[test]
    fn a_full_queue_says_so_until_the_consumer_publishes() {
        for layout in LAYOUTS {
            let (_memory, mut client, mut server) = pair(16, layout);
            for number in 0..16 {
                assert!(client.0.push(event(number)).unwrap());
            }
            client.0.publish();
            assert!(!client.0.push(event(16)).unwrap());
            assert_eq!(pop(&mut server.1).unwrap(), Some(event(0)));
            assert!(!client.0.push(event(16)).unwrap(), "not yet given back");
            server.1.publish();
            assert!(client.0.push(event(16)).unwrap());
            assert!(!client.0.push(event(17)).unwrap());
        }
    }

    #[test]
    fn half_a_queue_is_given_back_within_a_batch() {
        let (_memory, mut client, mut server) = pair(16, LAYOUTS[0]);
        for number in 0..16 {
            client.0.push(event(number)).unwrap();
        }
        client.0.publish();
        for _ in 0..8 {
            pop(&mut server.1).unwrap();
        }
        assert_eq!(client.0.in_flight().unwrap().1, 8);
    }

    #[test]
    fn the_flag_asks_for_one_wake_up_per_sleep() {
        for layout in LAYOUTS {
            let (_memory, mut client, mut server) = pair(16, layout);
            client.0.push(event(1)).unwrap();
            client.0.publish();
            assert!(client.0.must_ring(), "the consumer has never been awake");
            assert!(!client.0.must_ring(), "it has been rung");
            assert!(!server.1.try_sleep().unwrap(), "there is an event");
            assert!(!client.0.must_ring(), "it stays awake");
            pop(&mut server.1).unwrap();
            assert!(server.1.try_sleep().unwrap());
            assert!(client.0.must_ring());
        }
    }

    #[test]
    fn indices_that_no_honest_peer_writes_end_it() {
        for layout in LAYOUTS {
            let (memory, mut client, mut server) = pair(16, layout);
            for number in 0..4 {
                client.0.push(event(number)).unwrap();
            }
            client.0.publish();
            pop(&mut server.1).unwrap();
            pop(&mut server.1).unwrap();
            server.1.publish();
            let (head, tail) = (layout.head_offset(), layout.tail_offset());
            for value in [3, 0, -1, 19, i64::MAX, i64::MIN] {
                let mut fresh = map(&memory, layout).unwrap();
                memory.store_i64(tail, value);
                let error = loop {
                    match pop(&mut fresh.1) {
                        Ok(Some(_)) => {}
                        Ok(None) => panic!("a tail of {value} was believed"),
                        Err(error) => break error,
                    }
                };
                assert!(
                    matches!(error, MemoryError::QueueIndex { index: "tail", .. }),
                    "{error:?}"
                );
                memory.store_i64(tail, 4);
            }
            assert_eq!(client.0.in_flight().unwrap().1, 2);
            for value in [1, 5, -1, i64::MAX, i64::MIN] {
                memory.store_i64(head, value);
                let error = client.0.in_flight().unwrap_err();
                assert!(matches!(error, MemoryError::QueueIndex { index: "head", .. }), "{value}");
            }
        }
    }

    #[test]
    fn memory_that_holds_no_queues_is_refused() {
        let layout = LAYOUTS[0];
        let refused = |len: usize, change: &dyn Fn(&Region)| {
            let memory = Rc::new(Region::heap(len));
            if len >= queues_len(16) {
                create(&memory, 16, layout);
            }
            change(&memory);
            map(&memory, layout).map(drop).unwrap_err()
        };
        for len in [1, 24, 47, 49, 50] {
            assert!(matches!(refused(len, &|_| {}), MemoryError::TooSmall { .. }), "{len}");
        }
        let len = queues_len(16);
        let half = len / 2;
        for at in [0, half] {
            for capacity in [0, 17, u32::MAX] {
                let change = |memory: &Region| memory.store_u32(at, capacity, Ordering::Relaxed);
                let error = refused(len, &change);
                assert!(matches!(error, MemoryError::Field { .. }), "{at} {capacity}");
            }
            for (head, tail) in [(1, 0), (0, 17), (-1, 0), (i64::MAX, i64::MAX)] {
                let change = |memory: &Region| {
                    memory.store_i64(at + layout.head_offset(), head);
                    memory.store_i64(at + layout.tail_offset(), tail);
                };
                let error = refused(len, &change);
                assert!(matches!(error, MemoryError::QueueIndex { .. }), "{at} {head} {tail}");
            }
        }
    }

    /// A memory as shmipc-go lays it out, whatever its capacity, with indices that start here.
    fn peers_memory(capacity: u32, layout: QueueLayout, start: i64) -> Rc<Region> {
        let memory = Rc::new(Region::heap(queues_len(capacity)));
        for base in [0, queues_len(capacity) / 2] {
            memory.store_u32(base, capacity, Ordering::Relaxed);
            memory.store_i64(base + layout.head_offset(), start);
            memory.store_i64(base + layout.tail_offset(), start);
        }
        memory
    }

    /// The client's ends of a memory that [`map`] takes the server's ends of.
    fn client_ends(memory: &Rc<Region>, layout: QueueLayout) -> Ends {
        let half = memory.len() / 2;
        let (sending, tail, head) = map_ring(memory, layout, 0, half).unwrap();
        let (receiving, other_tail, own_head) = map_ring(memory, layout, half, half).unwrap();
        (
            Producer::starting_at(sending, tail, head),
            Consumer::starting_at(receiving, own_head, other_tail),
        )
    }

    #[test]
    fn queues_of_every_capacity_work_in_both_directions() {
        for layout in LAYOUTS {
            for capacity in (1..=64).chain([200, 1000, 5000, 65_535]) {
                // Through the carry, if it does not have to be waited for.
                for start in [0, (1 << 32) - 2 * i64::from(capacity)] {
                    let memory = peers_memory(capacity, layout, start);
                    let mut server = map(&memory, layout).unwrap();
                    let mut client = client_ends(&memory, layout);
                    let (mut sent, mut received) = (0, 0);
                    while received < 3 * capacity {
                        while sent < 3 * capacity && server.0.push(event(sent)).unwrap() {
                            sent += 1;
                        }
                        // Asleep, the peer lets the tail carry sooner or later.
                        for _ in 0..=CARRY_LOOKS {
                            server.0.publish();
                            if server.0.unpublished() == 0 {
                                break;
                            }
                        }
                        while let Some(came) = pop(&mut client.1).unwrap() {
                            assert_eq!(came, event(received), "{capacity} {layout:?}");
                            received += 1;
                        }
                        client.1.publish();
                    }
                    for number in 0..capacity {
                        assert!(client.0.push(event(number)).unwrap());
                    }
                    client.0.publish();
                    for number in 0..capacity {
                        assert_eq!(pop(&mut server.1).unwrap(), Some(event(number)));
                    }
                }
            }
        }
    }

    /// A capacity with which the second queue's tail is in two lines in the packed layout, and one
    /// that is so in the aligned layout where fields must be aligned.
    fn torn_tail() -> Option<(u32, QueueLayout)> {
        LAYOUTS.into_iter().find_map(|layout| {
            let is_torn =
                |&capacity: &u32| !is_one_access(queues_len(capacity) / 2 + layout.tail_offset());
            (1..64).find(is_torn).map(|capacity| (capacity, layout))
        })
    }

    #[test]
    fn a_tail_in_two_lines_carries_only_while_the_peer_sleeps() {
        let (capacity, layout) = torn_tail().unwrap();
        let memory = peers_memory(capacity, layout, (1 << 32) - 1);
        let mut server = map(&memory, layout).unwrap();
        let mut client = client_ends(&memory, layout);
        client.1.set_working();
        server.0.push(event(1)).unwrap();
        for _ in 0..10 * CARRY_LOOKS {
            server.0.publish();
            assert_eq!(server.0.unpublished(), 1, "the peer is awake");
        }
        assert_eq!(pop(&mut client.1).unwrap(), None);
        assert!(client.1.try_sleep().unwrap());
        for _ in 0..CARRY_LOOKS {
            assert_eq!(server.0.unpublished(), 1);
            server.0.publish();
        }
        assert_eq!(server.0.unpublished(), 0);
        assert!(server.0.must_ring());
        assert_eq!(pop(&mut client.1).unwrap(), Some(event(1)));
        // The next one is far away.
        server.0.push(event(2)).unwrap();
        server.0.publish();
        assert_eq!(pop(&mut client.1).unwrap(), Some(event(2)));
    }

    /// What a reader makes of a field that carries, for every place of the writer's two stores
    /// among its loads of `order`: 0 is a load of the lower half, 1 of the upper one.
    fn values_seen(order: &[usize]) -> Vec<i64> {
        let (old, new) = ([u32::MAX, 0], [0, 1]);
        let count = order.len();
        let mut values = Vec::new();
        for lower_at in 0..=count {
            for upper_at in lower_at..=count {
                let mut seen = [0; 2];
                let mut uppers = Vec::new();
                for (step, &half) in order.iter().enumerate() {
                    let written = if half == 0 { lower_at } else { upper_at };
                    seen[half] = if step < written { old[half] } else { new[half] };
                    if half == 1 {
                        uppers.push(seen[1]);
                    }
                }
                // Who reads the upper half twice begins again when it has changed.
                if uppers.windows(2).all(|pair| pair[0] == pair[1]) {
                    values.push(i64::from(seen[1]) << 32 | i64::from(seen[0]));
                }
            }
        }
        values
    }

    #[test]
    fn a_carry_that_is_read_half_done_is_never_too_large_for_us_and_can_be_for_others() {
        let (old, new) = (i64::from(u32::MAX), 1 << 32);
        // This side: too small, if it is neither. An index below the last is read again.
        let ours = values_seen(&[1, 0, 1]);
        assert!(ours.iter().all(|value| [old, new, 0].contains(value)), "{ours:?}");
        assert!(ours.contains(&0));
        // A peer that reads the upper half first sees a tail that is too small: nothing to take;
        // and a head that is too small: a full queue.
        let upper_first = values_seen(&[1, 0]);
        assert!(upper_first.iter().all(|&value| value <= new), "{upper_first:?}");
        // One that reads the lower half first can see 2^32 too many. So the tail carries while
        // nobody reads it, and for the head this is what remains.
        let lower_first = values_seen(&[0, 1]);
        assert!(lower_first.contains(&(new + old)), "{lower_first:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]
        #[test]
        fn agrees_with_a_model(
            capacity in prop_oneof![Just(16u32), Just(32)],
            actions in prop::collection::vec(0..6u8, 0..400),
        ) {
            for layout in LAYOUTS {
                let (_memory, mut client, mut server) = pair(capacity, layout);
                let mut unpublished = VecDeque::new();
                let mut visible = VecDeque::new();
                // Slots that are taken: pushed, and not yet given back.
                let (mut taken, mut owed) = (0, 0);
                for (number, &action) in actions.iter().enumerate() {
                    match action {
                        0..3 => {
                            let fits = client.0.push(event(number as u32)).unwrap();
                            prop_assert_eq!(fits, taken < capacity);
                            if fits {
                                unpublished.push_back(event(number as u32));
                                taken += 1;
                            }
                        }
                        3 => {
                            client.0.publish();
                            visible.append(&mut unpublished);
                        }
                        4 => {
                            let popped = pop(&mut server.1).unwrap();
                            prop_assert_eq!(popped, visible.pop_front());
                            owed += u32::from(popped.is_some());
                            if owed >= capacity / 2 {
                                taken -= std::mem::take(&mut owed);
                            }
                        }
                        _ => {
                            server.1.publish();
                            taken -= std::mem::take(&mut owed);
                        }
                    }
                }
            }
        }
    }

    /// Two threads with mappings of their own; the consumer sleeps for real whenever it may.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn two_threads_lose_no_event_and_no_wake_up() {
        const EVENTS: u32 = 200_000;
        for layout in LAYOUTS {
            let (memory, fd) =
                Region::create_memfd(Path::new("queue-test"), queues_len(64)).unwrap();
            let memory = Rc::new(memory);
            let (mut producer, _) = create(&memory, 64, layout);
            let (ring, doorbell) = mpsc::channel::<()>();
            let consumer = std::thread::spawn(move || {
                let memory = Rc::new(Region::map_descriptor(fd, "queue", 1 << 20).unwrap());
                let (_, mut consumer) = map(&memory, layout).unwrap();
                let (mut expected, mut attempts) = (0, 0);
                while expected < EVENTS {
                    while let Some(got) = pop(&mut consumer).unwrap() {
                        assert_eq!(got, event(expected));
                        expected += 1;
                    }
                    consumer.publish();
                    // One that is withdrawn may have been seen, and rung for, too.
                    attempts += 1;
                    if consumer.try_sleep().unwrap() && expected < EVENTS {
                        doorbell.recv().expect("the producer rings before it ends");
                    }
                }
                attempts
            });
            let mut rings = 0;
            for number in 0..EVENTS {
                while !producer.push(event(number)).unwrap() {
                    std::thread::yield_now();
                }
                // Batches of changing length, so that both sides meet in every state.
                if number % 7 == 0 || number % 3 == 0 || number + 1 == EVENTS {
                    producer.publish();
                    if producer.must_ring() {
                        rings += 1;
                        // The consumer may have ended, with everything it was to get.
                        let _ = ring.send(());
                    }
                }
                if number % 50 == 0 {
                    producer.publish();
                    if producer.must_ring() {
                        rings += 1;
                        let _ = ring.send(());
                    }
                    std::thread::yield_now();
                }
            }
            drop(ring);
            let attempts = consumer.join().unwrap();
            assert!(rings <= attempts + 1, "{rings} rings for {attempts} attempts to sleep");
        }
    }
}
