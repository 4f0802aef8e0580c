// SPDX-License-Identifier: MIT OR Apache-2.0
//! The only room that touches raw memory.
//!
//! Whom it trusts: nobody on the other side. A peer may write anything, anywhere in the memory, at
//! any time. So a field that the peer can write is read once, into a local, checked, and only then
//! used; everything that this side must be able to rely on (where lists stand, how large slices
//! are, which slices this side holds, its own queue index) is kept in private memory.
//!
//! - [`access`]: loads, stores and copies by offset, the one place with pointers to shared memory.
//! - [`region`]: memory that is created or mapped, and its descriptors and files, in a
//!   [`directory`] that is kept open.
//! - [`queue`]: the two IO queues. - [`list`]: the lists of free slices. - [`popper`]: the one side
//!   that takes from a list, where the sides have agreed on that.
//! - [`manager`]: all lists of one memory, by way of the [`ledger`] of slices that this side holds
//!   and of a [`magazine`] for each size ([`classes`]); [`setup`] lays a memory out, or checks one.
//! - [`chain`]: slices that belong together, as owned values that give themselves back;
//!   [`chain_queue`]: several of them; [`views`]: references into them.
//!
//! `unsafe` stands in `access`, `region` and [`fault`], and in `views`, where a promise of the
//! user's lets it.
//! The algorithms are generic over [`access::Memory`], so that tests run them on the heap and model
//! checkers on memory of their own.

pub mod access;
mod adopt;
pub mod chain;
pub mod chain_queue;
pub mod claims;
mod classes;
pub mod directory;
pub mod fault;
mod ledger;
pub mod leftovers;
pub mod list;
#[cfg(test)]
mod list_stress;
mod made;
mod magazine;
pub mod manager;
#[cfg(test)]
mod models;
mod popper;
pub mod queue;
pub mod region;
mod scout;
pub mod setup;
pub mod views;
