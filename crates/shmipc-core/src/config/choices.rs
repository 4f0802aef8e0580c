// SPDX-License-Identifier: MIT OR Apache-2.0
//! What there is to choose from.

use std::time::Duration;

/// The versions of the protocol that a session can speak (`docs/protocol.md#handshakes`).
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, MemoryKind, ProtocolVersion};
///
/// // For a server of version 2, which takes memory by its file's name only.
/// let config = Config::builder().protocol(ProtocolVersion::V2).memory(MemoryKind::File).build()?;
/// assert!(config.protocol() < ProtocolVersion::HIGHEST);
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ProtocolVersion {
    /// File memory only; the client uses the queues without waiting for an answer.
    V2,
    /// Memory by descriptor or by file, acknowledged by the server.
    V3,
    /// As version 3, with features that both sides agree on first, in JSON.
    V4,
}

impl ProtocolVersion {
    /// The highest version of this crate.
    pub const HIGHEST: Self = Self::V4;

    /// The number of the version.
    pub const fn as_u8(self) -> u8 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
            Self::V4 => 4,
        }
    }

    /// The version byte in the header of a session's messages: 0 in version 4.
    pub const fn message_byte(self) -> u8 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
            Self::V4 => 0,
        }
    }
}

/// How the client hands its shared memory to the server.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, MemoryKind};
///
/// // For a server on TCP loopback. It opens the files by their names, so it has to see them there.
/// let config = Config::builder()
///     .memory(MemoryKind::File)
///     .path_prefix("/dev/shm/orders")
///     .build()?;
/// assert_eq!(config.memory(), MemoryKind::File);
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Anonymous memory whose descriptors go over the Unix socket. Nothing is left behind by a
    /// crash, and nobody else can open it.
    Memfd,
    /// Files below the [path prefix](crate::ConfigBuilder::path_prefix). The only kind that works
    /// over TCP loopback, and the only kind that protocol version 2 knows.
    File,
}

/// One size class of buffer slices and the share of the buffer memory that it gets.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, SliceClass};
///
/// // Many small messages, and some of nearly 64 KiB. The header of a slice takes 20 bytes.
/// let classes = [SliceClass::new(256 - 20, 40), SliceClass::new((64 << 10) - 20, 60)];
/// let config = Config::builder().slice_classes(classes).build()?;
/// assert_eq!(config.slice_classes(), classes);
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceClass {
    /// Bytes of payload that one slice holds. A multiple of four.
    pub capacity: u32,
    /// Share of the buffer memory in per cent.
    pub percent: u32,
}

impl SliceClass {
    /// A class of slices with `capacity` bytes of payload that gets `percent` of the memory.
    pub const fn new(capacity: u32, percent: u32) -> Self {
        Self { capacity, percent }
    }
}

/// How a side of a session learns that its peer, while it slept, sent something.
///
/// The client of a session asks for one, in version 4 of the protocol; servers follow. Versions 2
/// and 3 know [`Socket`](Self::Socket) only.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use shmipc_glommio::{Config, ProtocolVersion, Wakeup};
///
/// let config = Config::builder().protocol(ProtocolVersion::V4).wakeup(Wakeup::EventFd).build()?;
/// assert_eq!(config.wakeup(), Wakeup::EventFd);
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wakeup {
    /// By a SyncEvent, a message of eight bytes over the session's socket.
    Socket,
    /// By an eventfd for each direction. For [memfd memory](MemoryKind::Memfd) only, with which the
    /// descriptors go over. Each side keeps two descriptors for it: the eventfd that it reads, and
    /// a small io_uring that rings at the other one. A session that sleeps while its core spins for
    /// others hears it at the next [look at io_uring](crate::ConfigBuilder::reactor_interval), up
    /// to 250 us later than a SyncEvent would be. But up to sixteen of a core's sessions do not
    /// sleep then (unless they [never spin](Spin::Never)), since to look at them too costs less.
    EventFd,
    /// Not at all: each side looks at its queue at this interval, as long as the session lives. For
    /// sessions whose messages can wait: no side ever makes a system call for the other, and both
    /// wake up for nothing when there is none. From [`Self::SHORTEST_INTERVAL`] to
    /// [`Self::LONGEST_INTERVAL`].
    Polling(Duration),
}

impl Wakeup {
    /// The shortest interval that a configuration can ask for, and that a server grants: one that a
    /// timer can keep without taking the whole core.
    pub const SHORTEST_INTERVAL: Duration = Duration::from_micros(50);
    /// The longest.
    pub const LONGEST_INTERVAL: Duration = Duration::from_secs(1);
}

/// How long a session goes on polling its IO queue after its last traffic.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
/// use std::time::Duration;
/// use shmipc_glommio::{Config, Spin};
///
/// // A core with nothing else to do may look for longer before it sleeps, and is woken less often.
/// let config = Config::builder().spin(Spin::For(Duration::from_millis(2))).build()?;
/// assert_eq!(config.spin(), Spin::For(Duration::from_millis(2)));
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spin {
    /// Never: every message that meets a sleeping peer costs a wake-up, and an idle core sleeps.
    Never,
    /// For this long after the last traffic at most, which is also what a wake-up is taken to cost:
    /// each session remembers how long its last waits were, and polls for as long as would have
    /// cost it least. So it does not poll at all when nothing comes within this time anyway, but
    /// for one wait of 64, since peers change.
    For(Duration),
    /// Always. The core never sleeps while the session lives.
    Forever,
}
