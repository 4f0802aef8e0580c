// SPDX-License-Identifier: MIT OR Apache-2.0
//! The shmipc protocol without a runtime: no executor, no clock, no waiting.
//!
//! `shmipc-glommio` is built on this crate and re-exports what its users need. Depend on this crate
//! directly to write another front end, or a peer for tests.
//!
//! | module | what it has |
//! |---|---|
//! | [`error`] | all errors, and which side they blame |
//! | [`limits`] | limits of the process that memory runs into |
//! | [`config`] | what a caller can choose, checked once |
//! | [`wire`] | bytes and types: headers, messages, events, memory layouts |
//! | [`proto`] | state machines: handshakes, the stream table, stream state, credit |
//! | [`shm`] | mapped memory, the pool of slices, chains, and the event queues |
//! | [`footprint`] | how much memory sessions take, and whether there is as much |
//!
//! A module imports only modules above it; [`proto`] and [`shm`] do not import each other. Only
//! [`shm`] has `unsafe` code.

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
pub mod payload;
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
pub use shm::map::sigbus::disable_sigbus_guard;
pub use shm::map::stale_files::remove_leftovers;
pub use shm::map::trust::PeerTrust;
pub use shm::pool::{ListOwner, SliceUsage};
pub use wire::ShardIdentity;
