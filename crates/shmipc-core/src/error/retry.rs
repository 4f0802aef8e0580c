// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is worth another try.

use std::io;

use nix::errno::Errno;

use super::{ALL_MEMORY, Error, HandshakeError, MemoryError};

/// The codes of refusals, as they go over the wire in version 4
/// (see [`negotiation`](crate::wire::negotiation)).
pub const VERSION_NOT_SUPPORTED: &str = "VERSION_NOT_SUPPORTED";
/// The request was not JSON of the known form.
pub const JSON_PARSE_ERROR: &str = "JSON_PARSE_ERROR";
/// No room for another session at present.
pub const FULL: &str = "FULL";
/// The memory is larger than this server maps.
pub const TOO_LARGE: &str = "TOO_LARGE";
/// The user may not talk to this server.
pub const NOT_ALLOWED: &str = "NOT_ALLOWED";
/// The server is stopping.
pub const STOPPING: &str = "STOPPING";

impl Error {
    /// Whether the same may succeed a moment later, with nobody changing a configuration, a
    /// permission or a program meanwhile.
    ///
    /// A server that is not there may come, one that is full may have room again, and a session
    /// that was lost can be made again: all of these are worth a retry, with a pause between. What
    /// is not: a peer that may not be spoken to, versions that do not meet, a path that cannot be,
    /// a peer that broke the protocol, and everything that is the caller's own mistake. A
    /// `Client` goes by this for its connections.
    ///
    /// It says nothing about whether a request was carried out: that the first attempt at one had
    /// no effect is for the application to know.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Handshake(error) => error.is_retryable(),
            Self::Resource(error) => error.is_retryable(),
            Self::Unavailable { source, .. } => source.is_retryable(),
            Self::Os { source, .. } => is_passing(source.kind()),
            Self::Shard { source, .. } => {
                source.downcast_ref::<Self>().is_some_and(Self::is_retryable)
            }
            // The memory is gone, and with it the session; another one has another memory.
            Self::Memory(MemoryError::Lost)
            | Self::PeerClosed
            | Self::PeerNotReading
            | Self::PeerStalled(_)
            | Self::NotTaken { .. }
            | Self::StreamClosedByPeer
            | Self::DeadlinePassed
            | Self::TooManyStreams(_) => true,
            Self::Wire(_)
            | Self::Memory(_)
            | Self::Config(_)
            | Self::NoSuchShard { .. }
            | Self::SessionClosed
            | Self::StreamClosed
            | Self::StreamReset
            | Self::NotTrusted
            | Self::ForeignLoan
            | Self::NotClient => false,
        }
    }
}

impl HandshakeError {
    /// Whether the same peer may get through later: see [`Error::is_retryable`].
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Closed { .. }
            | Self::Timeout(_)
            // It may have been starting.
            | Self::Version4Unanswered { .. }
            | Self::NeverMapped(_)
            | Self::TooManySessions(_)
            | Self::TooManyUnclosed { .. }
            | Self::TooManyQueued(_)
            | Self::GaveWay(_)
            | Self::Stopping
            | Self::OtherShard { .. } => true,
            // A code that is not known here may mean anything.
            Self::Refused { code, .. } => {
                ![VERSION_NOT_SUPPORTED, JSON_PARSE_ERROR, TOO_LARGE, NOT_ALLOWED]
                    .contains(&code.as_str())
            }
            _ => false,
        }
    }
}

impl Error {
    /// By which code a peer is told that this is why it is refused (version 4), if there is one.
    pub fn refusal_code(&self) -> Option<&'static str> {
        match self {
            Self::Handshake(error) => match error {
                HandshakeError::PeerNotAllowed { .. }
                | HandshakeError::NotAuthorized { .. }
                | HandshakeError::FileOwner { .. }
                | HandshakeError::UnknownOwner => Some(NOT_ALLOWED),
                HandshakeError::TooManySessions(_)
                | HandshakeError::TooManyQueued(_)
                | HandshakeError::GaveWay(_) => Some(FULL),
                HandshakeError::Stopping => Some(STOPPING),
                HandshakeError::Version4NotOffered | HandshakeError::NoCommonVersion { .. } => {
                    Some(VERSION_NOT_SUPPORTED)
                }
                HandshakeError::Negotiation(_) => Some(JSON_PARSE_ERROR),
                _ => None,
            },
            // What all sessions have together may be less later.
            Self::Memory(MemoryError::TooLarge { what: ALL_MEMORY, .. }) => Some(FULL),
            Self::Memory(MemoryError::TooLarge { .. }) => Some(TOO_LARGE),
            Self::Resource(error) if error.is_retryable() => Some(FULL),
            Self::Os { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Some(NOT_ALLOWED),
                _ => match source.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Some(FULL),
                    _ => None,
                },
            },
            _ => None,
        }
    }

    /// What a peer is told in words that is refused with this code. Nothing about others.
    pub fn refusal_words(&self) -> String {
        match (self.refusal_code(), self) {
            (Some(TOO_LARGE), Self::Memory(MemoryError::TooLarge { what, have, limit })) => {
                format!(
                    "too large: {what} has {have} bytes, this server takes {limit} \
                     (`max_mapped_bytes`)"
                )
            }
            (Some(FULL), Self::Handshake(HandshakeError::TooManySessions(most))) => {
                format!("full: there are {most} sessions, as many as `max_sessions` allows")
            }
            (Some(FULL), Self::Handshake(HandshakeError::GaveWay(_))) => {
                "full: others waited, and this took long (`max_handshakes`)".into()
            }
            (Some(FULL), Self::Memory(_)) => {
                "full: all sessions together have as much memory as they may \
                 (`max_total_mapped_bytes`)"
                    .into()
            }
            (Some(FULL), _) => "full: this server has no room for another session now".into(),
            (Some(NOT_ALLOWED), Self::Handshake(HandshakeError::PeerNotAllowed { .. })) => {
                "not allowed: this user may not connect here (`allowed_peers` of this server)"
                    .into()
            }
            (Some(NOT_ALLOWED), Self::Handshake(HandshakeError::NotAuthorized { .. })) => {
                "not allowed: this server did not authorize this process".into()
            }
            (Some(NOT_ALLOWED), Self::Handshake(HandshakeError::UnknownOwner)) => {
                "not allowed: users that this server cannot tell may pass descriptors, but not \
                 name files"
                    .into()
            }
            (Some(NOT_ALLOWED), Self::Handshake(HandshakeError::FileOwner { .. })) => {
                "not allowed: the files of the memory belong to another user".into()
            }
            (Some(NOT_ALLOWED), _) => {
                "not allowed: the memory cannot be opened here; its directory must be that of this \
                 server's `path_prefix`"
                    .into()
            }
            (Some(STOPPING), _) => "stopping: this server is about to stop".into(),
            (_, error) => error.to_string(),
        }
    }
}

/// Whether an error of the system passes by itself.
fn is_passing(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{
        FileTooLarge, InvalidFilename, InvalidInput, IsADirectory, NotADirectory, PermissionDenied,
        ReadOnlyFilesystem, Unsupported,
    };
    ![
        FileTooLarge,
        InvalidFilename,
        InvalidInput,
        IsADirectory,
        NotADirectory,
        PermissionDenied,
        ReadOnlyFilesystem,
        Unsupported,
    ]
    .contains(&kind)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use nix::errno::Errno;

    use super::*;
    use crate::error::{ConfigError, IoUringProblem, ResourceError, WireError};

    fn refused(code: &str) -> HandshakeError {
        HandshakeError::Refused { code: code.into(), message: "words".into() }
    }

    fn not_allowed() -> HandshakeError {
        HandshakeError::PeerNotAllowed { uid: None, peer: "server", allowed: String::new() }
    }

    #[test]
    fn what_may_pass_is_told_from_what_will_not() {
        let os = |errno: Errno| Error::os("do it", errno);
        let second = Duration::from_secs(1);
        let unavailable = |error: Error| Error::Unavailable {
            shard: 0,
            server: Path::new("/run/x").into(),
            source: Arc::new(error),
        };
        let io_uring = ResourceError::IoUring {
            call: "io_uring_setup",
            errno: Errno::EPERM as i32,
            problem: Box::new(IoUringProblem::Seccomp),
        };
        let too_long = ConfigError::SocketPath { path: "/x".into(), len: 108, suffix: "".into() };
        let affinity = ResourceError::Affinity { processor: 1, errno: Errno::EPERM as i32 };
        let table: &[(bool, Error)] = &[
            (true, os(Errno::ENOENT)),
            (true, os(Errno::ECONNREFUSED)),
            (true, os(Errno::ECONNRESET)),
            (true, os(Errno::EAGAIN)),
            (true, os(Errno::EMFILE)),
            (true, os(Errno::ENOMEM)),
            (true, os(Errno::EADDRINUSE)),
            (false, os(Errno::EACCES)),
            (false, os(Errno::EPERM)),
            (false, os(Errno::ENAMETOOLONG)),
            (false, os(Errno::ENOTDIR)),
            (false, os(Errno::EINVAL)),
            (false, os(Errno::EROFS)),
            (false, os(Errno::EOPNOTSUPP)),
            (true, HandshakeError::Closed { waiting_for: "it" }.into()),
            (true, HandshakeError::Timeout(second).into()),
            (true, HandshakeError::TooManySessions(1).into()),
            (true, HandshakeError::TooManyUnclosed { uid: None, connections: 128 }.into()),
            (true, HandshakeError::TooManyQueued(1).into()),
            (true, HandshakeError::GaveWay(second).into()),
            (true, HandshakeError::Stopping.into()),
            (true, HandshakeError::OtherShard { index: 1, count: 2, expected: 0 }.into()),
            (true, refused(FULL).into()),
            (true, refused(STOPPING).into()),
            (true, refused("OF_TOMORROW").into()),
            (false, refused(TOO_LARGE).into()),
            (false, refused(NOT_ALLOWED).into()),
            (false, refused(VERSION_NOT_SUPPORTED).into()),
            (false, refused(JSON_PARSE_ERROR).into()),
            (false, not_allowed().into()),
            (false, HandshakeError::NotAuthorized { uid: None }.into()),
            (false, HandshakeError::NoCommonVersion { peer: 1, needed: 2 }.into()),
            (false, HandshakeError::Version4NotOffered.into()),
            (false, HandshakeError::VersionNotOffered(3).into()),
            (false, HandshakeError::StrayBytes.into()),
            (false, HandshakeError::DescriptorsOverTcp.into()),
            (false, WireError::Magic(7).into()),
            (false, MemoryError::Offset { offset: 7 }.into()),
            (true, MemoryError::Lost.into()),
            (false, too_long.into()),
            (true, ResourceError::OpenFiles { needed: 1, used: 2, limit: 3 }.into()),
            (
                true,
                ResourceError::Threads { needed: 1, had: 0, limit: None, group_limit: None }.into(),
            ),
            (false, ResourceError::LockedMemory { needed: 1, limit: 0 }.into()),
            (false, ResourceError::FileSize { what: "it", needed: 1, limit: 0 }.into()),
            (false, affinity.into()),
            (false, io_uring.into()),
            (true, unavailable(os(Errno::ENOENT))),
            (false, unavailable(os(Errno::EACCES))),
            (true, Error::PeerClosed),
            (true, Error::PeerNotReading),
            (true, Error::PeerStalled(second)),
            (true, Error::StreamClosedByPeer),
            (true, Error::DeadlinePassed),
            (true, Error::TooManyStreams(1)),
            (false, Error::NoSuchShard { index: 1, count: 1 }),
            (false, Error::SessionClosed),
            (false, Error::StreamClosed),
            (false, Error::StreamReset),
            (false, Error::NotTrusted),
            (false, Error::ForeignLoan),
            (false, Error::NotClient),
        ];
        for (expected, error) in table {
            assert_eq!(error.is_retryable(), *expected, "{error}");
        }
    }
}
