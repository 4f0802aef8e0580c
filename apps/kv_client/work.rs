// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one connection asks for, request by request.
//!
//! A connection has keys of its own, so it knows what it has written last. Requests for a key all
//! take the same pipeline and are carried out in order: what is known when a GET is made is what its
//! answer must be.

use std::time::Instant;

use super::format::key_name;
use super::slots::shard_of;
use super::values::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Get,
    Set,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) operation: Operation,
    pub(crate) key: u32,
    /// The version that a SET writes, and that a GET must give.
    pub(crate) version: u32,
    /// Which pipeline leads to the key's shard.
    pub(crate) pipeline: u32,
    /// From when its latency counts.
    pub(crate) since: Instant,
}

/// What is asked for in a phase.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Plan {
    /// Every key is written once.
    Load,
    /// So many requests, read and written as the options say.
    Mixed(u64),
}

struct Key {
    version: u32,
    pipeline: u32,
}

pub(crate) struct Work {
    keys: Vec<Key>,
    random: Random,
    /// How many of 2^32 requests are GET.
    reads: u64,
    plan: Plan,
    /// How many requests of the plan are still to be made.
    left: u64,
}

impl Work {
    pub(crate) fn new(connection: u32, keys: u32, pipelines: usize, reads: u32, seed: u64) -> Self {
        let key = |key| {
            let pipeline = shard_of(&key_name(connection, key), pipelines) as u32;
            Key { version: 0, pipeline }
        };
        Self {
            keys: (0..keys).map(key).collect(),
            random: Random::new(seed, connection.into()),
            reads: (u64::from(reads) << 32) / 100,
            plan: Plan::Mixed(0),
            left: 0,
        }
    }

    pub(crate) fn begin(&mut self, plan: Plan) {
        self.plan = plan;
        self.left = match plan {
            Plan::Load => self.keys.len() as u64,
            Plan::Mixed(requests) => requests,
        };
    }

    /// Whether every request of the plan was made.
    #[inline]
    pub(crate) fn is_done(&self) -> bool {
        self.left == 0
    }

    /// The next request. There is one: see [`is_done`](Self::is_done).
    #[inline]
    pub(crate) fn next(&mut self, since: Instant) -> Request {
        self.left -= 1;
        let (operation, number) = match self.plan {
            Plan::Load => (Operation::Set, self.left as usize),
            Plan::Mixed(_) => self.draw(),
        };
        let key = &mut self.keys[number];
        if operation == Operation::Set {
            key.version = key.version.wrapping_add(1);
        }
        let Key { version, pipeline } = *key;
        Request { operation, key: number as u32, version, pipeline, since }
    }

    /// Which key, from the upper half of a random number, and what to do, from the lower.
    #[inline]
    fn draw(&mut self) -> (Operation, usize) {
        let random = self.random.next();
        let number = ((random >> 32) * self.keys.len() as u64) >> 32;
        let is_read = (random & u64::from(u32::MAX)) < self.reads;
        let operation = if is_read { Operation::Get } else { Operation::Set };
        (operation, number as usize)
    }
}
