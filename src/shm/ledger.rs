// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this side knows of each slice, in private memory.
//!
//! Nothing here is read from or seen by the peer; the page of [`manager`](super::manager) says what
//! it is for.

use std::cell::Cell;

use crate::wire::layout::SLICE_HEADER_LEN;

/// A slice, counted through all lists of its memory.
pub(super) type SliceId = u32;
/// No slice: the end of a chain.
pub(super) const NO_SLICE: SliceId = u32::MAX;

/// What the ledger says about one slice.
///
/// Each field is read and written alone, never the whole entry: see the page of
/// [`chain`](super::chain) for what a load that spans two fresh stores costs.
#[derive(Debug)]
pub(super) struct Entry {
    /// Offset of the slice from the start of the memory; 0 while this side has it neither in a
    /// chain nor in a magazine. No slice starts at 0, where the header of the memory stands.
    pub(super) offset: Cell<u32>,
    /// The next slice of the chain, or [`NO_SLICE`].
    pub(super) next: Cell<SliceId>,
    /// Where the bytes that count start, behind the slice header.
    pub(super) start: Cell<u32>,
    /// How many bytes count.
    pub(super) len: Cell<u32>,
    /// How many bytes the slice can hold.
    pub(super) capacity: u32,
}

impl Entry {
    pub(super) const fn of_capacity(capacity: u32) -> Self {
        Self {
            offset: Cell::new(0),
            next: Cell::new(NO_SLICE),
            start: Cell::new(0),
            len: Cell::new(0),
            capacity,
        }
    }

    #[inline]
    pub(super) fn set(&self, offset: u32, start: u32, len: u32) {
        self.offset.set(offset);
        self.next.set(NO_SLICE);
        self.start.set(start);
        self.len.set(len);
    }

    /// Offset of the first byte that counts, from the start of the memory.
    #[inline]
    pub(super) fn data(&self) -> usize {
        self.offset.get() as usize + SLICE_HEADER_LEN + self.start.get() as usize
    }
}
