// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a stream has received and its reader has not yet taken, in the order of arrival.

use std::collections::VecDeque;
use std::rc::Rc;

use super::access::Memory;
use super::chain::{Chain, ChainState};
use super::manager::BufferManager;
use super::region::Region;

/// Chains in the order in which they came, and how many bytes they hold together.
pub(crate) struct ChainQueue<M: Memory = Region> {
    manager: Rc<BufferManager<M>>,
    states: VecDeque<Box<ChainState>>,
    len: usize,
    /// How much of it came over the socket.
    socket_len: usize,
}

impl<M: Memory> ChainQueue<M> {
    pub(crate) fn new(manager: &Rc<BufferManager<M>>) -> Self {
        Self { manager: Rc::clone(manager), states: VecDeque::new(), len: 0, socket_len: 0 }
    }

    /// Puts a chain of the same memory behind the others. One without bytes is given back.
    #[inline]
    pub(crate) fn push(&mut self, mut chain: Chain<M>) {
        debug_assert!(chain.is_of(&self.manager));
        if chain.len() > 0 {
            self.len += chain.len();
            self.socket_len += chain.socket_len();
            self.states.extend(chain.state.take());
        }
    }

    /// Puts a chain of the same memory before the others.
    pub(crate) fn push_front(&mut self, mut chain: Chain<M>) {
        debug_assert!(chain.is_of(&self.manager));
        if chain.len() > 0 {
            self.len += chain.len();
            self.socket_len += chain.socket_len();
            self.states.push_front(chain.state.take().expect("a chain that has not ended"));
        }
    }

    /// Takes the oldest chain.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Chain<M>> {
        let state = self.states.pop_front()?;
        let chain = Chain { manager: Rc::clone(&self.manager), state: Some(state) };
        self.len -= chain.len();
        self.socket_len -= chain.socket_len();
        Some(chain)
    }

    /// Copies out the first bytes, as many as `to` holds. Gives how many, and tells `done` of every
    /// chain that was read to its end.
    #[inline]
    pub(crate) fn read(&mut self, to: &mut [u8], mut done: impl FnMut(&Chain<M>)) -> usize {
        let mut copied = 0;
        while copied < to.len()
            && let Some(mut chain) = self.pop()
        {
            copied += chain.read(&mut to[copied..]);
            if chain.len() == 0 {
                done(&chain);
            }
            self.push_front(chain);
        }
        copied
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn socket_len(&self) -> usize {
        self.socket_len
    }

    /// Throws everything away.
    pub(crate) fn clear(&mut self) {
        while self.pop().is_some() {}
    }
}

impl<M: Memory> Drop for ChainQueue<M> {
    fn drop(&mut self) {
        self.clear();
    }
}
