// SPDX-License-Identifier: MIT OR Apache-2.0
//! One core's sessions to the shards of one server.
//!
//! - [`builder`]: how a client is configured.
//! - [`shard_pool`]: the sessions to one shard; [`reconnect`]: makes one of them again whenever it
//!   ends; [`backoff`]: how long to wait between attempts.
//!
//! Nothing is shared between cores: each core has a client of its own.

pub(crate) mod backoff;
pub(crate) mod builder;
pub(crate) mod reconnect;
pub(crate) mod shard_pool;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Instant;

use futures_lite::future::or;

use crate::client::builder::{ClientBuilder, Settings};
use crate::client::reconnect::{ReconnectingSession, SessionStatus};
use crate::client::shard_pool::{Ended, Pick, ShardPool};
use crate::connect::connector::{Connector, count_shards};
use crate::exec::runtime::sleep;
use crate::reactor::poll_loop::Ends;
use crate::session::handle::Session;
use crate::session::local_reactor::LocalReactor;
use crate::session::stream::Stream;
use shmipc_core::error::{Error, Result};

/// While nobody knows how many shards a server has, no more than this are looked for.
const MOST_UNKNOWN_SHARDS: usize = 4096;

/// One core's sessions to the shards of a server: made when they are first asked for, and made
/// again when they end.
///
/// A [`Server`](crate::Server) at `PATH` has as many shards as it has cores; each is reached by the
/// client's own sessions with that core. A server of another kind, at `PATH` alone, has one.
///
/// Belongs to the executor that made it: a thread-per-core program makes one on each core, and
/// calls [`preflight`](crate::preflight) before the first executor. Cloning gives another handle;
/// when the last one is dropped, the sessions end, except those whose streams, or
/// [sessions](Self::session), are still held elsewhere.
///
/// ```
/// use shmipc_glommio::{Client, Cores, Error, Server};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-client-{}", std::process::id()));
/// # let builder = Server::builder(&path).cores(Cores::Unpinned(2));
/// # let server = builder.serve_streams(|mut stream| async move {
/// #     while let Some(message) = stream.recv().await? { stream.forward(message).await?; }
/// #     Ok::<_, Error>(())
/// # })?;
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// let client = Client::builder(&path).build()?;
/// for key in ["apple", "pear", "plum"] {
///     // Whatever client and server agree on.
///     let owner = key.len() % client.shard_count()?;
///     let answer = client
///         .with_stream(owner, async |stream| {
///             let mut loan = stream.alloc(key.len()).await?;
///             loan.write(key.as_bytes());
///             stream.send(loan).await?;
///             stream.recv().await?.ok_or(Error::StreamClosedByPeer)
///         })
///         .await?;
///     assert_eq!(answer.into_bytes(), key);
/// }
/// client.close().await?;
/// # Ok::<_, Error>(()) }).unwrap().join().unwrap().unwrap();
/// # drop(server);
/// # shmipc_glommio::Result::<()>::Ok(())
/// ```
#[derive(Clone)]
pub struct Client {
    inner: Rc<ClientInner>,
}

struct ClientInner {
    path: Rc<Path>,
    connector: Connector,
    settings: Settings,
    shards: RefCell<BTreeMap<usize, Rc<ShardPool>>>,
    /// How many shards there are, as far as is known since the last connection.
    count: Cell<Option<usize>>,
    is_closed: Cell<bool>,
    /// Whether it ends with its executor.
    is_known_to_poller: Cell<bool>,
}

impl Client {
    /// Starts to describe a client of the server at `path`.
    pub fn builder(path: impl Into<PathBuf>) -> ClientBuilder {
        ClientBuilder::new(path.into())
    }

    pub(crate) fn new(path: Rc<Path>, connector: Connector, settings: Settings) -> Self {
        let (shards, count, is_closed, is_known_to_poller) = Default::default();
        let inner =
            ClientInner { path, connector, settings, shards, count, is_closed, is_known_to_poller };
        Self { inner: Rc::new(inner) }
    }

    /// How many shards the server has. Looked up in the file system after each connection that was
    /// made, and remembered in between.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] with `NotFound`: no server is there, and none was.
    pub fn shard_count(&self) -> Result<usize> {
        self.inner.shard_count()
    }

    /// Waits until there is a session to every shard. A program that cannot do without its server
    /// finds out early that way.
    ///
    /// Waits up to the [patience](ClientBuilder::acquire_timeout) for each. Cancel-safe: what was
    /// begun goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] for the first shard that does not come; [`Error::Resource`], when the
    /// memory that all of the sessions take is not there, and memory is
    /// [checked](crate::ConfigBuilder::preflight_memory).
    pub async fn ready(&self) -> Result<()> {
        // How many there are can be seen as soon as there is one.
        self.session(0).await?;
        let count = self.shard_count()?;
        self.inner.check_memory(count - self.inner.shards.borrow().len().min(count))?;
        // All at the same time.
        for index in 1..count {
            self.inner.shard(index)?;
        }
        for index in 1..count {
            self.session(index).await?;
        }
        Ok(())
    }

    /// A session to a shard: of those that are up, the one with the fewest streams in use.
    ///
    /// Waits while there is none, up to the [patience](ClientBuilder::acquire_timeout). When an
    /// attempt to connect fails by something that is not [worth a retry](Error::is_retryable), a
    /// permission for instance, all who wait are told at once, and so are those who ask within the
    /// longest [back-off](ClientBuilder::backoff) after that; who asks later has it tried again.
    /// Cancel-safe: what was begun goes on for the next who asks.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchShard`], [`Error::Unavailable`] with the reason, [`Error::Resource`] when
    /// there is too little memory for the sessions to this shard, or [`Error::SessionClosed`] when
    /// the client was [closed](Self::close).
    pub async fn session(&self, shard: usize) -> Result<Session> {
        let (_, session) = self.pick(shard, |_, session| Ok(session.clone())).await?;
        Ok(session)
    }

    /// Opens a stream to a shard. Waits as [`session`](Self::session) does, and passes over
    /// sessions that have as many streams as they can have.
    ///
    /// # Errors
    ///
    /// As [`session`](Self::session); or [`Error::TooManyStreams`] on every session.
    pub async fn open_stream(&self, shard: usize) -> Result<Stream> {
        let open = |kept: &ReconnectingSession, session: &Session| loop {
            match session.open_stream() {
                // One that is only kept for the next exchange has to make room.
                Err(Error::TooManyStreams(_)) if kept.give_up_idle() => {}
                opened => return opened,
            }
        };
        let (_, stream) = self.pick(shard, open).await?;
        Ok(stream)
    }

    /// Runs an exchange with a shard on a stream, and keeps the stream for the next exchange.
    ///
    /// The stream is kept when the exchange ends with `Ok` and has left nothing on it: nothing
    /// unread, neither direction ended. An exchange that fails, or whose future is dropped, closes
    /// its stream, so that an answer which comes late reaches nobody.
    ///
    /// So an exchange that ends with `Ok` must have read all that belongs to it: what comes after
    /// that would be read by the next one. One that cannot know takes a stream of its own, with
    /// [`open_stream`](Self::open_stream).
    ///
    /// A kept stream may turn out to be closed by the server when it is used, as any stream can.
    ///
    /// # Errors
    ///
    /// As [`open_stream`](Self::open_stream), and those of the exchange.
    pub async fn with_stream<R, E: From<Error>>(
        &self,
        shard: usize,
        exchange: impl AsyncFnOnce(&mut Stream) -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        let reuse = |kept: &ReconnectingSession, session: &Session| match kept.take_idle() {
            Some(stream) => Ok(stream),
            None => session.open_stream(),
        };
        let (kept, mut stream) = self.pick(shard, reuse).await?;
        let result = exchange(&mut stream).await;
        if result.is_ok() {
            kept.keep(stream);
        }
        result
    }

    /// How it stands with the sessions to all shards that were asked for. Of a client that was
    /// [closed](Self::close) there is nothing to tell.
    pub fn status(&self) -> Vec<SessionStatus> {
        let shards: Vec<_> = self.inner.shards.borrow().values().cloned().collect();
        shards.iter().flat_map(|shard| shard.status()).collect()
    }

    /// Makes no more sessions, and [closes](Session::close) those that there are, those among them
    /// that are held elsewhere, all at the same time. Takes no longer than the
    /// [patience](ClientBuilder::acquire_timeout).
    ///
    /// Every handle of this client is closed then: whoever asks it for something, or waits for it,
    /// gets [`Error::SessionClosed`]. When the future is dropped, no more sessions are made all the
    /// same; sessions that were not ended by then are as if the last handle had been dropped.
    ///
    /// # Errors
    ///
    /// [`Error::NotTaken`] of the first session whose server has not taken what was sent to it. All
    /// sessions are over in any case.
    pub async fn close(&self) -> Result<()> {
        self.inner.is_closed.set(true);
        let shards = std::mem::take(&mut *self.inner.shards.borrow_mut());
        let mut sessions = Vec::new();
        for shard in shards.values() {
            shard.end(Ended::Closed);
        }
        for shard in shards.values() {
            sessions.extend(shard.dismantle().await);
        }
        // One limit for all: servers take what was sent at the same time.
        let limit = self.inner.connector.config().settings().limits.close_timeout;
        let limit = limit.min(self.inner.settings.patience);
        let began = Instant::now();
        let mut result = Ok(());
        for session in &sessions {
            let left = limit.saturating_sub(began.elapsed());
            if let Err(error @ Error::NotTaken { .. }) = session.close_within(left).await {
                result = result.and(Err(error));
            }
        }
        result
    }

    /// Takes something from a session to a shard, as soon as there is one that gives it.
    async fn pick<T>(
        &self,
        index: usize,
        take: impl Fn(&ReconnectingSession, &Session) -> Result<T>,
    ) -> Result<(Rc<ReconnectingSession>, T)> {
        let shard = self.inner.shard(index)?;
        let picked = shard.waiting.until(|| {
            if let Some(ended) = shard.ended() {
                return Poll::Ready(Err(ended.error(index)));
            }
            match shard.pick(&take) {
                Pick::Taken(kept, taken) => Poll::Ready(Ok((kept, taken))),
                Pick::Refused(error) => Poll::Ready(Err(error)),
                Pick::Nothing => match shard.failure() {
                    Some(error) => Poll::Ready(Err(self.unavailable(index, error))),
                    None => Poll::Pending,
                },
            }
        });
        let too_late = async {
            sleep(self.inner.settings.patience).await;
            // A server that came back with fewer shards can be counted by now.
            self.inner.check_index(index)?;
            Err(self.unavailable(index, shard.error().unwrap_or(Error::DeadlinePassed)))
        };
        or(picked, too_late).await
    }

    fn unavailable(&self, shard: usize, error: Error) -> Error {
        let server = Rc::as_ref(&self.inner.path).into();
        Error::unavailable(shard, server, error)
    }
}

impl Ends for ClientInner {
    fn end(&self) {
        self.is_closed.set(true);
        let shards = self.shards.take();
        for shard in shards.values() {
            shard.end(Ended::Closed);
            shard.tasks.cancel_soon();
        }
    }

    fn abandon(&self) {
        // Its sessions are known by themselves.
    }
}

impl ClientInner {
    fn shard_count(&self) -> Result<usize> {
        if let Some(count) = self.count.get() {
            return Ok(count);
        }
        let count = count_shards(&self.path)?;
        self.count.set(Some(count));
        // Sessions to shards that are no more would be tried for ever.
        let beyond = self.shards.borrow_mut().split_off(&count);
        for shard in beyond.values() {
            shard.end(Ended::HasOnly(count));
        }
        Ok(count)
    }

    /// A session came to be: it may be with another server than the last one.
    fn count_again(&self) {
        self.count.set(None);
        // When it has gone again, there is nothing to count.
        let _ = self.shard_count();
    }

    fn check_index(&self, index: usize) -> Result<()> {
        if self.is_closed.get() {
            return Err(Error::SessionClosed);
        }
        if self.count.get().is_some_and(|count| index >= count) {
            // The server may have become larger since.
            self.count.set(None);
        }
        let most = match self.shard_count() {
            Ok(count) => count,
            // A server that is not there may come yet; then it is seen how many it has.
            Err(_) => MOST_UNKNOWN_SHARDS,
        };
        if index < most { Ok(()) } else { Err(Error::NoSuchShard { index, count: most }) }
    }

    /// Whether there is the memory that the sessions to so many more shards take.
    fn check_memory(&self, shards: usize) -> Result<()> {
        let config = self.connector.config();
        if !config.settings().checks_memory {
            return Ok(());
        }
        config.footprint(1, shards, self.settings.sessions).check_shared_memory()
    }

    /// The sessions to a shard, which are made from now on if they were not before.
    fn shard(self: &Rc<Self>, index: usize) -> Result<Rc<ShardPool>> {
        self.check_index(index)?;
        if let Some(shard) = self.shards.borrow().get(&index) {
            return Ok(Rc::clone(shard));
        }
        self.check_memory(1)?;
        if !self.is_known_to_poller.replace(true) {
            let ends: Rc<dyn Ends> = self.clone();
            LocalReactor::current().ends_with_executor(Rc::downgrade(&ends));
        }
        let shard = Rc::new(ShardPool::new(index, &self.settings));
        self.shards.borrow_mut().insert(index, Rc::clone(&shard));
        for kept in shard.places() {
            shard.tasks.spawn(self.fill(kept, &shard));
        }
        Ok(shard)
    }

    /// Keeps a place filled.
    fn fill(
        self: &Rc<Self>,
        kept: &Rc<ReconnectingSession>,
        shard: &ShardPool,
    ) -> impl Future<Output = ()> + 'static {
        let (kept, waiting) = (Rc::clone(kept), Rc::clone(&shard.waiting));
        let (connector, path) = (self.connector.clone(), Rc::clone(&self.path));
        let (backoff, client) = (self.settings.backoff, Rc::downgrade(self));
        async move {
            // The callers are in the middle of something when a task begins to run at once.
            futures_lite::future::yield_now().await;
            let connected = || {
                if let Some(client) = Weak::upgrade(&client) {
                    client.count_again();
                }
            };
            kept.fill(&connector, &path, backoff, &waiting, connected).await;
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Client")
            .field("path", &self.inner.path)
            .field("sessions", &self.status())
            .finish_non_exhaustive()
    }
}
