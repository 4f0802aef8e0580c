// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes to types and back: everything of the protocol that needs no state. What stands where, and
//! what other implementations make of it, is in `docs/protocol.md`.
//!
//! - [`header`]: the eight bytes before every message on the socket, and the protocol versions.
//! - [`message`]: the messages themselves.
//! - [`deframe`]: messages out of a byte stream that arrives in arbitrary pieces.
//! - [`event`]: the elements of an IO queue.
//! - [`extension`]: what two sides of this crate do beyond versions 2 and 3.
//! - [`negotiation`]: what two sides of version 4 tell each other first.
//! - [`layout`]: where things stand in the shared memory, and snapshots of its headers.
//!
//! Invariants: whatever these modules encode they also decode to the same value, and nothing that
//! they are given to decode makes them panic, loop or allocate more than what was given.
//!
//! Trust: none. Every input is taken to come from a hostile peer.

pub mod deframe;
pub mod event;
pub mod extension;
pub mod header;
pub mod layout;
pub mod message;
pub mod negotiation;

pub use deframe::Deframer;
pub use event::{EVENT_LEN, Event, EventState, READER_WAITS_STATUS, RESET_STATUS, is_reset};
pub use extension::Extension;
pub use header::FALLBACK_HEADER_LEN;
pub use header::{HEADER_LEN, Header, MAGIC, MAX_NEGOTIATION_LEN, MessageType};
pub use layout::{BufferManagerHeader, ListHeader, QueueHeader, QueueLayout, SliceHeader};
pub use negotiation::{Features, NegotiationRequest, NegotiationResponse, ShardIdentity};

pub use message::{MemoryPaths, Message, fallback_header, sync_event};

pub use crate::config::{MemoryKind, ProtocolVersion};
