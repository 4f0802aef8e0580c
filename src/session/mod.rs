// SPDX-License-Identifier: MIT OR Apache-2.0
//! A session: one connection, its shared memory, and its streams.
//!
//! A session, and all it is made of, lives on one executor, without lock or atomic: state that
//! several tasks of the core share is in cells, and no cell is borrowed across an `await`.
//!
//! - [`state`]: what a session has, and the handle of users; [`guard`]: what ends it with the last
//!   handle.
//! - [`established`]: what a handshake hands over.
//! - [`driver`]: its turns; [`receive`]: what arrives; [`transmit`]: what is sent; [`outbox`]: what
//!   waits for the socket; [`path_order`]: what must not go over it yet; [`wakeup`]: how the peer
//!   is woken.
//! - [`flow_control`]: how far a sender may go; [`fallback`]: when a stream leaves shared memory,
//!   and comes back; [`send_wait`]: what a sender waits for.
//! - [`graceful`], [`close`]: how a session ends without losing anything.
//! - [`local_reactor`]: the reactor that drives them; [`stall`]: peers that do not move.
//! - [`serve`], [`supervised`]: a task for each stream, and what its end means to the peer.
//! - [`stream`]: the handles of streams.

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
