// SPDX-License-Identifier: MIT OR Apache-2.0
//! One session that a client keeps: made again whenever it has ended.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::fmt;
use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use crate::client::backoff::Backoff;
use crate::connect::connector::Connector;
use crate::exec::callback;
use crate::exec::runtime::sleep;
use crate::exec::wakers::{WakerList, WakerSlot};
use crate::session::handle::Session;
use crate::session::stream::Stream;
use shmipc_core::error::{Error, Result};

/// How it stands with a session that a [`Client`](crate::Client) keeps.
///
/// ```
/// use shmipc_glommio::{Client, SessionState};
///
/// # glommio::LocalExecutorBuilder::default().spawn(|| async {
/// let client = Client::builder("/nowhere/store.sock")
///     .on_change(|status| match &status.state {
///         SessionState::Backoff { error, .. } => eprintln!("shard {}: {error}", status.shard),
///         state => println!("shard {}: {state:?}", status.shard),
///     })
///     .acquire_timeout(std::time::Duration::from_millis(10))
///     .build()?;
/// client.open_stream(0).await.unwrap_err();
/// let state = &client.status()[0].state;
/// assert!(!matches!(state, SessionState::Up));
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum SessionState {
    /// A connection is being made.
    Connecting,
    /// It can be used.
    Up,
    /// It has ended, or could not be made; the next attempt comes at a time.
    Backoff {
        /// When the next attempt comes.
        until: Instant,
        /// How many attempts have failed in a row.
        failures: u32,
        /// Why the last session ended, or the last attempt failed.
        error: Error,
    },
    /// The last attempt failed by something that is [not worth a retry](Error::is_retryable), and
    /// no further one is made by itself. Who asks gets the error at once; the first who asks after
    /// a time has it tried again, and waits for that.
    #[non_exhaustive]
    Failed {
        /// From when on asking begins another attempt.
        retry_after: Instant,
        /// Why the attempt failed.
        error: Error,
    },
}

/// One of the sessions that a [`Client`](crate::Client) keeps, at one moment.
///
/// ```
/// use shmipc_glommio::{Client, Config, Listener, SessionState};
///
/// # let path = std::env::temp_dir().join(format!("shmipc-doc-status-{}", std::process::id()));
/// # glommio::LocalExecutorBuilder::default().spawn(|| async move {
/// # let _listener = Listener::bind(&path, Config::default())?;
/// let client = Client::builder(&path).build()?;
/// let stream = client.open_stream(0).await?;
/// let status = &client.status()[0];
/// assert!(matches!(status.state, SessionState::Up));
/// assert_eq!((status.shard, status.open_streams, status.connections), (0, 1, 1));
/// # drop(stream);
/// # shmipc_glommio::Result::<()>::Ok(()) }).unwrap().join().unwrap().unwrap();
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionStatus {
    /// The shard that it leads to.
    pub shard: usize,
    /// Which of the shard's sessions it is, from 0.
    pub slot: usize,
    /// How it stands.
    pub state: SessionState,
    /// Since when it stands like that.
    pub since: Instant,
    /// How often a session came to be here.
    pub connections: u64,
    /// Streams that are open, those that are kept for reuse among them.
    pub open_streams: usize,
    /// Streams that are kept for reuse.
    pub idle_streams: usize,
}

/// Told of every change.
pub(crate) type OnChange = Rc<dyn Fn(&SessionStatus)>;

/// A place for one session, which is filled again when it becomes empty.
pub(crate) struct ReconnectingSession {
    shard: usize,
    slot: usize,
    state: RefCell<State>,
    since: Cell<Instant>,
    connections: Cell<u64>,
    /// Streams of the present session that nobody uses, the latest last.
    idle: RefCell<Vec<Stream>>,
    most_idle: usize,
    on_change: Option<OnChange>,
    /// Whether someone has asked for another attempt, and the task that waits for that.
    is_asked_again: Cell<bool>,
    asked_again: WakerSlot,
}

enum State {
    /// And why there was none before, if there was a try.
    Connecting(Option<Error>),
    Up(Session),
    Backoff {
        until: Instant,
        failures: u32,
        error: Error,
    },
    Failed {
        retry_after: Instant,
        error: Error,
    },
}

impl ReconnectingSession {
    pub(crate) fn new(
        shard: usize,
        slot: usize,
        most_idle: usize,
        on_change: Option<OnChange>,
    ) -> Self {
        Self {
            shard,
            slot,
            state: RefCell::new(State::Connecting(None)),
            since: Cell::new(Instant::now()),
            connections: Cell::new(0),
            idle: RefCell::default(),
            most_idle,
            on_change,
            is_asked_again: Cell::new(false),
            asked_again: WakerSlot::default(),
        }
    }

    /// The session, when there is one that lives.
    pub(crate) fn session(&self) -> Option<Session> {
        match &*self.state.borrow() {
            State::Up(session) if session.end_reason().is_none() => Some(session.clone()),
            _ => None,
        }
    }

    /// Why there is none, if that is known.
    pub(crate) fn error(&self) -> Option<Error> {
        match &*self.state.borrow() {
            State::Connecting(before) => before.clone(),
            State::Up(session) => session.end_reason(),
            State::Backoff { error, .. } | State::Failed { error, .. } => Some(error.clone()),
        }
    }

    /// Why there will be no session unless someone asks for another attempt, and from when on
    /// asking helps.
    pub(crate) fn failure(&self) -> Option<(Instant, Error)> {
        match &*self.state.borrow() {
            State::Failed { retry_after, error } => Some((*retry_after, error.clone())),
            _ => None,
        }
    }

    /// Asks for another attempt after one that failed for good.
    pub(crate) fn ask_again(&self) {
        self.is_asked_again.set(true);
        self.asked_again.wake();
    }

    async fn until_asked_again(&self) {
        self.is_asked_again.set(false);
        poll_fn(|context| {
            if self.is_asked_again.get() {
                return Poll::Ready(());
            }
            self.asked_again.register(context);
            Poll::Pending
        })
        .await;
    }

    /// Streams that somebody uses.
    pub(crate) fn busy_streams(&self, session: &Session) -> usize {
        session.stream_count().saturating_sub(self.idle.borrow().len())
    }

    /// A stream that was used before and can be used again: the one that was used last, whose
    /// memory is warmest.
    pub(crate) fn take_idle(&self) -> Option<Stream> {
        let mut idle = self.idle.borrow_mut();
        while let Some(stream) = idle.pop() {
            if stream.is_reusable() {
                return Some(stream);
            }
        }
        None
    }

    /// Closes a stream that is kept for reuse. Whether there was one.
    pub(crate) fn give_up_idle(&self) -> bool {
        let stream = self.idle.borrow_mut().pop();
        stream.is_some()
    }

    /// Empties the place for good. Gives the session that was there.
    pub(crate) fn give_up(&self) -> Option<Session> {
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        drop(idle);
        match self.state.replace(State::Connecting(None)) {
            State::Up(session) => Some(session),
            State::Connecting(_) | State::Backoff { .. } | State::Failed { .. } => None,
        }
    }

    /// Keeps a stream for the next who needs one, if it is fit for that.
    pub(crate) fn keep(&self, mut stream: Stream) {
        let is_of_present =
            self.session().is_some_and(|session| stream.is_of_session(session.inner()));
        let mut idle = self.idle.borrow_mut();
        if is_of_present && stream.is_reusable() && idle.len() < self.most_idle {
            stream.set_read_deadline(None);
            stream.set_write_deadline(None);
            idle.push(stream);
        }
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let open_streams = match &*self.state.borrow() {
            State::Up(session) => session.stream_count(),
            _ => 0,
        };
        SessionStatus {
            shard: self.shard,
            slot: self.slot,
            state: self.state.borrow().shown(),
            since: self.since.get(),
            connections: self.connections.get(),
            open_streams,
            idle_streams: self.idle.borrow().len(),
        }
    }

    fn change(&self, state: State, waiting: &WakerList) {
        let before = self.state.replace(state);
        self.since.set(Instant::now());
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        // A session that ends here may have handles elsewhere; what is dropped wakes tasks.
        drop((before, idle));
        waiting.wake_all();
        if let Some(tell) = &self.on_change {
            callback::call("on_change", || tell(&self.status()));
        }
    }

    /// Fills the place for as long as the task lives that this is.
    pub(crate) async fn fill(
        &self,
        connector: &Connector,
        path: &Path,
        backoff: Backoff,
        waiting: &WakerList,
        connected: impl Fn(),
    ) {
        let mut failures = 0;
        loop {
            let before = self.error();
            self.change(State::Connecting(before), waiting);
            let error = match self.connect(connector, path).await {
                Ok(session) => {
                    self.connections.set(self.connections.get() + 1);
                    connected();
                    let began = Instant::now();
                    self.change(State::Up(session.clone()), waiting);
                    let reason = session.closed().await;
                    // One that accepts and goes at once is as good as away.
                    failures = if began.elapsed() > backoff.most { 0 } else { failures + 1 };
                    reason
                }
                Err(error) if error.is_retryable() => {
                    failures += 1;
                    error
                }
                Err(error) => {
                    failures += 1;
                    tracing::warn!(shard = self.shard, %error, "connecting is not tried again");
                    let retry_after = Instant::now() + backoff.most;
                    self.change(State::Failed { retry_after, error }, waiting);
                    self.until_asked_again().await;
                    continue;
                }
            };
            let wait = backoff.wait(failures, random());
            tracing::debug!(shard = self.shard, %error, ?wait, "connecting again");
            let until = Instant::now() + wait;
            self.change(State::Backoff { until, failures, error }, waiting);
            sleep(wait).await;
        }
    }

    async fn connect(&self, connector: &Connector, path: &Path) -> Result<Session> {
        connector.connect_door(path, self.shard).await
    }
}

impl State {
    fn shown(&self) -> SessionState {
        match self {
            Self::Connecting(_) => SessionState::Connecting,
            Self::Up(_) => SessionState::Up,
            Self::Backoff { until, failures, error } => {
                let (until, failures, error) = (*until, *failures, error.clone());
                SessionState::Backoff { until, failures, error }
            }
            Self::Failed { retry_after, error } => {
                SessionState::Failed { retry_after: *retry_after, error: error.clone() }
            }
        }
    }
}

impl fmt::Debug for ReconnectingSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.status().fmt(formatter)
    }
}

/// From the standard library's own source of randomness, seeded by the system per thread.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
