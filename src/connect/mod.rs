// SPDX-License-Identifier: MIT OR Apache-2.0
//! How sessions are made: listener, connector, and the handshakes over a socket.
//!
//! - Server: [`listener`] accepts connections; [`handshake_queue`]: connections that wait for a
//!   handshake; [`handshake_server`]: its side of a handshake; [`refusals`]: tells refused peers,
//!   and the log, why.
//! - Client: [`connector`]; [`handshake_client`]: its side of a handshake, and what both sides
//!   share (memory, descriptors); [`old_servers`]: servers that did not answer version 4.
//!
//! The handshakes themselves are state machines in `shmipc_core::proto`. This room carries out
//! their steps, and bounds their time.

pub(crate) mod connector;
pub(crate) mod handshake_client;
pub(crate) mod handshake_queue;
pub(crate) mod handshake_server;
pub(crate) mod listener;
pub(crate) mod old_servers;
pub(crate) mod refusals;
