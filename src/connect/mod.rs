// SPDX-License-Identifier: MIT OR Apache-2.0
//! How sessions come to be.
//!
//! - [`listener`]: where peers connect to; [`handshake_queue`]: connections that wait for their
//!   turn; [`handshake_server`]: the server's side of a handshake; [`refusals`]: what a refused
//!   peer, and whoever runs the server, get to know.
//! - [`connector`]: how a client gets a session; [`handshake_client`]: its side of a handshake, and
//!   what both sides share; [`old_servers`]: servers that do not answer version 4.

pub(crate) mod connector;
pub(crate) mod handshake_client;
pub(crate) mod handshake_queue;
pub(crate) mod handshake_server;
pub(crate) mod listener;
pub(crate) mod old_servers;
pub(crate) mod refusals;
