// SPDX-License-Identifier: MIT OR Apache-2.0
//! Slices that belong together: one message, on its way out or in.
//!
//! A [`Chain`] owns its slices; whatever happens to it, they go somewhere: on to the peer
//! ([`Chain::into_event_offset`]), or back among the free (when read, or dropped). Its links live
//! in the manager's private ledger, so a chain of any length is a few words and no allocation, and
//! nothing that the peer writes can redirect it.

use std::rc::Rc;

use super::access::{Memory, PeerTrust};
use super::manager::{BufferManager, NO_SLICE, SliceId};
use super::region::Region;

/// An owned chain of buffer slices, and how many of its bytes count.
pub(crate) struct Chain<M: Memory = Region> {
    manager: Rc<BufferManager<M>>,
    first: SliceId,
    last: SliceId,
    /// While it is written: the slice that the next byte goes into. Otherwise unused.
    filling: SliceId,
    slices: u32,
    len: usize,
}

impl<M: Memory> Chain<M> {
    pub(super) fn empty(manager: Rc<BufferManager<M>>) -> Self {
        Self { manager, first: NO_SLICE, last: NO_SLICE, filling: NO_SLICE, slices: 0, len: 0 }
    }

    /// Says that the chain is as it is, and nothing more is written to it.
    pub(super) fn complete(mut self) -> Self {
        self.filling = self.last;
        self
    }

    /// Puts a held slice behind the others, with the bytes that its ledger entry counts.
    pub(super) fn push_back(&mut self, id: SliceId) {
        if self.last == NO_SLICE {
            self.first = id;
            self.filling = id;
        } else {
            self.manager.update(self.last, |entry| entry.next = id);
        }
        self.last = id;
        self.slices += 1;
        self.len += self.manager.entry(id).len as usize;
    }

    /// How many bytes there are to read, or have been written.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn slices(&self) -> u32 {
        self.slices
    }

    /// Copies as much of `from` as there is room for behind what was written. Gives how much.
    pub(crate) fn write(&mut self, mut from: &[u8]) -> usize {
        let mut written = 0;
        while !from.is_empty() && self.filling != NO_SLICE {
            let entry = self.manager.entry(self.filling);
            let used = (entry.start + entry.len) as usize;
            let room = self.manager.capacity_of(self.filling) as usize - used;
            if room == 0 {
                // Only now, so that the slice being filled is never an empty one behind a full one.
                if self.filling == self.last {
                    break;
                }
                self.filling = entry.next;
                continue;
            }
            let count = room.min(from.len());
            self.manager.memory().copy_in(entry.data() + entry.len as usize, &from[..count]);
            // Fits: a slice's capacity does.
            self.manager.update(self.filling, |entry| entry.len += count as u32);
            from = &from[count..];
            written += count;
        }
        self.len += written;
        written
    }

    /// Counts `count` bytes behind what was written as written too, or as many as there is room
    /// for.
    pub(crate) fn advance(&mut self, mut count: usize) {
        while count > 0 && self.filling != NO_SLICE {
            let entry = self.manager.entry(self.filling);
            let room = self.manager.capacity_of(self.filling) - entry.start - entry.len;
            let step = (room as usize).min(count);
            self.manager.update(self.filling, |entry| entry.len += step as u32);
            self.len += step;
            count -= step;
            if count > 0 {
                if self.filling == self.last {
                    return;
                }
                self.filling = entry.next;
            }
        }
    }

    /// Whether the slices are those of this memory.
    pub(crate) fn is_of(&self, manager: &Rc<BufferManager<M>>) -> bool {
        Rc::ptr_eq(&self.manager, manager)
    }

    /// Copies the first bytes out, as many as `to` holds, and gives their slices back as they
    /// empty.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        let count = self.copy_out(to);
        self.consume(count);
        count
    }

    /// Copies the first bytes out, as many as `to` holds, and keeps them.
    pub(crate) fn copy_out(&self, to: &mut [u8]) -> usize {
        let mut copied = 0;
        let mut id = self.first;
        while copied < to.len() && id != NO_SLICE {
            let entry = self.manager.entry(id);
            let count = (entry.len as usize).min(to.len() - copied);
            self.manager.memory().copy_out(entry.data(), &mut to[copied..copied + count]);
            copied += count;
            id = entry.next;
        }
        copied
    }

    /// Drops the first `count` bytes, or all there are, and gives emptied slices back.
    pub(crate) fn consume(&mut self, mut count: usize) {
        count = count.min(self.len);
        self.len -= count;
        while self.first != NO_SLICE {
            let entry = self.manager.entry(self.first);
            let step = (entry.len as usize).min(count);
            if step < entry.len as usize {
                self.manager.update(self.first, |entry| {
                    entry.start += step as u32;
                    entry.len -= step as u32;
                });
                break;
            }
            count -= step;
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        self.first = self.manager.release(self.first);
        self.slices -= 1;
        if self.first == NO_SLICE {
            self.last = NO_SLICE;
            self.filling = NO_SLICE;
        }
    }

    /// Writes the headers of all slices that hold bytes, strikes them out of the ledger and gives
    /// the offset for the event that hands them to the peer. Slices that hold nothing go back.
    ///
    /// `None`: nothing was written; all slices are back.
    ///
    /// From here on the slices are the peer's, so the event must be on its way without fail.
    #[inline]
    pub(crate) fn into_event_offset(mut self) -> Option<u32> {
        if self.len == 0 {
            return None;
        }
        if self.first == self.last {
            // One slice, the common message: nothing to link, nothing to give back.
            let offset = self.manager.write_header(self.first);
            self.manager.forget(self.first);
            self.first = NO_SLICE;
            return Some(offset);
        }
        // Only slices behind the one being filled can be empty: they are filled front to back.
        let unused =
            self.manager.update(self.filling, |entry| std::mem::replace(&mut entry.next, NO_SLICE));
        let mut id = unused;
        while id != NO_SLICE {
            id = self.manager.release(id);
        }
        let offset = self.manager.write_header(self.first);
        let mut id = self.manager.entry(self.first).next;
        while id != NO_SLICE {
            self.manager.write_header(id);
            id = self.manager.entry(id).next;
        }
        let mut id = self.first;
        while id != NO_SLICE {
            id = self.manager.forget(id);
        }
        self.first = NO_SLICE;
        Some(offset)
    }
}

/// References into the memory itself, for peers that a promise speaks for.
impl Chain<Region> {
    /// The bytes of each slice, first to last.
    #[inline]
    pub(crate) fn views<'a>(&'a self, _proof: &'a PeerTrust) -> SliceViews<'a> {
        SliceViews { manager: &self.manager, next: self.first }
    }

    /// The room behind what was written, slice by slice. [`Self::advance`] says how much of it was
    /// filled.
    #[inline]
    pub(crate) fn spare_views<'a>(&'a mut self, _proof: &'a PeerTrust) -> SpareViews<'a> {
        SpareViews { manager: &self.manager, next: self.filling }
    }
}

/// The bytes of a chain's slices.
pub(crate) struct SliceViews<'a> {
    manager: &'a BufferManager,
    next: SliceId,
}

impl<'a> Iterator for SliceViews<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        if self.next == NO_SLICE {
            return None;
        }
        let entry = self.manager.entry(self.next);
        self.next = entry.next;
        // SAFETY: the chain holds the slice, by the ledger; its bytes are inside it, checked when
        // it was taken in; the chain is borrowed for as long as the reference lives, so nobody
        // here writes to it; and the peer does not, by the promise that was shown to
        // `Chain::views`.
        Some(unsafe { self.manager.memory().view(entry.data(), entry.len as usize) })
    }
}

/// The room in a chain's slices.
pub(crate) struct SpareViews<'a> {
    manager: &'a BufferManager,
    next: SliceId,
}

impl<'a> Iterator for SpareViews<'a> {
    type Item = &'a mut [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a mut [u8]> {
        if self.next == NO_SLICE {
            return None;
        }
        let entry = self.manager.entry(self.next);
        let room = self.manager.capacity_of(self.next) - entry.start - entry.len;
        self.next = entry.next;
        let at = entry.data() + entry.len as usize;
        // SAFETY: as in `SliceViews`; the chain is borrowed exclusively, a slice is in one chain
        // only and once in it, so each byte is in one of these references.
        Some(unsafe { self.manager.memory().view_mut(at, room as usize) })
    }
}

impl<M: Memory> Drop for Chain<M> {
    fn drop(&mut self) {
        let mut id = self.first;
        while id != NO_SLICE {
            id = self.manager.release(id);
        }
    }
}
