// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one side that takes slices from a list: a head with a single writer.
//!
//! Between two sides of this crate that have agreed on it, every size stands in the memory twice,
//! once for each side ([`ListSets`](crate::shm::pool::format::ListSets)). A side takes slices only
//! from its own lists. Whoever frees a slice gives it to the list that it stands in, as ever
//! ([`FreeList::give`]), so a list has two givers and one taker.
//!
//! # Why it needs no compare-and-swap, and cannot take a slice twice
//!
//! The true head is private. Nobody else moves it, so nothing that was walked from it can be taken
//! by another side between the walk and the move: the premise of ABA is gone. What givers do
//! meanwhile does not matter to the walk. A giver writes to the slices that it gives, which are in
//! no list before it links them, and to the one slice that was the tail when it swapped the tail.
//! That slice has no flag until the giver has linked it, and the giver does not touch it after
//! that. A walk stops at a slice without the flag and leaves it where it is. So no slice is handed
//! out that a giver will still write to, and the links of a slice that was passed are final.
//!
//! A giver that stalls between its swap and its link cuts the list there, for as long as it takes,
//! and for ever if it died. The walk ends at the cut as at the end of the list: what is in front of
//! it is handed out, and nobody waits.
//!
//! # What is shared, and who believes it
//!
//! The head in the list's header is written for whoever looks at the memory, and read once, when
//! this side starts. The count of free slices is kept, by one addition a batch, and nothing is
//! decided by it. It may be below zero for a moment: a slice can be taken after it was linked and
//! before its giver has counted it.
//!
//! A peer can write over flags and links, and with that make this side take what is in use. What is
//! marked as that is refused; what this side itself holds is found by the manager's ledger, which
//! also ends every cycle; what the peer holds is the peer's loss. A link that names no slice is an
//! error at once, since an honest peer never changes a link that this side can come to.

use std::cell::Cell;

use crate::error::MemoryError;
use crate::shm::map::memory::Memory;
use crate::shm::pool::free_list::{Batch, FreeList};

/// Takes slices from a list that nobody else takes from.
pub(crate) struct OwnedList {
    list: FreeList,
    /// The first free slice, from the end of the list's header. A slice starts there.
    head: Cell<u32>,
}

impl OwnedList {
    /// Starts where the list's header says, as its creator has left it.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when no slice starts there.
    pub(crate) fn new<M: Memory>(memory: &M, list: FreeList) -> Result<Self, MemoryError> {
        let head = Cell::new(list.head(memory)?);
        Ok(Self { list, head })
    }

    pub(crate) fn list(&self) -> &FreeList {
        &self.list
    }

    /// Where the first free slice stands, from the end of the list's header.
    pub(super) fn head(&self) -> u32 {
        self.head.get()
    }

    /// Takes up to `want` slices. An empty batch: nothing that could be handed out.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when the list does not hold together; the session is over then.
    pub(crate) fn take<M: Memory>(&self, memory: &M, want: usize) -> Result<Batch, MemoryError> {
        let (batch, next) = self.list.walk(memory, self.head.get(), want)?;
        if batch.is_empty() {
            return Ok(batch);
        }
        for &place in batch.places() {
            self.list.check_mark(memory, place)?;
            self.list.check_capacity(memory, place)?;
        }
        self.head.set(next);
        self.list.show_head(memory, next);
        self.list.add_to_size(memory, (batch.places().len() as u32).wrapping_neg());
        Ok(batch)
    }

    /// Whether there is a slice that could be handed out.
    pub(super) fn has_spare<M: Memory>(&self, memory: &M) -> bool {
        // A slice starts there: it was checked when the head was set.
        let place = self.list.checked_place("list head", self.head.get());
        place.is_ok_and(|place| self.list.has_next(memory, place))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::*;
    use crate::shm::map::region::Region;
    use crate::shm::pool::free_list::MAX_BATCH;
    use crate::wire::layout::{
        FLAG_HAS_NEXT, LIST_HEAD_OFFSET, LIST_SIZE_OFFSET, LIST_TAIL_OFFSET, SLICE_CAPACITY_OFFSET,
        SLICE_FLAGS_OFFSET, SLICE_HEADER_LEN, SLICE_NEXT_OFFSET, list_len,
    };

    const SLICE: u32 = 64;
    const STRIDE: u32 = SLICE + SLICE_HEADER_LEN as u32;
    /// Where the list stands.
    const AT: usize = 8;

    fn list_of(capacity: u32) -> (Region, FreeList, OwnedList) {
        let memory = Region::heap(list_len(capacity, SLICE) as usize + AT);
        let list = FreeList::create(&memory, AT, capacity, SLICE);
        let popper = OwnedList::new(&memory, list).unwrap();
        (memory, list, popper)
    }

    fn take(popper: &OwnedList, memory: &Region, want: usize) -> Vec<u32> {
        popper.take(memory, want).unwrap().places().to_vec()
    }

    #[test]
    fn slices_come_in_order_and_the_last_one_stays() {
        let (memory, list, popper) = list_of(5);
        assert_eq!(take(&popper, &memory, 3), [0, 1, 2]);
        assert_eq!(list.free(&memory), 2);
        assert!(popper.has_spare(&memory));
        assert_eq!(take(&popper, &memory, 3), [3]);
        assert_eq!(take(&popper, &memory, 3), [0; 0]);
        assert!(!popper.has_spare(&memory));
        list.give(&memory, &[2, 0]).unwrap();
        assert_eq!(take(&popper, &memory, 3), [4, 2]);
        assert_eq!(take(&popper, &memory, 3), [0; 0]);
        assert_eq!(list.free(&memory), 1);
    }

    #[test]
    fn a_batch_has_its_bound() {
        let (memory, _, popper) = list_of(3 * MAX_BATCH as u32);
        assert_eq!(take(&popper, &memory, usize::MAX).len(), MAX_BATCH);
        assert_eq!(take(&popper, &memory, 0), [0; 0]);
    }

    #[test]
    fn a_list_cut_by_a_giver_that_stalled_gives_what_is_in_front_of_the_cut() {
        let (memory, list, popper) = list_of(5);
        assert_eq!(take(&popper, &memory, 3), [0, 1, 2]);
        // What `give` does up to the swap, by a peer that then stops.
        memory.store_u8(list.slice(0) + SLICE_FLAGS_OFFSET, 0, Ordering::Relaxed);
        memory.swap_u32(AT + LIST_TAIL_OFFSET, 0, Ordering::AcqRel);
        // And one that came behind it and finished.
        list.give(&memory, &[1]).unwrap();
        assert_eq!(take(&popper, &memory, 4), [3]);
        assert_eq!(take(&popper, &memory, 4), [0; 0], "4 is cut off from 0");
        assert!(!popper.has_spare(&memory));
        // The peer goes on, and what was behind the cut is there.
        memory.store_u32(list.slice(4) + SLICE_NEXT_OFFSET, 0, Ordering::Relaxed);
        memory.store_u8(list.slice(4) + SLICE_FLAGS_OFFSET, FLAG_HAS_NEXT, Ordering::Release);
        assert_eq!(take(&popper, &memory, 4), [4, 0]);
    }

    #[test]
    fn the_shared_head_is_read_once() {
        let (memory, list, popper) = list_of(8);
        for head in [7 * STRIDE, 1, u32::MAX, 0] {
            memory.store_u32(AT + LIST_HEAD_OFFSET, head, Ordering::Relaxed);
            let taken = take(&popper, &memory, 1);
            assert_eq!(taken.len(), 1);
            list.give(&memory, &taken).unwrap();
        }
        // Four went round, and whoever looks is told the true head.
        let head = memory.load_u32(AT + LIST_HEAD_OFFSET, Ordering::Relaxed);
        assert_eq!(head, 4 * STRIDE);
        for head in [1, 8 * STRIDE, u32::MAX] {
            memory.store_u32(AT + LIST_HEAD_OFFSET, head, Ordering::Relaxed);
            let error = OwnedList::new(&memory, list).map(drop).unwrap_err();
            assert!(error.to_string().contains("list head"), "{error}");
        }
    }

    #[test]
    fn a_link_that_names_no_slice_is_an_error_at_once() {
        for link in [1, STRIDE - 1, STRIDE + 1, 4 * STRIDE, u32::MAX, 0x8000_0000] {
            let (memory, list, popper) = list_of(4);
            memory.store_u32(list.slice(1) + SLICE_NEXT_OFFSET, link, Ordering::Relaxed);
            let error = popper.take(&memory, 3).map(drop).unwrap_err();
            let what = "link of a free slice";
            let problem = "no slice starts there";
            assert_eq!(error, MemoryError::Field { what, value: u64::from(link), problem });
            // What stands in front of it does not need it.
            assert_eq!(take(&popper, &memory, 1), [0]);
        }
    }

    #[test]
    fn a_header_of_another_list_is_poison() {
        let (memory, list, popper) = list_of(4);
        memory.store_u32(list.slice(1) + SLICE_CAPACITY_OFFSET, 256, Ordering::Relaxed);
        let error = popper.take(&memory, 3).map(drop).unwrap_err();
        assert!(matches!(error, MemoryError::SliceHeader { value: 256, .. }), "{error}");
    }

    #[test]
    fn a_cycle_of_free_slices_ends() {
        let (memory, list, popper) = list_of(4);
        memory.store_u32(list.slice(1) + SLICE_NEXT_OFFSET, 0, Ordering::Relaxed);
        let taken = take(&popper, &memory, 5);
        assert_eq!(taken, [0, 1, 0, 1, 0], "the manager's ledger finds what comes twice");
    }

    #[test]
    fn nothing_is_decided_by_the_size() {
        for size in [i32::MAX, i32::MIN, 0, -5, 1000] {
            let (memory, list, popper) = list_of(6);
            let mut seen = HashSet::new();
            for _ in 0..10 {
                memory.store_u32(AT + LIST_SIZE_OFFSET, size.cast_unsigned(), Ordering::Relaxed);
                assert!(take(&popper, &memory, 2).into_iter().all(|place| seen.insert(place)));
            }
            assert_eq!(seen.len(), 5, "{size}");
            list.give(&memory, &[0, 1, 2]).unwrap();
            assert_eq!(take(&popper, &memory, 9), [5, 0, 1]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]
        #[test]
        fn agrees_with_a_queue(
            capacity in 1u32..50,
            actions in prop::collection::vec((any::<bool>(), 1usize..40), 0..200),
        ) {
            let (memory, list, popper) = list_of(capacity);
            let mut model: VecDeque<u32> = (0..capacity).collect();
            let mut held: Vec<u32> = Vec::new();
            for (takes, count) in actions {
                prop_assert_eq!(popper.has_spare(&memory), model.len() > 1);
                if takes {
                    let expected = count.min(MAX_BATCH).min(model.len() - 1);
                    let expected: Vec<_> = model.drain(..expected).collect();
                    prop_assert_eq!(&take(&popper, &memory, count), &expected);
                    held.extend(expected);
                } else {
                    let rest = held.split_off(held.len().saturating_sub(count));
                    list.give(&memory, &rest).unwrap();
                    model.extend(rest);
                }
                prop_assert_eq!(list.free(&memory) as usize, model.len());
                let head = memory.load_u32(AT + LIST_HEAD_OFFSET, Ordering::Relaxed);
                prop_assert_eq!(head, model[0] * STRIDE);
            }
        }

        /// A peer that writes anything over links, flags, heads and sizes: every walk ends, and
        /// what it gives are places of the list.
        #[test]
        fn a_list_in_shreds_does_no_harm(
            writes in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..40),
        ) {
            let (memory, list, popper) = list_of(8);
            for (at, value) in writes {
                // Grid offsets and flags are more likely to lead somewhere than any number is.
                let value = if value % 2 == 0 { value / 2 % 9 * STRIDE } else { value / 2 % 4 };
                memory.store_u32(at.index(memory.len() / 4) * 4, value, Ordering::Relaxed);
                if let Ok(batch) = popper.take(&memory, 3) {
                    prop_assert!(batch.places().iter().all(|&place| place < 8));
                    let _ = list.give(&memory, batch.places());
                }
            }
        }
    }
}
