// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes to types and back: everything of the protocol that needs no state. `docs/protocol.md`
//! describes every byte, and what other implementations do with it.
//!
//! - [`header`]: the eight bytes before every message on the socket.
//! - [`message`]: the messages on the socket. - [`deframe`]: cuts a byte stream into messages.
//! - [`event`]: the elements of an IO queue.
//! - [`negotiation`]: the JSON that two sides of version 4 exchange first.
//! - [`extension`]: what two sides of this crate do beyond versions 2 and 3.
//! - [`layout`]: offsets in the shared memory, and snapshots of its headers.
//!
//! Invariants: what is encoded decodes to the same value. No input makes decoding panic, loop, or
//! allocate more than the input's own length.
//!
//! Trust: none. Every input may come from a hostile peer.

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
