// SPDX-License-Identifier: MIT OR Apache-2.0
//! Slices that belong together: one message, on its way out or in.
//!
//! A [`Chain`] owns its slices; whatever happens to it, they go somewhere: on to the peer
//! ([`Chain::into_sent`]), or back among the free (when read, or dropped). Its links live
//! in the manager's private ledger, so a chain of any length is a few words, and nothing that the
//! peer writes can redirect it.
//!
//! A message that goes over the socket is a chain too, of private memory, so that everything above
//! deals with one type.
//!
//! A chain is moved a lot: out of the queue, into a stream, through the state of a future, to the
//! user. So the handle is two pointers, which travel in registers. As a larger struct it is copied
//! through memory, 16 bytes at a time, right after its fields were written one by one; such a load
//! waits until the stores have left the processor, behind the stores to lines that the peer has
//! (80 ns a hop). What the second pointer leads to is recycled.

mod adopt;
mod payload;
pub mod queue;
pub mod views;

use std::rc::Rc;

use bytes::{Buf, Bytes};

use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::pool::{NO_SLICE, SliceId, SlicePool};

pub use crate::payload::SentChain;
pub use crate::wire::deframe::SOCKET_MESSAGE_COST;

/// A block this small is kept until all of it is read.
const SMALL_BLOCK: usize = 4096;

/// An owned chain of buffer slices, or private memory, and how many of its bytes count.
pub struct Chain<M: Memory = Region> {
    pub(super) manager: Rc<SlicePool<M>>,
    /// Always there, but for the moment in which the chain ends.
    pub(super) state: Option<Box<ChainState>>,
}

/// What a chain consists of. Dropped alone it would keep its slices from everybody; only this file
/// and the [queue](crate::shm::chain::queue) take it out of its chain.
pub(super) struct ChainState {
    pub(super) first: SliceId,
    pub(super) last: SliceId,
    /// While it is written: the slice that the next byte goes into. Otherwise unused.
    pub(super) filling: SliceId,
    /// How many bytes there are to read, or have been written.
    pub(super) len: usize,
    /// While it is written: how many bytes were asked for. When it was received: how many bytes its
    /// slices hold together, or what came over the socket.
    pub(super) capacity: usize,
    pub(super) private: Private,
    /// While no chain has it: the next one that none has.
    pub(super) next_free: Option<Box<ChainState>>,
}

pub(super) enum Private {
    No,
    Writing(Vec<u8>),
    /// What came over the socket and is unread, and how many bytes of memory that keeps.
    Received {
        bytes: Bytes,
        held: usize,
    },
}

impl ChainState {
    pub(super) const fn empty() -> Self {
        Self {
            first: NO_SLICE,
            last: NO_SLICE,
            filling: NO_SLICE,
            len: 0,
            capacity: 0,
            private: Private::No,
            next_free: None,
        }
    }
}

impl<M: Memory> Chain<M> {
    #[inline(always)]
    pub(super) fn empty(manager: Rc<SlicePool<M>>) -> Self {
        let mut state = manager.new_chain_state();
        (state.first, state.last, state.filling) = (NO_SLICE, NO_SLICE, NO_SLICE);
        (state.len, state.capacity) = (0, 0);
        Self { manager, state: Some(state) }
    }

    /// A chain of one held slice, to be written.
    #[inline]
    pub(super) fn of(manager: Rc<SlicePool<M>>, id: SliceId) -> Self {
        let mut chain = Self::empty(manager);
        let state = chain.state_mut();
        (state.first, state.last, state.filling) = (id, id, id);
        chain
    }

    /// Private memory for up to `capacity` bytes, to be written. It grows as it is written.
    pub fn private(manager: Rc<SlicePool<M>>, capacity: usize) -> Self {
        let mut chain = Self::empty(manager).with_capacity(capacity);
        chain.state_mut().private = Private::Writing(Vec::new());
        chain
    }

    /// Bytes that came over the socket, and that are part of a block of `held` bytes at most.
    pub fn received(manager: Rc<SlicePool<M>>, bytes: Bytes, held: usize) -> Self {
        let mut chain = Self::empty(manager);
        let state = chain.state_mut();
        (state.len, state.capacity) = (bytes.len(), bytes.len());
        state.private = Private::Received { bytes, held };
        chain
    }

    #[inline]
    pub(super) fn state(&self) -> &ChainState {
        self.state.as_deref().expect("a chain that has not ended")
    }

    #[inline]
    fn state_mut(&mut self) -> &mut ChainState {
        self.state.as_deref_mut().expect("a chain that has not ended")
    }

    #[inline]
    pub(super) fn with_capacity(mut self, capacity: usize) -> Self {
        self.state_mut().capacity = capacity;
        self
    }

    /// Says that the chain is as it is, and nothing more is written to it.
    pub(super) fn complete(mut self) -> Self {
        let state = self.state_mut();
        state.filling = state.last;
        self
    }

    /// Puts a held slice behind the others, with the bytes that its ledger entry counts.
    #[inline]
    pub(super) fn push_back(&mut self, id: SliceId) {
        let len = self.manager.entry(id).len.get() as usize;
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        if state.last == NO_SLICE {
            state.first = id;
            state.filling = id;
        } else {
            self.manager.entry(state.last).next.set(id);
        }
        state.last = id;
        state.len += len;
    }

    /// How many bytes there are to read, or have been written.
    #[inline]
    pub fn len(&self) -> usize {
        self.state().len
    }

    /// Whether it has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes can be written in all.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.state().capacity
    }

    /// What it keeps occupied until its reader takes it, when it was received: the bytes that all
    /// its slices hold, or those that came over the socket.
    #[inline]
    pub fn occupies(&self) -> u64 {
        self.capacity() as u64
    }

    /// Whether it is slices, and not private memory.
    #[inline]
    pub fn is_shared(&self) -> bool {
        matches!(self.state().private, Private::No)
    }

    /// What it costs until it is taken, when it came over the socket: all of the block that it
    /// keeps, however little of that is unread, and what this side needs to keep it.
    #[inline]
    pub fn socket_cost(&self) -> usize {
        match &self.state().private {
            Private::Received { held, .. } => held + SOCKET_MESSAGE_COST,
            Private::No | Private::Writing(_) => 0,
        }
    }

    /// How many of its bytes came over the socket.
    #[inline]
    pub fn socket_len(&self) -> usize {
        if matches!(self.state().private, Private::Received { .. }) { self.len() } else { 0 }
    }

    /// How many slices it has.
    #[cfg_attr(not(test), allow(dead_code))]
    pub fn slices(&self) -> u32 {
        let mut count = 0;
        let mut id = self.state().first;
        while id != NO_SLICE {
            count += 1;
            id = self.manager.entry(id).next.get();
        }
        count
    }

    /// Copies as much of `from` as there is room for behind what was written. Gives how much.
    #[inline]
    pub fn write(&mut self, from: &[u8]) -> usize {
        let manager = &self.manager;
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        let mut from = &from[..from.len().min(state.capacity - state.len)];
        if let Private::Writing(bytes) = &mut state.private {
            // `spare_views` makes room behind what counts.
            bytes.truncate(state.len);
            bytes.extend_from_slice(from);
            state.len = bytes.len();
            return from.len();
        }
        let mut written = 0;
        while !from.is_empty() && state.filling != NO_SLICE {
            let entry = manager.entry(state.filling);
            let room = manager.room_in(state.filling);
            if room == 0 {
                // Only now, so that the slice being filled is never an empty one behind a full one.
                if state.filling == state.last {
                    break;
                }
                state.filling = entry.next.get();
                continue;
            }
            let count = room.min(from.len());
            let len = entry.len.get();
            manager.memory().copy_in(entry.data() + len as usize, &from[..count]);
            // Fits: a slice's capacity does.
            entry.len.set(len + count as u32);
            from = &from[count..];
            written += count;
        }
        state.len += written;
        written
    }

    /// Counts `count` bytes behind what was written as written too, or as many as there is room
    /// for.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        let manager = &self.manager;
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        let mut count = count.min(state.capacity - state.len);
        if let Private::Writing(bytes) = &mut state.private {
            state.len += count;
            // `spare_views` has made them, or nobody wrote them.
            if bytes.len() < state.len {
                bytes.resize(state.len, 0);
            }
            return;
        }
        while count > 0 && state.filling != NO_SLICE {
            let entry = manager.entry(state.filling);
            let step = manager.room_in(state.filling).min(count);
            // Fits: a slice's capacity does.
            entry.len.set(entry.len.get() + step as u32);
            state.len += step;
            count -= step;
            if count > 0 {
                if state.filling == state.last {
                    return;
                }
                state.filling = entry.next.get();
            }
        }
    }

    /// Whether the slices are those of this memory.
    #[inline]
    pub fn is_of(&self, manager: &Rc<SlicePool<M>>) -> bool {
        Rc::ptr_eq(&self.manager, manager)
    }

    /// Copies the first bytes out, as many as `to` holds, and gives their slices back as they
    /// empty.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let count = self.copy_out(to);
        self.consume(count);
        count
    }

    /// Copies the first bytes out, as many as `to` holds, and keeps them.
    pub fn copy_out(&self, to: &mut [u8]) -> usize {
        let state = self.state();
        let private = match &state.private {
            Private::No => None,
            Private::Writing(bytes) => Some(&bytes[..state.len]),
            Private::Received { bytes, .. } => Some(&bytes[..]),
        };
        if let Some(bytes) = private {
            let count = bytes.len().min(to.len());
            to[..count].copy_from_slice(&bytes[..count]);
            return count;
        }
        let mut copied = 0;
        let mut id = state.first;
        while copied < to.len() && id != NO_SLICE {
            let entry = self.manager.entry(id);
            let count = (entry.len.get() as usize).min(to.len() - copied);
            self.manager.memory().copy_out(entry.data(), &mut to[copied..copied + count]);
            copied += count;
            id = entry.next.get();
        }
        copied
    }

    /// Drops the first `count` bytes, or all there are, and gives emptied slices back.
    pub fn consume(&mut self, count: usize) {
        let manager = &self.manager;
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        let mut count = count.min(state.len);
        state.len -= count;
        match &mut state.private {
            Private::No => {}
            Private::Received { bytes, held } => {
                bytes.advance(count);
                // Once half of the block is dead the rest gets memory of its own. All such copies
                // of a message together are no longer than the message.
                if *held > SMALL_BLOCK && bytes.len() < *held / 2 {
                    *bytes = Bytes::copy_from_slice(bytes);
                    *held = bytes.len();
                }
                return;
            }
            Private::Writing(bytes) => return drop(bytes.drain(..count)),
        }
        while state.first != NO_SLICE {
            let entry = manager.entry(state.first);
            let (start, len) = (entry.start.get(), entry.len.get());
            let step = (len as usize).min(count);
            if step < len as usize {
                entry.start.set(start + step as u32);
                entry.len.set(len - step as u32);
                return;
            }
            count -= step;
            state.first = manager.release(state.first);
        }
        (state.last, state.filling) = (NO_SLICE, NO_SLICE);
    }

    /// Takes the first `count` bytes, or all there are, off as a chain of their own.
    ///
    /// Slices are moved, not copied; of the slice that the cut goes through, the first part is
    /// copied. When there is no slice for it, the whole front is, into private memory.
    pub fn split_to(&mut self, count: usize) -> Self {
        let manager = Rc::clone(&self.manager);
        let count = count.min(self.len());
        if count == self.len() {
            return std::mem::replace(self, Self::empty(manager));
        }
        if !self.is_shared() {
            let rest = std::mem::replace(self, Self::empty(Rc::clone(&manager)));
            let mut bytes = rest.into_bytes();
            // Both keep the block.
            let held = bytes.len();
            let front = bytes.split_to(count);
            *self = Self::received(Rc::clone(&manager), bytes, held);
            return Self::received(manager, front, held);
        }
        // Where the cut goes: `whole` slices before it, `within` bytes of the next one.
        let (mut last, mut within) = (NO_SLICE, count);
        let mut id = self.state().first;
        while id != NO_SLICE && within >= manager.entry(id).len.get() as usize {
            within -= manager.entry(id).len.get() as usize;
            last = id;
            id = manager.entry(id).next.get();
        }
        let piece = if within > 0 { manager.allocate_one(within) } else { None };
        if within > 0 && piece.is_none() {
            let mut bytes = vec![0; count];
            self.read(&mut bytes);
            return Self::received(manager, bytes.into(), count);
        }
        let mut front = Self::empty(Rc::clone(&manager));
        if last != NO_SLICE {
            let state = self.state_mut();
            let first = std::mem::replace(&mut state.first, id);
            state.len -= count - within;
            manager.entry(last).next.set(NO_SLICE);
            let state = front.state_mut();
            (state.first, state.last, state.len) = (first, last, count - within);
        }
        if let Some(mut piece) = piece {
            // Of the slice that is cut; it holds more than that.
            let to = manager.entry(piece.state().first).data();
            manager.memory().copy_within(manager.entry(id).data(), to, within);
            piece.advance(within);
            self.consume(within);
            front.append(piece);
        }
        front.complete()
    }

    /// Puts all slices of another chain behind this one's.
    fn append(&mut self, mut other: Self) {
        let theirs = other.state_mut();
        let mut id = std::mem::replace(&mut theirs.first, NO_SLICE);
        while id != NO_SLICE {
            let next = self.manager.entry(id).next.replace(NO_SLICE);
            self.push_back(id);
            id = next;
        }
    }

    /// Takes everything out of it as private memory, and gives the slices back.
    pub fn into_bytes(mut self) -> Bytes {
        match std::mem::replace(&mut self.state_mut().private, Private::No) {
            Private::Received { bytes, .. } => bytes,
            Private::Writing(mut bytes) => {
                bytes.truncate(self.len());
                bytes.into()
            }
            Private::No => {
                let mut copy = vec![0; self.len()];
                self.copy_out(&mut copy);
                copy.into()
            }
        }
    }

    /// Writes the headers of all slices that hold bytes, strikes them out of the ledger and gives
    /// what the event needs that hands them to the peer. Slices that hold nothing go back.
    ///
    /// `None`: nothing was written, or it is private memory; all slices are back.
    ///
    /// From here on the slices are the peer's, so the event must be on its way without fail.
    #[inline]
    pub fn into_sent(mut self) -> Option<SentChain> {
        let manager = &self.manager;
        let state = self.state.as_deref_mut().expect("a chain that has not ended");
        if state.len == 0 || state.first == NO_SLICE {
            return None;
        }
        let first = std::mem::replace(&mut state.first, NO_SLICE);
        if first == state.last {
            // One slice, the common message: nothing to link, nothing to give back.
            return Some(manager.sent(first, state.len));
        }
        // Only slices behind the one being filled can be empty: they are filled front to back.
        let mut unused = manager.entry(state.filling).next.replace(NO_SLICE);
        while unused != NO_SLICE {
            unused = manager.release(unused);
        }
        let offset = manager.write_header(first);
        let mut occupies = manager.slice_capacity(first);
        let mut id = manager.entry(first).next.get();
        while id != NO_SLICE {
            manager.write_header(id);
            occupies += manager.slice_capacity(id);
            id = manager.entry(id).next.get();
        }
        let mut id = first;
        while id != NO_SLICE {
            id = manager.forget(id);
        }
        Some(SentChain { offset, len: state.len, occupies })
    }
}

impl<M: Memory> Drop for Chain<M> {
    #[inline]
    fn drop(&mut self) {
        if let Some(mut state) = self.state.take() {
            let mut id = state.first;
            while id != NO_SLICE {
                id = self.manager.release(id);
            }
            if !matches!(state.private, Private::No) {
                state.private = Private::No;
            }
            self.manager.recycle_chain_state(state);
        }
    }
}
