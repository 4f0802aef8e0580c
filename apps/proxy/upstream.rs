// SPDX-License-Identifier: MIT OR Apache-2.0
//! Streams to a server, dealt over its shards.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use shmipc_glommio::{Client, Config, Error, SessionState, SessionStatus, Stream};

use crate::tell;

/// How long the first pause between two attempts to connect is at most, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];

/// Opens streams to a server: to a store of several shards, or another proxy.
pub(crate) struct Upstream {
    client: Client,
    /// The shard that is next.
    next: Cell<usize>,
}

impl Upstream {
    /// Whoever wants a stream while there is no session waits, up to `patience`.
    pub(crate) fn new(path: PathBuf, config: Config, patience: Duration) -> Result<Self, Error> {
        let told = Told { path: path.display().to_string(), sessions: RefCell::default() };
        let client = Client::builder(path)
            .config(config)
            .backoff(PAUSES[0], PAUSES[1])
            .acquire_timeout(patience)
            // Each connection has a stream of its own, from its beginning to its end.
            .max_idle_streams(0)
            .on_change(move |status| told.note(status))
            .build()?;
        Ok(Self { client, next: Cell::new(0) })
    }

    /// Waits until the sessions are there, for some time. Why they are not is told as it happens.
    pub(crate) async fn ready(&self) {
        let _ = self.client.ready().await;
    }

    /// Opens a stream to the shard whose turn it is.
    pub(crate) async fn open_stream(&self) -> io::Result<Stream> {
        // A server that is not there yet is waited for at its first shard.
        let count = self.client.shard_count().unwrap_or(1);
        let shard = self.next.get() % count;
        self.next.set(shard + 1);
        match self.client.open_stream(shard).await {
            // It has come back with fewer.
            Err(Error::NoSuchShard { .. }) => Ok(self.client.open_stream(0).await?),
            opened => Ok(opened?),
        }
    }

    /// Ends the sessions, and makes no others.
    pub(crate) async fn close(&self) {
        if let Err(error) = self.client.close().await {
            eprintln!("the server has not taken everything: {error}");
        }
    }
}

/// Tells how it stands with the sessions, when that changes.
struct Told {
    path: String,
    /// What was last said of each, by shard and number.
    sessions: RefCell<BTreeMap<(usize, usize), Said>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    IsConnected,
    IsAway,
}

impl Told {
    fn note(&self, status: &SessionStatus) {
        let (path, shard) = (&self.path, status.shard);
        let mut sessions = self.sessions.borrow_mut();
        let before = sessions.get(&(shard, status.slot)).copied();
        let now = match &status.state {
            SessionState::Up => {
                tell(format_args!("connected with {path}, shard {shard}"));
                Said::IsConnected
            }
            SessionState::Backoff { error, .. } => {
                match before {
                    Some(Said::IsConnected) => {
                        tell(format_args!("the session with {path} has ended: {error}"));
                    }
                    None => tell(format_args!("no session with {path}: {error}")),
                    // Once is enough.
                    Some(Said::IsAway) => {}
                }
                Said::IsAway
            }
            _ => return,
        };
        sessions.insert((shard, status.slot), now);
    }
}
