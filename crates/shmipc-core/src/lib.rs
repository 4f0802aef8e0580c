// SPDX-License-Identifier: MIT OR Apache-2.0
//! The shmipc protocol without a runtime: no executor, no clock, no waiting.
//!
//! `shmipc-glommio` is built on this crate, and exports what its users need of it. Depend on this
//! crate directly to write another front end, or a peer for tests.
//!
//! | module | what it has |
//! |---|---|
//! | [`wire`] | bytes and types: headers, messages, events, memory layouts |
//! | [`config`] | what a caller can choose |
//! | [`proto`] | the handshakes, streams, and credit, as state machines |
//! | [`shm`] | mapped memory, the pool of slices, and the event queues |
//!
//! Each imports those above it, and [`error`]. Only [`shm`] has `unsafe` code.

// Pages of modules are for whoever works on them, too.
#![allow(rustdoc::private_intra_doc_links)]

#[cfg(not(target_os = "linux"))]
compile_error!("shared memory by memfd exists on Linux only");

pub mod config;
pub mod error;
pub mod footprint;
#[cfg(any(test, fuzzing, feature = "test-util"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod limits;
pub mod proto;
pub mod shm;
pub mod wire;

pub use config::{
    AllowedPeers, Config, ConfigBuilder, MemoryKind, ProtocolVersion, SliceClass, Spin, Wakeup,
};
pub use error::{
    ConfigError, Error, HandshakeError, IoUringProblem, MemoryError, ResourceError, Result, Target,
    WireError,
};
pub use footprint::Footprint;
pub use shm::access::PeerTrust;
pub use shm::fault::disable_sigbus_guard;
pub use shm::leftovers::remove_leftovers;
pub use shm::manager::{ListOwner, SliceUsage};
pub use wire::ShardIdentity;
