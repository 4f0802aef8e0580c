// SPDX-License-Identifier: MIT OR Apache-2.0
//! A running session: one connection, its shared memory, and its streams.
//!
//! All of it lives on one executor. State that several tasks of the core share is in cells, without
//! a lock, and no cell is borrowed across an `await`.
//!
//! What happens to a session is decided in
//! [`shmipc_core::proto::session`], a state machine without runtime. This room drives it.
//!
//! - [`state`]: the parts of a session; [`queues`], [`socket_io`]: two of them; [`supervision`],
//!   [`established`]: data.
//! - [`actions`]: what the state machine asks for; [`transmit`]: what the socket has not taken yet;
//!   [`wakeup`]: how the peer is woken, and this side by it; [`extension`]: what each side tells
//!   the other in the memory's header.
//! - [`turn`]: one turn of the poll loop, and the short wait in place; [`receive`]: reads the
//!   socket; [`close`], [`stall`]: waits for the peer.
//! - [`send_wait`]: what a sender waits for.
//! - [`handle`], [`guard`]: the handle `Session`, and what ends the session with the last one.
//! - [`local_reactor`]: the poll loop of this thread's executor.
//! - [`serve`]: a task for each stream; [`supervised`]: resets the streams of a handler that fails.
//! - [`stream`]: the handles of streams, loans and messages.

pub(crate) mod actions;
pub(crate) mod close;
pub(crate) mod established;
pub(crate) mod extension;
pub(crate) mod guard;
pub(crate) mod handle;
pub(crate) mod local_reactor;
pub(crate) mod queues;
pub(crate) mod receive;
pub(crate) mod send_wait;
pub(crate) mod serve;
pub(crate) mod socket_io;
pub(crate) mod stall;
pub(crate) mod state;
pub(crate) mod stream;
pub(crate) mod supervised;
pub(crate) mod supervision;
pub(crate) mod transmit;
pub(crate) mod turn;
pub(crate) mod wakeup;
