// SPDX-License-Identifier: MIT OR Apache-2.0
//! References into the slices of a chain, for peers that a promise speaks for.
//!
//! `unsafe` here: the promise of the user, [`PeerTrust`], stands for what cannot be checked.

use crate::shm::chain::{Chain, Private};
use crate::shm::map::region::Region;
use crate::shm::map::trust::PeerTrust;
use crate::shm::pool::{NO_SLICE, SliceId, SlicePool};

/// References into the memory itself, for peers that a promise speaks for.
impl Chain<Region> {
    /// The bytes of each slice, first to last. `None`: the promise is not about this peer.
    #[inline]
    pub fn views<'a>(&'a self, proof: &'a PeerTrust) -> Option<SliceViews<'a>> {
        if !self.manager.is_trusted_by(proof) {
            return None;
        }
        let state = self.state();
        let private = match &state.private {
            Private::No => None,
            Private::Writing(bytes) => Some(&bytes[..state.len]),
            Private::Received { bytes, .. } => Some(&bytes[..]),
        };
        Some(SliceViews { manager: &self.manager, next: state.first, private })
    }

    /// The room behind what was written, slice by slice. [`Self::advance`] says how much of it was
    /// filled. `None`: the promise is not about this peer.
    #[inline]
    pub fn spare_views<'a>(&'a mut self, proof: &'a PeerTrust) -> Option<SpareViews<'a>> {
        let manager = &*self.manager;
        if !manager.is_trusted_by(proof) {
            return None;
        }
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        let remaining = state.capacity - state.len;
        let private = match &mut state.private {
            Private::Writing(bytes) => {
                bytes.resize(state.capacity, 0);
                Some(&mut bytes[state.len..])
            }
            _ => None,
        };
        Some(SpareViews { manager, next: state.filling, private, remaining })
    }
}

/// The bytes of a chain's slices.
pub struct SliceViews<'a> {
    manager: &'a SlicePool,
    next: SliceId,
    private: Option<&'a [u8]>,
}

impl<'a> Iterator for SliceViews<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        if self.next == NO_SLICE {
            return self.private.take();
        }
        let entry = self.manager.entry(self.next);
        self.next = entry.next.get();
        // SAFETY: the chain holds the slice, by the ledger; its bytes are inside it, checked when
        // it was taken in; the chain is borrowed for as long as the reference lives, so nobody
        // here writes to it; and the peer does not, by the promise that was shown to
        // `Chain::views`.
        Some(unsafe { self.manager.memory().view(entry.data(), entry.len.get() as usize) })
    }
}

/// The room in a chain's slices.
pub struct SpareViews<'a> {
    manager: &'a SlicePool,
    next: SliceId,
    private: Option<&'a mut [u8]>,
    remaining: usize,
}

impl<'a> Iterator for SpareViews<'a> {
    type Item = &'a mut [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a mut [u8]> {
        // Only the slice that was being filled can be full.
        while self.next != NO_SLICE && self.remaining > 0 {
            let entry = self.manager.entry(self.next);
            let room = self.manager.room_in(self.next).min(self.remaining);
            self.remaining -= room;
            self.next = entry.next.get();
            if room > 0 {
                let at = entry.data() + entry.len.get() as usize;
                // SAFETY: as in `SliceViews`; the chain is borrowed exclusively, a slice is in one
                // chain only and once in it, so each byte is in one of these references.
                return Some(unsafe { self.manager.memory().view_mut(at, room) });
            }
        }
        self.private.take().filter(|room| !room.is_empty())
    }
}
