// SPDX-License-Identifier: MIT OR Apache-2.0
//! A key-value store with one shard a core, for the program `kv_server`.
//!
//! - [`resp`] and [`reply`]: the protocol of Redis, versions 2 and 3, as it comes and as it goes.
//! - [`store`] (with [`slab`], [`glob`] and [`cursor`]): the keys of one shard, for one thread.
//! - [`command`], [`execute`] and [`route`]: what a command is, what it does to a store, and which
//!   shards it is for.
//! - [`connection`] (with [`caller`], [`client_stream`] and [`input`]): one client, whatever socket it came through.
//!   What it asks of other shards goes out, and comes back, by [`cross_shard`] (with [`reply_stream`]).
//! - [`shard`], [`remote_shards`], [`info`] and [`listeners`] (with [`socket`]): what a core has: its store,
//!   its sessions with the other cores, its counters, its sockets.

pub(crate) mod caller;
pub(crate) mod client_stream;
pub(crate) mod command;
pub(crate) mod connection;
pub(crate) mod cross_shard;
pub(crate) mod cursor;
pub(crate) mod execute;
pub(crate) mod glob;
pub(crate) mod info;
pub(crate) mod input;
pub(crate) mod listeners;
pub(crate) mod origin;
pub(crate) mod remote_shards;
pub(crate) mod replies;
mod reply;
pub(crate) mod reply_stream;
pub(crate) mod resp;
pub(crate) mod route;
pub(crate) mod shard;
pub(crate) mod slab;
pub(crate) mod slots;
pub(crate) mod socket;
#[path = "../../support/socket_file.rs"]
mod socket_file;
pub(crate) mod store;
#[allow(dead_code, reason = "the other examples use the rest")]
#[path = "../../support/unix_socket.rs"]
mod unix_socket;
