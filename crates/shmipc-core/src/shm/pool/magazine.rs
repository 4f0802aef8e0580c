// SPDX-License-Identifier: MIT OR Apache-2.0
//! A short private stack of free slices of one size.
//!
//! What was freed last is taken first, while its lines are still near; what lies at the bottom is
//! the coldest and goes back to its shared list first. Private memory of one core: nothing here is
//! seen by the peer.

use std::cell::Cell;

use crate::shm::pool::SliceId;

/// Up to so many free slices of one size, whichever lists they stand in.
pub(super) struct Magazine {
    slices: Box<[Cell<SliceId>]>,
    len: Cell<usize>,
}

impl Magazine {
    /// Holds `limit` slices, and for a moment one more: the one with which it overflows.
    pub(super) fn new(limit: usize) -> Self {
        Self { slices: vec![Cell::new(0); limit + 1].into_boxed_slice(), len: Cell::new(0) }
    }

    /// How many it should hold at most.
    #[inline]
    pub(super) fn limit(&self) -> usize {
        self.slices.len() - 1
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len.get()
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a slice on top. The caller takes some out when there are more than the limit.
    #[inline]
    pub(super) fn push(&self, id: SliceId) {
        let len = self.len.get();
        self.slices[len].set(id);
        self.len.set(len + 1);
    }

    /// Takes the slice on top.
    #[inline]
    pub(super) fn pop(&self) -> Option<SliceId> {
        let len = self.len.get().checked_sub(1)?;
        self.len.set(len);
        Some(self.slices[len].get())
    }

    /// All of them, the coldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = SliceId> {
        self.slices[..self.len()].iter().map(Cell::get)
    }

    /// Takes the coldest slices, as many as there are and `to` has room for. Gives how many.
    pub(super) fn take_coldest(&self, to: &mut [SliceId]) -> usize {
        let len = self.len.get();
        let count = to.len().min(len);
        for (to, slice) in to.iter_mut().zip(&self.slices[..count]) {
            *to = slice.get();
        }
        for place in count..len {
            self.slices[place - count].set(self.slices[place].get());
        }
        self.len.set(len - count);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_comes_first_and_the_coldest_goes_first() {
        let magazine = Magazine::new(4);
        assert_eq!((magazine.limit(), magazine.pop()), (4, None));
        (1..=5).for_each(|id| magazine.push(id));
        assert_eq!(magazine.len(), 5);
        assert!(magazine.iter().eq(1..=5));
        let mut cold = [0; 3];
        assert_eq!(magazine.take_coldest(&mut cold), 3);
        assert_eq!(cold, [1, 2, 3]);
        assert_eq!(magazine.pop(), Some(5));
        let mut cold = [0; 3];
        assert_eq!(magazine.take_coldest(&mut cold), 1);
        assert_eq!(cold, [4, 0, 0]);
        assert!(magazine.is_empty());
    }
}
