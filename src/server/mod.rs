// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server with one shard per core.
//!
//! Each shard is a thread with an executor of its own and a listening socket of its own,
//! `PATH.<index>`. Connections to the shared socket, `PATH`, are handed to the shards. The threads
//! share only that hand-over, the order to stop, and counters.
//!
//! - [`builder`]: configuration and start; [`placement`]: which processors the shards run on.
//! - [`acceptor`]: the thread of the shared socket; [`shard_thread`]: the thread of a shard.
//! - [`shard`]: the sessions of one core and their handlers, and how they stop.

pub(crate) mod acceptor;
pub(crate) mod builder;
pub(crate) mod placement;
pub(crate) mod shard;
pub(crate) mod shard_thread;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::exec::contain::panic_text;
use crate::net::bound_socket::BoundSocket;
use crate::preflight::thread_error;
use crate::server::acceptor::{Acceptor, Balance};
use crate::server::builder::ServerBuilder;
use crate::server::shard::ShardStats;
use crate::server::shard_thread::{Common, OnRefused, StopsAll, shard_error, tell_refused};
use shmipc_core::error::{Error, Result};

/// A server with a shard, an executor on a thread of its own, on each of its cores.
///
/// Shard `i` listens on `PATH.i`, for clients that know which shard they want: see
/// [`connect_shard`](crate::Connector::connect_shard). What comes in at `PATH` is dealt over the
/// cores. From then on a session belongs to its core, and nothing of it crosses to another.
///
/// The handle is for the thread that starts and stops it. Dropping it stops the server, and waits.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Config, Connector, Cores, Error, Server};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-server-{}", std::process::id()));
/// // Sends everything back, on two cores.
/// let builder = Server::builder(&path).cores(Cores::Unpinned(2));
/// let server = builder.serve_streams(|mut stream| async move {
///     while let Some(message) = stream.recv().await? {
///         stream.forward(message).await?;
///     }
///     Ok::<_, Error>(())
/// })?;
/// # let at = path.clone();
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move { let path = at;
/// // In another program:
/// let connector = Connector::new(Config::default());
/// let session = connector.connect_shard(&path, 1).await?;
/// let mut stream = session.open_stream()?;
/// let mut loan = stream.alloc(5).await?;
/// loan.write(b"hello");
/// stream.send(loan).await?;
/// assert_eq!(stream.recv().await?.expect("an answer").into_bytes(), "hello");
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
///
/// assert_eq!(server.stats()[1].accepted, 1);
/// server.stop(Duration::from_secs(5))?;
/// assert!(!path.exists());
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
pub struct Server {
    path: PathBuf,
    common: Arc<Common>,
    threads: Vec<JoinHandle<Result<()>>>,
    dealer: Option<JoinHandle<()>>,
}

impl Server {
    /// A server without threads as yet. From here on, dropping it stops what has been started.
    pub(crate) fn new(path: PathBuf, common: Arc<Common>) -> Self {
        Self { path, common, threads: Vec::new(), dealer: None }
    }

    pub(crate) fn add_thread(&mut self, thread: JoinHandle<Result<()>>) {
        self.threads.push(thread);
    }
}

impl Server {
    /// Starts to describe a server at `path`.
    pub fn builder(path: impl Into<PathBuf>) -> ServerBuilder {
        ServerBuilder::new(path.into())
    }

    /// The path of the shared door. That of shard 2 has `.2` behind it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many shards there are.
    pub fn shard_count(&self) -> usize {
        self.common.links.len()
    }

    /// What each shard counted until now.
    pub fn stats(&self) -> Vec<ShardStats> {
        self.common.links.iter().map(|link| link.stats()).collect()
    }

    /// A handle that can stop the server from anywhere.
    pub fn stopper(&self) -> ShutdownHandle {
        ShutdownHandle { common: Arc::clone(&self.common) }
    }

    /// Stops the server, and blocks the thread until it has stopped: accepts no more, gives
    /// sessions up to `patience` to come to their end, closes them, and waits for all threads.
    ///
    /// For handlers it is as if their peers had said that nothing more comes: no more streams, and
    /// at each stream the end behind what has come of it. They answer that, and end as they always
    /// do; when the last stream of a session is dropped, the session is closed. So every request
    /// that was seen is answered. What a peer sends after that finds the stream closed.
    ///
    /// A peer that is in the middle of sending something, which is not answered meanwhile, gets
    /// half of the time to come to its end. A handler gets until the deadline, and half a second
    /// more or so; then it is dropped, and so are the tasks of
    /// [`serve_streams`](crate::Session::serve_streams).
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    pub fn stop(self, patience: Duration) -> Result<()> {
        self.common.stop(patience);
        self.join()
    }

    /// Blocks the thread until the server has stopped, by its [`ShutdownHandle`] or because a shard
    /// did not go on.
    ///
    /// # Errors
    ///
    /// [`Error::Shard`], when one did not go on: its socket failed, or one of its tasks panicked.
    /// The others were stopped in order then.
    pub fn join(mut self) -> Result<()> {
        self.join_all()
    }

    pub(crate) fn join_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (index, thread) in self.threads.drain(..).enumerate() {
            // Panics of its tasks are caught; this would be one of its own.
            let ended =
                thread.join().map_err(|panic| shard_error(index, panic_text(&*panic).into()));
            result = result.and(ended.and_then(|ended| ended));
        }
        if let Some(dealer) = self.dealer.take() {
            // It does not panic; if it did, the doors of the shards were not affected.
            let _ = dealer.join();
        }
        result
    }

    /// Starts to deal what comes at the shared door.
    pub(crate) fn open_shared_door(
        &mut self,
        door: BoundSocket,
        control: UnixStream,
        deal: Balance,
        on_rejected: Option<OnRefused>,
    ) -> Result<()> {
        let BoundSocket { fd, path } = door;
        let failed = |error| Error::os("deal connections", error);
        let inlets = self.common.links.iter().map(|link| Arc::clone(&link.inlet)).collect();
        let dealer = Acceptor::new(fd, control, inlets, deal).map_err(failed)?;
        let count = self.shard_count();
        self.common.add_shared_door(path);
        let stops_all = StopsAll(Arc::clone(&self.common));
        let run = move || {
            let _stops_all = stops_all;
            dealer.run(|error| {
                tracing::warn!(%error, "the shared door");
                tell_refused(on_rejected.as_ref(), count, error);
            });
        };
        let thread = std::thread::Builder::new().name("shmipc-dealer".into()).spawn(run);
        let thread = thread.map_err(|error| match thread_error(error) {
            Ok(too_few) => too_few.into(),
            Err(error) => failed(error),
        });
        self.dealer = Some(thread?);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.threads.is_empty() || self.dealer.is_some() {
            self.common.stop(self.common.patience);
            if let Err(error) = self.join_all() {
                tracing::error!(%error, "server stopped");
            }
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Server")
            .field("path", &self.path)
            .field("shards", &self.stats())
            .finish_non_exhaustive()
    }
}

/// Stops a [`Server`] from any thread, a handler of signals for instance.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Cores, Server};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-stopper-{}", std::process::id()));
/// let server = Server::builder(&path).cores(Cores::Unpinned(1)).serve_streams(|_| async {})?;
/// let stopper = server.stopper();
/// std::thread::spawn(move || stopper.stop(Duration::from_secs(1)));
/// server.join()?;
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Clone)]
pub struct ShutdownHandle {
    common: Arc<Common>,
}

impl ShutdownHandle {
    /// Has the server stop, as [`Server::stop`] does, and does not wait for it. The earliest of
    /// several deadlines holds.
    pub fn stop(&self, patience: Duration) {
        self.common.stop(patience);
    }
}

impl fmt::Debug for ShutdownHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ShutdownHandle").finish_non_exhaustive()
    }
}
