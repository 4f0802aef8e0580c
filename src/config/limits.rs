// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may be at the other end, and how much of this side it can use.

use std::time::Duration;

/// Who may be at the other end of a connection, by the user that the kernel names.
///
/// Over TCP the kernel names the owner of the other end's socket, if it was built to (most are,
/// `CONFIG_INET_DIAG`) and the peer has not closed it. A peer that it does not name is let in by
/// [`Any`](Self::Any) alone; so is the overflow user (65534) in a user namespace that does not map
/// all users, where it stands for every user that is not mapped.
///
/// ```
/// use shmipc_glommio::{AllowedPeers, Config};
///
/// // A proxy that runs as user 1337, and whose socket that user can write to.
/// let config = Config::builder()
///     .allowed_peers(AllowedPeers::Users(vec![1337]))
///     .socket_mode(0o660)
///     .socket_owner(None, Some(1337))
///     .build()?;
/// # Ok::<(), shmipc_glommio::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllowedPeers {
    /// The user that this process runs as.
    SameUser,
    /// These users, by number.
    Users(Vec<u32>),
    /// Whoever can connect.
    Any,
}

/// Who can connect to a Unix socket, as its file says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SocketFile {
    pub(crate) mode: u32,
    /// User and group that the file is given to. `None` stays as it is.
    pub(crate) user: Option<u32>,
    pub(crate) group: Option<u32>,
}

/// How much private memory each slice of a buffer memory takes on each side at most: its line in
/// the books, and a message of its own while it is one that nobody has read.
pub(crate) const PRIVATE_BYTES_PER_SLICE: u64 = 192;

/// What a peer can make this side spend, at most.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) handshake_timeout: Duration,
    pub(crate) handshakes: usize,
    pub(crate) handshakes_per_user: usize,
    pub(crate) queued_handshakes: usize,
    pub(crate) sessions: usize,
    pub(crate) message_len: u32,
    pub(crate) streams: usize,
    pub(crate) mapped_bytes: u64,
    pub(crate) total_mapped_bytes: u64,
    /// `None`: for ever.
    pub(crate) stall: Option<Duration>,
    pub(crate) close_timeout: Duration,
    pub(crate) unread_fallback_bytes: usize,
    /// `None`: by the size of the buffer memory.
    pub(crate) stream_window: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(2),
            handshakes: 64,
            handshakes_per_user: 32,
            queued_handshakes: 1024,
            sessions: 4096,
            message_len: 64 << 20,
            streams: 65536,
            mapped_bytes: 1 << 30,
            total_mapped_bytes: 64 << 30,
            stall: Some(Duration::from_secs(60)),
            close_timeout: Duration::from_secs(5),
            unread_fallback_bytes: 64 << 20,
            stream_window: None,
        }
    }
}
