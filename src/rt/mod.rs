// SPDX-License-Identifier: MIT OR Apache-2.0
//! The only room that knows glommio: sockets, the poller, sessions and streams.
//!
//! A session, and all it is made of, lives on one executor, without lock or atomic: state that
//! several tasks of the core share is in cells, and no cell is borrowed across an `await`.
//!
//! - [`socket`]: a connected socket: readiness, sending without waiting, descriptors.
//! - [`fd_passing`]: descriptors that peers pass; [`fd_disposal`]: closing what a peer makes slow.
//! - [`handshake`]: drives the state machines of `proto` over a socket.
//! - [`session`]: a session's state; [`driver`]: its turns; [`receiving`]: what arrives;
//!   [`sending`]: what is sent; [`outbox`]: what waits for the socket; [`overtaking`]: what must
//!   not go over it yet.
//! - [`doorbell`]: how a peer is woken otherwise than by the socket.
//! - [`poller`]: the one task per core that polls the queues of active sessions.
//! - [`give_way`]: what it does on a processor that the peer needs, too.
//! - [`company`]: sessions without traffic beside some that have it.
//! - [`ticks`]: a look at the queues of sessions that nobody wakes.
//! - [`rests`]: what sleeping sessions give back.
//! - [`watch`]: a look at all sessions from time to time, for peers that have stopped.
//! - [`sweep`]: the lists that these look through.
//! - [`activity`], [`spin`]: for how long they are looked at before they sleep.
//! - [`stream`]: a stream's handle, of a [`read_half`] and a [`write_half`], each with a
//!   [`deadline`]; [`loan`]: messages as values, borrowed and sent by [`lending`]; [`credit`]: how
//!   far a sender may go.
//! - [`listener`], [`connector`]: how sessions come to be; [`admission`]: how many;
//!   [`old_servers`]: in which version not to try; [`peer`]: with whom; [`socket_path`]: the files
//!   of sockets, and [turns](door_lock) at them.
//! - [`client`], made by a [`client_builder`]: a core's [sessions](shard_sessions) to the shards of
//!   a server, each [`kept`] up with a [`backoff`].
//! - [`drain`]: how a session is brought to its end without losing what was asked of it; [`close`]:
//!   without losing what it has sent.
//! - [`contain`]: futures of the program's whose panics end nothing else.
//! - [`server`]: an executor for each of its [`cores`], each with a [`shard`] of the sessions;
//!   [`dealer`]: the thread that deals what comes in at their common door; [`serving`]: a task for
//!   each stream; [`tasks`]: tasks that end with what they belong to; [`wakers`] and
//!   [`task_waker`]: what tasks wait in. Only what these hand over at
//!   accept time ever changes threads.

mod acceptance;
mod activity;
mod admission;
mod backoff;
mod bound_socket;
mod callback;
mod client;
mod client_builder;
mod close;
mod company;
mod connector;
mod contain;
mod cores;
mod credit;
mod deadline;
mod dealer;
mod door_lock;
mod doorbell;
mod drain;
mod driver;
mod fallback;
mod fd_disposal;
mod fd_passing;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod give_way;
mod handshake;
mod handshake_queue;
mod kept;
mod lending;
mod listener;
mod loan;
mod old_servers;
mod outbox;
mod overtaking;
mod own_core;
mod peer;
mod poller;
mod read_half;
mod receiving;
mod refusals;
mod rests;
mod send_wait;
mod sending;
mod server;
mod server_builder;
mod server_core;
mod serving;
mod session;
mod shard;
mod shard_sessions;
mod socket;
mod socket_path;
mod spin;
mod stream;
mod supervised;
mod sweep;
mod task_waker;
mod tasks;
mod ticks;
mod wakers;
mod watch;
mod write_half;

pub use client::Client;
pub use client_builder::ClientBuilder;
pub use connector::Connector;
pub use cores::{Cores, preflight};
pub use dealer::Deal;
pub use kept::{SessionState, SessionStatus};
pub use lending::{Alloc, Send};
pub use listener::Listener;
pub use loan::{Loan, Message, MessageBuf, Views, ViewsMut};
pub use peer::PeerCredentials;
pub use poller::shut_down;
pub use read_half::{Messages, ReadHalf, Recv};
pub use server::{Server, Stopper};
pub use server_builder::ServerBuilder;
pub use session::Session;
pub use shard::{Shard, ShardStats};
pub use stream::Stream;
pub use supervised::StreamOutcome;
pub use write_half::WriteHalf;
