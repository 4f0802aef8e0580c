// SPDX-License-Identifier: MIT OR Apache-2.0
//! Taking over the slices of a message that came.
//!
//! Whom it trusts: nobody. Every header is read once, into private memory, and checked; what is not
//! a slice of these lists, or is one that this side holds already, ends the session by name.

use std::rc::Rc;

use crate::error::MemoryError;
use crate::shm::chain::Chain;
use crate::shm::map::memory::Memory;
use crate::shm::pool::SlicePool;
use crate::shm::pool::slice_table::SliceId;
use crate::wire::layout::FLAG_HAS_NEXT;

impl<M: Memory> SlicePool<M> {
    /// Takes over the chain that starts at `offset`, as an event of the peer names it.
    ///
    /// Reads every header once.
    pub fn adopt(self: &Rc<Self>, offset: u32) -> Result<Chain<M>, MemoryError> {
        let mut chain = Chain::empty(Rc::clone(self));
        let mut at = offset;
        let mut occupies = 0;
        // Ends: each turn takes one more slice into the ledger, and none twice.
        loop {
            let (id, capacity, next) = self.adopt_slice(at)?;
            chain.push_back(id);
            occupies += capacity as usize;
            match next {
                Some(next) => at = next,
                None => return Ok(chain.with_capacity(occupies).complete()),
            }
        }
    }

    /// Brings the slice that an event names near, before it is needed.
    #[inline]
    pub fn prefetch(&self, offset: u32) {
        self.memory.prefetch(offset as usize);
        self.memory.prefetch(offset as usize + 64);
    }

    #[inline]
    fn adopt_slice(&self, offset: u32) -> Result<(SliceId, u32, Option<u32>), MemoryError> {
        let id = self.classes.locate(offset).ok_or(MemoryError::Offset { offset })?;
        let entry = self.entry(id);
        if entry.offset.get() != 0 {
            return Err(MemoryError::SharedTwice { offset });
        }
        let at = offset as usize;
        let memory = &*self.memory;
        // Relaxed: the acquire load of the queue's tail ordered them, for an honest peer.
        let [capacity, len, start, next, flags] = memory.load_words(at);
        let [flags, ..] = flags.to_ne_bytes();
        let limit = entry.capacity;
        let wrong = |what, value, limit| MemoryError::SliceHeader { offset, what, value, limit };
        if capacity != limit {
            return Err(wrong("capacity", capacity, limit));
        }
        if start > limit {
            return Err(wrong("start", start, limit));
        }
        if len > limit - start {
            return Err(wrong("size", len, limit - start));
        }
        entry.set(offset, start, len);
        self.held.set(self.held.get() + 1);
        Ok((id, capacity, (flags & FLAG_HAS_NEXT != 0).then_some(next)))
    }
}
