// SPDX-License-Identifier: MIT OR Apache-2.0
//! All free lists of one buffer memory, and the private ledger of what this side holds
//! (spec chapter 5; `docs/protocol.md#buffer-memory`).
//!
//! # The ledger
//!
//! For each slice of the memory one private entry says whether this side holds it, and if so which
//! slice comes next in its chain and which bytes of it count. Shared headers are read once, when a
//! slice arrives, and written once, when it is sent; in between nothing depends on memory that the
//! peer can write. The ledger is also what finds a slice with two owners: one that arrives, or
//! comes out of a list, while this side holds it ends the session by name. Walking a cycle is the
//! same case, so every walk ends.
//!
//! # Magazines
//!
//! A short private stack per size. Freed slices go there first and are the first to be taken
//! again, while their lines are still near; the shared list is visited in batches. A magazine
//! holds at most an eighth of its list, so it cannot starve the peer. While a session [rests] they
//! are empty: nobody would come back to give their slices to the peer.
//!
//! # A set of lists for each side
//!
//! When both sides are of this crate and have agreed on it, every size has two lists, and a side
//! takes from its own alone, as [`owned_list`] says. The magazine of
//! a size holds slices of both: the slice in which a request came is still the one that the reply
//! goes out in, whichever list it stands in. What overflows goes back to the lists that it stands
//! in. The bound is a quarter of the shorter list: more than in a list for both, since only what
//! was received is the peer's, and no more than a quarter of its set is kept from it that way;
//! everything else that the peer misses is in messages that are read by one of the two, or wait to
//! be.
//!
//! [rests]: SlicePool::set_resting

mod create;
pub mod format;
pub(super) mod free_list;
mod magazine;
pub(super) mod owned_list;
mod prefetcher;
pub(super) mod size_class;
pub(super) mod slice_table;

use std::cell::{Cell, RefCell};
use std::io::IoSlice;
use std::rc::Rc;

pub(super) use self::slice_table::NO_SLICE;
pub use self::slice_table::{ListOwner, SliceId, SliceUsage};
use crate::error::MemoryError;
use crate::shm::chain::{Chain, ChainState, SentChain};
use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::map::trust::PeerTrust;
use crate::shm::pool::format::Lists;
use crate::shm::pool::free_list::MAX_BATCH;
use crate::shm::pool::size_class::{Class, Classes};
use crate::shm::pool::slice_table::Entry;
use crate::wire::layout::{FLAG_HAS_NEXT, FLAG_IN_USE, SLICE_SIZE_OFFSET};

/// The most chains whose memory is kept for the chains to come.
const MAX_CHAIN_STATES: u32 = 4096;

/// How many slices are looked at in one go when those are sought that the peer has.
const SEARCHED_AT_ONCE: u32 = 1 << 14;

/// The buffer memory of one session, as one side sees it.
pub struct SlicePool<M = Region> {
    pub(super) memory: Rc<M>,
    pub(super) classes: Classes,
    ledger: Box<[Entry]>,
    /// Kept for the chains to come, so that none of them allocates.
    chain_states: Cell<Option<Box<ChainState>>>,
    kept_chain_states: Cell<u32>,
    /// Which promise of the user speaks for the peer.
    trust: Cell<Option<u64>>,
    /// What was found broken where nobody could be told, in a `Drop`.
    broken: RefCell<Option<MemoryError>>,
    /// Called when something was.
    alarm: RefCell<Option<Box<dyn Fn()>>>,
    /// Slices that this side holds, magazines not counted.
    pub(super) held: Cell<u32>,
    /// Whether slices go past the magazines.
    is_resting: Cell<bool>,
    /// Whether less was free than is to be kept when it was last looked at.
    is_short: Cell<bool>,
}

impl<M: Memory> SlicePool<M> {
    pub(super) fn with_lists(memory: &Rc<M>, lists: &Lists) -> Result<Rc<Self>, MemoryError> {
        let (classes, ledger) = Classes::new(&**memory, lists)?;
        Ok(Rc::new(Self {
            memory: Rc::clone(memory),
            classes,
            ledger,
            chain_states: Cell::new(None),
            kept_chain_states: Cell::new(0),
            trust: Cell::new(None),
            broken: RefCell::new(None),
            alarm: RefCell::new(None),
            held: Cell::new(0),
            is_resting: Cell::new(false),
            is_short: Cell::new(false),
        }))
    }

    /// Whether a page of the memory was not there, and it is nobody's but ours any more.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// Bytes of memory, headers included.
    pub fn memory_len(&self) -> usize {
        self.memory.len()
    }

    /// Says which promise of the user speaks for the peer.
    pub fn trust(&self, promise: Option<u64>) {
        self.trust.set(promise);
    }

    #[inline]
    pub(super) fn is_trusted_by(&self, promise: &PeerTrust) -> bool {
        self.trust.get() == Some(promise.id())
    }

    #[inline(always)]
    pub(super) fn new_chain_state(&self) -> Box<ChainState> {
        match self.chain_states.take() {
            Some(mut state) => {
                self.chain_states.set(state.next_free.take());
                self.kept_chain_states.set(self.kept_chain_states.get() - 1);
                state
            }
            None => Box::new(ChainState::empty()),
        }
    }

    /// Keeps what a chain consisted of, up to a bound.
    #[inline]
    pub(super) fn recycle_chain_state(&self, mut state: Box<ChainState>) {
        let kept = self.kept_chain_states.get();
        if kept < MAX_CHAIN_STATES {
            self.kept_chain_states.set(kept + 1);
            state.next_free = self.chain_states.take();
            self.chain_states.set(Some(state));
        }
    }

    #[inline]
    pub(super) fn memory(&self) -> &M {
        &self.memory
    }

    /// What was found broken in a `Drop`, once.
    pub fn take_broken(&self) -> Option<MemoryError> {
        self.broken.borrow_mut().take()
    }

    /// Calls `alarm` when something is found broken in a `Drop`, so that somebody comes and
    /// [takes](Self::take_broken) it.
    pub fn on_broken(&self, alarm: impl Fn() + 'static) {
        *self.alarm.borrow_mut() = Some(Box::new(alarm));
    }

    #[cold]
    fn note_broken(&self, error: MemoryError) {
        self.broken.borrow_mut().get_or_insert(error);
        if let Some(alarm) = &*self.alarm.borrow() {
            alarm();
        }
    }

    /// Slices that chains of this side hold.
    pub fn held(&self) -> u32 {
        self.held.get()
    }

    /// The state of every list, smallest slices first; the client's before the server's, if each
    /// side has its own.
    pub fn usage(&self) -> Vec<SliceUsage> {
        self.classes.usage(&*self.memory)
    }

    /// A writable chain that holds `len` bytes, or as much of it as there is when `partial`.
    ///
    /// One slice when one is large enough, of the smallest class that has one; otherwise a chain
    /// from the largest class down. `None`: there is not enough, or nothing at all.
    #[inline]
    pub fn allocate(
        self: &Rc<Self>,
        len: usize,
        partial: bool,
    ) -> Result<Option<Chain<M>>, MemoryError> {
        match self.take_one_slice(len)? {
            Some(id) => Ok(Some(Chain::of(Rc::clone(self), id).with_capacity(len))),
            None => self.allocate_many(len, partial),
        }
    }

    /// A writable chain of one slice that holds `len` bytes, if there is one.
    pub(super) fn allocate_one(self: &Rc<Self>, len: usize) -> Option<Chain<M>> {
        match self.take_one_slice(len) {
            Ok(id) => Some(Chain::of(Rc::clone(self), id?).with_capacity(len)),
            Err(error) => {
                self.note_broken(error);
                None
            }
        }
    }

    fn allocate_many(
        self: &Rc<Self>,
        len: usize,
        partial: bool,
    ) -> Result<Option<Chain<M>>, MemoryError> {
        let mut chain = Chain::empty(Rc::clone(self));
        let mut missing = len;
        let mut has_slices = false;
        for class in self.classes.iter().rev() {
            let capacity = class.slice_capacity as usize;
            while missing > 0 {
                // The last bytes go into a slice of their size.
                let last = if missing < capacity { self.take_one_slice(missing)? } else { None };
                let Some(id) = last.map_or_else(|| self.take_from(class), |id| Ok(Some(id)))?
                else {
                    break;
                };
                missing = missing.saturating_sub(self.slice_capacity(id) as usize);
                chain.push_back(id);
                has_slices = true;
            }
        }
        let enough = missing == 0 || (partial && has_slices);
        // What is not enough goes back here, by the chain's own drop.
        Ok(enough.then(|| chain.with_capacity(len - missing)))
    }

    /// Writes the first `len` bytes of what these parts are together as a message, or as many of
    /// them as there are slices for, ready to be sent. `None`: there is no slice.
    ///
    /// From here on the slices are the peer's, so the event must be on its way without fail.
    #[inline]
    pub fn write_message(
        self: &Rc<Self>,
        parts: &[IoSlice<'_>],
        len: usize,
    ) -> Result<Option<SentChain>, MemoryError> {
        let mut left = len;
        let mut cut = |part: &IoSlice<'_>| {
            let count = part.len().min(left);
            left -= count;
            count
        };
        // Most messages fit one slice, and need no chain to be built.
        if let Some(id) = self.take_one_slice(len)? {
            let entry = self.entry(id);
            let mut at = entry.data();
            for part in parts {
                let count = cut(part);
                self.memory.copy_in(at, &part[..count]);
                at += count;
            }
            // Fits: the slice holds them.
            entry.len.set((at - entry.data()) as u32);
            return Ok(Some(self.sent(id, at - entry.data())));
        }
        let Some(mut chain) = self.allocate_many(len, true)? else { return Ok(None) };
        for part in parts {
            let count = cut(part);
            if chain.write(&part[..count]) < count {
                break;
            }
        }
        Ok(chain.into_sent())
    }

    #[inline]
    fn take_one_slice(&self, len: usize) -> Result<Option<SliceId>, MemoryError> {
        for class in self.classes.iter() {
            if class.slice_capacity as usize >= len
                && let Some(id) = self.take_from(class)?
            {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Whether an allocation of `len` bytes has any chance now, without taking anything.
    pub fn might_allocate(&self) -> bool {
        self.classes.iter().any(|class| class.has_spare(&*self.memory))
    }

    /// Whether so little is free that it is for small messages of streams whose readers read.
    #[inline]
    pub fn is_short(&self) -> bool {
        self.is_short.get() && self.look_whether_short()
    }

    #[cold]
    fn look_whether_short(&self) -> bool {
        self.is_short.set(self.classes.is_short(&*self.memory));
        self.is_short.get()
    }

    /// How much the smallest slices hold.
    pub fn smallest_slice(&self) -> usize {
        self.classes.iter().next().map_or(0, |class| class.slice_capacity as usize)
    }

    #[inline]
    fn take_from(&self, class: &Class) -> Result<Option<SliceId>, MemoryError> {
        if class.magazine.is_empty() {
            self.fill(class)?;
        }
        let id = class.magazine.pop();
        self.held.set(self.held.get() + u32::from(id.is_some()));
        Ok(id)
    }

    #[cold]
    fn fill(&self, class: &Class) -> Result<(), MemoryError> {
        let rests = self.is_resting.get();
        let want = if rests { 1 } else { (class.magazine.limit() / 2).clamp(1, MAX_BATCH) };
        let batch = class.take(&*self.memory, want)?;
        // The first of the list is the last of the stack: taken in the list's order.
        for &place in batch.places().iter().rev() {
            let id = class.first + place;
            // It fits 32 bits: the whole memory does.
            let offset = class.list().slice(place) as u32;
            let entry = self.entry(id);
            if entry.offset.get() != 0 {
                return Err(MemoryError::SharedTwice { offset });
            }
            entry.set(offset, 0, 0);
            class.magazine.push(id);
        }
        self.look_whether_short();
        Ok(())
    }

    /// Hands over one held slice with `len` bytes in it.
    #[inline(always)]
    pub(super) fn sent(&self, id: SliceId, len: usize) -> SentChain {
        let offset = self.write_header(id);
        let occupies = self.slice_capacity(id);
        self.forget(id);
        SentChain { offset, len, occupies }
    }

    /// How many bytes the slice can hold.
    #[inline]
    pub(super) fn slice_capacity(&self, id: SliceId) -> u64 {
        u64::from(self.entry(id).capacity)
    }

    /// How many more bytes the slice can hold behind those that count.
    #[inline]
    pub(super) fn room_in(&self, id: SliceId) -> usize {
        let entry = self.entry(id);
        (entry.capacity - entry.start.get() - entry.len.get()) as usize
    }

    #[inline]
    pub(super) fn entry(&self, id: SliceId) -> &Entry {
        &self.ledger[id as usize]
    }

    /// Writes the header of a held slice for the peer to read, in one go.
    #[inline(always)]
    pub(super) fn write_header(&self, id: SliceId) -> u32 {
        let entry = self.entry(id);
        if entry.start.get() != 0 {
            self.move_to_front(entry);
        }
        let offset = entry.offset.get();
        let at = offset as usize;
        let memory = &*self.memory;
        // Relaxed: the release store of the queue's tail publishes them. The capacity stands there
        // since the memory was laid out; a peer that relies on it finds its own.
        let (next, flags) = match entry.next.get() {
            NO_SLICE => (0, FLAG_IN_USE),
            next => (self.entry(next).offset.get(), FLAG_IN_USE | FLAG_HAS_NEXT),
        };
        let flags = u32::from(flags).to_le();
        let words = [entry.len.get(), entry.start.get(), next, flags];
        memory.store_words(at + SLICE_SIZE_OFFSET, words);
        offset
    }

    /// Moves what a partly read slice still holds to its front: shmipc-go, when it answers in the
    /// slice that it has read, announces the start that the slice came with and writes to the front
    /// (`docs/protocol.md#slice-header`).
    #[cold]
    fn move_to_front(&self, entry: &Entry) {
        let from = entry.data();
        entry.start.set(0);
        self.memory.copy_within(from, entry.data(), entry.len.get() as usize);
    }

    /// Strikes a slice out of the ledger: it was sent, and is the peer's.
    #[inline(always)]
    pub(super) fn forget(&self, id: SliceId) -> SliceId {
        self.held.set(self.held.get() - 1);
        let entry = self.entry(id);
        entry.offset.set(0);
        entry.next.get()
    }

    /// Appends to `found` the slices from number `from` on that this side has sent and the peer has
    /// not given back yet, and returns the number to go on from; `None` behind the last slice.
    /// Looks at [`SEARCHED_AT_ONCE`] slices at most, since there can be millions of them.
    pub fn find_sent(&self, from: SliceId, found: &mut Vec<SliceId>) -> Option<SliceId> {
        // Fits: a memory has fewer slices than offsets.
        let (len, begin) = (self.ledger.len() as u32, from.min(self.ledger.len() as u32));
        let end = begin.saturating_add(SEARCHED_AT_ONCE).min(len);
        found.extend((begin..end).filter(|&id| self.is_with_peer(id)));
        (end < len).then_some(end)
    }

    /// The slice at this offset, if this side has sent it and the peer has not given it back yet.
    pub fn sent_at(&self, offset: u32) -> Option<SliceId> {
        self.classes.locate(offset).filter(|&id| self.is_with_peer(id))
    }

    /// Whether this side has sent the slice, and the peer has not given it back yet.
    ///
    /// Private memory knows which slices were sent and have not come back to this side: their
    /// entries have a length and no offset. Of these, the shared header says which are still in
    /// use. Whoever frees a slice clears the mark and the size
    /// (`docs/protocol.md#giving-slices-back`), and whoever takes it next marks it again, with a
    /// size of zero until it is sent. So it counts as free unless both are as this side wrote them.
    /// One that was freed, taken and sent with the very same size is taken for one that was not
    /// freed until its event is handled, which errs towards waiting.
    pub fn is_with_peer(&self, id: SliceId) -> bool {
        let entry = self.entry(id);
        let len = entry.len.get();
        if entry.offset.get() != 0 || len == 0 {
            return false;
        }
        // Relaxed: nothing that the peer wrote is read because of it.
        let [_, size, _, _, flags] = self.memory.load_words(self.classes.offset_of(id));
        let [flags, ..] = flags.to_ne_bytes();
        flags & FLAG_IN_USE != 0 && size == len
    }

    /// Puts a held slice among the free. Gives the next of its chain.
    #[inline]
    pub(super) fn release(&self, id: SliceId) -> SliceId {
        self.held.set(self.held.get() - 1);
        let entry = self.entry(id);
        let next = entry.next.get();
        entry.set(entry.offset.get(), 0, 0);
        let class = self.classes.get(entry.class);
        class.magazine.push(id);
        let rests = self.is_resting.get();
        if rests || class.magazine.len() > class.magazine.limit() {
            // The coldest half goes, in one batch; the hot end of the stack stays.
            let count = if rests { 1 } else { class.magazine.len().div_ceil(2) };
            self.give_from(entry.class, count);
        }
        next
    }

    /// Puts the `count` coldest slices of a magazine back into the lists that they stand in,
    /// [`MAX_BATCH`] at the most.
    #[inline(never)]
    fn give_from(&self, class: u8, count: usize) {
        let mut ids = [0; MAX_BATCH];
        let magazine = &self.classes.get(class).magazine;
        let count = magazine.take_coldest(&mut ids[..count.min(MAX_BATCH)]);
        let ids = &ids[..count];
        for &id in ids {
            self.entry(id).offset.set(0);
        }
        for stand in self.classes.stands_of(class) {
            let mut places = [0; MAX_BATCH];
            let mut len = 0;
            for &id in ids.iter().filter(|&&id| stand.has(id)) {
                places[len] = id - stand.first;
                len += 1;
            }
            if let Err(error) = stand.list.give(&*self.memory, &places[..len]) {
                self.note_broken(error);
            }
        }
    }

    /// Says whether the session rests. When it does, every slice of every magazine goes back into
    /// its shared list, and those that are freed later go there at once.
    pub fn set_resting(&self, rests: bool) {
        self.is_resting.set(rests);
        if !rests {
            return;
        }
        for class in self.classes.numbers() {
            while !self.classes.get(class).magazine.is_empty() {
                self.give_from(class, MAX_BATCH);
            }
        }
    }
}

impl<M> Drop for SlicePool<M> {
    fn drop(&mut self) {
        debug_assert_eq!(self.held.get(), 0, "a chain outlived its memory");
        // One after the other: dropped as a list they would need a stack as deep as it is long.
        while let Some(mut state) = self.chain_states.take() {
            self.chain_states.set(state.next_free.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::*;
    use crate::config::SliceClass;
    use crate::shm::pool::format::{ListSets, Side};
    use crate::wire::layout::{
        LIST_HEAD_OFFSET, LIST_HEADER_LEN, LIST_SIZE_OFFSET, LIST_TAIL_OFFSET, MANAGER_HEADER_LEN,
        SLICE_CAPACITY_OFFSET, SLICE_FLAGS_OFFSET, SLICE_HEADER_LEN, SLICE_NEXT_OFFSET,
        SLICE_START_OFFSET,
    };

    const CLASSES: [SliceClass; 3] =
        [SliceClass::new(64, 50), SliceClass::new(256, 30), SliceClass::new(1024, 20)];

    const CLIENT: ListSets = ListSets::OnePerSide(Side::Client);
    const SERVER: ListSets = ListSets::OnePerSide(Side::Server);

    type Sides = (Rc<Region>, Rc<SlicePool>, Rc<SlicePool>);

    fn pair_with(len: usize, client: ListSets, server: ListSets) -> Sides {
        let memory = Rc::new(Region::heap(len));
        let client = SlicePool::create(&memory, &CLASSES, client).unwrap();
        let server = SlicePool::map(&memory, server).unwrap();
        (memory, client, server)
    }

    /// One memory on the heap, as the client and as the server see it.
    fn pair(len: usize) -> Sides {
        pair_with(len, ListSets::Shared, ListSets::Shared)
    }

    /// The same with a set of lists for each side.
    fn pair_apart(len: usize) -> Sides {
        pair_with(len, CLIENT, SERVER)
    }

    /// What has to hold with both kinds of sets.
    const PAIRS: [fn(usize) -> Sides; 2] = [pair, pair_apart];

    fn message(manager: &Rc<SlicePool>, bytes: &[u8]) -> Chain {
        let mut chain = manager.allocate(bytes.len(), false).unwrap().unwrap();
        assert_eq!(chain.write(bytes), bytes.len());
        chain
    }

    fn pattern(seed: usize, len: usize) -> Vec<u8> {
        (0..len).map(|index| (seed * 31 + index * 7 + (index >> 8)) as u8).collect()
    }

    fn is_all_free(manager: &SlicePool) -> bool {
        manager.held() == 0
            && manager.usage().iter().all(|list| list.free == list.total.cast_signed())
    }

    #[test]
    fn both_sides_see_the_same_lists() {
        let (_memory, client, server) = pair(64 << 10);
        assert_eq!(client.usage(), server.usage());
        let capacities: Vec<_> = client.usage().iter().map(|list| list.slice_capacity).collect();
        assert_eq!(capacities, [64, 256, 1024]);
        assert!(client.usage().iter().all(|list| list.owner == ListOwner::Shared));
        assert!(is_all_free(&client));
    }

    #[test]
    fn with_a_set_for_each_side_what_is_ours_is_not_the_peers() {
        let (_memory, client, server) = pair_apart(64 << 10);
        let (ours, theirs) = (client.usage(), server.usage());
        let capacities: Vec<_> = ours.iter().map(|list| list.slice_capacity).collect();
        assert_eq!(capacities, [64, 256, 1024, 64, 256, 1024]);
        let owners: Vec<_> = ours.iter().map(|list| list.owner).collect();
        use ListOwner::{Own, Peer};
        assert_eq!(owners, [Own, Own, Own, Peer, Peer, Peer]);
        let owners: Vec<_> = theirs.iter().map(|list| list.owner).collect();
        assert_eq!(owners, [Peer, Peer, Peer, Own, Own, Own]);
        assert!(is_all_free(&client) && is_all_free(&server));
    }

    #[test]
    fn the_default_layout_of_one_mebibyte_is_that_of_shmipc_go() {
        let memory = Rc::new(Region::heap(1 << 20));
        let config = crate::config::Config::default();
        SlicePool::create(&memory, config.slice_classes(), ListSets::Shared).unwrap();
        let captured = include_bytes!("../../../tests/vectors/buffer-1MiB-default-fresh.bin");
        let mut ours = vec![0; 1 << 20];
        memory.copy_out(0, &mut ours);
        let differs = ours.iter().zip(captured).position(|(ours, theirs)| ours != theirs);
        // Go counts in the first counter of each list while it sets up; both are undefined.
        assert_eq!(differs, None);
    }

    #[test]
    fn a_message_takes_the_smallest_slice_that_holds_it_or_a_chain_of_large_ones() {
        for pair in PAIRS {
            let (_memory, client, _) = pair(64 << 10);
            for (len, slices) in [(0, 1), (1, 1), (64, 1), (65, 1), (1024, 1), (1025, 2), (5000, 5)]
            {
                let chain = client.allocate(len, false).unwrap().unwrap();
                assert_eq!(chain.slices(), slices, "{len}");
            }
            client.set_resting(true);
            assert!(is_all_free(&client));
        }
    }

    #[test]
    fn bytes_arrive_whatever_their_number() {
        for pair in PAIRS {
            let (_memory, client, server) = pair(64 << 10);
            for len in [1, 63, 64, 65, 1023, 1024, 1025, 4096, 10_000] {
                let bytes = pattern(len, len);
                let offset = message(&client, &bytes).into_sent().unwrap().offset;
                let mut chain = server.adopt(offset).unwrap();
                assert_eq!(chain.len(), len);
                let mut copy = vec![0; len];
                assert_eq!(chain.copy_out(&mut copy), len);
                assert_eq!(copy, bytes, "{len}");
                // In two reads, of which the first ends inside a slice.
                let (head, tail) = copy.split_at_mut(len / 3);
                head.fill(0);
                tail.fill(0);
                assert_eq!(chain.read(head), len / 3);
                assert_eq!(chain.read(tail), len - len / 3);
                assert_eq!(copy, bytes, "{len}");
            }
            client.set_resting(true);
            server.set_resting(true);
            assert!(is_all_free(&client) && is_all_free(&server));
        }
    }

    #[test]
    fn a_message_that_exactly_fills_its_slices_sends_no_empty_one() {
        for pair in PAIRS {
            let (memory, client, server) = pair(64 << 10);
            let mut chain = client.allocate(2048, false).unwrap().unwrap();
            assert_eq!(chain.slices(), 2);
            assert_eq!(chain.write(&pattern(1, 1024)), 1024);
            let offset = chain.into_sent().unwrap().offset;
            let flags = memory.load_u8(offset as usize + SLICE_FLAGS_OFFSET, Ordering::Relaxed);
            assert_eq!(flags, FLAG_IN_USE, "the second slice is not linked");
            assert_eq!(server.adopt(offset).unwrap().slices(), 1);
        }
    }

    #[test]
    fn a_pool_that_runs_empty_gives_nothing_or_a_part() {
        for pair in PAIRS {
            let (_memory, client, _) = pair(32 << 10);
            let everything = 1 << 20;
            assert!(client.allocate(everything, false).unwrap().is_none());
            client.set_resting(true);
            assert!(is_all_free(&client));
            let mut part = client.allocate(everything, true).unwrap().unwrap();
            let len = part.write(&vec![7; everything]);
            assert!(len > 4096, "{len}");
            assert!(client.allocate(1, true).unwrap().is_none());
            assert!(!client.might_allocate());
            drop(part);
            assert!(client.might_allocate());
            client.set_resting(true);
            assert!(is_all_free(&client));
        }
    }

    #[test]
    fn a_message_is_cut_anywhere_and_its_parts_can_be_sent_on() {
        for pair in PAIRS {
            let (_memory, client, server) = pair(64 << 10);
            for len in [1, 64, 65, 1024, 1025, 3000, 5000] {
                let bytes = pattern(len, len);
                for cut in [0, 1, len / 3, len / 2, 1024, 2048, len - 1, len, len + 1] {
                    let offset = message(&client, &bytes).into_sent().unwrap().offset;
                    let mut back = server.adopt(offset).unwrap();
                    let front = back.split_to(cut);
                    let cut = cut.min(len);
                    assert_eq!((front.len(), back.len()), (cut, len - cut));
                    for (part, bytes) in [(front, &bytes[..cut]), (back, &bytes[cut..])] {
                        assert!(part.is_shared());
                        let mut copy = vec![0; part.len()];
                        part.copy_out(&mut copy);
                        assert_eq!(copy, bytes, "{len} at {cut}");
                        // And on to where it came from.
                        if let Some(sent) = part.into_sent() {
                            assert_eq!(sent.len, bytes.len());
                            let returned = client.adopt(sent.offset).unwrap();
                            assert_eq!(returned.into_bytes(), bytes, "{len} at {cut}");
                        }
                    }
                    assert_eq!((client.held(), server.held()), (0, 0));
                }
            }
            client.set_resting(true);
            server.set_resting(true);
            assert!(is_all_free(&client) && is_all_free(&server));
        }
    }

    #[test]
    fn a_message_is_cut_without_free_slices_too() {
        for pair in PAIRS {
            let (_memory, client, server) = pair(32 << 10);
            let bytes = pattern(9, 900);
            let offset = message(&client, &bytes).into_sent().unwrap().offset;
            let mut back = server.adopt(offset).unwrap();
            let everything = server.allocate(1 << 20, true).unwrap();
            let front = back.split_to(100);
            assert!(!front.is_shared());
            assert_eq!(front.into_bytes(), bytes[..100]);
            assert_eq!(back.split_to(0).len(), 0);
            assert_eq!(back.into_bytes(), bytes[100..]);
            drop(everything);
        }
    }

    #[test]
    fn a_slice_with_two_owners_is_found() {
        let (memory, client, server) = pair(64 << 10);
        let offset = message(&client, b"once").into_sent().unwrap().offset;
        let first = server.adopt(offset).unwrap();
        let twice = MemoryError::SharedTwice { offset };
        assert_eq!(server.adopt(offset).map(drop).unwrap_err(), twice);
        drop(first);
        // Free, in the server's magazine: the peer cannot send it either.
        assert_eq!(server.adopt(offset).map(drop).unwrap_err(), twice);

        // A free list that leads to a slice which this side holds.
        let held = message(&client, b"held");
        client.set_resting(true);
        let offset = client.ledger.iter().map(|entry| entry.offset.get()).max().unwrap();
        let list = MANAGER_HEADER_LEN;
        let relative = offset - (list + LIST_HEADER_LEN) as u32;
        memory.store_u32(list + LIST_HEAD_OFFSET, relative, Ordering::Relaxed);
        memory.store_u8(offset as usize + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Relaxed);
        memory.store_u32(offset as usize + SLICE_NEXT_OFFSET, 0, Ordering::Relaxed);
        let twice = MemoryError::SharedTwice { offset };
        assert_eq!(client.allocate(1, false).map(drop).unwrap_err(), twice);
        drop(held);
    }

    #[test]
    fn a_cycle_of_slices_ends() {
        for pair in PAIRS {
            let (memory, client, server) = pair(64 << 10);
            let offset = message(&client, &pattern(3, 3000)).into_sent().unwrap().offset;
            let second = memory.load_u32(offset as usize + SLICE_NEXT_OFFSET, Ordering::Relaxed);
            memory.store_u32(second as usize + SLICE_NEXT_OFFSET, offset, Ordering::Relaxed);
            let error = server.adopt(offset).map(drop).unwrap_err();
            assert_eq!(error, MemoryError::SharedTwice { offset });
            assert_eq!(server.held(), 0, "what was walked is given back");
        }
    }

    #[test]
    fn offsets_that_name_no_slice_are_refused() {
        for pair in PAIRS {
            let (memory, client, server) = pair(64 << 10);
            let good = message(&client, b"x").into_sent().unwrap().offset;
            let len = memory.len() as u32;
            for offset in [0, 8, 40, good + 1, good - 4, good + 20, len - 1, len, u32::MAX] {
                let error = server.adopt(offset).map(drop).unwrap_err();
                assert_eq!(error, MemoryError::Offset { offset });
            }
            assert!(server.adopt(good).is_ok());
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        for pair in PAIRS {
            let fields = [
                (SLICE_CAPACITY_OFFSET, &[0, 63, 65, 256, u32::MAX][..]),
                (SLICE_SIZE_OFFSET, &[65, u32::MAX]),
                (SLICE_START_OFFSET, &[61, 65, u32::MAX, u32::MAX - 3]),
            ];
            for (at, values) in fields {
                for &value in values {
                    let (memory, client, server) = pair(64 << 10);
                    let offset = message(&client, b"four").into_sent().unwrap().offset;
                    memory.store_u32(offset as usize + at, value, Ordering::Relaxed);
                    let error = server.adopt(offset).map(drop).unwrap_err();
                    assert!(matches!(error, MemoryError::SliceHeader { .. }), "{at} {value}");
                    assert_eq!(server.held(), 0);
                }
            }
        }
    }

    #[test]
    fn memory_that_holds_no_lists_is_refused() {
        let refused = |change: &dyn Fn(&Region)| {
            let (memory, _, _) = pair(16 << 10);
            change(&memory);
            SlicePool::map(&memory, ListSets::Shared).map(drop).unwrap_err()
        };
        for count in [0, 33, 0xffff] {
            let error = refused(&|memory| memory.store_u32(0, count, Ordering::Relaxed));
            assert!(error.to_string().contains("list count"), "{error}");
        }
        for used in [16 << 10, u32::MAX, 0, 35] {
            let error = refused(&|memory| memory.store_u32(4, used, Ordering::Relaxed));
            assert!(matches!(error, MemoryError::TooSmall { .. }), "{used}");
        }
        let small = Rc::new(Region::heap(7));
        assert!(SlicePool::map(&small, ListSets::Shared).is_err());
    }

    #[test]
    fn a_magazine_leaves_the_peer_its_share() {
        let (_memory, client, server) = pair(64 << 10);
        drop(client.allocate(1, false).unwrap());
        let usage = server.usage()[0];
        let missing = i64::from(usage.total) - i64::from(usage.free);
        assert!(missing > 0, "a batch is kept");
        assert!(missing * 8 <= i64::from(usage.total), "{missing} of {}", usage.total);
        client.set_resting(true);
        assert!(is_all_free(&server));
    }

    /// Free slices of the lists of one owner, as a side sees them.
    fn free_of(manager: &SlicePool, owner: ListOwner) -> Vec<i32> {
        let lists = manager.usage();
        lists.iter().filter(|list| list.owner == owner).map(|list| list.free).collect()
    }

    #[test]
    fn a_side_that_takes_all_it_can_leaves_the_peer_its_own() {
        let (_memory, client, server) = pair_apart(32 << 10);
        let everything = 1 << 20;
        let before = free_of(&server, ListOwner::Own);
        let taken = client.allocate(everything, true).unwrap().unwrap();
        assert_eq!(free_of(&client, ListOwner::Own), [1, 1, 1], "the last of each list stays");
        assert_eq!(free_of(&server, ListOwner::Own), before);
        assert!(client.allocate(1, true).unwrap().is_none() && !client.might_allocate());
        assert!(server.might_allocate());
        let theirs = server.allocate(everything, true).unwrap().unwrap();
        assert_eq!(theirs.slices(), taken.slices());
        // What the server sends, the client may use for what it sends, and no more than that.
        let offset = {
            let mut theirs = theirs;
            theirs.write(&pattern(1, everything));
            theirs.into_sent().unwrap().offset
        };
        drop(client.adopt(offset).unwrap());
        assert!(client.might_allocate());
        drop(taken);
        client.set_resting(true);
        server.set_resting(true);
        assert!(is_all_free(&client) && is_all_free(&server));
    }

    #[test]
    fn the_slice_of_a_request_becomes_that_of_the_reply() {
        let (_memory, client, server) = pair_apart(64 << 10);
        let offset = message(&client, b"request").into_sent().unwrap().offset;
        let elsewhere = free_of(&server, ListOwner::Own);
        for round in 0..100 {
            assert_eq!(server.adopt(offset).unwrap().into_bytes(), b"request"[..]);
            let reply = message(&server, b"reply").into_sent().unwrap().offset;
            assert_eq!(reply, offset, "{round}");
            assert_eq!(client.adopt(reply).unwrap().into_bytes(), b"reply"[..]);
            assert_eq!(message(&client, b"request").into_sent().unwrap().offset, offset);
        }
        assert_eq!(free_of(&server, ListOwner::Own), elsewhere, "nothing was taken from there");
        drop(server.adopt(offset).unwrap());
        client.set_resting(true);
        server.set_resting(true);
        assert!(is_all_free(&client) && is_all_free(&server));
    }

    #[test]
    fn a_magazine_of_both_sets_gives_each_list_its_own() {
        let (_memory, client, server) = pair_apart(64 << 10);
        // Held back until all are there, so that they are released one after the other.
        let send = |from: &Rc<SlicePool>, to: &Rc<SlicePool>| {
            let offset = message(from, b"x").into_sent().unwrap().offset;
            to.adopt(offset).unwrap()
        };
        let mut mixed = Vec::new();
        for _ in 0..40 {
            mixed.push(send(&client, &server));
            mixed.push(message(&server, b"unsent"));
        }
        drop(mixed);
        let usage = server.usage();
        let smallest: Vec<_> = usage.iter().filter(|list| list.slice_capacity == 64).collect();
        let [theirs, own] = smallest[..] else { panic!("{usage:?}") };
        assert_eq!((theirs.owner, own.owner), (ListOwner::Peer, ListOwner::Own));
        assert!(theirs.magazine > 0 && own.magazine > 0, "{usage:?}");
        let share = CLIENT.share_of_magazine() as u32;
        assert!((theirs.magazine + own.magazine) * share <= own.total, "{usage:?}");
        assert!(share >= 4, "the peer keeps three quarters of its set at the least");
        // The client has a batch of its own in its magazine.
        let missing = theirs.total.cast_signed() - theirs.free - theirs.magazine.cast_signed();
        assert!((1..=theirs.total.cast_signed() / 8).contains(&missing), "{usage:?}");
        assert_eq!(own.free + own.magazine.cast_signed(), own.total.cast_signed());
        server.set_resting(true);
        client.set_resting(true);
        assert!(is_all_free(&client) && is_all_free(&server));
    }

    /// Where the header of a list stands, by the list's number.
    fn header_of(manager: &SlicePool, number: usize) -> usize {
        let lists = manager.usage();
        let len = |list: &SliceUsage| {
            LIST_HEADER_LEN
                + list.total as usize * (SLICE_HEADER_LEN + list.slice_capacity as usize)
        };
        MANAGER_HEADER_LEN + lists[..number].iter().map(len).sum::<usize>()
    }

    #[test]
    fn a_peer_that_writes_over_heads_and_sizes_changes_nothing() {
        let (memory, client, server) = pair_apart(32 << 10);
        let write_over = |value: u32| {
            for number in 0..6 {
                let header = header_of(&client, number);
                memory.store_u32(header + LIST_HEAD_OFFSET, value, Ordering::Relaxed);
                memory.store_u32(header + LIST_SIZE_OFFSET, value, Ordering::Relaxed);
            }
        };
        for value in [0, 1, u32::MAX, 0x8000_0000, 84, 840] {
            let mut all = Vec::new();
            for side in [&client, &server] {
                write_over(value);
                assert!(side.might_allocate());
                all.push(side.allocate(1 << 20, true).unwrap().unwrap());
                write_over(value);
            }
            assert_eq!(all[0].slices(), all[1].slices(), "{value}");
            let slices: u32 = client.usage().iter().map(|list| list.total).sum();
            assert_eq!(all[0].slices() + all[1].slices(), slices - 6, "{value}");
            drop(all);
            for side in [&client, &server] {
                side.set_resting(true);
                side.set_resting(false);
                assert_eq!(side.take_broken(), None);
            }
        }
    }

    #[test]
    fn a_list_of_this_side_that_was_tampered_with_is_found() {
        // A link that names no slice.
        let (memory, client, _) = pair_apart(32 << 10);
        let first = header_of(&client, 0) + LIST_HEADER_LEN;
        memory.store_u32(first + SLICE_NEXT_OFFSET, 13, Ordering::Relaxed);
        let error = client.allocate(1, false).map(drop).unwrap_err();
        assert!(matches!(error, MemoryError::Field { value: 13, .. }), "{error}");

        // A link that leads to a slice which this side holds.
        let (memory, client, _) = pair_apart(32 << 10);
        let held = message(&client, b"held");
        client.set_resting(true);
        let offset = client.ledger.iter().map(|entry| entry.offset.get()).max().unwrap();
        let tail = memory.load_u32(header_of(&client, 0) + LIST_TAIL_OFFSET, Ordering::Relaxed);
        let last = first + tail as usize;
        memory.store_u32(last + SLICE_NEXT_OFFSET, offset - first as u32, Ordering::Relaxed);
        memory.store_u8(last + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Relaxed);
        memory.store_u8(offset as usize + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Relaxed);
        let error = client.allocate(1 << 20, true).map(drop).unwrap_err();
        assert_eq!(error, MemoryError::SharedTwice { offset });
        drop(held);

        // A tail that names no slice, where the peer's slices go back to.
        let (memory, client, server) = pair_apart(32 << 10);
        let offset = message(&client, b"x").into_sent().unwrap().offset;
        memory.store_u32(header_of(&client, 0) + LIST_TAIL_OFFSET, 13, Ordering::Relaxed);
        drop(server.adopt(offset).unwrap());
        server.set_resting(true);
        assert!(matches!(server.take_broken(), Some(MemoryError::Field { value: 13, .. })));
    }

    /// What a side of the model does.
    #[derive(Debug, Clone)]
    enum Action {
        Send(usize),
        /// Reads so many bytes of the oldest message.
        Read(usize),
        Drop,
        Abandon(usize),
        Rest(bool),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => (1usize..3000).prop_map(Action::Send),
            4 => (1usize..2000).prop_map(Action::Read),
            1 => Just(Action::Drop),
            1 => (0usize..3000).prop_map(Action::Abandon),
            1 => any::<bool>().prop_map(Action::Rest),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 256 }))]
        #[test]
        fn messages_arrive_whole_and_every_slice_comes_back(
            sets in prop::sample::select(&PAIRS[..]),
            actions in prop::collection::vec((any::<bool>(), action()), 0..120),
        ) {
            let (_memory, client, server) = sets(32 << 10);
            let sides = [client, server];
            // What each side has received: the chain, and what it must hold.
            let mut received: [VecDeque<(Chain, Vec<u8>)>; 2] = Default::default();
            for (seed, (is_client, action)) in actions.into_iter().enumerate() {
                let (own, other) = if is_client { (0, 1) } else { (1, 0) };
                match action {
                    Action::Send(len) => {
                        let bytes = pattern(seed, len);
                        if let Some(mut chain) = sides[own].allocate(len, true).unwrap() {
                            let sent = chain.write(&bytes);
                            prop_assert!(sent > 0);
                            let offset = chain.into_sent().unwrap().offset;
                            let chain = sides[other].adopt(offset).unwrap();
                            prop_assert_eq!(chain.len(), sent);
                            received[other].push_back((chain, bytes[..sent].to_vec()));
                        }
                    }
                    Action::Read(len) => {
                        if let Some((chain, bytes)) = received[own].front_mut() {
                            let mut to = vec![0; len];
                            let count = chain.read(&mut to);
                            prop_assert_eq!(count, len.min(bytes.len()));
                            prop_assert_eq!(&to[..count], &bytes[..count]);
                            bytes.drain(..count);
                        }
                    }
                    Action::Drop => drop(received[own].pop_front()),
                    Action::Abandon(len) => drop(sides[own].allocate(len, true).unwrap()),
                    Action::Rest(rests) => sides[own].set_resting(rests),
                }
            }
            received.iter_mut().for_each(VecDeque::clear);
            for side in &sides {
                side.set_resting(true);
                prop_assert_eq!(side.take_broken(), None);
            }
            prop_assert!(is_all_free(&sides[0]) && is_all_free(&sides[1]));
        }
    }
}
