// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared-memory IPC for thread-per-core programs: the shmipc protocol on glommio.
//!
//! Two programs on one Linux host exchange bytes through memory that both map. Descriptors of
//! messages go through a pair of IO queues in that memory, so that one wake-up harvests many; a
//! Unix or TCP connection carries the handshake, the wake-ups, and the data that finds no free
//! memory. The crate talks to shmipc-go and to the crate `shmipc`, in both roles.
//!
//! A session belongs to the executor that made it, and nothing of it ever crosses to another core.
//!
//! - A server [binds](Listener::bind) a [`Listener`], [accepts](Listener::accept) sessions, and on
//!   each of them [accepts](Session::accept) streams.
//! - A client [connects](Connector::connect) with a [`Connector`] and
//!   [opens](Session::open_stream) streams.
//! - A [`Stream`] is read and written like a socket.
//! - A [`Server`] has an executor on each of its cores, each with sessions and data of its own; a
//!   [`Client`] keeps sessions to those that it asks for, and makes them again when they end.
//!
//! A program that makes its own executors, as clients do, calls [`preflight`] before the first one:
//! it says what is missing where none can run.
//!
//! # An echo
//!
//! ```
//! use futures_lite::{AsyncReadExt, AsyncWriteExt};
//! use shmipc_glommio::{Config, Connector, Listener};
//!
//! # let path = std::env::temp_dir().join(format!("shmipc-doc-{}.sock", std::process::id()));
//! glommio::LocalExecutorBuilder::default()
//!     .spawn(|| async move {
//!         let listener = Listener::bind(&path, Config::default())?;
//!         let server = glommio::spawn_local(async move {
//!             let session = listener.accept().await?;
//!             let mut stream = session.accept().await?;
//!             let mut request = [0; 5];
//!             stream.read_exact(&mut request).await?;
//!             stream.write_all(&request).await
//!         });
//!
//!         let session = Connector::new(Config::default()).connect(&path).await?;
//!         let mut stream = session.open_stream()?;
//!         stream.write_all(b"hello").await?;
//!         let mut answer = Vec::new();
//!         stream.read_to_end(&mut answer).await?;
//!         assert_eq!(answer, b"hello");
//!         server.await
//!     })
//!     .unwrap()
//!     .join()
//!     .unwrap()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Trust
//!
//! The peer may be buggy or hostile: it may write anything, anywhere in the shared memory, at any
//! time, send any bytes, stop, or die. It can end its session that way, and scramble its own data.
//! It cannot crash this process, make it loop or allocate without bound, or reach memory or
//! sessions of others. Memory that it truncates raises `SIGBUS` here, which is caught
//! ([`disable_sigbus_guard`]); who may connect is up to [`AllowedPeers`] and
//! [`Listener::authorize`]. `SECURITY.md` in the repository has the threat model in full.
//!
//! # Rooms
//!
//! `shmipc-core` has the protocol without a runtime. Here, each room imports those before it:
//! `exec` (tasks and what they wait for), `net` (sockets), `reactor` (the task that polls the
//! queues), `session`, `connect`, `server` and `client`. `unsafe` stands only in the files that own
//! raw memory, atomics and descriptors.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(target_os = "linux"))]
compile_error!("shared memory by memfd and io_uring exist on Linux only");

mod client;
mod connect;
mod exec;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod net;
mod preflight;
mod reactor;
mod server;
mod session;
mod stats;

pub use client::Client;
pub use client::builder::ClientBuilder;
pub use client::reconnect::{SessionState, SessionStatus};
pub use connect::connector::Connector;
pub use connect::listener::Listener;
pub use net::credentials::PeerCredentials;
pub use server::acceptor::Deal;
pub use server::builder::ServerBuilder;
pub use server::placement::{Cores, preflight};
pub use server::shard::{Shard, ShardStats};
pub use server::{Server, Stopper};
pub use session::local_reactor::shut_down;
pub use session::state::Session;
pub use session::stream::Stream;
pub use session::stream::loan::{Loan, Message, MessageBuf, Views, ViewsMut};
pub use session::stream::read_half::{Messages, ReadHalf, Recv};
pub use session::stream::send::{Alloc, Send};
pub use session::stream::write_half::WriteHalf;
pub use session::supervised::StreamOutcome;
pub use shmipc_core::config::{
    AllowedPeers, Config, ConfigBuilder, MemoryKind, ProtocolVersion, SliceClass, Spin, Wakeup,
};
pub use shmipc_core::error::{
    ConfigError, Error, HandshakeError, IoUringProblem, MemoryError, ResourceError, Result, Target,
    WireError,
};
pub use shmipc_core::footprint::Footprint;
pub use shmipc_core::shm::access::PeerTrust;
pub use shmipc_core::shm::fault::disable_sigbus_guard;
pub use shmipc_core::shm::leftovers::remove_leftovers;
pub use shmipc_core::shm::manager::{ListOwner, SliceUsage};
pub use shmipc_core::wire;
pub use shmipc_core::wire::ShardIdentity;
pub use stats::{PoolUsage, SessionStats};

/// Its examples are compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// So are those of the page on errors.
#[cfg(doctest)]
#[doc = include_str!("../docs/errors.md")]
struct Errors;
