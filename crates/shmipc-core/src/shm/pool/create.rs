// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a [`SlicePool`] comes to be: over memory that this side lays out, or that the peer did.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use crate::config::{PRIVATE_BYTES_PER_SLICE, SliceClass};
use crate::error::MemoryError;
use crate::shm::chain::ChainState;
use crate::shm::map::memory::Memory;
use crate::shm::pool::SlicePool;
use crate::shm::pool::format::{ListSets, create_lists, map_lists};
use crate::shm::pool::slice_table::Entry;
use crate::wire::Extension;

// A line of the ledger; and for one message in each slice, what the message consists of, its place
// in a stream that grows by doubling, and what the allocator adds.
const _: () = assert!(
    size_of::<Entry>() + size_of::<ChainState>() + 2 * size_of::<Box<ChainState>>() + 16
        <= PRIVATE_BYTES_PER_SLICE as usize
);

impl<M: Memory> SlicePool<M> {
    /// Lays out the memory: every class gets its share of what the headers leave.
    pub fn create(
        memory: &Rc<M>,
        classes: &[SliceClass],
        sets: ListSets,
    ) -> Result<Rc<Self>, MemoryError> {
        Self::with_lists(memory, &create_lists(&**memory, classes, sets)?)
    }

    /// Checks a memory that the peer laid out.
    #[cfg(any(test, fuzzing, feature = "test-util"))]
    pub fn map(memory: &Rc<M>, sets: ListSets) -> Result<Rc<Self>, MemoryError> {
        Self::with_lists(memory, &map_lists(&**memory, sets)?)
    }

    /// Checks a memory that the peer laid out, and asks before it allocates what this side keeps
    /// beside it.
    ///
    /// # Errors
    ///
    /// What is wrong with the memory, and what `may_keep` says about the number of bytes.
    pub fn map_within(
        memory: &Rc<M>,
        sets: ListSets,
        may_keep: impl FnOnce(u64) -> Result<(), MemoryError>,
    ) -> Result<Rc<Self>, MemoryError> {
        let lists = map_lists(&**memory, sets)?;
        may_keep(lists.slices().saturating_mul(PRIVATE_BYTES_PER_SLICE))?;
        Self::with_lists(memory, &lists)
    }

    /// Says what this side does beyond the protocol. `at` is where its byte stands.
    pub fn show_extension(&self, at: usize, extension: Extension) {
        // Relaxed: the handshake's socket orders it, or it comes to be known a little later.
        self.memory().store_u8(at, extension.to_byte(), Ordering::Relaxed);
    }

    /// What the peer does beyond the protocol, as far as it has said so.
    pub fn peer_extension(&self, at: usize) -> Option<Extension> {
        Extension::from_byte(self.memory().load_u8(at, Ordering::Relaxed))
    }
}
