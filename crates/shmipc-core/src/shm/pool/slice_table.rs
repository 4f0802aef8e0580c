// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this side knows of each slice, in private memory.
//!
//! Nothing here is read from or seen by the peer; the page of [`pool`](crate::shm::pool) says what
//! it is for.

use std::cell::Cell;

use crate::wire::layout::SLICE_HEADER_LEN;

/// A slice, counted through all lists of its memory.
pub type SliceId = u32;
/// No slice: the end of a chain.
pub(crate) const NO_SLICE: SliceId = u32::MAX;

/// What the ledger says about one slice.
///
/// Each field is read and written alone, never the whole entry: see the page of
/// [`chain`](crate::shm::chain) for what a load that spans two fresh stores costs.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Offset of the slice from the start of the memory; 0 while this side has it neither in a
    /// chain nor in a magazine. No slice starts at 0, where the header of the memory stands.
    pub(crate) offset: Cell<u32>,
    /// The next slice of the chain, or [`NO_SLICE`].
    pub(crate) next: Cell<SliceId>,
    /// Where the bytes that count start, behind the slice header.
    pub(crate) start: Cell<u32>,
    /// How many bytes count.
    pub(crate) len: Cell<u32>,
    /// How many bytes the slice can hold.
    pub(crate) capacity: u32,
    /// Which of the sizes that is, so that a freed slice finds its magazine without a search.
    pub(crate) class: u8,
}

// The ledger is as long as there are slices.
const _: () = assert!(size_of::<Entry>() == 24);

impl Entry {
    pub(crate) const fn new(class: u8, capacity: u32) -> Self {
        Self {
            offset: Cell::new(0),
            next: Cell::new(NO_SLICE),
            start: Cell::new(0),
            len: Cell::new(0),
            capacity,
            class,
        }
    }

    #[inline]
    pub(crate) fn set(&self, offset: u32, start: u32, len: u32) {
        self.offset.set(offset);
        self.next.set(NO_SLICE);
        self.start.set(start);
        self.len.set(len);
    }

    /// Offset of the first byte that counts, from the start of the memory.
    #[inline]
    pub(crate) fn data(&self) -> usize {
        self.offset.get() as usize + SLICE_HEADER_LEN + self.start.get() as usize
    }
}

/// Who takes slices from a list. Both sides give back to all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListOwner {
    /// Both sides.
    Shared,
    /// This side alone: the sides have agreed on a set of lists for each of them.
    Own,
    /// The peer alone.
    Peer,
}

/// How many slices of one list are free, and how many there are.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{ListOwner, SliceUsage};
///
/// fn bytes_in_use(usage: &SliceUsage) -> u64 {
///     let free = i64::from(usage.free) + i64::from(usage.magazine);
///     // A peer can write any count of free slices into the memory.
///     let used = i64::from(usage.total) - free.clamp(0, i64::from(usage.total));
///     used as u64 * u64::from(usage.slice_capacity)
/// }
///
/// let owner = ListOwner::Shared;
/// let usage = SliceUsage { owner, slice_capacity: 4076, free: 90, magazine: 8, total: 100 };
/// assert_eq!(bytes_in_use(&usage), 2 * 4076);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceUsage {
    /// Who takes slices from the list.
    pub owner: ListOwner,
    /// Bytes of payload in each slice.
    pub slice_capacity: u32,
    /// Slices in the list's free chain, by the list's own count, which the peer can write. While
    /// slices are on their way it may be off by them, and below zero.
    pub free: i32,
    /// Slices of the list in this side's magazine, free too.
    pub magazine: u32,
    /// All slices of the list.
    pub total: u32,
}
