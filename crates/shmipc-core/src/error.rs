// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors, split by who is at fault.
//!
//! - [`WireError`]: the peer sent bytes on the socket that are not a message.
//! - [`HandshakeError`]: the peer sent a message that has no place where it stands.
//! - [`MemoryError`]: the shared memory that the peer gave us, or writes to, does not hold
//!   together.
//! - [`ConfigError`]: the caller asked for something that cannot be.
//! - [`ResourceError`]: the machine has too little of something, or does not let this process have
//!   it.
//! - [`Error`]: all of these, the operating system, and the ends of sessions and streams.
//!
//! Every one of them converts into [`std::io::Error`] with a fitting kind, so that code written for
//! sockets needs no second error type.

mod handshake;
mod resource;
mod retry;
mod target;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use handshake::HandshakeError;
pub use resource::{IoUringProblem, ResourceError};
pub use target::Target;

pub use retry::{FULL, JSON_PARSE_ERROR, NOT_ALLOWED, STOPPING, TOO_LARGE, VERSION_NOT_SUPPORTED};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The peer sent bytes on the socket that are not a message (spec 3.1;
/// `docs/protocol.md#messages`).
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::WireError;
/// use shmipc_glommio::wire::Header;
///
/// // A browser that found the socket.
/// assert_eq!(Header::decode(b"GET / HT"), Err(WireError::Magic(0x2f20)));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The two magic bytes are wrong: whatever talks to us does not speak shmipc.
    #[error("magic is {0:#06x}, not 0x7758")]
    Magic(u16),
    /// The version byte is one that no message of this crate carries.
    #[error("version byte {0} is not one of 0 (version 4), 2 and 3")]
    Version(u8),
    /// The type byte names no message.
    #[error("message type {0} is unknown")]
    Type(u8),
    /// The length field is not one that this type of message can have.
    #[error("{message} has a length of {length} bytes, expected {expected}")]
    Length {
        /// Which message.
        message: &'static str,
        /// The length that its header gives, header included.
        length: u32,
        /// What the length could have been, in words.
        expected: &'static str,
    },
    /// The length field is over the configured limit.
    #[error("message of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The length that the header gives, header included.
        length: u32,
        /// The configured limit in bytes.
        limit: u32,
    },
    /// A path inside a message ends outside the message, or is longer than a path may be.
    #[error("path of {length} bytes in {message}: {problem}")]
    Path {
        /// Which message.
        message: &'static str,
        /// The length that the path's own length field gives.
        length: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The JSON of a negotiation is none, or not one of a negotiation (version 4).
    #[error("negotiation: {0}")]
    Negotiation(String),
}

/// Shared memory that does not hold together (spec chapters 5 and 6.2;
/// `docs/protocol.md#io-queues`, `docs/protocol.md#buffer-memory`).
///
/// After one of these the session is over: its memory cannot be trusted any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The memory is smaller than what its headers, or the protocol, need.
    #[error("{what} needs {needed} bytes, the memory has {have}")]
    TooSmall {
        /// Which part.
        what: &'static str,
        /// How many bytes it needs at least.
        needed: u64,
        /// How many there are.
        have: u64,
    },
    /// The memory is larger than this side is willing, or able, to map.
    #[error("{what} has {have} bytes, the limit is {limit} ({})", setting_of(what))]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// How many bytes it has.
        have: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A field of a header holds what it must not.
    #[error("{what} is {value}: {problem}")]
    Field {
        /// The field, in words.
        what: &'static str,
        /// What it holds.
        value: u64,
        /// Why that cannot be.
        problem: &'static str,
    },
    /// A queue index moved as no honest peer moves it.
    #[error("the peer moved the {index} of its queue to {value}, it can be {low} to {high}")]
    QueueIndex {
        /// `"head"` or `"tail"`.
        index: &'static str,
        /// Where it stands.
        value: i64,
        /// The lowest place it could be.
        low: i64,
        /// The highest place it could be.
        high: i64,
    },
    /// An offset does not name a buffer slice.
    #[error("offset {offset} is not the start of a buffer slice")]
    Offset {
        /// The offset, from the start of the buffer memory.
        offset: u32,
    },
    /// A slice was named that this side holds: it was handed out twice, or its chain has a cycle.
    #[error("the slice at {offset} was handed to two owners")]
    SharedTwice {
        /// Where the slice stands.
        offset: u32,
    },
    /// A slice's header is not that of its list.
    #[error("the slice at {offset} says {what} = {value}, its list says at most {limit}")]
    SliceHeader {
        /// Where the slice stands.
        offset: u32,
        /// Which field.
        what: &'static str,
        /// What it holds.
        value: u32,
        /// What its list, or its capacity, allows.
        limit: u32,
    },
    /// The memory is gone: its file was truncated, or had no room for a page that was touched.
    ///
    /// What was read from it since may be zeroes
    /// (see [`disable_sigbus_guard`](crate::disable_sigbus_guard)).
    #[error("a page of the shared memory is gone: its file was truncated, or had no room for it")]
    Lost,
    /// A chain of slices has more links than there are slices.
    #[error("a chain of slices from {offset} does not end")]
    EndlessChain {
        /// Where the chain starts.
        offset: u32,
    },
}

/// What is limited in all, and not for each session.
pub const ALL_MEMORY: &str = "the memory of all sessions of this listener, with the books on it";

/// Which setting of this side's configuration a limit of memory is.
fn setting_of(what: &str) -> &'static str {
    if what == ALL_MEMORY { "`max_total_mapped_bytes`" } else { "`max_mapped_bytes` at most" }
}

/// The longest path of a Unix socket, in bytes: the kernel's field has one more, for the end.
pub const MAX_SOCKET_PATH: usize = 107;

fn appended(suffix: &str) -> String {
    match suffix.strip_prefix('.') {
        Some(shard) => format!(" (`{suffix}` is appended for shard {shard})"),
        None => String::new(),
    }
}

/// The caller asked for something that cannot be.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, ConfigError};
///
/// let error = Config::builder().queue_capacity(1000).build().unwrap_err();
/// assert_eq!(error, ConfigError::QueueCapacity(1000));
/// assert!(error.to_string().starts_with("queue capacity 1000 is not a multiple of 16"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The queue capacity is not a multiple of 16 in the range that the protocol can hold.
    ///
    /// The multiple keeps the indices of both queues inside one cache line each, without which they
    /// could not be read in one go (`docs/protocol.md#head-and-tail`).
    #[error("queue capacity {0} is not a multiple of 16 from 16 to 16777216")]
    QueueCapacity(u32),
    /// The slice classes cannot be laid out.
    #[error("slice classes: {0}")]
    SliceClasses(String),
    /// The buffer memory is too small for its slice classes, or larger than offsets can name.
    #[error("buffer memory of {size} bytes: {problem}")]
    BufferSize {
        /// The size asked for, in bytes.
        size: u64,
        /// Why it cannot be.
        problem: String,
    },
    /// Version 2 of the protocol has no message for descriptors.
    #[error("protocol version 2 knows file memory only")]
    MemfdNeedsVersion3,
    /// Versions 2 and 3 of the protocol wake by the socket.
    #[error("eventfd and polling need protocol version 4")]
    WakeupNeedsVersion4,
    /// The descriptors of eventfds go over with those of the memory.
    #[error("eventfd needs memfd memory")]
    EventFdNeedsMemfd,
    /// The path prefix of shared-memory files is too long or not absolute.
    #[error("path prefix {0:?} must be absolute and leave room for the file names")]
    PathPrefix(PathBuf),
    /// The path of a Unix socket is longer than the system takes.
    #[error(
        "a Unix socket path holds {MAX_SOCKET_PATH} bytes, {} has {len}{}: choose a shorter one",
        path.display(),
        appended(suffix)
    )]
    SocketPath {
        /// The whole path, with what is appended.
        path: PathBuf,
        /// How long it is, in bytes.
        len: usize,
        /// What of it was appended for a shard: `.0` for shard 0. Empty for none.
        suffix: Box<str>,
    },
    /// The processors that shards should run on are not there, or not for this process.
    #[error("processors: {0}")]
    Cores(String),
    /// A limit is zero or out of its range.
    #[error("{what} is {value}: {problem}")]
    Limit {
        /// Which setting.
        what: &'static str,
        /// What it was set to.
        value: u64,
        /// Why that cannot be.
        problem: &'static str,
    },
}

/// Anything that can go wrong here.
///
/// Cheap to clone, since the end of a session reaches every one of its streams.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer sent bytes that are not a message.
    #[error("the peer broke the wire format: {0}")]
    Wire(#[from] WireError),
    /// The peer broke the handshake, or never finished it.
    #[error("handshake failed: {0}")]
    Handshake(#[from] HandshakeError),
    /// The shared memory does not hold together.
    #[error("shared memory is broken: {0}")]
    Memory(#[from] MemoryError),
    /// The configuration cannot be.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// The machine has too little of something, or this process may not have it.
    #[error("{0}")]
    Resource(#[from] ResourceError),
    /// A server has no shard of this number.
    #[error("there is no shard {index}, the server has {count}")]
    NoSuchShard {
        /// The shard that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// No session to a shard came up for as long as the caller could wait.
    #[error("no session to shard {shard} of {}: {source}", server.display())]
    #[non_exhaustive]
    Unavailable {
        /// Which shard.
        shard: usize,
        /// The path of its server.
        server: Arc<Path>,
        /// Why the last one ended, or could not be made.
        source: Arc<Error>,
    },
    /// A shard of a server could not start, or did not go on.
    #[error("shard {index}: {source}")]
    Shard {
        /// Which one.
        index: usize,
        /// Why.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system said no.
    #[error("{operation}{}: {source}{}", of(target.as_deref()), advised(advice.as_deref()))]
    #[non_exhaustive]
    Os {
        /// What was being done.
        operation: &'static str,
        /// To what: the path of a socket or of a file, or an address. `None` where there is none.
        target: Option<Arc<Target>>,
        /// What the system said.
        source: Arc<io::Error>,
        /// Which setting or limit is in the way, and what to do about it, where that is known.
        advice: Option<Arc<str>>,
    },
    /// The peer went away: it closed its socket, or died.
    #[error("the peer closed the session")]
    PeerClosed,
    /// The peer makes this side send messages over the socket and does not read them.
    #[error("the peer does not read its socket")]
    PeerNotReading,
    /// The peer has left what was sent to it where it is for so long
    /// (see [`stall_timeout`](crate::ConfigBuilder::stall_timeout)).
    #[error("the peer has not moved for {0:?} (`stall_timeout`)")]
    PeerStalled(Duration),
    /// The session was closed here, and the peer was not known to have taken all that was sent to
    /// it when the time for that was over
    /// (see [`close_timeout`](crate::ConfigBuilder::close_timeout)).
    #[error(
        "closed while the peer was not known to have taken everything within {after:?} \
         (`close_timeout`): {events} events, {slices} slices, {socket_bytes} bytes of the socket \
         are left, and nothing shows whether {unconfirmed} bytes that went over it were read"
    )]
    NotTaken {
        /// How long the peer had.
        after: Duration,
        /// Events of the IO queue that it has not taken.
        events: u32,
        /// Buffer slices that it has not given back. shmipc-go keeps the last one of an open stream
        /// that was read in pieces of just its length, until more comes or the stream is closed.
        slices: usize,
        /// About how many bytes of the socket it has not read.
        socket_bytes: usize,
        /// Bytes that went over the socket and were not answered by data on the same stream or by
        /// its close. They may have been read: only a peer of this crate says so.
        unconfirmed: u64,
    },
    /// The session was closed on this side.
    #[error("the session was closed here")]
    SessionClosed,
    /// The stream was closed on this side.
    #[error("the stream was closed here")]
    StreamClosed,
    /// The peer closed the stream; what is written to it now would reach nobody.
    #[error("the peer closed the stream")]
    StreamClosedByPeer,
    /// The peer ended the stream as a failure (see `Stream::reset`): what
    /// it sent must not be taken for all there was.
    #[error("the peer reset the stream")]
    StreamReset,
    /// The deadline of this stream's reads or writes passed first.
    #[error("the deadline has passed")]
    DeadlinePassed,
    /// A token was shown that does not speak for the peer of this session.
    #[error("the promise was not made for this peer")]
    NotTrusted,
    /// A loan was to be sent on a session whose memory it is not.
    #[error("the loan is of another session")]
    ForeignLoan,
    /// Only the client of a session opens streams.
    #[error("a server cannot open streams, it accepts them")]
    NotClient,
    /// As many streams are open as the configuration allows.
    #[error("{0} streams are open, as many as `max_streams` allows")]
    TooManyStreams(usize),
}

fn of(target: Option<&Target>) -> String {
    target.map_or_else(String::new, |target| format!(" {target}"))
}

fn advised(advice: Option<&str>) -> String {
    advice.map_or_else(String::new, |advice| format!("; {advice}"))
}

impl Error {
    /// An error of the operating system, with what was being done.
    pub fn os(operation: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let advice = resource::advice(&source).map(Arc::from);
        Self::Os { operation, target: None, source: Arc::new(source), advice }
    }

    /// The same, about a path or an address.
    pub fn os_at(
        operation: &'static str,
        target: impl Into<Target>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::os(operation, source).at(target)
    }

    /// Says what an error of the operating system is about, if it does not by itself.
    pub fn at(mut self, about: impl Into<Target>) -> Self {
        if let Self::Os { target: target @ None, .. } = &mut self {
            *target = Some(Arc::new(about.into()));
        }
        self
    }

    /// Says what can be done about an error of the operating system.
    pub fn advise(mut self, text: impl Into<String>) -> Self {
        if let Self::Os { advice, .. } = &mut self {
            *advice = Some(Arc::from(text.into()));
        }
        self
    }

    /// The path that an operation of the system was about, if it was about one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Os { target, .. } => match target.as_deref() {
                Some(Target::Path(path)) => Some(path),
                _ => None,
            },
            Self::Config(ConfigError::SocketPath { path, .. }) => Some(path),
            Self::Resource(ResourceError::SharedMemory { directory, .. }) => Some(directory),
            Self::Unavailable { source, .. } => source.path(),
            _ => None,
        }
    }

    /// [`Unavailable`](Self::Unavailable), for the client that keeps the sessions.
    #[doc(hidden)]
    pub fn unavailable(shard: usize, server: Arc<Path>, source: Self) -> Self {
        Self::Unavailable { shard, server, source: Arc::new(source) }
    }

    /// Whether the peer is at fault, rather than this side or the machine.
    pub fn is_peer_fault(&self) -> bool {
        matches!(
            self,
            Self::Wire(_)
                | Self::Handshake(_)
                | Self::Memory(_)
                | Self::PeerNotReading
                | Self::PeerStalled(_)
                | Self::NotTaken { .. }
        )
    }

    /// The kind that fits this error best.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Wire(_) | Self::Memory(_) => io::ErrorKind::InvalidData,
            Self::Handshake(HandshakeError::Timeout(_) | HandshakeError::NeverMapped(_)) => {
                io::ErrorKind::TimedOut
            }
            Self::Handshake(HandshakeError::Version4Unanswered { .. }) => {
                io::ErrorKind::Unsupported
            }
            Self::Handshake(HandshakeError::Closed { .. }) => io::ErrorKind::UnexpectedEof,
            Self::Handshake(
                HandshakeError::PeerNotAllowed { .. }
                | HandshakeError::NotAuthorized { .. }
                | HandshakeError::FileOwner { .. }
                | HandshakeError::UnknownOwner
                | HandshakeError::MemoryInUse { .. },
            ) => io::ErrorKind::PermissionDenied,
            Self::Handshake(HandshakeError::Refused { code, .. }) if code == NOT_ALLOWED => {
                io::ErrorKind::PermissionDenied
            }
            Self::Handshake(HandshakeError::Refused { .. }) => io::ErrorKind::ConnectionRefused,
            Self::Handshake(_) => io::ErrorKind::InvalidData,
            Self::Config(_) => io::ErrorKind::InvalidInput,
            Self::Resource(error) => error.kind(),
            Self::Shard { source, .. } => {
                source.downcast_ref::<io::Error>().map_or(io::ErrorKind::Other, io::Error::kind)
            }
            Self::NoSuchShard { .. } => io::ErrorKind::NotFound,
            Self::Unavailable { source, .. } => source.kind(),
            Self::Os { source, .. } => source.kind(),
            Self::PeerClosed | Self::StreamReset => io::ErrorKind::ConnectionReset,
            Self::PeerNotReading | Self::PeerStalled(_) | Self::NotTaken { .. } => {
                io::ErrorKind::TimedOut
            }
            Self::SessionClosed => io::ErrorKind::ConnectionAborted,
            Self::StreamClosed => io::ErrorKind::NotConnected,
            Self::StreamClosedByPeer => io::ErrorKind::BrokenPipe,
            Self::DeadlinePassed => io::ErrorKind::TimedOut,
            Self::NotTrusted => io::ErrorKind::PermissionDenied,
            Self::ForeignLoan => io::ErrorKind::InvalidInput,
            Self::NotClient => io::ErrorKind::Unsupported,
            Self::TooManyStreams(_) => io::ErrorKind::QuotaExceeded,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}

macro_rules! into_io_error {
    ($($error:ty),*) => {
        $(impl From<$error> for io::Error {
            fn from(error: $error) -> Self {
                Error::from(error).into()
            }
        })*
    };
}

into_io_error!(WireError, HandshakeError, MemoryError, ConfigError, ResourceError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_and_the_source_survive_the_way_into_io_error() {
        let error = io::Error::from(Error::from(MemoryError::Offset { offset: 7 }));
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let inner = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
        assert!(matches!(inner, Error::Memory(MemoryError::Offset { offset: 7 })));
        assert!(inner.is_peer_fault());
    }

    /// It is in the result of every receive.
    #[test]
    fn errors_are_not_large() {
        assert!(size_of::<Error>() <= 56, "{}", size_of::<Error>());
    }

    #[test]
    fn errors_cross_threads() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Error>();
    }
}
