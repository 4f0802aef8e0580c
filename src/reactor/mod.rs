// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one task per core that polls the queues of its active sessions.
//!
//! - [`poll_loop`]: the task, and the sessions that it drives, as [`pollable`] says;
//!   [`ring_kick`]: how io_uring is looked at meanwhile.
//! - [`poll_state`], [`spin_budget`]: for how long a session is polled before it sleeps.
//! - [`standby`]: idle sessions on a core that is awake for others.
//! - [`cpu_sharing`]: what the task does on a processor that the peer needs, too.
//! - [`interval_poll`]: sessions that nobody wakes; [`idle_trim`]: what sleeping sessions give
//!   back; [`liveness`]: peers that have stopped. [`sweep`]: the lists that these go through.

pub(crate) mod cpu_sharing;
pub(crate) mod idle_trim;
pub(crate) mod interval_poll;
pub(crate) mod liveness;
pub(crate) mod poll_loop;
pub(crate) mod poll_state;
pub(crate) mod pollable;
pub(crate) mod ring_kick;
pub(crate) mod spin_budget;
pub(crate) mod standby;
pub(crate) mod sweep;
