// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors, split by who is at fault.
//!
//! - [`WireError`]: the peer sent bytes on the socket that are not a message.
//! - [`HandshakeError`]: the peer sent a message that has no place where it stands.
//! - [`MemoryError`]: the shared memory that the peer gave us, or writes to, does not hold
//!   together.
//! - [`ConfigError`]: the caller asked for something that cannot be.
//! - [`ResourceError`]: the machine has too little of something.
//! - [`Error`]: all of these, the operating system, and the ends of sessions and streams.
//!
//! Every one of them converts into [`std::io::Error`] with a fitting kind, so that code written for
//! sockets needs no second error type.

mod handshake;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use handshake::HandshakeError;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The peer sent bytes on the socket that are not a message (WIRE chapter 1; spec 3.1).
///
/// ```
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

/// Shared memory that does not hold together (WIRE chapters 3 and 4; spec chapters 5 and 6.2).
///
/// After one of these the session is over: its memory cannot be trusted any more.
///
/// ```
/// use std::sync::mpsc;
/// use shmipc_glommio::{Config, Connector, Error, Listener, MemoryError};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-memory-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// // This server maps 1 MiB for a client, and no more.
/// let config = Config::builder().max_mapped_bytes(1 << 20).build()?;
/// let listener = Listener::bind(&path, config)?;
/// let (tell, refused) = mpsc::channel();
/// listener.on_refused(move |error| tell.send(error.clone()).unwrap());
/// // By default, clients bring 32 MiB. One that is refused sees its connection closed.
/// Connector::new(Config::default()).connect(&path).await.unwrap_err();
/// let error = refused.try_recv().unwrap();
/// assert!(matches!(error, Error::Memory(MemoryError::TooLarge { limit: 0x10_0000, .. })));
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
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
    #[error("{what} has {have} bytes, the limit is {limit}")]
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
        /// The field, by its name in WIRE.md.
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

/// The caller asked for something that cannot be.
///
/// ```
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
    /// could not be read in one go (WIRE chapter 3).
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

/// This machine, or what this process may have of it, cannot hold what was asked for.
///
/// ```
/// use shmipc_glommio::{Config, Error, MemoryKind, ResourceError};
///
/// let config = Config::builder().memory(MemoryKind::File).build()?;
/// // No machine has a million gigabytes in `/dev/shm`.
/// let error = config.footprint(1, 1 << 20, 1 << 15).check().unwrap_err();
/// assert!(matches!(error, Error::Resource(ResourceError::SharedMemory { .. })));
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// The file system of shared-memory files has too little space. In containers `/dev/shm` often
    /// has 64 MiB.
    #[error("{directory:?} has {available} bytes left, the shared memory takes {needed}")]
    SharedMemory {
        /// Where the files would be.
        directory: PathBuf,
        /// How many bytes they would take.
        needed: u64,
        /// How many there are.
        available: u64,
    },
    /// A control group of this process may not use as much memory.
    #[error("control group {group:?} has {available} bytes left, the shared memory takes {needed}")]
    ControlGroup {
        /// Where the system shows the group.
        group: PathBuf,
        /// How many bytes are needed.
        needed: u64,
        /// How many the group has left.
        available: u64,
    },
    /// This process may not lock enough memory for the rings of its executors.
    #[error("{limit} bytes of memory may be locked, the executors take {needed}: see `ulimit -l`")]
    LockedMemory {
        /// How many bytes are needed.
        needed: u64,
        /// The limit.
        limit: u64,
    },
}

/// Anything that can go wrong here.
///
/// Cheap to clone, since the end of a session reaches every one of its streams.
///
/// ```
/// use std::io;
/// use shmipc_glommio::{Config, Connector, Error};
///
/// # glommio::LocalExecutorBuilder::default().spawn(|| async {
/// let connector = Connector::new(Config::default());
/// let error = connector.connect("/nowhere/store.sock").await.unwrap_err();
/// // Who is at fault decides what to do next: this server may come yet.
/// assert!(matches!(error, Error::Os { .. }) && !error.is_peer_fault());
/// // Code that was written for sockets sees what it would see of a socket.
/// assert_eq!(io::Error::from(error).kind(), io::ErrorKind::NotFound);
/// # }).unwrap().join().unwrap();
/// ```
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
    /// The machine has too little of something.
    #[error("too little memory: {0}")]
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
    #[error("no session to shard {shard}: {source}")]
    Unavailable {
        /// Which shard.
        shard: usize,
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
    #[error("{operation}: {source}")]
    Os {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The peer went away: it closed its socket, or died.
    #[error("the peer closed the session")]
    PeerClosed,
    /// The peer makes this side send messages over the socket and does not read them.
    #[error("the peer does not read its socket")]
    PeerNotReading,
    /// The peer has left what was sent to it where it is for so long
    /// (see [`stall_limit`](crate::ConfigBuilder::stall_limit)).
    #[error("the peer has not moved for {0:?}")]
    PeerStalled(Duration),
    /// The session was closed on this side.
    #[error("the session was closed here")]
    SessionClosed,
    /// The stream was closed on this side.
    #[error("the stream was closed here")]
    StreamClosed,
    /// The peer closed the stream; what is written to it now would reach nobody.
    #[error("the peer closed the stream")]
    StreamClosedByPeer,
    /// The peer ended the stream as a failure (see [`Stream::reset`](crate::Stream::reset)): what it
    /// sent must not be taken for all there was.
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
    #[error("{0} streams are open, the limit")]
    TooManyStreams(usize),
}

impl Error {
    /// An error of the operating system, with what was being done.
    pub(crate) fn os(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Os { operation, source: Arc::new(source.into()) }
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
        )
    }

    /// The kind that fits this error best.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Wire(_) | Self::Memory(_) => io::ErrorKind::InvalidData,
            Self::Handshake(HandshakeError::Timeout(_)) => io::ErrorKind::TimedOut,
            Self::Handshake(HandshakeError::Closed { .. }) => io::ErrorKind::UnexpectedEof,
            Self::Handshake(
                HandshakeError::PeerNotAllowed { .. }
                | HandshakeError::NotAuthorized { .. }
                | HandshakeError::FileOwner { .. },
            ) => io::ErrorKind::PermissionDenied,
            Self::Handshake(HandshakeError::Refused { .. }) => io::ErrorKind::ConnectionRefused,
            Self::Handshake(_) => io::ErrorKind::InvalidData,
            Self::Config(_) => io::ErrorKind::InvalidInput,
            Self::Resource(ResourceError::SharedMemory { .. }) => io::ErrorKind::StorageFull,
            Self::Resource(_) => io::ErrorKind::OutOfMemory,
            Self::Shard { source, .. } => {
                source.downcast_ref::<io::Error>().map_or(io::ErrorKind::Other, io::Error::kind)
            }
            Self::NoSuchShard { .. } => io::ErrorKind::NotFound,
            Self::Unavailable { source, .. } => source.kind(),
            Self::Os { source, .. } => source.kind(),
            Self::PeerClosed | Self::StreamReset => io::ErrorKind::ConnectionReset,
            Self::PeerNotReading | Self::PeerStalled(_) => io::ErrorKind::TimedOut,
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

    #[test]
    fn errors_cross_threads() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Error>();
    }
}
