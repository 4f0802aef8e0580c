// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sessions of this shard with the others.
//!
//! One session leads to each other shard, like that of any client, made when it is first needed
//! and again when it has ended. Each client of this shard has a stream of its own on it.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use shmipc_glommio::{Client, Config, Session, Stream};

/// What a shard says first on a stream to another one: commands that come on it are for that shard
/// alone, and it must not pass them on.
pub(crate) const ONLY: &[u8] = b"*2\r\n$5\r\nSHARD\r\n$4\r\nONLY\r\n";

/// How long a command waits for a shard that is not there.
const PATIENCE: Duration = Duration::from_secs(1);

/// The other shards.
pub(crate) struct RemoteShards {
    client: Client,
}

impl RemoteShards {
    /// The shards of the server at this path.
    pub(crate) fn new(path: &Path, config: Config) -> io::Result<Self> {
        let client = Client::builder(path).config(config).acquire_timeout(PATIENCE).build()?;
        Ok(Self { client })
    }

    /// Opens a stream to a shard, on which it takes commands for itself alone.
    pub(crate) async fn open(&self, shard: usize) -> io::Result<(Session, Stream)> {
        let session = self.client.session(shard).await?;
        match open_on(&session).await {
            Ok(stream) => Ok((session, stream)),
            // It was about to end when it was asked; a new one may live.
            Err(_) if session.end_reason().is_some() => {
                let session = self.client.session(shard).await?;
                let stream = open_on(&session).await?;
                Ok((session, stream))
            }
            Err(error) => Err(error),
        }
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
