// SPDX-License-Identifier: MIT OR Apache-2.0
//! The poll loop: one task per core that polls the queues of its active sessions.
//!
//! - [`poll_loop`]: the task and its lists; [`pollable`]: the trait by which it drives sessions;
//!   [`ring_kick`]: makes glommio look at io_uring while the task spins.
//! - [`poll_state`]: when a session counts as idle; [`spin_budget`]: for how long it is polled
//!   before it sleeps.
//! - [`standby`]: idle sessions that stay awake while the core spins for others.
//! - [`cpu_sharing`]: gives the processor away when the peer runs on the same one.
//! - [`interval_poll`]: polls sessions without wake-ups on a timer; [`idle_trim`]: returns free
//!   slices of idle sessions to the peer; [`liveness`]: finds peers that have stopped.
//! - [`sweep`]: the list type that all of these use.
//!
//! The room does not know what a session is.

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
