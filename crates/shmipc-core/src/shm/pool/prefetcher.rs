// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guesses in which order a list will give its slices, and brings their headers near together.
//!
//! To take slices is to follow links, each of which stands in memory that the peer was the last to
//! write: one miss after the other, each of which costs as much as everything else that a message
//! takes. But a list is first in, first out, and whoever reads messages gives their slices back in
//! the order in which they came, more or less. So what was taken behind a slice the last time will
//! mostly be behind it again. That is remembered, in private memory; from it the headers of a
//! whole batch are asked for before the first link is followed, and come at the same time.
//!
//! A wrong guess costs the fetch of a line. Nothing that is guessed is ever relied on.

use std::cell::Cell;

use crate::shm::map::memory::Memory;
use crate::shm::pool::free_list::{Batch, FreeList};

/// What is known of the order of one list.
pub(super) struct LinkPrefetcher {
    /// For each place, the one that was taken behind it the last time.
    behind: Box<[Cell<u32>]>,
    /// The last place of the last batch.
    last: Cell<u32>,
}

impl LinkPrefetcher {
    /// For a list as it is laid out: from the first slice to the last.
    pub(super) fn new(capacity: u32) -> Self {
        let behind = (1..capacity).chain([0]).map(Cell::new).collect();
        Self { behind, last: Cell::new(capacity.saturating_sub(1)) }
    }

    /// Brings the headers of `count` slices near: of the one at the head, and of those that are
    /// expected behind it.
    #[inline]
    pub(super) fn prefetch<M: Memory>(&self, memory: &M, list: &FreeList, head: u32, count: usize) {
        let mut place = head;
        for _ in 0..count {
            memory.prefetch(list.slice(place));
            let Some(behind) = self.behind.get(place as usize) else { return };
            place = behind.get();
        }
    }

    /// Remembers the order of a batch that was taken.
    #[inline]
    pub(super) fn note(&self, batch: &Batch) {
        for &place in batch.places() {
            // Those of a batch are places of the list.
            if let Some(behind) = self.behind.get(self.last.replace(place) as usize) {
                behind.set(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::map::region::Region;
    use crate::wire::layout::list_len;

    const SLICE: u32 = 64;
    const CAPACITY: u32 = 12;

    fn guess(scout: &LinkPrefetcher, head: u32, count: usize) -> Vec<u32> {
        let behind = |&place: &u32| Some(scout.behind[place as usize].get());
        std::iter::successors(Some(head), behind).take(count).collect()
    }

    #[test]
    fn what_was_taken_in_an_order_is_expected_in_it() {
        let memory = Region::heap(list_len(CAPACITY, SLICE) as usize);
        let list = FreeList::create(&memory, 0, CAPACITY, SLICE);
        let scout = LinkPrefetcher::new(CAPACITY);
        let take = |want| {
            let batch = list.take(&memory, want).unwrap();
            scout.note(&batch);
            batch.places().to_vec()
        };
        assert_eq!(guess(&scout, 0, 6), take(6), "a fresh list is in order");
        list.give(&memory, &[4, 1, 5, 0, 3, 2]).unwrap();
        assert_eq!(take(5), [6, 7, 8, 9, 10]);
        list.give(&memory, &[8, 10, 9, 6, 7]).unwrap();
        // What was behind the last of the batch before is learned with the first of this one.
        assert_eq!(take(7), [11, 4, 1, 5, 0, 3, 2]);
        list.give(&memory, &[11, 4, 1, 5, 0, 3, 2]).unwrap();
        assert_eq!(take(5), [8, 10, 9, 6, 7]);
        assert_eq!(guess(&scout, 11, 12), [11, 4, 1, 5, 0, 3, 2, 8, 10, 9, 6, 7]);
        assert_eq!(guess(&scout, 11, 6), take(6));
    }

    #[test]
    fn it_asks_for_nothing_outside() {
        let memory = Region::heap(list_len(CAPACITY, SLICE) as usize);
        let list = FreeList::create(&memory, 0, CAPACITY, SLICE);
        let scout = LinkPrefetcher::new(CAPACITY);
        scout.prefetch(&memory, &list, 3, 100);
        scout.prefetch(&memory, &list, CAPACITY, 100);
        scout.prefetch(&memory, &list, 0, 0);
        // Of a list of the same memory that is longer, by a mistake.
        let one = LinkPrefetcher::new(1);
        one.prefetch(&memory, &list, CAPACITY - 1, 100);
        assert_eq!(guess(&one, 0, 3), [0, 0, 0]);
        let none = LinkPrefetcher::new(0);
        none.prefetch(&memory, &list, 0, 3);
        none.note(&Batch::EMPTY);
    }
}
