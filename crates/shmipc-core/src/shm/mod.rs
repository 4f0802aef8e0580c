// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory: mappings, the pool of slices, chains, and the event queues. The only room of the
//! core with `unsafe` code.
//!
//! Trust: none. A peer may write anything, anywhere in the memory, at any time. A field that it can
//! write is read once into a local, checked, and then used. What this side relies on (where lists
//! are, the size of their slices, which slices it holds, its own queue index) is in private memory.
//!
//! - [`map`]: creates, opens and maps memory, and accesses it by offset.
//! - [`pool`]: the free lists of one memory, and which slices this side holds.
//! - [`chain`]: the slices of one message, as an owned value.
//! - [`event_queue`]: the two IO queues.
//!
//! A module imports only modules above it in this list, except that [`event_queue`] needs [`map`]
//! alone. The algorithms are generic over [`map::memory::Memory`], so that tests run them on the
//! heap and under a model checker.

pub mod chain;
pub mod event_queue;
pub mod map;
pub mod pool;
#[cfg(test)]
mod tests;
