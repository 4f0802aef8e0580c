// SPDX-License-Identifier: MIT OR Apache-2.0
//! A running session: one connection, its shared memory, and its streams.
//!
//! All of it lives on one executor. State that several tasks of the core share is in cells, without
//! a lock, and no cell is borrowed across an `await`.
//!
//! - [`state`]: the state of a session, and the handle `Session`; [`guard`]: ends the session with
//!   the last handle; [`established`]: what a handshake hands over.
//! - [`driver`]: one turn of the poll loop, and the short wait in place; [`receive`]: what arrives;
//!   [`transmit`]: what is sent.
//! - [`outbox`]: bytes that the socket has not taken yet; [`wakeup`]: how the peer is woken, and
//!   this side by it.
//! - [`flow_control`]: credit; [`fallback`]: when a stream leaves shared memory for the socket, and
//!   returns; [`send_wait`]: what a sender waits for.
//! - [`path_order`]: keeps the socket from overtaking the queue; [`close`], [`graceful`]: ending
//!   without losing what was sent.
//! - [`local_reactor`]: the poll loop of this thread's executor; [`stall`]: detects a peer that
//!   takes nothing.
//! - [`serve`]: a task for each stream; [`supervised`]: resets the streams of a handler that fails.
//! - [`stream`]: the handles of streams, loans and messages.

pub(crate) mod close;
pub(crate) mod driver;
pub(crate) mod established;
pub(crate) mod fallback;
pub(crate) mod flow_control;
pub(crate) mod graceful;
pub(crate) mod guard;
pub(crate) mod local_reactor;
pub(crate) mod outbox;
pub(crate) mod path_order;
pub(crate) mod receive;
pub(crate) mod send_wait;
pub(crate) mod serve;
pub(crate) mod stall;
pub(crate) mod state;
pub(crate) mod stream;
pub(crate) mod supervised;
pub(crate) mod transmit;
pub(crate) mod wakeup;
