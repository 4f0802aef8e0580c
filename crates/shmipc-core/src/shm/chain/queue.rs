// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a stream has received and its reader has not yet taken, in the order of arrival.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::shm::chain::{Chain, ChainState};
use crate::shm::map::memory::Memory;
use crate::shm::map::region::Region;
use crate::shm::pool::SlicePool;

/// Chains in the order in which they came, and how many bytes they hold together.
pub struct ChainQueue<M: Memory = Region> {
    manager: Rc<SlicePool<M>>,
    states: VecDeque<Box<ChainState>>,
    len: usize,
    /// How much of it came over the socket.
    socket_len: usize,
    /// What that costs.
    socket_cost: usize,
}

impl<M: Memory> ChainQueue<M> {
    /// An empty queue.
    pub fn new(manager: &Rc<SlicePool<M>>) -> Self {
        Self {
            manager: Rc::clone(manager),
            states: VecDeque::new(),
            len: 0,
            socket_len: 0,
            socket_cost: 0,
        }
    }

    /// Puts a chain of the same memory behind the others. One without bytes is given back.
    #[inline]
    pub fn push(&mut self, mut chain: Chain<M>) {
        debug_assert!(chain.is_of(&self.manager));
        if !chain.is_empty() {
            self.len += chain.len();
            self.socket_len += chain.socket_len();
            self.socket_cost += chain.socket_cost();
            self.states.extend(chain.state.take());
        }
    }

    /// Puts a chain of the same memory before the others.
    pub fn push_front(&mut self, mut chain: Chain<M>) {
        debug_assert!(chain.is_of(&self.manager));
        if !chain.is_empty() {
            self.len += chain.len();
            self.socket_len += chain.socket_len();
            self.socket_cost += chain.socket_cost();
            self.states.push_front(chain.state.take().expect("a chain that has not ended"));
        }
    }

    /// Takes the oldest chain.
    #[inline]
    pub fn pop(&mut self) -> Option<Chain<M>> {
        let state = self.states.pop_front()?;
        let chain = Chain { manager: Rc::clone(&self.manager), state: Some(state) };
        self.len -= chain.len();
        self.socket_len -= chain.socket_len();
        self.socket_cost -= chain.socket_cost();
        Some(chain)
    }

    /// Copies out the first bytes, as many as `to` holds. Gives how many, and tells `done` of every
    /// chain that was read to its end.
    #[inline]
    pub fn read(&mut self, to: &mut [u8], mut done: impl FnMut(&Chain<M>)) -> usize {
        let mut copied = 0;
        while copied < to.len()
            && let Some(mut chain) = self.pop()
        {
            copied += chain.read(&mut to[copied..]);
            if chain.is_empty() {
                done(&chain);
            }
            self.push_front(chain);
        }
        copied
    }

    /// How many bytes there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no chain.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many of the bytes came over the socket.
    #[inline]
    pub fn socket_len(&self) -> usize {
        self.socket_len
    }

    /// What all chains together cost that came over the socket: see [`Chain::socket_cost`].
    #[inline]
    pub fn socket_cost(&self) -> usize {
        self.socket_cost
    }

    /// Throws everything away.
    pub fn clear(&mut self) {
        while self.pop().is_some() {}
    }
}

impl<M: Memory> Drop for ChainQueue<M> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SliceClass;
    use crate::shm::chain::SOCKET_MESSAGE_COST;
    use crate::shm::pool::format::ListSets;

    /// The cost is of the memory that is kept. It falls when that does, and in all by what came.
    #[test]
    fn what_came_over_the_socket_costs_what_it_keeps() {
        const LEN: usize = 100_000;
        let memory = Rc::new(Region::heap(1 << 16));
        let classes = [SliceClass::new(64, 100)];
        let manager = SlicePool::create(&memory, &classes, ListSets::Shared).unwrap();
        let mut queue = ChainQueue::new(&manager);
        let bytes: Vec<u8> = (0..LEN).map(|at| at as u8).collect();
        for _ in 0..2 {
            queue.push(Chain::received(Rc::clone(&manager), bytes.clone().into(), LEN + 500));
        }
        let message = LEN + 500 + SOCKET_MESSAGE_COST;
        assert_eq!(queue.socket_cost(), 2 * message);
        let mut read = Vec::new();
        let mut step = |queue: &mut ChainQueue, count: usize| {
            let mut to = vec![0; count];
            assert_eq!(queue.read(&mut to, |_| {}), count);
            read.extend(to);
            queue.socket_cost()
        };
        // Until half of it is read it is all there.
        assert_eq!(step(&mut queue, LEN / 3), 2 * message);
        assert_eq!(step(&mut queue, LEN / 3), message + LEN - LEN / 3 * 2 + SOCKET_MESSAGE_COST);
        let left = step(&mut queue, LEN / 3 - 100) - message;
        assert!(left <= 4096 + SOCKET_MESSAGE_COST, "{left} for a hundred bytes");
        assert_eq!(step(&mut queue, LEN - LEN / 3 * 3 + 100), message);
        while queue.len() > 7 {
            let cost = step(&mut queue, 7);
            let unread = queue.len();
            let bound = (2 * unread + 500).max(4096) + SOCKET_MESSAGE_COST;
            assert!((unread..=bound).contains(&cost), "{cost} for {unread} bytes");
        }
        let rest = queue.len();
        step(&mut queue, rest);
        assert_eq!((queue.socket_cost(), queue.socket_len(), queue.len()), (0, 0, 0));
        assert_eq!(read, [&bytes[..], &bytes[..]].concat());
    }
}
