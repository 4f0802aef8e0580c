// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be wrong with a peer before there is a session.

use std::time::Duration;

use super::WireError;

/// The peer sent a message that has no place where it stands (spec chapter 4;
/// `docs/protocol.md#handshakes`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// Another message was due.
    #[error("{got} came where {expected} was due")]
    Unexpected {
        /// The message that came.
        got: &'static str,
        /// What was due, in words.
        expected: &'static str,
    },
    /// No version is common to both sides.
    #[error("the peer speaks up to version {peer}, this side needs {needed}")]
    NoCommonVersion {
        /// The highest version of the peer.
        peer: u8,
        /// The version that this side needs.
        needed: u8,
    },
    /// A later message of the handshake carries another version than the one agreed.
    #[error("{message} carries version {got}, agreed was {agreed}")]
    VersionChanged {
        /// Which message.
        message: &'static str,
        /// The version it carries.
        got: u8,
        /// The version agreed before.
        agreed: u8,
    },
    /// The descriptors of the two memories did not come as they should.
    #[error("{got} descriptors came, expected {expected}")]
    Descriptors {
        /// How many came. Six stands for six or more: no more are looked at.
        got: usize,
        /// How many were due.
        expected: usize,
    },
    /// A descriptor is of a kind that cannot be shared memory.
    #[error("descriptor of the {role} memory is {kind}, not a memfd or a file in memory")]
    DescriptorKind {
        /// Which memory.
        role: &'static str,
        /// What it is instead.
        kind: &'static str,
    },
    /// The byte that carries the descriptors has something behind or before it that does not
    /// belong.
    #[error("bytes came where descriptors were due")]
    StrayBytes,
    /// The peer went away in the middle.
    #[error("the peer closed the connection while {waiting_for} was due")]
    Closed {
        /// What was due, in words.
        waiting_for: &'static str,
    },
    /// The peer took too long.
    #[error("no handshake within {0:?} (`handshake_timeout`)")]
    Timeout(Duration),
    /// Its user is not one that may be at the other end
    /// (see [`allowed_peers`](crate::ConfigBuilder::allowed_peers)).
    #[error(
        "the {peer} is {}, and `allowed_peers` of this {} allows {allowed} only",
        user(*uid),
        side_of(peer)
    )]
    #[non_exhaustive]
    PeerNotAllowed {
        /// The user, if the kernel said.
        uid: Option<u32>,
        /// What the peer is: `"client"`, of a listener whose setting this is, or `"server"`, of a
        /// connector whose setting it is.
        peer: &'static str,
        /// Whom that setting allows, in words.
        allowed: String,
    },
    /// The program did not want it (see `authorize`).
    #[error("`authorize` of this listener refused a process of {}", user(*uid))]
    NotAuthorized {
        /// The user, if the kernel said.
        uid: Option<u32>,
    },
    /// A file that the peer named belongs to somebody else.
    #[error("the {role} memory is a file of user {owner}, named by user {peer}")]
    FileOwner {
        /// Which memory.
        role: &'static str,
        /// Whose file it is.
        owner: u32,
        /// Who named it.
        peer: u32,
    },
    /// The peer names files, and whose they would have to be is not known: its user is none that
    /// this process can tell, or it closed its TCP socket before it was accepted.
    #[error(
        "the peer names files, and since its user is unknown nothing says that they are its own"
    )]
    UnknownOwner,
    /// A memory that the peer brings is already that of another session of this process: its queue,
    /// or its buffer where a queue was named or the other way round. Only a buffer may be shared,
    /// as a buffer.
    #[error("the {role} memory that the peer brings is in use by another session")]
    MemoryInUse {
        /// Which memory.
        role: &'static str,
    },
    /// The listener has as many sessions as it may have.
    #[error("there are {0} sessions already, as many as `max_sessions` of this listener allows")]
    TooManySessions(usize),
    /// The peer's user has passed descriptors on so many connections that could not be closed yet.
    #[error("{connections} connections of {} wait for what was passed on them", user(*uid))]
    TooManyUnclosed {
        /// The user, if the kernel said.
        uid: Option<u32>,
        /// How many connections.
        connections: usize,
    },
    /// So many connections wait for a handshake already, and its user has the most of them.
    #[error("{0} connections wait for a handshake already (`max_queued_handshakes`)")]
    TooManyQueued(usize),
    /// Others waited for its place, and it had taken so long by then.
    #[error(
        "gave way to others after {0:?}, since all places for handshakes were taken \
         (`max_handshakes`, `max_handshakes_per_user`)"
    )]
    GaveWay(Duration),
    /// The listener is about to stop.
    #[error("the listener is stopping")]
    Stopping,
    /// The peer answered that it will not speak with this side (version 4).
    #[error("the server refused: {code}: {message}")]
    Refused {
        /// Its code, for programs: [one of those](crate::wire::negotiation) that are known here, or
        /// the first 64 bytes of another one.
        code: String,
        /// Its words; the first 256 bytes of them.
        message: String,
    },
    /// The negotiation cannot be read (version 4). A server tells its client so.
    #[error("{0}")]
    Negotiation(#[source] WireError),
    /// The client's negotiation does not offer version 4, and it was told so.
    #[error("the client negotiates, and does not offer version 4")]
    Version4NotOffered,
    /// The server did not answer the opening of version 4, as one that does not know it, and this
    /// side must not [fall back](crate::ConfigBuilder::allow_v3_fallback).
    #[error(
        "the server did not answer the opening of version 4 ({how}): it may not know that version, \
         and falling back to version 3 is not allowed (`allow_v3_fallback`)"
    )]
    Version4Unanswered {
        /// What it did instead, in words.
        how: &'static str,
    },
    /// The server of a version 2 session has not taken the first event that was sent to it: it has
    /// not mapped the memory. (Version 2 has no message that says so.)
    #[error(
        "the server has not taken the first message within {0:?}: it has not mapped the shared \
         memory of this version 2 session"
    )]
    NeverMapped(Duration),
    /// The server selected a version that it was not offered (version 4).
    #[error("the server selected version {0}, which was not offered to it")]
    VersionNotOffered(u64),
    /// The server selected what it was not offered (version 4).
    #[error("the server selected {0}, which was not offered to it")]
    NotOffered(&'static str),
    /// A shard answered that was not asked for (version 4): the server has changed.
    #[error("shard {index} of {count} answered where shard {expected} was asked for")]
    OtherShard {
        /// Which shard it says it is.
        index: u32,
        /// How many there are.
        count: u32,
        /// Which one was asked for.
        expected: usize,
    },
    /// A descriptor of a wake-up is no eventfd (version 4).
    #[error("the descriptor for wake-ups is {0}, not an eventfd")]
    NotAnEventFd(String),
    /// The transport cannot carry what the handshake needs.
    #[error("descriptors cannot be passed over TCP; use file memory")]
    DescriptorsOverTcp,
}

/// What has the setting that is about such a peer.
fn side_of(peer: &str) -> &'static str {
    if peer == "client" { "listener" } else { "connector" }
}

fn user(uid: Option<u32>) -> String {
    uid.map_or_else(|| "an unknown user".into(), |uid| format!("user {uid}"))
}
