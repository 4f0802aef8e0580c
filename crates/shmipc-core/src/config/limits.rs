// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may be at the other end, and how much of this side it can use.

use std::time::Duration;

use crate::error::HandshakeError;

/// Who may be at the other end of a connection, by the user that the kernel names.
///
/// Over TCP the kernel names the owner of the other end's socket, if it was built to (most are,
/// `CONFIG_INET_DIAG`) and the peer has not closed it. A peer that it does not name is let in by
/// [`Any`](Self::Any) alone; so is the overflow user (65534) in a user namespace that does not map
/// all users, where it stands for every user that is not mapped.
///
/// ```
/// # extern crate shmipc_core as shmipc_glommio;
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

impl AllowedPeers {
    /// Checks a peer, `"client"` or `"server"`, whose user the kernel named.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::PeerNotAllowed`].
    #[doc(hidden)]
    pub fn check(&self, uid: Option<u32>, peer: &'static str) -> Result<(), HandshakeError> {
        let is_allowed = match self {
            Self::Any => true,
            Self::SameUser => uid == Some(nix::unistd::geteuid().as_raw()),
            Self::Users(users) => uid.is_some_and(|uid| users.contains(&uid)),
        };
        if is_allowed {
            return Ok(());
        }
        Err(HandshakeError::PeerNotAllowed { uid, peer, allowed: words(self) })
    }
}

/// How many users of a list are named in an error.
const NAMED_USERS: usize = 8;

/// Whom a setting allows.
fn words(allowed: &AllowedPeers) -> String {
    match allowed {
        AllowedPeers::Any => "everybody".into(),
        AllowedPeers::SameUser => {
            format!("the user of this process, {},", nix::unistd::geteuid())
        }
        AllowedPeers::Users(users) if users.is_empty() => "nobody, a list of no users,".into(),
        AllowedPeers::Users(users) => {
            let named: Vec<_> = users.iter().take(NAMED_USERS).map(u32::to_string).collect();
            let more = if users.len() > NAMED_USERS { ", ..." } else { "" };
            format!("users {}{more}", named.join(", "))
        }
    }
}

/// Who can connect to a Unix socket, as its file says.
#[derive(Debug, Clone, Copy)]
pub struct SocketFile {
    /// The nine bits of permissions.
    pub mode: u32,
    /// User and group that the file is given to. `None` stays as it is.
    pub user: Option<u32>,
    /// `None` stays as it is.
    pub group: Option<u32>,
}

/// How much private memory each slice of a buffer memory takes on each side at most: its line in
/// the books, and a message of its own while it is one that nobody has read.
pub const PRIVATE_BYTES_PER_SLICE: u64 = 192;

/// What a peer can make this side spend, at most.
#[derive(Debug, Clone)]
pub struct Limits {
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How many handshakes run at the same time.
    pub handshakes: usize,
    /// How many of them one user may have.
    pub handshakes_per_user: usize,
    /// How many connections wait for a handshake to end.
    pub queued_handshakes: usize,
    /// How many sessions there are at the same time.
    pub sessions: usize,
    /// The longest message of the control connection, in bytes.
    pub message_len: u32,
    /// How many streams a session has at the same time.
    pub streams: usize,
    /// Bytes of a peer's memory that one session maps.
    pub mapped_bytes: u64,
    /// Bytes of peers' memory that all sessions map together.
    pub total_mapped_bytes: u64,
    /// `None`: for ever.
    pub stall: Option<Duration>,
    /// How long a close waits until the peer has taken what was sent.
    pub close_timeout: Duration,
    /// Bytes that came over the socket and are unread, of one session.
    pub unread_fallback_bytes: usize,
    /// `None`: by the size of the buffer memory.
    pub stream_window: Option<u64>,
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
