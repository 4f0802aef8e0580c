// SPDX-License-Identifier: MIT OR Apache-2.0
//! A core's sessions to the shards of one server.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_lite::future::or;

use super::backoff::Backoff;
use super::connector::{Connector, count_shards};
use super::kept::{Kept, OnChange, SessionState, SessionStatus};
use super::session::Session;
use super::stream::Stream;
use super::wakers::WakerList;
use crate::config::Config;
use crate::error::{ConfigError, Error, Result};
use crate::shm::access::PeerTrust;

/// The most sessions that one core keeps to one shard.
const MOST_SESSIONS: usize = 64;

/// Says how a [`Client`] is to be.
///
/// ```
/// use std::time::Duration;
/// use shmipc_glommio::{Client, Config};
///
/// # glommio::LocalExecutorBuilder::default().spawn(|| async {
/// let client = Client::builder("/run/store.sock")
///     .config(Config::builder().small_messages().build()?)
///     .sessions_per_shard(2)
///     .backoff(Duration::from_millis(10), Duration::from_secs(1))
///     .patience(Duration::from_secs(3))
///     .idle_streams(16)
///     .build()?;
/// # drop(client);
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[must_use]
pub struct ClientBuilder {
    path: PathBuf,
    config: Config,
    trust: Option<PeerTrust>,
    settings: Settings,
}

struct Settings {
    sessions: usize,
    idle_streams: usize,
    backoff: Backoff,
    patience: Duration,
    on_change: Option<OnChange>,
}

impl ClientBuilder {
    /// The configuration of the sessions. Default: [`Config::default`].
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// How many sessions are kept to each shard that is asked for, from 1 to 64. Default: one,
    /// which carries tens of thousands of streams; more give more buffer memory and queues.
    pub fn sessions_per_shard(mut self, sessions: usize) -> Self {
        self.settings.sessions = sessions;
        self
    }

    /// Between attempts to connect a random time passes, `first` at most after the first failure,
    /// twice as much after each further one, up to `most`. Default: 5 ms and 2 s.
    ///
    /// A session that lived for less than `most` counts as a failure too.
    pub fn backoff(mut self, first: Duration, most: Duration) -> Self {
        self.settings.backoff = Backoff { first, most };
        self
    }

    /// How long a caller waits for a session while there is none. Default: five seconds.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.settings.patience = patience;
        self
    }

    /// How many streams of a session are kept for reuse at most. Default: 64.
    pub fn idle_streams(mut self, streams: usize) -> Self {
        self.settings.idle_streams = streams;
        self
    }

    /// Says that the promise behind this token speaks for the server.
    pub fn trusting(mut self, trust: &PeerTrust) -> Self {
        self.trust = Some(*trust);
        self
    }

    /// Calls `tell` with the shard whenever the state of one of its sessions changes.
    pub fn on_change(mut self, tell: impl Fn(usize, &SessionState) + 'static) -> Self {
        self.settings.on_change = Some(Rc::new(tell));
        self
    }

    /// Makes the client. It connects when it is first asked for something.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Limit`], when there would be no session, or too many, or when `first` is
    /// zero or more than `most`.
    pub fn build(self) -> Result<Client> {
        let Self { path, config, trust, settings } = self;
        let out_of_range = |what, value, problem| Err(ConfigError::Limit { what, value, problem });
        if !(1..=MOST_SESSIONS).contains(&settings.sessions) {
            out_of_range("sessions_per_shard", settings.sessions as u64, "not from 1 to 64")?;
        }
        let Backoff { first, most } = settings.backoff;
        if first.is_zero() || first > most {
            let first = u64::try_from(first.as_micros()).unwrap_or(u64::MAX);
            out_of_range("first back-off in microseconds", first, "zero, or more than the most")?;
        }
        let mut connector = Connector::new(config);
        if let Some(trust) = trust {
            connector = connector.trusting(&trust);
        }
        let (shards, count) = Default::default();
        let inner = ClientInner { path: path.into(), connector, settings, shards, count };
        Ok(Client { inner: Rc::new(inner) })
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ClientBuilder")
            .field("path", &self.path)
            .field("sessions_per_shard", &self.settings.sessions)
            .field("backoff", &self.settings.backoff)
            .field("patience", &self.settings.patience)
            .finish_non_exhaustive()
    }
}

/// One core's sessions to the shards of a server: made when they are first asked for, and made
/// again when they end.
///
/// A [`Server`](crate::Server) at `PATH` has as many shards as it has cores; each is reached by the
/// client's own sessions with that core. A server of another kind, at `PATH` alone, has one.
///
/// Belongs to the executor that made it: a thread-per-core program makes one on each core. Cloning
/// gives another handle; when the last one is dropped, the sessions end, except those whose
/// streams, or [sessions](Self::session), are still held elsewhere.
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
    shards: RefCell<BTreeMap<usize, Rc<Shard>>>,
    /// How many shards there are, as far as is known since the last connection.
    count: Rc<Cell<Option<usize>>>,
}

/// The sessions to one shard.
struct Shard {
    sessions: Vec<Rc<Kept>>,
    waiting: Rc<WakerList>,
    /// Which session comes first among equals.
    turn: Cell<usize>,
    /// They fill the places. Dropped, they end.
    _tasks: Vec<glommio::Task<()>>,
}

impl Client {
    /// Starts to describe a client of the server at `path`.
    pub fn builder(path: impl Into<PathBuf>) -> ClientBuilder {
        ClientBuilder {
            path: path.into(),
            config: Config::default(),
            trust: None,
            settings: Settings {
                sessions: 1,
                idle_streams: 64,
                backoff: Backoff { first: Duration::from_millis(5), most: Duration::from_secs(2) },
                patience: Duration::from_secs(5),
                on_change: None,
            },
        }
    }

    /// How many shards the server has. Looked up in the file system after each connection that was
    /// made, and remembered in between.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] with `NotFound`: no server is there, and none was.
    pub fn shard_count(&self) -> Result<usize> {
        if let Some(count) = self.inner.count.get() {
            return Ok(count);
        }
        let count = count_shards(&self.inner.path)?;
        self.inner.count.set(Some(count));
        Ok(count)
    }

    /// A session to a shard: of those that are up, the one with the fewest streams in use.
    ///
    /// Waits while there is none, up to the [patience](ClientBuilder::patience). Cancel-safe: what
    /// was begun goes on for the next who asks.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchShard`], or [`Error::Unavailable`] with the reason.
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
        let (_, stream) = self.pick(shard, |_, session| session.open_stream()).await?;
        Ok(stream)
    }

    /// Runs an exchange with a shard on a stream, and keeps the stream for the next exchange.
    ///
    /// The stream is kept when the exchange ends with `Ok` and has left nothing on it: nothing
    /// unread, neither direction ended. An exchange that fails, or whose future is dropped, closes
    /// its stream, so that an answer which comes late reaches nobody.
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
        let reuse = |kept: &Kept, session: &Session| match kept.take_idle() {
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

    /// How it stands with the sessions to all shards that were asked for.
    pub fn status(&self) -> Vec<SessionStatus> {
        let shards = self.inner.shards.borrow();
        shards.values().flat_map(|shard| &shard.sessions).map(|kept| kept.status()).collect()
    }

    /// Takes something from a session to a shard, as soon as there is one that gives it.
    async fn pick<T>(
        &self,
        index: usize,
        take: impl Fn(&Kept, &Session) -> Result<T>,
    ) -> Result<(Rc<Kept>, T)> {
        let shard = self.shard(index)?;
        let picked = poll_fn(|context| match shard.pick(&take) {
            Picked::Taken(kept, taken) => Poll::Ready(Ok((kept, taken))),
            Picked::Refused(error) => Poll::Ready(Err(error)),
            Picked::Nothing => {
                shard.waiting.register(context, None);
                Poll::Pending
            }
        });
        let too_late = async {
            glommio::timer::sleep(self.inner.settings.patience).await;
            // A server that came back with fewer shards has been counted again by now.
            self.check_index(index)?;
            let last = shard.sessions.iter().find_map(|kept| kept.error());
            let source = Arc::new(last.unwrap_or(Error::DeadlinePassed));
            Err(Error::Unavailable { shard: index, source })
        };
        or(picked, too_late).await
    }

    fn check_index(&self, index: usize) -> Result<()> {
        if self.inner.count.get().is_some_and(|count| index >= count) {
            // The server may have become larger since.
            self.inner.count.set(None);
        }
        match self.shard_count() {
            Ok(count) if index >= count => Err(Error::NoSuchShard { index, count }),
            // A server that is not there may come yet; then it is seen how many it has.
            _ => Ok(()),
        }
    }

    fn shard(&self, index: usize) -> Result<Rc<Shard>> {
        self.check_index(index)?;
        let mut shards = self.inner.shards.borrow_mut();
        let shard = shards.entry(index).or_insert_with(|| Rc::new(self.inner.start_shard(index)));
        Ok(Rc::clone(shard))
    }
}

impl ClientInner {
    fn start_shard(&self, index: usize) -> Shard {
        let settings = &self.settings;
        let waiting = Rc::new(WakerList::default());
        let kept = |number| {
            let tell = settings.on_change.clone();
            Rc::new(Kept::new(index, number, settings.idle_streams, tell))
        };
        let sessions: Vec<_> = (0..settings.sessions).map(kept).collect();
        let fill = |kept: &Rc<Kept>| {
            let (kept, waiting) = (Rc::clone(kept), Rc::clone(&waiting));
            let (connector, path) = (self.connector.clone(), Rc::clone(&self.path));
            let (backoff, count) = (settings.backoff, Rc::clone(&self.count));
            glommio::spawn_local(async move {
                // The callers are in the middle of something when a task begins to run at once.
                futures_lite::future::yield_now().await;
                let forget = || count.set(None);
                kept.fill(&connector, &path, backoff, &waiting, forget).await;
            })
        };
        let tasks = sessions.iter().map(fill).collect();
        Shard { sessions, waiting, turn: Cell::new(0), _tasks: tasks }
    }
}

enum Picked<T> {
    Taken(Rc<Kept>, T),
    /// There are sessions, and none gives it.
    Refused(Error),
    /// There is no session.
    Nothing,
}

impl Shard {
    fn pick<T>(&self, take: impl Fn(&Kept, &Session) -> Result<T>) -> Picked<T> {
        let count = self.sessions.len();
        let turn = self.turn.get();
        let in_turn = (0..count).map(|at| &self.sessions[(turn + at) % count]);
        let mut up: Vec<_> = in_turn.filter_map(|kept| Some((kept, kept.session()?))).collect();
        // Stable: of equals, the next in turn.
        up.sort_by_key(|(kept, session)| kept.busy_streams(session));
        let mut refused = None;
        for (kept, session) in up {
            match take(kept, &session) {
                Ok(taken) => {
                    self.turn.set((turn + 1) % count);
                    return Picked::Taken(Rc::clone(kept), taken);
                }
                Err(error @ Error::TooManyStreams(_)) => refused = Some(error),
                // It ended a moment ago; its task knows by now.
                Err(_) => {}
            }
        }
        refused.map_or(Picked::Nothing, Picked::Refused)
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
