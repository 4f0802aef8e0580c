// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sessions of this shard with the others.
//!
//! One session leads to each other shard, like that of any client, made when it is first needed
//! and again when it has ended. Each client of this shard has a stream of its own on it.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::sync::Semaphore;
use shmipc_glommio::{Config, Connector, Session, Stream};

/// What a shard says first on a stream to another one: commands that come on it are for that shard
/// alone, and it must not pass them on.
pub(crate) const ONLY: &[u8] = b"*2\r\n$5\r\nSHARD\r\n$4\r\nONLY\r\n";

/// The other shards.
pub(crate) struct Peers {
    connector: Connector,
    peers: Vec<Peer>,
}

struct Peer {
    path: PathBuf,
    session: RefCell<Option<Session>>,
    /// Held while a session is made.
    connecting: Semaphore,
}

impl Peers {
    /// Shards that listen at these paths.
    pub(crate) fn new(paths: Vec<PathBuf>, config: Config) -> Self {
        let peer = |path| Peer { path, session: RefCell::default(), connecting: Semaphore::new(1) };
        Self { connector: Connector::new(config), peers: paths.into_iter().map(peer).collect() }
    }

    /// Opens a stream to a shard, on which it takes commands for itself alone.
    pub(crate) async fn open(&self, shard: usize) -> io::Result<(Session, Stream)> {
        let session = self.session(shard).await?;
        match open_on(&session).await {
            Ok(stream) => Ok((session, stream)),
            // It was about to end when it was asked; a new one may live.
            Err(_) if session.end_reason().is_some() => {
                let session = self.session(shard).await?;
                let stream = open_on(&session).await?;
                Ok((session, stream))
            }
            Err(error) => Err(error),
        }
    }

    async fn session(&self, shard: usize) -> io::Result<Session> {
        let peer = self.peers.get(shard).ok_or(io::ErrorKind::NotFound)?;
        if let Some(session) = peer.session() {
            return Ok(session);
        }
        // Only one of those who need it makes it; the others find it made.
        let _permit = peer.connecting.acquire_permit(1).await.map_err(io::Error::from)?;
        if let Some(session) = peer.session() {
            return Ok(session);
        }
        let session = self.connector.connect(&peer.path).await?;
        *peer.session.borrow_mut() = Some(session.clone());
        Ok(session)
    }
}

async fn open_on(session: &Session) -> io::Result<Stream> {
    let mut stream = session.open_stream()?;
    stream.write_all(ONLY).await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    if answer != super::reply::OK {
        return Err(io::Error::other("it does not take commands of another shard"));
    }
    Ok(stream)
}

impl Peer {
    /// The session, when there is one that lives.
    fn session(&self) -> Option<Session> {
        let session = self.session.borrow();
        session.as_ref().filter(|session| session.end_reason().is_none()).cloned()
    }
}
