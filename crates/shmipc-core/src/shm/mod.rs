// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory: mappings, the pool of slices, chains, and the event queues. The only room of the
//! core with `unsafe` code.
//!
//! Trust: none. A peer may write anything, anywhere in the memory, at any time. A field that it can
//! write is read once into a local, checked, and then used. What this side relies on (where lists
//! are, the size of their slices, which slices it holds, its own queue index) is in private memory.
//!
//! - [`access`]: loads, stores and copies by offset; the only pointers into shared memory.
//! - [`region`]: creates and maps memory; [`directory`]: opens files below a directory; [`claims`]:
//!   which memories accepted sessions use; [`stale_files`]: files of dead processes; [`sigbus`]:
//!   the guard against SIGBUS.
//! - [`event_queue`]: the two IO queues.
//! - [`free_list`]: a list of free slices; [`owned_list`]: one that only this side takes from;
//!   [`prefetcher`]: prefetches the links of a list; [`magazine`]: a private stack of free slices.
//! - [`pool`]: all lists of one memory; [`size_class`]: the sizes of slices; [`slice_table`]: which
//!   slices this side holds; [`mod@format`], [`made`]: lay a memory out, or check one.
//! - [`chain`]: the slices of one message, as an owned value; [`adopt`]: takes over what arrived;
//!   [`chain_queue`]: messages that wait to be read; [`views`]: references under a user's promise.
//!
//! `unsafe` is in `access`, `region`, `sigbus` and `views`. The algorithms are generic over
//! [`access::Memory`], so that tests run them on the heap and under a model checker.

pub mod access;
mod adopt;
pub mod chain;
pub mod chain_queue;
pub mod claims;
pub mod directory;
pub mod event_queue;
pub mod format;
pub mod free_list;
#[cfg(test)]
mod list_stress;
mod made;
mod magazine;
#[cfg(test)]
mod models;
mod owned_list;
mod payload;
pub mod pool;
mod prefetcher;
pub mod region;
pub mod sigbus;
mod size_class;
mod slice_table;
pub mod stale_files;
pub mod views;
