// SPDX-License-Identifier: MIT OR Apache-2.0
//! A list of free buffer slices of one size, shared by two processes (spec 5.2;
//! `docs/protocol.md#list-header`, `docs/protocol.md#taking-slices`).
//!
//! Both sides take from the head and give to the tail of the same list, without locks. The last
//! slice is never handed out, so takers and givers touch different slices. Here both work in
//! batches: a take walks `n` links and moves the head over all of them with one compare-and-swap;
//! a give links `n` slices in private and hangs them behind the tail with one swap.
//!
//! # What can go wrong, and what is done about it
//!
//! The list carries no version. A taker that stalls between its look at the head and its
//! compare-and-swap, while the other side takes those slices and gives them back so that the same
//! slice is the head again, moves the head to where its links pointed *then* (ABA). After the swap
//! the links are read again: slices that went through the other side's hands have other links, and
//! the list is reported broken. The manager's ledger catches the rest as far as it can be caught: a
//! slice that this side still holds can never be taken again. Between two sides of this crate no
//! list has two takers, if they have agreed on that: see
//! [`owned_list`](crate::shm::pool::owned_list).
//!
//! Whom it trusts: nobody. Where the list stands and how large its slices are is private. Every
//! offset read from shared memory is checked against the grid of slices before it is followed;
//! every loop has a bound.

use std::sync::atomic::Ordering;

use crate::error::MemoryError;
use crate::shm::map::memory::{Memory, ODD_FIELDS, is_exchangeable};
use crate::wire::layout::{
    FLAG_HAS_NEXT, FLAG_IN_USE, LIST_CAPACITY_OFFSET, LIST_HEAD_OFFSET, LIST_HEADER_LEN,
    LIST_SIZE_OFFSET, LIST_SLICE_CAPACITY_OFFSET, LIST_TAIL_OFFSET, SLICE_CAPACITY_OFFSET,
    SLICE_FLAGS_OFFSET, SLICE_HEADER_LEN, SLICE_NEXT_OFFSET, SLICE_SIZE_OFFSET, SLICE_START_OFFSET,
    list_len,
};

/// The most slices that one batch moves.
pub(super) const MAX_BATCH: usize = 32;

/// How often a take starts over before it says that the list is busy. A start-over needs the peer
/// to have moved in between, so an honest peer does not come near.
const TAKE_TRIES: usize = 256;

/// How often in a row the walk must lead nowhere, from a head that stands still, before the list is
/// called broken.
const ASTRAY_TRIES: usize = 16;

/// Where a list stands and what it holds, in private memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FreeList {
    /// Offset of the list header.
    header: usize,
    /// Number of slices.
    capacity: u32,
    /// Bytes of payload in each slice.
    slice_capacity: u32,
}

/// Up to [`MAX_BATCH`] slices, by their places in the list.
pub(crate) struct Batch {
    places: [u32; MAX_BATCH],
    len: usize,
}

impl Batch {
    pub(super) const EMPTY: Self = Self { places: [0; MAX_BATCH], len: 0 };

    /// Where the slices are that were taken.
    pub(crate) fn places(&self) -> &[u32] {
        &self.places[..self.len]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl FreeList {
    /// Lays out a full list at `header`. The caller has made sure that the memory holds it.
    pub(crate) fn create<M: Memory>(
        memory: &M,
        header: usize,
        capacity: u32,
        slice_capacity: u32,
    ) -> Self {
        let list = Self { header, capacity, slice_capacity };
        // Relaxed throughout: the peer sees none of this before the handshake, whose socket orders
        // it. The counters behind the slice capacity stay 0.
        let store = |at, value| memory.store_u32(at, value, Ordering::Relaxed);
        store(header + LIST_SIZE_OFFSET, capacity);
        store(header + LIST_CAPACITY_OFFSET, capacity);
        store(header + LIST_HEAD_OFFSET, 0);
        store(header + LIST_TAIL_OFFSET, list.relative(capacity - 1));
        store(header + LIST_SLICE_CAPACITY_OFFSET, slice_capacity);
        for place in 0..capacity {
            let slice = list.slice(place);
            let has_next = place + 1 < capacity;
            store(slice + SLICE_CAPACITY_OFFSET, slice_capacity);
            store(slice + SLICE_SIZE_OFFSET, 0);
            store(slice + SLICE_START_OFFSET, 0);
            store(slice + SLICE_NEXT_OFFSET, if has_next { list.relative(place + 1) } else { 0 });
            let flags = if has_next { FLAG_HAS_NEXT } else { 0 };
            store(slice + SLICE_FLAGS_OFFSET, u32::from(flags).to_le());
        }
        list
    }

    /// Checks a list that the peer laid out at `header`; it must end at or before `end`.
    pub(super) fn map<M: Memory>(
        memory: &M,
        header: usize,
        end: usize,
    ) -> Result<Self, MemoryError> {
        let too_small =
            |needed: u64| MemoryError::TooSmall { what: "a buffer list", needed, have: end as u64 };
        let slices = header as u64 + LIST_HEADER_LEN as u64;
        if slices > end as u64 {
            return Err(too_small(slices));
        }
        let capacity = memory.load_u32(header + LIST_CAPACITY_OFFSET, Ordering::Acquire);
        let slice_capacity =
            memory.load_u32(header + LIST_SLICE_CAPACITY_OFFSET, Ordering::Acquire);
        let field = |what, value: u32, problem| {
            Err(MemoryError::Field { what, value: u64::from(value), problem })
        };
        if capacity == 0 {
            return field("list capacity", capacity, "a list must hold slices");
        }
        if slice_capacity == 0 || !ODD_FIELDS && !slice_capacity.is_multiple_of(4) {
            let problem = "headers behind such slices would be misaligned";
            return field("slice capacity", slice_capacity, problem);
        }
        // Whose size is not divisible by four may stand anywhere, and so may the lists behind them.
        let exchanged = [LIST_SIZE_OFFSET, LIST_HEAD_OFFSET, LIST_TAIL_OFFSET];
        if exchanged.iter().any(|&at| !is_exchangeable(header + at)) {
            // Fits: the whole memory does.
            let problem = "a field that both sides change would cross a cache line";
            return field("place of a list header", header as u32, problem);
        }
        // Two large numbers of the peer's: their product may be the largest that there is.
        let needed = list_len(capacity, slice_capacity).saturating_add(header as u64);
        if needed > end as u64 {
            return Err(too_small(needed));
        }
        let list = Self { header, capacity, slice_capacity };
        list.head(memory)?;
        let tail = memory.load_u32(header + LIST_TAIL_OFFSET, Ordering::Acquire);
        list.checked_place("list tail", tail)?;
        Ok(list)
    }

    /// Where the list says that its first free slice stands, from the end of its header. A slice
    /// does start there.
    pub(super) fn head<M: Memory>(&self, memory: &M) -> Result<u32, MemoryError> {
        // Acquire, pairs with the compare-and-swap of another taker.
        let head = memory.load_u32(self.header + LIST_HEAD_OFFSET, Ordering::Acquire);
        self.checked_place("list head", head)?;
        Ok(head)
    }

    /// Says where the first free slice stands, when only this side takes from the list.
    pub(super) fn show_head<M: Memory>(&self, memory: &M, head: u32) {
        // Relaxed: it pairs with nothing. The one side that takes slices does not read it back, and
        // whoever looks at the list when all is quiet has been told so by other means.
        memory.store_u32(self.header + LIST_HEAD_OFFSET, head, Ordering::Relaxed);
    }

    /// How many slices the list was made with.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// How many bytes a slice holds.
    pub(super) fn slice_capacity(&self) -> u32 {
        self.slice_capacity
    }

    /// Offset of the first byte behind the list.
    pub(super) fn end(&self) -> usize {
        self.slice(self.capacity)
    }

    fn stride(&self) -> u32 {
        self.slice_capacity + SLICE_HEADER_LEN as u32
    }

    /// Offset of the slice at `place`, from the start of the memory.
    #[inline]
    pub(crate) fn slice(&self, place: u32) -> usize {
        self.header + LIST_HEADER_LEN + place as usize * self.stride() as usize
    }

    /// Offset of the slice at `place`, from the end of the list header. Fits: the whole list does.
    #[inline]
    fn relative(&self, place: u32) -> u32 {
        place * self.stride()
    }

    /// The place that an offset from the end of the list header names, if a slice starts there.
    #[inline]
    fn place(&self, relative: u32) -> Option<u32> {
        let place = relative / self.stride();
        (place < self.capacity && place * self.stride() == relative).then_some(place)
    }

    /// The place that an offset from the start of the memory names, if a slice starts there.
    #[inline]
    pub(super) fn place_of_slice(&self, offset: u32) -> Option<u32> {
        let slices = self.header + LIST_HEADER_LEN;
        let relative = (offset as usize).checked_sub(slices)?;
        self.place(u32::try_from(relative).ok()?)
    }

    #[inline]
    pub(super) fn checked_place(
        &self,
        what: &'static str,
        relative: u32,
    ) -> Result<u32, MemoryError> {
        self.place(relative).ok_or(MemoryError::Field {
            what,
            value: u64::from(relative),
            problem: "no slice starts there",
        })
    }

    /// How many slices the list says are free. The peer can write what it likes here.
    #[inline]
    pub(crate) fn free<M: Memory>(&self, memory: &M) -> i32 {
        memory.load_u32(self.header + LIST_SIZE_OFFSET, Ordering::Acquire).cast_signed()
    }

    pub(super) fn add_to_size<M: Memory>(&self, memory: &M, count: u32) -> i32 {
        // Acquire and release: `size` counts slices whose links are written before it grows (in
        // `give`) and taken after it shrank (in `take`).
        memory.fetch_add_u32(self.header + LIST_SIZE_OFFSET, count, Ordering::AcqRel).cast_signed()
    }

    /// Takes up to `want` slices. An empty batch: nothing that could be handed out.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when the list does not hold together; the session is over then.
    pub(crate) fn take<M: Memory>(&self, memory: &M, want: usize) -> Result<Batch, MemoryError> {
        let Some(want) = self.reserve(memory, want) else {
            return Ok(Batch::EMPTY);
        };
        let taken = self.take_reserved(memory, want as usize);
        let got = taken.as_ref().map_or(0, |batch| batch.len as u32);
        if got < want {
            self.add_to_size(memory, want - got);
        }
        taken
    }

    /// Takes up to `want` slices out of `size`, and leaves at least one in.
    fn reserve<M: Memory>(&self, memory: &M, want: usize) -> Option<u32> {
        // The peer can only be faster a few times in a row before nothing is left anyway.
        for _ in 0..4 {
            let free = self.free(memory);
            if free <= 1 {
                return None;
            }
            // A size that the peer made absurd buys nothing: the walk finds what is really there.
            let spare = free.unsigned_abs() - 1;
            let want = (want.min(MAX_BATCH) as u32).min(spare).min(self.capacity);
            if self.add_to_size(memory, want.wrapping_neg()) > want.cast_signed() {
                return Some(want);
            }
            self.add_to_size(memory, want);
        }
        None
    }

    fn take_reserved<M: Memory>(&self, memory: &M, want: usize) -> Result<Batch, MemoryError> {
        let head_at = self.header + LIST_HEAD_OFFSET;
        let mut astray = 0;
        for _ in 0..TAKE_TRIES {
            // Acquire, pairs with the compare-and-swap of another taker.
            let head = memory.load_u32(head_at, Ordering::Acquire);
            match self.walk(memory, head, want) {
                Ok((batch, next)) if batch.len > 0 => {
                    if memory.compare_exchange_u32(head_at, head, next).is_ok() {
                        self.check_taken(memory, &batch, next)?;
                        return Ok(batch);
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    // A slice that the peer took meanwhile has another kind of link by now. Only
                    // where the head has not moved, and again and again, is the list itself astray.
                    let is_still = memory.load_u32(head_at, Ordering::Acquire) == head;
                    astray = if is_still { astray + 1 } else { 0 };
                    if astray >= ASTRAY_TRIES {
                        return Err(error);
                    }
                }
            }
            // Either the peer took in between, or it has swapped the tail and not yet linked.
            memory.relax();
        }
        Ok(Batch::EMPTY)
    }

    /// Follows up to `want` links from `head`, [`MAX_BATCH`] at the most. Gives the slices on the
    /// way, and where the last link leads. All of it is true only if the head has not moved
    /// meanwhile.
    pub(super) fn walk<M: Memory>(
        &self,
        memory: &M,
        head: u32,
        want: usize,
    ) -> Result<(Batch, u32), MemoryError> {
        let mut batch = Batch::EMPTY;
        let mut relative = head;
        let mut place = self.checked_place("list head", head)?;
        while batch.len < want.min(MAX_BATCH) && self.has_next(memory, place) {
            batch.places[batch.len] = place;
            batch.len += 1;
            let next_at = self.slice(place) + SLICE_NEXT_OFFSET;
            relative = memory.load_u32(next_at, Ordering::Acquire);
            place = self.checked_place("link of a free slice", relative)?;
        }
        Ok((batch, relative))
    }

    /// Whether another free slice is linked behind this one.
    #[inline]
    pub(super) fn has_next<M: Memory>(&self, memory: &M, place: u32) -> bool {
        // Acquire, pairs with the release store of the flag in `give`: `next` is written.
        let flags = memory.load_u8(self.slice(place) + SLICE_FLAGS_OFFSET, Ordering::Acquire);
        flags & FLAG_HAS_NEXT != 0
    }

    /// Checks that a slice which this side has just taken is not marked as part of a message: both
    /// sides of this crate mark what they send, and take the mark off what they give.
    pub(super) fn check_mark<M: Memory>(&self, memory: &M, place: u32) -> Result<(), MemoryError> {
        let slice = self.slice(place);
        // Relaxed: the walk has acquired it, and nobody writes to it before this side does.
        let flags = memory.load_u8(slice + SLICE_FLAGS_OFFSET, Ordering::Relaxed);
        if flags & FLAG_IN_USE == 0 {
            return Ok(());
        }
        // An offset always fits: the whole memory is below 4 GiB.
        let (offset, value) = (slice as u32, u32::from(flags));
        let what = "flags of a free slice";
        Err(MemoryError::SliceHeader { offset, what, value, limit: u32::from(FLAG_HAS_NEXT) })
    }

    /// Checks that the header of a slice is one of this list.
    #[inline]
    pub(super) fn check_capacity<M: Memory>(
        &self,
        memory: &M,
        place: u32,
    ) -> Result<(), MemoryError> {
        let slice = self.slice(place);
        // Relaxed: no list changes it after it was laid out.
        let capacity = memory.load_u32(slice + SLICE_CAPACITY_OFFSET, Ordering::Relaxed);
        if capacity == self.slice_capacity {
            return Ok(());
        }
        // An offset always fits: the whole memory is below 4 GiB.
        let (offset, limit) = (slice as u32, self.slice_capacity);
        Err(MemoryError::SliceHeader { offset, what: "capacity", value: capacity, limit })
    }

    /// Checks that the links of the batch are still those that were walked, and that the headers
    /// are those of free slices of this list.
    fn check_taken<M: Memory>(
        &self,
        memory: &M,
        batch: &Batch,
        last_link: u32,
    ) -> Result<(), MemoryError> {
        for (index, &place) in batch.places().iter().enumerate() {
            let slice = self.slice(place);
            let expected = match batch.places().get(index + 1) {
                Some(&next) => self.relative(next),
                None => last_link,
            };
            let poison = |what, value, limit| {
                // An offset always fits: the whole memory is below 4 GiB.
                Err(MemoryError::SliceHeader { offset: slice as u32, what, value, limit })
            };
            let next = memory.load_u32(slice + SLICE_NEXT_OFFSET, Ordering::Acquire);
            let flags = memory.load_u8(slice + SLICE_FLAGS_OFFSET, Ordering::Acquire);
            // Not all peers mark what they use, but no peer gives back what it has marked.
            if flags & (FLAG_HAS_NEXT | FLAG_IN_USE) != FLAG_HAS_NEXT {
                return poison("flags of a free slice", u32::from(flags), 1);
            }
            if next != expected {
                return poison("next of a free slice", next, expected);
            }
            self.check_capacity(memory, place)?;
        }
        Ok(())
    }

    /// Gives slices back. This side holds every one of them.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when the list's tail names no slice; the session is over then.
    pub(crate) fn give<M: Memory>(&self, memory: &M, places: &[u32]) -> Result<(), MemoryError> {
        let (Some(&first), Some(&last)) = (places.first(), places.last()) else {
            return Ok(());
        };
        for (index, &place) in places.iter().enumerate() {
            let slice = self.slice(place);
            // Relaxed: these slices are nobody else's until the link below is released.
            memory.store_u32(slice + SLICE_SIZE_OFFSET, 0, Ordering::Relaxed);
            memory.store_u32(slice + SLICE_START_OFFSET, 0, Ordering::Relaxed);
            match places.get(index + 1) {
                Some(&next) => {
                    memory.store_u32(
                        slice + SLICE_NEXT_OFFSET,
                        self.relative(next),
                        Ordering::Relaxed,
                    );
                    memory.store_u8(slice + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Relaxed);
                }
                None => memory.store_u8(slice + SLICE_FLAGS_OFFSET, 0, Ordering::Relaxed),
            }
        }
        // Acquire and release: whoever swaps next links behind a slice whose header is reset, and
        // this side links behind one that its giver has reset.
        let tail_at = self.header + LIST_TAIL_OFFSET;
        let old = memory.swap_u32(tail_at, self.relative(last), Ordering::AcqRel);
        let old = self.slice(self.checked_place("list tail", old)?);
        memory.store_u32(old + SLICE_NEXT_OFFSET, self.relative(first), Ordering::Relaxed);
        // Release, pairs with the acquire load of the flag in `has_next`. From here on the slice
        // may be taken, and this side does not touch it any more.
        memory.store_u8(old + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Release);
        // At most the capacity, since this side holds that many.
        self.add_to_size(memory, places.len() as u32);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;

    use super::*;
    use crate::shm::map::region::Region;

    const SLICE: u32 = 64;

    fn list_of(capacity: u32) -> (Region, FreeList) {
        let memory = Region::heap(list_len(capacity, SLICE) as usize + 8);
        let list = FreeList::create(&memory, 8, capacity, SLICE);
        (memory, list)
    }

    #[test]
    fn a_mapped_list_is_the_created_one() {
        let (memory, created) = list_of(5);
        let mapped = FreeList::map(&memory, 8, memory.len()).unwrap();
        assert_eq!(format!("{created:?}"), format!("{mapped:?}"));
        assert_eq!(mapped.end(), memory.len());
    }

    #[test]
    fn slices_come_in_order_and_the_last_one_stays() {
        let (memory, list) = list_of(5);
        assert_eq!(list.take(&memory, 3).unwrap().places(), [0, 1, 2]);
        assert_eq!(list.free(&memory), 2);
        assert_eq!(list.take(&memory, 3).unwrap().places(), [3]);
        assert_eq!(list.take(&memory, 3).unwrap().places(), [0; 0]);
        list.give(&memory, &[2, 0]).unwrap();
        assert_eq!(list.free(&memory), 3);
        assert_eq!(list.take(&memory, 3).unwrap().places(), [4, 2]);
        assert_eq!(list.take(&memory, 3).unwrap().places(), [0; 0]);
    }

    #[test]
    fn a_list_cut_by_a_giver_that_stalled_gives_what_it_can_and_ends() {
        let (memory, list) = list_of(4);
        list.take(&memory, 2).unwrap();
        // What `give` does up to the swap, by a peer that then stops.
        let tail = 8 + LIST_TAIL_OFFSET;
        memory.store_u8(list.slice(0) + SLICE_FLAGS_OFFSET, 0, Ordering::Relaxed);
        memory.swap_u32(tail, list.relative(0), Ordering::AcqRel);
        // And one that came behind it and finished.
        list.give(&memory, &[1]).unwrap();
        assert_eq!(list.free(&memory), 3);
        assert_eq!(list.take(&memory, 2).unwrap().places(), [2]);
        assert_eq!(list.take(&memory, 2).unwrap().places(), [0; 0], "3 is cut off from 0");
        assert_eq!(list.free(&memory), 2, "what could not be taken is counted again");
    }

    #[test]
    fn offsets_off_the_grid_are_found_before_they_are_followed() {
        for (at, what) in [(LIST_HEAD_OFFSET, "list head"), (LIST_TAIL_OFFSET, "list tail")] {
            for bad in [1, 4, SLICE + 19, SLICE + 21, 4 * (SLICE + 20), u32::MAX, 0x8000_0000] {
                let (memory, list) = list_of(4);
                memory.store_u32(8 + at, bad, Ordering::Relaxed);
                let mapped = FreeList::map(&memory, 8, memory.len()).map(drop);
                assert!(matches!(mapped, Err(MemoryError::Field { .. })), "{what} {bad}");
                let result = match at {
                    LIST_HEAD_OFFSET => list.take(&memory, 1).map(drop),
                    _ => list.give(&memory, &[3]),
                };
                let error = result.unwrap_err();
                assert!(error.to_string().contains(what), "{error}");
            }
        }
        let (memory, list) = list_of(4);
        memory.store_u32(list.slice(1) + SLICE_NEXT_OFFSET, 7, Ordering::Relaxed);
        assert!(matches!(list.take(&memory, 3), Err(MemoryError::Field { value: 7, .. })));
    }

    #[test]
    fn headers_that_no_list_could_have_are_refused() {
        let stride = SLICE + 20;
        let cases = [
            (LIST_CAPACITY_OFFSET, 0, "list capacity"),
            (LIST_CAPACITY_OFFSET, 5, "a buffer list"),
            (LIST_CAPACITY_OFFSET, u32::MAX, "a buffer list"),
            // In 32 bits this many slices would come out at the right length again.
            (LIST_CAPACITY_OFFSET, u32::MAX / stride + 2, "a buffer list"),
            (LIST_SLICE_CAPACITY_OFFSET, 0, "slice capacity"),
            (LIST_SLICE_CAPACITY_OFFSET, 63, "list tail"),
            (LIST_SLICE_CAPACITY_OFFSET, u32::MAX - 3, "a buffer list"),
            (LIST_SLICE_CAPACITY_OFFSET, u32::MAX - 19, "a buffer list"),
        ];
        for (at, value, names) in cases {
            let (memory, _) = list_of(4);
            memory.store_u32(8 + at, value, Ordering::Relaxed);
            let error = FreeList::map(&memory, 8, memory.len()).map(drop).unwrap_err();
            assert!(error.to_string().contains(names), "{value}: {error}");
        }
        let (memory, _) = list_of(4);
        assert!(FreeList::map(&memory, memory.len() - 35, memory.len()).is_err());
    }

    #[test]
    fn a_cycle_of_free_slices_ends() {
        let (memory, list) = list_of(4);
        memory.store_u32(list.slice(1) + SLICE_NEXT_OFFSET, 0, Ordering::Relaxed);
        // The size says four; the walk goes round and takes no more than it was asked for.
        let taken = list.take(&memory, 3).unwrap();
        assert_eq!(taken.places(), [0, 1, 0], "the manager's ledger finds what comes twice");
    }

    #[test]
    fn a_size_that_lies_hands_out_nothing_twice() {
        for size in [i32::MAX, i32::MIN, 0, -5, 1000] {
            let (memory, list) = list_of(4);
            memory.store_u32(8 + LIST_SIZE_OFFSET, size.cast_unsigned(), Ordering::Relaxed);
            let mut seen = HashSet::new();
            for _ in 0..10 {
                for &place in list.take(&memory, 2).unwrap().places() {
                    assert!(seen.insert(place), "{size}");
                }
            }
            assert!(seen.len() <= 3, "{size}");
        }
    }

    #[test]
    fn links_that_changed_under_a_take_are_reported() {
        let (memory, list) = list_of(6);
        let head_at = 8 + LIST_HEAD_OFFSET;
        // What another process does between our walk and our swap: 0 and 1 go once round.
        let batch = Batch { places: [0; MAX_BATCH], len: 1 };
        let taken = list.take(&memory, 2).unwrap();
        assert_eq!(taken.places(), [0, 1]);
        list.give(&memory, &[0]).unwrap();
        memory.store_u32(head_at, 0, Ordering::Relaxed);
        let error = list.check_taken(&memory, &batch, list.relative(1)).unwrap_err();
        assert!(matches!(error, MemoryError::SliceHeader { .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]
        #[test]
        fn agrees_with_a_queue(
            capacity in 1u32..50,
            actions in prop::collection::vec((any::<bool>(), 1usize..40), 0..200),
        ) {
            let (memory, list) = list_of(capacity);
            let mut model: VecDeque<u32> = (0..capacity).collect();
            let mut held: Vec<u32> = Vec::new();
            for (takes, count) in actions {
                if takes {
                    let expected = count.min(MAX_BATCH).min(model.len().saturating_sub(1));
                    let expected: Vec<_> = model.drain(..expected).collect();
                    let batch = list.take(&memory, count).unwrap();
                    prop_assert_eq!(batch.places(), &expected[..]);
                    held.extend(expected);
                } else {
                    let rest = held.split_off(held.len().saturating_sub(count));
                    list.give(&memory, &rest).unwrap();
                    model.extend(rest);
                }
                prop_assert_eq!(list.free(&memory) as usize, model.len());
            }
        }
    }

    /// Two takers and givers with mappings of their own; a slice marks its owner in its payload.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn two_threads_never_hold_the_same_slice() {
        // Long, so that a thread which stalls in the middle of a take does not meet its head again:
        // the list cannot be safe from that, only report it.
        const CAPACITY: u32 = 8192;
        const ROUNDS: u32 = 30_000;
        let len = list_len(CAPACITY, SLICE) as usize + 8;
        let (memory, fd) = Region::create_memfd(Path::new("list-test"), len).unwrap();
        let list = FreeList::create(&memory, 8, CAPACITY, SLICE);
        let owners: Arc<Vec<AtomicU32>> =
            Arc::new((0..CAPACITY).map(|_| AtomicU32::new(0)).collect());
        let work = move |memory: Region, owner: u32, owners: Arc<Vec<AtomicU32>>| {
            let mut held = VecDeque::new();
            for round in 0..ROUNDS {
                let want = 1 + (round.wrapping_mul(owner + 7) % 9) as usize;
                for &place in list.take(&memory, want).unwrap().places() {
                    let before = owners[place as usize].swap(owner, Ordering::Relaxed);
                    assert_eq!(before, 0, "slice {place} has two owners");
                    held.push_back(place);
                    // As in a message: linked by an offset that is none of the list's.
                    let slice = list.slice(place);
                    let next = slice as u32;
                    memory.store_u32(slice + SLICE_NEXT_OFFSET, next, Ordering::Relaxed);
                    memory.store_u8(slice + SLICE_FLAGS_OFFSET, 3, Ordering::Relaxed);
                }
                if held.len() > 60 || round % 3 == 0 {
                    let count = held.len().min(MAX_BATCH / 2);
                    let places: Vec<u32> = held.drain(..count).collect();
                    for &place in &places {
                        owners[place as usize].store(0, Ordering::Relaxed);
                    }
                    list.give(&memory, &places).unwrap();
                }
                if round % 64 == 0 {
                    std::thread::yield_now();
                }
            }
            let rest: Vec<u32> = held.into();
            for &place in &rest {
                owners[place as usize].store(0, Ordering::Relaxed);
            }
            list.give(&memory, &rest).unwrap();
        };
        let other = {
            let owners = Arc::clone(&owners);
            std::thread::spawn(move || {
                let memory = Region::map_descriptor(fd, "buffer", 1 << 30).unwrap();
                work(memory, 2, owners);
            })
        };
        work(memory, 1, Arc::clone(&owners));
        other.join().unwrap();
        assert!(owners.iter().all(|owner| owner.load(Ordering::Relaxed) == 0));
    }
}
