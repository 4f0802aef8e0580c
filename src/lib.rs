// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared-memory IPC for thread-per-core programs: the shmipc protocol on glommio.
//!
//! Two programs on one Linux host exchange bytes through memory that both map. Small events in a
//! pair of IO queues say which slices of the memory hold a message. While both sides are busy no
//! system call is made; an idle side sleeps, and one wake-up is enough for many messages. A Unix or
//! TCP connection carries the handshake, the wake-ups, and data for which no memory is free. The
//! crate talks to shmipc-go and to the crate `shmipc`, in both roles.
//!
//! A session belongs to the executor that made it and never crosses to another core.
//!
//! - A server [binds](Listener::bind) a [`Listener`], [accepts](Listener::accept) sessions, and
//!   [accepts](Session::accept) streams on each of them.
//! - A client [connects](Connector::connect) with a [`Connector`] and
//!   [opens](Session::open_stream) streams.
//! - A [`Stream`] is read and written like a socket, or message by message without a copy.
//! - A [`Server`] runs one executor on each of its cores, with its own sessions and data. A
//!   [`Client`] keeps sessions to a server's shards and reconnects when they end.
//!
//! Call [`preflight`] before the first executor of a program that makes its own, as clients do. It
//! names what is missing on a host where none can run.
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
//! time, send any bytes, stop, or die. That can end its own session and garble its own data. It
//! cannot crash this process, make it loop or allocate without bound, or reach memory or sessions
//! of others. Memory that it truncates raises `SIGBUS`, which is caught ([`disable_sigbus_guard`]).
//! Who may connect is up to [`AllowedPeers`] and [`Listener::authorize`]. `SECURITY.md` has the
//! threat model.
//!
//! # For those who change it
//!
//! `shmipc-core` has the protocol without a runtime. Here, each room imports only those before it:
//! `exec` (tasks, the only room that names glommio), `net` (sockets), `reactor` (the poll loop),
//! `session`, `connect`, then `server` and `client`. `docs/architecture.md` follows a message
//! through them and says where to change what.

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
pub use exec::options::ExecutorOptions;
pub use net::credentials::PeerCredentials;
pub use server::acceptor::Balance;
pub use server::builder::ServerBuilder;
pub use server::placement::{Cores, Requirements, preflight};
pub use server::shard::{Shard, ShardStats};
pub use server::{Server, ShutdownHandle};
pub use session::handle::Session;
pub use session::local_reactor::shutdown_executor;
pub use session::stream::Stream;
pub use session::stream::loan::{Loan, Message, MessageBuf, Views, ViewsMut};
pub use session::stream::read_half::{Messages, ReadHalf, RecvFuture};
pub use session::stream::send::{AllocFuture, SendFuture};
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
pub use shmipc_core::shm::map::sigbus::disable_sigbus_guard;
pub use shmipc_core::shm::map::stale_files::remove_leftovers;
pub use shmipc_core::shm::map::trust::PeerTrust;
pub use shmipc_core::shm::pool::{ListOwner, SliceUsage};
pub use shmipc_core::wire;
pub use shmipc_core::wire::ShardIdentity;
pub use stats::{PoolUsage, SessionStats};

/// Its examples are compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// So are those of the guide.
#[cfg(doctest)]
#[doc = include_str!("../docs/guide.md")]
struct Guide;

/// So are those of the page on errors.
#[cfg(doctest)]
#[doc = include_str!("../docs/errors.md")]
struct Errors;
