// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains of slices as the messages of a running session.

use crate::payload::{Inbound, Payload};
use crate::shm::chain::Chain;
use crate::shm::chain::queue::ChainQueue;
use crate::shm::map::memory::Memory;

impl<M: Memory> Payload for Chain<M> {
    #[inline]
    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    #[inline]
    fn occupies(&self) -> u64 {
        self.occupies()
    }

    #[inline]
    fn is_shared(&self) -> bool {
        self.is_shared()
    }

    #[inline]
    fn socket_cost(&self) -> usize {
        self.socket_cost()
    }
}

impl<M: Memory> Inbound<Chain<M>> for ChainQueue<M> {
    #[inline]
    fn push(&mut self, chain: Chain<M>) {
        self.push(chain);
    }

    #[inline]
    fn pop(&mut self) -> Option<Chain<M>> {
        self.pop()
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    #[inline]
    fn socket_len(&self) -> usize {
        self.socket_len()
    }
}
